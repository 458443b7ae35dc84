"""Released alignment terms and their guards against hand values, loops, finite differences, and the collapse they allow."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from umm_kit.losses import factorization
from umm_kit.losses.alignment import GUARDS, PARTS, latent_alignment, vicreg

N, D = 9, 5


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(n=N, d=D, seed=0):
    return draws(n, d, seed=seed), draws(n, d, seed=seed + 100)


# --- VICReg ------------------------------------------------------------------------------------------------------------


def test_vicreg_by_hand():
    """Columns (1, -1) and (.5, -.5): Var 2 and .5, Cov 1; the second one's deviation falls short of 1."""
    parts = vicreg(torch.tensor([[1.0, 0.5], [-1.0, -0.5]]))
    assert float(parts.variance) == pytest.approx((1 - math.sqrt(0.5001)) / 2)
    assert float(parts.covariance) == pytest.approx(2 * 1.0 / 2)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_vicreg_is_its_loops(gamma):
    z = draws(N, D) * torch.tensor([0.1, 0.5, 1, 2, 3], dtype=torch.float64)
    means = [sum(float(z[n, j]) for n in range(N)) / N for j in range(D)]
    cov = [
        [sum(float((z[n, j] - means[j]) * (z[n, k] - means[k])) for n in range(N)) / (N - 1) for k in range(D)] for j in range(D)
    ]
    parts = vicreg(z, gamma)
    assert float(parts.variance) == pytest.approx(sum(max(0, gamma - math.sqrt(cov[j][j] + 1e-4)) for j in range(D)) / D)
    assert float(parts.covariance) == pytest.approx(sum(cov[j][k] ** 2 for j in range(D) for k in range(D) if j != k) / D)


def test_vicreg_ignores_shifts_and_permutations_and_scales_as_stated():
    z = draws(N, D)
    for same in (z + 7, z.flip(0), z.flip(1), -z):
        torch.testing.assert_close(vars(vicreg(same)), vars(vicreg(z)))
    torch.testing.assert_close(vicreg(3 * z, gamma=3).covariance, 81 * vicreg(z).covariance)
    assert float(vicreg(3 * z).variance) == 0
    assert float(vicreg(draws(N, 1)).covariance) == 0


def test_covariance_of_independent_coordinates_is_what_the_docstring_says():
    n, d = 20, 30
    mean = sum(float(vicreg(draws(n, d, seed=s)).covariance) for s in range(200)) / 200
    assert mean == pytest.approx((d - 1) / (n - 1), rel=0.05)


def test_the_guard_pushes_a_narrow_map_open_but_cannot_wake_a_constant_one():
    z = (0.01 * draws(N, D)).requires_grad_()
    vicreg(z).variance.backward()
    assert float(((z - z.mean(0)) * z.grad).sum().detach()) < 0  # down the gradient is outwards
    constant = torch.ones(N, D, requires_grad=True)
    parts = vicreg(constant)
    parts.variance.backward()
    assert float(parts.variance.detach()) == pytest.approx(0.99) and not constant.grad.any()


def test_vicreg_refusals():
    for gamma in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="gamma is"):
            vicreg(draws(N, D), gamma)
    with pytest.raises(ValueError, match="one row"):
        vicreg(draws(1, D))
    for bad in (draws(N), draws(N, D, 2), torch.ones(N, D, dtype=torch.long), torch.ones(0, D)):
        with pytest.raises(ValueError, match=r"z is .*expected floats \[N, d\]"):
            vicreg(bad)
    z = draws(N, D)
    z[2, 1] = math.nan
    with pytest.raises(ValueError, match="z holds NaN"):
        vicreg(z)


# --- LatentUMM's terms -------------------------------------------------------------------------------------------------


def test_terms_by_hand():
    """Squared distances 1 + 4 over four numbers, 9 over two, 0."""
    one = torch.zeros(2, 2), torch.tensor([[1.0, 0], [0, 2]])
    parts = latent_alignment(one, (torch.zeros(1, 2), torch.tensor([[0.0, 3]])), (one[1], one[1]))
    assert (float(parts.modal), float(parts.capacity), float(parts.target)) == (1.25, 4.5, 0)
    assert float(parts.weighted(modal=2, capacity=0.1, target=5)) == pytest.approx(2 * 1.25 + 0.1 * 4.5)
    assert parts.variance is parts.covariance is parts.infonce is None


def test_terms_are_their_loops():
    sizes = {"modal": (N, D), "capacity": (4, 3), "target": (2 * N, 7)}
    given = {name: pair(*size, seed=k) for k, (name, size) in enumerate(sizes.items())}
    parts = latent_alignment(**given)
    for name, (n, d) in sizes.items():
        a, b = given[name]
        naive = sum(float(a[i, j] - b[i, j]) ** 2 for i in range(n) for j in range(d)) / (n * d)
        assert float(getattr(parts, name)) == pytest.approx(naive)


