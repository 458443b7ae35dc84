"""What DIVA says of factors (Sec. 3.2 and 3.3): shared ones agree, unique ones tell nothing of each other, both are orthogonal.

``scores[i, j] = f(x_i, y_j)``: the diagonal holds the N positive pairs, everything else the negatives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

VARIANTS = ("corrected", "released")
READINGS = ("batch", "sample")


@dataclass(frozen=True)
class InfoNCE:
    """Parts of :func:`infonce` and :func:`alignment`, in nats: loss = bound - estimate."""

    loss: Float[Tensor, ""]  # to minimise
    estimate: Float[Tensor, ""]  # lower bound on the mutual information
    bound: float  # log of the number of candidates: the estimate cannot exceed it
    accuracy: Float[Tensor, ""]  # share of the x_i whose partner scores above every other candidate; chance is 1 / candidates
    n: int  # positive pairs


def _pairs(scores: Tensor, square: bool = True) -> int:
    n, m = scores.shape if scores.ndim == 2 else (0, 0)
    if n < 2 or m < n or (square and n != m):
        raise ValueError(f"scores are {tuple(scores.shape)}; expected [N, N] with N >= 2, positive pairs on the diagonal")
    return n


def infonce(scores: Float[Tensor, "N candidates"]) -> InfoNCE:
    """Cross-entropy of picking the partner of x_i among N candidates; its gap to log N bounds I(x; y) from below.

    loss = -1/N sum_i log( exp f(x_i, y_i) / sum_j exp f(x_i, y_j) ),   log N - loss <= I(x; y)

    van den Oord et al. 2018, Eqs. 4 and 5; DIVA Eq. 6 omits log N and does not say whether the positive pair counts in the
    denominator: here it does, without which the bound does not hold.

    Args:
        scores: [N, N], any real numbers, N >= 2. Columns beyond N are further negatives; minus infinity strikes one out (then
            log N is the mean over i of the log of the candidates that are left).
    Returns:
        InfoNCE: loss (lower = more information), estimate (higher = more), bound, in nats; accuracy in [0, 1], n.
    Raises:
        ValueError: scores are not [N, N] or wider, or N < 2.

    Example:
        >>> infonce(torch.zeros(4, 4)).estimate.item()  # a constant critic knows nothing
        0.0
    """
    n = _pairs(scores, square=False)
    positive, candidates = scores.diagonal(), scores != -math.inf
    loss = -torch.log_softmax(scores, 1).diagonal().mean()
    everyone = bool(candidates.all())
    bound = math.log(scores.shape[1]) if everyone else float(candidates.sum(1).double().log().mean())
    best = scores.detach().masked_fill(torch.eye(*scores.shape, dtype=torch.bool, device=scores.device), -math.inf).amax(1)
    return InfoNCE(loss, bound - loss, bound, (positive.detach() > best).float().mean(), n)


def _both_ways(scores: Tensor) -> InfoNCE:
    """Mean of x picking y and y picking x."""
    a, b = infonce(scores), infonce(scores.T)
    accuracy = (a.accuracy + b.accuracy) / 2
    return InfoNCE((a.loss + b.loss) / 2, (a.estimate + b.estimate) / 2, (a.bound + b.bound) / 2, accuracy, a.n)


def club(scores: Float[Tensor, "N N"]) -> Float[Tensor, ""]:
    """Contrast of positive and negative pairs, in nats: CLUB or NCE-CLUB, depending on the scores.

    mean_i f(x_i, y_i) - mean_{i != j} f(x_i, y_j)

    With f = log q(y | x) (:func:`gaussian_scores`) it is CLUB (Cheng et al. 2020, Eq. 6); with f = the critic that InfoNCE
    trained on the same variables it is NCE-CLUB (DIVA Eq. 7; Liang et al. 2023). With the true density, or the optimal
    critic, its expectation is **I + KL(p_x p_y || p_xy)**, not I: rho^2 / (1 - rho^2) per Gaussian dimension. With a critic
    that is not optimal it bounds nothing. Terms of f in x alone or in y alone cancel.

    Args:
        scores: [N, N], any real numbers, N >= 2.
    Returns:
        Scalar; higher = more dependent, 0 expected of independent variables whatever the critic (on pairs it was not
        fitted to).
    Raises:
        ValueError: scores are not square or N < 2.

    Example:
        >>> club(torch.eye(4)).item()
        1.0
    """
    n = _pairs(scores)
    positive = scores.diagonal().sum()
    return positive / n - (scores.sum() - positive) / (n * (n - 1))


def gaussian_scores(
    mean: Float[Tensor, "N d"], log_variance: Float[Tensor, "N d"], y: Float[Tensor, "M d"], variant: str = "corrected"
) -> Float[Tensor, "N M"]:
    """log N(y_j; mean_i, diag exp(log_variance_i)) for all pairs: what CLUB contrasts.

    -1/2 sum_d [ (y_jd - mean_id)^2 exp(-log_variance_id) + log_variance_id + log 2 pi ]   (Cheng et al. 2020, Sec. 3.2)

    ``variant="released"`` is what DIVA's authors' module has: without the factor 1/2, so that CLUB comes out twice as large, and
    with tanh(log_variance), so that no variance below 1/e or above e can be told. (It also contrasts shared with unique factors
    of one flow, where the paper contrasts unique factors across flows: that is up to who calls.)

    Args:
        mean, log_variance: [N, d], predicted from x_i.
        y: [M, d].
    Returns:
        [N, M], in nats ("released": in half nats).
    Raises:
        ValueError: unknown variant.

    Example:
        >>> round(gaussian_scores(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1)).item(), 3)
        -1.419
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; expected one of {VARIANTS}")
    if variant == "released":
        log_variance = log_variance.tanh()
    precision = torch.exp(-log_variance)
    # (y - m)^2 p = y^2 p - 2 y (m p) + m^2 p: three matrix products instead of an [N, M, d] array.
    square = precision @ (y * y).T - 2 * (mean * precision) @ y.T + (mean * mean * precision).sum(1, keepdim=True)
    twice = -(square + (log_variance + math.log(2 * math.pi)).sum(1, keepdim=True))
    return twice if variant == "released" else 0.5 * twice


