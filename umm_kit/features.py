"""Hidden states of both flows, streamed by id: to memory when small, to safetensors shards when not."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from umm_kit.models.base import MASK_RATIO, collate, draw_mask

FLOWS = ("understanding", "generation")


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
        unknown = [name for name in ids if name not in place]
        if unknown:
            raise ValueError(f"{len(unknown)} ids have no features, for example {unknown[:3]}")
        rows = torch.tensor([place[name] for name in ids])
        return Features(
            list(ids),
            {k: v[rows] for k, v in self.states.items()},
            {k: v[rows] for k, v in self.losses.items()},
            self.grids,
            None if self.masks is None else self.masks[rows],
            {k: v[rows] for k, v in self.factors.items()},
        )


def batches(data: Any, batch_size: int, indices: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    """Collated batches of a data set in order; only one is held at a time."""
    indices = range(len(data)) if indices is None else indices
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        yield collate(data.__getitems__(part) if hasattr(data, "__getitems__") else [data[i] for i in part])


def _masks(ids: Sequence[str], grid: tuple[int, int], ratio: float | tuple[float, float], layout: str, seed: int) -> Tensor:
    """The mask of each example, drawn by its id and the seed alone: whatever it is batched with."""
    draws = [torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())) for name in ids]
    return torch.cat([draw_mask(1, grid, ratio, layout, generator) for generator in draws])


@torch.no_grad()
def _flow_batches(
    model: Any,
    data: Any,
    flows: Sequence[str],
    layers: Sequence[int] | None,
    pooled: bool,
    mask_ratio: float | tuple[float, float],
    mask_layout: str,
    seed: int,
    batch_size: int,
    progress: bool,
    folder: Path | None = None,
) -> Iterator[Features]:
    unknown = sorted(set(flows) - set(FLOWS))
    if unknown or not flows:
        raise ValueError(f"flows are {list(flows)}; expected some of {FLOWS}")
    seen: set[str] = set()
    was_training = model.training
    model.eval()
    try:
        total = -(-len(data) // batch_size)
        stream = tqdm(batches(data, batch_size), total=total, desc="flows", disable=not progress, delay=2)
        for number, batch in enumerate(stream):
            repeated = seen & set(batch["ids"])
            if repeated:
                raise ValueError(f"ids repeat in the data set: {sorted(repeated)[:3]}; features are kept by id: make them unique")
            seen |= set(batch["ids"])
            if folder is not None and _shard(folder, number).exists():
                with safe_open(_shard(folder, number), "pt") as shard:
                    found = json.loads(shard.metadata()["ids"])
                if found != list(batch["ids"]):
                    raise ValueError(f"{_shard(folder, number)} holds other examples than this data set; choose another folder")
                continue
            out = Features(list(batch["ids"]), {}, {}, {}, factors=dict(batch.get("factors", {})))
            for flow in flows:
                if flow == "understanding":
                    result = model.understanding_flow(batch, layers=layers)
                else:
                    mask = _masks(batch["ids"], model.grid, mask_ratio, mask_layout, seed)
                    result = model.generation_flow(batch, layers=layers, mask=mask)
                    out.masks = None if result.mask is None else result.mask.cpu()
                out.grids[flow], out.losses[flow] = result.grid, result.per_example_loss.float().cpu()
                for layer, states in result.hidden_states.items():
                    out.states[flow, layer] = (states.float().mean(1) if pooled else states).cpu()
            if folder is not None:
                _write(out, _shard(folder, number))
            yield out
    finally:
        model.train(was_training)


def checksum(model: Any) -> int:
    """Of all weights and buffers: features of two stages of one training must not be mixed."""
    check = 0
    for tensor in model.state_dict().values():
        check = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), check)
    return check


def _shard(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.safetensors"


def _write(part: Features, name: Path) -> None:
    """One shard, through a temporary file, so that a stop never leaves half of one under its final name."""
    tensors = {f"state.{flow}.{layer}": v.contiguous() for (flow, layer), v in part.states.items()}
    tensors |= {f"loss.{k}": v for k, v in part.losses.items()} | {f"factor.{k}": v.contiguous() for k, v in part.factors.items()}
    tensors |= {} if part.masks is None else {"masks": part.masks}
    partial = name.with_suffix(".partial")
    save_file(tensors, partial, {"ids": json.dumps(part.ids), "grids": json.dumps(part.grids)})
    partial.replace(name)


def _join(parts: Sequence[Features]) -> Features:
    first = parts[0]
    return Features(
        [name for part in parts for name in part.ids],
        {k: torch.cat([part.states[k] for part in parts]) for k in first.states},
        {k: torch.cat([part.losses[k] for part in parts]) for k in first.losses},
        first.grids,
        None if first.masks is None else torch.cat([part.masks for part in parts if part.masks is not None]),
        {k: torch.cat([part.factors[k] for part in parts]) for k in first.factors},
    )


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
            Shards that are already there are kept: a stopped run goes on where it was.
    Raises:
        ValueError: unknown flow or layer, no data, ids that repeat, or a folder made with other settings, weights or examples.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    if not len(data):
        raise ValueError("the data set is empty; expected at least one example")
    if folder is None:
        found = list(_flow_batches(model, data, flows, layers, pooled, mask_ratio, mask_layout, seed, batch_size, progress))
        return _join(found)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "flows": list(flows), "layers": None if layers is None else list(layers), "pooled": pooled, "mask_ratio": mask_ratio,
        "mask_layout": mask_layout, "seed": seed, "batch_size": batch_size, "n": len(data), "model": checksum(model),
    }  # fmt: skip
    about = folder / "features.json"
    wanted = json.loads(json.dumps(settings))
    made = json.loads(about.read_text())["settings"] if about.exists() else wanted
    if made != wanted:
        changed = [f"{k} {made.get(k)} (now {v})" for k, v in wanted.items() if made.get(k) != v]
        raise ValueError(f"{folder} holds features made with other settings: {', '.join(changed)}; choose another folder")
    about.write_text(json.dumps({"settings": settings}))
    for _ in _flow_batches(model, data, flows, layers, pooled, mask_ratio, mask_layout, seed, batch_size, progress, folder):
        pass
    return folder


def read(folder: str | Path) -> Features:
    """Features that :func:`extract` wrote to a folder."""
    names = sorted(Path(folder).glob("part-*.safetensors"))
    if not names:
        raise ValueError(f"{folder} holds no feature shards (part-*.safetensors)")
    parts = []
    for name in names:
        with safe_open(name, "pt") as shard:
            about = shard.metadata()
        tensors = load_file(name)
        states = {(k.split(".")[1], int(k.split(".")[2])): v for k, v in tensors.items() if k.startswith("state.")}
        pick = lambda kind, tensors=tensors: {k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)}  # noqa: E731
        ids, grids = json.loads(about["ids"]), {k: tuple(v) for k, v in json.loads(about["grids"]).items()}
        parts.append(Features(ids, states, pick("loss."), grids, tensors.get("masks"), pick("factor.")))
    return _join(parts)
