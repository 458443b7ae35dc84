"""The first family against the contract: what sees what, what the losses are, what decoding keeps."""

import copy
import math

import pytest
import torch
from families import assert_foretold
from torch import nn

from umm_kit.data.shapes import Shapes
from umm_kit.models.base import Decoding, collate, draw_mask
from umm_kit.models.contract import check_model
from umm_kit.models.masked import MaskedUMM
from umm_kit.models.own import DESCRIBE, IGNORE, CodeTable, summed_loss


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    from umm_kit.data.language import vocabulary_corpus

    return MaskedUMM.tiny(list(vocabulary_corpus()))


@pytest.fixture(scope="module")
def batch():
    data = Shapes("test", n=4)
    return collate([data[i] for i in range(4)])


def test_meets_the_contract(model, batch):
    report = check_model(model, batch)
    assert not report.missing and report.tier == "diagnosable, drivable, preference-trainable"


def test_pack_by_hand(model):
    out = model.pack([[("is there a red circle?", "yes")], [("describe", "a red circle"), ("what shape", None)]])
    words = [model.words.convert_ids_to_tokens(row.tolist()) for row in out["ids"]]
    assert words[0][:8] == ["is", "there", "a", "red", "circle", "?", "yes", "<eos>"]
    # The label at each position is the next token where that token belongs to the target.
    yes, eos = model._special("yes"), model._special("<eos>")
    assert out["labels"][0, :8].tolist() == [IGNORE] * 5 + [yes, eos, IGNORE]
    assert out["position"][1].tolist()[:7] == [0, 1, 2, 3, 4, 0, 1]
    assert out["segment"][1].tolist()[:7] == [0, 0, 0, 0, 0, 1, 1]
    assert (out["labels"][1, 5:7] == IGNORE).all()


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_image_states_of_understanding_never_see_text(model, batch, layer):
    other = {**batch, "texts": ["a large blue square"] * 4}
    a, b = model.understanding_flow(batch), model.understanding_flow(other)
    assert torch.equal(a.hidden_states[layer], b.hidden_states[layer])
    assert not torch.allclose(a.loss, b.loss)


def test_understanding_attention_pattern(model):
    """Perturb one input at a time and see which outputs move: causal text, full image, segments apart."""
    codes = torch.randint(model.codebook_size, (1, 64), generator=torch.Generator().manual_seed(1))
    segments = [[("describe", "a small red circle"), ("how many circles are there?", "one")]]
    packed = model.pack(segments)
    base, states = model._understanding(codes, packed, [3])
    first = int((packed["segment"][0] == 0).sum())
    # One image token moves every image token and every text position.
    changed = codes.clone()
    changed[0, 63] = (codes[0, 63] + 1) % model.codebook_size
    out, moved = model._understanding(changed, packed, [3])
    assert ((moved[3] - states[3]).abs().amax(-1) > 0).all() and ((out - base).abs().amax(-1) > 0).all()
    # A later word moves only what follows it in its own segment.
    for position in (2, first + 1):
        ids = packed["ids"].clone()
        ids[0, position] = model._special("purple")
        out, moved = model._understanding(codes, {**packed, "ids": ids}, [3])
        touched = ((out - base).abs().amax(-1) > 0)[0]
        own = packed["segment"][0] == packed["segment"][0, position]
        expected = own & (torch.arange(len(own)) >= position)
        assert torch.equal(touched, expected) and torch.equal(moved[3], states[3])


def test_generation_attention_pattern(model):
    codes = torch.randint(model.codebook_size, (1, 64), generator=torch.Generator().manual_seed(1))
    mask = draw_mask(1, model.grid, 0.5, generator=torch.Generator().manual_seed(0))
    ids = model.pack_captions(["a small red circle"])
    base, _ = model._generation(codes, mask, ids)
    hidden, shown = int(mask[0].nonzero()[0]), int((~mask[0]).nonzero()[0])
    changed = codes.clone()
    changed[0, hidden] = (codes[0, hidden] + 1) % model.codebook_size
    assert torch.equal(model._generation(changed, mask, ids)[0], base), "a hidden token leaks into its own prediction"
    changed = codes.clone()
    changed[0, shown] = (codes[0, shown] + 1) % model.codebook_size
    assert ((model._generation(changed, mask, ids)[0] - base).abs().amax(-1) > 0).all()
    other = model.pack_captions(["a small blue circle"])
    assert ((model._generation(codes, mask, other)[0] - base).abs().amax(-1) > 0).all()


