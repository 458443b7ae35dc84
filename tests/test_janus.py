"""A foreign family behind the contract: what the flow tests ask of our own models, asked of a tiny random Janus."""

import copy

import pytest
import torch
from janus_adapter import JanusAdapter
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig
from transformers.models.janus.modeling_janus import JanusForConditionalGeneration

from umm_kit.data.language import vocabulary_corpus
from umm_kit.data.shapes import Shapes
from umm_kit.features import extract
from umm_kit.models.base import check_model, collate
from umm_kit.models.tokenizers import train_text_tokenizer

FLOWS = ("understanding_flow", "generation_flow")


@pytest.fixture(scope="module")
def words():
    return train_text_tokenizer(vocabulary_corpus())


@pytest.fixture(scope="module")
def model(words):
    torch.manual_seed(0)
    vision = JanusVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=64,
        num_image_tokens=16, mlp_ratio=2.0,
    )  # fmt: skip
    vq = JanusVQVAEConfig(
        embed_dim=8, num_embeddings=64, latent_channels=16, base_channels=32, channel_multiplier=[1, 1, 1, 1],
        num_res_blocks=1, projection_dim=64, image_token_embed_dim=64,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    janus = JanusForConditionalGeneration(JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=100))
    return JanusAdapter(janus, words).eval()


@pytest.fixture(scope="module")
def batch():
    data = Shapes("test", n=4)
    return collate([data[i] for i in range(4)])


def generation(model, batch, seed=0, ratio=0.5, **options):
    return model.generation_flow(batch, ratio, generator=torch.Generator().manual_seed(seed), **options)


def test_is_diagnosable_and_says_what_it_cannot_do(model, batch):
    report = check_model(model, batch)
    assert report.tier == "diagnosable"
    assert set(report.missing) == {"understand", "generate", "image_log_prob"}
    assert all(why.startswith("NotImplementedError: JanusAdapter: ") for why in report.missing.values())


@pytest.mark.parametrize("flow", FLOWS)
def test_shapes(model, batch, flow):
    out = getattr(model, flow)(batch)
    assert out.grid == (4, 4) and sorted(out.hidden_states) == [0, 1, 2, 3, 4]
    assert all(states.shape == (4, 16, 64) for states in out.hidden_states.values())
    assert out.per_example_loss.shape == (4,) and out.loss.shape == () and out.logits.shape[:2] == out.labels.shape
    assert sorted(getattr(model, flow)(batch, layers=[-1, 0]).hidden_states) == [0, 4]
    with pytest.raises(ValueError, match="layers"):
        getattr(model, flow)(batch, layers=[5])
    with pytest.raises(ValueError, match="unique"):
        getattr(model, flow)({**batch, "ids": ["a"] * 4})


@pytest.mark.parametrize("flow", FLOWS)
def test_gradients_reach_every_parameter_of_every_layer(model, batch, flow):
    loss = getattr(model, flow)(batch).loss
    for name, group in model.layer_parameters().items():
        for g in torch.autograd.grad(loss, group, retain_graph=True):
            assert g.abs().max() > 0, name
    assert list(model.layer_parameters()) == [f"block {i}" for i in range(1, 5)]
    assert not any(p.requires_grad for p in model.janus.model.vqmodel.parameters())


@pytest.mark.parametrize("flow", FLOWS)
def test_losses_equal_a_naive_count(model, batch, flow):
    out = getattr(model, flow)(batch)
    total, n, means = 0.0, 0, []
    for logits, labels in zip(out.logits, out.labels.tolist(), strict=True):
        logp = logits.log_softmax(-1)
        row = [-logp[t, label].item() for t, label in enumerate(labels) if label != -100]
        total, n, means = total + sum(row), n + len(row), [*means, sum(row) / len(row)]
    assert out.loss.item() == pytest.approx(total / n, rel=1e-5)
    assert out.per_example_loss.tolist() == pytest.approx(means, rel=1e-5)


def test_generation_is_supervised_on_hidden_tokens_alone(model, batch):
    out = generation(model, batch)
    assert torch.equal(out.labels != -100, out.mask) and (out.mask.sum(1) == 8).all()
    assert torch.equal(out.labels[out.mask], model.codes(batch["images"])[out.mask])
    assert torch.equal(generation(model, batch).mask, out.mask) and not torch.equal(generation(model, batch, 1).mask, out.mask)


def test_understanding_is_supervised_on_the_caption(model, batch, words):
    labels = model.understanding_flow(batch).labels
    for row, text in zip(labels.tolist(), batch["texts"], strict=True):
        said = words(text, add_special_tokens=False)["input_ids"]
        assert [label for label in row if label != -100] == [*said, words.eos_token_id]


