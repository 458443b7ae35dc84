"""DIVA's two stages: what each trains and what it leaves alone, resumption, refusals."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from umm_kit.data.digits import Digits
from umm_kit.data.shapes import Shapes
from umm_kit.losses.factorization import alignment, orthogonality
from umm_kit.models import load
from umm_kit.models.base import token_losses
from umm_kit.models.factors import FLOWS, FactorEncoders, FactorEncodersConfig, Factors, Readouts
from umm_kit.trainers.base import Stream, last_checkpoint
from umm_kit.trainers.diva import DIVAConfig, DIVATrainer, train
from umm_kit.trainers.stages import (
    BackboneStage,
    EncoderStage,
    FlowCollator,
    Flows,
    ReleasedCritic,
    adapters,
    bag_of_words,
    equalising,
    facts_of,
    new_critics,
    projected,
    states_at,
)

DATA = Shapes("train", n=4096)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(saved):
    return load(saved, device="cpu")


def config(folder, **changes):
    small = dict(
        output_dir=str(folder), stage1_steps=2, max_steps=6, layers=[2], per_device_train_batch_size=16, logging_steps=1,
        save_steps=2, disable_tqdm=True, warmup_steps=1, stage1_warmup_steps=1, use_cpu=True,
    )  # fmt: skip
    return DIVAConfig.tiny(**{**small, **changes})


def batch_of(model, n=8, replay_every=4, **changes):
    items = Stream(DATA, 64, 0).__getitems__(range(n))
    return FlowCollator(DATA, model.grid, config("unused", **changes), replay_every)(items)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- batches -----------------------------------------------------------------------------------------------------------


def test_every_fourth_item_is_a_question_and_a_drawing_from_text_alone(model):
    batch = batch_of(model, 16)
    assert batch["anchor"].tolist() == [True, True, True, False] * 4
    ratio = batch["mask"].float().mean(1)
    assert (ratio[~batch["anchor"]] == 1).all() and ratio[batch["anchor"]].min() > 0.15 and ratio[batch["anchor"]].max() < 0.65
    for i, anchor in enumerate(batch["anchor"]):
        assert (batch["prompts"][i] is None) == bool(anchor)
        assert not anchor or batch["said"][i] == batch["drawn"][i], "both flows see the same pair"
    assert batch_of(model, 8, replay_every=0)["anchor"].all()


def test_an_example_is_the_same_in_any_batch(model):
    whole, stream = batch_of(model, 16), Stream(DATA, 64, 0)
    part = FlowCollator(DATA, model.grid, config("unused"), 4)(stream.__getitems__([7, 10]))
    for k, i in enumerate((7, 10)):
        assert torch.equal(part["mask"][k], whole["mask"][i]) and part["said"][k] == whole["said"][i]
        assert part["prompts"][k] == whole["prompts"][i] and part["ids"][k] == whole["ids"][i]


def test_facts_are_equal_where_captions_mean_the_same():
    one, two = Shapes("test", n=40, style="list"), Shapes("test", n=40, style="placed", nuisance_seed=5)
    a, b = (facts_of([data[i] for i in range(40)]) for data in (one, two))
    assert np.array_equal(a, b) and len(set(a)) > 20
    texts = facts_of([{"texts": t} for t in ("a cat", "a dog", "a cat")])
    assert texts[0] == texts[2] != texts[1]


def test_questions_go_through_the_understanding_flow(model):
    """A prompt of None is the caption flow; with a question the loss is that of the answer, and states do not change."""
    batch = {"images": DATA.images(range(2)), "ids": ["a", "b"], "texts": ["yes", "no"]}
    plain, asked = model.understanding_flow(batch), model.understanding_flow({**batch, "prompts": [None, "is there a ring?"]})
    assert torch.allclose(plain.per_example_loss[0], asked.per_example_loss[0], atol=1e-5)
    assert abs(float(plain.per_example_loss[1] - asked.per_example_loss[1])) > 1e-3
    assert torch.allclose(plain.hidden_states[2], asked.hidden_states[2], atol=1e-5)


# --- stages ------------------------------------------------------------------------------------------------------------


def test_stage_one_starts_as_no_change(model):
    """Readouts start at zero, so the losses are the backbone's own, averaged over examples."""
    settings = config("unused")
    encoders = FactorEncoders(FactorEncodersConfig(hidden_size=32, factor_size=8))
    widths = {"understanding": model.config.text_vocab_size, "generation": model.codebook_size}
    stage = EncoderStage(model, encoders, Readouts(8, widths, 4), [2, 3], settings)
    batch = batch_of(model, 8, 0)
    out = stage(batch, unique=True)
    u, g = Flows(model)(batch, [])
    assert torch.allclose(out["understanding_loss"], u.per_example_loss.mean(), atol=1e-5)
    assert torch.allclose(out["generation_loss"], g.per_example_loss.mean(), atol=1e-5)
    assert abs(float(out["understanding_gain"])) < 1e-5 and abs(float(out["generation_gain"])) < 1e-5
    assert torch.allclose(out["loss"], out["understanding_loss"] + out["generation_loss"] + 0.2 * out["orthogonality_loss"])
    assert not [name for name in stage.state_dict() if "blocks" in name], "the backbone is in no checkpoint of this stage"


def test_factor_terms_by_a_naive_reference(model):
    """Eq. 10 per layer with the other flow's factor behind the stop-gradient, averaged over layers, anchors only."""
    settings = config("unused", unique_weight=0.0)
    encoders = FactorEncoders(FactorEncodersConfig(hidden_size=32, factor_size=8)).eval()
    batch = batch_of(model, 16)
    out = BackboneStage(model, encoders, [1, 3], settings)(batch, None, [], {})
    u, g = Flows(model)(batch, [1, 3])
    rows, terms = batch["anchor"], []
    for layer in (1, 3):
        z = encoders({"understanding": u.hidden_states[layer][rows].mean(1), "generation": g.hidden_states[layer][rows].mean(1)})
        x, y = z.shared["understanding"], z.shared["generation"]
        terms.append(alignment(x, y, True, 0.1).loss + alignment(y, x, True, 0.1).loss)
    assert torch.allclose(out["shared_loss"], sum(terms) / 2, atol=1e-5)
    assert float(out["shared_bound"]) == pytest.approx(np.log(12))


