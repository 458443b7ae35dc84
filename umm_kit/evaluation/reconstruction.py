"""What an image tokenizer keeps of a scene: the objects, by the oracle, and every nuisance factor, against its known value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from umm_kit.data.oracle import Oracle, audit, corrupt
from umm_kit.data.shapes import PATCH_GRID, Scenes, Shapes, render
from umm_kit.models.base import collate
from umm_kit.models.tokenizers import codebook_use


def _chroma(images: np.ndarray) -> np.ndarray:
    return images - images.mean(1, keepdims=True)


def nuisance_recovery(images: Tensor, factors: Mapping[str, Tensor]) -> dict[str, float]:
    """R^2 of each nuisance factor read off the images, against its known value; 1 = kept exactly, 0 = as good as a constant.

    With everything else known, each factor has a closed-form estimate: the patch means of the free ground give grey,
    gradient and texture; the objects' colour gives the brightness; the oracle's centres give the jitter. An absent
    factor (no variance) is left out.

    Args:
        images: [B, 3, H, W] in [0, 1], renders or reconstructions of the scenes that ``factors`` describes.
    """
    f = {k: v.numpy() for k, v in factors.items()}
    pixels = images.numpy().astype(np.float64)
    size, patch = pixels.shape[-1], pixels.shape[-1] // PATCH_GRID
    scenes = Scenes(f["count"], f["cell"], f["shape"], f["colour"], f["size"])
    plain = {**{k: f[k] for k in ("grey", "gradient", "jitter", "texture")}, "brightness": np.ones_like(f["brightness"])}
    reference = render(scenes, plain, size, 2 * float(np.abs(f["jitter"]).max())).astype(np.float64)
    colour = _chroma(reference)
    found = {"brightness": ((_chroma(pixels) * colour).sum((1, 2, 3)) / (colour**2).sum((1, 2, 3)), f["brightness"])}

    # Patches without an object or its edge, and not clipped at white.
    blocks = (len(pixels), PATCH_GRID, patch, PATCH_GRID, patch)
    free = np.abs(colour).max(1).reshape(blocks).max((2, 4)) < 1e-4
    free &= (reference.max(1) * f["brightness"][:, None, None]).reshape(blocks).max((2, 4)) < 1
    ground = pixels.mean(1).reshape(blocks).mean((2, 4)) / f["brightness"][:, None, None]
    axis = (np.arange(PATCH_GRID) + 0.5) / PATCH_GRID * 2 - 1
    plane = f["gradient"][:, 0, None, None] * axis + f["gradient"][:, 1, None, None] * axis[:, None]
    found["texture"] = ((ground - f["grey"][:, None, None] - plane)[free], f["texture"][free])
    estimates = []
    for row, level in enumerate(ground - f["texture"]):
        y, x = np.nonzero(free[row])
        design = np.stack([np.ones(len(x)), axis[x], axis[y]], 1)
        estimates.append(np.linalg.lstsq(design, level[y, x], rcond=None)[0])
    fitted = np.array(estimates)
    found["grey"], found["gradient"] = (fitted[:, 0], f["grey"]), (fitted[:, 1:], f["gradient"])

    # The middle of an object at rest depends on its shape: read it off renders without jitter.
    oracle, still = Oracle(size), {**plain, "jitter": np.zeros_like(f["jitter"])}
    moved, true = [], []
    rest = oracle.read(torch.from_numpy(render(scenes, still, size)))
    for row, (seen, at_rest) in enumerate(zip(oracle.read(images), rest, strict=True)):
        middle = {thing.object: thing for thing in at_rest.things if thing.clear}
        place = {o: k for k, o in enumerate(scenes.objects(row))}
        for thing in seen.things:
            if thing.clear and thing.object in middle and thing.object in place:
                moved.append([thing.x - middle[thing.object].x, thing.y - middle[thing.object].y])
                true.append(f["jitter"][row, place[thing.object]] * size / 32)
    found["jitter"] = (np.array(moved), np.array(true))
    return {
        name: float(1 - ((estimate - truth) ** 2).mean() / ((truth - truth.mean(0)) ** 2).mean())
        for name, (estimate, truth) in found.items()
        if len(truth) and truth.std() > 1e-9
    }


#: Damage under which the oracle is audited: kind and strength, see umm_kit.data.oracle.corrupt.
DAMAGE = (("noise", 0.05), ("noise", 0.1), ("blur", 1.0), ("missing", 0.05))


def audit_pictures(tokenizer: Any, data: Shapes, seed: int = 0, batch_size: int = 256) -> dict[str, Any]:
    """How far pictures of known scenes can be trusted: the oracle on clean, damaged and reconstructed ones.

    Returns:
        ``oracle``: kind of picture -> :func:`umm_kit.data.oracle.audit`; ``nuisance_r2``: factor -> R^2 on originals and on
        reconstructions; ``codebook``: codes used, their number and perplexity; ``psnr_db`` of the reconstructions.
    """
    rows = range(len(data))
    batch, scenes = collate(data.__getitems__(rows)), data.scenes(rows)
    images, factors, objects = batch["images"], batch["factors"], [scenes.objects(row) for row in rows]
    codes = torch.cat([tokenizer.encode(part) for part in images.split(batch_size)])
    again = torch.cat([tokenizer.decode(part) for part in codes.split(batch_size)]).float()
    generator = torch.Generator().manual_seed(seed)
    pictures = {"clean": images, "reconstructed": again}
    pictures |= {f"{kind} {strength}": corrupt(images, kind, strength, generator) for kind, strength in DAMAGE}
    use = codebook_use(codes, tokenizer.codebook_size)
    return {
        "data": repr(data),
        "oracle": {name: audit(shown, objects) for name, shown in tqdm(pictures.items(), desc="pictures", delay=2)},
        "nuisance_r2": {"clean": nuisance_recovery(images, factors), "reconstructed": nuisance_recovery(again, factors)},
        "codebook": {"used": use.used, "size": use.size, "perplexity": use.perplexity},
        "psnr_db": float(-10 * torch.log10((again - images).square().mean())),
    }
