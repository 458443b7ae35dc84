"""Do the two flows live in the same subspace? Residuals, effective rank, angles (DIVA Sec. 2, Fig. 2), and their nulls.

*States* are pooled [n, d] or tokens [n, N, d], n examples first; computed in float64 from the numbers as given. *Centring* is
part of each result, for the paper states none (``centre``). Effective rank is by default that of the matrix as it is (Roy and
Vetterli 2007); principal directions are those of centred states, each flow by its own mean row, because an offset that all
states share would fill the first direction and hide the rest.

*Nulls.* Shuffled rows leave the feature-space residual as it is: compare it, at the same number k of components, with
``random_subspace_residual(G, k)``, with ``reconstruction_residual(G_other_mask, G, components=k)`` and with the states of a
random-initialised model. Compare the sample-space residual with ``shuffled_ids_residual(G, U, k)``.

All raise ValueError for NaN, for what is not floats, for states that do not vary, and for sizes that do not match.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from umm_kit.statistics import Estimate, bootstrap_ratio

Array = np.ndarray | Tensor
States = Float[Array, "_n _d"] | Float[Array, "_n _N _d"]
StatesOfWidthD = Float[Array, "_n d"] | Float[Array, "_n _N d"]  # where two arguments, or an argument and the result, share d
FOLDS = 5  # of the held-out prediction
_SQUARED = 1e-9  # below this ratio of eigenvalues, squaring has cost the small singular values their digits


def _read(states: Any, name: str, centre: bool, device: torch.device | None = None) -> tuple[Tensor, float]:
    """States as float64 [n, N, d] (N = 1 if pooled), and the norm below which there is only round-off of their dtype."""
    x = states.detach() if isinstance(states, Tensor) else torch.as_tensor(np.ascontiguousarray(states))
    if x.ndim not in (2, 3) or not x.numel() or not x.is_floating_point():
        raise ValueError(f"{name} is {tuple(x.shape)} of {x.dtype}; expected floats [n, d] (pooled) or [n, N, d] (tokens)")
    eps, device = max(torch.finfo(x.dtype).eps / 2, 1e-14), device or x.device
    x = x.to("cpu" if device.type == "mps" else device).double()  # Apple GPUs have no float64
    if bad := int((~torch.isfinite(x)).sum()):
        raise ValueError(f"{name} holds {bad} NaN or infinite numbers; drop those examples or find the cause first")
    x, floor = x if x.ndim == 3 else x[:, None], eps * float(x.norm())
    x = x - x.mean((0, 1)) if centre else x
    if float(x.norm()) <= floor:
        if name != "U":
            raise ValueError(f"{name} does not vary ({len(x)} examples, equal or 0): shares of it are 0 / 0; leave it out")
        warnings.warn("U does not vary: it has no principal direction, so nothing of G is explained", stacklevel=4)
    return x, floor


def _agree(g: Tensor, u: Tensor, pairs: bool) -> None:
    if not pairs and g.shape[2] != u.shape[2]:
        raise ValueError(f"the widths are {g.shape[2]} and {u.shape[2]}; expected states of layers of one width")
    if pairs and g.shape[:2] != u.shape[:2]:
        raise ValueError(f"(examples, tokens) are {tuple(g.shape[:2])} and {tuple(u.shape[:2])}; expected the same anchors in "
                         "the same order on one token grid (Features.select pairs by id)")  # fmt: skip


def _warn_few(x: Tensor, what: str) -> None:
    if (rows := x.shape[0] * x.shape[1]) <= x.shape[2]:
        warnings.warn(f"{rows} rows in {x.shape[2]} dimensions: their number limits {what}; take more examples", stacklevel=3)


def _entropy_rank(x: Tensor) -> float:
    """exp(entropy) of the singular values of [n, N, d] as rows, from the smaller Gram matrix where that loses no digits."""
    x = x.flatten(0, 1)
    values = torch.linalg.eigvalsh(x.T @ x if len(x) > x.shape[1] else x @ x.T)
    sigma = values.sqrt() if values[0] > _SQUARED * values[-1] else torch.linalg.svdvals(x)
    entropy = float(torch.special.entr(sigma / sigma.sum()).sum())
    return min(float(np.exp(max(entropy, 0.0))), float(len(sigma)))  # past the bounds by round-off only


def effective_rank(H: States, centre: bool = False) -> float:
    """How many directions states use: exp(-sum_k p_k ln p_k), p_k = sigma_k / sum_j sigma_j, sigma the singular values of H.

    Roy and Vetterli 2007. Within 1e-6 of the direct SVD at any rank. Blind to scale: a collapse of all variance alone goes
    unseen. Orthogonal blocks with equal sums of singular values and effective rank a each have 2a together. Round-off counts:
    bfloat16 raises a rank of 20 in 512 dimensions by more than 1.

    Args:
        H: [n, d] or [n, N, d]; examples and tokens are rows. centre: take the mean row off first.

    Returns:
        Dimensions, in [1, min(rows, d)]; higher = spread over more directions.

    Example:
        >>> round(effective_rank(torch.eye(4)[[0, 1, 2, 0, 1, 2]]), 6)
        3.0
    """
    x, _ = _read(H, "H", centre)
    _warn_few(x, "the effective rank")
    return _entropy_rank(x)


@dataclass(frozen=True)
class RankIncrement:
    """Effective rank that generation adds to understanding: in dimensions, and in percent of ``alone`` = ER(H_U)."""

    absolute: float
    percent: float
    alone: float
    stack: str


def effective_rank_increment(H_G: States, H_U: States, stack: str = "rows", centre: bool = False) -> RankIncrement:
    """dER = ER([H_U, H_G]) - ER(H_U), absolute and in percent of ER(H_U) (DIVA Fig. 2, whose axis is in percent).

    The paper does not say how the flows are stacked. By "rows" (directions in R^d) it is blind to which row pairs with which;
    by "columns" it is not. Equal flows give 0 either way. The flow of larger norm weighs more.

    Args:
        H_G, H_U: [n, d] or [n, N, d]; rows: equal d; columns: row i of both is the same anchor (and token).

    Returns:
        :class:`RankIncrement`; higher = G uses more that U does not; negative if G is simpler than U.

    Example:
        >>> round(effective_rank_increment(torch.eye(4)[[2, 3] * 3], torch.eye(4)[[0, 1] * 3]).percent, 6)
        100.0
    """
    if stack not in ("rows", "columns"):
        raise ValueError(f"stack is {stack!r}; expected 'rows' or 'columns'")
    u, _ = _read(H_U, "H_U", centre)
    g, _ = _read(H_G, "H_G", centre, u.device)
    _agree(g, u, pairs=stack == "columns")
    joint = torch.cat([u, g], 2) if stack == "columns" else torch.cat([u.flatten(0, 1), g.flatten(0, 1)])[:, None]
    _warn_few(joint, "the joint effective rank")
    alone = _entropy_rank(u)
    absolute = _entropy_rank(joint) - alone
    return RankIncrement(absolute, 100 * absolute / alone, alone, stack)


def _principal(x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Singular values above the floor, descending, and right singular vectors [d, rank], of [n, N, d] as rows."""
    x = x.flatten(0, 1)
    if len(x) > x.shape[1] and (eigen := torch.linalg.eigh(x.T @ x))[0][0] > _SQUARED * eigen[0][-1]:
        sigma, vectors = eigen[0].sqrt().flip(0), eigen[1].flip(1)
    else:
        _, sigma, rows = torch.linalg.svd(torch.linalg.qr(x, mode="r").R, full_matrices=False)
        vectors = rows.T
    rank = int((sigma > floor).sum())
    return sigma[:rank], vectors[:, :rank]


