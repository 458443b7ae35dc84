"""Preference among a model's own generations: the released form of LatentUMM, and direct preference optimisation (DPO).

Rollouts of one prompt are ranked by a score that no gradient passes; the best becomes *chosen*, the worst *rejected*.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from umm_kit.losses.factorization import NotFinite


@dataclass(frozen=True)
class Preference:
    """Parts of :func:`dpo`; all but loss are detached. Rewards are beta * (policy - reference), in nats."""

    loss: Float[Tensor, ""]  # to minimise
    dpo: Float[Tensor, ""]  # -log sigmoid of the margin; log 2 where policy and reference agree
    nll: Float[Tensor, ""]  # -log p of the chosen
    margin: Float[Tensor, " B"]  # reward of the chosen - reward of the rejected (higher = told apart)
    accuracy: Float[Tensor, ""]  # share of margins above 0
    chosen_shift: Float[Tensor, " B"]  # log p of the chosen, policy - reference: below 0, what is preferred became *less* likely
    rejected_shift: Float[Tensor, " B"]


def released_preference(scores: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    """LatentUMM's preference term as released: it rewards spread, whichever way.

    mean over prompts of  -log sigmoid( max_k s_k - min_k s_k ),   with s_k = cos(z, z_hat_k), the score of rollout k

    Its gradient pushes the best score up and the worst **down**, by the same amount: the mean is free to fall, and rollouts that
    are all perfect have the *highest* value, log 2. There is no policy's likelihood in it, and no reference. Kept to be compared
    with :func:`dpo`.

    Args:
        scores: [B, K], K >= 2, differentiable, of K rollouts of each prompt.
    Returns:
        Scalar in (0, log 2], lower = more spread.
    Raises:
        ValueError: fewer than two rollouts, or NaN.

    Example:
        >>> round(released_preference(torch.ones(1, 4)).item(), 4)  # perfect consistency is its worst case
        0.6931
    """
    _checked_scores(scores)
    return -nn.functional.logsigmoid(scores.amax(1) - scores.amin(1)).mean()


def _checked_scores(scores: Tensor) -> None:
    if scores.ndim != 2 or scores.shape[1] < 2 or not len(scores):
        raise ValueError(f"scores are {tuple(scores.shape)}; expected [prompts, rollouts] with at least two rollouts of a prompt")
    if not bool(torch.isfinite(scores).all()):
        raise NotFinite("scores hold NaN or infinity; score a rollout that cannot be read as the worst, and not as NaN")


def best_and_worst(
    scores: Float[Tensor, "B K"], threshold: float = 0.0
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"], Bool[Tensor, " B"]]:
    """Which rollout of each prompt is chosen, which rejected, and whether they differ by more than ``threshold``.

    Where they do not there is no pair to learn from: leave the prompt out, and count it. Of equal scores the first counts.

    Raises:
        ValueError: fewer than two rollouts, NaN, or a threshold below 0.

    Example:
        >>> [part.tolist() for part in best_and_worst(torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.3, 0.3]]))]
        [[1, 0], [0, 0], [True, False]]
    """
    _checked_scores(scores)
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; expected at least 0")
    return scores.argmax(1), scores.argmin(1), scores.amax(1) - scores.amin(1) > threshold


def dpo(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    reference_chosen: Float[Tensor, " B"],
    reference_rejected: Float[Tensor, " B"],
    beta: float = 0.1,
    alpha: float = 0.0,
) -> Preference:
    """Direct preference optimisation from log-likelihoods, or from differences that stand for them.

    loss = mean of  -log sigmoid( beta [ (log p_w - log p_l) - (log q_w - log q_l) ] )  +  alpha mean of -log p_w

    with p the policy, q the frozen reference, w the chosen and l the rejected answer (Rafailov et al. 2023, Eq. 7; the second
    term as in Pang et al. 2024, without their division by length). The gradient moves log p_w and log p_l apart and can lower
    *both*; alpha holds the chosen up, and ``chosen_shift`` tells.

    Where a family has no likelihood: a bound under the same masks for all four (``MaskedUMM.image_log_prob``), or minus half the
    squared velocity error under the same levels and noise for all four (``FlowUMM.image_log_prob``; Wallace et al. 2024). Levels
    are drawn with its ``SHIFT``, as in training: that is a reweighted surrogate of the likelihood's bound, and not the bound.

    Args:
        chosen, rejected: [B], nats, of the policy, with gradient. reference_*: [B], of the reference.
        beta: strength of the tie to the reference, above 0. alpha: weight of the likelihood of the chosen, at least 0.
    Raises:
        ValueError: shapes differ, no pair, NaN, beta not above 0, alpha below 0.

    Example:
        >>> zero = torch.zeros(2)
        >>> round(dpo(zero, zero, zero, zero).loss.item(), 4)  # nothing learnt yet
        0.6931
    """
    given = (chosen, rejected, reference_chosen, reference_rejected)
    if len({tuple(x.shape) for x in given}) > 1 or chosen.ndim != 1 or not len(chosen):
        raise ValueError(f"log-likelihoods are {[tuple(x.shape) for x in given]}; expected four of [B], B >= 1")
    if not all(bool(torch.isfinite(x).all()) for x in given):
        raise NotFinite("log-likelihoods hold NaN or infinity; was an answer impossible under a model?")
    if not beta > 0 or not alpha >= 0:
        raise ValueError(f"{beta=}, {alpha=}; expected beta > 0 and alpha >= 0")
    chosen_shift, rejected_shift = chosen - reference_chosen.detach(), rejected - reference_rejected.detach()
    margin = beta * (chosen_shift - rejected_shift)
    told, nll = -nn.functional.logsigmoid(margin).mean(), -chosen.mean()
    detached = (x.detach() for x in (told, nll, margin, (margin > 0).float().mean(), chosen_shift, rejected_shift))
    return Preference(told + alpha * nll, *detached)
