"""Points in a plane: maps of latents, distances between groups, and the arrows that a loss puts on points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from umm_kit.plots.lines import Panel, curves
from umm_kit.plots.pictures import TEXT_SIZE, as_array

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
    beside = 0.45 * (len(steps) > 1)  # inches, for the names of rows
    figure = Figure(figsize=(beside + columns * size, rows * (1.1 * size + 0.2) + 0.5))
    edges = {"left": (beside + 0.06) / figure.get_figwidth(), "right": 1 - 0.06 / columns, "wspace": 0.05, "hspace": 0.1}
    figure.subplots_adjust(**edges, bottom=0.35 / figure.get_figheight(), top=1 - 0.4 / figure.get_figheight())
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
        ax.quiver([-0.95 * reach], [1.1 * reach], [key], [0], color="0.4", **style)
        ax.text(-0.45 * reach, 1.1 * reach, f" {key:g}", va="center", fontsize=TEXT_SIZE - 1)
        n, drawn = walk.points.shape[2], min(shown, walk.points.shape[2])
        at, pairs = f"{scene.xlabel.partition(' (')[0]} {scene.x[k]:.2g}", f"{drawn} of {n} pairs"
        if not beside:
            ax.set_title(f"{name}\n{at}; {pairs}", fontsize=TEXT_SIZE)
        elif ax.get_subplotspec().is_first_row():
            ax.set_title(at, fontsize=TEXT_SIZE)
        if beside and ax.get_subplotspec().is_first_col():
            ax.set_ylabel(f"{name}\n{pairs}", fontsize=TEXT_SIZE)
        ax.set(xticks=[], yticks=[], xlim=(-reach, reach), ylim=(-reach, 1.22 * reach), aspect="equal")
        for spine in ax.spines.values():
            spine.set(visible=True, color="0.8")
    look: dict[str, Any] = {"linewidth": 0, "markersize": 5}
    handles = [Line2D([], [], marker=m, color=f"C{i}", label=scene.sets[i], **look) for i, m in enumerate("o^")]
    handles.append(Line2D([], [], color="0.4", marker=">", markersize=4, label=f"length of an arrow: {scene.arrow}"))
    figure.legend(handles=handles, loc="lower center", ncols=3, fontsize=TEXT_SIZE)
    return figure


def pushes(panels: Mapping[str, Sequence[tuple[str, float, float]]], xlabel: str, size: float = 2.6) -> Figure:
    """Values on a line each, and the arrow that minus a gradient puts on every one of them.

    Args:
        panels: title -> rows (label, value, push); the longest arrow of a panel is half as long as its values are apart.

    Raises:
        ValueError: no panel, or one without rows.

    Example:
        >>> len(pushes({"a loss": [("best", 0.9, 1.0), ("worst", 0.1, -1.0)]}, "score").axes)
        1
    """
    if not panels or not all(panels.values()):
        raise ValueError("pushes need at least one panel, and rows in each")
    most = max(map(len, panels.values()))
    figure = Figure(figsize=(1.2 + size * len(panels), 0.8 + 0.25 * most), layout="constrained")
    for ax, (title, rows) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        values, longest = [value for _, value, _ in rows], max(abs(push) for *_, push in rows) or 1.0
        reach = (max(values) - min(values)) or 1.0
        for y, (_, value, push) in enumerate(rows):
            colour = "0.5" if not push else "C0" if push > 0 else "C3"
            ax.plot(value, y, "o", color=colour, markersize=5)
            if push:
                to = (value + 0.5 * reach * push / longest, y)
                ax.annotate("", to, (value, y), arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.6})
        ax.set(title=title, xlabel=xlabel, yticks=range(len(rows)), yticklabels=[label for label, *_ in rows])
        ax.set(xlim=(min(values) - 0.7 * reach, max(values) + 0.7 * reach), ylim=(len(rows) - 0.5, -0.5))
    return figure


def readings(scene: Any, step: int | None = None) -> Figure:
    """What was measured along a :class:`umm_kit.losses.microscope.Scene`, a panel per quantity; bounds and truths are dashed."""
    mark = None if step is None else float(scene.x[step])
    lines = {axis: {name: (scene.x, values) for name, values in found.items()} for axis, found in scene.readings.items()}
    return curves([Panel("", scene.xlabel, axis, found, scene.references, mark) for axis, found in lines.items()])


def paths(
    points: Any, items: Sequence[int] = (0,), upto: int | None = None, names: Sequence[str] = (), size: float = 3.4
) -> Figure:
    """The ways of some items over cycles, in front of where all items stood at first; of several runs, a family from each item.

    Args:
        points: [runs, cycles + 1, items, 2], or of one run [cycles + 1, items, 2], as ``Drift.paths`` gives.
        items: whose ways. upto: the last cycle that is drawn; all by default. names: of the items, for the legend.

    Raises:
        ValueError: another shape, or no such item or cycle.
    """
    where = as_array(points).astype(float)
    where = where[None] if where.ndim == 3 else where
    if where.ndim != 4 or where.shape[3] != 2 or not all(0 <= item < where.shape[2] for item in items):
        raise ValueError(f"points are {where.shape}, {items=}; expected [(runs,) cycles + 1, items, 2] and some of the items")
    last = where.shape[1] - 1 if upto is None else upto
    if not 0 <= last < where.shape[1]:
        raise ValueError(f"cycle {last} of {where.shape[1] - 1} was asked for")
    figure = Figure(figsize=(size, size), layout="constrained")
    ax = figure.subplots()
    ax.scatter(where[0, 0, :, 0], where[0, 0, :, 1], s=8, color="0.75", label="all items, step 0")
    for k, item in enumerate(items):
        for ways in where[:, : last + 1, item]:
            ax.plot(*ways.T, color=f"C{k}", linewidth=1.2, marker="o", markersize=3)
            ax.plot(*ways[-1], "*", color=f"C{k}", markeredgecolor="0.2", markersize=10)
        ax.plot(*where[0, 0, item], "s", color=f"C{k}", markeredgecolor="0.2", markersize=8, zorder=3)
        ax.plot([], [], color=f"C{k}", label=names[k] if names else "this item" if len(items) == 1 else f"item {item}")
    for marker, label in (("s", "origin"), ("*", f"cycle {last}")):
        ax.plot([], [], marker, color="1", markeredgecolor="0.2", label=label)
    low, high = where.min((0, 1, 2)), where.max((0, 1, 2))
    margin = 0.05 * (high - low) + 1e-9
    ax.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    ax.set(xlabel="component 1", ylabel="component 2")
    if names:
        figure.legend(fontsize=TEXT_SIZE - 1, loc="outside lower center", ncols=1)
    else:
        ax.legend(fontsize=TEXT_SIZE - 1, loc="best")
    return figure
