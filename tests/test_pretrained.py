"""Checkpoints of real classes: small random Janus and Emu3, against transformers' own forward passes and decoding."""

import json

import pytest
import torch
from families import PRETRAINED, small
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedTokenizerFast

import umm_kit as uk
from umm_kit import cli
from umm_kit.models.base import Decoding
from umm_kit.models.causal import SLOT
from umm_kit.models.pretrained import Emu3UMM, JanusUMM, LiquidUMM
from umm_kit.models.samples import random_model, word_tokenizer
from umm_kit.trainers.diva import DIVAConfig, DIVATrainer, train
from umm_kit.trainers.preference import PreferenceConfig, PreferenceTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=PRETRAINED)
def model(request):
    return small(request.param)


@pytest.fixture(scope="module")
def batch():
    data = uk.Shapes("test", n=3, seed=0)
    return uk.collate([data[i] for i in range(3)])


def as_transformers(model, rows, batch):
    """The inputs of transformers' own forward for rows with slots: placeholders there, and of Emu3 at the ends of rows, too."""
    if isinstance(model, LiquidUMM):
        ids, real = model._rows(rows)
        ids[ids == SLOT] = model.code_words[model.image_tokenizer.encode(batch["images"])].flatten()
        return {"input_ids": ids, "attention_mask": real.long()}
    place = model.model.config.image_token_id
    ids, real = model._rows(rows)
    ids = torch.where(ids == SLOT, place, ids)
    more = {"pixel_values": model.normalised(batch["images"])}
    if isinstance(model, Emu3UMM):
        ids = torch.where(ids == model.model.vocabulary_mapping.eol_token_id, place, ids)
        more["image_sizes"] = torch.tensor([[32, 32]] * len(rows))
    return {"input_ids": ids, "attention_mask": real.long(), **more}


# --- the flows, against transformers' own --------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    again = uk.load(tmp_path, device="cpu")
    assert type(again) is type(model) and again.image_size == 32
    mask, codes = torch.arange(model.num_image_tokens).expand(3, -1) % 3 == 0, torch.arange(model.num_image_tokens)[None]
    assert torch.equal(model.understanding_flow(batch).loss, again.understanding_flow(batch).loss)
    assert torch.equal(model.generation_flow(batch, mask=mask).loss, again.generation_flow(batch, mask=mask).loss)
    assert torch.equal(model.image_tokenizer.encode(batch["images"]), again.image_tokenizer.encode(batch["images"]))
    if not isinstance(model, LiquidUMM):
        assert torch.equal(model.image_tokenizer.decode(codes), again.image_tokenizer.decode(codes))


def test_layers_are_shared_by_devices(model, batch, tmp_path):
    """On a machine with one: every layer hands its inputs over and takes its output back, and nothing else changes."""
    model.save_pretrained(tmp_path)
    one, two = uk.load(tmp_path, "cpu"), uk.load(tmp_path, "cpu:0,cpu")
    assert [str(layer._hf_hook.execution_device) for layer in two.layers] == ["cpu:0"] * 2 + ["cpu"] * 2
    found = []
    for m in (one, two):
        out = m.understanding_flow(batch)
        out.loss.backward()
        drawn = m.image_log_prob(batch["texts"], batch["images"]) if hasattr(m, "image_log_prob") else out.loss
        gradient = next(iter(m.layer_parameters().values()))[0].grad
        found.append([*out.hidden_states.values(), gradient, drawn, m.understand(batch["images"])])
    assert all(torch.equal(a, b) for a, b in zip(found[0][:-1], found[1][:-1], strict=True)) and found[0][-1] == found[1][-1]


