"""Images and token states as pictures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

TEXT_SIZE = 8  # points

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