def test_stop_gradient_is_on_the_target(model):
    """With targets from elsewhere, nothing flows into them; with the symmetric form both flows move."""
    encoders = FactorEncoders(FactorEncodersConfig(hidden_size=32, factor_size=8)).eval()
    batch, stage = batch_of(model, 8), BackboneStage(model, encoders, [2], config("unused", unique_weight=0.0))
    elsewhere = [Factors({flow: torch.randn(6, 8, requires_grad=True) for flow in FLOWS}, {})]
    stage(batch, elsewhere, [], {})["shared_loss"].backward()
    assert all(z.grad is None for z in elsewhere[0].shared.values())
    assert model.blocks[0].mlp[0].weight.grad.abs().sum() > 0 and model.blocks[2].mlp[0].weight.grad is None
    stage.config = config("unused", unique_weight=0.0, stop_gradient=False)
    stage(batch, elsewhere, [], {})["shared_loss"].backward()
    assert all(float(z.grad.abs().sum()) > 0 for z in elsewhere[0].shared.values())


def test_without_stop_gradient_the_targets_are_the_models_own(model, tmp_path):
    """The averaged copy would stop the gradient all the same: the loss is then twice the symmetric form of the live factors."""
    encoders = FactorEncoders(FactorEncodersConfig(hidden_size=32, factor_size=8))
    settings = config(tmp_path, stop_gradient=False, unique_weight=0.0, ramp_share=0.0, ema_decay=0.9, factor_size=8)
    trainer = DIVATrainer(model, settings, DATA, encoders)
    trainer.train()
    batch = batch_of(model, 8)
    assert trainer.ema.average and trainer._targets(batch) is None
    leaves = Factors({flow: torch.randn(6, 8, requires_grad=True) for flow in FLOWS}, {})
    trainer.accelerator.unwrap_model(trainer.model).factors = lambda u, g, anchor: [leaves]
    loss = trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]["shared_loss"]
    found = torch.autograd.grad(loss, list(leaves.shared.values()))
    wanted = torch.autograd.grad(2 * alignment(*leaves.shared.values(), temperature=0.1).loss, list(leaves.shared.values()))
    torch.testing.assert_close(found, wanted)


def test_only_the_middle_is_trained(model, tmp_path):
    before, asked = weights(model), [p.requires_grad for p in model.parameters()]
    trainer = DIVATrainer(model, config(tmp_path, layers=[]), DATA)
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith(("blocks.0", "blocks.1", "blocks.2")) for name in changed), "layers 1 to 3 of 4"
    assert [p.requires_grad for p in model.parameters()] == asked
    assert not any(p.requires_grad for p in trainer.encoders.parameters())
    kept = FactorEncoders.from_pretrained(tmp_path / "encoders")
    assert all(torch.equal(p, kept.state_dict()[name]) for name, p in trainer.encoders.state_dict().items())


def test_the_log_tells_each_terms_share(model, tmp_path):
    trainer = DIVATrainer(model, config(tmp_path, ramp_share=0.5), DATA)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["ramp"] for entry in log] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])
    for entry in log:
        shares = [value for name, value in entry.items() if name.endswith("_gradient_share")]
        assert len(shares) == 4 and sum(shares) == pytest.approx(1)
        total = entry["understanding_loss"] + entry["generation_loss"]
        total += entry["ramp"] * 0.6 * (entry["shared_loss"] + entry["unique_loss"])
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
    assert {"shared_estimate", "shared_bound", "shared_accuracy", "critic_estimate", "unique_active"} <= set(log[-1])
    first = [entry for entry in json.loads((tmp_path / "stage1/run.json").read_text())["log"] if "loss" in entry]
    of_tasks = {f"{flow}_gradient_share" for flow in ("understanding", "generation")}
    told = [{k: v for k, v in entry.items() if k.endswith("_gradient_share")} for entry in first]
    assert [set(shares) for shares in told] == [of_tasks, of_tasks | {"orthogonality_gradient_share"}]
    assert all(sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0 for shares in told)


def test_without_factor_terms_it_is_fine_tuning(model, tmp_path):
    trainer = DIVATrainer(model, config(tmp_path, shared_weight=0.0, unique_weight=0.0, train_all_layers=True), DATA)
    before = weights(model)
    trainer.train()
    assert not (tmp_path / "encoders").exists() and trainer.encoders is None
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "embedding.weight" in changed and not any(name.startswith("image_tokenizer") for name in changed)


def test_orthogonality_alone_is_a_term_on_factors(model, tmp_path):
    """It was dropped without a word: no encoders were made."""
    alone = dict(shared_weight=0.0, unique_weight=0.0, stage2_orthogonality_weight=0.5, ramp_share=0.0)
    trainer = DIVATrainer(model, config(tmp_path, **alone), DATA)
    trainer.train()
    assert trainer.encoders is not None and (tmp_path / "encoders").exists()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["orthogonality_loss"] > 0 for entry in log) and log[0]["orthogonality_gradient_share"] > 0
    parts = log[0]["understanding_loss"] + log[0]["generation_loss"] + 0.5 * log[0]["orthogonality_loss"]
    assert log[0]["loss"] == pytest.approx(parts, abs=1e-3)


