"""Training of the image tokenizer (reconstruction of scenes at every texture level, or of any images)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.hf_argparser import HfArg

from umm_kit.models.latents import LatentTokenizer, LatentTokenizerConfig
from umm_kit.models.tokenizers import ImageTokenizer, ImageTokenizerConfig, codebook_use
from umm_kit.records import write_json
from umm_kit.trainers.base import Stream, UMMArguments, UMMTrainer, run_record


@dataclass
class TokenizerConfig(UMMArguments):
    """Configuration of :func:`train`; defaults make the shipped tokenizer."""

    output_dir: str | None = "runs/tokenizer"
    data: str = HfArg(default="shapes", help="'shapes', 'digits' or an image-text folder.")
    levels: list[int] = HfArg(default_factory=lambda: [8, 8, 8, 5], help="FSQ levels; the codebook has their product.")
    latent: bool = HfArg(default=False, help="Codes are vectors, of the flow family, and not numbers.")
    decoder_of: str = HfArg(default="", help="Folder of a latent tokenizer: its decoder is trained further, its latents stay.")
    channels: int = 96
    depth: int = 5
    max_steps: int = 4000
    per_device_train_batch_size: int = 64
    learning_rate: float = 4e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 100
    ema_decay: float = 0.995
    bf16: bool = True
    save_steps: float = 1000
    adam_beta2: float = 0.95


class TextureMix(torch.utils.data.Dataset):
    """Scenes that take turns at the texture levels, half of them at the default one.

    The tokenizer sees pixels and no words: one turn in four shows held-out compositions too, so that what is measured on
    them later is how the unified model composes, not whether its tokenizer can paint an orange triangle.
    """

    def __init__(self, seed: int):
        from umm_kit.data.shapes import Nuisance, Shapes

        turns = (("train", "mid"), ("train", "high"), ("heldout", "mid"), ("train", "none"))
        self.turns = [Shapes(split, n=2**40, seed=seed, nuisance=Nuisance(texture=texture)) for split, texture in turns]

    def __len__(self) -> int:
        return 2**40

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Scenes k, by turns of 64 that do not depend on how a batch is cut."""
        turn = lambda k: k // 64 % len(self.turns)  # noqa: E731
        return [item for t, run in groupby(numbers, turn) for item in self.turns[t].__getitems__(list(run))]


def images_only(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"images": torch.stack([item["images"] for item in items])}


def numbered(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """With the examples' numbers, to which the noise on their latents belongs."""
    return {**images_only(items), "numbers": [item["number"] for item in items]}


def trained_tokenizer(folder: Path, latent: bool) -> Any:
    """The image tokenizer in a folder; one of the other kind is refused."""
    if not (folder / "config.json").exists():
        raise ValueError(f"no image tokenizer in {folder}; train one with 'umm-kit train tokenizer --output_dir {folder}'")
    kind: Any = LatentTokenizer if latent else ImageTokenizer
    if (made := json.loads((folder / "config.json").read_text())["model_type"]) != kind.config_class.model_type:
        raise ValueError(f"{folder} holds a {made}; expected an image tokenizer {'with' if latent else 'without'} --latent")
    return kind.from_pretrained(folder, use_safetensors=True, local_files_only=True)


def train(config: TokenizerConfig) -> Any:
    """Train an image tokenizer and save it, with its run record, to ``config.output_dir``."""
    from umm_kit.data import open_data

    set_seed(config.seed)
    data = TextureMix(config.seed) if config.data == "shapes" else open_data(config.data, "train", seed=config.seed)
    length = config.max_steps * config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    if config.decoder_of:
        model: Any = trained_tokenizer(Path(config.decoder_of), latent=True)
        model.autoencoder.encoder.requires_grad_(False)
    elif config.latent:
        model = LatentTokenizer(LatentTokenizerConfig(channels=config.channels // 2, depth=config.depth // 2))
    else:
        model = ImageTokenizer(ImageTokenizerConfig(channels=config.channels, depth=config.depth, levels=tuple(config.levels)))
    collator = numbered if isinstance(model, LatentTokenizer) else images_only
    trainer = UMMTrainer(model, config, train_dataset=Stream(data, length, config.seed), data_collator=collator)
    trainer.fit()
    held_out = open_data(config.data, "validation", n=256, seed=config.seed)
    images = torch.stack([item["images"] for item in held_out.__getitems__(range(len(held_out)))])
    model.eval()
    if config.latent and not config.decoder_of:
        model.standardise(images)
    scores = {"psnr_db": float(-10 * (model.reconstruct(images) - images).square().mean().log10()), "n": len(images)}
    if isinstance(model, ImageTokenizer):
        use = codebook_use(model.encode(images), model.codebook_size)
        scores |= {"codes_used": use.used, "codes": use.size, "perplexity": use.perplexity}
    if trainer.is_world_process_zero():
        model.save_pretrained(str(config.output_dir))
        write_json(
            Path(str(config.output_dir)) / "run.json",
            run_record(config, trainer.seconds(), trainer.state.log_history, scores=scores),
        )
    return model
