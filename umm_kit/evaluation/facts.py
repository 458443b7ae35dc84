"""What a text says and what a picture shows, and which facts of an origin are still there.

A *fact* is what an origin says of one of its things (shape, colour, size, and the place or the relation to another thing where
a text says it). Things of the origin are given to things of the later content so that as many facts as can be hold. A later
content that says nothing about a fact has *lost* it; one that says something else *denies* it: a contradiction. What the origin
left unsaid is no fact, so filling it in later is no error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from umm_kit.data.language import Phrase, parse, related
from umm_kit.data.shapes import SceneObject

#: The categories that recall and survival count, and the attribute of a thing behind each (a relation has none).
FACTORS = {"shape": "shape", "colour": "colour", "size": "size", "position": "cell"}
COUNTED = (*FACTORS, "relation")
#: Scored beside them: the thing with its very colour and shape (what existence questions ask for), and the number of all things.
#: They are not counted, for they follow from the others or, like a number, survive when everything else is replaced.
CATEGORIES = (*COUNTED, "object", "count")
KEPT, SILENT, DENIED = 1, 0, -1
#: Of what can be kept equally well, shapes are kept first, then colours, sizes and places; and silence before a contradiction.
_COST = {"shape": 1.003, "colour": 1.002, "size": 1.001, "cell": 1.0}
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
#: Other items' origins that each content is compared with, for the floor.
N_SHIFTS = 8


@dataclass(frozen=True)
class Content:
    """What a text says or a picture shows: things (what is unsaid of them is None) and relations, by position."""

    things: tuple[Phrase, ...]
    relations: tuple[tuple[int, str, int], ...] = ()


def said(text: str) -> Content | None:
    """What a text says; None where any of it cannot be read.

    Example:
        >>> [str(thing) for thing in said("two red circles").things]
        ['a red circle', 'a red circle']
    """
    parsed = parse(text)
    if not parsed.ok:
        return None
    units = [i for i, p in enumerate(parsed.phrases) for _ in range(p.number)]
    things = tuple(replace(parsed.phrases[i], number=1, exact=False) for i in units)
    pairs = [
        (x, r, y) for a, r, b in parsed.relations for x, i in enumerate(units) for y, j in enumerate(units) if (i, j) == (a, b)
    ]
    return Content(things, tuple(pairs))


def seen(objects: Sequence[SceneObject], placed: bool = True) -> Content | None:
    """What a picture with these objects shows, with their places or without; None where there are none."""
    things = (Phrase(1, o.size, o.colour, o.shape, o.cell if placed else None) for o in objects)
    return Content(tuple(things)) if objects else None


@lru_cache(maxsize=2**16)
def facts(origin: Content) -> tuple[tuple[str, int], ...]:
    """(category, which thing or relation) of everything an origin says; its number of things is the fact ("count", 0)."""
    told = [(category, k) for k, t in enumerate(origin.things) for category, name in FACTORS.items() if getattr(t, name)]
    told += [("relation", k) for k in range(len(origin.relations))]
    told += [("object", k) for k, t in enumerate(origin.things) if t.shape]
    return (*told, ("count", 0))


@lru_cache(maxsize=2**16)
def _cost(wanted: Phrase, found: Phrase) -> float:
    """How many facts of a thing are not kept, about."""
    differ = [name for name in _COST if getattr(wanted, name) not in (None, getattr(found, name))]
    return sum(_COST[name] - 0.01 * (getattr(found, name) is None) for name in differ)


def _partners(origin: Content, state: Content) -> dict[int, Phrase]:
    """The thing of the state that each thing of the origin is given, so that as many facts as can be are kept."""
    table = np.array([[_cost(w, f) for f in state.things] for w in origin.things])
    return {int(i): state.things[j] for i, j in zip(*linear_sum_assignment(table), strict=True)}


def _relation(origin: Content, state: Content, partners: Mapping[int, Phrase], k: int) -> int:
    """Whether it holds, by place or by what the state says, of any things that keep as much of the origin as their partners."""
    a, relation, b = origin.relations[k]
    if not {a, b} <= set(partners):
        return SILENT
    bare = {i: replace(origin.things[i], cell=None) for i in (a, b)}
    fit = {i: [x for x, t in enumerate(state.things) if _cost(w, t) <= _cost(w, partners[i]) + 1e-9] for i, w in bare.items()}
    verdict = SILENT
    for x, y in ((x, y) for x in fit[a] for y in fit[b] if x != y):
        one, other = state.things[x].cell, state.things[y].cell
        told = {r for i, r, j in state.relations if (i, j) == (x, y)} | {
            _INVERSE[r] for i, r, j in state.relations if (i, j) == (y, x)
        }
        if one and other:
            told |= {r for r in _INVERSE if related(SceneObject(one, "", "", ""), SceneObject(other, "", "", ""), r)}
        if relation in told:
            return KEPT
        if (one and other) or _INVERSE[relation] in told:
            verdict = DENIED
    return verdict


@lru_cache(maxsize=2**17)
def agreement(origin: Content, state: Content | None) -> tuple[int, ...]:
    """For every fact of the origin, in the order of :func:`facts`: 1 kept, 0 lost in silence, -1 denied by the state.

    A lost state (None) keeps nothing and denies nothing.

    Example:
        >>> agreement(said("a red circle"), said("a small blue circle"))  # shape, colour, the red circle, one thing
        (1, -1, -1, 1)
    """
    if state is None:
        return (SILENT,) * len(facts(origin))
    partners = _partners(origin, state)

    def attribute(k: int, name: str) -> int:
        wanted, found = getattr(origin.things[k], name), getattr(partners.get(k), name, None)
        return KEPT if wanted in (None, found) else SILENT if found is None else DENIED

    def status(category: str, k: int) -> int:
        if category in FACTORS:
            return attribute(k, FACTORS[category])
        if category == "object":
            return min(attribute(k, "shape"), attribute(k, "colour"))
        if category == "count":
            return KEPT if len(origin.things) == len(state.things) else DENIED
        return _relation(origin, state, partners, k)

    return tuple(status(*fact) for fact in facts(origin))


def shifts(n: int) -> list[int]:
    """A few fixed rotations of n items, the same in every run: item i is compared with item i + shift."""
    return sorted({int(s) for s in np.linspace(1, n - 1, min(N_SHIFTS, n - 1)).round()})


@dataclass
class FactTable:
    """The facts of all origins in one row, item after item."""

    origins: list[Content]

    @cached_property
    def owner(self) -> np.ndarray:
        """[facts], the item that each fact belongs to."""
        return np.repeat(np.arange(len(self.origins)), [len(facts(o)) for o in self.origins])

    @cached_property
    def category(self) -> np.ndarray:
        """[facts], their categories in words."""
        return np.array([category for o in self.origins for category, _ in facts(o)])

    def describe(self, row: int) -> str:
        """A fact in words, such as "colour of the circle: red"."""
        origin, before = self.origins[self.owner[row]], int((self.owner[:row] == self.owner[row]).sum())
        category, k = facts(origin)[before]
        if category == "count":
            return f"things: {len(origin.things)}"
        if category == "relation":
            a, relation, b = origin.relations[k]
            return f"{origin.things[a].shape or 'thing'} {relation} {origin.things[b].shape or 'thing'}"
        thing = origin.things[k]
        if category == "object":
            return f"object: {' '.join(filter(None, (thing.colour, thing.shape)))}"
        if category == "shape":
            return f"thing {k + 1}: {thing.shape}"
        return f"{category} of the {thing.shape or 'thing'}: {getattr(thing, FACTORS[category])}"

    @property
    def counted(self) -> np.ndarray:
        """[facts] bool, those that recall counts."""
        return np.isin(self.category, COUNTED)

    def status(self, states: Sequence[Content | None]) -> np.ndarray:
        """[facts] of 1 (kept), 0 (lost) or -1 (denied) by each origin's own state."""
        return np.array([s for pair in zip(self.origins, states, strict=True) for s in agreement(*pair)], dtype=np.int8)

    def floor(self, states: Sequence[Content | None]) -> np.ndarray:
        """[facts], how often each fact is found in the states of *other* items: what is kept without any memory."""
        rounds = [self.status([*states[-s:], *states[:-s]]) == KEPT for s in shifts(len(states))]
        return np.mean(rounds, axis=0)

    def per_item(self, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Means [..., items] of values [..., facts] over the chosen facts of each item; items without any are left out."""
        _, row = np.unique(self.owner[chosen], return_inverse=True)
        share = 1 / np.bincount(row)
        weights = csr_array((share[row], (row, np.arange(len(row)))), shape=(len(share), len(row)))
        flat = np.asarray(values, dtype=np.float64)[..., chosen].reshape(-1, len(row))
        return (weights @ flat.T).T.reshape(*np.shape(values)[:-1], len(share))
