"""Image-text pairs of your own, in the form of :class:`umm_kit.data.shapes.Shapes`.

Everything is local: nothing is downloaded, and nothing in a folder is run. Files are read with a fixed list of Pillow's
decoders (the one for EPS, which starts an external program, is not among them), and a path that leaves the folder is
refused before it is opened.
"""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

#: Mid grey: transparent pixels are composited on it and ``fit="pad"`` fills with it, so that neither a dark nor a light
#: drawing disappears.
BACKGROUND = (128, 128, 128)
#: Larger images are refused from their header alone, before a decoder allocates anything.
MAX_PIXELS = 64 * 2**20
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
METADATA = ("metadata.csv", "metadata.jsonl")
_LISTED = 20


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to 8-bit RGB; transparency lands on mid grey. Colour profiles are not applied."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion would clip these modes at 255 instead of scaling them.
        values, top = np.asarray(image, dtype=np.float32), 1.0 if image.mode == "F" else 65535.0
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top):
            raise ValueError(f"{image.mode} pixels range from {values.min():.4g} to {values.max():.4g}; expected 0 to {top:g}")
        image = Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image)
    return image.convert("RGB")


def _fit(image: Image.Image, size: int, fit: str) -> Image.Image:
    """To size x size without distortion: the largest centred square ("crop"), or the whole image between bars ("pad")."""
    if fit == "crop":
        return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    out = Image.new("RGB", (size, size), BACKGROUND)
    out.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    return out


def read_image(file: str | os.PathLike | IO[bytes], image_size: int = 32, fit: str = "crop") -> Tensor:
    """One image file as a float tensor [3, image_size, image_size] in [0, 1].

    EXIF orientation is applied; the first frame of an animation is taken; transparency is composited on mid grey; 16-bit
    grey is scaled by 1 / 65535; the resize is Pillow's anti-aliased bicubic one.

    Raises:
        ValueError: what is wrong with the file, in one line.
    """
    try:
        Image.init()  # older Pillows lack AVIF, and asking for an unknown format is an error
        with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} pixels")
            image.draft(None, (4 * image_size, 4 * image_size))  # JPEG only: decodes large photographs at a fraction of the cost
            image.load()
            rgb = _fit(_to_rgb(ImageOps.exif_transpose(image)), image_size, fit)
    except Image.UnidentifiedImageError:
        raise ValueError(f"not an image in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image is too large ({error}); the limit is {MAX_PIXELS} pixels, make it smaller first") from None
    except Exception as error:  # a decoder fed with broken bytes may raise anything (OSError, SyntaxError, struct.error ...)
        raise ValueError(f"the image cannot be decoded ({type(error).__name__}: {error})") from error
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous().float() / 255


class ItemByItem(torch.utils.data.Dataset):
    """Indexing shared by the data sets whose items are read one by one: one item, several, or all in order."""

    ids: list[str]
    texts: list[str]

    def _image(self, i: int) -> Tensor:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.ids)

    def _index(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"item {i} is outside this data set of {len(self)}")
        return int(i) % len(self)

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = self._index(i)
        return {"id": self.ids[i], "images": self._image(i), "texts": self.texts[i]}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self[i] for i in indices]


@dataclass
class _Row:
    """One candidate item: where it stands, what it says, and what is already known to be wrong with it."""

    where: str
    id: str | None
    text: Any
    source: Any  # a path inside the folder, or a row number of a data set
    problem: str = ""


