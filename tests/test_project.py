"""The project keeps its own rules: pinned versions, thin targets, a quick import, nothing of one machine, a true README."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PINS = (ROOT / "constraints.txt").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def tracked() -> list[Path]:
    """Files under version control or about to be; all files that are not ignored."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout (an unpacked archive), so there is no list of tracked files")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in out.split("\0") if name and (path := ROOT / name).is_file()]


def declared() -> set[str]:
    extras = [d for group in PROJECT["optional-dependencies"].values() for d in group]
    return {canonical(re.split(r"[<>=!~ \[;]", d)[0]) for d in PROJECT["dependencies"] + extras}


# --- dependencies ------------------------------------------------------------------------------------------------------


def test_constraints_are_exact_and_portable():
    lines = [line for line in PINS.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    assert "+" not in PINS, "a local version label such as +cpu does not exist on the index"
    assert "torch==2.13.0" in lines


def test_every_declared_dependency_is_pinned():
    pinned = {canonical(line.split("==")[0]) for line in PINS.splitlines() if "==" in line}
    assert declared() <= pinned


def test_every_import_is_declared():
    """A fresh install has what the code imports: nothing rests on what a dependency happens to bring."""
    files = [p for folder in ("umm_kit", "tests", "benchmarks", "notebooks/source") for p in (ROOT / folder).rglob("*.py")]
    owners, missing = packages_distributions(), {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"umm_kit", "tests", "conftest"}:
                local = (path.parent / f"{top}.py").exists() or (path.parent / top).is_dir()
                if not local and not {canonical(d) for d in owners.get(top, [])} & declared():
                    missing.setdefault(top, []).append(str(path.relative_to(ROOT)))
    assert not missing, f"imported but not in pyproject.toml: {missing}"


def test_version_is_stated_once_and_the_same():
    import umm_kit

    assert umm_kit.__version__ == PROJECT["version"]
    assert re.search(rf"^version: {re.escape(umm_kit.__version__)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert f"## {umm_kit.__version__}" in (ROOT / "CHANGELOG.md").read_text()


# --- Makefile and CI ---------------------------------------------------------------------------------------------------


def targets() -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for line in (ROOT / "Makefile").read_text().splitlines():
        if found := re.match(r"([\w./-]+):(?!=)", line):
            out[found[1]] = []
        elif line.startswith("\t"):
            out[list(out)[-1]].append(line.strip())
    out.pop(".PHONY", None)
    return out


def test_each_target_is_one_line_over_a_tool():
    found = targets()
    assert {"reproduce", "test", "test-fast", "lab", "notebooks", "figures", "benchmarks", ".venv", "clean"} <= set(found)
    tools = r"(\$\(BIN\)/(umm-kit|pytest|ruff|mypy|jupyter) ?[^;|]*?( && )?)+|rm -rf [^/~*$]*"
    for name, body in found.items():
        if name not in (".venv", ".venv/installed"):
            assert len(body) == 1 and re.fullmatch(tools, body[0]), f"{name}: {body}"


def test_readme_explains_every_target():
    readme = (ROOT / "README.md").read_text()
    for name in set(targets()) - {".venv", ".venv/installed"}:
        assert f"make {name}" in readme, name


def test_ci_runs_exactly_make_test():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o100, "executable"
    lines = script.read_text().splitlines()
    assert lines[0].endswith("bash") and "set -euo pipefail" in lines and lines[-1] == "exec make test"
    subprocess.run(["bash", "-n", script], check=True)


# --- package -----------------------------------------------------------------------------------------------------------


def test_import_is_light():
    """Under half a second, without torch; the median of three, because a machine may be busy."""
    code = "import time; t = time.perf_counter(); import umm_kit, sys; print(time.perf_counter() - t, 'torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    assert {torch for _, torch in runs} == {"False"}
    assert sorted(float(seconds) for seconds, _ in runs)[1] < 0.5


def test_every_public_name_resolves():
    import umm_kit

    assert set(umm_kit._NAMES) | {"__version__"} == set(umm_kit.__all__)
    assert set(umm_kit._NAMES) <= set(dir(umm_kit))
    for name in umm_kit._NAMES:
        assert getattr(umm_kit, name) is not None


def test_unknown_name_says_what_there_is():
    import umm_kit

    with pytest.raises(AttributeError, match=r"no attribute 'Shape'.*Shapes"):
        umm_kit.Shape  # noqa: B018


def test_editors_see_what_python_serves():
    """The names imported for type checkers are those of the lazy table, from the same modules."""
    tree = ast.parse((ROOT / "umm_kit/__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    static = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    import umm_kit

    assert static == umm_kit._NAMES


def test_package_stays_thin():
    modules = [p for p in (ROOT / "umm_kit").rglob("*.py") if p.name != "__init__.py" or p.stat().st_size]
    lines = sum(len(p.read_text().splitlines()) for p in modules)
    assert len(modules) <= 90 and lines <= 20600, (len(modules), lines)
    assert not {"utils.py", "helpers.py", "misc.py"} & {p.name for p in modules}
    assert not (ROOT / "umm_kit/core").exists()


def test_imports_run_one_way():
    order = ["data", "models", "losses", "features", "diagnostics", "trainers", "evaluation", "plots"]
    order += ["widgets", "experiments", "cli"]
    for path in (ROOT / "umm_kit").rglob("*.py"):
        part = path.relative_to(ROOT / "umm_kit").parts[0].removesuffix(".py")
        if part not in order:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            found = re.match(r"umm_kit\.(\w+)", node.module or "") if isinstance(node, ast.ImportFrom) else None
            if found and found[1] in order:
                assert order.index(found[1]) <= order.index(part), f"{path.name} imports umm_kit.{found[1]}"


def test_sizes():
    checkpoints = sum(p.stat().st_size for p in (ROOT / "umm_kit/checkpoints").rglob("*") if p.is_file())
    assert checkpoints <= 60e6
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert path.stat().st_size <= 300_000, path.name


# --- text --------------------------------------------------------------------------------------------------------------


def test_no_trace_of_one_machine():
    """No absolute paths of somebody's machine and no registry hosts: a clone works anywhere."""
    forbidden = re.compile(rb"/(work|root|home/\w+|Users/\w+)/|pypi\.o" + rb"rg|pythonhosted|debian\.o" + rb"rg|npmjs")
    offenders = [
        f"{path.relative_to(ROOT)}: {found[0].decode()}"
        for path in tracked()
        if path != Path(__file__).resolve()  # it holds the pattern
        and path.suffix not in {".safetensors", ".png", ".pdf", ".npz"}
        and (found := forbidden.search(path.read_bytes()))
    ]
    assert not offenders


def test_links_within_the_documents_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "NOTATION.md", "CHANGELOG.md", "CLUSTER.md"):
        for link in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text()):
            assert link.startswith("https://") or (ROOT / link).exists(), f"{name}: {link}"


def test_notation_names_exist():
    """A name in NOTATION.md that the code does not have would be worse than no table."""
    code = "\n".join(p.read_text() for p in (ROOT / "umm_kit").rglob("*.py"))
    rows = [line.split("|")[3] for line in (ROOT / "NOTATION.md").read_text().splitlines() if line.startswith("| ")][2:]
    names = {name for row in rows for span in re.findall(r"`([^`]+)`", row) for name in re.findall(r"[A-Za-z_]{4,}", span)}
    assert len(names) > 10
    assert not {name for name in names if not re.search(rf"\b{name}\b", code)}


@pytest.mark.readme
@pytest.mark.slow
def test_readme_examples_run(tmp_path, monkeypatch, capsys):
    """The Python blocks of README.md, in order, in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    space: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
    assert space["drawn"].shape == (1, 3, 32, 32) and space["filled"].shape == (4, 3, 32, 32)
    assert "generation_overall" in capsys.readouterr().out
