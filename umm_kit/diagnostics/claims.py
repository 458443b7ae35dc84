"""Does this model have the shapes of DIVA's Figure 2? Each claim as a contrast over depth, with its interval and its null."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from umm_kit.published import load

COLUMNS = ["claim", "paper", "here", "low", "high", "null", "n", "verdict"]
VERDICTS = ("reproduced", "not reproduced", "undecided")
PAPER_LAYERS = 24  # of Show-o, whose curves DIVA draws

Terms = tuple[tuple[int, str], ...]  # a signed sum of series
Bands = tuple[np.ndarray, np.ndarray, np.ndarray]  # low, value, high


@dataclass(frozen=True)
class Claim:
    """A shape that DIVA reads off its Figure 2: ``contrast`` of a signed sum of series of one panel is above 0.

    ``nulls``: sums that must not do the same; without any, 0 is the null. ``published``: the sum in ``diva_fig2``, where the
    paper's axis means what ours does.
    """

    text: str
    panel: str
    curve: Terms
    contrast: Callable[[np.ndarray, Bands], tuple[float, float, float]]
    nulls: tuple[Terms, ...] = ()
    published: tuple[str, Terms] | None = None


def _means(bands: Bands, where: np.ndarray) -> tuple[float, float, float]:
    """Mean low, value and high over some layers: as wide as if they all erred together, which is the most that they can."""
    low, value, high = (float(band[where].mean()) for band in bands)
    return low, value, high


def middle(depth: np.ndarray, bands: Bands) -> tuple[float, float, float]:
    """Mean of the middle third less that of the higher outer third: above 0 only if the middle tops *both* ends."""
    first, second = 1 / 3 + 1e-3, 2 / 3 + 1e-3  # depths that were saved are rounded
    thirds = depth <= first, (depth > first) & (depth <= second), depth > second
    if not all(third.any() for third in thirds):
        raise ValueError(f"layers at relative depths {depth.round(2).tolist()} leave a third empty; expected at least 3 layers")
    shallow, mid, deep = (_means(bands, third) for third in thirds)
    ends = [max(a, b) for a, b in zip(shallow, deep, strict=True)]
    return mid[0] - ends[2], mid[1] - ends[1], mid[2] - ends[0]


def deep_half(depth: np.ndarray, bands: Bands) -> tuple[float, float, float]:
    """Mean of the deeper half."""
    return _means(bands, depth > 1 / 2)


_GAP: Terms = ((1, "generation"), (-1, "understanding"))
#: A trough of a curve is a peak of its negative.
CLAIMS = (
    Claim("gradient conflict has a trough in the middle layers", "gradients", ((-1, "conflict"),), middle,
          (((1, "within_understanding"),), ((1, "within_generation"),), ((-1, "conflict, untrained"),))),
    Claim("the reconstruction residual has a peak in the middle layers", "residual", ((1, "residual"),), middle,
          (((1, "random subspace"),), ((1, "another mask draw"),), ((1, "residual, untrained"),)),
          ("reconstruction_residual", ((1, "rate"),))),
    Claim("the effective-rank increment has a peak in the middle layers (%)", "rank", ((1, "increment"),), middle,
          (((1, "another mask draw"),), ((1, "increment, untrained"),)), ("effective_rank_increment_pct", ((1, "rate"),))),
    Claim("generation keeps more high-frequency energy in the deeper half", "spectrum", _GAP, deep_half,
          (((1, "generation, untrained"), (-1, "understanding, untrained")),), ("high_frequency_energy_ratio", _GAP)),
    Claim("so it does at visible positions alone", "spectrum",
          ((1, "generation, visible"), (-1, "understanding, visible")), deep_half),
)  # fmt: skip


def shape_claims(diagnosis: Any, mask_ratio: float | None = None) -> pd.DataFrame:
    """The shapes that DIVA describes in its Figure 2, tested on a model of one's own, each with a verdict.

    With m, s and e the mean of a curve over the middle, first and last third of the layers, a *peak* is m - max(s, e), a
    *trough* min(s, e) - m: a curve that only falls, however bent, has neither. The *gap* is the mean of generation less
    understanding over the deeper half. All are signed so that above 0 is as claimed. Layer 0, the embedding, counts nowhere.

    *Interval.* All layers see the same examples, so their errors are correlated, by how much the frame does not tell. Full
    correlation is assumed, the widest case: half-widths are averaged within a third and added across a difference. So an
    "undecided" may be decided by more examples, and a verdict stands on at least 95 %.

    *Nulls.* The same contrast of what could make the shape without any conflict of tasks: two batches of *one* task in the place
    of two tasks (a trough of noise is a peak of the within-task cosine), a random subspace of equal dimension, another mask draw,
    and a model with random weights where ``uk.diagnose(untrained=...)`` had one. The spectral gap has no other null than
    the last; the same at visible positions alone is a claim of its own, whose inputs are matched, so that 0 is its null.

    *reproduced*: the whole interval is above 0 and above every null's interval. *not reproduced*: the whole interval is below 0,
    or a null is above 0 for certain and reaches the value. *undecided*: anything else, a missing null included.

    Source: DIVA (arXiv 2605.25328) Fig. 2 and Sec. 2; the contrasts and the rule are ours.

    Args:
        diagnosis: of at least 3 layers, with any of the panels gradients, residual, rank and spectrum.
        mask_ratio: one that was diagnosed; the middle one by default.

    Returns:
        Columns claim, paper, here, low, high, null (the highest of the nulls, NaN without one), n, verdict. ``paper`` is the
        contrast of the published points, read by eye, at the nearest published mask ratio: compare signs, for rank rule, stacking
        and cut-off, which the paper does not state, move the sizes. It is NaN for gradient conflict, whose axis in the paper has
        no formula and cannot be 1 - cos, and at visible positions, which the paper does not show.

    Raises:
        ValueError: none of the panels, fewer than 3 layers, a mask ratio that was not diagnosed.

    Example:
        >>> from umm_kit.diagnostics.report import Diagnosis
        >>> rows = [("rank", "increment", False, 0.4, l, l / 6, v, v - 1, v + 1, 99) for l, v in enumerate([0, 5, 5, 9, 9, 5, 5])]
        >>> rows += [("rank", "another mask draw", True, 0.4, l, l / 6, 2.0, 1.5, 2.5, 99) for l in range(7)]
        >>> names = ["panel", "series", "null", "mask_ratio", "layer", "depth", "value", "low", "high", "n"]
        >>> shape_claims(Diagnosis(pd.DataFrame(rows, columns=names), {}))[["here", "low", "high", "verdict"]].values.tolist()
        [[4.0, 2.0, 6.0, 'reproduced']]
    """
    frame = diagnosis.frame
    ratios = sorted(frame.mask_ratio.dropna().unique())
    ratio = (ratios[len(ratios) // 2] if ratios else np.nan) if mask_ratio is None else mask_ratio
    if mask_ratio is not None and mask_ratio not in ratios:
        raise ValueError(f"mask ratio {mask_ratio} was not diagnosed; there are {[float(r) for r in ratios]}")
    frame = frame[(frame.depth > 0) & (frame.mask_ratio.isna() | (frame.mask_ratio == ratio))]
    rows = [_test(claim, frame[frame.panel == claim.panel], float(ratio)) for claim in CLAIMS]
    if not (rows := [row for row in rows if row]):
        raise ValueError(f"the diagnosis has the panels {list(diagnosis.frame.panel.unique())}; no claim is about one of these")
    return pd.DataFrame(rows, columns=COLUMNS)


def _test(claim: Claim, panel: pd.DataFrame, ratio: float) -> list[Any] | None:
    """One row of the table, or None where the curve was not diagnosed."""
    if (here := _contrast(claim, panel, claim.curve)) is None:
        return None
    low, value, high = here
    found = [null for terms in claim.nulls if (null := _contrast(claim, panel, terms)) is not None]
    tested = bool(found) or not claim.nulls
    if high < 0 or any(null[0] > 0 and null[1] >= value for null in found):
        verdict = "not reproduced"
    elif low > 0 and tested and all(low > null[2] for null in found):
        verdict = "reproduced"
    else:
        verdict = "undecided"
    n = int(panel[panel.series.isin([name for _, name in claim.curve])].n.min())
    strongest = max((null[1] for null in found), default=np.nan)
    return [claim.text, _published(claim, ratio), value, low, high, strongest, n, verdict]


def _contrast(claim: Claim, panel: pd.DataFrame, terms: Terms) -> tuple[float, float, float] | None:
    """Low, value and high of the claim's contrast of a signed sum of series, or None where one of them is missing.

    A null that came without an interval counts as known exactly. A value that is undefined makes all of it so.
    """
    curves = [panel[panel.series == name].set_index("depth").sort_index() for _, name in terms]
    if any(curve.empty for curve in curves):
        return None
    depth = curves[0].index.to_numpy()
    total = [np.zeros(len(depth)) for _ in range(3)]
    for (sign, _), curve in zip(terms, curves, strict=True):
        exact = curve.low.isna() & curve.null
        low, high = (curve[end].where(~exact, curve.value).reindex(depth) for end in ("low", "high"))
        ends = (low, curve.value.reindex(depth), high)
        total = [a + sign * b.to_numpy() for a, b in zip(total, ends if sign > 0 else ends[::-1], strict=True)]
    return claim.contrast(depth, (total[0], total[1], total[2]))


def _published(claim: Claim, ratio: float) -> float:
    """The contrast of the paper's points, means being over those that could be read; NaN where it has none to compare."""
    if claim.published is None:
        return np.nan
    name, terms = claim.published
    points = load("diva_fig2")
    points = points[(points.panel == name) & (points.layer > 0)]
    rates = [s for s in points.series.unique() if s.startswith("rate_")]
    nearest = min(rates, key=lambda s: abs(float(s.removeprefix("rate_")) - ratio), default="")
    curves = [sign * points[points.series == (nearest if s == "rate" else s)].set_index("layer").value for sign, s in terms]
    curve = sum(curves[1:], curves[0]).dropna()
    values = curve.to_numpy()
    return claim.contrast(curve.index.to_numpy() / PAPER_LAYERS, (values, values, values))[1]
