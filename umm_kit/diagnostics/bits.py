"""How many bits of a known factor one fixed small probe reads from anything: the common unit of an audit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MIN_ROWS = 100


@dataclass(frozen=True)
class Reading:
    """Bits about each factor in each held-out item, [factors, items]; controls [factors, shuffles]; entropy, loss [factors]."""

    items: np.ndarray
    controls: np.ndarray
    entropy: np.ndarray  # bits
    loss: np.ndarray  # of the validation rows, nats: what the choice among several inputs may look at

    @property
    def control(self) -> np.ndarray:
        """Mean over shuffles, at least 0: a probe that overfits must not earn a factor bits."""
        return np.maximum(self.controls.mean(1), 0)


def parts_of(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows for training (60 %), for stopping (15 %) and held out (25 %)."""
    if n < _MIN_ROWS:
        raise ValueError(f"there are {n} items; expected at least {_MIN_ROWS}, better 1,000, to train and to test a probe")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: int(0.6 * n)], order[int(0.6 * n) : int(0.75 * n)], order[int(0.75 * n) :]


def read(x: Any, factors: Mapping[str, Any], shuffles: int = 2, seed: int = 0) -> Reading:
    """How many bits about each factor a fixed small MLP reads from x, on items that it was not trained on.

    bits_i = log2 q(y_i | x_i) - log2 p(y_i), p = class frequencies of the training rows; mean (H(y) - cross-entropy) / ln 2

    One hidden layer of 32 GELUs beside a linear map, AdamW (rate .01, decay .01), batches of 256, at most 60 passes; the pass
    with the least validation loss counts, the frequencies alone being one of the candidates. *Control*: the same on shuffled
    labels (after Hewitt and Liang 2019).

    Args:
        x: [n, d], finite. factors: name -> [n] integer classes, at least two of them. shuffles: controls, >= 1.
    Returns:
        Reading, in bits (higher = more readable; at most the entropy in the mean).
    Raises:
        ValueError: fewer than 100 rows, NaN, rows that do not match, a factor that is constant.

    Example:
        >>> y = torch.arange(400) % 2
        >>> bool(read(torch.randn(400, 1) / 4 + y[:, None], {"parity": y}, shuffles=1).items.mean() > 0.7)
        True
    """
    x = torch.as_tensor(x).detach().cpu().float()
    train, stop, test = parts_of(len(x), seed)
    y = _classes(factors, len(x), train)
    if x.ndim != 2 or not torch.isfinite(x).all() or shuffles < 1:
        raise ValueError(f"x is {tuple(x.shape)} or holds NaN, {shuffles=}; expected finite numbers [n, d] and shuffles >= 1")
    centre, spread = x[train].mean(0), x[train].std(0)
    x = ((x - centre) / spread)[:, spread > 1e-6 * (1 + centre.abs())].clamp(-5, 5)  # one far-off value must not lead
    rng = torch.Generator().manual_seed(seed)
    y = torch.cat([y, *(y[:, torch.randperm(len(x), generator=rng)] for _ in range(shuffles))])
    nets, classes, width, d = len(y), int(y.max()) + 1, 32, x.shape[1]  # one net per row of y, all trained side by side
    prior = torch.stack([torch.bincount(row[train], minlength=classes) for row in y]).clamp(min=1e-3).float()
    prior = (prior / prior.sum(1, keepdim=True)).log()
    into = (torch.randn(d, nets * width, generator=rng) / max(d, 1) ** 0.5).requires_grad_()
    bias = (torch.randn(nets * width, generator=rng) / 2).requires_grad_()
    out, linear = torch.zeros(nets, width, classes, requires_grad=True), torch.zeros(d, nets * classes, requires_grad=True)
    optimizer = torch.optim.AdamW([into, bias, out, linear], lr=0.01, weight_decay=0.01)

    def losses(rows: Tensor) -> Tensor:
        hidden = nn.functional.gelu(x[rows] @ into + bias).unflatten(1, (nets, width)).transpose(0, 1)
        scores = hidden @ out + (x[rows] @ linear).unflatten(1, (nets, classes)).transpose(0, 1) + prior[:, None]
        return -scores.log_softmax(-1).gather(2, y[:, rows, None])[:, :, 0]

    best, held, since = torch.full((nets,), torch.inf), torch.zeros(nets, len(test)), 0
    for _ in range(61):
        with torch.no_grad():
            loss = losses(torch.cat([stop, test]))
        better = loss[:, : len(stop)].mean(1) < best - 1e-4
        best, held[better] = torch.where(better, loss[:, : len(stop)].mean(1), best), loss[better, len(stop) :]
        since = 0 if bool(better[: len(factors)].any()) else since + 1
        if since > 8:
            break
        for rows in train[torch.randperm(len(train), generator=rng)].split(256):
            optimizer.zero_grad()
            losses(rows).mean(1).sum().backward()
            optimizer.step()
    surprise = -prior.gather(1, y[:, test])
    bits, k = ((surprise - held) / math.log(2)).double().numpy(), len(factors)
    controls = bits[k:].mean(1).reshape(shuffles, k).T
    return Reading(bits[:k], controls, surprise[:k].mean(1).double().numpy() / math.log(2), best[:k].numpy())


def _classes(factors: Mapping[str, Any], n: int, train: Tensor) -> Tensor:
    """[factors, n] class numbers from 0."""
    rows = []
    for name, values in factors.items():
        values = torch.as_tensor(values).cpu()
        if values.shape != (n,) or values.is_floating_point():
            came = f"factor {name!r} is {tuple(values.shape)} of {values.dtype}"
            raise ValueError(f"{came}; expected {n} integer classes (quantile_classes makes some of numbers)")
        if len(values[train].unique()) < 2:
            raise ValueError(f"factor {name!r} is constant in these items: choose data in which it varies, or leave it out")
        rows.append(values.unique(return_inverse=True)[1])
    if not rows:
        raise ValueError("no factor was given; expected at least one")
    return torch.stack(rows)


def quantile_classes(values: Any, classes: int = 4) -> Tensor:
    """Numbers [n] as classes of about equal size, so that all factors can be counted in bits; ties stay together."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"values are {values.shape} or hold NaN; expected finite numbers [n]")
    return torch.from_numpy(np.searchsorted(np.quantile(values, np.arange(1, classes) / classes), values, side="right"))
