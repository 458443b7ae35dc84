"""Interventions: shifts of known effect, outcomes by hand, and one run of seconds."""

import numpy as np
import pytest
import torch
from torch import nn

from umm_kit.data.language import vocabulary_corpus
from umm_kit.data.shapes import SceneObject, Shapes
from umm_kit.experiments import Ledger, intervention
from umm_kit.models.factors import Factors
from umm_kit.models.masked import MaskedUMM


class Halves(nn.Module):
    """Encoders that read the first and the last half of the channels: what each shift must be is known."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, states):
        h = states[intervention.FLOW]
        return Factors({intervention.FLOW: self.scale * h[..., :2]}, {intervention.FLOW: h[..., 2:]})


@pytest.mark.parametrize("which", ["shared", "unique"])
@pytest.mark.parametrize(("shape", "scale"), [((64, 4), 1.0), ((16, 5, 4), 1.0), ((64, 4), 0.01)])
def test_the_smallest_shift_is_in_the_half_that_moves(which, shape, scale):
    """Also where the factor hardly varies, as a trained one may."""
    h = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    others = h.roll(1, 0)
    delta, found = intervention.move(Halves(scale), h, others, which, steps=400, weight=1e-4)
    mine = slice(0, 2) if which == "shared" else slice(2, 4)
    wanted = torch.zeros_like(h)
    wanted[..., mine] = (others - h)[..., mine]
    torch.testing.assert_close(delta, wanted, atol=0.02, rtol=0.02)
    assert found["moved"] > 0.999 and found["strayed"] < 1e-3
    assert found["apart"] == pytest.approx(2 * (scale**2 if which == "shared" else 1), rel=0.3)


def test_a_heavier_weight_shortens_the_shift():
    h = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    light, heavy = (intervention.move(Halves(), h, h.roll(1, 0), "shared", 300, w)[0].norm() for w in (1e-3, 1.0))
    assert heavy < 0.8 * light


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MaskedUMM.tiny(list(vocabulary_corpus()))


def test_the_shift_is_at_image_tokens_and_gone_afterwards(model):
    data = Shapes("test", n=3, seed=0)
    batch = {"images": data.images(range(3)), "ids": ["a", "b", "c"], "texts": ["a red circle"] * 3}
    delta = torch.randn(3, 1, model.hidden_size)
    flow = lambda: model.understanding_flow(batch, layers=[1, 2]).hidden_states  # noqa: E731
    with torch.no_grad():
        before = flow()
        with intervention.shifted(model, 1, delta):
            within = flow()
        torch.testing.assert_close(within[1], before[1] + delta)
        assert float((within[2] - before[2]).abs().max()) > 0.01
        torch.testing.assert_close(flow()[2], before[2], rtol=0, atol=0)


def test_captions_follow_the_states(model):
    """A shift of nothing changes nothing, whatever the batch; a shift to another picture's states is read as that picture."""
    data = Shapes("test", n=6, seed=0)
    images, texts = data.images(range(6)), ["a red circle"] * 6
    last = model.num_layers  # at its output words no longer look at the image: there a shift cannot matter
    with torch.no_grad():
        h = model.understanding_flow({"images": images, "ids": list("abcdef"), "texts": texts}, layers=[1, last]).hidden_states
    assert intervention.captions(model, images, 1, torch.zeros(6, 1, model.hidden_size), batch_size=4) == model.understand(images)
    late = intervention.captions(model, images, last, h[last].roll(1, 0) - h[last])
    early = intervention.captions(model, images, 1, 100 * (h[1].roll(1, 0) - h[1]))
    assert late == model.understand(images) != early


@pytest.mark.parametrize("shape", [(16, 4), (16, 5, 4)])
def test_a_control_is_as_long_in_units_of_spread(shape):
    scale = torch.tensor([100.0, 1.0, 0.1, 5.0])
    h, delta, away = (torch.randn(shape, generator=torch.Generator().manual_seed(k)) * scale for k in range(3))
    spread = intervention.spread_of(h)
    found = intervention.as_long(away, delta, spread)
    for k in range(16):
        assert float((found[k] / spread).norm()) == pytest.approx(float((delta[k] / spread).norm()), rel=1e-5)
        assert float(torch.cosine_similarity(found[k].flatten(), away[k].flatten(), 0)) == pytest.approx(1, abs=1e-5)


