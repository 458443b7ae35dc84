"""Images and words as tokens: the lattice by hand, codes there and back, and words nobody has seen."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from umm_kit.data.language import STYLES, vocabulary_corpus
from umm_kit.data.shapes import Shapes
from umm_kit.models.own import detokenize
from umm_kit.models.tokenizers import (
    SPECIAL_TOKENS,
    ImageTokenizer,
    ImageTokenizerConfig,
    code_digits,
    codebook_use,
    fsq,
    train_text_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return ImageTokenizer(ImageTokenizerConfig(channels=16, depth=1, levels=(4, 3, 5))).eval()


@pytest.fixture(scope="module")
def images():
    return Shapes("test", n=4).images(range(4))


@pytest.fixture(scope="module")
def words():
    return train_text_tokenizer(vocabulary_corpus())


# --- finite scalar quantization ----------------------------------------------------------------------------------------


def test_fsq_by_hand():
    """sigmoid(0) = 1/2 is the middle of the lattice; log 3 / 2 gives sigmoid = 3/4."""
    z = torch.tensor([[0.0, -20.0], [20.0, 20.0], [math.log(3) / 2, 0.0]])
    quantized, digits = fsq(z, torch.tensor([5, 2]))
    # Levels 5 and 2: lattices (-1, -.5, 0, .5, 1) and (-1, 1). Halves round to even: .5 -> 0.
    assert digits.tolist() == [[2, 0], [4, 1], [3, 0]]
    assert torch.allclose(quantized, torch.tensor([[0.0, -1.0], [1.0, 1.0], [0.5, -1.0]]), atol=1e-6)


def test_fsq_reaches_every_level_and_is_monotone():
    z = torch.linspace(-8, 8, 2001)[:, None].expand(-1, 3)
    levels = torch.tensor([2, 5, 8])
    quantized, digits = fsq(z, levels)
    for column, level in enumerate(levels.tolist()):
        assert digits[:, column].unique().tolist() == list(range(level))
        assert (digits[1:, column] >= digits[:-1, column]).all()
        lattice = torch.linspace(-1, 1, level)
        assert torch.allclose(quantized[:, column], lattice[digits[:, column]], atol=1e-6)
    assert quantized.abs().max() <= 1 + 1e-6


def test_fsq_gradient_passes_straight_through():
    """The gradient is that of the bounded value, 2 sigmoid(2z) - 1, as if nothing had been rounded."""
    z = torch.randn(7, 3, requires_grad=True)
    fsq(z, torch.tensor([4, 5, 8]))[0].sum().backward()
    s = torch.sigmoid(2 * z.detach())
    assert torch.allclose(z.grad, 4 * s * (1 - s), atol=1e-6)


# --- codes there and back ----------------------------------------------------------------------------------------------


def test_a_code_sees_its_own_patch_and_no_other(tokenizer, images):
    """Hidden patches must not leak into the codes of visible ones: one patch painted over, one code changed."""
    base = tokenizer.encode(images)
    for row, column in ((0, 0), (3, 5), (7, 7)):
        painted = images.clone()
        painted[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = torch.rand(4, 3, 4, 4)
        moved = (tokenizer.encode(painted) != base).nonzero()[:, 1].unique().tolist()
        assert moved == [8 * row + column]


def test_digits_by_hand():
    """With levels 4, 3, 5: 59 = 3 + 4 * (2 + 3 * 4)."""
    assert code_digits(torch.tensor([[0, 59, 13]]), (4, 3, 5)).tolist() == [[[0, 0, 0], [3, 2, 4], [1, 0, 1]]]


def test_codes_are_mixed_radix_numbers(tokenizer):
    """All 60 codes against the naive reference: digits counted up with the first one fastest."""
    naive = [(c, b, a) for a, b, c in itertools.product(range(5), range(3), range(4))]
    assert tokenizer.codebook_size == len(naive) == 60
    codes = torch.arange(60)[None]
    expected = torch.tensor([[d / (level - 1) * 2 - 1 for d, level in zip(row, (4, 3, 5), strict=True)] for row in naive])
    assert torch.allclose(tokenizer.quantized(codes)[0], expected, atol=1e-6)


def test_encode_inverts_quantized_for_every_code(tokenizer):
    """Put the value of each code where the encoder's output goes: the code comes back."""
    codes = torch.cat([torch.arange(60), torch.arange(4)])[None]
    position = (tokenizer.quantized(codes) + 1) / 2  # sigmoid(2z), kept off its ends
    z = torch.logit(position.clamp(1e-4, 1 - 1e-4)) / 2
    hook = tokenizer.encoder.register_forward_hook(lambda *_: z.unflatten(1, (8, 8)).permute(0, 3, 1, 2))
    try:
        assert torch.equal(tokenizer.encode(torch.rand(1, 3, 32, 32)), codes)
    finally:
        hook.remove()


