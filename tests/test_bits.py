"""The probe in bits: perfect, useless and partial knowledge, the exact value for Gaussians, controls, and what is refused."""

import numpy as np
import pytest
import torch

from umm_kit.diagnostics.bits import parts_of, quantile_classes, read


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_everything_and_nothing():
    y = torch.randint(4, (400,), generator=rng())
    out = read(torch.nn.functional.one_hot(y), {"class": y, "other": torch.randint(2, (400,), generator=rng(1))}, shuffles=3)
    assert out.items.shape == (2, 100) and out.controls.shape == (2, 3)
    assert out.entropy[0] == pytest.approx(2, abs=0.1) and out.items[0].mean() > 0.95 * out.entropy[0]
    assert abs(out.items[1].mean()) < 0.1 and (out.control < 0.05).all() and (out.control >= 0).all()
    assert out.loss[0] < 0.1 < out.loss[1]


def test_two_gaussians_have_the_bits_of_their_posterior():
    n, a = 3000, 1.0
    y = torch.randint(2, (n,), generator=rng())
    x = torch.randn(n, generator=rng(1)) + a * (2 * y - 1)
    *_, test = parts_of(n)
    right = torch.sigmoid(2 * a * x * (2 * y - 1))[test]  # p(y | x) of two unit normals at -a and a
    exact = 1 + float(right.log2().mean())
    out = read(torch.stack([x, torch.randn(n, generator=rng(2))], 1), {"side": y}, shuffles=1)
    assert out.items.mean() == pytest.approx(exact, abs=0.03)
    assert np.corrcoef(out.items[0], 1 + right.log2().numpy())[0, 1] > 0.95  # item by item, in the order of the held-out rows
    np.testing.assert_allclose(out.entropy, 1, atol=0.01)


def test_it_reads_what_no_linear_map_shows():
    x = torch.randn(1000, 2, generator=rng())
    assert read(x, {"same sign": (x.prod(1) > 0).long()}, shuffles=1).items.mean() > 0.6


def test_scale_shift_and_constant_columns_change_nothing():
    x = torch.randn(200, 3, generator=rng())
    y = {"sign": (x[:, 0] > 0).long()}
    moved = torch.cat([100 + 7 * x, torch.full((200, 2), 3.0)], 1)
    # Columns that say nothing are left out, so that the nets start alike.
    np.testing.assert_allclose(read(x, y, 1).items.mean(), read(moved, y, 1).items.mean(), atol=0.02)


def test_parts_share_no_row():
    parts = parts_of(1000, seed=3)
    assert [len(p) for p in parts] == [600, 150, 250] and sorted(torch.cat(parts).tolist()) == list(range(1000))


def test_quantile_classes_by_hand():
    assert quantile_classes([3.0, 1.0, 2.0, 4.0]).tolist() == [2, 0, 1, 3]
    assert quantile_classes([1.0, 2.0, 3.0, 4.0], 2).tolist() == [0, 0, 1, 1]
    assert len(set(quantile_classes([5, 5, 5, 5, 9, 9]).tolist())) == 2  # ties stay together


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(40, 2), torch.arange(40) % 2, "40 items"),
        (torch.full((200, 2), torch.nan), torch.arange(200) % 2, "NaN"),
        (torch.zeros(200), torch.arange(200) % 2, "expected finite numbers"),
        (torch.zeros(200, 2), torch.zeros(200, dtype=torch.long), "'y' is constant"),
        (torch.zeros(200, 2), torch.arange(100) % 2, r"\(100,\).*200 integer classes"),
        (torch.zeros(200, 2), torch.rand(200), "float32.*quantile_classes"),
    ],
)
def test_refuses(x, y, message):
    with pytest.raises(ValueError, match=message):
        read(x, {"y": y})


def test_refuses_no_factor_and_bad_numbers():
    with pytest.raises(ValueError, match="no factor"):
        read(torch.randn(200, 2), {})
    with pytest.raises(ValueError, match="NaN"):
        quantile_classes([1.0, float("nan")])
