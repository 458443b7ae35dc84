"""What did training change? The weights of two models, matrix by matrix: after fine-tuning, or after adding an adapter."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch


def weight_changes(before: Any, after: Any) -> pd.DataFrame:
    """How far each matrix of each layer moved, and along how many directions.

    Of the difference D = W' - W of one matrix: ``relative`` = |D|_F / |W|_F, ``rank`` = the number of its singular values above
    1e-4 of the largest, ``effective_rank`` = exp(entropy of its singular values) (Roy and Vetterli 2007), ``cosine`` of W and W'.
    An adapter of rank r has rank r at most; full fine-tuning has no such bound.

    Args:
        before, after: two models of one family and one size.
    Returns:
        A row per matrix with layer (from 1), name, shape, relative, rank, effective_rank, cosine; the last two ranks are NaN
        where nothing moved.
    Raises:
        ValueError: the models have other layers or shapes.

    Example:
        >>> import umm_kit as uk
        >>> model = uk.load("tiny-tight-0", device="cpu")
        >>> float(weight_changes(model, model).relative.max())
        0.0
    """
    names = {id(p): name for name, p in after.named_parameters()}
    groups = [list(model.layer_parameters().values()) for model in (before, after)]
    shapes = [[[tuple(p.shape) for p in group] for group in layers] for layers in groups]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the models differ: {len(groups[0])} layers of {sum(map(len, groups[0]))} parameters, and {len(groups[1])} of "
            f"{sum(map(len, groups[1]))}, or of other shapes; expected one model before and after a training"
        )
    rows = []
    for layer, (old, new) in enumerate(zip(*groups, strict=True), start=1):
        for p, q in zip(old, new, strict=True):
            if p.ndim != 2:
                continue
            w, v = p.detach().double().cpu(), q.detach().double().cpu()
            d = v - w
            spread = torch.linalg.svdvals(d)
            moved = bool(spread[0] > 0)
            rows.append(
                {
                    "layer": layer,
                    "name": names[id(q)],
                    "shape": tuple(p.shape),
                    "relative": float(d.norm() / w.norm()) if moved else 0.0,
                    "rank": int((spread > 1e-4 * spread[0]).sum()) if moved else float("nan"),
                    "effective_rank": float(torch.special.entr(spread / spread.sum()).sum().exp()) if moved else float("nan"),
                    "cosine": float((w * v).sum() / (w.norm() * v.norm())),
                }
            )
    return pd.DataFrame(rows)
