"""What families with omni-attention have in common (Show-o, Transfusion, BAGEL): text is causal, an image sees all of itself.

    understanding   <bos> <understand> | image | text segment | text segment | ...
    generation      <bos> <generate> caption <eos> | image, some of it hidden

In the understanding sequence the instruction stands before the image, so image states are conditioned on the task, and no text
segment stands before it, so they never see the caption. Segments after one image (a caption, questions) do not see each other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from umm_kit.models.base import Decoding, FlowOutput, as_layers, check_batch, check_questions, token_losses
from umm_kit.models.own import DESCRIBE, OwnUMM, detokenize


class Attention(nn.Module):
    """Multi-head attention under an additive mask."""

    def __init__(self, config: Any):
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

    def __init__(self, config: Any):
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


class OmniUMM(OwnUMM):
    """One transformer over words and image tokens; a family says what stands at an image token, and what is predicted there.

    Attributes:
        embedding, text_position: of words. row, column: of image tokens. blocks, norm, text_head.
    """

    _no_split_modules = ["Block"]
    num_layers: int
    num_image_tokens: int
    image_size: int
    embedding: nn.Embedding
    text_position: nn.Embedding
    row: nn.Embedding
    column: nn.Embedding
    blocks: nn.ModuleList
    norm: nn.LayerNorm

    # --- one transformer -----------------------------------------------------------------------------------------------

    def _embed_text(self, ids: Tensor, position: Tensor) -> Tensor:
        return self.embedding(ids) + self.text_position(position)

    def _place(self) -> Tensor:
        return (self.row.weight[:, None] + self.column.weight[None]).flatten(0, 1)

    def _embed_image(self, codes: Tensor) -> Tensor:
        """What stands at the image tokens [B, N, d] for a whole image, from what its image tokenizer makes of it."""
        raise NotImplementedError

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
        b, n = codes.shape[:2]
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

    def _drawing(
        self, image: Tensor, ids: Tensor, layers: Sequence[int] = (), condition: Tensor | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Final states at the image positions [B, N, d], and image states per layer, from a text and what is shown of the image.

        ``condition`` [B, C, d] stands between text and image.
        """
        b, words = ids.shape
        between = [] if condition is None else [condition]
        x = torch.cat([self._embed_text(ids, torch.arange(words, device=ids.device)), *between, image], 1)
        total, t = x.shape[1], x.shape[1] - image.shape[1]
        causal = torch.ones(total, total, dtype=torch.bool, device=ids.device).tril()
        causal[t:, t:] = True
        allowed = causal.expand(b, -1, -1).clone()
        allowed[:, :, :words] &= (ids != self._special("<pad>"))[:, None, :]
        hidden, states = self._blocks(x, allowed, slice(t, total), layers)
        return hidden[:, t:], states

    # --- understanding --------------------------------------------------------------------------------------------------

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

    def layer_parameters(self) -> OrderedDict[str, list[nn.Parameter]]:
        """Parameters of each block in order: "block 1" ... "block L"."""
        return OrderedDict((f"block {i}", list(block.parameters())) for i, block in enumerate(self.blocks, start=1))

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
        check_questions(images, prompts, self.image_size)
        if not len(images):
            return []
        if codes is None:
            codes = self.image_tokenizer.encode(images.to(self.device))
        elif tuple(codes.shape[:2]) != (len(images), self.num_image_tokens):
            raise ValueError(f"codes are {tuple(codes.shape)}; expected {(len(images), self.num_image_tokens)}, a row per image")
        packed = self.pack([[(p, None)] for p in (prompts or [DESCRIBE] * len(images))])
        asked = (packed["segment"] >= 0).sum(1)
        return self._decode_text(codes, packed["ids"].to(self.device), asked.to(self.device), decoding, generator)

    def _decode_text(
        self, codes: Tensor, prompt: Tensor, asked: Tensor, decoding: Decoding, generator: torch.Generator | None
    ) -> list[str]:
        b, n = codes.shape[:2]
        device, eos = codes.device, self._special("<eos>")
        caches: list[list[Tensor]] = [[] for _ in self.blocks]
        self._read(self._embed_image(codes), caches=caches)
        said: list[list[int]] = [[] for _ in range(b)]
        ended = torch.zeros(b, dtype=torch.bool, device=device)
        token = prompt[:, 0]
        room = (self.config.max_text - 1 - asked.clamp(min=2)).clamp(max=decoding.max_new_tokens).tolist()  # to be read again
        for position in range(self.config.max_text):
            x = self._embed_text(token[:, None], torch.tensor([position], device=device))
            everything = torch.ones(b, 1, 2 + n + position + 1, dtype=torch.bool, device=device)
            hidden, _ = self._blocks(x, everything, slice(0, 0), caches=caches)
            logits = self.text_head(hidden[:, 0]).float()
            chosen = decoding.word(logits, generator).to(device)
            in_prompt = position + 1 < asked
            speaking = ~in_prompt & ~ended
            ended |= speaking & (chosen == eos)
            for row in torch.nonzero(speaking & ~ended)[:, 0].tolist():
                said[row].append(int(chosen[row]))
                ended[row] = len(said[row]) >= room[row]
            if bool(ended.all()):
                break
            following = prompt[:, min(position + 1, prompt.shape[1] - 1)]
            token = torch.where(in_prompt, following, chosen)
        return [detokenize(self.words, ids) for ids in said]
