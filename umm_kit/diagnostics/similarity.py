"""Do two layers, or the two flows, hold the same geometry? Linear CKA and the orthogonal Procrustes distance.

Both compare how n anchors lie relative to each other and do not see rotations, reflections, shifts or the scale of either
space. Rows pair by position: row i of every layer is the same anchor. Neither says that one flow *uses* what it shares.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

Array = np.ndarray | Tensor
Layers = Sequence[Float[Array, "n _d"]] | Float[Array, "_layers n _d"]
Batch = Sequence[Float[Array, "_n _d"]] | Float[Array, "_layers _n _d"]  # n may change from batch to batch
Similarities = Float64[Tensor, "layers_x layers_y"]
_BLOCK = 2**25  # bytes of Gram rows held at once, over all layers


def cka(X: Float[Array, "n d_x"], Y: Float[Array, "n d_y"], unbiased: bool = True) -> float:
    """Linear centred kernel alignment of two sets of states of the same anchors.

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),  K = X X^T, L = Y Y^T
    (Kornblith et al. 2019, Sec. 3; the unbiased HSIC is that of Song et al. 2012, Eq. 3 of Nguyen et al. 2021).

    Args:
        X, Y: [n, d_x] and [n, d_y], finite floats; n >= 4, or n >= 2 with ``unbiased=False``.
        unbiased: the biased one tends to 1 as n falls below d, whatever the data, and warns there.

    Returns:
        At most 1, no unit; higher = more alike. Unbiased: about 0 for independent states, a little below 0 by chance.
        NaN, with a warning, where a side does not vary.

    Raises:
        ValueError: not 2-D floats, numbers of rows or devices that differ, too few rows, NaN or infinite states.

    Example:
        >>> X = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> round(cka(X, 3 * X.flip(1) + 1), 6)
        1.0
    """
    return float(cka_matrix([X], [Y], unbiased)[0, 0])


def cka_matrix(Xs: Layers, Ys: Layers | None = None, unbiased: bool = True) -> Similarities:
    """:func:`cka` of every layer of Xs with every layer of Ys, or of Xs with itself.

    With both flows in one list, ``cka_matrix([*U, *G])``, the result has within- and across-flow blocks. Inner products
    <K, L> are ||X^T Y||_F^2 for each pair (feature form) or come from one Gram matrix for each layer, a few rows at a time:
    whichever takes fewer operations for the whole matrix. States are centred in float64 and multiplied in float32 (float64
    if they came so, or where the bias correction cancels more than two digits); error below 1e-5 unless the user lowered
    ``torch.set_float32_matmul_precision``.

    Args:
        Xs, Ys: sequences of [n, d] states; widths may differ from layer to layer, n may not.

    Returns:
        [len(Xs), len(Ys)] float64 on the CPU, as :func:`cka`; rows and columns of layers that do not vary are NaN.

    Example:
        >>> layers = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0))
        >>> cka_matrix(layers).shape, round(float(cka_matrix(layers)[1, 1]), 6)
        (torch.Size([3, 3]), 1.0)
    """
    hsic, _ = _hsic(Xs, Ys, unbiased)
    return _normalised(hsic, len(Xs), Ys is None)


def cka_matrix_minibatch(batches: Iterable[tuple[Batch, Batch | None]]) -> Similarities:
    """:func:`cka_matrix` of a stream: the unbiased HSIC of each batch is averaged, then the ratio is taken.

    CKA = sum_b n_b HSIC_b(K, L) / sqrt(sum_b n_b HSIC_b(K, K) sum_b n_b HSIC_b(L, L))  (Nguyen et al. 2021, Eq. 2; the
    weights n_b are for a last batch that is smaller). HSIC_b is unbiased at any batch size of at least 4, so that small
    batches cost precision only. One batch is held at a time.

    Args:
        batches: pairs (Xs, Ys) as :func:`cka_matrix` takes them, Ys None for Xs with itself; the same layers in each.

    Raises:
        ValueError: as :func:`cka`; no batch; numbers of layers that change.

    Example:
        >>> states = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
        >>> cka_matrix_minibatch((part, None) for part in states.split(16, dim=1)).shape
        torch.Size([2, 2])
    """
    total, shape = None, None
    for Xs, Ys in batches:
        hsic, squares = _hsic(Xs, Ys, unbiased=True)
        hsic = hsic * torch.outer(squares, squares) * len(Xs[0])
        came = len(Xs), None if Ys is None else len(Ys)
        if shape not in (None, came):
            raise ValueError(f"a batch has (Xs, Ys) of {came} layers after batches of {shape}; expected the same layers in each")
        total, shape = (hsic if total is None else total + hsic), came
    if total is None or shape is None:
        raise ValueError("there is no batch; expected at least one pair (Xs, Ys)")
    return _normalised(total, shape[0], shape[1] is None)


def procrustes_similarity(X: Float[Array, "n d_x"], Y: Float[Array, "n d_y"]) -> float:
    """How well the best rotation or reflection maps one set of centred states on the other.

    s = ||X^T Y||_* / (||X||_F ||Y||_F), the sum of singular values (Schönemann 1966; Ding et al. 2021, Sec. 2). Unlike CKA it
    weighs a direction by its standard deviation, not by its variance, so that small directions count for more.

    Args:
        X, Y: as :func:`cka`, n >= 2; the narrower one is padded with zeros. Warns for n <= d: few rows can be rotated
            on each other whatever they are.

    Returns:
        In [0, 1], no unit; 1 = equal up to rotation, shift and scale. NaN, with a warning, where a side does not vary.

    Raises:
        ValueError: as :func:`cka`.

    Example:
        >>> X = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> round(procrustes_similarity(X, 3 * X.flip(1) + 1), 6)
        1.0
    """
    x, y = _checked([X, Y], least=2)
    n, width = len(x), max(x.shape[1], y.shape[1])
    if n <= width:
        warnings.warn(f"{n} rows of {width} features: with n <= d the similarity is high whatever the data", stacklevel=2)
    (x, vx), (y, vy) = _centred(x, torch.float64), _centred(y, torch.float64)
    if not (vx and vy):
        warnings.warn("the similarity is undefined (NaN): all rows of one side are equal", stacklevel=2)
        return float("nan")
    if n < width:  # a rotation of the features makes them n wide, and changes nothing
        x, y = (torch.linalg.qr(side.T, mode="r").R.T if side.shape[1] > n else side for side in (x, y))
    return min(float(torch.linalg.svdvals(x.T @ y).sum()), 1.0)


def procrustes_distance(X: Float[Array, "n d_x"], Y: Float[Array, "n d_y"]) -> float:
    """What the best rotation leaves between two centred sets of states of unit Frobenius norm.

    min_Q ||X / ||X||_F - (Y / ||Y||_F) Q||_F = sqrt(2 - 2 s), s of :func:`procrustes_similarity` (Ding et al. 2021 square it).

    Returns:
        In [0, sqrt(2)], no unit; higher = less alike; a metric.

    Example:
        >>> procrustes_distance(torch.eye(4)[:, :1], torch.eye(4)[:, 1:2]) < 2**0.5
        True
    """
    return (2 - 2 * procrustes_similarity(X, Y)) ** 0.5


def _checked(layers: Sequence[Any], least: int) -> list[Tensor]:
    """The layers as float [n, d] tensors of one n on one device."""
    tensors = [torch.as_tensor(layer).detach() for layer in layers]
    for k, x in enumerate(tensors):
        if x.ndim != 2 or not x.is_floating_point() or not x.shape[1]:
            raise ValueError(f"states {k} are {tuple(x.shape)} of {x.dtype}; expected floats [n, d] (pool or flatten the tokens)")
        if (len(x), x.device) != (len(tensors[0]), tensors[0].device):
            came = f"states 0 have {len(tensors[0])} rows on {tensors[0].device}, states {k} {len(x)} on {x.device}"
            raise ValueError(f"{came}; expected the same anchors in the same order, on one device")
    if len(tensors[0]) < least:
        raise ValueError(f"states have {len(tensors[0])} row(s); expected at least {least}")
    # MPS has no float64: the CPU does that work.
    return [x.cpu() if x.device.type == "mps" else x for x in tensors]


def _centred(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """x without its mean and of unit Frobenius norm, and that norm squared. Centred in float64: with a shared offset of 30
    the float32 Gram matrix has lost what the offset does not explain."""
    wide = x - x.mean(0, dtype=torch.float64)
    wide.masked_fill_((x == x[:1]).all(0), 0)  # else rounding of the mean would pass for variance
    norm = float(torch.linalg.vector_norm(wide))
    if not math.isfinite(norm):
        raise ValueError(f"states hold {int((~torch.isfinite(x)).sum())} NaN or infinite numbers (or overflow); drop them")
    return (wide.div_(norm) if norm else wide).to(dtype), norm**2


def _hsic(Xs: Layers, Ys: Layers | None, unbiased: bool, dtype: Any = None) -> tuple[Tensor, Tensor]:
    """HSIC times a common constant of all pairs that CKA needs, of layers (Xs, then Ys) of unit norm; their norms squared.

    For centred X the rows of K sum to 0 and the unbiased HSIC is, up to 1 / n(n - 3),
    sum_{i != j} K_ij L_ij - 2 a.b / (n - 2) + (sum a)(sum b) / (n - 1)(n - 2),  a = diag K, b = diag L.
    """
    if not len(Xs) or (Ys is not None and not len(Ys)):
        raise ValueError(f"there are {len(Xs)} layers in Xs, {0 if Ys is None else len(Ys)} in Ys; expected at least one in each")
    raw = _checked([*Xs, *([] if Ys is None else Ys)], least=4 if unbiased else 2)
    p, n, widths = len(Xs), len(raw[0]), [x.shape[1] for x in raw]
    if not unbiased and n <= max(widths):
        warnings.warn(f"{n} rows of {max(widths)} features: biased CKA tends to 1 for n <= d; use unbiased=True", stacklevel=3)
    dtype = dtype or (torch.float64 if any(x.dtype == torch.float64 for x in raw) else torch.float32)
    layers, norms = zip(*(_centred(x, dtype) for x in raw), strict=True)
    pairs = [(i, j) for i in range(len(raw)) for j in range(i, len(raw)) if i == j or Ys is None or i < p <= j]
    with torch.no_grad(), torch.autocast(raw[0].device.type, enabled=False):
        squares = torch.stack([torch.linalg.vector_norm(x, dim=1).double() ** 2 for x in layers])
        apart = _gram_products(layers) if _gram_is_cheaper(n, widths, pairs) else _feature_products(layers, pairs, squares)
        ab, total = (squares @ squares.T).cpu(), squares.sum(1).cpu()
    if not unbiased:
        return apart + ab, torch.tensor(norms, dtype=torch.float64)
    minus, plus = 2 / (n - 2) * ab, torch.outer(total, total) / ((n - 1) * (n - 2))
    hsic = apart - minus + plus
    kept = hsic.diagonal() / (apart + minus + plus).diagonal()
    if dtype != torch.float64 and bool((kept < 0.01).any()):
        del layers
        return _hsic(Xs, Ys, unbiased, torch.float64)
    hsic.diagonal().masked_fill_(~(kept > 1e-12), 0)  # nothing but rounding is left (or nothing was there: 0 / 0)
    return hsic / (n * (n - 3)), torch.tensor(norms, dtype=torch.float64)


def _gram_is_cheaper(n: int, widths: Sequence[int], pairs: Sequence[tuple[int, int]]) -> bool:
    """Multiply-adds of one symmetric half of a Gram matrix for each layer and of their inner products (which count threefold:
    measured, they wait for memory), against a d_i x d_j product for each pair. 12 x 12 layers: up to n = 14 d if d is large."""
    return n * n * (sum(widths) + 3 * len(widths) ** 2) / 2 < n * sum(widths[i] * widths[j] for i, j in pairs)


def _feature_products(layers: Sequence[Tensor], pairs: Sequence[tuple[int, int]], squares: Tensor) -> Tensor:
    """Sums over i != j of K_ij L_ij, as ||X^T Y||_F^2 less the diagonal."""
    out = torch.zeros(len(layers), len(layers), dtype=torch.float64, device=squares.device)
    for i, j in pairs:
        product = torch.linalg.vector_norm(layers[i].T @ layers[j], dtype=torch.float64) ** 2
        out[i, j] = out[j, i] = product - squares[i] @ squares[j]
    return out.cpu()


def _gram_products(layers: Sequence[Tensor]) -> Tensor:
    """The same sums for all pairs, from the upper triangles of the Gram matrices, a block of rows at a time."""
    count, n = len(layers), len(layers[0])
    rows = max(1, min(-(-n // 8), _BLOCK // (count * n * layers[0].element_size())))
    out = torch.zeros(count, count, dtype=torch.float64, device=layers[0].device)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        block = layers[0].new_empty(count, stop - start, n - start)
        for gram, x in zip(block, layers, strict=True):
            torch.mm(x[start:stop], x[start:].T, out=gram)
        square = block[:, :, : stop - start]
        square.diagonal(dim1=1, dim2=2).zero_()
        block[:, :, stop - start :] *= 2**0.5  # right of the square each entry stands for its mirror image too
        block = block.transpose(0, 1)  # summed by row in the states' precision, over rows in float64
        out += torch.bmm(block, block.transpose(1, 2)).sum(0, dtype=torch.float64)
    return out.cpu()


def _normalised(hsic: Tensor, p: int, within: bool) -> Tensor:
    root = hsic.diagonal().sqrt()
    if still := [k for k, value in enumerate(root.tolist()) if not value > 0]:
        names = [f"Xs[{k}]" if k < p else f"Ys[{k - p}]" for k in still]
        warnings.warn(f"CKA of {', '.join(names)} is undefined (NaN): these states do not vary", stacklevel=3)
    root = root.masked_fill(~(root > 0), float("nan"))
    out = (hsic + hsic.T) / 2 / torch.outer(root, root)  # symmetric to the last bit
    return (out if within else out[:p, p:]).clamp(-1, 1)
