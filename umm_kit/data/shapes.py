"""Procedural scenes whose every factor is known.

A scene is one to four flat shapes on a 3 x 3 lattice. What a caption may mention (the *said* factors) is the shape,
colour, size and cell of each object. What no caption ever mentions (the *nuisance* factors) is the background grey, its
gradient, the brightness, the sub-pixel jitter of each object and a texture that is drawn independently for every patch,
so that a masked patch cannot be guessed from its neighbours.

Every draw is a pure function of (seed, split, index): scene ``i`` is the same whatever is drawn before or beside it.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SIZES = ("small", "large")
CELLS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
#: said factor -> the words for its values
WORDS = {"cell": CELLS, "shape": SHAPES, "colour": COLOURS, "size": SIZES}
SPLITS = ("train", "validation", "test", "heldout")
#: (colour, shape) pairs that occur in no split but "heldout", where every scene has at least one.
HELD_OUT = (("orange", "triangle"), ("green", "cross"), ("purple", "circle"))
#: (colour, shape) pairs that asymmetric training shows to one flow alone: what one flow knows, the other can only be taught.
ONE_FLOW = {
    "understanding": (("red", "cross"), ("yellow", "ring"), ("blue", "triangle")),
    "generation": (("orange", "circle"), ("green", "square"), ("purple", "ring")),
}
#: Texture levels per patch; the entropy of the texture is log2 of it, in bits per patch.
TEXTURE_LEVELS = {"none": 1, "mid": 2, "high": 8}

Pairs = Sequence[tuple[str, str]]

RGB = np.array(
    [[0.82, 0.08, 0.10], [0.86, 0.46, 0.02], [0.84, 0.80, 0.06], [0.04, 0.60, 0.12], [0.10, 0.26, 0.84], [0.58, 0.08, 0.76]],
    dtype=np.float32,
)
# Mildly uneven frequencies, so that "popular" negatives (POPE) differ from random ones.
SHAPE_WEIGHTS = np.array([0.24, 0.22, 0.20, 0.18, 0.16])
COLOUR_WEIGHTS = np.array([0.20, 0.18, 0.17, 0.16, 0.15, 0.14])
MAX_OBJECTS = 4
PATCH_GRID = 8  # the texture grid; the image tokenizer uses the same one
JITTER_STEPS = np.array([-0.5, 0.0, 0.5], dtype=np.float32)  # in pixels of a 32-pixel image, at strength 1
_DIAMETER = {"small": 6.8, "large": 9.4}  # in pixels of a 32-pixel image
_MAX_ATTEMPTS = 10_000  # one scene in about 400 is of the wanted number of objects and contains a rare composition


@dataclass(frozen=True, order=True)
class SceneObject:
    """One object: its four said factors, as words."""

    cell: str
    shape: str
    colour: str
    size: str

    @property
    def row(self) -> int:
        return CELLS.index(self.cell) // 3

    @property
    def column(self) -> int:
        return CELLS.index(self.cell) % 3


@dataclass(frozen=True)
class Nuisance:
    """Strength of each nuisance factor: 0 switches it off, 1 is the default range (in units of intensity or pixels)."""

    grey: float = 1.0  # background grey in 0.5 +- 0.15
    gradient: float = 1.0  # change of the background across the image, +- 0.12 in x and in y
    brightness: float = 1.0  # factor on the whole image, 1 +- 0.15
    jitter: float = 1.0  # displacement of each object, -0.5, 0 or 0.5 pixels (of 32) in x and in y
    texture: str = "mid"  # entropy of the patch texture: "none" 0, "mid" 1, "high" 3 bits per patch
    texture_amplitude: float = 0.05

    def __post_init__(self) -> None:
        if self.texture not in TEXTURE_LEVELS:
            raise ValueError(f"texture is {self.texture!r}; expected one of {sorted(TEXTURE_LEVELS)}")
        for name in ("grey", "gradient", "brightness", "jitter", "texture_amplitude"):
            if not 0 <= getattr(self, name) <= 2:
                raise ValueError(f"nuisance strength {name}={getattr(self, name)} is outside [0, 2]")


def hash_uniform(key: np.ndarray, columns: int) -> np.ndarray:
    """Uniform [0, 1) draws, one row per 64-bit key, by the splitmix64 mixer: stateless, hence order-free."""
    with np.errstate(over="ignore"):
        step = np.arange(1, columns + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = key.astype(np.uint64)[:, None] + step
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def stream_key(seed: int, salt: int | np.ndarray, index: np.ndarray) -> np.ndarray:
    """Well-mixed 64-bit keys for (seed, salt, index), salt and index broadcast and flattened."""
    base = hash_uniform(np.array([seed], dtype=np.int64).view(np.uint64), 1)[0, 0]
    with np.errstate(over="ignore"):
        start = np.uint64(int(base * (1 << 53))) ^ (np.asarray(salt, dtype=np.uint64) * np.uint64(0x632BE59BD9B4E019))
        mixed = start + index.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
    return (hash_uniform(mixed.ravel(), 1)[:, 0] * (1 << 53)).astype(np.uint64) * np.uint64(2048)


@dataclass
class Scenes:
    """Factors of n scenes as arrays; objects beyond ``count`` are -1. Objects stand in raster order of their cells."""

    count: np.ndarray  # [n]
    cell: np.ndarray  # [n, 4], like the next three
    shape: np.ndarray
    colour: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.count)

    def factors(self) -> dict[str, np.ndarray]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def objects(self, row: int) -> list[SceneObject]:
        columns = (a[row, : self.count[row]] for a in (self.cell, self.shape, self.colour, self.size))
        return [SceneObject(CELLS[c], SHAPES[s], COLOURS[k], SIZES[z]) for c, s, k, z in zip(*columns, strict=True)]

    @staticmethod
    def blank(n: int) -> Scenes:
        """n scenes without objects, to be filled in."""
        return Scenes(np.zeros(n, dtype=np.int64), *(np.full((n, MAX_OBJECTS), -1) for _ in WORDS))

    @staticmethod
    def of(objects: Sequence[Sequence[SceneObject]]) -> Scenes:
        """Scenes from lists of objects (for rendering a scene of your own)."""
        out = Scenes.blank(len(objects))
        for row, scene in enumerate(objects):
            cells = len({o.cell for o in scene})
            if not 1 <= len(scene) <= MAX_OBJECTS or cells < len(scene):
                raise ValueError(f"scene {row} has {len(scene)} objects in {cells} cells; expected 1-4 in distinct cells")
            out.count[row] = len(scene)
            for k, item in enumerate(sorted(scene, key=lambda o: CELLS.index(o.cell))):
                for factor, words in WORDS.items():
                    getattr(out, factor)[row, k] = words.index(getattr(item, factor))
        return out


def meaning_key(scenes: Scenes) -> np.ndarray:
    """A number per scene that depends only on its multiset of (shape, colour, size): the caption's meaning."""
    code = (scenes.shape * len(COLOURS) + scenes.colour) * len(SIZES) + scenes.size + 1
    code = np.sort(np.where(scenes.cell >= 0, code, 0), axis=1)
    return code @ (61 ** np.arange(MAX_OBJECTS))


