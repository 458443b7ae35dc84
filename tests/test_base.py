"""The contract itself: what a batch is, what a layer is, and what is said about a model that falls short."""

import math

import pytest
import torch

from umm_kit.data.shapes import Shapes
from umm_kit.models.base import (
    CheckReport,
    Decoding,
    FlowOutput,
    UnifiedModel,
    as_layers,
    check_batch,
    check_images,
    check_model,
    collate,
    draw_mask,
    resolve_device,
    resolve_dtype,
    token_losses,
)


@pytest.fixture
def batch():
    data = Shapes("test", n=3)
    return collate([data[i] for i in range(3)])


class Stub(torch.nn.Module):
    """The smallest thing that meets the contract; each test breaks one part of it."""

    num_layers, hidden_size, grid = 2, 5, (2, 3)

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(4, 5)
        self.loss, self.length, self.layers = 1.0, 6, (0, 1, 2)

    def understanding_flow(self, batch, layers=None):
        n = len(check_batch(batch)["ids"])
        states = {layer: torch.zeros(n, self.length, 5) for layer in self.layers}
        return FlowOutput(torch.tensor(self.loss), torch.full((n,), self.loss), states, self.grid)

    def generation_flow(self, batch, mask_ratio=0.5, mask_layout="dispersed", generator=None, layers=None):
        return self.understanding_flow(batch)

    def layer_parameters(self):
        return {"block 1": [self.embedding.weight], "block 2": [self.embedding.weight]}

    def understand(self, images, prompts=None, decoding=None, generator=None):
        return [""] * len(images)

    def generate(self, texts, images=None, mask=None, decoding=None, generator=None):
        return torch.zeros(len(texts), 3, 8, 8)


# --- batches -----------------------------------------------------------------------------------------------------------


def test_collate_keeps_items_together():
    data = Shapes("test", n=4)
    items = [data[i] for i in (2, 0, 3)]
    batch = collate(items)
    assert batch["ids"] == [item["id"] for item in items] and batch["texts"] == [item["texts"] for item in items]
    for row, item in enumerate(items):
        assert torch.equal(batch["images"][row], item["images"])
        assert all(torch.equal(batch["factors"][k][row], v) for k, v in item["factors"].items())
    without = collate([items[0], {k: v for k, v in items[1].items() if k != "factors"}])
    assert "factors" not in without  # half of the factors would be no factors
    with pytest.raises(ValueError, match="no items"):
        collate([])
    with pytest.raises(ValueError, match="repeat"):
        collate([items[0], items[0]])


def test_bad_batches_are_refused(batch):
    assert check_batch(batch) is batch
    for change, message in [
        (lambda b: b.pop("texts"), r"lacks \['texts'\]"),
        (lambda b: b.update(texts=b["texts"][:2]), "differ in number.*'texts': 2"),
        (lambda b: b.update(ids=["a", "b", "a"]), r"repeat within the batch: \['a'\]"),
        (lambda b: b.update(images=b["images"][:0], texts=[], ids=[]), "empty"),
    ]:
        broken = dict(batch)
        change(broken)
        with pytest.raises(ValueError, match=message):
            check_batch(broken)


