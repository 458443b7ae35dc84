"""What all trainers share, on top of transformers.Trainer: stateless batches, Muon, EMA and run records.

Every random choice about an example is a function of (seed, its number in the stream), never of the state of a process:
a resumed run, and a run on more processes, therefore see exactly the batches of the uninterrupted run on one.
"""

from __future__ import annotations

import json
import logging
import math
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from umm_kit.data.shapes import hash_uniform, stream_key
from umm_kit.models.base import bf16_is_faster, checksum, resolve_device
from umm_kit.records import command, machine, versions, write_json

logger = logging.getLogger(__name__)

EMA_FILE = "ema.safetensors"
_FREE = re.compile(r"output_dir|resume|run_name|report_to|disable_tqdm|(logging|log|save|dataloader)_.*")  # may change on resume
ENDLESS = 2**32  # a data set of this length makes its examples on demand and is never walked to its end


@dataclass
class UMMArguments(TrainingArguments):
    """transformers.TrainingArguments with defaults that send nothing anywhere, plus Muon and EMA."""

    report_to: None | str | list[str] = "none"  # noqa: RUF036 (the argument parser wants None first)
    remove_unused_columns: bool = False
    logging_steps: float = 20
    save_total_limit: int | None = 2
    muon: bool = HfArg(default=True, help="Muon on the blocks' matrices and kernels, AdamW on the rest; False: AdamW alone.")
    ema_decay: float = HfArg(default=0.0, help="Decay of the averaged weights, which become the model at the end; 0 is off.")
    resume: bool = HfArg(default=False, help="Go on from the last checkpoint in output_dir, if there is one.")

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; expected a number in [0, 1)")
        if str(self.fsdp).lower() == "true":  # type: ignore[has-type]  # transformers takes the word for the name of an option
            self.fsdp, self.fsdp_config = True, self.fsdp_config or str(Path(__file__).with_name("fsdp.json"))  # type: ignore
        # transformers asks for this flag before it allows bf16 without an accelerator.
        self.use_cpu: bool = self.use_cpu or resolve_device().type == "cpu"
        super().__post_init__()


@dataclass
class PostTrainArguments(UMMArguments):
    """Of trainers that go on from a model."""

    model: str = HfArg(default="tiny-masked", help="The model to post-train.")
    data: str = HfArg(default="shapes", help="'shapes', 'digits' or an image-text folder.")
    lora_rank: int = HfArg(default=0, help="Above 0, of adapters that are trained instead of full weights.")
    load_dtype: str = HfArg(default="float32", help="Of loaded weights: 'bfloat16' halves them, for adapters on large models.")
    replay_every: int = HfArg(default=4, help="Every so many-th example is a question and a full drawing, no anchor; 0: none.")
    mask_layout: str = "dispersed"
    lr_scheduler_type: str = "cosine"
    muon: bool = False

    def __post_init__(self) -> None:
        every, size = self.replay_every, self.per_device_train_batch_size
        if every == 1 or every < 0:
            raise ValueError(f"replay_every is {every}; expected 0 (no replay) or at least 2")
        if every and size % every:
            raise ValueError(f"per_device_train_batch_size {size} is not a multiple of replay_every {every}")
        if self.load_dtype != "float32" and not self.lora_rank:
            raise ValueError(
                f"load_dtype is {self.load_dtype!r} without adapters, and small updates in 16 bits are lost: set lora_rank, "
                "or keep float32 weights (bf16=True computes in 16 bits all the same)"
            )
        super().__post_init__()


