"""Intervals and tests against hand values, naive loops, simulation, and what must be refused."""

import numpy as np
import pytest
from scipy import stats

from umm_kit.statistics import (
    Estimate,
    bootstrap,
    bootstrap_ratio,
    hierarchical_bootstrap,
    paired_difference,
    wilson,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_wilson_by_hand():
    z = 1.959964
    assert wilson(10, 10) == pytest.approx((1 / (1 + z**2 / 10), 1.0), abs=1e-6)
    centre, half = (0.3 + z**2 / 40) / (1 + z**2 / 20), z / (1 + z**2 / 20) * np.sqrt(0.3 * 0.7 / 20 + z**2 / 1600)
    assert wilson(6, 20) == pytest.approx((centre - half, centre + half), abs=1e-6)
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson(3, 2)


def test_bootstrap_value_and_a_naive_loop(rng):
    values = rng.normal(2, 1, 400)
    estimate = bootstrap(values)
    assert estimate.value == values.mean() and estimate.n == 400 and estimate.interval == (estimate.low, estimate.high)
    means = [rng.choice(values, len(values)).mean() for _ in range(4000)]
    # Symmetric data: BCa and the percentile loop agree up to the noise of resampling.
    assert estimate.interval == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.015)
    assert bootstrap(values) == estimate and bootstrap(values, seed=1) != estimate
    assert bootstrap(3 * values + 1).interval == pytest.approx([3 * e + 1 for e in estimate.interval])
    assert bootstrap(values, np.median).value == np.median(values)
    assert bootstrap(values, level=0.5).high < estimate.high
    assert float(estimate) == estimate.value and str(Estimate(0.5, 0.25, 0.75, 8)) == "0.500 [0.250, 0.750] (n=8)"


def test_all_right_or_all_wrong_is_not_certain():
    assert bootstrap([1] * 20).interval == wilson(20, 20)
    assert bootstrap([0] * 20).interval == wilson(0, 20)
    assert bootstrap([1] * 20, strata=[0, 1] * 10).interval == wilson(20, 20)
    assert bootstrap_ratio([3] * 20, [3] * 20).interval == wilson(20, 20)
    assert bootstrap_ratio([0] * 20, [3] * 20).interval == wilson(0, 20)
    assert bootstrap([2.5] * 20).interval == (2.5, 2.5)


@pytest.mark.parametrize("p", [0.97, 0.7])
def test_bootstrap_covers_as_often_as_it_says(p, rng):
    n, runs = 128, 200
    estimates = [bootstrap(rng.random(n) < p, n_resamples=500, seed=k) for k in range(runs)]
    covered = np.mean([e.low <= p <= e.high for e in estimates])
    assert 0.90 <= covered <= 0.99  # 0.95 +- 3 standard errors (0.046)


def test_ratio_by_hand_and_a_naive_loop(rng):
    true, said, claimed = rng.integers(1, 5, 300), rng.integers(0, 4, 300), rng.integers(1, 5, 300)
    right = np.minimum(np.minimum(true, said), claimed)
    top, bottom = 2 * right, true + claimed
    estimate = bootstrap_ratio(top, bottom)
    assert estimate.value == pytest.approx(top.sum() / bottom.sum())
    loop = []
    for _ in range(4000):
        i = rng.integers(300, size=300)
        loop.append(top[i].sum() / bottom[i].sum())
    assert estimate.interval == pytest.approx(np.quantile(loop, [0.025, 0.975]), abs=0.01)
    # Equal denominators: a ratio of sums is a mean.
    assert bootstrap_ratio(top, np.full(300, 8.0)).interval == pytest.approx(bootstrap(top / 8).interval, abs=0.01)
    assert bootstrap_ratio([1, 0], [2, 0]).value == 0.5
    assert bootstrap_ratio([0, 0], [0, 0]) == Estimate(0.0, *wilson(0, 2), 2)


def test_strata_are_resampled_apart(rng):
    values = np.concatenate([rng.random(100) < 0.9, rng.random(100) < 0.1, rng.random(40) < 0.5]).astype(float)
    labels = ["a"] * 100 + ["b"] * 100 + ["c"] * 40
    estimate = bootstrap(values, strata=labels)
    means = [values[:100].mean(), values[100:200].mean(), values[200:].mean()]
    assert estimate.value == pytest.approx(np.mean(means))
    error = np.sqrt(sum(m * (1 - m) / n for m, n in zip(means, (100, 100, 40), strict=True))) / 3
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    two, pooled = bootstrap(values[:200], strata=labels[:200]), bootstrap(values[:200])
    assert two.value == pytest.approx(pooled.value)
    assert two.high - two.low < 0.75 * (pooled.high - pooled.low)


def test_hierarchy_by_hand_and_in_its_limits(rng):
    groups = [[[1.0, 3.0], [3.0, 5.0]], [[0.0, 0.0, 3.0]]]
    assert hierarchical_bootstrap(groups).value == pytest.approx((3.0 + 1.0) / 2)
    assert hierarchical_bootstrap(groups).n == 2
    # Equal groups: only the items vary, over all groups; constant items: only the groups vary.
    items = [rng.normal(size=200) for _ in range(6)]
    width = lambda e: e.high - e.low  # noqa: E731
    means = np.array([5.0, 6, 7, 8, 9, 10])
    spread = hierarchical_bootstrap([np.full(30, m) for m in means])
    assert width(spread) == pytest.approx(2 * 1.96 * means.std() / np.sqrt(6), rel=0.12)
    centred = [x - x.mean() for x in items]
    assert width(hierarchical_bootstrap(centred)) == pytest.approx(2 * 1.96 * np.std(centred) / np.sqrt(1200), rel=0.15)
    # The same items everywhere: their variance does not average out over groups.
    same = [centred[0]] * 6
    assert width(hierarchical_bootstrap(same, shared_items=True)) == pytest.approx(width(bootstrap(centred[0])), rel=0.15)
    assert width(hierarchical_bootstrap(same)) < 0.6 * width(hierarchical_bootstrap(same, shared_items=True))


