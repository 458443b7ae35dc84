"""What a model says about images: captions read back into facts, and answers to questions."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from umm_kit.data.imagetext import Digits, digit_word
from umm_kit.data.language import NEGATIVES, QUESTION_KINDS, Question, parse, question
from umm_kit.data.oracle import score_caption
from umm_kit.data.shapes import Shapes
from umm_kit.models.base import Decoding

NUISANCE_DRAWS = 3
#: Streams of Shapes.draws that belong to questions, so that each kind is drawn apart from the others.
_STREAM = 100

T = TypeVar("T")


@dataclass
class Examiner:
    """Puts images and texts to a model in batches and keeps the outcome of every item.

    Attributes:
        items: metric -> id -> outcome, a number or a (numerator, denominator) pair.
        strata: metric -> id -> stratum, for means of means.
        chance: metric -> what a model reaches that ignores the image (or the prompt).
        notes: what could not be measured, and why.
    """

    model: Any
    decoding: Decoding = field(default_factory=Decoding)
    batch_size: int = 64
    seed: int = 0
    progress: bool = True
    n_questions: int = 512
    n_prompts: int = 64
    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    strata: dict[str, dict[str, str]] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, metric: str, key: str, value: float | tuple[float, float], stratum: str | None = None) -> None:
        """Record one outcome; an id may occur once per metric."""
        outcomes = self.items.setdefault(metric, {})
        if key in outcomes:
            raise ValueError(f"the id {key!r} occurs twice in {metric}; outcomes are paired by id, so each must be unique")
        outcomes[key] = value
        if stratum is not None:
            self.strata.setdefault(metric, {})[key] = stratum

    def batches(self, rows: Sequence[T], label: str) -> Iterator[Sequence[T]]:
        """Slices of ``rows``, with a progress bar once it has taken two seconds."""
        with tqdm(total=len(rows), desc=label, delay=2, leave=False, disable=not self.progress) as bar:
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]
                bar.update(min(self.batch_size, len(rows) - start))

    def _generator(self, key: str) -> torch.Generator:
        # Seeded by what is asked, not by how much was asked before.
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {key}".encode()))

    def understand(self, images: torch.Tensor, prompts: Sequence[str] | None, key: str) -> list[str]:
        said = self.model.understand(images, prompts, decoding=self.decoding, generator=self._generator(key))
        return [" ".join(text.lower().strip().rstrip(".").split()) for text in said]

    def generate(self, texts: Sequence[str], key: str, **given: torch.Tensor) -> torch.Tensor:
        return self.model.generate(texts, **given, decoding=self.decoding, generator=self._generator(key))


def majority(answers: Sequence[Any]) -> float:
    """Share of the most frequent answer: what is reached by always giving it."""
    return max(Counter(answers).values()) / len(answers)


# --- captions of scenes ------------------------------------------------------------------------------------------------


def _facts(text: str) -> Counter | None:
    """The objects a caption names, as a multiset of (size, colour, shape); None if it cannot be read."""
    parsed = parse(text)
    if not parsed.ok:
        return None
    facts: Counter = Counter()
    for p in parsed.phrases:
        facts[p.size, p.colour, p.shape] += p.number
    return facts


def scene_captions(exam: Examiner, data: Shapes, suffix: str = "") -> None:
    """Captions against the scene's facts: caption_f1, _precision, _recall (means over captions), _exact, _unreadable.

    Words that cannot be read are a false claim, and what they might have said is not recalled. Chance is the caption of
    the next scene: what the form of the captions is worth without the image.
    """
    keys, captions, truth = [], [], []
    for rows in exam.batches(range(len(data)), f"captions{suffix}"):
        batch = data.__getitems__(rows)
        keys += [item["id"] for item in batch]
        captions += exam.understand(torch.stack([item["images"] for item in batch]), None, batch[0]["id"])
        scenes = data.scenes(rows)
        truth += [scenes.objects(k) for k in range(len(scenes))]
    scores = [score_caption(c, objects) for c, objects in zip(captions, truth, strict=True)]
    for key, score, said in zip(keys, scores, captions, strict=True):
        exam.add(f"caption_f1{suffix}", key, score.f1)
        if not suffix:
            exam.add("caption_precision", key, score.precision)
            exam.add("caption_recall", key, score.recall)
            exam.add("caption_exact", key, float(score.exact))
            exam.add("caption_unreadable", key, float(not parse(said).ok))
    other = [score_caption(c, objects) for c, objects in zip(captions, truth[1:] + truth[:1], strict=True)]
    exam.chance[f"caption_f1{suffix}"] = sum(s.f1 for s in other) / len(other)
    if not suffix:
        exam.chance["caption_exact"] = sum(s.exact for s in other) / len(other)
        _nuisance_agreement(exam, data, keys[: exam.n_questions], captions[: exam.n_questions])


def _nuisance_agreement(exam: Examiner, data: Shapes, keys: Sequence[str], captions: Sequence[str]) -> None:
    """Share of pairs of nuisance draws of one scene whose captions name the same objects (the words may differ).

    Two captions of which one cannot be read do not agree. A model that says the same of every image agrees with itself
    perfectly: read it beside caption_f1.
    """
    facts = [[_facts(text)] for text in captions]
    for draw in range(1, NUISANCE_DRAWS):
        for rows in exam.batches(range(len(keys)), f"captions, nuisance draw {draw + 1}"):
            images = data.images(rows, nuisance_seed=data.nuisance_seed + 1_000_003 * draw)
            for row, text in zip(rows, exam.understand(images, None, f"{keys[rows[0]]} draw {draw}"), strict=True):
                facts[row].append(_facts(text))
    for key, seen in zip(keys, facts, strict=True):
        same = [a is not None and a == b for a, b in combinations(seen, 2)]
        exam.add("caption_nuisance_agreement", key, sum(same) / len(same))


def heldout_captions(exam: Examiner, data: Shapes) -> None:
    """caption_f1_heldout: scenes with a colour-shape pair that no other split contains."""
    if data.split == "heldout":
        exam.notes.append("caption_f1_heldout: the data are the held-out split itself, see caption_f1")
        return
    n, kept = min(len(data), exam.n_questions), (data.seed, data.image_size, data.nuisance, data.nuisance_seed)
    scene_captions(exam, Shapes("heldout", n, *kept), "_heldout")


# --- questions about scenes --------------------------------------------------------------------------------------------


def scene_questions(exam: Examiner, data: Shapes) -> None:
    """One question of each kind about each scene where one applies; chance is the most frequent answer."""
    rows = range(min(len(data), exam.n_questions))
    _existence(exam, data, rows)
    for stream, kind in enumerate(QUESTION_KINDS, _STREAM + len(NEGATIVES) + 1):
        if kind != "existence":
            answers = []
            for key, asked, said in _ask(exam, data, rows, kind, stream):
                exam.add(f"qa_{kind}", key, float(said == asked.answer))
                answers.append(asked.answer)
            if answers:
                exam.chance[f"qa_{kind}"] = majority(answers)


def _ask(
    exam: Examiner, data: Shapes, rows: range, kind: str, stream: int, present: bool = False, negative: str | None = None
) -> Iterator[tuple[str, Question, str]]:
    """(scene id, question, answer given) for every scene that has a question of this kind."""
    for chunk in exam.batches(rows, f"questions: {kind} {negative or ''}"):
        batch, scenes, draws = data.__getitems__(chunk), data.scenes(chunk), data.draws(chunk, 4, stream)
        if present:
            draws[:, 0] = 0.0  # below one half: question() asks for something that is there
        asked = [question(scenes.objects(k), kind, draws[k], negative) for k in range(len(batch))]
        kept = [(item, q) for item, q in zip(batch, asked, strict=True) if q is not None]
        if kept:
            key = f"{kept[0][0]['id']} {kind} {negative}"
            said = exam.understand(torch.stack([item["images"] for item, _ in kept]), [q.text for _, q in kept], key)
            yield from ((item["id"], q, text) for (item, q), text in zip(kept, said, strict=True))


def _existence(exam: Examiner, data: Shapes, rows: range) -> None:
    """POPE (Li et al. 2023): each scene is asked for one thing that is there and for one absent thing of each kind.

    The item is the scene: its accuracy is (present right + absent right) / 2, so that yes and no weigh the same. F1 is of
    "yes": 2 tp / (2 tp + fp + fn), where any wrong answer about an absent thing counts as a false positive. qa_existence
    and qa_existence_f1 average the three kinds of absent things scene by scene; the yes rate tells a bias from blindness.
    """
    there = {key: said for key, _, said in _ask(exam, data, rows, "existence", _STREAM, present=True)}
    absent = {
        how: {key: said for key, _, said in _ask(exam, data, rows, "existence", stream, negative=how)}
        for stream, how in enumerate(NEGATIVES, _STREAM + 1)
    }
    for name, kinds in (("qa_existence", NEGATIVES), *((f"qa_existence_{how}", (how,)) for how in NEGATIVES)):
        for key, said in there.items():
            answers = [absent[how][key] for how in kinds]
            right, false = float(said == "yes"), sum(a != "no" for a in answers) / len(kinds)
            exam.add(name, key, (right + 1 - false) / 2)
            exam.add(f"{name}_f1", key, (2 * right, 2 * right + false + 1 - right))
            exam.add(f"{name}_yes_rate", key, (right + sum(a == "yes" for a in answers) / len(kinds)) / 2)
        exam.chance |= {name: 0.5, f"{name}_f1": 2 / 3}  # always "yes"


# --- other image-text pairs --------------------------------------------------------------------------------------------


def pair_captions(exam: Examiner, data: Any) -> None:
    """Against the given caption: caption_exact, caption_token_f1 (micro, over words), and for digits caption_digit."""
    for rows in exam.batches(range(len(data)), "captions"):
        batch = [data[i] for i in rows]
        texts = exam.understand(torch.stack([item["images"] for item in batch]), None, batch[0]["id"])
        for item, said in zip(batch, texts, strict=True):
            wanted = " ".join(item["texts"].lower().strip().rstrip(".").split())
            if isinstance(data, Digits):
                exam.add("caption_digit", item["id"], float(digit_word(said) == int(item["factors"]["digit"])))
            exam.add("caption_exact", item["id"], float(said == wanted))
            common = (Counter(said.split()) & Counter(wanted.split())).total()
            exam.add("caption_token_f1", item["id"], (2 * common, len(said.split()) + len(wanted.split())))
    if isinstance(data, Digits):
        exam.chance["caption_digit"] = majority([int(data[i]["factors"]["digit"]) for i in range(len(data))])


def digit_questions(exam: Examiner, data: Digits) -> None:
    """qa_digit, qa_thickness, qa_slant: every question about each scan; a scan's outcome is its share of right answers."""
    right: dict[tuple[str, str], list[float]] = {}
    answers: dict[str, list[str]] = {}
    asked = [(i, q) for i in range(min(len(data), exam.n_questions)) for q in data.question(i)]
    for chunk in exam.batches(asked, "questions"):
        batch = [data[i] for i, _ in chunk]
        said = exam.understand(torch.stack([item["images"] for item in batch]), [q.text for _, q in chunk], batch[0]["id"])
        for item, (_, q), text in zip(batch, chunk, said, strict=True):
            right.setdefault((f"qa_{q.kind}", item["id"]), []).append(float(text == q.answer))
            answers.setdefault(f"qa_{q.kind}", []).append(q.answer)
    for (metric, key), outcomes in right.items():
        exam.add(metric, key, sum(outcomes) / len(outcomes))
    exam.chance |= {metric: majority(given) for metric, given in answers.items()}
