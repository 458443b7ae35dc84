"""Preference optimisation on a model's own drawings: the honest form of what LatentUMM's second stage is after.

In each round the model draws every prompt K times; a frozen reader, a copy of the model as it was, says how well each drawing
gives the prompt back; the best and the worst become a pair, and the model is trained by DPO against its frozen copy, beside its
native losses. The oracle has no part in it: it would know what no user's model can be told.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from umm_kit.features import evaluating
from umm_kit.losses.preference import best_and_worst, dpo
from umm_kit.models.base import Decoding, FlowOutput, checksum, elbo_masks
from umm_kit.models.factors import FLOWS
from umm_kit.trainers.base import PostTrainArguments, Stream, UMMTrainer, post_train
from umm_kit.trainers.stages import FlowCollator, Flows, adapters, captions_of

logger = logging.getLogger(__name__)


@dataclass
class PreferenceConfig(PostTrainArguments):
    """Configuration of :class:`PreferenceTrainer`."""

    output_dir: str | None = "runs/preference"
    rounds: int = HfArg(default=3, help="How often the model draws anew; the steps are divided among them.")
    prompts: int = HfArg(default=256, help="Captions that are drawn in each round.")
    rollouts: int = HfArg(default=4, help="K: drawings of each.")
    temperature: float = HfArg(default=1.0, help="Of drawing.")
    drawing_steps: int = HfArg(default=8, help="Rounds of masked prediction in a drawing.")
    threshold: float = HfArg(default=0.02, help="Best and worst must differ by more nats per word of the reader to be a pair.")
    pairs: int = HfArg(default=16, help="Pairs in each step.")
    draws: int = HfArg(default=8, help="Masks behind each likelihood (see elbo_masks).")
    beta: float = HfArg(default=0.05, help="How strongly DPO ties the model to its frozen copy.")
    alpha: float = HfArg(default=0.0, help="Weight of the chosen drawings' own likelihood, per token.")
    preference_weight: float = 1.0
    understanding_weight: float = 1.0
    generation_weight: float = 1.0
    lora_rank: int = HfArg(default=8, help="Of adapters on all blocks, merged at the end; 0 trains full weights.")
    max_steps: int = 300
    per_device_train_batch_size: int = 32
    learning_rate: float = 3e-4
    warmup_steps: float = 20
    weight_decay: float = 0.0
    save_steps: float = 100

    def __post_init__(self) -> None:
        if self.rollouts < 2:
            raise ValueError(f"rollouts is {self.rollouts}; a preference needs at least two drawings of one prompt")
        least = {"rounds": 1, "prompts": 2, "pairs": 1, "drawing_steps": 1, "lora_rank": 0}
        if small := [f"{name} = {getattr(self, name)}" for name, n in least.items() if getattr(self, name) < n]:
            raise ValueError(f"{', '.join(small)}; expected at least {', '.join(f'{k} = {n}' for k, n in least.items())}")
        if self.rounds > self.max_steps:
            raise ValueError(f"{self.rounds} rounds do not fit into {self.max_steps} steps")
        weights = ("preference_weight", "understanding_weight", "generation_weight")
        right = {"beta": self.beta > 0} | {k: getattr(self, k) >= 0 for k in ("alpha", "threshold", "temperature", *weights)}
        if wrong := [f"{name} = {getattr(self, name)}" for name, fine in right.items() if not fine]:
            raise ValueError(f"{', '.join(wrong)}; expected beta above 0, and the others at least 0")
        if self.draws < 2 or self.draws % 2:
            raise ValueError(f"draws is {self.draws}; masks come in pairs: expected an even number")
        super().__post_init__()

    @property
    def draws_pairs(self) -> bool:
        """Whether the model draws and is trained on pairs of drawings."""
        return self.preference_weight > 0

    @classmethod
    def tiny(cls, **changes: Any) -> PreferenceConfig:
        """A few minutes on a laptop; deviates from the default in sizes and steps only."""
        return cls(**{"rounds": 2, "prompts": 128, "max_steps": 100, "save_steps": 50, **changes})


@dataclass(frozen=True)
class Rollouts:
    """Drawings of one round, and how well the frozen reader finds each prompt in them."""

    texts: list[str]
    drawn: Tensor  # [n, K, N] codes, or [n, K, 3, H, W] pixels of a family without codes
    scores: Tensor  # [n, K], log-likelihood per word of the prompt, higher = better

    def spread(self) -> dict[str, float]:
        """Means over prompts of the best, the mean and the worst score, and of best - worst."""
        best, mean, worst = self.scores.amax(1).mean(), self.scores.mean(), self.scores.amin(1).mean()
        parts = {"best": best, "mean": mean, "worst": worst, "spread": best - worst}
        return {f"rollout_{name}": float(value) for name, value in parts.items()}


@torch.no_grad()
def roll_out(
    model: Any, reader: Any, texts: Sequence[str], rollouts: int, decoding: Decoding, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw each text K times and score what the reader makes of each: (drawings [n, K, ...], scores [n, K])."""
    said = [text for text in texts for _ in range(rollouts)]
    if hasattr(model, "generate_codes"):
        n = model.num_image_tokens
        blank = torch.zeros(len(said), n, dtype=torch.long, device=model.device)
        drawn = model.generate_codes(said, blank, torch.ones_like(blank, dtype=torch.bool), decoding, generator)
        images = model.image_tokenizer.decode(drawn).float()
    else:
        drawn = images = model.generate(said, decoding=decoding, generator=generator)
    batch = {"images": images, "ids": [str(k) for k in range(len(said))], "texts": said}
    scores = -reader.understanding_flow(batch, layers=[]).per_example_loss.float()
    return drawn.cpu().unflatten(0, (len(texts), rollouts)), scores.cpu().unflatten(0, (len(texts), rollouts))


