"""Preferences: by hand, against trl's loss, against enumeration of a tiny masked model, and refusals."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from umm_kit.losses.preference import best_and_worst, dpo, released_preference
from umm_kit.models.base import elbo_masks
from umm_kit.models.masked import MaskedUMM
from umm_kit.models.tokenizers import ImageTokenizerConfig


def four(seed=0, n=16):
    rng = torch.Generator().manual_seed(seed)
    return [-20 + 3 * torch.randn(n, generator=rng, dtype=torch.float64) for _ in range(4)]


def test_dpo_by_hand():
    """Chosen up by 2, rejected down by 1, beta .5: margin 1.5, loss log(1 + e^-1.5)."""
    one = torch.ones(1)
    found = dpo(-8 * one, -11 * one, -10 * one, -10 * one, beta=0.5, alpha=0.25)
    assert found.margin.item() == pytest.approx(1.5) and found.accuracy == 1
    assert found.chosen_shift.item() == 2 and found.rejected_shift.item() == -1
    assert found.dpo.item() == pytest.approx(math.log(1 + math.exp(-1.5))) and found.nll.item() == 8
    assert found.loss.item() == pytest.approx(found.dpo.item() + 0.25 * 8)


class Said(SimpleNamespace):
    """A model's output as trl's fused head returns it: what it only logs is zero."""

    def __getattr__(self, name):
        return None if name == "aux_loss" else torch.zeros(2, 3, dtype=torch.bool if name.startswith("is_") else torch.float64)


def test_dpo_is_trl_s():
    """trl's own method, on a trainer of stubs, with the log-likelihoods of three words of a chosen and a rejected answer."""
    trl = pytest.importorskip("trl")
    rng = torch.Generator().manual_seed(1)
    words = torch.randn(2, 3, generator=rng, dtype=torch.float64)
    reference = torch.randn(2, generator=rng, dtype=torch.float64)
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=same, aux_loss_enabled=False, precompute_ref_logps=True, beta=0.3,
        loss_types=["sigmoid"], loss_weights=[1.0], ld_alpha=None, f_divergence_type="reverse_kl", label_smoothing=0.0,
        use_weighting=False, _total_train_tokens=0, _metrics={"eval": defaultdict(list)},
    )  # fmt: skip
    inputs = {
        "input_ids": torch.ones(2, 4, dtype=torch.long), "completion_mask": torch.tensor([[0, 1, 1, 1]] * 2),
        "attention_mask": torch.ones(2, 4), "ref_chosen_logps": reference[:1], "ref_rejected_logps": reference[1:],
    }  # fmt: skip
    theirs = trl.DPOTrainer._compute_loss(trainer, lambda **_: Said(log_probs=words), inputs, False)
    policy = words.sum(1)
    ours = dpo(policy[:1], policy[1:], reference[:1], reference[1:], beta=0.3)
    assert float(theirs) == pytest.approx(float(ours.loss), abs=1e-6)


def test_dpo_gradient_by_hand():
    """d loss / d log p_w = -beta sigmoid(-margin) / B - alpha / B, and its opposite without alpha for the rejected."""
    chosen, rejected, a, b = four()
    chosen.requires_grad_(), rejected.requires_grad_(), a.requires_grad_()
    found = dpo(chosen, rejected, a, b, beta=0.2, alpha=0.5)
    found.loss.backward()
    push = 0.2 * torch.sigmoid(-found.margin) / len(chosen)
    torch.testing.assert_close(chosen.grad, -push - 0.5 / len(chosen))
    torch.testing.assert_close(rejected.grad, push)
    assert a.grad is None, "the reference is frozen"


def test_dpo_ignores_what_both_answers_gain():
    chosen, rejected, a, b = four()
    assert dpo(chosen + 5, rejected + 5, a, b).dpo == pytest.approx(float(dpo(chosen, rejected, a, b).dpo))


def test_released_pushes_the_worst_down():
    scores = torch.tensor([[0.9, 0.5, 0.7]], requires_grad=True)
    loss = released_preference(scores)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.4)))
    loss.backward()
    push = 1 / (1 + math.exp(0.4))
    assert scores.grad[0].tolist() == pytest.approx([-push, push, 0.0]), "descent raises the best and lowers the worst"


# --- the any-order bound -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A masked model of 4 tokens and 3 codes, so that everything can be enumerated."""
    torch.manual_seed(0)
    tokenizer = ImageTokenizerConfig(image_size=8, channels=8, depth=1, levels=(3,)).to_dict()
    model = MaskedUMM.tiny(["a red circle", "a blue square"], hidden_size=16, num_layers=2, image_tokenizer=tokenizer).double()
    with torch.no_grad():
        for p in model.image_head.parameters():
            p.mul_(4)  # far from uniform, so that masks matter
    return model.eval()


TEXT, CODES = ["a red circle"], torch.tensor([[0, 2, 1, 1]])


def exact_bound(model, codes, text=TEXT):
    """Over all masks: the mean over n = 1 ... 4 of the mean over masks of n hidden of 4 / n * sum of log p."""
    total = 0.0
    for n in range(1, 5):
        masks = list(itertools.combinations(range(4), n))
        for hidden in masks:
            mask = torch.zeros(1, 1, 4, dtype=torch.bool)
            mask[..., list(hidden)] = True
            total = total + model.image_log_prob(text, codes=codes, masks=mask)[0] / len(masks) / 4
    return total


