"""Gradient conflict against planted gradients of known angle, and against autograd by hand."""

import math
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from umm_kit.data.shapes import Shapes
from umm_kit.diagnostics.gradients import GradientConflict, conflict_along, gradient_conflict, parameter_groups
from umm_kit.models.masked import MaskedUMM

D = 400


class Planted(nn.Module):
    """Two layers of D weights whose gradients are known: L = w . (direction + noise of the batch).

    The noise of a batch is one of its own for each task, or, ``shared``, the same for both.
    """

    def __init__(self, angle, noise=0.0, gain=1.0, shared=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.ParameterDict({"attention": nn.Parameter(torch.zeros(D))}) for _ in range(2))
        self.u, self.g = torch.zeros(D), torch.zeros(D)
        self.u[0] = 1.0
        self.g[0], self.g[1] = gain * math.cos(angle), gain * math.sin(angle)
        self.noise, self.shared, self.draws = noise, shared, torch.Generator().manual_seed(0)

    def layer_parameters(self):
        return OrderedDict((f"block {i}", list(layer.parameters())) for i, layer in enumerate(self.layers, start=1))

    def _flow(self, direction, batch):
        draws = torch.Generator().manual_seed(int(batch["ids"][0])) if self.shared else self.draws
        towards = direction + self.noise * torch.randn(D, generator=draws)
        return SimpleNamespace(loss=sum((layer["attention"] * towards).sum() for layer in self.layers))

    def understanding_flow(self, batch, layers=None):
        return self._flow(self.u, batch)

    def generation_flow(self, batch, mask_ratio, mask_layout, generator, layers=None):
        return self._flow(self.g, batch)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"id": str(i), "images": torch.zeros(3, 2, 2), "texts": "x"}


def measured(model, pairs=8):
    return gradient_conflict(model, Pairs(2 * pairs), batch_size=1, progress=False).estimates("block 1")


@pytest.mark.parametrize("angle, conflict", [(0.0, 0.0), (math.pi / 3, 0.5), (math.pi / 2, 1.0), (math.pi, 2.0)])
def test_conflict_of_a_planted_angle(angle, conflict):
    """Identical losses conflict by 0, opposite ones by 2, orthogonal ones by 1; without noise all corrections are idle."""
    out = measured(Planted(angle, gain=3.0))
    assert out["conflict"].value == pytest.approx(conflict, abs=1e-6)
    assert out["disattenuated_cosine"].value == pytest.approx(1 - conflict, abs=1e-6)
    assert out["negative_rate"].value == (1.0 if conflict > 1 + 1e-6 else 0.0)
    assert out["within_understanding"].value == pytest.approx(1, abs=1e-6)
    assert out["magnitude_ratio"].value == pytest.approx(3, abs=1e-6)


def test_noise_hides_a_conflict_and_the_correction_finds_it():
    """Noise of power 1 beside a signal of power 1 halves every cosine: measured .25 for a true .5."""
    out = measured(Planted(math.pi / 3, noise=D**-0.5), pairs=100)
    assert 1 - out["conflict"].value == pytest.approx(0.25, abs=0.02)
    assert out["within_understanding"].value == pytest.approx(0.5, abs=0.02)
    assert out["disattenuated_cosine"].low < 0.5 < out["disattenuated_cosine"].high
    assert out["disattenuated_cosine"].value == pytest.approx(0.5, abs=0.05)


def test_noise_that_the_tasks_share_is_no_agreement():
    """Orthogonal tasks on one batch share its noise: the measured cosine is .5, that of the noise-free gradients 0."""
    out = measured(Planted(math.pi / 2, noise=D**-0.5, shared=True), pairs=100)
    assert 1 - out["conflict"].value == pytest.approx(0.5, abs=0.02)
    assert out["disattenuated_cosine"].value == pytest.approx(0.0, abs=0.05)


def test_without_signal_the_correction_is_undefined():
    model = Planted(0.0, noise=1.0)
    model.u.zero_(), model.g.zero_()
    values = [measured(model, pairs=4)["disattenuated_cosine"] for _ in range(12)]
    undefined = [v for v in values if math.isnan(v.value)]
    assert undefined and all(math.isnan(v.low) for v in undefined)


def corrected(cross, u, g):
    """The disattenuated cosine of pairs whose products across and within tasks are given; squares are 10."""
    grams = np.stack([10 * np.eye(4) for _ in u])
    for (i, j), values in {(0, 3): cross, (1, 2): cross, (0, 2): u, (1, 3): g}.items():
        grams[:, i, j] = grams[:, j, i] = values
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return GradientConflict(grams[:, None], [("block 1", "mlp")], {}).estimates("block 1")["disattenuated_cosine"]


