"""The first family, in the way of Show-o: next-token loss on text, masked-token loss on image codes, omni-attention.

The transformer is that of :mod:`umm_kit.models.omni`; a hidden image token has a vector of its own, <mask>.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from umm_kit.models.base import Decoding, DrawsCodes, as_layers, elbo_masks
from umm_kit.models.omni import Block, OmniUMM
from umm_kit.models.own import CodeTable, OwnUMMConfig, gumbel
from umm_kit.models.tokenizers import ImageTokenizer, ImageTokenizerConfig


class MaskedUMMConfig(OwnUMMConfig):
    model_type = "umm_masked"


class MaskedUMM(DrawsCodes, OmniUMM):
    """A small unified model that captions, answers, draws and inpaints.

    Example:
        >>> model = MaskedUMM.tiny(["a red circle", "a blue square"])
        >>> model.generate(["a red circle"], decoding=Decoding(steps=2)).shape
        torch.Size([1, 3, 32, 32])
    """

    config_class = MaskedUMMConfig

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

    # --- the two flows -------------------------------------------------------------------------------------------------

    def _embed_image(self, codes: Tensor) -> Tensor:
        table = torch.cat([self.image_embedding.weight, self.mask_embedding.weight])  # the last row is <mask>
        return nn.functional.embedding(codes, table) + self._place()

    def _generation(
        self, codes: Tensor, mask: Tensor, ids: Tensor, layers: Sequence[int] = (), condition: Tensor | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Final states at the image positions [B, N, d], and image states per layer. ``mask`` [B, N] hides codes."""
        return self._drawing(self._embed_image(torch.where(mask, self.codebook_size, codes)), ids, layers, condition)

    def _scored(
        self, batch: Mapping[str, Any], codes: Tensor, mask: Tensor, layers: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        ids = self.pack_captions(batch["texts"]).to(self.device)
        hidden, states = self._generation(codes, mask, ids, layers, batch.get("condition"))
        return self.image_head(hidden), states

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
            logits = logits + gumbel(logits.shape, generator).to(logits.device)
        y = (logits / temperature).softmax(-1)
        if hard:
            y = nn.functional.one_hot(y.argmax(-1), y.shape[-1]) + y - y.detach()
        drawn = y.to(self.dtype) @ self.image_embedding.weight + self._place()
        return self._read(drawn, as_layers(layers, self.num_layers))

    # --- generate ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_codes(
        self,
        texts: Sequence[str],
        codes: Tensor,
        hidden: Tensor,
        decoding: Decoding = Decoding(),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Fill the hidden positions of ``codes`` [B, N]. Noise is drawn on the CPU: one seed, one result on any device.

        All are predicted at once, some kept, the rest predicted again, along a cosine schedule of ``decoding.steps`` rounds
        (MaskGIT, Chang et al. 2022; which are kept: ``decoding.order``).
        """
        ids = self.pack_captions(texts).to(codes.device)
        empty = self.pack_captions([""] * len(texts)).to(codes.device)
        total, codes, hidden = hidden.sum(1), codes.clone(), hidden.clone()

        def last(sure: Tensor, left: Tensor) -> Tensor:
            """The hidden positions that are shown now: all but the ``left`` least sure ones."""
            rank = sure.masked_fill(~hidden, float("inf")).argsort(1).argsort(1)
            return hidden & (rank >= left[:, None])

        for step in range(1, decoding.steps + 1):
            left = (total * math.cos(math.pi / 2 * step / decoding.steps)).floor().long()
            sure = gumbel(hidden.shape, generator).to(codes.device)
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
                chosen = (logits / decoding.temperature + gumbel(logits.shape, generator).to(logits.device)).argmax(-1)
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
