"""LatentUMM's maps against their equations in plain tensors; what each option builds, trains, saves and refuses."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from umm_kit.losses.alignment import latent_alignment
from umm_kit.models.aligner import LatentAligner, LatentAlignerConfig, LatentHeads

E, D, Z, B = 6, 8, 5, 4


def aligner(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"embedding_size": E, "latent_size": Z, "hidden_size": D, "num_layers": 2, "num_heads": 2}
    return LatentAligner(LatentAlignerConfig(**sizes | options)).eval()


def embeddings():
    return torch.randn(B, E), torch.randn(B, E)


def mlp(x, net):
    return functional.gelu(x @ net[0].weight.T + net[0].bias) @ net[2].weight.T + net[2].bias


def transformed(x, layer):
    """One pre-norm layer on [B, tokens, D], written out, head by head."""
    h, attention = layer.norm1(x), layer.self_attn
    q, k, v = (h @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, -1)
    heads = []
    for part in torch.arange(D).chunk(attention.num_heads):
        scores = q[..., part] @ k[..., part].transpose(1, 2) / len(part) ** 0.5
        heads.append(scores.softmax(-1) @ v[..., part])
    x = x + attention.out_proj(torch.cat(heads, -1))
    h = layer.norm2(x)
    return x + functional.gelu(h @ layer.linear1.weight.T + layer.linear1.bias) @ layer.linear2.weight.T + layer.linear2.bias


def written_out(model, *tokens):
    x = torch.stack(tokens, 1)
    for layer in model.encoder[:-1]:
        x = transformed(x, layer)
    return model.encoder[-1](x)


def test_defaults_are_the_released_sizes():
    config = LatentAlignerConfig()
    assert (config.num_layers, config.num_heads, config.hidden_size, config.dropout) == (2, 8, 1024, 0.1)
    assert config.latent_size == config.embedding_size and LatentAlignerConfig(embedding_size=7).latent_size == 7
    assert (config.source, config.reencoder) == ("text", "phi")


@pytest.mark.parametrize("source", ["text", "fused"])
@pytest.mark.parametrize("reencoder", ["phi", "mlp"])
def test_equations(source, reencoder):
    model, (e_text, e_image) = aligner(source=source, reencoder=reencoder), embeddings()
    text = e_text @ model.text.weight.T + model.text.bias + model.modality[0]
    image = e_image @ model.image.weight.T + model.image.bias + model.modality[1]
    out = model(e_text, e_image)
    torch.testing.assert_close(out.z_text, model.latent(written_out(model, text)[:, 0]))
    torch.testing.assert_close(out.z_image, model.latent(written_out(model, image)[:, 0]))
    if source == "fused":
        torch.testing.assert_close(out.z_fused, mlp(written_out(model, text, image).flatten(1), model.fusion))
        assert out.z is out.z_fused
    else:
        assert out.z_fused is None and out.z is out.z_text
    torch.testing.assert_close(out.x_hat, mlp(out.z, model.generation))
    read = model.encode_image(out.x_hat) if reencoder == "phi" else mlp(out.x_hat, model.reencoder)
    torch.testing.assert_close(out.z_hat, read)
    assert {tuple(z.shape) for z in (out.z_text, out.z_image, out.z, out.z_hat)} == {(B, Z)} and out.x_hat.shape == (B, E)


def test_methods_are_the_parts_of_forward_and_rows_do_not_see_each_other():
    model, (e_text, e_image) = aligner(source="fused"), embeddings()
    out = model(e_text, e_image)
    for one, all_rows in ((model.encode_text(e_text[1:2]), out.z_text), (model.encode_image(e_image[1:2]), out.z_image),
                          (model.fuse(e_text[1:2], e_image[1:2]), out.z_fused), (model.generate(out.z[1:2]), out.x_hat),
                          (model.reencode(out.x_hat[1:2]), out.z_hat)):  # fmt: skip
        torch.testing.assert_close(one, all_rows[1:2], atol=1e-5, rtol=1e-5)


def test_modalities_have_maps_of_their_own():
    model, (e, _) = aligner(), embeddings()
    assert float((model.encode_text(e) - model.encode_image(e)).detach().abs().max()) > 1e-2
    model.image.load_state_dict(model.text.state_dict())
    assert float((model.encode_text(e) - model.encode_image(e)).detach().abs().max()) > 1e-4  # the learned embedding
    with torch.no_grad():
        model.modality[1] = model.modality[0]
    torch.testing.assert_close(model.encode_text(e), model.encode_image(e))


def test_layers_do_not_start_as_copies_and_keep_torch_s_start():
    model = aligner(hidden_size=64)
    first, second = model.encoder[0].linear1.weight, model.encoder[1].linear1.weight
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    expected = nn.Linear(E, D).weight
    assert torch.equal(aligner(3).text.weight, expected)  # transformers would draw it anew, with a spread of .02


@pytest.mark.parametrize("source", ["text", "fused"])
@pytest.mark.parametrize("reencoder", ["phi", "mlp"])
def test_every_parameter_is_trained_by_the_three_terms(source, reencoder):
    model, (e_text, e_image) = aligner(source=source, reencoder=reencoder).train(), embeddings()
    out = model(e_text, e_image)
    parts = latent_alignment((out.z_text, out.z_image), (out.z, out.z_hat), (out.x_hat, e_image))
    parts.weighted(modal=1, capacity=1, target=1).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    # A shift of both latents is free in the modal term, and here nothing else reads them.
    free = {"latent.bias"} if (source, reencoder) == ("fused", "mlp") else set()
    assert {name for name, grad in grads.items() if float(grad.abs().max()) < 1e-9} == free


def test_capacity_gradient_runs_through_generation_and_re_encoding():
    """Against central differences, in the bias of G: z -> G -> phi is one path."""
    model = aligner().double()
    e_text, e_image = (e.double() for e in embeddings())

    def capacity():
        out = model(e_text, e_image)
        return latent_alignment((out.z_text, out.z_image), (out.z, out.z_hat)).capacity

    bias = model.generation[2].bias
    (gradient,) = torch.autograd.grad(capacity(), bias)
    with torch.no_grad():
        for k in range(E):
            values = []
            for step in (1e-5, -2e-5):
                bias[k] += step
                values.append(float(capacity()))
            bias[k] += 1e-5
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(gradient[k]), rel=1e-5, abs=1e-9)


def test_dropout_acts_in_training_only():
    model, (e, _) = aligner(dropout=0.5), embeddings()
    assert torch.equal(model.encode_text(e), model.encode_text(e))
    model.train()
    assert not torch.equal(model.encode_text(e), model.encode_text(e))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_embeddings_of_any_precision(dtype):
    model, e = aligner(), torch.randn(B, E).to(dtype)
    assert model.encode_text(e).dtype == torch.float32
    torch.testing.assert_close(model.encode_text(e), model.encode_text(e.float()))


@pytest.mark.parametrize("options", [{}, {"source": "fused", "reencoder": "mlp", "latent_size": None}])
def test_saved_and_loaded(options, tmp_path):
    model, given = aligner(**options), embeddings()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["latent_size"] == (E if options else Z)
    loaded = LatentAligner.from_pretrained(tmp_path, use_safetensors=True, local_files_only=True).eval()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    for name, value in vars(model(*given)).items():
        other = getattr(loaded(*given), name)
        assert other is None if value is None else torch.equal(value, other), name


def test_refusals():
    bad_sizes = ({"embedding_size": 0}, {"num_heads": 3}, {"num_layers": 0}, {"hidden_size": 0}, {"latent_size": 0})
    for sizes in bad_sizes:
        with pytest.raises(ValueError, match="expected all >= 1 and a hidden_size that the heads divide"):
            aligner(**sizes)
    with pytest.raises(ValueError, match="dropout is 1"):
        aligner(dropout=1)
    for option in ({"source": "image"}, {"reencoder": "g"}):
        with pytest.raises(ValueError, match=r"expected of \('text', 'fused'\) and \('phi', 'mlp'\)"):
            aligner(**option)
    model, (e, _) = aligner(source="fused"), embeddings()
    for wrong in (e[0], e[:, :-1], e[None], e.long()):
        for method, name in ((model.encode_text, "e_text"), (model.encode_image, "e_image"), (model.generate, "z")):
            with pytest.raises(ValueError, match=rf"{name} is .*expected floats \[B, {Z if name == 'z' else E}\]"):
                method(wrong if wrong.shape[-1] != Z or name != "z" else wrong[:, :-1])
    for method in (model, model.fuse):
        with pytest.raises(ValueError, match="there are 4 texts and 3 images"):
            method(e, e[:3])
    with pytest.raises(ValueError, match="source is 'text'"):
        aligner().fuse(e, e)
    with pytest.raises(ValueError, match=r"x_hat is .*\[B, 6\]"):
        aligner(reencoder="mlp").reencode(e[:, :-1])


# --- the two heads beside a backbone -----------------------------------------------------------------------------------


def test_heads_are_two_mlps_out_and_back():
    heads, h = LatentHeads(D, E), torch.randn(B, D)
    x_hat, h_hat = heads(h)
    torch.testing.assert_close(x_hat, mlp(h, heads.generation))
    torch.testing.assert_close(h_hat, mlp(x_hat, heads.reencoder))
    assert x_hat.shape == (B, E) and h_hat.shape == (B, D)
    assert torch.equal(heads.generate(h), x_hat) and torch.equal(heads.reencode(x_hat), h_hat)


def test_heads_keep_their_state_and_read_half_precision():
    heads, h = LatentHeads(D, E), torch.randn(B, D).bfloat16()
    other = copy.deepcopy(LatentHeads(D, E))
    other.load_state_dict(heads.state_dict())
    assert torch.equal(heads(h)[1], other(h)[1]) and heads(h)[0].dtype == torch.float32


def test_heads_refusals():
    for sizes in ((0, E), (D, 0)):
        with pytest.raises(ValueError, match="expected both >= 1"):
            LatentHeads(*sizes)
    heads = LatentHeads(D, E)
    with pytest.raises(ValueError, match=r"h is \(4, 6\).*\[B, 8\]"):
        heads.generate(torch.zeros(B, E))
    with pytest.raises(ValueError, match=r"x_hat is \(4, 8\).*\[B, 6\]"):
        heads.reencode(torch.zeros(B, D))
