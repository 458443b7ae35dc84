"""Estimators against distributions of known mutual information, naive loops, other libraries, and what must be refused."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from sklearn.feature_selection import mutual_info_regression

from umm_kit.diagnostics import mutual_information as module
from umm_kit.diagnostics.mutual_information import mutual_information
from umm_kit.losses.factorization import club, gaussian_scores, infonce


def normal(covariance, split, n, seed=0):
    z = np.random.default_rng(seed).multivariate_normal(np.zeros(len(covariance)), covariance, n)
    return z[:, :split], z[:, split:]


def pair(rho, n, seed=0):
    return normal(np.array([[1, rho], [rho, 1]]), 1, n, seed)


DENSE = np.eye(10) / 2 + 0.5
DENSE_TRUTH = np.log(np.linalg.det(DENSE[:5, :5]) ** 2 / np.linalg.det(DENSE)) / 2


def swiss_roll(n, seed=0):
    """A Gaussian pair whose first variable is rolled up in the plane: linear methods see almost nothing."""
    x, y = stats.norm.cdf(pair(0.75, n, seed))
    t = 1.5 * np.pi * (1 + 2 * x)
    return np.hstack([t * np.cos(t), t * np.sin(t)]) / 21, y


# --- the pure terms --------------------------------------------------------------------------------------------------


def test_infonce_and_club_by_hand():
    scores = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])
    parts = infonce(scores)
    assert float(parts.loss) == pytest.approx(math.log(4 / 3)) and parts.bound == math.log(2)
    assert float(parts.estimate) == pytest.approx(math.log(2) - math.log(4 / 3))
    assert float(infonce(1e4 * torch.eye(8)).estimate) == pytest.approx(math.log(8))
    assert float(club(torch.tensor([[3.0, 1.0], [2.0, 5.0]]))) == 4 - 1.5
    for bad in (torch.zeros(3, 2), torch.zeros(1, 1), torch.zeros(4)):
        for term in (infonce, club):
            with pytest.raises(ValueError, match="expected \\[N, N\\]"):
                term(bad)


@settings(max_examples=20)
@given(st.integers(2, 6), st.integers(0, 99))
def test_terms_of_one_side_cancel(n, seed):
    rng = torch.Generator().manual_seed(seed)
    scores, row, column = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((n, n), (n, 1), (1, n)))
    torch.testing.assert_close(club(scores + row + column), club(scores))
    torch.testing.assert_close(infonce(scores + row).loss, infonce(scores).loss)
    assert float(infonce(scores).estimate) <= infonce(scores).bound


def test_gaussian_scores_are_log_densities():
    rng = torch.Generator().manual_seed(0)
    mean, log_variance, y = (torch.randn(size, 3, generator=rng, dtype=torch.float64) for size in (4, 4, 6))
    naive = torch.distributions.Normal(mean[:, None], (log_variance / 2).exp()[:, None]).log_prob(y).sum(2)
    torch.testing.assert_close(gaussian_scores(mean, log_variance, y), naive)


def test_club_with_the_true_density_is_not_the_mutual_information():
    """It is I + KL(p_x p_y || p_xy) = rho^2 / (1 - rho^2) per Gaussian dimension."""
    x, y = (torch.from_numpy(side) for side in pair(0.75, 4000))
    scores = gaussian_scores(0.75 * x, torch.full_like(x, math.log(1 - 0.75**2)), y)
    assert float(club(scores)) == pytest.approx(0.75**2 / (1 - 0.75**2), abs=0.08)


# --- KSG -------------------------------------------------------------------------------------------------------------


def test_ksg_is_a_double_loop():
    x, y = normal(DENSE, 5, 120)
    n, k = 120, 4
    a, b = ((side - side.mean(0)) / side.std(0) for side in (x, y))
    total = 0.0
    for i in range(n):
        dx, dy = abs(a - a[i]).max(1), abs(b - b[i]).max(1)
        radius = np.sort(np.maximum(dx, dy))[k]
        total += special.digamma((dx < radius).sum()) + special.digamma((dy < radius).sum())
    naive = special.digamma(k) + special.digamma(n) - total / n
    assert mutual_information(x, y, k=k).value == pytest.approx(naive, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_ksg_agrees_with_scikit_learn_in_one_dimension(seed):
    x, y = pair(0.75, 1000, seed)
    theirs = mutual_info_regression(x, y[:, 0], n_neighbors=5, random_state=0)[0]
    assert mutual_information(x, y).value == pytest.approx(theirs, abs=1e-3)


def test_ksg_on_known_truth():
    one = mutual_information(*pair(0.75, 3000))
    assert one.value == pytest.approx(0.413, abs=0.05) and one.low < 0.413 < one.high and one.n == 3000
    assert one.method == "ksg" and one.bound == math.inf and one.per_seed == ()
    assert mutual_information(*normal(DENSE, 5, 2000)).value == pytest.approx(DENSE_TRUTH, abs=0.08)
    assert mutual_information(*swiss_roll(3000)).value == pytest.approx(0.413, abs=0.05)
    rng = np.random.default_rng(0)
    null = mutual_information(rng.normal(size=(2000, 3)), rng.normal(size=(2000, 2)))
    assert abs(null.value) < 0.03 and null.low < 0 < null.high + 0.03


def test_intervals_cover():
    for method, least in (("ksg", 0.8), ("gaussian", 0.85)):
        found = [mutual_information(*pair(0.6, 400, seed), method) for seed in range(30)]
        truth = -np.log(1 - 0.36) / 2
        assert np.mean([e.low <= truth <= e.high for e in found]) >= least, method
        assert np.mean([e.high - e.low for e in found]) < 0.35, method


# --- Gaussian --------------------------------------------------------------------------------------------------------


def test_gaussian_by_hand_and_unbiased_where_the_plug_in_is_not():
    x, y = pair(0.75, 50)
    r = np.corrcoef(x[:, 0], y[:, 0])[0, 1]
    bias = (special.digamma(49 / 2) - special.digamma(48 / 2)) / 2
    assert mutual_information(x, y, "gaussian").value == pytest.approx(-np.log(1 - r**2) / 2 - bias)
    found = [mutual_information(*normal(DENSE, 5, 40, seed), "gaussian").value for seed in range(400)]
    assert np.mean(found) == pytest.approx(DENSE_TRUTH, abs=3 * np.std(found) / 20)
    null = [mutual_information(*normal(np.eye(10), 5, 40, seed), "gaussian") for seed in range(200)]
    assert np.mean([e.value for e in null]) == pytest.approx(0, abs=0.04)  # the plug-in says 0.4
    assert np.mean([e.low <= 0 <= e.high for e in null]) > 0.85


@settings(max_examples=20)
@given(st.integers(0, 99))
def test_gaussian_ignores_invertible_maps_order_and_sides(seed):
    rng = np.random.default_rng(seed)
    x, y = normal(DENSE, 4, 60, seed)
    value = mutual_information(x, y, "gaussian").value
    order = rng.permutation(60)
    assert mutual_information(x @ rng.normal(size=(4, 4)) + 5, 3 * y, "gaussian").value == pytest.approx(value, abs=1e-6)
    assert mutual_information(y[order], x[order], "gaussian").value == pytest.approx(value)
    assert mutual_information(np.hstack([x, x @ np.ones((4, 1))]), y, "gaussian").value == pytest.approx(value)  # rank 4


def test_gaussian_at_its_limits():
    x, _ = pair(0.5, 30)
    with pytest.warns(UserWarning, match="infinite"):
        assert mutual_information(x, 2 - 3 * x, "gaussian").value == math.inf
    with pytest.raises(ValueError, match="8 rows for 5 \\+ 5 directions"):
        mutual_information(*normal(DENSE, 5, 8), "gaussian")


# --- by a critic -----------------------------------------------------------------------------------------------------


def test_infonce_finds_dependence_on_held_out_rows_and_none_where_there_is_none():
    x, y = pair(0.75, 900)
    state = torch.get_rng_state()
    found = mutual_information(x, np.exp(y), "infonce", batch_size=128, steps=100)
    assert torch.equal(state, torch.get_rng_state())
    assert found.value == pytest.approx(0.413, abs=0.12) and len(found.per_seed) == 3
    assert found.value == np.median(found.per_seed) and found.bound == pytest.approx(math.log(100))
    shuffled = np.random.default_rng(1).permutation(900)
    null = mutual_information(x, y[shuffled], "infonce", batch_size=128, steps=50)
    assert abs(null.value) < 0.05 and null == mutual_information(x, y[shuffled], "infonce", batch_size=128, steps=50)


@pytest.mark.parametrize("method", ["club", "nceclub"])
def test_club_meets_its_own_closed_form(method):
    x, y = pair(0.6, 1200)
    found = mutual_information(x, y, method, batch_size=128, steps=100)
    assert found.value == pytest.approx(0.36 / 0.64, abs=0.17) and found.bound == math.inf
    shuffled = np.random.default_rng(1).permutation(1200)
    assert abs(mutual_information(x, y[shuffled], method, batch_size=128, steps=50).value) < 0.06


def test_whitening_makes_a_diagonal_conditional_exact():
    x, y = (torch.from_numpy(side).float() for side in normal(DENSE, 5, 3000))
    white = module._whitened(x, y, torch.arange(3000))
    design = torch.cat([x, torch.ones(3000, 1)], 1)
    left = white - design @ torch.linalg.lstsq(design, white).solution
    torch.testing.assert_close(torch.cov(left.T), torch.eye(5), atol=2e-3, rtol=0)


def test_a_failed_fit_is_not_reported_as_zero(monkeypatch):
    x, y = pair(0.9, 600)
    with pytest.raises(RuntimeError, match="failed, not independent"):
        monkeypatch.setattr(module, "_LEARNING_RATE", 0.0)
        mutual_information(x, y, "nceclub", steps=2)
    with pytest.raises(RuntimeError, match="failed"):
        monkeypatch.setattr(module, "_LEARNING_RATE", 1e20)
        mutual_information(x, y, "infonce", steps=60)


def test_a_saturated_infonce_says_so(monkeypatch):
    x, y = pair(0.999, 600)
    monkeypatch.setattr(module, "_fit", lambda *arguments: 5.0)
    with pytest.warns(UserWarning, match=r"5.00 nats is close to the bound log\(batch\) = 5.30"):
        mutual_information(x, y, "infonce")


# --- input -----------------------------------------------------------------------------------------------------------


def test_dtypes_strides_tensors_and_constant_columns():
    x, y = normal(DENSE, 5, 300)
    value = mutual_information(x, y).value
    assert mutual_information(torch.from_numpy(x), torch.from_numpy(y)).value == value
    assert mutual_information(np.asfortranarray(x), np.stack([y, y], 2)[:, :, 0]).value == value
    assert mutual_information(torch.from_numpy(x).bfloat16(), y.astype(np.float16)).value == pytest.approx(value, abs=0.05)
    assert mutual_information(x[:, 0], y[:, 0]).value == mutual_information(x[:, :1], y[:, :1]).value
    with pytest.warns(UserWarning, match="1 constant columns of x"):
        assert mutual_information(np.hstack([x, np.ones((300, 1))]), y).value == value
    with pytest.warns(UserWarning, match="mostly noise"):
        mutual_information(np.random.default_rng(0).normal(size=(30, 28)), np.arange(90.0).reshape(30, 3) ** 2)


def test_refusals():
    x, y = pair(0.5, 100)
    with pytest.raises(ValueError, match="method is 'mine'"):
        mutual_information(x, y, "mine")
    with pytest.raises(ValueError, match="x has 100 rows, y has 99"):
        mutual_information(x, y[1:])
    with pytest.raises(ValueError, match="y is \\(100, 1\\) with 1 NaN"):
        mutual_information(x, np.where(np.arange(100)[:, None] == 3, np.nan, y))
    with pytest.raises(ValueError, match="x is constant"):
        mutual_information(np.ones(100), y)
    with pytest.raises(ValueError, match=r"x is \(2, 3, 4\)"):
        mutual_information(np.zeros((2, 3, 4)), y)
    with pytest.raises(ValueError, match="occur more than 5 times"):
        mutual_information(np.repeat(x[:10], 10, 0), np.repeat(y[:10], 10, 0))
    with pytest.raises(ValueError, match="k=5 with 20 rows"):
        mutual_information(x[:20], y[:20])
    with pytest.raises(ValueError, match="x is \\(1, 1\\)"):
        mutual_information([1.0], [2.0])
    with pytest.raises(ValueError, match="seeds=2"):
        mutual_information(x, y, "infonce", seeds=2)
    with pytest.raises(ValueError, match="50 rows for 3 disjoint"):
        mutual_information(x[:50], y[:50], "club")


#: Task of the public benchmark of Czyz et al. 2023 (benchmark-mi 0.1.3, task.sample(5000, seed=0)) -> how near InfoNCE comes
TASKS = {"multinormal-dense-5-5-0.5": 0.05, "multinormal-sparse-5-5-2-2.0": 0.1, "swissroll_x-normal_cdf-1v1-normal-0.75": 0.1}


@pytest.fixture(params=TASKS)
def task(request):
    """x, y, the truth, and that package's own value of KSG (k = 5, maximum norm, standardised columns)."""
    return request.param, np.load(Path(__file__).parent / "data" / "mi" / f"{request.param}.npz")


def test_ksg_meets_its_reference(task):
    _, data = task
    assert mutual_information(data["x"], data["y"]).value == pytest.approx(float(data["ksg"]), abs=1e-3)


@pytest.mark.slow
def test_infonce_at_its_defaults_on_known_truth(task):
    name, data = task
    assert mutual_information(data["x"], data["y"], "infonce").value == pytest.approx(float(data["truth"]), abs=TASKS[name])