def _draw(key: np.ndarray) -> Scenes:
    u = hash_uniform(key, 27)
    count = 1 + (u[:, 0] * MAX_OBJECTS).astype(np.int64)
    present = np.arange(MAX_OBJECTS) < count[:, None]
    cell = np.argsort(u[:, 1:10], axis=1)[:, :MAX_OBJECTS]
    cell = np.sort(np.where(present, cell, 99), axis=1)
    shape = np.searchsorted(np.cumsum(SHAPE_WEIGHTS), u[:, 10:14]).clip(max=len(SHAPES) - 1)
    colour = np.searchsorted(np.cumsum(COLOUR_WEIGHTS), u[:, 14:18]).clip(max=len(COLOURS) - 1)
    size = (u[:, 18:22] * len(SIZES)).astype(np.int64)
    # A quarter of the scenes repeat one shape (and half of those one colour), so that counting means something.
    same = u[:, 22:23] < 0.25
    shape = np.where(same, shape[:, :1], shape)
    colour = np.where(same & (u[:, 23:24] < 0.5), colour[:, :1], colour)
    return Scenes(count, *(np.where(present, a, -1) for a in (cell, shape, colour, size)))


def shows_any(colour: np.ndarray | Tensor, shape: np.ndarray | Tensor, pairs: Pairs) -> np.ndarray:
    """Which scenes have an object of one of these (colour, shape) pairs; ``colour`` and ``shape`` are [n, 4] of factors.

    Raises:
        ValueError: a pair is not a colour and a shape.

    Example:
        >>> shows_any(np.array([[0, -1]]), np.array([[3, -1]]), [("red", "cross")])
        array([ True])
    """
    found = np.zeros(len(colour), dtype=bool)
    for pair in pairs:
        if len(pair) != 2 or pair[0] not in COLOURS or pair[1] not in SHAPES:
            raise ValueError(f"{pair!r} is no composition; expected (colour, shape), of {COLOURS} and {SHAPES}")
        found |= np.asarray((colour == COLOURS.index(pair[0])) & (shape == SHAPES.index(pair[1]))).any(axis=1)
    return found


