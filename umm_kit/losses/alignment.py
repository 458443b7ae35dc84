"""LatentUMM's alignment terms as its authors *released* them (arXiv 2605.17766), and two guards against what they allow.

Modal, capacity and target are one formula, the mean squared distance of two sets of vectors, on three pairs of sets. Modal
and capacity alone are minimised **exactly by a constant map**: if every z is the same vector, both are 0, and nothing in them
asks that different items differ. Shrinking every z by c lowers both by c^2 at unchanged geometry. The guards are not
LatentUMM's: VICReg's variance and covariance terms keep the scale of every coordinate and its own content; InfoNCE keeps
the directions of different items apart but, reading cosines, does not see scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from umm_kit.losses.factorization import NotFinite, alignment, gathered

GUARDS = ("none", "vicreg", "infonce")
PARTS = ("modal", "capacity", "target", "variance", "covariance", "infonce")


@dataclass(frozen=True)
class VICReg:
    """Parts of :func:`vicreg`; both >= 0 and to minimise."""

    variance: Float[Tensor, ""]  # how far the coordinates' standard deviations fall short of gamma
    covariance: Float[Tensor, ""]  # what the coordinates have in common


def vicreg(z: Float[Tensor, "N d"], gamma: float = 1.0, gather: bool = True) -> VICReg:
    """Variance and covariance terms of VICReg, of one set of vectors: every coordinate varies, each by itself.

    variance = 1/d sum_j max(0, gamma - sqrt(Var(z_j) + 1e-4)),   covariance = 1/d sum_{j != k} Cov(z_j, z_k)^2

    Bardes et al. 2022, Eqs. 1 to 4, with N - 1 in both Var and Cov. With few rows the covariance term is not 0 for
    independent coordinates of variance v, but near v^2 (d - 1) / (N - 1). A constant z has variance term gamma - .01 and,
    the derivative of its Var being 0, **no gradient**: the guard keeps a map from collapsing, it does not bring one back.

    Args:
        z: [N, d] finite floats, N >= 2; this process's rows (the terms are of all processes'). gamma: > 0, in units of z.
        gather: False to stay on this process, where others make no such call.
    Returns:
        VICReg: variance in [0, gamma), 0 = every coordinate's standard deviation is at least gamma; covariance >= 0.
    Raises:
        ValueError: not [N, d] floats, N < 2, NaN, gamma not above 0.

    Example:
        >>> parts = vicreg(torch.tensor([[2.0, 2.0], [-2.0, -2.0]]))  # both coordinates vary enough, but they are one
        >>> parts.variance.item(), parts.covariance.item()  # Cov = 8
        (0.0, 64.0)
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma is {gamma}; expected a finite standard deviation above 0, in units of z")
    (z,) = _checked("z", gathered(z) if gather else z)
    if len(z) < 2:
        raise ValueError("z has one row; its coordinates have no variance: expected N >= 2")
    with torch.autocast(z.device.type, enabled=False):
        covariance = (z - z.mean(0)).T @ (z - z.mean(0)) / (len(z) - 1)
        variance = nn.functional.relu(gamma - (covariance.diagonal() + 1e-4).sqrt()).mean()
        common = covariance.square().sum() - covariance.diagonal().square().sum()
    return VICReg(variance, common.clamp(min=0) / z.shape[1])


@dataclass(frozen=True)
class LatentAlignment:
    """Parts of :func:`latent_alignment`, each to minimise; None = not asked for."""

    modal: Float[Tensor, ""]
    capacity: Float[Tensor, ""] | None = None
    target: Float[Tensor, ""] | None = None
    variance: Float[Tensor, ""] | None = None
    covariance: Float[Tensor, ""] | None = None
    infonce: Float[Tensor, ""] | None = None  # in nats

    def weighted(self, **weights: float) -> Float[Tensor, ""]:
        """Sum of weight times part, over the parts that are named; a weight of 0 leaves its part out, asked for or not.

        Raises:
            ValueError: a part that does not exist or was not asked for, a weight that is negative or not finite, or none
                above 0.
        """
        if unknown := sorted(set(weights) - set(PARTS)):
            raise ValueError(f"weights are for {unknown}; expected some of {PARTS}")
        if bad := {name: w for name, w in weights.items() if not 0 <= w < math.inf}:
            raise ValueError(f"weights are {bad}; expected finite numbers >= 0")
        parts = {name: getattr(self, name) for name, w in weights.items() if w > 0}
        if missing := sorted(name for name, part in parts.items() if part is None):
            raise ValueError(f"{missing} have a weight but were not computed; give latent_alignment their pair or guard")
        if not parts:
            raise ValueError(f"weights are {weights}; expected at least one above 0: there is nothing to minimise")
        terms = [weights[name] * part for name, part in parts.items()]
        return sum(terms[1:], start=terms[0])


