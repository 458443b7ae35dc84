"""From pixels back to facts: reads pictures, scores captions and prompts, and gives a reason for every failure.

**How a picture is read.** The background is achromatic, the objects are not. In the plane orthogonal to grey a pixel is therefore
``brightness * alpha * colour``: background, gradient and texture drop out exactly. In each cell the chroma is fitted by least
squares with every sprite (shape, size, jitter, some blur), colour and brightness, and what the fits explain is subtracted. What
is left over says whether the reading can be trusted: a blob between two cells, a second colour or a missing half leave chroma
behind, and come back as an *unclear* thing. So does a thing that two descriptions fit about equally well. Only chroma is looked
at: a grey thing, or a tint fainter than about a third of an object's colour, is background to this oracle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from umm_kit.data import language, shapes
from umm_kit.data.language import NUMBERS, Parsed, Phrase, describe, join, parse, related
from umm_kit.data.shapes import CELLS, COLOURS, PATCH_GRID, RGB, SHAPES, SIZES, WORDS, SceneObject

#: Orthonormal basis of the plane orthogonal to grey, and the objects' colours in it.
_BASIS = np.array([[1, -1, 0], [1, 1, -2]], dtype=np.float32) / np.sqrt(np.array([[2], [6]], dtype=np.float32))
_HUES = RGB @ _BASIS.T
#: Brightness is 1 +- .15 by default and 1 +- .3 at most, and a tokenizer makes thin shapes paler. What has less than this share
#: of its colour, or more, is unclear; below ``_FAINTEST`` it is not fitted, so that all of its chroma is left over.
_BRIGHTNESS = (0.6, 1.4)
_FAINTEST = 0.3
#: Blur of the sprites (Gaussian sigma in pixels of 32): a tokenizer's reconstruction is softer than a render, not another shape.
_BLURS = (0.0, 0.6, 1.0)
# Both gates were chosen on validation scenes (seed 100, n = 1000) so that no render with Gaussian noise of .05 or blur of .8
# pixels comes back unclear. The least leftover gate that does so is .14 (of .12, .14, .16, .18): no single object with half of it
# missing, a second colour in half of it, or a place 3 or 5 pixels off the lattice then passes as clear, and 2 % of those with a
# third missing do (.4 % at .12, 10 % at .18), for two thirds of a shape may be another shape. The largest such margin gate is
# .008 (of 0, .002, .004, .006, .008, .012): it turns 7 of 10 misreadings of a 31 dB linear reconstruction into unclear things.
#: Mean chroma over 3 x 3 pixels of 32 that no fit explains (a whole object has .33 to .7): above it, something is unclear.
LEFTOVER_GATE = 0.14
#: Least lead of the best description over the next, as a share of the chroma energy of the best.
MARGIN_GATE = 0.008


@dataclass(frozen=True)
class Thing:
    """One thing seen in a picture.

    Attributes:
        cell: where the middle of it lies, in words.
        x, y: the middle of it, in pixels from the left and the top edge.
        object: the nearest description; None where nothing comes near. It holds only if the thing is clear.
        reason: why the thing is unclear, in words; empty if it is clear.
    """

    cell: str
    x: float
    y: float
    object: SceneObject | None
    reason: str = ""

    @property
    def clear(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Reading:
    """What one picture shows: all things, in raster order of their cells."""

    things: tuple[Thing, ...]

    @property
    def objects(self) -> list[SceneObject]:
        """The clear objects."""
        return [t.object for t in self.things if t.clear and t.object]

    @property
    def unclear(self) -> list[Thing]:
        return [t for t in self.things if not t.clear]

    def shows(self, objects: Sequence[SceneObject]) -> bool:
        """Whether the picture shows these objects, each in its cell, and nothing else, clear or unclear."""
        return not self.unclear and Counter(self.objects) == Counter(objects)


class Oracle:
    """Reads pictures of :class:`Shapes` worlds from their pixels alone.

    Args:
        image_size: side of the pictures in pixels, a multiple of 16, at least 32.
        jitter: strength of the jitter to expect (``Nuisance.jitter``).

    Example:
        >>> from umm_kit.data.shapes import Shapes
        >>> data = Shapes("test", n=4)
        >>> [r.objects for r in Oracle().read(data.images(range(4)))] == [data.objects(i) for i in range(4)]
        True
    """

    def __init__(self, image_size: int = 32, jitter: float = 1.0):
        self.image_size, self._box = image_size, shapes.box_size(image_size)
        sharp = shapes.sprite_bank(image_size, float(jitter))
        blurs = [ndimage.gaussian_filter(sharp, s * image_size / 32, axes=(-2, -1), mode="constant") for s in _BLURS]
        bank = np.stack(blurs, axis=2).reshape(len(SHAPES) * len(SIZES), -1, self._box, self._box)
        self._variants = bank.shape[1]  # sprites of one shape and size: blur x jitter y x jitter x
        axis = np.arange(self._box) + 0.5
        self._middle = (np.stack([bank.sum(-2) @ axis, bank.sum(-1) @ axis], -1) / bank.sum((-2, -1))[..., None]).reshape(-1, 2)
        self._sprites = bank.reshape(-1, self._box**2)
        self._top, self._left = shapes.cell_origin(np.arange(len(CELLS)), image_size)
        # Boxes of neighbouring cells overlap: the nearest cell owns a pixel, and a cell is fitted on the pixels it owns.
        pixel = np.arange(image_size) + 0.5
        nearest = abs(pixel[:, None] - (self._left[:3] + self._box / 2)).argmin(1)
        self._owner = nearest[:, None] * 3 + nearest
        self._owned = np.stack([self._owner[self._window(c)].ravel() == c for c in range(len(CELLS))]).astype(np.float32)

    def _window(self, cell: int) -> tuple[slice, slice]:
        top, left = self._top[cell], self._left[cell]
        return slice(top, top + self._box), slice(left, left + self._box)

    def read(self, images: Tensor) -> list[Reading]:
        """Readings of pictures [B, 3, H, W] in [0, 1].

        Raises:
            ValueError: another shape or size, NaN or infinite values.
        """
        size = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            shape = tuple(images.shape)
            raise ValueError(f"images are {shape}; this oracle reads [batch, 3, {size}, {size}] (Oracle(image_size=...) sets it)")
        pixels = images.detach().to("cpu", torch.float32).numpy()
        if not np.isfinite(pixels).all():
            raise ValueError("images hold NaN or infinite values; expected floats in [0, 1]")
        return [reading for start in range(0, len(pixels), 256) for reading in self._read(pixels[start : start + 256])]

    def _read(self, pixels: np.ndarray) -> list[Reading]:
        chroma = np.einsum("kc,nchw->nkhw", _BASIS, pixels)
        rows, cells, sprites, colours, scales, rivals, strange = self._fit(chroma)
        left = chroma.copy()
        for c in range(len(CELLS)):
            k = np.flatnonzero(cells == c)
            explained = (scales[k, None] * _HUES[colours[k]])[:, :, None] * self._sprites[sprites[k], None]
            top, side = self._window(c)
            left[rows[k], :, top, side] -= explained.reshape(-1, 2, self._box, self._box)

        things: list[dict[int, Thing]] = [{} for _ in pixels]
        found = np.stack([rows, cells, sprites, colours, rivals, strange], 1)
        for row, c, sprite, colour, rival, odd in found.tolist():
            seen = self._object(c, sprite // self._variants, colour)
            x, y = self._middle[sprite]
            reason = f"{describe(seen)} in a {seen.colour} that no object has" if odd else ""
            if rival >= 0:
                reason = f"either {describe(seen)} or {describe(self._object(c, *divmod(rival, len(COLOURS))))}"
            things[row][c] = Thing(CELLS[c], float(self._left[c] + x), float(self._top[c] + y), seen, reason)
        for row, c, x, y, hue in self._strangers(chroma, left):
            old = things[row].get(c)
            if old is None or old.object is None:
                things[row][c] = Thing(CELLS[c], x, y, None, f"something {hue or 'grey'} of no known shape, size or place")
            else:
                flaw = f"{hue} {'beyond its outline' if hue == old.object.colour else 'in it'}" if hue else "a part missing"
                things[row][c] = replace(old, reason=f"{describe(old.object)} with {flaw}")
        return [Reading(tuple(seen[c] for c in sorted(seen))) for seen in things]

    @staticmethod
    def _object(cell: int, kind: int, colour: int) -> SceneObject:
        return SceneObject(CELLS[cell], SHAPES[kind // len(SIZES)], COLOURS[colour], SIZES[kind % len(SIZES)])

    def _fit(self, chroma: np.ndarray) -> tuple[np.ndarray, ...]:
        """Best description of each cell that one explains at all: row, cell, sprite, colour, brightness, rival, strange.

        ``rival`` is another description (kind * colours + colour) that fits about as well, or -1; ``strange`` says that the
        brightness is out of bounds.

        min over sprite a, colour q and brightness s of ||X - s a q^T||^2 = ||X||^2 - 2 s (a^T X) q + s^2 ||a||^2 ||q||^2
        """
        n, cells = len(chroma), len(CELLS)
        patches = np.stack([chroma[:, :, *self._window(c)].reshape(n * 2, -1) * self._owned[c] for c in range(cells)])
        energy = np.square(patches).sum(-1).reshape(cells, n, 2).sum(-1)
        cell, row = np.nonzero(energy > 0.5 * (self.image_size / 32) ** 2)  # the least object has 1.3
        energy = energy[cell, row]
        dots = np.stack([p @ self._sprites.T for p in patches]).reshape(cells, n, 2, -1)[cell, row]
        norm = (self._owned @ np.square(self._sprites).T)[cell][..., None] * np.square(_HUES).sum(-1)
        along = dots.transpose(0, 2, 1) @ _HUES.T  # [things, sprites, colours]
        scale = (along / norm).clip(_FAINTEST, None)
        gain = scale * (2 * along - scale * norm)
        things, sprites, colours = gain.shape
        at, best = np.arange(things), gain.reshape(things, sprites * colours).argmax(1)
        sprite, colour = np.divmod(best, colours)
        top, scale, norm = (a[at, sprite, colour] for a in (gain, scale, norm))
        others = gain.reshape(things, sprites // self._variants, self._variants, colours).max(2)
        others[at, sprite // self._variants, colour] = -np.inf
        others = others.reshape(things, sprites // self._variants * colours)
        rival = others.argmax(1)
        rival = np.where(top - others[at, rival] < MARGIN_GATE * norm, rival, -1)
        keep = top > 0.5 * energy
        strange = (scale < _BRIGHTNESS[0]) | (scale > _BRIGHTNESS[1])
        return tuple(a[keep] for a in (row, cell, sprite, colour, scale, rival, strange))

    def _strangers(self, chroma: np.ndarray, left: np.ndarray) -> Iterator[tuple[int, int, float, float, str | None]]:
        """Patches of chroma that no fit explains, weakest first: row, cell, x, y and hue (None where it is grey)."""
        width = 2 * round(self.image_size / 32) + 1
        smooth = ndimage.uniform_filter(left, width, axes=(2, 3), mode="nearest")
        strength = np.sqrt(np.square(smooth).sum(1))
        labels, count = ndimage.label(strength > LEFTOVER_GATE, np.array([[[0] * 3] * 3, [[1] * 3] * 3, [[0] * 3] * 3]))
        row, y, x = np.nonzero(labels)
        label, weight = labels[row, y, x] - 1, strength[row, y, x]
        mass = np.bincount(label, weight, count)
        mean = lambda a: np.bincount(label, weight * a, count) / mass  # noqa: E731
        middle_x, middle_y = mean(x + 0.5), mean(y + 0.5)
        hue = np.stack([mean(chroma[row, k, y, x]) for k in range(2)], 1)
        nearest = (hue @ (_HUES / np.linalg.norm(_HUES, axis=1, keepdims=True)).T).argmax(1)
        grey = np.linalg.norm(hue, axis=1) < LEFTOVER_GATE
        image = np.zeros(count, dtype=int)
        image[label] = row
        for k in np.argsort(mass.round(3), kind="stable"):  # equal patches stay in raster order
            cell = self._owner[int(middle_y[k]), int(middle_x[k])]
            yield int(image[k]), int(cell), float(middle_x[k]), float(middle_y[k]), None if grey[k] else COLOURS[nearest[k]]


# --- words against objects ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionScore:
    """How a caption fits a scene: shares of its claims that are true and of the required facts it names, in [0, 1]."""

    precision: float
    recall: float
    exact: bool  # the very objects, each with its own size and colour, and every further claim true
    reasons: list[str]

    @property
    def f1(self) -> float:
        return 2 * self.precision * self.recall / total if (total := self.precision + self.recall) else 0.0


@dataclass(frozen=True)
class PromptScore:
    """Whether a picture shows what a prompt asks for; ``strict``: and nothing else, and nothing unclear."""

    ok: bool
    strict: bool
    reasons: list[str]


def facts(things: Sequence[SceneObject | Phrase]) -> Counter[tuple[str, ...]]:
    """The multiset of (shape,), (colour, shape) and (size, shape) that objects have or phrases with a noun claim."""
    out: Counter[tuple[str, ...]] = Counter()
    for t in things:
        if t.shape:
            out.update([(t.shape,), *((word, t.shape) for word in (t.colour, t.size) if word)])
    return out


def holds(parsed: Parsed, objects: Sequence[SceneObject], counted: bool = True) -> bool:
    """Whether distinct objects can be given to all phrases so that attributes and relations are true.

    With ``counted``, a number word ("two circles") also asks that no further object matches its phrase.
    """
    if counted and any(p.exact and sum(map(p.matches, objects)) != p.number for p in parsed.phrases):
        return False
    units = [i for i, p in enumerate(parsed.phrases) for _ in range(p.number)]  # each needs an object: the phrase it stands for

    def extend(given: list[int]) -> bool:
        """Whether the units beyond those that have the ``given`` objects can have some of the others."""
        if len(given) == len(units):
            return True
        i = units[len(given)]
        before = [(objects[k], r) for a, r, b in parsed.relations if b == i for k, j in zip(given, units, strict=False) if j == a]
        return any(
            k not in given and parsed.phrases[i].matches(o) and all(related(g, o, r) for g, r in before) and extend([*given, k])
            for k, o in enumerate(objects)
        )

    return len(units) <= len(objects) and extend([])


def _single(parsed: Parsed) -> list[Phrase]:
    """The phrases, each as often as its number says and then with number one."""
    return [replace(p, number=1) for p in parsed.phrases for _ in range(p.number)]


def _align(
    wanted: Sequence[Any], found: Sequence[Any], factors: Callable[[Any], Sequence[str]]
) -> tuple[list[tuple[Any, Any, list[tuple[Any, Any]]]], list[Any], list[Any]]:
    """Pairs (wanted, found, words that differ in some factor of ``wanted``), so few in all as can be; what has no partner."""

    def differ(w: Any, f: Any) -> list[tuple[Any, Any]]:
        return [(getattr(w, k), getattr(f, k)) for k in factors(w) if getattr(w, k) != getattr(f, k)]

    cost = np.array([[len(differ(w, f)) for f in found] for w in wanted]).reshape(len(wanted), len(found))
    rows, columns = (a.tolist() for a in linear_sum_assignment(cost))
    pairs = [(wanted[r], found[c], differ(wanted[r], found[c])) for r, c in zip(rows, columns, strict=True)]
    missed, extra = ([x for k, x in enumerate(all_) if k not in used] for all_, used in ((wanted, rows), (found, columns)))
    return pairs, missed, extra


def _mismatch(differences: list[tuple[Any, Any]], expected: str, found: str) -> str:
    """One sentence for one object: the single word that differs with its context, or both whole descriptions."""
    if len(differences) == 1:
        want, got = differences[0]
        return f"expected {want or 'nothing'}, found {got or 'nothing'} ({found})"
    return f"expected {expected}, found {found}"


def score_caption(text: str, objects: Sequence[SceneObject]) -> CaptionScore:
    """Compare the facts a caption claims with those of the scene, as SPICE does (Anderson et al. 2016).

    Required facts are those of :func:`facts`. Cells, relations and things without a noun are further claims: they count in
    precision only. Words that cannot be read count as one false claim, and what they might have said is not recalled.

    Example:
        >>> score_caption("a small orange circle", [SceneObject("top", "circle", "red", "small")]).reasons
        ['expected red, found orange (a small orange circle)']
    """
    parsed = parse(text)
    claimed, required = facts(said := _single(parsed)), facts(objects)
    recalled = common = (claimed & required).total()
    total = claimed.total() + len(parsed.unread)
    false, free = [], {o.cell: o for o in objects}
    for p in said:
        if p.cell:
            total += 1
            # A cell holds one object: a second claim to it is false.
            if (o := free.get(p.cell)) and p.matches(o):
                del free[p.cell]
                common += 1
            else:
                false.append(f"nothing at the {p.cell} is {describe(p)}")
    for p in parsed.phrases:
        if not p.shape:
            total += p.number
            common += (true := min(p.number, sum(map(p.matches, objects))))
            false += [f"found {p}, expected {NUMBERS[true]} of them"] if true < p.number else []
    for a, relation, b in parsed.relations:
        total += 1
        pair = Parsed([parsed.phrases[a], parsed.phrases[b]], [(0, relation, 1)])
        if holds(pair, objects, counted=False):
            common += 1
        else:
            false.append(f"it is not true that {pair.phrases[0]} is {relation} {pair.phrases[1]}")

    pairs, missed, extra = _align(objects, [p for p in said if p.shape], lambda o: ("size", "colour", "shape"))
    reasons = [f"could not read {words!r}" for words in parsed.unread]
    reasons += [_mismatch(differences, describe(o), describe(p)) for o, p, differences in pairs if differences]
    reasons += [f"expected {describe(o)}, found nothing" for o in missed]
    reasons += [f"expected nothing more, found {describe(p)}" for p in extra]
    reasons += false
    same = Counter(map(describe, said)) == Counter(map(describe, objects))
    exact = parsed.ok and same and holds(parsed, objects, counted=False)
    if same and not exact and not reasons:
        reasons.append("each claim is true, but not all of them of different objects")
    return CaptionScore(common / total if total else 0.0, recalled / required.total() if required else 1.0, exact, reasons)


def _shows(parsed: Parsed, seen: Reading) -> bool:
    """Whether all phrases hold of clear objects; a number is not established while something is unclear."""
    return holds(parsed, seen.objects) and not (seen.unclear and any(p.exact for p in parsed.phrases))


def score_prompt(text: str, seen: Reading | Sequence[SceneObject]) -> PromptScore:
    """Whether a picture, or a list of objects, shows what a prompt asks for, as GenEval does (Ghosh et al. 2023).

    Each phrase needs clear objects of its own; "two circles" needs exactly two, "a circle" at least one. A number is never
    found right while anything in the picture is unclear.

    Raises:
        ValueError: the prompt cannot be read.

    Example:
        >>> score_prompt("two circles", [SceneObject("top", "circle", "red", "small")]).reasons
        ['expected two circles, found one']
    """
    parsed = parse(text)
    if not parsed.ok:
        stuck = " ".join(parsed.unread)
        raise ValueError(f"prompt {text!r} cannot be read from {stuck!r} on; expected words as in 'two red circles and a cross'")
    if not isinstance(seen, Reading):
        seen = Reading(tuple(Thing(o.cell, 0.0, 0.0, o) for o in seen))
    ok, objects, reasons = _shows(parsed, seen), seen.objects, []
    pairs, missed, extra = _align(_single(parsed), objects, lambda p: [k for k in WORDS if getattr(p, k)])
    if not ok:
        for p, o, differences in pairs:
            if differences:
                reasons.append(_mismatch(differences, str(p), describe(o, placed=True)))
        reasons += [f"expected {p}, found nothing" for p in missed if not p.exact]
        for p in parsed.phrases:
            if p.exact and (n := sum(map(p.matches, objects))) != p.number:
                reasons.append(f"expected {_exactly(p)}, found {NUMBERS[n] if n < len(NUMBERS) else n}")
        for a, relation, b in parsed.relations:
            if not reasons:
                one, other = parsed.phrases[a], parsed.phrases[b]
                at = [join([o.cell for o in objects if p.matches(o)]) for p in (one, other)]
                asked = f"{_exactly(one)} {relation} {_exactly(other)}"
                reasons.append(f"expected {asked}, found them at the {at[0]} and at the {at[1]}")
        if not reasons and not seen.unclear:
            reasons.append("expected different objects for all phrases, found none that satisfy them at once")
    else:
        reasons += [f"expected nothing more, found {describe(o, placed=True)}" for o in extra]
    reasons += [f"unclear at the {t.cell}: {t.reason}" for t in seen.unclear]
    return PromptScore(ok, ok and not extra and not seen.unclear, reasons)


# --- how far the oracle can be trusted ---------------------------------------------------------------------------------


def _exactly(p: Phrase) -> str:
    """The phrase in words; unlike ``str``, "one circle" stays a number word."""
    words = str(p)
    return "one " + words.split(" ", 1)[1] if p.exact and p.number == 1 else words


def _compose(phrases: Sequence[Phrase], relations: Sequence[tuple[int, str, int]]) -> str:
    """The text that says this; relations hold between neighbours."""
    linked = {b: relation for _, relation, b in relations}
    groups: list[str] = []
    for i, p in enumerate(phrases):
        if i in linked:
            groups[-1] += f" {linked[i]} {_exactly(p)}"
        else:
            groups.append(_exactly(p))
    return join(groups)


_EDITED = ("colour", "shape", "size", "number", "relation", "cell")


def edits(text: str) -> dict[str, list[str]]:
    """All texts that differ from a prompt in one attribute, by attribute: what a checker must not mistake for it.

    Only what is said is changed, and numbers from one to four. Whether an edit is false of a scene must be judged.

    Example:
        >>> edits("a circle above a cross")["relation"]
        ['a circle left of a cross', 'a circle right of a cross', 'a circle below a cross']
    """
    parsed = parse(text)
    if not parsed.ok:
        raise ValueError(f"prompt {text!r} cannot be read from {' '.join(parsed.unread)!r} on, so it cannot be edited")
    out: dict[str, list[str]] = {k: [] for k in _EDITED}
    for i, p in enumerate(parsed.phrases):
        changed: list[tuple[str, Any]] = [(k, word) for k in WORDS if getattr(p, k) for word in WORDS[k] if word != getattr(p, k)]
        changed += [("number", n) for n in range(1, len(NUMBERS)) if n != p.number]
        for kind, value in changed:
            q = replace(p, **{kind: value, "exact": p.exact or kind == "number"})
            out[kind].append(_compose([*parsed.phrases[:i], q, *parsed.phrases[i + 1 :]], parsed.relations))
    for i, (a, now, b) in enumerate(parsed.relations):
        for other in language.RELATIONS:
            if other != now:
                relations = [*parsed.relations[:i], (a, other, b), *parsed.relations[i + 1 :]]
                out["relation"].append(_compose(parsed.phrases, relations))
    return out


def true_texts(objects: Sequence[SceneObject]) -> list[str]:
    """Every caption and prompt of this world's styles and categories that is true of a scene."""
    prompts = (language.prompt(objects, c) for c in language.CATEGORIES)
    return list(dict.fromkeys([*(language.caption(objects, s) for s in language.STYLES), *(p for p in prompts if p)]))


