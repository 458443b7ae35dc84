"""``uk.diagnose``: every panel of DIVA's Figure 2 on a model of your own, with nulls, intervals and plain sentences."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from umm_kit.diagnostics.geometry import effective_rank_increment, reconstruction_residual
from umm_kit.diagnostics.gradients import _as_it_was, gradient_conflict
from umm_kit.diagnostics.similarity import cka
from umm_kit.diagnostics.spectrum import input_matched, token_spectrum
from umm_kit.features import batches, masks_by_id
from umm_kit.statistics import Estimate, bootstrap

#: In the order of DIVA's Figure 2; similarity is ours.
PANELS = ("gradients", "residual", "rank", "spectrum", "similarity")
COLUMNS = ["panel", "series", "null", "mask_ratio", "layer", "depth", "value", "low", "high", "n"]
_GROUPS = 8  # of the jackknife


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        frame: one row per panel, series, mask ratio and layer: ``value`` with its 95 % interval ``low``, ``high`` over ``n``
            independent items, ``depth`` = layer / number of layers, ``null`` True where the series is a null or a control.
        record: settings, data, versions and seconds.
    """

    frame: pd.DataFrame
    record: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    def save(self, path: str | Path) -> None:
        """One JSON file; :meth:`load` reads it back."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")  # a full disk or an interrupt leaves no half of a file under its name
        frame = json.loads(self.frame.to_json(orient="split", index=False))
        partial.write_text(json.dumps({"record": self.record, "frame": frame}) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Diagnosis:
        content = json.loads(Path(path).read_text())
        frame = pd.DataFrame(content["frame"]["data"], columns=content["frame"]["columns"])
        return cls(frame.astype({"value": float, "low": float, "high": float, "mask_ratio": float}), content["record"])

    def series(self, panel: str, series: str, mask_ratio: float | None = None) -> pd.DataFrame:
        """The rows of one curve, by layer."""
        rows = self.frame[(self.frame.panel == panel) & (self.frame.series == series)]
        rows = rows if mask_ratio is None else rows[rows.mask_ratio == mask_ratio]
        if rows.empty:
            there = self.frame[["panel", "series"]].drop_duplicates().itertuples(index=False, name=None)
            raise ValueError(f"there is no series {series!r} in panel {panel!r}; there are {list(there)}")
        return rows.sort_values(["mask_ratio", "layer"])

    def plot(self, published: bool = True) -> Figure:
        """The panels side by side; ``published`` lays DIVA's curves (read by eye) over them where the axis is comparable."""
        from umm_kit import plots

        return plots.diagnosis(self.frame, published)

    def summary(self) -> str:
        """What the intervals allow to say, a sentence or two per panel."""
        return "\n".join(sentence for panel in self.frame.panel.unique() for sentence in _sentences(self, panel))

    def __repr__(self) -> str:
        return self.summary()


