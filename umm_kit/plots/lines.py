"""Numbers with their intervals: curves over layers and steps, dots and bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from umm_kit.plots.pictures import TEXT_SIZE, as_array

_MARKERS = "osD^vPX*"


def scores(frame: Any, chance: Mapping[str, float] | None = None, width: float = 6.5) -> Figure:
    """Values with their intervals as dots and bars, and a tick where chance lies.

    Args:
        frame: columns metric, value, low, high, n, as ``uk.evaluate(...).to_frame()`` has; values in [0, 1].
        chance: metric -> what is reached without looking.
    """
    if not len(frame):
        raise ValueError("the frame has no rows; expected one per metric")
    names = list(frame["metric"])[::-1]
    value, low, high = (as_array(frame[c])[::-1].astype(float) for c in ("value", "low", "high"))
    figure = Figure(figsize=(width, 0.24 * len(names) + 0.7), layout="constrained")
    ax = figure.subplots()
    at = np.arange(len(names))
    ax.hlines(at, low, high, color="C0", linewidth=2.5)
    ax.plot(value, at, "o", color="C0", markersize=5, label="this model, 95 % interval")
    known = [(chance[name], k) for k, name in enumerate(names) if chance and name in chance]
    if known:
        x, y = zip(*known, strict=True)
        ax.plot(x, y, "|", color="C1", markersize=11, markeredgewidth=2, label="chance")
    ax.set(xlabel="score (higher is better)", xlim=(-0.02, 1.02), yticks=at, ylim=(-0.6, len(names) - 0.4))
    counts = list(frame["n"])[::-1]
    ax.set_yticklabels([f"{name.replace('_', ' ')} (n={n})" for name, n in zip(names, counts, strict=True)])
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def cumulative(reference: Any, marks: Mapping[str, float], label: str, width: float = 6.5) -> Figure:
    """Where single values lie in a reference sample: its cumulative share on a log axis, and one marker per value.

    Args:
        reference: [n] positive values. marks: name -> positive value.
        label: what is measured, with its unit.

    Raises:
        ValueError: values that a log axis cannot show.
    """
    sample = np.sort(as_array(reference).astype(float).ravel())
    placed = {name: float(value) for name, value in marks.items()}
    everything = np.concatenate([sample, list(placed.values())])
    if not len(sample) or not (np.isfinite(everything).all() and (everything > 0).all()):
        raise ValueError(f"{len(sample)} reference values and the marks {placed}; expected at least one, all positive and finite")
    figure = Figure(figsize=(width, 2.6), layout="constrained")
    ax = figure.subplots()
    ax.step(sample, np.arange(1, len(sample) + 1) / len(sample), where="post", color="0.4", label=f"reference (n={len(sample)})")
    for k, (name, value) in enumerate(placed.items()):
        share = float((sample < value).mean())
        style: dict[str, Any] = {"marker": _MARKERS[k % len(_MARKERS)], "color": f"C{k}", "linestyle": "none", "clip_on": False}
        ax.plot([value], [share], label=f"{name}: above {share:.0%}", **style)
    ax.set(xscale="log", xlabel=label, ylabel="share below", ylim=(0, 1))
    figure.legend(loc="outside right upper")
    return figure


#: panel of a diagnosis -> (title, axis, the series to draw, the paper's panel that has this axis)
_DIAGNOSIS = {
    "gradients": ("gradient conflict", "1 - cos (U, G)", ("conflict",), None),
    "residual": ("residual of G outside U", "share of energy", ("residual", "random subspace", "another mask draw"),
                 "reconstruction_residual"),
    "rank": ("effective-rank increment", "%", ("increment", "another mask draw"), "effective_rank_increment_pct"),
    "spectrum": ("high-frequency energy", "share of energy", ("understanding", "generation", "understanding, visible",
                 "generation, visible", "white noise"), None),
    "similarity": ("CKA of U and G", "CKA", ("cka", "shuffled ids"), None),
}  # fmt: skip
#: One colour for one thing, in all panels; what is measured on the model is blue, unless it is of one flow. Untrained: dotted.
_HUES = {
    "generation": "C1", "generation, visible": "C1", "random subspace": "0.5", "white noise": "0.5", "shuffled ids": "0.5",
    "another mask draw": "0.2",
}  # fmt: skip


def diagnosis(frame: Any, published: bool = True) -> Figure:
    """Panels of :class:`umm_kit.diagnostics.report.Diagnosis` against relative depth: curves with bands, nulls dashed.

    Where there are several mask ratios, the middle one is drawn; n counts examples, in the gradient panel pairs of batches.
    ``published`` adds the paper's curves as dots where the axis means the same: not for gradients, which have no formula
    there, nor for the spectrum, whose cut-off is not given.
    """
    panels = [panel for panel in _DIAGNOSIS if (frame.panel == panel).any()]
    if not panels:
        raise ValueError(f"the frame holds none of the panels {list(_DIAGNOSIS)}")
    figure = Figure(figsize=(3.0 * len(panels), 3.7), layout="constrained")
    for ax, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        title, unit, wanted, theirs = _DIAGNOSIS[panel]
        mine = frame[frame.panel == panel]
        ratios = sorted(mine.mask_ratio.dropna().unique())
        mine = mine[mine.mask_ratio.isna() | (mine.mask_ratio == ratios[len(ratios) // 2])] if ratios else mine
        for name in (name for name in mine.series.unique() if name.removesuffix(", untrained") in wanted):
            curve = mine[mine.series == name].sort_values("layer")
            null, kind = bool(curve.null.iloc[0]), name.removesuffix(", untrained")
            line = ":" if kind != name else "--" if null else "-"
            style = {"color": _HUES.get(kind, "C0"), "linestyle": line, "linewidth": 1.0 if null or "visible" in kind else 1.6}
            ax.plot(
                curve.depth, curve.value, marker="" if null else _MARKERS[wanted.index(kind)], markersize=3, label=name, **style
            )
            ax.fill_between(curve.depth, curve.low, curve.high, color=style["color"], alpha=0.2, linewidth=0)
        if published and theirs:
            _published(ax, theirs, ratios)
        about = f", mask ratio {ratios[len(ratios) // 2]:g}" if ratios else " pairs of batches" if panel == "gradients" else ""
        ax.set(title=title, xlabel=f"relative depth (n = {mine.n.max()}{about})", ylabel=unit)
        ax.legend(fontsize=TEXT_SIZE - 1, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.2))
    return figure


def _published(ax: Axes, panel: str, ratios: Sequence[float]) -> None:
    """The paper's points of one panel at the mask ratio nearest to ours: of Show-o, 24 layers, read by eye."""
    from umm_kit.published import load

    values: Any = load("diva_fig2").query("panel == @panel")
    wanted = ratios[len(ratios) // 2]
    nearest = min(values.series.unique(), key=lambda name: abs(float(name.removeprefix("rate_")) - wanted))
    points = values[values.series == nearest]
    label = f"DIVA, {nearest.replace('_', ' ')} (by eye)"
    ax.plot(points.layer / 24, points.value, "x", color="0.5", markersize=3.5, label=label)


@dataclass(frozen=True)
class Panel:
    """One picture of :func:`curves`.

    Attributes:
        series: name -> (x, y), or (x, y, low, high) for a band around the curve.
        nulls: names of those to dash and leave without markers.
        mark: an x to mark by a vertical line.
        log: a logarithmic x axis.
    """

    title: str
    xlabel: str
    ylabel: str
    series: Mapping[str, Sequence[Any]]
    nulls: Sequence[str] = ()
    mark: float | None = None
    log: bool = False


def curves(panels: Sequence[Panel], columns: int = 3, size: tuple[float, float] = (3.2, 2.7)) -> Figure:
    """Panels of curves, row by row, each with its legend; the k-th series of every panel has the k-th colour.

    Raises:
        ValueError: no panel; a series that is not x and y, or x, y, low and high, of one length.

    Example:
        >>> len(curves([Panel("a line", "x", "y", {"rising": ([0, 1], [0, 1])})]).axes)
        1
    """
    if not panels:
        raise ValueError("there are no panels; expected at least one")
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    keys = 0.1 + 0.16 * max(math.ceil(len(panel.series) / _wide(panel)) for panel in panels)  # height of legends, in inches
    width, height = size[0] - 0.8, size[1] - 0.75  # room for labels: letting them find it takes twice the time
    figure = Figure(figsize=(columns * size[0], rows * (size[1] + keys)))
    axes = figure.subplots(rows, columns, squeeze=False).flat
    edges = {"left": 0.7 / figure.get_figwidth(), "bottom": (0.5 + keys) / figure.get_figheight()}
    edges |= {"right": 1 - 0.1 / figure.get_figwidth(), "top": 1 - 0.25 / figure.get_figheight()}
    figure.subplots_adjust(**edges, wspace=0.8 / width, hspace=(0.75 + keys) / height)
    for ax in list(axes)[len(panels) :]:
        figure.delaxes(ax)
    for ax, panel in zip(figure.axes, panels, strict=True):
        whole = not panel.log
        for k, (name, given) in enumerate(panel.series.items()):
            x, *ys = (as_array(values).astype(float) for values in given)
            whole = whole and bool((x == x.round()).all())
            if len(ys) not in (1, 3) or any(y.shape != x.shape or y.ndim != 1 for y in ys):
                shapes = [x.shape, *(y.shape for y in ys)]
                raise ValueError(f"{name!r} of {panel.title!r} has the shapes {shapes}; expected x, y or x, y, low, high")
            null, few = name in panel.nulls, len(x) <= 30
            style: dict[str, Any] = {"linestyle": "--" if null else "-", "linewidth": 1.0 if null else 1.6, "markersize": 3}
            ax.plot(x, ys[0], color=f"C{k}", marker="" if null or not few else _MARKERS[k % len(_MARKERS)], label=name, **style)
            if len(ys) == 3:
                ax.fill_between(x, ys[1], ys[2], color=f"C{k}", alpha=0.2, linewidth=0)
                ax.vlines(x, ys[1], ys[2], color=f"C{k}", alpha=0.4, linewidth=0.8)  # a point between gaps has no band
        if panel.mark is not None:
            ax.axvline(panel.mark, color="0.5", linewidth=4, alpha=0.3, zorder=0)
        ax.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel, xscale="log" if panel.log else "linear")
        if whole:  # layers, cycles and steps have no halves
            ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        below: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, -0.45 / height), "ncols": _wide(panel)}
        ax.legend(fontsize=TEXT_SIZE - 1, frameon=False, borderaxespad=0, **below)
    return figure


