"""DPO on rollouts: what is drawn, ranked, kept and trained on; resumption; refusals."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from umm_kit.data.shapes import Shapes
from umm_kit.losses.preference import best_and_worst
from umm_kit.models import load
from umm_kit.models.base import Decoding
from umm_kit.trainers.base import Stream
from umm_kit.trainers.latentumm import LatentUMMConfig, LatentUMMTrainer
from umm_kit.trainers.latentumm import train as train_latentumm
from umm_kit.trainers.preference import PreferenceConfig, PreferenceTrainer, Rollouts, roll_out, train

DATA = Shapes("train", n=4096)


pytestmark = pytest.mark.usefixtures("one_thread")


SMALL = dict(
    rounds=2, prompts=8, rollouts=3, pairs=4, draws=2, drawing_steps=2, max_steps=4, threshold=0.0,
    per_device_train_batch_size=8, logging_steps=1, save_steps=2, disable_tqdm=True, use_cpu=True, warmup_steps=0,
    lr_scheduler_type="constant", learning_rate=1e-3,
)  # fmt: skip


def config(folder, **changes):
    return changes.pop("kind", PreferenceConfig)(**{**SMALL, "output_dir": str(folder), **changes})


def trained(saved, folder, **changes):
    model = load(saved, device="cpu")
    trainer = PreferenceTrainer(model, config(folder, **changes), DATA)
    trainer.fit()
    return model, trainer


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_rollouts_are_scored_by_what_the_reader_would_say(saved):
    """By hand: the mean log-likelihood per word of the prompt, given the picture as pixels."""
    model = load(saved, device="cpu")
    texts = ["a red circle", "a large blue square"]
    drawn, scores = roll_out(model, model, texts, 3, Decoding(steps=2), torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 3, model.num_image_tokens) and scores.shape == (2, 3)
    for i, text in enumerate(texts):
        for k in range(3):
            batch = {"images": model.image_tokenizer.decode(drawn[i, k : k + 1]), "ids": ["x"], "texts": [text]}
            assert scores[i, k].item() == pytest.approx(-float(model.understanding_flow(batch, []).loss), abs=1e-4)
    assert len({tuple(row.tolist()) for row in drawn.flatten(0, 1)}) == 6, "each drawing has noise of its own"


def test_rollouts_before_and_after_are_of_the_same_prompts_and_noise(saved, tmp_path):
    """An untrained model scores as it came; a trained one otherwise, whether it saw pairs or not; the reader stays as it was."""
    trainer = PreferenceTrainer(load(saved, device="cpu"), config(tmp_path / "a"), DATA)
    still = trainer.before_and_after()
    assert still["before"] == still["after"]
    stream = Stream(DATA, 100, trainer.args.seed + 2)
    texts = [item["texts"] for item in stream.__getitems__(range(16, 24))]  # two rounds of 8 stand before
    noise = torch.Generator().manual_seed(1_000_003 * trainer.args.seed + 16)
    drawn, scores = roll_out(trainer.umm.eval(), load(saved, device="cpu"), texts, 3, Decoding(steps=2), noise)
    assert still["after"] == pytest.approx(Rollouts(texts, drawn, scores).spread())
    _, trainer = trained(saved, tmp_path / "b", preference_weight=0.0, learning_rate=1e-2)
    moved = trainer.before_and_after()
    assert moved["before"] == pytest.approx(still["before"]) and moved["after"]["rollout_mean"] != moved["before"]["rollout_mean"]


@pytest.mark.parametrize("rank", [0, 2])
def test_training_moves_the_margin_and_logs_what_it_did(saved, tmp_path, rank):
    model, trainer = trained(saved, tmp_path, lora_rank=rank, max_steps=12, rounds=1, preference_weight=20.0, beta=0.5)
    log = [entry for entry in trainer.state.log_history if "preference_loss" in entry]
    assert log[0]["preference_nll"] > 1
    assert log[0]["preference_loss"] == pytest.approx(0.6931, abs=1e-3) and log[0]["chosen_shift"] == pytest.approx(0, abs=1e-4)
    assert log[-1]["preference_margin"] > 0.02 > abs(log[0]["preference_margin"])
    assert {"rollout_best", "rollout_mean", "rollout_worst", "rollout_spread", "pairs_kept"} <= set(log[0])
    assert log[0]["rollout_best"] > log[0]["rollout_mean"] > log[0]["rollout_worst"] and log[0]["pairs_kept"] == 1
    assert not any("lora" in name for name, _ in model.named_parameters())
    before = weights(load(saved, device="cpu"))
    assert not torch.equal(weights(model), before) and len(weights(model)) == len(before)


def test_each_round_draws_with_the_model_as_it_is_then(saved, tmp_path):
    _, trainer = trained(saved, tmp_path, lora_rank=0, learning_rate=0.05)
    first, second = (sorted((tmp_path / f"rollouts/{r}").glob("*.safetensors")) for r in (0, 1))
    assert len(first) == len(second) == 1 and trainer.rollouts.texts != []
    reference = load(saved, device="cpu")
    texts = trainer.rollouts.texts
    generator = torch.Generator().manual_seed(1_000_003 * trainer.args.seed + 8)
    drawn, _ = roll_out(reference, reference, texts, 3, Decoding(steps=2), generator)
    assert not torch.equal(drawn, trainer.rollouts.drawn), "the second round is drawn by the trained model"


def test_alpha_holds_the_chosen_up(saved, tmp_path):
    shifts = {}
    for alpha in (0.0, 50.0):
        changes = dict(rounds=1, max_steps=10, lora_rank=0, alpha=alpha, understanding_weight=0.0, generation_weight=0.0)
        _, trainer = trained(saved, tmp_path / str(alpha), **changes)
        shifts[alpha] = [e for e in trainer.state.log_history if "chosen_shift" in e][-1]["chosen_shift"]
    assert shifts[50.0] > shifts[0.0]


def test_without_preference_nothing_is_drawn(saved, tmp_path):
    _, trainer = trained(saved, tmp_path, preference_weight=0.0)
    assert not (tmp_path / "rollouts").exists()
    assert all("preference_loss" not in entry for entry in trainer.state.log_history)


def test_a_stopped_run_goes_on_with_the_same_pairs(saved, tmp_path, monkeypatch):
    whole, _ = trained(saved, tmp_path / "whole")
    drawn = PreferenceTrainer.collect

    def stop(self, number):
        if number == 1:
            raise KeyboardInterrupt
        return drawn(self, number)

    monkeypatch.setattr(PreferenceTrainer, "collect", stop)
    with pytest.raises(KeyboardInterrupt):
        trained(saved, tmp_path / "cut")
    monkeypatch.setattr(PreferenceTrainer, "collect", drawn)
    (tmp_path / "cut/rollouts/1").mkdir(parents=True, exist_ok=True)
    (tmp_path / "cut/rollouts/1/0.safetensors").write_bytes(b"half a file")
    model = load(saved, device="cpu")
    PreferenceTrainer(model, config(tmp_path / "cut", resume=True), DATA).fit()
    torch.testing.assert_close(weights(model), weights(whole), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("what", ["preference", "latentumm"])
def test_one_and_two_processes_agree(saved, tmp_path, what, train_command):
    """The same global batch and pairs, whole on one process or halved on two; measured: 3e-7 and 6e-7."""
    flags = dict(
        model=str(saved), rounds=2, prompts=8, rollouts=3, draws=2, drawing_steps=2, max_steps=4, threshold=0.0, lora_rank=0,
        logging_steps=1, save_steps=2, disable_tqdm=True, use_cpu=True, warmup_steps=0, lr_scheduler_type="constant",
        learning_rate=1e-3,
    )  # fmt: skip
    flags |= {"latentumm": {"target_weight": 0.0, "capacity_weight": 1.0}, "preference": {}}[what]
    kind, train_it = {"preference": (PreferenceConfig, train), "latentumm": (LatentUMMConfig, train_latentumm)}[what]
    train_it(kind(output_dir=str(tmp_path / "one"), per_device_train_batch_size=8, pairs=4, **flags))
    done = train_command(what, 2, output_dir=tmp_path / "two", per_device_train_batch_size=4, pairs=2, **flags)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "two/run.json").read_text())["processes"] == 2
    before, one, two = (weights(load(folder, device="cpu")) for folder in (saved, tmp_path / "one", tmp_path / "two"))
    assert float((one - two).abs().max()) <= 1e-5 < 1e-4 < float((one - before).abs().max())


def test_train_saves_the_model_with_its_record(saved, tmp_path):
    train(config(tmp_path, model=str(saved)))
    assert (tmp_path / "run.json").exists()
    assert torch.isfinite(weights(load(tmp_path, device="cpu"))).all()


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_no_pair_is_an_error_that_says_what_to_do(saved, tmp_path):
    with pytest.raises(ValueError, match=r"none of 8 prompts has a pair.*higher temperature"):
        trained(saved, tmp_path, threshold=1e6)


@pytest.mark.parametrize("rounds", [1, 2])
def test_what_is_not_finite_stops_and_keeps_the_batch(saved, tmp_path, rounds):
    """Weights that diverge in the third step: seen in the next step's losses, or by the reader of the next round's drawings."""

    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                broken = [model, trainer._frozen[0]][rounds - 1]
                with torch.no_grad():
                    broken.blocks[1].mlp[0].weight.fill_(float("nan"))

    model = load(saved, device="cpu")
    trainer = PreferenceTrainer(model, config(tmp_path, lora_rank=0, rounds=rounds), DATA, callbacks=[Diverge()])
    said = {1: "log-likelihoods hold NaN", 2: "scores hold NaN"}[rounds]
    with pytest.raises(ValueError, match=rf"{said}.*batch of step 2 is kept in .*--resume True"):
        trainer.fit()
    assert load_file(tmp_path / "not_finite.safetensors")["images"].shape == (8, 3, 32, 32)


class Mute(torch.utils.data.Dataset):
    """Scenes, some of which have no caption."""

    def __init__(self, caption, mute):
        self.caption, self.mute = caption, mute

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return {**DATA[i], "texts": self.caption} if i in self.mute else DATA[i]


@pytest.mark.parametrize("caption", ["", " ", None])
@pytest.mark.parametrize("kind", ["preference", "native", "latentumm", "released"])
def test_items_without_a_caption_are_refused(saved, tmp_path, caption, kind):
    model = load(saved, device="cpu")
    with pytest.raises(ValueError, match=r"items \['train-\S+'.*\] have no caption; expected words"):
        if kind in ("preference", "native"):
            changes = dict(preference_weight=0.0) if kind == "native" else {}
            PreferenceTrainer(model, config(tmp_path, **changes), Mute(caption, range(64))).fit()
        else:
            variant = {"latentumm": "corrected"}.get(kind, kind)
            few = config(tmp_path, kind=LatentUMMConfig, variant=variant, target_weight=0.0)
            LatentUMMTrainer(model, few, Mute(caption, range(64))).fit()
    assert not list(tmp_path.glob("rollouts/*/*.safetensors"))


def test_one_prompt_without_a_caption_is_refused_too(saved, tmp_path):
    trainer = PreferenceTrainer(load(saved, device="cpu"), config(tmp_path), data := Mute("", set()))
    data.mute = {Stream(data, 16, trainer.args.seed + 2).__getitems__([5])[0]["index"]}
    with pytest.raises(ValueError, match="have no caption"):
        trainer.collect(0)


@pytest.mark.parametrize("other", [dict(rollouts=2), dict(temperature=0.5), dict(seed=7), dict(model=True)])
def test_a_cache_of_another_run_is_refused(saved, tmp_path, other):
    trained(saved, tmp_path)
    model = load(saved, device="cpu")
    if other.pop("model", False):
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
    trainer = PreferenceTrainer(model, config(tmp_path, **other), DATA)
    with pytest.raises(ValueError, match=r"is of a run with another .*choose another output_dir"):
        trainer.collect(0)


def test_a_run_that_is_not_resumed_draws_anew(saved, tmp_path):
    trained(saved, tmp_path, save_strategy="no")
    first = load_file(tmp_path / "rollouts/0/0.safetensors")["drawn"]
    _, trainer = trained(saved, tmp_path, save_strategy="no", seed=5)
    assert not torch.equal(load_file(tmp_path / "rollouts/0/0.safetensors")["drawn"], first)
    assert trainer.rollouts.texts != PreferenceTrainer(load(saved), config(tmp_path / "b"), DATA).collect(0).texts


@pytest.mark.parametrize("kind", [PreferenceConfig, LatentUMMConfig])
def test_resuming_with_another_configuration_is_refused_by_name(saved, tmp_path, kind):
    made, more = (PreferenceTrainer, {}) if kind is PreferenceConfig else (LatentUMMTrainer, {"target_weight": 0.0})

    def run(data=DATA, **changes):
        few = {"kind": kind, "rounds": 1, "max_steps": 2, "save_steps": 1, **more, **changes}
        made(load(saved, device="cpu"), config(tmp_path, **few), data).fit()

    run()
    changed = dict(beta=0.5, learning_rate=0.01, threshold=0.1)
    said = r"another configuration: .*learning_rate 0.001 \(now 0.01\), .*threshold 0.0 \(now 0.1\).*beta 0.05 \(now 0.5\)"
    with pytest.raises(ValueError, match=said):
        run(resume=True, **changed)
    with pytest.raises(ValueError, match=r"examples Shapes\('train', n=4096.*now Shapes\('train', n=64"):
        run(Shapes("train", n=64), resume=True)
    run(resume=True, logging_steps=2, save_total_limit=1)  # what says nothing of the result may change
    for checkpoint in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    run(**changed)  # anew
    assert json.loads((tmp_path / "preference.json").read_text())["beta"] == 0.5


def test_a_later_round_without_a_pair_goes_on(saved, tmp_path, monkeypatch, caplog):
    drawn = PreferenceTrainer.collect

    def equal(self, number):
        found = drawn(self, number)
        return found if not number else replace(found, scores=torch.zeros_like(found.scores))

    monkeypatch.setattr(PreferenceTrainer, "collect", equal)
    _, trainer = trained(saved, tmp_path)
    log = trainer.state.log_history
    assert [entry["pairs_kept"] for entry in log if "pairs_kept" in entry] == [1.0, 0.0]
    assert "generation_loss" in log[3] and "preference_loss" not in log[3] and "native losses alone" in caplog.text


def test_each_micro_batch_has_pairs_of_its_own(saved, tmp_path, monkeypatch):
    seen, pair = [], PreferenceTrainer._pair
    monkeypatch.setattr(PreferenceTrainer, "_pair", lambda self: seen.append(pair(self)) or seen[-1])
    trained(saved, tmp_path, gradient_accumulation_steps=2, max_steps=2, rounds=1, pairs=2)
    assert [list(each["seeds"]) for each in seen] == [[42, 43], [44, 45], [46, 47], [48, 49]]


def test_equal_rollouts_are_counted_and_skipped():
    rollouts = Rollouts(["a", "b"], torch.zeros(2, 3, 4), torch.tensor([[-1.0, -1.0, -1.0], [-2.0, -1.0, -3.0]]))
    assert best_and_worst(rollouts.scores)[2].tolist() == [False, True]
    assert rollouts.spread() == pytest.approx(
        {"rollout_best": -1.0, "rollout_mean": -1.5, "rollout_worst": -2.0, "rollout_spread": 1.0}
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(rollouts=1), "at least two drawings"), (dict(prompts=1), "prompts = 1"), (dict(rounds=9), "do not fit"),
        (dict(beta=0.0), "beta"), (dict(draws=3), "even"), (dict(threshold=-1.0), "threshold"), (dict(replay_every=1), "replay"),
        (dict(understanding_weight=float("nan")), "understanding_weight = nan"),
        (dict(per_device_train_batch_size=6), "6 is not a multiple of replay_every 4"),
    ],
)  # fmt: skip
def test_bad_configurations_are_refused(tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **wrong)


def test_the_frozen_copy_stays(saved, tmp_path):
    model = load(saved, device="cpu")
    trainer = PreferenceTrainer(model, config(tmp_path, lora_rank=0), DATA)
    before = copy.deepcopy(weights(trainer._frozen[0]))
    trainer.fit()
    assert torch.equal(weights(trainer._frozen[0]), before) and not torch.equal(weights(model), before)
