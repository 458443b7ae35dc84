"""What an audit of factors holds on to: known factors of scenes, flows with planted factors, and splits that must be beaten."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.feature_extraction.text import CountVectorizer
from torch import Tensor, nn

from umm_kit.data.shapes import COLOURS, PATCH_GRID, SIZES
from umm_kit.diagnostics.bits import quantile_classes
from umm_kit.features import FLOWS, batches, evaluating, masks_by_id
from umm_kit.models.base import as_layers, draw_mask

ALWAYS_HIDDEN, SOMETIMES_HIDDEN = 0.3, (0.02, 0.42)  # together about 31 to 59 % of the tokens, as in training
_HUES, _WORDS = 24, 256


# --- factors of scenes -------------------------------------------------------------------------------------------------


def look(images: Tensor, visible: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
    """What can be seen at the visible patches [B, N] of images, in parts of few numbers that a small probe can use.

    ``ground``: brightness of the uncoloured pixels of each patch: a fitted plane, what is left of it, 0 where there are none.
    ``colour``: how coloured each patch is. ``hues``: how much of each hue there is in all.
    """
    blocks = images.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1)).transpose(3, 4).flatten(4).flatten(2, 3)
    r, g, b = blocks.unbind(1)  # [B, N, pixels of a patch]
    colour = blocks.amax(1) - blocks.amin(1)
    grey = (colour < 0.02).float()
    level, there = (blocks.mean(1) * grey).sum(2) / grey.sum(2).clamp(min=1), (grey.any(2) & visible).float()
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in grid), indexing="ij")
    design = torch.stack([torch.ones(rows.numel()), rows.flatten(), columns.flatten()], 1)
    square = (there[:, :, None] * design).transpose(1, 2) @ design + 1e-3 * torch.eye(3)
    plane = torch.linalg.solve(square, ((there * level)[:, :, None] * design).sum(1))
    angle = torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b) / (2 * math.pi) + 0.5
    hues = nn.functional.one_hot((angle * _HUES).long().clamp(max=_HUES - 1), _HUES) * (colour * visible[:, :, None])[..., None]
    return {
        "ground": torch.cat([plane, (level - plane @ design.T) * there], 1),
        "colour": colour.mean(2) * visible,
        "hues": hues.sum((1, 2)),
    }


def known_factors(
    scenes: Mapping[str, Tensor], texts: Sequence[str], shown: Tensor, masks: Tensor, always: Tensor, grid: tuple[int, int]
) -> dict[str, Tensor]:
    """Factors of scenes of ``Shapes`` that should be of all kinds; :func:`truth_table` says which they are.

    Said in captions: count, red, large. Never said: grey; the texture that shows at the places that are always hidden. Of the
    caption alone: whether its style names places. Of the mask alone: how much it hides, and on which side.
    """
    texture = nn.functional.adaptive_avg_pool2d(scenes["texture"].float(), grid).flatten(1) * shown
    lower = masks.unflatten(1, grid)[:, grid[0] // 2 :].sum((1, 2)) * 2 - masks.sum(1)
    return {
        "count": scenes["count"],
        "red": (scenes["colour"] == COLOURS.index("red")).any(1).long(),
        "large": (scenes["size"] == SIZES.index("large")).any(1).long(),
        "grey": quantile_classes(scenes["grey"]),
        "hidden texture": quantile_classes(texture[:, always].sum(1), 2),
        "style": torch.tensor([" at the " in text for text in texts]).long(),
        "mask share": quantile_classes(masks.sum(1)),
        "mask side": quantile_classes(lower, 2),
    }


@dataclass(frozen=True)
class Collected:
    """What an audit needs of scenes: pooled states, the raw inputs and targets of both flows in parts, and factors."""

    flows: dict[str, Tensor]
    inputs: dict[str, dict[str, Tensor]]
    targets: dict[str, dict[str, Tensor]]
    factors: dict[str, Tensor]


@torch.no_grad()
def collect(model: Any, data: Any, layer: int | None = None, batch_size: int = 64, seed: int = 0) -> Collected:
    """One pass over scenes of ``Shapes``, one batch of images and tokens in memory at a time; arguments as those of ``audit``.

    Raises:
        ValueError: other data than scenes, no such layer, a token grid that does not divide the texture's.
    """
    layer = model.num_layers // 2 if layer is None else as_layers([layer], model.num_layers)[0]
    grid = tuple(model.grid)
    if any(PATCH_GRID % side for side in grid):
        raise ValueError(f"the token grid {grid} does not divide the texture's grid of {PATCH_GRID}: tokens would share a patch")
    always = draw_mask(1, grid, ALWAYS_HIDDEN, generator=torch.Generator().manual_seed(seed))[0]
    rows: dict[str, list[Tensor]] = {}
    texts: list[str] = []
    with evaluating(model):
        for batch in batches(data, batch_size):
            if not {"texture", "cell", "grey"} <= set(batch.get("factors", {})):
                raise ValueError("the data have no scene factors; expected uk.Shapes (for states and factors of your own: score)")
            mask = masks_by_id(batch["ids"], grid, SOMETIMES_HIDDEN, "dispersed", seed) | always
            h = {
                "understanding": model.understanding_flow(batch, layers=[layer]),
                "generation": model.generation_flow(batch, layers=[layer], mask=mask),
            }
            new = {f"flow {flow}": out.hidden_states[layer].float().mean(1).cpu() for flow, out in h.items()}
            views = {"all": torch.ones_like(mask), "visible": ~mask, "hidden": mask}
            new |= {f"{view} {k}": v for view, at in views.items() for k, v in look(batch["images"], at, grid).items()}
            for key, value in (new | {"mask": mask, **{f"factor {k}": v for k, v in batch["factors"].items()}}).items():
                rows.setdefault(key, []).append(value)
            texts += batch["texts"]
    whole = {key: torch.cat(parts) for key, parts in rows.items()}
    under = lambda name: {k.removeprefix(f"{name} "): v for k, v in whole.items() if k.startswith(f"{name} ")}  # noqa: E731
    count = CountVectorizer(token_pattern=r"\w+", max_features=_WORDS)
    words = {"words": torch.from_numpy(count.fit_transform(texts).toarray())}
    shown = whole["all ground"][:, 3:] != 0
    factors = known_factors(under("factor"), texts, shown, whole["mask"], always, grid)
    inputs = {"understanding": under("all"), "generation": under("visible") | words | {"mask": whole["mask"]}}
    return Collected(under("flow"), inputs, {"understanding": words, "generation": under("hidden")}, factors)


# --- planted flows -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """Two flows made from known factors."""

    flows: dict[str, Tensor]  # flow -> [n, d]
    factors: dict[str, Tensor]  # name -> [n] classes (quarters of the continuous ones)
    kinds: dict[str, str]  # name -> shared, U-only or G-only
    sources: dict[str, Tensor]  # kind -> [n, k], the numbers that were mixed


def planted_flows(
    n: int = 2000, shared: int = 2, unique_u: int = 2, unique_g: int = 2, d: int = 32, seed: int = 0, noise: float = 0.05
) -> Planted:
    """Flows h_U = f_U(s, u_U) + noise and h_G = f_G(s, u_G) + noise of independent factors, each f another random network.

    f(v) = B tanh(A v + c), entries normal. Of each kind every other factor is continuous (normal), every other discrete (four
    levels); all have variance 1.

    Args:
        shared, unique_u, unique_g: how many factors of each kind, at least 1. d: width of the flows. noise: its sd; h has sd 1.

    Example:
        >>> sorted(planted_flows(n=100, unique_g=1, d=8).factors)
        ['G-only 0', 'U-only 0', 'U-only 1', 'shared 0', 'shared 1']
    """
    if min(n, shared, unique_u, unique_g, d) < 1 or noise < 0:
        raise ValueError(f"{n=}, {shared=}, {unique_u=}, {unique_g=}, {d=}, {noise=}; expected at least 1 of each, noise >= 0")
    rng = torch.Generator().manual_seed(seed)
    factors, kinds, sources = {}, {}, {}
    for kind, number in (("shared", shared), ("U-only", unique_u), ("G-only", unique_g)):
        columns = []
        for k in range(number):
            name, level = f"{kind} {k}", torch.randint(4, (n,), generator=rng)
            normal = torch.randn(n, generator=rng)
            columns.append((level - 1.5) / 1.25**0.5 if k % 2 else normal)
            factors[name], kinds[name] = level if k % 2 else quantile_classes(normal), kind
        sources[kind] = torch.stack(columns, 1)

    def mix(v: Tensor) -> Tensor:
        width = 2 * d
        a, b = torch.randn(v.shape[1], width, generator=rng), torch.randn(width, d, generator=rng)
        h = torch.tanh(v @ a / v.shape[1] ** 0.5 + torch.randn(width, generator=rng)) @ b
        return (h - h.mean(0)) / h.std(0) + noise * torch.randn(len(v), d, generator=rng)

    flows = {
        flow: mix(torch.cat([sources["shared"], sources[own]], 1)) for flow, own in zip(FLOWS, ("U-only", "G-only"), strict=True)
    }
    return Planted(flows, factors, kinds, sources)


# --- splits that must be beaten ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Two halves of each flow's states: what encoders, and their rivals, return when called with ``{flow: [n, d]}``."""

    shared: dict[str, Tensor]  # flow -> [n, f]
    unique: dict[str, Tensor]


