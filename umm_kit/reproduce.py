"""Claims and the notebooks that make them: a claim is checked where it is shown, and gathered into one table.

Environment: ``UMM_KIT_STRICT=1`` makes a claim that fails raise; ``UMM_KIT_CLAIMS=FILE`` appends each claim to a file of
JSON lines. Neither is set in a reader's own session, so a class on other hardware is not stopped.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

PRESETS = ("tiny", "full")
MAX_NOTEBOOK_BYTES = 300_000
COLUMNS = ("claim", "paper", "here", "interval", "n", "verdict", "notebook")
_WIDGET = "application/vnd.jupyter.widget-view+json"


def expect(
    value: Any,
    target: Any = None,
    tol: float | None = None,
    low: float | None = None,
    high: float | None = None,
    claim: str = "",
    paper: str | float = "",
    interval: tuple[float, float] | None = None,
    n: int | None = None,
) -> None:
    """Check one claim and print a tick or a cross.

    A number holds when ``|value - target| <= tol`` or ``low <= value <= high`` (one bound is enough); anything else, such
    as a word, when it equals ``target``. NaN never holds.

    Args:
        value: what was measured: a number, a result with ``.value`` (and ``.interval``), a bool or a string.
        claim: the sentence that is checked.
        paper: the published value with its source, for the table.
        interval, n: the 95 % interval and the number of items behind ``value``.

    Raises:
        ValueError: without anything to compare with, or for a number with a target and no tolerance (two whole
            numbers need none).
        AssertionError: when the claim fails and UMM_KIT_STRICT=1.

    Example:
        >>> expect(0.97, low=0.95, claim="captions name the right facts")
        ✓ captions name the right facts: 0.97 (expected >= 0.95)
    """
    interval = getattr(value, "interval", None) if interval is None else interval
    value, target = _plain(value), _plain(target)
    number, bounded = isinstance(value, int | float) and not isinstance(value, bool), low is not None or high is not None
    if bounded == (target is not None):  # both, or neither
        raise ValueError(f"expect() got {target=}, {low=} and {high=}; give either a target (with tol for a number) or bounds")
    if bounded:
        if not number:
            raise ValueError(f"expect() got bounds for {value!r}; only a number can lie between bounds")
        holds = (low is None or value >= low) and (high is None or value <= high) and not math.isnan(value)
        wanted = " and ".join(f"{sign} {_number(b)}" for sign, b in ((">=", low), ("<=", high)) if b is not None)
    elif number:
        tol = 0 if tol is None and isinstance(value, int) and isinstance(target, int) else tol
        if tol is None or not tol >= 0:
            raise ValueError(f"expect() got the numeric target {target!r} and tol={tol}; give a tolerance of at least 0")
        holds, wanted = abs(value - target) <= tol, f"{_number(target)} ± {_number(tol)}"
    else:
        holds, wanted = bool(value == target), repr(target)
    bounds = None if interval is None else [float(bound) for bound in interval]
    known = [_interval(bounds)] * (bounds is not None) + [f"n = {n}"] * (n is not None)
    text = f"{claim or 'value'}: {' '.join([_number(value), *known])} (expected {wanted})"
    print(f"{'✓' if holds else '✗'} {text}")
    if path := os.environ.get("UMM_KIT_CLAIMS"):
        record = {"claim": claim, "paper": str(paper), "here": value, "expected": wanted}
        record |= {"interval": bounds, "n": n, "holds": holds}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    if not holds and os.environ.get("UMM_KIT_STRICT") == "1":
        raise AssertionError(text)


def _plain(value: Any) -> Any:
    """Results, tensors and NumPy scalars to Python's own types."""
    value = getattr(value, "value", value)
    return value.item() if hasattr(value, "item") else value


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(bounds: Iterable[float] | None) -> str:
    return "" if bounds is None else "[" + ", ".join(map(_number, bounds)) + "]"


def claims_table(claims: Iterable[Mapping[str, Any]]) -> str:
    """The summary table: claim | paper | here | interval | n | verdict | notebook."""
    rows: list[Sequence[str]] = [COLUMNS]
    for c in claims:
        here = f"{_number(c['here'])} (expected {c['expected']})"
        n = "" if c["n"] is None else str(c["n"])
        rows.append(
            (c["claim"], c["paper"] or "-", here, _interval(c["interval"]), n, "holds" if c["holds"] else "FAILS", c["notebook"])
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(COLUMNS))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-+-".join("-" * width for width in widths), *lines[1:]])


# --- notebooks ---------------------------------------------------------------------------------------------------------


def sources(folder: str | Path) -> list[Path]:
    """The notebooks' reviewed texts, ``notebooks/source/*.py``, in reading order."""
    found = sorted(Path(folder, "source").glob("[0-9]*.py"))
    if not found:
        raise ValueError(f"no notebooks in {Path(folder, 'source')}; run this in a clone of the repository (or pass --notebooks)")
    return found


def run_notebook(
    source: str | Path, output: str | Path, parameters: Mapping[str, Any] | None = None, strict: bool = False
) -> list[dict]:
    """Execute one notebook into ``output`` and return its claims; with ``strict`` the first claim that fails stops it.

    ``parameters`` replace those of the cell tagged "parameters". Raises what papermill raises when a cell fails; what ran
    until then is in ``output``, and its claims in the file beside it.
    """
    jupytext, papermill = _notebook_tools()
    source, output = Path(source), Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    claims = output.with_suffix(".claims.jsonl").resolve()
    claims.write_text("")
    notebook = jupytext.read(source)
    notebook.metadata.setdefault("kernelspec", {"name": "python3", "display_name": "Python 3", "language": "python"})
    with mock.patch.dict(os.environ, UMM_KIT_CLAIMS=str(claims), UMM_KIT_STRICT="1" if strict else "0"):
        # The folder of the committed notebook is the working folder, whatever the output folder is.
        papermill.execute_notebook(notebook, output, dict(parameters or {}), cwd=source.parent.parent, progress_bar=True)
    return read_claims(claims, source.stem)


