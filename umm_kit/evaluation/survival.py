"""The arithmetic of drift: survival, half-life, whether decay is exponential, how far words and vectors have moved.

The functions of a measured :class:`Drift` at the end look closer: what goes first, what comes back, what is mere noise, and
whether a model has a code of its own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import linalg, optimize, stats

from umm_kit.evaluation.facts import CATEGORIES, KEPT, Content, agreement, facts
from umm_kit.statistics import N_RESAMPLES, Difference, Estimate, bootstrap, hierarchical_bootstrap, paired_difference, wilson

if TYPE_CHECKING:
    from umm_kit.evaluation.drift import Drift

#: Where ceiling and floor are nearer than this, survival would divide noise by noise.
LEAST_GAP = 0.2
_CHUNK = 2**23  # numbers held at once while resampling


@dataclass(frozen=True)
class HalfLife(Estimate):
    """Cycles until half of the meaning is gone.

    ``censored``: half of it never was; ``value`` is then the number of cycles run and the half-life is longer. ``high`` is
    infinite wherever resamples reach that end.
    """

    censored: bool

    def __str__(self) -> str:
        return f"{'> ' if self.censored else ''}{self.value:.2f} cycles [{self.low:.2f}, {self.high:.2f}] (n={self.n})"


@dataclass(frozen=True)
class ExponentialFit:
    """S(k) = exp(-rate k), and whether the survival curve allows it (a small ``p_value``: it does not)."""

    rate: Estimate  # per cycle
    statistic: float
    p_value: float

    @property
    def rejected(self) -> bool:
        return self.p_value < 0.05

    def __str__(self) -> str:
        verdict = "REJECTED, do not quote the rate" if self.rejected else "not rejected"
        return f"S(k) = exp(-k * {self.rate}): {verdict} (p={self.p_value:.4f})"


@dataclass(frozen=True)
class Survival:
    """A survival curve: S at each step, its 95 % interval, bootstrap resamples [n_resamples, steps] and the number of items."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    resamples: np.ndarray
    n: int
    alike: bool = False  # whether at every step all keep everything, or none anything: resamples then tell less than the steps

    def mean(self) -> Estimate:
        """Mean over the steps."""
        low, high = np.quantile(self.resamples.mean(1), [0.025, 0.975])
        if self.alike:
            low, high = self.low.mean(), self.high.mean()
        return Estimate(float(self.value.mean()), float(low), float(high), self.n)

    def over(self, other: Survival) -> Estimate:
        """This mean less that of another curve of the *same* items, whose resamples are then the same draws of them."""
        assert self.resamples.shape == other.resamples.shape and self.n == other.n, "curves of other items, steps or runs"
        low, high = np.quantile(self.resamples.mean(1) - other.resamples.mean(1), [0.025, 0.975])
        if self is not other and self.alike and other.alike:
            low, high = self.mean().low - other.mean().high, self.mean().high - other.mean().low
        return Estimate(float(self.value.mean() - other.value.mean()), float(low), float(high), self.n)

    def half_life(self) -> HalfLife:
        """Of :func:`half_life`; the steps must be the cycles 1 to K."""
        end, found, drawn = float(len(self.value)), float(half_life(self.value)), half_life(self.resamples)
        low = float(np.quantile(drawn, 0.025, method="lower"))  # infinite ones cannot be interpolated
        high = float(np.quantile(drawn, 0.975, method="higher"))
        if self.alike:
            low, high = float(half_life(self.low)), float(half_life(self.high))
        return HalfLife(min(found, end), min(low, end), high, self.n, not np.isfinite(found))

    def exponential_fit(self) -> ExponentialFit:
        """S(k) = exp(-rate k) by generalised least squares, with the test T^2 = r' V^-1 r against Hotelling's distribution.

        r are the residuals, V the bootstrap covariance of S(1) ... S(K). A curve that levels off, or bends, is rejected.

        Raises:
            ValueError: fewer than two cycles, or a curve that does not vary between resamples (nothing was lost).
        """
        covariance = np.atleast_2d(np.cov(self.resamples, rowvar=False))
        rank, k = int(np.linalg.matrix_rank(covariance, tol=1e-10)), np.arange(1, len(self.value) + 1)
        if rank < 2 or self.n <= rank:
            shown = ", ".join(f"{s:.3f}" for s in self.value)
            raise ValueError(f"S = {shown} of {self.n} items varies too little to test a curve on; take more cycles or items")
        inverse = linalg.pinvh(covariance, atol=1e-10)

        def misfit(rate: float) -> float:
            return float((self.value - np.exp(-rate * k)) @ inverse @ (self.value - np.exp(-rate * k)))

        rate = float(optimize.minimize_scalar(misfit, bounds=(0, 20), method="bounded").x)
        slope, free = k * np.exp(-rate * k), rank - 1
        error = 1.96 / np.sqrt(slope @ inverse @ slope)
        p_value = stats.f.sf(misfit(rate) * (self.n - free) / (free * (self.n - 1)), free, self.n - free)
        return ExponentialFit(Estimate(rate, max(rate - error, 0.0), rate + error, self.n), misfit(rate), float(p_value))


