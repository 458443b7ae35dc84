"""How meaning drifts while a model goes text -> image -> text -> ...: what survives, for how long, and what goes first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from umm_kit.data.oracle import Oracle
from umm_kit.data.shapes import Shapes
from umm_kit.evaluation import survival
from umm_kit.evaluation.cycles import STARTS, Cycles, Trace, bar, batches, ceilings_of, choose_layers, origins
from umm_kit.evaluation.facts import DENIED, KEPT, FactTable, shifts
from umm_kit.evaluation.survival import ExponentialFit, HalfLife, Survival, cosine, edit_distance, refuse_narrow, retrieval_rank
from umm_kit.models.base import Decoding, evaluating
from umm_kit.models.teachers import Teacher
from umm_kit.records import machine, versions, write_json
from umm_kit.statistics import Estimate

WHOLE = slice(2, None, 2)  # the steps at which a cycle ends


@dataclass(repr=False)
class Drift:
    """What happened to every item over the cycles, and what can be said of it.

    Attributes:
        traces: one per repeat: words, contents, latents and status at every half-step (:class:`Trace`).
        facts: what every origin says; None where the data have no known factors, and then survival cannot be measured.
        ceilings: "true images" (and "round trips", where there is a tokenizer) -> [facts], whether the oracle reads each fact.
        notes: what was not measured, and why.
        record: model, data, settings, versions, device and wall time (seconds) of the run.
    """

    traces: list[Trace]
    cycles: int
    start: str
    ids: list[str]
    facts: FactTable | None
    ceilings: dict[str, np.ndarray]
    notes: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    # A closer look; as a function of a drift, each stands beside the arithmetic.
    by_category = survival.by_category
    transitions = survival.transitions
    first_failure = survival.first_failure
    noise = survival.noise
    private_code = cached_property(survival.private_code)

    def __post_init__(self) -> None:
        self._narrow = ""  # why there are facts, and no survival
        if self.facts is not None:
            _, floor, ceiling = self.shares(slice(None, None, 2))
            try:
                refuse_narrow(float(ceiling.mean()), floor.mean((0, 2)))
            except ValueError as error:  # the run is done and kept
                self._narrow = str(error)
                self.notes = list(dict.fromkeys([*self.notes, f"survival is not measured: {error}."]))
        self.measured = self.facts is not None and not self._narrow  # whether there is a survival to ask for

    # --- facts ---------------------------------------------------------------------------------------------------------

    @property
    def table(self) -> FactTable:
        """The facts, or a ValueError that says why there are none."""
        if self.facts is None:
            raise ValueError(f"{self.record.get('data', 'these data')} have no known factors, so no survival can be measured")
        return self.facts

    @cached_property
    def status(self) -> np.ndarray:
        """[repeats, steps, facts]: 1 kept, 0 lost, -1 denied, in the order of ``facts``; step 0 is the origin itself."""
        return np.stack([np.stack([self.table.status(states) for states in trace.contents]) for trace in self.traces])

    @cached_property
    def _floors(self) -> np.ndarray:
        return np.stack([np.stack([self.table.floor(states) for states in trace.contents]) for trace in self.traces])

    def shares(self, steps: slice, chosen: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each item's counted (or chosen) facts, the shares that its own state keeps, and that others' states keep
        [repeats, steps, items], and the ceiling [items]: the lower one, by its mean, of true images and round trips."""
        counted = self.table.counted if chosen is None else chosen
        best = min(self.ceilings.values(), key=lambda read: self.table.per_item(read, self.table.counted).mean())
        arrays = (self.status[:, steps] == KEPT, self._floors[:, steps], best)
        kept, floor, ceiling = (self.table.per_item(values, counted) for values in arrays)
        return kept, floor, ceiling

    def survival(self, steps: slice = WHOLE, chosen: np.ndarray | None = None) -> Survival:
        """S = (A - F) / (C - F) at these steps, by default the cycles 1 to K; a ValueError where it is not measured."""
        if self._narrow:
            raise ValueError(self._narrow)
        return survival.survival(*self.shares(steps, chosen))

    @cached_property
    def _curve(self) -> Survival:
        return self.survival()

    @property
    def mean_survival(self) -> Estimate:
        """Mean of S(1) ... S(K): the primary number (1 = all that can be kept is kept, 0 = no more than without memory)."""
        return self._curve.mean()

    @property
    def half_life(self) -> HalfLife:
        """The first k with S(k) <= 1/2, in cycles, interpolated; right-censored at the number of cycles run."""
        return self._curve.half_life()

    def exponential_fit(self) -> ExponentialFit:
        """S(k) = exp(-rate k), with a test that says where the curve does not allow it; see :meth:`Survival.exponential_fit`."""
        return self._curve.exponential_fit()

    # --- everything per cycle ------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[int]:
        """Those whose latents were kept."""
        return sorted(self.traces[0].latents)

    def _spaces(self) -> Iterator[tuple[str, list[np.ndarray]]]:
        """Name and vectors [steps, n, d] of each run, for every space in which cosines are taken."""
        for layer in self.layers:
            name = "latent" if layer == self.layers[-1] else f"latent_{layer}"
            yield name, [trace.latents[layer] for trace in self.traces]
        if self.traces[0].teacher is not None:
            yield "teacher", [trace.teacher for trace in self.traces]  # type: ignore[misc]

    def _values(self, step: int) -> Iterator[tuple[str, np.ndarray]]:
        """Metric and its values [repeats, n] at one step. What is compared is compared with the first content of its kind."""
        first = step % 2
        if self.facts is not None:
            kept, floor, ceiling = self.shares(slice(step, step + 1))
            yield from (("recall", kept[:, 0]), ("floor", floor[:, 0]), ("ceiling", ceiling[None]))
            denied = (self.status[:, step] == DENIED) & self.table.counted  # another count may only say less
            yield "contradictions", np.stack([np.bincount(self.table.owner, row, len(self.ids)) for row in denied])
        yield "lost", np.stack([trace.lost[step] for trace in self.traces]).astype(float)
        for name, spaces in self._spaces():
            if step > first:
                yield f"{name}_cosine", np.stack([cosine(v[step], v[first]) for v in spaces])
                yield f"{name}_step_cosine", np.stack([cosine(v[step], v[step - 2]) for v in spaces])
                others = [[cosine(v[step], np.roll(v[first], s, 0)) for s in shifts(len(self.ids))] for v in spaces]
                yield f"{name}_cosine_floor", np.mean(others, axis=1)
                if name == ("teacher" if self.traces[0].teacher is not None else "latent"):
                    yield "retrieval_rank", np.stack([retrieval_rank(v[step], v[first]) for v in spaces])
        if self.traces[0].kinds[step] == "text" and step > first:
            texts = [(trace.texts[first], trace.texts[step]) for trace in self.traces]
            yield "caption_edit_distance", np.array([[edit_distance(a, b) for a, b in zip(*pair, strict=True)] for pair in texts])

    def to_frame(self, half_steps: bool = False) -> pd.DataFrame:
        """Columns cycle, metric, value, low, high, n (items), for cycles 1 to K; with ``half_steps`` for .5, 1, 1.5, ... K.

        A whole cycle ends in content of the kind it started from. recall, floor, ceiling, survival: shares of step-0 facts.
        contradictions: counted step-0 facts that are denied, per item. lost: share of items. Everything else compares with the
        first content of its kind (step 0 at whole cycles): latent_cosine, at the last chosen layer, and latent_step_cosine (to
        one cycle before), teacher_*; *_cosine_floor: with other items' origins. retrieval_rank, by the teacher if there is one,
        else by the latent: the share of other origins that are nearer than one's own (0 = first, .5 = chance).
        caption_edit_distance: words inserted, deleted or changed over the longer text's number of words; from an image, that of
        the caption to the first one.
        """
        steps, rows = slice(1, None) if half_steps else WHOLE, []
        curve = self.survival(steps) if self.measured else None
        for j, step in enumerate(range(2 * self.cycles + 1)[steps]):
            cycle = step / 2 if half_steps else step // 2
            if curve is not None:
                rows.append((cycle, "survival", curve.value[j], curve.low[j], curve.high[j], curve.n))
            values = dict(self._values(step))
            if not half_steps and self.start == "image":
                values |= {m: v for m, v in self._values(step - 1) if m == "caption_edit_distance"}  # of this cycle's caption
            means = {metric: survival.mean(v) for metric, v in values.items()}
            rows += [(cycle, metric, e.value, e.low, e.high, e.n) for metric, e in means.items()]
        return pd.DataFrame(rows, columns=["cycle", "metric", "value", "low", "high", "n"])

    def paths(self, layer: int | None = None) -> np.ndarray:
        """[runs, cycles + 1, items, 2]: where latents of a layer are after each cycle, on a plane fitted at step 0.

        The plane is that of the two leading principal components of the items at step 0; later cycles are only projected.
        """
        chosen = self.layers[-1] if layer is None else layer
        if chosen not in self.layers:
            raise ValueError(f"latents of layer {chosen} were not kept; there are those of {self.layers}")
        whole = np.stack([trace.latents[chosen][::2] for trace in self.traces]).astype(np.float64)
        centre = whole[0, 0].mean(0)  # all runs start there
        axes = np.linalg.svd(whole[0, 0] - centre, full_matrices=False)[2][:2]
        axes = axes * np.where(axes[range(len(axes)), abs(axes).argmax(1)] < 0, -1, 1)[:, None]  # no flips between runs
        return (whole - centre) @ axes.T

    def save(self, path: str | Path) -> None:
        """Write every number per cycle, survival by category, mean survival and half-life, and the record of the run, as JSON."""
        rows, results = self.to_frame().to_dict("records"), {}
        if self.measured:
            rows += self.by_category().assign(metric=lambda f: "survival of " + f.category).to_dict("records")
            named = {"mean_survival": self.mean_survival, "half_life": self.half_life}
            results = {name: {"value": e.value, "interval": list(e.interval)} for name, e in named.items()}
        write_json(path, {"record": self.record, "notes": self.notes, "results": results, "rows": rows})

    def plot(self) -> Figure:
        """Survival, what bounds it, where latents go, and survival by category, against cycles."""
        from umm_kit import plots

        return plots.drift(self.to_frame(), self.by_category() if self.measured else None)

    def __repr__(self) -> str:
        about = f"{self.record.get('model')} on {self.record.get('data')}: {self.cycles} cycles from {self.start}"
        lines = [f"{about}, {len(self.ids)} items, {len(self.traces)} run(s)"]
        if self.measured:
            lines += [f"mean survival {self.mean_survival}", f"half-life     {self.half_life}"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def drift(
    model: Any,
    data: Any,
    cycles: int = 8,
    start: str = "text",
    repeats: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    teacher: Teacher | None = None,
    decoding: Decoding = Decoding(),
    layers: Sequence[int] | None = None,
    keep: int = 8,
    progress: bool = True,
    reader: Any = None,
    writer: Any = None,
) -> Drift:
    """Take a model around text -> image -> text -> ... and measure what is left of the meaning after every cycle.

    S(k) = (A(k) - F(k)) / (C - F(k)), with A the recall of step-0 facts, F the same for other items' origins (what is kept
    without memory, so that a constant model has S = 0), C what the oracle can read at best. A fact is what the origin says of a
    thing: shape, colour, size, and place or relation where a caption says them; from an image, places do not count, for most
    captions leave them out. An item that cannot be read is lost: it scores 0 and stays in every mean. Without known factors
    (any data but :class:`Shapes`) texts, latents and teacher are followed and survival is not.

    Args:
        model: drivable (models/base.py); with flows, its latents are followed, too.
        start: "text" or "image", the kind of step 0.
        repeats: runs with other draws of the noise (from seed, seed + 1, ...).
        teacher: an embedding model of texts and images (:class:`Teacher`).
        layers: whose latents to keep (default: the middle and the last); () for none.
        keep: pictures of so many items stay in memory at each step; of the others only what the oracle reads.
        reader, writer: who reads and who draws in place of the model (anything with ``understand`` or ``generate``).

    Returns:
        A :class:`Drift`; higher survival = less drift.

    Raises:
        ValueError: cycles, repeats or batch_size below 1, fewer than two items, an unknown start, no captions to start from, NaN,
            or data whose facts are so alike that C - F < .2. (Where that comes about in the run, what was run is kept.)

    Example:
        >>> uk.drift(model, uk.Shapes("test", n=256), cycles=8).mean_survival  # doctest: +SKIP
    """
    whole = all(isinstance(number, Integral) for number in (cycles, repeats, batch_size, keep, seed))
    if not whole or min(cycles, repeats, batch_size) < 1 or keep < 0:
        raise ValueError(f"{cycles=}, {repeats=}, {batch_size=}, {keep=}, {seed=}; expected whole numbers from 1 (keep: 0)")
    if teacher is not None and not hasattr(teacher, "embed_text"):
        raise ValueError(f"teacher is a {type(teacher).__name__}; drift makes new texts and pictures, which no table knows: "
                         "expected a model with embed_text and embed_image, such as load_teacher()")  # fmt: skip
    if start not in STARTS:
        raise ValueError(f"start is {start!r}; expected one of {STARTS}")
    if len(data) < 2:
        raise ValueError(f"the data set has {len(data)} item(s); the floor compares items with others: expected at least 2")
    begun, notes, table, ceilings = time.perf_counter(), [], None, {}
    oracle = Oracle(data.image_size, data.nuisance.jitter) if isinstance(data, Shapes) else None
    if isinstance(data, Shapes):  # draw the scenes once
        data = replace(data, fixed=data.scenes(range(len(data))))
    chosen = choose_layers(model, layers)
    around = Cycles(model, reader or model, writer or model, oracle, teacher, chosen, decoding)
    with evaluating(model, around.reader, around.writer), torch.no_grad():
        if oracle is None:
            notes.append("survival, facts and private codes are not measured: these data have no known factors.")
        else:
            table = FactTable(origins(data, start))
            ceilings = ceilings_of(model, data, oracle, table, batch_size, start)
            if len(ceilings) < 2:
                notes.append("the ceiling knows no tokenizer: the model has no image_tokenizer.")
            recall = [table.per_item(v, table.counted).mean() for v in (*ceilings.values(), table.floor(table.origins))]
            refuse_narrow(min(recall[:-1]), recall[-1])  # before any time is spent
        if not chosen:
            notes.append("no latents are followed: the model has no flows, or layers is empty.")
        with bar(repeats * len(data) * (2 * cycles + 1), "cycles", progress) as done:
            runs = [around.run(data, cycles, start, seed + r, batch_size, keep * (not r), done.update) for r in range(repeats)]
    if table is not None:
        for trace in runs:
            trace.contents[0] = list(table.origins)  # what is known of the origin, not what is read in it
    record = {
        "model": Path(getattr(model, "name_or_path", "") or type(model).__name__).name, "data": repr(data), "cycles": cycles,
        "start": start, "repeats": repeats, "seed": seed, "batch_size": batch_size, "decoding": asdict(decoding),
        "layers": chosen, "reader": type(around.reader).__name__, "writer": type(around.writer).__name__,
        "teacher": None if teacher is None else type(teacher).__name__, "device": machine(),
        "seconds": round(time.perf_counter() - begun, 1), "versions": versions(),
    }  # fmt: skip
    ids = [i for batch in batches(data, batch_size, start) for i in batch["ids"]]
    return Drift(runs, cycles, start, ids, table, ceilings, notes, record)
