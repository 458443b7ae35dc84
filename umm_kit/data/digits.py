"""Scikit-learn's scanned digits, with captions whose words are measured on the scan, in the form of :class:`Shapes`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import Tensor

from umm_kit.data.imagetext import ItemByItem
from umm_kit.data.language import Question, article
from umm_kit.data.shapes import hash_uniform, stream_key

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
THICKNESS = ("thin", "medium", "thick")  # captions leave "medium" out
SLANT = ("backslanted", "upright", "slanted")
SPLIT_SHARES = {"train": 0.70, "validation": 0.15, "test": 0.15}


def stroke_width(scans: np.ndarray) -> np.ndarray:
    """Mean width of the strokes, in scan pixels: [n, 8, 8] ink in [0, 1] -> [n], larger = thicker.

    width = sum_p ink(p) * S(p) / (3 * sum_p ink(p)), where S(p) is the ink in the 3 x 3 pixels around p. On a straight
    stroke S = 3 * width up to a width of 2, ends aside; unlike the mass of ink it does not grow with the stroke's length.
    """
    around = ndimage.convolve(scans, np.ones((1, 3, 3)), mode="constant")
    return (scans * around).sum((1, 2)) / (3 * scans.sum((1, 2)))


def slant(scans: np.ndarray) -> np.ndarray:
    """Shear of the ink, from its second moments: [n, 8, 8] -> [n], in columns to the right per row upwards.

    slant = -cov(x, y) / var(y) with y pointing down: 0 upright, positive leaning right, negative leaning left.
    """
    mass = scans.sum((1, 2))
    y, x = np.mgrid[: scans.shape[1], : scans.shape[2]]
    dy, dx = (axis - ((scans * axis).sum((1, 2)) / mass)[:, None, None] for axis in (y, x))
    return -(scans * dx * dy).sum((1, 2)) / (scans * dy * dy).sum((1, 2))


@lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, pd.DataFrame]:
    """Ink [1797, 8, 8] in [0, 1], and for each scan its split, digit, thickness and slant, the last two also as word indices."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    ink = loaded.images / 16
    table = pd.DataFrame({"digit": loaded.target.astype(np.int64), "thickness": stroke_width(ink), "slant": slant(ink)})
    # The split is a property of the scan: no seed of Digits can move a test scan into training.
    draw = pd.Series(hash_uniform(np.arange(len(ink)), 1)[:, 0]).groupby(table["digit"])
    share = (draw.rank() - 1) / draw.transform("size")
    edges = np.cumsum(list(SPLIT_SHARES.values()))[:-1]
    table["split"] = np.array(list(SPLIT_SHARES))[np.searchsorted(edges, share, side="right")]
    train = table["split"] == "train"
    for name in ("thickness", "slant"):
        for _, values in table[name].groupby(table["digit"]):  # below, between or above the tertiles of the training scans
            thirds = np.quantile(values[train[values.index]], [1 / 3, 2 / 3])
            table.loc[values.index, f"{name}_word"] = np.searchsorted(thirds, values)
    return ink, table.astype({"thickness_word": np.int64, "slant_word": np.int64})


