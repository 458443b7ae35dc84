"""Facts: what words and pictures claim, and which claims of an origin a later content keeps, loses or denies."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umm_kit.data.language import STYLES, caption
from umm_kit.data.shapes import SceneObject, Shapes
from umm_kit.evaluation.facts import CATEGORIES, DENIED, KEPT, SILENT, Content, FactTable, agreement, facts, said, seen, shifts

DATA = Shapes("test", n=64, seed=1)


def verdict(origin, state):
    """Category -> statuses, of two texts."""
    out = {}
    a, b = said(origin), said(state)
    for (category, _), status in zip(facts(a), agreement(a, b), strict=True):
        out.setdefault(category, []).append(status)
    return out


def test_said_by_hand():
    content = said("two small red circles at the top and a cross left of a ring")
    circle = ("circle", "red", "small", "top")
    expected = [circle, circle, ("cross", None, None, None), ("ring", None, None, None)]
    assert [(t.shape, t.colour, t.size, t.cell) for t in content.things] == expected
    assert content.relations == ((2, "left of", 3),)
    assert [c for c, _ in facts(said("a red circle"))] == ["shape", "colour", "object", "count"]
    assert said("a red circle and a banana") is None and said("") is None and seen([]) is None


@pytest.mark.parametrize(
    ("origin", "state", "expected"),
    [
        ("a red circle", "a small red circle", {"shape": [1], "colour": [1], "object": [1], "count": [1]}),  # filled in: no error
        ("a red circle", "a blue circle", {"shape": [1], "colour": [-1], "object": [-1], "count": [1]}),
        ("a red circle", "a circle", {"shape": [1], "colour": [0], "object": [0], "count": [1]}),  # silence is no contradiction
        ("a circle and a square", "a square", {"shape": [0, 1], "object": [0, 1], "count": [-1]}),
        ("a circle", "a circle and a square", {"shape": [1], "object": [1], "count": [-1]}),
        ("two circles", "a circle and a circle", {"shape": [1, 1], "object": [1, 1], "count": [1]}),
        ("a circle at the top", "a circle at the left", {"shape": [1], "position": [-1], "object": [1], "count": [1]}),
        # colours swapped between things: the shapes are kept and the colours denied
        ("a red circle and a blue ring", "a blue circle and a red ring",
         {"shape": [1, 1], "colour": [-1, -1], "object": [-1, -1], "count": [1]}),
    ],
)  # fmt: skip
def test_agreement_by_hand(origin, state, expected):
    assert verdict(origin, state) == expected


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("a circle left of a ring", KEPT),
        ("a ring right of a circle", KEPT),
        ("a circle at the left and a ring at the top", KEPT),  # left of asks for a smaller column only
        ("a ring left of a circle", DENIED),
        ("a circle at the top and a ring at the bottom", DENIED),  # the same column
        ("a circle above a ring", SILENT),
        ("a circle and a ring", SILENT),
        ("a circle", SILENT),
    ],
)
def test_relations_hold_by_word_or_by_place(state, expected):
    assert verdict("a circle left of a ring", state)["relation"] == [expected]


def test_equal_things_may_stand_either_way_round():
    there = seen([SceneObject("left", "circle", "red", "small"), SceneObject("right", "circle", "red", "small")])
    for text in ("a red circle left of a red circle", "a red circle right of a red circle"):
        origin = said(text)
        assert dict(zip([c for c, _ in facts(origin)], agreement(origin, there), strict=True))["relation"] == KEPT


def test_a_relation_holds_if_it_does_for_any_thing_that_fits_as_well():
    """Whatever the order of things: a circle stands left of the ring, though another circle may be the first one's partner."""
    there = [("right", "circle", "red"), ("centre", "ring", "red"), ("left", "circle", "blue")]
    # a red circle is the right one: the blue one does not fit as well
    for text, expected in (("a circle left of a ring", KEPT), ("a red circle left of a ring", DENIED)):
        origin = said(text)
        k = [category for category, _ in facts(origin)].index("relation")
        for way in itertools.permutations([SceneObject(*o, "small") for o in there]):
            assert agreement(origin, seen(way))[k] == expected
    for words in itertools.permutations(("a red circle right of a ring", "a blue circle left of a ring")):
        assert verdict("a circle left of a ring", " and ".join(words))["relation"] == [KEPT]