def test_padding_changes_nothing(model, batch):
    alone = model.generation_flow(
        {**{k: batch[k][:1] for k in ("images", "texts", "ids")}}, 0.4, generator=torch.Generator().manual_seed(3)
    )
    codes = model.image_tokenizer.encode(batch["images"][:1])
    ids = model.pack_captions(
        [batch["texts"][0], "a small red circle, a small red circle, a small red circle and a small red circle"]
    )[:1]
    hidden, _ = model._generation(codes, alone.mask, ids)
    assert torch.allclose(model.image_head(hidden), alone.logits, atol=1e-5)


def test_losses_equal_a_naive_count(model, batch):
    out = model.understanding_flow(batch)
    total, n = 0.0, 0
    for i in range(4):
        logp = out.logits[i].log_softmax(-1)
        for t, label in enumerate(out.labels[i].tolist()):
            if label != IGNORE:
                total, n = total - logp[t, label].item(), n + 1
    assert out.loss.item() == pytest.approx(total / n, rel=1e-5)
    generation = model.generation_flow(batch, 0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generation.labels != IGNORE, generation.mask)
    assert generation.per_example_loss.mean().item() == pytest.approx(generation.loss.item(), rel=1e-5)  # equal counts here


def test_training_forward_is_the_sum_of_the_flows(model, batch):
    codes = model.image_tokenizer.encode(batch["images"])
    mask = draw_mask(4, model.grid, 0.5, generator=torch.Generator().manual_seed(0))
    packed = model.pack([[(DESCRIBE, t)] for t in batch["texts"]])
    out = model(codes, packed, model.pack_captions(batch["texts"]), mask, understanding_weight=2.0, generation_weight=0.5)
    u = model.understanding_flow(batch).loss
    g = model.generation_flow(batch, 0.5, generator=torch.Generator().manual_seed(0)).loss
    assert torch.allclose(out["loss"], 2 * u + 0.5 * g, rtol=1e-4)


def test_cached_decoding_equals_full_recomputation(model, batch):
    said = model.understand(batch["images"], decoding=Decoding(max_new_tokens=6))
    codes, eos = model.image_tokenizer.encode(batch["images"]), model._special("<eos>")
    for i, text in enumerate(said):
        ids = [model._special(DESCRIBE)]
        for _ in range(6):
            packed = {
                "ids": torch.tensor([ids]),
                "segment": torch.zeros(1, len(ids), dtype=torch.long),
                "position": torch.arange(len(ids))[None],
            }
            token = int(model.text_head(model._understanding(codes[i : i + 1], packed)[0][0, -1]).argmax())
            if token == eos:
                break
            ids.append(token)
        from umm_kit.models.own import detokenize

        assert text == detokenize(model.words, ids[1:])


def test_prompts_of_different_lengths_do_not_disturb_each_other(model, batch):
    questions = [
        "is there a red circle?",
        "how many things are there?",
        "what colour is the square?",
        "where is the red circle from the blue square?",
    ]
    together = model.understand(batch["images"], questions, Decoding(max_new_tokens=4))
    alone = [model.understand(batch["images"][i : i + 1], [q], Decoding(max_new_tokens=4))[0] for i, q in enumerate(questions)]
    assert together == alone


def test_generation_is_seeded_and_inpainting_keeps_the_rest(model, batch):
    texts = batch["texts"]
    draw = lambda seed, **k: model.generate(texts, decoding=Decoding(steps=3), generator=torch.Generator().manual_seed(seed), **k)  # noqa: E731
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    mask = torch.zeros(4, 8, 8, dtype=torch.bool)
    mask[:, :4, :4] = True
    out = draw(0, images=batch["images"], mask=mask)
    assert torch.equal(out[:, :, 16:], batch["images"][:, :, 16:]) and torch.equal(
        out[:, :, :, 16:], batch["images"][:, :, :, 16:]
    )
    assert not torch.equal(out[:, :, :16, :16], batch["images"][:, :, :16, :16])


