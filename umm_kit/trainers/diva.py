"""DIVA post-training (Sec. 3.3): factor encoders on a frozen backbone, then the backbone's middle on what the factors say.

    stage 1   L = L_Und(s~_U) + L_Gen(s~_G) + w_perp L_perp                  encoders and readouts, backbone frozen
    stage 2   L = L_Und + L_Gen + r(t) [w_sh (L_{U->G} + L_{G->U}) + w_uni L_uni]     middle layers, encoders frozen

with s~ the logits under the factors' biases (Eq. 8), L_perp of Eq. 9, L_{U->G} of Eq. 10, L_uni of Eq. 7 and r(t) a ramp from
0 to 1. Factor terms are means over the middle layers. After training nothing of it is left but the changed backbone.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from umm_kit.losses.factorization import UniqueCritic
from umm_kit.models.factors import FLOWS, FactorEncoders, FactorEncodersConfig, Factors, Readouts, middle_layers
from umm_kit.records import write_json
from umm_kit.trainers.base import Stream, UMMArguments, UMMTrainer, run_record
from umm_kit.trainers.stages import BackboneStage, EncoderStage, FlowCollator, Flows, projected

logger = logging.getLogger(__name__)
EXTRAS_FILE = "extras.pt"  # of a checkpoint: critics with their optimizers, and the queue of earlier targets
_QUIET, _LOUD = 0.01, 0.9  # shares of the gradient below and above which a term is called out


@dataclass
class DIVAConfig(UMMArguments):
    """Configuration of :class:`DIVATrainer`; defaults are the paper's for Show-o (Tables 7, 8), its layers 8-18 of 24 scaled.

    The paper does not state factor_size, temperature, ramp_share and replay_every. Its batch is 6 on each of 8 GPUs, 12 times
    accumulated; a batch of 6 alone would bound InfoNCE by log 6 = 1.8 nats.
    """

    output_dir: str | None = "runs/diva"
    model: str = field(default="tiny-masked", metadata={"help": "The model to post-train."})
    data: str = field(default="shapes", metadata={"help": "'shapes', 'digits' or an image-text folder."})
    stage1_steps: int = 2000
    stage1_learning_rate: float = 2e-4
    stage1_warmup_steps: int = 200
    shared_only: float = field(default=0.5, metadata={"help": "Share of stage 1 before the unique factors join."})
    orthogonality_weight: float = 0.2
    orthogonality: str = field(
        default="batch", metadata={"help": "Reading of Eq. 9: 'batch' or 'sample'; 'overlap': free of scale, in [0, 1]."}
    )
    factor_size: int = 64
    encoder: str = field(default="gated", metadata={"help": "'gated', 'linear' or 'transformer' (then on tokens, not pooled)."})
    rank: int = 24
    injection: str = field(default="crosswise", metadata={"help": "'crosswise' or 'own', see Readouts."})
    layers: list[int] = field(default_factory=list, metadata={"help": "Layers to factorize and train; empty: the middle ones."})
    train_all_layers: bool = field(default=False, metadata={"help": "Stage 2 trains all parameters, not only the middle."})
    shared_weight: float = 0.6
    unique_weight: float = 0.6
    ramp_share: float = field(default=0.5, metadata={"help": "Share of stage 2 in which both rise linearly from 0."})
    understanding_weight: float = 1.0
    generation_weight: float = 1.0
    stop_gradient: bool = field(default=True, metadata={"help": "Alignment is directed (Eq. 10); False: symmetric."})
    temperature: float = 0.1
    mask_equal_facts: bool = field(default=False, metadata={"help": "Pairs that say the same are no negatives of each other."})
    queue: int = field(default=0, metadata={"help": "Targets of earlier batches kept as further negatives (directed only)."})
    replay_every: int = field(
        default=4,
        metadata={"help": "Every how many-th example is a question and a full-mask drawing instead of an anchor; 0: none."},
    )
    mask_layout: str = "dispersed"
    ema_role: str = field(
        default="targets", metadata={"help": "Averaged weights give the alignment's 'targets' (paper), or the final 'weights'."}
    )
    project_conflicts: bool = field(default=False, metadata={"help": "PCGrad between the two task losses (a baseline)."})
    max_steps: int = 12_000
    per_device_train_batch_size: int = 64
    learning_rate: float = 3e-5
    warmup_steps: float = 800
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.01
    muon: bool = False
    ema_decay: float = 0.999
    save_steps: float = 500

    def __post_init__(self) -> None:
        if self.ema_role not in ("targets", "weights"):
            raise ValueError(f"ema_role is {self.ema_role!r}; expected 'targets' or 'weights'")
        if self.orthogonality not in ("batch", "sample", "overlap"):
            raise ValueError(f"orthogonality is {self.orthogonality!r}; expected 'batch', 'sample' or 'overlap'")
        for name in ("shared_only", "ramp_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share in [0, 1]")
        weights = ("shared_weight", "unique_weight", "orthogonality_weight", "understanding_weight", "generation_weight")
        if negative := [name for name in weights if getattr(self, name) < 0]:
            raise ValueError(f"{negative} are negative; expected weights of at least 0")
        if self.replay_every == 1 or self.replay_every < 0:
            raise ValueError(f"replay_every is {self.replay_every}; expected 0 (no replay) or at least 2")
        if self.replay_every and self.per_device_train_batch_size % self.replay_every:
            raise ValueError(
                f"per_device_train_batch_size {self.per_device_train_batch_size} is not a multiple of replay_every "
                f"{self.replay_every}; every batch needs as many anchors as the others"
            )
        if self.queue and not self.stop_gradient:
            raise ValueError(f"queue is {self.queue}, but without stop_gradient the alignment is symmetric and takes no queue")
        super().__post_init__()

    @property
    def factors(self) -> bool:
        """Whether stage 2 has any term on factors; fine-tuning without one needs no encoders."""
        return self.shared_weight > 0 or self.unique_weight > 0

    @classmethod
    def tiny(cls, **changes: Any) -> DIVAConfig:
        """Minutes on a laptop, for 4 to 12 layers: fewer steps at higher rates, a rank fit for a small vocabulary, and the
        orthogonality without scale (Eq. 9 as printed starts at a hundred times the task losses)."""
        small: dict[str, Any] = dict(stage1_steps=200, stage1_learning_rate=1e-3, stage1_warmup_steps=20, rank=8, factor_size=32)
        small |= dict(orthogonality="overlap")
        small |= dict(max_steps=300, learning_rate=3e-4, warmup_steps=30, ema_decay=0.99, save_steps=100)
        return cls(**{**small, **changes})


class EncoderTrainer(UMMTrainer):
    """Stage 1: shared factors alone for ``shared_only`` of the steps, then unique ones with them."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        inputs = {"batch": inputs, "unique": self.state.global_step >= self.args.shared_only * self.args.max_steps}
        return super().compute_loss(model, inputs, return_outputs)