class Digits(ItemByItem):
    """Scikit-learn's 1,797 handwritten digits, with captions whose words are measured on the scan; no download.

    "a thick slanted seven": the digit is the label; *thin* / *thick* are the lower and upper third of
    :func:`stroke_width`, *backslanted* / *upright* / *slanted* the thirds of :func:`slant`, each within the training scans
    of the same digit (a seven leans more than a six by its shape alone; within a digit the words say something that its
    name does not). The moments see all of the ink, so the foot of a one counts as leaning left. Ink is 1 on a ground of
    0, enlarged from 8 x 8 by bicubic interpolation.

    The splits (70 / 15 / 15 %, stratified by digit) are fixed and disjoint. Writers are not recorded, so the same hand may
    occur in several. ``seed`` decides the order and, with ``n``, which scans of the split are taken; ids do not depend on it.
    Items are those of :class:`Shapes`; factors are ``digit``, ``thickness`` (scan pixels), ``slant`` (columns per row) and
    the word indices ``thickness_word`` and ``slant_word``. ``pixels`` [n, 1, H, W] and ``digits`` [n] hold all at once.

    Raises:
        ValueError: unknown split, n < 1 or beyond the split, image size below 8.

    Example:
        >>> data = Digits("test", n=4)
        >>> data[0]["images"].shape
        torch.Size([3, 32, 32])
    """

    def __init__(self, split: str = "train", n: int | None = None, seed: int = 0, image_size: int = 32):
        if split not in SPLIT_SHARES:
            raise ValueError(f"split is {split!r}; expected one of {tuple(SPLIT_SHARES)}")
        if image_size < 8:
            raise ValueError(f"image_size is {image_size}; expected at least 8, the size of the scans")
        ink, table = _scans()
        rows = np.flatnonzero(table["split"] == split)
        if n is not None and not 1 <= n <= len(rows):
            raise ValueError(f"n is {n}; expected 1 to {len(rows)}, the scans of split {split!r}")
        self._rows = rows[hash_uniform(stream_key(seed, 1, rows), 1)[:, 0].argsort()][:n]
        self.split, self.seed, self.image_size = split, seed, image_size
        self._table = table.drop(columns="split").iloc[self._rows].reset_index(drop=True)
        self.digits = self._table["digit"].to_numpy()
        self.ids = [f"digits-{row:04d}" for row in self._rows]
        self.texts = []
        for digit, thickness, lean in self._table[["digit", "thickness_word", "slant_word"]].to_numpy():
            words = [w for w in (THICKNESS[thickness], SLANT[lean], DIGITS[digit]) if w != "medium"]
            self.texts.append(" ".join([article(words[0]), *words]))
        small = torch.from_numpy(ink[self._rows]).float()[:, None]
        large = torch.nn.functional.interpolate(small, size=(image_size, image_size), mode="bicubic", align_corners=False)
        self.pixels = large.clamp(0, 1)

    def __repr__(self) -> str:
        return f"Digits({self.split!r}, n={len(self)}, seed={self.seed}, image_size={self.image_size})"

    def _image(self, i: int) -> Tensor:
        return self.pixels[i].repeat(3, 1, 1)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item, i = super().__getitem__(i), self._index(i)
        return item | {"factors": {name: torch.tensor(values[i]) for name, values in self._table.items()}}

    def question(self, i: int) -> list[Question]:
        """Everything that is asked about scan i: which digit, and yes or no for each word of thickness and slant."""
        scan = self._table.iloc[self._index(i)]
        said = {"thickness": THICKNESS[int(scan["thickness_word"])], "slant": SLANT[int(scan["slant_word"])]}
        asked = [("thickness", "thin"), ("thickness", "thick"), *(("slant", word) for word in SLANT)]
        yes_no = [Question(kind, f"is it {word}?", "yes" if word == said[kind] else "no") for kind, word in asked]
        return [Question("digit", "which digit is it?", DIGITS[int(scan["digit"])]), *yes_no]

    def questions(self, indices: Sequence[int], n: int) -> list[list[tuple[str, str]]]:
        """For each scan n pairs (question, answer): all kinds in turn, starting at a place drawn for this scan."""
        rows = self._rows[[self._index(i) for i in indices]]
        out = []
        for i, start in zip(indices, hash_uniform(stream_key(self.seed, 2, rows), 1)[:, 0], strict=True):
            asked = [(q.text, q.answer) for q in self.question(i)]
            first = int(start * len(asked))
            out.append([asked[k % len(asked)] for k in range(first, first + n)])
        return out


def digit_word(caption: str) -> int | None:
    """The digit that a caption names, None where it names none or several.

    Example:
        >>> digit_word("A thick slanted seven.")
        7
    """
    found = {DIGITS.index(word) for word in re.findall(r"[a-z]+", caption.lower()) if word in DIGITS}
    return found.pop() if len(found) == 1 else None


def to_scan(images: Tensor) -> Tensor:
    """Images [B, 3 or 1, H, W] in [0, 1] back to scans [B, 8, 8] in [0, 16], for a classifier trained on the originals."""
    return torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 8)[:, 0] * 16