def _wide(panel: Panel) -> int:
    """Columns of the legend."""
    return 1 + (len(panel.series) > 5)


_BOTH = ("understanding", "generation")
_TRAINING = {
    "task losses": ("nats per token", "_loss", _BOTH),
    "gain of the biases": ("nats per token", "_gain", _BOTH),
    "orthogonality": ("loss", "_loss", ("orthogonality",)),
    "shared factors": ("nats", "", ("shared_estimate", "shared_bound")),
    "unique factors": ("nats", "", ("critic_estimate", "unique_contrast", "critic_bound")),
    "alignment": ("squared distance", "_loss", ("modal", "capacity", "target")),
    "scale": ("total variance", "", ("total_variance",)),
    "rank": ("dimensions", "", ("effective_rank",)),
    "one direction?": ("cosine", "", ("positive_cosine", "negative_cosine")),
    "told apart?": ("share of items", "", ("retrieval_at_1",)),
    "rollouts": ("score", "", ("rollout_best", "rollout_mean", "rollout_worst")),
    "preference": ("nats", "", ("chosen_shift", "rejected_shift")),
    "who pushes": ("share of gradient norms", "_gradient_share", (*_BOTH, "orthogonality", "shared", "unique")),
}


def training(log: Sequence[Mapping[str, Any]]) -> Figure:
    """A training's terms against its steps: task losses, and what else there is of DIVA's terms or LatentUMM's and its collapse.

    Args:
        log: entries with "step" and some of the terms, as ``trainer.state.log_history`` or the "log" of a run record.

    Raises:
        ValueError: no entry holds any of the terms.

    Example:
        >>> len(training([{"step": 1, "understanding_loss": 2.0}, {"step": 2, "understanding_loss": 1.0}]).axes)
        1
    """
    panels = []
    for title, (unit, end, names) in _TRAINING.items():
        series = {}
        for name in names:
            if points := [(entry["step"], entry[name + end]) for entry in log if name + end in entry]:
                series[name.replace("_", " ")] = list(zip(*points, strict=True))
        if series:
            bounds = [name for name in series if name.endswith("bound")]
            panels.append(Panel(title, "step", unit, series, nulls=bounds))
    if not panels:
        raise ValueError("no entry of the log holds a term to draw; expected such as 'understanding_loss'")
    return curves(panels, columns=4, size=(2.6, 2.4))