def test_reconstruction_draws_from_states_and_not_from_words(model, tmp_path):
    """By hand: states of blocks of 2 x 2 tokens, normalised, between an empty text and an image of which all is hidden."""
    stage, batch = BackboneStage(model, None, [], config(tmp_path, reconstruction_weight=1.0)), batch_of(model)
    loss = stage(batch, None, [], {})["reconstruction_loss"]
    codes = model.image_tokenizer.encode(batch["images"])
    shown = {"images": batch["images"], "ids": batch["ids"], "texts": ["a"] * len(codes)}
    u = model.understanding_flow(shown, layers=[2])
    h = u.hidden_states[2].detach().unflatten(1, model.grid)
    rows = torch.stack([h[:, r : r + 2, c : c + 2].mean((1, 2)) for r in range(0, 8, 2) for c in range(0, 8, 2)], 1)
    rows = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    condition = rows / model.hidden_size**0.5
    ids = model.pack_captions([""] * len(codes))
    hidden = model._generation(codes, torch.ones_like(codes, dtype=torch.bool), ids, condition=condition)[0]
    wanted = torch.nn.functional.cross_entropy(model.image_head(hidden).flatten(0, 1), codes.flatten())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    of_loss, of_wanted = (torch.autograd.grad(value, model.blocks[0].mlp[0].weight)[0] for value in (loss, wanted))
    torch.testing.assert_close(of_loss, of_wanted, rtol=1e-4, atol=1e-7, msg="U's states are detached")
    other = {**batch, "said": batch["said"][::-1], "drawn": batch["drawn"][::-1]}
    assert float(stage(other, None, [], {})["reconstruction_loss"]) == loss.item(), "no caption is read"
    turned = {**batch, "images": batch["images"].flip(3)}
    assert abs(float(stage(turned, None, [], {})["reconstruction_loss"]) - loss.item()) > 1e-4


def test_reconstruction_is_trained_beside_the_native_losses(saved, tmp_path):
    trained = []
    for weight in (0.0, 1.0):
        model = load(saved, device="cpu")
        options = dict(shared_weight=0.0, unique_weight=0.0, ema_decay=0.0, reconstruction_weight=weight)
        trainer = DIVATrainer(model, config(tmp_path / str(weight), **options), DATA)
        trainer.train()
        trained.append(torch.cat([p.detach().flatten() for p in model.blocks[1].parameters()]))
        logged = [entry for entry in trainer.state.log_history if "reconstruction_loss" in entry]
        assert bool(logged) == bool(weight)
    assert not torch.equal(*trained)


def test_projected_by_hand():
    """Opposed gradients lose what is against each other; agreeing ones are added; a missing one changes nothing."""
    a, b = [torch.tensor([1.0, 0.0]), torch.tensor([2.0])], [torch.tensor([-1.0, 1.0]), None]
    mixed = list(projected(a, b))
    # <a, b> = -1, <b, b> = 2, <a, a> = 5: a + b / 2 and b + a / 5; where b is missing, a stays as it is
    assert torch.allclose(mixed[0], torch.tensor([1.0, 0.0]) * 1.2 + torch.tensor([-1.0, 1.0]) * 1.5)
    assert torch.equal(mixed[1], torch.tensor([2.0]) * 1.2)
    assert torch.equal(next(projected([torch.tensor([1.0])], [torch.tensor([2.0])])), torch.tensor([3.0]))


def test_projection_runs_and_differs_only_where_tasks_conflict(saved, tmp_path):
    ends = {}
    for project in (False, True):
        model = load(saved, device="cpu")
        settings = config(tmp_path / str(project), shared_weight=0.0, unique_weight=0.0, project_conflicts=project, max_steps=3)
        DIVATrainer(model, settings, DATA).train()
        ends[project] = model.blocks[1].mlp[0].weight
    assert torch.isfinite(ends[True]).all() and float((ends[True] - ends[False]).abs().max()) < 1e-2


def test_projection_takes_the_gradient_of_both_tasks(model, tmp_path):
    chosen = dict(shared_weight=0.0, unique_weight=0.0, project_conflicts=True, generation_weight=0.5)
    trainer, batch = DIVATrainer(model, config(tmp_path, **chosen), DATA), batch_of(model, 16)
    trained = [p for p in model.parameters() if p.requires_grad]
    u, g = (out.per_example_loss.mean() for out in Flows(model)(batch, []))
    sides = (torch.autograd.grad(w * loss, trained, retain_graph=True) for w, loss in ((1, u), (0.5, g)))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    torch.testing.assert_close([p.grad for p in trained], list(projected(*sides)), rtol=1e-4, atol=1e-7)
    assert float(loss) == pytest.approx(float(u + 0.5 * g), rel=1e-5)


# --- options and controls ----------------------------------------------------------------------------------------------


def test_equalising_by_hand():
    """|a| = 5 over two tensors, |b| = 15: their mean is 10; nothing to do against a zero gradient."""
    a, b = [torch.tensor([3.0]), torch.tensor([[4.0]])], [torch.tensor([0.0]), torch.tensor([[-15.0]])]
    assert equalising(a, b) == pytest.approx((2, 2 / 3))
    assert equalising(a, [None, torch.tensor([[15.0]])]) == pytest.approx((2, 2 / 3))
    assert equalising(a, [None, torch.zeros(1, 1)]) == (1, 1)


def test_equalised_gradients_are_weighted_and_summed(model, tmp_path):
    """w_U m gU/|gU| + w_G m gG/|gG| over the trained parameters, m the mean of both norms."""
    chosen = dict(shared_weight=0.0, unique_weight=0.0, equalise_gradients=True, generation_weight=0.5)
    trainer, batch = DIVATrainer(model, config(tmp_path, **chosen), DATA), batch_of(model, 16)
    trained = [p for p in model.parameters() if p.requires_grad]
    u, g = (
        torch.cat([x.flatten() for x in torch.autograd.grad(out.per_example_loss.mean(), trained)])
        for out in Flows(model)(batch, [])
    )
    mean = (u.norm() + g.norm()) / 2
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    found = torch.cat([p.grad.flatten() for p in trained])
    assert abs(float(u.norm() / g.norm()) - 1) > 0.05, "else this shows nothing"
    torch.testing.assert_close(found, mean * (u / u.norm() + 0.5 * g / g.norm()), atol=1e-6, rtol=1e-4)


