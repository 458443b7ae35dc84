"""Mutual information between two sets of states, by estimators whose limits are stated and measured.

KSG and the Gaussian one need no training; the neural ones fit a small critic and report what it is worth on rows it never
saw. InfoNCE is a lower bound on I. **CLUB and NCE-CLUB do not estimate I**, see :func:`mutual_information`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import special, stats
from scipy.spatial import cKDTree
from torch import Tensor

from umm_kit.losses.factorization import ConditionalGaussian, Critic, club, infonce
from umm_kit.statistics import Estimate

Array = np.ndarray | Tensor
Rows = Float[Array, " n"] | Float[Array, "n _d"]
METHODS = ("ksg", "gaussian", "infonce", "club", "nceclub")
_PARTS = 10  # disjoint parts of the rows from whose spread the interval of KSG comes
_EVERY, _PATIENCE = 50, 6  # steps between looks at the validation rows; looks without progress that end a fit
_LEARNING_RATE, _WEIGHT_DECAY = 3e-3, 1e-2


@dataclass(frozen=True)
class MutualInformation(Estimate):
    """An estimate in nats with its 95 % interval; ``n`` rows.

    ``bound``: what the estimate cannot exceed (InfoNCE: log of the held-out batch; otherwise infinity).
    ``per_seed``: the held-out value of each fit (neural methods only); ``value`` is their median.
    """

    method: str
    bound: float = math.inf
    per_seed: tuple[float, ...] = ()


def mutual_information(
    x: Rows, y: Rows, method: str = "ksg", k: int = 5, seeds: int = 3, batch_size: int = 256, steps: int = 2000, seed: int = 0
) -> MutualInformation:
    """Mutual information I(x; y) = E log[p(x, y) / (p(x) p(y))] from n paired rows, or the quantity a method has instead.

    ``"ksg"``: psi(k) + psi(n) - < psi(n_x + 1) + psi(n_y + 1) >, n_x = other rows nearer in x than the k-th neighbour is in
        the joint space, maximum norm throughout (Kraskov et al. 2004, algorithm 1, Eq. 8). Columns are standardised. Not
        clipped at 0. Too low in high dimension and where dependence is strong or tails are heavy.
    ``"gaussian"``: -1/2 sum log(1 - rho_i^2) over canonical correlations, less its bias at this n (from E log det of a
        Wishart matrix: unbiased for Gaussian rows). Regularisation: directions of singular value below machine precision
        are dropped, nothing is shrunk. For other distributions it sees linear dependence only.
    ``"infonce"``: a lower bound on I, and at most log(batch) (van den Oord et al. 2018).
    ``"club"``, ``"nceclub"``: E_p(x,y) f - E_p(x)p(y) f with f = log q(y|x) (Cheng et al. 2020) or f = the InfoNCE critic
        (DIVA Eq. 7). Even with the best f it is **I + KL(p_x p_y || p_xy)** >= I: rho^2 / (1 - rho^2) per Gaussian dimension
        (1.286 nats at rho = .75, where I = .413). With a poor f it bounds nothing; q is Gaussian, of diagonal covariance
        once y is whitened by what a linear fit leaves.

    Neural methods: columns become normal scores by rank (I is unchanged). Each of ``seeds`` fits holds out another 1/seeds
    of the rows, stops early by a tenth of the others, and counts on the held-out rows only. A result that is not above 0
    while KSG sees dependence is a failed fit, not independence: it raises. Near 0 without that says: this critic found nothing.

    Args:
        x, y: [n, d] or [n], any float dtype, array or tensor, row i of both from the same anchor.
        k: neighbours of KSG.
        seeds: fits of a neural method, at least 3.
        batch_size: rows among which a neural critic tells the partner; ``steps``: of training at most.
    Returns:
        MutualInformation: nats, higher = more dependent. Interval: from disjoint parts of the rows (KSG) or from the seeds'
        disjoint held-out rows (neural; Student's t, wide for 3), asymptotic normal for Gaussian rows ("gaussian").
    Raises:
        ValueError: unknown method, rows that do not match, NaN, constant data, too few rows, repeated rows (KSG).
        RuntimeError: a neural fit failed.

    Example:
        >>> x, noise = np.random.default_rng(0).normal(size=(2, 2000))
        >>> print(mutual_information(x, x + noise, "gaussian"))  # the truth is log(2) / 2
        0.340 [0.309, 0.371] (n=2000)
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {METHODS}")
    a, b = _matrix(x, "x"), _matrix(y, "y")
    if len(a) != len(b):
        raise ValueError(f"x has {len(a)} rows, y has {len(b)}; expected the same anchors in the same order")
    if method == "gaussian":
        return _gaussian(a, b)
    if (n := len(a)) <= a.shape[1] + b.shape[1]:
        warnings.warn(f"{n} rows for {a.shape[1]} + {b.shape[1]} columns: mostly noise (project first)", stacklevel=2)
    if method == "ksg":
        return _ksg_estimate(a, b, k, seed)
    return _neural(a, b, method, seeds, batch_size, steps, seed)


def _matrix(values: Any, name: str) -> np.ndarray:
    """Standardised float64 columns, without constant ones: they carry no information."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double()  # numpy has no bfloat16
    array = np.asarray(values, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or len(array) < 2 or not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{name} is {array.shape} with {bad} NaN or infinite numbers; expected finite [n, d], tokens pooled")
    keep = np.ptp(array, axis=0) > 0
    if not keep.any():
        raise ValueError(f"{name} is constant: its mutual information with anything is 0 and there is nothing to estimate")
    if not keep.all():
        warnings.warn(f"{int((~keep).sum())} constant columns of {name} are left out: they carry no information", stacklevel=3)
    array = array[:, keep]
    return (array - array.mean(0)) / array.std(0)


# --- without training ------------------------------------------------------------------------------------------------


def _ksg(x: np.ndarray, y: np.ndarray, k: int) -> float:
    joint = np.hstack([x, y])
    radius = cKDTree(joint).query(joint, [k + 1], p=np.inf)[0][:, 0]  # the first neighbour is the row itself
    if not radius.all():
        raise ValueError(f"{int((radius == 0).sum())} rows occur more than {k} times; KSG needs continuous data: add noise")
    inside = np.nextafter(radius, 0)  # strictly nearer
    # The counts include the row itself, hence psi(count) and not psi(count + 1).
    counts = (cKDTree(side).query_ball_point(side, inside, p=np.inf, return_length=True) for side in (x, y))
    return float(special.digamma(k) + special.digamma(len(x)) - sum(special.digamma(c).mean() for c in counts))


def _t_interval(value: float, parts: Any, level: float = 0.95) -> tuple[float, float]:
    """Of the mean of independent parts, by their spread (for KSG: Holmes and Nemenman 2019, Sec. III)."""
    half = stats.t.ppf((1 + level) / 2, len(parts) - 1) * np.std(parts, ddof=1) / math.sqrt(len(parts))
    return float(value - half), float(value + half)


def _ksg_estimate(x: np.ndarray, y: np.ndarray, k: int, seed: int, level: float = 0.95) -> MutualInformation:
    n = len(x)
    parts = min(_PARTS, n // (2 * (k + 1)))
    if k < 1 or parts < 2:
        raise ValueError(f"k={k} with {n} rows; expected k >= 1 and at least 4 (k + 1) rows")
    rows = np.array_split(np.random.default_rng(seed).permutation(n), parts)
    value = _ksg(x, y, k)
    return MutualInformation(value, *_t_interval(value, [_ksg(x[r], y[r], k) for r in rows], level), n, "ksg")


def _gaussian(x: np.ndarray, y: np.ndarray) -> MutualInformation:
    bases = []
    for side in (x, y):
        u, s, _ = np.linalg.svd(side, full_matrices=False)
        bases.append(u[:, s > s[0] * max(side.shape) * np.finfo(float).eps])
    n, a, b = len(x), bases[0].shape[1], bases[1].shape[1]
    freedom = n - 1
    if freedom <= a + b:
        raise ValueError(f"{n} rows for {a} + {b} directions: some correlation is 1 whatever the data; expected n > {a + b + 1}")
    rho = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    if rho[0] > 1 - 1e-12:
        warnings.warn("a linear function of x equals one of y: their mutual information is infinite", stacklevel=3)
        return MutualInformation(math.inf, math.inf, math.inf, n, "gaussian")
    # E log det W = log det Sigma + sum_i psi((freedom + 1 - i) / 2) + const, for x, y and both together; the part that x
    # and y do not share with the whole remains.
    i = np.arange(1, b + 1)
    full, rest = (freedom + 1 - i) / 2, (freedom - a + 1 - i) / 2
    bias = 0.5 * (special.digamma(full) - special.digamma(rest)).sum()
    variance = (rho**2).sum() / n + 0.25 * (special.polygamma(1, rest) - special.polygamma(1, full)).sum()
    value = float(-0.5 * np.log1p(-(rho**2)).sum() - bias)
    half = stats.norm.ppf(0.975) * math.sqrt(variance)
    return MutualInformation(value, value - half, value + half, n, "gaussian")


# --- by a critic -----------------------------------------------------------------------------------------------------


def _batches(rows: Tensor, size: int) -> list[Tensor]:
    """As many equal batches of at most ``size`` as hold all rows but a few."""
    each = len(rows) // math.ceil(len(rows) / size)
    return list(rows[: len(rows) // each * each].split(each))


def _whitened(x: Tensor, y: Tensor, train: Tensor) -> Tensor:
    """y with what a linear fit of it to x leaves made uncorrelated: a diagonal q is then exact for Gaussian data."""
    design = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    fit = torch.linalg.lstsq(design[train], y[train].double(), driver="gelsd").solution
    covariance = torch.cov((y.double() - design @ fit)[train].T).reshape(y.shape[1], -1)
    covariance += 1e-4 * torch.eye(y.shape[1], dtype=torch.float64)  # for y a linear function of x
    return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), y.double().T, upper=False).T.float()


def _fit(x: Tensor, y: Tensor, held_out: Tensor, rest: Tensor, method: str, size: int, steps: int, seed: int) -> float:
    """Train on nine tenths of ``rest``, stop by the other tenth, return the value on ``held_out``."""
    generator = torch.Generator().manual_seed(seed)
    train, validation = rest[len(rest) // 10 :], rest[: len(rest) // 10]
    y = _whitened(x, y, train) if method == "club" else y
    with torch.random.fork_rng(devices=[]):  # initial weights without touching the caller's generator
        torch.manual_seed(seed)
        critic = (ConditionalGaussian if method == "club" else Critic)(x.shape[1], y.shape[1])
    gain = (lambda f: f.diagonal().mean()) if method == "club" else (lambda f: infonce(f).estimate)  # likelihood or InfoNCE
    optimizer = torch.optim.AdamW(critic.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    best, weights, looks = -math.inf, None, 0
    for step in range(1, steps + 1):
        rows = train[torch.randperm(len(train), generator=generator)[:size]]
        optimizer.zero_grad()
        (-gain(critic(x[rows], y[rows]))).backward()
        optimizer.step()
        if step % _EVERY and step < steps:
            continue
        with torch.no_grad():
            reached = float(np.mean([float(gain(critic(x[r], y[r]))) for r in _batches(validation, size)]))
        looks += 1
        if reached > best:
            best, weights, looks = reached, {name: value.clone() for name, value in critic.state_dict().items()}, 0
        if looks == _PATIENCE or not math.isfinite(reached):
            break
    if weights is None:
        raise RuntimeError(f"the {method} fit failed: its objective is not finite; this is no evidence of independence")
    critic.load_state_dict(weights)
    with torch.no_grad():
        value = gain if method == "infonce" else club
        return float(np.mean([float(value(critic(x[r], y[r]))) for r in _batches(held_out, size)]))


def _neural(x: np.ndarray, y: np.ndarray, method: str, seeds: int, size: int, steps: int, seed: int) -> MutualInformation:
    n = len(x)
    if seeds < 3 or size < 4 or steps < 1:
        raise ValueError(f"seeds={seeds}, batch_size={size}, steps={steps}; expected at least 3, 4 and 1")
    if n < 20 * seeds:
        raise ValueError(f"{n} rows for {seeds} disjoint held-out parts; expected at least {20 * seeds}: use method='gaussian'")
    scores = [stats.norm.ppf(stats.rankdata(side, axis=0) / (n + 1)) for side in (x, y)]
    a, b = (torch.from_numpy(side).float() for side in scores)
    parts = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tensor_split(seeds)
    values = []
    for s, part in enumerate(parts):
        rest = torch.cat([other for t, other in enumerate(parts) if t != s])
        values.append(_fit(a, b, part, rest, method, size, steps, seed + s))
    value = float(np.median(values))
    low, high = _t_interval(value, values)
    bound = math.log(len(_batches(parts[-1], size)[0])) if method == "infonce" else math.inf
    if value < -0.05 and high < 0:
        raise RuntimeError(f"the {method} fits failed: {value:.3f} nats on held-out rows, where a constant critic reaches 0")
    if low <= 0:
        rows = torch.cat(parts)[:2000]  # with a breath of noise, because KSG refuses repeated rows
        noise = 1e-6 * np.random.default_rng(seed).normal(size=(2, len(rows), 1))
        control = _ksg_estimate(x[rows] + noise[0], y[rows] + noise[1], 3, seed, level=0.99)
        if value < control.low:
            raise RuntimeError(
                f"the {method} fits found nothing ({value:.3f} nats on held-out rows), but KSG sees {control.value:.3f} "
                f"[{control.low:.3f}, {control.high:.3f}]: failed, not independent; give more steps or rows, or use 'ksg'"
            )
    if value > 0.8 * bound:
        warnings.warn(f"{value:.2f} nats is close to the bound log(batch) = {bound:.2f}: raise batch_size", stacklevel=3)
    return MutualInformation(value, low, high, n, method, bound, tuple(values))
