"""Arms that train on the same base models, against fine-tuning that had as much time: matching, tuning, running, and what counts.

First :meth:`Study.tune`: what an arm costs, and which learning rate suits it, on validation items and a seed of its own. Then
:meth:`Study.run`: each arm from each base model with each seed, judged once on test items. What counts was fixed before:

- plain fine-tuning gets as many steps as fit into the processor time of the reference arm ("time"), or as many examples as that
  arm sees, which is less; an arm **counts only if it beats the better of them**, endpoint by endpoint;
- an effect is a mean of paired differences with a hierarchical bootstrap over base models, training seeds and items (after the
  runs its interval became wider, see :func:`interval`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from umm_kit.data.shapes import Nuisance, Shapes
from umm_kit.experiments import ASYMMETRIC, Ledger, mine
from umm_kit.models import load
from umm_kit.models.base import Decoding
from umm_kit.statistics import Estimate, hierarchical_bootstrap

Records = Mapping[str, Mapping[str, Any]]

HEADLINES = ("understanding", "generation")
#: A quarter of the usual rounds, for pictures are most of what judging costs: the first base model meets no fewer of the same
#: validation prompts by it ("base" in diva-tuning.jsonl against its joint record in atlas.jsonl).
DECODING = Decoding(steps=8)


@dataclass(frozen=True)
class Arm:
    """One way to train on: what it changes of the configuration, whose learning rate it takes (or a ``rate`` that another study's
    trials have chosen), and what it is matched in."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    rate_of: str = ""
    matched: str = "stages"  # 'stages': its own steps; 'time': as many as take the reference's time; 'examples': as many examples
    rate: float = 0.0

    @property
    def plain(self) -> bool:
        return self.matched != "stages"


@dataclass(frozen=True)
class Preset:
    """Base models, training seeds, arms and sizes; ``settings`` go to the configuration of every arm."""

    bases: tuple[str, ...] = ("tiny-tight-0", "tiny-tight-1", "tiny-tight-2")
    texture: str = "none"
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    few_seeds: tuple[int, ...] = (0,)
    tuning_seed: int = 100
    rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4)  # 3e-5 is that of DIVA's paper for Show-o
    arms: tuple[str, ...] = ()
    n: int = 2048
    n_prompts: int = 342
    n_tuning: int = 512
    settings: Mapping[str, Any] = field(default_factory=dict)

    def data(self, seed: int) -> Shapes:
        """What every arm trains on: scenes without the compositions that were kept from one flow."""
        return Shapes("train", seed=seed, nuisance=Nuisance(texture=self.texture), without=ASYMMETRIC)


