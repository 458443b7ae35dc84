"""The second family: packed training rows say what the flows say, and it is trained, saved and loaded like the first."""

import json

import pytest
import torch
from families import OWN, assert_foretold, small

import umm_kit as uk
from umm_kit.models.autoregressive import AutoregressiveUMM, AutoregressiveUMMConfig
from umm_kit.models.base import Decoding
from umm_kit.models.own import DESCRIBE
from umm_kit.trainers.pretrain import AutoregressiveConfig, PretrainConfig, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=list(OWN))
def model(request):
    return small(request.param)


@pytest.fixture(scope="module")
def batch():
    data = uk.Shapes("test", n=4)
    return uk.collate([data[i] for i in range(4)])


def losses(model, batch, segments, mask, **more):
    codes = model.image_tokenizer.encode(batch["images"])
    return model(codes, model.pack(segments, 16), model.pack_captions(batch["texts"], 16), mask, **more)


@pytest.mark.parametrize("hidden", ["half", "whole"])
def test_packed_rows_cost_what_the_flows_cost(model, batch, hidden, monkeypatch):
    n = model.grid[0] * model.grid[1]
    if hasattr(model, "_drawn_from"):  # the same level and noise for both
        drawn = model._drawn_from(4, [torch.Generator().manual_seed(0)])
        monkeypatch.setattr(model, "_drawn_from", lambda n, generators: drawn)
    mask = (torch.arange(n) % 2 == 0).expand(4, -1) if hidden == "half" else torch.ones(4, n, dtype=torch.bool)
    found = losses(model, batch, [[(DESCRIBE, text)] for text in batch["texts"]], mask)
    u, g = model.understanding_flow(batch), model.generation_flow(batch, mask=mask)
    torch.testing.assert_close(found["understanding_loss"], u.loss)
    torch.testing.assert_close(found["generation_loss"], g.loss)
    torch.testing.assert_close(found["loss"], u.loss + g.loss)


def test_segments_after_one_image_do_not_see_each_other(model, batch):
    """Three texts behind one image cost what each costs alone."""
    asked = [(DESCRIBE, batch["texts"][0]), ("is there a red circle?", "yes"), ("how many circles are there?", "two")]
    mask = torch.ones(1, model.grid[0] * model.grid[1], dtype=torch.bool)
    one = {k: batch[k][:1] for k in ("images", "texts", "ids")}
    packed = losses(model, one, [asked], mask)["understanding_loss"]
    alone, tokens = [], []
    for prompt, text in asked:
        prompts = None if prompt == DESCRIBE else [prompt]
        out = model.understanding_flow({**one, "texts": [text], "prompts": prompts})
        alone.append(out.loss), tokens.append(int((out.labels != -100).sum()))
    torch.testing.assert_close(packed, sum(a * t for a, t in zip(alone, tokens, strict=True)) / sum(tokens))


def test_an_image_hidden_in_part_sees_its_left_alone():
    model, data = small("autoregressive"), uk.Shapes("test", n=1)
    batch = uk.collate([data[0]])
    codes, mask = model.image_tokenizer.encode(batch["images"]), torch.zeros(1, 64, dtype=torch.bool)
    mask[0, 20] = True
    right = codes.clone()
    right[0, 21:] = right[0, 21:].flip(0)
    a, b = (model.generation_flow({**batch, "codes": c}, mask=mask).loss for c in (codes, right))
    left = codes.clone()
    left[0, 19] = (left[0, 19] + 1) % 64
    assert torch.equal(a, b) and not torch.equal(a, model.generation_flow({**batch, "codes": left}, mask=mask).loss)


@pytest.mark.slow
def test_it_is_trained_saved_and_loaded(tmp_path, shipped):
    shipped.image_tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = AutoregressiveConfig.tiny(
        output_dir=str(tmp_path / "run"),
        image_tokenizer=str(tmp_path / "tokenizer"),
        max_steps=6,
        disable_tqdm=True,
        use_cpu=True,
    )
    model = train(config)
    again = uk.load(tmp_path / "run", device="cpu")
    assert type(again) is AutoregressiveUMM and config.full_mask == 0.75
    data = uk.Shapes("test", n=2)
    batch = uk.collate([data[0], data[1]])
    assert torch.equal(model.understanding_flow(batch).loss, again.understanding_flow(batch).loss)
    log = [e for e in json.loads((tmp_path / "run/run.json").read_text())["log"] if "generation_loss" in e]
    assert log[-1]["generation_loss"] < log[0]["generation_loss"]
    assert model.image_embedding.of_code.weight.abs().max() > 0, "Muon and AdamW together train every table"


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="family is 'diffusion'; expected one of masked, autoregressive"):
        PretrainConfig(family="diffusion")
    with pytest.raises(ValueError, match="not a multiple"):
        AutoregressiveUMMConfig(hidden_size=30, num_heads=4)


def test_regenerate_reads_the_codes_that_are_drawn():
    """Without noise the likeliest codes; with noise, draws: each text's belong to its own generator."""
    model, texts = small("autoregressive"), ["a red circle", "a blue square"]
    blank = torch.zeros(2, model.num_image_tokens, dtype=torch.long)
    greedy = Decoding(temperature=0, guidance=1)
    codes = model.generate_codes(texts, blank, torch.ones_like(blank, dtype=torch.bool), greedy)
    batch = {"images": torch.zeros(2, 3, 32, 32), "ids": ["a", "b"], "texts": texts, "codes": codes}
    read = model.understanding_flow(batch, layers=[1, 3]).hidden_states
    states = model.regenerate(texts, layers=[1, 3])
    for layer in (1, 3):
        torch.testing.assert_close(states[layer], read[layer], atol=1e-5, rtol=1e-4)
    each = lambda seeds: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
    both, alone = (
        model.regenerate(texts, [3], generator=each([4, 5]))[3],
        model.regenerate(texts[1:], [3], generator=each([5]))[3],
    )
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-4)
    assert (both - states[3]).abs().max() > 0.01, "noise draws other codes"
    with pytest.raises(ValueError, match="temperature"):
        model.regenerate(texts, temperature=0)


@pytest.mark.parametrize("hard", [False, True])
def test_gradient_through_drawing_and_reading(hard):
    """The codes stay as they were drawn: a small step of the weights changes what y weighs, which the gradient foretells."""
    model = small("autoregressive").double()
    weight = model.image_head.of_digit.weight

    def score():
        return model.regenerate(["a red circle"], [3], temperature=2.0, hard=hard)[3].square().mean()

    gradient = torch.autograd.grad(score(), weight)[0]
    assert gradient.abs().max() > 0, "the loss reaches the head that draws"
    if not hard:
        assert_foretold(score, weight, gradient, step=1e-3, tolerance=2e-3)  # Llama's norms compute in float32