class DIVATrainer(UMMTrainer):
    """Trains a model in place by DIVA's two stages; without weights on factors it is plain fine-tuning (the matched baseline).

    ``train()`` runs stage 1 first, unless its encoders are there already (given, or finished in an earlier, stopped run of the
    same folder). Everything random belongs to the example's number, so a resumed run, and a run on more processes, go on alike.

    Raises:
        ValueError: layers outside the model; a folder of a run with another configuration; fewer than two anchors per batch.

    Example:
        >>> trainer = DIVATrainer(model, DIVAConfig.tiny(output_dir="runs/diva"), uk.Shapes("train"))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, model: Any, args: DIVAConfig, train_dataset: Any, encoders: FactorEncoders | None = None, **kwargs: Any):
        layers = list(args.layers) or list(middle_layers(model.num_layers))
        if bad := [layer for layer in layers if not 1 <= layer <= model.num_layers]:
            raise ValueError(f"layers {bad} are outside the model, which has layers 1 to {model.num_layers}")
        if encoders is not None and encoders.config.hidden_size != model.hidden_size:
            raise ValueError(f"the encoders read width {encoders.config.hidden_size}, the model has {model.hidden_size}")
        anchors = args.per_device_train_batch_size * (1 - 1 / args.replay_every if args.replay_every else 1)
        if args.factors and anchors < 2:
            raise ValueError("a batch holds fewer than two anchors: InfoNCE has no negative; raise per_device_train_batch_size")
        self.umm, self.layers, self.encoders, self.data = model, layers, encoders, train_dataset
        self.critics: list[UniqueCritic] = []
        self.queues: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        stage = BackboneStage(model, encoders, layers, args)
        length = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        collator = FlowCollator(train_dataset, model.grid, args, args.replay_every)
        self._trainable = [(p, p.requires_grad) for p in model.parameters()]
        model.requires_grad_(args.train_all_layers)
        if hasattr(model, "image_tokenizer"):
            model.image_tokenizer.requires_grad_(False)
        groups = list(model.layer_parameters().values())
        for layer in layers:
            for p in groups[layer - 1]:
                p.requires_grad_(True)
        super().__init__(stage, args, train_dataset=Stream(train_dataset, length, args.seed), data_collator=collator, **kwargs)
        if self.ema is not None:
            self.ema.restore = args.ema_role == "weights"

    # --- stage 1 ---

    def warm_up(self) -> FactorEncoders:
        """Encoders for the present backbone: finished ones of this folder, or stage 1 from its last checkpoint on."""
        folder, config = Path(str(self.args.output_dir)), self.args
        finished = folder / "encoders"
        if (finished / "config.json").exists():
            return FactorEncoders.from_pretrained(finished, use_safetensors=True, local_files_only=True).to(config.device)
        set_seed(config.seed)
        sizes = {"hidden_size": self.umm.hidden_size, "factor_size": config.factor_size, "kind": config.encoder}
        encoders = FactorEncoders(FactorEncodersConfig(**sizes))
        first = {**self.data[0], "number": 0, "index": 0}  # one example, to see how wide the logits are
        with torch.no_grad():
            u, g = Flows(self.umm)(self._prepare_inputs(FlowCollator(self.data, self.umm.grid, config, 0)([first])), [])
        if u.logits is None or g.logits is None:
            raise NotImplementedError(f"{type(self.umm).__name__} has a flow without logits to put biases on (Eq. 8)")
        widths = {"understanding": u.logits.shape[-1], "generation": g.logits.shape[-1]}
        readouts = Readouts(config.factor_size, widths, config.rank, config.injection)
        stage = EncoderStage(self.umm, encoders, readouts, self.layers, config)
        steps, args = config.stage1_steps, copy.copy(config)  # a copy: building new arguments would reset the process group
        args.output_dir, args.max_steps, args.ema_decay, args.resume = str(folder / "stage1"), steps, 0.0, True
        args.learning_rate, args.warmup_steps = config.stage1_learning_rate, config.stage1_warmup_steps
        args.ddp_find_unused_parameters = True  # the unique encoders wait for their turn
        length = steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        stream, collator = Stream(self.data, length, args.seed + 1), FlowCollator(self.data, self.umm.grid, args, 0)
        with _evaluating_frozen(self.umm):
            trainer = EncoderTrainer(stage, args, train_dataset=stream, data_collator=collator)
            trainer.fit()
        if trainer.is_world_process_zero():
            encoders.save_pretrained(finished)
            write_json(folder / "stage1/run.json", run_record(args, trainer.seconds(), trainer.state.log_history))
        return encoders

    # --- stage 2 ---

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Both stages; the model's parameters ask for gradients afterwards as they did before."""
        self._claim_folder()
        try:
            if self.args.factors:
                self.encoders = (self.encoders or self.warm_up()).to(self.args.device).eval().requires_grad_(False)
                stage = self.accelerator.unwrap_model(self.model)
                stage._encoders, stage.layers = (self.encoders,), self.layers
                size = self.encoders.config.factor_size
                self.critics = [UniqueCritic(size, seed=self.args.seed + k).to(self.args.device) for k in range(len(self.layers))]
            if isinstance(resume_from_checkpoint, str):
                self._load_extras(Path(resume_from_checkpoint))
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            for p, before in self._trainable:
                p.requires_grad_(before)

    def _claim_folder(self) -> None:
        """Write the configuration to the folder; refuse one where another configuration began."""
        about = Path(str(self.args.output_dir)) / "diva.json"
        skip = ("output_dir", "logging_dir", "resume", "disable_tqdm", "logging_steps", "save_steps")
        names = [n for n in type(self.args).__dataclass_fields__ if n not in skip]
        wanted = {n: v for n in names if isinstance(v := getattr(self.args, n), bool | int | float | str | list)}
        begun = json.loads(about.read_text()) if about.exists() else wanted
        if changed := [f"{n} {begun.get(n)} (now {v})" for n, v in wanted.items() if begun.get(n) != v]:
            raise ValueError(
                f"{about.parent} holds a run with another configuration: {', '.join(changed)}; choose another folder"
            )
        if self.is_world_process_zero():
            write_json(about, wanted)

    def _ramp(self) -> float:
        steps = self.args.ramp_share * self.args.max_steps
        return min(1.0, self.state.global_step / steps) if steps else 1.0

    def _targets(self, batch: Mapping[str, Any]) -> list[Factors] | None:
        """Factors of the averaged model (App. B.2); None: of the model itself, behind the stop-gradient."""
        if not self.args.shared_weight or self.ema is None or self.args.ema_role != "targets":
            return None
        stage = self.accelerator.unwrap_model(self.model)
        with torch.no_grad(), self.compute_loss_context_manager():
            u, g = torch.func.functional_call(Flows(self.umm), self.ema.average, (batch, self.layers))
            return stage.factors(u, g, batch["anchor"])

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        training = model.training
        for critic in self.critics:
            critic.train(training)
        targets = self._targets(inputs) if self.encoders is not None else None
        terms = model(inputs, targets, self.critics, self.queues)
        ramp, config = self._ramp(), self.args
        weights = {
            "understanding_loss": config.understanding_weight, "generation_loss": config.generation_weight,
            "shared_loss": ramp * config.shared_weight, "unique_loss": ramp * config.unique_weight,
        }  # fmt: skip
        weighted = {name: weight * terms[name] for name, weight in weights.items() if name in terms}
        if training:
            if self.args.queue and self.encoders is not None:
                self._enqueue(inputs, targets)
            if self.state.global_step % max(int(self.args.logging_steps), 1) == 0:
                terms = {**terms, **self._shares(weighted)}
        loss = torch.stack(list(weighted.values())).sum()
        self.note_parts({**terms, "ramp": torch.tensor(ramp)})
        outputs = {"loss": loss, **terms}
        return (loss, outputs) if return_outputs else loss

    def _shares(self, weighted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each term's gradient norm over the sum of all terms' (its own share of the push, directions aside)."""
        parameters = [p for p in self.umm.parameters() if p.requires_grad]
        norms = {}
        for name, term in weighted.items():
            if term.requires_grad:
                found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
                norms[name] = math.sqrt(sum(float(g.float().square().sum()) for g in found if g is not None))
            else:
                norms[name] = 0.0
        total = sum(norms.values()) or 1.0
        for name, norm in norms.items():
            if self._ramp() == 1 and not _QUIET <= norm / total <= _LOUD and len(norms) > 1:
                what = "hardly moves" if norm / total < _QUIET else "dominates"
                logger.warning("%s %s the model: %.1f %% of all gradient norms", name, what, 100 * norm / total)
        return {f"{name.removesuffix('_loss')}_gradient_share": torch.tensor(norm / total) for name, norm in norms.items()}

    def _enqueue(self, batch: Mapping[str, Any], targets: Sequence[Factors] | None) -> None:
        if targets is None:
            stage = self.accelerator.unwrap_model(self.model)
            with torch.no_grad():
                u, g = Flows(self.umm)(batch, self.layers)
                targets = stage.factors(u, g, batch["anchor"])
        facts, most = batch["facts"][batch["anchor"]], self.args.queue // self.args.world_size  # the queue of all is gathered
        for k, z in enumerate(targets):
            for flow in FLOWS:
                new = z.shared[flow] if z.shared[flow].ndim == 2 else z.shared[flow].mean(1)
                old = self.queues.get((k, flow), (new[:0], facts[:0]))
                self.queues[k, flow] = tuple(torch.cat(p)[-most:] for p in zip(old, (new, facts), strict=True))  # type: ignore[assignment]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if not self.args.project_conflicts:
            return super().training_step(model, inputs, num_items_in_batch)
        if self.args.world_size > 1:
            raise NotImplementedError("project_conflicts runs on one process: gradients are projected before they are averaged")
        model.train()
        batch = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            terms = model(batch, None, [], {})
        self.note_parts(terms)
        parameters = [p for p in self.umm.parameters() if p.requires_grad]
        weights = (self.args.understanding_weight, self.args.generation_weight)
        losses = [w * terms[f"{flow}_loss"] for w, flow in zip(weights, FLOWS, strict=True)]
        share = 1 / self.args.gradient_accumulation_steps
        first, second = (torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses)
        for p, gradient in zip(parameters, projected(first, second), strict=True):
            if gradient is not None:
                p.grad = share * gradient if p.grad is None else p.grad + share * gradient
        return torch.stack(losses).sum().detach() * share

    # --- files ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero() and (self.critics or self.queues):
            folder.mkdir(parents=True, exist_ok=True)
            state = {"critics": [critic.state_dict() for critic in self.critics], "queues": self.queues}
            torch.save(state, folder / EXTRAS_FILE)
        super()._save_checkpoint(model, trial)

    def _load_extras(self, folder: Path) -> None:
        if (folder / EXTRAS_FILE).exists():
            state = torch.load(folder / EXTRAS_FILE, weights_only=True, map_location=self.args.device)
            self.queues = state["queues"]
            for critic, saved in zip(self.critics, state["critics"], strict=True):
                critic.load_state_dict(saved)


@contextmanager
def _evaluating_frozen(model: nn.Module) -> Iterator[None]:
    """The backbone as stage 1 sees it: in evaluation mode, asking for no gradient."""
    before, training = [(p, p.requires_grad) for p in model.parameters()], model.training
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for p, asked in before:
            p.requires_grad_(asked)


def train(config: DIVAConfig) -> Any:
    """Post-train ``config.model`` on ``config.data`` and save it, with its run record, to ``config.output_dir``."""
    from umm_kit.data import open_data
    from umm_kit.models import load

    set_seed(config.seed)
    model = load(config.model, device="cpu")
    trainer = DIVATrainer(model, config, open_data(config.data, "train", seed=config.seed, image_size=model.image_size))
    trainer.fit()
    if trainer.is_world_process_zero():
        model.eval().save_pretrained(str(config.output_dir))
        record = run_record(config, trainer.seconds(), trainer.state.log_history)
        write_json(Path(str(config.output_dir)) / "run.json", record)
    return model