def _count(sigma: Tensor, variance: float, components: int | None, d: int) -> int:
    """How many principal directions the rule keeps."""
    if not 0 < variance <= 1 or (components is not None and not 1 <= components <= d):
        raise ValueError(f"{variance=}, {components=}; expected a share in (0, 1], or 1 to {d} components")
    if components is None:
        share = sigma.square().cumsum(0) / sigma.square().sum()
        components = len(sigma) if variance == 1 else 1 + int((share < variance - 1e-12).sum())
    elif components > len(sigma):
        warnings.warn(f"{components} components were asked for, {len(sigma)} exist and are kept", stacklevel=3)
    return min(components, len(sigma))


@dataclass(frozen=True, eq=False)
class Residual:
    """A residual, the number of ``components`` of U that were kept, by which ``rule``, in which ``space``.

    ``value`` = sum(unexplained) / sum(energy), which are those of each example [n].
    """

    value: float
    components: int
    rule: str
    space: str
    unexplained: Float64[np.ndarray, " n"] = field(repr=False)
    energy: Float64[np.ndarray, " n"] = field(repr=False)

    def estimate(self, **options: Any) -> Estimate:
        """With its bootstrap interval over examples, what was fitted (directions, predictors) held fixed."""
        return bootstrap_ratio(self.unexplained, self.energy, **options)