def half_life(survival: Any) -> np.ndarray:
    """First k with S(k) <= 1/2, linear between whole cycles and with S(0) = 1; infinite where that never happens.

    Args:
        survival: [..., K], S(1) to S(K).

    Example:
        >>> [float(half_life(s)) for s in ([0.75, 0.25], [0.9, 0.8])]
        [1.5, inf]
    """
    s = np.asarray(survival, dtype=np.float64)
    s = np.concatenate([np.ones((*s.shape[:-1], 1)), s], -1)
    below = s <= 0.5
    first = np.maximum(below.argmax(-1), 1)[..., None]
    before, after = np.take_along_axis(s, first - 1, -1)[..., 0], np.take_along_axis(s, first, -1)[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = first[..., 0] - 1 + (before - 0.5) / (before - after)
    return np.where(below.any(-1), crossing, np.inf)


def survival(kept: np.ndarray, floor: np.ndarray, ceiling: np.ndarray, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Survival:
    """S(k) = (A(k) - F(k)) / (C - F(k)), with A, F and C means over items: 1 = all is kept, 0 = no more than without memory.

    Items are resampled, the same for every step, and runs too where there are several. Where all items keep everything, or none
    keeps anything, resamples cannot differ: the Wilson bound of A then gives the lower, or the upper, end.

    Args:
        kept, floor: [runs, steps, items], share of each item's facts that its own state, and others' states, keep.
        ceiling: [items], the most that could be read.

    Raises:
        ValueError: NaN, or fewer than two items.

    Example:
        >>> survival(np.array([[[1.0, 0.5]]]), np.full((1, 1, 2), 0.25), np.ones(2)).value.round(3)
        array([0.667])
    """
    runs, n = len(kept), len(ceiling)
    if n < 2 or not all(np.isfinite(x).all() for x in (kept, floor, ceiling)):
        raise ValueError(f"recall, floor or ceiling of {n} item(s) hold NaN, or the items are fewer than 2")
    rng, drawn = np.random.default_rng(seed), []

    def ratio(items: np.ndarray, weights: np.ndarray) -> np.ndarray:
        a, f = (np.einsum("rsb,br->bs", values @ items.T, weights) for values in (kept, floor))
        with np.errstate(divide="ignore", invalid="ignore"):
            return (a - f) / ((items @ ceiling)[:, None] - f)

    for part in np.array_split(np.arange(n_resamples), -(-n_resamples * n // _CHUNK)):
        drawn.append(ratio(*(rng.multinomial(k, np.full(k, 1 / k), len(part)) / k for k in (n, runs))))
    value = ratio(np.full((1, n), 1 / n), np.full((1, runs), 1 / runs))[0]
    resamples = np.concatenate(drawn)
    low, high = np.quantile(resamples, [0.025, 0.975], axis=0)
    f, perfect, nothing = floor.mean((0, 2)), (kept > 1 - 1e-9).all((0, 2)), (kept < 1e-9).all((0, 2))  # shares, summed
    with np.errstate(divide="ignore", invalid="ignore"):
        low = np.where(perfect, (wilson(n, n)[0] - f) / (ceiling.mean() - f), low)
        high = np.where(nothing, (wilson(0, n)[1] - f) / (ceiling.mean() - f), high)
    return Survival(value, low, high, resamples, n, bool((perfect | nothing).all()))


def refuse_narrow(ceiling: float, floors: Any) -> None:
    """ValueError where a floor, of cycles 0, 1, ..., comes nearer to the ceiling than LEAST_GAP."""
    floors = np.atleast_1d(floors)
    worst = int(floors.argmax())
    if not ceiling - floors[worst] >= LEAST_GAP:
        raise ValueError(
            f"the ceiling is {ceiling:.3f} and the floor at cycle {worst} is {floors[worst]:.3f}; expected C - F >= {LEAST_GAP}, "
            "or survival divides noise by noise: take data whose items differ more, or a tokenizer that keeps more"
        )


def mean(values: np.ndarray) -> Estimate:
    """Mean of [runs, items], with its interval over items, and over runs where there are several that differ."""
    if len(values) == 1 or not np.ptp(values, axis=0).any():
        return bootstrap(values.mean(0))
    return replace(hierarchical_bootstrap(list(values), shared_items=True), n=values.shape[1])


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n], of each row of a [n, d] with that of b; 0 where one is all zeros.

    Example:
        >>> cosine(np.eye(2), np.array([[3, 4], [0, 0]]))
        array([0.6, 0. ])
    """
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(1), size, out=np.zeros(len(a)), where=size > 0)


def retrieval_rank(states: np.ndarray, first: np.ndarray) -> np.ndarray:
    """[n], share of other items' origins that are nearer (cosine) to a state than its own, ties half: 0 = first, .5 = chance.

    Example:
        >>> retrieval_rank(np.eye(3), np.eye(3))
        array([0., 0., 0.])
    """
    a, b = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (states, first))
    own, out = (a * b).sum(1), np.empty(len(a))
    for rows in np.array_split(np.arange(len(a)), -(-len(a) // 1024)):
        gap = a[rows] @ b.T - own[rows, None]
        gap[np.arange(len(rows)), rows] = -np.inf
        out[rows] = ((gap > 1e-6).sum(1) + 0.5 * (np.abs(gap) <= 1e-6).sum(1)) / (len(a) - 1)
    return out


def edit_distance(a: str, b: str) -> float:
    """Words to insert, delete or change, over the number of words of the longer text (0 = the same, 1 = nothing in common).

    Example:
        >>> edit_distance("a small red circle", "a red ring")
        0.5
    """
    one, other = a.lower().split(), b.lower().split()
    row = list(range(len(other) + 1))
    for i, word in enumerate(one, start=1):
        last, row = row, [i]
        for j, w in enumerate(other, start=1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (word != w)))
    return row[-1] / max(len(one), len(other), 1)


# --- a closer look at a measured drift ---------------------------------------------------------------------------------


def by_category(drift: Drift) -> pd.DataFrame:
    """Survival of each kind of fact: category, cycle, value, low, high, recall, floor, ceiling, n (items that have any).

    "object" (a thing of the very colour and shape) and "count" (the number of things) are scored here but not counted in
    ``mean_survival``. Where ceiling and floor are nearer than .2, survival is NaN.
    """
    rows = []
    for category in CATEGORIES:
        if not (chosen := drift.table.category == category).any():
            continue
        kept, floor, ceiling = drift.shares(slice(2, None, 2), chosen)
        if kept.shape[-1] < 2:
            continue
        curve, f, c = drift.survival(slice(2, None, 2), chosen), floor.mean((0, 2)), ceiling.mean()
        for k in range(drift.cycles):
            point = (curve.value[k], curve.low[k], curve.high[k]) if c - f[k] >= LEAST_GAP else (np.nan,) * 3
            rows.append((category, k + 1, *point, kept[:, k].mean(), f[k], c, curve.n))
    return pd.DataFrame(rows, columns=["category", "cycle", "value", "low", "high", "recall", "floor", "ceiling", "n"])


def transitions(drift: Drift) -> pd.DataFrame:
    """From one cycle to the next, what becomes of facts: columns category, before, after, n, share (of those before).

    A fact is "kept" since step 0, "lost" (in silence or denied), or "regained": found again after it was lost.
    """
    kept, rows = drift.status[:, ::2] == KEPT, []
    never = np.logical_and.accumulate(kept, axis=1)
    state = np.where(never, "kept", np.where(kept, "regained", "lost"))
    for category in [c for c in CATEGORIES if c in drift.table.category]:
        mine = state[..., drift.table.category == category]
        earlier, later = mine[:, :-1].ravel().tolist(), mine[:, 1:].ravel().tolist()
        total, count = Counter(earlier), Counter(zip(earlier, later, strict=True))
        rows += [(category, before, after, n, n / total[before]) for (before, after), n in sorted(count.items())]
    return pd.DataFrame(rows, columns=["category", "before", "after", "n", "share"])


def first_failure(drift: Drift) -> pd.DataFrame:
    """Which kind of fact goes first: columns category, value (share of items), low, high, n.

    Kinds that fail in the same cycle share the item; "lost": the item could not be read at all; "none": nothing failed.
    """
    table, n = drift.table, len(drift.ids)
    kinds = [c for c in CATEGORIES if (table.counted & (table.category == c)).any()]
    share = np.zeros((len(drift.traces), n, len(kinds) + 2))
    for run, trace in enumerate(drift.traces):
        failed = (drift.status[run, ::2] != KEPT) & table.counted
        count = [[np.bincount(table.owner, row & (table.category == c), n) for row in failed] for c in kinds]
        failing = np.moveaxis(np.array(count) > 0, 0, -1)  # [cycles, n, kinds]
        for i in range(n):
            cycle = int(failing[:, i].any(-1).argmax())  # nothing fails at cycle 0
            if cycle == 0:
                share[run, i, -1] = 1
            elif trace.contents[2 * cycle][i] is None:
                share[run, i, -2] = 1
            else:
                share[run, i, : len(kinds)] = failing[cycle, i] / failing[cycle, i].sum()
    means = [mean(share[..., j]) for j in range(share.shape[-1])]
    rows = [(name, e.value, e.low, e.high, e.n) for name, e in zip([*kinds, "lost", "none"], means, strict=True)]
    return pd.DataFrame(rows, columns=["category", "value", "low", "high", "n"])


def noise(drift: Drift) -> pd.DataFrame:
    """Sampling noise apart from systematic drift, per cycle; asks for ``repeats`` of at least 2.

    Columns: cycle; drift = C - A (what repeats do not average away), low, high; sampling_sd (of an item's recall between
    repeats) and item_sd (of items' true recalls), by analysis of variance; lost (share of facts) and lost_again (the same
    among facts that another repeat has lost: about ``lost`` for pure chance, 1 where the same facts always go); n.
    """
    repeats = len(drift.traces)
    if repeats < 2:
        raise ValueError("one run cannot tell noise from drift; measure with repeats=2 or more")
    kept, _, ceiling = drift.shares(slice(None, None, 2))
    gone, rows = (drift.status[:, ::2] != KEPT)[..., drift.table.counted].sum(0), []
    for k in range(1, drift.cycles + 1):
        within = kept[:, k].var(0, ddof=1).mean()
        between = max(kept[:, k].mean(0).var(ddof=1) - within / repeats, 0.0)
        lost, twice = gone[k].mean() / repeats, (gone[k] * (gone[k] - 1)).mean() / (repeats * (repeats - 1))
        e = mean(ceiling - kept[:, k])
        rows.append((k, e.value, e.low, e.high, within**0.5, between**0.5, lost, twice / lost if lost else 0.0, e.n))
    names = ["cycle", "drift", "low", "high", "sampling_sd", "item_sd", "lost", "lost_again", "n"]
    return pd.DataFrame(rows, columns=names)


def private_code(drift: Drift) -> Difference:
    """How much better a model agrees with itself than with the oracle, about its own pictures (0 = no private code).

    For each text that is drawn and read again: recall of what it says of shapes, colours and sizes in the model's reading
    minus that in the oracle's. Positive: the model reads its own text out of pictures that do not show it. Negative: it
    misreads true pictures. A text that cannot be read counts 0. Its ``p_value`` is that of the sign-flip test.
    """
    assert drift.table is not None
    kinds = drift.traces[0].kinds
    if not (told := [step for step in range(len(kinds) - 2) if kinds[step] == "text"]):
        raise ValueError("one cycle from an image draws no text that is read again; run at least 2 cycles")

    def agreement_after(steps: int) -> np.ndarray:
        """[items], how much of each text is still said or shown so many steps later, over texts and repeats."""
        columns = [list(zip(*trace.contents, strict=True)) for trace in drift.traces]
        return np.array([np.mean([_agrees(c[s], c[s + steps]) for c in run for s in told]) for run in zip(*columns, strict=True)])

    return paired_difference(agreement_after(2), agreement_after(1))


def _agrees(told: Content | None, other: Content | None) -> float:
    """Share of what a text says of shapes, colours and sizes that another content keeps; 0 where it says nothing."""
    if told is None:
        return 0.0
    pairs = zip(facts(told), agreement(told, other), strict=True)
    kept = [status == KEPT for (category, _), status in pairs if category in ("shape", "colour", "size")]
    return float(np.mean(kept)) if kept else 0.0