def diagnose(
    model: Any,
    data: Any,
    panels: Sequence[str] = PANELS,
    mask_ratios: Sequence[float] = (0.2, 0.4, 0.6),
    mask_layout: str = "dispersed",
    variance: float = 0.99,
    cutoff: float = 0.5,
    untrained: Any = None,
    batch_size: int = 64,
    gradient_batch: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Diagnosis:
    """Where understanding and generation part, layer by layer (DIVA Sec. 2), each beside what chance or the masks alone give.

    - *gradients*: :func:`~umm_kit.diagnostics.gradients.gradient_conflict`, mask ratio drawn between the given ones.
    - *residual*: share of the pooled generation states outside the directions that hold ``variance`` of the understanding
      states. Nulls: a random subspace of as many dimensions (1 - k/d), and *another mask draw* in the place of
      understanding: what the masks alone move.
    - *rank*: effective-rank increment in percent, rows stacked; null: another mask draw.
    - *spectrum*: share of spatial energy above ``cutoff`` (of Nyquist); controls: the same with both flows' states at the
      visible positions only, and white noise.
    - *similarity*: unbiased linear CKA of the flows at equal layers; null: shuffled ids.

    The states of all layers are pooled as they come: memory is 4 n d (layers + 1) (1 + 2 len(mask_ratios)) bytes. Panels other
    than gradients never ask for a gradient.

    Args:
        untrained: a model of the same shape with random weights; its panels are added as a null, for a structure that
            training did not make.

    Raises:
        ValueError: unknown panel or ratio, fewer than 16 examples, flows whose grids differ.
    """
    started = time.time()
    if unknown := set(panels) - set(PANELS) or not panels:
        raise ValueError(f"panels are {list(panels)}; expected some of {PANELS} ({unknown=})")
    if len(data) < 2 * _GROUPS:
        raise ValueError(f"there are {len(data)} examples; a diagnosis with intervals needs at least {2 * _GROUPS}")
    if not mask_ratios or not all(0 < r < 1 for r in mask_ratios):
        raise ValueError(f"mask ratios are {list(mask_ratios)}; expected numbers in (0, 1)")
    rows: list[dict[str, Any]] = []

    def add(panel: str, series: str, ratio: float, layer: int, estimate: Estimate | float, null: bool = False) -> None:
        e = estimate if isinstance(estimate, Estimate) else Estimate(estimate, np.nan, np.nan, 0)
        depth = layer / model.num_layers
        rows.append(dict(zip(COLUMNS, (panel, series, null, ratio, layer, depth, e.value, e.low, e.high, e.n), strict=True)))

    if "gradients" in panels:
        between = (min(mask_ratios), max(mask_ratios))
        conflict = gradient_conflict(model, data, gradient_batch, between, mask_layout, seed, progress)
        for number, name in enumerate(conflict.layers, start=1):
            for metric, value in conflict.estimates(name).items():
                add("gradients", metric, np.nan, number, value, metric.startswith("within"))
    if set(panels) - {"gradients"}:
        states, roughness = _pass(model, data, panels, mask_ratios, mask_layout, cutoff, batch_size, seed, progress)
        for layer, ratio, u, g, again in _layers(states, mask_ratios):
            _geometry(add, panels, layer, ratio, u, g, again, variance, seed)
        for (series, ratio, layer), values in roughness.items():
            finite = np.concatenate(values)
            finite = finite[np.isfinite(finite)]
            if len(finite) > 1:
                control = series.endswith(("visible", "noise"))
                add("spectrum", series, ratio, layer, bootstrap(finite) if finite.any() else float(0), control)
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame = frame.sort_values("panel", key=lambda names: names.map(PANELS.index), kind="stable", ignore_index=True)
    if untrained is not None:
        others = (panels, mask_ratios, mask_layout, variance, cutoff, None, batch_size, gradient_batch, seed, progress)
        null = diagnose(untrained, data, *others).frame.query("not null")
        frame = pd.concat([frame, null.assign(series=null.series + ", untrained", null=True)], ignore_index=True)
    device = f"{next(model.parameters()).device}, {torch.get_num_threads()} threads"
    record = {
        "model": f"{type(model).__name__}, {model.num_layers} layers of width {model.hidden_size}",
        "data": repr(data), "n": len(data), "mask_ratios": list(mask_ratios), "mask_layout": mask_layout,
        "variance": variance, "cutoff": cutoff, "transform": "dct", "batch_size": batch_size,
        "gradient_batch": gradient_batch, "seed": seed, "device": device, "seconds": round(time.time() - started, 1),
    }  # fmt: skip
    return Diagnosis(frame, record)


@torch.no_grad()
def _pass(
    model: Any, data: Any, panels: Sequence[str], ratios: Sequence[float], layout: str, cutoff: float, batch_size: int, seed: int,
    progress: bool,
) -> tuple[dict[tuple[str, float, int], list[Tensor]], dict[tuple[str, float, int], list[np.ndarray]]]:  # fmt: skip
    """One walk over the data: pooled states, and each example's high-frequency share, by (flow, mask ratio, layer)."""
    states: dict[tuple[str, float, int], list[Tensor]] = {}
    rough: dict[tuple[str, float, int], list[np.ndarray]] = {}

    def share(name: str, ratio: float, layer: int, H: Tensor, grid: tuple[int, int]) -> None:
        with warnings.catch_warnings():  # layer 0 of the understanding flow may be constant; such maps are left out
            warnings.simplefilter("ignore", UserWarning)
            spectrum = token_spectrum(H, grid)
            rough.setdefault((name, ratio, layer), []).append(spectrum.above(cutoff).numpy())
            rough["white noise", np.nan, layer] = [np.full(2, spectrum.white(cutoff))]

    with _as_it_was(model):
        total = -(-len(data) // batch_size)
        for batch in tqdm(batches(data, batch_size), total=total, desc="flows", disable=not progress, delay=2):
            u = model.understanding_flow(batch)
            for layer, H in u.hidden_states.items():
                states.setdefault(("understanding", np.nan, layer), []).append(H.float().mean(1).cpu())
                if "spectrum" in panels:
                    share("understanding", np.nan, layer, H, u.grid)
            for ratio in ratios:
                for name, draw in (("generation", seed), ("another draw", seed + 1)):
                    mask = masks_by_id(batch["ids"], model.grid, ratio, layout, draw)
                    g = model.generation_flow(batch, mask=mask)
                    for layer, H in g.hidden_states.items():
                        states.setdefault((name, ratio, layer), []).append(H.float().mean(1).cpu())
                        if "spectrum" in panels and name == "generation":
                            share("generation", ratio, layer, H, g.grid)
                            if g.grid == u.grid:
                                for flow, full in (("understanding", u.hidden_states[layer]), ("generation", H)):
                                    share(f"{flow}, visible", ratio, layer, input_matched(full, mask, g.grid), g.grid)
    return states, rough


def _layers(
    states: dict[tuple[str, float, int], list[Tensor]], ratios: Sequence[float]
) -> Iterator[tuple[int, float, Tensor, Tensor, Tensor]]:
    for layer in sorted({layer for _, _, layer in states}):
        u = torch.cat(states["understanding", np.nan, layer])
        for ratio in ratios:
            yield layer, ratio, u, torch.cat(states["generation", ratio, layer]), torch.cat(states["another draw", ratio, layer])


def _geometry(
    add: Callable,
    panels: Sequence[str],
    layer: int,
    ratio: float,
    u: Tensor,
    g: Tensor,
    again: Tensor,
    variance: float,
    seed: int,
) -> None:
    """The panels that need pooled states alone."""
    if "residual" in panels:
        residual = reconstruction_residual(g, u, variance)
        add("residual", "residual", ratio, layer, residual.estimate())
        add("residual", "random subspace", ratio, layer, 1 - residual.components / g.shape[1], null=True)
        add("residual", "another mask draw", ratio, layer, reconstruction_residual(g, again, variance).estimate(), null=True)
    if "rank" in panels:
        add("rank", "increment", ratio, layer, jackknife(lambda k: effective_rank_increment(g[k], u[k]).percent, len(g)))
        add("rank", "another mask draw", ratio, layer, effective_rank_increment(g, again).percent, null=True)
    if "similarity" in panels:
        add("similarity", "cka", ratio, layer, jackknife(lambda k: cka(g[k], u[k]), len(g)))
        shuffled = torch.randperm(len(u), generator=torch.Generator().manual_seed(seed))
        add("similarity", "shuffled ids", ratio, layer, cka(g, u[shuffled]), null=True)


def jackknife(statistic: Callable[[Tensor], float], n: int, groups: int = _GROUPS) -> Estimate:
    """A statistic of all n examples with its 95 % interval from leaving out one group at a time.

    For what resampling with replacement would bias: a repeated row adds no direction, so bootstrapped ranks are too low.
    SE^2 = (m - 1) / m sum_j (t_(j) - mean)^2 over m groups; t interval with m - 1 degrees of freedom.

    Example:
        >>> values = torch.arange(80.0)
        >>> e = jackknife(lambda k: float(values[k].mean()), 80)
        >>> e.low < 39.5 < e.high
        True
    """
    everyone = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    parts = everyone.tensor_split(groups)
    without = np.array([statistic(torch.cat([p for k, p in enumerate(parts) if k != j])) for j in range(groups)])
    error = np.sqrt((groups - 1) / groups * ((without - without.mean()) ** 2).sum()) * stats.t.ppf(0.975, groups - 1)
    value = float(statistic(everyone))
    return Estimate(value, float(value - error), float(value + error), n)


_WORDS = {
    ("gradients", "conflict"): "Gradient conflict 1 - cos (1 is orthogonal)",
    ("residual", "residual"): "The share of the generation states outside the understanding subspace",
    ("rank", "increment"): "The effective-rank increment in percent",
    ("spectrum", "generation"): "The high-frequency share of the generation flow",
    ("spectrum", "understanding"): "The high-frequency share of the understanding flow",
    ("similarity", "cka"): "CKA of the two flows",
}
_NULLS = ("random subspace", "another mask draw", "shuffled ids")


def _sentences(found: Diagnosis, panel: str) -> Iterator[str]:
    """Where a curve is highest and lowest, if the intervals tell these apart, and at how many layers it leaves its nulls."""
    mine = found.frame[found.frame.panel == panel]
    for name in mine.series.unique():
        if (panel, name) not in _WORDS:
            continue
        curve = found.series(panel, name)
        ratio = curve.mask_ratio.iloc[len(curve) // 2]
        curve = curve if np.isnan(ratio) else curve[curve.mask_ratio == ratio]
        words = _WORDS[panel, name] + ("" if np.isnan(ratio) else f", mask ratio {ratio:g},")
        top, bottom = (curve.iloc[int(k)] for k in (curve.value.argmax(), curve.value.argmin()))
        high, low = (f"{row.value:.3g} [{row.low:.3g}, {row.high:.3g}] at layer {row.layer}" for row in (top, bottom))
        if top.low > bottom.high:
            yield f"{words} is highest with {high} and lowest with {low}."
        else:
            yield f"{words} runs from {low} to {high}: the intervals do not tell these apart."
        for null in _NULLS:
            beside = mine[(mine.series == null) & ((mine.mask_ratio == ratio) | mine.mask_ratio.isna())].set_index("layer")
            if len(beside):
                values = beside.value.reindex(curve.layer).to_numpy()
                outside = int(((values > curve.high) | (values < curve.low)).sum())
                yield f"  Its interval leaves out what '{null}' gives at {outside} of {len(curve)} layers."
