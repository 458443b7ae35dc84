"""Janus (Wu et al. 2024) in the diagnosable tier of the contract: a foreign, autoregressive model in about a hundred lines.

Understanding reads an image through a vision encoder and generation through codes of a VQ model, so the two flows have
different image tokens, whose grids need not agree. Text and image tokens are all causal:

    understanding   <bos> <understand> | image tokens | caption <eos>
    generation      <bos> <generate> caption <eos> <bos> | codes, the hidden ones replaced by <unk>

Janus has no token for "hidden" and these words none for the begin of an image: <unk> and a second <bos> stand for them.

The predictor of code j is the position before it: logits and loss are read there, while the states of a flow are those
at the *input* positions of the image tokens, as for every family.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.janus.modeling_janus import JanusForConditionalGeneration

from umm_kit.models.base import MASK_RATIO, FlowOutput, as_layers, check_batch, check_images, choose_mask, token_losses

IGNORE = -100


class JanusAdapter(nn.Module):
    """The two flows of a JanusForConditionalGeneration; ``words`` has the special tokens of train_text_tokenizer."""

    def __init__(self, janus: JanusForConditionalGeneration, words: PreTrainedTokenizerFast):
        super().__init__()
        self.janus, self.words = janus, words
        config = janus.config
        self.embedding = janus.get_input_embeddings()
        self.num_layers, self.hidden_size = config.text_config.num_hidden_layers, config.text_config.hidden_size
        side = config.vision_config.image_size // config.vision_config.patch_size
        self.understanding_grid, self.grid = (side, side), (config.vq_config.num_patches,) * 2
        self.image_size = config.vision_config.image_size
        self.train(self.training)

    def train(self, mode: bool = True) -> JanusAdapter:
        super().train(mode)
        self.janus.model.vqmodel.eval().requires_grad_(False)  # the tokenizer of images stays as it is
        return self

    def layer_parameters(self) -> OrderedDict[str, list[nn.Parameter]]:
        """Parameters of each block in order; aligners, towers and heads belong to one flow alone and are left out."""
        blocks = self.janus.model.language_model.layers
        return OrderedDict((f"block {i}", list(block.parameters())) for i, block in enumerate(blocks, start=1))

    def _tokens(self, rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=self.embedding.weight.device)

    def _captions(self, texts: Sequence[str], *before: str) -> list[list[int]]:
        opening, encoded = self.words.convert_tokens_to_ids(list(before)), self.words(list(texts), add_special_tokens=False)
        return [[*opening, *ids, self.words.eos_token_id] for ids in encoded["input_ids"]]

    def _run(
        self, embedded: Tensor, span: slice, layers: Sequence[int] | None, attend: Tensor
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Final (normed) states [B, S, d], and states per layer at the positions ``span`` of the image tokens.

        Hooks catch each block's own output: the last of transformers' hidden_states has gone through the final norm.
        """
        wanted = as_layers(layers, self.num_layers)
        states = {0: embedded[:, span]} if 0 in wanted else {}
        model, hooks = self.janus.model.language_model, []
        for number, block in enumerate(model.layers, start=1):
            if number in wanted:
                keep = lambda _m, _i, out, number=number: states.update({number: out[:, span]})  # noqa: E731
                hooks.append(block.register_forward_hook(keep))
        try:
            final = model(inputs_embeds=embedded, attention_mask=attend, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return final, states

    def understanding_flow(self, batch: Mapping[str, Any], layers: Sequence[int] | None = None) -> FlowOutput:
        """Instruction and image in, caption as target; causal attention hides the caption from the image states."""
        check_batch(batch)
        images = check_images(batch["images"], (self.image_size, self.image_size)).to(self.embedding.weight.device)
        captions = self._tokens(self._captions(batch["texts"]), self.words.pad_token_id)
        asked = self._tokens([self.words.convert_tokens_to_ids(["<bos>", "<understand>"])] * len(images), 0)
        seen = self.janus.model.get_image_features(images * 2 - 1).pooler_output
        start, n = asked.shape[1], seen.shape[1]
        embedded = torch.cat([self.embedding(asked), seen, self.embedding(captions)], 1)
        supervised = captions != self.words.pad_token_id
        attend = nn.functional.pad(supervised, (start + n, 0), value=True).long()
        final, states = self._run(embedded, slice(start, start + n), layers, attend)
        logits = self.janus.lm_head(final[:, start + n - 1 : -1])  # the last image token predicts the first word
        labels = captions.masked_fill(~supervised, IGNORE)
        loss, per_example = token_losses(logits, labels)
        return FlowOutput(loss, per_example, states, self.understanding_grid, logits=logits, labels=labels)

    def codes(self, images: Tensor) -> Tensor:
        """VQ codes [B, N] of images in [0, 1]."""
        images = check_images(images, (self.image_size, self.image_size)).to(self.embedding.weight.device)
        with torch.no_grad():
            return self.janus.model.vqmodel.encode(images * 2 - 1).image_tokens.view(len(images), -1)

    def generation_flow(
        self,
        batch: Mapping[str, Any],
        mask_ratio: float | tuple[float, float] = MASK_RATIO,
        mask_layout: str = "dispersed",
        generator: torch.Generator | None = None,
        layers: Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> FlowOutput:
        """Caption and partly hidden codes in, hidden codes as target: DIVA's inpainting under next-token prediction."""
        check_batch(batch)
        codes = self.codes(batch["images"])
        mask = choose_mask(mask, len(codes), self.grid, mask_ratio, mask_layout, generator).to(codes.device)
        opening = self._captions(batch["texts"], "<bos>", "<generate>")
        # Padding stands on the left, so that every row's image begins at the same place, right after its <bos>.
        width = max(map(len, opening)) + 1
        rows = [[*[self.words.pad_token_id] * (width - 1 - len(r)), *r, self.words.bos_token_id] for r in opening]
        prompt = self._tokens(rows, self.words.pad_token_id)
        hidden = self.embedding.weight[self.words.unk_token_id]
        shown = torch.where(mask[..., None], hidden, self.janus.prepare_embeddings_for_image_generation(codes))
        embedded = torch.cat([self.embedding(prompt), shown], 1)
        attend = nn.functional.pad(prompt != self.words.pad_token_id, (0, codes.shape[1]), value=True).long()
        final, states = self._run(embedded, slice(width, None), layers, attend)
        logits = self.janus.model.generation_head(final[:, width - 1 : -1])
        labels = codes.masked_fill(~mask, IGNORE)
        loss, per_example = token_losses(logits, labels)
        return FlowOutput(loss, per_example, states, self.grid, mask=mask, logits=logits, labels=labels)

    def understand(self, *_: Any, **__: Any) -> list[str]:
        raise NotImplementedError("JanusAdapter: only the flows are adapted; decoding answers is left to Janus' own generate")

    def generate(self, *_: Any, **__: Any) -> Tensor:
        raise NotImplementedError("JanusAdapter: a left-to-right model cannot fill a masked image from both sides")

    def image_log_prob(self, *_: Any, **__: Any) -> Tensor:
        raise NotImplementedError("JanusAdapter: only the flows are adapted; the likelihood is the sum of its next-code terms")
