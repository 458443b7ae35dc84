"""Hidden states of both flows, streamed by id: to memory when small, to safetensors shards when not."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from umm_kit.models.base import FLOWS, MASK_RATIO, checksum, collate, draw_mask, evaluating


@dataclass
class Features:
    """States of one data set: ``states[flow, layer]`` is [n, d] (pooled) or [n, N, d] (tokens), rows in order of ``ids``."""

    ids: list[str]
    states: dict[tuple[str, int], Tensor]
    losses: dict[str, Tensor]  # flow -> [n], mean loss of each example (nats per supervised token)
    grids: dict[str, tuple[int, int]]  # flow -> (rows, columns) of its image tokens; they may differ
    masks: Tensor | None = None  # [n, N], where generation was hidden
    factors: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def layers(self, flow: str) -> list[int]:
        return sorted(layer for f, layer in self.states if f == flow)

    def select(self, ids: Sequence[str]) -> Features:
        """The rows of the given ids, in their order; unknown ids raise."""
        place = {name: row for row, name in enumerate(self.ids)}
        if unknown := [name for name in ids if name not in place]:
            raise ValueError(f"{len(unknown)} ids have no features, for example {unknown[:3]}")
        rows = torch.tensor([place[name] for name in ids])
        pick = lambda tensors: {k: v[rows] for k, v in tensors.items()}  # noqa: E731
        masks = None if self.masks is None else self.masks[rows]
        return Features(list(ids), pick(self.states), pick(self.losses), self.grids, masks, pick(self.factors))


def batches(data: Any, batch_size: int, indices: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    """Collated batches of a data set in order; only one is held at a time."""
    indices = range(len(data)) if indices is None else indices
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        yield collate(data.__getitems__(part) if hasattr(data, "__getitems__") else [data[i] for i in part])


def masks_by_id(ids: Sequence[str], grid: tuple[int, int], ratio: float | tuple[float, float], layout: str, seed: int) -> Tensor:
    """Masks [B, N] (True = hidden) that depend on each example's id and the seed alone, whatever it is batched with."""
    draws = (torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())) for name in ids)
    return torch.cat([draw_mask(1, grid, ratio, layout, generator) for generator in draws])


@torch.no_grad()
def _features(model: Any, batch: Mapping[str, Any], settings: Mapping[str, Any]) -> Features:
    """One batch through the flows that the settings of :func:`extract` name."""
    out = Features(list(batch["ids"]), {}, {}, {}, factors=dict(batch.get("factors", {})))
    for flow in settings["flows"]:
        if flow == "understanding":
            result = model.understanding_flow(batch, layers=settings["layers"])
        else:
            mask = masks_by_id(out.ids, model.grid, settings["mask_ratio"], settings["mask_layout"], settings["seed"])
            result = model.generation_flow(batch, layers=settings["layers"], mask=mask)
            out.masks = None if result.mask is None else result.mask.cpu()
        out.grids[flow], out.losses[flow] = result.grid, result.per_example_loss.float().cpu()
        for layer, states in result.hidden_states.items():
            out.states[flow, layer] = (states.float().mean(1) if settings["pooled"] else states).cpu()
    return out


def _write(part: Features, name: Path) -> None:
    """One shard, through a temporary file, so that a stop never leaves half of one under its final name."""
    tensors = {f"state.{flow}.{layer}": v.contiguous() for (flow, layer), v in part.states.items()}
    tensors |= {f"loss.{k}": v for k, v in part.losses.items()} | {f"factor.{k}": v.contiguous() for k, v in part.factors.items()}
    tensors |= {} if part.masks is None else {"masks": part.masks}
    partial = name.with_suffix(".partial")
    save_file(tensors, partial, {"ids": json.dumps(part.ids), "grids": json.dumps(part.grids)})
    partial.replace(name)


def _join(parts: Sequence[Features]) -> Features:
    states, losses, factors = (
        {k: torch.cat([getattr(part, name)[k] for part in parts]) for k in getattr(parts[0], name)}
        for name in ("states", "losses", "factors")
    )
    masks = [part.masks for part in parts if part.masks is not None]
    ids = [i for part in parts for i in part.ids]
    return Features(ids, states, losses, parts[0].grids, torch.cat(masks) if masks else None, factors)


