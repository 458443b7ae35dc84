"""Do paired latents still tell items apart? Measures of collapse for one reading, and a monitor that raises an alarm.

A loss that only pulls pairs together is lowest where all latents are one point. There are three ways there, and no single
measure sees all of them:

- *scale*: all variance goes, the shape stays. No cosine, rank or retrieval changes; the effective rank may even rise, because
  what is left is evenly spread noise. Only the total variance tells.
- *rank*: everything falls on a few directions. The total variance may stay.
- *mode*: everything falls on few points or into one narrow cone. The cosine of negative pairs tends to 1, retrieval falls.

Rows pair by position: row i of both sides is the same item. All is computed in float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from umm_kit.diagnostics.geometry import effective_rank

Array = np.ndarray | Tensor
_TIE = 1e-12  # cosines closer than this are equal: round-off of float64


@dataclass(frozen=True)
class Collapse:
    """One reading of :func:`collapse`. Where sides a and b differ, the total is that of the side that is worse off.

    Attributes:
        variance_a, variance_b: sum over coordinates of the variance, squared units of z; 0 = one point.
        rank_a, rank_b: centred effective rank in dimensions, [1, min(n - 1, d)]; 0 where nothing varies.
        positive_cosine: mean cosine of (a_i, b_i), [-1, 1]; higher = pairs agree.
        negative_cosine: mean cosine of (a_i, b_j) over all i != j, that is of shuffled pairs, [-1, 1]; 1 = one direction.
        retrieval_at_1: share of items whose partner has a higher cosine than every other item, mean of a to b and b to a,
            [0, 1]; chance is 1 / n, ties are misses.
        uniformity: log of the mean over i != j of exp(-2 |x_i - x_j|^2), x of unit length, within the side where it is higher;
            [-8, 0], 0 = one direction, lower = more evenly spread (Wang and Isola 2020, with t = 2).
        n: rows. Rank, retrieval and the noise of all others depend on it: compare readings of equal n.
    """

    variance_a: float
    variance_b: float
    rank_a: float
    rank_b: float
    positive_cosine: float
    negative_cosine: float
    retrieval_at_1: float
    uniformity: float
    n: int

    @property
    def total_variance(self) -> float:
        """The smaller total variance of both sides."""
        return min(self.variance_a, self.variance_b)

    @property
    def effective_rank(self) -> float:
        """The smaller centred effective rank of both sides. Blind to scale: it may rise while everything shrinks."""
        return min(self.rank_a, self.rank_b)

    @property
    def alignment(self) -> float:
        """Mean of |a_i - b_i|^2 at unit length (Wang and Isola 2020, alpha = 2) = 2 - 2 positive_cosine; lower = pairs agree."""
        return 2 - 2 * self.positive_cosine

    def as_dict(self) -> dict[str, float]:
        """All measures by name, for a log."""
        totals = {"total_variance": self.total_variance, "effective_rank": self.effective_rank, "alignment": self.alignment}
        return totals | asdict(self)


def _side(z: Any, name: str) -> tuple[Tensor, float, float]:
    """Rows of unit length (rows of zeros stay), total variance and effective rank."""
    x = z.detach() if isinstance(z, Tensor) else torch.as_tensor(np.ascontiguousarray(z))
    if x.ndim != 2 or len(x) < 2 or not x.shape[1] or not x.is_floating_point():
        raise ValueError(f"{name} is {tuple(x.shape)} of {x.dtype}; expected floats [n, d], n >= 2")
    eps, x = torch.finfo(x.dtype).eps, x.cpu().double()
    if bad := int((~torch.isfinite(x)).sum()):
        raise ValueError(f"{name} holds {bad} NaN or infinite numbers; the model that made them has diverged")
    centred = x - x.mean(0)
    unit = x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    if float(centred.norm()) <= eps * float(x.norm()):  # round-off of the dtype that came
        return unit, 0.0, 0.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*limits the effective rank")  # said in Collapse.n
        return unit, float(centred.square().sum() / (len(x) - 1)), effective_rank(centred, centre=True)


def _uniformity(unit: Tensor) -> float:
    """log mean exp(2 (2 cos - 2)) over i != j: at unit length |x - y|^2 = 2 - 2 cos."""
    energy = 4 * (unit @ unit.T) - 4
    energy.fill_diagonal_(-math.inf)
    return min(float(energy.flatten().logsumexp(0)) - math.log(len(unit) * (len(unit) - 1)), 0.0)


def collapse(z_a: Float[Array, "n d"], z_b: Float[Array, "n d"]) -> Collapse:
    """How far paired latents are from being one point: scale, rank, and whether pairs can still be told apart.

    Effective rank: Roy and Vetterli 2007, of centred latents. Alignment and uniformity: Wang and Isola 2020, Sec. 4.1. The
    total variance has no bound of its own: it means something beside an earlier reading, which :class:`CollapseMonitor` keeps.

    Args:
        z_a, z_b: [n, d] finite floats, n >= 2, row i of both from the same item. Takes memory for n^2 numbers.
    Returns:
        :class:`Collapse`.
    Raises:
        ValueError: not floats [n, d], n < 2, rows or widths that differ, NaN.

    Example:
        >>> z = torch.eye(4)
        >>> now, small = collapse(z, z), collapse(0.01 * z, 0.01 * z)
        >>> now.retrieval_at_1, small.retrieval_at_1, round(small.total_variance / now.total_variance, 6)
        (1.0, 1.0, 0.0001)
    """
    (a, variance_a, rank_a), (b, variance_b, rank_b) = _side(z_a, "z_a"), _side(z_b, "z_b")
    if a.shape != b.shape:
        raise ValueError(f"z_a is {tuple(a.shape)}, z_b {tuple(b.shape)}; expected the same items, in latents of one width")
    n, cosines = len(a), a @ b.T
    positive = cosines.diagonal().clone()
    others = cosines.fill_diagonal_(-math.inf)
    hits = [(positive > others.amax(k) + _TIE).double().mean() for k in (0, 1)]
    negative = (a.sum(0) @ b.sum(0) - positive.sum()) / (n * (n - 1))
    uniformity = max(_uniformity(a), _uniformity(b))
    same, other = (float(c.clamp(-1, 1)) for c in (positive.mean(), negative))  # past it by round-off only
    return Collapse(variance_a, variance_b, rank_a, rank_b, same, other, float(hits[0] + hits[1]) / 2, uniformity, n)


@dataclass(frozen=True)
class Alarm:
    """Why latents count as collapsed: ``reason`` is scale, rank, mode or constant; ``measure`` went from its reference past
    its limit to ``value``."""

    reason: str
    measure: str
    value: float
    limit: float
    reference: float

    def __str__(self) -> str:
        return f"{self.reason}: {self.measure} is {self.value:.3g}, past {self.limit:.3g} (reference {self.reference:.3g})"


class CollapseMonitor:
    """Reads latents during training and says, by name, when they collapse in scale, rank or mode; it never stops a training.

    The first reading is the reference, so start it on a model that has not collapsed, and look at that reading. The thresholds
    are shares of the reference; all are conventions, chosen so that noise of batches and healthy training raise none:

    - ``variance_share`` .25, reason *scale*: a side's total variance is below a quarter, its standard deviation below half.
      The alignment losses are squares, so by then they have fallen to a quarter though no pair came closer relative to the
      spread. A rescale by .8 leaves .64.
    - ``rank_share`` .25, reason *rank*: a side's effective rank is below a quarter. Not below half, because an untrained map
      spreads noise over more directions than the items have: an aligner trained well from scratch (with the VICReg guard, on
      embeddings whose content has 24 dimensions) went from 40 to 14 while retrieval rose from chance to .99.
    - ``angle_share`` .25, reason *mode*: 1 - negative_cosine is below a quarter. It is half the mean squared distance of
      different items at unit length, the same rule as for the variance, but without scale. Relative, because an untrained
      network may start with all latents in a cone, at a negative cosine of .8.
    - ``retrieval_share`` .5, reason *mode*: retrieval_at_1 is below half of the *best* reading (at the start it may be chance),
      and by more than 5 standard errors of the difference: the best of a thousand small batches is itself 3 too high by luck
      (300 healthy batches of 16 with a retrieval of .4 raised none).
    - reason *constant*: a side does not vary at all; the first reading, too.

    What is healthy may still raise one: a model that learns to ignore nuisance loses rank. An alarm says look, not stop.

    Args:
        variance_share, rank_share, angle_share, retrieval_share: in (0, 1).
    Raises:
        ValueError: a share outside (0, 1).

    Example:
        >>> z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> monitor = CollapseMonitor()
        >>> monitor.update(z, z, step=0), [alarm.reason for alarm in monitor.update(0.1 * z, 0.1 * z, step=10)]
        ([], ['scale', 'scale'])
        >>> monitor.to_frame()[["step", "retrieval_at_1", "alarm"]].values.tolist()
        [[0, 1.0, ''], [10, 1.0, 'scale']]
    """

    def __init__(
        self, variance_share: float = 0.25, rank_share: float = 0.25, angle_share: float = 0.25, retrieval_share: float = 0.5
    ):
        self.shares = {"variance": variance_share, "rank": rank_share, "angle": angle_share, "retrieval": retrieval_share}
        if bad := {name: share for name, share in self.shares.items() if not 0 < share < 1}:
            raise ValueError(f"shares are {bad}; expected all between 0 and 1")
        self.readings: list[tuple[int, Collapse, list[Alarm]]] = []

    def update(self, z_a: Float[Array, "n d"], z_b: Float[Array, "n d"], step: int | None = None) -> list[Alarm]:
        """Take a reading of a batch or a whole set, and return what is wrong with it: an empty list if nothing is.

        Args:
            z_a, z_b: as for :func:`collapse`; as many rows in each reading. step: for the log; by default counted from 0.
        Raises:
            ValueError: as :func:`collapse`; another number of rows than the first reading's.
        """
        return self._add(collapse(z_a, z_b), len(self.readings) if step is None else step)

    def _add(self, now: Collapse, step: int) -> list[Alarm]:
        if self.readings and now.n != (rows := self.readings[0][1].n):
            raise ValueError(f"the reading has {now.n} rows, the first had {rows}; expected as many: rank and retrieval depend "
                             "on it (drop the last, smaller batch, or feed one held-out set)")  # fmt: skip
        first = self.readings[0][1] if self.readings else now
        best = max([now.retrieval_at_1, *(reading.retrieval_at_1 for _, reading, _ in self.readings)])
        alarms = self._alarms(now, first, best)
        self.readings.append((step, now, alarms))
        return alarms

    def _alarms(self, now: Collapse, first: Collapse, best: float) -> list[Alarm]:
        found = []
        for reason, measure in (("scale", "variance"), ("rank", "rank")):
            for name in (f"{measure}_a", f"{measure}_b"):
                value, reference = getattr(now, name), getattr(first, name)
                if value == 0:
                    found += [Alarm("constant", name, value, 0.0, reference)] * (measure == "variance")
                elif value < (limit := self.shares[measure] * reference):
                    found.append(Alarm(reason, name, value, limit, reference))
        limit = 1 - self.shares["angle"] * (1 - first.negative_cosine)
        if now.negative_cosine > limit:
            found.append(Alarm("mode", "negative_cosine", now.negative_cosine, limit, first.negative_cosine))
        error = math.sqrt(sum(p * (1 - p) for p in (now.retrieval_at_1, best)) / now.n)
        limit = min(self.shares["retrieval"] * best, best - 5 * error)
        if now.retrieval_at_1 < limit:
            found.append(Alarm("mode", "retrieval_at_1", now.retrieval_at_1, limit, best))
        return found

    def to_frame(self) -> pd.DataFrame:
        """One row for each reading: step, the measures of :class:`Collapse`, and the reasons of its alarms ("" = none)."""
        rows = [
            {"step": step, **reading.as_dict(), "alarm": ", ".join(dict.fromkeys(alarm.reason for alarm in alarms))}
            for step, reading, alarms in self.readings
        ]
        return pd.DataFrame(rows)

    def state_dict(self) -> dict[str, Any]:
        """The readings as plain numbers, for a checkpoint or JSON; the shares are arguments, not state."""
        return {"readings": [{"step": step, **asdict(reading)} for step, reading, _ in self.readings]}

    def load_state_dict(self, state: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Go on from :meth:`state_dict`: the same reference, and the same alarms as an uninterrupted monitor."""
        self.readings = []
        for row in state["readings"]:
            self._add(Collapse(**{name: value for name, value in row.items() if name != "step"}), row["step"])
