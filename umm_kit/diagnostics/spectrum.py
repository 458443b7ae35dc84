"""How fine is the pattern that a layer lays over the image? Spatial spectra of the states on the token grid.

DIVA Fig. 2(c) plots a "high-frequency energy ratio" for each flow and layer without a cut-off, a window or a word on the
mean, so each is stated here. **No window**: on a grid of 8 x 8 tokens it would weigh the middle of the image and blur half
of the spectrum. The cosine transform needs none, since it continues the map by its mirror image; the Fourier transform
continues it periodically, and an edge that differs from the opposite one counts as high frequency. **The mean over the
grid is removed** for each example and channel, unless asked otherwise: a vector that all tokens share is no pattern, and
in transformers it carries so much energy that the ratio would tell its size and little else.

Frequencies are in units of the Nyquist frequency, half a cycle per token: an axis of m tokens has k / m, k < m, in the
cosine transform, 2 |k| / m, |k| <= m / 2, in the Fourier transform. Two axes give f = sqrt(f_y^2 + f_x^2), up to sqrt(2).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from scipy import fft
from torch import Tensor

Array = np.ndarray | Tensor
States = Float[Array, "N d"] | Float[Array, "B N d"]
Rings = tuple[Float64[Tensor, " bins"], Float64[Tensor, "B bins"], Float64[Tensor, " bins"]]
TRANSFORMS = ("dct", "dft")
_CHUNK = 2**17  # numbers transformed at once: what fits a cache is twice as fast


@dataclass(frozen=True)
class Spectrum:
    """Where the energy of each example lies.

    Attributes:
        frequency: [F] of each two-dimensional frequency, in units of Nyquist, [0, sqrt(2)].
        share: [B, F], share of the example's energy; rows sum to 1, or are NaN where the map is constant.
        energy: [B], the energy itself: the sum of squares over tokens and channels (Parseval).
    """

    frequency: Float64[Tensor, " F"]
    share: Float64[Tensor, "B F"]
    energy: Float64[Tensor, " B"]

    def above(self, cutoff: float) -> Float64[Tensor, " B"]:
        """[B] shares of the energy at frequencies strictly above the cut-off (units of Nyquist)."""
        if (white := self.white(cutoff)) in (0, 1):
            which = "none" if white == 0 else "each"
            warnings.warn(f"{which} of the grid's frequencies lies above {cutoff}: the ratio is always {white:g}", stacklevel=2)
        return (self.share @ self._high(cutoff)).clamp(0, 1)  # NaN stays NaN

    def white(self, cutoff: float) -> float:
        """The ratio of white noise, a share of the frequencies: a map above it is rougher than noise."""
        return float(self._high(cutoff).mean())

    def _high(self, cutoff: float) -> Tensor:
        if not 0 <= cutoff < 2**0.5:
            raise ValueError(f"the cut-off is {cutoff}; expected [0, sqrt(2)) in units of the Nyquist frequency")
        return (self.frequency > cutoff + 1e-9).double()  # sqrt(0.3^2 + 0.4^2) is not above 0.5

    def radial(self, bins: int) -> Rings:
        """Centres [bins] of equal rings from 0 to sqrt(2), shares [B, bins], and the share of white noise [bins]."""
        if bins < 1:
            raise ValueError(f"bins is {bins}; expected at least 1")
        ring = (self.frequency / 2**0.5 * bins).long().clamp(max=bins - 1)
        member = torch.nn.functional.one_hot(ring, bins).double()
        centres = (torch.arange(bins, dtype=torch.float64) + 0.5) * 2**0.5 / bins
        return centres, self.share @ member, member.mean(0)


def token_spectrum(
    H: States, grid: tuple[int, int], transform: str = "dct", remove_mean: bool = True, average: str = "energy"
) -> Spectrum:
    """Spectral energy of states on their token grid, by example and frequency.

    E_k = sum over channels of |F_k|^2, F the orthonormal two-dimensional transform of a channel; share = E_k / sum_k E_k.
    Orthonormal means Parseval: the sum is the energy of the map itself. Take it once where many cut-offs are asked.

    Args:
        H: [B, N, d] or [N, d] states in raster order, N = rows * columns.
        grid: (rows, columns), at least two tokens; 1 x N is a line.
        transform: "dct" (type II) or "dft".
        remove_mean: False keeps the constant part as frequency 0 in the total.
        average: "energy" adds the channels' energies, so that a rotation of the features changes nothing but one huge
            channel decides; "channel" averages the shares of the channels that vary, each alike.

    Returns:
        :class:`Spectrum`, float64 on the CPU. Constant maps have no shares: NaN, with a warning.

    Raises:
        ValueError: a grid that does not fit N, one token, options unknown, NaN or infinite states.

    Example:
        >>> checkers = torch.tensor([1.0, -1, -1, 1])[:, None]
        >>> token_spectrum(checkers, (2, 2)).above(0.5)
        tensor([1.], dtype=torch.float64)
    """
    if transform not in TRANSFORMS or average not in ("energy", "channel"):
        raise ValueError(f"{transform=}, {average=}; expected transform of {TRANSFORMS} and average 'energy' or 'channel'")
    H = _checked(H, grid)
    rows, columns = grid
    if rows * columns < 2:
        raise ValueError("the grid has one token; expected at least two: a single token has no spatial frequency")
    basis = [torch.from_numpy((fft.dct if transform == "dct" else fft.fft)(np.eye(m), axis=0, norm="ortho")) for m in grid]
    axes = [torch.from_numpy(np.arange(m) / m if transform == "dct" else 2 * abs(fft.fftfreq(m))) for m in grid]
    frequency = (axes[0][:, None] ** 2 + axes[1] ** 2).sqrt().flatten()
    shares, totals = [], []
    for part in H.split(max(1, _CHUNK // H[0].numel())):
        part = part.to(torch.float64)
        if remove_mean:
            still = (part == part[:, :1]).all(1, keepdim=True)  # else rounding of the mean would pass for a pattern
            part = (part - part.mean(1, keepdim=True)).masked_fill_(still, 0)
        half = basis[0] @ part.to(basis[0].dtype).reshape(len(part), rows, -1)  # over rows, then over columns
        wave = (basis[1] @ half.reshape(len(part), rows, columns, -1)).flatten(1, 2)
        energy = (wave * wave.conj()).real
        if remove_mean:
            energy = energy[:, 1:]
        totals.append(energy.sum((1, 2)))
        if average == "energy":
            shares.append(energy.sum(2) / totals[-1][:, None])
        else:  # 0 / 0 is NaN: channels that do not vary are left out
            shares.append((energy / energy.sum(1, keepdim=True)).nanmean(2))
    share = torch.cat(shares)
    if flat := int(share.isnan().any(1).sum()):
        warnings.warn(f"{flat} of {len(share)} maps are constant over the grid: they have no spectrum (NaN)", stacklevel=2)
    return Spectrum(frequency[1:] if remove_mean else frequency, share, torch.cat(totals))


def high_frequency_energy_ratio(
    H: States,
    grid: tuple[int, int],
    cutoff: float = 0.5,
    transform: str = "dct",
    remove_mean: bool = True,
    average: str = "energy",
) -> float:
    """Share of the spatial energy of states above a cut-off, the mean over examples (DIVA Sec. 2, Fig. 2c).

    HFER = sum_{f_k > c} E_k / sum_k E_k of :func:`token_spectrum`, whose arguments these are. The paper names no cut-off; the
    default is half of Nyquist, and a curve should be shown at several. Mask tokens alone raise the ratio of the generation
    flow: compare flows after :func:`input_matched`.

    Args:
        cutoff: c in units of Nyquist, [0, sqrt(2)); strictly higher frequencies count.

    Returns:
        In [0, 1], no unit; higher = finer patterns. White noise has ``token_spectrum(...).white(cutoff)``. Constant maps
        are left out with a warning; NaN if all are.

    Raises:
        ValueError: as :func:`token_spectrum`; a cut-off out of its range.

    Example:
        >>> ramp = torch.arange(8.0)[:, None]
        >>> high_frequency_energy_ratio(ramp, (1, 8), cutoff=0.5) < 0.01
        True
    """
    return float(token_spectrum(H, grid, transform, remove_mean, average).above(cutoff).nanmean())


def radial_spectrum(
    H: States,
    grid: tuple[int, int],
    bins: int | None = None,
    transform: str = "dct",
    remove_mean: bool = True,
    average: str = "energy",
) -> Rings:
    """Shares of the spatial energy in rings of equal width, by example; arguments as :func:`token_spectrum`.

    Args:
        bins: number of rings between 0 and sqrt(2); by default as many as the longer side has tokens.

    Returns:
        Frequencies [bins] (centres, units of Nyquist); shares [B, bins], each row sums to 1; and the shares of white noise
        [bins]: the share of frequencies in the ring, by which one divides for energy *per frequency*.

    Example:
        >>> frequency, share, white = radial_spectrum(torch.eye(16), (4, 4))
        >>> bool(torch.allclose(share[0], white))  # channels that are single points, together: white
        True
    """
    return token_spectrum(H, grid, transform, remove_mean, average).radial(max(grid) if bins is None else bins)


def input_matched(
    H: States, mask: Bool[Array, " N"] | Bool[Array, "B N"], grid: tuple[int, int], keep: str = "visible"
) -> Float64[Tensor, "N d"] | Float64[Tensor, "B N d"]:
    """States at the visible (or at the masked) positions only, continued smoothly over the others: for both flows alike.

    In the generation flow mask tokens stand between visible ones, so its map is rough whatever the layer does. Here the states
    at the dropped positions are forgotten and filled from the kept ones: x_i = mean of its neighbours on the grid (the
    discrete Laplace equation; edges have fewer neighbours).
    The filling is one linear map that knows the mask and not the flow: **pass the generation flow's mask for both flows**.
    Equal states at the kept positions then give equal spectra, whatever stands at the others.

    What it does not do: the filled map is smoother than a full one, more so the more is masked, so that levels compare
    between flows under one mask only, not with the plain ratio or across mask ratios; and what attention carried from masked
    to visible positions stays. With ``keep="masked"`` the flows had different inputs there, and the difference shows that too.

    Args:
        H: [B, N, d] or [N, d] states of either flow.
        mask: [B, N] or [N] bool, True where generation hid the token.
        grid: (rows, columns).
        keep: "visible" or "masked" positions.

    Returns:
        As H, in float64 on the CPU: kept positions as they were.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, an example in which no position is kept.

    Example:
        >>> line, hidden = torch.tensor([[0.0], [9], [2]]), torch.tensor([False, True, False])
        >>> input_matched(line, hidden, (1, 3)).flatten().tolist()
        [0.0, 1.0, 2.0]
    """
    states, hidden, shape = _checked(H, grid), torch.as_tensor(mask), tuple(np.shape(H))
    if hidden.dtype != torch.bool or tuple(hidden.shape) != shape[:-1]:
        raise ValueError(f"the mask is {tuple(hidden.shape)} of {hidden.dtype}; expected bool {shape[:-1]}, as the states")
    return (filling(hidden.reshape(states.shape[:2]), grid, keep) @ states.to(torch.float64)).reshape(shape)


def filling(mask: Bool[Tensor, "B N"], grid: tuple[int, int], keep: str = "visible") -> Float64[Tensor, "B N N"]:
    """The linear map [B, N, N], float64 on the CPU, that :func:`input_matched` applies under masks [B, N].

    Take it once where the states of many layers lie under one mask.

    Example:
        >>> filling(torch.tensor([[False, True, False]]), (1, 3))[0, 1].tolist()
        [0.5, 0.0, 0.5]
    """
    if keep not in ("visible", "masked"):
        raise ValueError(f"{keep=}; expected 'visible' or 'masked'")
    kept = (mask if keep == "masked" else ~mask).detach().cpu()
    if bool((~kept.any(1)).any()):
        empty = (~kept.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"{len(empty)} examples have no {keep} position, the first at {empty[:3]}; leave them out")
    line = [torch.diag_embed(torch.ones(m - 1, dtype=torch.float64), 1) for m in grid]
    rows, columns = (upper + upper.T for upper in line)
    near = torch.kron(rows, torch.eye(grid[1])) + torch.kron(torch.eye(grid[0]), columns)
    laplace, same = torch.diag(near.sum(1)) - near, torch.eye(len(near), dtype=torch.float64)
    maps = [torch.linalg.solve(torch.where(known[..., None], same, laplace), torch.diag_embed(known.double())) for known in kept]
    return torch.where(kept[..., None], same, torch.stack(maps))


def _checked(H: Any, grid: tuple[int, int]) -> Tensor:
    """Finite states [B, N, d] on the CPU, where float64 always exists."""
    states = torch.as_tensor(H).detach().cpu()
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"the grid is {grid}; expected (rows, columns), at least 1 of each")
    if states.ndim not in (2, 3) or not states.is_floating_point() or states.shape[-2] != grid[0] * grid[1] or not states.numel():
        came = f"states are {tuple(states.shape)} of {states.dtype} on a grid of {grid[0]} x {grid[1]}"
        raise ValueError(f"{came}; expected floats [B, N, d] or [N, d], N = {grid[0] * grid[1]} (pooled states have no spectrum)")
    if not bool(torch.isfinite(states).all()):
        raise ValueError(f"states hold {int((~torch.isfinite(states)).sum())} NaN or infinite numbers; drop those examples")
    return states if states.ndim == 3 else states[None]
