"""What our own families have in common: words, packed rows of text, training on both flows at once, files.

A family says by ``_understanding`` and ``_generation`` how it reads a packed batch; the rest is here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from umm_kit.models.base import check_loaded
from umm_kit.models.tokenizers import ImageTokenizerConfig, check_sizes, code_digits, train_text_tokenizer

DESCRIBE = "describe"  # opens the segment in which a caption is asked for
IGNORE = -100


def drawn_by(draw: Any, shape: Sequence[int], generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """``draw`` (torch.rand or torch.randn) on the CPU, from one generator (torch's own if None), or from one for each row."""
    if generator is None or isinstance(generator, torch.Generator):
        return draw(tuple(shape), generator=generator)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators came for {shape[0]} rows; expected one each, or one for all")
    return torch.stack([draw(tuple(shape[1:]), generator=each) for each in generator])


def gumbel(shape: Sequence[int], generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Gumbel noise: a largest score plus it is a draw from the scores' softmax."""
    return -(-drawn_by(torch.rand, shape, generator).clamp_(1e-9, 1 - 1e-7).log()).log()


class OwnUMMConfig(PretrainedConfig):
    """Sizes of a model of our own families; ``image_tokenizer`` is the configuration of its (frozen) image tokenizer.

    ``attention``, where a family's transformer is ours: "sdpa", "matmul", or "auto" by the device.
    """

    image_tokenizer_config: ClassVar[Any] = ImageTokenizerConfig
    hidden_size: int = 128
    num_layers: int = 10
    num_heads: int = 4
    mlp_ratio: int = 4
    text_vocab_size: int = 128
    max_text: int = 96
    attention: str = "auto"
    image_tokenizer: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        sizes = ("hidden_size", "num_layers", "num_heads", "mlp_ratio", "text_vocab_size", "max_text")
        check_sizes(**{name: getattr(self, name) for name in sizes})
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.attention not in ("auto", "sdpa", "matmul"):
            raise ValueError(f"attention is {self.attention!r}; expected 'auto', 'sdpa' or 'matmul'")
        self.image_tokenizer = self.image_tokenizer or self.image_tokenizer_config().to_dict()
        super().__post_init__(**kwargs)


class CodeTable(nn.Module):
    """A vector for each image code: the sum of those of its FSQ digits, plus one of its own that starts at zero.

    Codes that share a digit look alike. Shared vectors let a word teach all codes of a colour at once, where unrelated
    ones would each have to be met often. Called on states [..., d], it scores all codes: logits [..., K].
    """

    def __init__(self, levels: Sequence[int], hidden_size: int):
        super().__init__()
        self.levels = tuple(levels)
        self.of_digit = nn.Embedding(sum(self.levels), hidden_size)
        self.of_code = nn.Embedding(math.prod(self.levels), hidden_size)
        self.of_digit.init_gain = len(self.levels) ** -0.5  # type: ignore[assignment]
        self.of_code.init_gain = 0.0  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:
        """[K, d], differentiable."""
        digits = code_digits(torch.arange(len(self.of_code.weight), device=self.of_code.weight.device), self.levels)
        start = torch.tensor([0, *self.levels[:-1]], device=digits.device).cumsum(0)
        return self.of_code.weight + self.of_digit(digits + start).sum(1)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight)


class OwnUMM(PreTrainedModel):
    """A family that is trained here: its image tokenizer and its words lie in its folder.

    Args (of a family): config with ``max_text``; text_tokenizer: made by ``train_text_tokenizer``.
    """

    main_input_name = "images"
    config_class: Any
    small_tokenizer: Mapping[str, Any] = {"channels": 16, "depth": 1, "levels": (4, 4, 4)}  # of a tiny model
    grid: tuple[int, int]
    image_tokenizer: Any
    text_tokenizer: PreTrainedTokenizerFast | None
    text_head: Any
    image_head: Any

    def _understanding(
        self, codes: Tensor, packed: Mapping[str, Tensor], layers: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Final states at the text positions [B, T, d], and image states per layer."""
        raise NotImplementedError

    def _generation(
        self, codes: Tensor, mask: Tensor, ids: Tensor, layers: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """States that predict each code [B, N, d], and image states per layer. ``mask`` [B, N] hides codes."""
        raise NotImplementedError

    def _generation_loss(self, codes: Tensor, mask: Tensor, ids: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Sum over hidden tokens of what each costs. ``seeds`` [B]: of what a family draws for an example."""
        return summed_loss(self.image_head, self._generation(codes, mask, ids)[0], torch.where(mask, codes, IGNORE))

    def _init_weights(self, module: nn.Module) -> None:
        # transformers draws each weight once, the children's first: a parent cannot rescale what a child has drawn,
        # so modules that start smaller carry their factor themselves.
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=getattr(module, "init_gain", 1.0) * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=getattr(module, "init_gain", 1.0) * module.embedding_dim**-0.5)

    @classmethod
    def tiny(cls, corpus: Sequence[str], **sizes: Any) -> Any:
        """An untrained model of a few thousand parameters, for tests and examples."""
        words, kind = train_text_tokenizer([*corpus, DESCRIBE]), cls.config_class
        small = dict(hidden_size=32, num_layers=3, num_heads=2, mlp_ratio=2)
        tokenizer = kind.image_tokenizer_config(**cls.small_tokenizer).to_dict()
        return cls(kind(**{**small, "image_tokenizer": tokenizer, **sizes}, text_vocab_size=len(words)), words).eval()

    def untrained(self, seed: int = 0) -> Any:
        """A model of this shape and image tokenizer with random weights: what it shows, training did not make."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            twin = type(self)(copy.deepcopy(self.config), self.text_tokenizer)
        twin.image_tokenizer = self.image_tokenizer
        return twin.to(next(self.parameters()).device).eval()

    # --- words ---------------------------------------------------------------------------------------------------------

    @property
    def words(self) -> PreTrainedTokenizerFast:
        if self.text_tokenizer is None:
            raise ValueError("this model has no text tokenizer; load it with uk.load(folder), or pass text_tokenizer=")
        return self.text_tokenizer

    def _special(self, token: str) -> int:
        return self.words.convert_tokens_to_ids(token)

    def pack(self, segments: Sequence[Sequence[tuple[str, str | None]]], multiple: int = 1) -> dict[str, Tensor]:
        """Tokenize text segments that follow one image: per image a list of (prompt, target or None).

        Returns tensors [B, T] ``ids``, ``segment`` (-1 = padding), ``position`` (within its segment) and ``labels`` (the
        *next* token where it belongs to a target or its <eos>, else -100). T is padded to a multiple of ``multiple``.
        """
        flat = [text for row in segments for pair in row for text in pair if text is not None]
        encoded = iter(self.words(flat, add_special_tokens=False)["input_ids"] if flat else [])
        eos, rows = self._special("<eos>"), []
        for row in segments:
            columns: tuple[list[int], ...] = ([], [], [], [])
            ids, segment, position, labels = columns
            for number, (_, target) in enumerate(row):
                asked = next(encoded)
                said = [] if target is None else [*next(encoded), eos]
                tokens = [*asked, *said]
                if len(tokens) > self.config.max_text:
                    raise ValueError(f"a text of {len(tokens)} tokens exceeds max_text = {self.config.max_text}: {row[number]!r}")
                ids += tokens
                segment += [number] * len(tokens)
                position += range(len(tokens))
                labels += ([IGNORE] * (len(asked) - 1) + said + [IGNORE])[: len(tokens)]
            rows.append(columns)
        width = -(-max(len(r[0]) for r in rows) // multiple) * multiple
        fills = (self._special("<pad>"), -1, 0, IGNORE)
        tensors = [torch.tensor([r[k] + [fill] * (width - len(r[k])) for r in rows]) for k, fill in enumerate(fills)]
        return dict(zip(("ids", "segment", "position", "labels"), tensors, strict=True))

    def pack_captions(self, texts: Sequence[str], multiple: int = 1) -> Tensor:
        """Tokenize texts for generation: [B, T] = <bos> <generate> words <eos>, padded; "" is the unconditional prompt."""
        ends = [self._special(t) for t in ("<bos>", "<generate>", "<eos>", "<pad>")]
        rows = [[ends[0], ends[1], *ids, ends[2]] for ids in self.words(list(texts), add_special_tokens=False)["input_ids"]]
        width = max(map(len, rows))
        if width > self.config.max_text:
            raise ValueError(f"a text of {width} tokens exceeds max_text = {self.config.max_text}")
        width = min(-(-width // multiple) * multiple, self.config.max_text)
        return torch.tensor([r + [ends[3]] * (width - len(r)) for r in rows])

    # --- training ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        codes: Tensor | None,
        understanding: Mapping[str, Tensor],
        captions: Tensor,
        mask: Tensor,
        shown: Tensor | None = None,
        tokens: Tensor | None = None,
        seeds: Tensor | None = None,
        images: Tensor | None = None,
        understanding_weight: float = 1.0,
        generation_weight: float = 1.0,
    ) -> dict[str, Tensor]:
        """Training losses of both flows on the same images, and their weighted sum.

        Args:
            codes: [B, N]; None: those of ``images`` [B, 3, H, W]. understanding: packed segments, see :meth:`pack`.
            captions: [B, T], see :meth:`pack_captions`.
            mask: [B, N] bool, True = hidden.
            shown: places in the batch of the images that ``understanding`` is about; all of them by default.
            tokens: [2] numbers of supervised text and image tokens to divide by; by default those of this batch.
            seeds: [B] numbers that a family makes each example's noise from.
        """
        out: dict[str, Tensor] = {}
        codes = self.image_tokenizer.encode(images) if codes is None else codes
        asked = understanding["labels"] != IGNORE
        tokens = torch.stack([asked.sum(), mask.sum()]) if tokens is None else tokens
        if understanding_weight:
            hidden = self._understanding(codes if shown is None else codes[shown], understanding)[0]
            out["understanding_loss"] = summed_loss(self.text_head, hidden, understanding["labels"]) / tokens[0]
        if generation_weight:
            out["generation_loss"] = self._generation_loss(codes, mask, captions, seeds) / tokens[1]
        weights = {"understanding_loss": understanding_weight, "generation_loss": generation_weight}
        out["loss"] = torch.stack([weights[k] * v for k, v in out.items()]).sum()
        return out

    def get_input_embeddings(self) -> None:
        """None that is only looked up in: accelerate would shard it by itself, where other modules read its weight."""

    # --- files ---------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Weights (safetensors), configuration and the text tokenizer in one folder."""
        super().save_pretrained(save_directory, **kwargs)
        if self.text_tokenizer is not None and kwargs.get("is_main_process", True):
            self.text_tokenizer.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:
        """A folder that :meth:`save_pretrained` wrote.

        Raises:
            ValueError: weights that are not those of its configuration, or not finite.
        """
        asked = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = super().from_pretrained(folder, *args, **{**kwargs, **asked})
        check_loaded(info, folder)
        if wrong := [name for name, value in model.state_dict().items() if not bool(torch.isfinite(value).all())]:
            raise ValueError(f"the weights in {folder} hold NaN or infinity: {', '.join(wrong[:3])}")
        if model.text_tokenizer is None and (Path(folder) / "tokenizer.json").exists():
            model.text_tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        return model


def summed_loss(head: nn.Module, hidden: Tensor, labels: Tensor, multiple: int = 256) -> Tensor:
    """Sum of cross-entropies of the labels [B, S] that are not IGNORE, given states [B, S, d].

    The head runs on those rows alone, filled up to a multiple of ``multiple``: CPU kernels are made anew for each number
    of rows, and kept, which over a long training fills the memory.
    """
    labels = labels.flatten()
    rows = torch.nonzero(labels != IGNORE)[:, 0]
    fill = -len(rows) % multiple
    targets = nn.functional.pad(labels[rows], (0, fill), value=IGNORE)
    logits = head(hidden.flatten(0, 1).index_select(0, nn.functional.pad(rows, (0, fill)))).float()
    return nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)


def detokenize(words: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """Words joined by spaces, punctuation attached to the word before it."""
    text = " ".join(words.convert_ids_to_tokens(list(ids)))
    for mark in ",.?!:;":
        text = text.replace(f" {mark}", mark)
    return text
