"""The contract itself: what a batch is, what a layer is, and what is said about a model that falls short."""

import math

import pytest
import torch

from umm_kit.data.shapes import Shapes
from umm_kit.models.base import (
    Decoding,
    as_layers,
    check_batch,
    check_images,
    collate,
    draw_mask,
    product_rate,
    resolve_device,
    resolve_dtype,
    token_losses,
)


@pytest.fixture
def batch():
    data = Shapes("test", n=3)
    return collate([data[i] for i in range(3)])


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
    assert product_rate(torch.device("cpu"), torch.float32, 64, 0.01) > 1e6
    for wrong in ("float31", "Tensor"):
        with pytest.raises(ValueError, match="dtype"):
            resolve_dtype(wrong, torch.device("cpu"))
    with pytest.raises(ValueError, match="device"):
        resolve_device("toaster")
