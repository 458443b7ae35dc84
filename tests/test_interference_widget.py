"""The explorer says the numbers of the diagnostics' own functions, and draws anew whatever is set."""

import numpy as np
import pandas as pd
import pytest
import torch

from umm_kit.data.shapes import Shapes
from umm_kit.diagnostics.geometry import reconstruction_residual
from umm_kit.diagnostics.spectrum import high_frequency_energy_ratio, input_matched
from umm_kit.features import extract
from umm_kit.models.masked import MaskedUMM
from umm_kit.widgets.interference import interference_explorer, measure


@pytest.fixture(scope="module")
def states():
    from umm_kit.data.language import vocabulary_corpus

    torch.manual_seed(0)
    model = MaskedUMM.tiny(list(vocabulary_corpus())).eval()
    data = Shapes("test", n=6)
    return {r: extract(model, data, pooled=False, mask_ratio=r, progress=False) for r in (0.25, 0.5)}


@pytest.fixture(scope="module")
def explorer(states):
    return interference_explorer(states)


def test_measured_is_what_the_functions_say(states):
    found, H = measure(states[0.5])[2], states[0.5].states
    u, g = H["understanding", 2], H["generation", 2]
    for options, rule in (({"variance": 0.9}, 0.9), ({"variance": 0.99}, 0.99), ({"components": 4}, 4), ({"components": 1}, 1)):
        expected = reconstruction_residual(g, u, **options)
        assert found.components(rule) == expected.components
        assert found.residual[found.components(rule)] == pytest.approx(expected.value, abs=1e-9)
    for cutoff in (0.3, 0.8):
        assert found.above("generation", cutoff) == pytest.approx(high_frequency_energy_ratio(g, (8, 8), cutoff))
        visible = high_frequency_energy_ratio(input_matched(u, states[0.5].masks, (8, 8)), (8, 8), cutoff)
        assert found.above("understanding, visible", cutoff) == pytest.approx(visible)


def test_setting_each_control_says_and_draws_something_else(explorer, states):
    assert explorer.said.value.startswith("layer 2 of 3, mask ratio 0.5: ")
    for control, value in ((explorer.layer, 1), (explorer.mask_ratio, 0.25), (explorer.rank, 8), (explorer.cutoff, 0.8)):
        said, picture = explorer.said.value, explorer.picture.value
        control.value = value
        assert explorer.said.value != said and explorer.picture.value != picture
    found = measure(states[0.25])[1]
    assert f"mask ratio 0.25: {found.residual[8]:.3f} of generation outside 8 components" in explorer.said.value
    assert f"(random: {1 - 8 / 32:.3f}); above 0.8 of Nyquist {found.above('generation', 0.8):.3f}" in explorer.said.value
    assert explorer.picture.value[:4] == b"\x89PNG"


def test_rank_rules_are_below_the_width_and_cutoffs_split_the_spectrum(explorer):
    ranks = [value for _, value in explorer.rank.options]
    assert max(ranks) < 32 and 0.99 in ranks and 1 in ranks
    assert min(explorer.cutoff.options) == 0.2 and max(explorer.cutoff.options) == 1.2  # 1/8 to sqrt(2) 7/8 on 8 x 8 tokens


def test_a_given_conflict_is_one_panel_more(states):
    rows = pd.DataFrame({"layer": [1, 2, 3], "value": [0.9, 1.0, 1.1], "low": [0.8, 0.9, 1.0], "high": [1.0, 1.1, 1.2]})
    explorer = interference_explorer({0.5: states[0.5]}, rows)
    panels = explorer.panels()
    assert len(panels) == 6 and np.allclose(panels[0].series["1 - cos (U, G)"][1], rows.value)
    assert all(panel.mark is not None for panel in panels)


def test_controls_have_the_classes_that_a_page_is_driven_by(explorer):
    for control, name in (
        (explorer.layer, "layer"),
        (explorer.mask_ratio, "mask-ratio"),
        (explorer.rank, "rank-rule"),
        (explorer.cutoff, "cut-off"),
    ):
        assert f"umm-{name}" in control._dom_classes
    assert "umm-said" in explorer.said._dom_classes and "umm-interference" in explorer.picture._dom_classes


def test_refusals(states):
    with pytest.raises(ValueError, match="no states"):
        interference_explorer({})
    pooled = states[0.5].select(states[0.5].ids)
    pooled.states = {key: H.mean(1) for key, H in pooled.states.items()}
    with pytest.raises(ValueError, match="tokens: False; expected token states"):
        measure(pooled)