def test_understanding_image_states_do_not_see_the_caption(model, batch):
    other = {**batch, "texts": ["a large blue square"] * 4}
    a, b = model.understanding_flow(batch), model.understanding_flow(other)
    for layer in range(5):
        assert torch.allclose(a.hidden_states[layer], b.hidden_states[layer], atol=1e-6)
    assert not torch.allclose(a.loss, b.loss)
    caption = generation(model, batch).hidden_states, generation(model, other).hidden_states
    assert torch.equal(caption[0][0], caption[1][0]) and not torch.allclose(caption[0][1], caption[1][1], atol=1e-4)


def test_the_image_decides_the_words(model, batch):
    other = {**batch, "images": batch["images"].flip(0)}
    assert not torch.allclose(model.understanding_flow(batch).logits, model.understanding_flow(other).logits, atol=1e-6)


def test_predictor_of_a_code_stands_before_it(model, batch, monkeypatch):
    """Change one code at a time. Hidden: nothing moves. Shown at p: states from p on and logits from p + 1 on, no others."""
    base, codes = generation(model, batch), model.codes(batch["images"])
    for p in range(16):
        changed = codes.clone()
        changed[:, p] = (codes[:, p] + 1) % 64
        monkeypatch.setattr(model, "codes", lambda _, changed=changed: changed)
        out = generation(model, batch)
        for row in range(4):
            states = (out.hidden_states[4][row] - base.hidden_states[4][row]).abs().amax(-1) > 1e-7
            logits = (out.logits[row] - base.logits[row]).abs().amax(-1) > 1e-7
            if base.mask[row, p]:
                assert not states.any() and not logits.any(), "a hidden code leaks"
            else:
                assert states.tolist() == [j >= p for j in range(16)]
                assert logits.tolist() == [j > p for j in range(16)]


def test_layers_are_outputs_of_blocks_before_the_final_norm(model, batch):
    states = model.understanding_flow(batch).hidden_states
    inner = model.janus.model.language_model
    hidden = model.janus.model.get_image_features(batch["images"] * 2 - 1).pooler_output
    assert torch.equal(states[0], hidden)
    normed = inner.norm(states[4])
    assert not torch.allclose(normed, states[4], atol=1e-2)
    # One block after another from the states of the layer below: the whole sequence is needed, so replay it.
    seen = {}
    hook = inner.norm.register_forward_pre_hook(lambda _, inputs: seen.update(last=inputs[0]))
    model.understanding_flow(batch)
    hook.remove()
    assert torch.equal(seen["last"][:, 2:18], states[4])


@pytest.mark.parametrize("flow", FLOWS)
def test_neighbours_and_padding_change_nothing(model, batch, flow):
    together = getattr(model, flow)(batch, **({} if flow == FLOWS[0] else {"mask_ratio": 1.0}))
    for i in range(4):
        alone = {k: batch[k][i : i + 1] for k in ("images", "texts", "ids")}
        out = getattr(model, flow)(alone, **({} if flow == FLOWS[0] else {"mask_ratio": 1.0}))
        assert torch.allclose(out.hidden_states[4][0], together.hidden_states[4][i], atol=1e-5)
        assert out.loss.item() == pytest.approx(together.per_example_loss[i].item(), rel=1e-4)


@pytest.mark.parametrize("flow", FLOWS)
def test_flows_leave_the_model_as_it_was(model, batch, flow):
    before = copy.deepcopy(model.state_dict())
    assert not model.training
    getattr(model, flow)(batch)
    assert not model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(block._forward_hooks for block in model.janus.model.language_model.layers)
    try:
        model.train()
        assert not model.janus.model.vqmodel.training  # transformers would flip it
        getattr(model, flow)(batch)
        assert model.training and model.janus.model.language_model.training
    finally:
        model.eval()


def test_hooks_are_gone_after_a_failure(model, batch):
    inner = model.janus.model.language_model
    bad = inner.norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        model.understanding_flow(batch)
    bad.remove()
    assert not any(block._forward_hooks for block in inner.layers)


def test_save_and_load(model, batch, words, tmp_path):
    model.janus.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.bin"))
    again = JanusAdapter(JanusForConditionalGeneration.from_pretrained(tmp_path, local_files_only=True), words).eval()
    assert torch.equal(again.codes(batch["images"]), model.codes(batch["images"]))
    for flow in (lambda m: m.understanding_flow(batch), lambda m: generation(m, batch)):
        a, b = flow(model), flow(again)
        assert torch.equal(a.logits, b.logits) and torch.equal(a.hidden_states[4], b.hidden_states[4])


def test_features_stream_from_a_foreign_family(model):
    data = Shapes("test", n=5)
    features = extract(model, data, batch_size=2)
    assert features.states["understanding", 4].shape == (5, 64) and features.masks.shape == (5, 16)
    with torch.no_grad():
        out = model.understanding_flow(collate([data[3]]))
    assert torch.allclose(features.states["understanding", 2][3], out.hidden_states[2][0].mean(0), atol=1e-5)


def test_bad_images_are_refused(model, batch):
    for flow in FLOWS:
        with pytest.raises(ValueError, match="range"):
            getattr(model, flow)({**batch, "images": batch["images"] * 255})