def test_codes_stand_in_raster_order(tokenizer):
    """The top right corner of the image decides token 7, and with it nothing at the bottom left."""
    torch.manual_seed(1)
    image = torch.rand(1, 3, 32, 32)
    changed = image.clone()
    changed[:, :, :4, 28:] = 1 - changed[:, :, :4, 28:]
    before, after = (tokenizer.encoder(x * 2 - 1)[0] for x in (image, changed))
    moved = (before - after).abs().sum(0)
    assert moved[0, 7] > 0 and tokenizer.encode(image).shape == (1, 64)
    quantized = tokenizer._quantize(image)[1]
    radix = torch.tensor([1, 4, 12])
    assert int((quantized[0, 0, 7] * radix).sum()) == int(tokenizer.encode(image)[0, 7])


def test_decode_agrees_with_the_training_path(tokenizer, images):
    with torch.no_grad():
        trained = tokenizer(images)["reconstructions"].clamp(0, 1)
    assert torch.allclose(tokenizer.reconstruct(images), trained, atol=1e-5)
    assert torch.equal(tokenizer.reconstruct(images), tokenizer.decode(tokenizer.encode(images)))
    assert tokenizer.reconstruct(images).min() >= 0 and tokenizer.reconstruct(images).max() <= 1


def test_codes_do_not_depend_on_autocast_or_batch(tokenizer, images):
    codes = tokenizer.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), codes)
    assert torch.equal(torch.cat([tokenizer.encode(image[None]) for image in images]), codes)
    assert not codes.requires_grad and codes.dtype == torch.long


@pytest.mark.parametrize("colour, weight", [((0.5, 0.5, 0.5), 1), ((0.9, 0.1, 0.1), 8)])
def test_loss_by_hand(tokenizer, monkeypatch, colour, weight):
    """Grey pixels weigh 1, coloured ones 8: a constant error e costs w (10 e^2 + 0.3 |e|)."""
    image = torch.tensor(colour)[None, :, None, None].expand(1, 3, 32, 32)
    monkeypatch.setattr(tokenizer, "_pixels", lambda _: image + 0.1)
    assert float(tokenizer(image)["loss"]) == pytest.approx(weight * (10 * 0.01 + 0.3 * 0.1), rel=1e-5)