class PreferenceTrainer(UMMTrainer):
    """Trains a model in place by DPO on rollouts of its own, beside its native losses.

    Each round's rollouts are kept in ``output_dir``/rollouts, batch by batch: a crash loses one batch, and a resumed run goes on
    with the same pairs. A run that is not resumed removes those of an earlier one.

    The log holds, besides both native losses: preference_loss (log 2 at first, and alpha times preference_nll), preference_nll
    (-log p of the chosen drawings), preference_margin, preference_accuracy, chosen_shift and rejected_shift (nats, policy -
    reference: both may fall), and at the start of each round rollout_best, _mean, _worst, _spread, pairs_kept (share of prompts
    whose drawings differ enough; a later round without any trains on the native losses alone).

    Raises:
        ValueError: no prompt of the first round has a pair (lower the threshold, or draw at a higher temperature); a cache of
            another run, or a run that is resumed with another configuration, model or data.
    """

    def __init__(self, model: Any, args: PreferenceConfig, train_dataset: Any, step: Step | None = None, **kwargs: Any):
        self.umm, self.data, self._round = model, train_dataset, -1
        self.rollouts: Rollouts | None = None
        self._frozen = (copy.deepcopy(model).eval().requires_grad_(False),)  # in a tuple: no submodule, and in no checkpoint
        self._trainable = [(p, p.requires_grad) for p in model.parameters()]
        self._in_layers = [p for group in model.layer_parameters().values() for p in group]
        if not args.lora_rank:
            model.requires_grad_(True)
        if hasattr(model, "image_tokenizer"):
            model.image_tokenizer.requires_grad_(False)
        length = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        collator = FlowCollator(train_dataset, model.grid, args, args.replay_every)  # type: ignore[arg-type]
        stream = Stream(train_dataset, length, args.seed)
        super().__init__(step or Step(model), args, train_dataset=stream, data_collator=collator, **kwargs)
        self._frozen[0].to(args.device)
        self._place, self._base = (-1, -1), checksum(self._frozen[0])

    # --- rollouts ---

    @property
    def round(self) -> int:
        return self.state.global_step * self.args.rounds // max(self.args.max_steps, 1)

    def collect(self, number: int) -> Rollouts:
        """The rollouts of a round: those of its folder, and what is missing there, drawn by the model as it is now."""
        args, folder = self.args, Path(str(self.args.output_dir)) / "rollouts" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        stream = Stream(self.data, args.rounds * args.prompts, args.seed + 2)
        parts = []
        size = max(1, 64 // args.rollouts)
        for start in range(0, args.prompts, size):
            places = range(number * args.prompts + start, number * args.prompts + min(start + size, args.prompts))
            texts, file = captions_of(stream.__getitems__(places)), folder / f"{start}.safetensors"
            made_of = {
                "model": self._base, "texts": zlib.crc32("\n".join(texts).encode()), "seed": args.seed,
                "rollouts": args.rollouts, "temperature": args.temperature, "drawing_steps": args.drawing_steps,
            }  # fmt: skip
            if not (part := self._kept(file, made_of)):
                part = self._drawn(self.umm, texts, places[0])
                if self.is_world_process_zero():
                    tensors = {k: v.contiguous() for k, v in part.items()}
                    save_file(tensors, file.with_suffix(".partial"), {"made_of": json.dumps(made_of)})
                    file.with_suffix(".partial").replace(file)
            parts.append((texts, part))
        texts = [text for some, _ in parts for text in some]
        return Rollouts(texts, *(torch.cat([part[name] for _, part in parts]) for name in ("drawn", "scores")))

    def _drawn(self, model: Any, texts: Sequence[str], first: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * self.args.seed + first)
        decoding = Decoding(steps=self.args.drawing_steps, temperature=self.args.temperature)
        with evaluating(model):
            drawn, scores = roll_out(model, self._frozen[0], texts, self.args.rollouts, decoding, generator)
        return {"drawn": drawn, "scores": scores}

    def before_and_after(self) -> dict[str, dict[str, float]]:
        """Scores of rollouts of the same prompts with the same noise, by the model as it came and as it is now.

        As many as in a round, and none that a round drew. The frozen reader judges both; whoever never trained on pairs can be
        judged, too.
        """
        stream = Stream(self.data, (self.args.rounds + 1) * self.args.prompts, self.args.seed + 2)
        last, size = self.args.rounds * self.args.prompts, max(1, 64 // self.args.rollouts)
        out = dict[str, dict[str, float]]()
        starts = range(last, len(stream), size)
        texts = [captions_of(stream.__getitems__(range(k, min(k + size, len(stream))))) for k in starts]
        for name, model in (("before", self._frozen[0]), ("after", self.umm)):
            parts = [self._drawn(model, some, k) for some, k in zip(texts, starts, strict=True)]
            out[name] = Rollouts([], *(torch.cat([part[key] for part in parts]) for key in ("drawn", "scores"))).spread()
        return out

    def _kept(self, file: Path, made_of: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """What a batch's file holds; None if there is none or a crash left half of one."""
        try:
            if not file.exists():
                return None
            with safe_open(file, "pt") as content:
                came = json.loads((content.metadata() or {}).get("made_of", "{}"))
                part = {name: content.get_tensor(name) for name in ("drawn", "scores")}
        except SafetensorError:
            return None
        if other := sorted(name for name, value in made_of.items() if came.get(name) != value):
            raise ValueError(f"{file} is of a run with another {', '.join(other)}: choose another output_dir, or remove it")
        return part

    def _next_round(self) -> None:
        self._round, self.rollouts = self.round, self.collect(self.round)
        chosen, rejected, keep = best_and_worst(self.rollouts.scores, self.args.threshold)
        rows = keep.nonzero()[:, 0]
        if not len(rows):
            came = f"best and worst differ by {self.rollouts.spread()['rollout_spread']:.3f} nats on average"
            said = f"none of {len(keep)} prompts has a pair: {came}, the threshold is {self.args.threshold}"
            if not self._round:
                raise ValueError(f"{said}; {'lower it, or ' * (self.args.threshold > 0)}draw at a higher temperature")
            logger.warning("round %d: %s; it trains on the native losses alone", self._round, said)
        self._pairs = rows, chosen[rows], rejected[rows]
        self.note_parts({k: torch.tensor(v) for k, v in (self.rollouts.spread() | {"pairs_kept": len(rows) / len(keep)}).items()})

    # --- training ---

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """The parameters ask for gradients afterwards as they did before."""
        if not self.args.resume and resume_from_checkpoint is None:
            if self.is_world_process_zero():
                shutil.rmtree(Path(str(self.args.output_dir)) / "rollouts", ignore_errors=True)
                Path(str(self.args.output_dir), "preference.json").unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
        self.claim_folder("preference.json")
        adapting: Any = nullcontext()
        if self.args.lora_rank:
            kept = Path(str(self.args.output_dir)) / "adapter" if self.is_world_process_zero() else None
            adapting = adapters(self.umm, self._in_layers, self.args.lora_rank, self.args.seed, kept, self.args.model)
            self.optimizer = None  # type: ignore[assignment]
        try:
            with adapting:
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            for p, before in self._trainable:
                p.requires_grad_(before)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        pairs = self.args.draws_pairs
        if pairs and self.round != self._round:
            self._next_round()
        terms = model(inputs, self._pair() if pairs else None, self.args)
        loss = torch.stack([weight * terms[name] for name, weight in self.weights().items() if name in terms]).sum()
        self.note_parts(terms)
        return (loss, {"loss": loss, **terms}) if return_outputs else loss

    def weights(self) -> dict[str, float]:
        """Of every term of the loss."""
        return {f"{name}_loss": getattr(self.args, f"{name}_weight") for name in (*FLOWS, "preference")}

    def _pair(self) -> dict[str, Any] | None:
        """This step's pairs, with the reference's likelihoods under the masks that the policy will be judged by."""
        assert self.rollouts is not None
        args, (rows, chosen, rejected) = self.args, self._pairs
        if not len(rows):
            return None
        step, micro = self._place
        self._place = step, micro = (self.state.global_step, micro + 1 if step == self.state.global_step else 0)
        number = step * args.gradient_accumulation_steps + micro % args.gradient_accumulation_steps
        first = (number * args.world_size + args.process_index) * args.pairs
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed + self._round))
        at = order[(first + torch.arange(args.pairs)) % len(rows)]
        seeds = range(args.seed + first, args.seed + first + args.pairs)
        out: dict[str, Any] = {"texts": [self.rollouts.texts[k] for k in rows[at]], "seeds": seeds}
        for name, which in (("chosen", chosen), ("rejected", rejected)):
            out[name] = self.rollouts.drawn[rows[at], which[at]].to(args.device)
            with torch.no_grad():
                out[f"reference_{name}"] = log_prob(self._frozen[0], out["texts"], out[name], args.draws, seeds)
        return out


def log_prob(model: Any, texts: Sequence[str], drawn: Tensor, draws: int, seeds: Sequence[int]) -> Tensor:
    """The model's (surrogate) log-likelihood of drawings; a seed makes a text's masks, whatever the model and the drawing.

    The masks belong to the pair and not to the process that has it. (Of pixels the first seed makes the noise of all.)
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if drawn.is_floating_point():
        return model.image_log_prob(texts, images=drawn, draws=draws, generator=generators[0])
    masks = torch.cat([elbo_masks(1, drawn.shape[1], draws, generator) for generator in generators], 1)
    return model.image_log_prob(texts, codes=drawn, masks=masks)


class Step(nn.Module):
    """One step as one module, as a process group wants it: native losses of a batch, and DPO's of some pairs."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self._flows, self._no_split_modules = (Flows(model),), getattr(model, "_no_split_modules", None)

    def forward(self, batch: Mapping[str, Any], pair: Mapping[str, Any] | None, config: PreferenceConfig) -> dict[str, Tensor]:
        return self.native(batch, [])[0] | (self.preferred(pair, config) if pair is not None else {})

    def native(self, batch: Mapping[str, Any], layers: Sequence[int]) -> tuple[dict[str, Tensor], FlowOutput, FlowOutput]:
        """Both losses, and what the flows left behind."""
        u, g = self._flows[0](batch, layers)
        return {f"{flow}_loss": r.per_example_loss.mean() for flow, r in zip(FLOWS, (u, g), strict=True)}, u, g

    def preferred(self, pair: Mapping[str, Any], config: PreferenceConfig) -> dict[str, Tensor]:
        """DPO's loss on pairs, and what it did."""
        chosen, rejected = (
            log_prob(self.model, pair["texts"], pair[name], config.draws, pair["seeds"]) for name in ("chosen", "rejected")
        )
        alpha = config.alpha / getattr(self.model, "num_image_tokens", 1)
        found = dpo(chosen, rejected, pair["reference_chosen"], pair["reference_rejected"], config.beta, alpha)
        out = {"preference_loss": found.loss, "preference_nll": found.nll}
        out |= {"preference_margin": found.margin.mean(), "preference_accuracy": found.accuracy}
        return out | {"chosen_shift": found.chosen_shift.mean(), "rejected_shift": found.rejected_shift.mean()}


def train(config: PreferenceConfig) -> Any:
    """Post-train ``config.model`` on its own drawings of ``config.data``, and save it with its run record."""
    return post_train(config, lambda model, data: PreferenceTrainer(model, config, data))
