"""The first family, in the way of Show-o: one transformer, next-token loss on text, masked-token loss on image codes.

Sequences, with N image tokens in raster order:

    understanding   <bos> <understand> | image codes | text segment | text segment | ...
    generation      <bos> <generate> caption <eos> | image codes, some of them <mask>

Omni-attention: text is causal, image tokens see the text before them and all of one another. In the understanding
sequence the instruction stands before the image, so image states are conditioned on the task, and no text segment
stands before it, so they never see the caption. Segments after one image (a caption, questions) do not see each other.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from umm_kit.models.base import (
    MASK_RATIO,
    Decoding,
    FlowOutput,
    as_layers,
    check_batch,
    check_images,
    choose_mask,
    elbo_masks,
    token_losses,
)
from umm_kit.models.tokenizers import ImageTokenizer, ImageTokenizerConfig, code_digits, train_text_tokenizer

DESCRIBE = "describe"  # opens the segment in which a caption is asked for
IGNORE = -100


def _uniform(shape: Sequence[int], generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """Numbers in [0, 1) on the CPU, from one generator, or from one for each row."""
    if isinstance(generator, torch.Generator):
        return torch.rand(tuple(shape), generator=generator)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators came for {shape[0]} rows; expected one each, or one for all")
    return torch.stack([torch.rand(tuple(shape[1:]), generator=each) for each in generator])


class MaskedUMMConfig(PretrainedConfig):
    """Sizes of a :class:`MaskedUMM`; ``image_tokenizer`` is the configuration of its (frozen) image tokenizer."""

    model_type = "umm_masked"

    def __init__(
        self,
        hidden_size: int = 128,
        num_layers: int = 10,
        num_heads: int = 4,
        mlp_ratio: int = 4,
        text_vocab_size: int = 128,
        max_text: int = 96,
        attention: str = "auto",
        image_tokenizer: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        if attention not in ("auto", "sdpa", "matmul"):
            raise ValueError(f"attention is {attention!r}; expected 'auto', 'sdpa' or 'matmul'")
        self.hidden_size, self.num_layers, self.num_heads, self.mlp_ratio = hidden_size, num_layers, num_heads, mlp_ratio
        self.text_vocab_size, self.max_text, self.attention = text_vocab_size, max_text, attention
        self.image_tokenizer = image_tokenizer or ImageTokenizerConfig().to_dict()
        super().__init__(**kwargs)


class Attention(nn.Module):
    """Multi-head attention under an additive mask."""

    def __init__(self, config: MaskedUMMConfig):
        super().__init__()
        d, self.heads = config.hidden_size, config.num_heads
        self.kind = config.attention
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, mask: Tensor, cache: list[Tensor] | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = [k, v]
        # On CPUs the backward of scaled_dot_product_attention costs more than the plain product it replaces.
        if self.kind == "sdpa" or (self.kind == "auto" and x.device.type != "cpu"):
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).add_(mask)
            out = scores.softmax(-1).to(v.dtype) @ v
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: MaskedUMMConfig):
        super().__init__()
        d = config.hidden_size
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(config)
        self.mlp = nn.Sequential(nn.Linear(d, config.mlp_ratio * d), nn.ReLU(), nn.Linear(config.mlp_ratio * d, d))
        for last in (self.attention.out, self.mlp[-1]):  # the sum over all residual branches keeps its scale
            last.init_gain = (2 * config.num_layers) ** -0.5  # type: ignore[assignment]

    def forward(self, x: Tensor, mask: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask, cache)
        return x + self.mlp(self.norm2(x))


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


class MaskedUMM(PreTrainedModel):
    """A small unified model that captions, answers, draws and inpaints.

    Example:
        >>> model = MaskedUMM.tiny(["a red circle", "a blue square"])
        >>> model.generate(["a red circle"], decoding=Decoding(steps=2)).shape
        torch.Size([1, 3, 32, 32])
    """

    config_class = MaskedUMMConfig
    main_input_name = "images"
    _no_split_modules = ["Block"]

    def __init__(self, config: MaskedUMMConfig, text_tokenizer: PreTrainedTokenizerFast | None = None):
        super().__init__(config)
        d = config.hidden_size
        self.image_tokenizer = ImageTokenizer(ImageTokenizerConfig(**config.image_tokenizer)).requires_grad_(False)
        self.text_tokenizer = text_tokenizer
        self.grid = self.image_tokenizer.grid
        self.num_image_tokens = self.grid[0] * self.grid[1]
        self.codebook_size = self.image_tokenizer.codebook_size
        self.num_layers, self.hidden_size, self.image_size = config.num_layers, d, self.image_tokenizer.config.image_size
        self.embedding = nn.Embedding(config.text_vocab_size, d)
        self.image_embedding, self.mask_embedding = CodeTable(self.image_tokenizer.levels, d), nn.Embedding(1, d)
        self.text_position = nn.Embedding(config.max_text, d)
        self.row, self.column = nn.Embedding(self.grid[0], d), nn.Embedding(self.grid[1], d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(d)
        self.text_head = nn.Linear(d, config.text_vocab_size, bias=False)
        self.image_head = CodeTable(self.image_tokenizer.levels, d)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # transformers draws each weight once, the children's first: a parent cannot rescale what a child has drawn,
        # so modules that start smaller carry their factor themselves.
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=getattr(module, "init_gain", 1.0) * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=getattr(module, "init_gain", 1.0) * module.embedding_dim**-0.5)

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

    # --- one transformer -----------------------------------------------------------------------------------------------

    def _embed_text(self, ids: Tensor, position: Tensor) -> Tensor:
        return self.embedding(ids) + self.text_position(position)

    def _place(self) -> Tensor:
        return (self.row.weight[:, None] + self.column.weight[None]).flatten(0, 1)

    def _embed_image(self, codes: Tensor) -> Tensor:
        table = torch.cat([self.image_embedding.weight, self.mask_embedding.weight])  # the last row is <mask>
        return nn.functional.embedding(codes, table) + self._place()

    def _blocks(
        self, x: Tensor, allowed: Tensor, span: slice, layers: Sequence[int] = (), caches: list[list[Tensor]] | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run all blocks under a boolean mask [B, S, S'] and keep the states of ``layers`` at positions ``span``."""
        mask = torch.zeros(allowed.shape, device=x.device, dtype=torch.float32).masked_fill_(~allowed, float("-inf"))[:, None]
        if torch.is_autocast_enabled(x.device.type):
            # The residual stream stays in the reduced precision too: on a CPU the traffic of a wider one is half the step.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        mask = mask.to(x.dtype)
        states = {0: x[:, span]} if 0 in layers else {}
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, mask, caches[number - 1] if caches is not None else None)
            if number in layers:
                states[number] = x[:, span]
        return self.norm(x), states

    def _instruction(self, batch: int, device: torch.device) -> Tensor:
        ids = torch.tensor([[self._special("<bos>"), self._special("<understand>")]], device=device).expand(batch, -1)
        return self._embed_text(ids, torch.arange(2, device=device))

    def _read(self, image: Tensor, layers: Sequence[int] = (), caches: list[list[Tensor]] | None = None) -> dict[int, Tensor]:
        """States of the image tokens [B, N, d] in the understanding flow, before any word, from their embeddings."""
        b, n = image.shape[:2]
        allowed = torch.ones(2 + n, 2 + n, dtype=torch.bool, device=image.device).tril()
        allowed[2:, 2:] = True
        x = torch.cat([self._instruction(b, image.device), image], 1)
        return self._blocks(x, allowed.expand(b, -1, -1), slice(2, 2 + n), layers, caches)[1]

    def _understanding(
        self, codes: Tensor, packed: Mapping[str, Tensor], layers: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Final states at the text positions [B, T, d], and image states per layer."""
        b, n = codes.shape
        device = codes.device
        text = self._embed_text(packed["ids"], packed["position"])
        x = torch.cat([self._instruction(b, device), self._embed_image(codes), text], 1)
        start, total = 2 + n, x.shape[1]
        causal = torch.ones(total, total, dtype=torch.bool, device=device).tril()
        causal[2:start, 2:start] = True
        segment = packed["segment"]
        same = (segment[:, :, None] == segment[:, None, :]) & (segment >= 0)[:, None, :]
        allowed = causal.expand(b, -1, -1).clone()
        allowed[:, start:, start:] &= same
        hidden, states = self._blocks(x, allowed, slice(2, start), layers)
        return hidden[:, start:], states

    def _generation(
        self, codes: Tensor, mask: Tensor, ids: Tensor, layers: Sequence[int] = (), condition: Tensor | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Final states at the image positions [B, N, d], and image states per layer. ``mask`` [B, N] hides codes.

        ``condition`` [B, C, d] stands between text and image.
        """
        b, words = ids.shape
        between = [] if condition is None else [condition]
        shown = torch.where(mask, self.codebook_size, codes)
        parts = [self._embed_text(ids, torch.arange(words, device=ids.device)), *between, self._embed_image(shown)]
        x = torch.cat(parts, 1)
        total, t = x.shape[1], x.shape[1] - shown.shape[1]
        causal = torch.ones(total, total, dtype=torch.bool, device=ids.device).tril()
        causal[t:, t:] = True
        allowed = causal.expand(b, -1, -1).clone()
        allowed[:, :, :words] &= (ids != self._special("<pad>"))[:, None, :]
        hidden, states = self._blocks(x, allowed, slice(t, total), layers)
        return hidden[:, t:], states

    # --- training ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        codes: Tensor,
        understanding: Mapping[str, Tensor],
        captions: Tensor,
        mask: Tensor,
        shown: Tensor | None = None,
        tokens: Tensor | None = None,
        understanding_weight: float = 1.0,
        generation_weight: float = 1.0,
    ) -> dict[str, Tensor]:
        """Training losses of both flows on the same images, and their weighted sum.

        Args:
            codes: [B, N]. understanding: packed segments, see :meth:`pack`. captions: [B, T], see :meth:`pack_captions`.
            mask: [B, N] bool, True = hidden.
            shown: places in the batch of the images that ``understanding`` is about; all of them by default.
            tokens: [2] numbers of supervised text and image tokens to divide by; by default those of this batch.
        """
        out: dict[str, Tensor] = {}
        asked = understanding["labels"] != IGNORE
        tokens = torch.stack([asked.sum(), mask.sum()]) if tokens is None else tokens
        if understanding_weight:
            hidden = self._understanding(codes if shown is None else codes[shown], understanding)[0]
            out["understanding_loss"] = summed_loss(self.text_head, hidden, understanding["labels"]) / tokens[0]
        if generation_weight:
            hidden = self._generation(codes, mask, captions)[0]
            out["generation_loss"] = summed_loss(self.image_head, hidden, torch.where(mask, codes, IGNORE)) / tokens[1]
        weights = {"understanding_loss": understanding_weight, "generation_loss": generation_weight}
        out["loss"] = torch.stack([weights[k] * v for k, v in out.items()]).sum()
        return out

    # --- the two flows -------------------------------------------------------------------------------------------------

    def _codes(self, batch: Mapping[str, Any]) -> Tensor:
        codes = batch.get("codes")
        return (self.image_tokenizer.encode(batch["images"].to(self.device)) if codes is None else codes).to(self.device)

    def understanding_flow(self, batch: Mapping[str, Any], layers: Sequence[int] | None = None) -> FlowOutput:
        """Image and instruction in, caption as target: next-token loss on the caption (DIVA Sec. 3.1).

        ``batch["prompts"]``, where there, holds for each image a question that its text answers, or None for a caption.
        """
        check_batch(batch)
        asked = zip(batch.get("prompts") or [None] * len(batch["texts"]), batch["texts"], strict=True)
        packed = self.pack([[(DESCRIBE if prompt is None else prompt, text)] for prompt, text in asked])
        packed = {k: v.to(self.device) for k, v in packed.items()}
        hidden, states = self._understanding(self._codes(batch), packed, as_layers(layers, self.num_layers))
        logits = self.text_head(hidden)
        loss, per_example = token_losses(logits, packed["labels"])
        return FlowOutput(loss, per_example, states, self.grid, logits=logits, labels=packed["labels"])

    def generation_flow(
        self,
        batch: Mapping[str, Any],
        mask_ratio: float | tuple[float, float] = MASK_RATIO,
        mask_layout: str = "dispersed",
        generator: torch.Generator | None = None,
        layers: Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> FlowOutput:
        """Caption and partly hidden image in, hidden codes as target: masked-token loss (DIVA Sec. 3.1).

        ``batch["condition"]`` [B, C, d], where there, are vectors to draw by beside the caption, such as states of an image.
        """
        check_batch(batch)
        codes = self._codes(batch)
        mask = choose_mask(mask, len(codes), self.grid, mask_ratio, mask_layout, generator).to(self.device)
        hidden, states = self._generation(
            codes, mask, self.pack_captions(batch["texts"]).to(self.device), as_layers(layers, self.num_layers),
            batch.get("condition"),
        )  # fmt: skip
        logits = self.image_head(hidden)
        labels = torch.where(mask, codes, IGNORE)
        loss, per_example = token_losses(logits, labels)
        return FlowOutput(loss, per_example, states, self.grid, mask=mask, logits=logits, labels=labels)

    def text_states(self, texts: Sequence[str], layers: Sequence[int] | None = None) -> dict[int, Float[Tensor, "B d"]]:
        """Layer -> mean state of each text, as generation reads it: an image would come after it, so it has seen none."""
        ids = self.pack_captions(texts).to(self.device)
        said = ids != self._special("<pad>")
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        x = self._embed_text(ids, torch.arange(ids.shape[1], device=ids.device))
        allowed = causal & said[:, None]
        states = self._blocks(x, allowed, slice(0, ids.shape[1]), as_layers(layers, self.num_layers))[1]
        weight = said / said.sum(1, keepdim=True)
        return {layer: (h * weight[..., None]).sum(1) for layer, h in states.items()}

    def regenerate(
        self,
        texts: Sequence[str],
        layers: Sequence[int] | None = None,
        temperature: float = 1.0,
        hard: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> dict[int, Float[Tensor, "B N d"]]:
        """Draw each text in one step and read what was drawn, with gradient through both: z -> image -> z_hat.

        All codes are drawn at once: y = softmax((logits + Gumbel noise) / temperature), and the image is read from the sum of
        embeddings that y weighs. ``hard``: one code each in the forward pass, y's gradient in the backward pass (straight-
        through, Jang et al. 2017). Without noise and hardness, these are the expected embeddings at ``temperature``. Several
        generators are one for each text, whose noise then does not depend on its neighbours.

        Returns:
            Layer -> states of the drawn image's tokens in the understanding flow.
        Raises:
            ValueError: temperature not above 0.
        """
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected above 0")
        ids, n = self.pack_captions(texts).to(self.device), self.num_image_tokens
        codes = torch.zeros(len(ids), n, dtype=torch.long, device=self.device)
        logits = self.image_head(self._generation(codes, torch.ones_like(codes, dtype=torch.bool), ids)[0])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if generator is not None:
            u = _uniform(logits.shape, generator).to(logits.device).clamp_(1e-9, 1 - 1e-7)
            logits = logits - (-u.log()).log()
        y = (logits / temperature).softmax(-1)
        if hard:
            y = nn.functional.one_hot(y.argmax(-1), y.shape[-1]) + y - y.detach()
        drawn = y.to(self.dtype) @ self.image_embedding.weight + self._place()
        return self._read(drawn, as_layers(layers, self.num_layers))

    def layer_parameters(self) -> OrderedDict[str, list[nn.Parameter]]:
        """Parameters of each block in order: "block 1" ... "block L"."""
        return OrderedDict((f"block {i}", list(block.parameters())) for i, block in enumerate(self.blocks, start=1))

    # --- understand ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def understand(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        decoding: Decoding = Decoding(),
        generator: torch.Generator | None = None,
        codes: Tensor | None = None,
    ) -> list[str]:
        """Caption each image, or answer one question about each; of ``codes`` [B, N], where given, the pixels are not read."""
        check_images(images, (self.image_size, self.image_size))
        if prompts is not None and len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts came with {len(images)} images; expected one each")
        if not len(images):
            return []
        if codes is None:
            codes = self.image_tokenizer.encode(images.to(self.device))
        elif tuple(codes.shape) != (len(images), self.num_image_tokens):
            raise ValueError(f"codes are {tuple(codes.shape)}; expected {(len(images), self.num_image_tokens)}, a row per image")
        packed = self.pack([[(p, None)] for p in (prompts or [DESCRIBE] * len(images))])
        asked = (packed["segment"] >= 0).sum(1)
        if int(asked.min()) == 0:
            raise ValueError("a prompt is empty; expected a question, or prompts=None for captions")
        return self._decode_text(codes, packed["ids"].to(self.device), asked.to(self.device), decoding, generator)

    def _decode_text(
        self, codes: Tensor, prompt: Tensor, asked: Tensor, decoding: Decoding, generator: torch.Generator | None
    ) -> list[str]:
        b, n = codes.shape
        device, eos = codes.device, self._special("<eos>")
        caches: list[list[Tensor]] = [[] for _ in self.blocks]
        self._read(self._embed_image(codes), caches=caches)
        said: list[list[int]] = [[] for _ in range(b)]
        ended = torch.zeros(b, dtype=torch.bool, device=device)
        token = prompt[:, 0]
        for position in range(self.config.max_text):
            x = self._embed_text(token[:, None], torch.tensor([position], device=device))
            everything = torch.ones(b, 1, 2 + n + position + 1, dtype=torch.bool, device=device)
            hidden, _ = self._blocks(x, everything, slice(0, 0), caches=caches)
            logits = self.text_head(hidden[:, 0]).float()
            if decoding.text_temperature:
                p = (logits / decoding.text_temperature).softmax(-1).cpu()
                chosen = torch.multinomial(p, 1, generator=generator)[:, 0].to(device)
            else:
                chosen = logits.argmax(-1)
            in_prompt = position + 1 < asked
            speaking = ~in_prompt & ~ended
            ended |= speaking & (chosen == eos)
            for row in torch.nonzero(speaking & ~ended)[:, 0].tolist():
                said[row].append(int(chosen[row]))
                ended[row] = len(said[row]) >= decoding.max_new_tokens
            if bool(ended.all()):
                break
            following = prompt[:, min(position + 1, prompt.shape[1] - 1)]
            token = torch.where(in_prompt, following, chosen)
        return [detokenize(self.words, ids) for ids in said]

    # --- generate ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        texts: Sequence[str],
        images: Tensor | None = None,
        mask: Tensor | None = None,
        decoding: Decoding = Decoding(),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw each text [B, 3, H, W]; with ``images`` and ``mask`` [B, rows, columns] (True = redraw), inpaint.

        All hidden tokens are predicted at once, some are kept, the rest is predicted again, along a cosine schedule of
        ``decoding.steps`` rounds (MaskGIT, Chang et al. 2022; which are kept: ``decoding.order``). Inpainting returns the
        given pixels wherever nothing was hidden.
        """
        if (images is None) != (mask is None):
            raise ValueError("inpainting needs both images= and mask=; drawing from text needs neither")
        if not len(texts):
            return torch.zeros(0, 3, self.image_size, self.image_size)
        n = self.num_image_tokens
        if images is None or mask is None:
            codes, hidden = (
                torch.zeros(len(texts), n, dtype=torch.long, device=self.device),
                torch.ones(len(texts), n, dtype=torch.bool, device=self.device),
            )
        else:
            check_images(images, (self.image_size, self.image_size))
            if tuple(mask.shape) != (len(texts), *self.grid) or len(images) != len(texts) or mask.dtype != torch.bool:
                raise ValueError(
                    f"{len(texts)} texts, images {tuple(images.shape)} and mask {tuple(mask.shape)} ({mask.dtype}) do not fit; "
                    f"expected as many images, and a bool mask [{len(texts)}, {self.grid[0]}, {self.grid[1]}]"
                )
            codes, hidden = self.image_tokenizer.encode(images.to(self.device)), mask.flatten(1).to(self.device)
        codes = self.generate_codes(texts, codes, hidden, decoding, generator)
        drawn = self.image_tokenizer.decode(codes).float()
        if images is None or mask is None:
            return drawn
        p = self.image_size // self.grid[0]
        pixels = mask.to(self.device).repeat_interleave(p, 1).repeat_interleave(p, 2)[:, None]
        return torch.where(pixels, drawn, images.to(drawn))

    @torch.no_grad()
    def generate_codes(
        self,
        texts: Sequence[str],
        codes: Tensor,
        hidden: Tensor,
        decoding: Decoding = Decoding(),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Fill the hidden positions of ``codes`` [B, N]. Noise is drawn on the CPU: one seed, one result on any device."""
        ids = self.pack_captions(texts).to(codes.device)
        empty = self.pack_captions([""] * len(texts)).to(codes.device)
        total, codes, hidden = hidden.sum(1), codes.clone(), hidden.clone()

        def gumbel(*shape: int) -> Tensor:
            u = torch.rand(shape, generator=generator).to(codes.device).clamp_(1e-9, 1 - 1e-7)
            return -(-u.log()).log()

        def last(sure: Tensor, left: Tensor) -> Tensor:
            """The hidden positions that are shown now: all but the ``left`` least sure ones."""
            rank = sure.masked_fill(~hidden, float("inf")).argsort(1).argsort(1)
            return hidden & (rank >= left[:, None])

        for step in range(1, decoding.steps + 1):
            left = (total * math.cos(math.pi / 2 * step / decoding.steps)).floor().long()
            sure = gumbel(*hidden.shape)
            # In random order it is known which are shown before what they are: only those need logits.
            at = hidden if decoding.order == "confidence" else last(sure, left)
            rows = at.any(1)
            if not bool(rows.any()):
                continue
            now = codes[rows], hidden[rows]
            logits = self.image_head(self._generation(*now, ids[rows])[0][at[rows]]).float()
            if decoding.guidance != 1:
                free = self.image_head(self._generation(*now, empty[rows])[0][at[rows]]).float()
                logits = free + decoding.guidance * (logits - free)
            if decoding.temperature:
                chosen = (logits / decoding.temperature + gumbel(*logits.shape)).argmax(-1)
            else:
                chosen = logits.argmax(-1)
            codes[at] = chosen
            if decoding.order == "confidence":
                sure[at] *= decoding.choice_temperature * (1 - step / decoding.steps)
                sure[at] += logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
                at = last(sure, left)
            hidden = hidden & ~at
        return codes

    def image_log_prob(
        self,
        texts: Sequence[str],
        images: Tensor | None = None,
        draws: int = 8,
        generator: torch.Generator | None = None,
        codes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> Tensor:
        """Surrogate log-likelihood [B] of images given their texts, in nats, with gradient (higher = more likely).

        A masked model has no tractable likelihood. This is its any-order lower bound (Uria et al. 2014): with n hidden tokens of
        N, n uniform on 1 ... N,

            E_n E_mask[ N / n * sum over hidden of log p(code | shown, text) ] <= log p(codes | text),

        by as many masks as there are draws. Bounds of two images, or under two models, are to be compared under the same masks.

        Args:
            images: [B, 3, H, W]; or codes: [B, N], such as :meth:`generate_codes` drew: pixels do not always give them back.
            masks: [draws, B, N] bool, True = hidden; by default drawn by ``elbo_masks``.
        Raises:
            ValueError: neither images nor codes, or both.
        """
        if (images is None) == (codes is None):
            raise ValueError("expected images or codes, one of them")
        codes = self.image_tokenizer.encode(images.to(self.device)) if codes is None else codes.to(self.device)  # type: ignore[union-attr]
        masks = elbo_masks(len(codes), self.num_image_tokens, draws, generator) if masks is None else masks
        if tuple(masks.shape[1:]) != tuple(codes.shape):
            raise ValueError(f"masks are {tuple(masks.shape)} for codes {tuple(codes.shape)}; expected [draws, B, N]")
        ids, terms = self.pack_captions(texts).to(self.device), []
        for mask in masks.to(self.device):
            logits = self.image_head(self._generation(codes, mask, ids)[0]).float()
            log_p = logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]
            terms.append((log_p * mask).sum(1) / mask.sum(1) * self.num_image_tokens)
        return torch.stack(terms).mean(0)

    # --- files ---------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Weights (safetensors), configuration and the text tokenizer in one folder."""
        super().save_pretrained(save_directory, **kwargs)
        if self.text_tokenizer is not None and kwargs.get("is_main_process", True):
            self.text_tokenizer.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> MaskedUMM:
        model = super().from_pretrained(folder, *args, **kwargs)
        if model.text_tokenizer is None and (Path(folder) / "tokenizer.json").exists():
            model.text_tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        return model

    @classmethod
    def tiny(cls, corpus: Sequence[str], **sizes: Any) -> MaskedUMM:
        """An untrained model of a few thousand parameters, for tests and examples."""
        words = train_text_tokenizer([*corpus, DESCRIBE])
        small = dict(hidden_size=32, num_layers=3, num_heads=2, mlp_ratio=2)
        tokenizer = ImageTokenizerConfig(channels=16, depth=1, levels=(4, 4, 4)).to_dict()
        config = MaskedUMMConfig(**{**small, "image_tokenizer": tokenizer, **sizes}, text_vocab_size=len(words))
        return cls(config, words).eval()


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