def test_a_lost_state_keeps_and_denies_nothing():
    origin = said("a red circle and a blue square")
    assert set(agreement(origin, None)) == {SILENT} and len(agreement(origin, None)) == len(facts(origin))


@given(st.integers(0, 63), st.integers(0, 63), st.sampled_from(STYLES))
@settings(max_examples=30)
def test_as_many_facts_as_can_be_are_kept(i, j, style):
    """Against every way of giving things to things; and a content always agrees with itself and with its picture."""
    origin, state = said(caption(DATA.objects(i), style)), seen(DATA.objects(j))
    assert set(agreement(origin, origin)) == {KEPT}
    assert set(agreement(origin, seen(DATA.objects(i)))) == {KEPT}
    names = ("shape", "colour", "size", "cell")
    same = lambda o, t: sum(getattr(o, n) is not None and getattr(o, n) == getattr(t, n) for n in names)  # noqa: E731
    pairs = [[same(o, t) for t in state.things] for o in origin.things]
    slots = [*range(len(state.things)), *[None] * len(origin.things)]
    ways = itertools.permutations(slots, len(origin.things))
    best = max(sum(row[k] for row, k in zip(pairs, way, strict=True) if k is not None) for way in ways)
    told = zip(facts(origin), agreement(origin, state), strict=True)
    assert sum(status == KEPT for (c, _), status in told if c in ("shape", "colour", "size", "position")) == best


def test_order_of_things_does_not_matter():
    origin, objects = said("a small red circle, a large blue ring and a small green square"), DATA.objects(3)
    there = [agreement(origin, seen(list(way))) for way in itertools.permutations(objects)]
    assert len({sum(s == KEPT for s in status) for status in there}) == 1


def test_table_against_a_naive_reference():
    table = FactTable([said(DATA.caption(i)) for i in range(12)])
    states = [seen(DATA.objects(i + 1)) if i % 3 else None for i in range(12)]
    expected = [s for o, state in zip(table.origins, states, strict=True) for s in agreement(o, state)]
    assert table.status(states).tolist() == expected and set(table.category) <= set(CATEGORIES)
    floor, k = table.floor(states), 0
    for i, origin in enumerate(table.origins):
        kept = np.mean([[s == KEPT for s in agreement(origin, states[(i - shift) % 12])] for shift in shifts(12)], axis=0)
        assert floor[k : k + len(kept)] == pytest.approx(kept)
        shares = table.per_item(floor, table.counted)
        counted = [v for v, (c, _) in zip(kept, facts(origin), strict=True) if c not in ("object", "count")]
        assert shares[i] == pytest.approx(np.mean(counted))
        k += len(kept)
    assert k == len(floor)


def test_equal_states_agree_as_much_with_others_as_with_their_own():
    """The floor of a constant model is its recall, whatever it says."""
    table = FactTable([said(DATA.caption(i)) for i in range(30)])
    states = [said("a small red circle and a large blue ring")] * 30
    kept = table.per_item((table.status(states) == KEPT).astype(float), table.counted)
    assert table.per_item(table.floor(states), table.counted) == pytest.approx(kept)


def test_items_without_a_kind_of_fact_are_left_out():
    table = FactTable([said("a circle"), said("a red ring"), said("a blue circle and a red cross")])
    values = np.arange(len(table.owner), dtype=float)
    shares = table.per_item(values, table.category == "colour")
    at = np.flatnonzero(table.category == "colour")
    assert shares == pytest.approx([at[0], (at[1] + at[2]) / 2])
    assert Content(()) != said("a circle")


def test_shifts_never_compare_an_item_with_itself():
    assert shifts(2) == [1] and shifts(3) == [1, 2]
    assert len(shifts(500)) == 8 and 0 < min(shifts(500)) and max(shifts(500)) < 500


def test_facts_in_words():
    table = FactTable([said("a large red circle left of a blue square"), said("two green rings")])
    words = [table.describe(row) for row in range(len(table.owner))]
    assert {"thing 1: circle", "colour of the circle: red", "size of the circle: large", "circle left of square"} <= set(words)
    assert {"object: green ring", "things: 2"} <= set(words) and len(words) == len(table.category)
