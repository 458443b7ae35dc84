"""What each flow keeps at each layer: probes of known factors, said by captions and never said.

What a probe reads out, the states hold in a form this simple; that the model *uses* it does not follow, nor does a failing
probe show absence.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from umm_kit.data.shapes import WORDS
from umm_kit.features import FLOWS, Features

PENALTIES = tuple(10.0**k for k in range(-5, 3))  # of ridge, per training row; chosen for each column by leave-one-out
_RESAMPLES, _CONTROLS, _CHUNK, _MOST_CLASSES = 1000, 5, 2048, 20


@dataclass(frozen=True)
class Target:
    """What a probe should read: numbers (scored by R^2) or classes (by balanced accuracy), one row per scene.

    ``values`` is [n], [n, columns], or [n, rows, columns of the texture grid] with ``patches`` (read from token states only).
    """

    values: Tensor
    said: bool
    classes: bool = False
    patches: bool = False


@dataclass(frozen=True, eq=False)
class Probes:
    """All scores of one call, one row each, with 95 % intervals over ``n`` scenes or groups of them."""

    frame: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """Columns flow, layer, factor, kind (said, unsaid), probe, measure, score, low, high, control, selectivity, chance, n."""
        return self.frame.copy()


def probe_targets(factors: Mapping[str, Tensor]) -> dict[str, Target]:
    """Probe targets of the factors of a data set; those of several objects become numbers of a scene.

    From the scenes of ``Shapes``: ``count``; for ``shape``, ``colour``, ``size`` and ``cell`` the number of objects of
    each value (one column per value, scores averaged); ``grey``, ``gradient`` (x, y), ``brightness``; ``jitter`` as the mean
    displacement of the objects (x, y); ``texture`` as its mean over the image, all that a pooled state can be asked for, and
    ``patch texture``, that of a token's own place. Of other data sets integers are taken as said (classes, if up to 20 occur)
    and floats as unsaid.

    Example:
        >>> list(probe_targets({"digit": torch.arange(4), "slant": torch.rand(4)}))
        ['digit', 'slant']
    """
    out = {}
    for name, values in factors.items():
        if name in WORDS:
            out[name] = Target(torch.stack([(values == k).sum(1) for k in range(len(WORDS[name]))], 1), said=True)
        elif name == "jitter" and "cell" in factors:
            present = (factors["cell"] >= 0)[:, :, None]
            out[name] = Target((values * present).sum(1) / present.sum(1).clamp(min=1), said=False)
        elif name == "texture" and values.ndim == 3:
            out[name] = Target(values.mean((1, 2)), said=False)
            out["patch texture"] = Target(values, said=False, patches=True)
        else:
            whole = not values.is_floating_point()
            out[name] = Target(values, whole, classes=whole and name != "count" and len(values.unique()) <= _MOST_CLASSES)
    return out


def probe(
    features: Features,
    targets: Mapping[str, Target] | None = None,
    method: str = "linear",
    folds: int = 5,
    groups: Sequence[Any] | None = None,
    neighbours: int = 10,
    seed: int = 0,
) -> Probes:
    """How well each factor can be read from the states of each flow and layer, on scenes the probe was not trained on.

    R^2 = 1 - sum (y - prediction)^2 / sum (y - training mean)^2, averaged over the columns of a factor, or balanced accuracy, the
    mean share of right answers over classes (classes compete by score over frequency). Predictions are cross-validated:
    no scene, and no group, is in both parts. ``"linear"`` is ridge regression in closed form (float64) on standardised
    features, its penalty chosen inside the training part by leave-one-out; ``"knn"`` averages the nearest training rows.

    *Control*: the same probe on the labels of other scenes, mean of 5 shuffles (Hewitt and Liang 2019, Sec. 2, whose control
    labels belong to word types; scenes do not recur, so ours can only be memorised). *Selectivity* = score - control. Layer
    0, and the same call on an untrained model, say how much of a score is the picture's and not the model's. The
    interval resamples held-out scenes (percentile bootstrap), not the training of the probe.

    Args:
        features: pooled [n, d] or token [n, N, d] states. Tokens are averaged for factors of the scene; the linear probe
            asks every token for ``patch texture``, in generation apart where it was visible and where hidden.
        targets: by default :func:`probe_targets` of ``features.factors``.
        groups: [n] labels; scenes of one group (near-duplicates) are held out and resampled together.
    Returns:
        Probes: score (higher = more readable; R^2 <= 1, 0 = the mean, below 0 = worse), chance, control, selectivity.
    Raises:
        ValueError: no states or targets, rows that do not match, NaN, fewer than 2 groups per fold, texture that does not
            divide into the token grid.

    Example:
        >>> h = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> seen = Features([str(i) for i in range(100)], {("understanding", 1): h}, {}, {})
        >>> probe(seen, {"first": Target(h[:, 0], said=True)}).to_frame()["score"].round(2).tolist()
        [1.0]
    """
    n = len(features)
    wanted = _checked(probe_targets(features.factors) if targets is None else targets, n)
    labels = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if method not in ("linear", "knn") or not features.states or len(labels) != n:
        came = f"method {method!r}, {len(features.states)} states, {len(labels)} group labels for {n} scenes"
        raise ValueError(f"{came}; expected 'linear' or 'knn', at least one state, one label per scene")
    group, number = torch.from_numpy(labels), int(labels.max()) + 1
    if folds < 2 or number < 2 * folds or neighbours < 1:
        raise ValueError(f"{number} groups, {folds} folds, {neighbours} neighbours; expected folds >= 2 of 2 groups or more")
    rng = torch.Generator().manual_seed(seed)
    fold = (torch.randperm(number, generator=rng) % folds)[group]
    orders = [torch.arange(n), *(torch.randperm(n, generator=rng) for _ in range(_CONTROLS))]  # the truth, then the controls
    draws = torch.randint(number, (_RESAMPLES, number), generator=rng)
    weights = torch.stack([torch.bincount(draw, minlength=number) for draw in draws]).double()
    rows = []
    for (flow, layer), states in sorted(features.states.items(), key=lambda item: (FLOWS.index(item[0][0]), item[0][1])):
        if len(states) != n or not torch.isfinite(states).all():
            raise ValueError(f"states of {flow} at layer {layer} are {tuple(states.shape)} or hold NaN; expected {n} finite rows")
        for patches in (False, True) if states.ndim == 3 and method == "linear" else (False,):
            asked = {name: target for name, target in wanted.items() if target.patches == patches}
            if not asked:
                continue
            truth = {name: _columns(target, features.grids.get(flow)) for name, target in asked.items()}  # [n, tokens, c]
            tokens, x = states.shape[1] if patches else 1, states.cpu().double()
            x = x.flatten(0, 1) if patches else x.mean(1) if x.ndim == 3 else x
            y = torch.cat([values[order] for order in orders for values in truth.values()], 2).flatten(0, 1)
            x, at = _standardised(x, f"{flow} at layer {layer}"), fold.repeat_interleave(tokens)
            predicted, mean = _ridge(x, y, at) if method == "linear" else _nearest(x, y, at, neighbours)
            widths = [values.shape[2] for _ in orders for values in truth.values()]
            parts = list(zip(y.split(widths, 1), predicted.split(widths, 1), mean.split(widths, 1), strict=True))
            views = {"": torch.ones(n, tokens)}
            if patches and flow == "generation" and features.masks is not None:
                views = {k: m for k, m in ((", visible", ~features.masks), (", hidden", features.masks)) if m.any()}
            for place, (name, target) in enumerate(asked.items()):
                errors = [_errors(*part, target.classes) for part in parts[place :: len(asked)]]  # one per order
                for view, where in views.items():
                    sums = [[_by_group(e, where, group) for e in pair] for pair in errors]
                    score, *controls = (float(_score(*(s.sum(0) for s in pair))) for pair in sums)
                    low, high = np.nanquantile(_score(*(weights @ s for s in sums[0])), [0.025, 0.975])
                    control = float(np.mean(controls))
                    rows.append({
                        "flow": flow, "layer": layer, "factor": name + view, "kind": "said" if target.said else "unsaid",
                        "probe": method, "measure": "balanced accuracy" if target.classes else "R^2", "score": score,
                        "low": low, "high": high, "control": control, "selectivity": score - control,
                        "chance": 1 / truth[name].shape[2] if target.classes else 0.0, "n": number,
                    })  # fmt: skip
    return Probes(pd.DataFrame(rows))


def _checked(wanted: Mapping[str, Target], n: int) -> dict[str, Target]:
    """Targets without constant columns, which nothing can predict and nothing can miss."""
    out = {}
    for name, target in wanted.items():
        values = target.values.cpu()
        if len(values) != n or (target.patches and values.ndim != 3) or not torch.isfinite(values).all():
            raise ValueError(f"target {name!r} is {tuple(values.shape)} or holds NaN; expected {n} finite rows")
        if target.classes:
            values = torch.nn.functional.one_hot(values.flatten().unique(return_inverse=True)[1])
        if not target.patches:
            values = values.reshape(n, -1)
            values = values[:, (values != values[:1]).any(0)]
        if not (values != values[:1]).any():
            warnings.warn(f"factor {name!r} is constant in these scenes and left out", stacklevel=3)
            continue
        out[name] = replace(target, values=values.double())
    if not out:
        raise ValueError("no factor to probe: the features carry none that varies; give targets")
    return out


def _columns(target: Target, grid: tuple[int, int] | None) -> Tensor:
    """[n, tokens, columns]; a texture finer than the token grid is averaged over each token."""
    if not target.patches:
        return target.values[:, None]
    if grid is None or any(have % want for have, want in zip(target.values.shape[1:], grid, strict=True)):
        raise ValueError(f"a texture of {tuple(target.values.shape[1:])} patches does not divide into the token grid {grid}")
    return torch.nn.functional.adaptive_avg_pool2d(target.values, grid).flatten(1)[:, :, None]


def _standardised(x: Tensor, name: str) -> Tensor:
    """Columns of variance 1 (over all rows: no label is used), turned into at most as many as there are rows."""
    x = x[:, (x != x[:1]).any(0)]
    if not x.shape[1]:
        warnings.warn(f"the states of {name} are the same in every scene: nothing can be read from them", stacklevel=3)
        return torch.zeros(len(x), 1, dtype=x.dtype)
    x = (x - x.mean(0)) / x.std(0)
    return torch.linalg.qr(x.T).R.T if x.shape[1] > len(x) else x  # a rotation: no distance or ridge prediction changes


def _ridge(x: Tensor, y: Tensor, fold: Tensor) -> tuple[Tensor, Tensor]:
    """Held-out predictions of every column of y and the training means, both [rows, columns]."""
    predicted, mean = torch.empty_like(y), torch.empty_like(y)
    for f in fold.unique():
        train, test = fold != f, fold == f
        centre, mean[test] = x[train].mean(0), y[train].mean(0)
        a, b = x[train] - centre, y[train] - y[train].mean(0)
        square, v = torch.linalg.eigh(a.T @ a)
        z, square = a @ v, square.clamp(min=0)
        cross = z.T @ b
        best, weight = torch.full((y.shape[1],), torch.inf, dtype=y.dtype), torch.zeros_like(cross)
        for penalty in PENALTIES:
            w = cross / (square + penalty * len(a))[:, None]
            leverage = 1 / len(a) + (z * z / (square + penalty * len(a))).sum(1)
            error = (((b - z @ w) / (1 - leverage)[:, None]) ** 2).sum(0)  # leave-one-out, exact for ridge
            best, weight = torch.minimum(best, error), torch.where(error < best, w, weight)
        predicted[test] = (x[test] - centre) @ v @ weight + mean[test]
    return predicted, mean


def _nearest(x: Tensor, y: Tensor, fold: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Means of y over the nearest rows of other folds, and over all rows of other folds."""
    predicted, mean = torch.empty_like(y), torch.empty_like(y)
    for f in fold.unique():
        train = (fold != f).nonzero()[:, 0]
        mean[fold == f] = y[train].mean(0)
        for rows in (fold == f).nonzero()[:, 0].split(_CHUNK):
            near = torch.cdist(x[rows], x[train]).topk(min(neighbours, len(train)), largest=False).indices
            predicted[rows] = y[train[near]].mean(1)
    return predicted, mean


def _errors(truth: Tensor, predicted: Tensor, mean: Tensor, classes: bool) -> tuple[Tensor, Tensor]:
    """What is lost and what there was to lose, per row and column: the score is 1 - sum / sum, averaged over columns."""
    if not classes:
        return (truth - predicted) ** 2, (truth - mean) ** 2
    answer = (predicted / mean.clamp(min=1e-9)).argmax(1)
    return truth * (torch.arange(truth.shape[1]) != answer[:, None]), truth


def _by_group(errors: Tensor, where: Tensor, group: Tensor) -> Tensor:
    """Sums over the tokens of a view and the scenes of a group: [groups, columns]."""
    scenes = (errors.view(*where.shape, -1) * where[:, :, None]).sum(1)
    return torch.zeros(int(group.max()) + 1, scenes.shape[1], dtype=scenes.dtype).index_add_(0, group, scenes)


def _score(lost: Tensor, total: Tensor) -> Tensor:
    return 1 - (lost / total).nanmean(-1)  # a class that a resample misses does not count in it
