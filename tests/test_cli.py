"""The command line, its configuration files, claims, and running notebooks."""

import json
import math
import shlex
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from umm_kit import cli, reproduce
from umm_kit.reproduce import claims_table, expect, read_claims, tidy

COMMANDS = ("train", "diagnose", "extract", "evaluate", "drift", "audit", "check", "info", "reproduce", "notebooks", "figures")


# --- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and f"umm-kit {command}" in capsys.readouterr().out


def test_help_needs_no_torch():
    run = "try: cli.main(['evaluate', '--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    code = "import sys, umm_kit.cli as cli\n" + run
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"


def test_the_installed_command_and_the_module_are_one():
    out = subprocess.run([sys.executable, "-m", "umm_kit.cli", "--version"], capture_output=True, text=True, check=True).stdout
    import umm_kit

    assert out.strip() == f"umm-kit {umm_kit.__version__}"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "required: COMMAND"),
        (["evaluate"], "required: MODEL"),
        (["evaluate", "m", "--bogus", "1"], "--bogus"),
        (["evaluate", "m", "--n", "many"], "invalid int value"),
        (["train", "nothing"], "invalid choice: 'nothing'"),
        (["reproduce", "mona-lisa"], "invalid choice: 'mona-lisa'"),
    ],
)
def test_wrong_usage_exits_2(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("what", ["notebooks", "atlas", "diva"])
def test_an_unknown_preset_is_refused_with_those_there_are(what, capsys):
    assert cli.main(["reproduce", what, "--preset", "huge"]) == 2
    said = capsys.readouterr().err
    assert "preset is 'huge'" in said and "tiny" in said


@pytest.mark.parametrize("part", ["3/2", "0/2", "half", "1/2/3"])
def test_a_part_of_an_experiment_is_k_of_m(part, capsys):
    assert cli.main(["reproduce", "atlas", "--preset", "tiny", "--part", part]) == 2
    assert f"--part is {part!r}; expected K/M" in capsys.readouterr().err


def test_experiments_take_other_seeds_and_arms(monkeypatch, tmp_path, capsys):
    from umm_kit.experiments import diva, planted

    seen = []
    for module in (planted, diva):
        monkeypatch.setattr(module, "run", lambda preset, *rest: seen.append(preset))
    assert cli.main(["reproduce", "planted", "--preset", "tiny", "--seeds", "7", "8"]) == 0
    assert cli.main(["reproduce", "diva", "--arms", "sft_all", "diva", "--seeds", "5", "6"]) == 0
    assert seen[0].seeds == (7, 8) and seen[0].steps == planted.PRESETS["tiny"].steps
    assert (seen[1].seeds, seen[1].few_seeds, seen[1].arms) == ((5, 6), (5,), ("sft_all", "diva"))
    assert diva.PRESETS["tiny"].seeds == (0, 1, 2, 3), "the preset itself is as it was"
    for what, option in (("diva-tuning", "seeds"), ("frontier", "seeds"), ("atlas", "arms")):
        assert cli.main(["reproduce", what, f"--{option}", "7"]) == 2
        assert f"--{option} does not apply to {what}" in capsys.readouterr().err
    assert cli.main(["reproduce", "diva", "--seeds", "100"]) == 2 and "learning rates were chosen" in capsys.readouterr().err
    assert cli.main(["reproduce", "--seeds", "5"]) == 2 and "name one, such as diva" in capsys.readouterr().err
    file = str(tmp_path / "f.jsonl")
    assert cli.main(["reproduce", "families", "--seeds", "3", "--records", file, "--runs", str(tmp_path)]) == 2
    assert "no masked model of this recipe is shipped for seed [3]" in capsys.readouterr().err


def test_a_users_mistake_is_one_line_and_a_traceback_on_demand(tmp_path, capsys):
    argv = ["reproduce", "--notebooks", str(tmp_path)]
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("umm-kit reproduce: no notebooks in") and captured.err.count("\n") == 1
    with pytest.raises(ValueError, match="no notebooks in"):
        cli.main([*argv, "--traceback"])


def test_info_tells_versions_and_the_shipped_models(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    shipped = [p.parent.name for p in (Path(cli.__file__).parent / "checkpoints").glob("*/config.json")]
    assert f"torch {torch.__version__}" in out and f"shipped models ({len(shipped)})" in out
    assert all(name in out for name in shipped)


class _Model:
    image_size, device = 32, torch.device("cpu")


@pytest.fixture
def fake(monkeypatch):
    """A model and an evaluation that cost nothing, with the real result class; returns the calls of the evaluation."""
    import umm_kit
    from umm_kit.evaluation import Evaluation

    calls = []

    def evaluate(model, data, seed, n_prompts, decoding):
        calls.append((data, seed, n_prompts, decoding.guidance, decoding.temperature))
        items = {"caption_f1": {f"id-{i}": float(i > 0) for i in range(4)}}
        record = {"model": "?", "data": repr(data), "seconds": 1.0, "device": "cpu"}
        return Evaluation(items, {}, {"caption_f1": 0.25}, ["a note"], record)

    monkeypatch.setitem(vars(umm_kit), "load", lambda name, device, dtype: _Model())
    monkeypatch.setitem(vars(umm_kit), "evaluate", evaluate)
    return calls


def test_evaluate_passes_its_options_on_and_writes_a_record(fake, tmp_path, capsys):
    output = tmp_path / "new" / "scores.json"
    argv = ["evaluate", "m", "--n", "3", "--seed", "7", "--split", "validation", "--prompts", "5", "--output", str(output)]
    argv += ["--guidance", "2", "--temperature", "0.7"]
    assert cli.main(argv) == 0
    ((data, seed, n_prompts, *decoding),) = fake
    assert (data.split, data.n, data.seed, data.image_size, seed, n_prompts) == ("validation", 3, 7, 32, 7, 5)
    assert decoding == [2.0, 0.7]
    out = capsys.readouterr().out
    assert "m on Shapes('validation', n=3" in out and "caption_f1  0.750  [" in out and "a note" in out
    content = json.loads(output.read_text())
    assert content["record"]["command"] == shlex.join(["umm-kit", *argv]) and content["record"]["model"] == "m"
    assert cli._headline(output) == f"caption_f1 0.750 (n=4) on {data!r}"
    assert cli._headline(tmp_path / "none.json") == "no scores recorded"


def test_drift_prints_a_table_writes_rows_and_draws(monkeypatch, tmp_path, capsys):
    """A model that reads by the oracle and draws by the renderer keeps everything."""
    import umm_kit
    from umm_kit.evaluation.blame import PerfectReader, PerfectWriter

    class Perfect(PerfectReader, PerfectWriter):
        device = torch.device("cpu")

        def __init__(self, data):
            PerfectReader.__init__(self, data)
            PerfectWriter.__init__(self, data)

    monkeypatch.setitem(vars(umm_kit), "load", lambda name, device, dtype: Perfect(umm_kit.Shapes("test", n=24)))
    output, figure = tmp_path / "new" / "drift.json", tmp_path / "new" / "drift.png"
    argv = ["drift", "m", "--n", "24", "--cycles", "2", "--start", "image", "--output", str(output), "--figure", str(figure)]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "survival" in out and "half-life" in out and f"written to {output}" in out and f"drawn to {figure}" in out
    content = json.loads(output.read_text())
    assert content["record"]["command"] == shlex.join(["umm-kit", *argv]) and content["record"]["model"] == "m"
    kept = {(row["cycle"], row["metric"]): row["value"] for row in content["rows"]}
    assert kept[2, "recall"] == pytest.approx(1) == kept[2, "survival of shape"] and kept[2, "lost"] == 0
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert cli.main([*argv[:6], "--teacher", str(tmp_path / "none")]) == 2 and "none" in capsys.readouterr().err

    assert cli.main([*argv[:4], "--unified-bench", "tiny-teacher", "--output", str(output)]) == 0
    assert "ceiling" in capsys.readouterr().out
    rows = {row["metric"]: row["value"] for row in json.loads(output.read_text())["rows"]}
    assert rows["floor"] < 0.9 < rows["similarity"] <= rows["ceiling"] == pytest.approx(1)


@pytest.mark.parametrize("options", ["--n 0", "--split tset", "--data no-such-folder", "--data . --n 2"])
def test_evaluate_refuses(fake, options, capsys):
    assert cli.main(["evaluate", "m", *options.split()]) == 2
    assert "expected" in (err := capsys.readouterr().err) or "leave it out" in err
    assert not fake


def test_config_file_gives_options_and_flags_win(fake, tmp_path):
    file = tmp_path / "evaluate.yaml"
    file.write_text("model: m\nn: 4\nseed: 5\nsplit: validation\n")
    assert cli.main(["evaluate", "--config", str(file), "--seed", "6"]) == 0
    ((data, seed, *_),) = fake
    assert (data.n, data.split, seed) == (4, "validation", 6)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sede: 1", "did you mean 'seed'"),
        ("- 1", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("traceback: maybe", "expected true or false"),
        ("config: x", "no option"),
    ],
)
def test_config_file_refusals(text, says, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    assert cli.main(["evaluate", "m", "--config", str(tmp_path / "c.yaml")]) == 2
    assert says in capsys.readouterr().err


def test_missing_config_file(capsys):
    assert cli.main(["info", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


# --- train -------------------------------------------------------------------------------------------------------------


@dataclass
class _Config:
    output_dir: str = "runs"
    learning_rate: float = 1e-3
    resume: bool = False
    shuffle: bool = True
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected a positive number")


@pytest.fixture
def trained(monkeypatch):
    """A trainer that only remembers its config."""
    seen = []
    module = types.ModuleType("fake_trainer")
    module.Config, module.train = _Config, seen.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_trainer", module)
    monkeypatch.setitem(cli.TRAINERS, "masked", ("fake_trainer", "Config", "train"))
    return seen


def test_train_reads_flags(trained):
    flags = "--output-dir masked --learning_rate=2e-3 --resume --betas 0.1 0.2"
    assert cli.main(["train", "masked", *flags.split()]) == 0
    assert trained == [_Config("masked", 2e-3, True, True, [0.1, 0.2])]


def test_train_reads_a_file_and_flags_win(trained, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("learning_rate: 5e-4\nshuffle: false\nbetas: [0.5, -0.5]\noutput_dir: a\n")
    assert cli.main(["train", "masked", "--config", str(file), "--output_dir", "b"]) == 0
    assert trained == [_Config("b", 5e-4, False, False, [0.5, -0.5])]


@pytest.mark.parametrize("options", [["--learning_rate", "-1"], ["--bogus", "1"]])
def test_train_refuses(trained, options, capsys):
    assert cli.main(["train", "masked", *options]) == 2
    assert capsys.readouterr().err.startswith("umm-kit train: ") and not trained


# --- claims ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "how", "holds"),
    [
        (0.5, {"target": 0.6, "tol": 0.11}, True),
        (0.5, {"target": 0.6, "tol": 0.09}, False),
        (0.5, {"low": 0.5}, True),
        (0.5, {"high": 0.4}, False),
        (0.5, {"low": 0.4, "high": 0.6}, True),
        (0.7, {"low": 0.4, "high": 0.6}, False),
        (math.nan, {"low": -math.inf}, False),
        (math.nan, {"target": 0.0, "tol": math.inf}, False),
        (12, {"target": 12}, True),
        (12, {"target": 11}, False),
        ("seven", {"target": "seven"}, True),
        (True, {"target": False}, False),
        (torch.tensor(0.5), {"low": 0.5}, True),
        (np.float32(0.25), {"target": 0.25, "tol": 0.0}, True),
        (types.SimpleNamespace(value=0.5, interval=(0.4, 0.6)), {"high": 0.5}, True),
    ],
)
def test_expect_by_hand(value, how, holds, capsys):
    assert expect(value, **how, claim="c") is None, "a notebook shows what a cell ends in: the tick is enough"
    assert capsys.readouterr().out.startswith("✓ c: " if holds else "✗ c: ")


@pytest.mark.parametrize(
    ("value", "how"),
    [
        (0.5, {}),
        (0.5, {"target": 0.5}),
        (0.5, {"target": 0.5, "tol": -1}),
        (0.5, {"target": 0.5, "tol": math.nan}),
        (0.5, {"target": 0.5, "low": 0.1}),
        ("a", {"low": 0}),
    ],
)
def test_expect_refuses_what_cannot_be_checked(value, how):
    with pytest.raises(ValueError, match="expect"):
        expect(value, **how)


def test_expect_raises_only_when_strict_and_records_first(monkeypatch, tmp_path, capsys):
    file = tmp_path / "claims.jsonl"
    monkeypatch.setenv("UMM_KIT_CLAIMS", str(file))
    expect(0.1, low=0.5, claim="a", paper=0.62, interval=(0.05, 0.15), n=10)
    monkeypatch.setenv("UMM_KIT_STRICT", "1")
    with pytest.raises(AssertionError, match="b: 0"):
        expect(0.1, low=0.5, claim="b")
    first, second = read_claims(file, "00")
    assert first == {
        "claim": "a", "paper": "0.62", "here": 0.1, "expected": ">= 0.5", "interval": [0.05, 0.15], "n": 10, "holds": False,
        "notebook": "00",
    }  # fmt: skip
    assert second["claim"] == "b" and not second["holds"]


def test_claims_table_by_hand():
    claim = {"claim": "a", "paper": "", "here": 0.5, "expected": ">= 0.4", "interval": [0.4, 0.6], "n": 3}
    claim |= {"holds": True, "notebook": "00"}
    head, rule, row, failed = claims_table([claim, {**claim, "holds": False, "interval": None}]).splitlines()
    assert [cell.strip() for cell in head.split("|")] == ["claim", "paper", "here", "interval", "n", "verdict", "notebook"]
    assert [cell.strip() for cell in row.split("|")] == ["a", "-", "0.5 (expected >= 0.4)", "[0.4, 0.6]", "3", "holds", "00"]
    assert "FAILS" in failed and set(rule) == {"-", "+"}


# --- notebooks ---------------------------------------------------------------------------------------------------------

SOURCE = """# %% [markdown]
# # Is it so?

# %% tags=["parameters"]
PRESET = "full"
SHARE = 0.5

# %%
import sys
from IPython.display import display
from umm_kit.reproduce import expect
png = b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
display({"image/png": png.decode()}, raw=True)
print("noise", file=sys.stderr)
display({"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "IntSlider()"}, raw=True)

# %%
expect(SHARE if PRESET == "full" else 0.1, low=0.4, claim="the share is large")
"""


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "notebooks" / "source"
    source.mkdir(parents=True)
    (source / "00_so.py").write_text(SOURCE)
    return tmp_path / "notebooks"


@pytest.mark.notebook
@pytest.mark.slow
def test_reproduce_holds_and_fails(folder, tmp_path, capsys):
    """The full preset meets the claim; the tiny one of this notebook does not, and both are told and exit accordingly."""
    build = tmp_path / "build"
    argv = ["reproduce", "--notebooks", str(folder), "--output", str(build)]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "the share is large" in out and "1 of 1 claims hold, 0 notebooks stopped" in out and "Next:" in out
    assert (build / "figures/00_so-1.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*argv, "--preset", "tiny"]) == 1
    out = capsys.readouterr().out
    assert "FAILS" in out and "stopped: 00_so: AssertionError" in out
    assert sorted(p.name for p in folder.iterdir()) == ["source"], "a clone stays clean"


@pytest.mark.notebook
@pytest.mark.slow
def test_notebooks_are_refreshed_the_same_twice(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["notebooks", "--notebooks", str(folder)]
    assert cli.main(argv) == 0
    first = (folder / "00_so.ipynb").read_bytes()
    assert cli.main([*argv, "00_so"]) == 0
    assert (folder / "00_so.ipynb").read_bytes() == first
    text = first.decode()
    assert "noise" not in json.dumps([c.get("outputs") for c in json.loads(text)["cells"]])
    assert "widget-view" not in json.dumps([c.get("outputs") for c in json.loads(text)["cells"]]) and "papermill" not in text
    monkeypatch.setattr(reproduce, "MAX_NOTEBOOK_BYTES", 100)
    assert cli.main(argv) == 2
    assert cli.main(["notebooks", "99", "--notebooks", str(folder)]) == 2


def test_tidy_gives_equal_cells_distinct_stable_ids():
    import nbformat.v4 as v4

    def notebook():
        return v4.new_notebook(cells=[v4.new_code_cell("x = 1"), v4.new_code_cell("x = 1"), v4.new_markdown_cell("x = 1")])

    ids = [cell["id"] for cell in tidy(notebook()).cells]
    assert len(set(ids)) == 3 and ids == [cell["id"] for cell in tidy(notebook()).cells]


def test_shipped_sources_are_paired_by_jupytext(root):
    """jupytext.toml pairs notebooks/NAME.ipynb with notebooks/source/NAME.py, as the commands here do."""
    import tomllib

    from jupytext.formats import long_form_multiple_formats
    from jupytext.paired_paths import paired_paths

    formats = long_form_multiple_formats(tomllib.loads((root / "jupytext.toml").read_text())["formats"])
    pair = [path for path, _ in paired_paths("notebooks/a.ipynb", formats[0], formats)]
    assert pair == ["notebooks/a.ipynb", "notebooks/source/a.py"]
