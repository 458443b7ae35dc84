"""Verdicts on planted curves: shapes that are there, upside down, drowned in noise, or shared with a null."""

import numpy as np
import pandas as pd
import pytest

from umm_kit.diagnostics.claims import CLAIMS, COLUMNS, VERDICTS, middle, shape_claims
from umm_kit.diagnostics.report import COLUMNS as FRAME
from umm_kit.diagnostics.report import Diagnosis
from umm_kit.published import load

PEAK = np.repeat([5.0, 0, 3, 1], [1, 3, 3, 3])  # layer 0, which counts nowhere; means 0, 3, 1: a peak of 2


def curve(panel, series, values, half=0.1, null=False, ratio=0.4):
    """Rows of a diagnosis; half = half-width of the intervals."""
    values = np.asarray(values, dtype=float)
    rows = [
        (panel, series, null, ratio, layer, layer / (len(values) - 1), v, v - half, v + half, 64)
        for layer, v in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=FRAME)


def verdict(*curves, **options):
    table = shape_claims(Diagnosis(pd.concat(curves, ignore_index=True), {}), **options)
    assert list(table.columns) == COLUMNS and set(table.verdict) <= set(VERDICTS)
    assert len(table) == 1
    return table.iloc[0]


def flat(panel, series, value=1.0, half=0.0, **options):
    return curve(panel, series, np.full(10, value), half, null=True, **options)


def test_a_peak_by_hand():
    """Middle 3, outer thirds 0 and 1: 3 - 1; half-widths .1 + .1; one of layer 0 would have changed all."""
    row = verdict(curve("rank", "increment", PEAK), flat("rank", "another mask draw"))
    assert (row.here, row.low, row.high) == pytest.approx((2, 1.8, 2.2))
    assert row.null == pytest.approx(0) and row.n == 64 and row.verdict == "reproduced"


def test_a_saved_diagnosis_has_the_same_verdicts(tmp_path):
    """Six layers: the thirds end at layers 2 and 4, whose depths 1/3 and 2/3 are rounded in a file."""
    values = np.repeat([5.0, 0, 3, 1], [1, 2, 2, 2])
    whole = Diagnosis(pd.concat([curve("rank", "increment", values), curve("rank", "another mask draw", 0 * values)]), {})
    whole.save(tmp_path / "whole.json")
    pd.testing.assert_frame_equal(shape_claims(Diagnosis.load(tmp_path / "whole.json")), shape_claims(whole), atol=1e-3)
    assert shape_claims(whole).here[0] == pytest.approx(2)


@pytest.mark.parametrize(
    ("values", "half", "expected"),
    [
        (PEAK, 0.1, "reproduced"),
        (-PEAK, 0.1, "not reproduced"),
        (PEAK, 1.1, "undecided"),  # 2 -+ 2.2
        (np.arange(10) ** 2.0, 0.1, "not reproduced"),  # rises, bent
        (np.sqrt(np.arange(10.0)), 0.1, "not reproduced"),  # rises, bent the other way: the middle is above the mean of the ends
        (np.ones(10), 0.1, "undecided"),
        (np.where(np.arange(10) == 5, np.nan, PEAK), 0.1, "undecided"),  # a value that is undefined
    ],
)
def test_a_peak_needs_to_top_both_ends_beyond_its_interval(values, half, expected):
    assert verdict(curve("rank", "increment", values, half), flat("rank", "another mask draw")).verdict == expected


@pytest.mark.parametrize(("sign", "expected"), [(-1, "reproduced"), (1, "not reproduced")])
def test_a_trough_is_the_mirror_image(sign, expected):
    noise = [flat("gradients", f"within_{flow}", 0.5, ratio=np.nan) for flow in ("understanding", "generation")]
    row = verdict(curve("gradients", "conflict", 1 + sign * PEAK / 10, 0.01, ratio=np.nan), *noise)
    assert row.verdict == expected and np.isnan(row.paper)
    if sign < 0:
        assert (row.here, row.low, row.high) == pytest.approx((0.2, 0.18, 0.22))


def test_a_trough_that_noise_makes_is_not_one_of_conflict():
    """Noise-free cosine 0.4 at every layer; where the gradients have more signal, 1 - cos is lower."""
    signal = 0.2 + PEAK / 10
    conflict = curve("gradients", "conflict", 1 - 0.4 * signal, 0.01, ratio=np.nan)
    noise = [curve("gradients", f"within_{f}", signal, 0.01, null=True, ratio=np.nan) for f in ("understanding", "generation")]
    assert verdict(conflict, *noise).verdict == "not reproduced"
    quiet = [flat("gradients", f"within_{f}", 0.5, ratio=np.nan) for f in ("understanding", "generation")]
    assert verdict(conflict, *quiet).verdict == "reproduced"


@pytest.mark.parametrize(
    ("share", "half", "expected"),
    [
        (1.0, 0.1, "not reproduced"),  # the null does it all
        (1.2, np.nan, "not reproduced"),  # and without an interval, too
        (0.5, 0.1, "reproduced"),  # half of it: 1 -+ .2 below 2 -+ .2
        (0.95, 0.1, "undecided"),  # nearly all: it cannot be told apart
        (0.5, 1.0, "undecided"),  # a null that is itself uncertain
        (-2.0, 0.1, "reproduced"),  # the opposite
    ],
)
def test_a_peak_that_the_null_shares_is_not_reproduced(share, half, expected):
    null = curve("residual", "another mask draw", share * PEAK, half, null=True)
    easy = flat("residual", "random subspace", half=np.nan)
    row = verdict(curve("residual", "residual", PEAK), null, easy)
    assert row.verdict == expected
    assert row.null == pytest.approx(max(2 * share, 0) if share > 0 else 0)  # the highest of the two


