"""The diagnosis as a whole: on a tiny model, and on one whose two flows are the same."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from umm_kit import plots
from umm_kit.data.shapes import Shapes
from umm_kit.diagnostics.report import COLUMNS, PANELS, Diagnosis, diagnose, jackknife
from umm_kit.models.masked import MaskedUMM

OPTIONS = dict(mask_ratios=(0.25, 0.5), batch_size=16, gradient_batch=8, progress=False)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    from umm_kit.data.language import vocabulary_corpus

    return MaskedUMM.tiny(list(vocabulary_corpus()))


@pytest.fixture(scope="module")
def found(model):
    return diagnose(model, Shapes("test", n=48), **OPTIONS)


def test_every_panel_at_every_layer(found, model):
    frame = found.to_frame()
    assert list(frame.columns) == COLUMNS and list(frame.panel.unique()) == list(PANELS)
    assert sorted(found.series("gradients", "conflict").layer) == [1, 2, 3]
    for panel, series in (("residual", "residual"), ("rank", "increment"), ("similarity", "cka"), ("spectrum", "generation")):
        rows = found.series(panel, series, mask_ratio=0.5)
        assert rows.layer.tolist() == [0, 1, 2, 3] and rows.depth.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
        assert (rows.low <= rows.value).all() and (rows.value <= rows.high).all()
    assert (found.series("residual", "random subspace").value >= 0).all()
    with pytest.raises(ValueError, match="no series 'x'"):
        found.series("rank", "x")


def test_panels_agree_with_their_functions(found, model):
    """The streamed pass against the states of one flow call, layer 2, mask ratio 0.5."""
    from umm_kit.diagnostics.geometry import reconstruction_residual
    from umm_kit.features import extract

    u = extract(model, Shapes("test", n=48), progress=False, mask_ratio=0.5, seed=0)
    expected = reconstruction_residual(u.states["generation", 2], u.states["understanding", 2]).value
    row = found.series("residual", "residual", 0.5).query("layer == 2")
    assert float(row.value.iloc[0]) == pytest.approx(expected, rel=1e-4)


def test_the_batch_size_changes_nothing(found, model):
    chosen = {**OPTIONS, "batch_size": 7, "panels": ["residual", "spectrum"]}
    other = diagnose(model, Shapes("test", n=48), **chosen)
    mine = found.frame[found.frame.panel.isin(["residual", "spectrum"])].reset_index(drop=True)
    assert np.allclose(mine.value, other.frame.value, rtol=1e-3, atol=1e-5)


def test_one_flow_twice_has_nothing_apart(model):
    """A model whose generation flow is its understanding flow: CKA 1, no increment, residual within the 1 % left out."""

    class Twice(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.num_layers, self.hidden_size, self.grid = inner, inner.num_layers, inner.hidden_size, inner.grid

        def understanding_flow(self, batch, layers=None):
            return self.inner.understanding_flow(batch, layers)

        def generation_flow(self, batch, *_, layers=None, **__):
            return self.inner.understanding_flow(batch, layers)

    found = diagnose(Twice(model), Shapes("test", n=48), panels=["residual", "rank", "similarity"], **OPTIONS)
    assert found.series("similarity", "cka").value.min() > 1 - 1e-6
    assert found.series("rank", "increment").value.abs().max() < 1e-6
    assert found.series("residual", "residual").value.max() < 0.0101
    assert "CKA of the two flows" in found.summary() and "do not tell these apart" in found.summary()


def test_an_untrained_model_is_a_null(model):
    other = MaskedUMM(copy.deepcopy(model.config), model.text_tokenizer).eval()
    data, options = Shapes("test", n=32), {**OPTIONS, "mask_ratios": (0.5,)}
    found = diagnose(model, data, untrained=other, **options)
    twins = found.frame[found.frame.series.str.endswith(", untrained")]
    mine, theirs = found.frame.drop(twins.index), diagnose(other, data, **options)
    never = {"random subspace", "another mask draw", "shuffled ids", "white noise"}
    assert {name.removesuffix(", untrained") for name in twins.series} == set(mine.series) - never and twins.null.all()
    for panel, name in (("residual", "residual"), ("spectrum", "generation, visible"), ("gradients", "within_understanding")):
        twin, alone = found.series(panel, f"{name}, untrained"), theirs.series(panel, name)
        assert np.allclose(twin.value, alone.value) and len(twin) == len(found.series(panel, name))
    assert "what 'residual, untrained' gives" in found.summary() and found.record["untrained"]
    drawn = [line.get_label() for line in plots.diagnosis(found.frame).axes[0].get_lines()]
    assert drawn == ["conflict", "conflict, untrained"], "only the curves of a panel have a null there"


def test_frozen_layers_keep_their_numbers(model):
    partly = copy.deepcopy(model)
    partly.blocks[0].requires_grad_(False)
    found = diagnose(partly, Shapes("test", n=32), panels=["gradients"], **OPTIONS)
    assert found.series("gradients", "conflict").layer.tolist() == [2, 3]


def test_the_summary_says_what_is_not_known():
    ends = {"disattenuated_cosine": [(-0.9, -0.1), (0.1, 0.9), (np.nan, np.nan), (-0.2, 0.3)], "conflict": [(np.nan, np.nan)] * 4}
    rows = [
        ("gradients", name, False, np.nan, layer, layer / 4, (low + high) / 2, low, high, 8)
        for name, bounds in ends.items()
        for layer, (low, high) in enumerate(bounds, start=1)
    ]
    said = Diagnosis(pd.DataFrame(rows, columns=COLUMNS), {}).summary()
    assert "below 0 at 1 and above 0 at 1 of 4 layers" in said and "at 1 too little" in said
    assert "(1 is orthogonal) is undefined at every layer" in said


def test_a_cut_off_above_all_frequencies_is_told(model):
    with pytest.warns(UserWarning, match="always 0"):
        diagnose(model, Shapes("test", n=32), panels=["spectrum"], cutoff=1.4, **OPTIONS)


def test_saved_and_read_back(found, tmp_path):
    found.save(tmp_path / "a" / "diagnosis.json")
    again = Diagnosis.load(tmp_path / "a" / "diagnosis.json")
    assert again.record == json.loads(json.dumps(found.record)) and again.summary() == found.summary()
    assert np.allclose(again.frame.value, found.frame.value, equal_nan=True)


def test_the_figure_has_its_panels(found):
    figure = found.plot()
    assert [ax.get_title() for ax in figure.axes][:2] == ["gradient conflict", "residual of G outside U"]
    labels = {text.get_text() for ax in figure.axes for text in ax.get_legend().get_texts()}
    assert "random subspace" in labels and any("by eye" in label for label in labels)
    conflict = figure.axes[0].get_legend().get_texts()
    assert not any("DIVA" in text.get_text() for text in conflict)  # the paper gives that axis no formula


def test_jackknife_of_a_mean_is_the_t_interval():
    """With one item per group the jackknife of a mean is s / sqrt(n), exactly."""
    values = torch.tensor([1.0, 4.0, 2.0, 7.0])
    e = jackknife(lambda k: float(values[k].mean()), 4, groups=4)
    half = 3.182446305284263 * float(values.std()) / 2
    assert (e.value, e.low, e.high) == pytest.approx((3.5, 3.5 - half, 3.5 + half))


def test_refusals(model):
    data = Shapes("test", n=48)
    with pytest.raises(ValueError, match="panels"):
        diagnose(model, data, panels=["colour"])
    with pytest.raises(ValueError, match="panels"):
        diagnose(model, data, panels=[])
    with pytest.raises(ValueError, match="at least 16"):
        diagnose(model, Shapes("test", n=8))
    with pytest.raises(ValueError, match="mask ratios"):
        diagnose(model, data, mask_ratios=(0.0,))
    with pytest.raises(ValueError, match="different numbers"):
        diagnose(model, data, mask_ratios=(0.4, 0.4))
    with pytest.raises(ValueError, match="the untrained model has 2 layers"):
        diagnose(model, data, untrained=SimpleNamespace(num_layers=2, hidden_size=model.hidden_size))


def test_from_the_command_line(model, tmp_path, capsys):
    from umm_kit.cli import main

    model.save_pretrained(tmp_path / "model")
    chosen = ["--n", "32", "--panels", "rank", "similarity", "--mask-ratios", "0.5"]
    outputs = ["--output", str(tmp_path / "d.json"), "--figure", str(tmp_path / "new/d.png")]
    assert main(["diagnose", str(tmp_path / "model"), *chosen, *outputs]) == 0
    said = capsys.readouterr().out
    assert "CKA of the two flows, mask ratio 0.5," in said and "seconds on" in said
    again = Diagnosis.load(tmp_path / "d.json")
    assert list(again.frame.panel.unique()) == ["rank", "similarity"] and again.record["n"] == 32
    assert again.record["command"].startswith("umm-kit diagnose")
    assert (tmp_path / "new/d.png").read_bytes()[:4] == b"\x89PNG"
