"""What can be said about a scene: captions, questions, prompts, and the way back from words to facts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

from umm_kit.data.shapes import CELLS, COLOUR_WEIGHTS, COLOURS, HELD_OUT, SHAPE_WEIGHTS, SHAPES, SIZES, Pairs, SceneObject, Shapes

NUMBERS = ("zero", "one", "two", "three", "four")
STYLES = ("list", "count", "relation", "placed")
RELATIONS = ("left of", "right of", "above", "below")
QUESTION_KINDS = ("existence", "colour", "shape", "count", "relation", "position")
NEGATIVES = ("random", "popular", "adversarial")
#: GenEval's six categories (Ghosh et al. 2023).
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attribution")


# --- from objects to words ---------------------------------------------------------------------------------------------


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def phrase(size: str | None, colour: str | None, shape: str | None, number: int = 1, cell: str | None = None) -> str:
    """One noun phrase, as in "two small red circles" or "an orange cross at the top left"."""
    noun = shape or "thing"
    words = [w for w in (size, colour) if w] + [noun if number == 1 else plural(noun)]
    text = f"{article(words[0]) if number == 1 else NUMBERS[number]} {' '.join(words)}"
    return f"{text} at the {cell}" if cell else text


def describe(o: SceneObject | Phrase, *, placed: bool = False) -> str:
    """One thing in words, as in "a small red circle", whatever its number; ``placed`` adds the cell."""
    return phrase(o.size, o.colour, o.shape, cell=o.cell if placed else None)


def join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def related(a: SceneObject, b: SceneObject, relation: str) -> bool:
    """Whether a stands in ``relation`` to b; "left of" asks for a smaller column only, whatever the rows."""
    if relation in ("left of", "right of"):
        return a.column < b.column if relation == "left of" else a.column > b.column
    return a.row < b.row if relation == "above" else a.row > b.row


def main_relation(a: SceneObject, b: SceneObject) -> str | None:
    """The relation along the longer axis of the displacement; None on an exact diagonal."""
    dx, dy = a.column - b.column, a.row - b.row
    if abs(dx) == abs(dy):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def caption(objects: Sequence[SceneObject], style: str = "list") -> str:
    """Describe every object with shape, colour and size; "placed" adds the cell, "relation" (two objects) how they stand."""
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; expected one of {STYLES}")
    if style == "count":
        return join([phrase(*kind, number=n) for kind, n in Counter((o.size, o.colour, o.shape) for o in objects).items()])
    if style == "relation" and len(objects) == 2 and (relation := main_relation(*objects)):
        return f"{describe(objects[0])} {relation} {describe(objects[1])}"
    return join([describe(o, placed=style == "placed") for o in objects])


def pick_style(objects: Sequence[SceneObject], u: float) -> str:
    """A style that says something about this scene that the plain list does not, by a uniform draw."""
    options = ["list", "placed"]
    if len({(o.size, o.colour, o.shape) for o in objects}) < len(objects):
        options.append("count")
    if len(objects) == 2 and main_relation(*objects):
        options.append("relation")
    return options[int(u * len(options))]


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    negative: str | None = None  # for existence questions answered "no": how the absent object was chosen


def _unique(objects: Sequence[SceneObject], *factors: str) -> list[SceneObject]:
    """The objects that these factors tell from all others."""
    key = attrgetter(*factors)
    seen = Counter(map(key, objects))
    return [o for o in objects if seen[key(o)] == 1]


def question(objects: Sequence[SceneObject], kind: str, u: np.ndarray, negative: str | None = None) -> Question | None:
    """A question of one kind about a scene, chosen by uniform draws ``u`` (at least 4); None where none applies.

    Existence questions are balanced unless ``negative`` names how an absent object is chosen (as in POPE, Li et al.
    2023): "random" among all absent, "popular" among the frequent, "adversarial" among those whose colour or shape is
    on show, both where possible.
    """
    pick = lambda options, k: options[min(int(u[k] * len(options)), len(options) - 1)]  # noqa: E731
    if kind == "existence":
        present = sorted({(o.colour, o.shape) for o in objects})
        if negative is None and u[0] < 0.5:
            colour, shape = pick(present, 1)
            return Question(kind, f"is there {phrase(None, colour, shape)}?", "yes")
        how = negative or pick(NEGATIVES, 2)
        absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present and (c, s) not in HELD_OUT]
        if how == "popular":
            weight = {(c, s): COLOUR_WEIGHTS[COLOURS.index(c)] * SHAPE_WEIGHTS[SHAPES.index(s)] for c, s in absent}
            absent = sorted(absent, key=lambda pair: -weight[pair])[:5]
        elif how == "adversarial":
            colours, shapes = {c for c, _ in present}, {s for _, s in present}
            both = [(c, s) for c, s in absent if c in colours and s in shapes]
            absent = both or [(c, s) for c, s in absent if c in colours or s in shapes]
        colour, shape = pick(absent, 1)
        return Question(kind, f"is there {phrase(None, colour, shape)}?", "no", how)
    if kind in ("colour", "shape", "position"):
        told_by, asks = {
            "colour": (["shape"], "what colour is the {o.shape}?"),
            "shape": (["colour"], "what shape is the {o.colour} thing?"),
            "position": (["colour", "shape"], "where is the {o.colour} {o.shape}?"),
        }[kind]
        if not (options := _unique(objects, *told_by)):
            return None
        o = pick(options, 1)
        return Question(kind, asks.format(o=o), o.cell if kind == "position" else getattr(o, kind))
    if kind == "count":
        if u[0] < 0.5:
            shape = pick(sorted({o.shape for o in objects}), 1)
            noun, n = plural(shape), sum(o.shape == shape for o in objects)
        elif u[0] < 0.85:
            colour = pick(sorted({o.colour for o in objects}), 1)
            noun, n = f"{colour} things", sum(o.colour == colour for o in objects)
        else:
            noun, n = "things", len(objects)
        return Question(kind, f"how many {noun} are there?", NUMBERS[n])
    if kind == "relation":
        unique = _unique(objects, "colour", "shape")
        pairs = [(a, b) for a in unique for b in unique if a is not b and main_relation(a, b)]
        if not pairs:
            return None
        a, b = pick(pairs, 1)
        text = f"where is the {a.colour} {a.shape} from the {b.colour} {b.shape}?"
        return Question(kind, text, str(main_relation(a, b)).removesuffix(" of"))
    raise ValueError(f"question kind is {kind!r}; expected one of {QUESTION_KINDS}")


def prompt(objects: Sequence[SceneObject], category: str) -> str | None:
    """A GenEval-style prompt that is true of the scene and names all of its objects; None where the category does not fit."""
    n, a, b = len(objects), objects[0], objects[-1]
    if category == "single_object" and n == 1:
        return phrase(None, None, a.shape)
    if category == "colors" and n == 1:
        return phrase(None, a.colour, a.shape)
    if category == "counting" and n > 1 and len({o.shape for o in objects}) == 1:
        return phrase(None, None, a.shape, number=n)
    if n != 2:
        return None
    if category == "two_object" and a.shape != b.shape:
        return join([phrase(None, None, o.shape) for o in objects])
    if category == "color_attribution" and a.shape != b.shape and a.colour != b.colour:
        return join([phrase(None, o.colour, o.shape) for o in objects])
    if category == "position" and a.shape != b.shape and (relation := main_relation(a, b)):
        return f"{phrase(None, None, a.shape)} {relation} {phrase(None, None, b.shape)}"
    return None


@dataclass(frozen=True)
class Prompt:
    id: str
    category: str
    text: str


def prompts(
    split: str = "test",
    n_per_category: int = 64,
    seed: int = 0,
    categories: Sequence[str] = CATEGORIES,
    containing: Pairs = (),
    without: Pairs = (),
) -> list[Prompt]:
    """Prompts of GenEval's six categories, each true of a scene of the split (and of many other pictures).

    ``containing`` and ``without`` choose the scenes, as for :class:`Shapes`.
    """
    unknown = sorted(set(categories) - set(CATEGORIES))
    if unknown:
        raise ValueError(f"unknown prompt categories {unknown}; expected some of {CATEGORIES}")
    found: dict[str, list[Prompt]] = {c: [] for c in categories}
    data = Shapes(split, n=10**9, seed=seed, containing=containing, without=without)
    for start in range(0, 10**6, 1024):
        scenes = data.scenes(np.arange(start, start + 1024))
        for row in range(1024):
            objects = scenes.objects(row)
            for category in categories:
                if len(found[category]) < n_per_category and (text := prompt(objects, category)):
                    found[category].append(Prompt(f"{split}-{seed}-{category}-{start + row}", category, text))
        if all(len(f) == n_per_category for f in found.values()):
            return [p for c in categories for p in found[c]]
    short = {category: len(f) for category, f in found.items() if len(f) < n_per_category}
    raise ValueError(f"the {split!r} split has fewer than {n_per_category} prompts of these categories: {short}")


# --- from words to facts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phrase:
    """A parsed noun phrase: attributes that were not said are None; ``exact`` when a number word was used."""

    number: int = 1
    size: str | None = None
    colour: str | None = None
    shape: str | None = None
    cell: str | None = None
    exact: bool = False

    def matches(self, o: SceneObject) -> bool:
        return all(getattr(self, name) in (None, getattr(o, name)) for name in ("shape", "colour", "size", "cell"))

    def __str__(self) -> str:
        return phrase(self.size, self.colour, self.shape, self.number, self.cell)


@dataclass
class Parsed:
    """What a text claims: noun phrases, relations between them (by position), and words that could not be read."""

    phrases: list[Phrase] = field(default_factory=list)
    relations: list[tuple[int, str, int]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.phrases) and not self.unread


_PLURAL = {plural(noun): noun for noun in (*SHAPES, "thing")}
_CELL = "|".join(sorted(CELLS, key=len, reverse=True))
_NOUN = "|".join((*SHAPES, "thing", *_PLURAL))
_PHRASE = re.compile(
    rf"(?P<number>an|a|{'|'.join(NUMBERS[1:])}) (?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<colour>{'|'.join(COLOURS)}) )?"
    rf"(?P<shape>{_NOUN})\b(?: at the (?P<cell>{_CELL})\b)?"
)
_LINK = re.compile(rf"\s*(?P<link>,? and|,|{'|'.join(RELATIONS)})\s*")


def parse(text: str) -> Parsed:
    """Read a caption or prompt back into facts.

    Unreadable text is kept in ``unread``, never dropped in silence: a caption that does not parse is a failed caption.

    Example:
        >>> parse("a small red circle left of a blue square").relations
        [(0, 'left of', 1)]
    """
    rest, out, relation = " ".join(text.lower().strip().rstrip(".").split()), Parsed(), None
    rest = re.sub(r"\s+,", ",", rest)
    while found := _PHRASE.match(rest):
        number, noun = found["number"], _PLURAL.get(found["shape"], found["shape"])
        exact, shape = number in NUMBERS, None if noun == "thing" else noun
        n = NUMBERS.index(number) if exact else 1
        out.phrases.append(Phrase(n, found["size"], found["colour"], shape, found["cell"], exact))
        if relation:
            out.relations.append((len(out.phrases) - 2, relation, len(out.phrases) - 1))
        rest = rest[found.end() :]
        if not rest:
            return out
        link = _LINK.match(rest)
        if not link or link.end() == len(rest):
            break
        relation, rest = (link["link"] if link["link"] in RELATIONS else None), rest[link.end() :]
    out.unread.append(rest or text)
    return out


def vocabulary_corpus() -> Iterator[str]:
    """Sentences that hold every word of this world, for training a text tokenizer."""
    for shape in SHAPES:
        for colour in COLOURS:
            for number in range(1, 5):
                yield phrase("small", colour, shape, number, CELLS[0])
    yield from (phrase("large", COLOURS[0], None, cell=c) for c in CELLS)
    yield from (phrase(None, colour, None) for colour in COLOURS)  # "an" orange thing
    yield "describe, and: is there a thing? what colour is the thing? what shape are things? where from? how many?"
    yield from (" ".join(RELATIONS), "left right above below yes no", " ".join(NUMBERS))