def _admissible(scenes: Scenes, split: str, containing: Pairs, without: Pairs) -> np.ndarray:
    held = shows_any(scenes.colour, scenes.shape, HELD_OUT)
    chosen = ~shows_any(scenes.colour, scenes.shape, without)
    if containing:
        chosen &= shows_any(scenes.colour, scenes.shape, containing)
    if split == "heldout":
        return held & chosen
    # Meanings of two objects or more belong to one split only; the few of one object are shared by all.
    bucket = (hash_uniform(meaning_key(scenes).astype(np.uint64), 1)[:, 0] * 10).astype(int)
    mine = {"train": bucket < 8, "validation": bucket == 8, "test": bucket == 9}[split]
    return ~held & chosen & (mine | (scenes.count == 1))


def sample_scenes(split: str, seed: int, index: np.ndarray, containing: Pairs = (), without: Pairs = ()) -> Scenes:
    """Draw scenes by rejection: the first admissible attempt of each index."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {SPLITS}")
    index = np.asarray(index, dtype=np.int64)
    out, pending, attempt = Scenes.blank(len(index)), np.arange(len(index)), 0

    # Salts of the splits differ, so that equal indices do not share draws.
    def drawn(first: int, several: int) -> Scenes:
        """Some attempts at each pending scene, attempt by attempt."""
        salts = 1 + SPLITS.index(split) + 8 * np.arange(first, first + several)
        return _draw(stream_key(seed, salts[:, None], index[pending]))

    # The share of single-object scenes must not grow with the rejections of the others: fix the count first.
    wanted = drawn(0, 1).count
    while len(pending) and attempt < _MAX_ATTEMPTS:
        several = max(1, min(attempt, 512 // len(pending)))  # attempts at once: the last few scenes may need thousands
        draw = drawn(attempt, several)
        ok = _admissible(draw, split, containing, without) & (draw.count == np.tile(wanted[pending], several))
        ok = ok.reshape(several, len(pending))
        found, first = ok.any(0), ok.argmax(0)
        rows = first[found] * len(pending) + np.flatnonzero(found)
        for factor, values in out.factors().items():
            values[pending[found]] = getattr(draw, factor)[rows]
        pending, attempt = pending[~found], attempt + several
    if not len(pending):
        return out
    raise ValueError(f"no scene of {split!r} was found that contains {containing} and is without {without}; ask for less")


def sample_nuisance(strength: Nuisance, seed: int, index: np.ndarray) -> dict[str, np.ndarray]:
    """Known values of the nuisance factors of scenes ``index``: grey, gradient, brightness, jitter, texture."""
    index = np.asarray(index, dtype=np.int64)
    cells = PATCH_GRID * PATCH_GRID
    u = hash_uniform(stream_key(seed, 7_000_003, index), 4 + 2 * MAX_OBJECTS + cells).astype(np.float32)
    levels = TEXTURE_LEVELS[strength.texture]
    step = np.minimum((u[:, -cells:] * levels).astype(np.int64), levels - 1)
    texture = (2 * step / max(levels - 1, 1) - 1) * (levels > 1) * strength.texture_amplitude
    jitter = JITTER_STEPS[np.minimum((u[:, 4 : 4 + 2 * MAX_OBJECTS] * len(JITTER_STEPS)).astype(np.int64), len(JITTER_STEPS) - 1)]
    return {
        "grey": 0.5 + 0.15 * strength.grey * (2 * u[:, 0] - 1),
        "gradient": 0.12 * strength.gradient * (2 * u[:, 1:3] - 1),
        "brightness": 1 + 0.15 * strength.brightness * (2 * u[:, 3] - 1),
        "jitter": (jitter * strength.jitter).reshape(-1, MAX_OBJECTS, 2),
        "texture": texture.astype(np.float32).reshape(-1, PATCH_GRID, PATCH_GRID),
    }


def _coverage(shape: str, diameter: float, box: int, dx: float, dy: float, oversample: int = 8) -> np.ndarray:
    """Anti-aliased coverage [box, box] of one shape centred in a box, shifted by (dx, dy) pixels."""
    axis = (np.arange(box * oversample) + 0.5) / oversample - box / 2
    x, y = axis[None, :] - dx, axis[:, None] - dy
    r = diameter / 2
    if shape == "circle":
        inside = x**2 + y**2 <= r**2
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.96 * r
    elif shape == "triangle":
        inside = (y <= 0.88 * r) & (y >= -r) & (abs(x) <= (y + r) / (1.88 * r) * r)
    elif shape == "cross":
        inside = (np.minimum(abs(x), abs(y)) <= 0.30 * r) & (np.maximum(abs(x), abs(y)) <= r)
    else:
        inside = (x**2 + y**2 <= r**2) & (x**2 + y**2 >= (0.52 * r) ** 2)
    return inside.reshape(box, oversample, box, oversample).mean((1, 3), dtype=np.float64).astype(np.float32)


@lru_cache(maxsize=8)
def sprite_bank(image_size: int, jitter: float = 1.0) -> np.ndarray:
    """Coverage of every (shape, size, jitter y, jitter x): [5, 2, 3, 3, box, box], read-only."""
    scale, box = image_size / 32, box_size(image_size)
    steps = JITTER_STEPS * jitter * scale
    kinds = itertools.product(SHAPES, SIZES, steps, steps)
    bank = np.stack([_coverage(shape, _DIAMETER[size] * scale, box, dx, dy) for shape, size, dy, dx in kinds])
    bank = bank.reshape(len(SHAPES), len(SIZES), len(steps), len(steps), box, box)
    bank.setflags(write=False)
    return bank


def box_size(image_size: int) -> int:
    """Side of the square box, in pixels, that holds any object with its jitter; ValueError for a size that does not divide."""
    if image_size < 32 or image_size % 16:
        raise ValueError(f"image_size is {image_size}; expected a multiple of 16, at least 32")
    return 12 * image_size // 32


def cell_origin(cell: np.ndarray, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Top row and left column (pixels) of the box of each cell."""
    step = 10 * image_size // 32
    return cell // 3 * step, cell % 3 * step