def test_shared_layers_are_for_reading(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    two, config = uk.load(tmp_path / "m", "cpu,cpu"), DIVAConfig.tiny(output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="load it onto one device to train it"):
        DIVATrainer(two, config, uk.Shapes("train", n=8, image_size=32))


def test_a_small_model_has_one_device():
    with pytest.raises(ValueError, match="several devices share the layers of real checkpoints"):
        uk.load("tiny-masked", "cpu,cpu")


def test_captions_cost_what_transformers_says(model, batch):
    """Its own forward, with labels on the caption: the same mean loss."""
    asked = [model.asked(None) for _ in batch["texts"]]
    said = [[*model.spoken(text), model.words.eos_token_id] for text in batch["texts"]]
    inputs = as_transformers(model, [a + s for a, s in zip(asked, said, strict=True)], batch)
    labels = torch.full_like(inputs["input_ids"], -100)
    for k, (a, s) in enumerate(zip(asked, said, strict=True)):
        labels[k, len(a) : len(a) + len(s)] = torch.tensor(s)
    ours = model.understanding_flow(batch)
    torch.testing.assert_close(ours.loss, model.model(**inputs, labels=labels).loss)


def test_states_are_those_of_transformers_before_its_last_norm(model, batch):
    row = [model.asked(None)] * 3
    with torch.no_grad():
        theirs = model.model(**as_transformers(model, row, batch), output_hidden_states=True).hidden_states
        ours = model.understanding_flow({**batch, "texts": [""] * 3}).hidden_states
    at = [k for k, word in enumerate(row[0]) if word == SLOT]
    for layer in range(model.num_layers):
        torch.testing.assert_close(ours[layer], theirs[layer][:, at])
    torch.testing.assert_close(model.body.norm(ours[model.num_layers]), theirs[-1][:, at])
    assert not torch.allclose(ours[model.num_layers], theirs[-1][:, at]), "transformers' last state is normalised"


def test_an_instruction_stands_before_the_image_and_a_question_after_it(model):
    first = model.asked(None).index(SLOT)
    assert model.spoken("Describe this image in detail")[0] in model.asked(None)[:first]
    asked = model.asked("how many circles are there")
    assert asked[: asked.index(SLOT)] == model.asked("what is red")[: asked.index(SLOT)]
    tail = len(asked) - asked[::-1].index(SLOT)
    assert all(word in asked[tail:] for word in model.spoken("how many circles are there"))
    assert not set(model.spoken("a red circle")[1:]) & set(model.asked(None)), "no caption stands before the image"


def test_questions_get_answers_as_targets(model, batch):
    asked = {**batch, "prompts": ["is there a red circle", None, "how many"], "texts": ["yes", batch["texts"][1], "two"]}
    out = model.understanding_flow(asked)
    alone = [model.understanding_flow({k: v[i : i + 1] for k, v in asked.items() if k != "factors"}) for i in range(3)]
    torch.testing.assert_close(out.per_example_loss, torch.cat([one.per_example_loss for one in alone]))


# --- generation --------------------------------------------------------------------------------------------------------


def test_a_code_is_predicted_one_place_before_its_own(model, batch):
    codes = model.image_tokenizer.encode(batch["images"])
    whole = torch.ones_like(codes, dtype=torch.bool)
    changed = codes.clone()
    j = 7
    changed[:, j] = (changed[:, j] + 1) % 64
    with torch.no_grad():
        a, b = (model.generation_flow({**batch, "codes": c}, mask=whole) for c in (codes, changed))
    assert torch.equal(a.logits[:, : j + 1], b.logits[:, : j + 1]) and not torch.equal(a.logits[:, j + 1], b.logits[:, j + 1])
    for layer in range(model.num_layers + 1):
        assert torch.equal(a.hidden_states[layer][:, :j], b.hidden_states[layer][:, :j])
        assert not torch.equal(a.hidden_states[layer][:, j], b.hidden_states[layer][:, j]), "a state stands where its input does"


def test_a_hidden_code_is_in_no_state(model, batch):
    codes = model.image_tokenizer.encode(batch["images"])
    mask = torch.zeros_like(codes, dtype=torch.bool)
    mask[:, 5] = True
    changed = codes.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 64
    with torch.no_grad():
        a, b = (model.generation_flow({**batch, "codes": c}, mask=mask) for c in (codes, changed))
    for layer in a.hidden_states:
        assert torch.equal(a.hidden_states[layer], b.hidden_states[layer])
    assert (a.labels != -100).sum() == 3 and not torch.equal(a.loss, b.loss)


def test_an_image_that_is_hidden_whole_costs_its_likelihood(model, batch):
    """-log p of the codes, which a loop of transformers' forward over growing rows gives, too."""
    codes = model.image_tokenizer.encode(batch["images"])[:1]
    one = {"images": batch["images"][:1], "texts": batch["texts"][:1], "ids": batch["ids"][:1], "codes": codes}
    with torch.no_grad():
        out = model.generation_flow(one, mask=torch.ones_like(codes, dtype=torch.bool))
        total, row = 0.0, model.told(one["texts"][0])
        embeds = [model.embedding(torch.tensor([word])) if word != SLOT else None for word in row]
        j = 0
        for place, word in enumerate(row):
            if word == SLOT:
                last = model.body(inputs_embeds=torch.cat(embeds[:place])[None]).last_hidden_state[0, -1]
                total += float(model.code_logits(last).log_softmax(-1)[codes[0, j]])
                embeds[place], j = model.embed_codes(codes[:, j : j + 1])[0], j + 1
        assert float(model.image_log_prob(one["texts"], codes=codes)) == pytest.approx(total, abs=1e-3)
        assert float(out.per_example_loss * model.num_image_tokens) == pytest.approx(-total, abs=1e-3)


def test_janus_draws_the_codes_that_transformers_draws():
    model = small("janus")
    text = "a red circle"
    row = model.told(text)
    start = torch.tensor([row[: row.index(SLOT)]])
    settings = model.model.generation_config
    settings.generation_kwargs = {"boi_token_id": model.boi}
    settings.pad_token_id, settings.bos_token_id, settings.eos_token_id = 0, 2, 3
    theirs = model.model.generate(
        start, attention_mask=torch.ones_like(start), generation_mode="image", do_sample=False, guidance_scale=4.0,
        generation_config=settings,
    )  # fmt: skip
    blank = torch.zeros(1, 16, dtype=torch.long)
    ours = model.generate_codes([text], blank, blank == 0, Decoding(temperature=0.0, guidance=4.0))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_what_is_drawn_together_is_drawn_alone(model, guidance):
    """Rows of other lengths beside it change nothing; greedy, so that noise cannot hide a difference."""
    texts = ["a red circle", "a large blue square and a small green triangle"]
    blank = torch.zeros(2, model.num_image_tokens, dtype=torch.long)
    decoding = Decoding(temperature=0.0, guidance=guidance)
    both = model.generate_codes(texts, blank, blank == 0, decoding)
    alone = [model.generate_codes([text], blank[:1], blank[:1] == 0, decoding) for text in texts]
    assert torch.equal(both, torch.cat(alone))


def test_drawing_follows_the_likelihood(model):
    """At temperature 1 without guidance, a drawing's first code has the frequencies that the flow gives it."""
    n, text = 400, "a red circle"
    blank = torch.zeros(n, model.num_image_tokens, dtype=torch.long)
    codes = model.generate_codes([text] * n, blank, blank == 0, Decoding(guidance=1.0), torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = model.code_logits(model._drawing([text], codes[:1], blank[:1] == 1, [])[0][0, 0]).softmax(-1)
    seen = torch.bincount(codes[:, 0], minlength=64) / n
    assert float((seen - p).abs().sum() / 2) < 0.25 and len(codes.unique(dim=0)) > n // 2


def test_inpainting_keeps_what_is_shown(model, batch):
    if isinstance(model, LiquidUMM):
        pytest.skip("Liquid makes no pixels")
    mask = torch.zeros(3, *model.grid, dtype=torch.bool)
    mask[:, 1] = True
    drawn = model.generate(batch["texts"], batch["images"], mask, Decoding(), torch.Generator().manual_seed(0))
    p = 32 // model.grid[0]
    assert torch.equal(drawn[:, :, :p], batch["images"][:, :, :p]) and not torch.equal(drawn, batch["images"])


# --- understanding -----------------------------------------------------------------------------------------------------


def test_it_says_what_transformers_says(model, batch):
    prompts = ["how many circles are there in the image", "what is red", "is there a large blue square"]
    ours = model.understand(batch["images"], prompts, Decoding(max_new_tokens=6))
    for k, prompt in enumerate(prompts):
        one = {"images": batch["images"][k : k + 1]}
        inputs = as_transformers(model, [model.asked(prompt)], one)
        out = model.model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=3, pad_token_id=0)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert ours[k] == model.words.decode(new, skip_special_tokens=True).strip()


# --- image tokenizer ---------------------------------------------------------------------------------------------------


def test_janus_encodes_by_the_codebook_that_it_decodes_with():
    """A latent at a code's direction is that code, whatever the code's length; transformers' own argmin is not of that kind."""
    model = small("janus")
    vq = model.model.model.vqmodel
    image = uk.Shapes("test", n=1)[0]["images"][None]
    with torch.no_grad():
        z = vq.quant_conv(vq.encoder(model.normalised(image))).flatten(2)[0].T
        book = nn.functional.normalize(vq.quantize.embedding.weight, dim=1)
        nearest = (nn.functional.normalize(z, dim=1)[:, None] - book[None]).norm(dim=-1).argmin(1)
        assert torch.equal(model.image_tokenizer.encode(image)[0], nearest)
        assert not torch.equal(vq.encode(model.normalised(image)).image_tokens.flatten(), nearest)


def test_training_leaves_the_image_tokenizer_alone(model):
    vq = model.image_tokenizer.vq
    model.train().requires_grad_(True)
    assert not vq.training and not any(p.requires_grad for p in vq.parameters()) and model.body.training
    model.eval()


# --- trainers and diagnoses --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_diva_trains_it(batch, tmp_path, rank):
    model = small("janus" if rank else "emu3")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    config = DIVAConfig(
        output_dir=str(tmp_path), stage1_steps=2, max_steps=2, per_device_train_batch_size=8, logging_steps=1, rank=4,
        factor_size=16, layers=[2], lora_rank=rank, use_cpu=True, disable_tqdm=True, warmup_steps=0, save_steps=1,
    )  # fmt: skip
    DIVATrainer(model, config, uk.Shapes("train", n=64)).train()
    moved = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert moved and all(".layers.1." in name for name in moved), "the middle layer alone is trained"


@pytest.mark.slow
def test_adapters_train_a_base_of_16_bits(tmp_path):
    """What a model of billions needs: the base stays as it was, in half the memory, and the adapter alone is in float32."""
    small("janus").save_pretrained(tmp_path / "base")
    settings = {"stage1_steps": 2, "max_steps": 2, "per_device_train_batch_size": 8, "rank": 4, "factor_size": 16, "layers": [2]}
    quiet = {"use_cpu": True, "disable_tqdm": True, "warmup_steps": 0, "save_steps": 2, "logging_steps": 1}
    config = DIVAConfig(
        output_dir=str(tmp_path / "run"),
        model=str(tmp_path / "base"),
        load_dtype="bfloat16",
        lora_rank=2,
        learning_rate=1e-2,
        **settings,
        **quiet,
    )
    trained, base = train(config), uk.load(tmp_path / "base", device="cpu", dtype="bfloat16")
    assert {p.dtype for p in trained.body.parameters()} == {torch.bfloat16}
    moved = {name for name, p in trained.state_dict().items() if not torch.equal(p, base.state_dict()[name])}
    assert moved and all(".layers.1." in name for name in moved)
    with safe_open(tmp_path / "run/adapter/adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}
    for dtype in ("float32", "bfloat16"):  # put onto its base again, whatever precision is asked for
        again = uk.load(tmp_path / "run/adapter", device="cpu", dtype=dtype)
        for name, p in again.body.state_dict().items():
            assert p.dtype == getattr(torch, dtype) and torch.allclose(
                p.float(), trained.body.state_dict()[name].float(), atol=1e-2
            )
    with torch.no_grad():
        base.embedding.weight[0] += 1
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="trained on other weights"):
        uk.load(tmp_path / "run/adapter", device="cpu")
    with pytest.raises(ValueError, match="set lora_rank"):
        DIVAConfig(output_dir=str(tmp_path), load_dtype="bfloat16")


@pytest.mark.slow
def test_preferences_train_it(tmp_path):
    model = small("janus")
    config = PreferenceConfig(
        output_dir=str(tmp_path), rounds=1, prompts=4, rollouts=2, pairs=2, max_steps=2, threshold=0.0, lora_rank=0,
        per_device_train_batch_size=4, logging_steps=1, disable_tqdm=True, use_cpu=True, learning_rate=1e-3,
    )  # fmt: skip
    before = model.body.layers[0].mlp.up_proj.weight.clone()
    trainer = PreferenceTrainer(model, config, uk.Shapes("train", n=64))
    trainer.fit()
    assert not torch.equal(model.body.layers[0].mlp.up_proj.weight, before)
    assert (tmp_path / "rollouts/0/0.safetensors").exists() and "preference_loss" in trainer.state.log_history[0]


@pytest.mark.slow
def test_it_is_diagnosed_like_any_model(model):
    found = uk.diagnose(model, uk.Shapes("test", n=128, seed=0), ["gradients", "rank"], mask_ratios=[0.4], progress=False)
    frame = found.to_frame()
    assert set(frame.layer.dropna()) >= {1, 2, 3, 4}, frame


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_another_class_is_refused(model):
    with pytest.raises(ValueError, match=r"takes a \w+; a Linear came"):
        type(model)(nn.Linear(1, 1), model.words)


def test_check_asks_for_pictures_of_the_models_size(tmp_path, capsys):
    sample = random_model("emu3")
    Emu3UMM(sample.model, sample.words, {"image_size": 64}).save_pretrained(tmp_path)
    assert uk.load(tmp_path, device="cpu").image_size == 64
    assert cli.main(["check", str(tmp_path)]) == 0 and "diagnosable, drivable" in capsys.readouterr().out


def test_sixteen_bits_leave_the_image_tokenizer_as_it_is(tmp_path):
    """Codes near an edge must not depend on the precision of the backbone."""
    small("janus").save_pretrained(tmp_path)
    for name in (tmp_path, "tiny-tight-0"):
        whole, half = (uk.load(name, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
        images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        assert half.embedding.weight.dtype == torch.bfloat16
        assert torch.equal(whole.image_tokenizer.encode(images), half.image_tokenizer.encode(images))
        vq = [getattr(m.image_tokenizer, "vq", m.image_tokenizer).state_dict() for m in (whole, half)]
        assert all(torch.equal(value, vq[1][key]) for key, value in vq[0].items())


def test_a_tokenizer_without_places_for_images_is_refused():
    plain = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer("janus").backend_tokenizer, pad_token="<pad>", eos_token="<eos>"
    )
    with pytest.raises(ValueError, match="no boi_token"):
        JanusUMM(small("janus").model, plain)


def test_liquid_without_its_image_tokenizer_is_refused(tmp_path):
    model = small("liquid")
    with pytest.raises(ValueError, match="folder image_tokenizer beside"):
        LiquidUMM(model.model, model.words)
    model.model.config.vocab_size -= 1
    with pytest.raises(ValueError, match="do not fit a vocabulary"):
        LiquidUMM(model.model, model.words, vq=model.vq)


def test_vectors_are_no_condition(model, batch):
    with pytest.raises(NotImplementedError, match="draws from words"):
        model.generation_flow({**batch, "condition": torch.zeros(3, 1, 64)})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, b: m.understand(torch.rand(1, 3, 16, 16)), r"reads \(32, 32\)"),
        (lambda m, b: m.understand(b["images"], ["what"]), "1 prompts came with 3 images"),
        (lambda m, b: m.understand(b["images"], ["what", " ", "who"]), "a prompt is empty"),
        (lambda m, b: m.generate(["a"], b["images"]), "both images= and mask="),
        (lambda m, b: m.image_log_prob(["a"]), "images or codes"),
        (lambda m, b: m.generation_flow(b, mask=torch.ones(3, 5, dtype=torch.bool)), "the mask is"),
    ],
)
def test_bad_input_is_refused(model, batch, call, said):
    with pytest.raises(ValueError, match=said):
        call(model, batch)


def test_weights_that_could_run_code_are_refused(tmp_path):
    model = small("janus")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no janus model could be read"):
        uk.load(tmp_path, device="cpu")


def test_an_id_of_the_hub_is_not_fetched_unasked(monkeypatch):
    with pytest.raises(ValueError, match=r"no model 'deepseek-community/Janus-Pro-1B'.*download=True"):
        uk.load("deepseek-community/Janus-Pro-1B")


def test_an_unknown_family_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "show-o"}))
    with pytest.raises(ValueError, match=r"a 'show-o' model; this version loads \['emu3', 'gemma', 'janus', 'umm_auto"):
        uk.load(tmp_path)