def test_images_outside_the_contract_are_refused(batch):
    images = batch["images"]
    assert check_images(images) is images and check_images(images, (32, 32)) is images and len(check_images(images[:0])) == 0
    for wrong, message in [
        (images.numpy(), "ndarray; expected a tensor"),
        (images[0], r"\(3, 32, 32\); expected"),
        (images[:, :1], r"\(3, 1, 32, 32\); expected"),
        (images.permute(0, 2, 3, 1), "expected a tensor"),
        ((images * 255).byte(), "divide bytes by 255"),
        (images * 2 - 1, r"expected \[0, 1\]"),
        (images / 0, "NaN or infinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_images(wrong)
    with pytest.raises(ValueError, match="resize"):
        check_images(images, (64, 64))


def test_layers_are_counted_from_either_end():
    assert as_layers(None, 3) == [0, 1, 2, 3] and as_layers([0, -1, 2], 3) == [0, 3, 2] and as_layers([-4], 3) == [0]
    for wrong in ([4], [-5], [0, 99]):
        with pytest.raises(ValueError, match="do not exist"):
            as_layers(wrong, 3)


def test_decoding_refuses_nonsense():
    for wrong in (dict(steps=0), dict(max_new_tokens=0), dict(temperature=-1.0), dict(guidance=-0.1)):
        with pytest.raises(ValueError):
            Decoding(**wrong)


# --- losses ------------------------------------------------------------------------------------------------------------


def test_token_losses_by_hand():
    """Two classes with logits (0, log 3): probabilities 1/4 and 3/4."""
    logits = torch.tensor([0.0, math.log(3)]).expand(2, 3, 2)
    labels = torch.tensor([[0, 1, -100], [1, -100, -100]])
    loss, per_example = token_losses(logits, labels)
    a, b = math.log(4), math.log(4 / 3)
    assert loss.item() == pytest.approx((a + b + b) / 3) and per_example.tolist() == pytest.approx([(a + b) / 2, b])


def test_token_losses_at_the_edges():
    logits, labels = torch.randn(2, 3, 7), torch.full((2, 3), -100)
    with pytest.raises(ValueError, match="no token is supervised"):
        token_losses(logits, labels)
    labels[0, 0] = 3
    loss, per_example = token_losses(logits, labels)
    assert per_example[1] == 0 and loss == per_example[0]
    assert token_losses(logits.bfloat16(), labels)[0].dtype == torch.float32
    assert token_losses(torch.zeros(2, 3, 7), labels)[0].item() == pytest.approx(math.log(7))


def test_masks_are_alike_on_every_call_with_a_seed_and_bounded():
    draw = lambda seed, **k: draw_mask(50, (4, 6), generator=torch.Generator().manual_seed(seed), **k)  # noqa: E731
    for layout in ("dispersed", "contiguous"):
        assert torch.equal(draw(0, layout=layout), draw(0, layout=layout))
        assert not torch.equal(draw(0, layout=layout), draw(1, layout=layout))
        for ratio in (1e-6, 0.999):
            hidden = draw(0, layout=layout, ratio=ratio).sum(1)
            assert hidden.min() >= 1 and hidden.max() <= 23
        assert draw(0, layout=layout, ratio=1.0).all()
    counts = draw(0, ratio=0.5).float().mean(0)
    assert counts.min() > 0.2 and counts.max() < 0.8  # no position is always or never hidden


# --- devices -----------------------------------------------------------------------------------------------------------


def test_device_and_dtype():
    assert resolve_device("cpu") == torch.device("cpu") and resolve_device().type in ("cuda", "mps", "cpu")
    assert resolve_dtype("float32", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    for wrong in ("float31", "Tensor"):
        with pytest.raises(ValueError, match="dtype"):
            resolve_dtype(wrong, torch.device("cpu"))
    with pytest.raises(ValueError, match="device"):
        resolve_device("toaster")


# --- the report --------------------------------------------------------------------------------------------------------


def test_report_of_a_model_that_meets_the_contract(batch):
    model = Stub()
    assert isinstance(model, UnifiedModel)
    report = check_model(model, batch)
    assert report.tier == "diagnosable, drivable"
    assert list(report.missing) == ["image_log_prob"] and "AttributeError" in report.missing["image_log_prob"]
    assert "missing  image_log_prob" in str(report) and str(report).startswith("Stub: diagnosable, drivable\n")


@pytest.mark.parametrize(
    "part, wrong, missing, message",
    [
        ("length", 7, "understanding_flow", r"layer 0 states are \(3, 7, 5\); expected \(3, 6, 5\)"),
        ("layers", (0, 1), "understanding_flow", r"layers \[0, 1\]; expected 0 to 2"),
        ("loss", float("nan"), "generation_flow", "the loss is nan"),
        ("hidden_size", 9, "generation_flow", "expected \\(3, 6, 9\\)"),
        ("layer_parameters", dict, "layer_parameters", r"are \{\}; expected some for each of 2"),
        ("understand", lambda images: ["one"], "understand", "1 texts for 3 examples"),
        ("generate", lambda texts: torch.full((3, 3, 8, 8), 7.0), "generate", "range"),
        ("generate", lambda texts: torch.zeros(1, 3, 8, 8), "generate", "1 images for 3 examples"),
        ("image_log_prob", lambda texts, images: torch.zeros(2), "image_log_prob", "2 log-probabilities for 3 examples"),
    ],
)
def test_each_fault_is_found_and_named(batch, part, wrong, missing, message):
    import re

    model = Stub()
    setattr(model, part, wrong)
    report = check_model(model, batch)
    assert missing in report.missing and re.search(message, report.missing[missing]), report
    tier = {"understand": "diagnosable", "generate": "diagnosable", "image_log_prob": "diagnosable, drivable"}.get(
        missing, "drivable"
    )
    assert report.tier == tier


def test_check_leaves_the_model_as_it_was(batch):
    from umm_kit.data.language import vocabulary_corpus
    from umm_kit.models.masked import MaskedUMM

    model = MaskedUMM.tiny(list(vocabulary_corpus()), num_layers=1, max_text=24).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    check_model(model, {k: batch[k][:1] for k in ("images", "texts", "ids")})
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_nothing_met_is_said_so():
    assert CheckReport("Empty").tier == "none"
    report = check_model(object(), {"ids": ["a"], "texts": ["a"], "images": torch.zeros(1, 3, 8, 8)})
    assert report.tier == "none" and report.met == []