def read_claims(path: str | Path, notebook: str) -> list[dict]:
    """Claims that ``expect`` appended to a file, each with the name of its notebook."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    return [{**json.loads(line), "notebook": notebook} for line in lines]


def reproduce(notebooks: str | Path = "notebooks", output: str | Path = "build", preset: str = "full") -> bool:
    """Run every notebook into ``output``/notebooks, save their figures, print the table of claims; True if all held."""
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; expected one of {PRESETS}")
    _, papermill = _notebook_tools()
    start, claims, stopped = time.perf_counter(), [], {}
    for source in sources(notebooks):
        print(f"{source.stem} ({preset})", flush=True)
        target = Path(output, "notebooks", source.stem + ".ipynb")
        try:
            claims += run_notebook(source, target, {"PRESET": preset}, strict=True)
        except papermill.exceptions.PapermillExecutionError as error:
            stopped[source.stem] = f"{error.ename}: {error.evalue}"
            claims += read_claims(target.with_suffix(".claims.jsonl"), source.stem)
        save_figures([target], Path(output, "figures"))
    print("\n" + claims_table(claims))
    for name, why in stopped.items():
        print(f"stopped: {name}: {why} (see {Path(output, 'notebooks', name + '.ipynb')})")
    held = sum(c["holds"] for c in claims)
    minutes = (time.perf_counter() - start) / 60
    print(f"\n{held} of {len(claims)} claims hold, {len(stopped)} notebooks stopped; {minutes:.1f} minutes")
    print("Next: make lab (or: jupyter lab notebooks) to read the notebooks and turn their knobs")
    return held == len(claims) and not stopped


def refresh(notebooks: str | Path = "notebooks", names: Sequence[str] = (), build: str | Path = "build/refresh") -> bool:
    """Write notebooks/NAME.ipynb from notebooks/source/NAME.py with outputs; True if every claim held.

    Raises:
        ValueError: for an unknown name, or a notebook over 300 kB (draw fewer or smaller pictures); it is not written.
    """
    import nbformat

    found = {path.stem: path for path in sources(notebooks)}
    if unknown := sorted(set(names) - set(found)):
        raise ValueError(f"no notebook {unknown}; expected some of {sorted(found)}")
    claims: list[dict] = []
    for name in names or found:
        executed = Path(build, name + ".ipynb")
        claims += run_notebook(found[name], executed)
        notebook = tidy(nbformat.read(executed, as_version=4))
        text = nbformat.writes(notebook) + "\n"
        if (size := len(text.encode())) > MAX_NOTEBOOK_BYTES:
            raise ValueError(f"{name}.ipynb has {size} bytes, more than {MAX_NOTEBOOK_BYTES}: draw fewer or smaller pictures")
        Path(notebooks, name + ".ipynb").write_text(text, encoding="utf-8")
        print(f"{Path(notebooks, name + '.ipynb')}: {size / 1000:.0f} kB")
    print("\n" + claims_table(claims))
    return all(c["holds"] for c in claims)


def tidy(notebook: Any) -> Any:
    """Make an executed notebook fit to commit: the same text gives the same cell ids, no run times, no dead widgets."""
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec",) if key in notebook.metadata}
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type != "code":
            continue
        # Progress bars and warnings differ from run to run and say nothing to a reader.
        cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr") and not _progress(o)]
        for out in cell.outputs:
            out.get("metadata", {}).clear()
            if _WIDGET in out.get("data", {}):  # its state is not saved, so it could only show an error
                out.data = {"text/plain": "(an interactive view: run this cell to use it)"}
            if "image/png" in out.get("data", {}):
                out.data["image/png"] = _smaller(out.data["image/png"])
    return notebook


def _progress(output: Any) -> bool:
    """Whether an output is a progress bar that a widget has drawn."""
    plain = str(output.get("data", {}).get("text/plain", ""))
    return _WIDGET in output.get("data", {}) and any(mark in plain for mark in ("%|", "Progress"))


def _smaller(picture: str) -> str:
    """A base64 PNG with a palette: a third of the bytes, so that a notebook with its figures stays light.

    The palette is chosen to be near every colour, not only frequent ones: on white, a median cut makes a yellow ring orange.
    """
    from PIL import Image

    image, file = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"), io.BytesIO()
    few = image.quantize(48, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    few.save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def save_figures(notebooks: Iterable[str | Path], folder: str | Path) -> list[Path]:
    """Save every picture in executed notebooks as FOLDER/NOTEBOOK-K.png, counted in reading order."""
    import nbformat

    saved = []
    for path in map(Path, notebooks):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; run umm-kit notebooks first")
        outputs = (out for cell in nbformat.read(path, as_version=4).cells for out in cell.get("outputs", ()))
        pictures = (out.data["image/png"] for out in outputs if "image/png" in out.get("data", {}))
        for k, picture in enumerate(pictures, 1):
            saved.append(Path(folder, f"{path.stem}-{k}.png"))
            saved[-1].parent.mkdir(parents=True, exist_ok=True)
            saved[-1].write_bytes(base64.b64decode(picture))
    return saved


def _notebook_tools() -> tuple[Any, Any]:
    try:
        import jupytext
        import papermill
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; notebooks need: pip install 'umm-kit[notebooks]'") from error
    return jupytext, papermill
