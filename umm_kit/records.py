"""What stands behind a number: the command, the versions and the machine that made it, and files that are whole or not there."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

#: Packages whose version can change a number.
NUMERIC = ("torch", "transformers", "numpy", "scipy", "scikit-learn")


def machine() -> str:
    """The device in words: the GPU's name, or the processor and its threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of this package, Python, and the packages that compute.

    Example:
        >>> sorted(versions())[:3]
        ['numpy', 'python', 'scikit-learn']
    """
    from umm_kit import __version__

    return {"umm_kit": __version__, "python": platform.python_version(), **{name: version(name) for name in NUMERIC}}


def command(arguments: Sequence[str] | None = None) -> str | None:
    """The ``umm-kit`` command of this process (or with these arguments); None in any other program."""
    if arguments is not None or Path(sys.argv[0]).name in ("umm-kit", "umm-kit.exe"):
        return shlex.join(["umm-kit", *(sys.argv[1:] if arguments is None else arguments)])
    return None


def write_json(path: str | os.PathLike, content: Any, indent: int | None = 1) -> None:
    """Write through a temporary file, so that a full disk or an interrupt never leaves half a record under its name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=indent, default=str) + "\n", encoding="utf-8")
    partial.replace(path)
