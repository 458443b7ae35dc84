"""LatentUMM's two stages: terms by hand, what each variant trains, collapse seen, resumption, refusals."""

import json
import math
import zlib

import pytest
import torch
from families import small
from safetensors.torch import load_file
from transformers import TrainerCallback

from umm_kit import cli
from umm_kit.data.shapes import Shapes
from umm_kit.models import load
from umm_kit.models.aligner import LatentAligner, LatentAlignerConfig
from umm_kit.models.teachers import EmbeddingTable
from umm_kit.trainers.base import Stream
from umm_kit.trainers.latentumm import (
    VARIANTS,
    AlignerConfig,
    AlignerTrainer,
    LatentStep,
    LatentUMMConfig,
    LatentUMMTrainer,
    train,
    train_aligner,
)
from umm_kit.trainers.stages import FlowCollator

DATA = Shapes("train", n=256)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A stand-in for a teacher: random unit vectors for each item, the image's near the text's."""
    rng = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(256, 12, generator=rng), dim=1)
    image = text + 0.05 * torch.randn(256, 12, generator=rng)
    made = EmbeddingTable([DATA[i]["id"] for i in range(256)], text, image)
    made.save(tmp_path_factory.mktemp("table") / "teacher.safetensors")
    return made


def config(folder, **changes):
    few = dict(
        output_dir=str(folder), rounds=1, prompts=8, pairs=4, draws=2, drawing_steps=2, max_steps=4, threshold=0.0,
        per_device_train_batch_size=8, logging_steps=1, save_steps=2, disable_tqdm=True, use_cpu=True, warmup_steps=0,
        lr_scheduler_type="constant", learning_rate=1e-3,
    )  # fmt: skip
    return LatentUMMConfig(**{**few, **changes})


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def batch_of(model, args, table):
    items = Stream(DATA, 64, 0).__getitems__(range(8))
    batch = FlowCollator(DATA, model.grid, args, args.replay_every)(items)
    e_text, e_image = table.of([items[k]["id"] for k in batch["anchor"].nonzero()[:, 0].tolist()])
    return {**batch, "e_text": e_text, "e_image": e_image}


# --- stage 2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_terms_by_hand(saved, table, tmp_path, variant):
    model, args = load(saved, device="cpu"), config(tmp_path, variant=variant)
    batch = batch_of(model, args, table)
    step = LatentStep(model, 12)
    out = step(batch, None, args)
    anchor = batch["anchor"].nonzero()[:, 0].tolist()
    texts = [batch["drawn"][k] for k in anchor]
    common = {"images": batch["images"], "ids": batch["ids"]}
    last = model.num_layers
    z_text = model.text_states(texts, [last])[last]
    if variant == "released":
        flow = model.generation_flow({**common, "texts": batch["drawn"]}, mask=batch["mask"], layers=[last])
        z_hat = step.heads.reencode(step.heads.generate(z_text))
    else:
        flow = model.understanding_flow({**common, "texts": batch["said"], "prompts": batch["prompts"]}, layers=[last])
        noise = [torch.Generator().manual_seed(zlib.crc32(batch["ids"][k].encode())) for k in anchor]
        z_hat = model.regenerate(texts, [last], generator=noise)[last].mean(1)
    z_image = flow.hidden_states[last][anchor].mean(1)
    assert out["modal_loss"].item() == pytest.approx(float((z_text - z_image).square().mean()), rel=1e-4)
    assert out["capacity_loss"].item() == pytest.approx(float((z_text - z_hat).square().mean()), rel=1e-3)
    target = [(step.heads.generate(z) - e).square().mean() for z, e in ((z_text, batch["e_text"]), (z_image, batch["e_image"]))]
    assert out["target_loss"].item() == pytest.approx(float(sum(target)) / 2, rel=1e-3)
    assert ("infonce_loss" in out) == (variant == "corrected")
    if variant == "released":
        assert 0 < out["preference_loss"].item() <= 0.6932 and out["rollout_best"] > out["rollout_worst"]


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_each_variant_trains_the_backbone_and_its_own_terms(saved, table, tmp_path, variant):
    model = load(saved, device="cpu")
    trainer = LatentUMMTrainer(model, config(tmp_path, variant=variant), DATA, table)
    trainer.fit()
    log = [entry for entry in trainer.state.log_history if "modal_loss" in entry]
    assert {"understanding_loss", "capacity_loss", "target_loss", "preference_loss", "total_variance", "negative_cosine"} <= set(
        log[-1]
    )
    assert ("preference_margin" in log[-1]) == (variant == "corrected") == (tmp_path / "rollouts").exists()
    before = weights(load(saved, device="cpu"))
    assert len(weights(model)) == len(before) and not torch.equal(weights(model), before), "adapters are merged and gone"
    assert len(trainer.monitor.readings) == 4


def test_the_loss_is_the_weighted_sum_of_what_is_logged(saved, table, tmp_path):
    args = config(tmp_path, variant="released", modal_weight=0.5, capacity_weight=0.25, target_weight=2.0, max_steps=1)
    trainer = LatentUMMTrainer(load(saved, device="cpu"), args, DATA, table)
    trainer.fit()
    entry = next(e for e in trainer.state.log_history if "modal_loss" in e)
    given = {"understanding": 1, "generation": 1, "modal": 0.5, "capacity": 0.25, "target": 2.0, "preference": 0.001}
    wanted = sum(weight * entry[f"{name}_loss"] for name, weight in given.items())
    assert entry["loss"] == pytest.approx(wanted, rel=2e-3)  # as many digits as the log has


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_what_is_not_finite_stops_and_keeps_the_batch(saved, tmp_path, variant):
    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            with torch.no_grad():
                model.blocks[1].mlp[0].weight.fill_(float("nan"))

    model, few = load(saved, device="cpu"), config(tmp_path, variant=variant, target_weight=0.0, lora_rank=0)
    trainer = LatentUMMTrainer(model, few, DATA, callbacks=[Diverge()])
    with pytest.raises(ValueError, match=r"hold.* NaN.*batch of step 1 is kept in .*--resume True"):
        trainer.fit()
    assert load_file(tmp_path / "not_finite.safetensors")["images"].shape == (8, 3, 32, 32)


def test_without_a_target_no_teacher_is_asked_for(saved, tmp_path):
    trainer = LatentUMMTrainer(load(saved, device="cpu"), config(tmp_path, target_weight=0.0, preference="none"), DATA)
    trainer.fit()
    log = [entry for entry in trainer.state.log_history if "modal_loss" in entry]
    assert trainer.teacher is None and trainer.model.heads is None and "target_loss" not in log[0]
    assert "preference_loss" not in log[0]


def test_a_stopped_run_goes_on_as_if_it_had_not(saved, table, tmp_path, monkeypatch):
    def run(folder, **changes):
        model = load(saved, device="cpu")
        trainer = LatentUMMTrainer(model, config(folder, variant="released", lora_rank=0, **changes), DATA, table)
        trainer.fit()
        steps.append([step for step, *_ in trainer.monitor.readings])
        return weights(model)

    steps = []
    whole = run(tmp_path / "whole")
    real, count = LatentUMMTrainer.compute_loss, iter(range(100))

    def stop(self, *args, **kwargs):
        if next(count) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LatentUMMTrainer, "compute_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.setattr(LatentUMMTrainer, "compute_loss", real)
    torch.testing.assert_close(run(tmp_path / "cut", resume=True), whole, atol=1e-6, rtol=0)
    assert steps == [[0, 1, 2, 3]] * 2, "readings of a resumed run are compared with the start of the run"


def test_plain_training_takes_no_latents(saved, tmp_path, monkeypatch):
    model = load(saved, device="cpu")
    monkeypatch.setattr(type(model), "text_states", lambda *_: pytest.fail("latents were taken"))
    weightless = dict.fromkeys(("modal_weight", "capacity_weight", "target_weight"), 0.0)
    plain = config(tmp_path, preference="none", guard="none", **weightless)
    assert not plain.takes_latents and config(tmp_path, preference="released", guard="none", **weightless).takes_latents
    LatentUMMTrainer(model, plain, DATA).fit()


def test_train_reads_a_table_and_saves_its_record(saved, table, tmp_path, monkeypatch):
    table.save(tmp_path / "t.safetensors")
    monkeypatch.setattr("umm_kit.data.open_data", lambda *_, **__: DATA)
    train(config(tmp_path / "run", model=str(saved), teacher=str(tmp_path / "t.safetensors"), variant="released", max_steps=2))
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert len(record["collapse"]["readings"]) == 2
    load(tmp_path / "run", device="cpu")


# --- stage 1 -----------------------------------------------------------------------------------------------------------


def aligned(table, folder, **changes):
    torch.manual_seed(0)
    args = AlignerConfig.tiny(output_dir=str(folder), use_cpu=True, disable_tqdm=True, hidden_size=32, num_heads=4, **changes)
    aligner = LatentAligner(LatentAlignerConfig(embedding_size=12, hidden_size=32, num_layers=1, num_heads=4, dropout=0.0))
    trainer = AlignerTrainer(aligner, args, table, DATA)
    trainer.fit()
    return trainer


def test_released_terms_collapse_and_the_monitor_says_so(table, tmp_path):
    """Modal and capacity alone: the variance goes, an alarm is raised; with the guard neither."""
    small = dict(max_steps=120, per_device_train_batch_size=64, logging_steps=40)
    released = aligned(table, tmp_path / "a", **small).monitor.to_frame()
    assert released.total_variance.iloc[-1] < 0.25 * released.total_variance.iloc[0]
    assert "scale" in released.alarm.iloc[-1]
    kept = aligned(table, tmp_path / "b", guard="vicreg", guard_weight=25.0, **small).monitor.to_frame()
    assert kept.total_variance.iloc[-1] > 4 * released.total_variance.iloc[-1] and "scale" not in kept.alarm.iloc[-1]


def test_stage_one_is_saved_with_its_readings(table, tmp_path, monkeypatch):
    table.save(tmp_path / "t.safetensors")
    monkeypatch.setattr("umm_kit.data.open_data", lambda *_, **__: DATA)
    options = dict(output_dir=str(tmp_path / "run"), teacher=str(tmp_path / "t.safetensors"), max_steps=2, logging_steps=1)
    options |= dict(hidden_size=32, use_cpu=True, disable_tqdm=True)
    aligner = train_aligner(AlignerConfig(**options))
    again = LatentAligner.from_pretrained(tmp_path / "run").eval()
    e = table.text[:3]
    torch.testing.assert_close(again.encode_text(e), aligner.encode_text(e))
    options["output_dir"] = str(tmp_path / "command")
    assert cli.main(["train", "aligner", *(f"--{name}={value}" for name, value in options.items())]) == 0
    commanded = LatentAligner.from_pretrained(tmp_path / "command").eval()
    torch.testing.assert_close(again.encode_text(e), commanded.encode_text(e))
    assert len(json.loads((tmp_path / "run/run.json").read_text())["collapse"]["readings"]) == 2


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(variant="paper"), "variant is 'paper'"), (dict(latents="both"), "latents"), (dict(guard="hope"), "guard"),
        (dict(variant="released", sigma=0.0), "sigma is 0"), (dict(modal_weight=-1.0), "modal_weight"),
        (dict(preference="ppo"), "preference"), (dict(rollouts=1), "at least two"),
    ],
)  # fmt: skip
def test_bad_configurations_are_refused(tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **wrong)


@pytest.mark.parametrize("family", ["autoregressive", "flow"])
def test_other_families_are_trained_by_the_corrected_form(family, table, tmp_path):
    """They draw and read with gradient, each in its own way (whose gradients the tests of the families check)."""
    trainer = LatentUMMTrainer(small(family), config(tmp_path, max_steps=2), DATA, table)
    trainer.fit()
    log = [entry for entry in trainer.state.log_history if "capacity_loss" in entry]
    assert len(log) == 2 and all(0 < entry["capacity_loss"] < math.inf for entry in log)


def test_a_flow_model_with_an_encoder_of_its_own_is_refused_before_it_draws(tmp_path, table):
    from umm_kit.data.language import vocabulary_corpus
    from umm_kit.models.flowmatching import FlowUMM

    apart = FlowUMM.tiny(list(vocabulary_corpus()), separate_encoder=True)
    with pytest.raises(NotImplementedError, match="--capacity heads"):
        LatentUMMTrainer(apart, config(tmp_path), DATA, table)
    LatentUMMTrainer(apart, config(tmp_path, capacity="heads"), DATA, table)


def test_a_family_that_cannot_draw_with_gradient_is_refused(saved, tmp_path, table):
    class Other(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="Other has no text_states, regenerate"):
        LatentUMMTrainer(Other(), config(tmp_path), DATA, table)


def test_an_id_without_a_vector_is_refused_by_name(saved, tmp_path):
    few = EmbeddingTable(["nobody"], torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="have no vector in this table"):
        LatentUMMTrainer(load(saved, device="cpu"), config(tmp_path, variant="released"), DATA, few).fit()