class _Net(nn.Module):
    """A linear map plus a small MLP: for Gaussian data the first is nearly enough."""

    def __init__(self, inputs: int, outputs: int, width: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        layers = (nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs))
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.mlp(x)


class Critic(nn.Module):
    """Scores of all pairs, f(x, y) = g(x) . h(y) / sqrt(features) + c(y): [N, d_x] and [M, d_y] to [N, M].

    Separable, so that N^2 scores cost N passes; InfoNCE determines f up to a term in x alone, hence none is learned.

    Example:
        >>> Critic(3, 2)(torch.zeros(5, 3), torch.zeros(5, 2)).shape
        torch.Size([5, 5])
    """

    def __init__(self, x_size: int, y_size: int, width: int = 64, features: int = 32):
        super().__init__()
        self.g, self.h = _Net(x_size, features, width), _Net(y_size, features + 1, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        g, h = self.g(x), self.h(y)
        return g @ h[:, 1:].T / math.sqrt(g.shape[1]) + h[:, 0]


class ConditionalGaussian(nn.Module):
    """Scores of all pairs, f(x, y) = log q(y | x) with q normal, of diagonal covariance: the critic of CLUB.

    ``variant``: see :func:`gaussian_scores`.

    Example:
        >>> ConditionalGaussian(3, 2)(torch.zeros(5, 3), torch.zeros(5, 2)).shape
        torch.Size([5, 5])
    """

    def __init__(self, x_size: int, y_size: int, width: int = 64, variant: str = "corrected"):
        super().__init__()
        self.net, self.variant = _Net(x_size, 2 * y_size, width), variant

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mean, log_variance = self.net(x).chunk(2, 1)
        return gaussian_scores(mean, log_variance, y, self.variant)


# --- vectors of a batch, whole or spread over processes ----------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """All processes' rows in order of rank; backward adds up what every process's loss says of the local ones."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # type: ignore[override]
        ctx.start, ctx.length = dist.get_rank() * len(rows), len(rows)
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.length]


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes in order of rank, with gradient; on one process the rows themselves.

    Every one of W processes then computes the same loss of the whole batch, and the gradient that comes back to a row is W
    times that loss's: the mean over processes that DistributedDataParallel takes of parameter gradients makes it right.

    Args:
        rows: [n, ...], as many on every process.
    Returns:
        [W n, ...].
    Raises:
        ValueError: the processes hold different numbers of rows.

    Example:
        >>> gathered(torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    if len({int(count) for count in counts}) > 1:
        raise ValueError(f"processes hold {[int(c) for c in counts]} rows; expected equal numbers: drop the last, smaller batch")
    return _Gather.apply(rows)  # type: ignore[no-any-return]


class NotFinite(ValueError, FloatingPointError):
    """NaN or infinite numbers among vectors; trainers keep the batch of a FloatingPointError."""


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one precision, at least float32. Called on gathered rows: every process raises, and none waits for another."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"vectors are {tuple(x.shape)} and {tuple(y.shape)}; expected [N, f] each, row i from the same anchor")
    if len(x) < 2:
        raise ValueError("a batch of one: with no other pair there is nothing to contrast with; expected N >= 2")
    if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise NotFinite("vectors hold NaN or infinite numbers; expected finite ones: the model that made them has diverged")
    kind = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(kind), y.to(kind)


@contextmanager
def _full_precision(x: Tensor) -> Iterator[None]:
    """No autocast: in bf16 a score of 10 may be off by .03."""
    with torch.autocast(x.device.type, enabled=False):
        yield


def alignment(
    x: Float[Tensor, "N f"],
    y: Float[Tensor, "N f"],
    directed: bool = False,
    temperature: float = 0.1,
    facts: Int[Tensor, " N"] | None = None,
    queue: Float[Tensor, "M f"] | None = None,
    queue_facts: Int[Tensor, " M"] | None = None,
    gather: bool = True,
) -> InfoNCE:
    """InfoNCE between two sets of vectors by f(x_i, y_j) = cos(x_i, y_j) / temperature: shared factors of one anchor agree.

    symmetric: 1/2 [InfoNCE(x, y) + InfoNCE(y, x)]      directed: InfoNCE(x, sg[y]), each x_i picks its y_i

    DIVA Eq. 6 (symmetric) and Eq. 10 (directed): L_{U->G} = ``alignment(z_u, z_g, directed=True)``, L_{G->U} the reverse; for
    targets from the averaged copy of the model, pass its vectors as y. Without stop-gradient the sum of both directions is
    twice the symmetric form.

    Args:
        x, y: [N, f], row i of both from the same anchor. All arguments are this process's; the loss is of all processes'.
        temperature: > 0; the default is ours.
        facts: [N] integers, the same for anchors that say the same: such pairs i != j are not negatives. The rest are no longer
            draws of p(y), and the estimate no bound on I(x; y) but too high.
        queue: [M, f] targets of earlier micro-batches, further negatives without gradient (directed only); ``queue_facts`` [M].
        gather: False to stay on this process, where others make no such call.
    Returns:
        InfoNCE: loss (lower = better aligned), estimate = bound - loss, bound = log(N + M), in nats; accuracy of retrieval; N.
    Raises:
        ValueError: N < 2, rows that do not match, NaN, a queue without ``directed``, facts for one of batch and queue only,
            no pair of different facts.

    Example:
        >>> parts = alignment(torch.eye(4), torch.eye(4))
        >>> round(parts.estimate.item(), 3), round(parts.bound, 3), parts.accuracy.item()
        (1.386, 1.386, 1.0)
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected above 0")
    if queue is not None and not directed:
        raise ValueError("a queue holds further targets y, and y picks among x here too; expected directed=True")
    if (queue_facts is not None) != (queue is not None and facts is not None):
        raise ValueError("expected facts for the batch and for the queue, or for neither")
    y = y.detach() if directed else y
    if gather:
        x, y = gathered(x), gathered(y)
        facts, queue, queue_facts = (None if v is None else gathered(v) for v in (facts, queue, queue_facts))
    x, y = _checked(x, y)
    if x.shape[1] != y.shape[1] or (queue is not None and queue.shape[1:] != y.shape[1:]):
        shapes = [tuple(v.shape) for v in (x, y, queue) if v is not None]
        raise ValueError(f"vectors are {shapes}; expected the same number of columns")
    with _full_precision(x):
        targets = y if queue is None else torch.cat([y, queue.detach().to(y.dtype)])
        normal = nn.functional.normalize
        scores = normal(x) @ normal(targets).T / temperature
    if facts is not None:
        every = facts if queue_facts is None else torch.cat([facts, queue_facts])
        if facts.shape != x.shape[:1] or every.shape != targets.shape[:1] or facts.is_floating_point():
            raise ValueError(f"facts are {tuple(every.shape)} of {facts.dtype}; expected one integer for each of {len(targets)}")
        if bool((every == every[0]).all()):
            raise ValueError(f"all {len(every)} pairs state one fact: no negative is left; enlarge the batch, or give no facts")
        same = (facts[:, None] == every[None]).fill_diagonal_(False)
        scores = scores.masked_fill(same, -math.inf)
    return infonce(scores) if directed else _both_ways(scores)


@dataclass(frozen=True)
class Orthogonality:
    """Parts of :func:`orthogonality`; both 0 where the two factors are orthogonal."""

    loss: Float[Tensor, ""]  # Eq. 9: grows with the fourth power of the vectors' scale
    overlap: Float[Tensor, ""]  # in [0, 1], without scale


def orthogonality(
    shared: Float[Tensor, "N f_sh"], unique: Float[Tensor, "N f_uni"], reading: str = "batch", gather: bool = True
) -> Orthogonality:
    """Overlap of the shared and the unique factor of one flow i, || (z_sh^i)^T z_uni^i ||_F^2 (DIVA Eq. 9; sum over the flows).

    batch:   loss = || Z_sh^T Z_uni ||_F^2 / N^2,  overlap = || Z_sh^T Z_uni ||_F^2 / (|| Z_sh^T Z_sh ||_F || Z_uni^T Z_uni ||_F)
    sample:  loss = mean_n (z_sh_n . z_uni_n)^2,   overlap = mean_n cos(z_sh_n, z_uni_n)^2

    The paper prints no index of samples, so both can be meant: a Frobenius norm asks for the matrices Z [N, f] of a batch
    (as the difference loss of Bousmalis et al. 2016), a factor z for the inner product of two vectors. N^2, not printed, frees
    the loss from the batch size. "batch" does not change when either factor is rotated; its overlap is linear CKA without
    centring, its loss for independent factors of unit variance not 0 but near f_sh f_uni / N. "sample" changes when one factor
    is rotated alone, so what it asks for depends on the axes that the encoders happen to choose.

    Args:
        shared: [N, f_sh]. unique: [N, f_uni] ("sample": f_uni = f_sh). N >= 2; this process's rows, see :func:`gathered`.
    Returns:
        Orthogonality: loss >= 0 and overlap in [0, 1], 0 = orthogonal; a factor of zeros overlaps with nothing.
    Raises:
        ValueError: unknown reading, rows that do not match, NaN, N < 2, different widths for "sample".

    Example:
        >>> parts = orthogonality(torch.tensor([[2.0, 0], [0, 2]]), torch.tensor([[0.0, 1], [1, 0]]))
        >>> parts.loss.item(), round(parts.overlap.item(), 6)  # each row orthogonal, but one a rotation of the other
        (2.0, 1.0)
    """
    if reading not in READINGS:
        raise ValueError(f"reading is {reading!r}; expected one of {READINGS}")
    shared, unique = _checked(*((gathered(shared), gathered(unique)) if gather else (shared, unique)))
    with _full_precision(shared):
        if reading == "batch":
            square = (shared.T @ unique).square().sum()
            # || Z^T Z ||_F = || Z Z^T ||_F: the smaller of the two products.
            sizes = [torch.linalg.matrix_norm(z.T @ z if z.shape[1] < len(z) else z @ z.T) for z in (shared, unique)]
            return Orthogonality(square / len(shared) ** 2, square / (sizes[0] * sizes[1]).clamp(min=1e-30))
        if shared.shape[1] != unique.shape[1]:
            raise ValueError(f"factors are {shared.shape[1]} and {unique.shape[1]} wide; an inner product needs equal widths")
        cosine = nn.functional.cosine_similarity(shared, unique)
        return Orthogonality((shared * unique).sum(1).square().mean(), cosine.square().mean())


# --- unique factors: NCE-CLUB and the critic that must keep up ---------------------------------------------------------


@dataclass(frozen=True)
class UniquePenalty:
    """What a call of :class:`UniqueCritic` returns, in nats."""

    loss: Float[Tensor, ""]  # to minimise: the contrast, or 0 with zero gradient while not active
    contrast: Float[Tensor, ""]  # Eq. 7 on these pairs, active or not, without gradient
    held_out: float  # the critic's InfoNCE estimate on those of these pairs it has not met; if fewer than two, the last there was
    bound: float  # log of the number of those pairs: held_out cannot exceed it
    active: bool  # held_out >= threshold


_JUDGES = 64  # held-out pairs that settle whether a critic knows anything


def _after(before: float, now: float, share: float) -> float:
    """Running mean; the first value as it is."""
    return now if math.isnan(before) else share * now + (1 - share) * before


class UniqueCritic(nn.Module):
    """NCE-CLUB penalty between the unique factors of both flows, with the critic f it needs (DIVA Eq. 7).

    loss = mean_i f(x_i, y_i) - mean_{i != j} f(x_i, y_j),   f trained by symmetric InfoNCE on detached earlier pairs

    Eq. 7 says something of x and y only while f is close to the best critic *of the present factors* (see :func:`club`);
    against a critic that stands still, factors go to where it scores them low, which is dependence of another sign. So each
    call in training mode, in this order: scores the pairs with the critic as it is (penalty, and held-out value), puts them into
    a first-in first-out buffer, and trains the critic on draws from it for ``steps`` steps, or ``warm_up`` when the buffer is
    full for the first time. In evaluation mode it only scores.

    The held-out value is of anchors that the critic was never fitted to, as it would be too high on others. Where anchors come
    back (``repeats``), a critic knows them for long after they have left the buffer: there, every fourth anchor, by a hash of
    its id, never enters it, and those alone are held out. In a stream without end, every pair is.

    A held-out value below ``threshold`` (.1 nats) means that the critic knows nothing, because the factors are independent
    or because it is poor. Its gradient would then be noise of full size, so the penalty is *inactive*: 0, and it says so.
    A batch with fewer than two pairs new to the critic says nothing of that: the value before stays. It also shows that the data
    set fits into the buffer; from then on every fourth anchor, by a hash of its id, is kept out, so that there is a value.

    The module keeps its own optimizer, buffer, generator and counts, all in ``state_dict`` (``torch.save``; not safetensors):
    loaded into a critic of the same arguments, it goes on bit for bit. Leave its parameters out of other optimizers. Every
    process trains the same critic on the pairs of all. Use one for each layer: layers of one anchor are no independent pairs.

    Args:
        size: f, columns of x and of y.
        capacity: pairs in the buffer: several batches, but few enough that the factors have not moved on since.
        batch_size: pairs a critic step draws; its InfoNCE cannot exceed log(batch_size).
        repeats: whether anchors come back, as in training that runs over its data more than once.

    Example:
        >>> critic = UniqueCritic(2, capacity=64, batch_size=32)
        >>> critic(torch.randn(8, 2), torch.randn(8, 2), torch.arange(8)).active  # untrained
        False
    """

    x: Tensor
    y: Tensor
    ids: Tensor

    def __init__(
        self, size: int, capacity: int = 1024, batch_size: int = 128, steps: int = 5, warm_up: int = 100,
        learning_rate: float = 1e-3, threshold: float = 0.1, seed: int = 0, repeats: bool = True,
    ):  # fmt: skip
        super().__init__()
        if not (size >= 1 and 2 <= batch_size <= capacity and steps >= 1 and warm_up >= 0):
            raise ValueError(
                f"size={size}, capacity={capacity}, batch_size={batch_size}, steps={steps}, warm_up={warm_up}; expected "
                "size and steps >= 1, 2 <= batch_size <= capacity, warm_up >= 0"
            )
        self.batch_size, self.steps, self.warm_up, self.threshold = batch_size, steps, warm_up, threshold
        self.seen = 0  # pairs put into the buffer so far
        self.last, self.repeats = (math.nan, math.nan), repeats  # held-out value with its bound
        with torch.random.fork_rng(devices=[]):  # the same critic on all processes, the caller's generator untouched
            torch.manual_seed(seed)
            self.critic = Critic(size, size)
        self.register_buffer("x", torch.zeros(capacity, size))
        self.register_buffer("y", torch.zeros(capacity, size))
        self.register_buffer("ids", torch.zeros(capacity, dtype=torch.long))
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(self.critic.parameters(), lr=learning_rate, weight_decay=1e-2)

    def get_extra_state(self) -> dict[str, Any]:
        state = {"seen": self.seen, "generator": self.generator.get_state(), "optimizer": self.optimizer.state_dict()}
        return state | {"last": self.last}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen, self.last = state["seen"], state["last"]
        self.generator.set_state(state["generator"].cpu())
        self.optimizer.load_state_dict(state["optimizer"])

    @property
    def _filled(self) -> int:
        return min(self.seen, len(self.ids))

    def forward(self, x: Float[Tensor, "N f"], y: Float[Tensor, "N f"], ids: Int[Tensor, " N"]) -> UniquePenalty:
        """Penalty of the pairs; in training mode the critic then learns from them.

        Args:
            x, y: [N, f], unique factors of U and of G, row i of both from the same anchor; this process's rows.
            ids: [N] integers, one for each anchor, which is not its own negative. Of rows with one id, as where two epochs meet,
                the first counts.
        Raises:
            ValueError: rows or widths that do not match, NaN, fewer than two different ids.
        """
        x, y, ids = gathered(x), gathered(y), gathered(ids)
        x, y = _checked(x, y)
        if {x.shape[1], y.shape[1]} != {self.x.shape[1]}:
            raise ValueError(f"vectors are {tuple(x.shape)} and {tuple(y.shape)}; this critic is for {self.x.shape[1]} columns")
        if ids.shape != x.shape[:1] or ids.is_floating_point():
            raise ValueError(f"ids are {tuple(ids.shape)} of {ids.dtype}; expected {len(x)} integers")
        first = ~(ids[:, None] == ids[None]).tril(-1).any(1)
        x, y, ids = x[first], y[first], ids[first]
        if len(ids) < 2:
            raise ValueError(f"all {len(first)} pairs are of anchor {int(ids[0])}; expected two different ones at least")
        # Copies: backward comes after the critic's own steps, which would overwrite weights that it needs.
        frozen = {name: p.detach().clone() for name, p in self.critic.named_parameters()}
        with _full_precision(x):
            scores = torch.func.functional_call(self.critic, frozen, (x.float(), y.float()))
            kept_out = (ids.long() * 2654435761 >> 16) % 4 == 0
            if not self.repeats:
                kept_out = torch.ones_like(kept_out)
            unseen = scores.detach()[kept_out][:, kept_out]
            held_out, bound = self.last
            if len(unseen) > 1:
                met, share = _both_ways(unseen), min(1.0, len(unseen) / _JUDGES)
                held_out, bound = _after(held_out, float(met.estimate), share), _after(bound, met.bound, share)
            if self.training:
                self.last = (held_out, bound)
                enter = ~kept_out | (not self.repeats)
                self._learn(x.detach().float()[enter], y.detach().float()[enter], ids[enter])
        contrast, active = club(scores), held_out >= self.threshold
        return UniquePenalty(contrast * float(active), contrast.detach(), held_out, bound, active)

    def _learn(self, x: Tensor, y: Tensor, ids: Tensor) -> None:
        capacity, before = len(self.ids), self.seen
        places = torch.arange(before, before + len(x), device=x.device)[-capacity:] % capacity
        for store, rows in ((self.x, x), (self.y, y), (self.ids, ids)):
            store[places] = rows[-capacity:]
        self.seen += len(x)
        for _ in range(self.warm_up if before < capacity <= self.seen else self.steps):
            rows = torch.randperm(self._filled, generator=self.generator)[: self.batch_size].to(x.device)
            same = (self.ids[rows][:, None] == self.ids[rows][None]).fill_diagonal_(False)
            with torch.enable_grad():
                scores = self.critic(self.x[rows], self.y[rows]).masked_fill(same, -math.inf)
                self.optimizer.zero_grad()
                _both_ways(scores).loss.backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
