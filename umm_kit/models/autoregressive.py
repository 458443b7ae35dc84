"""The second family, in the way of Chameleon, Liquid and Emu3: one causal language model over words and image codes.

    understanding   <bos> <understand> | image codes | text segment | text segment | ...
    generation      <bos> <generate> caption <eos> <generate> | image codes

The transformer is transformers' Llama. What stands at an image token, and what is predicted, is in :mod:`umm_kit.models.causal`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from umm_kit.models.base import Decoding, as_layers
from umm_kit.models.causal import SLOT, CausalUMM
from umm_kit.models.own import DESCRIBE, CodeTable, OwnUMM, OwnUMMConfig, gumbel
from umm_kit.models.tokenizers import ImageTokenizer, ImageTokenizerConfig


class AutoregressiveUMMConfig(OwnUMMConfig):
    model_type = "umm_autoregressive"


class AutoregressiveUMM(CausalUMM, OwnUMM):
    """A small unified model that writes captions, answers and pictures one token after another.

    Inpainting sees what is above and to the left. A hidden input has a vector of its own.

    Example:
        >>> model = AutoregressiveUMM.tiny(["a red circle", "a blue square"])
        >>> model.generate(["a red circle"]).shape
        torch.Size([1, 3, 32, 32])
    """

    config_class = AutoregressiveUMMConfig
    _no_split_modules = ["LlamaDecoderLayer"]
    image_head: Any

    def __init__(self, config: AutoregressiveUMMConfig, text_tokenizer: PreTrainedTokenizerFast | None = None):
        super().__init__(config)  # type: ignore[call-arg]
        self.image_tokenizer = ImageTokenizer(ImageTokenizerConfig(**config.image_tokenizer)).requires_grad_(False)
        self.text_tokenizer = text_tokenizer
        self.grid = self.seen_grid = self.image_tokenizer.grid
        self.codebook_size, self.image_size = self.image_tokenizer.codebook_size, self.image_tokenizer.config.image_size
        d = config.hidden_size
        gated = -(-config.mlp_ratio * d * 2 // 48) * 16  # three matrices with as many weights as the two of a plain MLP
        sizes = dict(hidden_size=d, intermediate_size=gated, num_hidden_layers=config.num_layers, pad_token_id=0)
        self.longest = config.max_text - 3  # what it writes can be drawn: three words more stand around a caption
        places = 4 * (config.max_text + self.grid[0] * self.grid[1])
        self.transformer: Any = LlamaModel(
            LlamaConfig(
                **sizes, vocab_size=config.text_vocab_size, num_attention_heads=config.num_heads, max_position_embeddings=places,
                attn_implementation="eager",  # on CPUs the backward of scaled_dot_product_attention costs twice as much
            )
        )  # fmt: skip
        self.image_embedding, self.mask_embedding = CodeTable(self.image_tokenizer.levels, d), nn.Embedding(1, d)
        self.text_head = nn.Linear(d, config.text_vocab_size, bias=False)
        self.image_head = CodeTable(self.image_tokenizer.levels, d)
        for layer in self.transformer.layers:  # the sum over all residual branches keeps its scale
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                last.init_gain = (2 * config.num_layers) ** -0.5
        self.post_init()  # type: ignore[operator]

    @property
    def body(self) -> Any:  # type: ignore[override]
        return self.transformer

    @property
    def embedding(self) -> Any:  # type: ignore[override]
        return self.transformer.embed_tokens

    @property
    def pad(self) -> int:  # type: ignore[override]
        return self._special("<pad>")

    # --- rows ---

    def asked(self, prompt: str | None) -> list[int]:
        start = [self._special("<bos>"), self._special("<understand>")]
        return [*start, *[SLOT] * self.num_image_tokens, *self.spoken(DESCRIBE if prompt is None else prompt)]

    def told(self, text: str) -> list[int]:
        caption = self.pack_captions([text])[0].tolist()
        return [*caption, self._special("<generate>"), *[SLOT] * self.num_image_tokens]

    def untold(self, text: str) -> list[int]:
        return self.told("")

    def see(self, images: Tensor, codes: Tensor | None) -> Tensor:
        return self.embed_codes(self.image_tokenizer.encode(images) if codes is None else codes)

    def embed_codes(self, codes: Tensor) -> Tensor:
        return nn.functional.embedding(codes.to(self.device), self.image_embedding.weight)

    def stand_in(self) -> Tensor:
        return self.mask_embedding.weight[0]

    def code_logits(self, hidden: Tensor) -> Tensor:
        return self.image_head(hidden)

    def regenerate(
        self,
        texts: Sequence[str],
        layers: Sequence[int] | None = None,
        temperature: float = 1.0,
        hard: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> dict[int, Float[Tensor, "B N d"]]:
        """Draw each text code by code and read what was drawn, with gradient through both: z -> image -> z_hat.

        Drawing leaves no gradient. One pass over the drawn codes then scores them all: y = softmax((logits + Gumbel noise) /
        temperature), with the noise that they were drawn with; the image is read from the embeddings that y weighs. ``hard``: the
        drawn codes in the forward pass, y's gradient in the backward pass (straight-through). A code's gradient reaches its own
        place alone: what it does to the codes after it is left out. Returns and raises as the masked family's.
        """
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected above 0")
        codes = torch.zeros(len(texts), self.num_image_tokens, dtype=torch.long, device=self.device)
        shape = (*codes.shape, self.codebook_size)
        noise = (torch.zeros(shape) if generator is None else gumbel(shape, generator)).to(self.device)
        codes = self.generate_codes(texts, codes, torch.ones_like(codes, dtype=torch.bool), Decoding(guidance=1), noise=noise)
        logits = self.code_logits(self._drawing(texts, codes, torch.zeros_like(codes, dtype=torch.bool), [])[0])
        y = ((logits.to(torch.promote_types(logits.dtype, torch.float32)) + noise) / temperature).softmax(-1)
        if hard:
            y = nn.functional.one_hot(codes, self.codebook_size) + y - y.detach()
        ids, real = self._rows([self.asked("")] * len(texts))
        drawn = self._embed(ids, y.to(self.dtype) @ self.image_embedding.weight)
        return self._in_slots(self._run(drawn, real, as_layers(layers, self.num_layers))[1], ids)

    # --- packed rows, for training ---

    def _understanding(
        self, codes: Tensor, packed: Mapping[str, Tensor], layers: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Final states at the text positions [B, T, d]; each segment stands right behind the image, and sees no other."""
        b, n = codes.shape
        start, device = 2 + n, codes.device
        image = torch.tensor(self.asked("")[:start], device=device).expand(b, -1)
        ids = torch.cat([image, packed["ids"]], 1)
        position = torch.cat([torch.arange(start, device=device).expand(b, -1), start + packed["position"]], 1)
        allowed = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=device).tril().repeat(b, 1, 1)
        segment = packed["segment"]
        allowed[:, start:, start:] &= (segment[:, :, None] == segment[:, None, :]) & (segment >= 0)[:, None, :]
        x = self._embed(ids, self.embed_codes(codes))
        mask = torch.zeros(allowed.shape, device=device, dtype=x.dtype).masked_fill_(~allowed, torch.finfo(x.dtype).min)
        out = self.body(inputs_embeds=x, attention_mask=mask[:, None], position_ids=position)
        return out.last_hidden_state[:, start:], {}

    def _generation(
        self, codes: Tensor, mask: Tensor, ids: Tensor, layers: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """States that predict each code [B, N, d]; of an image that is hidden whole, from the codes before it."""
        tail = torch.tensor([self._special("<generate>"), *[SLOT] * codes.shape[1]], device=ids.device)
        ids = torch.cat([ids, tail.expand(len(ids), -1)], 1)
        return self._draw(ids, ids != self.pad, codes, mask & ~mask.all(1, keepdim=True), layers)