def test_save_and_load(tokenizer, images, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = ImageTokenizer.from_pretrained(tmp_path).eval()
    assert again.levels == (4, 3, 5) and again.grid == (8, 8)
    assert torch.equal(again.encode(images), tokenizer.encode(images))
    assert torch.equal(again.reconstruct(images), tokenizer.reconstruct(images))
    assert not list(tmp_path.glob("*.bin"))


def test_wrong_input_is_refused(tokenizer, images):
    for wrong, message in [
        (images[:, :, :16], "resize"),
        (images[:, :1], "expected a tensor"),
        ((images * 255).round(), "range"),
        ((images * 255).byte(), "divide bytes"),
        (images + float("nan"), "NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            tokenizer.encode(wrong)
    for wrong, message in [
        (torch.full((1, 64), 60), "expected 0 to 59"),
        (torch.full((1, 64), -1), "expected 0 to 59"),
        (torch.zeros(1, 63, dtype=torch.long), "expected \\[batch, 64\\]"),
        (torch.zeros(64, dtype=torch.long), "expected \\[batch, 64\\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            tokenizer.decode(wrong)
    with pytest.raises(ValueError, match="multiple of patch_size"):
        ImageTokenizer(ImageTokenizerConfig(image_size=30))


def test_codebook_use_by_hand():
    use = codebook_use(torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]), 8)
    assert (use.used, use.size) == (2, 8) and use.perplexity == pytest.approx(2.0)
    # Frequencies 3/4 and 1/4: entropy = 3/4 log 4/3 + 1/4 log 4.
    skewed = codebook_use(torch.tensor([2, 2, 2, 5]), 8)
    assert skewed.perplexity == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    assert codebook_use(torch.full((9,), 3), 8).perplexity == pytest.approx(1.0)
    assert codebook_use(torch.arange(8), 8).perplexity == pytest.approx(8.0)


def test_codebook_use_against_a_naive_count():
    codes = torch.randint(20, (30, 7), generator=torch.Generator().manual_seed(0))
    counts = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    use = codebook_use(codes, 50)
    assert use.used == len(counts) and use.perplexity == pytest.approx(math.exp(-(counts * np.log(counts)).sum()))
    with pytest.raises(ValueError, match="no codes"):
        codebook_use(torch.zeros(0, dtype=torch.long), 8)
    with pytest.raises(ValueError, match="codes range"):
        codebook_use(torch.tensor([3, 8]), 8)


# --- words -------------------------------------------------------------------------------------------------------------


def ids(words, text):
    return words(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_come_first_and_stay_there(words):
    for some in (words, train_text_tokenizer(["only this"])):
        assert [some.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
        assert (some.pad_token_id, some.unk_token_id, some.bos_token_id, some.eos_token_id) == (0, 1, 2, 3)


def test_unknown_words(words):
    assert words.convert_ids_to_tokens(ids(words, "a purplish circle")) == ["a", "<unk>", "circle"]
    assert detokenize(words, ids(words, "a purplish circle")) == "a <unk> circle"


def test_case_and_spaces_do_not_matter(words):
    assert ids(words, "A  Red\tCIRCLE") == ids(words, "a red circle") and words.unk_token_id not in ids(words, "A red circle")


def test_special_tokens_in_a_text_are_only_words(words):
    """A caption cannot end its own sequence: "<eos>" from outside is not the token of that name."""
    special = {words.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS if token != "<unk>"}
    assert not special & set(ids(words, "a red <eos> circle <pad> <generate> <understand> <bos>"))


@pytest.mark.parametrize("style", STYLES)
def test_captions_come_back(words, style):
    data = Shapes("train", n=200)
    for i in range(200):
        text = data.caption(i, style)
        assert words.unk_token_id not in ids(words, text) and detokenize(words, ids(words, text)) == text


def test_questions_and_drawing_texts_come_back(words):
    data = Shapes("train", n=100)
    texts = [text for row in data.questions(range(100), 6) for pair in row for text in pair] + data.drawing_texts(range(100))
    assert len(texts) > 500
    for text in texts:
        assert detokenize(words, ids(words, text)) == text


def test_unicode(words):
    own = train_text_tokenizer(["ein großer roter Kreis über dem Café", "红色的圆", "une étoile d'été"])
    assert own.unk_token_id not in ids(
        own, "GROSSER roter kreis".replace("SS", "ß") + " über dem cafe\u0301"
    )  # composed and decomposed
    assert own.unk_token_id not in ids(own, "红色的圆") and ids(words, "红色的圆 🙂") == [words.unk_token_id] * 2
    assert ids(words, "") == [] and ids(words, " \n\t ") == []


def test_vocabulary_keeps_the_most_frequent_words():
    tokenizer = train_text_tokenizer(["often often often rare", "often sometimes sometimes"], max_words=len(SPECIAL_TOKENS) + 2)
    assert set(tokenizer.get_vocab()) == {*SPECIAL_TOKENS, "often", "sometimes"}


def test_order_of_the_corpus_does_not_matter():
    corpus = list(vocabulary_corpus())
    assert train_text_tokenizer(corpus).get_vocab() == train_text_tokenizer(corpus[::-1]).get_vocab()


def test_an_empty_corpus_is_refused():
    for corpus in ([], [""], ["  ", "\n"]):
        with pytest.raises(ValueError, match="no words"):
            train_text_tokenizer(corpus)
    with pytest.raises(ValueError, match="max_words"):
        train_text_tokenizer(["a word"], max_words=len(SPECIAL_TOKENS))


def test_text_tokenizer_saves_and_loads(words, tmp_path):
    words.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("A small red circle, and an orange cross.", "Unknown WORDS é <eos>?"):
        assert ids(again, text) == ids(words, text)


def test_punctuation_is_attached_again(words):
    assert detokenize(words, ids(words, "what colour is the circle ?")) == "what colour is the circle?"
    assert detokenize(words, []) == ""