def _inside(root: Path, name: Any, *, folder: bool = False) -> Path:
    """The file (or folder) ``name`` of folder ``root`` with links followed, if it lies in it and can be opened.

    Refused if it leaves the folder by "..", by an absolute path or by a link, and if opening it would wait for ever (a pipe).
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError("no file name")
    # As a Windows path both kinds of slash separate, so that one rule holds on every system.
    parts = PureWindowsPath(name)
    if parts.drive or parts.root or ".." in parts.parts:
        raise ValueError(f"the path {name!r} leaves the folder: refused, not read")
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL character
        raise ValueError(f"the path {name!r} cannot be followed ({error})") from None
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"the path {name!r} leaves the folder through a link: refused, not read")
    if folder:
        return path
    if not path.exists():
        raise ValueError(f"the file {name!r} does not exist")
    if not path.is_file():
        raise ValueError(f"{name!r} is not a regular file")
    if path.stat().st_size == 0:
        raise ValueError(f"the file {name!r} is empty (0 bytes)")
    return path


def _text_problem(text: Any) -> str:
    if text is None or (isinstance(text, str) and not text.strip()):
        return "no caption"
    if not isinstance(text, str):
        return f"the caption is of type {type(text).__name__}; expected one string"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the caption is not valid Unicode (a lone surrogate)"
    return ""


def _metadata_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, fields or what is wrong with the line) of a metadata file."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            reader = csv.DictReader(lines)
            for row in reader:
                surplus = None in row  # DictReader's key for fields beyond the header
                yield reader.line_num, "more fields than the header names (quote captions that hold commas)" if surplus else row
            return
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    fields = json.loads(line)
                    yield number, fields if isinstance(fields, dict) and fields else "not a JSON object with fields"
            except (ValueError, RecursionError) as error:
                yield number, f"not JSON ({error})"


class ImageText(ItemByItem):
    """Image-text pairs of your own: a folder, a ``datasets.Dataset``, or the folder one was saved to.

    A folder follows the Hugging Face ``imagefolder`` convention: images beside a ``metadata.csv`` or ``metadata.jsonl``
    with the columns ``file_name`` and ``text``, and an optional ``id`` (default: the file name; for a ``datasets.Dataset``
    the row number). Subfolders that each have their own metadata are splits: choose one with ``split``.

    Items are mappings ``id``, ``images`` [3, H, W] float in [0, 1] and ``texts``, as in :class:`Shapes` without factors.
    Every image is decoded once at the start, one at a time, to find the broken ones; later it is read again on demand.

    Args:
        source: the folder or the data set. Strings are local paths, never names on a hub.
        image_size: side in pixels.
        split: the subfolder (or split of a saved ``DatasetDict``) to read.
        on_error: "raise" one error that lists every unusable item, or "skip" them with a warning and an account in
            ``.skipped``, a list of (id, reason). Paths that leave the folder are never read, under either.
        image_column, text_column: where they are not ``file_name`` / the only image column and ``text``.
        fit: "crop" to the centred square or "pad" to mid grey bars.
        captions: False takes pictures without a caption, too (their text is empty), and a folder of nothing but pictures:
            enough for what starts from pictures, such as ``uk.drift(..., start="image")``.

    Raises:
        ValueError: unusable items (all of them, with reasons), an empty folder, no metadata, unknown options.

    Example:
        >>> data = ImageText("my_folder/", on_error="skip")  # doctest: +SKIP
        >>> data[0]["texts"], data.skipped  # doctest: +SKIP
        ('a dog on a beach', [('cat.png', 'metadata.csv line 3: no caption')])
    """

    def __init__(
        self,
        source: str | os.PathLike | Any,
        image_size: int = 32,
        split: str | None = None,
        on_error: str = "raise",
        image_column: str | None = None,
        text_column: str | None = None,
        fit: str = "crop",
        captions: bool = True,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {on_error!r}; expected 'raise' or 'skip'")
        if fit not in ("crop", "pad"):
            raise ValueError(f"fit is {fit!r}; expected 'crop' or 'pad'")
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; expected at least 1 pixel")
        self.image_size, self.fit, self.image_column, self.text_column = image_size, fit, image_column, text_column
        self.captions = captions
        self._root: Path | None = None
        self._table: Any = None
        if isinstance(source, str | os.PathLike):
            self.name, rows = os.fspath(source), self._open_folder(Path(source), split)
        else:
            self.name, rows = type(source).__name__, self._open_dataset(source, split)
        self._keep_usable(list(rows), on_error)

    def __repr__(self) -> str:
        skipped = f", skipped={len(self.skipped)}" if self.skipped else ""
        return f"ImageText({self.name!r}, n={len(self)}, image_size={self.image_size}, fit={self.fit!r}{skipped})"

    def _image(self, i: int) -> Tensor:
        try:
            return self._read(self._sources[i])
        except ValueError as error:  # it was readable at the start
            raise ValueError(f"item {self.ids[i]!r} of {self.name} has become unreadable: {error}") from error

    def _read(self, source: Any) -> Tensor:
        if self._table is None:
            assert self._root is not None
            return read_image(_inside(self._root, source), self.image_size, self.fit)
        cell = self._table[source]["image"]
        if not cell or (cell.get("bytes") is None and not cell.get("path")):
            raise ValueError("no image")
        if cell.get("bytes") is not None:
            return read_image(io.BytesIO(cell["bytes"]), self.image_size, self.fit)
        if self._root is not None:
            raise ValueError(f"the path {cell['path']!r} leaves the saved data set: refused, not read")
        if not Path(cell["path"]).is_file():  # also anything with a scheme, such as https:// or zip://
            raise ValueError(f"the file {cell['path']!r} does not exist on this machine")
        return read_image(cell["path"], self.image_size, self.fit)

    def _open_folder(self, root: Path, split: str | None) -> Iterable[_Row]:
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise ValueError(f"{root} {what}; expected a local folder (a data set of the hub must be downloaded first)")
        if not any(root.iterdir()):
            raise ValueError(f"the folder {root} is empty; expected images and a metadata.csv with file_name and text")
        splits = sorted(p.name for p in root.iterdir() if any((p / m).is_file() for m in (*METADATA, "state.json")))
        if split is not None:
            if split not in splits:
                raise ValueError(f"{root} has no split {split!r}; it has {splits or 'none (leave split out)'}")
            root = _inside(root, split, folder=True)
        self._root = root
        if (root / "state.json").is_file():
            return self._open_dataset(_load_saved(root), None)
        found = [root / m for m in METADATA if (root / m).is_file()]
        if len(found) != 1:
            if found:
                raise ValueError(f"{root} has both {' and '.join(METADATA)}; expected one of them")
            if not self.captions:
                return [_Row(name, name, None, name) for name in self._pictures()]
            hint = (
                f"; its subfolders {splits} do: choose one with split="
                if splits
                else ", with the columns file_name and text (pictures alone: captions=False, or umm-kit drift --start image)"
            )
            raise ValueError(f"{root} has no metadata.csv or metadata.jsonl{hint}")
        return self._metadata(_inside(root, found[0].name))

    def _metadata(self, file: Path) -> Iterable[_Row]:
        try:
            lines = list(_metadata_rows(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{file} cannot be read as UTF-8 {file.suffix[1:].upper()}: {error}") from None
        columns = list(dict.fromkeys(key for _, row in lines if isinstance(row, dict) for key in row))
        if not lines:
            raise ValueError(f"{file} has no rows; expected one line per image with file_name and text")
        image, text = self.image_column or "file_name", self.text_column or "text"
        for wanted, option in ((image, "image_column"), (text, "text_column")):
            if columns and wanted not in columns:
                raise ValueError(f"{file} has the columns {sorted(columns)}; expected {wanted!r} (name another with {option}=)")
        named = set()
        for number, row in lines:
            where = f"{file.name} line {number}"
            if isinstance(row, str):
                yield _Row(where, None, None, None, row)
            else:
                name = row.get(image)
                named.add(os.path.normpath(name) if isinstance(name, str) else None)
                yield _Row(where, _as_id(row.get("id", name)), row.get(text), name)
        for name in self._pictures():
            if os.path.normpath(name) not in named:
                said = "no line names this image, so it has no caption" if self.captions else ""
                yield _Row(file.name, name, None, name, said)

    def _pictures(self) -> Iterator[str]:
        """Every image file of the folder, but for hidden ones, as it is named from there."""
        assert self._root is not None
        for path in sorted(self._root.rglob("*")):
            place = path.relative_to(self._root)
            if path.suffix.lower() in SUFFIXES and path.is_file() and not any(part.startswith(".") for part in place.parts):
                yield place.as_posix()

    def _open_dataset(self, source: Any, split: str | None) -> Iterable[_Row]:
        import datasets

        if isinstance(source, datasets.DatasetDict):
            if split not in source:
                raise ValueError(f"split is {split!r}; this DatasetDict has {sorted(source)}")
            source, split = source[split], None
        if not isinstance(source, datasets.Dataset):
            raise ValueError(f"source is of type {type(source).__name__}; expected a folder or a datasets.Dataset")
        if split is not None:
            raise ValueError(f"split is {split!r}, but one datasets.Dataset has no splits; leave it out")
        pictures = [name for name, feature in source.features.items() if isinstance(feature, datasets.Image)]
        if self.image_column is None and len(pictures) != 1:
            hint = "choose one with image_column=" if pictures else "cast_column(name, datasets.Image()) makes one of paths"
            raise ValueError(f"the data set has the image columns {pictures}; expected exactly one: {hint}")
        image, text, columns = self.image_column or pictures[0], self.text_column or "text", source.column_names
        if image not in pictures:
            raise ValueError(f"column {image!r} is not one of the image columns {pictures} (cast_column makes them)")
        if text not in columns:
            raise ValueError(f"the data set has the columns {sorted(columns)}; expected {text!r} (or name one with text_column=)")
        plain = source.with_format(None)
        # decode=False: the bytes come here, so that local paths, size and format pass the same checks as in a folder.
        self._table = (
            plain.select_columns([image]).rename_columns({image: "image"}).cast_column("image", datasets.Image(decode=False))
        )
        texts = plain.select_columns([text] + (["id"] if "id" in columns else []))
        return (_Row(f"row {i}", _as_id(row.get("id", i)), row[text], i) for i, row in enumerate(texts))

    def _keep_usable(self, rows: list[_Row], on_error: str) -> None:
        """Read every candidate once; keep the good ones and an account of the others."""
        self.ids, self.texts, self._sources = [], [], []
        self.skipped: list[tuple[str, str]] = []
        first: dict[str, str] = {}
        for row in tqdm(rows, desc=f"checking {self.name}", unit="image", delay=2, leave=False):
            problems = [row.problem] if row.problem else []
            if not problems:
                if not row.id:
                    problems.append("no id")
                elif first.setdefault(row.id, row.where) != row.where:
                    problems.append(f"the id is already that of {first[row.id]} (ids must be unique; an `id` column gives them)")
                if problem := _text_problem(row.text if self.captions else row.text or "none"):
                    problems.append(problem)
                try:
                    self._read(row.source)
                except ValueError as error:
                    problems.append(str(error))
            if problems:
                self.skipped.append((row.id or row.where, f"{row.where}: {'; '.join(problems)}"))
            else:
                self.ids.append(str(row.id))
                self.texts.append((row.text or "").strip())
                self._sources.append(row.source)
        if not rows:
            raise ValueError(f"{self.name} has no items; expected at least one image-text pair")
        if not self.skipped:
            return
        listed = "\n".join(f"  {name}: {reason}" for name, reason in self.skipped[:_LISTED])
        more = f"\n  ... and {len(self.skipped) - _LISTED} more" if len(self.skipped) > _LISTED else ""
        account = f"{len(self.skipped)} of {len(rows)} items of {self.name} cannot be used:\n{listed}{more}"
        if on_error == "raise":
            raise ValueError(f"{account}\nRepair them, or leave them out with on_error='skip'.")
        if not self.ids:
            raise ValueError(f"{account}\nNothing is left.")
        warnings.warn(f"{account}\nThey are skipped; .skipped has the whole account.", stacklevel=3)


def _as_id(value: Any) -> str | None:
    return str(value).strip() if isinstance(value, str | int) else None


def _load_saved(root: Path) -> Any:
    """The ``datasets.Dataset`` saved in ``root``, once every file that its state names is known to lie in it."""
    import datasets

    try:
        state = json.loads(_inside(root, "state.json").read_text(encoding="utf-8"))
        for file in state["_data_files"]:
            _inside(root, file["filename"])
        return datasets.load_from_disk(str(root))
    except Exception as error:  # broken JSON or Arrow files, in as many ways as there are readers
        raise ValueError(f"{root} cannot be loaded as a saved data set ({type(error).__name__}: {error})") from error