def test_every_hidden_token_is_filled_once(model):
    hidden = torch.zeros(1, 64, dtype=torch.bool)
    hidden[0, :10] = True
    codes = torch.full((1, 64), 5)
    for steps in (1, 4, 30):
        out = model.generate_codes(["a red circle"], codes, hidden, Decoding(steps=steps), torch.Generator().manual_seed(0))
        assert (out[0, 10:] == 5).all() and (out < model.codebook_size).all()


def test_confidence_keeps_the_surest_and_random_does_not_care(model):
    """Of two rounds the first fixes 64 - floor(64 cos 45 deg) = 19 tokens: the 19 surest, or any 19."""
    hidden, codes = torch.ones(1, 64, dtype=torch.bool), torch.zeros(1, 64, dtype=torch.long)
    logits = model.image_head(model._generation(codes, hidden, model.pack_captions([""]))[0])
    sure = logits.log_softmax(-1).max(-1).values[0]
    left = math.floor(64 * math.cos(math.pi / 4))
    kept = {}
    real = model._generation
    for order in ("confidence", "random"):
        seen = []

        def spy(codes, mask, ids, layers=(), seen=seen):
            seen.append(mask.clone())
            return real(codes, mask, ids, layers)

        model._generation = spy
        greedy = Decoding(steps=2, temperature=0.0, choice_temperature=0.0, guidance=1.0, order=order)
        model.generate_codes([""], codes, hidden, greedy, torch.Generator().manual_seed(0))
        kept[order] = ~seen[1][0]
    model._generation = real
    assert kept["confidence"].sum() == kept["random"].sum() == 64 - left
    assert sure[kept["confidence"]].min() >= sure[~kept["confidence"]].max()
    assert not torch.equal(kept["confidence"], kept["random"])
    with pytest.raises(ValueError, match="order"):
        Decoding(order="raster")


def test_guidance_one_is_the_conditional_model(model):
    hidden, codes = torch.ones(1, 64, dtype=torch.bool), torch.zeros(1, 64, dtype=torch.long)
    quiet = Decoding(steps=1, temperature=0.0, choice_temperature=0.0, guidance=1.0)
    out = model.generate_codes(["a red circle"], codes, hidden, quiet)
    logits = model.image_head(model._generation(codes, hidden, model.pack_captions(["a red circle"]))[0])
    assert torch.equal(out, logits.argmax(-1))


