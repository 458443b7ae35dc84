"""What a model draws: prompts of GenEval's six categories, hidden objects drawn again, digits, reconstructions."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from umm_kit.data.imagetext import Digits, to_scan
from umm_kit.data.language import CATEGORIES, Prompt, parse, prompts
from umm_kit.data.oracle import Oracle, score_prompt
from umm_kit.data.shapes import CELLS, HELD_OUT, SceneObject, Shapes, box_size, cell_origin
from umm_kit.evaluation.understanding import Examiner, majority

_STREAM = 200  # of Shapes.draws: which object is hidden


def scene_prompts(exam: Examiner, data: Shapes) -> None:
    """Draws prompts and reads the pictures: generation_<category>, generation_overall, generation_strict.

    A prompt is met when the picture shows what it says (GenEval); strict asks that it shows nothing else either.
    generation_overall is the mean of the six categories, and its interval resamples prompts within their category. Where a
    category knows few different prompts (five for single_object) the interval is over pictures, not over prompts. Chance
    is the picture drawn for the next prompt of the category.
    """
    _draw(exam, data, prompts(data.split, exam.n_prompts, data.seed))
    if data.split != "heldout":
        wanted = prompts("heldout", exam.n_prompts, data.seed, ("colors", "color_attribution"))
        wanted = [p for p in wanted if any((q.colour, q.shape) in HELD_OUT for q in parse(p.text).phrases)]
        _draw(exam, data, wanted, heldout=True)


def _draw(exam: Examiner, data: Shapes, asked: list[Prompt], heldout: bool = False) -> None:
    oracle, readings = Oracle(data.image_size, data.nuisance.jitter), []
    for chunk in exam.batches(asked, "held-out prompts" if heldout else "prompts"):
        readings += oracle.read(exam.generate([p.text for p in chunk], chunk[0].id))
    scores = [score_prompt(p.text, reading) for p, reading in zip(asked, readings, strict=True)]
    for p, score in zip(asked, scores, strict=True):
        exam.add("generation_heldout" if heldout else "generation_overall", p.id, float(score.ok), p.category)
        if not heldout:
            exam.add("generation_strict", p.id, float(score.strict), p.category)
            exam.add(f"generation_{p.category}", p.id, float(score.ok))
    if heldout:
        return
    for category in CATEGORIES:
        mine = [k for k, p in enumerate(asked) if p.category == category]
        met = [score_prompt(asked[k].text, readings[other]).ok for k, other in zip(mine, mine[1:] + mine[:1], strict=True)]
        exam.chance[f"generation_{category}"] = sum(met) / len(met)
    exam.chance["generation_overall"] = sum(exam.chance[f"generation_{c}"] for c in CATEGORIES) / len(CATEGORIES)


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
    oracle, hidden = Oracle(data.image_size, data.nuisance.jitter), []
    for rows in exam.batches(range(min(len(data), exam.n_questions)), "inpainting"):
        batch, scenes, u = data.__getitems__(rows), data.scenes(rows), data.draws(rows, 1, _STREAM)[:, 0]
        objects = [scenes.objects(k) for k in range(len(batch))]
        targets: list[SceneObject] = [o[int(u[k] * len(o))] for k, o in enumerate(objects)]
        mask = object_mask(np.array([CELLS.index(t.cell) for t in targets]), exam.model.grid, data.image_size)
        images = torch.stack([item["images"] for item in batch])
        drawn = exam.generate([data.caption(i, "placed") for i in rows], f"{batch[0]['id']} inpainting", images=images, mask=mask)
        for item, reading, scene, target in zip(batch, oracle.read(drawn), objects, targets, strict=True):
            exam.add("inpainting_objects", item["id"], float(target in reading.objects))
            if len(scene) > 1:
                others = [o in reading.objects for o in scene if o != target]
                exam.add("inpainting_kept", item["id"], (sum(others), len(others)))
        hidden += [(t.shape, t.colour, t.size) for t in targets]
    exam.chance["inpainting_objects"] = majority(hidden)


@lru_cache(maxsize=1)
def digit_classifier() -> Any:
    """A support vector machine trained on the training scans alone; it has never seen a model's picture."""
    from sklearn.svm import SVC

    scans = Digits("train")
    pixels = to_scan(torch.stack([scans[i]["images"] for i in range(len(scans))])).flatten(1).numpy()
    return SVC(gamma=0.001).fit(pixels, [int(scans[i]["factors"]["digit"]) for i in range(len(scans))])


def _recognise(images: torch.Tensor) -> list[int]:
    return digit_classifier().predict(to_scan(images.detach().to("cpu", torch.float32)).flatten(1).numpy()).tolist()


def digit_prompts(exam: Examiner, data: Digits) -> None:
    """generation_digit: drawn digits that the classifier recognises; generation_digit_ceiling: the same on real test scans."""
    digits = []
    for rows in exam.batches(range(min(len(data), exam.n_questions)), "digits"):
        batch = [data[i] for i in rows]
        seen = _recognise(exam.generate([item["texts"] for item in batch], batch[0]["id"]))
        for item, digit in zip(batch, seen, strict=True):
            exam.add("generation_digit", item["id"], float(digit == int(item["factors"]["digit"])))
            digits.append(int(item["factors"]["digit"]))
    exam.chance["generation_digit"] = majority(digits)
    for item in (test := Digits("test")):
        seen = _recognise(item["images"][None])
        exam.add("generation_digit_ceiling", item["id"], float(seen == [int(item["factors"]["digit"])]))
    exam.notes.append(f"generation_digit_ceiling: the classifier on {len(test)} real test scans; no drawing can be held to more")


def reconstruction(exam: Examiner, data: Any) -> None:
    """reconstruction_error: mean absolute error per pixel through the image tokenizer (0 to 1, lower = better)."""
    tokenizer = getattr(exam.model, "image_tokenizer", None)
    if tokenizer is None:
        raise NotImplementedError("the model has no image_tokenizer to reconstruct with")
    for rows in exam.batches(range(len(data)), "reconstruction"):
        batch = [data[i] for i in rows]
        images = torch.stack([item["images"] for item in batch])
        errors = (tokenizer.reconstruct(images.to(exam.model.device)).float().cpu() - images).abs().mean((1, 2, 3))
        for item, error in zip(batch, errors.tolist(), strict=True):
            exam.add("reconstruction_error", item["id"], error)
