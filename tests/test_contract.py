"""One contract for every family: what is asked of all, and what ``umm-kit check`` says of a model that is broken on purpose."""

import copy
import dataclasses
import re
import types

import pytest
import torch
from families import FAMILIES, OWN, small

from umm_kit.data.shapes import Shapes
from umm_kit.features import extract
from umm_kit.models.base import Decoding, UnifiedModel, collate, example_losses, scores_of
from umm_kit.models.contract import PARTS, RULES, CheckReport, check_model
from umm_kit.models.own import DESCRIBE

pytestmark = pytest.mark.usefixtures("one_thread")

FLOWS = ("understanding_flow", "generation_flow")
LAYERS = {"masked": 3, "autoregressive": 3, "flow": 3}  # others: 4


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    model = small(request.param)
    model.family = request.param
    return model


@pytest.fixture(scope="module")
def batch():
    data = Shapes("test", n=4)
    return collate([data[i] for i in range(4)])


def generation(model, batch, seed=0, ratio=0.5, **options):
    return model.generation_flow(batch, ratio, generator=torch.Generator().manual_seed(seed), **options)


# --- every family ------------------------------------------------------------------------------------------------------


def test_the_report_is_clean(model, batch):
    report = check_model(model, batch)
    assert isinstance(model, UnifiedModel)
    if model.family == "liquid":
        assert report.tier == "diagnosable, preference-trainable" and set(report.missing) == {"generate", "same_seed"}
        assert all("no decoder" in why for why in [*report.missing.values(), report.not_asked["shown_kept"]])
    else:
        assert report.tier == "diagnosable, drivable, preference-trainable" and not report.missing
        assert set(report.not_asked) == ({"hidden_unseen"} if model.family == "flow" else set())


@pytest.mark.parametrize("flow", FLOWS)
def test_shapes(model, batch, flow):
    out = getattr(model, flow)(batch)
    n, deep, layers = out.grid[0] * out.grid[1], model.num_layers, LAYERS.get(model.family, 4)
    assert deep == layers and sorted(out.hidden_states) == list(range(layers + 1))
    assert all(states.shape == (4, n, model.hidden_size) for states in out.hidden_states.values())
    assert out.per_example_loss.shape == (4,) and out.loss.shape == ()
    if out.logits is None:
        assert out.prediction.shape == out.target.shape == (4, n, 4) and (model.family, flow) == ("flow", FLOWS[1])
    else:
        assert out.logits.shape[:2] == out.labels.shape
    assert sorted(getattr(model, flow)(batch, layers=[-1, 0]).hidden_states) == [0, layers]
    assert getattr(model, flow)(batch, layers=[]).hidden_states == {}
    with pytest.raises(ValueError, match="layers"):
        getattr(model, flow)(batch, layers=[layers + 1])
    with pytest.raises(ValueError, match="unique"):
        getattr(model, flow)({**batch, "ids": ["a"] * 4})
    with pytest.raises(ValueError, match="range"):
        getattr(model, flow)({**batch, "images": batch["images"] * 255})


@pytest.mark.parametrize("flow", FLOWS)
def test_gradients_reach_every_parameter_of_every_layer(model, batch, flow):
    loss = getattr(model, flow)(batch).loss
    for name, group in model.layer_parameters().items():
        for g in torch.autograd.grad(loss, group, retain_graph=True):
            assert g.abs().max() > 0, name
    assert list(model.layer_parameters()) == [f"block {i}" for i in range(1, model.num_layers + 1)]


@pytest.mark.parametrize("flow", FLOWS)
def test_losses_equal_a_naive_count(model, batch, flow):
    out = getattr(model, flow)(batch)
    total, n, means = 0.0, 0, []
    if out.logits is None:
        for v, target, mask in zip(out.prediction, out.target, out.mask, strict=True):
            row = [((v[j] - target[j]) ** 2).mean().item() for j in range(len(mask)) if mask[j]]
            total, n, means = total + sum(row), n + len(row), [*means, sum(row) / len(row)]
    for logits, labels in zip(out.logits, out.labels.tolist(), strict=True) if out.logits is not None else ():
        logp = logits.log_softmax(-1)
        row = [-logp[t, label].item() for t, label in enumerate(labels) if label != -100]
        total, n, means = total + sum(row), n + len(row), [*means, sum(row) / len(row)]
    assert out.loss.item() == pytest.approx(total / n, rel=1e-5)
    assert out.per_example_loss.tolist() == pytest.approx(means, rel=1e-5)
    torch.testing.assert_close(example_losses(out, scores_of(out)), out.per_example_loss)
    assert (example_losses(out, scores_of(out) + torch.arange(scores_of(out).shape[-1])) > out.per_example_loss).all()


