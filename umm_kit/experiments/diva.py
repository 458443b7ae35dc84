"""Does DIVA help? Its arms against fine-tuning with as much time, over base models and training seeds, on the same test items.

First ``tune``: what an arm costs, and which learning rate suits it, on validation items and a seed of its own; and what each of
DIVA's terms does there (``CAUSES``). Then ``run``: each arm from each base model with each seed, judged once on test items.

What is compared and what counts was fixed before:

- every arm is the trainer of DIVA with other settings, and sees the same mix of anchors, questions and full drawings;
- plain fine-tuning gets as many steps as fit into the processor time of DIVA's two stages ("time"), or as many examples as both
  stages see, which is less; DIVA **counts only if it beats the better of them**, endpoint by endpoint;
- an effect is a mean of paired differences with a hierarchical bootstrap over base models, training seeds and items.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from umm_kit.data.shapes import Nuisance, Shapes
from umm_kit.experiments import ASYMMETRIC, Ledger, endpoints, mine
from umm_kit.models import load
from umm_kit.models.base import Decoding
from umm_kit.statistics import hierarchical_bootstrap
from umm_kit.trainers.diva import DIVAConfig, DIVATrainer

HEADLINES = ("understanding", "generation")
ENDPOINTS = (*HEADLINES, "understanding_loss", "generation_loss", "understood_of_drawn", "drawn_of_understood")
RATES = (3e-5, 1e-4, 3e-4)  # the first is the paper's for Show-o
#: DIVA's ablations on Show-o, from the worst to the best on all four of its benchmarks (Table 4).
PAPER_ORDER = ("base", "sft", "no_unique", "no_stop_gradient", "diva")


#: A quarter of the usual rounds, for pictures are most of what judging costs: the first base model meets no fewer of the same
#: validation prompts by it ("base" in diva-tuning.jsonl against its joint record in atlas.jsonl).
DECODING = Decoding(steps=8)


@dataclass(frozen=True)
class Arm:
    """One way to train on: what it changes of ``DIVAConfig.tiny``, whose learning rate it takes, and what it is matched in."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    rate_of: str = "diva"
    matched: str = "stages"  # 'stages': as long as DIVA; 'time': as many steps as take that long; 'examples': as many examples

    @property
    def plain(self) -> bool:
        return self.matched != "stages"


_PLAIN: dict[str, Any] = {"shared_weight": 0.0, "unique_weight": 0.0, "ema_decay": 0.0}
ARMS: dict[str, Arm] = {
    "sft_all": Arm({**_PLAIN, "train_all_layers": True}, "sft_all", "time"),
    "sft_middle": Arm(_PLAIN, "sft_middle", "time"),
    "diva": Arm(),
    "sft_all_examples": Arm({**_PLAIN, "train_all_layers": True}, "sft_all", "examples"),
    "sft_middle_examples": Arm(_PLAIN, "sft_middle", "examples"),
    "pcgrad": Arm({**_PLAIN, "project_conflicts": True}, "pcgrad", "time"),
    "reca": Arm({**_PLAIN, "reconstruction_weight": 1.0}, "reca", "time"),
    "no_unique": Arm({"unique_weight": 0.0}),
    "no_stop_gradient": Arm({"stop_gradient": False}),
    "all_layers": Arm({"layers": [1, 2, 3, 4]}),
    "last_layer": Arm({"layers": [4]}),
    "linear": Arm({"encoder": "linear"}),
    "transformer": Arm({"encoder": "transformer"}),
    "contiguous": Arm({"mask_layout": "contiguous"}),
    "equalised": Arm({"equalise_gradients": True}),
    "released": Arm({"variant": "released"}),
    "corrected": Arm({"variant": "corrected"}),
    "shuffled": Arm({"pairs": "shuffled"}),
    "bag_of_words": Arm({"bag_of_words": True}),
    "random_encoders": Arm({"random_encoders": True}),
    "unique_0.4": Arm({"unique_weight": 0.4}),
    "unique_0.8": Arm({"unique_weight": 0.8}),
    "unique_0.06": Arm({"unique_weight": 0.06}),
    "no_shared": Arm({"shared_weight": 0.0}),
    "aligned_warm_up": Arm({"stage1_alignment": True}),
}
TUNED = tuple(dict.fromkeys(arm.rate_of for arm in ARMS.values()))
#: What may be wrong with DIVA, each tried at the middle rate.
CAUSES = ("no_unique", "no_shared", "unique_0.06", "aligned_warm_up", "corrected")
CORE = ("diva", "sft_middle", "sft_all")  # with every training seed; the others with as many as ``Preset.few_seeds``
FINE_TUNING = tuple(name for name, arm in ARMS.items() if arm.plain and name.startswith("sft"))