def started(settings, model):
    """Encoders, and readouts that already say something."""
    torch.manual_seed(1)
    encoders = FactorEncoders(FactorEncodersConfig(hidden_size=32, factor_size=8)).eval()
    readouts = Readouts(8, {"understanding": model.config.text_vocab_size, "generation": model.codebook_size}, 4)
    stage = EncoderStage(model, encoders, readouts, [2], settings)
    for p in readouts.parameters():
        torch.nn.init.normal_(p)
    return stage


@pytest.mark.parametrize("pairs", ["true", "shuffled"])
def test_shuffled_pairs_in_stage_one(model, pairs):
    """U of anchor i takes z_sh of G's anchor i + 1, its own z_uni; G of anchor i + 1 takes z_sh of U's anchor i."""
    stage, batch = started(config("unused", pairs=pairs), model), batch_of(model, 6, 0)
    out = stage(batch, unique=True)
    u, g = Flows(model)(batch, [2])
    z = stage.encoders({flow: r.hidden_states[2].mean(1) for flow, r in zip(FLOWS, (u, g), strict=True)})
    step, losses = int(pairs == "shuffled"), {flow: [] for flow in FLOWS}
    for i in range(6):
        j = (i + step) % 6
        one = {"understanding": (u, i), "generation": (g, j)}
        pair = [{flow: part[flow][[k]] for flow, (_, k) in one.items()} for part in (z.shared, z.unique)]
        for flow, s in stage.readouts({flow: r.logits[[k]] for flow, (r, k) in one.items()}, Factors(*pair)).items():
            result, k = one[flow]
            losses[flow].append(token_losses(s, result.labels[[k]])[0])
    for flow in FLOWS:
        assert float(out[f"{flow}_loss"]) == pytest.approx(float(torch.stack(losses[flow]).mean()), rel=1e-4)


def test_shuffled_pairs_in_stage_two(model):
    """Partners, averaged targets and facts are those of the next anchor; the task losses do not notice."""
    encoders = FactorEncoders(FactorEncodersConfig(hidden_size=32, factor_size=8)).eval()
    batch = batch_of(model, 16)
    batch["facts"] = batch["facts"] % 5
    u, g = Flows(model)(batch, [2])
    rows, facts = batch["anchor"], batch["facts"][batch["anchor"]]
    z = encoders({"understanding": u.hidden_states[2][rows].mean(1), "generation": g.hidden_states[2][rows].mean(1)})
    order = [*range(1, 12), 0]
    x, y = z.shared["understanding"], z.shared["generation"][order]
    expected = alignment(x, y, True, 0.1, facts[order]).loss + alignment(y, x, True, 0.1, facts).loss
    found = {}
    for pairs in ("true", "shuffled"):
        settings = config("unused", unique_weight=0.0, pairs=pairs, mask_equal_facts=True)
        stage = BackboneStage(model, encoders, [2], settings)
        found[pairs] = stage(batch, None, [], {})
        with_targets = stage(batch, stage.factors(u, g, rows), [], {})
        assert torch.allclose(with_targets["shared_loss"], found[pairs]["shared_loss"])
    assert torch.allclose(found["shuffled"]["shared_loss"], expected, atol=1e-5)
    assert abs(float(found["shuffled"]["shared_loss"] - found["true"]["shared_loss"])) > 1e-3
    assert torch.equal(found["shuffled"]["generation_loss"], found["true"]["generation_loss"])


