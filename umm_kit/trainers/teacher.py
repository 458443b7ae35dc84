"""Training of a small teacher: a real ``transformers.CLIPModel``, contrastively, on scenes or on any image-text pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, set_seed
from transformers.hf_argparser import HfArg

from umm_kit.losses.factorization import alignment
from umm_kit.models.teachers import CLIPTeacher, retrieved
from umm_kit.models.tokenizers import train_text_tokenizer
from umm_kit.records import command, write_json
from umm_kit.statistics import bootstrap
from umm_kit.trainers.base import Stream, UMMArguments, UMMTrainer, run_record
from umm_kit.trainers.pretrain import PAD_TO, corpus
from umm_kit.trainers.stages import facts_of


@dataclass
class TeacherConfig(UMMArguments):
    """Configuration of :func:`train`. The shipped ``tiny-teacher`` is smaller and was trained for less; its card says how."""

    output_dir: str | None = "runs/teacher"
    data: str = HfArg(default="shapes", help="'shapes', 'digits' or an image-text folder.")
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    patch_size: int = 4
    projection_dim: int = 64
    max_text: int = 48
    temperature: float = 0.05
    max_steps: int = 3000
    per_device_train_batch_size: int = 128
    learning_rate: float = 2e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 100
    ema_decay: float = 0.995
    bf16: bool = True
    save_steps: float = 500
    adam_beta2: float = 0.95

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        super().__post_init__()

    @classmethod
    def tiny(cls, **changes: Any) -> TeacherConfig:
        """A run of seconds for tests; deviates from the default in sizes and steps only."""
        small: dict[str, Any] = dict(hidden_size=32, num_layers=1, num_heads=2, patch_size=8, projection_dim=16, max_steps=4)
        small |= dict(per_device_train_batch_size=16, warmup_steps=1, save_steps=2, logging_steps=1, bf16=False)
        return cls(**{**small, **changes})


class Contrastive(nn.Module):
    """A CLIP model with its loss: each caption picks its picture and the reverse, among those that do not say the same."""

    _no_split_modules = ("CLIPEncoderLayer",)  # whose matrices Muon trains

    def __init__(self, teacher: CLIPTeacher, temperature: float):
        super().__init__()
        self.clip, self.temperature = teacher.model, temperature

    def forward(self, ids: Tensor, attention_mask: Tensor, pixels: Tensor, facts: Tensor) -> dict[str, Tensor]:
        text = self.clip.get_text_features(input_ids=ids, attention_mask=attention_mask).pooler_output
        image = self.clip.get_image_features(pixel_values=pixels).pooler_output
        found = alignment(text, image, temperature=self.temperature, facts=facts)
        return {"loss": found.loss, "accuracy": found.accuracy, "estimate": found.estimate.detach()}


def new_teacher(config: TeacherConfig, texts: Iterable[str], image_size: int) -> CLIPTeacher:
    """An untrained teacher whose words are those of the texts."""
    from tokenizers.processors import TemplateProcessing

    words: Any = train_text_tokenizer(texts)
    # CLIP reads a text off at its <eos>, so the tokenizer has to put one there.
    words.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", words.eos_token_id)])
    sizes = {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads}
    sizes["intermediate_size"] = 4 * config.hidden_size
    ends = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**sizes, **ends, "vocab_size": len(words), "max_position_embeddings": config.max_text}
    vision = {**sizes, "image_size": image_size, "patch_size": config.patch_size}
    both = CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.projection_dim)
    return CLIPTeacher(CLIPModel(both), words, ((0.5,) * 3, (0.5,) * 3))


def train(config: TeacherConfig) -> CLIPTeacher:
    """Train a teacher and save it, with its run record and its retrieval on validation items, to ``config.output_dir``."""
    from umm_kit.data import open_data
    from umm_kit.data.language import vocabulary_corpus

    set_seed(config.seed)
    data = open_data(config.data, "train", seed=config.seed)
    texts = vocabulary_corpus() if config.data == "shapes" else corpus(data)
    teacher = new_teacher(config, texts, data[0]["images"].shape[-1])

    def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        said = teacher.tokenizer([item["texts"] for item in items], truncation=True, max_length=config.max_text)
        padded = teacher.tokenizer.pad(said, pad_to_multiple_of=PAD_TO, return_tensors="pt")
        pixels = teacher.pixels(torch.stack([item["images"] for item in items]))
        facts = torch.from_numpy(facts_of(items))
        return {"ids": padded["input_ids"], "attention_mask": padded["attention_mask"], "pixels": pixels, "facts": facts}

    length = config.max_steps * config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    model = Contrastive(teacher, config.temperature).train()
    trainer = UMMTrainer(model, config, train_dataset=Stream(data, length, config.seed), data_collator=collate)
    trainer.fit()
    teacher.model.eval()
    if trainer.is_world_process_zero():
        folder = Path(str(config.output_dir))
        teacher.save_pretrained(folder)
        parameters = sum(p.numel() for p in teacher.model.parameters())
        record = run_record(config, trainer.seconds(), trainer.state.log_history, parameters=parameters)
        write_json(folder / "run.json", record)
        write_json(folder / "scores.json", scores(teacher, open_data(config.data, "validation", n=512, seed=config.seed)))
    return teacher


def scores(teacher: CLIPTeacher, data: Any) -> dict[str, Any]:
    """How often the nearest picture of a text is its own, and the reverse, in the form that model cards are written from.

    Pictures and texts that say the same as one's own count as right.
    """
    items = [data[i] for i in range(len(data))]
    vectors = teacher.embed_text([i["texts"] for i in items]), teacher.embed_image(torch.stack([i["images"] for i in items]))
    e = bootstrap(retrieved(*vectors, facts_of(items).tolist()).numpy())
    row = {"metric": "retrieval_at_1", "value": e.value, "low": e.low, "high": e.high, "n": len(items)}
    return {"record": {"command": command() or "trainers.teacher.scores", "data": repr(data)}, "metrics": [row]}