class PCASplit:
    """Shared = the leading principal components of each flow, unique = the next ones."""

    def __init__(self, flows: Mapping[str, Tensor], size: int, seed: int = 0):
        self.mean = {flow: h.mean(0) for flow, h in flows.items()}
        self.directions = {flow: axes(h - self.mean[flow]) for flow, h in flows.items()}
        self.size = {flow: min(size, a.shape[1] // 2) for flow, a in self.directions.items()}

    def __call__(self, flows: Mapping[str, Tensor]) -> Split:
        z = {flow: (h - self.mean[flow]) @ self.directions[flow] for flow, h in flows.items()}
        return Split(
            {flow: v[:, : self.size[flow]] for flow, v in z.items()},
            {flow: v[:, self.size[flow] : 2 * self.size[flow]] for flow, v in z.items()},
        )


class CCASplit:
    """Shared = canonical directions whose correlation tops that of shuffled pairs; unique = leading components of the rest."""

    def __init__(self, flows: Mapping[str, Tensor], size: int, seed: int = 0):
        self.mean = {flow: h.mean(0) for flow, h in flows.items()}
        x, y = (flows[flow] - self.mean[flow] for flow in FLOWS)
        white = [axes(h, whiten=True) for h in (x, y)]
        a, b = x @ white[0], y @ white[1]
        order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
        left, strength, right = torch.linalg.svd(a.T @ b / len(a))
        chance = float(torch.linalg.svdvals(a.T @ b[order] / len(a))[0])
        k = max(1, min(size, int((strength > chance).sum())))
        sides = zip(FLOWS, (x, y), white, (left, right.T), strict=True)
        self.shared, self.back, self.rest = {}, {}, {}
        for flow, h, w, turn in sides:
            self.shared[flow] = w @ turn[:, :k]
            z = h @ self.shared[flow]
            self.back[flow] = z.T @ h / len(h)  # regression on uncorrelated columns of variance 1
            self.rest[flow] = axes(h - z @ self.back[flow])[:, :size]

    def __call__(self, flows: Mapping[str, Tensor]) -> Split:
        centred = {flow: h - self.mean[flow] for flow, h in flows.items()}
        shared = {flow: h @ self.shared[flow] for flow, h in centred.items()}
        return Split(shared, {f: (h - shared[f] @ self.back[f]) @ self.rest[f] for f, h in centred.items()})


class RandomSplit:
    """Fixed random maps of one layer, tanh(W (h - mean) / sd): four of them, drawn alike."""

    def __init__(self, flows: Mapping[str, Tensor], size: int, seed: int = 0):
        rng = torch.Generator().manual_seed(seed)
        self.norm = {flow: (h.mean(0), h.std(0).clamp(min=1e-6) * h.shape[1] ** 0.5) for flow, h in flows.items()}
        self.maps = [{f: torch.randn(h.shape[1], size, generator=rng) for f, h in flows.items()} for _ in range(2)]

    def __call__(self, flows: Mapping[str, Tensor]) -> Split:
        unit = {flow: (h - self.norm[flow][0]) / self.norm[flow][1] for flow, h in flows.items()}
        return Split(*({flow: torch.tanh(h @ maps[flow]) for flow, h in unit.items()} for maps in self.maps))


def axes(x: Tensor, whiten: bool = False) -> Tensor:
    """Principal directions [d, rank] of centred rows, leading ones first; whitened: the projections have variance 1."""
    _, spread, directions = torch.linalg.svd(x, full_matrices=False)
    keep = spread > 1e-4 * spread[0]
    return directions[keep].T / spread[keep] * len(x) ** 0.5 if whiten else directions[keep].T


RIVALS: Mapping[str, Callable] = {"CCA": CCASplit, "PCA": PCASplit, "random": RandomSplit}
