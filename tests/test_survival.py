"""Survival, half-life and their intervals: by hand, against planted decay, at their limits."""

import numpy as np
import pytest

from umm_kit.evaluation.survival import (
    cosine,
    edit_distance,
    half_life,
    mean,
    refuse_narrow,
    retrieval_rank,
    survival,
)
from umm_kit.statistics import wilson


def planted(p, n=300, cycles=8, floor=0.3, runs=1, seed=0, least=0.0, n_resamples=2000):
    """Recall of items whose four facts are each forgotten (and guessed right by chance) with probability p per cycle."""
    rng = np.random.default_rng(seed)
    gone = rng.geometric(p, (runs, 1, n, 4)) <= np.arange(1, cycles + 1)[:, None, None]
    gone &= rng.random((1, 1, n, 4)) >= least  # some facts can never go
    kept = (~gone | (rng.random((runs, 1, n, 4)) < floor)).mean(-1)
    return survival(kept, np.full((runs, cycles, n), floor), np.ones(n), n_resamples)


def test_half_life_by_hand():
    assert half_life([0.9, 0.5]) == 2 and half_life([0.4, 0.9]) == pytest.approx(0.5 / 0.6)
    assert half_life([0.8, 0.6, 0.4, 0.9, 0.1]) == pytest.approx(2.5)  # the first crossing counts
    assert half_life([[0.9, 0.8], [0.5, 0.4]]).tolist() == [np.inf, 1.0]


def test_survival_by_hand():
    kept, floor = np.array([[[1.0, 0.5], [0.5, 0.5]]]), np.full((1, 2, 2), 0.25)
    curve = survival(kept, floor, np.array([1.0, 0.9]))
    assert curve.value == pytest.approx([0.5 / 0.7, 0.25 / 0.7])
    assert curve.resamples.shape == (2000, 2) and curve.n == 2
    assert curve.mean().value == pytest.approx(0.75 / 1.4)


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_all_or_nothing_has_the_interval_of_a_share(kept):
    curve = survival(np.full((1, 3, 50), kept), np.zeros((1, 3, 50)), np.ones(50))
    low, high = wilson(round(50 * kept), 50)
    assert curve.mean().interval == pytest.approx((low, high)) and high - low > 0.05
    assert curve.half_life().interval == ((3, np.inf) if kept else (0.5, pytest.approx(0.5 / (1 - high))))


def test_resamples_against_a_naive_bootstrap():
    rng = np.random.default_rng(3)
    kept, floor, ceiling = rng.random((3, 2, 40)), 0.2 * rng.random((3, 2, 40)), 0.9 + 0.1 * rng.random(40)
    curve, naive = survival(kept, floor, ceiling), []
    for _ in range(2000):
        i, r = rng.integers(40, size=40), rng.integers(3, size=3)
        a, f = kept[r][:, :, i].mean((0, 2)), floor[r][:, :, i].mean((0, 2))
        naive.append((a - f) / (ceiling[i].mean() - f))
    assert curve.resamples.std(0) == pytest.approx(np.std(naive, axis=0), rel=0.1)
    assert curve.low == pytest.approx(np.quantile(naive, 0.025, axis=0), abs=0.03)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.4])
def test_planted_half_life_lies_in_its_interval(p):
    curve = planted(p)
    assert curve.half_life().low < np.log(0.5) / np.log(1 - p) < curve.half_life().high
    assert curve.mean().low < np.mean((1 - p) ** np.arange(1, 9)) < curve.mean().high
    fit = curve.exponential_fit()
    assert fit.rate.low < -np.log(1 - p) < fit.rate.high and not fit.rejected and "not rejected" in str(fit)


def test_intervals_cover():
    """Of 60 planted curves, about 57 hold the true half-life; 51 are more than three standard errors below."""
    true = np.log(0.5) / np.log(0.8)
    found = [planted(0.2, n=100, cycles=6, seed=seed, n_resamples=400).half_life() for seed in range(60)]
    assert sum(h.low <= true <= h.high for h in found) >= 52


def test_a_curve_that_levels_off_is_no_exponential():
    fit = planted(0.5, least=0.5).exponential_fit()
    assert fit.rejected and "REJECTED" in str(fit)


def test_nothing_lost_is_censored_and_not_certain():
    curve = survival(np.ones((1, 4, 50)), np.full((1, 4, 50), 0.3), np.ones(50))
    life, level = curve.half_life(), curve.mean()
    assert life.censored and life.value == 4 and life.interval == (4, np.inf) and str(life).startswith("> 4.00")
    assert level.value == 1 and level.high == pytest.approx(1) and 0.8 < level.low < 1
    with pytest.raises(ValueError, match="varies too little"):
        curve.exponential_fit()