@dataclass(frozen=True)
class Study:
    """What is compared, and how an arm is trained and judged.

    Args:
        reference: the arm whose examples and processor time plain fine-tuning gets, and that has to beat it.
        core: arms with every training seed; the others have those of ``Preset.few_seeds``.
        rivals: plain arms; the better one is what counts.
        length: preset -> steps of the reference arm, all stages together.
        train: (base, arm, preset, seed, folder, learning rate, steps or None) -> the model and what the run was.
        judge: (model, split, n, prompts per category, seed, preset) -> metric -> one outcome per item.
        causes: arms that are tried at the middle rate while tuning, to see what each part of the reference does.
        headlines: what the table of trials shows; chosen_by: those whose mean decides between learning rates.
        more: records -> what else the summary says.
    """

    reference: str
    arms: Mapping[str, Arm]
    core: Sequence[str]
    rivals: Sequence[str]
    endpoints: Sequence[str]
    length: Callable[[Preset], int]
    train: Callable[..., tuple[Any, dict[str, Any]]]
    judge: Callable[..., dict[str, list[float]]]
    causes: Sequence[str] = ()
    headlines: Sequence[str] = HEADLINES
    chosen_by: Sequence[str] = HEADLINES
    more: Callable[[Records], str] = lambda records: ""

    def named(self, preset: Preset) -> tuple[str, ...]:
        """The arms of a preset, all of them unless it names some.

        Raises:
            ValueError: one of them is not of the study.
        """
        if unknown := sorted(set(preset.arms) - set(self.arms)):
            raise ValueError(f"no arm {', '.join(unknown)}; expected some of {', '.join(self.arms)}")
        return preset.arms or tuple(self.arms)

    def tuned(self, preset: Preset) -> tuple[str, ...]:
        """Arms that have trials of their own; the core first."""
        names = dict.fromkeys(self.arms[name].rate_of for name in self.named(preset) if not self.arms[name].rate)
        return tuple(sorted(names, key=lambda name: name not in self.core))

    def runs(self, preset: Preset) -> list[tuple[str, str, int | None]]:
        """(arm, base, seed): the bases as they are, the core arms seed by seed, then the others."""
        names = self.named(preset)
        core = [(arm, base, seed) for seed in preset.seeds for arm in names if arm in self.core for base in preset.bases]
        rest = [(arm, base, seed) for arm in names if arm not in self.core for seed in preset.few_seeds for base in preset.bases]
        return [*(("base", base, None) for base in preset.bases), *core, *rest]

    # --- tuning ---

    def tune(self, preset: Preset, records: str | Path, folder: str | Path, part: tuple[int, int] = (1, 1)) -> str:
        """Cost of every arm that is matched in time, then the trials, on the first base, validation items and the tuning seed."""
        ledger, folder = Ledger(Path(records), preset), Path(folder)
        base, seed, middle = preset.bases[0], preset.tuning_seed, preset.rates[len(preset.rates) // 2]
        tuned = self.tuned(preset)
        costly = [self.reference, *(name for name in tuned if self.arms[name].plain)]
        for name in costly if part[0] == 1 else ():  # one after another: what runs beside them would count
            if f"cost of {name}" not in ledger.records():
                steps = self.length(preset) if self.arms[name].plain else None
                _, content = self.train(base, name, preset, seed, folder / f"cost-{name}", middle, steps)
                ledger.add(f"cost of {name}", {"arm": name, **content})
        wanted = [("base", 0.0), *((name, middle) for name in self.causes), *itertools.product(tuned, preset.rates)]
        for name, rate in mine(wanted, part, lambda run: tuning_name(*run) in ledger.records()):
            model, content = load(base, device="cpu"), dict[str, Any]()
            if name != "base":
                steps = self.matched_steps(ledger.records(), name, preset)
                model, content = self.train(base, name, preset, seed, folder / f"{name}-{rate:g}", rate, steps)
            items = self.judge(model, "validation", preset.n_tuning, preset.n_tuning // 8, seed, preset)
            means = {metric: round(float(np.mean(values)), 5) for metric, values in items.items()}
            ledger.add(tuning_name(name, rate), {"arm": name, "rate": rate, **content, "means": means})
        return self.tuning_table(ledger.records()).to_string(index=False, float_format="%.4g")

    def matched_steps(self, tuning: Records, name: str, preset: Preset) -> int | None:
        """Steps of a plain arm: of examples, those of the reference; of time, what fits into its processor seconds. Else None.

        Raises:
            ValueError: a cost has no record yet.
        """
        arm = self.arms[name]
        if not arm.plain:
            return None
        if arm.matched == "examples":
            return self.length(preset)
        wanted = [f"cost of {which}" for which in (self.reference, arm.rate_of)]
        if missing := [w for w in wanted if w not in tuning]:
            raise ValueError(f"{missing} have no record yet; run 'umm-kit reproduce {self.reference}-tuning' (part 1) before")
        reference, own = (tuning[w]["processor_seconds"] for w in wanted)
        return max(1, round(self.length(preset) * reference / own))

    def tuning_table(self, tuning: Records) -> pd.DataFrame:
        """Every trial: arm, rate, steps, headlines on validation items, the mean that decides, and whether it is the best."""
        trials = [r for r in tuning.values() if "means" in r]
        rows = [(r["arm"], r["rate"], r.get("steps", 0), *(r["means"][metric] for metric in self.headlines)) for r in trials]
        frame = pd.DataFrame(rows, columns=["arm", "rate", "steps", *self.headlines])
        frame["mean"] = frame[list(self.chosen_by)].mean(axis=1)
        frame["best"] = frame.groupby("arm")["mean"].transform("max") == frame["mean"]
        return frame

    def best_rate(self, tuning: Records, name: str, preset: Preset) -> float:
        """The learning rate with the highest mean of what it is chosen by; asks for every trial of the arm.

        Raises:
            ValueError: a trial has no record yet.
        """
        trials = {rate: tuning.get(tuning_name(name, rate)) for rate in preset.rates}
        if missing := [rate for rate, record in trials.items() if record is None]:
            raise ValueError(f"{name} was not tried at {missing}; run 'umm-kit reproduce {self.reference}-tuning' first")
        return max(trials, key=lambda rate: np.mean([trials[rate]["means"][metric] for metric in self.chosen_by]))  # type: ignore[index]

    # --- reported runs ---

    def run(self, preset: Preset, records: str | Path, folder: str | Path, part: tuple[int, int] = (1, 1)) -> str:
        """Train and judge every arm from every base with every seed that has no record yet."""
        ledger, folder = Ledger(Path(records), preset), Path(folder)
        tuning = Ledger(Path(records).with_name(Path(records).stem + "-tuning.jsonl"), preset).records()
        for name, base, seed in mine(self.runs(preset), part, lambda run: run_name(*run) in ledger.records()):
            model, content = load(base, device="cpu"), dict[str, Any]()
            if seed is not None:
                rate = self.arms[name].rate or self.best_rate(tuning, self.arms[name].rate_of, preset)
                steps = self.matched_steps(tuning, name, preset)
                where = folder / f"{Path(base).name}-{name}-{seed}"
                model, content = self.train(base, name, preset, seed, where, rate, steps)
            items = self.judge(model, "test", preset.n, preset.n_prompts, 0, preset)
            kept = {metric: items[metric] for metric in self.endpoints}
            about = {"arm": name, "base": Path(base).name, "seed": seed}
            ledger.add(run_name(name, base, seed), {**about, **content, "items": kept})
        return self.summary(ledger.records())

    def effects(self, records: Records) -> pd.DataFrame:
        """:func:`effects` on this study's endpoints, against its rivals."""
        return effects(records, self.endpoints, self.rivals)

    def summary(self, records: Records) -> str:
        """What the records say, in words and tables."""
        done = len([r for r in records.values() if r["seed"] is not None])
        try:
            frame = self.effects(records)
        except ValueError as error:
            return f"{done} trained models so far: {error}"
        lines = [f"{done} trained models.", frame.to_string(index=False, float_format="%.4f")]
        if "over_sft" in frame:
            lines.append(f"\nDoes {self.reference} beat the better fine-tuning?")
            lines.append(verdict(frame, self.reference).to_string(index=False, float_format="%.4f"))
            lines.append(self.more(records))
        return "\n".join(lines)


def tuning_name(arm: str, rate: float) -> str:
    return arm if arm == "base" else f"{arm} at {rate:g}"


def run_name(arm: str, base: str, seed: int | None) -> str:
    return f"{Path(base).name}, {arm}" + ("" if seed is None else f", seed {seed}")


def content_of(config: Any, trainer: Any, started: float, arm: Arm) -> dict[str, Any]:
    """What a run was: changes, steps, rate, processor seconds since ``started``, the end of its log, every round's rollouts."""
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    log = [entry for entry in log[:-3] if "rollout_mean" in entry] + log[-3:]
    return {
        "changes": dict(arm.changes), "steps": config.max_steps, "learning_rate": config.learning_rate, "seed": config.seed,
        "processor_seconds": round(time.process_time() - started, 1),
        "log": [{k: round(v, 5) if isinstance(v, float) else v for k, v in entry.items()} for entry in log],
    }  # fmt: skip


# --- what the records say ----------------------------------------------------------------------------------------------


def differences(records: Records, arm: str, other: str, metric: str) -> list[list[np.ndarray]]:
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


def better(records: Records, metric: str, rivals: Iterable[str]) -> str:
    """The rival with the highest mean of an endpoint (lowest of a loss), of those with most bases: others have just begun."""
    sign, rivals = -1 if metric.endswith("_loss") else 1, tuple(rivals)
    bases = {name: {r["base"] for r in records.values() if r["arm"] == name} for name in rivals}
    most = max(map(len, bases.values()), default=0)
    if not most:
        raise ValueError(f"no run of {rivals} has a record; nothing can be compared with fine-tuning")
    mean = lambda name: sign * np.mean([np.mean(r["items"][metric]) for r in records.values() if r["arm"] == name])  # noqa: E731
    return max((name for name in rivals if len(bases[name]) == most), key=mean)


def interval(tree: Sequence[Any]) -> tuple[Estimate, float]:
    """Mean of paired differences with a 95 % interval, and the gain that the design tells from 0 four times in five (power .8).

    Both are the wider of the bootstrap's over base models, training seeds and items, and the t interval's over the means of base
    models. The rule frozen before the runs had the bootstrap alone; the other was added after them, to the careful side, because
    with three base models it called 15 to 23 % of simulated nulls.
    """
    e = hierarchical_bootstrap(tree, shared_items=True)
    error = stats.sem([np.mean(base) for base in tree])
    half, more = (float(q * error) for q in stats.t.ppf([0.975, 0.8], len(tree) - 1))
    low, high = min(e.low, e.value - half), max(e.high, e.value + half)
    return replace(e, low=low, high=high), max(2.8 * (e.high - e.low) / (2 * 1.96), half + more)


def effects(records: Records, endpoints: Sequence[str], rivals: Sequence[str]) -> pd.DataFrame:
    """For each arm and endpoint: mean, gain over its base, gain over the better fine-tuning, with the 95 % :func:`interval`.

    ``detectable``: the gain over fine-tuning that the design would have told from 0 four times in five (power .8).
    ``runs`` counts models; gains are in points of the endpoint (shares, or nats for a loss), above 0 = better.
    """
    rows = []
    arms = list(dict.fromkeys(r["arm"] for r in records.values()))
    for metric in endpoints:
        rival = better(records, metric, rivals)
        for arm in arms:
            own = [r for r in records.values() if r["arm"] == arm]
            row: dict[str, Any] = {"arm": arm, "metric": metric, "runs": len(own), "n": len(own[0]["items"][metric])}
            row["mean"] = float(np.mean([np.mean(r["items"][metric]) for r in own]))
            row["rival"] = rival
            for against, other in (("base", "base"), ("sft", rival)):
                tree = [] if arm == other else differences(records, arm, other, metric)
                if len(tree) > 1:
                    e, detectable = interval(tree)
                    row |= {f"over_{against}": e.value, f"{against}_low": e.low, f"{against}_high": e.high}
                    row |= {"detectable": detectable} if against == "sft" else {}
            rows.append(row)
    return pd.DataFrame(rows)


def verdict(frame: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Does an arm beat the better fine-tuning? *Yes* if the interval lies above 0, *no, it is worse* if below, else
    *undecided*: the rule fixed beforehand, on an interval that was widened after the runs (:func:`interval`)."""
    rows = frame[frame.arm == arm].dropna(subset=["over_sft"])
    said = np.select([rows.sft_low > 0, rows.sft_high < 0], ["yes", "no, it is worse"], "undecided")
    columns = ["metric", "rival", "over_sft", "sft_low", "sft_high", "detectable", "runs", "n"]
    return rows[columns].assign(verdict=said).reset_index(drop=True)
