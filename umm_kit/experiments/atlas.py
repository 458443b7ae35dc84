"""The interference atlas: where does training both tasks hurt, and do the gradient diagnostics see it?

interference(task) = score of a model trained on that task alone - score of the model trained on both,

with the same parameters, start, examples and steps. For a loss the sign is turned round, so that **above 0 means that the
other task hurts**. DIVA takes gradient conflict for interference; the paper has no model trained on one task to check it by.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from umm_kit.data.shapes import Nuisance, Shapes
from umm_kit.diagnostics.report import diagnose
from umm_kit.experiments import ASYMMETRIC, Ledger, endpoints, mine
from umm_kit.models import load
from umm_kit.statistics import Estimate, paired_difference
from umm_kit.trainers.pretrain import PretrainConfig, train

TASKS = {"understanding": (1.0, 0.0), "generation": (0.0, 1.0), "joint": (1.0, 1.0)}  # weights of the two losses
#: What is compared for each task; the first of each decides.
METRICS = {
    "understanding": ("understanding_loss", "understanding", "caption_exact"),
    "generation": ("generation_loss", "generation", "inpainting"),
}
#: What a base model must leave to gain, on its own score of each task: below is too weak to judge, above has no room.
HEADROOM = {"caption_f1": (0.75, 0.9), "generation": (0.4, 0.7)}


SERIES = ["panel", "series", "layer", "value", "low", "high"]  # of a diagnosis, in a record


@dataclass(frozen=True)
class Cell:
    """One place of the grid: what the three models of a seed have in common."""

    width: int
    texture: str
    every: int = 4  # understanding sees every so many-th of the pictures that drawing sees
    steps: int = 1600

    def __str__(self) -> str:
        return f"width {self.width}, {self.texture} texture, every {self.every}, {self.steps} steps"


CELL = [f.name for f in fields(Cell)]
#: With room to gain: reading sees few pictures, or its captions would leave nothing long before drawings are any good.
ROOMY = Cell(96, "none", every=32, steps=4800)


@dataclass(frozen=True)
class Preset:
    """The grid and the sizes of one run of the atlas."""

    cells: tuple[Cell, ...]
    seeds: tuple[int, ...] = (100, 101)
    layers: int = 4
    heads: int = 2
    n: int = 512
    n_prompts: int = 64

    def runs(self) -> Iterator[tuple[Cell, int, str]]:
        """(cell, seed, task), the runs of one cell beside each other; what does not see ``every`` is trained once."""
        seen = set()
        for cell, seed, task in itertools.product(self.cells, self.seeds, TASKS):
            if (what := _what(asdict(cell) | {"seed": seed, "task": task})) not in seen:
                seen.add(what)
                yield cell, seed, task


def _what(run: Mapping[str, Any], task: str = "") -> tuple:
    """What a run is told by: a model of generation alone is the same whatever share of the pictures understanding would see."""
    task = task or run["task"]
    return (task, *(run[name] for name in [*CELL, "seed"] if name != "every" or task != "generation"))


PRESETS = {
    "full": Preset((Cell(48, "none", every=1), *(Cell(w, t) for w in (48, 96) for t in ("none", "high")))),
    "bases": Preset((Cell(48, "none", every=1),), seeds=(100, 101, 102)),  # tiny-tight-0, -1 and -2
    "roomy": Preset((ROOMY,), seeds=(100,)),
    "tiny": Preset((Cell(32, "none", steps=4),), layers=2, n=16, n_prompts=2),
}


def run(preset: Preset, records: str | Path, folder: str | Path, part: tuple[int, int] = (1, 1)) -> str:
    """Train and score every model of the grid that has no record yet."""
    ledger, folder = Ledger(Path(records), preset), Path(folder)
    tokenizer = folder / "image_tokenizer"
    if not (tokenizer / "config.json").exists():
        load("tiny-masked", device="cpu").image_tokenizer.save_pretrained(tokenizer)
    title = "{}, seed {}, {}".format

    def done(run: tuple[Cell, int, str]) -> bool:
        cell, seed, task = run
        return _what(asdict(cell) | {"seed": seed, "task": task}) in map(_what, ledger.records().values())

    for cell, seed, task in mine(list(preset.runs()), part, done):
        understanding, generation = TASKS[task]
        config = PretrainConfig(
            output_dir=str(folder / title(cell, seed, task).replace(", ", "-").replace(" ", "_")),
            image_tokenizer=str(tokenizer), resume=True, hidden_size=cell.width, num_layers=preset.layers,
            num_heads=preset.heads, max_steps=cell.steps, warmup_steps=min(100, cell.steps // 4), texture=cell.texture,
            seed=seed, asymmetric=True, eval_strategy="no", disable_tqdm=True, understanding_every=cell.every, bf16=False,
            understanding_weight=understanding, generation_weight=generation,
        )  # fmt: skip
        model = train(config).eval()
        data = Shapes("validation", n=256, seed=seed, nuisance=Nuisance(texture=cell.texture), without=ASYMMETRIC)
        content: dict[str, Any] = {
            **asdict(cell), "seed": seed, "task": task, "layers": preset.layers,
            "parameters": model.num_parameters(only_trainable=True),
            "items": endpoints(model, "validation", preset.n, preset.n_prompts, 100, cell.texture, progress=False),
        }  # fmt: skip
        if task == "joint":
            found = diagnose(model, data, mask_ratios=(0.4,), seed=seed, progress=False).frame
            content["diagnosis"] = found[SERIES].round(5).to_dict("split", index=False)
        ledger.add(title(cell, seed, task), content)
    return summary(ledger.records())


def summary(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Every comparison, and the verdict on each cell."""
    frame = interference(records)
    table = frame.to_string(index=False, float_format="%.3f")
    return f"{table}\n\nDoes the other task hurt?\n{verdicts(frame).to_string(index=False)}"