def test_masks_are_uniform_in_number_and_in_place():
    masks = elbo_masks(4000, 5, draws=4, generator=torch.Generator().manual_seed(0))
    number = masks.sum(2)
    assert [int((number == k).sum()) for k in range(1, 6)] == pytest.approx([3200] * 5, rel=0.06)
    assert (number[0] + number[1] == 6).all() and ((masks[0] & masks[1]).sum(1) == 1).all(), "complements but for one token"
    for k in range(1, 6):
        share = masks[number == k].double().mean(0)
        torch.testing.assert_close(share, torch.full((5,), k / 5, dtype=torch.float64), atol=0.04, rtol=0)


def test_the_bound_is_unbiased(small):
    rows = 4000
    with torch.no_grad():
        exact = exact_bound(small, CODES).item()
        drawn = small.image_log_prob(
            TEXT * rows, codes=CODES.expand(rows, -1), draws=4, generator=torch.Generator().manual_seed(1)
        )
    error = float(drawn.std()) / rows**0.5
    assert abs(float(drawn.mean()) - exact) < 3.5 * error < 0.4


def test_the_bound_is_below_the_likelihood(small):
    """A model of any order has as many likelihoods as orders; log of their mean bounds the mean of their logs: the bound."""
    likelihoods = []
    for order in itertools.permutations(range(4)):
        log_p, mask = 0.0, torch.ones(1, 4, dtype=torch.bool)
        for position in order:
            with torch.no_grad():
                logits = small.image_head(small._generation(CODES, mask, small.pack_captions(TEXT))[0])
            log_p += float(logits.log_softmax(-1)[0, position, CODES[0, position]])
            mask = mask.clone()
            mask[0, position] = False
        likelihoods.append(log_p)
    mean = sum(likelihoods) / len(likelihoods)
    assert exact_bound(small, CODES).item() == pytest.approx(mean, abs=1e-4), "the bound is the mean over orders (Uria et al.)"
    assert mean < float(torch.tensor(likelihoods).logsumexp(0)) - math.log(24)


def test_the_dpo_gradient_converges_to_the_exact_one(small):
    other = torch.tensor([[1, 0, 2, 0]])
    weight = small.image_head.of_code.weight

    def gradient(chosen, rejected):
        fixed = torch.zeros_like(chosen)
        return torch.autograd.grad(dpo(chosen, rejected, fixed, fixed - 1, beta=0.1).loss, weight)[0]

    exact = gradient(exact_bound(small, CODES)[None], exact_bound(small, other)[None])
    errors = []
    for draws in (2, 32, 512):
        masks = elbo_masks(1, 4, draws, torch.Generator().manual_seed(0))
        found = gradient(*(small.image_log_prob(TEXT, codes=codes, masks=masks) for codes in (CODES, other)))
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.1


def test_same_masks_and_more_draws_calm_the_margin(small):
    """The spread of a margin over draws of masks: lower with shared masks than with each its own, lower with 32 than with 8."""
    other = torch.tensor([[0, 2, 1, 2]])  # like CODES but for one token

    def spread(draws, shared, rows=200):
        rng = torch.Generator().manual_seed(2)
        masks = [elbo_masks(rows, 4, draws, rng) for _ in range(2)]
        with torch.no_grad():
            chosen, rejected = (
                small.image_log_prob(TEXT * rows, codes=codes.expand(rows, -1), masks=masks[0 if shared else k])
                for k, codes in enumerate((CODES, other))
            )
        return float((chosen - rejected).std())

    assert spread(32, True) < 0.7 * spread(8, True) < 0.7 * spread(8, False)


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_best_and_worst_leaves_out_pairs_too_close():
    scores = torch.tensor([[0.5, 0.9], [0.5, 0.55], [0.7, 0.7]])
    chosen, rejected, keep = best_and_worst(scores, threshold=0.1)
    assert chosen.tolist() == [1, 1, 0] and rejected.tolist() == [0, 0, 0] and keep.tolist() == [True, False, False]


NAN = torch.tensor([float("nan")])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: released_preference(torch.ones(3, 1)), "at least two rollouts"),
        (lambda: released_preference(torch.tensor([[1.0, math.nan]])), "NaN"),
        (lambda: best_and_worst(torch.ones(3)), r"\(3,\)"),
        (lambda: best_and_worst(torch.ones(1, 2), threshold=-1), "threshold"),
        (lambda: dpo(*[torch.ones(0)] * 4), "B >= 1"),
        (lambda: dpo(torch.ones(2), torch.ones(3), torch.ones(2), torch.ones(2)), r"\(3,\)"),
        (lambda: dpo(NAN, NAN, NAN, NAN), "NaN"),
        (lambda: dpo(*[torch.ones(1)] * 4, beta=0), "beta"),
        (lambda: dpo(*[torch.ones(1)] * 4, alpha=-1), "alpha"),
        (lambda: elbo_masks(1, 4, draws=3), "even"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_log_prob_refuses_what_does_not_fit(small):
    with pytest.raises(ValueError, match="one of them"):
        small.image_log_prob(TEXT)
    with pytest.raises(ValueError, match=r"\[draws, B, N\]"):
        small.image_log_prob(TEXT, codes=CODES, masks=torch.ones(2, 1, 5, dtype=torch.bool))
