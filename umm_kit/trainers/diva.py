"""DIVA post-training (Sec. 3.3): factor encoders on a frozen backbone, then the backbone's middle on what the factors say.

    stage 1   L = L_Und(s~_U) + L_Gen(s~_G) + w_perp L_perp                  encoders and readouts, backbone frozen
    stage 2   L = L_Und + L_Gen + r(t) [w_sh (L_{U->G} + L_{G->U}) + w_uni L_uni]     middle layers, encoders frozen

with s~ the logits under the factors' biases (Eq. 8), L_perp of Eq. 9, L_{U->G} of Eq. 10, L_uni of Eq. 7 and r(t) a ramp from
0 to 1. Factor terms are means over the middle layers. After training nothing of it is left but the changed backbone. What else
``DIVAConfig`` offers, and its variants, changes single terms or what is trained.

The log of a run (``run.json``, ``stage1/run.json``) holds, besides what transformers writes and in nats where it is information:

    {understanding,generation}_loss          task losses; in stage 1 of the logits with biases
    {understanding,generation}_gain          stage 1: by how much the biases lower them (higher = they help)
    {understanding,generation}_scale         stage 2: factor that equalise_gradients puts on them
    shared_loss, shared_accuracy             L_{U->G} + L_{G->U}; share of partners that are found, in [0, 1]
    shared_estimate, shared_bound            information by InfoNCE, and the most it can show
    unique_loss, _contrast, _active          L_uni as trained on, and as if always active; share of critics that are not silent
    critic_estimate, critic_bound            information the critics find between held-out pairs, and the most they can show
    orthogonality_loss                       L_perp
    ramp                                     r(t) in [0, 1]
    {term}_gradient_share                    a weighted term's gradient norm over the sum of all terms'
    {term}_warning                           after the ramp: -1 if that share is below .01 (a dead loss), 1 above .9, else 0

The last two are of the steps that are logged alone, all others means since the line before.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import set_seed

from umm_kit.losses.factorization import UniqueCritic
from umm_kit.models.base import checksum, scores_of
from umm_kit.models.factors import FLOWS, FactorEncoders, FactorEncodersConfig, Factors, Readouts, middle_layers
from umm_kit.records import write_json
from umm_kit.trainers.base import Stream, UMMTrainer, post_train, reshard, run_record, world_mean
from umm_kit.trainers.stages import (
    BackboneStage,
    EncoderStage,
    FlowCollator,
    Flows,
    adapters,
    equalising,
    new_critics,
    norm_of,
    paired,
    pooled,
    projected,
)
from umm_kit.trainers.variants import DIVAConfig

logger = logging.getLogger(__name__)
EXTRAS_FILE = "extras.pt"  # of a checkpoint: critics with their optimizers, and the queue of earlier targets
_QUIET, _LOUD = 0.01, 0.9  # shares of the gradient below and above which a term is called out


class _StageTrainer(UMMTrainer):
    """A stage whose checkpoints hold its critics with their optimizers, and the queue of earlier targets."""

    shards = True

    def __init__(self, *args: Any, **kwargs: Any):
        self.critics: list[UniqueCritic] = []
        self.queues: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self._warned: set[tuple[str, int]] = set()
        super().__init__(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.critics or self.queues:
            state = {"critics": [critic.state_dict() for critic in self.critics], "queues": self.queues}
            try:
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(state, self._extras(folder))
            except (OSError, RuntimeError) as error:
                raise OSError(f"{folder} could not be written ({error}); make room, then go on with --resume True") from error
        super()._save_checkpoint(model, trial)

    def _extras(self, folder: Path) -> Path:
        """Each process has a queue of its own."""
        return folder / EXTRAS_FILE.replace(".", f"_{self.args.process_index}." if self.args.process_index else ".")

    def _load_extras(self, folder: Path) -> None:
        file = own if (own := self._extras(folder)).exists() else folder / EXTRAS_FILE  # there were fewer processes
        if file.exists():
            state = torch.load(file, weights_only=True, map_location=self.args.device.type)
            self.queues = state["queues"]
            for critic, saved in zip(self.critics, state["critics"], strict=True):
                critic.load_state_dict(saved)

    def _keep(self, encoders: FactorEncoders, folder: Path) -> FactorEncoders:
        """Encoders that are given their name when they are whole: what lies there is taken for finished."""
        part = folder.with_name("encoders.part")
        try:
            self.save_whole(encoders, part)
            if self.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
                part.rename(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(f"{part} could not be written ({error}); make room, then go on with --resume True") from error
        return encoders

    def _gradient(self, loss: Tensor) -> list[Tensor | None]:
        """Of this process's loss, by the trained parameters of what the stage trains; the graph is kept."""
        if not loss.requires_grad:
            return []
        return list(torch.autograd.grad(loss, self._in_graph(), retain_graph=True, allow_unused=True))

    def _in_graph(self) -> list[Tensor]:
        """The trained parameters; under FSDP not the pieces, but what the forward pass gathered from them."""
        stage, found = self.accelerator.unwrap_model(self.model), list[Tensor]()
        trained = getattr(stage, "model", stage)  # the backbone alone, where it is trained
        reshard(stage)
        for part in (m for m in stage.modules() if isinstance(m, FSDPModule)):
            part.unshard()
            found += [p for p in trained.parameters() if p.requires_grad and not isinstance(p, DTensor)]
            part.reshard()
        return found if self.is_fsdp_enabled else [p for p in trained.parameters() if p.requires_grad]

    def _shares(self, weighted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each term's gradient norm over the sum of all terms' (its own share of the push, directions aside), and a warning."""
        norms = {name.removesuffix("_loss"): norm_of(self._gradient(term)) for name, term in weighted.items()}
        total, out = sum(norms.values()) or 1.0, dict[str, Tensor]()
        for name, norm in norms.items():
            share = norm / total
            sign = (share > _LOUD) - (share < _QUIET) if self._ramp() == 1 and len(norms) > 1 else 0
            out |= {f"{name}_gradient_share": torch.tensor(share), f"{name}_warning": torch.tensor(float(sign))}
            if sign and (name, sign) not in self._warned:
                what = "dominates" if sign > 0 else "hardly moves"
                logger.warning("%s %s what is trained: %.1f %% of all gradient norms", name, what, 100 * share)
                self._warned.add((name, sign))
        return out


class EncoderTrainer(_StageTrainer):
    """Stage 1: shared factors alone for ``shared_only`` of the steps, then unique ones with them."""

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        if isinstance(resume_from_checkpoint, str):
            self._load_extras(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The penalty rises over ``ramp_share`` of the steps that the unique factors have."""
        unique, ramp = self.state.global_step >= self.args.shared_only * self.args.max_steps, self._ramp()
        terms = model(inputs, unique, self.critics, ramp)
        if self.state.global_step % max(int(self.args.logging_steps), 1) == 0:
            terms = terms | self._shares(self.accelerator.unwrap_model(model).weighted(terms, ramp))
        self.note_parts(terms)
        return (terms["loss"], terms) if return_outputs else terms["loss"]

    def _ramp(self) -> float:
        begin = self.args.shared_only * self.args.max_steps
        rise = self.args.ramp_share * (self.args.max_steps - begin)
        return min(1.0, max(0.0, self.state.global_step - begin) / rise) if rise else 1.0


class DIVATrainer(_StageTrainer):
    """Trains a model in place by DIVA's two stages; without weights on factors it is plain fine-tuning (the matched baseline).

    ``train()`` runs stage 1 first, unless its encoders are there already (given, or finished in an earlier, stopped run of the
    same folder). Everything random belongs to the example's number, so a resumed run, and a run on more processes, go on alike.

    Raises:
        ValueError: layers outside the model; a folder of a run with another configuration, model or data.

    Example:
        >>> trainer = DIVATrainer(model, DIVAConfig.tiny(output_dir="runs/diva"), uk.Shapes("train"))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, model: Any, args: DIVAConfig, train_dataset: Any, encoders: FactorEncoders | None = None, **kwargs: Any):
        middle = [max(1, 2 * model.num_layers // 3)] if args.single_layer else list(middle_layers(model.num_layers))
        layers = list(args.layers) or middle
        if bad := [layer for layer in layers if not 1 <= layer <= model.num_layers]:
            raise ValueError(f"layers {bad} are outside the model, which has layers 1 to {model.num_layers}")
        self._sizes = {"hidden_size": model.hidden_size, "factor_size": args.factor_size, "kind": args.encoder}
        if encoders is not None:
            self._fitting(encoders, "given", "set factor_size and encoder to theirs, or leave them out")
        self.umm, self.layers, self.encoders, self.data = model, layers, encoders, train_dataset
        self._came = None if encoders is None else checksum(encoders)
        self._given = kwargs.get("callbacks")  # both stages have them
        stage = BackboneStage(model, encoders, layers, args)
        length = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        collator = FlowCollator(train_dataset, model.grid, args, args.replay_every)
        self._trainable = [(p, p.requires_grad) for p in model.parameters()]
        model.requires_grad_(args.train_all_layers)
        if hasattr(model, "image_tokenizer"):
            model.image_tokenizer.requires_grad_(False)
        groups = list(model.layer_parameters().values())
        self._in_layers = [p for k, group in enumerate(groups, 1) if args.train_all_layers or k in layers for p in group]
        for p in self._in_layers:
            p.requires_grad_(True)
        super().__init__(stage, args, train_dataset=Stream(train_dataset, length, args.seed), data_collator=collator, **kwargs)
        if self.is_fsdp_enabled and not (plugin := self.accelerator.state.fsdp_plugin).transformer_cls_names_to_wrap:
            layer_sets = [set(group) for group in groups]  # which are gathered one after the other
            found = {type(m).__name__ for m in model.modules() if set(m.parameters()) in layer_sets}
            plugin.transformer_cls_names_to_wrap = sorted(found)
        if self.ema is not None:
            self.ema.restore = args.ema_role == "weights"

    def _fitting(self, encoders: FactorEncoders, which: str, advice: str) -> FactorEncoders:
        """The encoders, if model and configuration are of their sizes and kind."""
        if (came := {name: getattr(encoders.config, name) for name in self._sizes}) != self._sizes:
            raise ValueError(f"the encoders {which} are {came}; expected {self._sizes}: {advice}")
        return encoders

    # --- stage 1 ---

    def warm_up(self) -> FactorEncoders:
        """Encoders for the present backbone: finished ones of this folder, or stage 1 from its last checkpoint on."""
        self.claim_folder("diva.json")
        folder, config = Path(str(self.args.output_dir)), self.args
        finished = folder / "encoders"
        if (finished / "config.json").exists():
            found = FactorEncoders.from_pretrained(finished, use_safetensors=True, local_files_only=True)
            return self._fitting(found, f"in {finished}", "choose another folder").to(config.device)
        self.umm.to(config.device)  # under FSDP nobody did
        set_seed(config.seed)
        encoders = FactorEncoders(FactorEncodersConfig(**self._sizes))
        if config.random_encoders:
            return self._keep(encoders, finished)
        first = {**self.data[0], "number": 0, "index": 0}  # one example, to see how wide the logits are
        with torch.no_grad():
            u, g = Flows(self.umm)(self._prepare_inputs(FlowCollator(self.data, self.umm.grid, config, 0)([first])), [])
        widths = {"understanding": scores_of(u).shape[-1], "generation": scores_of(g).shape[-1]}
        rank = min(config.rank, config.factor_size, *widths.values())
        if rank < config.rank:
            logger.warning("readouts of rank %d instead of %d: their full rank is no more", rank, config.rank)
        readouts = Readouts(config.factor_size, widths, rank, config.injection)
        stage = EncoderStage(self.umm, encoders, readouts, self.layers, config)
        steps, args = config.stage1_steps, copy.copy(config)  # a copy: building new arguments would reset the process group
        args.output_dir, args.max_steps, args.ema_decay, args.resume = str(folder / "stage1"), steps, 0.0, True
        args.learning_rate, args.warmup_steps = config.stage1_learning_rate, config.stage1_warmup_steps
        args.ddp_find_unused_parameters = True  # the unique encoders wait for their turn
        length = steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        stream, collator = Stream(self.data, length, args.seed + 1), FlowCollator(self.data, self.umm.grid, args, 0)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        of_backbone = dict(vars(plugin or args))
        if plugin is not None:  # the encoders are one piece; whose classes are pieces by themselves is settled but once
            plugin.transformer_cls_names_to_wrap = []
        with _evaluating_frozen(self.umm):
            trainer = EncoderTrainer(stage, args, train_dataset=stream, data_collator=collator, callbacks=self._given)
            if config.stage1_penalty and config.unique_weight:
                trainer.critics = new_critics(config.factor_size, len(self.layers), config, length > len(self.data))
            trainer.fit()
        trainer._keep(encoders, finished)
        if trainer.is_world_process_zero():
            write_json(folder / "stage1/run.json", run_record(args, trainer.seconds(), trainer.state.log_history))
        if plugin is not None:
            vars(plugin).update(of_backbone)
            self.accelerator.wait_for_everyone()
            return self.warm_up()  # whole, from the file
        return encoders

    # --- stage 2 ---

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Both stages; the model's parameters ask for gradients afterwards as they did before."""
        self.claim_folder("diva.json")
        adapting: Any = nullcontext()
        try:
            if self.args.factors:
                self.encoders = (self.encoders or self.warm_up()).to(self.args.device).eval()
                self.accelerator.unwrap_model(self.model).take(self.encoders, self.layers)
                repeats = len(self.train_dataset) > len(self.data)  # type: ignore[arg-type]
                self.critics = new_critics(self.encoders.config.factor_size, len(self.layers), self.args, repeats)
            if isinstance(resume_from_checkpoint, str):
                self._load_extras(Path(resume_from_checkpoint))
            if self.args.lora_rank:
                kept = Path(str(self.args.output_dir)) / "adapter" if self.is_world_process_zero() else None
                adapting = adapters(self.umm, self._in_layers, self.args.lora_rank, self.args.seed, kept, self.args.model)
                self.optimizer = None  # type: ignore[assignment]  # that of an earlier call held adapters which are merged by now
            with adapting:
                done = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
                self.gather(self.model)
        finally:
            for p, before in self._trainable:
                p.requires_grad_(before)
        if self.args.train_encoders and self.encoders is not None:
            self._keep(self.encoders, Path(str(self.args.output_dir)) / "encoders")
        return done

    def _ramp(self) -> float:
        steps = self.args.ramp_share * self.args.max_steps
        return min(1.0, self.state.global_step / steps) if steps else 1.0

    def _targets(self, batch: Mapping[str, Any]) -> list[Factors] | None:
        """Factors of the averaged model (App. B.2); None: of the model itself, where ``stop_gradient`` decides what moves."""
        if not (self.args.shared_weight and self.args.stop_gradient) or self.ema is None or self.args.ema_role != "targets":
            return None
        stage = self.accelerator.unwrap_model(self.model)
        self.ema.swap(stage, "model.")
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                return stage(batch)
        finally:
            self.ema.swap(stage, "model.")

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        training = model.training
        for critic in self.critics:
            critic.train(training)
        targets = self._targets(inputs) if self.encoders is not None else None
        terms = model(inputs, targets, self.critics, self.queues)
        ramp, config = self._ramp(), self.args
        if training and config.equalise_gradients:
            terms |= self._equal(terms)
        weights = {
            "understanding_loss": config.understanding_weight * float(terms.get("understanding_scale", 1)),
            "generation_loss": config.generation_weight * float(terms.get("generation_scale", 1)),
            "reconstruction_loss": config.reconstruction_weight,
            "shared_loss": ramp * config.shared_weight, "unique_loss": ramp * config.unique_weight,
            "orthogonality_loss": ramp * config.stage2_orthogonality_weight,
        }  # fmt: skip
        weighted = {name: weight * terms[name] for name, weight in weights.items() if name in terms}
        if training:
            if self.args.queue and self.encoders is not None:
                self._enqueue(inputs, targets)
            if self.state.global_step % max(int(self.args.logging_steps), 1) == 0:
                terms = {**terms, **self._shares(weighted)}
        self.note_parts({**terms, "ramp": torch.tensor(ramp)})
        loss = torch.stack(list(weighted.values())).sum()
        if training and config.project_conflicts:
            loss = self._without_conflict(loss, [weighted[f"{flow}_loss"] for flow in FLOWS])
        outputs = {"loss": loss, **terms}
        return (loss, outputs) if return_outputs else loss

    def _equal(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By what the two task losses are multiplied so that their gradients are equally long (see :func:`equalising`)."""
        found = [self._gradient(terms[f"{flow}_loss"]) for flow in FLOWS]
        first, second = ([None if part is None else world_mean(part) for part in gradient] for gradient in found)
        return {f"{flow}_scale": torch.tensor(s) for flow, s in zip(FLOWS, equalising(first, second), strict=True)}

    def _without_conflict(self, loss: Tensor, tasks: Sequence[Tensor]) -> Tensor:
        """The same number, with the gradient that :func:`projected` makes of those of both tasks."""
        if self.args.world_size > 1:
            raise NotImplementedError("project_conflicts runs on one process: gradients are projected before they are averaged")
        parameters = [p for p in self.umm.parameters() if p.requires_grad]
        mixed = zip(parameters, projected(*(self._gradient(task) for task in tasks)), strict=True)
        push = torch.stack([(p * gradient).sum() for p, gradient in mixed if gradient is not None]).sum()
        return loss.detach() + (push - push.detach())

    def _enqueue(self, batch: Mapping[str, Any], targets: Sequence[Factors] | None) -> None:
        if targets is None:
            with torch.no_grad():
                targets = self.accelerator.unwrap_model(self.model)(batch)
        most = max(1, self.args.queue // self.args.world_size)  # the queue of all is gathered; [-0:] would keep everything
        for k, z in enumerate(targets):
            for flow, new in pooled(z.shared).items():
                facts = paired(batch["facts"][batch["anchor"]], flow, self.args)
                old = self.queues.get((k, flow), (new[:0], facts[:0]))
                self.queues[k, flow] = tuple(torch.cat(p)[-most:] for p in zip(old, (new, facts), strict=True))  # type: ignore[assignment]


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
    return post_train(config, lambda model, data: DIVATrainer(model, config, data))
