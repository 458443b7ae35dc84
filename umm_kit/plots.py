"""Figures: arrays in, :class:`matplotlib.figure.Figure` out.

Nothing here touches pyplot's global state, because a widget's callback may draw while a cell runs. Tensors on any device are
arrays too. Colours stay apart under the common forms of colour blindness, and nothing is told by hue alone.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

TEXT_SIZE = 8  # points
_MARKERS = "osD^vPX*"
#: Directions in RGB of the first three components: dark to light, blue to yellow, green to red. The order follows the variance,
#: so that a reader who cannot tell red from green misses the least of the three.
_OPPONENT = np.array([[0.30, 0.30, 0.30], [0.20, 0.20, -0.40], [0.25, -0.25, 0.0]])


def as_array(values: Any) -> np.ndarray:
    """A NumPy array of an array or of a tensor on any device; NumPy has no bfloat16, so floats become float32."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def as_pixels(images: Any) -> np.ndarray:
    """Images [n, 3, H, W] in [0, 1] as an array [n, H, W, 3]; ValueError for another shape."""
    pixels = as_array(images)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
        raise ValueError(f"images are {pixels.shape}; expected [n, 3, height, width] n >= 1 (images[None] makes one a batch)")
    return pixels.transpose(0, 2, 3, 1).clip(0, 1)