def test_guards_are_those_of_both_sides():
    a, b = pair()
    parts, sides = latent_alignment((a, b), guard="vicreg", gamma=2.0), [vicreg(z, 2.0) for z in (a, b)]
    torch.testing.assert_close(parts.variance, sides[0].variance + sides[1].variance)
    torch.testing.assert_close(parts.covariance, sides[0].covariance + sides[1].covariance)
    contrast = latent_alignment((a, b), guard="infonce", temperature=0.3)
    assert torch.equal(contrast.infonce, factorization.alignment(a, b, temperature=0.3).loss)
    assert contrast.variance is None and parts.infonce is None


def test_rotations_and_shifts_of_both_sides_change_nothing():
    (a, b), q = pair(), torch.linalg.qr(draws(D, D, seed=3)).Q
    for move in (lambda z: z @ q, lambda z: z + 5):
        torch.testing.assert_close(latent_alignment((move(a), move(b))).modal, latent_alignment((a, b)).modal)


def test_a_constant_map_is_the_minimum_of_modal_and_capacity_and_each_guard_forbids_it():
    z = torch.full((N, D), 3.0)
    for guard in GUARDS:
        parts = latent_alignment((z, z), (z, z), guard=guard)
        assert float(parts.weighted(modal=1, capacity=1)) == 0
    assert float(latent_alignment((z, z), guard="vicreg").variance) == pytest.approx(2 * 0.99)
    assert float(latent_alignment((z, z), guard="infonce").infonce) == pytest.approx(math.log(N))


def test_shrinking_lowers_the_squares_at_unchanged_geometry_and_infonce_does_not_see_it():
    a, b = pair()
    whole, small = (latent_alignment((c * a, c * b), guard="infonce") for c in (1.0, 0.1))
    torch.testing.assert_close(small.modal, 0.01 * whole.modal)
    torch.testing.assert_close(small.infonce, whole.infonce)


@pytest.mark.parametrize("guard", GUARDS)
def test_gradient_against_finite_differences(guard):
    sides = [z.requires_grad_() for z in (*pair(), *pair(4, 3, seed=1), *pair(2, 2, seed=2))]

    def loss(a, b, c, d, e, f):
        parts = latent_alignment((a, b), (c, d), (e, f), guard=guard, gamma=1.5)
        return parts.weighted(**{name: k + 1.0 for k, name in enumerate(PARTS) if getattr(parts, name) is not None})

    assert gradcheck(loss, sides)


def test_half_precision_is_summed_in_full():
    a = torch.full((2, 3), 300.0, dtype=torch.float16)
    parts = latent_alignment((a, torch.zeros_like(a)))
    assert parts.modal.dtype == torch.float32 and float(parts.modal) == 90_000  # above the largest float16


def test_one_item_needs_no_guard():
    assert float(latent_alignment((torch.ones(1, 2), torch.zeros(1, 2))).modal) == 1
    for guard in GUARDS[1:]:
        with pytest.raises(ValueError, match="expected N >= 2"):
            latent_alignment((torch.ones(1, 2), torch.zeros(1, 2)), guard=guard)


def test_refusals():
    z, bad = draws(N, D), draws(N, D)
    with pytest.raises(ValueError, match=r"guard is 'barlow'.*'vicreg'"):
        latent_alignment((z, z), guard="barlow")
    for other in (draws(N - 1, D), draws(N, D + 1), draws(1, D), z.long()):
        with pytest.raises(ValueError, match=r"capacity is .*the same shape"):
            latent_alignment((z, z), (z, other))
    with pytest.raises(ValueError, match="modal is"):
        latent_alignment((z[:0], z[:0]))
    bad[0, 0] = math.inf
    with pytest.raises(ValueError, match="target holds NaN or infinite"):
        latent_alignment((z, z), (z, z), (z, bad))
    with pytest.raises(ValueError, match="temperature is 0"):
        latent_alignment((z, z), guard="infonce", temperature=0)


def test_weights_are_checked():
    parts = latent_alignment(pair())
    assert torch.equal(parts.weighted(modal=1, target=0), parts.modal)  # a weight of 0 asks for nothing
    with pytest.raises(ValueError, match=r"weights are for \['model'\]"):
        parts.weighted(model=1)
    with pytest.raises(ValueError, match=r"\['target', 'variance'\] have a weight"):
        parts.weighted(modal=1, target=1, variance=1)
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite numbers >= 0"):
            parts.weighted(modal=bad)
    for none in ({}, {"modal": 0}):
        with pytest.raises(ValueError, match="at least one above 0"):
            parts.weighted(**none)
