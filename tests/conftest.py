"""What every test starts from: no network, no display, the same draws, and the shipped model loaded once."""

import os

# Before torch, transformers or matplotlib are imported: nothing may reach for a network or a display.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # two processes on two cores: more threads would only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
for name in ("UMM_KIT_STRICT", "UMM_KIT_CLAIMS"):
    os.environ.pop(name, None)

from pathlib import Path

import pytest
from hypothesis import settings

# A property is a matter of truth, not of how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(autouse=True)
def same_draws():
    """Global generators start alike in every test, so that no test depends on which ran before."""
    import random

    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shipped():
    """The shipped model; read-only: a test that trains takes a copy."""
    import umm_kit as uk

    return uk.load("tiny-masked").eval()


@pytest.fixture
def one_thread():
    """Losses that are compared with those of another run are summed in one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """An untrained model of four layers in a folder."""
    import torch

    from umm_kit.data.language import vocabulary_corpus
    from umm_kit.models.masked import MaskedUMM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    MaskedUMM.tiny(list(vocabulary_corpus()), num_layers=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def train_command():
    """``umm-kit train`` as a user starts it, under torchrun if ``processes`` > 1; ``program`` is a script in place of umm-kit."""
    import subprocess
    import sys

    def run(what, processes, program=None, **options):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        flags = [f"--{name}={value[0] if isinstance(value, list) else value}" for name, value in options.items()]
        target = ["-m", "umm_kit.cli"] if program is None else [str(program)]
        command = [sys.executable, *launcher, *target, "train", what, *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return run