def test_words_stand_in_for_the_factor(model):
    """U's bias is a linear map of the caption's words plus its own unique factor's, and E_sh^G learns nothing."""
    stage, batch = started(config("unused", bag_of_words=True), model), batch_of(model, 6, 0)
    out = stage(batch, unique=False)
    u, _ = Flows(model)(batch, [2])
    words = torch.zeros(6, model.config.text_vocab_size)
    for i in range(6):
        for label in u.labels[i]:
            if label >= 0:
                words[i, label] += 1
    assert torch.equal(bag_of_words(u.labels, words.shape[1]), words) and float(words.sum(1).min()) > 3
    first, last = stage.readouts.shared["understanding"]
    assert first.weight.shape == (4, words.shape[1])
    expected = token_losses(u.logits + (words @ first.weight.T @ last.weight.T)[:, None], u.labels)[1].mean()
    assert float(out["understanding_loss"]) == pytest.approx(float(expected), rel=1e-4)
    out["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in stage.encoders.shared["generation"].parameters())


def test_random_encoders_stay_as_they_were_drawn(model, tmp_path):
    trainer = DIVATrainer(model, config(tmp_path, random_encoders=True), DATA)
    trainer.train()
    torch.manual_seed(trainer.args.seed)
    drawn = FactorEncoders(FactorEncodersConfig(hidden_size=32, factor_size=32)).state_dict()
    assert all(torch.equal(p, drawn[name]) for name, p in trainer.encoders.state_dict().items())
    assert not (tmp_path / "stage1").exists() and (tmp_path / "encoders").exists()


def test_readouts_are_cut_to_full_rank(model, tmp_path, caplog):
    DIVATrainer(model, config(tmp_path, rank=64, stage1_steps=1), DATA).warm_up()
    assert "readouts of rank 32 instead of 64" in caplog.text


def test_released_critic_is_club_by_its_formula():
    """Without 1/2 and with tanh(log variance); it learns by likelihood, one step for each batch."""
    critic, x = ReleasedCritic(3, seed=1).eval(), torch.randn(5, 3)
    y = x + 0.1 * torch.randn(5, 3)
    mean, spread = critic.critic.net(x).detach().chunk(2, 1)
    score = [
        [-sum((y[j, d] - mean[i, d]) ** 2 / spread[i, d].tanh().exp() for d in range(3)) for j in range(5)] for i in range(5)
    ]
    expected = sum(float(score[i][i]) for i in range(5)) / 5
    expected -= sum(float(score[i][j]) for i in range(5) for j in range(5) if i != j) / 20
    found = critic(x, y, torch.arange(5))
    assert float(found.loss) == pytest.approx(expected, rel=1e-4) and found.active
    critic.train()
    likelihood = []
    for _ in range(200):
        likelihood.append(float(critic.critic(x, y).detach().diagonal().mean()))
        critic(x, y, torch.arange(5))
    assert likelihood[-1] > likelihood[0] + 1


def test_released_terms_by_a_naive_reference(model):
    """CLUB of (shared, unique) in each flow, summed; orthogonality in stage 2, InfoNCE but no orthogonality in stage 1."""
    settings, batch = config("unused", variant="released", factor_size=8), batch_of(model, 16)
    encoders = FactorEncoders(FactorEncodersConfig(hidden_size=32, factor_size=8, kind=settings.encoder)).eval()
    critics = [ReleasedCritic(8, seed=k).eval() for k in range(4)]
    out = BackboneStage(model, encoders, [1, 3], settings)(batch, None, critics, {})
    u, g = Flows(model)(batch, [1, 3])
    unique, orthogonal, places = [], [], batch["places"][batch["anchor"]]
    for k, layer in enumerate((1, 3)):
        z = encoders({f: r.hidden_states[layer][batch["anchor"]].mean(1) for f, r in zip(FLOWS, (u, g), strict=True)})
        pairs = [(z.shared[flow], z.unique[flow]) for flow in FLOWS]
        unique.append(sum(critics[2 * k + i](*pair, places).loss for i, pair in enumerate(pairs)))
        orthogonal.append(sum(orthogonality(*pair).overlap for pair in pairs))
    assert torch.allclose(out["unique_loss"], sum(unique) / 2, atol=1e-4)
    assert torch.allclose(out["orthogonality_loss"], sum(orthogonal) / 2, atol=1e-5)
    first = started(settings, model)(batch_of(model, 8, 0), unique=True)
    assert "shared_loss" in first and "orthogonality_loss" not in first
    total = first["understanding_loss"] + first["generation_loss"] + 0.6 * first["shared_loss"]
    assert torch.allclose(first["loss"], total)


def test_released_trains_everything_in_stage_two(model, tmp_path):
    trainer = DIVATrainer(model, config(tmp_path, variant="released", layers=[], max_steps=3), DATA)
    assert trainer.layers == [2], "two thirds of four, rounded down"
    before, encoders = weights(model), trainer.warm_up()
    drawn = weights(encoders)
    trainer.encoders = encoders
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"embedding.weight", "blocks.3.mlp.0.weight"} < changed and not any("image_tokenizer" in name for name in changed)
    moved = {name.split(".")[0] for name, p in encoders.named_parameters() if not torch.equal(p, drawn[name])}
    assert moved == {"shared", "unique"}
    kept = FactorEncoders.from_pretrained(tmp_path / "encoders").state_dict()
    assert all(torch.equal(p, kept[name]) for name, p in encoders.state_dict().items())