def test_outcomes_by_hand():
    red = SceneObject("top left", "circle", "red", "large")
    blue = SceneObject("center", "circle", "blue", "large")
    found = intervention.outcomes(
        ["a large blue circle", "a large red circle and a large blue circle", "two things"],
        [[red]] * 3,
        [[blue], [blue], [red, blue]],
    )
    np.testing.assert_array_equal(found["colour"]["moved"], [1, 0, 0])
    np.testing.assert_array_equal(found["colour"]["kept"], [0, 0, 0])
    np.testing.assert_array_equal(found["count"]["moved"], [np.nan, np.nan, 1])
    assert np.isnan(found["shape"]["moved"][:2]).all() and found["shape"]["moved"][2] == 0, "both show one circle"


def records(moved_shared):
    """Three trainings; the shared shift's control moves a tenth, that of all a half, the shared shift what is planted."""
    out = {}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        draw = lambda p, rng=rng: {  # noqa: E731
            a: {"moved": [int(x) for x in rng.random(400) < p], "kept": [None, *[0] * 399]} for a in intervention.ATTRIBUTES
        }
        shares = {"none": 0.0, "shared": moved_shared, "unique": 0.1, "all": 0.9}
        shares |= {"control of shared": 0.1, "control of unique": 0.1, "control of all": 0.5}
        items = {shift: draw(p) for shift, p in shares.items()}
        shifts = {"shared": {"moved": 0.9, "strayed": 0.1, "apart": 2.0, "length": 1.0}}
        out[str(seed)] = {"encoder": "gated", "seed": seed, "layer": 5, "n": 400, "items": items, "shifts": shifts}
    return out


@pytest.mark.parametrize(("moved", "said"), [(0.4, "yes"), (0.1, "no")])
def test_verdicts_follow_the_rule(moved, said):
    found = intervention.verdicts(intervention.effects(records(moved))).set_index(["shift", "attribute"])
    row = found.loc[("shared", "colour")]
    assert row.verdict == said and row.moved_over_control == pytest.approx(moved - 0.1, abs=0.04)
    row = found.loc[("all", "size")]
    assert row.verdict == "yes" and row.moved_over_control == pytest.approx(0.4, abs=0.04), "each beside its own control"
    assert "moved 0.90, strayed 0.10" in intervention.summary(records(moved))


def test_audits_are_counted_over_trainings():
    lines = {"columns": ["flow", "factor", "kind", "z", "r", "low", "high", "wanted", "verdict"]}
    out = {}
    for seed, (r, low) in enumerate([(0.9, 0.1), (0.6, -0.1)]):
        said = "pass" if r >= 0.8 else "fail"
        shown = lines | {"data": [["understanding", "colour", "shared", "shared", r, r, r, ">= 0.8", said]]}
        rivals = {"columns": ["method", "separation", "ahead", "low", "high"]}
        rivals |= {"data": [["encoders", 0.5, None, None, None], ["cca", 0.3, 0.2 - seed * 0.2, low, 0.4]]}
        out[str(seed)] = {"encoder": "gated", "audit": {"lines": shown, "rivals": rivals}}
    found = intervention.audits(out).set_index("asked")
    row = found.loc["shared in shared"]
    assert row.found == pytest.approx(0.75) and (row.passed, row.of) == (1, 2)
    row = found.loc["ahead of cca"]
    assert row.found == pytest.approx(0.1) and (row.passed, row.of) == (1, 2)
    assert not len(intervention.audits({"t": {"encoder": "transformer"}}))


@pytest.mark.slow
def test_a_run_of_seconds(tmp_path, model, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    small = intervention.Preset(
        model=str(tmp_path / "model"), encoders=("transformer", "gated"), seeds=(0,), n=12, steps=3, n_audit=100,
        settings={"stage1_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True, "stage1_warmup_steps": 1},
    )  # fmt: skip
    said = intervention.run(small, tmp_path / "r.jsonl", tmp_path / "runs")
    records = Ledger(tmp_path / "r.jsonl").records()
    assert len(records) == 2 and "strayed" in said
    found = records["gated encoder, seed 0"]["audit"]
    assert "shuffled pairs" in str(found["rivals"]) and not found["passed"]
    assert "audit" not in records["transformer encoder, seed 0"], "an audit pools states, and these encoders read tokens"
    for record in records.values():
        for shift, control in intervention.CONTROLS.items():
            lengths = [record["shifts"][name]["length"] for name in (shift, control)]
            assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)
    assert intervention.run(small, tmp_path / "r.jsonl", tmp_path / "runs") == said