def test_generation_is_supervised_on_hidden_tokens_alone(model, batch):
    out, n = generation(model, batch), model.grid[0] * model.grid[1]
    assert (out.mask.sum(1) == n // 2).all()
    if out.logits is not None:
        assert torch.equal(out.labels != -100, out.mask)
        assert torch.equal(out.labels[out.mask], model.image_tokenizer.encode(batch["images"])[out.mask])
    assert torch.equal(generation(model, batch).mask, out.mask) and not torch.equal(generation(model, batch, 1).mask, out.mask)


def test_understanding_is_supervised_on_the_caption(model, batch):
    labels = model.understanding_flow(batch).labels
    for row, text in zip(labels.tolist(), batch["texts"], strict=True):
        said = model.words(text, add_special_tokens=False)["input_ids"]
        assert [label for label in row if label != -100] == [*said, model.words.eos_token_id]


def test_the_image_decides_the_words(model, batch):
    other = {**batch, "images": batch["images"].flip(0)}
    assert not torch.allclose(model.understanding_flow(batch).logits, model.understanding_flow(other).logits, atol=1e-6)


@pytest.mark.parametrize("flow", FLOWS)
def test_neighbours_and_padding_change_nothing(model, batch, flow):
    more = {} if flow == FLOWS[0] else {"mask_ratio": 1.0}
    together = getattr(model, flow)(batch, **more)
    for i in range(4):
        alone = getattr(model, flow)({k: batch[k][i : i + 1] for k in ("images", "texts", "ids")}, **more)
        deep = model.num_layers
        assert torch.allclose(alone.hidden_states[deep][0], together.hidden_states[deep][i], atol=1e-5)
        assert alone.loss.item() == pytest.approx(together.per_example_loss[i].item(), rel=1e-4)


def test_an_image_before_its_text_has_a_mean_state(model, batch):
    """What text_states says of a text is what stands in the generation flow before the image, and knows no neighbour."""
    states = model.text_states(batch["texts"])
    assert all(h.shape == (4, model.hidden_size) for h in states.values())
    alone = model.text_states(batch["texts"][:1])
    for layer, h in alone.items():
        assert torch.allclose(h[0], states[layer][0], atol=1e-5)


def test_likelihoods_have_gradients_and_tell_texts_apart(model, batch):
    codes = model.image_tokenizer.encode(batch["images"])
    masks = torch.ones(2, *codes.shape[:2], dtype=torch.bool)
    a = model.image_log_prob(batch["texts"], codes=codes, masks=masks)
    b = model.image_log_prob(batch["texts"][1:] + batch["texts"][:1], codes=codes, masks=masks)
    assert a.shape == (4,) and (a < 0).all() and not torch.allclose(a, b)
    assert torch.autograd.grad(a.sum(), next(iter(model.layer_parameters().values()))[0])[0].abs().max() > 0


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("asked", [None, ["how many circles are there?", "what colour is the circle?"]])
def test_a_text_that_never_ends_can_be_drawn_and_read_again(kind, asked):
    model, images = small(kind), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        model.text_head.weight[model._special("<eos>")] = 0.0  # another word always scores more
    for temperature in (0.0, 1e-3):
        texts = model.understand(images, asked, Decoding(max_new_tokens=500, text_temperature=temperature))
        assert min(len(ids) for ids in model.words(texts)["input_ids"]) > model.config.max_text - 20
        assert model.generate(texts, decoding=Decoding(steps=1)).shape == images.shape
        batch = {"images": images, "texts": texts, "ids": ["a", "b"], "prompts": asked or [None, None]}
        assert torch.isfinite(model.understanding_flow(batch, []).loss)
        assert len(model.pack([[(DESCRIBE, text)] for text in texts])["ids"]) == 2
    assert len(model.words(model.understand(images, asked, Decoding(max_new_tokens=5))[0])["input_ids"]) == 5


@pytest.mark.parametrize("flow", FLOWS)
def test_flows_leave_the_model_as_it_was(model, batch, flow):
    before = copy.deepcopy(model.state_dict())
    assert not model.training
    getattr(model, flow)(batch)
    assert not model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    blocks = model.blocks if hasattr(model, "blocks") else model.layers
    assert not any(block._forward_hooks for block in blocks)


def test_features_stream_from_every_family(model):
    data = Shapes("test", n=5)
    features = extract(model, data, batch_size=2, progress=False)
    n = model.grid[0] * model.grid[1]
    assert features.states["understanding", 2].shape == (5, model.hidden_size) and features.masks.shape == (5, n)
    with torch.no_grad():
        out = model.understanding_flow(collate([data[3]]))
    assert torch.allclose(features.states["understanding", 2][3], out.hidden_states[2][0].mean(0), atol=1e-5)


# --- broken on purpose -------------------------------------------------------------------------------------------------


def flow_of(model, name, change):
    """The model with a flow whose output is changed: ``change(output, batch)`` gives the fields that are other."""
    whole = getattr(model, name)

    def broken(batch, *args, **kwargs):
        out = whole(batch, *args, **kwargs)
        return dataclasses.replace(out, **change(out, batch))

    setattr(model, name, broken)


def caption_before_the_image(model):
    words = lambda batch: torch.tensor([float(len(text)) for text in batch["texts"]])[:, None, None]  # noqa: E731
    flow_of(model, FLOWS[0], lambda out, b: {"hidden_states": {k: h + words(b) for k, h in out.hidden_states.items()}})


def caption_is_not_read(model):
    whole = model.generation_flow
    model.generation_flow = lambda batch, *a, **k: whole({**batch, "texts": ["a red circle"] * len(batch["texts"])}, *a, **k)


def hidden_codes_stay(model):
    whole = model._generation
    model._generation = lambda codes, mask, *a, **k: whole(codes, torch.zeros_like(mask), *a, **k)


def columns_first(model):
    turned = lambda h: h.unflatten(1, model.grid).transpose(1, 2).flatten(1, 2)  # noqa: E731
    flow_of(model, FLOWS[1], lambda out, _: {"hidden_states": {k: turned(h) for k, h in out.hidden_states.items()}})


def a_loss_is_doubled(model):
    flow_of(model, FLOWS[0], lambda out, _: {"loss": out.loss * 2})


def all_tokens_are_supervised(model):
    whole = model.generation_flow

    def broken(batch, *args, mask=None, **kwargs):
        out = whole(batch, *args, mask=torch.ones_like(mask) if mask is not None else None, **kwargs)
        return dataclasses.replace(out, mask=mask if mask is not None else out.mask)

    model.generation_flow = broken


def what_is_shown_is_supervised(model):
    whole = model.generation_flow

    def broken(batch, *args, mask=None, **kwargs):
        return dataclasses.replace(whole(batch, *args, mask=None if mask is None else ~mask, **kwargs), mask=mask)

    model.generation_flow = broken


def pictures_are_not_read(model):
    whole = model.image_tokenizer.encode
    flow_of(model, FLOWS[1], lambda out, _: {"hidden_states": {k: h * 0 + 1 for k, h in out.hidden_states.items()}})
    model.image_tokenizer.encode = whole


def a_block_gets_no_gradient(model):
    block, forward = model.blocks[1], model.blocks[1].forward
    del block
    model.blocks[1].forward = lambda *a, **k: forward(*a, **k).detach()


def masks_of_its_own(model):
    whole = model.generation_flow
    model.generation_flow = lambda batch, *a, generator=None, **k: whole(batch, *a, **k)


def noise_of_its_own(model):
    whole = model.generate
    model.generate = lambda *a, generator=None, **k: whole(*a, **k)


def all_is_drawn_again(model):
    whole = model.generate
    model.generate = lambda texts, images=None, mask=None, **k: whole(texts, **k)


BREAKAGES = {
    caption_before_the_image: ("caption_unseen", "must stand behind the image"),
    caption_is_not_read: ("caption_read", "must stand before the image"),
    hidden_codes_stay: ("hidden_unseen", "must not be in the input"),
    columns_first: ("raster_order", "must be in raster order"),
    a_loss_is_doubled: ("losses", "its logits and labels give"),
    all_tokens_are_supervised: ("losses", "expected the hidden ones"),
    what_is_shown_is_supervised: ("losses", "but others"),
    pictures_are_not_read: ("raster_order", "is it read at all"),
    a_block_gets_no_gradient: ("gradients", "no gradient in block 1"),
    masks_of_its_own: ("repeatable", "two masks"),
    noise_of_its_own: ("same_seed", "two drawings"),
    all_is_drawn_again: ("shown_kept", "were not hidden"),
}


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda f: f.__name__)
def test_each_broken_rule_is_found_and_named(batch, breakage):
    model, (rule, said) = small("masked"), BREAKAGES[breakage]
    breakage(model)
    report = check_model(model, batch)
    assert re.search(said, report.missing[rule]), report
    others = {
        "all_tokens_are_supervised": {"hidden_unseen", "raster_order", "shown_kept"},
        "what_is_shown_is_supervised": {"hidden_unseen", "raster_order"},
        "pictures_are_not_read": {"caption_read"},
    }
    assert set(report.missing) - {rule} <= others.get(breakage.__name__, set()), report
    tier = "diagnosable" if rule in RULES else "drivable"
    assert tier not in report.tier and f"fails      {rule}: ValueError: " in str(report)
    assert {*BREAKAGES} and set(RULES) <= {rule for rule, _ in BREAKAGES.values()}


