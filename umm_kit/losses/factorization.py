"""Terms on mutual information (DIVA Sec. 3.2): pure functions of a critic's scores for all pairs of a batch; two critics.

``scores[i, j] = f(x_i, y_j)``: the diagonal holds the N positive pairs, everything else the negatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class InfoNCE:
    """Parts of :func:`infonce`, in nats: loss = bound - estimate."""

    loss: Tensor  # scalar, to minimise
    estimate: Tensor  # scalar, lower bound on the mutual information
    bound: float  # log N: the estimate cannot exceed it


def _square(scores: Tensor) -> int:
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) < 2:
        raise ValueError(f"scores are {tuple(scores.shape)}; expected [N, N] with N >= 2, positive pairs on the diagonal")
    return len(scores)


def infonce(scores: Tensor) -> InfoNCE:
    """Cross-entropy of picking the partner of x_i among N candidates; its gap to log N bounds I(x; y) from below.

    loss = -1/N sum_i log( exp f(x_i, y_i) / sum_j exp f(x_i, y_j) ),   log N - loss <= I(x; y)

    van den Oord et al. 2018, Eqs. 4 and 5; DIVA Eq. 6 omits log N and does not say whether the positive pair counts in the
    denominator: here it does, without which the bound does not hold. For both directions average over scores and scores.T.

    Args:
        scores: [N, N], any real numbers, N >= 2.
    Returns:
        InfoNCE: loss (lower = more information), estimate (higher = more) and bound, in nats.
    Raises:
        ValueError: scores are not square or N < 2.

    Example:
        >>> infonce(torch.zeros(4, 4)).estimate.item()  # a constant critic knows nothing
        0.0
    """
    n = _square(scores)
    loss = -torch.log_softmax(scores, 1).diagonal().mean()
    return InfoNCE(loss, math.log(n) - loss, math.log(n))


def club(scores: Tensor) -> Tensor:
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
    n = _square(scores)
    positive = scores.diagonal().sum()
    return positive / n - (scores.sum() - positive) / (n * (n - 1))


def gaussian_scores(mean: Tensor, log_variance: Tensor, y: Tensor) -> Tensor:
    """log N(y_j; mean_i, diag exp(log_variance_i)) for all pairs: what CLUB contrasts.

    -1/2 sum_d [ (y_jd - mean_id)^2 exp(-log_variance_id) + log_variance_id + log 2 pi ]   (Cheng et al. 2020, Sec. 3.2)

    Args:
        mean, log_variance: [N, d], predicted from x_i.
        y: [M, d].
    Returns:
        [N, M], in nats.

    Example:
        >>> round(gaussian_scores(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1)).item(), 3)
        -1.419
    """
    precision = torch.exp(-log_variance)
    # (y - m)^2 p = y^2 p - 2 y (m p) + m^2 p: three matrix products instead of an [N, M, d] array.
    square = precision @ (y * y).T - 2 * (mean * precision) @ y.T + (mean * mean * precision).sum(1, keepdim=True)
    return -0.5 * (square + (log_variance + math.log(2 * math.pi)).sum(1, keepdim=True))


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

    Example:
        >>> ConditionalGaussian(3, 2)(torch.zeros(5, 3), torch.zeros(5, 2)).shape
        torch.Size([5, 5])
    """

    def __init__(self, x_size: int, y_size: int, width: int = 64):
        super().__init__()
        self.net = _Net(x_size, 2 * y_size, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mean, log_variance = self.net(x).chunk(2, 1)
        return gaussian_scores(mean, log_variance, y)