def test_resamples_without_signal_warn_of_nothing():
    """u sums to 0 or less in 1 of 256 resamples of (4, -1, 4, 4): few enough for an interval. Of (3, -1, -1, 1), in many."""
    few, many = corrected(4 * [1.0], [4.0, -1.0, 4.0, 4.0], 4 * [1.0]), corrected(4 * [1.0], [3.0, -1.0, -1.0, 1.0], 4 * [1.0])
    assert few.value == pytest.approx(2.75**-0.5) and few.low == pytest.approx(0.5) and few.low < few.value < few.high
    assert many.value == pytest.approx(0.5**-0.5) and math.isnan(many.low) and math.isnan(many.high)


def test_interval_of_the_correction_is_scipys_percentile_bootstrap():
    cross, u, g = np.random.default_rng(1).uniform(1, 2, size=(3, 12))
    ratio = lambda c, u, g, axis: c.mean(axis) / np.sqrt(u.mean(axis) * g.mean(axis))  # noqa: E731
    theirs = stats.bootstrap((cross, u, g), ratio, paired=True, method="percentile", n_resamples=20_000, rng=0)
    assert corrected(cross, u, g).interval == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    from umm_kit.data.language import vocabulary_corpus

    return MaskedUMM.tiny(list(vocabulary_corpus()))


def test_grams_are_inner_products_of_autograd(model):
    """Against one backward pass per task over the first two batches, parameter by parameter."""
    from umm_kit.features import batches

    data = Shapes("test", n=16)
    out = gradient_conflict(model, data, batch_size=4, seed=3, progress=False)
    draws, rows = torch.Generator().manual_seed(3), []
    for batch in list(batches(data, 4))[:2]:
        for flow in ("u", "g"):
            model.zero_grad()
            loss = (model.understanding_flow(batch) if flow == "u" else model.generation_flow(batch, generator=draws)).loss
            loss.backward()
            rows.append(torch.cat([p.grad.flatten().double() for p in model.blocks[1].parameters()]))
    model.zero_grad()
    expected = torch.stack(rows) @ torch.stack(rows).T
    assert np.allclose(out.gram("block 2")[0], expected.numpy(), rtol=1e-4)
    parts = sum(out.gram("block 2", part) for part in ("attention", "mlp", "norm"))
    assert np.allclose(parts, out.gram("block 2"))


def test_model_is_left_as_it_was(model):
    model.train()
    model.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    model.embedding.weight.grad = torch.ones_like(model.embedding.weight)
    frame = gradient_conflict(model, Shapes("test", n=16), batch_size=4, progress=False).to_frame(("all", "mlp"))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert (model.embedding.weight.grad == 1).all() and model.blocks[0].mlp[0].weight.grad is None
    assert list(frame.columns) == ["layer", "part", "metric", "value", "low", "high", "n"]
    assert len(frame) == 3 * 2 * 6 and (frame.n == 2).all()
    model.zero_grad()
    model.eval()


def test_works_without_outer_gradients_and_repeats(model):
    data = Shapes("test", n=16)
    with torch.no_grad():
        a = gradient_conflict(model, data, batch_size=4, progress=False)
    b = gradient_conflict(model, data, batch_size=4, progress=False)
    assert np.array_equal(a.grams, b.grams)


def test_frozen_and_lora_wrapped_backbones(model):
    import copy

    peft = pytest.importorskip("peft")

    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["qkv"]))
    # LoRA's B starts at zero, and then A has no gradient: give it one.
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    out = gradient_conflict(wrapped, Shapes("test", n=16), batch_size=4, progress=False)
    assert {part for _, part in out.groups} == {"attention"} and out.layers == ["block 1", "block 2", "block 3"]
    assert all(p.requires_grad for _, parameters in parameter_groups(wrapped).items() for p in parameters)
    with pytest.raises(ValueError, match="trainable"):
        gradient_conflict(copy.deepcopy(model).requires_grad_(False), Shapes("test", n=16), batch_size=4)


def test_refusals(model):
    with pytest.raises(ValueError, match="at least 128 examples"):
        gradient_conflict(model, Shapes("test", n=127))
    broken = Planted(0.0)
    broken.u[0] = float("nan")
    with pytest.raises(ValueError, match="understanding loss"):
        measured(broken)
    huge = Planted(0.0, gain=1e30)
    with pytest.raises(ValueError, match=r"gradients of \[\('block 1', 'attention'\).*too large"):
        measured(huge)
    silent = Planted(0.0)
    silent.g.zero_()
    with pytest.raises(ValueError, match="generation loss has no gradient"):
        measured(silent)
    out = gradient_conflict(Planted(0.0), Pairs(4), batch_size=1, progress=False)
    with pytest.raises(ValueError, match="no parameters 'mlp'"):
        out.gram("block 1", "mlp")


def test_along_a_training_run(model, tmp_path):
    with pytest.raises(ValueError, match="checkpoint"):
        conflict_along(tmp_path, Shapes("test", n=16))
    for step in (10, 2):
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    frame = conflict_along(tmp_path, Shapes("test", n=16), batch_size=4)
    assert frame.step.unique().tolist() == [2, 10]
    twice = [frame[frame.step == step].value.tolist() for step in (2, 10)]
    assert twice[0] == twice[1]
