"""The third family: what stands for noise, what a velocity is and where it leads, latents, and training by every trainer."""

import copy
import itertools
import json

import pytest
import torch
from families import assert_foretold, small

import umm_kit as uk
from umm_kit.models.base import Decoding
from umm_kit.models.flowmatching import LOWEST, FlowUMM
from umm_kit.models.latents import LatentTokenizer, LatentTokenizerConfig
from umm_kit.models.tokenizers import ImageTokenizer, ImageTokenizerConfig
from umm_kit.trainers.diva import DIVAConfig, DIVATrainer
from umm_kit.trainers.preference import PreferenceConfig, PreferenceTrainer
from umm_kit.trainers.pretrain import FlowConfig, train
from umm_kit.trainers.tokenizer import TokenizerConfig
from umm_kit.trainers.tokenizer import train as train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return small("flow")


@pytest.fixture(scope="module")
def batch():
    data = uk.Shapes("test", n=4)
    return uk.collate([data[i] for i in range(4)])


# --- latents -----------------------------------------------------------------------------------------------------------


def test_latents_are_standardised_and_decode_as_before(batch):
    tokenizer = LatentTokenizer(LatentTokenizerConfig(channels=8, depth=1)).eval()
    before = tokenizer.reconstruct(batch["images"])
    tokenizer.standardise(batch["images"])
    z = tokenizer.encode(batch["images"])
    assert z.shape == (4, 64, 8) and float(z.mean((0, 1)).abs().max()) < 1e-5
    torch.testing.assert_close(z.flatten(0, 1).std(0), torch.ones(8))
    torch.testing.assert_close(tokenizer.reconstruct(batch["images"]), before)
    with pytest.raises(ValueError, match=r"latents are \(4, 63, 8\); expected \[batch, 64, 8\]"):
        tokenizer.decode(z[:, 1:])
    for wrong in (dict(patch_size=3), dict(patch_size=64), dict(latent_channels=0), dict(noise=-0.1), dict(noise=float("nan"))):
        with pytest.raises(ValueError, match="expected"):
            LatentTokenizerConfig(**wrong)


def test_noise_in_training_is_in_units_of_the_latents(batch):
    tokenizer = LatentTokenizer(LatentTokenizerConfig(channels=8, depth=1, noise=0.5))
    x, seen = batch["images"], []
    tokenizer.autoencoder.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for mode in (False, True):
        tokenizer.train(mode)(x)
    noise, std = seen[1] - seen[0], seen[0].std((0, 2, 3))
    torch.testing.assert_close(noise.std((0, 2, 3)) / std, torch.full((8,), 0.5), atol=0.06, rtol=0)
    assert torch.equal(seen[0], tokenizer.autoencoder.encode(x * 2 - 1).latents)


# --- the flow ----------------------------------------------------------------------------------------------------------


def test_a_hidden_token_is_latent_and_noise_by_its_level(model):
    z, e = torch.full((1, 64, 4), 2.0), torch.full((1, 64, 4), -1.0)
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, 3] = True
    x, levels = model._noisy(z, mask, torch.tensor([0.25]), e)
    assert x[0, 3, 0] == pytest.approx(0.75 * 2 + 0.25 * -1) and (x[0, [0, 1, 2, 4]] == 2).all()
    assert levels[0, 3] == 0.25 and levels.sum() == 0.25