def test_hierarchy_agrees_with_a_naive_loop(rng):
    groups = [[rng.normal(m, 1, 20) for _ in range(3)] for m in (0, 1, 2, 3)]
    loop = []
    for _ in range(3000):
        models = [groups[rng.integers(4)] for _ in range(4)]
        seeds = [[model[rng.integers(3)] for _ in range(3)] for model in models]
        loop.append(np.mean([np.mean([rng.choice(s, 20).mean() for s in model]) for model in seeds]))
    assert hierarchical_bootstrap(groups).interval == pytest.approx(np.quantile(loop, [0.025, 0.975]), abs=0.12)


def test_paired_difference_exact_values():
    result = paired_difference([1.0, 1, 1, 1, 0], [0.0, 0, 0, 0, 0])
    assert result.value == pytest.approx(0.8) and result.n == 5
    assert result.p_value == pytest.approx(2 / 16)  # 4 pairs differ: 2 of their 16 sign patterns are as extreme
    mirrored = paired_difference([0.0, 0, 0, 0, 0], [1.0, 1, 1, 1, 0])
    assert mirrored.interval == pytest.approx((-result.high, -result.low)) and mirrored.p_value == result.p_value
    all_differ = paired_difference(np.zeros(9), np.ones(9))
    assert (all_differ.low, all_differ.high) == (-1.0, -wilson(9, 9)[0])
    equal = paired_difference([1.0, 0, 1], [1.0, 0, 1])
    assert equal.value == 0 and equal.p_value == 1 and equal.high == wilson(0, 3)[1] == -equal.low


def test_pairing_sees_what_two_separate_intervals_miss(rng):
    difficulty = rng.normal(0, 3, 200)
    a, b = difficulty + rng.normal(0.2, 0.3, 200), difficulty + rng.normal(0, 0.3, 200)
    result = paired_difference(a, b)
    assert result.low > 0 and result.p_value < 0.01
    assert bootstrap(a).low < bootstrap(b).high
    assert result.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.01)


def test_paired_p_values_are_uniform_under_the_null(rng):
    p = [paired_difference(rng.normal(size=30), rng.normal(size=30), n_resamples=200, seed=k).p_value for k in range(200)]
    assert abs(np.mean(np.array(p) < 0.1) - 0.1) < 0.065
    assert stats.kstest(p, "uniform").pvalue > 0.001


def test_paired_ratio_and_strata(rng):
    top, bottom = rng.integers(0, 5, (2, 80)), np.full((2, 80), 8)
    ratio = paired_difference(np.stack([top[0], bottom[0]], 1), np.stack([top[1], bottom[1]], 1))
    mean = paired_difference(top[0] / 8, top[1] / 8)
    assert ratio.value == pytest.approx(mean.value)
    assert ratio.interval == pytest.approx(mean.interval, abs=0.01) and ratio.p_value == pytest.approx(mean.p_value, abs=0.05)
    a, b = np.r_[np.ones(10), np.zeros(30)], np.zeros(40)
    assert paired_difference(a, b, strata=[0] * 10 + [1] * 30).value == pytest.approx(0.5)
    assert paired_difference(a, b).value == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap([]), "0 item"),
        (lambda: bootstrap([0.5]), "at least 2"),
        (lambda: bootstrap([0.5, np.nan]), "1 NaN"),
        (lambda: bootstrap([0.5, np.inf]), "infinite"),
        (lambda: bootstrap(np.ones((3, 2))), r"shape \(3, 2\)"),
        (lambda: bootstrap([1, 0, 1], strata=[0, 0]), "2 strata labels for 3"),
        (lambda: bootstrap([1, 0, 1], strata=[0, 0, 1]), "stratum 1 hold 1 item"),
        (lambda: bootstrap([1, 0, 1], level=95), "level=95"),
        (lambda: bootstrap_ratio([1, 2, 3], [1, 2]), "3 numerators and 2 denominators"),
        (lambda: bootstrap_ratio([1, 2], [1, -2]), "negative"),
        (lambda: hierarchical_bootstrap([1.0, 2.0]), "at least 2"),
        (lambda: hierarchical_bootstrap([[1.0, 2.0]]), "at least 2"),
        (lambda: hierarchical_bootstrap([[1.0, 2.0], [1.0]]), "1 item"),
        (lambda: hierarchical_bootstrap([[1.0, 2.0], [1.0, 2.0, 3.0]], shared_items=True), "same items"),
        (lambda: paired_difference([1.0, 2], [1.0, 2, 3]), "same items"),
        (lambda: paired_difference([1.0, np.nan], [1.0, 2]), "NaN"),
        (lambda: paired_difference([1.0], [1.0]), "at least 2"),
        (lambda: paired_difference(np.ones((3, 2)), np.ones((3, 2)), strata=[1, 2, 3]), "without strata"),
        (lambda: paired_difference([1.0, 2], [1.0, 3], strata=[1]), "1 strata labels for 2"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