@pytest.mark.parametrize(
    ("part", "wrong", "said"),
    [
        (
            FLOWS[0],
            lambda out: {"hidden_states": {k: h[:, 1:] for k, h in out.hidden_states.items()}},
            r"\(4, 63, 32\); expected",
        ),
        (FLOWS[0], lambda out: {"hidden_states": {0: out.hidden_states[0]}}, r"layers \[0\]; expected 0 to 3"),
        (FLOWS[1], lambda out: {"loss": torch.tensor(float("nan"))}, "the loss is nan"),
        ("layer_parameters", dict, r"are \{\}; expected some for each of 3"),
        ("understand", lambda images: ["one"], "1 texts for 4 examples"),
        ("generate", lambda texts, **_: torch.full((4, 3, 32, 32), 7.0), "range"),
        ("generate", lambda texts, **_: torch.zeros(1, 3, 32, 32), "1 images for 4 examples"),
        ("image_log_prob", lambda texts, images: torch.zeros(2), "2 log-probabilities for 4 examples"),
    ],
)
def test_each_wrong_part_is_found_and_named(batch, part, wrong, said):
    model = small("masked")
    if part in FLOWS:
        flow_of(model, part, lambda out, _: wrong(out))
    else:
        setattr(model, part, wrong)
    report = check_model(model, batch)
    assert re.search(said, report.missing[part]), report
    assert ("diagnosable" in report.tier) == (part not in PARTS)


def test_what_cannot_be_tried_is_said(batch):
    """All parameters are frozen: one rule is not asked, and the tier stands. Without codes of its own pixels are changed."""
    inner = small("masked").requires_grad_(False)
    names = ("embedding", "num_layers", "hidden_size", "grid", "layer_parameters", *FLOWS, "understand", "generate")
    report = check_model(types.SimpleNamespace(**{name: getattr(inner, name) for name in names}), batch)
    assert set(report.not_asked) == {"gradients"} and list(report.missing) == ["image_log_prob"]
    assert report.tier == "diagnosable, drivable" and "asks for a gradient" in str(report)


def test_check_leaves_the_model_as_it_was(batch):
    model = small("masked").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    check_model(model, batch)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_nothing_met_is_said_so(batch):
    assert CheckReport("Empty").tier == "none"
    report = check_model(object(), batch)
    assert report.tier == "none" and report.met == []


@pytest.mark.parametrize("texts", [["a"], ["a", "a"]])
def test_texts_that_cannot_be_told_apart_are_refused(batch, texts):
    few = {k: batch[k][: len(texts)] for k in ("images", "ids")}
    with pytest.raises(ValueError, match="1 different texts; expected two"):
        check_model(small("masked"), {**few, "texts": texts})
