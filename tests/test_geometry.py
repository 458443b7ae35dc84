"""Subspaces and effective rank against planted truth, naive references, limits, nulls, and what must be refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umm_kit.diagnostics.geometry import (
    effective_rank,
    effective_rank_increment,
    principal_angles,
    random_subspace_residual,
    reconstruction_residual,
    residual_curve,
    shuffled_ids_residual,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*(rows in|directions of U are kept):UserWarning")
seeds = st.integers(0, 10**6)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(randn(rows, columns, seed=seed)).Q


def spectrum(n, d, sigma, seed=0):
    """A matrix of known singular values."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return orthonormal(n, len(sigma), seed) * sigma @ orthonormal(d, len(sigma), seed + 1).T


def naive_rank(H):
    p = np.linalg.svd(H, compute_uv=False)
    p = p[p > 0] / p.sum()
    return np.exp(-(p * np.log(p)).sum())


def naive_feature(G, U, k):
    G, U = G - G.mean(0), U - U.mean(0)
    basis = np.linalg.svd(U, full_matrices=False)[2][:k].T
    return np.square(G - G @ basis @ basis.T).sum() / np.square(G).sum()


def planted(n=400, d=8, shared=3, seed=0):
    """U spans the first ``shared`` axes; G has half of its energy there and half outside."""
    u, g = randn(n, d, seed=seed), randn(n, d, seed=seed + 1)
    u[:, shared:] = 0
    g -= g.mean(0)
    g[:, :shared] /= g[:, :shared].norm()
    g[:, shared:] /= g[:, shared:].norm()
    return g, u


# --- effective rank ----------------------------------------------------------------------------------------------------


def test_effective_rank_by_hand():
    p = np.array([0.75, 0.25])
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(np.exp(-(p * np.log(p)).sum()), abs=1e-7)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1)
    # centring takes a common offset away: two points in each of two directions, far from the origin
    H = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]) + torch.tensor([30.0, 0])
    assert effective_rank(H, centre=True) == pytest.approx(2) and effective_rank(H) < 1.2


@pytest.mark.parametrize(
    "n, d, sigma",
    [
        (300, 40, np.linspace(1, 2, 40)),
        (300, 40, np.linspace(1, 2, 5)),  # low rank: the Gram matrix alone leaves 35 spurious values of 1e-8
        (300, 40, 10.0 ** -np.arange(12)),  # wider than eigenvalues in float64 can hold
        (20, 60, np.linspace(1, 2, 20)),
        (20, 60, [1.0]),
    ],
)
def test_effective_rank_is_exact_at_any_spectrum(n, d, sigma):
    H, p = spectrum(n, d, sigma), np.asarray(sigma) / np.sum(sigma)
    assert effective_rank(H) == pytest.approx(np.exp(-(p * np.log(p)).sum()), abs=1e-6)
    single = H.float()
    assert effective_rank(single) == pytest.approx(naive_rank(single.double().numpy()), abs=1e-6)
    assert effective_rank(H + 5, centre=True) == pytest.approx(naive_rank((H - H.mean(0)).numpy()), abs=1e-6)


@settings(max_examples=25)
@given(seeds, st.integers(2, 30), st.integers(1, 12))
def test_effective_rank_bounds_and_invariance(seed, n, d):
    H = randn(n, d, seed=seed)
    value = effective_rank(H)
    assert 1 <= value <= min(n, d)
    assert effective_rank(-7 * H @ orthonormal(d, d, seed)) == pytest.approx(value, abs=1e-9)
    assert effective_rank(H[torch.randperm(n)]) == pytest.approx(value, abs=1e-9)


@settings(max_examples=15)
@given(seeds, st.integers(1, 6), st.integers(1, 6), st.floats(0.05, 0.95))
def test_orthogonal_blocks_add_in_the_known_way(seed, a, b, weight):
    """Blocks that hold shares w, 1 - w of the sum of singular values: exp(entropy of w) ER_a^w ER_b^(1 - w); 2a if alike."""
    first, second = (s / s.sum() for s in (randn(a, seed=seed).abs() + 0.1, randn(b, seed=seed + 1).abs() + 0.1))
    block = lambda s, at: torch.nn.functional.pad(spectrum(20, len(s), s, seed), (at, 12 - at - len(s)))  # noqa: E731
    H = torch.cat([weight * block(first, 0), (1 - weight) * block(second, 6)])
    mixing = np.exp(-weight * np.log(weight) - (1 - weight) * np.log(1 - weight))
    parts = [effective_rank(torch.diag(s)) for s in (first, second)]
    assert effective_rank(H) == pytest.approx(mixing * parts[0] ** weight * parts[1] ** (1 - weight), rel=1e-9)
    alike = torch.cat([block(first, 0), block(first, 6)])
    assert effective_rank(alike) == pytest.approx(2 * parts[0], rel=1e-9)


