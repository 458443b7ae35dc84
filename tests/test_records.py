"""Records: whole files, and what they say about where a number came from."""

import json
import sys

import pytest

from umm_kit.records import command, machine, versions, write_json


def test_a_file_is_whole_or_as_it_was(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "a.json", {(1, 2): "no such key in JSON"})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"x": 1}


def test_the_command_is_ours_or_none(monkeypatch):
    assert command(["diagnose", "my model"]) == "umm-kit diagnose 'my model'"
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/umm-kit", "info"])
    assert command() == "umm-kit info"
    monkeypatch.setattr(sys, "argv", ["/home/umm-kit/pytest", "-x"])
    assert command() is None


def test_versions_and_machine_are_of_this_process():
    import torch

    assert versions()["torch"] == torch.__version__
    assert versions()["python"] == ".".join(map(str, sys.version_info[:3]))
    if not torch.cuda.is_available():
        assert machine().endswith(f"{torch.get_num_threads()} threads")