def forest(panels: Mapping[str, Sequence[tuple[str, float, float, float]]], xlabel: str, columns: int = 3) -> Figure:
    """Effects with their intervals, one row each and 0 marked: filled where the interval excludes 0.

    Args:
        panels: title -> rows (label, value, low, high), drawn from top to bottom; labels stand beside the first column only, so
            every panel needs the same ones.

    Raises:
        ValueError: no panel or no row, or panels with other labels.

    Example:
        >>> len(forest({"understanding": [("diva", 0.1, 0.0, 0.2)]}, "gain").axes)
        1
    """
    labels = [[row[0] for row in rows] for rows in panels.values()]
    if not labels or not labels[0] or any(found != labels[0] for found in labels):
        raise ValueError(f"panels have the labels {labels}; expected at least one panel and the same labels in each")
    columns, n = min(columns, len(panels)), len(labels[0])
    down = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(1.2 + 2.1 * columns, 5.0), down * (0.75 + 0.2 * n)), layout="constrained")
    axes = figure.subplots(down, columns, squeeze=False, sharey=True)
    for ax in axes.flat[len(panels) :]:
        figure.delaxes(ax)
    for ax, (title, rows) in zip(axes.flat, panels.items(), strict=False):
        for y, (_, value, low, high) in enumerate(rows):
            sure = low > 0 or high < 0
            ax.plot([low, high], [y, y], color="C0", linewidth=1.2)
            ax.plot(value, y, "o", color="C0", markersize=4, markerfacecolor="C0" if sure else "white")
        ax.axvline(0, color="0.5", linewidth=0.8, zorder=1)  # above the grid
        ax.set(title=title, yticks=range(n), yticklabels=labels[0], ylim=(n - 0.5, -0.5))
        ax.locator_params(axis="x", nbins=3)  # the panels are narrow
    for ax in axes[-1]:
        ax.set_xlabel(xlabel)
    return figure