def test_image_log_prob_of_a_uniform_model(model, batch):
    """With all logits equal each code has probability 1/V: the surrogate is N log(1/V) for any masks."""
    flat = copy.deepcopy(model)
    for parameter in flat.image_head.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        value = flat.image_log_prob(batch["texts"], batch["images"], draws=4)
    assert torch.allclose(value, torch.full((4,), -64 * math.log(model.codebook_size)), rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
def test_attention_kinds_agree_and_bf16_is_close(model, batch, attention):
    reference = model.understanding_flow(batch).logits
    for block in model.blocks:
        block.attention.kind = attention
    try:
        assert torch.allclose(model.understanding_flow(batch).logits, reference, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            low = model.understanding_flow(batch).logits.float()
        assert (low - reference).abs().max() < 0.05 * reference.abs().max()
    finally:
        for block in model.blocks:
            block.attention.kind = "auto"


def test_save_and_load(model, batch, tmp_path):
    import umm_kit as uk

    model.save_pretrained(tmp_path)
    again = uk.load(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and list(tmp_path.glob("*.safetensors"))
    for (name, p), (_, q) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(p, q), name
    assert torch.allclose(again.understanding_flow(batch).loss, model.understanding_flow(batch).loss, rtol=1e-5)
    with pytest.raises(ValueError, match="no model 'nonesuch'"):
        uk.load("nonesuch")


def test_unknown_words_and_unicode_are_read(model, batch):
    assert len(model.generate(["ein roter Kreis ∘ 漢字"], decoding=Decoding(steps=1))) == 1
    assert len(model.understand(batch["images"][:1], ["zxcv qwer?"], Decoding(max_new_tokens=2))) == 1


def test_bad_input(model, batch):
    images, texts = batch["images"], batch["texts"]
    for wrong, message in [
        (images[0], "expected a tensor"),
        ((images * 255).byte(), "divide bytes by 255"),
        (images.repeat(1, 1, 2, 2), "resize"),
        (images * float("nan"), "NaN"),
        (images * 255, "range"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.understand(wrong)
    with pytest.raises(ValueError, match="one each"):
        model.understand(images, ["what?"])
    with pytest.raises(ValueError, match="empty"):
        model.understand(images, [""] * 4)
    with pytest.raises(ValueError, match="needs both"):
        model.generate(texts, images=images)
    with pytest.raises(ValueError, match="do not fit"):
        model.generate(texts, images=images, mask=torch.zeros(4, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="max_text"):
        model.generate(["circle " * 200])
    with pytest.raises(ValueError, match="unique"):
        model.understanding_flow({**batch, "ids": ["a"] * 4})
    with pytest.raises(ValueError, match="layers"):
        model.understanding_flow(batch, layers=[4])
    assert model.generate([]).shape[0] == 0 and model.understand(images[:0]) == []


def test_mask_draws():
    g = torch.Generator().manual_seed(0)
    mask = draw_mask(500, (8, 8), (0.2, 0.6), generator=g)
    share = mask.float().mean(1)
    assert share.min() >= 0.2 - 1 / 64 and share.max() <= 0.6 + 1 / 64 and abs(float(share.mean()) - 0.4) < 0.02
    assert (draw_mask(3, (8, 8), 0.25).sum(1) == 16).all() and draw_mask(3, (8, 8), 1.0).all()
    block = draw_mask(200, (8, 8), 0.25, "contiguous", g).unflatten(1, (8, 8))
    for m in block:
        rows, columns = m.any(1).nonzero()[:, 0], m.any(0).nonzero()[:, 0]
        assert int(m.sum()) == len(rows) * len(columns) and rows[-1] - rows[0] == len(rows) - 1  # one full rectangle
        assert 12 <= int(m.sum()) <= 20
    for wrong in (0, 1.2, (0.5, 0.2)):
        with pytest.raises(ValueError, match="mask ratio"):
            draw_mask(1, (8, 8), wrong)
    with pytest.raises(ValueError, match="layout"):
        draw_mask(1, (8, 8), 0.5, "striped")


def test_a_code_is_the_sum_of_its_digits_and_itself():
    table = CodeTable((4, 3), 2)
    with torch.no_grad():
        table.of_digit.weight.copy_(torch.arange(14).reshape(7, 2))
        table.of_code.weight.zero_()
        table.of_code.weight[6] = 100.0
    # Code 6 = 2 + 4 * 1: digit vectors 2 and 4 + 1, that is [4, 5] and [10, 11].
    assert table.weight[6].tolist() == [114.0, 116.0]
    assert table(torch.tensor([1.0, 0.0]))[6] == 114.0


def test_branches_and_tables_start_small(model):
    """transformers initializes children before parents and draws nothing twice: a rescaling in the parent is lost."""
    d = model.hidden_size
    for layer, inputs in ((model.blocks[0].attention.out, d), (model.blocks[-1].mlp[-1], 2 * d)):
        expected = inputs**-0.5 * (2 * model.num_layers) ** -0.5
        assert 0.9 * expected < layer.weight.std() < 1.1 * expected
    assert not model.image_head.of_code.weight.any() and model.image_head.weight.std() > 0


def test_summed_loss_is_cross_entropy_of_the_labelled_rows():
    torch.manual_seed(0)
    head, hidden, labels = nn.Linear(4, 7), torch.randn(3, 5, 4), torch.randint(7, (3, 5))
    labels[torch.rand(3, 5) < 0.5] = IGNORE
    naive = sum(-head(h).log_softmax(-1)[y] for h, y in zip(hidden.flatten(0, 1), labels.flatten(), strict=True) if y != IGNORE)
    assert torch.allclose(summed_loss(head, hidden, labels, multiple=8), naive)
    assert summed_loss(head, hidden, torch.full_like(labels, IGNORE)) == 0


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_rounds_compute_what_predicting_everything_would(model, guidance):
    """Naively: every round predicts every token of every row, and the last of a random order are shown."""
    texts, rng = ["a red circle", "a ring", "two squares"], torch.Generator().manual_seed(1)
    codes = torch.randint(model.codebook_size, (3, 64), generator=rng)
    hidden = torch.rand(3, 64, generator=rng) < torch.tensor([[1.0], [0.2], [0.0]])
    greedy = Decoding(steps=6, temperature=0.0, guidance=guidance)
    found = model.generate_codes(texts, codes, hidden, greedy, torch.Generator().manual_seed(0))

    noise = torch.Generator().manual_seed(0)
    naive, left = codes.clone(), hidden.clone()
    ids, empty = model.pack_captions(texts), model.pack_captions([""] * 3)
    for step in range(1, 7):
        sure = torch.rand(3, 64, generator=noise)  # the Gumbel noise has the same order
        with torch.no_grad():
            said, free = (model.image_head(model._generation(naive, left, t)[0]) for t in (ids, empty))
        chosen = (free + guidance * (said - free)).argmax(-1)
        for row in range(3):
            keep = math.floor(int(hidden[row].sum()) * math.cos(math.pi / 2 * step / 6))
            order = sorted(torch.nonzero(left[row])[:, 0].tolist(), key=lambda k, row=row: float(sure[row, k]))
            for k in order[keep:]:
                naive[row, k], left[row, k] = chosen[row, k], False
    assert torch.equal(found, naive) and torch.equal(found[2], codes[2]), "a row without holes is left alone"


# --- latents of texts, and one step out and back in ---------------------------------------------------------------------


def test_text_states_are_means_over_words_whatever_the_padding(model):
    texts = ["a red circle", "a large red circle and a small blue square"]
    both = model.text_states(texts, layers=[0, 2])
    for k, text in enumerate(texts):
        ids = model.pack_captions([text])
        codes = torch.zeros(1, model.num_image_tokens, dtype=torch.long)
        seen = []
        hook = model.blocks[1].register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        model._generation(codes, torch.ones_like(codes, dtype=torch.bool), ids)  # with an image after the words
        hook.remove()
        torch.testing.assert_close(both[2][k], seen[0][0, : ids.shape[1]].mean(0), atol=1e-5, rtol=1e-4)
    assert both[0].shape == (2, model.hidden_size)


def test_regenerate_reads_the_image_that_the_likeliest_codes_make(model):
    texts = ["a red circle", "a blue square"]
    states = model.regenerate(texts, layers=[1, 3])
    hidden = torch.ones(2, model.num_image_tokens, dtype=torch.bool)
    codes = model.image_head(
        model._generation(torch.zeros_like(hidden, dtype=torch.long), hidden, model.pack_captions(texts))[0]
    ).argmax(-1)
    batch = {"images": torch.zeros(2, 3, 32, 32), "ids": ["a", "b"], "texts": texts, "codes": codes}
    read = model.understanding_flow(batch, layers=[1, 3]).hidden_states
    for layer in (1, 3):
        torch.testing.assert_close(states[layer], read[layer], atol=1e-5, rtol=1e-4)
    noisy = [model.regenerate(texts, [3], generator=torch.Generator().manual_seed(s))[3] for s in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])
    each = lambda seeds: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
    both, alone = (
        model.regenerate(texts, [3], generator=each([4, 5]))[3],
        model.regenerate(texts[1:], [3], generator=each([5]))[3],
    )
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="1 generators came for 2 rows"):
        model.regenerate(texts, generator=each([4]))
    with pytest.raises(ValueError, match="temperature"):
        model.regenerate(texts, temperature=0)


@pytest.mark.parametrize("hard", [False, True])
def test_gradient_through_drawing_and_reading(model, hard):
    """Expected embeddings: equal to finite differences. Straight-through: the gradient is that of the soft pass at hard codes."""
    small = copy.deepcopy(model).double()
    weight = small.image_head.of_digit.weight

    def score():
        return small.regenerate(["a red circle"], [3], temperature=2.0, hard=hard)[3].square().mean()

    gradient = torch.autograd.grad(score(), weight)[0]
    assert gradient.abs().max() > 0, "the loss reaches the head that draws"
    if not hard:
        assert_foretold(score, weight, gradient)
