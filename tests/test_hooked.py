"""A module that the kit does not know, behind the contract by hooks."""

import copy
import re

import pytest
import torch
from torch import nn

import umm_kit as uk
from umm_kit.data.language import vocabulary_corpus
from umm_kit.features import extract
from umm_kit.models.base import collate
from umm_kit.models.contract import check_model
from umm_kit.models.hooked import HookedUMM, Pass

pytestmark = pytest.mark.usefixtures("one_thread")
split = re.compile(r"\w+|[^\w\s]").findall
WORDS = ["<pad>", "<end>", *sorted({word for line in vocabulary_corpus() for word in split(line)})]
SIDE = 4  # image tokens across


class Theirs(nn.Module):
    """Somebody's model: torch's own encoder over words and 8 x 8 patches, pixels out; nothing in it knows of this kit."""

    def __init__(self, width=16):
        super().__init__()
        self.words, self.patches = nn.Embedding(len(WORDS), width), nn.Linear(192, width)
        self.hidden, self.where = nn.Parameter(torch.randn(width)), nn.Embedding(128, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.to_words, self.to_patches = nn.Linear(width, len(WORDS)), nn.Linear(width, 192)

    def forward(self, x):
        later = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.encoder(x + self.where.weight[: x.shape[1]], mask=later)


def patches(images):
    return nn.functional.unfold(images, 8, stride=8).mT


class Mine(HookedUMM):
    """What its user writes."""

    image_size = 32

    def ids(self, texts):
        rows = [[WORDS.index(word) for word in split(text)] + [1] for text in texts]
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

    def read(self, batch):
        m, ids = self.module, self.ids(batch["texts"])
        x = m(torch.cat([m.patches(patches(batch["images"])), m.words(ids[:, :-1])], 1))
        return Pass(m.to_words(x[:, SIDE * SIDE - 1 :]), ids.masked_fill(ids == 0, -100), torch.arange(SIDE * SIDE))

    def shown(self, batch, mask):
        return torch.where(mask[..., None], self.module.hidden, self.module.patches(patches(batch["images"])))

    def draw(self, batch, mask):
        m, words = self.module, self.module.words(self.ids(batch["texts"]))
        x = m(torch.cat([words, self.shown(batch, mask)], 1))
        start = words.shape[1]
        return Pass(m.to_patches(x[:, start:]), patches(batch["images"]), torch.arange(start, start + SIDE * SIDE))

    @torch.no_grad()
    def understand(self, images, prompts=None, decoding=uk.Decoding(), generator=None):
        m, said = self.module, torch.zeros(len(images), 0, dtype=torch.long)
        for _ in range(4):
            x = m(torch.cat([m.patches(patches(images)), m.words(said)], 1))
            said = torch.cat([said, m.to_words(x[:, -1:]).argmax(-1)], 1)
        return [" ".join(WORDS[k] for k in row) for row in said.tolist()]

    @torch.no_grad()
    def generate(self, texts, images=None, mask=None, decoding=uk.Decoding(), generator=None):
        mask = torch.ones(len(texts), SIDE, SIDE, dtype=torch.bool) if mask is None else mask
        images = torch.zeros(len(texts), 3, 32, 32) if images is None else images
        drawn = self.draw({"images": images, "texts": texts}, mask.flatten(1)).scores.clamp(0, 1)
        new = torch.where(mask.flatten(1)[..., None], drawn, patches(images))
        return nn.functional.fold(new.mT, (32, 32), 8, stride=8)


def mine(kind=Mine, seed=0):
    torch.manual_seed(seed)
    theirs = Theirs()
    return kind(theirs, theirs.encoder.layers, theirs.words, (SIDE, SIDE)).eval()


@pytest.fixture(scope="module")
def batch():
    data = uk.Shapes("test", n=4)
    return collate([data[i] for i in range(4)])


def test_it_meets_the_contract(batch):
    report = check_model(mine(), batch)
    assert report.tier == "diagnosable, drivable" and list(report.missing) == ["image_log_prob"] and not report.not_asked


def test_states_are_those_of_its_own_blocks(batch):
    model = mine()
    m, out = model.module, mine().understanding_flow(batch)
    x = torch.cat([m.patches(patches(batch["images"])), m.words(model.ids(batch["texts"])[:, :-1])], 1)
    x = x + m.where.weight[: x.shape[1]]
    later = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    for layer in range(4):
        assert torch.allclose(out.hidden_states[layer], x[:, : SIDE * SIDE], atol=1e-5)
        x = m.encoder.layers[layer](x, src_mask=later) if layer < 3 else x
    log_p = m.to_words(x[:, SIDE * SIDE - 1 :]).log_softmax(-1)
    ids = model.ids(batch["texts"])
    each = [-log_p[i, range(n), ids[i, :n]].mean() for i, n in enumerate((ids != 0).sum(1).tolist())]
    assert torch.allclose(out.per_example_loss, torch.stack(each), atol=1e-5)


def test_a_continuous_loss_counts_what_is_hidden(batch):
    model, mask = mine(), torch.zeros(4, SIDE * SIDE, dtype=torch.bool)
    mask[:, 3], mask[0, 5] = True, True
    out = model.generation_flow(batch, mask=mask)
    error = (out.prediction - patches(batch["images"])).square().mean(-1)
    assert out.per_example_loss[0].item() == pytest.approx((error[0, 3] + error[0, 5]).item() / 2, rel=1e-5)
    assert out.loss.item() == pytest.approx(error[mask].mean().item(), rel=1e-5)
    assert out.logits is None and torch.equal(out.mask, mask)


class Leaks(Mine):
    def shown(self, batch, mask):
        return self.module.patches(patches(batch["images"]))


class LooksAround(Mine):
    def shown(self, batch, mask):
        blurred = {**batch, "images": nn.functional.avg_pool2d(batch["images"], 5, 1, 2)}
        return super().shown(blurred, mask)


class ColumnsFirst(Mine):
    def draw(self, batch, mask):
        out = super().draw(batch, mask)
        return Pass(out.scores, out.targets, out.places.view(SIDE, SIDE).T.flatten())


class CaptionFirst(Mine):
    def read(self, batch):
        m, ids = self.module, self.ids(batch["texts"])
        x = m(torch.cat([m.words(ids), m.patches(patches(batch["images"]))], 1))
        return Pass(m.to_words(x[:, : ids.shape[1]]), ids, torch.arange(ids.shape[1], x.shape[1]))


@pytest.mark.parametrize(
    ("kind", "rule"),
    [(Leaks, "hidden_unseen"), (LooksAround, "hidden_unseen"), (ColumnsFirst, "raster_order"), (CaptionFirst, "caption_unseen")],
)
def test_what_is_wrong_in_it_is_found(batch, kind, rule):
    assert rule in check_model(mine(kind), batch).missing


def test_pixels_that_belong_to_no_token_cannot_be_changed_alone(batch):
    report = check_model(mine(), {**batch, "images": nn.functional.pad(batch["images"], (0, 2, 0, 2))})
    assert set(report.not_asked) == {"hidden_unseen", "raster_order"} and "34 x 34 pixels do not divide" in str(report)


class Skips(Mine):
    def read(self, batch):
        first, self.module.encoder.layers = self.module.encoder.layers, self.module.encoder.layers[:2]
        try:
            return super().read(batch)
        finally:
            self.module.encoder.layers = first


class TooFew(Mine):
    def read(self, batch):
        out = super().read(batch)
        return Pass(out.scores, out.targets, out.places[:-1])


class Shifted(Mine):
    def read(self, batch):
        out = super().read(batch)
        return Pass(out.scores[:, 1:], out.targets, out.places)


class TooFar(Mine):
    def read(self, batch):
        out = super().read(batch)
        return Pass(out.scores, out.targets, out.places + 1000)


class Silent(HookedUMM):
    pass


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Skips, r"layers \[3\] did not run"),
        (TooFew, "15 places"),
        (TooFar, "positions"),
        (Shifted, "scores\\[:, t\\]"),
        (Silent, "write read"),
    ],
)
def test_what_it_gives_is_checked(batch, kind, said):
    model = mine(kind)
    with pytest.raises((ValueError, NotImplementedError), match=said):
        model.understanding_flow(batch)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_blocks_of_another_module_are_refused():
    theirs = Theirs()
    with pytest.raises(ValueError, match="not parts of the Theirs"):
        Mine(theirs, Theirs().encoder.layers, theirs.words, (SIDE, SIDE))
    with pytest.raises(ValueError, match="0 blocks"):
        Mine(theirs, [], theirs.words, (SIDE, SIDE))


