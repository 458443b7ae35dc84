"""Does a finding depend on how a model draws? Three families of one width on the same scenes, with as many steps, by one oracle.

The masked models are the shipped ones of that recipe (the joint runs of the atlas); the others are trained here. What is matched
is width, depth, examples and steps: not the learning rate, which was chosen on the masked family and is the same for all, nor
the time, nor the precision (float32 here, where the shipped ones computed in bf16).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from umm_kit.data.shapes import Nuisance, Shapes
from umm_kit.diagnostics.claims import shape_claims
from umm_kit.diagnostics.report import diagnose
from umm_kit.evaluation.drift import drift
from umm_kit.experiments import ASYMMETRIC, Ledger, endpoints, mine
from umm_kit.experiments.atlas import SERIES
from umm_kit.experiments.comparison import differences, interval
from umm_kit.experiments.latentumm import of_drift
from umm_kit.models import load
from umm_kit.trainers.pretrain import AutoregressiveConfig, FlowConfig, train
from umm_kit.trainers.tokenizer import TokenizerConfig
from umm_kit.trainers.tokenizer import train as train_tokenizer

CONFIGS = {"autoregressive": AutoregressiveConfig, "flow": FlowConfig}
#: Losses of drawing are in units of each family, and stay out.
METRICS = ("understanding_loss", "understanding", "generation", "understood_of_drawn", "drawn_of_understood", "survival")


@dataclass(frozen=True)
class Preset:
    """Sizes of the models and of what judges them; ``masked``: (seed, shipped model) of the masked family."""

    arms: tuple[str, ...] = ("masked", "autoregressive", "flow")
    masked: tuple[tuple[int, str], ...] = ((100, "tiny-tight-0"), (101, "tiny-tight-1"))
    seeds: tuple[int, ...] = (100, 101)
    width: int = 48
    layers: int = 4
    heads: int = 2
    steps: int = 1600
    tokenizer_steps: int = 800
    n: int = 1024
    n_prompts: int = 128
    n_diagnosis: int = 256
    n_drift: int = 96
    cycles: int = 8


PRESETS = {"full": Preset()}


def run(preset: Preset, records: str | Path, folder: str | Path, part: tuple[int, int] = (1, 1)) -> str:
    """Train and judge every family with every seed that has no record yet.

    Raises:
        ValueError: a seed for which there is no masked model.
    """
    ledger, folder = Ledger(Path(records), preset), Path(folder)
    title, shipped = "{}, seed {}".format, dict(preset.masked)
    if "masked" in preset.arms and (missing := [seed for seed in preset.seeds if seed not in shipped]):
        raise ValueError(f"no masked model of this recipe is shipped for seed {missing}; expected some of {list(shipped)}")
    wanted = [(family, seed) for seed in preset.seeds for family in preset.arms]
    for family, seed in mine(wanted, part, lambda run: title(*run) in ledger.records()):
        if family == "masked":
            model = load(shipped[seed], device="cpu")
        else:
            model = train(config_of(family, seed, preset, folder)).eval()
        ledger.add(title(family, seed), {"arm": family, "base": str(seed), "seed": seed, **judge(model, preset)})
    return summary(ledger.records())


def config_of(family: str, seed: int, preset: Preset, folder: Path) -> Any:
    """The configuration of one training, after its image tokenizer was made: codes of tiny-masked, or vectors of flow's own."""
    tokenizer = folder / ("vectors" if family == "flow" else "codes")
    if not (tokenizer / "config.json").exists():
        if family == "flow":
            few: Any = {"latent": True, "max_steps": preset.tokenizer_steps, "bf16": False, "disable_tqdm": True, "resume": True}
            train_tokenizer(TokenizerConfig(output_dir=str(tokenizer), **few))
        else:
            load("tiny-masked", device="cpu").image_tokenizer.save_pretrained(tokenizer)
    return CONFIGS[family](
        output_dir=str(folder / f"{family}-{seed}"), image_tokenizer=str(tokenizer), resume=True, hidden_size=preset.width,
        num_layers=preset.layers, num_heads=preset.heads, max_steps=preset.steps, warmup_steps=min(100, preset.steps // 4),
        texture="none", seed=seed, asymmetric=True, eval_strategy="no", disable_tqdm=True, understanding_every=1,
        bf16=False,
    )  # fmt: skip


def judge(model: Any, preset: Preset) -> dict[str, Any]:
    """Both abilities and drift on test items, item by item; diagnosis and claims of Figure 2 on validation scenes."""
    items = endpoints(model, "test", preset.n, preset.n_prompts, 0, "none", progress=False, inpaint=False)
    plain = Nuisance(texture="none")
    walked = Shapes("test", n=preset.n_drift, seed=0, nuisance=plain, without=ASYMMETRIC)
    items |= of_drift(drift(model, walked, preset.cycles, seed=0, layers=(), keep=0, progress=False))
    data = Shapes("validation", n=preset.n_diagnosis, seed=0, nuisance=plain, without=ASYMMETRIC)
    found = diagnose(model, data, mask_ratios=(0.4,), untrained=model.untrained(), seed=0, progress=False)
    sizes = [p.numel() for name, p in model.named_parameters() if not name.startswith("image_tokenizer.")]
    about = {"parameters": sum(sizes), "claims": shape_claims(found).round(5).to_dict("records")}
    about |= {"diagnosis": found.frame[SERIES].round(5).to_dict("split", index=False)}
    return {**about, "items": {metric: items[metric] for metric in METRICS}}


def effects(records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Each family's mean, and its gain over the masked family with its 95 % interval; above 0 = better."""
    rows = []
    for metric in METRICS:
        for family in dict.fromkeys(r["arm"] for r in records.values()):
            own = [np.mean(r["items"][metric]) for r in records.values() if r["arm"] == family]
            row: dict[str, Any] = {"family": family, "metric": metric, "runs": len(own), "mean": float(np.mean(own))}
            tree = [] if family == "masked" else differences(records, family, "masked", metric)
            if len(tree) > 1:
                e, _ = interval([run for runs in tree for run in runs])
                row |= {"n": e.n, "over_masked": e.value, "low": e.low, "high": e.high}
            rows.append(row)
    return pd.DataFrame(rows)


def claims(records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Which shapes of DIVA's Figure 2 a family has: a row per claim, and of each family how many models with each verdict."""
    frames = [pd.DataFrame(r["claims"]).assign(family=r["arm"]) for r in records.values()]
    return pd.concat(frames).pivot_table(index="claim", columns=["family", "verdict"], aggfunc="size", fill_value=0, sort=False)


def summary(records: Mapping[str, Mapping[str, Any]]) -> str:
    return f"{effects(records).to_string(index=False, float_format='%.3f')}\n\n{claims(records).to_string()}"
