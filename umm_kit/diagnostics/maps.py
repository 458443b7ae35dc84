"""Maps of the latent space, and the numbers without which a map is only a pretty picture.

A map puts n states into the plane. Clusters, gaps and distances in it may come from the method alone: every map here carries
how far its neighbourhoods can be trusted, and what is to be said about pairs and groups is measured in the *original* space.
Distances are Euclidean, in float64, between the states as they are given.

All raise ValueError for NaN, for what is not floats, for states that do not vary, and for sizes or ids that do not match.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from umm_kit.statistics import Estimate, bootstrap

Array = np.ndarray | Tensor
#: method -> its settings and their defaults; perplexity and n_neighbors shrink where there are too few rows for them
METHODS: dict[str, dict[str, Any]] = {
    "pca": {},
    "tsne": {"perplexity": 30.0, "max_iter": 1000, "init": "pca"},
    "umap": {"n_neighbors": 15, "min_dist": 0.1},
}
SCORED = 2000  # rows that a map's scores rest on, and rows that `nearness` compares, at most
_PACKAGES = {"tsne": "scikit-learn", "umap": "umap-learn"}
_BLOCK = 2**23  # distances held at once


@dataclass(frozen=True, eq=False)
class LatentMap:
    """A map of n states, and how far its neighbourhoods are those of the states.

    ``trustworthiness`` (1 = no false neighbour; a random map: about 0.5) and ``neighbour_overlap`` (share of the ``neighbours``
    nearest that are the same in both spaces; ``chance`` in a random map) rest on ``scored`` rows, each against all n.
    """

    positions: Float64[np.ndarray, "points 2"] = field(repr=False)
    trustworthiness: float
    neighbour_overlap: float
    chance: float
    method: str
    seed: int
    neighbours: int
    scored: int
    variance: tuple[float, float] | None = None  # shares that the two axes hold; of PCA only


@dataclass(frozen=True, eq=False)
class Nearness:
    """Are rows of one label nearer to each other than to others? Both shares have intervals over labels.

    ``nearer``: of all comparisons (one row of the same label, one of another) the share in which the same is nearer; 0.5 by
    chance, and ``null`` is the 95 % range under shuffled labels. ``nearest``: of all rows the share whose nearest neighbour
    has their label; ``chance`` is that of a random neighbour.
    """

    nearer: Estimate
    nearest: Estimate
    null: tuple[float, float]
    chance: float


@dataclass(frozen=True, eq=False)
class PairedMap(LatentMap):
    """Both flows in one map: ``positions`` [2 n, 2] are understanding's, then generation's, each in the order of ``ids``.

    ``others`` [2 n, k]: for each point the rows of ``ids`` whose states in the *other* flow are nearest in the original space,
    the nearest first. ``pairs``: :func:`nearness` of the two flows, with the ids as labels.
    """

    ids: Sequence[Hashable] = ()
    others: Int[np.ndarray, "points k"] = field(default_factory=lambda: np.zeros((0, 0), int), repr=False)
    pairs: Nearness | None = None


def latent_map(
    X: Float[Array, "n d"],
    method: str = "pca",
    seed: int = 0,
    cache: str | Path | None = None,
    neighbours: int = 10,
    **settings: Any,
) -> LatentMap:
    """Put states into the plane by PCA, t-SNE or UMAP, with trustworthiness and neighbour overlap.

    trustworthiness = 1 - 2 / (n k (2 n - 3 k - 1)) sum_i sum_{j in the map's k nearest of i} max(0, r(i, j) - k), r the rank of j
    by distance from i among the states (Venna and Kaski 2001; as scikit-learn's); neighbour overlap = mean over i of the
    share of the k nearest states that are among the k nearest in the map. Above ``SCORED`` rows, i runs over that many drawn
    at random, each against all n; never more than a block of distances is held.

    Args:
        X: [n, d] states, n >= 3.
        method: "pca" (exact; each axis points where its largest loading is positive), "tsne" or "umap" (``seed`` fixes both;
            t-SNE starts from PCA, so that the seed matters only with ``init="random"``).
        cache: folder for the positions of t-SNE and UMAP, one file per content (states, method, seed, settings, version of the
            library). A file that cannot be read is made anew, with a warning.
        neighbours: k; at most (n - 1) // 2 are used.
        settings: those in ``METHODS``, for example ``perplexity=5``.

    Returns:
        :class:`LatentMap`; both scores without unit, higher = more faithful.

    Raises:
        ImportError: UMAP is asked for and not installed.

    Example:
        >>> m = latent_map(np.random.default_rng(0).normal(size=(50, 2)))
        >>> m.positions.shape, round(m.trustworthiness, 3), m.neighbour_overlap
        ((50, 2), 1.0, 1.0)
    """
    x = _states(X, "X")
    if method not in METHODS or not set(settings) <= set(METHODS[method]):
        known = {name: sorted(own) for name, own in METHODS.items()}
        raise ValueError(f"method {method!r} with settings {sorted(settings)} is unknown; there are {known}")
    if len(x) < 3 or neighbours < 1 or not np.ptp(x, axis=0).any():
        came = f"X is {x.shape}, {'varies' if np.ptp(x, axis=0).any() else 'does not vary'}, with {neighbours} neighbours"
        raise ValueError(f"{came}; a map needs at least 3 rows that are not all equal, and 1 neighbour")
    x = x - x.mean(0)
    variance = None
    if method == "pca":
        axes = PCA(min(2, *x.shape), svd_solver="covariance_eigh" if len(x) > x.shape[1] else "full").fit(x)
        positions, shares = np.zeros((len(x), 2)), np.zeros(2)
        positions[:, : axes.n_components_] = axes.transform(x)
        shares[: axes.n_components_] = axes.explained_variance_ratio_
        variance = (float(shares[0]), float(shares[1]))
    else:
        full = METHODS[method] | settings
        if method == "tsne" and "perplexity" not in settings:
            full["perplexity"] = min(full["perplexity"], (len(x) - 1) / 3)
        if method == "umap" and "n_neighbors" not in settings:
            full["n_neighbors"] = min(full["n_neighbors"], len(x) - 1)
        positions = _cached(x, method, seed, full, cache)
    k = min(neighbours, (len(x) - 1) // 2)
    trust, overlap, scored = _scores(x, positions, k, seed)
    return LatentMap(positions, trust, overlap, k / (len(x) - 1), method, seed, k, scored, variance)


def paired_map(
    U: Float[Array, "n d"],
    G: Float[Array, "n d"],
    ids: Sequence[Hashable],
    G_ids: Sequence[Hashable] | None = None,
    centre: bool = False,
    nearest: int = 3,
    **options: Any,
) -> PairedMap:
    """One :func:`latent_map` of the states of both flows, paired by id, with what the joined pairs mean in the original space.

    Args:
        U, G: [n, d] states of understanding and generation, of one width.
        ids: of U's rows, unique. G_ids: of G's rows, the same ids in any order; by default in U's order.
        centre: take each flow's own mean off first. Otherwise a constant difference between the flows may be all one sees.
        nearest: how many neighbours in the other flow are kept of each point.
        options: as those of :func:`latent_map`.

    Returns:
        :class:`PairedMap`, rows in the order of ``ids``.

    Example:
        >>> U = np.random.default_rng(0).normal(size=(20, 4))
        >>> both = paired_map(U, U[::-1] + 0.01, ids=range(20), G_ids=range(19, -1, -1))
        >>> both.positions.shape, both.pairs.nearest.value, round(both.pairs.chance, 3)
        ((40, 2), 1.0, 0.05)
    """
    u, g = _states(U, "U"), _states(G, "G")
    mine, theirs = list(ids), list(ids if G_ids is None else G_ids)
    place = {name: row for row, name in enumerate(theirs)}
    if len(set(mine)) < len(mine) or len(place) < len(theirs) or set(mine) != set(place):
        raise ValueError(f"{len(mine)} and {len(theirs)} ids repeat or differ between flows; expected the same unique ids")
    if (len(u), len(g)) != (len(mine), len(theirs)) or u.shape[1] != g.shape[1]:
        raise ValueError(f"states are {u.shape} and {g.shape} for {len(mine)} ids; expected a row for each, of one width")
    g = g[[place[name] for name in mine]]
    if centre:
        u, g = u - u.mean(0), g - g.mean(0)
    out = latent_map(np.concatenate([u, g]), **options)
    k = min(nearest, len(u))
    others = [NearestNeighbors(n_neighbors=k).fit(b).kneighbors(a, return_distance=False) for a, b in ((u, g), (g, u))]
    pairs = nearness(u, range(len(u)), g, range(len(u)), seed=out.seed)
    return PairedMap(**vars(out), ids=mine, others=np.concatenate(others), pairs=pairs)


def nearness(
    X: Float[Array, "n d"],
    labels: Sequence[Hashable],
    Y: Float[Array, "m d"] | None = None,
    Y_labels: Sequence[Hashable] | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> Nearness:
    """Are rows of one label nearer to each other, in the original space, than to rows of other labels?

    nearer = mean over labels, rows i, rows j of i's label and rows k of others of [d(i, j) < d(i, k)] (ties count half), the area
    under the ROC curve of "same label" by distance. ``nearest`` is recall@1. With Y, i is in X and j, k in Y, and the same from Y
    to X, averaged: with ids as labels, whether the partner in the other flow is the nearest of all there.

    Args:
        X, Y: [n, d] and [m, d] states. labels, Y_labels: one per row; rows of labels without a partner have no part in it.
        permutations: of the labels, for ``null``. Above ``SCORED`` rows, whole labels are left out at random.

    Returns:
        :class:`Nearness`; ``n`` of its estimates counts labels. The interval resamples them with all others held as they are.

    Raises:
        ValueError: also for fewer than 2 labels with a partner.

    Example:
        >>> X = np.array([[0.0], [1.0], [10.0], [11.0]])
        >>> nearness(X, ["a", "a", "b", "b"]).nearer.value, nearness(X, ["a", "b", "a", "b"]).nearest.value
        (1.0, 0.0)
    """
    both = Y is not None
    x = _states(X, "X")
    y = _states(Y, "Y") if both else x
    names = list(labels), list(labels if Y_labels is None else Y_labels)
    if x.shape[1] != y.shape[1] or (len(x), len(y)) != (len(names[0]), len(names[1])) or permutations < 1:
        came = f"states {x.shape} and {y.shape} with {len(names[0])} and {len(names[1])} labels, {permutations=}"
        raise ValueError(f"{came}; expected one width, a label per row, at least one permutation")
    number = {name: k for k, name in enumerate(dict.fromkeys(names[0] + names[1]))}
    a, b = (np.array([number[name] for name in side]) for side in names)
    rows_a, rows_b = (np.bincount(side, minlength=len(number)) for side in (a, b))
    rng = np.random.default_rng(seed)
    usable = rng.permutation(np.flatnonzero((rows_a > 0) & (rows_b > 0) if both else rows_a > 1))
    if len(usable) < 2:
        raise ValueError(f"{len(usable)} labels can be compared; expected at least 2, two rows each (with Y: one on each side)")
    fit = int((np.cumsum((rows_a + rows_b * both)[usable]) <= SCORED).sum())
    in_a, in_b = (np.isin(side, usable[: max(2, fit)]) for side in (a, b))
    x, y, a, b = x[in_a], y[in_b], a[in_a], b[in_b]
    d = euclidean_distances(x - x.mean(0), y - x.mean(0), squared=True)
    if not both:
        np.fill_diagonal(d, np.inf)
    ranks = [rankdata(side, axis=1) for side in ((d, d.T) if both else (d,))]
    nearer, nearest, chance = _compared(ranks, a, b, both)
    moved = [rng.permutation(len(b)) for _ in range(permutations)]
    null = np.quantile([_compared(ranks, a if both else a[m], b[m], both)[0].mean() for m in moved], [0.025, 0.975])
    return Nearness(bootstrap(nearer), bootstrap(nearest), (float(null[0]), float(null[1])), float(chance.mean()))


def _compared(ranks: Sequence[np.ndarray], a: np.ndarray, b: np.ndarray, both: bool) -> np.ndarray:
    """For each label: share of comparisons won, share of nearest neighbours, and the chance of the latter; [3, labels].

    ``ranks`` are those of the distances from the rows of X to those of Y, and back; a and b are the labels of either side.
    """
    out = []
    for rank, (rows, columns) in zip(ranks, ((a, b), (b, a)), strict=False):
        same = rows[:, None] == columns
        if not both:
            np.fill_diagonal(same, False)  # a row's distance to itself is ranked last and is no comparison
        s, m = same.sum(1), rank.shape[1] - (not both)
        lost = (rank * same).sum(1) - s * (s + 1) / 2  # pairs in which a row of another label is the nearer one
        first = rank == rank.min(1, keepdims=True)
        values = 1 - lost / (s * (m - s)), (first & same).sum(1) / first.sum(1), s / m
        label = np.unique(rows, return_inverse=True)[1]
        out.append([np.bincount(label, v) / np.bincount(label) for v in values])
    return np.mean(out, 0)


def _states(states: Any, name: str) -> np.ndarray:
    """[n, d] in float64, of an array or of a tensor on any device and of any float type."""
    if hasattr(states, "detach"):
        states = states.detach().cpu()
        states = (states.double() if states.is_floating_point() else states).numpy()
    x = np.asarray(states)
    if x.ndim != 2 or not x.size or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{name} is {x.shape} of {x.dtype}; expected floats [n, d] (pool the tokens, or flatten them into rows)")
    if bad := int((~np.isfinite(x)).sum()):
        raise ValueError(f"{name} holds {bad} NaN or infinite numbers; drop those rows or find the cause first")
    return x.astype(np.float64)


def _scores(x: np.ndarray, positions: np.ndarray, k: int, seed: int) -> tuple[float, float, int]:
    """Trustworthiness, neighbour overlap and the number of rows they rest on."""
    n = len(x)
    rows = np.arange(n) if n <= SCORED else np.random.default_rng(seed).choice(n, SCORED, replace=False)
    intruded = kept = 0
    for part in np.array_split(rows, -(-len(rows) * n // _BLOCK)):
        own = np.arange(len(part)), part
        far, close = euclidean_distances(x[part], x, squared=True), euclidean_distances(positions[part], positions, squared=True)
        far[own] = close[own] = np.inf
        true, shown = (np.argpartition(d, k - 1, axis=1)[:, :k] for d in (far, close))
        kept += int((true[:, :, None] == shown[:, None, :]).sum())
        for column in shown.T:
            rank = 1 + (far < far[np.arange(len(part)), column][:, None]).sum(1)
            intruded += int(np.maximum(rank - k, 0).sum())
    trust = 1 - 2 * intruded / (len(rows) * k * (2 * n - 3 * k - 1))
    return trust, kept / (len(rows) * k), len(rows)


def _embedded(x: np.ndarray, method: str, seed: int, settings: dict[str, Any]) -> np.ndarray:
    if method == "tsne":
        return TSNE(random_state=seed, **settings).fit_transform(x)
    from umap import UMAP  # not before: importing it compiles for a quarter of a minute or more

    return UMAP(random_state=seed, n_jobs=1, **settings).fit_transform(x)


def _cached(x: np.ndarray, method: str, seed: int, settings: dict[str, Any], cache: str | Path | None) -> np.ndarray:
    """Positions [n, 2] of t-SNE or UMAP: from the file of this content, or made and written to it."""
    try:
        library = version(_PACKAGES[method])
    except PackageNotFoundError as error:
        raise ImportError(f"{method!r} needs {_PACKAGES[method]}: pip install {_PACKAGES[method]} (or 'pca', 'tsne')") from error
    if cache is None:
        return _embedded(x, method, seed, settings).astype(np.float64)
    about = json.dumps([method, seed, settings, library, x.shape], sort_keys=True)
    digest = hashlib.sha256(about.encode() + np.ascontiguousarray(x).tobytes()).hexdigest()[:32]
    file = Path(cache) / f"{method}-{digest}.npz"
    try:
        with np.load(file, allow_pickle=False) as stored:
            positions = stored["positions"]
        if positions.shape == (len(x), 2) and np.isfinite(positions).all():
            return positions
        warnings.warn(f"{file} holds {positions.shape}, not finite positions of {len(x)} rows; it is made anew", stacklevel=3)
    except FileNotFoundError:
        pass
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        warnings.warn(f"{file} cannot be read ({error}); the map is made anew", stacklevel=3)
    positions = _embedded(x, method, seed, settings).astype(np.float64)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent, suffix=".partial")
    with os.fdopen(handle, "wb") as out:
        np.savez(out, positions=positions)
    os.replace(partial, file)  # whole or not at all, also when two processes write
    return positions