def test_noise_belongs_to_the_ids(model, batch):
    out, again = (model.generation_flow(batch, mask=torch.ones(4, 64, dtype=torch.bool)) for _ in range(2))
    assert torch.equal(out.target, again.target) and not torch.equal(out.target[0], out.target[1])
    one = {k: batch[k][2:3] for k in ("images", "texts", "ids")}
    alone = model.generation_flow(one, mask=torch.ones(1, 64, dtype=torch.bool))
    torch.testing.assert_close(alone.target[0], out.target[2])
    other = model.generation_flow({**batch, "ids": list("abcd")}, mask=torch.ones(4, 64, dtype=torch.bool))
    assert not torch.equal(other.target, out.target)
    levels = model._drawn_from(4000, [torch.Generator().manual_seed(0)])[0]
    assert LOWEST < float(levels.min()) < 0.03 and 0.99 < float(levels.max()) <= 1.0
    middle = LOWEST + (1 - LOWEST) * 2 / 3  # a level of 2 u / (1 + u) at u = 1/2
    assert float((levels < middle).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_the_true_velocity_leads_to_the_image(model, batch, monkeypatch):
    """v = e - z = (x_s - z) / s: the steps end at z, any number of them, from noise of any size."""
    z = model.image_tokenizer.encode(batch["images"])
    monkeypatch.setattr(model, "_velocity", lambda x, levels, ids: ((x - z) / levels[..., None], {}))
    for steps, temperature in ((1, 1.0), (7, 1.0), (3, 0.3)):
        drawn = model.generate(batch["texts"], decoding=Decoding(steps=steps, temperature=temperature, guidance=1.0))
        torch.testing.assert_close(drawn, model.image_tokenizer.decode(z), atol=1e-4, rtol=0)


def test_each_step_predicts_the_image_and_noises_it_anew(model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        model, "_velocity", lambda x, levels, ids: (seen.append((x, float(levels[0, 0]))) or torch.ones_like(x), {})
    )
    model.generate(["a red circle"], decoding=Decoding(steps=3, guidance=1.0), generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(seen[0][0].shape, generator=draws)
    assert [s for _, s in seen] == pytest.approx([1, 4 / 5, 1 / 2])  # 2 u / (1 + u) of 1, 2/3, 1/3
    for (_, level), (there, below) in itertools.pairwise(seen):
        x = (1 - below) * (x - level) + below * torch.randn(x.shape, generator=draws)
        torch.testing.assert_close(there, x)


def test_guidance_goes_on_from_the_empty_text(model, monkeypatch):
    """Two constant velocities: the drawing ends where their extrapolation leads."""
    monkeypatch.setattr(model, "_velocity", lambda x, levels, ids: (torch.full_like(x, float(ids.shape[1] > 3)), {}))
    ends = []
    monkeypatch.setattr(model.image_tokenizer, "decode", lambda x: ends.append(x) or torch.zeros(1, 3, 32, 32))
    for guidance in (1.0, 3.0):
        model.generate(
            ["a red circle"], decoding=Decoding(steps=2, guidance=guidance), generator=torch.Generator().manual_seed(0)
        )
    torch.testing.assert_close(ends[0] - ends[1], torch.full_like(ends[0], 2.0))


def test_a_likelihood_is_compared_under_the_same_noise(model, batch):
    codes = model.image_tokenizer.encode(batch["images"])

    def said(codes, seed=0):
        noise = torch.Generator().manual_seed(seed)
        return model.image_log_prob(batch["texts"][:1] * len(codes), codes=codes, draws=4, generator=noise)

    same = said(codes[:1].expand(3, -1, -1))
    assert torch.allclose(same, same[:1].expand(3), rtol=1e-5) and not torch.allclose(said(codes[:1], 1), same[:1])
    a, b = said(codes[:1])[0], said(codes[1:2])[0]
    assert a != b and a < 0
    with pytest.raises(ValueError, match="images or codes"):
        model.image_log_prob(["a"])


def test_an_encoder_of_its_own_sees_by_itself(batch):
    """Decoupled: understanding is moved by its encoder and not by what latents are embedded by, generation the reverse."""
    from umm_kit.data.language import vocabulary_corpus

    torch.manual_seed(0)
    model = FlowUMM.tiny(list(vocabulary_corpus()), separate_encoder=True)
    u, g = model.understanding_flow(batch).loss, model.generation_flow(batch, mask=torch.ones(4, 64, dtype=torch.bool)).loss
    encoder, latents = model.encoder[0].weight, model.latent_embedding.weight
    moved = [torch.autograd.grad(loss, (encoder, latents), allow_unused=True) for loss in (u, g)]
    assert moved[0][0].abs().max() > 0 and moved[0][1] is None and moved[1][0] is None and moved[1][1].abs().max() > 0
    assert uk.check_model(model, batch).tier == "diagnosable, drivable, preference-trainable"


# --- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_trained_saved_and_loaded(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    common = dict(disable_tqdm=True, use_cpu=True, logging_steps=1)
    train_tokenizer(TokenizerConfig(output_dir=str(tokenizer), latent=True, channels=32, depth=2, max_steps=4, bf16=False,
                                    per_device_train_batch_size=8, warmup_steps=1, **common))  # fmt: skip
    made = json.loads((tokenizer / "run.json").read_text())["scores"]
    assert made.keys() == {"psnr_db", "n"}
    config = FlowConfig.tiny(output_dir=str(tmp_path / "run"), image_tokenizer=str(tokenizer), max_steps=8, **common)
    model = train(config)
    log = [e for e in json.loads((tmp_path / "run/run.json").read_text())["log"] if "generation_loss" in e]
    assert log[-1]["generation_loss"] < log[0]["generation_loss"] < 6
    again, data = uk.load(tmp_path / "run", device="cpu"), uk.Shapes("test", n=2)
    batch = uk.collate([data[0], data[1]])
    losses = [m.generation_flow(batch, generator=torch.Generator().manual_seed(0)).loss for m in (model, again)]
    assert type(again) is FlowUMM and torch.equal(*losses)
    with pytest.raises(ValueError, match=r"holds a umm_latent_tokenizer; .* without --latent"):
        train(uk.PretrainConfig.tiny(output_dir=str(tmp_path / "other"), image_tokenizer=str(tokenizer), **common))


def test_a_decoder_is_trained_further_and_latents_stay(tmp_path, batch):
    common = dict(disable_tqdm=True, use_cpu=True, logging_steps=1, bf16=False, per_device_train_batch_size=8, warmup_steps=0)
    common |= dict(channels=16, depth=2, max_steps=2)
    first = train_tokenizer(TokenizerConfig(output_dir=str(tmp_path / "first"), latent=True, **common))
    settings = dict(output_dir=str(tmp_path / "second"), decoder_of=str(tmp_path / "first"), **common)
    second = train_tokenizer(TokenizerConfig(**settings))
    assert torch.equal(first.encode(batch["images"]), second.encode(batch["images"]))
    z = first.encode(batch["images"])
    assert not torch.equal(first.decode(z), second.decode(z))
    with pytest.raises(ValueError, match=r"no image tokenizer in .*nowhere"):
        train_tokenizer(TokenizerConfig(**{**settings, "decoder_of": str(tmp_path / "nowhere")}))
    ImageTokenizer(ImageTokenizerConfig(channels=16, depth=1)).save_pretrained(tmp_path / "codes")
    with pytest.raises(ValueError, match=r"holds a umm_image_tokenizer; expected an image tokenizer with --latent"):
        train_tokenizer(TokenizerConfig(**{**settings, "decoder_of": str(tmp_path / "codes")}))


@pytest.mark.slow
def test_diva_and_preferences_train_it(tmp_path):
    """Stage 1's biases are on the velocity; drawings are ranked and compared as pixels."""
    small_run = dict(per_device_train_batch_size=8, logging_steps=1, use_cpu=True, disable_tqdm=True, warmup_steps=0)
    model = small("flow")
    config = DIVAConfig(
        output_dir=str(tmp_path / "diva"), stage1_steps=3, max_steps=2, rank=4, factor_size=16, layers=[2], **small_run
    )
    before = model.blocks[1].mlp[0].weight.clone()
    DIVATrainer(model, config, uk.Shapes("train", n=64)).train()
    log = json.loads((tmp_path / "diva/stage1/run.json").read_text())["log"]
    assert not torch.equal(model.blocks[1].mlp[0].weight, before) and abs(log[0]["generation_gain"]) < 1
    sizes = dict(rounds=1, prompts=4, rollouts=2, pairs=2, max_steps=2, lora_rank=0, drawing_steps=2, draws=2)
    chosen = PreferenceConfig(output_dir=str(tmp_path / "dpo"), threshold=0.0, learning_rate=1e-3, **sizes, **small_run)
    trainer = PreferenceTrainer(model, chosen, uk.Shapes("train", n=64))
    trainer.fit()
    assert trainer.rollouts.drawn.shape == (4, 2, 3, 32, 32) and trainer.state.log_history[0]["preference_loss"] > 0


def test_regenerate_reads_one_euler_step(model):
    texts = ["a red circle", "a blue square"]
    states = model.regenerate(texts, [0, 3])
    blank = torch.zeros(2, model.num_image_tokens, model.image_tokenizer.config.latent_channels)
    hidden = torch.ones(blank.shape[:2])
    drawn = -model._velocity(blank, hidden, model.pack_captions(texts))[0]
    batch = {"images": torch.zeros(2, 3, 32, 32), "ids": ["a", "b"], "texts": texts, "codes": drawn}
    read = model.understanding_flow(batch, layers=[0, 3]).hidden_states
    for layer in (0, 3):
        torch.testing.assert_close(states[layer], read[layer], atol=1e-5, rtol=1e-4)
    each = lambda seeds: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
    both, alone = (
        model.regenerate(texts, [3], generator=each([4, 5]))[3],
        model.regenerate(texts[1:], [3], generator=each([5]))[3],
    )
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="1 generators came for 2 rows"):
        model.regenerate(texts, generator=each([4]))
    from umm_kit.data.language import vocabulary_corpus

    apart = FlowUMM.tiny(list(vocabulary_corpus()), separate_encoder=True)
    with pytest.raises(NotImplementedError, match="--capacity heads"):
        apart.regenerate(texts)


def test_gradient_through_drawing_and_reading(model):
    exact = copy.deepcopy(model).double()
    weight = exact.image_head.weight

    def score():
        return exact.regenerate(["a red circle"], [3], generator=torch.Generator().manual_seed(0))[3].square().mean()

    assert_foretold(score, weight, torch.autograd.grad(score(), weight)[0])
