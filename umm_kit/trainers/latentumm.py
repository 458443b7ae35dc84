"""LatentUMM: an aligned latent of a stronger model (stage 1), and a backbone whose maps in and out of its own are tied (stage 2).

    stage 1   L = w_modal |z_t - z_i|^2 + w_cap |z - phi(G(z))|^2 + w_tgt |G(z) - e_i|^2 + guard            in the teacher's space
    stage 2   L = L_Und + L_Gen + w_modal |z_t - z_i|^2 + w_cap |z - z_hat|^2 + w_tgt |G(z) - e|^2 + guard + w_pref L_pref

z_t and z_i are means of the backbone's last states over words and over image tokens. The paper's body was not at hand: what is
called "released" follows the code its authors published, what is called "corrected" mends what measurements found wrong with it.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed
from transformers.hf_argparser import HfArg

from umm_kit.diagnostics.collapse import CollapseMonitor
from umm_kit.losses.alignment import GUARDS, latent_alignment
from umm_kit.losses.preference import released_preference
from umm_kit.models.aligner import LatentAligner, LatentAlignerConfig, LatentHeads
from umm_kit.models.base import evaluating
from umm_kit.models.teachers import EmbeddingTable, Teacher, embeddings, load_teacher
from umm_kit.records import write_json
from umm_kit.trainers.base import Stream, UMMArguments, UMMTrainer, post_train, run_record
from umm_kit.trainers.preference import PreferenceConfig, PreferenceTrainer, Step
from umm_kit.trainers.stages import captions_of
from umm_kit.trainers.variants import take_variant, varied

logger = logging.getLogger(__name__)


# --- stage 1: in the teacher's space -----------------------------------------------------------------------------------


@dataclass
class AlignerConfig(UMMArguments):
    """Configuration of :func:`train_aligner`; defaults are the release's, whose terms alone collapse (guard "none")."""

    output_dir: str | None = "runs/aligner"
    teacher: str = HfArg(default="tiny-teacher", help="A teacher's folder or id, or a table of embeddings.")
    data: str = HfArg(default="shapes", help="'shapes', 'digits' or an image-text folder.")
    modal_weight: float = 1.0
    capacity_weight: float = 1.0
    target_weight: float = 0.0
    guard: str = HfArg(default="none", help=f"One of {', '.join(GUARDS)}.")
    guard_weight: float = 1.0
    hidden_size: int = 1024
    num_layers: int = 2
    num_heads: int = 8
    dropout: float = 0.1
    per_device_train_batch_size: int = 32
    max_steps: int = 3000
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "constant"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    muon: bool = False

    def __post_init__(self) -> None:
        if self.guard not in GUARDS:
            raise ValueError(f"guard is {self.guard!r}; expected one of {GUARDS}")
        super().__post_init__()

    @classmethod
    def tiny(cls, **changes: Any) -> AlignerConfig:
        """Under a minute on a laptop: a narrower map at a higher rate. Its terms are the release's unless changed."""
        small: Any = dict(hidden_size=128, num_heads=4, max_steps=300, learning_rate=1e-3, per_device_train_batch_size=128)
        return cls(**{**small, "logging_steps": 10, **changes})


def guarded(guard: str, weight: float) -> dict[str, float]:
    """Weights of the parts of a guard: 25 to 1 for VICReg's variance and covariance, as its authors weigh them."""
    return {"none": {}, "vicreg": {"variance": weight, "covariance": weight / 25}, "infonce": {"infonce": weight}}[guard]


class AlignerStage(nn.Module):
    """An aligner with its losses on a batch of embeddings."""

    def __init__(self, aligner: LatentAligner, config: AlignerConfig):
        super().__init__()
        self.aligner, self.config = aligner, config

    def forward(self, e_text: Tensor, e_image: Tensor) -> dict[str, Tensor]:
        config, out = self.config, self.aligner(e_text, e_image)
        found = latent_alignment((out.z_text, out.z_image), (out.z, out.z_hat), (out.x_hat, e_image), config.guard)
        weights = {name: getattr(config, f"{name}_weight") for name in ("modal", "capacity", "target")}
        loss = found.weighted(**weights, **guarded(config.guard, config.guard_weight))
        parts = {f"{name}_loss": part for name in weights if (part := getattr(found, name)) is not None}
        return {"loss": loss, **parts, "z_text": out.z_text.detach(), "z_image": out.z_image.detach()}


