"""Spatial spectra against hand values, scipy in the space domain, planted waves, and the mask-token artefact."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import fft

from umm_kit.diagnostics import spectrum
from umm_kit.diagnostics.spectrum import high_frequency_energy_ratio, input_matched, radial_spectrum, token_spectrum
from umm_kit.models.base import draw_mask


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_ratio(x, cutoff, transform):
    """One channel [rows, columns]: take the low frequencies out, go back to the image, compare energies there."""
    x = x - x.mean()
    forward, back = (fft.dctn, fft.idctn) if transform == "dct" else (fft.fft2, fft.ifft2)
    coefficients = forward(x, norm="ortho")
    for i, j in np.ndindex(*x.shape):
        f = [k / m if transform == "dct" else 2 * min(k, m - k) / m for k, m in zip((i, j), x.shape, strict=True)]
        if math.hypot(*f) <= cutoff:
            coefficients[i, j] = 0
    return (abs(back(coefficients, norm="ortho")) ** 2).sum(), (x**2).sum()


def test_by_hand():
    """(3, 1, -1, -3) on a line: orthonormal DCT coefficients at 1/4, 2/4, 3/4 with shares by the formula."""
    x = [3.0, 1, -1, -3]
    by_hand = [sum(v * math.cos(math.pi * (2 * i + 1) * k / 8) for i, v in enumerate(x)) ** 2 / 2 / 20 for k in (1, 2, 3)]
    found = token_spectrum(torch.tensor(x)[:, None], (1, 4))
    assert found.frequency.tolist() == [0.25, 0.5, 0.75] and found.energy.tolist() == pytest.approx([20])
    assert found.share[0].tolist() == pytest.approx(by_hand) and by_hand[1] == pytest.approx(0)
    assert high_frequency_energy_ratio(torch.tensor(x)[:, None], (1, 4), cutoff=0.5) == pytest.approx(by_hand[2])
    # A checkerboard on 2 x 2 has its energy at (1/2, 1/2) in the cosine, at (1, 1) in the Fourier transform.
    checkers = torch.tensor([1.0, -1, -1, 1])[:, None]
    assert high_frequency_energy_ratio(checkers, (2, 2), cutoff=0.7) == pytest.approx(1)
    assert high_frequency_energy_ratio(checkers, (2, 2), cutoff=1.4, transform="dft") == pytest.approx(1)


@pytest.mark.parametrize("transform", ["dct", "dft"])
@pytest.mark.parametrize("grid", [(6, 6), (5, 8), (1, 9), (7, 1)])
@pytest.mark.parametrize("cutoff", [0.4, 0.5, 0.8])
def test_energy_is_that_of_the_filtered_image(grid, transform, cutoff):
    H = noise(3, math.prod(grid), 4) + 30
    found = token_spectrum(H, grid, transform)
    pairs = np.array([[naive_ratio(c.reshape(grid), cutoff, transform) for c in h.T] for h in H.double().numpy()])
    assert found.energy.tolist() == pytest.approx(pairs[:, :, 1].sum(1))  # Parseval
    assert found.above(cutoff).tolist() == pytest.approx(pairs[:, :, 0].sum(1) / pairs[:, :, 1].sum(1))
    assert high_frequency_energy_ratio(H, grid, cutoff, transform) == pytest.approx(float(found.above(cutoff).mean()))
    alike = high_frequency_energy_ratio(H, grid, cutoff, transform, average="channel")
    assert alike == pytest.approx((pairs[:, :, 0] / pairs[:, :, 1]).mean())


@pytest.mark.filterwarnings("ignore:none of the grid's frequencies")  # above the last corner
def test_planted_waves_lie_in_their_ring():
    grid, y, x = (8, 12), torch.arange(8.0), torch.arange(12.0)
    for k, l in ((1, 0), (0, 5), (3, 4), (7, 11)):  # noqa: E741
        wave = torch.outer(torch.cos(math.pi * (y + 0.5) * k / 8), torch.cos(math.pi * (x + 0.5) * l / 12)).reshape(-1, 1)
        f = math.hypot(k / 8, l / 12)
        low, high = (high_frequency_energy_ratio(wave, grid, cutoff) for cutoff in (f - 0.01, f + 0.01))
        assert low == pytest.approx(1) and high == pytest.approx(0, abs=1e-12)
        frequency, share, _ = radial_spectrum(wave, grid)
        assert len(frequency) == 12 and float(share.sum()) == pytest.approx(1)
        assert abs(float(frequency[share[0].argmax()]) - f) <= 2**0.5 / 24
    period = torch.cos(2 * math.pi * 3 * x / 12)[:, None]  # three periods: 3 / 6 of Nyquist, and not above it
    assert high_frequency_energy_ratio(period, (1, 12), 0.49, "dft") == pytest.approx(1)
    assert high_frequency_energy_ratio(period, (1, 12), 0.5, "dft") == pytest.approx(0, abs=1e-12)


def test_white_noise_has_the_share_of_frequencies():
    H = noise(200, 48, 16)
    for transform in ("dct", "dft"):
        found = token_spectrum(H, (6, 8), transform)
        assert float(found.above(0.6).mean()) == pytest.approx(found.white(0.6), abs=0.005)  # 3 standard errors
        _, share, white = found.radial(5)
        assert share.mean(0).tolist() == pytest.approx(white.tolist(), abs=0.005) and float(white.sum()) == pytest.approx(1)


def test_a_shared_vector_counts_only_if_asked():
    H = noise(2, 36, 5)
    moved = H + 30
    assert high_frequency_energy_ratio(moved, (6, 6)) == pytest.approx(high_frequency_energy_ratio(H, (6, 6)), abs=1e-5)
    kept = token_spectrum(moved, (6, 6), remove_mean=False)
    x = moved.double()
    assert kept.share[:, 0].tolist() == pytest.approx((36 * x.mean(1).square().sum(1) / x.square().sum((1, 2))).tolist())
    assert kept.energy.tolist() == pytest.approx(x.square().sum((1, 2)).tolist())
    assert float(kept.above(0.5).mean()) < 0.01


@given(st.integers(0, 2**16), st.integers(1, 7), st.integers(2, 7), st.sampled_from(["dct", "dft"]), st.floats(0.01, 1.41))
@settings(max_examples=40)
@pytest.mark.filterwarnings("ignore:(none|each) of the grid's frequencies")
def test_ratio_is_a_share_blind_to_rotation_and_scale(seed, rows, columns, transform, cutoff):
    H = noise(2, rows * columns, 4, seed=seed).double()
    found = token_spectrum(H, (rows, columns), transform)
    assert found.share.sum(1).tolist() == pytest.approx([1, 1])
    assert found.energy.tolist() == pytest.approx((H - H.mean(1, keepdim=True)).square().sum((1, 2)).tolist())
    ratio = found.above(cutoff)
    assert bool((ratio >= 0).all()) and bool((ratio <= 1).all())
    assert bool((ratio <= found.above(cutoff / 2) + 1e-12).all())
    Q = torch.linalg.qr(noise(4, 4, seed=seed + 1).double()).Q
    assert token_spectrum(1e3 * H @ Q, (rows, columns), transform).above(cutoff).tolist() == pytest.approx(ratio.tolist())
    transposed = H.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)
    assert token_spectrum(transposed, (columns, rows), transform).above(cutoff).tolist() == pytest.approx(ratio.tolist())


def smooth(n, grid, d):
    """Maps of three low cosine waves."""
    y, x = (torch.cos(math.pi * (torch.arange(m) + 0.5) / m) for m in grid)
    waves = torch.stack([y[:, None].expand(grid), x.expand(grid), torch.outer(y, x)]).flatten(1)
    return torch.einsum("bdk,kn->bnd", noise(n, d, 3), waves)


def test_mask_tokens_raise_the_naive_ratio_and_not_the_matched_one():
    grid, draw = (8, 8), torch.Generator().manual_seed(0)
    U, mask = smooth(16, grid, 12), draw_mask(16, grid, 0.4, generator=draw)
    G = torch.where(mask[..., None], 2 + 0.5 * noise(16, 64, 12, seed=1), U)  # a mask embedding and what the layer adds
    naive = [high_frequency_energy_ratio(H, grid) for H in (U, G)]
    matched = [high_frequency_energy_ratio(input_matched(H, mask, grid), grid) for H in (U, G)]
    assert naive[0] < 0.001 and naive[1] > 0.3
    assert matched[1] == pytest.approx(matched[0], abs=1e-12) and matched[0] < 0.05
    # It still sees what the flows do to the visible tokens, and only that; the masked ones are seen from the other side.
    checkers = (torch.arange(8)[:, None] + torch.arange(8)).flatten() % 2 * 2.0 - 1
    rough = torch.where(mask[..., None], G, U + checkers[:, None])
    assert high_frequency_energy_ratio(input_matched(rough, mask, grid), grid) > matched[0] + 0.2
    apart = [high_frequency_energy_ratio(input_matched(H, mask, grid, keep="masked"), grid) for H in (U, G, rough)]
    assert apart[0] < 0.1 < apart[1] == pytest.approx(apart[2], abs=1e-12)


def test_filling_is_harmonic_exact_and_linear():
    grid, mask = (5, 7), draw_mask(3, (5, 7), 0.5, generator=torch.Generator().manual_seed(1))
    H = noise(3, 35, 2).double()
    filled = input_matched(H, mask, grid)
    assert torch.equal(filled[~mask], H[~mask])
    for b, i in mask.nonzero().tolist():
        r, c = divmod(i, 7)
        near = [7 * y + x for y, x in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)) if 0 <= y < 5 and 0 <= x < 7]
        assert filled[b, i].tolist() == pytest.approx(filled[b, near].mean(0).tolist())
    ramp = torch.arange(9.0)[:, None]
    inner = torch.tensor([False, True, True, False, True, True, True, True, False])
    assert input_matched(ramp, inner, (1, 9)).flatten().tolist() == pytest.approx(ramp.flatten().tolist())
    none = torch.zeros(3, 35, dtype=torch.bool)
    assert torch.equal(input_matched(H, none, grid), H)
    # It smooths: white noise is no longer white, which is why levels compare under one mask only.
    white = noise(50, 64, 8)
    half = input_matched(white, draw_mask(50, (8, 8), 0.5), (8, 8))
    assert high_frequency_energy_ratio(half, (8, 8)) < high_frequency_energy_ratio(white, (8, 8)) - 0.1


@pytest.mark.parametrize("make", [lambda x: x.half(), lambda x: x.bfloat16(), lambda x: x.numpy(), lambda x: x.double()])
def test_any_float_layout_and_chunk(make, monkeypatch):
    H = make(noise(5, 36, 6))
    mask = draw_mask(5, (6, 6), 0.3, generator=torch.Generator().manual_seed(0))
    plain, filled = torch.as_tensor(H).double(), input_matched(H, mask, (6, 6))
    expected = token_spectrum(plain, (6, 6)).share
    monkeypatch.setattr(spectrum, "_CHUNK", 36 * 36 * 2)  # two examples at once
    wide = torch.as_tensor(H).repeat_interleave(2, 2)[:, :, ::2].requires_grad_()
    turned = torch.as_tensor(H).transpose(0, 2).contiguous().transpose(0, 2)
    assert not wide.is_contiguous() and not turned.is_contiguous()
    for states in (H, wide, turned):
        assert torch.allclose(token_spectrum(states, (6, 6)).share, expected, atol=1e-12)
        assert torch.allclose(input_matched(states, mask, (6, 6)), filled, atol=1e-12)
    alone = input_matched(H[2], mask[2], (6, 6))
    assert alone.shape == (36, 6) and torch.allclose(alone, filled[2], atol=1e-12)


def test_trivial_regimes_warn():
    H = noise(3, 16, 2)
    H[1] = 0.1  # its mean is not 0.1 to the last bit
    H[0, :, 1] = 0.1
    with pytest.warns(UserWarning, match="1 of 3 maps are constant"):
        found = token_spectrum(H, (4, 4))
    assert found.share.isnan().any(1).tolist() == [False, True, False] and found.energy[1] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rest = high_frequency_energy_ratio(H[[0, 2]], (4, 4))
        assert high_frequency_energy_ratio(H, (4, 4)) == pytest.approx(rest)
        assert math.isnan(high_frequency_energy_ratio(H[1], (4, 4)))
        first = high_frequency_energy_ratio(H[0, :, :1], (4, 4))
        assert high_frequency_energy_ratio(H[0], (4, 4), average="channel") == pytest.approx(first)  # dead channel left out
    with pytest.warns(UserWarning, match=r"none of the grid's frequencies lies above 0\.8"):
        assert high_frequency_energy_ratio(H[0, :2], (1, 2), 0.8) == 0
    with pytest.warns(UserWarning, match=r"each of the grid's frequencies lies above 0\.1"):
        assert high_frequency_energy_ratio(H[0], (4, 4), 0.1) == pytest.approx(1)


@pytest.mark.parametrize(
    ("H", "grid", "options", "message"),
    [
        (torch.zeros(2, 15, 3), (4, 4), {}, r"\(2, 15, 3\).*4 x 4.*N = 16"),
        (torch.zeros(16), (4, 4), {}, "pooled states have no spectrum"),
        (torch.zeros(0, 16, 3), (4, 4), {}, r"\(0, 16, 3\)"),
        (torch.zeros(16, 3, dtype=torch.long), (4, 4), {}, "int64"),
        (torch.full((16, 3), math.nan), (4, 4), {}, "48 NaN"),
        (torch.zeros(2, 1, 3), (1, 1), {}, "one token"),
        (torch.zeros(16, 3), (-4, -4), {}, r"\(-4, -4\)"),
        (torch.zeros(16, 3), (4, 4, 1), {}, r"\(rows, columns\)"),
        (torch.eye(16), (4, 4), {"cutoff": 1.5}, r"1\.5.*Nyquist"),
        (torch.eye(16), (4, 4), {"cutoff": math.nan}, "nan"),
        (torch.eye(16), (4, 4), {"transform": "wavelet"}, "wavelet"),
        (torch.eye(16), (4, 4), {"average": "mean"}, "average='mean'"),
    ],
)
def test_bad_states_are_refused(H, grid, options, message):
    with pytest.raises(ValueError, match=message):
        high_frequency_energy_ratio(H, grid, **options)


def test_bad_masks_and_bins_are_refused():
    H, mask = noise(2, 16, 3), torch.ones(2, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"2 examples have no visible position, the first at \[0, 1\]"):
        input_matched(H, mask, (4, 4))
    with pytest.raises(ValueError, match="1 examples have no masked position"):
        input_matched(H, torch.stack([mask[0], ~mask[0]]), (4, 4), keep="masked")
    for bad in (mask.float(), mask[0], mask[:, :9]):
        with pytest.raises(ValueError, match=r"expected bool \(2, 16\)"):
            input_matched(H, bad, (4, 4))
    with pytest.raises(ValueError, match="keep='hidden'"):
        input_matched(H, mask, (4, 4), keep="hidden")
    with pytest.raises(ValueError, match="bins is 0"):
        radial_spectrum(H, (4, 4), bins=0)