@dataclass(frozen=True)
class Preset:
    """Base models, training seeds, arms and sizes; ``settings`` go to ``DIVAConfig.tiny`` of every arm."""

    bases: tuple[str, ...] = ("tiny-tight-0", "tiny-tight-1", "tiny-tight-2")
    texture: str = "none"
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    few_seeds: tuple[int, ...] = (0,)
    tuning_seed: int = 100
    rates: tuple[float, ...] = RATES
    arms: tuple[str, ...] = tuple(ARMS)
    n: int = 2048
    n_prompts: int = 342
    n_tuning: int = 512
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def judged(self) -> dict[str, Any]:
        """How every arm is judged, whatever the items."""
        return {"texture": self.texture, "progress": False, "inpaint": False, "decoding": DECODING}

    def runs(self) -> list[tuple[str, str, int | None]]:
        """(arm, base, seed): the bases as they are, the core arms seed by seed, then the others."""
        core = [(arm, base, seed) for seed in self.seeds for arm in self.arms if arm in CORE for base in self.bases]
        rest = [(arm, base, seed) for arm in self.arms if arm not in CORE for seed in self.few_seeds for base in self.bases]
        return [*(("base", base, None) for base in self.bases), *core, *rest]


PRESETS = {"tiny": Preset()}


def config_of(arm: Arm, preset: Preset, seed: int, folder: Path, rate: float, steps: int | None = None) -> DIVAConfig:
    """The configuration of one run; ``steps`` replaces those of a plain arm."""
    if arm.plain and steps is None:
        raise ValueError("a plain arm needs its number of steps")
    more = {"max_steps": steps} if arm.plain else {}
    quiet = {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 50}
    quiet |= {"output_dir": str(folder), "seed": seed, "learning_rate": rate}
    return DIVAConfig.tiny(**{**preset.settings, **arm.changes, **more, **quiet})


def post_train(base: str, arm: Arm, config: DIVAConfig, texture: str) -> tuple[Any, dict[str, Any]]:
    """A base model trained on by one arm, and what the run was: configuration, processor seconds, the end of its log."""
    model = load(base, device="cpu")
    data = Shapes("train", seed=config.seed, nuisance=Nuisance(texture=texture), without=ASYMMETRIC)
    started = time.process_time()
    trainer = DIVATrainer(model, config, data)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    content = {
        "changes": dict(arm.changes), "steps": config.max_steps, "learning_rate": config.learning_rate, "seed": config.seed,
        "processor_seconds": round(time.process_time() - started, 1), "log": [_rounded(entry) for entry in log[-3:]],
    }  # fmt: skip
    return model.eval(), content


def _rounded(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in entry.items()}


# --- tuning ------------------------------------------------------------------------------------------------------------


def _both_stages(preset: Preset) -> int:
    config = config_of(ARMS["diva"], preset, 0, Path("unused"), RATES[0])
    return config.stage1_steps + config.max_steps