def test_increment_of_known_blocks():
    H = randn(50, 6)
    left, right = torch.nn.functional.pad(H, (0, 6)), torch.nn.functional.pad(H, (6, 0))
    new = effective_rank_increment(right, left)
    assert new.percent == pytest.approx(100) and new.absolute == pytest.approx(new.alone) == effective_rank(H)
    for stack in ("rows", "columns"):
        assert effective_rank_increment(H, H, stack).absolute == pytest.approx(0, abs=1e-9)
    # Only columns see which row pairs with which.
    shuffled = H[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    assert effective_rank_increment(shuffled, H).absolute == pytest.approx(0, abs=1e-9)
    assert effective_rank_increment(shuffled, H, "columns").percent > 50
    both = effective_rank_increment(randn(50, 3, seed=5), H, "columns")
    assert both.absolute == pytest.approx(naive_rank(np.hstack([H, randn(50, 3, seed=5)])) - naive_rank(H), abs=1e-9)
    # Each flow by its own mean: an offset between the flows is no direction.
    assert effective_rank_increment(H + 9, H, centre=True).absolute == pytest.approx(0, abs=1e-9)
    assert effective_rank_increment(H[:1].repeat(50, 1), H).absolute < 0, "a simpler flow takes away"


# --- residual in feature space -----------------------------------------------------------------------------------------


def test_feature_residual_by_hand_and_naive():
    g, u = planted()
    result = reconstruction_residual(g, u)
    assert (result.components, result.rule, result.space) == (3, "variance 0.99", "feature")
    assert result.value == pytest.approx(0.5, abs=1e-12)
    G, U = randn(60, 9), randn(70, 9, seed=1) * torch.arange(1, 10)
    for k in (1, 4, 8):
        assert reconstruction_residual(G, U, components=k).value == pytest.approx(
            naive_feature(G.numpy(), U.numpy(), k), abs=1e-12
        )
    # variances 81, 64, ... of 285: the fewest that hold 70 % are 4 (230 of 285; 3 hold 194)
    exact = spectrum(70, 9, np.arange(1.0, 10))
    assert reconstruction_residual(G, exact, variance=0.70, centre=False).components == 4


@settings(max_examples=25)
@given(seeds, st.integers(3, 40), st.integers(2, 10), st.floats(0.1, 1))
def test_feature_residual_properties(seed, n, d, variance):
    G, U = randn(n, d, seed=seed), randn(n, d, seed=seed + 1)
    result = reconstruction_residual(G, U, variance=variance)
    assert 0 <= result.value <= 1 and 1 <= result.components <= d
    turn = orthonormal(d, d, seed)
    moved = reconstruction_residual(3 * G @ turn + 4, 0.1 * U[torch.randperm(n)] @ turn - 2, variance=variance)
    assert moved.value == pytest.approx(result.value, abs=1e-9), "blind to rotation, scale, offset and pairing"
    r = max(1, d // 2)
    low = randn(n, r, seed=seed) @ randn(r, d, seed=seed + 2)
    inside = randn(n, n, seed=seed + 3) @ low
    assert reconstruction_residual(inside, low, variance=1, centre=False).value == pytest.approx(0, abs=1e-9)


def test_curve_is_the_residual_at_every_rank():
    G, U = randn(60, 7), randn(60, 7, seed=1)
    U[:, 6] = U[:, 0]  # rank 6
    for space in ("feature", "sample"):
        curve = residual_curve(G, U, space)
        assert curve.shape == (8,) and curve[0] == 1 and curve[7] == curve[6]
        values = [reconstruction_residual(G, U, components=k, space=space).value for k in range(1, 7)]
        assert curve[1:7] == pytest.approx(values, abs=1e-12)
    assert (np.diff(residual_curve(G, U)) <= 0).all()
    with pytest.warns(UserWarning, match="7 components were asked for, 6 exist"):
        assert reconstruction_residual(G, U, components=7).components == 6


def test_tokens_are_rows_and_examples_carry_the_interval():
    G, U = randn(30, 4, 6), randn(30, 4, 6, seed=1)
    result = reconstruction_residual(G, U, components=2)
    assert result.value == pytest.approx(reconstruction_residual(G.flatten(0, 1), U.flatten(0, 1), components=2).value)
    assert result.energy.shape == (30,) and result.value == pytest.approx(result.unexplained.sum() / result.energy.sum())
    estimate = result.estimate(n_resamples=200)
    assert estimate.value == pytest.approx(result.value) and estimate.low < result.value < estimate.high and estimate.n == 30
    assert effective_rank(G) == effective_rank(G.flatten(0, 1))


def test_random_subspaces_have_the_mean_and_scatter_of_theory():
    """Mean 1 - k/d for every G; variance 2k(d-k) / (d(d-1)(d+2)) (sum_i l_i^2 - 1/d) for shares l_i of G's variance."""
    d, k, share = 6, 2, np.array([0.7, 0.1, 0.1, 0.05, 0.03, 0.02])
    G = spectrum(50, d, np.sqrt(share))
    draws = random_subspace_residual(G, k, 4000, torch.Generator().manual_seed(0), centre=False)
    sd = np.sqrt(2 * k * (d - k) / (d * (d - 1) * (d + 2)) * ((share**2).sum() - 1 / d))
    assert draws.mean() == pytest.approx(1 - k / d, abs=4 * sd / np.sqrt(4000))
    assert draws.std() == pytest.approx(sd, rel=0.05)
    again = random_subspace_residual(G, k, 3, torch.Generator().manual_seed(0), centre=False)
    assert (again == draws[:3]).all()
    _, u = planted()
    null = random_subspace_residual(u, 3, 200, torch.Generator().manual_seed(0))
    assert reconstruction_residual(u, u, components=3).value < null.min()


# --- residual in sample space ------------------------------------------------------------------------------------------


def test_sample_residual_against_a_naive_loop_and_known_noise():
    n, d = 90, 5
    U = randn(n, d)
    G = U @ randn(d, 3, seed=1) + 0.5 * randn(n, 3, seed=2) + 2
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).numpy()
    left = energy = 0.0
    for test in np.array_split(order, 5):
        train = np.setdiff1d(order, test)
        design = lambda rows: np.column_stack([np.ones(len(rows)), U[rows]])  # noqa: E731
        weights = np.linalg.lstsq(design(train), G[train].numpy(), rcond=None)[0]
        left += np.square(G[test].numpy() - design(test) @ weights).sum()
        energy += np.square((G[test] - G[train].mean(0)).numpy()).sum()
    assert reconstruction_residual(G, U, variance=1, space="sample").value == pytest.approx(left / energy, abs=1e-10)
    assert reconstruction_residual(U @ randn(d, 3) - 1, U, variance=1, space="sample").value == pytest.approx(0, abs=1e-12)


def test_sample_residual_sees_the_pairing_and_does_not_reward_overfitting():
    U, noise = randn(200, 20), randn(200, 20, seed=1)
    shuffle = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    paired = reconstruction_residual(U @ orthonormal(20, 20), U, components=20, space="sample").value
    null = shuffled_ids_residual(U, U, 20, 20, torch.Generator().manual_seed(0))
    assert paired < 1e-12 and null.min() > 1
    # of independent flows: 1 + about k / n_train, however many components; in sample it would fall to 1 - k / n
    value = reconstruction_residual(noise, U, components=20, space="sample").value
    assert 1 + 0.5 * 20 / 160 < value < 1 + 2 * 20 / 160 and null.mean() == pytest.approx(value, abs=0.05)
    direct = reconstruction_residual(U[shuffle], U, components=20, space="sample").value
    assert null.min() - 0.05 < direct < null.max() + 0.05
    one = torch.Generator().manual_seed(7)
    drawn = torch.randperm(200, generator=torch.Generator().manual_seed(7))
    again = reconstruction_residual(U[drawn], U, components=20, space="sample").value
    assert shuffled_ids_residual(U, U, 20, 1, one)[0] == pytest.approx(again, abs=1e-12)


def test_shuffled_tokens_keep_their_places():
    """What depends on the position alone survives a shuffle of examples: the null says so instead of 1."""
    place = randn(1, 5, 4)
    U, G = place + 0.01 * randn(40, 5, 4, seed=1), place + 0.01 * randn(40, 5, 4, seed=2)
    assert shuffled_ids_residual(G, U, 4, 5).max() < 0.1


# --- angles ------------------------------------------------------------------------------------------------------------


def test_planted_angles():
    theta = np.array([1e-9, 0.3, 1.2])
    basis, U = orthonormal(8, 6), randn(100, 3)
    turned = basis[:, :3] * torch.tensor(np.cos(theta)) + basis[:, 3:] * torch.tensor(np.sin(theta))
    X, Y = U @ basis[:, :3].T, randn(80, 3, seed=1) @ turned.T
    assert principal_angles(X, Y, variance=1) == pytest.approx(theta, abs=1e-12)
    assert principal_angles(X + 5, Y - 3, variance=1) == pytest.approx(theta, abs=1e-12)
    assert len(principal_angles(X, Y, components=2)) == 2 and principal_angles(X, X) == pytest.approx([0, 0, 0], abs=1e-12)
    assert principal_angles(X, torch.cat([X, Y]), variance=1) == pytest.approx([0, 0, 0], abs=1e-12)
    orthogonal = randn(80, 3, seed=1) @ basis[:, 3:].T
    assert principal_angles(X, orthogonal) == pytest.approx([np.pi / 2] * 3, abs=1e-12)
    # the residual of states isotropic in Y is the mean of sin^2
    even = orthonormal(50, 3) @ turned.T
    assert reconstruction_residual(even, X, variance=1, centre=False).value == pytest.approx((np.sin(theta) ** 2).mean())


# --- bad input ---------------------------------------------------------------------------------------------------------


def test_any_float_and_layout_gives_the_same():
    H = (randn(40, 6) * 4).round()  # exact in half precision
    G = (randn(40, 6, seed=1) * 4).round()
    rank, residual = effective_rank(H), reconstruction_residual(G, H, components=3).value
    strided = torch.zeros(6, 80, dtype=torch.float64)
    strided[:, ::2] = H.T
    for form in (H.half(), H.bfloat16(), H.float().requires_grad_(), H.numpy(), H.numpy()[::-1][::-1], strided[:, ::2].T):
        assert effective_rank(form) == pytest.approx(rank, abs=1e-9)
        assert reconstruction_residual(G, form, components=3).value == pytest.approx(residual, abs=1e-9)
    if torch.cuda.is_available():
        assert reconstruction_residual(G, H.cuda(), components=3).value == pytest.approx(residual, abs=1e-9)
        assert reconstruction_residual(G.cuda(), H, components=3, space="sample").value > 0


def test_round_off_is_not_a_direction():
    """Constant states with an offset, as pooling leaves them in float32, do not vary; low rank stays low."""
    noise = 1 + 1e-8 * torch.rand(50, 6)
    with pytest.raises(ValueError, match="does not vary"):
        effective_rank(30 * noise, centre=True)
    low = (randn(200, 3) @ randn(3, 10, seed=1)).float()
    assert reconstruction_residual(randn(200, 10, seed=2), low, variance=1).components == 3


def test_trivial_regimes_warn():
    G, U = randn(20, 30), randn(20, 30, seed=1)
    for call in (lambda: effective_rank(G), lambda: reconstruction_residual(G, U), lambda: residual_curve(G, U, "sample")):
        with pytest.warns(UserWarning, match="20 rows in 30 dimensions"):
            call()
    with pytest.warns(UserWarning, match="40 rows in 60 dimensions"):
        effective_rank_increment(randn(40, 30), randn(40, 30, seed=1), "columns")
    with pytest.warns(UserWarning, match="residual is 0 whatever G"):
        assert reconstruction_residual(randn(90, 3), randn(90, 3, seed=1), variance=1).value == pytest.approx(0, abs=1e-12)
    for space in ("feature", "sample"):
        with pytest.warns(UserWarning, match="U does not vary"):
            result = reconstruction_residual(randn(90, 3), torch.full((90, 3), 7.0), space=space)
        assert result.value == pytest.approx(1, abs=0.1) and result.components == 0


def test_refusals():
    G, U = randn(20, 4), randn(20, 4, seed=1)
    bad = G.clone()
    bad[3, 1] = torch.nan
    for call in (effective_rank, lambda h: reconstruction_residual(h, U), lambda h: residual_curve(U, h)):
        with pytest.raises(ValueError, match="1 NaN or infinite"):
            call(bad)
    for states in (G[0], G[:0], G.long(), G[None, None]):
        with pytest.raises(ValueError, match="expected floats"):
            effective_rank(states)
    with pytest.raises(ValueError, match="H does not vary"):
        effective_rank(G[:1], centre=True)
    assert effective_rank(G[:1]) == pytest.approx(1)
    for call in (reconstruction_residual, lambda g, u: effective_rank_increment(g, u, centre=True)):
        with pytest.raises(ValueError, match="does not vary"):
            call(torch.full((20, 4), 0.1), U)
    with pytest.raises(ValueError, match="widths are 4 and 3"):
        reconstruction_residual(G, U[:, :3])
    with pytest.raises(ValueError, match="same anchors"):
        reconstruction_residual(G, U[:19], space="sample")
    with pytest.raises(ValueError, match="same anchors"):
        effective_rank_increment(G, U[:19], "columns")
    with pytest.raises(ValueError, match="at least 2"):
        reconstruction_residual(randn(1, 5, 3), randn(1, 5, 3, seed=1), space="sample")
    for rule in ({"variance": 0}, {"variance": 1.5}, {"components": 0}, {"components": 5}):
        with pytest.raises(ValueError, match="1 to 4 components"):
            reconstruction_residual(G, U, **rule)
    with pytest.raises(ValueError, match="1 to 4 components"):
        random_subspace_residual(G, 5)
    with pytest.raises(ValueError, match="'feature' or 'sample'"):
        reconstruction_residual(G, U, space="token")
    with pytest.raises(ValueError, match="'rows' or 'columns'"):
        effective_rank_increment(G, U, stack="both")