def interference(records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row per cell, seed, task and metric: single, joint, interference with its 95 % interval over items, and n.

    ``interference`` > 0: the model that was trained on this task alone is better.
    """
    rows = []
    models = {_what(record): record for record in records.values()}
    for record in sorted((r for r in records.values() if r["task"] == "joint"), key=_place):
        place = _place(record)
        for task, metrics in METRICS.items():
            for metric in metrics if _what(record, task) in models else ():
                alone, joint = (np.array(r["items"][metric]) for r in (models[_what(record, task)], record))
                pair = (joint, alone) if metric.endswith("_loss") else (alone, joint)
                d = paired_difference(*pair)
                rows.append((*place, task, metric, alone.mean(), joint.mean(), d.value, d.low, d.high, d.n))
    columns = [*CELL, "seed", "task", "metric", "alone", "joint", "interference", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


def _place(record: Mapping[str, Any]) -> tuple:
    return tuple(record[name] for name in [*CELL, "seed"])


def verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each cell: does each task hurt the other? By the rule fixed before the runs: *yes* if the interval of the loss
    interference lies above 0 in every seed, *no* if below 0 in every seed, else *undecided*, as it is without two seeds."""
    rows = []
    for cell, group in frame.groupby(CELL):
        row: dict[str, Any] = dict(zip(CELL, cell, strict=True))
        for task, (metric, *_) in METRICS.items():
            mine = group[group.metric == metric]
            said = "yes" if (mine.low > 0).all() else "no" if (mine.high < 0).all() else "undecided"
            row[task] = said if mine.seed.nunique() > 1 else "undecided"
        rows.append(row)
    return pd.DataFrame(rows)


def headroom(records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Does each model of both tasks leave room to gain, and enough to judge? Its scores beside the limits of :data:`HEADROOM`."""
    rows = []
    for record in sorted((r for r in records.values() if r["task"] == "joint"), key=_place):
        for metric, (least, most) in HEADROOM.items():
            value = float(np.mean(record["items"][metric]))
            said = "too weak" if value < least else "no room" if value > most else "yes"
            rows.append((*_place(record), metric, value, least, most, said))
    return pd.DataFrame(rows, columns=[*CELL, "seed", "metric", "value", "least", "most", "headroom"])


def predictors(records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Does a diagnostic of the joint model predict its interference? Spearman's rank correlation over all cells and seeds.

    Each series is averaged over layers. ``low`` and ``high`` are Fisher's 95 % interval, wide with so few models: it says how
    little a grid of this size can show. ``p_value`` is the share of all orders of the models that rank at least as well (either
    sign), of one series alone: with as many series as there are, some will be below .05 by chance.
    """
    frame = interference(records)
    joint = [record for record in records.values() if record["task"] == "joint"]
    means: list[pd.Series] = []
    for record in joint:
        found = pd.DataFrame(record["diagnosis"]["data"], columns=record["diagnosis"]["columns"])
        means.append(found.groupby(["panel", "series"]).value.mean())
    rows = []
    for task, (metric, *_) in METRICS.items():
        mine = frame[frame.metric == metric].set_index([*CELL, "seed"]).interference
        y = np.array([mine.get(_place(r), np.nan) for r in joint])
        for panel, series in sorted(set().union(*(m.index for m in means))):
            x = np.array([m.get((panel, series), np.nan) for m in means])
            seen = np.isfinite(x) & np.isfinite(y)
            if seen.sum() > 3 and np.ptp(x[seen]) > 0:
                r = spearman(x[seen], y[seen])
                rows.append((task, panel, series, r.value, r.low, r.high, orders(x[seen], y[seen]), r.n))
    return pd.DataFrame(rows, columns=["task", "panel", "series", "spearman", "low", "high", "p_value", "n"])


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> Estimate:
    """Rank correlation with the interval of Fisher's z, standard error 1.03 / sqrt(n - 3) (Fieller et al. 1957).

    Where the ranks agree in every place, z is infinite and there is no such interval: its ends are NaN.

    Example:
        >>> spearman([1, 2, 3, 4, 5], [2, 1, 3, 5, 4]).value
        0.7999999999999999
    """
    value, n = float(stats.spearmanr(x, y).statistic), len(x)
    if abs(value) > 1 - 1e-9:
        return Estimate(value, float("nan"), float("nan"), n)
    z, half = np.arctanh(value), 1.96 * 1.03 / np.sqrt(n - 3)
    return Estimate(value, float(np.tanh(z - half)), float(np.tanh(z + half)), n)


def orders(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """p-value of a rank correlation, two-sided: exact over all orders where there are at most 10,000, else over as many drawn.

    Example:
        >>> orders([1, 2, 3, 4], [1, 2, 3, 4])  # 2 of 24 orders rank as well
        0.08333333333333333
    """
    ranks = stats.rankdata(y)
    test = stats.permutation_test(
        (stats.rankdata(x),), lambda a: np.corrcoef(a, ranks)[0, 1], permutation_type="pairings", n_resamples=10_000, rng=0
    )
    return float(test.pvalue)