def band(estimates: Sequence[Any]) -> list[Sequence[float]]:
    """A series for :class:`Panel`: x = 0, 1, 2, ..., and the values and intervals of estimates, such as one per layer."""
    parts = ([float(getattr(e, part)) for e in estimates] for part in ("value", "low", "high"))
    return [range(len(estimates)), *parts]


def probes(frame: Any, size: tuple[float, float] = (3.7, 3.0)) -> Figure:
    """Scores of probes by layer: a row per flow, said factors on the left and unsaid ones on the right; controls dashed.

    Args:
        frame: of :class:`umm_kit.diagnostics.probes.Probes`, by one probe.

    Raises:
        ValueError: no rows.
    """
    panels = []
    for (flow, kind), mine in sorted(frame.groupby(["flow", "kind"]), key=lambda g: (g[0][0] != "understanding", g[0][1])):
        mine, name = mine.sort_values("layer"), "shuffled scenes"
        lines = {factor: [rows[c] for c in ("layer", "score", "low", "high")] for factor, rows in mine.groupby("factor")}
        control = mine.groupby("layer", as_index=False).control.mean()
        measure = ", ".join(sorted(set(mine.measure)))
        panels.append(Panel(f"{flow}: {kind}", "layer", measure, lines | {name: (control.layer, control.control)}, [name]))
    return curves(panels, columns=2, size=size)


_DRIFT = {
    "what survives": ("share of what can be kept", ("survival",)),
    "facts": ("share of step-0 facts", ("recall", "ceiling", "floor")),
    "latents": ("cosine to step 0", ("latent_cosine", "latent_cosine_floor", "teacher_cosine", "teacher_cosine_floor")),
    "captions and losses": ("share", ("caption_edit_distance", "retrieval_rank", "lost")),
}


def drift(frame: Any, categories: Any = None, columns: int = 3) -> Figure:
    """Panels of :class:`umm_kit.evaluation.drift.Drift` against cycles: what survives, what bounds it, where latents go.

    Args:
        frame: columns cycle, metric, value, low, high, n, as ``Drift.to_frame`` has; panels without a metric are left out.
        categories: columns category, cycle, value, low, high, as ``Drift.by_category`` has: one more panel.

    Raises:
        ValueError: no metric that is known.
    """
    panels = []
    for title, (unit, metrics) in _DRIFT.items():
        mine = frame[frame.metric.isin(metrics)]
        series = {name: mine[mine.metric == name].sort_values("cycle") for name in metrics if (mine.metric == name).any()}
        lines = {name.replace("_", " "): (rows.cycle, rows.value, rows.low, rows.high) for name, rows in series.items()}
        nulls = [name for name in lines if name.endswith("floor") or name == "ceiling"]
        if lines:
            panels.append(Panel(title, f"cycle (n = {mine.n.max()})", unit, lines, nulls))
    if not panels:
        known = [metric for _, metrics in _DRIFT.values() for metric in metrics]
        raise ValueError(f"the frame holds none of the metrics {known}")
    if categories is not None and len(categories):
        rows = {name: group.sort_values("cycle") for name, group in categories.groupby("category", sort=False)}
        lines = {name: (g.cycle, g.value, g.low, g.high) for name, g in rows.items() if np.isfinite(g.value.astype(float)).any()}
        panels.insert(1, Panel("by category", "cycle", "share of what can be kept", lines))
    return curves(panels, columns)