def test_the_spectral_gap_needs_its_nulls():
    gap, u = (
        curve("spectrum", "generation", np.full(10, 0.7), 0.05),
        curve("spectrum", "understanding", np.full(10, 0.3), 0.05, ratio=np.nan),
    )
    row = verdict(gap, u)
    assert (row.here, row.low, row.high) == pytest.approx((0.4, 0.3, 0.5)) and row.verdict == "undecided" and np.isnan(row.null)
    untrained = [flat("spectrum", "understanding, untrained", 0.3, ratio=np.nan)]
    assert verdict(gap, u, flat("spectrum", "generation, untrained", 0.4), *untrained).verdict == "reproduced"
    row = verdict(gap, u, flat("spectrum", "generation, untrained", 0.9), *untrained)
    assert row.verdict == "not reproduced" and row.null == pytest.approx(0.6)


def test_visible_positions_are_their_own_control():
    flows = [
        curve("spectrum", f"{flow}, visible", np.full(10, v), null=True)
        for flow, v in (("generation", 0.3), ("understanding", 0.6))
    ]
    row = verdict(*flows)
    assert row.here == pytest.approx(-0.3) and row.verdict == "not reproduced" and np.isnan(row.null)


def test_only_the_deeper_half_counts_in_the_gap():
    shallow = np.where(np.arange(10) <= 4, 100.0, 0.7)
    row = verdict(curve("spectrum", "generation", shallow), curve("spectrum", "understanding", np.full(10, 0.3), ratio=np.nan))
    assert row.here == pytest.approx(0.4)


def test_the_paper_by_the_same_definition():
    points = load("diva_fig2").query("panel == 'reconstruction_residual' and series == 'rate_0.6'").set_index("layer").value
    expected = points[[9.8, 12, 14.2]].mean() - max(points[[1, 3.3, 5.5, 7.6]].mean(), points[[16.4, 18.6, 20.8, 23]].mean())
    row = verdict(curve("residual", "residual", PEAK, ratio=0.55), flat("residual", "random subspace", ratio=0.55))
    assert row.paper == pytest.approx(expected)  # 0.6 is the nearest of the published mask ratios
    flows = [curve("spectrum", name, np.full(10, 0.5)) for name in ("generation", "understanding")]
    assert verdict(*flows).paper == pytest.approx(0.51, abs=0.02)


def test_the_mask_ratio_is_the_middle_one_or_that_asked_for():
    peaks = [curve("rank", "increment", share * PEAK, ratio=r) for share, r in ((1, 0.2), (2, 0.4), (3, 0.6))]
    nulls = [flat("rank", "another mask draw", ratio=r) for r in (0.2, 0.4, 0.6)]
    assert verdict(*peaks, *nulls).here == pytest.approx(4)
    assert verdict(*peaks, *nulls, mask_ratio=0.6).here == pytest.approx(6)
    with pytest.raises(ValueError, match=r"0\.3 was not diagnosed; there are \[0\.2, 0\.4, 0\.6\]"):
        verdict(*peaks, *nulls, mask_ratio=0.3)


def test_the_interval_covers_whatever_the_layers_errors_have_in_common():
    """Errors of standard deviation 1 at each layer, the same within a third: the widest spread that the contrast can have."""
    rng, depth, missed = np.random.default_rng(0), np.arange(1, 10) / 9, []
    for shared in (np.eye(3), np.ones((3, 3)) / 3**0.5, np.array([[1, 0, 0], [-1, 0, 0], [1, 0, 0]])):
        errors = (rng.normal(size=(2000, 3)) @ shared.T).repeat(3, axis=1)
        intervals = [middle(depth, (v - 1.96, v, v + 1.96)) for v in PEAK[1:] + errors]
        missed.append(np.mean([not low <= 2 <= high for low, _, high in intervals]))
    assert max(missed) <= 0.055 and missed[2] > 0.02  # opposite errors of the middle and the ends: no wider than needed


def test_refusals():
    with pytest.raises(ValueError, match="expected at least 3 layers"):
        verdict(curve("rank", "increment", [0, 1, 2]))
    with pytest.raises(ValueError, match=r"\['similarity'\]; no claim"):
        verdict(curve("similarity", "cka", PEAK))


def test_every_claim_on_a_real_diagnosis():
    import torch

    from umm_kit.data.language import vocabulary_corpus
    from umm_kit.data.shapes import Shapes
    from umm_kit.diagnostics.report import diagnose
    from umm_kit.models.masked import MaskedUMM

    torch.manual_seed(0)
    model, other = (MaskedUMM.tiny(list(vocabulary_corpus())).eval() for _ in range(2))
    found = diagnose(model, Shapes("test", n=32), untrained=other, mask_ratios=(0.4,), gradient_batch=8, progress=False)
    table = shape_claims(found)
    assert table.claim.tolist() == [claim.text for claim in CLAIMS]
    assert (
        np.isfinite(table[["here", "low", "high"]].to_numpy()).all()
        and ((table.low <= table.here) & (table.here <= table.high)).all()
    )
    assert table.null.notna().tolist() == [True, True, True, True, False]
    assert table.paper.notna().tolist() == [False, True, True, True, False]
    assert not (table.verdict == "reproduced").any()  # random weights against random weights
