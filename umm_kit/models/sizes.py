"""How large a model is, what training it would hold in memory and cost: from its configuration alone, before a weight is read.

All memory is that of one process which holds everything, without the workspace of kernels; ``umm-kit info MODEL`` prints it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from umm_kit.models import config_of, load, place_of

GIB = 2**30
#: What is trained -> what it says.
TRAINED = {
    "none": "read only",
    "lora": "LoRA in the middle layers",
    "middle": "the middle layers (DIVA, stage 2)",
    "all": "all shared layers",
}


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, and of what is trained of it.

    Attributes:
        parameters: of everything that is loaded (of Liquid without its image tokenizer, which has a folder of its own).
        blocks: of each shared layer, in order.
        linear: (in, out) of every matrix in one layer, where LoRA goes.
        hidden_size: width d. stored: bytes of a parameter in the checkpoint.
        name: as it was asked for.
    """

    name: str
    parameters: int
    blocks: tuple[int, ...]
    linear: tuple[tuple[int, int], ...]
    hidden_size: int
    stored: int

    @property
    def download(self) -> int:
        """Bytes of the weights."""
        return self.parameters * self.stored

    def trained(self, what: str, rank: int = 16) -> int:
        """Parameters that are trained: of ``TRAINED``; LoRA holds rank (in + out) for every linear map of the middle layers."""
        from umm_kit.models.factors import middle_layers

        if what not in TRAINED:
            raise ValueError(f"what is trained is {what!r}; expected one of {list(TRAINED)}")
        middle = middle_layers(len(self.blocks))
        counts = {
            "none": 0,
            "lora": rank * len(middle) * sum(a + b for a, b in self.linear),
            "middle": sum(self.blocks[layer - 1] for layer in middle),
            "all": sum(self.blocks),
        }
        return counts[what]

    def memory(self, pairs: int = 8, tokens: int = 640, rank: int = 16) -> pd.DataFrame:
        """GiB by what is trained: weights, gradients, optimizer (AdamW: two moments), averages (EMA), activations, and their sum.

        Weights that are read or stand under LoRA are kept in 16 bits; others are trained in 32, with 16-bit products. Activations
        are those of ``pairs`` image-text pairs of ``tokens`` tokens in both flows at once: of a training about 34 d bytes per
        token and layer, which is what a transformer layer keeps for its backward pass at 16 bits without its attention matrix
        (after Korthikanti et al. 2022), of reading those of one layer. They are an estimate, the rest is counted.
        """
        rows = {}
        for what, says in TRAINED.items():
            t, frozen = self.trained(what, rank), what in ("none", "lora")
            weights = 2 * self.parameters + 4 * t if frozen else 4 * self.parameters
            layers = 1 if what == "none" else len(self.blocks)
            kept = 34 * self.hidden_size * 2 * pairs * tokens * layers
            parts = {"weights": weights, "gradients": 4 * t, "optimizer": 8 * t, "averages": 4 * t, "activations": kept}
            rows[says] = {"trained": t} | {k: v / GIB for k, v in parts.items()} | {"sum": sum(parts.values()) / GIB}
        return pd.DataFrame(rows).T

    def operations(self, pairs: int = 8, tokens: int = 640) -> float:
        """Of one step of training on both flows: 6 per parameter of the shared layers and token (2 forward, 4 backward)."""
        return 6.0 * sum(self.blocks) * 2 * pairs * tokens

    def __str__(self) -> str:
        table = self.memory().to_string(formatters={"trained": "{:,.0f}".format}, float_format="%.2f")
        return (
            f"{self.name}: {self.parameters:,} parameters in {self.stored * 8} bits, {self.download / 1e9:.2f} GB on disk; "
            f"{len(self.blocks)} shared layers of width {self.hidden_size}\n"
            f"GiB on one device, for 8 pairs of 640 tokens in both flows (activations are estimated):\n{table}"
        )


def sizes(model: Any, name: str = "") -> Sizes:
    """Of a model, or of a name that :func:`umm_kit.load` knows; of a checkpoint of transformers no weight is read.

    Raises:
        ValueError: as ``load`` does.

    Example:
        >>> found = sizes("tiny-tight-0")
        >>> len(found.blocks), found.trained("all") == sum(found.blocks)
        (4, True)
    """
    if isinstance(model, str | Path):
        return _of_name(str(model))
    groups = model.layer_parameters().values()
    return _counted(name or type(model).__name__, model, [nn.ParameterList(group) for group in groups], model.hidden_size, model)


def _of_name(name: str) -> Sizes:
    import transformers

    from umm_kit.models.pretrained import PRETRAINED

    about = config_of(place_of(name))
    kind = json.loads(about.read_text(encoding="utf-8")).get("model_type")
    if kind not in PRETRAINED:
        return sizes(load(name, device="cpu"), name)
    family = PRETRAINED[kind]
    known = getattr(transformers, family.transformers_class)
    config = known.config_class.from_pretrained(about.parent, trust_remote_code=False)
    with torch.device("meta"):
        model = known(config)
    body = model.get_submodule(family.body_path)
    return _counted(name, model, body.layers, body.config.hidden_size, config)


def _counted(name: str, model: nn.Module, blocks: Any, width: int, about: Any) -> Sizes:
    each = tuple(sum(p.numel() for p in block.parameters()) for block in blocks)
    maps = [p for p in blocks[0].parameters() if p.ndim == 2]
    dtype = getattr(about, "dtype", None) or torch.float32
    stored = (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize
    total = sum(p.numel() for p in model.parameters())
    return Sizes(name, total, each, tuple((p.shape[1], p.shape[0]) for p in maps), width, stored)
