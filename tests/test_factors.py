"""Factor encoders and readouts against their printed equations, what pools and what does not, and what must be refused."""

import json
import math

import pytest
import torch
from torch import nn

from umm_kit import features
from umm_kit.models.factors import (
    FLOWS,
    INJECTIONS,
    FactorEncoder,
    FactorEncoders,
    FactorEncodersConfig,
    Factors,
    Readouts,
    middle_layers,
)

D, F, N, B = 12, 6, 9, 4
VOCABULARY = {"understanding": 11, "generation": 17}


def states(tokens=False):
    return {flow: torch.randn(B, N, D) if tokens else torch.randn(B, D) for flow in FLOWS}


def encoders(kind="gated", seed=0):
    torch.manual_seed(seed)
    return FactorEncoders(FactorEncodersConfig(hidden_size=D, factor_size=F, kind=kind))


def factors(tokens=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shape = (B, N, F) if tokens else (B, F)
    return Factors(*({flow: torch.randn(shape, generator=draw) for flow in FLOWS} for _ in range(2)))


def readouts(injection="crosswise", started=True):
    out = Readouts(F, VOCABULARY, rank=3, injection=injection)
    if started:
        for p in out.parameters():
            nn.init.normal_(p)
    return out


def test_flows_are_named_as_everywhere():
    assert FLOWS == features.FLOWS


@pytest.mark.parametrize(
    ("layers", "first", "last"), [(24, 8, 18), (12, 4, 9), (10, 3, 7), (28, 9, 21), (4, 1, 3), (2, 1, 1), (1, 1, 1)]
)
def test_middle_layers(layers, first, last):
    assert list(middle_layers(layers)) == list(range(first, last + 1))


@pytest.mark.parametrize("layers", [0, -3])
def test_no_layers_no_middle(layers):
    with pytest.raises(ValueError, match="expected at least 1"):
        middle_layers(layers)


# --- encoders ----------------------------------------------------------------------------------------------------------


def test_gated_by_hand():
    """All weights 0 but the biases: phi = (1, 3), gate = sigmoid(0) = 1/2, their product (1/2, 3/2), normalised (-1, 1)."""
    encoder = FactorEncoder(3, 2)
    for p in encoder.parameters():
        nn.init.zeros_(p)
    encoder.phi[-1].bias.data = torch.tensor([1.0, 3.0])
    nn.init.ones_(encoder.norm.weight)
    assert encoder(torch.randn(5, 3)).detach() == pytest.approx(torch.tensor([-1.0, 1.0]).expand(5, 2).numpy(), abs=1e-4)


def printed(encoder, h):
    """Eq. 13 one vector and one number at a time."""
    out = []
    for row in h.reshape(-1, h.shape[-1]):
        v = row
        for layer in (m for m in encoder.phi if isinstance(m, nn.Linear)):
            v = torch.stack([layer.weight[k] @ v + layer.bias[k] for k in range(len(layer.bias))])
            if layer is not encoder.phi[-1]:
                v = torch.stack([t * 0.5 * (1 + math.erf(t.item() / math.sqrt(2))) for t in v])
        v = torch.stack([v[k] / (1 + torch.exp(-encoder.gate.weight[k] @ row)) for k in range(len(v))])
        out.append((v - v.mean()) / (v.var(unbiased=False) + encoder.norm.eps).sqrt() * encoder.norm.weight + encoder.norm.bias)
    return torch.stack(out).reshape(*h.shape[:-1], -1)


@pytest.mark.parametrize("tokens", [False, True])
def test_gated_is_the_printed_equation(tokens):
    encoder, h = FactorEncoder(D, F), 2 * states(tokens)["generation"]
    for p in encoder.norm.parameters():
        nn.init.normal_(p)
    assert sum(isinstance(m, nn.Linear) for m in encoder.phi) == 3 and encoder.gate.bias is None
    torch.testing.assert_close(encoder(h), printed(encoder, h), atol=1e-5, rtol=1e-4)


def test_shallow_has_one_layer_beside_its_gate():
    encoder, h = FactorEncoder(D, F, "shallow"), torch.randn(B, D)
    gate = 1 / (1 + torch.exp(-h @ encoder.gate.weight.T))
    raw = gate * (h @ encoder.phi.weight.T + encoder.phi.bias)
    torch.testing.assert_close(encoder(h), torch.nn.functional.layer_norm(raw, (F,)))


@pytest.mark.parametrize("kind", ["gated", "shallow", "linear"])
def test_tokens_are_read_one_by_one(kind):
    encoder, h = FactorEncoder(D, F, kind), torch.randn(B, N, D)
    torch.testing.assert_close(encoder(h)[:, 2], encoder(h[:, 2]))
    z = encoder(h)
    torch.testing.assert_close(z.mean(-1), torch.zeros(B, N), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.square().mean(-1), torch.ones(B, N), atol=2e-2, rtol=0)  # up to LN's epsilon


def test_linear_has_no_other_part_and_ignores_scale():
    encoder = FactorEncoder(D, F, "linear")
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == {"phi", "norm"}
    nn.init.zeros_(encoder.phi.bias)
    h = torch.randn(B, D) * 10
    torch.testing.assert_close(encoder(h), encoder(7 * h), atol=1e-3, rtol=1e-3)


def test_transformer_lets_tokens_see_each_other_but_not_other_images():
    encoder, h = FactorEncoder(D, F, "transformer"), torch.randn(B, N, D)
    changed = h.clone()
    changed[0, 0] = torch.randn(D)
    difference = (encoder(changed) - encoder(h)).detach().abs().amax(-1)
    assert bool((difference[0] > 1e-4).all()) and float(difference[1:].max()) < 1e-6
    permuted = h[:, torch.randperm(N)]
    torch.testing.assert_close(encoder(permuted).mean(1), encoder(h).mean(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_of_any_precision(dtype):
    encoder, h = FactorEncoder(D, F), torch.randn(B, D).to(dtype)
    assert encoder(h).dtype == torch.float32 and torch.equal(encoder(h), encoder(h.float()))


def test_encoder_refusals():
    with pytest.raises(ValueError, match=r"kind is 'mlp'.*'gated'"):
        FactorEncoder(D, F, "mlp")
    for sizes in ((0, F), (D, 1)):
        with pytest.raises(ValueError, match="expected >= 1 and >= 2"):
            FactorEncoder(*sizes)
    for shape in ((B, D + 1), (D,), (B, 2, N, D)):
        with pytest.raises(ValueError, match=r"expected \[B, 12\] or \[B, N, 12\]"):
            FactorEncoder(D, F)(torch.zeros(shape))
    with pytest.raises(ValueError, match="not pooled"):
        FactorEncoder(D, F, "transformer")(torch.zeros(B, D))


def test_four_encoders_of_their_own():
    model, h = encoders(), torch.randn(B, D)
    z = model({flow: h for flow in FLOWS})
    all_four = [part[flow] for part in (z.shared, z.unique) for flow in FLOWS]
    for i, a in enumerate(all_four):
        assert all(float((a - b).detach().abs().max()) > 0.1 for b in all_four[:i])
    z.shared["generation"].square().mean().backward()
    touched = {name.rsplit(".", 2)[0] for name, p in model.named_parameters() if p.grad is not None}
    assert touched and all(name.startswith("shared.generation") for name in touched)
    assert sorted(model({"generation": h}).unique) == ["generation"]


@pytest.mark.parametrize("given", [{}, {"generate": torch.zeros(B, D)}])
def test_unknown_flows_are_refused(given):
    with pytest.raises(ValueError, match="expected some of"):
        encoders()(given)


@pytest.mark.parametrize("kind", ["gated", "shallow", "linear", "transformer"])
def test_saved_and_loaded(kind, tmp_path):
    model, h = encoders(kind), states(tokens=True)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["kind"] == kind
    loaded = FactorEncoders.from_pretrained(tmp_path, use_safetensors=True, local_files_only=True)
    for flow in FLOWS:
        assert torch.equal(loaded(h).shared[flow], model(h).shared[flow])
        assert torch.equal(loaded(h).unique[flow], model(h).unique[flow])


def test_start_is_torch_s_own():
    """transformers would draw all weights anew, with a spread of .02: the gate and phi would start almost closed."""
    torch.manual_seed(3)
    expected = nn.Linear(D, D).weight
    torch.manual_seed(3)
    assert torch.equal(FactorEncoders(FactorEncodersConfig(D, F)).shared["understanding"].phi[0].weight, expected)


# --- readouts ----------------------------------------------------------------------------------------------------------


def test_injection_starts_as_no_change_and_learns():
    model, z = readouts(started=False), factors()
    for part in (z.shared, z.unique):
        for factor in part.values():
            factor.requires_grad_()
    logits = {flow: torch.randn(B, 5, size) for flow, size in VOCABULARY.items()}
    out = model(logits, z)
    assert all(torch.equal(out[flow], logits[flow]) for flow in FLOWS)
    sum(s.log_softmax(-1)[..., 0].sum() for s in out.values()).backward()
    assert all(float(m[1].weight.grad.abs().max()) > 0 for part in (model.shared, model.unique) for m in part.values())
    assert all(float(factor.grad.abs().max()) == 0 for part in (z.shared, z.unique) for factor in part.values())


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("unique", [True, False])
def test_equation_8(injection, unique):
    model, z = readouts(injection), factors()
    out = model({flow: torch.zeros(B, 5, size) for flow, size in VOCABULARY.items()}, z, unique)
    for flow, other in (FLOWS, FLOWS[::-1]):
        source = other if injection == "crosswise" else flow
        expected = []
        for b in range(B):
            A, R = (m[flow][1].weight @ m[flow][0].weight for m in (model.shared, model.unique))
            assert A.shape == (VOCABULARY[flow], F) and int(torch.linalg.matrix_rank(A)) == 3
            expected.append(A @ z.shared[source][b] + (R @ z.unique[flow][b] if unique else 0))
        for position in range(5):
            torch.testing.assert_close(out[flow][:, position], torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("unique", [True, False])
def test_who_is_informed_by_whom(unique):
    """Crosswise: the bias of U has no gradient to U's shared factor nor to G's unique one; own: no gradient to G at all."""
    expected = {"crosswise": {("shared", "generation")}, "own": {("shared", "understanding")}}
    for injection, sources in expected.items():
        z = factors()
        every = {(name, flow): getattr(z, name)[flow].requires_grad_() for name in ("shared", "unique") for flow in FLOWS}
        readouts(injection).bias("understanding", z, unique).square().sum().backward()
        touched = {key for key, factor in every.items() if factor.grad is not None}
        assert touched == sources | ({("unique", "understanding")} if unique else set())


def test_tokens_bias_their_own_position_in_generation_and_their_mean_in_understanding():
    model, z = readouts(), factors(tokens=True)
    logits = {"understanding": torch.randn(B, N, 11), "generation": torch.randn(B, N, 17)}  # N text positions, too
    out = model(logits, z)
    pick = lambda k: Factors(*({f: v[:, k] for f, v in part.items()} for part in (z.shared, z.unique)))  # noqa: E731
    for k in range(N):
        alone = model({"generation": logits["generation"][:, [k]]}, pick(k))["generation"]
        torch.testing.assert_close(out["generation"][:, [k]], alone)
    mean = Factors(*({f: v.mean(1) for f, v in part.items()} for part in (z.shared, z.unique)))
    torch.testing.assert_close(out["understanding"], model(logits, mean)["understanding"])


def test_words_can_take_the_place_of_a_factor():
    model, z = readouts(), factors()
    model.read_words()
    first, last = model.shared["understanding"]
    assert (first.weight.shape, last.weight.shape) == ((3, 11), (11, 3)) and not last.weight.any()
    nn.init.normal_(last.weight)
    words = torch.rand(B, 11)
    expected = words @ first.weight.T @ last.weight.T
    with_words = Factors({**z.shared, "generation": words}, z.unique)
    torch.testing.assert_close(model.bias("understanding", with_words, unique=False)[:, 0], expected)
    torch.testing.assert_close(model.bias("generation", with_words), model.bias("generation", z))


def test_readout_refusals():
    for vocabulary in ({"understanding": 11}, {**VOCABULARY, "other": 3}):
        with pytest.raises(ValueError, match="vocabulary is for"):
            Readouts(F, vocabulary, rank=2)
    with pytest.raises(ValueError, match=r"injection is 'cross'.*'crosswise', 'own'"):
        Readouts(F, VOCABULARY, rank=2, injection="cross")
    for rank in (0, F + 1):
        with pytest.raises(ValueError, match=f"rank is {rank}; expected 1 to 6"):
            Readouts(F, VOCABULARY, rank=rank)
    model = readouts()
    for given in ({}, {"G": torch.zeros(B, 5, 17)}):
        with pytest.raises(ValueError, match="logits are of flows"):
            model(given, factors())
    with pytest.raises(ValueError, match=r"factors of \['understanding'\] only"):
        model({"understanding": torch.zeros(B, 5, 11)}, Factors({"understanding": torch.zeros(B, F)}, {}))
    for shape, z in (((B, 5, 16), factors()), ((B + 1, 5, 17), factors()), ((B, 17), factors()), ((B, 5, 17), factors(True))):
        with pytest.raises(ValueError, match="generation logits are"):
            model({"generation": torch.zeros(shape)}, z)