def test_adapters_are_merged_by_hand():
    """W + B A afterwards, in the same parameter, nothing of peft left; other linear maps and the generator untouched."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 2))
    weight, start = module[0].weight, module[0].weight.detach().clone()
    torch.manual_seed(5)
    with adapters(module, [weight], rank=1, seed=2):
        assert {name for name, p in module.named_parameters() if p.requires_grad} == {
            "0.lora_A.default.weight",
            "0.lora_B.default.weight",
        }
        torch.nn.init.constant_(module[0].lora_A.default.weight, 2.0)
        module[0].lora_B.default.weight.data = torch.tensor([[1.0], [-1.0]])
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert module[0].weight is weight and list(module.state_dict()) == ["0.weight", "1.weight", "1.bias"]
    torch.testing.assert_close(weight.detach(), start + torch.tensor([[2.0] * 3, [-2.0] * 3]))
    with pytest.raises(ValueError, match=r"hold no torch\.nn\.Linear"), adapters(module, [module[1].bias], 1):
        pass


def test_lora_trains_adapters_only_and_leaves_a_plain_model(model, tmp_path):
    from transformers import TrainerCallback

    before, names = weights(model), [name for name, _ in model.named_parameters()]

    class Watch(TrainerCallback):
        seen = 0

        def on_step_end(self, args, state, control, **_):
            inside = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
            assert list(inside) == names and all(torch.equal(p, before[name]) for name, p in inside.items())
            assert len(model.layer_parameters()) == 4 and any(p.requires_grad for p in model.layer_parameters()["block 2"])
            self.seen += 1

    watch = Watch()
    trainer = DIVATrainer(model, config(tmp_path, lora_rank=2), DATA)
    trainer.add_callback(watch)  # of stage 2 alone
    trainer.train()
    assert watch.seen == 6 and [name for name, _ in model.named_parameters()] == names
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"blocks.1.{name}.weight" for name in ("attention.qkv", "attention.out", "mlp.0", "mlp.2")}
    for name in changed:
        spread = torch.linalg.svdvals((model.get_parameter(name) - before[name]).detach().double())
        assert float(spread[2]) < 1e-6 < float(spread[0]) / 5, "of rank 2, up to rounding"
    model.save_pretrained(tmp_path / "saved")
    program = (
        "import sys; sys.modules['peft'] = None; from umm_kit.models import load; "
        f"print(float(load({str(tmp_path / 'saved')!r}, device='cpu').blocks[1].mlp[0].weight.double().sum()))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=250)
    assert said.returncode == 0, said.stderr[-2000:]
    assert float(said.stdout.split()[-1]) == float(model.blocks[1].mlp[0].weight.double().sum())


@pytest.mark.slow
def test_adapters_are_kept_by_themselves(saved, tmp_path):
    """What peft would load onto the base is the merged model, bit for bit; onto another base it is refused."""
    model = load(saved, device="cpu")
    DIVATrainer(model, config(tmp_path, lora_rank=2, model=str(saved)), DATA).train()
    again = load(tmp_path / "adapter", device="cpu")
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    about = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert about["r"] == 2 and about["base_model_name_or_path"] == str(saved)
    model.save_pretrained(tmp_path / "other")
    for base, said in ((str(tmp_path / "other"), "trained on other weights"), ("", "names no base model")):
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": base}))
        with pytest.raises(ValueError, match=said):
            load(tmp_path / "adapter", device="cpu")


def test_callbacks_that_are_given_hear_of_both_stages(model, tmp_path):
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        steps: ClassVar[list[str]] = []

        def on_step_end(self, args, state, control, **_):
            self.steps.append("stage 1" if args.output_dir.endswith("stage1") else "stage 2")

    settings = config(tmp_path)
    DIVATrainer(model, settings, DATA, callbacks=[Watch()]).train()
    assert Watch.steps == ["stage 1"] * settings.stage1_steps + ["stage 2"] * settings.max_steps


def test_terms_without_gradient_and_terms_that_dominate_are_called_out(model, tmp_path, caplog):
    """An untrained critic is silent, so the unique term is dead; a weight of 1e4 drowns the rest. Said once, logged always."""
    settings = config(tmp_path, understanding_weight=1e4, ramp_share=0.5)
    trainer = DIVATrainer(model, settings, DATA)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["unique_warning"] for entry in log] == [0, 0, 0, -1, -1, -1], "not before the ramp ends"
    assert log[-1]["unique_gradient_share"] == 0 and log[-1]["unique_active"] == 0
    assert [entry["understanding_warning"] for entry in log[3:]] == [1, 1, 1] and log[-1]["understanding_gradient_share"] > 0.9
    assert caplog.text.count("unique hardly moves what is trained: 0.0 %") == 1
    assert caplog.text.count("understanding dominates what is trained") == 1
    assert log[-1]["shared_estimate"] <= log[-1]["shared_bound"] == pytest.approx(np.log(12))


# --- stops -------------------------------------------------------------------------------------------------------------


def same_end(a, b):
    first, second = (load_file(Path(folder) / "model.safetensors") for folder in (a, b))
    return max(float((w - second[name]).abs().max()) for name, w in first.items())


def options(saved, folder, **changes):
    small = dict(
        model=str(saved), output_dir=str(folder), stage1_steps=4, max_steps=6, per_device_train_batch_size=16, logging_steps=1,
        save_steps=2, disable_tqdm=True, warmup_steps=1, stage1_warmup_steps=1, use_cpu=True, rank=8, factor_size=32,
        stage1_learning_rate=1e-3, learning_rate=3e-4, queue=24, layers=[2], seed=1,
    )  # fmt: skip
    return {**small, **changes}


@pytest.fixture(scope="module")
def whole(saved, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    train(DIVAConfig(**options(saved, folder)))
    return folder


@pytest.mark.parametrize("stage, step", [(1, 3), (2, 3)])
def test_an_interrupt_in_either_stage_resumes_to_the_same_model(saved, whole, tmp_path, monkeypatch, stage, step):
    import transformers.trainer
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == step and ("stage1" in args.output_dir) == (stage == 1):
                os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, Stop()])
        with pytest.raises(KeyboardInterrupt):
            train(DIVAConfig(**options(saved, tmp_path)))
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "encoders").exists() == (stage == 2)
    train(DIVAConfig(**options(saved, tmp_path, resume=True)))
    assert same_end(whole, tmp_path) == 0


def test_the_penalty_of_stage_one_is_that_of_its_critics(model, tmp_path):
    """loss = the other terms + ramp * unique_weight * what a critic of its own scores, layer by layer; none before its turn."""
    settings = config(tmp_path, unique_weight=0.5, stage1_penalty=True)
    torch.manual_seed(0)
    encoders = FactorEncoders(FactorEncodersConfig(hidden_size=model.hidden_size, factor_size=8))
    widths = {"understanding": model.config.text_vocab_size, "generation": model.codebook_size}
    stage = EncoderStage(model, encoders, Readouts(8, widths, 4), [2, 3], settings)
    critics = new_critics(8, 2, settings, False)
    for critic in critics:
        critic.threshold = -np.inf  # an untrained critic would be silent
        critic.eval()
    batch = batch_of(model, 8, 0)
    with_penalty, without = stage(batch, True, critics, 0.25), stage(batch, True)
    u, g = Flows(model)(batch, [2, 3])
    z = [encoders(states_at(u, g, layer, batch["anchor"], settings)) for layer in (2, 3)]
    scored = [c(f.unique["understanding"], f.unique["generation"], batch["places"]).loss for c, f in zip(critics, z, strict=True)]
    assert abs(float(sum(scored))) > 1e-4
    assert float(with_penalty["loss"] - without["loss"]) == pytest.approx(0.25 * 0.5 * float(sum(scored)) / 2, abs=1e-6)
    assert "unique_loss" not in without and "unique_loss" not in stage(batch, False, critics)


def test_an_interrupted_stage_one_resumes_with_its_critics(saved, tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 3 and "stage1" in args.output_dir:
                os.kill(os.getpid(), signal.SIGINT)

    chosen = dict(variant="corrected", stage1_steps=5, max_steps=1, shared_only=0.2, save_steps=100)
    ends = []
    for stops in (False, True):
        folder = tmp_path / str(stops)
        if stops:
            with pytest.raises(KeyboardInterrupt):
                DIVATrainer(load(saved, device="cpu"), config(folder, **chosen), DATA, callbacks=[Stop()]).fit()
            assert (folder / "stage1/checkpoint-4/extras.pt").exists()
        trainer = DIVATrainer(load(saved, device="cpu"), config(folder, resume=stops, **chosen), DATA)
        trainer.fit()
        ends.append(weights(trainer.encoders))
        log = json.loads((folder / "stage1/run.json").read_text())["log"]
        assert ["unique_contrast" in entry for entry in log if "loss" in entry] == [False, True, True, True, True]
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())


@pytest.mark.parametrize("options_of", ["lora", "released"])
def test_an_interrupted_stage_two_resumes_with_adapters_and_with_encoders(saved, tmp_path, options_of):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2 and "stage1" not in args.output_dir:
                os.kill(os.getpid(), signal.SIGINT)

    chosen = {
        "lora": dict(lora_rank=2, shared_weight=0.0, unique_weight=0.0),
        "released": dict(variant="released", stage1_steps=1),
    }
    ends = []
    for stops in (False, True):
        model = load(saved, device="cpu")
        settings = config(tmp_path / str(stops), max_steps=5, save_steps=100, **chosen[options_of])
        if stops:
            with pytest.raises(KeyboardInterrupt):
                DIVATrainer(model, settings, DATA, callbacks=[Stop()]).fit()
            model = load(saved, device="cpu")
            settings = config(tmp_path / str(stops), max_steps=5, save_steps=100, resume=True, **chosen[options_of])
        trainer = DIVATrainer(model, settings, DATA)
        trainer.fit()
        ends.append(weights(model) | (weights(trainer.encoders) if trainer.encoders is not None else {}))
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())


def test_resuming_with_another_configuration_is_refused_by_name(saved, whole):
    changed = options(saved, whole, resume=True, temperature=0.2, shared_weight=0.5)
    with pytest.raises(ValueError, match=r"shared_weight 0.6 \(now 0.5\), temperature 0.1 \(now 0.2\)"):
        train(DIVAConfig(**changed))


@pytest.mark.slow
@pytest.mark.distributed
def test_one_and_two_processes_agree(saved, whole, tmp_path, train_command):
    """The same global batch, whole on one process or halved on two: negatives, queue and critics' pairs are those of both.

    Measured: 3e-8. With seed 42 it is 1.3e-5, because at one step a unit of the MLPs lies so near 0 that rounding decides
    whether its ReLU lets the gradient through; losses up to that step are equal to 1e-6.
    """
    done = train_command("diva", 2, **options(saved, tmp_path / "two", per_device_train_batch_size=8))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert same_end(whole, tmp_path / "two") <= 1e-5


def test_a_loss_that_is_no_number_stops_and_keeps_the_batch(model, tmp_path):
    trainer = DIVATrainer(model, config(tmp_path), DATA)
    trainer.encoders = trainer.warm_up()
    with torch.no_grad():
        model.blocks[1].mlp[0].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"not finite at step 0.*--resume True"):
        trainer.train()
    kept = load_file(tmp_path / "not_finite.safetensors")
    assert kept["images"].shape == (16, 3, 32, 32) and last_checkpoint(tmp_path) is None


def test_every_batch_that_is_not_finite_is_kept(saved, tmp_path):
    """Of the projection of gradients, of terms on factors in stage 1, of encoders that are broken in stage 2."""
    plain = dict(shared_weight=0.0, unique_weight=0.0)
    for name, options in {"projected": {**plain, "project_conflicts": True}, "stage1": {"variant": "corrected"}}.items():
        model = load(saved, device="cpu")
        with torch.no_grad():
            model.blocks[1].mlp[0].weight.fill_(float("nan"))
        with pytest.raises(ValueError, match=r"kept in .*--resume True"):
            DIVATrainer(model, config(tmp_path / name, **options), DATA).train()
        assert (tmp_path / name / ("stage1" if name == "stage1" else "") / "not_finite.safetensors").exists()
    encoders = FactorEncoders(FactorEncodersConfig(hidden_size=32, factor_size=32))
    with torch.no_grad():
        encoders.shared["generation"].norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"vectors hold NaN.*kept in .*--resume True"):
        DIVATrainer(load(saved, device="cpu"), config(tmp_path / "stage2"), DATA, encoders).train()
    assert (tmp_path / "stage2/not_finite.safetensors").exists()


def test_epochs_of_a_finite_data_set_may_meet_in_a_batch(model, tmp_path):
    trainer = DIVATrainer(model, config(tmp_path, max_steps=8, shared_only=0.0), Digits("train", n=20))
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 8 and all(np.isfinite(entry["unique_contrast"]) for entry in log)


def test_a_queue_smaller_than_the_processes_keeps_one_row(model, tmp_path):
    trainer = DIVATrainer(model, config(tmp_path, queue=2), DATA)
    trainer.args = SimpleNamespace(queue=2, world_size=4, pairs="true")
    z = [Factors({flow: torch.randn(12, 8) for flow in FLOWS}, {})]
    for _ in range(2):
        trainer._enqueue(batch_of(model, 16), z)
    assert {len(rows) for pair in trainer.queues.values() for rows in pair} == {1}


def test_a_full_disk_is_named_for_the_extras_too(model, tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    trainer = DIVATrainer(model, config(tmp_path), DATA, FactorEncoders(FactorEncodersConfig(hidden_size=32, factor_size=32)))
    with pytest.raises(OSError, match=r"could not be written \(unexpected pos.*--resume True"):
        trainer.critics = new_critics(8, 1, trainer.args, True)
        trainer._save_checkpoint(trainer.model, None)


@pytest.mark.parametrize("random", [True, False])
def test_encoders_on_a_full_disk_are_not_taken_for_finished(saved, tmp_path, monkeypatch, random):
    def full(self, folder):
        self.config.save_pretrained(folder)  # as transformers does: the weights come last
        raise OSError("No space left on device")

    made = lambda folder: DIVATrainer(load(saved, device="cpu"), config(folder, random_encoders=random), DATA)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(FactorEncoders, "save_pretrained", full)
        with pytest.raises(OSError, match=r"encoders.part could not be written \(No space left.*make room.*--resume True"):
            made(tmp_path / "full").warm_up()
    again, whole = weights(made(tmp_path / "full").warm_up()), weights(made(tmp_path / "whole").warm_up())
    assert all(torch.equal(p, again[name]) for name, p in whole.items())
    kept = FactorEncoders.from_pretrained(tmp_path / "full/encoders").state_dict()
    assert all(torch.equal(p, kept[name]) for name, p in whole.items())
    assert not (tmp_path / "full/encoders.part").exists()


def test_a_folder_belongs_to_its_model_its_data_and_its_configuration(saved, tmp_path):
    """Also for warm_up alone; what says nothing of the result may change."""
    model = load(saved, device="cpu")
    drawn = DIVATrainer(model, config(tmp_path, random_encoders=True), DATA).warm_up()
    free = dict(save_total_limit=7, dataloader_num_workers=1, run_name="again", log_level="error", logging_first_step=True)
    again = DIVATrainer(load(saved, device="cpu"), config(tmp_path, random_encoders=True, **free), DATA).warm_up()
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in drawn.state_dict().items())
    with pytest.raises(ValueError, match=r"examples Shapes\('train', n=4096.*now Shapes\('train', n=64"):
        DIVATrainer(model, config(tmp_path, random_encoders=True), Shapes("train", n=64)).warm_up()
    with pytest.raises(ValueError, match=r"factor_size 32 \(now 16\)"):
        DIVATrainer(model, config(tmp_path, random_encoders=True, factor_size=16), DATA).warm_up()
    with torch.no_grad():
        model.blocks[0].mlp[0].weight.add_(1)
    with pytest.raises(ValueError, match=r"another configuration: model's checksum \d+ \(now \d+\)"):
        DIVATrainer(model, config(tmp_path, random_encoders=True), DATA).warm_up()
    about = tmp_path / "diva.json"
    earlier = {n: v for n, v in json.loads(about.read_text()).items() if n not in ("model's checksum", "examples")}
    about.write_text(json.dumps(earlier))  # of a release that did not keep them
    DIVATrainer(load(saved, device="cpu"), config(tmp_path, random_encoders=True), DATA).warm_up()
    about.unlink()
    with pytest.raises(ValueError, match=r"encoders in .*'kind': 'gated'.*expected .*'kind': 'linear'"):
        DIVATrainer(load(saved, device="cpu"), config(tmp_path, encoder="linear"), DATA).warm_up()


def test_a_folder_belongs_to_its_examples_and_to_encoders_that_were_given(saved, tmp_path):
    """Also where data look alike, and whether encoders were given at all; of an older folder what is known decides."""
    drawn = [FactorEncoders(FactorEncodersConfig(hidden_size=32, factor_size=32)) for _ in range(2)]

    def begin(encoders=drawn[0], data=DATA):
        DIVATrainer(load(saved, device="cpu"), config(tmp_path), data, encoders).claim_folder("diva.json")

    begin()
    begin()
    for others in (Shapes("train", n=4096, style="list"), Shapes("train", n=4096, nuisance_seed=5)):
        assert repr(others) == repr(DATA)
        with pytest.raises(ValueError, match=r"another configuration: first example \S+ \(now \S+\); choose another folder"):
            begin(data=others)
    with pytest.raises(ValueError, match=r"another configuration: checksum of given encoders \d+ \(now \d+\); choose"):
        begin(drawn[1])
    with pytest.raises(ValueError, match=r"checksum of given encoders \d+ \(now None\)"):
        begin(None)
    about = tmp_path / "diva.json"
    known = {n: v for n, v in json.loads(about.read_text()).items() if n not in ("first example", "checksum of given encoders")}
    about.write_text(json.dumps(known))
    begin(drawn[1])
    with pytest.raises(ValueError, match=r"checksum of given encoders \d+ \(now \d+\)"):
        begin()


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"ema_role": "both"}, "ema_role"),
        ({"ramp_share": 1.5}, "ramp_share"),
        ({"unique_weight": -1.0}, "unique_weight.*negative"),
        ({"replay_every": 1}, "replay_every"),
        ({"replay_every": 3}, "not a multiple of replay_every 3"),
        ({"queue": 8, "stop_gradient": False}, "symmetric and takes no queue"),
        ({"orthogonality": "cosine"}, "orthogonality"),
        ({"layers": [2, 2, 2]}, r"layers are \[2, 2, 2\]; expected each once"),
        ({"per_device_train_batch_size": 1}, "fewer than two anchors, and InfoNCE contrasts at least 2 pairs"),
        ({"per_device_train_batch_size": 2, "replay_every": 2}, "fewer than two anchors"),
        ({"project_conflicts": True, "reconstruction_weight": 1.0},
         r"\['shared_weight', 'unique_weight', 'reconstruction_weight'\] are above 0"),
        ({"project_conflicts": True, "shared_weight": 0.0, "unique_weight": 0.0, "stage2_orthogonality_weight": 0.1},
         r"\['stage2_orthogonality_weight'\] are above 0"),
    ],
)  # fmt: skip
def test_bad_configurations_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **wrong)


def test_what_does_not_fit_the_model_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"layers \[5\] are outside the model, which has layers 1 to 4"):
        DIVATrainer(model, config(tmp_path, layers=[2, 5]), DATA)
    fits = {"hidden_size": 32, "factor_size": 32, "kind": "gated"}
    for wrong in ({"hidden_size": 16}, {"factor_size": 8}, {"kind": "linear"}):
        came = fits | wrong
        with pytest.raises(ValueError, match=re.escape(f"encoders given are {came}; expected {fits}: set factor_size")):
            DIVATrainer(model, config(tmp_path), DATA, FactorEncoders(FactorEncodersConfig(**came)))
