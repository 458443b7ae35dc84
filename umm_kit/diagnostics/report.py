"""``uk.diagnose``: every panel of DIVA's Figure 2 on a model of your own, with nulls, intervals and plain sentences."""

from __future__ import annotations

import json
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
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
from umm_kit.diagnostics.gradients import gradient_conflict
from umm_kit.diagnostics.similarity import cka
from umm_kit.diagnostics.spectrum import filling, token_spectrum
from umm_kit.features import batches, evaluating, masks_by_id
from umm_kit.records import machine, versions, write_json
from umm_kit.statistics import Estimate, bootstrap

#: In the order of DIVA's Figure 2; similarity is ours.
PANELS = ("gradients", "residual", "rank", "spectrum", "similarity")
COLUMNS = ["panel", "series", "null", "mask_ratio", "layer", "depth", "value", "low", "high", "n"]
_GROUPS = 8  # of the jackknife
_NULLS = ("random subspace", "another mask draw", "shuffled ids")  # what chance or the masks alone give

#: panel, series, is it a null, mask ratio, layer, value
Row = tuple[str, str, bool, float, int, Estimate | float]
Collected = Mapping[tuple[str, float, int], list[Tensor]]  # by series, mask ratio and layer, a tensor per batch


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        frame: one row per panel, series, mask ratio and layer: ``value`` with its 95 % interval ``low``, ``high`` over ``n``
            independent items, ``depth`` = layer / number of layers, ``null`` True where the series is a null or a control.
        record: settings, data, versions, device and seconds.
    """

    frame: pd.DataFrame
    record: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    def save(self, path: str | Path) -> None:
        """One JSON file; :meth:`load` reads it back."""
        write_json(
            path, {"record": self.record, "frame": json.loads(self.frame.to_json(orient="split", index=False))}, indent=None
        )

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
      visible positions only (where the flows have one grid), and white noise.
    - *similarity*: unbiased linear CKA of the flows at equal layers; null: shuffled ids.

    The states of all layers are pooled as they come: memory is 4 n d (layers + 1) (1 + 2 len(mask_ratios)) bytes. Panels other
    than gradients never ask for a gradient.

    Args:
        untrained: a model of the same shape with random weights. All that is measured on the model has a twin from it, "...,
            untrained", as a null: what training did not make. So have the controls: the within-task cosines tell whether its
            gradients are signal, the spectra at visible positions whether fine patterns there are learned.

    Raises:
        ValueError: unknown panel or ratio, fewer than 16 examples, an untrained model of another shape.
    """
    started = time.perf_counter()
    if not panels or not set(panels) <= set(PANELS):
        raise ValueError(f"panels are {list(panels)}; expected some of {PANELS}")
    if len(data) < 2 * _GROUPS:
        raise ValueError(f"there are {len(data)} examples; a diagnosis with intervals needs at least {2 * _GROUPS}")
    if not mask_ratios or not all(0 < r < 1 for r in mask_ratios) or len(set(mask_ratios)) < len(mask_ratios):
        raise ValueError(f"mask ratios are {list(mask_ratios)}; expected different numbers in (0, 1)")
    if untrained is not None and _shape(untrained) != _shape(model):
        raise ValueError(f"the untrained model has {_shape(untrained)}, the model {_shape(model)}; expected the same")
    settings: dict[str, Any] = {
        "panels": list(panels), "mask_ratios": list(mask_ratios), "mask_layout": mask_layout, "variance": variance,
        "cutoff": cutoff, "batch_size": batch_size, "gradient_batch": gradient_batch, "seed": seed,
    }  # fmt: skip
    frame = _measured(model, data, settings, progress)
    if untrained is not None:
        null = _measured(untrained, data, settings, progress)
        null = null[~null.series.isin([*_NULLS, "white noise"])]  # all else, controls included, rests on the weights
        frame = pd.concat([frame, null.assign(series=null.series + ", untrained", null=True)], ignore_index=True)
    record = {
        "model": f"{type(model).__name__}, {_shape(model)}", "untrained": untrained is not None, "data": repr(data),
        "n": len(data), **settings, "transform": "dct", "versions": versions(), "device": machine(),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    return Diagnosis(frame, record)


def _shape(model: Any) -> str:
    return f"{model.num_layers} layers of width {model.hidden_size}"


def _measured(model: Any, data: Any, settings: Mapping[str, Any], progress: bool) -> pd.DataFrame:
    """All panels of one model."""
    rows: list[Row] = []
    if "gradients" in settings["panels"]:
        between = (min(settings["mask_ratios"]), max(settings["mask_ratios"]))
        options = (settings["gradient_batch"], between, settings["mask_layout"], settings["seed"], progress)
        conflict = gradient_conflict(model, data, *options)
        numbers = {name: number for number, name in enumerate(model.layer_parameters(), start=1)}  # frozen ones count too
        for name in conflict.layers:
            for metric, estimate in conflict.estimates(name).items():
                rows.append(("gradients", metric, metric.startswith("within"), np.nan, numbers[name], estimate))
    if set(settings["panels"]) - {"gradients"}:
        states, shares = _pass(model, data, settings, progress)
        rows += _geometry(states, settings)
        rows += _spectrum(shares)
    return _frame(rows, model.num_layers)


def _frame(rows: Sequence[Row], layers: int) -> pd.DataFrame:
    """Rows in the order of the panels; what comes without an interval (a null that is one number) has NaN there."""
    full = [
        (panel, series, null, ratio, layer, layer / layers, *(astuple(e) if isinstance(e, Estimate) else (e, np.nan, np.nan, 0)))
        for panel, series, null, ratio, layer, e in sorted(rows, key=lambda row: PANELS.index(row[0]))
    ]
    return pd.DataFrame(full, columns=COLUMNS)


@torch.no_grad()
def _pass(model: Any, data: Any, settings: Mapping[str, Any], progress: bool) -> tuple[Collected, Collected]:
    """One walk over the data: pooled states, and each example's high-frequency share, by (series, mask ratio, layer)."""
    states, shares = defaultdict(list), defaultdict(list)

    def collect(name: str, ratio: float, flow: Any, filled: Tensor | None = None) -> None:
        for layer, H in flow.hidden_states.items():
            if filled is None:
                states[name, ratio, layer].append(H.float().mean(1).cpu())
            else:
                H = filled @ H.double().cpu()
            if "spectrum" in settings["panels"]:
                with warnings.catch_warnings():  # layer 0 of the understanding flow may be constant; such maps are left out
                    warnings.simplefilter("ignore", UserWarning)
                    spectrum = token_spectrum(H, flow.grid)
                shares[name, ratio, layer].append(spectrum.above(settings["cutoff"]))
                shares["white noise", np.nan, layer] = [torch.tensor([spectrum.white(settings["cutoff"])])]

    size, layout = settings["batch_size"], settings["mask_layout"]
    with evaluating(model):
        for batch in tqdm(batches(data, size), total=-(-len(data) // size), desc="flows", disable=not progress, delay=2):
            u = model.understanding_flow(batch)
            collect("understanding", np.nan, u)
            for ratio in settings["mask_ratios"]:
                mask, other = (masks_by_id(batch["ids"], model.grid, ratio, layout, settings["seed"] + k) for k in (0, 1))
                g = model.generation_flow(batch, mask=mask)
                collect("generation", ratio, g)
                for layer, H in model.generation_flow(batch, mask=other).hidden_states.items():
                    states["another draw", ratio, layer].append(H.float().mean(1).cpu())
                if "spectrum" in settings["panels"] and g.grid == u.grid:
                    filled = filling(mask, g.grid)
                    collect("understanding, visible", ratio, u, filled)
                    collect("generation, visible", ratio, g, filled)
    return states, shares


def _geometry(states: Collected, settings: Mapping[str, Any]) -> Iterator[Row]:
    """The panels that need pooled states alone."""
    for ratio, layer in [(ratio, layer) for name, ratio, layer in states if name == "generation"]:
        u, g = torch.cat(states["understanding", np.nan, layer]), torch.cat(states["generation", ratio, layer])
        for panel, series, null, value in _compared(u, g, torch.cat(states["another draw", ratio, layer]), settings):
            yield panel, series, null, ratio, layer, value


def _compared(
    u: Tensor, g: Tensor, again: Tensor, settings: Mapping[str, Any]
) -> Iterator[tuple[str, str, bool, Estimate | float]]:
    """Pooled states [n, d] of understanding, of generation, and of generation under another mask draw."""
    if "residual" in settings["panels"]:
        residual = reconstruction_residual(g, u, settings["variance"])
        yield "residual", "residual", False, residual.estimate()
        yield "residual", "random subspace", True, 1 - residual.components / g.shape[1]
        yield "residual", "another mask draw", True, reconstruction_residual(g, again, settings["variance"]).estimate()
    if "rank" in settings["panels"]:
        yield "rank", "increment", False, jackknife(lambda k: effective_rank_increment(g[k], u[k]).percent, len(g))
        yield "rank", "another mask draw", True, effective_rank_increment(g, again).percent
    if "similarity" in settings["panels"]:
        shuffled = torch.randperm(len(u), generator=torch.Generator().manual_seed(settings["seed"]))
        yield "similarity", "cka", False, jackknife(lambda k: cka(g[k], u[k]), len(g))
        yield "similarity", "shuffled ids", True, cka(g, u[shuffled])


def _spectrum(shares: Collected) -> Iterator[Row]:
    """Means over the examples whose map is not constant; a layer without such examples has no row."""
    for (series, ratio, layer), parts in shares.items():
        finite = torch.cat(parts)
        finite = finite[torch.isfinite(finite)]
        if series == "white noise":
            yield "spectrum", series, True, ratio, layer, float(finite)
        elif len(finite) > 1:
            yield "spectrum", series, series.endswith("visible"), ratio, layer, bootstrap(finite.numpy())


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
    ("spectrum", "generation, visible"): "The high-frequency share of the generation flow at visible positions",
    ("spectrum", "understanding, visible"): "The high-frequency share of the understanding flow at visible positions",
    ("similarity", "cka"): "CKA of the two flows",
}


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
        if (curve := curve.dropna(subset="value")).empty:
            yield f"{words} is undefined at every layer."
            continue
        top, bottom = (curve.iloc[int(k)] for k in (curve.value.argmax(), curve.value.argmin()))
        high, low = (f"{row.value:.3g} [{row.low:.3g}, {row.high:.3g}] at layer {row.layer}" for row in (top, bottom))
        if top.low > bottom.high:
            yield f"{words} is highest with {high} and lowest with {low}."
        else:
            yield f"{words} runs from {low} to {high}: the intervals do not tell these apart."
        for null in (*_NULLS, f"{name}, untrained"):
            beside = mine[(mine.series == null) & ((mine.mask_ratio == ratio) | mine.mask_ratio.isna())].set_index("layer")
            if len(beside):
                values = beside.value.reindex(curve.layer).to_numpy()
                outside = int(((values > curve.high) | (values < curve.low)).sum())
                yield f"  Its interval leaves out what '{null}' gives at {outside} of {len(curve)} layers."
    if len(cosine := mine[mine.series == "disattenuated_cosine"]):
        below, above, unknown = (int(which.sum()) for which in (cosine.high < 0, cosine.low > 0, cosine.low.isna()))
        signs = f"below 0 at {below} and above 0 at {above} of {len(cosine)} layers, by its interval"
        but = f"; at {unknown} too little of the gradients is signal to tell" if unknown else ""
        yield f"  Freed of noise the cosine is {signs}{but}."
