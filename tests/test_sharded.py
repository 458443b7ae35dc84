"""Training in pieces (FSDP2), by two processes on CPUs: ``sharded.py`` makes accelerate do there what it does on GPUs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from umm_kit.models import load
from umm_kit.trainers.base import EMACallback
from umm_kit.trainers.diva import DIVAConfig
from umm_kit.trainers.diva import train as train_diva
from umm_kit.trainers.pretrain import PretrainConfig
from umm_kit.trainers.pretrain import train as train_masked

SHARDED = Path(__file__).parent / "sharded.py"
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.usefixtures("one_thread")]


def options(saved, folder, **changes):
    """Of fine-tuning for seconds, with averages, an evaluation at the very end and clipping."""
    small = dict(
        model=str(saved), output_dir=str(folder), max_steps=6, per_device_train_batch_size=8, per_device_eval_batch_size=8,
        warmup_steps=1, save_steps=3, eval_strategy="steps", eval_steps=3, eval_items=16, logging_steps=1, bf16=False,
        disable_tqdm=True, muon=False, learning_rate=1e-3,
    )  # fmt: skip
    return {**small, **changes}


def diva_options(saved, folder, **changes):
    small = dict(
        model=str(saved), output_dir=str(folder), stage1_steps=4, max_steps=6, per_device_train_batch_size=16, logging_steps=1,
        save_steps=2, disable_tqdm=True, warmup_steps=1, stage1_warmup_steps=1, use_cpu=True, rank=8, factor_size=32,
        stage1_learning_rate=1e-3, learning_rate=3e-4, queue=24, layers=[2], seed=1,
        train_all_layers=True,  # also those that stay gathered after a forward pass
    )  # fmt: skip
    return {**small, **changes}


def check(done, parts):
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"sharded: {parts} parts, 0.5" in done.stdout, done.stdout  # and the image tokenizer, which stays whole


def log(folder):
    """Every number in the log of a run but times, by step and name."""
    entries = json.loads((Path(folder) / "run.json").read_text())["log"]
    times = ("seconds", "runtime", "per_second")
    return {(e["step"], k): v for e in entries for k, v in e.items() if not any(word in k for word in times)}


def assert_same_run(a, b, tolerance=0.0, names=""):
    """Logged numbers whose name holds ``names``, and all weights that both left: final ones, averages, encoders, adapters."""
    first, second = log(a), log(b)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert names not in key[1] or abs(value - second[key]) <= tolerance * max(1, abs(value)), (key, value, second[key])
    files = sorted(p.relative_to(a) for p in Path(a).rglob("*.safetensors"))
    assert len(files) >= 2
    for file in (f for f in files if "checkpoint" not in str(f) or f.name == "ema.safetensors"):
        one, two = load_file(a / file), load_file(b / file)
        assert one.keys() == two.keys()
        for name, w in one.items():
            assert float((w - two[name]).abs().max()) <= tolerance, (file, name)


@pytest.fixture(scope="module")
def masked(saved, tmp_path_factory, train_command):
    folder = tmp_path_factory.mktemp("masked")
    half = dict(per_device_train_batch_size=4, per_device_eval_batch_size=4, fsdp=True)
    check(train_command("masked", 2, SHARDED, **options(saved, folder, **half)), 8)
    return folder


@pytest.fixture(scope="module")
def diva(saved, tmp_path_factory, train_command):
    folder = tmp_path_factory.mktemp("diva")
    check(train_command("diva", 2, SHARDED, **diva_options(saved, folder, per_device_train_batch_size=8, fsdp=True)), 5)
    return folder


def test_two_sharded_processes_are_one(saved, masked, tmp_path):
    """The same global batch; the folder they leave is whole, and holds nothing else than that of one process."""
    train_masked(PretrainConfig(**options(saved, tmp_path)))
    assert_same_run(tmp_path, masked, 1e-5)
    assert {p.name for p in tmp_path.glob("*")} == {p.name for p in masked.glob("*")}
    assert load(masked).num_parameters() == load(tmp_path).num_parameters()


def test_a_sharded_run_resumes_to_the_same_run(saved, masked, tmp_path, train_command):
    shutil.copytree(masked / "checkpoint-3", tmp_path / "checkpoint-3")
    half = dict(per_device_train_batch_size=4, per_device_eval_batch_size=4, fsdp=True, resume=True)
    check(train_command("masked", 2, SHARDED, **options(saved, tmp_path, **half)), 8)
    assert_same_run(masked, tmp_path)


def test_sharded_diva_is_that_of_one_process(saved, diva, tmp_path):
    """Both stages, targets by averages, negatives of both processes, and a queue."""
    train_diva(DIVAConfig(**diva_options(saved, tmp_path)))
    one, two = log(tmp_path), log(diva)
    assert one.keys() == two.keys()  # gradient shares are means over processes
    for key in (k for k in one if k[1].endswith("loss")):
        assert abs(one[key] - two[key]) < 1e-5, key
    for name in ("model.safetensors", "checkpoint-6/ema.safetensors"):
        first, second = load_file(tmp_path / name), load_file(diva / name)
        assert first.keys() == second.keys()
        assert max(float((w - second[k]).abs().max()) for k, w in first.items()) < 1e-5


@pytest.mark.parametrize("stage", [1, 2])
def test_sharded_diva_resumes_in_either_stage(saved, diva, tmp_path, train_command, stage):
    """In stage 1 while unique encoders wait for their first step; in stage 2 with a queue in each process."""
    folder = tmp_path / "run"
    gone = ["checkpoint-6", *(["checkpoint-4", "encoders"] if stage == 1 else [])]
    shutil.copytree(diva, folder, ignore=shutil.ignore_patterns(*gone))
    done = train_command("diva", 2, SHARDED, **diva_options(saved, folder, per_device_train_batch_size=8, fsdp=True, resume=True))
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(diva, folder)


def test_sharded_adapters_are_those_of_plain_data_parallelism(saved, tmp_path, train_command):
    """With all that is logged: shares and scales of gradients are by the weights as they are gathered."""
    few = dict(per_device_train_batch_size=8, stage1_steps=2, max_steps=3, lora_rank=2, equalise_gradients=True)
    for name, program, more in (("plain", None, {}), ("sharded", SHARDED, {"fsdp": True})):
        done = train_command("diva", 2, program, **diva_options(saved, tmp_path / name, **few, **more))
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "sharded/adapter/adapter_model.safetensors").exists()
    assert min(v for k, v in log(tmp_path / "sharded").items() if k[1] == "understanding_gradient_share") > 0.1
    assert_same_run(tmp_path / "plain", tmp_path / "sharded", 1e-5)


def test_what_cannot_be_sharded_is_refused(saved, tmp_path, train_command):
    """On CPUs accelerate would share nothing out and say nothing; some trainers need whole weights between steps."""
    done = train_command("preference", 2, model=str(saved), output_dir=tmp_path, fsdp=True, muon=True, use_cpu=True)
    assert done.returncode == 1
    assert done.stderr.count("umm-kit train: --fsdp True came, but PreferenceTrainer uses its model between steps") == 2
    assert "set --muon False; accelerate did not set up FSDP2" in done.stderr
    with pytest.raises(ValueError, match="--fsdp came without --image_tokenizer"):
        PretrainConfig(output_dir=str(tmp_path), fsdp=True)


def test_averages_are_swapped_in_and_out():
    """Also where autocast has kept 16-bit copies of the weights; afterwards the gradient is that of the own weights."""
    model, ema = nn.Linear(2, 1, bias=False), EMACallback(0.9)
    own, x = model.weight.detach().clone(), torch.ones(1, 2)
    ema.average = {"weight": torch.full((1, 2), 3.0)}
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        ema.swap(model, "other")
        with torch.no_grad():
            assert torch.equal(model(x), before)
            ema.swap(model, "weight")
            assert float(model(x)) == 6
        ema.swap(model, "weight")
        after = model(x)
    assert torch.equal(after, before) and torch.equal(model.weight, own) and torch.equal(ema.average["weight"], 3 + 0 * own)
    after.sum().backward()
    assert torch.equal(model.weight.grad, x)
