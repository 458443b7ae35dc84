"""The *loss microscope*: what a term's gradient does to points that are free to follow it, and how the term fails.

In training the points are outputs of encoders, which can move them in fewer ways; here nothing stands between term and points.
Each scene walks twice from one start: into a failure of the term, and with one thing changed.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import special
from torch import Tensor
from torch.nn.functional import normalize

from umm_kit.losses.factorization import UniqueCritic, alignment, infonce, orthogonality

Term = Callable[[Tensor, Tensor], Tensor]
Lines = dict[str, np.ndarray]  # name -> [S] values


@dataclass(frozen=True)
class Walk:
    """Two sets of N points in the plane at each of S steps, the arrows on them, the loss; row i of both sets is a pair."""

    points: Float[np.ndarray, "2 S N 2"]
    arrows: Float[np.ndarray, "2 S N 2"]
    loss: Float[np.ndarray, " S"]


@dataclass(frozen=True)
class Scene:
    """A term and one of its failures."""

    failure: str  # what to look for
    sets: tuple[str, str]  # names of the two sets of points
    walks: dict[str, Walk]  # the first fails, the second has one thing changed
    x: Float[np.ndarray, " S"]  # what the steps stand for
    xlabel: str
    readings: dict[str, Lines]  # by axis, a line for each walk and for each reference
    references: tuple[str, ...] = ()  # lines that no walk made: bounds, truths
    arrow: str = "N |d loss / d point|"  # what the length of an arrow is
    one_term: bool = True  # both walks descend on the same quantity, so that their arrows compare


def arrows(term: Term, u: Float[Tensor, "N f"], g: Float[Tensor, "N f"]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and on each point the negative gradient times N: terms are means over pairs, and the share of one is 1 / N.

    Args:
        term: (u, g) -> scalar to minimise. u, g: [N, f], row i of both a pair.
    Returns:
        loss, arrows on u [N, f], arrows on g [N, f].
    Raises:
        ValueError: sets of different shapes, N < 2, NaN.

    Example:
        >>> arrows(lambda u, g: (u * g).sum(1).mean(), torch.ones(2, 1), torch.ones(2, 1))[1].tolist()  # -g
        [[-1.0], [-1.0]]
    """
    if u.shape != g.shape or u.ndim != 2 or len(u) < 2 or not bool(torch.isfinite(u).all() and torch.isfinite(g).all()):
        shapes = f"{tuple(u.shape)} and {tuple(g.shape)}"
        raise ValueError(f"points are {shapes}; expected [N, f] twice, N >= 2, finite (if they ran away: a lower rate)")
    u, g = u.detach().requires_grad_(), g.detach().requires_grad_()
    loss = term(u, g)
    on_u, on_g = torch.autograd.grad(loss, [u, g])
    return loss.detach(), -len(u) * on_u, -len(g) * on_g


def follow(term: Term, u: Float[Tensor, "N 2"], g: Float[Tensor, "N 2"], steps: int, rate: float, circle: bool = True) -> Walk:
    """Gradient descent of the points themselves: each moves by rate times its arrow, ``steps`` times.

    ``circle`` brings them back to length 1 after each step, for terms that see directions only (in an encoder LayerNorm does
    the like). The walk has S = steps + 1 places, the last with arrows that were not followed.

    Raises:
        ValueError: as :func:`arrows`; fewer than one step, a rate that is not above 0.
    """
    if steps < 1 or not rate > 0:
        raise ValueError(f"steps={steps}, rate={rate}; expected steps >= 1 and rate > 0")
    found = []
    for _ in range(steps + 1):
        loss, *push = arrows(term, u, g)
        found.append((torch.stack([u, g]), torch.stack(push), loss))
        u, g = (normalize(v + rate * a) if circle else v + rate * a for v, a in zip((u, g), push, strict=True))
    return _walk(found)


def _walk(found: list[tuple[Tensor, Tensor, Tensor]]) -> Walk:
    points, pushes, losses = (torch.stack(part).numpy() for part in zip(*found, strict=True))
    return Walk(points.swapaxes(0, 1), pushes.swapaxes(0, 1), losses)


def _directions(angles: np.ndarray) -> Tensor:
    return torch.tensor(np.stack([np.cos(angles), np.sin(angles)], -1), dtype=torch.float32)


def _along(walks: Mapping[str, Walk], reading: Term) -> Lines:
    """A reading of (u, g) at every step of every walk."""
    places = {name: zip(*torch.from_numpy(walk.points), strict=True) for name, walk in walks.items()}
    return {name: np.array([float(reading(u, g)) for u, g in pairs]) for name, pairs in places.items()}


