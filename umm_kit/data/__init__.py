"""Data sets: procedural scenes with known factors, any image-text folder, scanned digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_data(name: str, split: str = "test", n: int | None = None, seed: int = 0, **options: Any) -> Any:
    """A data set by name: "shapes", "digits", or the path of an image-text folder.

    Raises:
        ValueError: neither a known name nor an existing path.
    """
    from umm_kit.data.digits import Digits
    from umm_kit.data.imagetext import ImageText
    from umm_kit.data.shapes import Shapes

    if name == "shapes":
        return Shapes(split, n=n or 2**40, seed=seed, **options)
    if name == "digits":
        return Digits(split, n=n, seed=seed, **options)
    if Path(name).exists():
        return ImageText(name, split=split if (Path(name) / split).is_dir() else None, **options)
    raise ValueError(f"data is {name!r}; expected 'shapes', 'digits' or the path of an image-text folder")