def audit(
    images: Tensor, objects: Sequence[Sequence[SceneObject]], texts: Sequence[Sequence[str]] | None = None
) -> dict[str, float]:
    """How honest the oracle is on pictures whose objects are known: clean, corrupted or reconstructed ones.

    Args:
        images: [n, 3, H, W].
        objects: the true objects of each.
        texts: texts that are true of each, :func:`true_texts` by default.
    Returns:
        All but the numbers ``n*`` are shares in [0, 1]. Of pictures: ``exact`` (read right as a whole), ``unclear`` (at least one
        unclear thing), ``silent`` (misread with nothing unclear; exact + unclear + silent = 1). Of true objects: ``missing``
        (no clear object in that cell), and wrong ``shape``, ``colour``, ``size`` of those seen. Of texts: ``true_accept``. Of
        one-attribute edits that are false of the true objects: ``false_accept``, the share that :func:`score_prompt` finds ok on
        the reading, in all and as ``false_accept_<attribute>`` with its ``n_edits_<attribute>``.
    """
    texts = [true_texts(o) for o in objects] if texts is None else texts
    if not len(images) == len(objects) == len(texts) or not len(images):
        got = f"{len(images)} images, {len(objects)} lists of objects and {len(texts)} of texts"
        raise ValueError(f"{got} came; expected the same number of each, at least one")
    readings = Oracle(images.shape[-1]).read(images)
    count: Counter[str] = Counter()
    for reading, truth, true in zip(readings, objects, texts, strict=True):
        at, shown = {o.cell: o for o in reading.objects}, reading.shows(truth)
        count.update(n=1, exact=shown, unclear=bool(reading.unclear), silent=not shown and not reading.unclear)
        for o in truth:
            other = at.get(o.cell)
            count.update(n_objects=1, missing=other is None, n_seen=other is not None)
            count.update({k: other is not None and getattr(o, k) != getattr(other, k) for k in ("shape", "colour", "size")})
        for text in true:
            count.update(n_texts=1, true_accept=_shows(parse(text), reading))
            for kind, changed in edits(text).items():
                false = [p for p in map(parse, changed) if not holds(p, truth)]
                accepted = 0 if shown else sum(_shows(p, reading) for p in false)  # the same objects give the same verdict
                for key in ("", f"_{kind}"):
                    count.update({f"n_edits{key}": len(false), f"false_accept{key}": accepted})
    shares = {"n": ["exact", "unclear", "silent"], "n_objects": ["missing"], "n_seen": ["shape", "colour", "size"]}
    shares |= {"n_texts": ["true_accept"], "n_edits": ["false_accept"]}
    shares |= {f"n_edits_{kind}": [f"false_accept_{kind}"] for kind in _EDITED}
    out: dict[str, float] = {}
    for n, names in shares.items():
        of_none = float("nan") if n.startswith("n_edits") else 0.0
        out |= {n: count[n]} | {name: count[name] / count[n] if count[n] else of_none for name in names}
    return out