@pytest.mark.parametrize("floor", [0.3, 0.0])
def test_a_ceiling_that_wobbles_makes_nothing_lost_no_more_certain(floor):
    """Of 20 items 19 can be read whole and one to four fifths: C = .99, which resamples differ in, and in nothing else."""
    ceiling = np.array([1.0] * 19 + [0.8])
    perfect = survival(np.ones((1, 4, 20)), np.full((1, 4, 20), floor), ceiling)
    assert np.ptp(perfect.resamples) > 1e-3 and perfect.alike
    bound = (wilson(20, 20)[0] - floor) / (0.99 - floor)
    assert perfect.mean().low == pytest.approx(bound) and bound < 0.9 and perfect.mean().high > 1
    assert perfect.half_life().censored and perfect.half_life().high == np.inf
    nothing = survival(np.zeros((1, 4, 20)), np.full((1, 4, 20), floor), ceiling)
    assert nothing.mean().high == pytest.approx((wilson(0, 20)[1] - floor) / (0.99 - floor))
    assert nothing.half_life().high > nothing.half_life().value
    gain = perfect.over(nothing)
    assert gain.low == pytest.approx(perfect.mean().low - nothing.mean().high) and gain.low < gain.value - 0.2
    partly = survival(np.stack([np.ones(20), np.arange(20) / 19])[None], np.full((1, 2, 20), floor), ceiling)
    assert not partly.alike


def test_partly_censored_resamples_leave_the_interval_open():
    life = planted(0.1, n=60, cycles=7).half_life()
    assert life.high == np.inf and life.low < 7


def test_runs_widen_the_interval_by_what_they_share():
    rng = np.random.default_rng(0)
    kept = np.clip(0.7 + 0.1 * rng.standard_normal((4, 1, 1)) + 0.1 * rng.standard_normal((4, 1, 200)), 0, 1)
    together = survival(kept, np.full((4, 1, 200), 0.2), np.ones(200))
    alone = survival(kept.mean(0, keepdims=True), np.full((1, 1, 200), 0.2), np.ones(200))
    assert together.value == pytest.approx(alone.value)
    assert together.high - together.low > 2 * (alone.high - alone.low)
    assert mean(kept[:, 0]).n == 200 and mean(kept[:, 0]).high - mean(kept[:, 0]).low > 0.03


def test_refusals():
    with pytest.raises(ValueError, match=r"ceiling is 0.600 and the floor at cycle 1 is 0.450"):
        refuse_narrow(0.6, [0.2, 0.45])
    with pytest.raises(ValueError, match="C - F"):
        refuse_narrow(float("nan"), [0.2])
    refuse_narrow(0.6, [0.2, 0.4 - 1e-9])
    for kept in (np.full((1, 1, 3), np.nan), np.ones((1, 1, 1))):
        with pytest.raises(ValueError, match="NaN"):
            survival(kept, 0 * np.nan_to_num(kept), np.ones(kept.shape[-1]))


def test_cosine_and_rank_against_loops():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((20, 5)), rng.standard_normal((20, 5))
    for i in range(20):
        near = [x @ a[i] / np.linalg.norm(x) / np.linalg.norm(a[i]) for x in b]
        assert cosine(a, b)[i] == pytest.approx(near[i])
        assert retrieval_rank(a, b)[i] == pytest.approx(sum(x > near[i] for x in near) / 19)
    assert retrieval_rank(a, np.ones((20, 5))) == pytest.approx(np.full(20, 0.5))  # all alike: chance
    assert retrieval_rank(3 * b, b).max() == 0 and cosine(a, 0 * b).tolist() == [0.0] * 20


def test_edit_distance():
    assert edit_distance("a b c", "a b c") == 0 and edit_distance("a b", "c d e") == 1 and edit_distance("", "") == 0
    assert edit_distance("a red circle", "a circle") == pytest.approx(1 / 3) == edit_distance("a circle", "A red circle")


def test_a_paired_gain_is_surer_than_its_parts():
    """Two curves that differ by the same amount in every item: their own intervals overlap, that of the gain has no width."""
    rng = np.random.default_rng(0)
    kept, nothing = rng.choice([0.2, 0.8], (1, 1, 60)), np.zeros((1, 1, 60))
    low, high = survival(kept, nothing, np.ones(60)), survival(kept + 0.1, nothing, np.ones(60))
    gain = high.over(low)
    assert gain.value == pytest.approx(0.1) and gain.interval == pytest.approx((0.1, 0.1))
    assert low.mean().high > high.mean().low
    all_kept, none_kept = (survival(np.full((1, 2, 3), k), np.zeros((1, 2, 3)), np.ones(3)) for k in (1.0, 0.0))
    assert all_kept.over(none_kept).low < 0 < all_kept.over(none_kept).value == 1, "three items are not certain"
    with pytest.raises(AssertionError, match="other items"):
        low.over(all_kept)