class Watching(TrainerCallback):
    """Keeps the readings of a monitor in each checkpoint: what a resumed run compares with is the start of the run."""

    def __init__(self, monitor: CollapseMonitor):
        self.monitor = monitor

    @staticmethod
    def file(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "collapse.json"

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            write_json(self.file(args, state), self.monitor.state_dict())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step and self.file(args, state).exists():
            self.monitor.load_state_dict(json.loads(self.file(args, state).read_text()))


class AlignerTrainer(UMMTrainer):
    """Stage 1 on embeddings of a teacher; each line of the log holds a reading of collapse, and ``monitor`` all of them.

    Raises:
        ValueError: as :class:`LatentAligner` and :func:`latent_alignment`.
    """

    def __init__(self, aligner: LatentAligner, args: AlignerConfig, teacher: Teacher | EmbeddingTable, data: Any, **kwargs: Any):
        def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
            batch = {"ids": [i["id"] for i in items], "texts": [i["texts"] for i in items]}
            e_text, e_image = embeddings(teacher, {**batch, "images": torch.stack([i["images"] for i in items])})
            return {"e_text": e_text, "e_image": e_image}

        self.monitor = CollapseMonitor()
        length = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        stage = AlignerStage(aligner, args)
        super().__init__(stage, args, train_dataset=Stream(data, length, args.seed), data_collator=collate, **kwargs)
        self.add_callback(Watching(self.monitor))

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = {name: value for name, value in model(**inputs).items() if not name.startswith("z_")}
        if self.state.global_step % max(int(self.args.logging_steps), 1) == 0:
            with evaluating(model), torch.no_grad():  # once latents are near one point, dropout is most of what varies
                seen = model(**inputs)
            outputs |= watch(self.monitor, seen["z_text"], seen["z_image"], self.state.global_step)
        self.note_parts(outputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


def watch(monitor: CollapseMonitor, z_text: Tensor, z_image: Tensor, step: int) -> dict[str, Tensor]:
    """A reading of collapse for the log; new alarms are said aloud."""
    before = {alarm.reason for _, _, alarms in monitor.readings for alarm in alarms}
    alarms = monitor.update(z_text, z_image, step)
    for alarm in alarms:
        if alarm.reason not in before:
            logger.warning("step %d: %s", step, alarm)
            before.add(alarm.reason)
    reading = monitor.readings[-1][1].as_dict()
    kept = ("total_variance", "effective_rank", "positive_cosine", "negative_cosine", "retrieval_at_1", "uniformity")
    return {name: torch.tensor(reading[name]) for name in kept} | {"collapse_alarms": torch.tensor(float(len(alarms)))}


def open_teacher(name: str) -> Teacher | EmbeddingTable:
    """A teacher by name, folder or id; a file is a table of embeddings."""
    return EmbeddingTable.load(name) if Path(name).is_file() else load_teacher(name)


def train_aligner(config: AlignerConfig) -> LatentAligner:
    """Stage 1: train an aligner on a teacher's embeddings of ``config.data``, and save it with its run record."""
    from umm_kit.data import open_data

    set_seed(config.seed)
    teacher = open_teacher(config.teacher)
    sizes = {name: getattr(config, name) for name in ("hidden_size", "num_layers", "num_heads", "dropout")}
    aligner = LatentAligner(LatentAlignerConfig(embedding_size=teacher.dim, **sizes))
    trainer = AlignerTrainer(aligner, config, teacher, open_data(config.data, "train", seed=config.seed))
    trainer.fit()
    if trainer.is_world_process_zero():
        aligner.eval().save_pretrained(str(config.output_dir))
        record = run_record(config, trainer.seconds(), trainer.state.log_history, collapse=trainer.monitor.state_dict())
        write_json(Path(str(config.output_dir)) / "run.json", record)
    return aligner


# --- stage 2: in the backbone ------------------------------------------------------------------------------------------

# fmt: off
_VARIED = {
    #                     released    corrected
    "latents":           ("packed",   "apart"),
    "capacity":          ("heads",    "generation"),
    "guard":             ("none",     "infonce"),
    "preference":        ("released", "dpo"),
    "modal_weight":      (0.01,       0.01),
    "capacity_weight":   (0.01,       0.01),
    "target_weight":     (0.01,       0.01),
    "preference_weight": (0.001,      1.0),
    "rollouts":          (2,          4),
    "lora_rank":         (64,         8),
}
# fmt: on
VARIANTS = {name: {k: v[i] for k, v in _VARIED.items()} for i, name in enumerate(("released", "corrected"))}


@dataclass
class LatentUMMConfig(PreferenceConfig):
    """Configuration of :class:`LatentUMMTrainer`.

    ``variant`` sets the options of :data:`VARIANTS` that were not chosen:

    - "released": both latents from one sequence, in which the image has seen the words; two small MLPs beside the backbone stand
      for generation and re-encoding, so nothing is drawn; no guard against collapse; a preference for spread among noisy copies
      of a latent. (The release scales its adapters by 2; here the scale is 1.)
    - "corrected": the text before any image, the image before any text; the model draws and reads
      its drawing; InfoNCE keeps items apart; DPO on whole drawings, ranked by a frozen reader.
    """

    output_dir: str | None = "runs/latentumm"
    variant: str = HfArg(default="corrected", help="'released' or 'corrected'.")
    teacher: str = HfArg(default="tiny-teacher", help="A teacher's folder or id, or a table of embeddings.")
    latents: str = varied("'packed' (image states have seen the words) or 'apart'.")
    capacity: str = varied("'heads' (side MLPs) or 'generation' (draw and read).")
    guard: str = varied(f"One of {', '.join(GUARDS)}.")
    guard_weight: float = 0.01
    preference: str = varied("'released', 'dpo' or 'none'.")
    modal_weight: float = varied("Of |z_t - z_i|^2.")
    capacity_weight: float = varied("Of |z - z_hat|^2.")
    target_weight: float = varied("Of the distance to the teacher's embeddings; 0 needs no teacher.")
    preference_weight: float = varied("Of the preference term.")
    rollouts: int = varied("K.")
    lora_rank: int = varied("Of adapters; 0 trains full weights.")
    sigma: float = HfArg(default=0.05, help="Noise on a latent, for the released preference.")

    def __post_init__(self) -> None:
        take_variant(self, VARIANTS)
        known = {"latents": ("packed", "apart"), "capacity": ("heads", "generation"), "guard": GUARDS}
        for name, values in {**known, "preference": ("released", "dpo", "none")}.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {values}")
        weights = ("modal_weight", "capacity_weight", "target_weight", "guard_weight", "sigma")
        if negative := [name for name in weights if not getattr(self, name) >= 0]:
            raise ValueError(f"{negative} are negative or NaN; expected at least 0")
        if self.preference == "released" and self.preference_weight and not self.sigma:
            raise ValueError("sigma is 0: all rollouts of a latent are equal, and the released preference has no gradient")
        super().__post_init__()

    @property
    def draws_pairs(self) -> bool:
        return self.preference == "dpo" and super().draws_pairs

    @property
    def takes_latents(self) -> bool:
        """Whether any term is of the latents; plain fine-tuning and DPO alone leave them out, and their cost."""
        terms = (self.modal_weight, self.capacity_weight, self.target_weight, self.guard != "none" and self.guard_weight)
        return any(terms) or (self.preference == "released" and self.preference_weight > 0)


class LatentStep(Step):
    """Native losses, LatentUMM's terms on the anchors' latents, and a preference, as one module with the side heads."""

    def __init__(self, model: Any, embedding_size: int):
        super().__init__(model)
        self.heads = LatentHeads(model.hidden_size, embedding_size) if embedding_size else None

    def forward(self, batch: Mapping[str, Any], pair: Mapping[str, Any] | None, config: Any) -> dict[str, Tensor]:
        last = self.model.num_layers
        out, u, g = self.native(batch, [last] if config.takes_latents else [])
        if not config.takes_latents:
            return out | (self.preferred(pair, config) if pair is not None else {})
        anchor = batch["anchor"].nonzero()[:, 0]
        texts = [batch["drawn"][k] for k in anchor.tolist()]
        z_text = self.model.text_states(texts, [last])[last]
        seen = g if config.latents == "packed" else u
        z_image = seen.hidden_states[last][anchor].float().mean(1)
        # Noise belongs to the example and not to a process: a resumed run, and a run on more processes, draw the same.
        noise = [torch.Generator().manual_seed(zlib.crc32(batch["ids"][k].encode())) for k in anchor.tolist()]
        pairs: dict[str, Any] = {}
        if config.capacity_weight:
            if config.capacity == "generation":
                z_hat = self.model.regenerate(texts, [last], generator=noise)[last].float().mean(1)
            else:
                z_hat = self._heads.reencode(self._heads.generate(z_text))
            pairs["capacity"] = (z_text, z_hat)
        if config.target_weight:
            mapped = self._heads.generate(torch.cat([z_text, z_image]))
            pairs["target"] = (mapped, torch.cat([batch["e_text"], batch["e_image"]]).to(mapped))
        found = latent_alignment((z_text, z_image), **pairs, guard=config.guard)
        named = ("modal", "capacity", "target", "variance", "covariance", "infonce")
        out |= {f"{name}_loss": part for name in named if (part := getattr(found, name)) is not None}
        out |= {"z_text": z_text.detach(), "z_image": z_image.detach()}
        if config.preference == "released" and config.preference_weight:
            shape = (len(z_text), config.rollouts, z_text.shape[1])
            z = z_text[:, None] + config.sigma * torch.stack([torch.randn(shape[1:], generator=g) for g in noise]).to(z_text)
            again = self._heads.reencode(self._heads.generate(z.flatten(0, 1))).unflatten(0, z.shape[:2])
            scores = nn.functional.cosine_similarity(z_text[:, None], again, dim=-1)
            out["preference_loss"] = released_preference(scores)
            out |= {"rollout_best": scores.amax(1).mean().detach(), "rollout_mean": scores.mean().detach()}
            out |= {"rollout_worst": scores.amin(1).mean().detach()}
        return out | (self.preferred(pair, config) if pair is not None else {})

    @property
    def _heads(self) -> LatentHeads:
        assert self.heads is not None
        return self.heads


class LatentUMMTrainer(PreferenceTrainer):
    """Stage 2: trains a model in place. The log holds every term, and readings of collapse of both latents.

    Raises:
        ValueError: as :class:`PreferenceTrainer`; the model cannot give text states, or draw and read with gradient.
    """

    def __init__(self, model: Any, args: LatentUMMConfig, train_dataset: Any, teacher: Any = None, **kwargs: Any):
        needs = ["text_states"] + ["regenerate"] * (args.capacity == "generation" and args.capacity_weight > 0)
        if missing := [name for name in needs if not hasattr(model, name)]:
            raise ValueError(f"{type(model).__name__} has no {', '.join(missing)}; LatentUMM's {args.variant} form needs it")
        if "regenerate" in needs:  # who cannot says so here, and not after the first drawings
            with torch.no_grad():
                model.regenerate(captions_of([train_dataset[0]]), [])
        self.teacher = None
        if args.target_weight:
            self.teacher = open_teacher(args.teacher) if teacher is None else teacher
        self.monitor = CollapseMonitor()
        width = self.teacher.dim if self.teacher else model.hidden_size  # without a teacher G's space is of no meaning
        heads = args.target_weight > 0 or args.capacity == "heads" or args.preference == "released"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            step = LatentStep(model, width if heads else 0)
        super().__init__(model, args, train_dataset, step=step, **kwargs)
        self.add_callback(Watching(self.monitor))

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if self.teacher is not None:
            anchor = inputs["anchor"].nonzero()[:, 0].tolist()
            batch = {"ids": [inputs["ids"][k].rsplit(" ", 1)[0] for k in anchor], "texts": [inputs["drawn"][k] for k in anchor]}
            e_text, e_image = embeddings(self.teacher, {**batch, "images": inputs["images"][anchor]})
            inputs = {**inputs, "e_text": e_text, "e_image": e_image}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def weights(self) -> dict[str, float]:
        """Of every term of the loss."""
        parts = {f"{name}_loss": getattr(self.args, f"{name}_weight") for name in ("modal", "capacity", "target")}
        guards = {f"{name}_loss": weight for name, weight in guarded(self.args.guard, self.args.guard_weight).items()}
        return super().weights() | parts | guards

    def note_parts(self, outputs: Mapping[str, Tensor]) -> None:
        logged = {name: value for name, value in outputs.items() if name not in ("z_text", "z_image")}
        if "z_text" in outputs and self.state.global_step % max(int(self.args.logging_steps), 1) == 0:
            logged |= watch(self.monitor, outputs["z_text"], outputs["z_image"], self.state.global_step)
        super().note_parts(logged)


def train(config: LatentUMMConfig) -> Any:
    """Post-train ``config.model`` on ``config.data`` and save it, with its run record, to ``config.output_dir``."""
    seen: Any = lambda trainer: {"collapse": trainer.monitor.state_dict()}  # noqa: E731
    return post_train(config, lambda model, data: LatentUMMTrainer(model, config, data), seen)
