"""What one step of DIVA's training computes: batches for both flows, the modules of both stages, gradient projection."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from umm_kit.data.shapes import Scenes, meaning_key
from umm_kit.features import masks_by_id
from umm_kit.losses.factorization import UniqueCritic, alignment, orthogonality
from umm_kit.models.base import MASK_RATIO, FlowOutput, token_losses
from umm_kit.models.factors import FLOWS, FactorEncoders, Factors, Readouts

if TYPE_CHECKING:
    from umm_kit.trainers.diva import DIVAConfig


class FlowCollator:
    """Items of a :class:`Stream` to one batch for both flows: anchors, and among them every n-th item as replay.

    An anchor is a picture with its caption, in both flows, with a mask of ratio [0.2, 0.6]. A replay item is a question with its
    answer in U, and a drawing from text alone (all tokens hidden) in G: masks of at most 60 % alone would let drawing decay.
    """

    def __init__(self, data: Any, grid: tuple[int, int], config: DIVAConfig, replay_every: int):
        self.data, self.grid, self.config, self.replay_every = data, grid, config, replay_every

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        numbers, places = [item["number"] for item in items], [item["index"] for item in items]
        anchor = np.array([not self.replay_every or k % self.replay_every != self.replay_every - 1 for k in numbers])
        prompts: list[str | None] = [None] * len(items)
        said, drawn = [item["texts"] for item in items], [item["texts"] for item in items]
        mask = masks_by_id([str(k) for k in numbers], self.grid, MASK_RATIO, self.config.mask_layout, self.config.seed)
        for i in np.flatnonzero(~anchor):
            mask[i] = True
            if hasattr(self.data, "questions") and (asked := self.data.questions([places[i]], 1)[0]):
                prompts[i], said[i] = asked[0]
            if hasattr(self.data, "drawing_texts"):
                drawn[i] = self.data.drawing_texts([places[i]])[0]
        return {
            "images": torch.stack([item["images"] for item in items]),
            "ids": [f"{item['id']} {k}" for item, k in zip(items, numbers, strict=True)],
            "prompts": prompts, "said": said, "drawn": drawn, "mask": mask,
            "anchor": torch.from_numpy(anchor), "places": torch.tensor(places), "facts": torch.from_numpy(facts_of(items)),
        }  # fmt: skip


def facts_of(items: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """An integer per item, equal where captions mean the same: of scenes the multiset of their objects, else the text."""
    if all({"count", "cell", "shape", "colour", "size"} <= set(item.get("factors", {})) for item in items):
        columns = [np.stack([np.asarray(item["factors"][k]) for item in items]) for k in Scenes.blank(0).factors()]
        return meaning_key(Scenes(*columns)).astype(np.int64)
    return np.array([zlib.crc32(item["texts"].encode()) for item in items], dtype=np.int64)


class Flows(nn.Module):
    """Both flows of one batch as one module: what averaged weights, and a process group, can be put around."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any], layers: Sequence[int]) -> tuple[FlowOutput, FlowOutput]:
        common: dict[str, Any] = {"images": batch["images"], "ids": batch["ids"]}
        if hasattr(self.model, "image_tokenizer"):  # both flows need the same codes
            common["codes"] = self.model.image_tokenizer.encode(batch["images"])
        u = self.model.understanding_flow({**common, "texts": batch["said"], "prompts": batch["prompts"]}, layers)
        return u, self.model.generation_flow({**common, "texts": batch["drawn"]}, mask=batch["mask"], layers=layers)


def states_at(u: FlowOutput, g: FlowOutput, layer: int, rows: Tensor, pooled: bool) -> dict[str, Tensor]:
    """States of some rows at one layer, by flow: [rows, d] (mean over image tokens) or [rows, N, d]."""
    out = {flow: result.hidden_states[layer][rows].float() for flow, result in zip(FLOWS, (u, g), strict=True)}
    return {flow: states.mean(1) for flow, states in out.items()} if pooled else out


# --- stage 1 -----------------------------------------------------------------------------------------------------------


class EncoderStage(nn.Module):
    """Encoders and readouts around a frozen backbone, which is no submodule: no checkpoint of this stage holds it."""

    def __init__(self, model: Any, encoders: FactorEncoders, readouts: Readouts, layers: Sequence[int], config: DIVAConfig):
        super().__init__()
        self.encoders, self.readouts, self.layers, self.config = encoders, readouts, list(layers), config
        self._flows = (Flows(model),)
        self.pooled = config.encoder != "transformer"

    def forward(self, batch: Mapping[str, Any], unique: bool) -> dict[str, Tensor]:
        with torch.no_grad():
            u, g = self._flows[0](batch, self.layers)
        logits, labels = {"understanding": u.logits, "generation": g.logits}, {"understanding": u.labels, "generation": g.labels}
        if u.logits is None or g.logits is None:
            raise NotImplementedError(f"{type(self._flows[0].model).__name__} has a flow without logits to put biases on (Eq. 8)")
        out: dict[str, list[Tensor]] = {name: [] for name in ("understanding_loss", "generation_loss", "orthogonality_loss")}
        for layer in self.layers:
            z = self.encoders(states_at(u, g, layer, batch["anchor"], self.pooled))
            if unique:
                out["orthogonality_loss"].append(self._orthogonality(z))
            for flow, s in self.readouts(logits, z, unique).items():
                out[f"{flow}_loss"].append(token_losses(s, labels[flow])[1].mean())
        means = {name: torch.stack(values).mean() for name, values in out.items() if values}
        weights = {"orthogonality_loss": self.config.orthogonality_weight}
        loss = torch.stack([weights.get(name, 1.0) * value for name, value in means.items()]).sum()
        gains = {f"{flow}_gain": r.per_example_loss.mean() - means[f"{flow}_loss"] for flow, r in zip(FLOWS, (u, g), strict=True)}
        return {"loss": loss, **means, **{name: value.detach() for name, value in gains.items()}}

    def _orthogonality(self, z: Factors) -> Tensor:
        how, terms = self.config.orthogonality, []
        for flow in FLOWS:
            parts = orthogonality(z.shared[flow].flatten(0, -2), z.unique[flow].flatten(0, -2), how.replace("overlap", "batch"))
            terms.append(parts.overlap if how == "overlap" else parts.loss)
        return torch.stack(terms).sum()


