"""CKA and Procrustes against hand values, textbook float64 forms, invariances, and what must be refused."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.spatial import procrustes as scipy_procrustes

from umm_kit.diagnostics import similarity
from umm_kit.diagnostics.similarity import cka, cka_matrix, cka_matrix_minibatch, procrustes_distance, procrustes_similarity


def states(n, widths, seed=0, offset=0.0):
    """Layers that share a part of their variance."""
    draw = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 5, generator=draw)
    return [shared @ torch.randn(5, d, generator=draw) + torch.randn(n, d, generator=draw) + offset for d in widths]


def textbook(X, Y, unbiased=True):
    """Kornblith et al. 2019 and Song et al. 2012 as printed, in float64; returns (CKA, HSIC)."""
    n, one = len(X), torch.ones(len(X), dtype=torch.float64)
    K, L = ((x := side.double() - side.double().mean(0)) @ x.T for side in (X, Y))
    if unbiased:
        K, L = K.fill_diagonal_(0), L.fill_diagonal_(0)

    def hsic(K, L):
        if not unbiased:
            H = torch.eye(n, dtype=torch.float64) - 1 / n
            return torch.trace(K @ H @ L @ H) / (n - 1) ** 2
        terms = torch.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ K @ L @ one)
        return terms / (n * (n - 3))

    return float(hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()), float(hsic(K, L))


def test_cka_by_hand():
    """K of x = (1, 1, -1, -1) and L of y = (1, -1, 1, -1): off the diagonal, <K, K> = 12 and <K, L> = -4.

    Unbiased, n = 4, a = b = 1: 12 - 4 + 16/6 = 32/3 and -4 - 4 + 16/6 = -16/3. Biased: x and y are orthogonal.
    """
    x, y = torch.tensor([[1.0], [1], [-1], [-1]]), torch.tensor([[1.0], [-1], [1], [-1]])
    assert cka(x, y) == pytest.approx(-0.5, abs=1e-12)
    assert cka(x, x) == pytest.approx(1, abs=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cka(x, y, unbiased=False) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("offset", [0, 30])
@pytest.mark.parametrize(("n", "widths"), [(400, (3, 9, 6)), (40, (30, 25, 50)), (8, (300, 200, 100))])
@pytest.mark.filterwarnings("ignore:.*biased CKA tends to 1")
def test_matrix_is_the_textbook_in_both_forms(n, widths, offset, unbiased, monkeypatch):
    Xs, Ys = states(n, widths, offset=offset), states(n, widths[:2], offset=offset)
    expected = [[textbook(x, y, unbiased)[0] for y in Ys] for x in Xs]
    for gram in (True, False):
        monkeypatch.setattr(similarity, "_gram_is_cheaper", lambda *_, gram=gram: gram)
        assert cka_matrix(Xs, Ys, unbiased).numpy() == pytest.approx(np.array(expected), abs=1e-6)
        both = cka_matrix([*Xs, *Ys], unbiased=unbiased)
        assert both[: len(Xs), len(Xs) :].numpy() == pytest.approx(np.array(expected), abs=1e-6)
        assert torch.equal(both, both.T) and both.diagonal().numpy() == pytest.approx(1, abs=1e-12)


def test_one_outlying_anchor_does_not_cost_precision():
    """Its row cancels in the bias correction to a part in a million: more than float32 holds."""
    X, Y = states(60, (20, 30), offset=30)
    X[0] *= 1e3
    Y[0] *= 1e3
    assert cka(X, Y) == pytest.approx(textbook(X, Y)[0], abs=1e-6)


def test_form_is_chosen_by_operations():
    """12 x 12 layers of width d: 144 + 24 products of d^2 n against 24 half Grams of d n^2: equal near n = 14 d."""
    pairs = [(i, j) for i in range(24) for j in range(i, 24) if i == j or i < 12 <= j]
    choices = [similarity._gram_is_cheaper(n, [1024] * 24, pairs) for n in (512, 12 * 1024, 15 * 1024)]
    assert choices == [True, True, False]
    assert not similarity._gram_is_cheaper(4 * 64, [64, 64], [(0, 0), (0, 1), (1, 1)])  # one pair: 3 products, n = 3 d


def test_gram_rows_are_chunked(monkeypatch):
    """The Gram rows in memory stay within the block, all layers together: never an n x n matrix."""
    Xs, block, seen, bmm = states(600, (256, 256)), 2**19, [], torch.bmm
    monkeypatch.setattr(similarity, "_BLOCK", block)
    monkeypatch.setattr(torch, "bmm", lambda a, b: seen.append(a.untyped_storage().nbytes()) or bmm(a, b))
    assert float(cka_matrix(Xs)[0, 1]) == pytest.approx(textbook(*Xs)[0], abs=1e-6)
    assert len(seen) >= 6 and block / 2 < max(seen) <= block


def test_minibatches_accumulate_hsic():
    X, Y = states(90, (6, 8), offset=30)
    sizes = (40, 30, 20)
    parts = list(zip(X.split(sizes), Y.split(sizes), strict=True))
    hsic = [np.average([textbook(a[i], a[j])[1] for a in parts], weights=sizes) for i, j in ((0, 1), (0, 0), (1, 1))]
    expected = hsic[0] / math.sqrt(hsic[1] * hsic[2])
    across = cka_matrix_minibatch(([x], [y]) for x, y in parts)
    assert across.shape == (1, 1) and float(across) == pytest.approx(expected, abs=1e-6)
    assert float(cka_matrix_minibatch((p, None) for p in parts)[0, 1]) == pytest.approx(expected, abs=1e-6)
    assert float(cka_matrix_minibatch([([X], [Y])])) == pytest.approx(cka(X, Y), abs=1e-9)
    with pytest.raises(ValueError, match="there is no batch"):
        cka_matrix_minibatch([])
    with pytest.raises(ValueError, match=r"\(1, None\) layers after batches of \(2, None\)"):
        cka_matrix_minibatch([([X, Y], None), ([X], None)])


def test_unbiased_is_near_zero_for_independent_states_and_biased_is_not():
    draw = torch.Generator().manual_seed(1)
    pairs = torch.randn(40, 2, 20, 200, generator=draw)
    unbiased = [cka(X, Y) for X, Y in pairs]
    # 40 draws of mean 0: within 4 standard errors.
    assert abs(np.mean(unbiased)) < 4 * np.std(unbiased) / math.sqrt(40)
    with pytest.warns(UserWarning, match="20 rows of 200 features: biased CKA tends to 1"):
        assert cka(*pairs[0], unbiased=False) > 0.8


@given(st.integers(0, 2**16), st.integers(5, 40), st.integers(1, 12), st.floats(1e-6, 1e6), st.floats(-30, 30))
@settings(max_examples=40)
def test_rotation_scale_and_shift_change_nothing(seed, n, d, scale, shift):
    X, Y = (side.double() for side in states(n, (d, d + 2), seed))
    Q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    moved = scale * (X @ Q + shift)
    assert cka(moved, Y) == pytest.approx(cka(X, Y), abs=1e-7)
    assert cka(X, moved) == pytest.approx(1, abs=1e-7)
    assert -1 <= cka(X, Y) <= 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # n <= d is among the draws
        assert procrustes_similarity(moved, Y) == pytest.approx(procrustes_similarity(X, Y), abs=1e-7)
        assert procrustes_distance(X, moved) == pytest.approx(0, abs=1e-5)
        assert 0 <= procrustes_similarity(X, Y) == pytest.approx(procrustes_similarity(Y, X), abs=1e-9)


def test_procrustes_by_hand_and_against_scipy():
    x, y = torch.tensor([[1.0], [1], [-1], [-1]]), torch.tensor([[1.0], [-1], [1], [-1]])
    assert procrustes_similarity(x, torch.cat([x, y], 1)) == pytest.approx(2**-0.5)  # |x|^2 / (|x| |(x, y)|) = 4 / (2 sqrt 8)
    assert procrustes_distance(x, y) == pytest.approx(2**0.5)
    X, Y = (side.double().numpy() for side in states(50, (7, 7), offset=30))
    X0, Y0 = ((side - side.mean(0)) / np.linalg.norm(side - side.mean(0)) for side in (X, Y))
    Q, total = orthogonal_procrustes(Y0, X0)
    assert procrustes_similarity(X, Y) == pytest.approx(total, abs=1e-10)
    assert procrustes_distance(X, Y) == pytest.approx(np.linalg.norm(X0 - Y0 @ Q), abs=1e-10)
    assert scipy_procrustes(X, Y)[2] == pytest.approx(1 - procrustes_similarity(X, Y) ** 2, abs=1e-10)


def test_procrustes_is_a_metric_also_with_few_rows():
    sides = states(6, (9, 40, 4))
    with pytest.warns(UserWarning, match="6 rows of 40 features"):
        procrustes_similarity(sides[1], sides[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b, c = (procrustes_distance(sides[i], sides[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
        assert a + b >= c and a + c >= b and b + c >= a and min(a, b, c) > 0
        x, y = ((s := side.double() - side.double().mean(0)) / s.norm() for side in sides[:2])
        assert procrustes_similarity(*sides[:2]) == pytest.approx(float(torch.linalg.matrix_norm(x.T @ y, "nuc")), abs=1e-9)


@pytest.mark.parametrize("make", [lambda x: x.half(), lambda x: x.bfloat16(), lambda x: x.double().numpy()])
def test_any_float_and_layout(make):
    X, Y = states(80, (6, 9), offset=2)
    X, Y = make(X), make(Y)
    expected = textbook(*(torch.as_tensor(side) for side in (X, Y)))[0]
    assert cka(X, Y) == pytest.approx(expected, abs=1e-6)
    wide = torch.as_tensor(X).repeat_interleave(2, 1)[:, ::2]
    assert not wide.is_contiguous() and cka(wide.requires_grad_(), Y) == pytest.approx(expected, abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert cka(X, Y) == pytest.approx(expected, abs=1e-6)


def test_states_that_do_not_vary_are_undefined_and_named():
    X, Y = states(30, (4, 5))
    still = torch.full((30, 3), 0.1)  # its float mean is not 0.1: rounding must not pass for variance
    with pytest.warns(UserWarning, match=r"CKA of Ys\[1\] is undefined"):
        matrix = cka_matrix([X], [Y, still])
    assert float(matrix[0, 0]) == pytest.approx(textbook(X, Y)[0], abs=1e-6) and matrix[0, 1].isnan()
    lone = torch.zeros(30, 1)
    lone[3] = 5  # K_ij is a sum of a row and a column part: nothing is left of it
    with pytest.warns(UserWarning, match=r"CKA of Xs\[0\] is undefined"):
        assert math.isnan(cka(lone, Y))
    with pytest.warns(UserWarning, match="all rows of one side are equal"):
        assert math.isnan(procrustes_similarity(X, still))


@pytest.mark.parametrize(
    ("Xs", "Ys", "message"),
    [
        ([], None, "0 layers in Xs"),
        ([torch.zeros(9, 2)], [], "0 in Ys"),
        ([torch.zeros(9, 2, 2)], None, r"\(9, 2, 2\).*pool or flatten"),
        ([torch.zeros(9, 2, dtype=torch.long)], None, "int64"),
        ([torch.zeros(9, 2)], [torch.zeros(8, 2)], "9 rows on cpu, states 1 8"),
        ([torch.zeros(9, 2)], [torch.zeros(9, 2, device="meta")], "on meta"),
        ([torch.zeros(3, 2)], None, r"3 row\(s\); expected at least 4"),
        ([torch.tensor([[math.nan], [1], [2], [math.inf]])], None, "2 NaN or infinite"),
        ([torch.zeros(9, 0)], None, r"\(9, 0\)"),
    ],
)
def test_bad_states_are_refused(Xs, Ys, message):
    with pytest.raises(ValueError, match=message):
        cka_matrix(Xs, Ys)
    if Xs and Ys != [] and "expected at least 4" not in message:
        with pytest.raises(ValueError, match=message):
            procrustes_similarity(Xs[0], (Ys or Xs)[0])
    with pytest.raises(ValueError, match=r"1 row\(s\); expected at least 2"):
        procrustes_distance(torch.zeros(1, 3), torch.zeros(1, 3))