def _told(u: Tensor, g: Tensor) -> Tensor:
    """Share of g's spread around its mean that a linear map of u explains."""
    u, g = u.double() - u.double().mean(0), g.double() - g.double().mean(0)
    return 1 - (g - u @ torch.linalg.lstsq(u, g).solution).square().sum() / g.square().sum()


def _aligning(temperature: float, facts: Int[Tensor, " N"] | None = None) -> Term:
    """InfoNCE times its temperature, so that scores, and arrows, are in units of the cosine."""
    return lambda x, y: alignment(x, y, temperature=temperature, facts=facts, gather=False).loss * temperature


def anti_alignment(n: int = 256, steps: int = 30, seed: int = 0) -> Scene:
    """NCE-CLUB (DIVA Eq. 7) takes dependence away only while its critic knows the present points.

    Both walks begin with one critic, fitted to the points as they are: directions u uniform on the circle, g = u + noise. A
    critic that stays as it was scores opposite directions lowest, and there the points go: cos = -1, and u tells all of g.
    (:class:`UniqueCritic` stops the penalty where its critic knows nothing; in both walks that is off.)
    """
    draw, ids, calls = np.random.default_rng(seed), torch.arange(n), itertools.count(1)
    angle = draw.uniform(0, 2 * np.pi, n)
    u, g = _directions(angle), _directions(angle + draw.vonmises(0, 4.0, n))
    fitted = UniqueCritic(2, capacity=n, batch_size=n // 2, warm_up=150, learning_rate=1e-2, threshold=-math.inf, seed=seed)
    fitted(u, g, ids)  # fills the buffer, which trains the critic

    def penalty(critic: UniqueCritic) -> Term:
        # A pair that has moved is new to the critic, and the buffer holds one place of each: it learns the present alone.
        return lambda x, y: critic(normalize(x), normalize(y), ids + n * next(calls)).loss

    critics = {"fixed critic": copy.deepcopy(fitted).eval(), "critic keeps up": fitted.train()}
    walks = {name: follow(penalty(critic), u, g, steps, rate=0.1) for name, critic in critics.items()}
    readings = {
        "cosine of partners": _along(walks, lambda x, y: (x * y).sum(1).mean()),
        "NCE-CLUB penalty (nats)": {name: walk.loss for name, walk in walks.items()},
        "share of G told by U (linear)": _along(walks, _told),
    }
    failure = "a critic that stays as it was sends partners to opposite directions, where one tells all of the other"
    return Scene(failure, ("U, unique", "G, unique"), walks, np.arange(steps + 1.0), f"step (n = {n})", readings)


def information(concentration: float) -> float:
    """I(u; g) in nats of directions u, uniform on the circle, and g = u + von Mises noise: k I_1(k) / I_0(k) - log I_0(k).

    That is log 2 pi less the noise's entropy; it grows with the concentration k >= 0 from 0 without bound.

    Example:
        >>> round(information(10.0), 3)
        1.543
    """
    i0, i1 = special.ive(0, concentration), special.ive(1, concentration)  # both times exp(-k)
    return float(concentration * (i1 / i0 - 1) - math.log(i0))


def _noise(share: np.ndarray, concentration: float) -> np.ndarray:
    """Angles below which that share of a von Mises distribution lies (scipy's own quantiles take seconds)."""
    width = min(np.pi, 8 / math.sqrt(concentration))
    angle = np.linspace(-width, width, 4001)
    below = np.cumsum(np.exp(concentration * (np.cos(angle) - 1)))
    return np.interp(share, below / below[-1], angle)


def saturation(sizes: tuple[int, int] = (6, 96), steps: int = 24, batches: int = 10, seed: int = 0) -> Scene:
    """InfoNCE cannot say more than log N, and hardly pulls once it says it (the points do not follow: steps add information).

    Directions u uniform on the circle, g = u + von Mises noise of growing concentration k: the truth is :func:`information`. At
    temperature 1 / k the cosine is the best critic there is, so that N alone makes the difference. Readings are means over as
    many pairs for either N: ``batches`` of the larger.
    """
    draw, total, ks = np.random.default_rng(seed), batches * max(sizes), np.geomspace(0.1, 2e4, steps + 1)
    angle, share = draw.uniform(0, 2 * np.pi, total), draw.uniform(0, 1, total)
    walks, weights, truth = {}, {}, np.array([information(k) for k in ks])
    for n in sizes:
        found, pulls = [], []
        for k in ks:
            u, g = (_directions(a[: total // n * n]).view(-1, n, 2) for a in (angle, angle + _noise(share, k)))
            scores = (k * u @ g.transpose(1, 2)).requires_grad_()
            loss = torch.stack([infonce(s).loss for s in scores]).mean()
            pulls.append(-float(torch.autograd.grad(loss, scores)[0].diagonal(dim1=1, dim2=2).sum()))
            _, *push = arrows(_aligning(1 / k), u[0], g[0])
            found.append((torch.stack([u[0], g[0]]), torch.stack(push), loss.detach()))
        walks[f"N = {n}"], weights[f"N = {n}"] = _walk(found), np.array(pulls)
    bounds = {f"log {n}": np.full(steps + 1, math.log(n)) for n in sizes}
    estimates = {name: bound - walk.loss for (name, walk), bound in zip(walks.items(), bounds.values(), strict=True)}
    readings = {"InfoNCE estimate (nats)": estimates | {"the truth": truth} | bounds, "N |d loss / d score of a pair|": weights}
    failure = "among few pairs each partner is soon beyond doubt: the estimate stays below log N, and hardly anything is pulled"
    xlabel, lines, arrow = f"true I (nats, n = {total})", ("the truth", *bounds), "N tau |d loss / d point|"
    return Scene(failure, ("U, shared", "G, shared"), walks, truth, xlabel, readings, lines, arrow)


def shrinking(n: int = 64, steps: int = 40, seed: int = 0) -> Scene:
    """Eq. 9, read over the batch, grows with the fourth power of the vectors' scale: where factors are alike, they shrink.

    The unique factor starts as the shared one turned by 60 degrees, which this reading does not see, plus little noise. The
    second walk descends on the overlap of the same reading, which has no scale. (Where the vectors have shrunk to the size of
    the noise, Eq. 9 does part them.)
    """
    draw, turn = torch.Generator().manual_seed(seed), _directions(np.pi * np.array([1 / 3, 5 / 6]))
    shared, noise = (torch.randn(n, 2, generator=draw) for _ in range(2))
    terms: dict[str, Term] = {
        "Eq. 9": lambda x, y: orthogonality(x, y, gather=False).loss,
        "without scale": lambda x, y: orthogonality(x, y, gather=False).overlap,
    }
    walks = {k: follow(term, shared, shared @ turn + 0.03 * noise, steps, 0.1, circle=False) for k, term in terms.items()}
    readings = {
        "Eq. 9 (batch)": _along(walks, terms["Eq. 9"]),
        "root mean square length": _along(walks, lambda x, y: torch.cat([x, y]).square().sum(1).mean().sqrt()),
        "overlap, in [0, 1]": _along(walks, terms["without scale"]),
    }
    failure = "the loss falls because the vectors shrink; what they have in common stays"
    return Scene(failure, ("shared", "unique"), walks, np.arange(steps + 1.0), f"step (n = {n})", readings, one_term=False)


def false_negatives(facts: int = 4, each: int = 5, steps: int = 60, seed: int = 0) -> Scene:
    """InfoNCE takes pairs that state the same fact for negatives and parts them, unless it is told the facts.

    Each of ``facts`` facts is stated by ``each`` pairs, which begin close together.
    """
    if facts < 2 or each < 2:
        raise ValueError(f"facts={facts}, each={each}; expected at least two of both: one to differ from, one to be parted from")
    draw, n, tau = np.random.default_rng(seed), facts * each, 0.1
    stated = torch.arange(facts).repeat_interleave(each)
    angle = 2 * np.pi * stated.numpy() / facts + draw.normal(0, 0.08, n)
    u, g = (_directions(angle + draw.normal(0, 0.04, n)) for _ in range(2))
    known = {"facts not given": None, "facts given": stated}
    walks = {name: follow(_aligning(tau, told), u, g, steps, rate=0.1) for name, told in known.items()}
    equal, floor = (stated[:, None] == stated).fill_diagonal_(False), f"log {each}: equal facts in one place"
    readings = {
        "cosine of equal facts": _along(walks, lambda x, y: (x @ y.T)[equal].mean()),
        "cosine of partners": _along(walks, lambda x, y: (x * y).sum(1).mean()),
        "InfoNCE loss (nats)": {k: w.loss / tau for k, w in walks.items()} | {floor: np.full(steps + 1, math.log(each))},
    }
    failure = "pairs that state the same fact are pushed apart, as if they said different things"
    sets, xlabel, arrow = ("U, shared", "G, shared"), f"step (n = {n})", "N tau |d loss / d point|"
    return Scene(failure, sets, walks, np.arange(steps + 1.0), xlabel, readings, (floor,), arrow)


#: term and failure -> what computes the scene
SCENES: dict[str, Callable[..., Scene]] = {
    "NCE-CLUB (Eq. 7): anti-alignment": anti_alignment,
    "InfoNCE (Eq. 6): saturation": saturation,
    "orthogonality (Eq. 9): shrinking": shrinking,
    "InfoNCE (Eq. 6): false negatives": false_negatives,
}
