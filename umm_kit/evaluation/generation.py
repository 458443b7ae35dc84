"""What a model draws: prompts of GenEval's six categories, hidden objects drawn again, digits, reconstructions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from umm_kit.data.digits import Digits, to_scan
from umm_kit.data.language import CATEGORIES, caption, parse, prompts
from umm_kit.data.oracle import Oracle, score_prompt
from umm_kit.data.shapes import CELLS, HELD_OUT, Pairs, Shapes, box_size, cell_origin
from umm_kit.evaluation.understanding import Examiner, items_of, majority

_STREAM = 200  # of Shapes.draws: which object is hidden


def scene_prompts(exam: Examiner, data: Shapes, heldout: bool = True) -> None:
    """Draws prompts and reads the pictures: generation_<category>, generation_overall, generation_strict.

    A prompt is met when the picture shows what it says (GenEval); strict asks that it shows nothing else either.
    generation_overall is the mean of the six categories, and its interval resamples prompts within their category. Where a
    category knows few different prompts (five for single_object) the interval is over pictures, not over prompts. Chance
    is the picture drawn for the next prompt of the category. ``heldout``: held-out compositions are drawn, too.
    """
    oracle = Oracle(data.image_size, data.nuisance.jitter)
    asked = prompts(data.split, exam.n_prompts, data.seed, CATEGORIES, data.containing, data.without)
    readings = oracle.read(exam.generate([p.text for p in asked], [p.id for p in asked], "prompts"))
    for p, reading in zip(asked, readings, strict=True):
        score = score_prompt(p.text, reading)
        exam.add("generation_overall", p.id, float(score.ok), p.category)
        exam.add("generation_strict", p.id, float(score.strict), p.category)
        exam.add(f"generation_{p.category}", p.id, float(score.ok))
    for category in CATEGORIES:
        mine = [k for k, p in enumerate(asked) if p.category == category]
        met = [score_prompt(asked[k].text, readings[other]).ok for k, other in zip(mine, mine[1:] + mine[:1], strict=True)]
        exam.chance[f"generation_{category}"] = sum(met) / len(met)
    exam.chance["generation_overall"] = sum(exam.chance[f"generation_{c}"] for c in CATEGORIES) / len(CATEGORIES)
    if heldout and data.split != "heldout":
        composition_prompts(exam, "generation_heldout", replace(data, split="heldout"), HELD_OUT)


def composition_prompts(exam: Examiner, metric: str, data: Shapes, pairs: Pairs) -> None:
    """Draws prompts, true of such scenes, that name one of the (colour, shape) pairs; the outcome is whether each is met."""
    categories = ("colors", "color_attribution")
    asked = prompts(data.split, exam.n_prompts, data.seed, categories, data.containing, data.without)
    asked = [p for p in asked if any((q.colour, q.shape) in pairs for q in parse(p.text).phrases)]
    drawn = exam.generate([p.text for p in asked], [p.id for p in asked], metric)
    for p, reading in zip(asked, Oracle(data.image_size, data.nuisance.jitter).read(drawn), strict=True):
        exam.add(metric, p.id, float(score_prompt(p.text, reading).ok), p.category)


def object_mask(cells: np.ndarray, grid: tuple[int, int], image_size: int) -> torch.Tensor:
    """Masks [n, rows, columns], True for every token that touches the box of the cell (indices into CELLS).

    Tokens are coarser than boxes: the edge of a neighbour may be hidden with them.
    """
    origin, box = cell_origin(np.asarray(cells), image_size), box_size(image_size)
    sides = []
    for start, tokens in zip(origin, grid, strict=True):
        edge = np.arange(tokens) * (image_size / tokens)
        sides.append((edge < start[:, None] + box) & (edge + image_size / tokens > start[:, None]))
    return torch.from_numpy(sides[0][:, :, None] & sides[1][:, None, :])


def scene_inpainting(exam: Examiner, data: Shapes) -> None:
    """Hides one object of each scene, gives the whole caption with its places, and reads what was drawn there.

    inpainting_objects: the hidden object is back in its cell with its shape, colour and size; chance is the most frequent
    (shape, colour, size). inpainting_kept: share of the other objects that still read right.
    """
    rows = exam.rows(data)
    items, scenes, u = data.__getitems__(rows), data.scenes(rows), data.draws(rows, 1, _STREAM)[:, 0]
    objects = [scenes.objects(k) for k in rows]
    hidden = [scene[int(x * len(scene))] for scene, x in zip(objects, u, strict=True)]
    mask = object_mask(np.array([CELLS.index(o.cell) for o in hidden]), exam.model.grid, data.image_size)
    texts, ids = [caption(scene, "placed") for scene in objects], [item["id"] for item in items]
    images = torch.stack([item["images"] for item in items])
    drawn = exam.generate(texts, ids, "inpainting", " inpainting", images=images, mask=mask)
    readings = Oracle(data.image_size, data.nuisance.jitter).read(drawn)
    for key, reading, scene, target in zip(ids, readings, objects, hidden, strict=True):
        exam.add("inpainting_objects", key, float(target in reading.objects))
        if others := [o in reading.objects for o in scene if o != target]:
            exam.add("inpainting_kept", key, (sum(others), len(others)))
    exam.chance["inpainting_objects"] = majority([(o.shape, o.colour, o.size) for o in hidden])


def digit_prompts(exam: Examiner, data: Digits) -> None:
    """generation_digit: drawn digits that a classifier recognises; generation_digit_ceiling: the same on real test scans."""
    from sklearn.svm import SVC

    n, train, test = len(exam.rows(data)), Digits("train"), Digits("test")
    classifier = SVC(gamma=0.001).fit(to_scan(train.pixels).flatten(1).numpy(), train.digits)  # it sees no model's picture
    drawn = exam.generate(data.texts[:n], data.ids[:n], "digits")
    exam.chance["generation_digit"] = majority(data.digits[:n].tolist())
    for metric, scans, pixels in (("generation_digit", data, drawn), ("generation_digit_ceiling", test, test.pixels)):
        seen = classifier.predict(to_scan(pixels).flatten(1).numpy())
        for key, digit, said in zip(scans.ids, scans.digits, seen, strict=False):
            exam.add(metric, key, float(said == digit))
    exam.notes.append(f"generation_digit_ceiling: the classifier on {len(test)} real test scans; no drawing can be held to more")


def reconstruction(exam: Examiner, data: Any) -> None:
    """reconstruction_error: mean absolute error per pixel through the image tokenizer (0 to 1, lower = better)."""
    tokenizer = getattr(exam.model, "image_tokenizer", None)
    if tokenizer is None:
        raise NotImplementedError("the model has no image_tokenizer to reconstruct with")
    for part in exam.batches(len(data), "reconstruction"):
        batch = items_of(data, range(len(data))[part])
        images = torch.stack([item["images"] for item in batch])
        errors = (tokenizer.reconstruct(images.to(exam.model.device)).float().cpu() - images).abs().mean((1, 2, 3))
        for item, error in zip(batch, errors.tolist(), strict=True):
            exam.add("reconstruction_error", item["id"], error)
