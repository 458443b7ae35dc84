"""The trainers: what an example is, what an optimizer step is, and what is left when a run is killed."""

import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from umm_kit.data.shapes import ONE_FLOW, Shapes
from umm_kit.models import load
from umm_kit.models.latents import LatentTokenizer
from umm_kit.models.masked import MaskedUMM
from umm_kit.models.own import IGNORE
from umm_kit.models.tokenizers import ImageTokenizer, ImageTokenizerConfig
from umm_kit.records import write_json
from umm_kit.trainers.base import (
    EMA_FILE,
    ENDLESS,
    EMACallback,
    MuonAdamW,
    Stream,
    UMMArguments,
    check_writable,
    last_checkpoint,
    run_record,
)
from umm_kit.trainers.pretrain import Collator, PretrainConfig, PretrainTrainer, corpus, new_model, train
from umm_kit.trainers.tokenizer import TokenizerConfig, images_only
from umm_kit.trainers.tokenizer import train as train_tokenizer

TRAJECTORY = Path(__file__).parent / "trajectories" / "pretrain_tiny.json"
STEPS = 12
HALVES = dict(per_device_train_batch_size=4, per_device_eval_batch_size=4)  # of the batches below, for two processes
#: A program that is umm-kit, and kills itself at step 6 the way `kill -9` does: nothing is flushed, nothing is caught.
KILLED = """
import os, signal, sys, transformers.trainer
class Kill(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
transformers.trainer.DEFAULT_CALLBACKS.append(Kill)
from umm_kit.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A small untrained image tokenizer: the trainers do not care how good it is."""
    folder = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    ImageTokenizer(ImageTokenizerConfig(channels=16, depth=1, levels=(4, 4, 4))).save_pretrained(folder)
    return folder


pytestmark = pytest.mark.usefixtures("one_thread")


