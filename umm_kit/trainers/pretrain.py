"""Pretraining and supervised fine-tuning: both flows from the same images, in one step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import set_seed
from transformers.hf_argparser import HfArg

from umm_kit.data import open_data
from umm_kit.data.shapes import ONE_FLOW, Nuisance, shows_any
from umm_kit.models.autoregressive import AutoregressiveUMM, AutoregressiveUMMConfig
from umm_kit.models.base import MASK_RATIO
from umm_kit.models.flowmatching import FlowUMM, FlowUMMConfig
from umm_kit.models.masked import MaskedUMM, MaskedUMMConfig
from umm_kit.models.own import DESCRIBE, IGNORE, OwnUMM
from umm_kit.models.tokenizers import train_text_tokenizer
from umm_kit.records import write_json
from umm_kit.trainers.base import Stream, UMMArguments, UMMTrainer, run_record, world_mean
from umm_kit.trainers.tokenizer import TokenizerConfig, trained_tokenizer
from umm_kit.trainers.tokenizer import train as train_tokenizer

#: Text widths are padded to multiples of this: kernels are made anew for every new shape, and kept, so few shapes are fast
#: and need little memory.
PAD_TO = 16


FAMILIES: dict[str, tuple[Any, Any]] = {
    "masked": (MaskedUMM, MaskedUMMConfig),
    "autoregressive": (AutoregressiveUMM, AutoregressiveUMMConfig),
    "flow": (FlowUMM, FlowUMMConfig),
}


@dataclass
class PretrainConfig(UMMArguments):
    """Configuration of :func:`train`; what a shipped model changed, its card says."""

    output_dir: str | None = "runs/masked"
    model: str = HfArg(default="", help="Go on from this model (fine-tuning); empty starts a new one.")
    family: str = HfArg(default="masked", help="Of a new model: masked, autoregressive or flow.")
    image_tokenizer: str = HfArg(default="", help="Image tokenizer of a new model; empty: train one first, in output_dir.")
    data: str = HfArg(default="shapes", help="'shapes', 'digits' or an image-text folder.")
    texture: str = HfArg(default="mid", help="Entropy of the scenes' patch texture: 'none', 'mid' or 'high'.")
    asymmetric: bool = HfArg(default=False, help="Scenes with a composition of data.shapes.ONE_FLOW are shown to its flow alone.")
    hidden_size: int = 128
    num_layers: int = 10
    num_heads: int = 4
    questions: int = HfArg(default=3, help="Questions per image beside its caption.")
    understanding_every: int = HfArg(
        default=2, help="Every how many-th image goes through the understanding flow too: drawing is the slower to learn."
    )
    understanding_weight: float = 1.0
    generation_weight: float = 1.0
    full_mask: float = HfArg(default=0.1, help="Share of generation examples with every token hidden (text-to-image replay).")
    mask_schedule: str = HfArg(
        default="cosine",
        help="Mask ratio of the others: 'cosine' (cos of a uniform angle, MaskGIT) or 'flow' (uniform in 0.2-0.6, DIVA).",
    )
    caption_dropout: float = HfArg(default=0.1, help="Share of generation examples without text, for classifier-free guidance.")
    max_steps: int = 6000
    per_device_train_batch_size: int = 64
    learning_rate: float = 3e-3
    lr_scheduler_type: str = "warmup_stable_decay"
    decay_share: float = HfArg(default=0.3, help="Share of the steps at the end in which the learning rate falls to 0.")
    warmup_steps: float = 200
    weight_decay: float = 0.01
    adam_beta2: float = 0.95
    ema_decay: float = 0.998
    bf16: bool = True
    save_steps: float = 500
    eval_strategy: str = "steps"
    eval_steps: float | None = 500
    per_device_eval_batch_size: int = 64
    eval_items: int = HfArg(default=256, help="Validation examples behind each evaluation loss.")

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family is {self.family!r}; expected one of {', '.join(FAMILIES)}")
        if self.mask_schedule not in ("cosine", "flow"):
            raise ValueError(f"mask_schedule is {self.mask_schedule!r}; expected 'cosine' or 'flow'")
        if self.data != "shapes" and (self.texture != "mid" or self.asymmetric):
            raise ValueError(f"texture and asymmetric are of the scenes, but data is {self.data!r}; leave them out")
        if self.understanding_every < 1 or self.per_device_train_batch_size % self.understanding_every:
            raise ValueError(
                f"per_device_train_batch_size {self.per_device_train_batch_size} is not a multiple of "
                f"understanding_every {self.understanding_every}"
            )
        for name in ("full_mask", "caption_dropout", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share in [0, 1]")
        if (
            min(self.understanding_weight, self.generation_weight) < 0
            or not self.understanding_weight + self.generation_weight > 0
        ):
            raise ValueError("understanding_weight and generation_weight must not be negative, nor both zero")
        if str(self.lr_scheduler_type) == "warmup_stable_decay":
            self.lr_scheduler_kwargs = {"num_decay_steps": int(self.decay_share * self.max_steps)}
        super().__post_init__()
        if self.fsdp and not self.model and not self.image_tokenizer:  # what is trained first would settle how all is
            raise ValueError("--fsdp came without --image_tokenizer: train one first with 'umm-kit train tokenizer', and name it")

    @classmethod
    def tiny(cls, **changes: Any) -> PretrainConfig:
        """A run of seconds for tests: 8 steps of 8 small examples; deviates from the default in sizes and steps only."""
        small: dict[str, Any] = dict(hidden_size=32, num_layers=2, num_heads=2, max_steps=8, per_device_train_batch_size=8)
        small |= dict(warmup_steps=2, save_steps=4, eval_strategy="no", logging_steps=1, bf16=False)
        return cls(**{**small, **changes})


@dataclass
class AutoregressiveConfig(PretrainConfig):
    """:class:`PretrainConfig` of the second family: pictures are mostly drawn whole, as it draws them, others as DIVA asks."""

    output_dir: str | None = "runs/autoregressive"
    family: str = "autoregressive"
    full_mask: float = 0.75
    mask_schedule: str = "flow"


@dataclass
class FlowConfig(AutoregressiveConfig):
    """:class:`PretrainConfig` of the third family: pictures are mostly drawn whole, too; its image tokenizer makes vectors."""

    output_dir: str | None = "runs/flow"
    family: str = "flow"
    separate_encoder: bool = HfArg(default=False, help="Understanding sees by an encoder of its own.")


class Collator:
    """Items of a :class:`Stream` to tensors for both flows; every choice comes from the item's own draws ``u``.

    u[0] the full mask, u[1] the mask ratio, u[2] caption dropout, u[8:] the order in which tokens are hidden.
    """

    def __init__(self, model: OwnUMM, data: Any, config: PretrainConfig):
        self.model, self.data, self.config = model, data, config

    def masks(self, u: np.ndarray) -> Tensor:
        """Masks [B, N] bool from draws [B, 8 + N]."""
        n = math.prod(self.model.grid)
        low, high = MASK_RATIO
        ratio = np.cos(np.pi / 2 * u[:, 1]) if self.config.mask_schedule == "cosine" else low + (high - low) * u[:, 1]
        ratio = np.where(u[:, 0] < self.config.full_mask, 1.0, ratio)
        count = np.clip(np.rint(ratio * n), 1, n)
        return torch.from_numpy(u[:, 8 : 8 + n].argsort(1).argsort(1) < count[:, None])

    def one_flow(self, items: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """Which items are kept from understanding, and which from generation: those that only the other flow may see."""
        if not self.config.asymmetric:
            return np.zeros(len(items), dtype=bool), np.zeros(len(items), dtype=bool)
        colour, shape = (torch.stack([item["factors"][name] for item in items]) for name in ("colour", "shape"))
        return shows_any(colour, shape, ONE_FLOW["generation"]), shows_any(colour, shape, ONE_FLOW["understanding"])

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        places, u = [item["index"] for item in items], np.stack([item["u"] for item in items])
        from_understanding, from_generation = self.one_flow(items)
        every = self.config.understanding_every
        shown = [i for i, item in enumerate(items) if item["number"] % every == 0 and not from_understanding[i]]
        read = [places[i] for i in shown or [0]]
        asked = self.data.questions(read, self.config.questions) if hasattr(self.data, "questions") else [[] for _ in read]
        segments = [[(DESCRIBE, items[i]["texts"]), *more] for i, more in zip(shown or [0], asked, strict=True)]
        packed = self.model.pack(segments, PAD_TO)
        if not shown:  # a batch needs one row, which then supervises nothing
            packed["labels"].fill_(IGNORE)
        drawn = self.data.drawing_texts(places) if hasattr(self.data, "drawing_texts") else [item["texts"] for item in items]
        texts = ["" if row[2] < self.config.caption_dropout else text for text, row in zip(drawn, u, strict=True)]
        return {
            "images": torch.stack([item["images"] for item in items]),
            "shown": torch.tensor(shown or [0]),
            "understanding": packed,
            "captions": self.model.pack_captions(texts, PAD_TO),
            "mask": self.masks(u) & ~torch.from_numpy(from_generation)[:, None],
            "seeds": torch.tensor([item["number"] for item in items]),
        }


class PretrainTrainer(UMMTrainer):
    """Trains a model of one of our families in place on understanding_weight * L_U + generation_weight * L_G.

    Both losses are means over all supervised tokens of the global batch, so that they do not depend on how many
    processes share it.
    """

    shards = True

    def __init__(self, model: OwnUMM, args: PretrainConfig, train_dataset: Any, eval_dataset: Any = None, **kwargs: Any):
        length = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        draws = 8 + math.prod(model.grid)
        stream = Stream(train_dataset, length, args.seed, draws)
        held_out = (
            None if eval_dataset is None else Stream(eval_dataset, min(len(eval_dataset), args.eval_items), args.seed + 1, draws)
        )
        self._eval_collator = None if eval_dataset is None else Collator(model, eval_dataset, args)
        self._train_collator = Collator(model, train_dataset, args)
        super().__init__(model, args, train_dataset=stream, eval_dataset=held_out, data_collator=self._train_collator, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        self.data_collator = self._eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = self._train_collator

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        inputs = {"codes": None, **inputs}
        counts = torch.stack([(inputs["understanding"]["labels"] != IGNORE).sum(), inputs["mask"].sum()]).float()
        inputs["tokens"] = world_mean(counts).clamp(min=1)
        inputs |= {"understanding_weight": self.args.understanding_weight, "generation_weight": self.args.generation_weight}
        return super().compute_loss(model, inputs, return_outputs)


def new_model(config: PretrainConfig, data: Any) -> OwnUMM:
    """An untrained model around a trained image tokenizer, with a text tokenizer made from the data's words.

    Without a named image tokenizer, one is trained first (or its training resumed, or the finished one taken up again).
    """
    from umm_kit.data.language import vocabulary_corpus

    folder, kind = Path(config.image_tokenizer or f"{config.output_dir}/image_tokenizer"), FAMILIES[config.family]
    latent = config.family == "flow"
    if not config.image_tokenizer and not (folder / "config.json").exists():
        train_tokenizer(TokenizerConfig(output_dir=str(folder), data=config.data, seed=config.seed, resume=True, latent=latent))
        set_seed(config.seed)  # the model is the same whether its tokenizer was there or not
    tokenizer = trained_tokenizer(folder, latent)
    words = train_text_tokenizer(vocabulary_corpus() if config.data == "shapes" else corpus(data))
    sizes: dict[str, Any] = dict(hidden_size=config.hidden_size, num_layers=config.num_layers, num_heads=config.num_heads)
    sizes |= {"separate_encoder": config.separate_encoder} if isinstance(config, FlowConfig) else {}
    model = kind[0](kind[1](**sizes, text_vocab_size=len(words), image_tokenizer=tokenizer.config.to_dict()), words)
    model.image_tokenizer.load_state_dict(tokenizer.state_dict())
    return model


def corpus(data: Any) -> list[str]:
    """All texts of a finite data set: captions, questions and answers."""
    texts = [DESCRIBE]
    for i in range(len(data)):
        texts.append(data.texts[i] if hasattr(data, "texts") else data[i]["texts"])
        if hasattr(data, "questions"):
            texts += [text for pair in data.questions([i], 100)[0] for text in pair]
    return texts


def train(config: PretrainConfig) -> OwnUMM:
    """Pretrain or fine-tune, and save the model with its run record to ``config.output_dir``."""
    from umm_kit.models import load

    set_seed(config.seed)
    options: dict[str, Any] = {"nuisance": Nuisance(texture=config.texture)} if config.data == "shapes" else {}
    data, held_out = (open_data(config.data, split, seed=config.seed, **options) for split in ("train", "validation"))
    model = load(config.model, device="cpu") if config.model else new_model(config, data)
    model.train()
    trainer = PretrainTrainer(model, config, data, eval_dataset=held_out if config.eval_strategy != "no" else None)
    trainer.fit()
    trainer.save_whole(model, str(config.output_dir))
    if trainer.is_world_process_zero():
        record = run_record(
            config, trainer.seconds(), trainer.state.log_history, parameters=model.num_parameters(only_trainable=True)
        )
        made = Path(config.image_tokenizer or f"{config.output_dir}/image_tokenizer") / "run.json"
        if not config.model and made.exists():  # a new model rests on a tokenizer: how that was made belongs to its record
            record["image_tokenizer"] = {k: v for k, v in json.loads(made.read_text()).items() if k != "log"}
        write_json(Path(str(config.output_dir)) / "run.json", record)
    return model