def latent_alignment(
    modal: tuple[Float[Tensor, "N d"], Float[Tensor, "N d"]],
    capacity: tuple[Float[Tensor, "C d_c"], Float[Tensor, "C d_c"]] | None = None,
    target: tuple[Float[Tensor, "T e"], Float[Tensor, "T e"]] | None = None,
    guard: str = "none",
    gamma: float = 1.0,
    temperature: float = 0.1,
    gather: bool = True,
) -> LatentAlignment:
    """LatentUMM's alignment terms, in the released form: three mean squared distances, and a guard if one is asked for.

    modal = mse(z_text, z_image),  capacity = mse(z, z_hat),  target = mse(G(z), e_image),  mse = mean over rows and columns

    LatentUMM, as released: z_hat = phi(G(z)) is what comes back when z is generated and read again; e_image is the teacher's
    embedding. No side is detached. Stage 1 takes z = z_text or z_fused and weighs target 0 unless told otherwise; the
    backbone's stage 2 weighs all three .01 and ties both generated states to the teacher: put their rows below each other.
    The mean over columns makes target small: to unit vectors of e dimensions even a constant G is at most about 1/e away.

    ``guard``: "vicreg" adds both terms of :func:`vicreg`, summed over both sides of ``modal`` as in Bardes et al. 2022, Eq. 6
    (their code halves variance; its weights 25 : 25 : 1 for distance, variance, covariance go with this mean over columns).
    "infonce" adds symmetric InfoNCE on cosines between both sides, :func:`umm_kit.losses.factorization.alignment`.

    Args:
        modal: (z_text, z_image), [N, d] each, row i from the same item; N >= 2 with a guard.
        capacity: (z, z_hat). target: (G(z), e_image). Their rows and columns need not be those of ``modal``.
        guard: one of ``GUARDS``. gamma: of :func:`vicreg`. temperature: of InfoNCE, > 0.
        gather: False to stay on this process, where others make no such call (only guards contrast rows).
    Returns:
        LatentAlignment: modal, capacity and target in squared units of their vectors, 0 = equal; the guard's parts.
    Raises:
        ValueError: unknown guard, shapes of a pair that differ, NaN, no rows, N < 2 with a guard, temperature not above 0.

    Example:
        >>> z = torch.ones(8, 4)  # a constant map: every item is the same vector
        >>> parts = latent_alignment((z, z), (z, z), guard="vicreg")
        >>> parts.weighted(modal=1, capacity=1).item(), round(parts.weighted(modal=1, capacity=1, variance=1).item(), 2)
        (0.0, 1.98)
    """
    if guard not in GUARDS:
        raise ValueError(f"guard is {guard!r}; expected one of {GUARDS}")
    named = {"modal": modal, "capacity": capacity, "target": target}
    pairs = {name: _checked(name, *pair) for name, pair in named.items() if pair is not None}
    parts = {name: (a - b).square().mean() for name, (a, b) in pairs.items()}
    if guard == "vicreg":
        a, b = (vicreg(z, gamma, gather) for z in pairs["modal"])
        parts |= {"variance": a.variance + b.variance, "covariance": a.covariance + b.covariance}
    elif guard == "infonce":
        z_text, z_image = pairs["modal"]
        parts["infonce"] = alignment(z_text, z_image, temperature=temperature, gather=gather).loss
    return LatentAlignment(**parts)


def _checked(name: str, *sides: Tensor) -> list[Tensor]:
    """All in one precision, at least float32: in float16 a squared distance overflows at 256."""
    if any(z.ndim != 2 or z.shape != sides[0].shape or not z.numel() or not z.is_floating_point() for z in sides):
        came = " and ".join(f"{tuple(z.shape)} of {z.dtype}" for z in sides)
        raise ValueError(f"{name} is {came}; expected floats [N, d]{', the same shape on both sides' * (len(sides) > 1)}")
    if not all(bool(torch.isfinite(z).all()) for z in sides):
        raise NotFinite(f"{name} holds NaN or infinite numbers; expected finite ones: the model that made them has diverged")
    kind = torch.float32
    for z in sides:
        kind = torch.promote_types(kind, z.dtype)
    return [z.to(kind) for z in sides]