def options(folder, tokenizer, **changes):
    """Options of a run of seconds, with everything on that has a state: averages, evaluations, warm-up and decay."""
    small = dict(
        output_dir=str(folder), image_tokenizer=str(tokenizer), hidden_size=32, num_layers=2, num_heads=2, max_steps=STEPS,
        per_device_train_batch_size=8, warmup_steps=2, save_steps=4, eval_strategy="steps", eval_steps=6, eval_items=16,
        per_device_eval_batch_size=8, logging_steps=1, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    return {**small, **changes}


@pytest.fixture(scope="module")
def whole(tokenizer_folder, tmp_path_factory):
    """The uninterrupted run on one process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    train(PretrainConfig(**options(folder, tokenizer_folder)))
    return folder


def losses(folder):
    """Every loss in the log of a run, by step and name."""
    log = json.loads((Path(folder) / "run.json").read_text())["log"]
    return {(entry["step"], name): value for entry in log for name, value in entry.items() if name.endswith("loss")}


def all_weights(folder):
    """The final (averaged) weights of a run, and the raw and averaged ones in its last checkpoint."""
    last = Path(folder) / f"checkpoint-{STEPS}"
    files = {"final": Path(folder) / "model.safetensors", "raw": last / "model.safetensors", "average": last / EMA_FILE}
    return {f"{kind}.{name}": w for kind, file in files.items() for name, w in load_file(file).items()}


def assert_same_run(a, b, tolerance=0.0):
    assert losses(a).keys() == losses(b).keys() and len(losses(a)) > 3 * STEPS
    for key, value in losses(a).items():
        assert abs(value - losses(b)[key]) <= tolerance, key
    first, second = all_weights(a), all_weights(b)
    assert first.keys() == second.keys()
    for name, w in first.items():
        assert float((w - second[name]).abs().max()) <= tolerance, name


# --- the stream of examples --------------------------------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset):
    """A data set of which only the numbers matter."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"id": str(i), "value": i}


def test_each_epoch_is_a_permutation_of_its_own():
    stream = Stream(Numbers(7), 21, seed=3)
    epochs = [[stream[k]["value"] for k in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(7))
    assert [item["value"] for item in stream.__getitems__(list(range(5, 9)))] == epochs[0][5:] + epochs[1][:2]


def test_a_short_run_samples_a_long_data_set():
    """A folder sorted by class must not become a run on its first class."""
    seen = [item["value"] for item in Stream(Numbers(1000), 50, seed=0).__getitems__(range(50))]
    assert len(set(seen)) == 50 and max(seen) > 500
    assert [item["value"] for item in Stream(Numbers(ENDLESS), 50, seed=0).__getitems__(range(3))] == [0, 1, 2]


def test_draws_belong_to_the_example():
    a, b = Stream(Numbers(7), 100, seed=3, draws=5), Stream(Numbers(7), 30, seed=3, draws=5)
    for k in (20, 3, 20):  # any order, any batch, any length of the stream
        assert np.array_equal(a[k]["u"], b.__getitems__([1, k])[1]["u"]) and a[k]["index"] == b[k]["index"]
    assert a[3]["u"].shape == (5,) and not np.array_equal(a[3]["u"], a[10]["u"])  # the same item in another epoch
    assert not np.array_equal(a[3]["u"], Stream(Numbers(7), 100, seed=4, draws=5)[3]["u"])
    u = np.stack([item["u"] for item in Stream(Numbers(7), 4000, 0).__getitems__(range(4000))])
    assert abs(u.mean() - 0.5) < 0.01 and abs(np.corrcoef(u.T) - np.eye(8)).max() < 0.06
    with pytest.raises(ValueError, match="empty"):
        Stream(Numbers(0), 10, seed=0)


# --- the collator ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_model():
    from umm_kit.data.language import vocabulary_corpus

    torch.manual_seed(0)
    return MaskedUMM.tiny(list(vocabulary_corpus()))


@pytest.fixture
def collator(small_model, tmp_path):
    return lambda **k: Collator(small_model, Shapes("train", n=64), PretrainConfig.tiny(output_dir=str(tmp_path), **k))


def test_masks_by_hand(collator):
    u = np.zeros((3, 72))
    u[:, 0], u[:, 1] = [0.05, 0.5, 0.5], [0.9, 0.5, 1 - 1e-9]
    u[:, 8:] = np.arange(64)[::-1] / 64  # the last token is hidden first
    masks = collator(full_mask=0.1).masks(u)
    assert masks.sum(1).tolist() == [64, round(64 * math.cos(math.pi / 4)), 1]
    assert masks[1, -45:].all() and not masks[1, :-45].any()
    assert collator(full_mask=0.0).masks(u)[0].sum() == round(64 * math.cos(0.45 * math.pi))
    assert collator(full_mask=0.0, mask_schedule="flow").masks(u)[1].sum() == round(64 * 0.4)


@pytest.mark.parametrize("schedule, mean", [("cosine", 2 / math.pi), ("flow", 0.4)])
def test_mask_ratios_follow_their_law(collator, schedule, mean):
    """E cos(pi u / 2) = 2 / pi for uniform u; the share of full masks is what was asked for."""
    u = np.random.default_rng(0).random((4000, 72))
    ratio = collator(full_mask=0.25, mask_schedule=schedule).masks(u).float().mean(1)
    full = u[:, 0] < 0.25
    assert (ratio[full] == 1).all() and abs(full.mean() - 0.25) < 0.03
    assert float(ratio[~full].mean()) == pytest.approx(mean, abs=0.02)
    if schedule == "flow":
        assert ratio[~full].min() >= 0.2 - 1 / 64 and ratio[~full].max() <= 0.6 + 1 / 64


def test_collating_has_no_state(collator):
    """An example looks the same in any batch, whatever came before and whatever the global generators do."""
    collate, stream = collator(caption_dropout=0.5), Stream(Shapes("train", n=64), 64, seed=0, draws=72)
    together = collate(stream.__getitems__(range(16)))
    torch.manual_seed(99)
    alone = collate(stream.__getitems__([6]))
    assert torch.equal(alone["images"][0], together["images"][6]) and torch.equal(alone["mask"][0], together["mask"][6])
    pairs = [(alone["captions"], together["captions"][6])]
    keys = ("ids", "segment", "position", "labels")  # of every second image: number 6 is the fourth that is read
    pairs += [(alone["understanding"][k], together["understanding"][k][3]) for k in keys]
    for one, other in pairs:  # equal up to the padding that longer neighbours ask for
        assert torch.equal(one[0], other[: one.shape[1]])
    unconditional = (together["captions"] != collate.model._special("<pad>")).sum(1) == 3
    assert unconditional.tolist() == [item["u"][2] < 0.5 for item in stream.__getitems__(range(16))]
    assert 0 < unconditional.sum() < 16


def test_one_flow_never_sees_what_is_kept_from_it(collator):
    """Asymmetric: labels and masks of the kept scenes are gone, everything else is as without the option."""
    data = Shapes("train", n=64)
    items = Stream(data, 64, seed=0, draws=72).__getitems__(range(64))
    usual, chosen = (collator(understanding_every=1, asymmetric=a)(items) for a in (False, True))

    def shows(flow):
        return [any((o.colour, o.shape) in ONE_FLOW[flow] for o in data.objects(item["index"])) for item in items]

    read, drawn = shows("understanding"), shows("generation")
    assert 5 < sum(read) < 40 and 5 < sum(drawn) < 40
    assert chosen["shown"].tolist() == [i for i in range(64) if not drawn[i]]
    assert chosen["mask"].any(1).tolist() == [not r for r in read] and usual["mask"].any(1).all()
    assert torch.equal(chosen["mask"][~torch.tensor(read)], usual["mask"][~torch.tensor(read)])


def test_a_batch_that_is_kept_from_both_flows_teaches_nothing(collator, small_model):
    data = Shapes("train", n=64, containing=ONE_FLOW["generation"])
    collate = collator(understanding_every=1, asymmetric=True)
    batch = collate(Stream(data, 8, seed=0, draws=72).__getitems__(range(3)))
    assert (batch["understanding"]["labels"] == IGNORE).all() and batch["mask"].any()
    codes = small_model.image_tokenizer.encode(batch["images"])
    parts = [batch[k] for k in ("understanding", "captions", "mask", "shown")]
    losses = small_model(codes, *parts, tokens=torch.tensor([1.0, 9.0]))
    assert losses["understanding_loss"] == 0 and losses["generation_loss"] > 0


# --- optimizer and averages --------------------------------------------------------------------------------------------


def parameters():
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 4))], [nn.Parameter(torch.randn(5))]