def _show(ax: Axes, picture: np.ndarray, hidden: np.ndarray | None = None) -> None:
    """One picture without ticks; hidden tokens [rows, columns] are hatched, so that they are no picture content."""
    height, width = picture.shape[:2]
    ax.imshow(picture, interpolation="nearest", extent=(0, width, height, 0))
    if hidden is not None:
        high, wide = height / hidden.shape[0], width / hidden.shape[1]
        for row, column in np.argwhere(hidden):
            place = (column * wide, row * high)
            ax.add_patch(Rectangle(place, wide, high, facecolor="0.2", edgecolor="0.7", hatch="/////", linewidth=0))
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def image_grid(
    images: Any,
    titles: Sequence[str] | None = None,
    notes: Sequence[str] | None = None,
    masks: Any = None,
    columns: int = 6,
    size: float = 1.6,
) -> Figure:
    """Pictures in rows, each with a title above and a note below.

    Args:
        images: [n, 3, H, W] in [0, 1].
        titles, notes: one text per picture, wrapped to its width.
        masks: [n, rows, columns] bool, True = hidden: those tokens are hatched.
        size: width of a picture in inches.

    Raises:
        ValueError: another shape, or texts and masks that are not one per picture.

    Example:
        >>> figure = image_grid(np.zeros((2, 3, 32, 32)), titles=["nothing", "nothing either"])
        >>> len(figure.axes)
        2
    """
    pixels = as_pixels(images)
    n = len(pixels)
    for name, given in (("titles", titles), ("notes", notes), ("masks", masks)):
        if given is not None and len(given) != n:
            raise ValueError(f"{len(given)} {name} came with {n} images; expected one each")
    hidden = None if masks is None else as_array(masks)
    columns = max(1, min(columns, n))
    rows = math.ceil(n / columns)
    above, below = (["\n".join(_wrap(t, size)) for t in texts or [""] * n] for texts in (titles, notes))
    heights = []  # a row is as high as its longest texts
    for start in range(0, n, columns):
        lines = (max(text.count("\n") + 1 for text in texts[start : start + columns]) for texts in (above, below))
        heights.append(size + sum(lines) * TEXT_SIZE * 1.3 / 72)
    figure = Figure(figsize=(columns * size, sum(heights)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flat
    for k, ax in enumerate(axes):
        if k >= n:
            figure.delaxes(ax)
            continue
        _show(ax, pixels[k], None if hidden is None else hidden[k])
        ax.set_title(above[k], fontsize=TEXT_SIZE)
        ax.set_xlabel(below[k], fontsize=TEXT_SIZE)
    return figure


def _wrap(text: str, inches: float) -> list[str]:
    """Lines that fit a width in inches; line breaks in the text are kept."""
    width = max(8, int(inches * 72 / (0.55 * TEXT_SIZE)))
    return [line for part in text.split("\n") for line in (textwrap.wrap(part, width) or [""])]


def token_colours(states: Mapping[str, Any], offset: bool = False) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Colours of token states at one layer, in one basis for all flows: the first three principal components.

    With X the states of all flows, images and tokens, each flow's mean taken off, and v_k the eigenvectors of X^T X of the
    largest eigenvalues: score_k = x . v_k, divided by the 98th percentile of its absolute value, moves a colour from mid-grey
    dark to light (k = 1), blue to yellow (2), green to red (3). v_k points where its largest entry is positive, so that
    colours do not flip between runs.

    Args:
        states: flow -> [B, N, d], d >= 3; equal colours mean equal scores in any flow.
        offset: take off only the mean over all flows, so that a constant difference between them shows as colour.

    Returns:
        flow -> [B, N, 3] in [0, 1], and the shares [3] of variance that the components hold.

    Raises:
        ValueError: no flow, shapes that do not fit, values that are not finite.
    """
    arrays = {flow: as_array(a).astype(np.float64) for flow, a in states.items()}
    shapes = {flow: a.shape for flow, a in arrays.items()}
    if not arrays or any(len(s) != 3 for s in shapes.values()) or len({s[2] for s in shapes.values()}) > 1:
        raise ValueError(f"states are {shapes}; expected [images, tokens, width] for each flow, of one width")
    if (width := next(iter(shapes.values()))[2]) < 3:
        raise ValueError(f"states have width {width}; three components need at least 3")
    if not all(np.isfinite(a).all() for a in arrays.values()):
        raise ValueError("states hold NaN or infinite values")
    flat = {flow: a.reshape(-1, width) for flow, a in arrays.items()}
    together = np.concatenate(list(flat.values())).mean(0)
    centred = {flow: a - (together if offset else a.mean(0)) for flow, a in flat.items()}
    everything = np.concatenate(list(centred.values()))
    values, vectors = np.linalg.eigh(everything.T @ everything)
    values, basis = values[:-4:-1], vectors[:, :-4:-1]
    basis = basis * np.where(basis[abs(basis).argmax(0), range(3)] < 0, -1, 1)
    total = np.square(everything).sum()
    scale = np.quantile(abs(everything @ basis), 0.98, axis=0)
    scale = np.where(scale > 1e-9 * max(np.sqrt(total), 1e-300), scale, np.inf)  # a component without variance stays grey
    colours = {flow: (0.5 + (a @ basis / scale).clip(-1, 1) @ _OPPONENT).clip(0, 1) for flow, a in centred.items()}
    shares = values.clip(0) / total if total else np.zeros(3)
    return {flow: c.reshape(*shapes[flow][:2], 3) for flow, c in colours.items()}, shares


def token_maps(
    states: Mapping[str, Mapping[int, Any]],
    grid: tuple[int, int],
    layers: Sequence[int] | None = None,
    item: int = 0,
    images: Any = None,
    masks: Mapping[str, Any] | None = None,
    offset: bool = False,
    size: float = 1.3,
) -> Figure:
    """The flows' token states as pictures: a row per flow, a column per layer, coloured by :func:`token_colours`.

    Colours may be compared between the rows of one column, and between images; not between layers, which have bases of
    their own. Below a column stand the shares of variance that its three components hold.

    Args:
        states: flow -> layer -> [B, N, d], as ``hidden_states`` of the flows are. All B images decide the basis.
        grid: (rows, columns) of the tokens.
        layers: those to show; all by default. item: which of the B images.
        images: [B, 3, H, W], shown before the layers.
        masks: flow -> [B, N] bool, True = hidden: hatched in the image, crossed in the maps.
        offset: see :func:`token_colours`.

    Raises:
        ValueError: an unknown layer or item, tokens that do not fill the grid.
    """
    have = sorted(set.intersection(*(set(by_layer) for by_layer in states.values()))) if states else []
    wanted = have if layers is None else list(layers)
    if not wanted or not set(wanted) <= set(have):
        raise ValueError(f"layers {wanted} were asked for; expected some of those in the states of every flow, {have}")
    painted = {layer: token_colours({flow: by_layer[layer] for flow, by_layer in states.items()}, offset) for layer in wanted}
    first = {flow: a.shape for flow, a in painted[wanted[0]][0].items()}
    if any(not 0 <= item < s[0] or s[1] != grid[0] * grid[1] for s in first.values()):
        raise ValueError(f"item {item} on a {grid} grid does not fit states of [images, tokens, colour] {first}")
    before = 0 if images is None else 1
    figure = Figure(figsize=((len(wanted) + before) * size, len(states) * size + 0.5), layout="constrained")
    axes = figure.subplots(len(states), len(wanted) + before, squeeze=False)
    for row, flow in zip(axes, states, strict=True):
        hidden = as_array(masks[flow])[item].reshape(grid) if masks and flow in masks else None
        if before:
            _show(row[0], as_pixels(images)[item], hidden)
        for ax, layer in zip(row[before:], wanted, strict=True):
            _show(ax, painted[layer][0][flow][item].reshape(*grid, 3))
            if hidden is not None:
                y, x = np.nonzero(hidden)
                ax.plot(x + 0.5, y + 0.5, "x", color="black", markersize=size * 2, markeredgewidth=0.7)
        row[0].set_ylabel(flow, fontsize=TEXT_SIZE + 1)
    for k, layer in enumerate(wanted):
        axes[0, before + k].set_title(f"layer {layer}", fontsize=TEXT_SIZE + 1)
        shares = " + ".join(f"{100 * share:.0f}" for share in painted[layer][1])
        axes[-1, before + k].set_xlabel(f"{shares} %", fontsize=TEXT_SIZE)
    return figure


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
        names = [name for name in mine.series.unique() if name.removesuffix(", untrained") in wanted]
        for number, name in enumerate(names):
            curve = mine[mine.series == name].sort_values("layer")
            null = bool(curve.null.iloc[0])
            style = {"color": f"C{number}", "linestyle": "--" if null else "-", "linewidth": 1.0 if null else 1.6}
            ax.plot(curve.depth, curve.value, marker="" if null else _MARKERS[number], markersize=3, label=name, **style)
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
    figure = Figure(figsize=(columns * size[0], rows * size[1]))
    axes = figure.subplots(rows, columns, squeeze=False).flat
    wide, high = size[0] - 0.8, size[1] - 0.75  # room for labels, in inches: letting them find it takes twice the time
    edges = {"left": 0.7 / figure.get_figwidth(), "bottom": 0.5 / figure.get_figheight()}
    edges |= {"right": 1 - 0.1 / figure.get_figwidth(), "top": 1 - 0.25 / figure.get_figheight()}
    figure.subplots_adjust(**edges, wspace=0.8 / wide, hspace=0.75 / high)
    for ax in list(axes)[len(panels) :]:
        figure.delaxes(ax)
    for ax, panel in zip(figure.axes, panels, strict=True):
        for k, (name, given) in enumerate(panel.series.items()):
            x, *ys = (as_array(values).astype(float) for values in given)
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
        bottom, top = ax.get_ylim()
        ax.set_ylim(bottom, top + 0.09 * len(panel.series) * (top - bottom))  # the legend's place
        ax.set_yticks([tick for tick in ax.get_yticks() if bottom <= tick <= top])  # where no value lies, no number
        ax.legend(fontsize=TEXT_SIZE - 1, loc="upper left", borderaxespad=0.1)
    return figure


_TRAINING = {
    "task losses": ("nats per token", "_loss", ("understanding", "generation")),
    "gain of the biases": ("nats per token", "_gain", ("understanding", "generation")),
    "orthogonality": ("loss", "_loss", ("orthogonality",)),
    "shared factors": ("nats", "", ("shared_estimate", "shared_bound")),
    "unique factors": ("nats", "", ("critic_estimate", "unique_contrast", "critic_bound")),
    "who pushes": ("share of gradient norms", "_gradient_share", ("understanding", "generation", "shared", "unique")),
}


def training(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Terms of DIVA's losses along a training: task losses, gain of the biases, estimates with their bounds, shares of gradient.

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
    figure = Figure(figsize=(1.2 + 2.1 * columns, down * (0.75 + 0.2 * n)), layout="constrained")
    axes = figure.subplots(down, columns, squeeze=False, sharey=True)
    for ax in axes.flat[len(panels) :]:
        figure.delaxes(ax)
    for ax, (title, rows) in zip(axes.flat, panels.items(), strict=False):
        for y, (_, value, low, high) in enumerate(rows):
            sure = low > 0 or high < 0
            ax.plot([low, high], [y, y], color="C0", linewidth=1.2)
            ax.plot(value, y, "o", color="C0", markersize=4, markerfacecolor="C0" if sure else "white")
        ax.axvline(0, color="0.5", linewidth=0.8, zorder=0)
        ax.set(title=title, yticks=range(n), yticklabels=labels[0], ylim=(n - 0.5, -0.5))
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
    for (flow, kind), mine in sorted(
        frame.groupby(["flow", "kind"]), key=lambda item: (item[0][0] != "understanding", item[0][1])
    ):
        mine, name = mine.sort_values("layer"), "shuffled scenes"
        lines = {factor: [rows[c] for c in ("layer", "score", "low", "high")] for factor, rows in mine.groupby("factor")}
        control = mine.groupby("layer", as_index=False).control.mean()
        measure = ", ".join(sorted(set(mine.measure)))
        panels.append(Panel(f"{flow}: {kind}", "layer", measure, lines | {name: (control.layer, control.control)}, [name]))
    return curves(panels, columns=2, size=size)


_CLASSES = [*(f"C{k}" for k in range(7)), "#F0E442", "#7F4F24", "0.6"]  # the style sheet's, then yellow, brown and grey


def latent_map(
    maps: Mapping[str, Any], values: Any = None, label: str = "", join: int = 60, columns: int = 4, size: float = 2.4
) -> Figure:
    """Maps of the latent space side by side, each under the scores that say how far it can be trusted.

    Circles are understanding, triangles generation; a thin line joins the two points of one id. Axes have no ticks; of PCA
    alone their labels say what share of the variance each axis holds.

    Args:
        maps: title -> :class:`umm_kit.diagnostics.maps.LatentMap` or ``PairedMap``.
        values: colour of each row, or of each id of a paired map: floats by a scale, anything else as classes (the 10 most
            frequent; the rest is pale). Without, the colour is the flow.
        label: what the values are.
        join: draw the lines of that many ids at most, evenly spread over the rows.

    Raises:
        ValueError: no map; values that are not one per row or id, or not finite.
    """
    if not maps:
        raise ValueError("there are no maps; expected at least one")
    columns = min(columns, len(maps))
    rows = math.ceil(len(maps) / columns)
    bar = 0.0 if values is None or not np.issubdtype(as_array(values).dtype, np.floating) else 0.9
    figure = Figure(figsize=(columns * size + bar, rows * (size + 0.6) + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax in list(axes)[len(maps) :]:
        figure.delaxes(ax)
    shown: Any = None
    keys: dict[str, tuple[str, str]] = {}
    for ax, (title, drawn) in zip(figure.axes, maps.items(), strict=True):
        points, paired = drawn.positions, hasattr(drawn, "ids")
        parts = dict(zip(("understanding", "generation"), np.split(points, 2), strict=True)) if paired else {"": points}
        n = len(points) // len(parts)
        colours, classes, scale = _point_colours(values, n)
        if join and paired:
            some = np.unique(np.linspace(0, n - 1, min(join, n)).astype(int))
            ax.add_collection(LineCollection(list(np.stack(list(parts.values()), 1)[some]), colors="0.6", linewidths=0.5))
        for k, (flow, part) in enumerate(parts.items()):
            style: dict[str, Any] = {"marker": "o^"[k], "linewidths": 0, "zorder": 2, "rasterized": True}
            style |= scale | {"s": float(np.clip(6000 / len(points), 2, 16)), "c": f"C{k}" if colours is None else colours}
            made = ax.scatter(part[:, 0], part[:, 1], **style)
            shown = made if scale else shown
            keys |= {flow: ("o^"[k], f"C{k}" if colours is None else "0.3")} if flow else {}
        keys |= {name: ("s", colour) for name, colour in classes.items()}
        scores = [f"trust {drawn.trustworthiness:.2f}", f"kept {drawn.neighbour_overlap:.2f} (chance {drawn.chance:.2f})"]
        if paired and drawn.pairs:
            scores.append(f"partner nearest {drawn.pairs.nearest.value:.2f} (chance {drawn.pairs.chance:.3f})")
        ax.set_title("\n".join([title, *scores]), fontsize=TEXT_SIZE)
        ax.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        if drawn.variance:
            ax.set_xlabel(f"{drawn.variance[0]:.0%} of variance", fontsize=TEXT_SIZE - 1)
            ax.set_ylabel(f"{drawn.variance[1]:.0%}", fontsize=TEXT_SIZE - 1)
    if shown is not None:
        figure.colorbar(shown, ax=figure.axes, label=label, shrink=0.7)
    look: dict[str, Any] = {"linewidth": 0, "markersize": 5}
    handles = [Line2D([], [], marker=marker, color=colour, label=name, **look) for name, (marker, colour) in keys.items()]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * columns), fontsize=TEXT_SIZE)
    return figure


def _point_colours(values: Any, n: int) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """Colours of n points (None: by flow), the classes' colours, and the options of a scale for numbers."""
    if values is None:
        return None, {}, {}
    given = as_array(values)
    number = np.issubdtype(given.dtype, np.floating)
    if given.shape != (n,) or (number and not np.isfinite(given).all()):
        raise ValueError(f"the values to colour by are {given.shape} or not finite; expected {n} finite ones, one per row or id")
    if number:
        return given, {}, {"cmap": "cividis", "vmin": given.min(), "vmax": given.max()}
    names, place, counts = np.unique(given.astype(str), return_inverse=True, return_counts=True)
    kept = np.sort(np.argsort(-counts, kind="stable")[: len(_CLASSES)])
    colour = np.full(len(names), "0.85", dtype=object)
    colour[kept] = _CLASSES[: len(kept)]
    classes = {str(names[k]): str(colour[k]) for k in kept} | ({"other": "0.85"} if len(names) > len(kept) else {})
    return colour[place], classes, {}


def heat_map(values: Any, groups: Mapping[str, Sequence[Any]], label: str = "", size: float = 4.6) -> Figure:
    """A square matrix of groups of rows, such as the layers of each flow, the same along both sides; NaN is left white.

    Args:
        values: [n, n]. groups: name -> labels of its rows, n in all.

    Raises:
        ValueError: a matrix that is not square, or labels that are not one per row.

    Example:
        >>> heat_map(np.eye(3), {"understanding": [0, 1], "generation": [0]}).axes[0].get_title()
        ''
    """
    matrix, sizes = as_array(values).astype(float), [len(labels) for labels in groups.values()]
    if matrix.ndim != 2 or matrix.shape != (sum(sizes), sum(sizes)):
        raise ValueError(f"the matrix is {matrix.shape} for groups of {sizes}; expected as many rows and columns as labels")
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    ax = figure.subplots()
    low = min(0.0, float(np.nanmin(matrix)))
    figure.colorbar(ax.imshow(matrix, cmap="cividis", vmin=low, vmax=max(1.0, float(np.nanmax(matrix)))), label=label, shrink=0.8)
    ends, names = np.cumsum(sizes), [str(name) for labels in groups.values() for name in labels]
    for end in ends[:-1] - 0.5:
        ax.axhline(end, color="white", linewidth=2)
        ax.axvline(end, color="white", linewidth=2)
    ax.set(xticks=range(len(names)), yticks=range(len(names)))
    ax.set_xticklabels(names, fontsize=TEXT_SIZE - 1)
    ax.set_yticklabels(names, fontsize=TEXT_SIZE - 1)
    for name, start, end in zip(groups, ends - sizes, ends, strict=True):
        middle = (start + end - 1) / 2
        ax.text(middle, len(names) + 0.9, name, ha="center", va="top", fontsize=TEXT_SIZE)
        ax.text(-2.4, middle, name, ha="center", va="center", rotation=90, fontsize=TEXT_SIZE)
    ax.grid(False)
    return figure


def gradient_arrows(scene: Any, steps: Sequence[int], shown: int = 40, size: float = 2.6) -> Figure:
    """Points of two sets and the arrows that a term's negative gradient puts on them: one column per walk of a scene.

    Circles are the first set, triangles the second; a thin line joins a pair. The grey arrow at the upper left is the scale: one
    for all pictures, or one per walk where walks descend on different terms. With several steps there is a row for each walk and
    a column for each step.

    Args:
        scene: :class:`umm_kit.losses.microscope.Scene`. steps: indices into its walks.
        shown: pairs that are drawn, the first ones; all count in every number.

    Raises:
        ValueError: no step, or one that the scene does not have.
    """
    if not len(steps) or not all(0 <= k < len(scene.x) for k in steps):
        raise ValueError(f"steps {list(steps)} were asked for; the scene has those from 0 to {len(scene.x) - 1}")
    cells = [(name, walk, k) for name, walk in scene.walks.items() for k in steps]
    columns = len(cells) if len(steps) == 1 else len(steps)
    rows = len(cells) // columns
    figure = Figure(figsize=(columns * size, rows * (size + 0.35) + 0.35))
    edges = {"left": 0.06 / columns, "right": 1 - 0.06 / columns, "bottom": 0.35 / figure.get_figheight()}
    figure.subplots_adjust(**edges, top=1 - 0.35 / figure.get_figheight(), wspace=0.05, hspace=0.16)
    reach = 1.12 * max(float(abs(walk.points).max()) for walk in scene.walks.values())
    longest = {name: float(np.linalg.norm(walk.arrows[:, :, :shown], axis=-1).max()) for name, walk in scene.walks.items()}
    for ax, (name, walk, k) in zip(figure.subplots(rows, columns, squeeze=False).flat, cells, strict=True):
        key = float(f"{max(longest.values()) if scene.one_term else longest[name]:.0e}") or 1.0
        style: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": key / (0.45 * reach), "width": 0.006, "zorder": 3}
        points, arrows = walk.points[:, k, :shown], walk.arrows[:, k, :shown]
        ax.add_collection(LineCollection(list(points.transpose(1, 0, 2)), colors="0.75", linewidths=0.6))
        for part, push, colour, marker in zip(points, arrows, ("C0", "C1"), "o^", strict=True):
            ax.plot(*part.T, marker, color=colour, markersize=4, markeredgewidth=0)
            ax.quiver(*part.T, *push.T, color=colour, **style)
        ax.quiver([-0.95 * reach], [0.92 * reach], [key], [0], color="0.4", **style)
        ax.text(-0.45 * reach, 0.92 * reach, f" {key:g}", va="center", fontsize=TEXT_SIZE - 1)
        n, drawn = walk.points.shape[2], min(shown, walk.points.shape[2])
        ax.set_title(f"{name}\n{scene.xlabel.partition(' (')[0]} {scene.x[k]:.2g}; {drawn} of {n} pairs", fontsize=TEXT_SIZE)
        ax.set(xticks=[], yticks=[], xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        for spine in ax.spines.values():
            spine.set(visible=True, color="0.8")
    look: dict[str, Any] = {"linewidth": 0, "markersize": 5}
    handles = [Line2D([], [], marker=m, color=f"C{i}", label=scene.sets[i], **look) for i, m in enumerate("o^")]
    handles.append(Line2D([], [], color="0.4", marker=">", markersize=4, label=f"length of an arrow: {scene.arrow}"))
    figure.legend(handles=handles, loc="lower center", ncols=3, fontsize=TEXT_SIZE)
    return figure


def readings(scene: Any, step: int | None = None) -> Figure:
    """What was measured along a :class:`umm_kit.losses.microscope.Scene`, a panel per quantity; bounds and truths are dashed."""
    mark = None if step is None else float(scene.x[step])
    lines = {axis: {name: (scene.x, values) for name, values in found.items()} for axis, found in scene.readings.items()}
    return curves([Panel("", scene.xlabel, axis, found, scene.references, mark) for axis, found in lines.items()])