class BackboneStage(nn.Module):
    """The backbone under native losses and the factor terms; its frozen encoders are no submodule."""

    def __init__(self, model: Any, encoders: FactorEncoders | None, layers: Sequence[int], config: DIVAConfig):
        super().__init__()
        self.model, self.layers, self.config = model, list(layers) if encoders is not None else [], config
        self._flows, self._encoders = (Flows(model),), (encoders,)
        self._no_split_modules = getattr(model, "_no_split_modules", None)

    def factors(self, u: FlowOutput, g: FlowOutput, anchor: Tensor) -> list[Factors]:
        """Of the anchors, one per layer."""
        encoders = self._encoders[0]
        assert encoders is not None
        return [encoders(states_at(u, g, layer, anchor, self.config.encoder != "transformer")) for layer in self.layers]

    def forward(
        self, batch: Mapping[str, Any], targets: Sequence[Factors] | None, critics: Sequence[UniqueCritic], queues: Mapping
    ) -> dict[str, Tensor]:
        u, g = self._flows[0](batch, self.layers)
        out = {f"{flow}_loss": r.per_example_loss.mean() for flow, r in zip(FLOWS, (u, g), strict=True)}
        if not self.layers or not all(bool(torch.isfinite(loss)) for loss in out.values()):
            return out  # the trainer says what is wrong with it
        anchor, parts = batch["anchor"], list[dict[str, Tensor]]()
        facts = batch["facts"][anchor] if self.config.mask_equal_facts else None
        for k, z in enumerate(self.factors(u, g, anchor)):
            part: dict[str, Tensor] = {}
            pooled = [{flow: v if v.ndim == 2 else v.mean(1) for flow, v in f.items()} for f in (z.shared, z.unique)]
            goal = pooled[0] if targets is None else {f: v if v.ndim == 2 else v.mean(1) for f, v in targets[k].shared.items()}
            if self.config.shared_weight:
                found = []
                for flow, other in (FLOWS, FLOWS[::-1]):
                    more = {"queue": queues[k, other][0], "queue_facts": queues[k, other][1]} if (k, other) in queues else {}
                    if facts is None:
                        more.pop("queue_facts", None)
                    how = (self.config.stop_gradient, self.config.temperature, facts)
                    found.append(alignment(pooled[0][flow], goal[other], *how, **more))
                part["shared_loss"] = found[0].loss + found[1].loss
                part["shared_estimate"] = (found[0].estimate + found[1].estimate).detach() / 2
                part["shared_bound"] = torch.tensor((found[0].bound + found[1].bound) / 2)
                part["shared_accuracy"] = (found[0].accuracy + found[1].accuracy) / 2
            if self.config.unique_weight:
                penalty = critics[k](pooled[1]["understanding"], pooled[1]["generation"], batch["places"][anchor])
                part |= {"unique_loss": penalty.loss, "unique_contrast": penalty.contrast}
                part |= {"critic_estimate": torch.tensor(penalty.held_out), "critic_bound": torch.tensor(penalty.bound)}
                part["unique_active"] = torch.tensor(float(penalty.active))
            parts.append(part)
        out |= {name: torch.stack([part[name].to(u.loss.device) for part in parts]).mean() for name in parts[0]}
        return out


def projected(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """PCGrad (Yu et al. 2020) for two tasks: each gradient loses its part against the other where <a, b> < 0; then their sum.

    a - <a, b> / <b, b> b + b - <a, b> / <a, a> a,  inner products over all parameters together; a + b where <a, b> >= 0.

    Example:
        >>> list(projected([torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]))
        [tensor([0.5000, 1.5000])]
    """
    pairs = list(zip(first, second, strict=True))
    dot = sum(float((a * b).sum()) for a, b in pairs if a is not None and b is not None)
    squares = [sum(float(x.square().sum()) for x in side if x is not None) for side in (first, second)]
    scales = [1 - dot / square if dot < 0 else 1.0 for square in squares]
    for pair in pairs:
        kept = [scale * gradient for scale, gradient in zip(scales, pair, strict=True) if gradient is not None]
        yield sum(kept[1:], start=kept[0]) if kept else None