def _pair(G: Any, U: Any, space: str, centre: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """G and U, checked; U's singular values, principal directions and floor."""
    if space not in ("feature", "sample"):
        raise ValueError(f"space is {space!r}; expected 'feature' or 'sample'")
    g, _ = _read(G, "G", centre)
    u, floor = _read(U, "U", centre, g.device)
    _agree(g, u, pairs=space == "sample")
    if space == "sample" and len(u) < 2:
        raise ValueError("there is 1 example; the sample-space residual is held out and needs at least 2")
    _warn_few(u, f"the {space}-space residual")
    return g, u, *_principal(u, floor), floor


def _blocks(
    g: Tensor, u: Tensor, kept: Tensor, floor: float, space: str, centre: bool, seed: int, orders: Sequence[Tensor] = ()
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """(order, examples, target, T, W): T @ W is what U's leading components, as many as are kept, explain of the target.

    In sample space a held-out part for each fold, and for each order of G's examples (by default only as they are).
    """
    rows, everyone = g.flatten(0, 1), torch.arange(len(g), device=g.device)
    if space == "feature":
        yield 0, everyone, rows, rows @ kept, kept.T
        return
    mixed = torch.randperm(len(u), generator=torch.Generator().manual_seed(seed)).to(u.device)
    for test in mixed.tensor_split(min(FOLDS, len(u))):
        train = mixed[~torch.isin(mixed, test)]
        mean = u[train].mean((0, 1)) if centre else 0
        sigma, vectors = _principal(u[train] - mean, floor)
        maps = (vectors / sigma)[:, : kept.shape[1]]
        scores, t = ((u[part] - mean).flatten(0, 1) @ maps for part in (train, test))  # scores^T scores = 1
        for k, order in enumerate(orders or [everyone]):
            mean_g = g[order[train]].mean((0, 1)) if centre else 0
            fit, target = ((g[order[part]] - mean_g).flatten(0, 1) for part in (train, test))
            yield k, test, target, t, scores.T @ fit


def reconstruction_residual(
    G: States, U: States, variance: float = 0.99, components: int | None = None, space: str = "feature",
    centre: bool = True, seed: int = 0,
) -> Residual:  # fmt: skip
    """Share of generation's energy outside understanding: ||G - Pi_U G||_F^2 / ||G||_F^2 (DIVA Sec. 2, Fig. 2).

    The paper states neither the space of the projector Pi_U nor its rank; both are part of the result.
    *feature*: G's rows on U's principal directions in R^d. Blind to pairing; 0 whatever G is once all d are kept.
    *sample*: G's columns predicted across examples by least squares on U's k leading scores, held out in 5 folds over examples
    (in sample it would be 0 whatever G is once n <= d). Can exceed 1: a worse guess than G's training mean.

    Args:
        G, U: [n, d] or [n, N, d]; feature: equal d; sample: row i (and token j) of both is the same anchor.
        variance: keep the fewest directions that hold this share of U's variance (1: all above round-off).
        components: keep this many instead, 1 to d.
        centre: take each flow's mean row off first (sample: that of the training part, an intercept).
        seed: of the folds.

    Returns:
        :class:`Residual`, a share; higher = less of G is found in U (feature: in [0, 1]).

    Example:
        >>> reconstruction_residual(torch.eye(4).repeat(3, 1), torch.eye(4)[[0, 1] * 6], centre=False).value
        0.5
    """
    g, u, sigma, vectors, floor = _pair(G, U, space, centre)
    k = _count(sigma, variance, components, u.shape[2])
    if space == "feature" and k == u.shape[2]:
        warnings.warn(f"all {k} directions of U are kept: the residual is 0 whatever G is; keep fewer", stacklevel=2)
    energy, left = (torch.zeros(len(g), dtype=g.dtype, device=g.device) for _ in range(2))
    for _, part, target, t, w in _blocks(g, u, vectors[:, :k], floor, space, centre, seed):
        energy[part], left[part] = (h.square().view(len(part), -1).sum(1) for h in (target, target - t @ w))
    value = min(float(left.sum() / energy.sum()), 1.0 if space == "feature" else float("inf"))  # past 1 by round-off only
    rule = f"variance {variance:g}" if components is None else f"components {components}"
    return Residual(value, k, rule, space, left.cpu().numpy(), energy.cpu().numpy())


def residual_curve(
    G: States, U: StatesOfWidthD, space: str = "feature", centre: bool = True, seed: int = 0
) -> Float64[np.ndarray, " d+1"]:
    """:func:`reconstruction_residual` for k = 0 to d components, from one decomposition of U (sample: one per fold).

    Returns:
        [d + 1] shares; flat past the rank of U.

    Example:
        >>> residual_curve(torch.eye(3).repeat(2, 1), torch.eye(3)[[0, 0, 0, 1]], centre=False).round(3).tolist()
        [1.0, 0.667, 0.333, 0.333]
    """
    g, u, _, vectors, floor = _pair(G, U, space, centre)
    errors = torch.zeros(u.shape[2] + 1, dtype=g.dtype, device=g.device)
    for _, _, target, t, w in _blocks(g, u, vectors, floor, space, centre, seed):
        energy = target.square().sum()
        # |target - T_k W_k|^2 for all k at once: sums over the leading k components, and over the leading k x k block.
        cross, block = ((t.T @ target) * w).sum(1).cumsum(0), ((t.T @ t) * (w @ w.T)).cumsum(0).cumsum(1).diagonal()
        fold = torch.cat([energy[None], energy - 2 * cross + block])
        errors += torch.cat([fold, fold[-1:].expand(len(errors) - len(fold))])
    return (errors / errors[0]).clamp(min=0).cpu().numpy()


def random_subspace_residual(
    G: States, components: int, draws: int = 100, generator: torch.Generator | None = None, centre: bool = True
) -> Float64[np.ndarray, " {draws}"]:
    """Null of the feature-space residual: G against subspaces of equal dimension k, drawn uniformly; [draws] shares.

    The mean over subspaces is 1 - k/d for every G, since the mean projector is (k/d) 1; the scatter depends on G's spectrum and
    is 0 where that is flat. A weak null where all states of a model share a few strong directions.

    Example:
        >>> random_subspace_residual(torch.eye(4), 1, draws=3, centre=False).round(6).tolist()
        [0.75, 0.75, 0.75]
    """
    g, _ = _read(G, "G", centre)
    d, gram = g.shape[2], torch.einsum("nti,ntj->ij", g, g).cpu()
    if not 1 <= components <= d or draws < 1:
        raise ValueError(f"{components=}, {draws=}; expected 1 to {d} components and at least one draw")
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}  # on the CPU: one seed, one null on any device
    bases = (torch.linalg.qr(torch.randn(d, components, **options)).Q for _ in range(draws))
    return np.clip([1 - float(((gram @ basis) * basis).sum() / gram.trace()) for basis in bases], 0, 1)


def shuffled_ids_residual(
    G: States,
    U: States,
    components: int,
    draws: int = 100,
    generator: torch.Generator | None = None,
    centre: bool = True,
    seed: int = 0,
) -> Float64[np.ndarray, " {draws}"]:
    """Null of the sample-space residual: whole examples of G change places, their tokens stay where they are; [draws] shares.

    What can still be predicted is what all examples share, such as the position of a token; else it lies just above 1.

    Example:
        >>> shuffled_ids_residual(torch.randn(60, 4), torch.randn(60, 4), components=2, draws=5).shape
        (5,)
    """
    g, u, sigma, vectors, floor = _pair(G, U, "sample", centre)
    k = _count(sigma, 1.0, components, u.shape[2])
    left, energy = np.zeros((2, draws))
    orders = [torch.randperm(len(g), generator=generator).to(g.device) for _ in range(draws)]
    for draw, _, target, t, w in _blocks(g, u, vectors[:, :k], floor, "sample", centre, seed, orders):
        energy[draw] += float(target.square().sum())
        left[draw] += float((target - t @ w).square().sum())
    return left / energy


def principal_angles(
    X: StatesOfWidthD, Y: StatesOfWidthD, variance: float = 0.99, components: int | None = None, centre: bool = True
) -> Float64[np.ndarray, " k"]:
    """Angles between the principal subspaces of two sets of states in R^d: cos(theta_i) = sigma_i(V_X^T V_Y).

    Bjorck and Golub 1973; from cosines and sines together, so that small angles keep their digits (arccos alone has none below
    1e-8; scipy's subspace_angles falls back on it when large angles are present). Blind to pairing; row numbers may differ.

    Returns:
        [min(k_X, k_Y)] angles in radians, ascending; 0 = a shared direction, pi/2 = orthogonal.

    Example:
        >>> principal_angles(torch.eye(4)[[0, 1] * 3], torch.eye(4)[[1, 2] * 3], centre=False).round(3).tolist()
        [0.0, 1.571]
    """
    bases, pair = [], [_read(X, "X", centre), _read(Y, "Y", centre, X.device if isinstance(X, Tensor) else None)]
    _agree(pair[0][0], pair[1][0], pairs=False)
    for h, floor in pair:
        _warn_few(h, "the number of principal directions")
        sigma, vectors = _principal(h, floor)
        bases.append(vectors[:, : _count(sigma, variance, components, h.shape[2])])
    small, large = sorted(bases, key=lambda basis: basis.shape[1])
    cosines, sines = torch.linalg.svdvals(large.T @ small), torch.linalg.svdvals(small - large @ (large.T @ small))
    return torch.atan2(sines.flip(0), cosines).cpu().numpy()