class Muon(torch.optim.Muon):
    """torch's, with nesterov and match_rms_adamw; on a processor, which may be slow in bfloat16, it computes in float32."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if any(p.is_cuda for group in self.param_groups for p in group["params"]):
            super().step(closure)
            return
        for group in self.param_groups:
            a, b, c = group["ns_coefficients"]
            for p in (p for p in group["params"] if p.grad is not None):
                if "momentum_buffer" not in (state := self.state[p]):
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(momentum, group["momentum"])
                x = x.T if len(p) > p.shape[1] else x
                x = x / x.norm().clamp(min=group["eps"])
                for _ in range(group["ns_steps"]):
                    gram = x @ x.T
                    x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
                rate = group["lr"] * 0.2 * max(p.shape) ** 0.5  # of match_rms_adamw
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(x.T if len(p) > p.shape[1] else x, alpha=rate)


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on hidden matrices and AdamW on the rest, behind one optimizer's face.

    A convolution's kernel [out, in, h, w] is the matrix [out, in h w]. ``adjust_lr_fn="match_rms_adamw"`` scales Muon's
    updates to AdamW's root mean square, so that one learning rate and one schedule serve both.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
    ):
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=betas)]
        # Views of the same storage: what Muon writes to them is written to the model.
        self.views = [(p, nn.Parameter(p.detach().view(len(p), -1))) for p in matrices]
        if matrices:
            flat = [view for _, view in self.views]
            self.parts.append(Muon(flat, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        super().__init__([{"params": [*others, *matrices]}], {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p, view in self.views:  # wrappers of a model may have given p new storage since
            view.data, view.grad = p.data.view(len(p), -1), None if p.grad is None else p.grad.view(len(p), -1)
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)
        for p, _ in self.views:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class EMACallback(TrainerCallback):
    """Averaged weights, kept inside each checkpoint and put into the model when training ends."""

    def __init__(self, decay: float):
        self.decay, self.restore = decay, True  # False: the averages serve the trainer, the model keeps its own weights
        self.average: dict[str, Tensor] = {}

    @staticmethod
    def _weights(model: nn.Module) -> dict[str, Tensor]:
        reshard(model)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def on_train_begin(self, args, state, control, model=None, **_):  # type: ignore[no-untyped-def]
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / EMA_FILE
        weights = self._weights(model)
        self.average = {k: v.clone().float() for k, v in weights.items()}
        for name, v in (load_file(saved) if state.global_step and saved.exists() else {}).items():
            p, v = weights[name], v.to(args.device)
            self.average[name] = distribute_tensor(v, p.device_mesh, p.placements) if isinstance(p, DTensor) else v

    def on_step_end(self, args, state, control, model=None, **_):  # type: ignore[no-untyped-def]
        # A young average would remember the random start: it follows faster at first (Karras et al. 2024 in spirit).
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        weights = self._weights(model)
        pairs = [[v.to_local() if isinstance(v, DTensor) else v for v in (self.average[k], weights[k])] for k in self.average]
        torch._foreach_lerp_([a for a, _ in pairs], [w.float() for _, w in pairs], 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module, prefix: str) -> None:
        """The averages of parameters with this prefix into the model, whose own wait in their place; or back."""
        for name, p in self._weights(model).items():
            if name.startswith(prefix):
                own = p.clone()
                p.copy_(self.average[name])
                self.average[name].copy_(own)
        torch.clear_autocast_cache()  # which holds 16-bit copies of the weights as they were

    def on_train_end(self, args, state, control, model=None, **_):  # type: ignore[no-untyped-def]
        if not self.restore:
            return
        with torch.no_grad():
            for name, p in self._weights(model).items():
                p.copy_(self.average[name])


class InterruptCallback(TrainerCallback):
    """An interrupt waits for the end of the step, where a checkpoint is whole; a second one does not wait."""

    asked = False

    def ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        # The processes of one run must stop after the same step, whichever of them heard it first.
        self.asked = bool(world_mean(torch.tensor(float(self.asked), device=args.device)) > 0)
        if self.asked:
            control.should_save = control.should_training_stop = True


class Stream(torch.utils.data.Dataset):
    """An endless walk over a data set as ``length`` numbered examples: epoch after epoch, each in its own order.

    Example k is an item of the data set with ``number`` k, its ``index`` there, and uniform draws ``u`` that belong to k alone.
    """

    def __init__(self, data: Any, length: int, seed: int, draws: int = 8):
        if not len(data):
            raise ValueError("the data set is empty; expected at least one example")
        self.data, self.length, self.seed, self.draws = data, length, seed, draws
        self._orders: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.length

    def _place(self, k: int) -> int:
        epoch, offset = divmod(k, len(self.data))
        if len(self.data) >= ENDLESS:  # examples made on demand come in no order that could matter
            return k
        if epoch not in self._orders:
            rng = torch.Generator().manual_seed(self.seed + 7919 * epoch)
            self._orders = {epoch: torch.randperm(len(self.data), generator=rng)}
        return int(self._orders[epoch][offset])

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        places = [self._place(k) for k in numbers]
        if hasattr(self.data, "__getitems__"):
            items = self.data.__getitems__(places)
        else:
            items = [self.data[i] for i in places]
        u = hash_uniform(stream_key(self.seed, 11_000_027, torch.tensor(numbers).numpy()), self.draws)
        extra = ({"number": k, "index": place, "u": row} for k, place, row in zip(numbers, places, u, strict=True))
        return [{**item, **more} for item, more in zip(items, extra, strict=True)]

    def __getitem__(self, k: int) -> dict[str, Any]:
        return self.__getitems__([k])[0]


class UMMTrainer(Trainer):
    """transformers.Trainer with Muon, EMA, part losses in the log, and sequential (already random) streams."""

    shards = False  # whether it touches weights in the model's forward pass alone, as FSDP needs
    umm: Any  # of trainers that go on from a model: that, and its data
    data: Any
    _base: int | None = None  # checksum of the model as it came
    _came: int | None = None  # that of encoders that came with it

    def __init__(self, model: nn.Module, args: UMMArguments, **kwargs: Any):
        self._parts: dict[str, list[float]] = {}
        self._started, self._seconds_before = time.time(), 0.0
        check_writable(str(args.output_dir))
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise ValueError("the model's layers are shared by several devices, to read it; load it onto one device to train it")
        if args.bf16 and args.device.type == "cpu" and not bf16_is_faster(args.device):
            logger.warning("this processor is slower in bfloat16 than in float32; --bf16 False will be faster here")
        defaults_of(type(args))  # type: ignore[arg-type]
        super().__init__(model=model, args=args, **kwargs)
        refused = {
            f"{type(self).__name__} uses its model between steps, where it is in pieces: leave --fsdp out": not self.shards,
            "Muon needs whole matrices: set --muon False": args.muon,
            f"accelerate did not set up FSDP2, which it has for several GPUs alone, and on {args.device.type} each process "
            "would silently keep all: leave --fsdp out": not self.accelerator.is_fsdp2,
        }
        if args.fsdp and (why := [reason for reason, holds in refused.items() if holds]):
            raise ValueError(f"--fsdp {args.fsdp} came, but {'; '.join(why)}")
        if (plugin := getattr(self.accelerator.state, "fsdp_plugin", None)) is not None:
            plugin.ignored_modules = ".*image_tokenizer"  # frozen and small, and its codes must not depend on bf16
            if args.bf16:  # accelerate would round losses and averages over processes as well
                plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        self.ema = EMACallback(args.ema_decay) if args.ema_decay else None
        if self.ema is not None:
            self.add_callback(self.ema)

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        model = model or self.model
        if self.optimizer is None:  # type: ignore[has-type]
            trained = [p for p in model.parameters() if p.requires_grad]
            blocks = [m for m in model.modules() if type(m).__name__ in (getattr(self.model, "_no_split_modules", None) or ())]
            inside = {id(p) for block in blocks for p in block.parameters() if p.ndim > 1}
            kinds = [id(p) in inside if self.args.muon else p.ndim > 1 for p in trained]
            matrices, others = ([p for p, kind in zip(trained, kinds, strict=True) if kind == asked] for asked in (True, False))
            rate, decay, betas = self.args.learning_rate, self.args.weight_decay, (self.args.adam_beta1, self.args.adam_beta2)
            groups: list[Any] = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
            self.optimizer = (
                MuonAdamW(matrices, others, rate, decay, betas)
                if self.args.muon
                else torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, betas=betas)
            )
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs)
        self.note_parts(outputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def note_parts(self, outputs: Mapping[str, Tensor]) -> None:
        """Keep the scalars beside the loss for the next line of the log; a loss that is not a number ends the run."""
        parts = {name: float(value.detach()) for name, value in outputs.items() if name != "loss" and value.ndim == 0}
        if wrong := [name for name, value in parts.items() if name.endswith("_loss") and not math.isfinite(value)]:
            raise FloatingPointError(f"{', '.join(wrong)} is not finite at step {self.state.global_step}")
        for name, value in parts.items():
            if math.isfinite(value):  # an estimate may be undefined now and then
                self._parts.setdefault(name, []).append(value)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except FloatingPointError as error:
            file = Path(str(self.args.output_dir)) / "not_finite.safetensors"
            save_batch(inputs, file)
            raise ValueError(
                f"{error}; the batch of step {self.state.global_step} is kept in {file}. Nothing saved before is lost: lower the "
                "learning rate, or look at that batch, then go on from the last checkpoint with --resume True"
            ) from error

    def prediction_step(self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._parts = {}
        metrics = super().evaluate(*args, **kwargs)
        parts = {f"eval_{k}": v for k, v in self._part_means().items()}
        self.log(parts)  # transformers has logged the sum
        return metrics | parts

    def seconds(self) -> float:
        """Wall time of the run, with that of the runs it was resumed from up to their last log entry."""
        return round(self._seconds_before + time.time() - self._started, 1)

    def _part_means(self) -> dict[str, float]:
        """Means over the batches since the last call and over all processes; starts anew."""
        parts, self._parts = self._parts, {}
        return {k: float(world_mean(torch.tensor(sum(v) / len(v), device=self.args.device))) for k, v in parts.items()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        logs.pop("train_loss", None)  # transformers' closing mean forgets what a resumed run did before
        logs["seconds"] = self.seconds()
        if "loss" in logs and self._parts:
            logs |= self._part_means()
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights that two modules share are written twice, which safetensors refuses unless one of them is a copy."""
        seen, state = set[int](), dict(self.model.state_dict() if state_dict is None else state_dict)
        for name, value in state.items():
            if value.data_ptr() in seen:
                state[name] = value.clone()
            seen.add(value.data_ptr())
        super()._save(output_dir, state)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            # The averages go first: the state file that transformers writes last marks a whole checkpoint.
            whole = dict[str, Tensor]()
            for name, value in ({} if self.ema is None else self.ema.average).items():
                found = value.full_tensor() if isinstance(value, DTensor) else value  # one at a time, and by all
                whole |= {name: found.cpu()} if self.is_world_process_zero() else {}
            if whole:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(whole, folder / EMA_FILE)
            if self.is_fsdp_enabled:  # which loads all parameters' state or none: of those that wait for their turn too
                for p in (p for group in self.optimizer.param_groups for p in group["params"] if not self.optimizer.state[p]):
                    zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[p] = {"step": torch.tensor(0.0), **zeros}
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(f"{folder} could not be written ({error}); make room, then go on with --resume True") from error

    def gather(self, model: nn.Module) -> None:
        """End the sharding of a trained model, or of a part: the first process gets all of it, the others keep shapes."""
        reshard(self.model)
        whole = dict[Tensor, nn.Parameter]()
        for module in model.modules():
            for name, p in module._parameters.items():
                if isinstance(p, DTensor):
                    if p not in whole:
                        value = p.full_tensor().to("cpu" if self.is_world_process_zero() else "meta")
                        whole[p] = nn.Parameter(value, requires_grad=p.requires_grad)
                    module._parameters[name] = whole[p]

    def save_whole(self, model: Any, folder: str | Path) -> None:
        """Write a trained model, or a part of one, by the first process; all must call."""
        self.gather(model)
        if self.is_world_process_zero():
            model.eval().save_pretrained(str(folder))

    def claim_folder(self, file: str) -> None:
        """Write configuration, the model's checksum and what the data are to the folder; refuse one where others began."""
        about = Path(str(self.args.output_dir)) / file
        given = {n: getattr(self.args, n) for n in type(self.args).__dataclass_fields__ if not _FREE.fullmatch(n)}
        wanted = {n: v for n, v in given.items() if isinstance(v, bool | int | float | str | list)}
        defaults = defaults_of(type(self.args))  # type: ignore[arg-type]
        begun = {n: getattr(defaults, n) for n in wanted}  # for options that an earlier release did not have
        self._base = checksum(self.umm) if self._base is None else self._base
        examples = re.sub(" at 0x[0-9a-f]+", "", repr(self.data))[:200]  # an address says nothing of what is in there
        came: dict[str, Any] = {"model's checksum": self._base, "examples": f"{examples}, {len(self.data)} in all"}
        came |= {"first example": str(self.data[0].get("id")), "checksum of given encoders": self._came}
        wanted |= came
        begun = begun | came | json.loads(about.read_text()) if about.exists() else wanted
        if changed := [f"{n} {begun.get(n)} (now {v})" for n, v in wanted.items() if begun.get(n) != v]:
            raise ValueError(f"{about.parent} is of another configuration: {', '.join(changed)}; choose another folder")
        if self.is_world_process_zero():
            write_json(about, wanted)

    def fit(self) -> None:
        """Train, from the last whole checkpoint when ``args.resume``; an interrupt saves one before it ends."""
        last = last_checkpoint(str(self.args.output_dir))
        if last and not self.args.resume:
            raise ValueError(f"{last} is of an earlier run; go on with --resume True, or choose another --output_dir")
        if last:
            history = json.loads((Path(last) / "trainer_state.json").read_text())["log_history"]
            self._seconds_before = max((entry.get("seconds", 0.0) for entry in history), default=0.0)
        interrupt = InterruptCallback()
        self.add_callback(interrupt)
        listening = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, interrupt.ask) if listening else None
        try:
            self.train(resume_from_checkpoint=last)
        finally:
            self.remove_callback(interrupt)
            if listening:
                signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        if interrupt.asked:
            raise KeyboardInterrupt