def descend(optimizer, parameters, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


def test_muon_adamw_is_both_applied_apart():
    (m1, o1), (m2, o2) = parameters(), parameters()
    both = MuonAdamW(m1, o1, 1e-2, 0.1, (0.9, 0.95))
    descend(both, [*o1, *m1], 5)

    class Apart:
        parts = (
            torch.optim.AdamW(o2, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0),
            torch.optim.Muon(m2, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        )

        def step(self):
            [part.step() for part in self.parts]

        def zero_grad(self):
            [part.zero_grad() for part in self.parts]

    descend(Apart(), [*o2, *m2], 5)
    assert torch.equal(o1[0], o2[0])
    for mine, theirs, start in zip(m1, m2, parameters()[0], strict=True):  # torch's computes in bfloat16: 8 bits
        assert (mine - theirs).norm() < 0.02 * (mine - start).norm()
    assert not torch.equal(m1[0], parameters()[0][0]) and not torch.equal(o1[0], parameters()[1][0])


@pytest.mark.parametrize("muon", [True, False])
def test_weight_decay_shrinks_matrices_and_no_biases(tmp_path, muon):
    """Also without Muon, where it was once silently 0. Gradients are none: what moves, moves by decay."""
    model = MaskedUMM.tiny(["a red circle"])
    config = PretrainConfig.tiny(output_dir=str(tmp_path), muon=muon, weight_decay=0.1, learning_rate=0.5, image_tokenizer="-")
    optimizer = PretrainTrainer(model, config, Shapes("train", n=8)).create_optimizer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    weight, bias = "blocks.0.attention.qkv.weight", "norm.weight"
    torch.testing.assert_close(dict(model.named_parameters())[weight], 0.95 * before[weight])
    assert torch.equal(dict(model.named_parameters())[bias], before[bias])


def test_muon_takes_a_kernel_as_a_matrix():
    """A kernel [out, in, h, w] moves exactly as the matrix [out, in h w] with the same gradients."""
    start = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    kernel, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    for p in (kernel, matrix):
        descend(MuonAdamW([p], [nn.Parameter(torch.zeros(1))], 1e-2, 0.1, (0.9, 0.95)), [p], 3)
    assert not torch.equal(kernel, start) and torch.equal(kernel.flatten(1), matrix)


def test_schedules_reach_both_parts():
    matrices, others = parameters()
    optimizer = MuonAdamW(matrices, others, 1.0, 0.0, (0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    descend(optimizer, [*others, *matrices], 1)
    schedule.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.5, 0.5]
    optimizer.load_state_dict(optimizer.state_dict())
    schedule.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.25, 0.25]


def test_optimizer_state_round_trip(tmp_path):
    (m1, o1), (m2, o2) = parameters(), parameters()
    first = MuonAdamW(m1, o1, 1e-2, 0.1, (0.9, 0.95))
    descend(first, [*o1, *m1], 3)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = MuonAdamW(m2, o2, 1e-2, 0.1, (0.9, 0.95))
    with torch.no_grad():
        for a, b in zip([*m1, *o1], [*m2, *o2], strict=True):
            b.copy_(a)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    descend(first, [*o1, *m1], 2, seed=9)
    descend(second, [*o2, *m2], 2, seed=9)
    assert all(torch.equal(a, b) for a, b in zip([*m1, *o1], [*m2, *o2], strict=True))


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else(small_model, tmp_path):
    trainer = PretrainTrainer(small_model, PretrainConfig.tiny(output_dir=str(tmp_path)), Shapes("train", n=64))
    optimizer = trainer.create_optimizer()
    muon = {id(p) for p, _ in optimizer.views}
    names = {name for name, p in small_model.named_parameters() if id(p) in muon}
    assert names == {f"blocks.{i}.{w}.weight" for i in range(3) for w in ("attention.qkv", "attention.out", "mlp.0", "mlp.2")}
    held = muon | {id(p) for group in optimizer.parts[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in small_model.parameters() if p.requires_grad}  # the image tokenizer stays frozen


def test_ema_by_hand(tmp_path):
    class State:
        global_step = 0

    model, ema = nn.Linear(1, 1, bias=False), EMACallback(0.9)
    args = UMMArguments(output_dir=str(tmp_path))
    with torch.no_grad():
        model.weight.fill_(0.0)
        ema.on_train_begin(args, State, None, model=model)
        expected = 0.0
        for step, w in ((1, 1.0), (2, 2.0), (200, 3.0)):
            model.weight.fill_(w)
            State.global_step = step
            ema.on_step_end(args, State, None, model=model)
            decay = min(0.9, (1 + step) / (10 + step))  # 2/11, 3/12, and only then 0.9
            expected = decay * expected + (1 - decay) * w
        assert float(ema.average["weight"]) == pytest.approx(expected, rel=1e-6)
        ema.on_train_end(args, State, None, model=model)
    assert model.weight.item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="ema_decay"):
        UMMArguments(output_dir=str(tmp_path), ema_decay=1.0)


# --- whole runs --------------------------------------------------------------------------------------------------------


def test_run_record(whole):
    record = json.loads((whole / "run.json").read_text())
    assert record["command"] and record["seed"] == 42 and record["processes"] == 1 and record["device"]
    assert record["config"]["max_steps"] == STEPS and record["config"]["hidden_size"] == 32
    assert "output_dir" not in record["config"] and "generation_weight" not in record["config"]  # only what was changed
    assert set(record["versions"]) >= {"umm_kit", "torch", "transformers", "numpy", "python"}
    assert [entry["step"] for entry in record["log"] if "loss" in entry] == list(range(1, STEPS + 1))
    seconds = [entry["seconds"] for entry in record["log"]]
    assert seconds == sorted(seconds) and 0 < seconds[-1] <= record["wall_seconds"]
    parts = [entry for entry in record["log"] if "loss" in entry or "eval_generation_loss" in entry]
    sums = {entry["step"]: entry["eval_loss"] for entry in record["log"] if "eval_loss" in entry}
    for entry in parts:
        kind, total = ("", entry["loss"]) if "loss" in entry else ("eval_", sums[entry["step"]])
        assert total == pytest.approx(entry[f"{kind}understanding_loss"] + entry[f"{kind}generation_loss"], abs=1e-4)


def test_run_record_holds_lists_that_were_changed(tmp_path):
    record = run_record(TokenizerConfig(output_dir=str(tmp_path), levels=[4, 4]), 1.0)
    assert record["config"] == {"levels": [4, 4]} and record["wall_seconds"] == 1.0


def test_pinned_trajectory(whole):
    """The losses of a short run, as they were when they were last looked at; refresh: delete the file, run this test."""
    found = {f"{step} {name}": value for (step, name), value in losses(whole).items()}
    if not TRAJECTORY.exists():
        write_json(TRAJECTORY, found)
        pytest.fail(f"wrote {TRAJECTORY.name}; look at it, and commit it")
    assert found == pytest.approx(json.loads(TRAJECTORY.read_text()), abs=1e-3)


def test_an_untrained_model_starts_at_chance(whole, tokenizer_folder):
    """Logits of variance 1 cost half a nat beside the log of the number of codes, here 4 * 4 * 4, and of words."""
    first = losses(whole)[1, "generation_loss"]
    assert first == pytest.approx(math.log(64) + 0.5, abs=0.6)
    words = load(whole).config.text_vocab_size
    assert losses(whole)[1, "understanding_loss"] == pytest.approx(math.log(words) + 0.5, abs=0.6)


def test_the_loss_falls_on_a_fixed_batch(tokenizer_folder, tmp_path):
    """Learning smoke test: 8 scenes seen 60 times over are nearly known by heart in words, and better drawn."""
    config = PretrainConfig(**options(tmp_path, tokenizer_folder, max_steps=60, save_strategy="no", eval_strategy="no"))
    torch.manual_seed(0)
    data = Shapes("train", n=8)
    model = new_model(config, data)
    trainer = PretrainTrainer(model, config, data)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    mean = lambda name, part: np.mean([entry[name] for entry in part])  # noqa: E731
    assert mean("understanding_loss", log[-5:]) < 0.25 * mean("understanding_loss", log[:5])
    assert mean("generation_loss", log[-5:]) < 0.9 * mean("generation_loss", log[:5])


def test_weights_of_the_two_losses(small_model, tmp_path):
    """The gradient with weights (2, 0) is twice that with (1, 0), and the generation head gets none of it."""
    gradients = []
    for weight in (1.0, 2.0):
        config = PretrainConfig.tiny(output_dir=str(tmp_path), understanding_weight=weight, generation_weight=0.0)
        trainer = PretrainTrainer(small_model.train(), config, Shapes("train", n=64))
        inputs = next(iter(trainer.get_train_dataloader()))
        small_model.zero_grad()
        trainer.compute_loss(small_model, inputs).backward()
        gradients.append(small_model.text_head.weight.grad.clone())
        assert small_model.image_head.of_code.weight.grad is None
    small_model.zero_grad()
    small_model.eval()
    assert torch.allclose(2 * gradients[0], gradients[1], rtol=1e-5) and gradients[0].abs().max() > 0


def test_fine_tuning_goes_on_from_a_model(whole, tmp_path):
    """Zero learning rate: the model that comes out is the one that went in, so it did start from there."""
    config = PretrainConfig(
        **options(tmp_path, "unused", model=str(whole), max_steps=2, learning_rate=0.0, weight_decay=0.0, eval_strategy="no")
    )
    train(config)
    a, b = load_file(whole / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resuming_a_finished_run_changes_nothing(whole, tokenizer_folder, tmp_path):
    import shutil

    shutil.copytree(whole, tmp_path / "again")
    train(PretrainConfig(**options(tmp_path / "again", tokenizer_folder, resume=True)))
    assert_same_run(whole, tmp_path / "again")


class At(TrainerCallback):
    """Do something in the middle of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            self.action()


def interrupted(monkeypatch, step, action):
    import transformers.trainer

    callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, At(step, action)]
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", callbacks)


def test_an_interrupt_saves_a_checkpoint_and_resumes_to_the_same_run(whole, tokenizer_folder, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupted(patch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))  # a real Ctrl-C within step 5
        with pytest.raises(KeyboardInterrupt):
            train(PretrainConfig(**options(tmp_path, tokenizer_folder)))
    assert signal.getsignal(signal.SIGINT) is handler
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-5" and (tmp_path / "checkpoint-5" / EMA_FILE).exists()
    assert not (tmp_path / "run.json").exists()
    train(PretrainConfig(**options(tmp_path, tokenizer_folder, resume=True)))
    assert_same_run(whole, tmp_path)


def test_a_second_interrupt_does_not_wait(tokenizer_folder, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    interrupted(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        train(PretrainConfig(**options(tmp_path, tokenizer_folder)))
    assert last_checkpoint(tmp_path) is None


def test_half_written_checkpoints_are_passed_over(tmp_path):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nowhere") is None
    for step, content in ((4, '{"global_step": 4}'), (8, '{"global_step": 8}'), (12, '{"global_st'), (16, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")


@pytest.mark.slow
def test_resume_after_kill_9(whole, tokenizer_folder, tmp_path, train_command):
    """One process, killed at step 6 after its checkpoint of step 4: the resumed run is the uninterrupted one, bit for bit."""
    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    folder = tmp_path / "run"
    chosen = options(folder, tokenizer_folder)
    died = train_command("masked", 1, program, **chosen)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    assert Path(last_checkpoint(folder)).name == "checkpoint-4" and not (folder / "model.safetensors").exists()
    train(PretrainConfig(**{**chosen, "resume": True}))
    assert_same_run(whole, folder)
    record = json.loads((folder / "run.json").read_text())
    before = next(e["seconds"] for e in record["log"] if e["step"] == 4 and "loss" in e)
    assert record["wall_seconds"] > before  # the time of the killed run counts


@pytest.mark.slow
@pytest.mark.distributed
def test_one_and_two_processes_agree(tokenizer_folder, tmp_path, train_command):
    """The same global batch, whole on one process or halved on two, is the same run to 1e-5 (measured: 1e-6)."""
    train(PretrainConfig(**options(tmp_path / "one", tokenizer_folder)))
    done = train_command("masked", 2, **options(tmp_path / "two", tokenizer_folder, **HALVES))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2  # as torch.distributed counted them
    assert_same_run(tmp_path / "one", tmp_path / "two", tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_processes_resume_after_kill_9(whole, tokenizer_folder, tmp_path, train_command):
    """Both processes killed at step 6: the resumed run is the uninterrupted one on two processes, bit for bit."""
    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    done = train_command("masked", 2, **options(tmp_path / "two", tokenizer_folder, **HALVES))
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = losses(whole), losses(tmp_path / "two")
    assert one.keys() == two.keys() and max(abs(one[k] - two[k]) for k in one) < 1e-4

    chosen = options(tmp_path / "killed", tokenizer_folder, **HALVES)
    died = train_command("masked", 2, program, **chosen)
    assert died.returncode != 0 and "SIGKILL" in died.stderr
    assert Path(last_checkpoint(tmp_path / "killed")).name == "checkpoint-4"
    resumed = train_command("masked", 2, **chosen, resume=True)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    for folder in ("two", "killed"):
        assert json.loads((tmp_path / folder / "run.json").read_text())["processes"] == 2
    assert_same_run(tmp_path / "two", tmp_path / "killed")


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_unwritable_folder_is_refused_before_training(tokenizer_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be written to"):
            train(PretrainConfig(**options(folder, tokenizer_folder)))
    check_writable(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())  # the probe leaves nothing behind


@pytest.mark.parametrize("step", [4, 8])
def test_a_full_disk_says_so_and_how_to_go_on(whole, tokenizer_folder, tmp_path, monkeypatch, step):
    """The system refuses files above 100 kB, which is how a full disk looks to a program: at the first checkpoint or the second,
    where the first one stays as it was and is the one that is resumed."""
    import transformers.trainer

    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before, begun = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), list[int]()
    kept = lambda: {f.name: f.read_bytes() for f in (tmp_path / "checkpoint-4").glob("*") if step > 4}  # noqa: E731
    earlier = dict[str, bytes]()

    class Fill(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            begun.append(state.global_step)

        def on_step_end(self, args, state, control, **_):
            if state.global_step == step - 1 and len(begun) == 1:
                earlier.update(kept())
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, Fill()])
    try:
        with pytest.raises(OSError, match=rf"checkpoint-{step} could not be written .*--resume True"):
            train(PretrainConfig(**options(tmp_path, tokenizer_folder)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    last = last_checkpoint(tmp_path)  # what was half written is not taken for a checkpoint
    assert last == (None if step == 4 else str(tmp_path / "checkpoint-4"))
    assert kept() == earlier and (step == 4 or {"model.safetensors", EMA_FILE, "trainer_state.json"} < set(earlier))
    train(PretrainConfig(**options(tmp_path, tokenizer_folder, resume=True)))
    assert begun == [0, step - 4]
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"mask_schedule": "linear"}, "mask_schedule"),
        ({"full_mask": 1.5}, "full_mask"),
        ({"caption_dropout": -0.1}, "caption_dropout"),
        ({"understanding_weight": 0.0, "generation_weight": 0.0}, "nor both zero"),
        ({"generation_weight": -1.0}, "negative"),
        ({"understanding_every": 3}, "not a multiple of understanding_every 3"),
        ({"data": "digits", "asymmetric": True}, "texture and asymmetric are of the scenes"),
        ({"data": "digits", "texture": "high"}, "texture and asymmetric are of the scenes"),
    ],
)
def test_bad_configurations_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig.tiny(output_dir=str(tmp_path), **wrong)


def test_a_missing_tokenizer_is_named_with_the_way_to_make_it(tmp_path):
    with pytest.raises(ValueError, match="umm-kit train tokenizer"):
        train(PretrainConfig.tiny(output_dir=str(tmp_path), image_tokenizer=str(tmp_path / "none")))


def test_one_command_trains_the_image_tokenizer_too(tmp_path, monkeypatch):
    """Without a named tokenizer one is trained first; a second start takes it up as it is."""
    from umm_kit.trainers import pretrain

    few = dict(max_steps=2, channels=16, depth=1, levels=[4, 4], per_device_train_batch_size=4, bf16=False, disable_tqdm=True)
    monkeypatch.setattr(pretrain, "TokenizerConfig", partial(pretrain.TokenizerConfig, **few))
    first = train(PretrainConfig.tiny(output_dir=str(tmp_path), disable_tqdm=True))
    assert first.codebook_size == 16
    made = json.loads((tmp_path / "run.json").read_text())["image_tokenizer"]
    assert made["config"]["levels"] == [4, 4] and "psnr_db" in made["scores"]
    stamp = (tmp_path / "image_tokenizer/model.safetensors").stat().st_mtime_ns
    again = train(PretrainConfig.tiny(output_dir=str(tmp_path), resume=True, max_steps=9, disable_tqdm=True))
    assert (tmp_path / "image_tokenizer/model.safetensors").stat().st_mtime_ns == stamp
    assert torch.equal(again.image_tokenizer.encoder[1].weight, first.image_tokenizer.encoder[1].weight)


def test_every_second_image_is_read_whatever_the_batch(small_model):
    """Which images go through understanding is a matter of their number in the stream, not of their batch."""
    data, config = Shapes("train", n=64), PretrainConfig.tiny(understanding_every=2)
    stream, collate_ = Stream(data, 32, 0, 8 + 64), Collator(small_model, data, config)
    whole = collate_(stream.__getitems__(range(8)))
    assert whole["shown"].tolist() == [0, 2, 4, 6] and len(whole["understanding"]["ids"]) == 4
    halves = [collate_(stream.__getitems__(range(k, k + 4))) for k in (0, 4)]
    assert [h["shown"].tolist() for h in halves] == [[0, 2], [0, 2]]
    codes = small_model.image_tokenizer.encode(whole["images"])
    losses = small_model(codes, whole["understanding"], whole["captions"], whole["mask"], whole["shown"])
    alone = small_model(codes[::2], whole["understanding"], whole["captions"][::2], whole["mask"][::2])
    assert torch.allclose(losses["understanding_loss"], alone["understanding_loss"])


def test_corpus_holds_every_word_of_a_data_set(small_model):
    from umm_kit.data.digits import Digits

    words = " ".join(corpus(Digits("train", n=20))).split()
    assert "describe" in words and len(set(words)) > 10


# --- the image tokenizer -----------------------------------------------------------------------------------------------


def test_tokenizer_training(tmp_path):
    config = TokenizerConfig(
        output_dir=str(tmp_path), channels=16, depth=1, levels=[4, 4, 4], max_steps=30, per_device_train_batch_size=8,
        warmup_steps=2, logging_steps=1, save_steps=20, bf16=False, ema_decay=0.5, disable_tqdm=True, data="digits",
    )  # fmt: skip
    trained = train_tokenizer(config)
    record = json.loads((tmp_path / "run.json").read_text())
    log = [entry["loss"] for entry in record["log"] if "loss" in entry]
    assert np.mean(log[-5:]) < 0.5 * np.mean(log[:3])
    again = ImageTokenizer.from_pretrained(tmp_path)
    images = images_only([Shapes("test", n=2)[i] for i in range(2)])["images"]
    assert torch.equal(again.encode(images), trained.encode(images)) and again.levels == (4, 4, 4)
    scores = record["scores"]
    assert scores["codes"] == 64 and 1 <= scores["perplexity"] <= scores["codes_used"] <= 64 and scores["n"] == 256


@pytest.mark.slow
@pytest.mark.distributed
def test_a_latent_tokenizer_on_two_processes_is_that_of_one(tmp_path, train_command):
    """The noise on latents belongs to the examples, and its size to the batch of all processes."""
    chosen = dict(
        latent=True, channels=16, depth=2, max_steps=4, warmup_steps=1, logging_steps=1, save_steps=10, bf16=False, ema_decay=0.5,
        disable_tqdm=True, data="digits", use_cpu=True,
    )  # fmt: skip
    train_tokenizer(TokenizerConfig(output_dir=str(tmp_path / "one"), per_device_train_batch_size=16, **chosen))
    done = train_command("tokenizer", 2, output_dir=tmp_path / "two", per_device_train_batch_size=8, **chosen)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (LatentTokenizer.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert max(float((p - q).abs().max()) for p, q in zip(one.parameters(), two.parameters(), strict=True)) < 1e-5
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5) and len(losses(tmp_path / "one")) == 4


@pytest.mark.parametrize(("faster", "said"), [(False, 1), (True, 0)])
def test_slow_bf16_is_said(small_model, tmp_path, monkeypatch, caplog, faster, said):
    monkeypatch.setattr("umm_kit.trainers.base.bf16_is_faster", lambda device: faster)
    PretrainTrainer(small_model, PretrainConfig.tiny(output_dir=str(tmp_path), bf16=True), Shapes("train", n=64))
    assert sum("--bf16 False" in message for message in caplog.messages) == said
