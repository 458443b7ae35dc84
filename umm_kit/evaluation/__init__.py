"""Score a model: what it says and draws, item by item, with an interval on every number."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from umm_kit.data.digits import Digits
from umm_kit.data.shapes import Shapes
from umm_kit.evaluation import generation, understanding
from umm_kit.evaluation.understanding import Examiner
from umm_kit.models.base import Decoding, evaluating
from umm_kit.records import machine, versions, write_json
from umm_kit.statistics import Estimate, bootstrap, bootstrap_ratio, paired_difference

__all__ = ["Evaluation", "compare", "evaluate"]


@dataclass(repr=False)
class Evaluation:
    """Scores of one model on one data set, kept item by item so that two models can be compared on the same items.

    Attributes:
        items: metric -> id -> outcome, a number or a (numerator, denominator) pair for ratios of sums.
        strata: metric -> id -> stratum, for means of means (generation_overall: the six categories).
        chance: metric -> what is reached without looking (most frequent answer, or another item's caption or picture).
        notes: what was not measured, and why.
        record: model, data, seed, decoding, versions, device and wall time (seconds) of the run.
    """

    items: dict[str, dict[str, Any]]
    strata: dict[str, dict[str, str]]
    chance: dict[str, float]
    notes: list[str]
    record: dict[str, Any]

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Metric -> value with its 95 % bootstrap interval; metrics of fewer than two items have none and are left out."""
        out: dict[str, Estimate] = {}
        for metric, outcomes in self.items.items():
            values, strata = list(outcomes.values()), self.strata.get(metric)
            if len(values) > 1 and isinstance(values[0], float | int):
                out[metric] = bootstrap(values, strata=list(strata.values()) if strata else None)
            elif len(values) > 1:
                numerators, denominators = zip(*values, strict=True)
                out[metric] = bootstrap_ratio(numerators, denominators)
        return out

    def __getitem__(self, metric: str) -> Estimate:
        if metric not in self.estimates:
            raise KeyError(f"{metric!r} was not measured; there are {', '.join(self.estimates)}")
        return self.estimates[metric]

    def to_frame(self) -> pd.DataFrame:
        """Columns metric, value, low, high, n (independent items)."""
        rows = [(metric, e.value, e.low, e.high, e.n) for metric, e in self.estimates.items()]
        return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "n"])

    def __repr__(self) -> str:
        width = max(map(len, self.estimates), default=6)
        lines = [f"{self.record['model']} on {self.record['data']}", f"{'metric':{width}}  value  95 % interval   chance      n"]
        for metric, e in self.estimates.items():
            chance = f"{self.chance[metric]:.3f}" if metric in self.chance else ""
            lines.append(f"{metric:{width}}  {e.value:.3f}  [{e.low:.3f}, {e.high:.3f}]  {chance:5}  {e.n:5}")
        return "\n".join([*lines, *(f"not measured or to be read with care: {note}" for note in self.notes)])

    def save(self, path: str | os.PathLike) -> None:
        """Everything as one JSON file, the estimates with it."""
        content = {key: getattr(self, key) for key in ("record", "chance", "notes", "strata", "items")}
        content["metrics"] = self.to_frame().to_dict("records")
        write_json(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Evaluation:
        """What :meth:`save` wrote."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{key: content[key] for key in ("items", "strata", "chance", "notes", "record")})


#: what can be measured on each kind of data, the last on any: task -> measures
TASKS: dict[type, dict[str, list[Callable[[Examiner, Any], None]]]] = {
    Shapes: {
        "captions": [understanding.scene_captions, understanding.heldout_captions],
        "questions": [understanding.scene_questions],
        "generation": [generation.scene_prompts],
        "inpainting": [generation.scene_inpainting],
    },
    Digits: {
        "captions": [understanding.pair_captions],
        "questions": [understanding.digit_questions],
        "generation": [generation.digit_prompts],
        "reconstruction": [generation.reconstruction],
    },
    object: {"captions": [understanding.pair_captions], "reconstruction": [generation.reconstruction]},
}


def evaluate(
    model: Any,
    data: Any,
    tasks: Sequence[str] | None = None,
    n_questions: int = 512,
    n_prompts: int = 64,
    seed: int = 0,
    batch_size: int = 64,
    decoding: Decoding = Decoding(),
    progress: bool = True,
) -> Evaluation:
    """Score understanding and generation of a model on a data set.

    On :class:`Shapes` everything is scored by the exact oracle; on :class:`Digits` drawings are read by an independent
    classifier; on other image-text pairs only captions and reconstructions can be scored, and ``notes`` says so.

    Args:
        model: anything with ``understand``, ``generate`` and ``grid`` (see models/base.py).
        data: what to score on. It alone decides the scenes, questions and prompts, so that two models get the same.
        tasks: some of "captions", "questions", "generation", "inpainting" (scenes), "reconstruction" (other data); default all.
        n_questions: at most so many scenes are asked per kind of question, captioned again under other nuisances, and inpainted.
        n_prompts: prompts per category.
        seed: of decoding. Captions and answers are greedy by default and do not depend on it, nor on ``batch_size`` (but for
            rounding); the noise of drawing is drawn per batch, so pictures depend on both: both are in the record.

    Returns:
        An :class:`Evaluation`; higher is better but for caption_unreadable and reconstruction_error.

    Raises:
        ValueError: unknown tasks, sizes too small, fewer than two items.

    Example:
        >>> uk.evaluate(model, uk.Shapes("test", n=256), tasks=["captions"]).to_frame()  # doctest: +SKIP
    """
    known = next(tasks for kind, tasks in TASKS.items() if isinstance(data, kind))
    wanted = list(known) if tasks is None else list(tasks)
    if unknown := sorted(set(wanted) - set(known)):
        raise ValueError(f"tasks {unknown} cannot be measured on {type(data).__name__}; expected some of {list(known)}")
    if min(n_questions, n_prompts, len(data)) < 2 or batch_size < 1:
        raise ValueError(f"{n_questions=}, {n_prompts=}, {batch_size=}, {len(data)} items; expected at least 2 (batch_size 1)")
    if isinstance(data, Shapes):  # draw the scenes once: each task would draw them again
        data = replace(data, fixed=data.scenes(range(len(data))))
    exam = Examiner(model, decoding, batch_size, seed, progress, n_questions, n_prompts)
    start = time.perf_counter()
    with evaluating(model), torch.no_grad():
        for task in wanted:
            for measure in known[task]:
                try:
                    measure(exam, data)
                except NotImplementedError as error:
                    exam.notes.append(f"{task}: {error}")
    if not isinstance(data, Shapes | Digits):
        exam.notes.append("what pictures show: these images have no known factors, so answers and drawings cannot be scored")
    exam.notes += [f"{metric}: {len(outcomes)} item, no interval" for metric, outcomes in exam.items.items() if len(outcomes) < 2]
    record = {
        "model": str(getattr(model, "name_or_path", "") or type(model).__name__), "data": repr(data), "tasks": wanted,
        "n_questions": n_questions, "n_prompts": n_prompts, "seed": seed, "batch_size": batch_size, "decoding": asdict(decoding),
        "device": machine(), "seconds": round(time.perf_counter() - start, 1),
        "versions": versions(),
    }  # fmt: skip
    return Evaluation(exam.items, exam.strata, exam.chance, exam.notes, record)


def compare(a: Evaluation, b: Evaluation) -> pd.DataFrame:
    """Paired comparison on the same items, for every metric that both have.

    Returns:
        Columns metric, a, b, difference (a - b), low, high, n, p_value (sign-flip test, two-sided, not adjusted for the
        number of metrics).

    Raises:
        ValueError: no metric in common, or a metric was measured on different items.
    """
    rows = []
    for metric in [m for m in a.estimates if m in b.estimates]:
        keys = list(a.items[metric])
        if apart := set(keys) ^ set(b.items[metric]):
            raise ValueError(
                f"{metric} was measured on different items: {len(apart)} ids occur only once, such as {sorted(apart)[:3]}; "
                "evaluate both models on the same data, with the same n_questions and n_prompts"
            )
        strata = [a.strata[metric][key] for key in keys] if metric in a.strata else None
        d = paired_difference([a.items[metric][k] for k in keys], [b.items[metric][k] for k in keys], strata)
        rows.append((metric, a[metric].value, b[metric].value, d.value, d.low, d.high, d.n, d.p_value))
    if not rows:
        raise ValueError(f"the evaluations have no metric in common: {', '.join(a.estimates)} and {', '.join(b.estimates)}")
    return pd.DataFrame(rows, columns=["metric", "a", "b", "difference", "low", "high", "n", "p_value"])