def save_batch(batch: Mapping[str, Any], path: Path) -> None:
    """The tensors of a nested batch, and its words as JSON in the header."""
    tensors, words = {}, {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
        elif isinstance(node, Tensor):
            tensors[prefix] = node.detach().cpu().contiguous()
        else:
            words[prefix] = json.dumps(node, default=str)

    walk("", batch)
    save_file(tensors, path, words)


def check_writable(folder: str | Path) -> None:
    """Refuse a folder that cannot be written to, before hours of training end there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 16))
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written to ({error}); choose another") from error


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a run: a kill may have left a newer one without its state, or with half of it."""
    found = {int(path.name.split("-")[1]): path for path in Path(folder).glob("checkpoint-[0-9]*") if path.is_dir()}
    for step in sorted(found, reverse=True):
        try:
            if json.loads((found[step] / "trainer_state.json").read_text())["global_step"] == step:
                return str(found[step])
        except (OSError, ValueError, KeyError):
            continue
    return None


def world_mean(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes (itself on one)."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def reshard(model: nn.Module) -> None:
    """Back to pieces what FSDP leaves whole after a forward pass without a backward pass; nothing for other models."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@cache
def defaults_of(kind: type[TrainingArguments]) -> TrainingArguments:
    """Arguments of this kind as they come. Building any takes the process group away from trainers that exist: each trainer
    asks for these before it is built."""
    return kind(output_dir="")


def post_train(
    config: Any, make: Callable[[Any, Any], UMMTrainer], about: Callable[[Any], dict[str, Any]] = lambda trainer: {}
) -> Any:
    """Train ``config.model`` in place on ``config.data``, and save it with its run record to ``config.output_dir``.

    Args:
        make: model and training data -> the trainer. about: trainer -> more for the record.
    """
    from umm_kit.data import open_data
    from umm_kit.models import load

    set_seed(config.seed)
    model = load(config.model, device="cpu", dtype=config.load_dtype)
    trainer = make(model, open_data(config.data, "train", seed=config.seed, image_size=model.image_size))
    trainer.fit()
    trainer.save_whole(model, str(config.output_dir))
    if trainer.is_world_process_zero():
        record = run_record(config, trainer.seconds(), trainer.state.log_history, **about(trainer))
        write_json(Path(str(config.output_dir)) / "run.json", record)
    return model


def run_record(
    config: TrainingArguments, seconds: float, history: Iterable[Mapping[str, Any]] = (), **more: Any
) -> dict[str, Any]:
    """What it takes to make a run again: command, configuration, seed, versions, device, wall time, and its log."""
    defaults, changed = defaults_of(type(config)), {}  # type: ignore[arg-type]
    for name in config.__dataclass_fields__:
        value = getattr(config, name)
        if (
            isinstance(value, bool | int | float | str | list)
            and value != getattr(defaults, name)
            and name not in ("output_dir", "logging_dir", "resume")
        ):
            changed[name] = value
    return {
        "command": command() or type(config).__name__,
        "config": changed,
        "seed": config.seed,
        "processes": config.world_size,
        "versions": versions(),
        "device": machine(),
        "wall_seconds": seconds,
        "log": list(history),
        **more,
    }