CORRUPTIONS = ("noise", "blur", "missing")


def corrupt(images: Tensor, kind: str, strength: float, generator: torch.Generator | None = None) -> Tensor:
    """Damaged copies of images [B, 3, H, W] in [0, 1].

    ``kind`` is "noise" (Gaussian; strength = sigma in units of intensity), "blur" (Gaussian; sigma in pixels) or "missing"
    (strength = the chance of each patch of the 8 x 8 grid to become mid-grey). Draws happen on the CPU.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"corruption is {kind!r}; expected one of {CORRUPTIONS}")
    if strength < 0 or (kind == "missing" and strength > 1):
        raise ValueError(f"strength of {kind} is {strength}; expected at least 0{', at most 1' if kind == 'missing' else ''}")
    if kind == "noise":
        return (images + strength * torch.randn(images.shape, generator=generator).to(images)).clamp(0, 1)
    if kind == "blur":
        blurred = ndimage.gaussian_filter(images.detach().cpu().numpy(), strength, axes=(2, 3), mode="nearest")
        return torch.from_numpy(blurred).to(images)
    gone = torch.rand(len(images), 1, PATCH_GRID, PATCH_GRID, generator=generator) < strength
    gone = gone.repeat_interleave(images.shape[2] // PATCH_GRID, 2).repeat_interleave(images.shape[3] // PATCH_GRID, 3)
    return torch.where(gone.to(images.device), 0.5, images)
