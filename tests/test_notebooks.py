"""The notebooks keep their form, the committed ones are those of the reviewed text, and they run with every claim held."""

import re
import runpy
import statistics

import jupytext
import nbformat
import pytest
from conftest import ROOT

from umm_kit.reproduce import run_notebook, sources

SOURCES = sources(ROOT / "notebooks")
each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def lines(cell) -> list[str]:
    return [line for line in cell.source.splitlines() if line.strip()]


@each
def test_form(source):
    cells = jupytext.read(source).cells
    code, prose = ([c for c in cells if c.cell_type == kind] for kind in ("code", "markdown"))
    assert 25 <= len(cells) <= 45
    assert max(len(lines(c)) for c in code) <= 20 and statistics.median(len(lines(c)) for c in code) <= 6
    assert len(prose) >= len(cells) / 2
    title = cells[0].source.splitlines()[0]
    assert title.startswith("# ") and title.endswith("?"), "the title is a question"
    assert (
        re.search(r"\*\*Claim\.\*\*.*(Sec\. \d|\(abstract\))", cells[0].source, re.DOTALL) and "**Run time.**" in cells[0].source
    )
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and re.findall(r"^([A-Z]+) = ", tagged[0].source, re.M) == ["PRESET", "SEED", "DEVICE", "MODEL"]
    text = "\n".join(c.source for c in prose)
    sections = text.split("\n## ")[1:]
    numbered = [s for s in sections if re.match(r"\d+\. ", s)]
    assert len(numbered) >= 3
    for section in numbered:
        for phrase in ("Write down what you expect", "What you should see", "If you see something else", "Published value"):
            assert section.count(f"**{phrase}.**") == 1, (section.splitlines()[0], phrase)


@each
def test_definitions_are_short(source):
    import ast

    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.end_lineno - node.lineno < 15, f"{node.name} belongs in the library"


@each
def test_committed_notebook_is_the_reviewed_text_with_outputs(source):
    path = source.parent.parent / f"{source.stem}.ipynb"
    committed, reviewed = nbformat.read(path, as_version=4), jupytext.read(source)
    assert [(c.cell_type, c.source) for c in committed.cells] == [(c.cell_type, c.source) for c in reviewed.cells], (
        f"{path.name} differs from source/{source.name}: run make notebooks"
    )
    nbformat.validate(committed)
    outputs = [out for c in committed.cells if c.cell_type == "code" for out in c.outputs]
    assert not [out for out in outputs if out.output_type == "error"]
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 3, "run make notebooks: there are no figures"
    said = "".join(out.text for out in outputs if out.output_type == "stream")
    assert "✓" in said and "✗" not in said, "a claim failed when this notebook was refreshed"
    assert "widgets" not in committed.metadata


@each
def test_every_notebook_has_solutions_and_a_lesson(source):
    exercises = re.findall(r"^# (\d)\. ", source.read_text().split("Exercises")[1], re.M)
    assert 3 <= len(exercises) <= 5
    answers = (source.parent.parent / "solutions" / source.name).read_text()
    assert re.findall(r"\*\*(\d)\.\*\*", answers) == exercises
    assert source.stem in (source.parent.parent / "LESSON.md").read_text()


@pytest.mark.notebook
@pytest.mark.slow
@each
def test_runs_at_the_tiny_preset(source, tmp_path):
    """Strict: the first claim that fails raises."""
    claims = run_notebook(source, tmp_path / f"{source.stem}.ipynb", {"PRESET": "tiny"}, strict=True)
    assert len(claims) >= 3 and all(c["holds"] for c in claims)


@pytest.mark.notebook
@pytest.mark.slow
@each
def test_solutions_run(source, monkeypatch, capsys):
    monkeypatch.setenv("UMM_KIT_PRESET", "tiny")
    monkeypatch.setenv("UMM_KIT_STRICT", "1")
    runpy.run_path(str(source.parent.parent / "solutions" / source.name))
    assert capsys.readouterr().out.count("✓") >= 3