def tune(preset: str, records: str | Path, folder: str | Path, part: tuple[int, int] = (1, 1)) -> str:
    """Cost of every tuned arm, then its learning rates, on the first base model, validation items and the tuning seed."""
    chosen, ledger, folder = PRESETS[preset], Ledger(Path(records)), Path(folder)
    base, seed = chosen.bases[0], chosen.tuning_seed
    for name in TUNED if part[0] == 1 else ():  # one after another: what runs beside them would count
        if f"cost of {name}" not in ledger.records():
            config = config_of(ARMS[name], chosen, seed, folder / f"cost-{name}", RATES[1], _both_stages(chosen))
            _, content = post_train(base, ARMS[name], config, chosen.texture)
            ledger.add(f"cost of {name}", {"arm": name, **content})
    trials = sorted(itertools.product(TUNED, chosen.rates), key=lambda trial: trial[0] not in CORE)
    wanted = [("base", 0.0), *((name, chosen.rates[len(chosen.rates) // 2]) for name in CAUSES), *trials]
    for name, rate in mine(wanted, part, lambda run: tuning_name(*run) in ledger.records()):
        if name == "base":
            model, content = load(base, device="cpu"), dict[str, Any]()
        else:
            steps = matched_steps(ledger.records(), name, chosen)
            config = config_of(ARMS[name], chosen, seed, folder / f"{name}-{rate:g}", rate, steps)
            model, content = post_train(base, ARMS[name], config, chosen.texture)
        items = endpoints(
            model, "validation", chosen.n_tuning, chosen.n_tuning // 8, seed, chosen.texture, False, False, DECODING
        )
        ledger.add(tuning_name(name, rate), {"arm": name, "rate": rate, **content, "means": _means(items)})
    return tuning_table(ledger.records()).to_string(index=False, float_format="%.4g")


def tuning_name(arm: str, rate: float) -> str:
    return arm if arm == "base" else f"{arm} at {rate:g}"


def _means(items: Mapping[str, list[float]]) -> dict[str, float]:
    return {metric: round(float(np.mean(values)), 5) for metric, values in items.items()}


def matched_steps(tuning: Mapping[str, Mapping[str, Any]], name: str, preset: Preset) -> int:
    """Steps of a plain arm: of examples, those of both stages of DIVA; of time, what fits into DIVA's processor seconds.

    Raises:
        ValueError: a cost has no record yet.
    """
    arm, stages = ARMS[name], _both_stages(preset)
    if arm.matched != "time":
        return stages
    wanted = [f"cost of {which}" for which in ("diva", arm.rate_of)]
    if missing := [w for w in wanted if w not in tuning]:
        raise ValueError(f"{missing} have no record yet; run 'umm-kit reproduce diva-tuning' (its first part) before")
    diva, own = (tuning[w]["processor_seconds"] for w in wanted)
    return max(1, round(stages * diva / own))


def tuning_table(tuning: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Every trial: arm, rate, steps, both headlines on validation items, their mean, and whether it is the arm's best."""
    rows = [
        (r["arm"], r["rate"], r.get("steps", 0), *(r["means"][metric] for metric in HEADLINES))
        for r in tuning.values()
        if "means" in r
    ]
    frame = pd.DataFrame(rows, columns=["arm", "rate", "steps", *HEADLINES])
    frame["mean"] = frame[list(HEADLINES)].mean(axis=1)
    frame["best"] = frame.groupby("arm")["mean"].transform("max") == frame["mean"]
    return frame


def best_rate(tuning: Mapping[str, Mapping[str, Any]], name: str, preset: Preset) -> float:
    """The learning rate with the highest mean of both headlines; asks for every trial of the arm.

    Raises:
        ValueError: a trial has no record yet.
    """
    trials = {rate: tuning.get(tuning_name(name, rate)) for rate in preset.rates}
    if missing := [rate for rate, record in trials.items() if record is None]:
        raise ValueError(f"{name} was not tried at {missing}; run 'umm-kit reproduce diva-tuning' first")
    return max(trials, key=lambda rate: np.mean([trials[rate]["means"][metric] for metric in HEADLINES]))  # type: ignore[index]


# --- reported runs -----------------------------------------------------------------------------------------------------


def run(preset: str, records: str | Path, folder: str | Path, part: tuple[int, int] = (1, 1)) -> str:
    """Train and judge every arm from every base with every seed that has no record yet."""
    chosen, ledger, folder = PRESETS[preset], Ledger(Path(records)), Path(folder)
    tuning = Ledger(Path(records).with_name(Path(records).stem + "-tuning.jsonl")).records()
    for name, base, seed in mine(chosen.runs(), part, lambda run: run_name(*run) in ledger.records()):
        model, content = load(base, device="cpu"), dict[str, Any]()
        if seed is not None:
            arm = ARMS[name]
            rate, steps = best_rate(tuning, arm.rate_of, chosen), matched_steps(tuning, name, chosen)
            config = config_of(arm, chosen, seed, folder / f"{Path(base).name}-{name}-{seed}", rate, steps)
            model, content = post_train(base, arm, config, chosen.texture)
        items = endpoints(model, "test", chosen.n, chosen.n_prompts, 0, **chosen.judged)
        kept = {metric: items[metric] for metric in ENDPOINTS}
        ledger.add(run_name(name, base, seed), {"arm": name, "base": Path(base).name, "seed": seed, **content, "items": kept})
    return summary(ledger.records())


def run_name(arm: str, base: str, seed: int | None) -> str:
    return f"{Path(base).name}, {arm}" + ("" if seed is None else f", seed {seed}")


def differences(records: Mapping[str, Mapping[str, Any]], arm: str, other: str, metric: str) -> list[list[np.ndarray]]:
    """Item by item, arm - other, by base model and training seed; of a loss the other way round: above 0 = the arm is better.

    "base" is one model for all seeds. Only seeds that both arms have are compared.
    """
    by: dict[tuple[str, str], dict[Any, np.ndarray]] = {}
    for record in records.values():
        by.setdefault((record["base"], record["arm"]), {})[record["seed"]] = np.asarray(record["items"][metric])
    sign, out = -1 if metric.endswith("_loss") else 1, []
    for base in sorted({base for base, _ in by}):
        a, b = by.get((base, arm), {}), by.get((base, other), {})
        seeds = [seed for seed in (a if arm != "base" else b) if other == "base" or arm == "base" or seed in b]
        pairs = [(a[None if arm == "base" else s], b[None if other == "base" else s]) for s in seeds]
        if pairs:
            out.append([sign * (x - y) for x, y in pairs])
    return out


def better_fine_tuning(records: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    """The plain arm with the highest mean of an endpoint (the lowest of a loss): what DIVA must beat."""
    sign = -1 if metric.endswith("_loss") else 1
    found = {
        name: np.mean([np.mean(r["items"][metric]) for r in records.values() if r["arm"] == name])
        for name in FINE_TUNING
        if any(r["arm"] == name for r in records.values())
    }
    if not found:
        raise ValueError(f"no run of {FINE_TUNING} has a record; DIVA cannot be compared with fine-tuning")
    return max(found, key=lambda name: sign * found[name])


def effects(records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """For each arm and endpoint: mean, gain over its base, gain over the better fine-tuning, with 95 % intervals.

    ``detectable``: the smallest gain over fine-tuning that the design had an even chance of four to one to see (power .8).
    ``runs`` counts models; gains are in points of the endpoint (shares, or nats for a loss), above 0 = better.
    """
    rows = []
    arms = list(dict.fromkeys(r["arm"] for r in records.values()))
    for metric in ENDPOINTS:
        rival = better_fine_tuning(records, metric)
        for arm in arms:
            mine = [r for r in records.values() if r["arm"] == arm]
            row: dict[str, Any] = {"arm": arm, "metric": metric, "runs": len(mine), "n": len(mine[0]["items"][metric])}
            row["mean"] = float(np.mean([np.mean(r["items"][metric]) for r in mine]))
            row["rival"] = rival
            for against, other in (("base", "base"), ("sft", rival)):
                tree = [] if arm == other else differences(records, arm, other, metric)
                if len(tree) > 1:
                    e = hierarchical_bootstrap(tree, shared_items=True)
                    row |= {f"over_{against}": e.value, f"{against}_low": e.low, f"{against}_high": e.high}
            if "sft_low" in row:
                row["detectable"] = 2.8 * (row["sft_high"] - row["sft_low"]) / (2 * 1.96)
            rows.append(row)
    return pd.DataFrame(rows)


def verdict(frame: pd.DataFrame, arm: str = "diva") -> pd.DataFrame:
    """Does an arm beat the better fine-tuning? By the rule fixed beforehand: *yes* if the interval lies above 0, *no, it is
    worse* if below, else *undecided*."""
    rows = frame[frame.arm == arm].dropna(subset=["over_sft"])
    said = np.select([rows.sft_low > 0, rows.sft_high < 0], ["yes", "no, it is worse"], "undecided")
    columns = ["metric", "rival", "over_sft", "sft_low", "sft_high", "detectable", "runs", "n"]
    return rows[columns].assign(verdict=said).reset_index(drop=True)


def ablation_order(records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Is each arm of the paper's ablation better than the one before it? Kept, reversed, or undecided, step by step."""
    rows = []
    for metric in HEADLINES:
        names = [better_fine_tuning(records, metric) if name == "sft" else name for name in PAPER_ORDER]
        for lower, higher in itertools.pairwise(names):
            tree = differences(records, higher, lower, metric)
            if len(tree) > 1:
                e = hierarchical_bootstrap(tree, shared_items=True)
                said = "kept" if e.low > 0 else "reversed" if e.high < 0 else "undecided"
                rows.append((metric, lower, higher, e.value, e.low, e.high, said))
    return pd.DataFrame(rows, columns=["metric", "lower", "higher", "difference", "low", "high", "verdict"])


def summary(records: Mapping[str, Mapping[str, Any]]) -> str:
    """What the records say, in words and tables."""
    done = len([r for r in records.values() if r["seed"] is not None])
    try:
        frame = effects(records)
    except ValueError as error:
        return f"{done} trained models so far: {error}"
    lines = [f"{done} trained models.", frame.to_string(index=False, float_format="%.4f")]
    if "over_sft" in frame:
        lines += ["\nDoes DIVA beat the better fine-tuning?", verdict(frame).to_string(index=False, float_format="%.4f")]
        lines += ["\nThe paper's order of ablations:", ablation_order(records).to_string(index=False, float_format="%.4f")]
    return "\n".join(lines)