def render(scenes: Scenes, nuisance: dict[str, np.ndarray], image_size: int = 32, jitter: float = 1.0) -> np.ndarray:
    """Images [n, 3, H, W], float32 in [0, 1].

    pixel = brightness * ((1 - alpha) * (grey + gradient . (x, y) + texture) + alpha * colour), alpha = coverage.
    """
    n, box = len(scenes), box_size(image_size)
    axis = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size * 2 - 1
    slope_x, slope_y = nuisance["gradient"][:, 0, None, None], nuisance["gradient"][:, 1, None, None]
    ground = nuisance["grey"][:, None, None] + slope_x * axis + slope_y * axis[:, None]
    pixels = image_size // PATCH_GRID
    ground = ground.reshape(n, PATCH_GRID, pixels, PATCH_GRID, pixels) + nuisance["texture"][:, :, None, :, None]
    images = np.repeat(ground.reshape(n, image_size, image_size, 1).astype(np.float32), 3, axis=3)
    bank = sprite_bank(image_size, float(jitter))
    steps = np.rint(nuisance["jitter"] / (0.5 * jitter) + 1).astype(int) if jitter else np.ones((n, MAX_OBJECTS, 2), dtype=int)
    span = np.arange(box)
    for k in range(MAX_OBJECTS):
        rows = np.flatnonzero(scenes.count > k)
        top, left = cell_origin(scenes.cell[rows, k], image_size)
        alpha = bank[scenes.shape[rows, k], scenes.size[rows, k], steps[rows, k, 1], steps[rows, k, 0]][..., None]
        where = rows[:, None, None], (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]
        patch = images[where]
        images[where] = patch + alpha * (RGB[scenes.colour[rows, k]][:, None, None, :] - patch)
    images *= nuisance["brightness"][:, None, None, None]
    return np.ascontiguousarray(np.clip(images, 0, 1).transpose(0, 3, 1, 2))