def test_the_kit_works_on_it(tmp_path):
    model, data = mine(), uk.Shapes("test", n=24)
    few = {"batch_size": 8, "gradient_batch": 4, "progress": False}
    found = uk.diagnose(model, data, ["gradients", "residual", "similarity"], [0.4], **few)
    assert set(found.frame.layer) == {0, 1, 2, 3} and found.frame.value.notna().all()
    assert extract(model, data, batch_size=8, progress=False).states["generation", 3].shape == (24, 16)
    drift = uk.drift(model, data, cycles=1, start="image", progress=False)  # it says nothing that could survive
    assert (drift.to_frame().query("metric == 'lost'").value <= 1).all()


def test_diva_trains_it_and_its_copy_is_whole(tmp_path):
    model = mine()
    before, frozen = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    assert list(before) == [f"module.{name}" for name in model.module.state_dict()]
    quiet = {"per_device_train_batch_size": 8, "save_strategy": "no", "disable_tqdm": True, "stage1_steps": 2, "max_steps": 2}
    config = uk.DIVAConfig.tiny(output_dir=str(tmp_path), layers=[2], **quiet)
    uk.DIVATrainer(model, config, uk.Shapes("train", n=64)).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("module.encoder.layers.1.") for name in moved)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert frozen.blocks[0] is frozen.module.encoder.layers[0] is not model.blocks[0]
