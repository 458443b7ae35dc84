"""From objects to words and back: nothing is lost, and every answer, negative and prompt is what it claims to be."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umm_kit.data.language import (
    CATEGORIES,
    NEGATIVES,
    NUMBERS,
    QUESTION_KINDS,
    RELATIONS,
    STYLES,
    Phrase,
    article,
    caption,
    join,
    main_relation,
    parse,
    phrase,
    pick_style,
    plural,
    prompts,
    question,
    related,
    vocabulary_corpus,
)
from umm_kit.data.oracle import score_caption, score_prompt, true_texts
from umm_kit.data.shapes import (
    CELLS,
    COLOUR_WEIGHTS,
    COLOURS,
    HELD_OUT,
    SHAPE_WEIGHTS,
    SHAPES,
    SIZES,
    SPLITS,
    SceneObject,
    Shapes,
)


@st.composite
def scenes(draw, least=1, most=4):
    cells = draw(st.lists(st.sampled_from(CELLS), min_size=least, max_size=most, unique=True))
    words = st.tuples(st.sampled_from(SHAPES), st.sampled_from(COLOURS), st.sampled_from(SIZES))
    return [SceneObject(c, *draw(words)) for c in sorted(cells, key=CELLS.index)]


def test_hand_written_captions():
    a, b = SceneObject("top left", "cross", "orange", "small"), SceneObject("right", "circle", "red", "large")
    assert caption([a, b], "list") == "a small orange cross and a large red circle"
    assert caption([a, b], "placed") == "a small orange cross at the top left and a large red circle at the right"
    assert caption([a, b], "relation") == "a small orange cross left of a large red circle"
    twins = [SceneObject("top", "cross", "blue", "small"), b, SceneObject("bottom", "cross", "blue", "small")]
    assert caption(twins, "count") == "two small blue crosses and a large red circle"
    assert phrase(None, "orange", "cross") == "an orange cross" and phrase(None, None, None, 3) == "three things"
    assert (article("orange"), plural("cross"), plural("circle")) == ("an", "crosses", "circles")
    assert join(["a", "b", "c"]) == "a, b and c"
    with pytest.raises(ValueError, match="style is 'haiku'"):
        caption([a], "haiku")


@given(scenes(), st.sampled_from(STYLES))
def test_captions_parse_back_to_their_objects(objects, style):
    read = parse(caption(objects, style))
    assert read.ok
    said = Counter()
    for p in read.phrases:
        said[p.size, p.colour, p.shape] += p.number
    assert said == Counter((o.size, o.colour, o.shape) for o in objects)
    if style == "placed":
        assert [p.cell for p in read.phrases] == [o.cell for o in objects]
    else:
        assert not any(p.cell for p in read.phrases)
    if style == "relation" and len(objects) == 2 and main_relation(*objects):
        assert read.relations == [(0, main_relation(*objects), 1)]
    else:
        assert not read.relations


@given(scenes(), st.floats(0, 1, exclude_max=True))
def test_picked_style_is_possible(objects, u):
    style = pick_style(objects, u)
    assert style in STYLES
    if style in ("count", "relation"):
        assert caption(objects, style) != caption(objects, "list")


def test_every_style_comes_up():
    data = Shapes("train", n=400)
    texts = [item["texts"] for item in data]
    assert {"two", "at", "above", "left"} <= {w for t in texts for w in t.split()}
    assert all(parse(t).ok for t in texts)


@pytest.mark.parametrize(
    ("text", "unread"),
    [
        ("a small red elephant", "a small red elephant"),
        ("a red small circle", "a red small circle"),
        ("a red circle and", " and"),
        ("a red circle beside a cross", " beside a cross"),
        ("a red circle a cross", " a cross"),
        ("", ""),
        ("five circles", "five circles"),
        ("a circlet", "a circlet"),
    ],
)
def test_what_cannot_be_read_is_kept(text, unread):
    read = parse(text)
    assert not read.ok and read.unread == [unread]


def test_parse_tolerates_case_spaces_and_a_full_stop():
    assert parse(" A  small RED circle , and two crosses. ").phrases == [
        Phrase(1, "small", "red", "circle"),
        Phrase(2, shape="cross", exact=True),
    ]
    chain = parse("a circle left of a cross above a thing")
    assert chain.relations == [(0, "left of", 1), (1, "above", 2)] and chain.phrases[2].shape is None


def test_relations():
    a, b = SceneObject("top left", "circle", "red", "small"), SceneObject("right", "cross", "red", "small")
    assert main_relation(a, b) == "left of" and main_relation(b, a) == "right of"
    assert related(a, b, "left of") and related(a, b, "above") and not related(a, b, "below")
    assert main_relation(a, SceneObject("centre", "cross", "red", "small")) is None


@given(scenes(2, 2))
def test_relations_are_antisymmetric(objects):
    a, b = objects
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    for relation in RELATIONS:
        assert related(a, b, relation) == related(b, a, opposite[relation])
        assert not (related(a, b, relation) and related(b, a, relation))
    if relation := main_relation(a, b):
        assert related(a, b, relation) and main_relation(b, a) == opposite[relation]


def singular(word: str) -> str:
    return {"crosses": "cross"}.get(word, word.removesuffix("s") if word != "cross" else word)


def naive_answer(text: str, objects: list[SceneObject]) -> str:
    """Answer a question by its words alone, from a table of (row, column) and words; knows nothing of how it was asked."""
    table = [(*divmod(CELLS.index(o.cell), 3), o.colour, o.shape) for o in objects]
    words = text.rstrip("?").split()
    pick = lambda colour, shape: [t for t in table if t[2] == colour and t[3] == shape]  # noqa: E731
    if words[:2] == ["is", "there"]:
        return "yes" if pick(*words[3:5]) else "no"
    if words[0] == "how":
        found = table
        for word in words[2:-2]:
            if singular(word) in SHAPES:
                found = [t for t in found if t[3] == singular(word)]
            elif word in COLOURS:
                found = [t for t in found if t[2] == word]
        return NUMBERS[len(found)]
    if words[:2] == ["what", "colour"]:
        ((*_, colour, _),) = [t for t in table if t[3] == words[-1]]
        return colour
    if words[:2] == ["what", "shape"]:
        ((*_, shape),) = [t for t in table if t[2] == words[-2]]
        return shape
    if "from" in words:
        ((y, x, *_),), ((v, u, *_),) = pick(*words[3:5]), pick(*words[7:9])
        dy, dx = y - v, x - u
        assert abs(dx) != abs(dy)
        return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
    ((y, x, *_),) = pick(*words[3:5])
    return CELLS[3 * y + x]


def scene_questions(kind: str, n: int = 600, negative: str | None = None):
    data = Shapes("test", n=n, seed=2)
    objects, draws = data.scenes(range(n)), data.draws(range(n), 4)
    for i in range(n):
        if q := question(objects.objects(i), kind, draws[i], negative):
            yield objects.objects(i), q


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_answers_agree_with_a_naive_reader(kind):
    asked = list(scene_questions(kind))
    assert len(asked) > 200
    for objects, q in asked:
        assert q.kind == kind and q.answer == naive_answer(q.text, objects), (q, objects)
    assert len({q.answer for _, q in asked}) >= {"existence": 2, "count": 4, "relation": 4, "position": 9}.get(kind, 5)


def test_existence_is_balanced():
    answers = Counter(q.answer for _, q in scene_questions("existence", 2000))
    assert abs(answers["yes"] / 2000 - 0.5) < 0.05


@pytest.mark.parametrize("negative", NEGATIVES)
def test_negatives_are_absent_and_of_their_kind(negative):
    weight = {(c, s): COLOUR_WEIGHTS[i] * SHAPE_WEIGHTS[j] for i, c in enumerate(COLOURS) for j, s in enumerate(SHAPES)}
    asked = list(scene_questions("existence", negative=negative))
    assert len(asked) == 600
    for objects, q in asked:
        colour, shape = re.fullmatch(r"is there an? (\w+) (\w+)\?", q.text).groups()
        present = {(o.colour, o.shape) for o in objects}
        assert q.answer == "no" and q.negative == negative
        assert (colour, shape) not in present and (colour, shape) not in HELD_OUT
        if negative == "adversarial":
            # Both words are on show, on different objects; where that is impossible at least one of them is.
            both = {(c, s) for c, _ in present for _, s in present} - present - set(HELD_OUT)
            assert (colour, shape) in both if both else colour in {c for c, _ in present} or shape in {s for _, s in present}
        if negative == "popular":
            more_popular = [p for p in weight if weight[p] > weight[colour, shape] and p not in present and p not in HELD_OUT]
            assert len(more_popular) < 5
    assert len({q.text for _, q in asked}) > 5


def test_questions_that_do_not_apply():
    twins = [SceneObject(c, "circle", "red", "small") for c in ("top", "left")]
    u = np.full(4, 0.3)
    assert all(question(twins, kind, u) is None for kind in ("colour", "shape", "position", "relation"))
    assert question(twins, "count", u).answer == "two"
    with pytest.raises(ValueError, match="question kind is 'taste'"):
        question(twins, "taste", u)


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_true_of_their_scene(split):
    found = prompts(split, n_per_category=20, seed=3)
    assert Counter(p.category for p in found) == {c: 20 for c in CATEGORIES}
    assert len({p.id for p in found}) == len(found)
    data = Shapes(split, n=10**9, seed=3)
    for p in found:
        objects = data.objects(int(p.id.rsplit("-", 1)[1]))
        assert score_prompt(p.text, objects).strict, (p, objects)


def test_prompts_say_what_their_category_asks():
    for p in prompts("test", 30):
        read = parse(p.text)
        number = sum(q.number for q in read.phrases)
        colours, shapes = [q.colour for q in read.phrases], [q.shape for q in read.phrases]
        assert not any(q.size or q.cell for q in read.phrases) and None not in shapes
        assert len(read.relations) == (p.category == "position")
        assert (None in colours) == (p.category not in ("colors", "color_attribution"))
        assert number == 1 if p.category in ("single_object", "colors") else number >= 2
        if p.category == "counting":
            assert len(read.phrases) == 1 and read.phrases[0].exact
        elif number == 2:
            assert len(set(shapes)) == 2
    with pytest.raises(ValueError, match="unknown prompt categories"):
        prompts("test", 2, categories=["poetry"])


@given(scenes())
def test_everything_said_of_a_scene_is_true_of_it(objects):
    for text in true_texts(objects):
        assert score_prompt(text, objects).strict, text
    for style in STYLES:
        score = score_caption(caption(objects, style), objects)
        assert (score.precision, score.recall, score.f1, score.exact, score.reasons) == (1, 1, 1, True, [])


def test_the_corpus_holds_every_word():
    corpus = {w for text in vocabulary_corpus() for w in re.findall(r"\w+", text)}
    for kind in QUESTION_KINDS:
        for _, q in scene_questions(kind, 200):
            assert set(re.findall(r"\w+", f"{q.text} {q.answer}")) <= corpus
    for item in Shapes("train", n=300):
        assert set(re.findall(r"\w+", item["texts"])) <= corpus
