"""What one step of DIVA's training computes: batches for both flows, the modules of both stages, how gradients are combined."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from umm_kit.data.shapes import Scenes, meaning_key
from umm_kit.features import masks_by_id
from umm_kit.losses.factorization import ConditionalGaussian, UniqueCritic, alignment, orthogonality
from umm_kit.models.base import MASK_RATIO, FlowOutput, checksum, example_losses, scores_of
from umm_kit.models.factors import FLOWS, FactorEncoders, Factors, Readouts

if TYPE_CHECKING:
    from umm_kit.trainers.variants import DIVAConfig


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
        drawn = (said := captions_of(items)).copy()
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


def captions_of(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """What items say; a ValueError where one says nothing."""
    if mute := [item["id"] for item in items if not str(item["texts"] or "").strip()]:
        raise ValueError(f"items {mute[:3]} have no caption; expected words for each: leave them out, or write captions")
    return [item["texts"] for item in items]


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
        if "codes" in batch:
            common["codes"] = batch["codes"]
        elif hasattr(self.model, "image_tokenizer"):  # both flows need the same codes
            common["codes"] = self.model.image_tokenizer.encode(batch["images"])
        u = self.model.understanding_flow({**common, "texts": batch["said"], "prompts": batch["prompts"]}, layers)
        return u, self.model.generation_flow({**common, "texts": batch["drawn"]}, mask=batch["mask"], layers=layers)


def reconstruction(model: Any, batch: Mapping[str, Any], u: FlowOutput, layer: int) -> FlowOutput:
    """The whole image, all of it hidden, drawn from what understanding made of it (after RecA, arXiv 2509.07295).

    No caption: between an empty text and the image stand U's states of the image at one layer, the mean over each block of 2 x 2
    tokens, normalised and detached. RecA takes those of a separate vision encoder; here one backbone is all there is.
    """
    h = u.hidden_states[layer].detach().float().unflatten(1, u.grid).permute(0, 3, 1, 2)
    blocks = nn.functional.avg_pool2d(h, 2, ceil_mode=True).flatten(2).transpose(1, 2)
    condition = nn.functional.layer_norm(blocks, blocks.shape[-1:]) * blocks.shape[-1] ** -0.5  # as large as embeddings are
    again = {k: v for k, v in batch.items() if k in ("images", "ids", "codes")} | {"texts": [""] * len(h)}
    hidden = torch.ones(len(h), u.grid[0] * u.grid[1], dtype=torch.bool)
    return model.generation_flow({**again, "condition": condition}, mask=hidden, layers=[])


def paired(rows: Tensor, flow: str, config: DIVAConfig) -> Tensor:
    """Rows [anchors, ...] of a flow in the order in which they meet the other's: with ``pairs="shuffled"`` U_i meets G_{i + 1}.

    A rotation leaves no anchor in its place. It is within the batch of this process, and the same in both stages.
    """
    return rows.roll(-1, 0) if config.pairs == "shuffled" and flow == "generation" else rows


def _paired_output(out: FlowOutput, flow: str, config: DIVAConfig) -> FlowOutput:
    """What a flow predicted and should have, in the order in which its rows meet the other's."""
    names = ("logits", "labels", "prediction", "target", "mask")
    turned: dict[str, Any] = {n: paired(v, flow, config) for n in names if (v := getattr(out, n)) is not None}
    return replace(out, **turned)


def states_at(u: FlowOutput, g: FlowOutput, layer: int, anchor: Tensor, config: DIVAConfig) -> dict[str, Tensor]:
    """States of the anchors at one layer by flow, in pairs: [anchors, d], the mean over image tokens, or [anchors, N, d]."""
    states = {flow: r.hidden_states[layer][anchor].float() for flow, r in zip(FLOWS, (u, g), strict=True)}
    return {flow: paired(h if config.encoder == "transformer" else h.mean(1), flow, config) for flow, h in states.items()}