def extract(
    model: Any,
    data: Any,
    flows: Sequence[str] = FLOWS,
    layers: Sequence[int] | None = None,
    pooled: bool = True,
    mask_ratio: float | tuple[float, float] = MASK_RATIO,
    mask_layout: str = "dispersed",
    seed: int = 0,
    batch_size: int = 64,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Features | Path:
    """States of both flows over a data set, one batch in memory at a time.

    Args:
        pooled: mean over image tokens [n, d] (DIVA Sec. 3.1), else tokens [n, N, d].
        folder: write one safetensors shard per batch there and return the folder; without it the result is returned.
            Shards that are already there are kept: a stopped run goes on where it was. Under torchrun every process makes its
            share of them, each example once.
    Raises:
        ValueError: unknown flow or layer, no data, ids that repeat, or a folder made with other settings, weights or examples.
    """
    if not flows or not set(flows) <= set(FLOWS):
        raise ValueError(f"flows are {list(flows)}; expected some of {FLOWS}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    if not len(data):
        raise ValueError("the data set is empty; expected at least one example")
    settings = {
        "flows": list(flows), "layers": None if layers is None else list(layers), "pooled": pooled, "mask_ratio": mask_ratio,
        "mask_layout": mask_layout, "seed": seed, "batch_size": batch_size, "n": len(data),
    }  # fmt: skip
    if folder is not None:
        folder = Path(folder)
        _claim(folder, settings | {"model": checksum(model)})
    rank, world = processes() if folder is not None else (0, 1)
    parts: list[Features] = []
    seen: set[str] = set()
    numbers = range(rank, -(-len(data) // batch_size), world)
    with evaluating(model):
        for k in tqdm(numbers, desc="flows", disable=not progress or rank > 0, delay=2):
            batch = next(batches(data, batch_size, range(k * batch_size, min((k + 1) * batch_size, len(data)))))
            if repeated := seen & set(batch["ids"]):
                raise ValueError(f"ids repeat in the data set: {sorted(repeated)[:3]}; features are kept by id: make them unique")
            seen |= set(batch["ids"])
            if folder is None:
                parts.append(_features(model, batch, settings))
                continue
            shard = folder / f"part-{k:06d}.safetensors"
            if not shard.exists():
                _write(_features(model, batch, settings), shard)
                continue
            with safe_open(shard, "pt") as file:
                if json.loads(file.metadata()["ids"]) != list(batch["ids"]):
                    raise ValueError(f"{shard} holds other examples than this data set; choose another folder")
    return _join(parts) if folder is None else folder


def processes() -> tuple[int, int]:
    """(number of this process, how many there are), as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings into a folder for features; refuse one that was made with others."""
    folder.mkdir(parents=True, exist_ok=True)
    about, wanted = folder / "features.json", json.loads(json.dumps(settings))
    made = json.loads(about.read_text())["settings"] if about.exists() else wanted
    if made != wanted:
        changed = [f"{k} {made.get(k)} (now {v})" for k, v in wanted.items() if made.get(k) != v]
        raise ValueError(f"{folder} holds features made with other settings: {', '.join(changed)}; choose another folder")
    partial = folder / f"features.{os.getpid()}.partial"  # several processes may come here at once
    partial.write_text(json.dumps({"settings": settings}))
    partial.replace(about)


def read(folder: str | Path, layers: Sequence[int] | None = None) -> Features:
    """Features that :func:`extract` wrote to a folder; of some ``layers`` alone, no others are held in memory.

    Raises:
        ValueError: no shards, some that are missing or cut short, ids that repeat, a layer that was not extracted.
    """
    names, about = sorted(Path(folder).glob("part-*.safetensors")), Path(folder) / "features.json"
    if not names:
        raise ValueError(f"{folder} holds no feature shards (part-*.safetensors)")
    if about.exists():
        settings = json.loads(about.read_text())["settings"]
        wanted = -(-settings["n"] // settings["batch_size"])
        if len(names) < wanted:
            raise ValueError(f"{folder} holds {len(names)} of {wanted} shards; extract again into it for the missing ones")
    parts = [_read_shard(name, layers) for name in names]
    out = _join(parts)
    if len(set(out.ids)) < len(out.ids):
        twice = sorted(name for name, n in Counter(out.ids).items() if n > 1)[:3]
        raise ValueError(f"ids repeat in {folder}: {twice}; features are kept by id: make them unique")
    return out


def _read_shard(name: Path, layers: Sequence[int] | None) -> Features:
    try:
        with safe_open(name, "pt") as shard:
            about = shard.metadata()
            keys = [k for k in shard.keys() if layers is None or not k.startswith("state.") or int(k.split(".")[2]) in layers]
            tensors = {key: shard.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{name} cannot be read ({error}); delete it and extract again, which makes it anew") from error
    grids = {flow: tuple(grid) for flow, grid in json.loads(about["grids"]).items()}
    part = Features(json.loads(about["ids"]), {}, {}, grids, tensors.pop("masks", None))
    for key, value in tensors.items():
        kind, rest = key.split(".", 1)
        if kind == "state":
            flow, layer = rest.split(".")
            part.states[flow, int(layer)] = value
        else:
            (part.losses if kind == "loss" else part.factors)[rest] = value
    if missing := [layer for layer in layers or [] if layer not in {layer for _, layer in part.states}]:
        raise ValueError(f"{name} holds no layers {missing}; it has {sorted({layer for _, layer in part.states})}")
    return part
