"""Where understanding and generation pull one layer in different directions: gradient conflict, with its noise ceiling."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from umm_kit.features import batches, evaluating
from umm_kit.models.base import MASK_RATIO
from umm_kit.statistics import N_RESAMPLES, Estimate, bootstrap

#: Parts of a block, by what their parameters are called; the first that fits counts, anything else is "other".
PARTS = {"norm": r"norm|ln_|\.ln", "attention": r"att", "mlp": r"mlp|ffn|feed_forward|fc\d|experts"}
_U, _G, _U2, _G2 = range(4)  # rows of a Gram matrix: both tasks on one batch, and both on another


@dataclass(frozen=True)
class GradientConflict:
    """Inner products of the two tasks' gradients, from which every reading follows.

    Attributes:
        grams: [pairs, groups, 4, 4]; for each pair of disjoint batches (B, B') and each group of parameters the inner products
            of (g_U(B), g_G(B), g_U(B'), g_G(B')).
        groups: (layer, part) of each group, layers in the order of the model.
        settings: what it was computed with.
    """

    grams: np.ndarray
    groups: list[tuple[str, str]]
    settings: dict[str, Any]

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(layer for layer, _ in self.groups))

    def gram(self, layer: str, part: str = "all") -> np.ndarray:
        """Inner products [pairs, 4, 4] over one layer, or one part of it."""
        wanted = [k for k, (name, kind) in enumerate(self.groups) if name == layer and part in ("all", kind)]
        if not wanted:
            raise ValueError(f"there are no parameters {part!r} of {layer!r}; there are {self.groups}")
        return self.grams[:, wanted].sum(1)

    def estimates(self, layer: str, part: str = "all") -> dict[str, Estimate]:
        """Every metric with its 95 % interval over pairs of batches.

        - ``conflict`` 1 - cos(g_U, g_G) on one batch, in [0, 2], mean over batches (higher = more conflict);
        - ``negative_rate`` share of batches with cos < 0 (PCGrad's criterion);
        - ``within_understanding``, ``within_generation`` cos(g(B), g(B')): how much of a gradient is signal. It is the ceiling
          of what two tasks could show: batches of pure noise are orthogonal, and a conflict near 1 then says nothing;
        - ``disattenuated_cosine`` <g_U, g_G'> / sqrt(<g_U, g_U'> <g_G, g_G'>), of sums over pairs: the cosine of the noise-free
          gradients. Every product is of disjoint batches, so that no noise is shared. It may leave [-1, 1]. NaN where a
          product within a task is not above 0: there is no signal to correct by. Its interval alone is NaN where that holds
          of one resample in twenty or more;
        - ``magnitude_ratio`` ||g_G|| / ||g_U||, mean over batches.

        At a stationary point of L_U + L_G the noise-free gradients are opposite whatever the model has learned: the
        disattenuated cosine is -1 there by necessity, while noise pulls the measured conflict to 1.
        """
        gram = self.gram(layer, part)
        squares = np.diagonal(gram, axis1=1, axis2=2)
        if not (squares > 0).all():
            flow = "understanding" if not (squares[:, [_U, _U2]] > 0).all() else "generation"
            raise ValueError(f"the {flow} loss has no gradient in {part} of {layer}: a cosine with it is undefined")
        norms = np.sqrt(squares)
        cosine = gram / norms[:, :, None] / norms[:, None, :]
        across = np.stack([cosine[:, _U, _G], cosine[:, _U2, _G2]], 1)
        cross = (gram[:, _U, _G2] + gram[:, _U2, _G]) / 2
        return {
            "conflict": bootstrap(1 - across.mean(1)),
            "negative_rate": bootstrap((across < 0).mean(1)),
            "within_understanding": bootstrap(cosine[:, _U, _U2]),
            "within_generation": bootstrap(cosine[:, _G, _G2]),
            "disattenuated_cosine": _disattenuated(cross, gram[:, _U, _U2], gram[:, _G, _G2]),
            "magnitude_ratio": bootstrap((norms[:, [_G, _G2]] / norms[:, [_U, _U2]]).mean(1)),
        }

    def to_frame(self, parts: Sequence[str] = ("all",)) -> pd.DataFrame:
        """Columns layer, part, metric, value, low, high, n (pairs of batches)."""
        rows = [
            {"layer": layer, "part": part, "metric": metric, "value": e.value, "low": e.low, "high": e.high, "n": e.n}
            for part in parts
            for layer in self.layers
            if part == "all" or (layer, part) in self.groups
            for metric, e in self.estimates(layer, part).items()
        ]
        return pd.DataFrame(rows)


def _disattenuated(cross: np.ndarray, u: np.ndarray, g: np.ndarray) -> Estimate:
    """Resamples without signal have no value; where there are many of them, an interval of the rest would flatter."""

    def cosine(cross: np.ndarray, u: np.ndarray, g: np.ndarray) -> np.ndarray:
        a, b = u.mean(-1), g.mean(-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where((a > 0) & (b > 0), cross.mean(-1) / np.sqrt(a * b), np.nan)

    n, value = len(cross), float(cosine(cross, u, g))
    rows = np.random.default_rng(0).integers(n, size=(N_RESAMPLES, n))  # scipy's bootstrap warns of each draw without a value
    drawn = cosine(cross[rows], u[rows], g[rows])
    if np.isnan(value) or np.isnan(drawn).mean() >= 0.05:
        return Estimate(value, np.nan, np.nan, n)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high), n)


def parameter_groups(model: Any) -> dict[tuple[str, str], list[nn.Parameter]]:
    """Trainable parameters of the shared blocks by (layer, part); frozen ones (a LoRA-wrapped backbone) are left out."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups: dict[tuple[str, str], list[nn.Parameter]] = {}
    for layer, parameters in model.layer_parameters().items():
        for p in parameters:
            if p.requires_grad:
                name = names.get(id(p), "").lower()
                part = next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "other")
                groups.setdefault((layer, part), []).append(p)
    if not groups:
        raise ValueError("no parameter of the model's layers is trainable; unfreeze some, or leave the gradient panel out")
    return groups


def gradient_conflict(
    model: Any,
    data: Any,
    batch_size: int = 32,
    mask_ratio: float | tuple[float, float] = MASK_RATIO,
    mask_layout: str = "dispersed",
    seed: int = 0,
    progress: bool = True,
) -> GradientConflict:
    """Gradients of L_Und and L_Gen (DIVA Sec. 2, Fig. 2a) at every layer, batch by batch.

    Each batch costs one forward and one backward pass per task and nothing else; two batches' gradients are in memory at
    a time. ``.grad`` of the model and the mode of its modules stay as they were.

    Args:
        data: examples of both flows; they are cut into len(data) // (2 batch_size) pairs of disjoint batches.
        mask_ratio, mask_layout: of the generation flow.

    Raises:
        ValueError: fewer than two pairs of batches, nothing trainable, a loss or a gradient that is not finite.
    """
    pairs = len(data) // (2 * batch_size)
    if pairs < 2:
        raise ValueError(
            f"{len(data)} examples make {pairs} pair(s) of batches of {batch_size}; an interval needs 2: give at least "
            f"{4 * batch_size} examples, or a smaller batch_size"
        )
    groups = parameter_groups(model)
    flat = [p for parameters in groups.values() for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    grams = np.empty((pairs, len(groups), 4, 4))
    gradients: list[list[Tensor]] = []
    with evaluating(model), torch.enable_grad():
        walk = batches(data, batch_size, range(2 * pairs * batch_size))
        for k, batch in enumerate(tqdm(walk, total=2 * pairs, desc="gradients", disable=not progress, delay=2)):
            for flow in ("understanding", "generation"):
                if flow == "understanding":
                    loss = model.understanding_flow(batch, layers=[]).loss
                else:
                    loss = model.generation_flow(batch, mask_ratio, mask_layout, generator, layers=[]).loss
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"the {flow} loss of examples {batch['ids'][:3]}... is {float(loss.detach())}; expected a finite number"
                    )
                found = torch.autograd.grad(loss, flat, allow_unused=True)
                gradients.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, flat, strict=True)])
            if k % 2:
                grams[k // 2] = _grams(gradients, [len(parameters) for parameters in groups.values()])
                gradients = []
                if not np.isfinite(grams[k // 2]).all():
                    where = [group for group, gram in zip(groups, grams[k // 2], strict=True) if not np.isfinite(gram).all()]
                    raise ValueError(f"gradients of {where} are NaN, infinite or too large for float32; expected finite numbers")
    settings = {"batch_size": batch_size, "mask_ratio": mask_ratio, "mask_layout": mask_layout, "seed": seed}
    return GradientConflict(grams, list(groups), settings)


def _grams(gradients: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> np.ndarray:
    """[groups, 4, 4] inner products of four gradients, each a list of tensors that the sizes cut into groups."""
    out, start = [], 0
    for size in sizes:
        rows = [torch.cat([g.flatten().float() for g in row[start : start + size]]) for row in gradients]
        stacked = torch.stack(rows)
        out.append((stacked @ stacked.T).double().cpu().numpy())
        start += size
    return np.stack(out)


def conflict_along(folder: str | Path, data: Any, device: str = "auto", **options: Any) -> pd.DataFrame:
    """:func:`gradient_conflict` at every checkpoint that a training run left in ``folder``; adds a column ``step``.

    Only the end of a training is a point where the tautology of a stationary point looms; the way there is not.

    Raises:
        ValueError: no checkpoint-<step> in the folder (train with --save_total_limit 100 to keep them all).
    """
    from umm_kit.models import load

    found = {int(path.name.split("-")[1]): path for path in Path(folder).glob("checkpoint-[0-9]*") if path.is_dir()}
    if not found:
        raise ValueError(f"{folder} holds no checkpoint-<step>; train with --save_steps and --save_total_limit to keep them")
    frames = []
    for step in tqdm(sorted(found), desc="checkpoints", delay=2):
        conflict = gradient_conflict(load(str(found[step]), device=device), data, progress=False, **options)
        frames.append(conflict.to_frame().assign(step=step))
    return pd.concat(frames, ignore_index=True)