def pooled(factor: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of every flow [anchors, f], of tokens their mean."""
    return {flow: z if z.ndim == 2 else z.mean(1) for flow, z in factor.items()}


# --- terms on factors, of one layer ------------------------------------------------------------------------------------


def shared_terms(
    z: Factors, targets: Factors, batch: Mapping[str, Any], queues: Mapping[str, tuple[Tensor, Tensor]], config: DIVAConfig
) -> dict[str, Tensor]:
    """Eq. 10 in both directions, each towards the other flow's ``targets``, and what it says of their information."""
    x, y, found = pooled(z.shared), pooled(targets.shared), []
    for flow, other in (FLOWS, FLOWS[::-1]):
        facts = paired(batch["facts"][batch["anchor"]], other, config) if config.mask_equal_facts else None
        queue, queue_facts = queues.get(other, (None, None))
        if facts is None:
            queue_facts = None
        found.append(alignment(x[flow], y[other], config.stop_gradient, config.temperature, facts, queue, queue_facts))
    return {
        "shared_loss": found[0].loss + found[1].loss,
        "shared_estimate": (found[0].estimate + found[1].estimate).detach() / 2,
        "shared_bound": torch.tensor((found[0].bound + found[1].bound) / 2),
        "shared_accuracy": (found[0].accuracy + found[1].accuracy) / 2,
    }


class ReleasedCritic(UniqueCritic):
    """CLUB as DIVA's authors released it: what one vector tells of another by a diagonal normal, fitted as training goes on.

    See ``gaussian_scores(variant="released")``. On each batch one step of maximum likelihood, after its penalty; no buffer,
    nothing kept out of it, and no threshold: it always pushes. ``held_out`` is the InfoNCE estimate of its scores.

    Example:
        >>> ReleasedCritic(2)(torch.randn(8, 2), torch.randn(8, 2), torch.arange(8)).active  # untrained
        True
    """

    def __init__(self, size: int, seed: int = 0, learning_rate: float = 1e-3):
        super().__init__(size, capacity=2, batch_size=2, threshold=-math.inf, seed=seed, repeats=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.critic = ConditionalGaussian(size, size, variant="released")  # type: ignore[assignment]
        self.optimizer = torch.optim.AdamW(self.critic.parameters(), lr=learning_rate)

    def _learn(self, x: Tensor, y: Tensor, ids: Tensor) -> None:
        with torch.enable_grad():
            self.optimizer.zero_grad()
            (-self.critic(x, y).diagonal().mean() / 2).backward()  # released scores are twice a log-likelihood
        self.optimizer.step()
        self.optimizer.zero_grad()


def new_critics(size: int, layers: int, config: DIVAConfig, repeats: bool) -> list[UniqueCritic]:
    """As many for each layer as :func:`unique_terms` takes; ``repeats``: whether training sees an anchor more than once."""
    if config.penalty == "within":
        return [ReleasedCritic(size, seed=config.seed + k).to(config.device) for k in range(layers * len(FLOWS))]
    return [UniqueCritic(size, seed=config.seed + k, repeats=repeats).to(config.device) for k in range(layers)]


def unique_terms(z: Factors, critics: Sequence[UniqueCritic], batch: Mapping[str, Any], config: DIVAConfig) -> dict[str, Tensor]:
    """The penalty on unique factors, across flows (Eq. 7) or within each against its shared factor; sums and means of critics."""
    shared, unique = pooled(z.shared), pooled(z.unique)
    across = [(unique["understanding"], unique["generation"])]
    asked = across if config.penalty == "across" else [(shared[flow], unique[flow]) for flow in FLOWS]
    places = batch["places"][batch["anchor"]]
    found = [critic(x, y, places) for critic, (x, y) in zip(critics, asked, strict=True)]
    return {
        "unique_loss": torch.stack([penalty.loss for penalty in found]).sum(),
        "unique_contrast": torch.stack([penalty.contrast for penalty in found]).sum(),
        "critic_estimate": torch.tensor([penalty.held_out for penalty in found]).mean(),
        "critic_bound": torch.tensor([penalty.bound for penalty in found]).mean(),
        "unique_active": torch.tensor([float(penalty.active) for penalty in found]).mean(),
    }


def orthogonality_term(z: Factors, config: DIVAConfig) -> Tensor:
    """Eq. 9 in the chosen reading, summed over the flows."""
    how, terms = config.orthogonality, []
    for flow in FLOWS:
        parts = orthogonality(z.shared[flow].flatten(0, -2), z.unique[flow].flatten(0, -2), how.replace("overlap", "batch"))
        terms.append(parts.overlap if how == "overlap" else parts.loss)
    return torch.stack(terms).sum()


def bag_of_words(labels: Tensor, vocabulary: int) -> Tensor:
    """How often each word stands in the supervised text: [B, positions], -100 elsewhere, to [B, V].

    Example:
        >>> bag_of_words(torch.tensor([[-100, 2, 0, 2]]), 3)
        tensor([[1., 0., 2.]])
    """
    return nn.functional.one_hot(labels.clamp(min=0), vocabulary).mul((labels >= 0)[..., None]).sum(1).float()


# --- stage 1 -----------------------------------------------------------------------------------------------------------


class EncoderStage(nn.Module):
    """Encoders and readouts around a frozen backbone, which is no submodule: no checkpoint of this stage holds it.

    A gain in understanding may be no more than words that z_sh^G leaks: G was shown the caption. With ``bag_of_words`` the
    caption's words stand in for z_sh^G, behind a readout of the same rank: what ``understanding_gain`` reaches then, leaked words
    can explain. (E_sh^G stays as it was drawn.)
    """

    def __init__(self, model: Any, encoders: FactorEncoders, readouts: Readouts, layers: Sequence[int], config: DIVAConfig):
        super().__init__()
        self.encoders, self.readouts, self.layers, self.config = encoders, readouts, list(layers), config
        self._flows = (Flows(model),)
        if config.bag_of_words:
            readouts.read_words()

    def forward(
        self, batch: Mapping[str, Any], unique: bool, critics: Sequence[UniqueCritic] = (), ramp: float = 1.0
    ) -> dict[str, Tensor]:
        """Mean of every term over the layers, and their weighted sum ``loss``; ``ramp`` is the critics' penalty's."""
        config, each = self.config, len(critics) // len(self.layers)
        with torch.no_grad():
            u, g = self._flows[0](batch, self.layers)
        outs = {flow: _paired_output(r, flow, config) for flow, r in zip(FLOWS, (u, g), strict=True)}
        scores = {flow: scores_of(r) for flow, r in outs.items()}
        words = None
        if config.bag_of_words:
            assert u.labels is not None
            words = paired(bag_of_words(u.labels, scores["understanding"].shape[-1]), "generation", config)
        found: dict[str, list[Tensor]] = {}
        for k, layer in enumerate(self.layers):
            z = self.encoders(states_at(u, g, layer, batch["anchor"], config))
            terms = shared_terms(z, z, batch, {}, config) if config.stage1_alignment else {}
            if unique and config.orthogonality_weight:
                terms["orthogonality_loss"] = orthogonality_term(z, config)
            if unique and critics:
                terms |= unique_terms(z, critics[k * each : (k + 1) * each], batch, config)
            read = z if words is None else Factors({**z.shared, "generation": words}, z.unique)
            for flow, s in self.readouts(scores, read, unique).items():
                terms[f"{flow}_loss"] = example_losses(outs[flow], s).mean()
            for name, value in terms.items():
                found.setdefault(name, []).append(value)
        means = {name: torch.stack(values).mean() for name, values in found.items()}
        gains = {f"{flow}_gain": r.per_example_loss.mean() - means[f"{flow}_loss"] for flow, r in zip(FLOWS, (u, g), strict=True)}
        loss = torch.stack(list(self.weighted(means, ramp).values())).sum()
        return {"loss": loss, **means, **{name: value.detach() for name, value in gains.items()}}

    def weighted(self, terms: Mapping[str, Tensor], ramp: float) -> dict[str, Tensor]:
        """Those terms that are losses, as they enter the sum."""
        weights = {"orthogonality_loss": self.config.orthogonality_weight, "shared_loss": self.config.shared_weight}
        weights["unique_loss"] = ramp * self.config.unique_weight
        return {name: weights.get(name, 1.0) * value for name, value in terms.items() if name.endswith("_loss")}


# --- stage 2 -----------------------------------------------------------------------------------------------------------


class BackboneStage(nn.Module):
    """The backbone under native losses and the factor terms; encoders are a submodule only if they are trained."""

    def __init__(self, model: Any, encoders: FactorEncoders | None, layers: Sequence[int], config: DIVAConfig):
        super().__init__()
        self.model, self.config = model, config
        self._flows, self._no_split_modules = (Flows(model),), getattr(model, "_no_split_modules", None)
        self.layers, self._encoders = list[int](), tuple[FactorEncoders, ...]()
        if encoders is not None:
            self.take(encoders, layers)

    def take(self, encoders: FactorEncoders, layers: Sequence[int]) -> None:
        """From now on with terms on these encoders' factors of these layers."""
        self.layers, self._encoders = list(layers), (encoders.requires_grad_(self.config.train_encoders),)
        if self.config.train_encoders:
            self.encoders = encoders

    def factors(self, u: FlowOutput, g: FlowOutput, anchor: Tensor) -> list[Factors]:
        """Of the anchors, one per layer."""
        return [self._encoders[0](states_at(u, g, layer, anchor, self.config)) for layer in self.layers]

    def forward(
        self, batch: Mapping[str, Any], targets: Sequence | None = None, critics: Sequence = (), queues: Mapping | None = None
    ) -> Any:
        """Every term; without queues the anchors' factors alone, one per layer."""
        if queues is None:
            u, g = self._flows[0](batch, self.layers)
            return self.factors(u, g, batch["anchor"])
        drawn_from = [max(1, self.model.num_layers // 2)] if self.config.reconstruction_weight else []
        if drawn_from and hasattr(self.model, "image_tokenizer"):  # three flows need the same codes
            batch = {**batch, "codes": self.model.image_tokenizer.encode(batch["images"])}
        u, g = self._flows[0](batch, sorted({*self.layers, *drawn_from}))
        out = {f"{flow}_loss": r.per_example_loss.mean() for flow, r in zip(FLOWS, (u, g), strict=True)}
        for layer in drawn_from:
            out["reconstruction_loss"] = reconstruction(self.model, batch, u, layer).per_example_loss.mean()
        if not self.layers or not all(bool(torch.isfinite(loss)) for loss in out.values()):
            return out  # the trainer says what is wrong with it
        parts, each = list[dict[str, Tensor]](), len(critics) // len(self.layers)
        for k, z in enumerate(self.factors(u, g, batch["anchor"])):
            part: dict[str, Tensor] = {}
            if self.config.shared_weight:
                queue = {flow: queues[k, flow] for flow in FLOWS if (k, flow) in queues}
                part |= shared_terms(z, z if targets is None else targets[k], batch, queue, self.config)
            if self.config.unique_weight:
                part |= unique_terms(z, critics[k * each : (k + 1) * each], batch, self.config)
            if self.config.stage2_orthogonality_weight:
                part["orthogonality_loss"] = orthogonality_term(z, self.config)
            parts.append(part)
        out |= {name: torch.stack([part[name].to(u.loss.device) for part in parts]).mean() for name in parts[0]}
        return out


@contextmanager
def adapters(
    model: nn.Module, parameters: Iterable[nn.Parameter], rank: int, seed: int = 0, folder: Path | None = None, base: str = ""
) -> Iterator[None]:
    """LoRA (Hu et al. 2022): W + B A of low rank in the place of each linear map W among the parameters, and only A, B trained.

    peft puts them into the model, which keeps its shape; afterwards they are added to the weights (and rounded, where these have
    16 bits) and gone. B starts at zero. The scale of B A is 1. In ``folder`` they are kept by themselves, as peft keeps them,
    with the checksum and precision of the weights that they belong to; ``umm_kit.load(folder)`` adds them to ``base``.

    Raises:
        ValueError: none of the parameters is the weight of a linear map.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel
    from peft.utils import get_peft_model_state_dict

    wanted = {id(p) for p in parameters}
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m.weight) in wanted]
    if not names:
        raise ValueError("lora_rank is above 0, but the trained layers hold no torch.nn.Linear; train full weights instead")
    before = {"base_checksum": str(checksum(model)) if folder is not None else ""}
    before["base_dtype"] = str(next(p for p in model.parameters() if id(p) in wanted).dtype).removeprefix("torch.")
    with torch.random.fork_rng(devices=[]):  # the same start in a run that is resumed, and on all processes
        torch.manual_seed(seed)
        exactly = "|".join(re.escape(name) for name in names)  # peft takes a list for endings of names
        settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly, base_model_name_or_path=base)
        tuner = LoraModel(model, {"default": settings}, "default")  # type: ignore[arg-type]
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data = p.data.float()  # in 16 bits, as the weights beside them may be, small updates would be lost
    try:
        yield
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            trained = get_peft_model_state_dict(tuner, adapter_name="default", save_embedding_layers=False)
            trained = {f"base_model.model.{name.removeprefix('model.')}": p.contiguous().cpu() for name, p in trained.items()}
            save_file(trained, folder / "adapter_model.safetensors", before)
            settings.save_pretrained(str(folder))
    finally:
        tuner.merge_and_unload()


# --- gradients of two tasks --------------------------------------------------------------------------------------------


def norm_of(gradient: Iterable[Tensor | None]) -> float:
    """Euclidean norm of all tensors together; None is zero."""
    return math.sqrt(sum(float(part.float().square().sum()) for part in gradient if part is not None))


def equalising(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> tuple[float, float]:
    """Factors that bring two gradients to the mean of their norms: (m / |a|, m / |b|) with m = (|a| + |b|) / 2.

    (1, 1) if either is zero: there is nothing to balance.

    Example:
        >>> equalising([torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 15.0])])
        (2.0, 0.6666666666666666)
    """
    norms = norm_of(first), norm_of(second)
    mean = sum(norms) / 2
    return (mean / norms[0], mean / norms[1]) if min(norms) > 0 else (1.0, 1.0)


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
