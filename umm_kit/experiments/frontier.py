"""The trade-off of both tasks (DIVA Fig. 6): their validation losses as the weights of the two losses move against each other.

The paper draws DIVA's frontier below that of its baseline everywhere. Here: the better-known plain arm and DIVA, matched in time
as in :mod:`umm_kit.experiments.diva`, on the same validation items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from umm_kit.data.shapes import Nuisance, Shapes
from umm_kit.experiments import ASYMMETRIC, Ledger, comparison, diva, mine
from umm_kit.features import Features, extract
from umm_kit.models import load
from umm_kit.statistics import hierarchical_bootstrap

ARMS = ("sft_middle", "diva")
LOSSES = ("understanding_loss", "generation_loss")


@dataclass(frozen=True)
class Preset:
    """``ratios``: weight of understanding over that of generation; the two sum to 2. The rest is that of the arms."""

    arms: comparison.Preset
    ratios: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    n: int = 1024


PRESETS = {"tiny": Preset(replace(diva.PRESETS["tiny"], seeds=(100,)))}


def run(preset: Preset, records: str | Path, folder: str | Path, part: tuple[int, int] = (1, 1)) -> str:
    """Train every arm from every base under every ratio that has no record yet."""
    ledger, folder = Ledger(Path(records), preset), Path(folder)
    tuning = Ledger(Path(records).with_name("diva-tuning.jsonl"), preset.arms).records()
    runs: list[tuple[str, str, float, int | None]] = [("base", base, 1.0, None) for base in preset.arms.bases]
    runs += [
        (arm, base, ratio, seed)
        for seed in preset.arms.seeds
        for ratio in preset.ratios
        for arm in ARMS
        for base in preset.arms.bases
    ]
    title = "{1}, {0}, ratio {2:g}, seed {3}".format
    for name, base, ratio, seed in mine(runs, part, lambda run: title(*run) in ledger.records()):
        model, content = load(base, device="cpu"), dict[str, Any]()
        if seed is not None:
            weights = {"understanding_weight": 2 * ratio / (1 + ratio), "generation_weight": 2 / (1 + ratio)}
            arm = replace(diva.ARMS[name], changes={**diva.ARMS[name].changes, **weights})
            rate = diva.STUDY.best_rate(tuning, arm.rate_of, preset.arms)
            steps = diva.STUDY.matched_steps(tuning, name, preset.arms)
            where = folder / f"{Path(base).name}-{name}-{ratio:g}-{seed}"
            model, content = diva.post_train(base, arm, preset.arms, seed, where, rate, steps)
        data = Shapes("validation", n=preset.n, seed=100, nuisance=Nuisance(texture=preset.arms.texture), without=ASYMMETRIC)
        flows = extract(model, data, layers=[0], seed=100, progress=False)
        assert isinstance(flows, Features)
        items = {f"{flow}_loss": [round(float(v), 4) for v in values] for flow, values in flows.losses.items()}
        about = {"arm": name, "base": Path(base).name, "ratio": ratio, "seed": seed}
        ledger.add(title(name, base, ratio, seed), {**about, **content, "items": items})
    found = frontier(ledger.records())
    if found.empty:
        return "no comparison yet: it asks for two base models"
    table = verdicts(ledger.records()).to_string(index=False, float_format="%.4f")
    return f"{found.to_string(index=False, float_format='%.4f')}\n\nIs DIVA's frontier below that of fine-tuning?\n{table}"


def frontier(records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Points of the frontiers: arm, ratio, and both losses in nats per token with 95 % intervals over bases, seeds and items."""
    rows = []
    cells: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for r in records.values():
        cells.setdefault((r["arm"], r["ratio"]), {}).setdefault(r["base"], []).append(r["items"])
    for (arm, ratio), bases in sorted(cells.items()):
        if len(bases) > 1:
            row: dict[str, Any] = {"arm": arm, "ratio": ratio, "runs": sum(map(len, bases.values()))}
            for metric in LOSSES:
                tree = [[np.asarray(items[metric]) for items in runs] for runs in bases.values()]
                e = hierarchical_bootstrap(tree, shared_items=True)
                row |= {metric: e.value, f"{metric}_low": e.low, f"{metric}_high": e.high}
            rows.append(row)
    return pd.DataFrame(rows)


def verdicts(records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Under each ratio: fine-tuning - DIVA in both losses, paired; *better* if both intervals (:func:`comparison.interval`) lie
    above 0, *worse* if both lie below, *a trade* if they lie on different sides, else *undecided*."""
    rows = []
    for ratio in sorted({r["ratio"] for r in records.values()}):
        some = {name: r for name, r in records.items() if r["ratio"] == ratio and r["arm"] in ARMS}
        found = []
        for metric in LOSSES:
            tree = comparison.differences(some, "diva", ARMS[0], metric)
            if len(tree) > 1:
                found.append(comparison.interval(tree)[0])
        if len(found) == len(LOSSES):
            signs = [int(e.low > 0) - int(e.high < 0) for e in found]
            said = {2: "better", -2: "worse"}.get(sum(signs), "a trade" if signs[0] * signs[1] < 0 else "undecided")
            parts = {f"{m}_{k}": getattr(e, k) for m, e in zip(LOSSES, found, strict=True) for k in ("value", "low", "high")}
            rows.append({"ratio": ratio, **parts, "verdict": said})
    return pd.DataFrame(rows)
