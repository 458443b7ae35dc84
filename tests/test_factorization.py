"""Losses on factors against hand values and loops, their gradients and invariances, a critic on planted dependence.

InfoNCE, CLUB and their scores are also tested by what they estimate, in test_mutual_information.py.
"""

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from umm_kit.losses import factorization
from umm_kit.losses.factorization import (
    ConditionalGaussian,
    UniqueCritic,
    alignment,
    club,
    gathered,
    gaussian_scores,
    infonce,
    orthogonality,
)

N, F = 7, 4


def pair(n=N, f=F, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, f, generator=draw, dtype=dtype)
    return x, x + torch.randn(n, f, generator=draw, dtype=dtype)


def rotation(f=F, seed=0):
    return torch.linalg.qr(torch.randn(f, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


# --- InfoNCE and CLUB: what is new to the terms ------------------------------------------------------------------------


def test_further_negatives_by_hand():
    """Row 0: e^0 against 1 + 3 + 4 = 8; row 1, with one candidate struck out: e^log 6 = 6 against 6 + 3 = 9."""
    scores = torch.tensor([[0.0, math.log(3), math.log(4)], [-math.inf, math.log(6), math.log(3)]])
    parts = infonce(scores)
    assert float(parts.loss) == pytest.approx((math.log(8) + math.log(9 / 6)) / 2)
    assert parts.bound == pytest.approx((math.log(3) + math.log(2)) / 2)
    assert float(parts.estimate) == pytest.approx(parts.bound - float(parts.loss))
    assert float(parts.accuracy) == 0.5 and parts.n == 2


def test_ties_are_misses():
    assert float(infonce(torch.zeros(4, 4)).accuracy) == 0


def test_released_club_by_hand():
    """(y - m)^2 = 4, log-variance atanh(.5), squashed to .5: -(4 e^-.5 + .5 + log 2 pi)."""
    scores = gaussian_scores(torch.zeros(1, 1), torch.tensor([[math.atanh(0.5)]]), torch.tensor([[2.0]]), "released")
    assert scores.item() == pytest.approx(-(4 * math.exp(-0.5) + 0.5 + math.log(2 * math.pi)))


def test_released_club_is_twice_club_under_a_squashed_variance():
    (mean, y), log_variance = pair(), pair(seed=1)[0]
    released = gaussian_scores(mean, log_variance, y, "released")
    naive = torch.zeros(N, N, dtype=torch.float64)
    for i in range(N):
        for j in range(N):
            for k in range(F):
                s = math.tanh(log_variance[i, k])
                naive[i, j] -= (y[j, k] - mean[i, k]) ** 2 / math.exp(s) + s + math.log(2 * math.pi)
    torch.testing.assert_close(released, naive)
    torch.testing.assert_close(club(released), 2 * club(gaussian_scores(mean, log_variance.tanh(), y)))
    wide = [float(club(gaussian_scores(mean, torch.full_like(mean, s), y, "released"))) for s in (-20.0, -40.0)]
    assert wide[0] == pytest.approx(wide[1])  # no variance below 1/e


def test_conditional_gaussian_hands_the_variant_on():
    x, y = pair(dtype=torch.float32)
    torch.manual_seed(0)
    critic = ConditionalGaussian(F, F, variant="released")
    mean, log_variance = critic.net(x).chunk(2, 1)
    assert torch.equal(critic(x, y), gaussian_scores(mean, log_variance, y, "released"))
    with pytest.raises(ValueError, match=r"variant is 'paper'.*'corrected', 'released'"):
        gaussian_scores(mean, log_variance, y, "paper")


# --- alignment ---------------------------------------------------------------------------------------------------------


def test_alignment_by_hand():
    """cos = identity: each picks with e / (e + 1) at temperature 1."""
    for directed in (False, True):
        parts = alignment(2 * torch.eye(2), 3 * torch.eye(2), directed, temperature=1.0)
        assert float(parts.loss) == pytest.approx(math.log(1 + math.exp(-1)))
        assert parts.bound == math.log(2) and parts.n == 2 and float(parts.accuracy) == 1
        assert float(parts.estimate) == pytest.approx(math.log(2) - float(parts.loss))
    reverse = alignment(torch.eye(2), torch.eye(2).flip(0), temperature=1.0)
    assert float(reverse.loss) == pytest.approx(math.log(1 + math.exp(1))) and float(reverse.accuracy) == 0


def looped(x, y, directed, temperature, facts, queue, queue_facts):
    """(loss, bound, accuracy), pair by pair."""

    def score(a, b):
        return float(a @ b / (a.norm() * b.norm()) / temperature)

    directions = []
    for a, b in [(x, y)] if directed else [(x, y), (y, x)]:
        loss = bound = hits = 0.0
        for i in range(len(a)):
            negatives = [score(a[i], b[j]) for j in range(len(b)) if j != i and (facts is None or facts[j] != facts[i])]
            for k in range(0 if queue is None else len(queue)):
                negatives += [score(a[i], queue[k])] if facts is None or queue_facts[k] != facts[i] else []
            positive = score(a[i], b[i])
            loss -= positive - math.log(sum(math.exp(s) for s in [positive, *negatives]))
            bound += math.log(1 + len(negatives))
            hits += positive > max(negatives)
        directions.append([loss / len(a), bound / len(a), hits / len(a)])
    return [sum(column) / len(directions) for column in zip(*directions, strict=True)]


@pytest.mark.parametrize("with_facts", [False, True])
@pytest.mark.parametrize(("directed", "queued"), [(False, 0), (True, 0), (True, 5), (True, 12)])
def test_alignment_is_the_loop(directed, queued, with_facts):
    (x, y), queue = pair(), pair(queued, seed=1)[1] if queued else None
    facts = torch.tensor([0, 1, 0, 2, 3, 0, 2]) if with_facts else None
    queue_facts = torch.arange(queued) % 6 if with_facts and queued else None
    leaf = x.clone().requires_grad_()
    loss = alignment(leaf, y, directed, 0.3, facts, queue, queue_facts).loss
    assert bool(torch.autograd.grad(loss, leaf)[0].isfinite().all())  # negatives that are struck out leave no NaN
    parts = alignment(x, y, directed, 0.3, facts, queue, queue_facts)
    loss, bound, accuracy = looped(x, y, directed, 0.3, facts, queue, queue_facts)
    assert float(parts.loss) == pytest.approx(loss) and parts.bound == pytest.approx(bound)
    assert float(parts.accuracy) == pytest.approx(accuracy) and float(parts.estimate) == pytest.approx(bound - loss)


def test_alignment_ignores_scale_rotation_and_order():
    x, y = pair()
    expected, order, turn = alignment(x, y).loss, torch.randperm(N), rotation()
    scale = torch.rand(N, 1, dtype=torch.float64) + 0.1
    for same in ((x * scale, y / scale), (x @ turn, y @ turn), (x[order], y[order]), (y, x)):
        torch.testing.assert_close(alignment(*same).loss, expected)
    facts = torch.arange(N)
    torch.testing.assert_close(alignment(x, y, facts=facts).loss, expected)  # all different: nothing is masked
    assert float((alignment(x @ turn, y).loss - expected).abs()) > 0.01


def test_alignment_at_its_limits():
    x, y = pair()
    sure = alignment(x, x, temperature=1e-4)
    assert float(sure.loss) == pytest.approx(0, abs=1e-9) and float(sure.estimate) == pytest.approx(math.log(N))
    collapsed = alignment(torch.ones(N, F), torch.ones(N, F))
    assert float(collapsed.estimate) == pytest.approx(0, abs=1e-6)
    both = alignment(x, y, directed=True).loss + alignment(y, x, directed=True).loss
    torch.testing.assert_close(both / 2, alignment(x, y).loss)
    assert bool(torch.isfinite(alignment(torch.zeros(N, F), y).loss))


def test_directed_gradient_reaches_the_anchors_alone():
    leaves = [v.requires_grad_() for v in (*pair(), pair(3, seed=1)[1])]
    x, y, queue = leaves
    alignment(x, y, directed=True, queue=queue).loss.backward()
    assert y.grad is None and queue.grad is None and float(x.grad.abs().min()) > 0
    # The gradient is that of the same loss with y a constant; the symmetric form moves both sides.
    assert torch.autograd.gradcheck(lambda v: alignment(v, y, directed=True, queue=queue).loss, (x.detach().requires_grad_(),))
    alignment(x, y).loss.backward()
    assert float(y.grad.abs().min()) > 0
    assert torch.autograd.gradcheck(lambda a, b: alignment(a, b).loss, (x.detach().requires_grad_(), y.detach().requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_float32(dtype):
    x, y = (v.to(dtype) for v in pair())
    expected = alignment(x.float(), y.float())
    with torch.autocast("cpu", torch.bfloat16):
        parts = alignment(x, y)
    assert parts.loss.dtype == torch.float32 and torch.equal(parts.loss, expected.loss)


def test_alignment_refusals():
    x, y = pair()
    with pytest.raises(ValueError, match="batch of one"):
        alignment(x[:1], y[:1])
    for a, b in ((x, y[1:]), (x[0], y[0]), (x[None], y[None])):
        with pytest.raises(ValueError, match=r"expected \[N, f\] each"):
            alignment(a, b)
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[2, 1] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            alignment(broken, y)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature is"):
            alignment(x, y, temperature=temperature)
    for a, b, queue in ((x, y[:, 1:], None), (x, y, y[:, 1:])):
        with pytest.raises(ValueError, match="same number of columns"):
            alignment(a, b, directed=True, queue=queue)
    with pytest.raises(ValueError, match="expected directed=True"):
        alignment(x, y, queue=y)
    facts = torch.arange(N)
    for given in (dict(facts=facts, queue=y), dict(queue=y, queue_facts=facts), dict(facts=facts, queue_facts=facts)):
        with pytest.raises(ValueError, match="for the batch and for the queue"):
            alignment(x, y, directed=True, **given)
    for bad_facts in (facts[1:], facts.float(), facts[:, None]):
        with pytest.raises(ValueError, match="expected one integer for each of 7"):
            alignment(x, y, facts=bad_facts)
    with pytest.raises(ValueError, match="no negative is left"):
        alignment(x, y, facts=torch.zeros(N, dtype=torch.long))


# --- orthogonality -----------------------------------------------------------------------------------------------------


def test_orthogonality_by_hand():
    """Z_sh^T Z_uni = [[5, 0], [1, 0]], Z_sh^T Z_sh = [[5, 1], [1, 2]], Z_uni^T Z_uni = [[5, 0], [0, 0]].

    Inner products of the rows 4 and 1, their squared norms 5 and 4, 2 and 1.
    """
    shared, unique = torch.tensor([[2.0, 1], [1, -1]]), torch.tensor([[2.0, 0], [1, 0]])
    batch = orthogonality(shared, unique)
    assert float(batch.loss) == pytest.approx(26 / 4) and float(batch.overlap) == pytest.approx(26 / (math.sqrt(31) * 5))
    sample = orthogonality(shared, unique, "sample")
    assert float(sample.loss) == pytest.approx(17 / 2) and float(sample.overlap) == pytest.approx((16 / 20 + 1 / 2) / 2)


@pytest.mark.parametrize(("n", "f", "g"), [(7, 4, 4), (3, 6, 6), (9, 2, 5), (3, 6, 2)])
def test_orthogonality_is_the_loop(n, f, g):
    a, b = pair(n, f)[0], pair(n, g, seed=1)[0]

    def inner(p, q):
        """|| P^T Q ||_F^2."""
        return sum(sum(p[k, i] * q[k, j] for k in range(n)) ** 2 for i in range(p.shape[1]) for j in range(q.shape[1]))

    parts = orthogonality(a, b)
    assert float(parts.loss) == pytest.approx(float(inner(a, b)) / n**2)
    assert float(parts.overlap) == pytest.approx(float(inner(a, b) / (inner(a, a) * inner(b, b)).sqrt()))
    if f == g:
        parts = orthogonality(a, b, "sample")
        dots = [(float(p @ q), float(p @ p), float(q @ q)) for p, q in zip(a, b, strict=True)]
        assert float(parts.loss) == pytest.approx(sum(d**2 for d, _, _ in dots) / n)
        assert float(parts.overlap) == pytest.approx(sum(d**2 / (p * q) for d, p, q in dots) / n)


@pytest.mark.parametrize("reading", ["batch", "sample"])
def test_orthogonality_limits_and_invariances(reading):
    x, y = pair(40)
    parts, turn, other = orthogonality(x, y, reading), rotation(), rotation(seed=1)
    close = torch.testing.assert_close
    assert 0 < float(parts.overlap) < 1 and float(orthogonality(x, x, reading).overlap) == pytest.approx(1)
    for doubled in (orthogonality(torch.cat([x, x]), torch.cat([y, y]), reading), orthogonality(x @ turn, y @ turn, reading)):
        close(doubled.loss, parts.loss)
        close(doubled.overlap, parts.overlap)
    scaled = orthogonality(3 * x, y / 2, reading)
    close(scaled.loss, parts.loss * 2.25)
    close(scaled.overlap, parts.overlap)
    alone = orthogonality(x @ turn, y @ other, reading)
    assert (float((alone.loss - parts.loss).abs()) < 1e-9) == (reading == "batch")
    for axis in (0, 1):  # never both in one sample, or in one coordinate: columns of a batch may agree all the same
        apart = orthogonality(torch.cat([x, 0 * x], axis), torch.cat([0 * y, y], axis), reading)
        zero = axis == 0 or reading == "sample"
        assert (float(apart.loss) == 0) == zero and (float(apart.overlap) == 0) == zero
    nothing = orthogonality(0 * x, y, reading)
    assert float(nothing.loss) == 0 and float(nothing.overlap) == 0
    leaves = x[:5].requires_grad_(), y[:5].requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: orthogonality(a, b, reading).loss, leaves)


def test_batch_reading_has_a_floor_of_its_own():
    """Independent factors of unit variance: E || Z^T Y ||_F^2 / N^2 = f^2 / N."""
    draw = torch.Generator().manual_seed(0)
    found = [float(orthogonality(*torch.randn(2, 50, 10, generator=draw)).loss) for _ in range(200)]
    assert sum(found) / len(found) == pytest.approx(100 / 50, rel=0.05)


def test_orthogonality_refusals():
    x, y = pair()
    with pytest.raises(ValueError, match=r"reading is 'flow'.*'batch', 'sample'"):
        orthogonality(x, y, "flow")
    with pytest.raises(ValueError, match="batch of one"):
        orthogonality(x[:1], y[:1])
    with pytest.raises(ValueError, match=r"expected \[N, f\] each"):
        orthogonality(x, y[1:])
    with pytest.raises(ValueError, match="NaN or infinite"):
        orthogonality(x * math.nan, y)
    with pytest.raises(ValueError, match="needs equal widths"):
        orthogonality(x, y[:, 1:], "sample")
    half = orthogonality(*(300 * v.half() for v in (x, y)))  # products that half precision cannot hold
    assert bool(torch.isfinite(half.loss)) and half.loss.dtype == torch.float32


# --- the critic of NCE-CLUB --------------------------------------------------------------------------------------------


def planted(rho, calls, n=64, f=1, seed=0):
    """Batches (x, y, ids) of Gaussian pairs with I = -f/2 log(1 - rho^2)."""
    draw = torch.Generator().manual_seed(seed)
    for k in range(calls):
        x, noise = torch.randn(2, n, f, generator=draw)
        yield x, rho * x + math.sqrt(1 - rho**2) * noise, torch.arange(n) + n * k


def small(**changes):
    return UniqueCritic(**{**dict(size=1, capacity=256, batch_size=128, steps=3, warm_up=60, repeats=False), **changes})


def test_dependent_factors_are_penalised():
    critic, truth = small(), -math.log(1 - 0.9**2) / 2  # .830
    found = [critic(*batch) for batch in planted(0.9, 24)]
    late = found[-12:]
    assert not found[0].active and all(out.active for out in late)
    assert sum(out.held_out for out in late) / 12 == pytest.approx(truth, abs=0.15)
    assert all(out.held_out < out.bound == math.log(64) for out in found)
    # NCE-CLUB with the best critic is rho^2 / (1 - rho^2) = 4.26, not I.
    assert sum(float(out.loss) for out in late) / 12 == pytest.approx(0.81 / 0.19, rel=0.3)


def test_independent_factors_are_left_alone():
    critic = small()
    for x, y, ids in planted(0.0, 24):
        out = critic(x.requires_grad_(), y, ids)
        out.loss.backward()
        assert not out.active and out.held_out < 0.1 and float(out.loss) == 0 and float(x.grad.abs().max()) == 0
    assert float(out.contrast) != 0  # what the penalty would have been is still told


def test_penalty_takes_dependence_away_until_the_critic_finds_none():
    """x = cos(a) noise + sin(a) y, correlation sin(a) = .87 at first; .1 nats are left at a correlation of .43."""
    angle = torch.tensor(math.pi / 3, requires_grad=True)
    optimizer, critic = torch.optim.Adam([angle], lr=0.03), small()
    for noise, y, ids in planted(0.0, 60):
        optimizer.zero_grad()
        critic(angle.cos() * noise + angle.sin() * y, y, ids).loss.backward()  # after the critic's own steps
        optimizer.step()
    assert abs(math.sin(float(angle))) < 0.55


def test_penalty_is_club_of_the_critic_before_it_learns():
    critic = small(threshold=-math.inf)
    x, y, ids = next(planted(0.9, 1))
    before = {k: v.clone() for k, v in critic.critic.state_dict().items()}
    x.requires_grad_(), y.requires_grad_()
    out = critic(x, y, ids)
    assert any(float((v - before[k]).abs().max()) > 0 for k, v in critic.critic.state_dict().items())  # it has learned
    out.loss.backward()
    assert all(p.grad is None for p in critic.critic.parameters())
    frozen = factorization.Critic(1, 1)
    frozen.load_state_dict(before)
    again = [v.detach().requires_grad_() for v in (x, y)]
    scores = frozen(*again)
    club(scores).backward()
    assert torch.equal(out.loss, club(scores)) and torch.equal(out.contrast, out.loss)
    for leaf, expected in zip((x, y), again, strict=True):
        torch.testing.assert_close(leaf.grad, expected.grad)
    estimate = (infonce(scores).estimate + infonce(scores.T).estimate) / 2
    assert out.held_out == pytest.approx(float(estimate)) and out.active


def test_evaluation_mode_only_scores():
    critic, batch = small(), next(planted(0.9, 1))
    state = {k: v.clone() for k, v in critic.state_dict().items() if torch.is_tensor(v)}
    with torch.no_grad():
        first = critic.eval()(*batch)
    assert critic.seen == 0 and all(torch.equal(v, critic.state_dict()[k]) for k, v in state.items())
    with torch.no_grad():  # learning does not depend on the caller's mode
        assert critic.train()(*batch).held_out == first.held_out
    assert critic.seen == 64 and not torch.equal(state["critic.g.linear.weight"], critic.critic.g.linear.weight)


def test_buffer_is_first_in_first_out():
    critic = UniqueCritic(1, capacity=5, batch_size=2, steps=1, warm_up=0, repeats=False)
    for start in (0, 3, 6):
        values = torch.arange(start, start + 3)
        critic(values[:, None].float(), -values[:, None].float(), values)
    assert sorted(critic.ids.tolist()) == [4, 5, 6, 7, 8] and critic.seen == 9
    assert torch.equal(critic.x[:, 0], critic.ids.float()) and torch.equal(critic.y[:, 0], -critic.ids.float())
    many = torch.arange(20, 29)  # more than it holds
    critic(many[:, None].float(), many[:, None].float(), many)
    assert sorted(critic.ids.tolist()) == [24, 25, 26, 27, 28] and torch.equal(critic.x[:, 0], critic.ids.float())


def test_anchors_that_never_enter_are_held_out():
    critic = small(threshold=-math.inf, repeats=True)
    x, y, ids = next(planted(0.9, 1))
    first = critic(x, y, ids)
    entered = torch.isin(ids, critic.ids[: critic.seen])
    assert critic.seen == entered.sum() and 8 <= (~entered).sum() <= 24 and first.bound == math.log(int((~entered).sum()))
    again, share = critic.eval()(x, y, ids), int((~entered).sum()) / 64
    scores = critic.critic(x[~entered], y[~entered])
    estimate = float(infonce(scores).estimate + infonce(scores.T).estimate) / 2
    assert again.bound == pytest.approx(first.bound)
    assert again.held_out == pytest.approx(share * estimate + (1 - share) * first.held_out, abs=1e-5), "so few are no verdict"
    few = critic(x[entered], y[entered], ids[entered])
    assert (few.held_out, few.bound) == (first.held_out, first.bound) and few.active, "the value before stays"
    nothing = small(threshold=-math.inf, repeats=True)(x[entered], y[entered], ids[entered])
    assert math.isnan(nothing.held_out) and not nothing.active and float(nothing.loss) == 0, "before any value"


def test_repeated_ids_count_once():
    """A batch where two epochs meet: the second row of an anchor is left out, of the penalty and of the buffer."""
    x, y, ids = next(planted(0.9, 1, n=8))
    twice, plain = small(threshold=-math.inf), small(threshold=-math.inf)
    rows = torch.tensor([0, 1, 2, 1, 3, 0])
    a = twice(x[torch.tensor([0, 1, 2, 7, 3, 6])], y[rows], ids[rows])
    b = plain(x[:4], y[:4], ids[:4])
    assert torch.equal(a.loss, b.loss) and a.held_out == b.held_out and twice.seen == plain.seen == 4
    assert all(torch.equal(p, q) for p, q in zip(twice.parameters(), plain.parameters(), strict=True))
    with pytest.raises(ValueError, match="all 3 pairs are of anchor 5"):
        twice(x[:3], y[:3], torch.full((3,), 5))


@pytest.mark.parametrize("anchors", [96, 512])  # in a buffer of 256
def test_data_that_return_are_judged_by_what_the_critic_never_met(anchors):
    """Dependent factors keep their penalty; independent ones, whose pairs a critic comes to know by heart, have none."""
    orders = [torch.randperm(anchors, generator=torch.Generator().manual_seed(k))[:64] for k in range(150)]
    pairs = {rho: next(planted(rho, 1, n=anchors, f=8)) for rho in (0.0, 0.9)}
    late = {}
    for rho, (x, y, _) in pairs.items():
        critic = small(size=8, repeats=True)
        late[rho] = [critic(x[rows], y[rows], rows) for rows in orders][-30:]
        resumed = small(size=8, repeats=True, seed=5)
        resumed.load_state_dict(critic.state_dict())
        assert resumed.last == critic.last == (late[rho][-1].held_out, late[rho][-1].bound)
    assert not any(out.active for out in late[0.0]) and all(out.active for out in late[0.9])
    careless = small(size=8)  # as if each were met but once
    fooled = [careless(*(v[rows] for v in pairs[0.0][:2]), rows) for rows in orders][-30:]
    assert all(out.active for out in fooled)


def test_an_anchor_is_not_its_own_negative(monkeypatch):
    critic = UniqueCritic(1, capacity=8, batch_size=8, steps=1, warm_up=1, repeats=False)
    x, y, ids = next(planted(0.9, 1, n=4))
    critic(x, y, ids)
    seen, original = [], factorization._both_ways
    monkeypatch.setattr(factorization, "_both_ways", lambda scores: seen.append(scores) or original(scores))
    critic(x + 1, y + 1, ids)  # the same anchors, a step of the encoders later
    _, scores = seen  # of the batch, then of the buffer
    struck = scores == -math.inf
    assert struck.sum(0).tolist() == struck.sum(1).tolist() == [1] * 8 and not struck.diagonal().any()


def test_warm_up_comes_once_when_the_buffer_is_full():
    critic = UniqueCritic(1, capacity=128, batch_size=16, steps=2, warm_up=9, repeats=False)
    taken = []
    for batch in planted(0.5, 4, n=50):
        critic(*batch)
        taken.append(int(next(iter(critic.optimizer.state.values()))["step"]))
    assert taken == [2, 4, 13, 15]


def test_state_goes_on_bit_for_bit():
    batches = list(planted(0.9, 8))
    critic = small()
    for batch in batches[:4]:
        critic(*batch)
    file = io.BytesIO()
    torch.save(critic.state_dict(), file)
    file.seek(0)
    resumed = small(seed=5)  # whatever it started from
    resumed.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(77)  # nothing comes from the global generator
    for batch in batches[4:]:
        a, b = critic(*batch), resumed(*batch)
        assert a.held_out == b.held_out and torch.equal(a.contrast, b.contrast)
    for (name, a), b in zip(critic.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_global_generator_is_untouched():
    before = torch.get_rng_state()
    critic = small()
    critic(*next(planted(0.9, 1)))
    assert torch.equal(before, torch.get_rng_state())
    weights = [p for seed in (0, 0, 1) for p in list(small(seed=seed).parameters())[:1]]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_critic_refusals():
    x, y, ids = next(planted(0.9, 1, n=8))
    critic = small()
    wide = torch.cat([x, x], 1)
    for a, b in ((wide, wide), (x, wide)):
        with pytest.raises(ValueError, match="this critic is for 1 columns"):
            critic(a, b, ids)
    for bad in (ids[1:], ids.float()):
        with pytest.raises(ValueError, match="expected 8 integers"):
            critic(x, y, bad)
    with pytest.raises(ValueError, match="batch of one"):
        critic(x[:1], y[:1], ids[:1])
    with pytest.raises(FloatingPointError, match="NaN or infinite"):  # of which trainers keep the batch; a ValueError as well
        critic(x, y / 0, ids)
    assert critic.seen == 0  # nothing of a refused batch stays
    for bad_size in (dict(size=0), dict(batch_size=1), dict(batch_size=300), dict(steps=0), dict(warm_up=-1)):
        with pytest.raises(ValueError, match="expected size and steps"):
            small(**bad_size)
    assert critic(x.half(), y.half(), ids).loss.dtype == torch.float32


# --- one and two processes ---------------------------------------------------------------------------------------------


def test_alone_rows_stay_as_they_are():
    x, _ = pair()
    assert gathered(x) is x


def work(part):
    """Values of every loss, and gradients of two encoders, from the given part of a batch; the critic's weights after it."""
    (u, g), (queue, _) = pair(8), pair(6, seed=1)
    encoders = [pair(F, seed=seed)[1].requires_grad_() for seed in (2, 3)]
    facts, queue_facts = torch.tensor([0, 1, 2, 0, 3, 1, 4, 5]), torch.arange(6)
    mine = [v[part(len(v))] for v in (u, g, queue, facts, queue_facts, torch.arange(8))]
    x, y = mine[0] @ encoders[0], mine[1] @ encoders[1]
    critic = UniqueCritic(F, capacity=16, batch_size=8, steps=2, warm_up=4, threshold=-math.inf, repeats=False)
    losses = {
        "symmetric": alignment(x, y).loss,
        "directed": alignment(x, y, True, 0.2, mine[3], mine[2], mine[4]).loss,
        "batch": orthogonality(x, y).loss,
        "sample": orthogonality(x, y, "sample").overlap,
        "first": critic(x, y, mine[5]).loss,
        "second": critic(x, y, mine[5] + 8).loss,
        "third": critic(x, y, mine[5] + 16).loss,
    }
    out = {name: loss.detach() for name, loss in losses.items()}
    for name, loss in losses.items():
        for k, gradient in enumerate(torch.autograd.grad(loss, encoders, retain_graph=True, allow_unused=True)):
            if gradient is not None:
                out[f"{name} gradient {k}"] = gradient
    return out | {name: p.detach() for name, p in critic.named_parameters()}


def halves(n):
    """The rows of this process among n."""
    each = n // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


@pytest.mark.distributed
def test_two_processes_are_one(tmp_path):
    """The same global batch, whole or halved: every loss, and its gradient after the mean that DDP takes, to 1e-6."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([*launcher, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    one = work(lambda n: slice(None))
    for rank in range(2):
        two = torch.load(tmp_path / f"{rank}.pt")
        assert two.pop("refused") == "processes hold [2, 3] rows; expected equal numbers: drop the last, smaller batch"
        assert two.keys() == one.keys() and sum("gradient" in name for name in one) == 13
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


if __name__ == "__main__":  # one of the two processes
    dist.init_process_group("gloo")
    found = work(halves)
    for key in found:
        if "gradient" in key:  # what DistributedDataParallel does
            dist.all_reduce(found[key])
            found[key] /= dist.get_world_size()
    try:
        gathered(torch.zeros(2 + dist.get_rank(), 1))
    except ValueError as error:
        found["refused"] = str(error)
    torch.save(found, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