@dataclass(repr=False, eq=False)
class Shapes(torch.utils.data.Dataset):
    """Scenes with known factors, drawn on demand: nothing is stored, scene ``i`` depends only on (seed, split, i).

    Items are mappings ``id`` (stable string), ``images`` [3, H, W] float in [0, 1], ``texts`` (a caption), ``factors``
    (tensors: those of :class:`Scenes` and of :func:`sample_nuisance`). ``nuisance_seed`` (default: ``seed``) re-draws only what
    captions never mention; ``containing`` and ``without`` are (colour, shape) pairs of which every scene has at least one, or
    none; ``fixed`` holds scenes of your own, see :meth:`of`.

    Raises:
        ValueError: unknown split or texture, n < 1, image size not a multiple of 16 or below 32.

    Example:
        >>> data = Shapes("test", n=4, seed=0)
        >>> data[0]["images"].shape
        torch.Size([3, 32, 32])
    """

    split: str = "train"
    n: int = 1024
    seed: int = 0
    image_size: int = 32
    nuisance: Nuisance = Nuisance()
    nuisance_seed: int = None  # type: ignore[assignment]
    style: str = "mixed"
    containing: Pairs = ()
    without: Pairs = ()
    fixed: Scenes | None = None
    name: str = ""  # of scenes of your own; a part of their ids

    def __post_init__(self) -> None:
        from umm_kit.data.language import STYLES

        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; expected one of {SPLITS}")
        if self.n < 1:
            raise ValueError(f"n is {self.n}; expected at least one scene")
        if self.style not in ("mixed", *STYLES):
            raise ValueError(f"style is {self.style!r}; expected 'mixed' or one of {STYLES}")
        box_size(self.image_size)
        self.nuisance_seed = self.seed if self.nuisance_seed is None else self.nuisance_seed
        shows_any(np.empty((0, 1)), np.empty((0, 1)), (*self.containing, *self.without))
        self._ids = f"{self.name or self.split}-{self.seed}-{self.nuisance_seed}"
        settings = (self.image_size, self.nuisance, self.style, tuple(self.containing), tuple(self.without))
        if settings != (32, Nuisance(), "mixed", (), ()):  # other pictures or words need other ids
            self._ids += f"-{zlib.crc32(repr(settings).encode()):08x}"

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        settings = f"n={self.n}, seed={self.seed}, image_size={self.image_size}, texture={self.nuisance.texture!r}"
        chosen = "".join(f", {name}={pairs}" for name in ("containing", "without") if (pairs := getattr(self, name)))
        return f"Shapes({self.split!r}, {settings}{chosen})"

    def _index(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        index = np.asarray(indices, dtype=np.int64)
        bad = index[(index < -self.n) | (index >= self.n)]
        if len(bad):
            raise IndexError(f"scene {bad[0]} is outside this data set of {self.n}")
        return index % self.n

    def scenes(self, indices: Sequence[int] | np.ndarray) -> Scenes:
        """Said factors of the given scenes."""
        index = self._index(indices)
        if self.fixed is None:
            return sample_scenes(self.split, self.seed, index, self.containing, self.without)
        return Scenes(*(values[index] for values in self.fixed.factors().values()))

    def objects(self, i: int) -> list[SceneObject]:
        """Objects of scene i in raster order."""
        return self.scenes([i]).objects(0)

    def images(self, indices: Sequence[int] | np.ndarray, nuisance_seed: int | None = None) -> Tensor:
        """Images [n, 3, H, W]; another ``nuisance_seed`` renders the same captions under other nuisances."""
        return self._render(self.scenes(indices), self._index(indices), nuisance_seed)[0]

    def _render(self, scenes: Scenes, index: np.ndarray, seed: int | None = None) -> tuple[Tensor, dict[str, np.ndarray]]:
        values = sample_nuisance(self.nuisance, self.nuisance_seed if seed is None else seed, index)
        return torch.from_numpy(render(scenes, values, self.image_size, self.nuisance.jitter)), values

    def caption(self, i: int, style: str | None = None) -> str:
        """The caption of scene i, in its own style or a named one."""
        return self._caption(self.objects(i), self.draws([i], 1)[0, 0], style)

    def _caption(self, objects: list[SceneObject], u: float, style: str | None = None) -> str:
        from umm_kit.data.language import caption, pick_style

        style = style or self.style
        return caption(objects, pick_style(objects, u) if style == "mixed" else style)

    def draws(self, indices: Sequence[int] | np.ndarray, n: int, stream: int = 0) -> np.ndarray:
        """Uniform draws [len(indices), n] that belong to the scenes: for whatever must be reproducible (styles, questions)."""
        return hash_uniform(stream_key(self.seed, 5_000_011 + stream, np.asarray(indices, dtype=np.int64)), n)

    def questions(self, indices: Sequence[int], n: int) -> list[list[tuple[str, str]]]:
        """For each scene up to n pairs (question, answer) of different kinds, drawn for this scene."""
        from umm_kit.data.language import QUESTION_KINDS, question

        scenes, u = self.scenes(indices), self.draws(indices, len(QUESTION_KINDS) * 5, stream=1)
        out = []
        for row, draws in enumerate(u):
            objects, order = scenes.objects(row), np.argsort(draws[: len(QUESTION_KINDS)])
            rest = draws[len(QUESTION_KINDS) :].reshape(-1, 4)
            asked = (question(objects, QUESTION_KINDS[kind], rest[kind]) for kind in order)
            out.append([(q.text, q.answer) for q in asked if q][:n])
        return out

    def drawing_texts(self, indices: Sequence[int]) -> list[str]:
        """For each scene a text to draw it from: its caption, or a shorter prompt that is true of it."""
        from umm_kit.data.language import CATEGORIES, join, phrase, prompt

        scenes, styles, out = self.scenes(indices), self.draws(indices, 1)[:, 0], []
        for row, draws in enumerate(self.draws(indices, 3, stream=2)):
            objects = scenes.objects(row)
            short = [text for c in CATEGORIES if (text := prompt(objects, c))]
            short = short or [join([phrase(None, o.colour, o.shape) for o in objects])]
            out.append(self._caption(objects, styles[row]) if draws[0] < 0.5 else short[int(draws[1] * len(short))])
        return out

    def __getitem__(self, i: int) -> dict:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> list[dict]:
        """A batch at once: rendering is vectorised over scenes (the DataLoader calls this)."""
        index = self._index(indices)
        scenes, styles = self.scenes(index), self.draws(index, 1)[:, 0]
        images, nuisance = self._render(scenes, index)
        factors = {k: torch.from_numpy(np.asarray(v)) for k, v in (scenes.factors() | nuisance).items()}
        return [
            {
                "id": f"{self._ids}-{i}",
                "images": images[row],
                "texts": self._caption(scenes.objects(row), styles[row]),
                "factors": {k: v[row] for k, v in factors.items()},
            }
            for row, i in enumerate(index)
        ]

    def __iter__(self) -> Iterator[dict]:
        return (item for start in range(0, self.n, 256) for item in self.__getitems__(range(start, min(start + 256, self.n))))

    def with_nuisance(self, nuisance_seed: int | None = None, **strengths: float | str) -> Shapes:
        """The same scenes and captions under other nuisance draws or strengths."""
        seed = self.nuisance_seed if nuisance_seed is None else nuisance_seed
        return replace(self, nuisance_seed=seed, nuisance=replace(self.nuisance, **strengths))  # type: ignore[arg-type]

    @classmethod
    def of(cls, objects: Sequence[Sequence[SceneObject]], seed: int = 0, **options) -> Shapes:
        """Scenes of your own, from lists of :class:`SceneObject`."""
        scenes = Scenes.of(objects)
        told = zlib.crc32(b"".join(values.tobytes() for values in scenes.factors().values()))
        return cls("test", len(objects), seed, fixed=scenes, **{"name": f"own-{told:08x}", **options})

    @classmethod
    def anchors(cls, factor: str = "colour", n: int = 10, variants: int = 4, seed: int = 0, **options) -> Shapes:
        """Near-duplicates (DIVA Fig. 5): n scenes, each followed by variants that differ in one factor of one object.

        Item ``a * variants + v`` is variant v of anchor a; v = 0 is the anchor itself. ``factor`` is "colour", "shape",
        "cell", "size" (2 variants) or "nuisance" (same scene, other background, jitter and texture).
        """
        if factor not in ("nuisance", *WORDS):
            raise ValueError(f"factor is {factor!r}; expected 'nuisance' or one of {sorted(WORDS)}")
        if factor in WORDS and variants > len(WORDS[factor]):
            raise ValueError(f"{variants} variants of {factor} were asked for; it has {len(WORDS[factor])} values")
        base, scenes = cls("test", n, seed), []
        for a in range(n):
            first, *rest = base.objects(a)
            # Walk through the factor's other values, skipping cells that are taken.
            taken = {getattr(first, factor, ""), *(o.cell for o in rest)}
            other = [word for word in WORDS.get(factor, ()) if word not in taken]
            changed = [replace(first, **{factor: other[v % len(other)]}) if other else first for v in range(variants - 1)]
            scenes += [[o, *rest] for o in (first, *changed)]
        return cls.of(scenes, seed=seed, **options)
