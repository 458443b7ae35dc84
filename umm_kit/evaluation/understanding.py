"""What a model says about images: captions read back into facts, and answers to questions."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from umm_kit.data.digits import Digits, digit_word
from umm_kit.data.language import NEGATIVES, QUESTION_KINDS, Question, describe, parse, question
from umm_kit.data.oracle import score_caption
from umm_kit.data.shapes import Shapes
from umm_kit.models.base import Decoding

NUISANCE_DRAWS = 3
#: Streams of Shapes.draws that belong to questions, so that each kind is drawn apart from the others.
_STREAM = 100


@dataclass
class Examiner:
    """Puts images and texts to a model in batches and keeps the outcome of every item, in the fields of :class:`Evaluation`."""

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

    def rows(self, data: Any) -> range:
        """The items that are asked about; captions are asked of all."""
        return range(min(len(data), self.n_questions))

    def batches(self, n: int, label: str) -> Iterator[slice]:
        """n items in slices, with a progress bar once it has taken two seconds."""
        with tqdm(total=n, desc=label, delay=2, leave=False, disable=not self.progress) as bar:
            for start in range(0, n, self.batch_size):
                yield slice(start, min(start + self.batch_size, n))
                bar.update(min(self.batch_size, n - start))

    def _options(self, key: str) -> dict[str, Any]:
        # Seeded by what is asked, not by how much was asked before.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {key}".encode()))
        return {"decoding": self.decoding, "generator": generator}

    def understand(
        self, data: Any, rows: Sequence[int], label: str, prompts: Sequence[str] | None = None, about: str = ""
    ) -> list[tuple[dict[str, Any], str]]:
        """What the model says of these items, captions or answers to a prompt for each: (item without its image, words)."""
        out: list[tuple[dict[str, Any], str]] = []
        for part in self.batches(len(rows), label):
            batch = [dict(item) for item in items_of(data, rows[part])]
            images = torch.stack([item.pop("images") for item in batch])
            said = self.model.understand(images, prompts and prompts[part], **self._options(batch[0]["id"] + about))
            out += zip(batch, map(_plain, said), strict=True)
        return out

    def generate(self, texts: Sequence[str], ids: Sequence[str], label: str, about: str = "", **given: Tensor) -> Tensor:
        """Pictures [n, 3, H, W] of these texts on the CPU; ``given``: images and masks of as many, to fill in."""
        drawn = []
        for part in self.batches(len(texts), label):
            some = {name: tensor[part] for name, tensor in given.items()}
            drawn.append(self.model.generate(texts[part], **some, **self._options(ids[part.start] + about)))
        return torch.cat(drawn).detach().to("cpu", torch.float32)


def items_of(data: Any, rows: Sequence[int]) -> list[dict[str, Any]]:
    return data.__getitems__(rows) if hasattr(data, "__getitems__") else [data[i] for i in rows]


def _plain(text: str) -> str:
    """In lower case, with single spaces and without a full stop: differences that are no mistakes."""
    return " ".join(text.lower().strip().rstrip(".").split())


def majority(answers: Sequence[Any]) -> float:
    """Share of the most frequent answer: what is reached by always giving it."""
    return max(Counter(answers).values()) / len(answers)


def scene_captions(exam: Examiner, data: Shapes, suffix: str = "", agreement: bool = True) -> None:
    """Captions against the scene's facts: caption_f1, _precision, _recall (means over captions), _exact, _unreadable.

    Words that cannot be read are a false claim, and what they might have said is not recalled. Chance is the caption of
    the next scene: what the form of the captions is worth without the image. ``agreement``: across nuisances, too.
    """
    rows = range(len(data))
    said, scenes = exam.understand(data, rows, f"captions{suffix}"), data.scenes(rows)
    truth = [scenes.objects(k) for k in rows]
    for (item, text), objects in zip(said, truth, strict=True):
        key, score = item["id"], score_caption(text, objects)
        exam.add(f"caption_f1{suffix}", key, score.f1)
        if not suffix:
            exam.add("caption_precision", key, score.precision)
            exam.add("caption_recall", key, score.recall)
            exam.add("caption_exact", key, float(score.exact))
            exam.add("caption_unreadable", key, float(not parse(text).ok))
    other = [score_caption(text, objects) for (_, text), objects in zip(said, truth[1:] + truth[:1], strict=True)]
    exam.chance[f"caption_f1{suffix}"] = sum(s.f1 for s in other) / len(other)
    if not suffix:
        exam.chance["caption_exact"] = sum(s.exact for s in other) / len(other)
    if agreement and not suffix:
        _nuisance_agreement(exam, data, said[: exam.n_questions])


def _nuisance_agreement(exam: Examiner, data: Shapes, said: Sequence[tuple[dict[str, Any], str]]) -> None:
    """Share of pairs of nuisance draws of one scene whose captions name the same objects (the words may differ).

    Two captions of which one cannot be read do not agree. A model that says the same of every image agrees with itself
    perfectly: read it beside caption_f1.
    """

    def named(text: str) -> Counter | None:
        parsed = parse(text)
        return Counter(describe(p) for p in parsed.phrases for _ in range(p.number)) if parsed.ok else None

    views = [said]
    for draw in range(1, NUISANCE_DRAWS):
        other = data.with_nuisance(nuisance_seed=data.nuisance_seed + 1_000_003 * draw)
        views.append(exam.understand(other, range(len(said)), f"captions, nuisance draw {draw + 1}"))
    for seen in zip(*views, strict=True):
        same = [a is not None and a == b for a, b in combinations([named(text) for _, text in seen], 2)]
        exam.add("caption_nuisance_agreement", seen[0][0]["id"], sum(same) / len(same))


def heldout_captions(exam: Examiner, data: Shapes) -> None:
    """caption_f1_heldout: scenes with a colour-shape pair that no other split contains."""
    if data.split == "heldout":
        exam.notes.append("caption_f1_heldout: the data are the held-out split itself, see caption_f1")
        return
    scene_captions(exam, replace(data, split="heldout", n=len(exam.rows(data)), fixed=None), "_heldout")


def scene_questions(exam: Examiner, data: Shapes) -> None:
    """One question of each kind about each scene where one applies; chance is the most frequent answer."""
    _existence(exam, data)
    for stream, kind in enumerate(QUESTION_KINDS, _STREAM + len(NEGATIVES) + 1):
        asked = _ask(exam, data, kind, stream) if kind != "existence" else []
        for key, q, said in asked:
            exam.add(f"qa_{kind}", key, float(said == q.answer))
        if asked:
            exam.chance[f"qa_{kind}"] = majority([q.answer for _, q, _ in asked])


def _ask(
    exam: Examiner, data: Shapes, kind: str, stream: int, present: bool = False, negative: str | None = None
) -> list[tuple[str, Question, str]]:
    """(scene id, question, answer given) for every scene that has a question of this kind."""
    rows = exam.rows(data)
    scenes, draws = data.scenes(rows), data.draws(rows, 4, stream)
    if present:
        draws[:, 0] = 0.0  # below one half: question() asks for something that is there
    asked = {i: q for i in rows if (q := question(scenes.objects(i), kind, draws[i], negative))}
    texts, label = [q.text for q in asked.values()], f"questions: {kind} {negative or ''}"
    said = exam.understand(data, list(asked), label, texts, f" {kind} {negative}")
    return [(item["id"], q, text) for (item, text), q in zip(said, asked.values(), strict=True)]


def _existence(exam: Examiner, data: Shapes) -> None:
    """POPE (Li et al. 2023): each scene is asked for one thing that is there and for one absent thing of each kind.

    The item is the scene: its accuracy is (present right + absent right) / 2, so that yes and no weigh the same. F1 is of
    "yes": 2 tp / (2 tp + fp + fn), where any wrong answer about an absent thing counts as a false positive. qa_existence
    and qa_existence_f1 average the three kinds of absent things scene by scene; the yes rate tells a bias from blindness.
    """
    there = {key: said for key, _, said in _ask(exam, data, "existence", _STREAM, present=True)}
    absent = {
        how: {key: said for key, _, said in _ask(exam, data, "existence", stream, negative=how)}
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


def pair_captions(exam: Examiner, data: Any) -> None:
    """Against the given caption: caption_exact, caption_token_f1 (micro, over words), and for digits caption_digit."""
    digits = []
    for item, said in exam.understand(data, range(len(data)), "captions"):
        key, wanted = item["id"], _plain(item["texts"])
        if isinstance(data, Digits):
            digits.append(int(item["factors"]["digit"]))
            exam.add("caption_digit", key, float(digit_word(said) == digits[-1]))
        exam.add("caption_exact", key, float(said == wanted))
        common = (Counter(said.split()) & Counter(wanted.split())).total()
        exam.add("caption_token_f1", key, (2 * common, len(said.split()) + len(wanted.split())))
    if digits:
        exam.chance["caption_digit"] = majority(digits)


def digit_questions(exam: Examiner, data: Digits) -> None:
    """qa_digit, qa_thickness, qa_slant: every question about each scan; a scan's outcome is its share of right answers."""
    asked = [(i, q) for i in exam.rows(data) for q in data.question(i)]
    said = exam.understand(data, [i for i, _ in asked], "questions", [q.text for _, q in asked])
    right: dict[tuple[str, str], list[bool]] = {}
    for (_, q), (item, text) in zip(asked, said, strict=True):
        right.setdefault((f"qa_{q.kind}", item["id"]), []).append(text == q.answer)
    for (metric, key), outcomes in right.items():
        exam.add(metric, key, sum(outcomes) / len(outcomes))
    for kind in dict.fromkeys(q.kind for _, q in asked):
        exam.chance[f"qa_{kind}"] = majority([q.answer for _, q in asked if q.kind == kind])
