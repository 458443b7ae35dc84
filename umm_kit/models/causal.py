"""What causal families have in common: Chameleon, Liquid, Emu3, Janus, and our own. A language model writes words and codes.

Both flows are rows of word ids in which ``SLOT`` marks the places of image tokens, so a family says only how its rows look:

    understanding   instruction | image | caption          generation   caption | image, some of whose inputs are hidden

**Off by one.** A causal model predicts what comes next: the logits of image token j are read at the position *before* its own.
The states that both flows are compared by are those at the tokens' own positions, where their input stands, as in any family. So
a state of the generation flow at a hidden token has seen the caption and what is shown to its left, and no code of its own.

**Hidden inputs.** Where DIVA hides a token, something else stands in for its code (``stand_in``; each family says what). What
is shown to the *right* of a hidden token cannot help it. An image of which everything is hidden is drawn code by code, so its
inputs are its own codes, as in the family's own training: hiding them would make it a model of another kind.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from umm_kit.models.base import (
    Decoding,
    DrawsCodes,
    FlowOutput,
    as_layers,
    check_batch,
    check_images,
    check_questions,
    recording,
    token_losses,
)
from umm_kit.models.own import IGNORE, gumbel

SLOT = -1  # the place of an image token in a row of word ids


class CausalUMM(DrawsCodes, nn.Module):
    """The contract for a causal language model that reads image vectors and writes image codes.

    A family sets the attributes below, and says by the methods up to ``code_logits`` how its rows look and what stands in them.

    Attributes:
        words: its text tokenizer. body: the transformer, with ``layers``. embedding, text_head: of words.
        image_tokenizer: a module with encode(images) -> codes [B, N], decode(codes) -> images in [0, 1], and reconstruct.
        grid, seen_grid: rows and columns of image tokens in generation, and in understanding.
        image_size: pixels of a side. pad: an id.
    """

    words: Any
    body: Any
    embedding: Any
    text_head: Any
    image_tokenizer: Any
    grid: tuple[int, int]
    seen_grid: tuple[int, int]
    image_size: int
    pad: int
    longest: int = 2**31  # of texts that it writes, in words

    # --- what a family says of itself ---

    def asked(self, prompt: str | None) -> list[int]:
        """The row of an image and a question about it, or of the instruction to describe it, which stands *before* the image."""
        raise NotImplementedError

    def told(self, text: str) -> list[int]:
        """The row of a text and the image that is drawn from it; it ends with the last image token, or later."""
        raise NotImplementedError

    def untold(self, text: str) -> list[int]:
        """The same without the text, for classifier-free guidance."""
        raise NotImplementedError

    def see(self, images: Tensor, codes: Tensor | None) -> Float[Tensor, "B N d"]:
        """What stands in the slots of :meth:`asked`; ``codes`` [B, N], where they are given, are those of the images."""
        raise NotImplementedError

    def embed_codes(self, codes: Int[Tensor, "B n"]) -> Float[Tensor, "B n d"]:
        """What stands in the slots of :meth:`told`."""
        raise NotImplementedError

    def stand_in(self) -> Float[Tensor, " d"]:
        """What stands for the code of a hidden token: the padding word, unless a family has something better."""
        return self.embedding(torch.tensor(self.pad, device=self.device))

    def code_logits(self, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch K"]:
        """Scores of all codes from the states that predict them."""
        raise NotImplementedError

    # --- sizes ---

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.body.layers

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return int(self.embedding.weight.shape[1])

    @property
    def num_image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def layer_parameters(self) -> OrderedDict[str, list[nn.Parameter]]:
        """Parameters of each block in order: "block 1" ... "block L"."""
        return OrderedDict((f"block {i}", list(block.parameters())) for i, block in enumerate(self.layers, start=1))

    def train(self, mode: bool = True) -> CausalUMM:
        """The image tokenizer stays as it is in evaluation."""
        super().train(mode)
        self.image_tokenizer.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> CausalUMM:
        """The image tokenizer stays frozen."""
        super().requires_grad_(requires_grad)
        self.image_tokenizer.requires_grad_(False)
        return self

    # --- one transformer ---

    def spoken(self, text: str) -> list[int]:
        """Ids of a text as it follows other words."""
        return list(self.words(text, add_special_tokens=False)["input_ids"])

    def _rows(self, rows: Sequence[Sequence[int]], left: bool = False) -> tuple[Int[Tensor, "B S"], Bool[Tensor, "B S"]]:
        """Rows as one tensor, filled with padding, and where they are."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad)
        real = torch.zeros(len(rows), width, dtype=torch.bool)
        for k, row in enumerate(rows):
            at = slice(width - len(row), width) if left else slice(0, len(row))
            ids[k, at], real[k, at] = torch.tensor(row), True
        return ids.to(self.device), real.to(self.device)

    def _embed(self, ids: Int[Tensor, "B S"], vectors: Tensor) -> Tensor:
        """Vectors of words, and those given in the slots."""
        x = self.embedding(ids.clamp(min=0))
        return x.masked_scatter((ids == SLOT)[..., None], vectors.to(x))

    def _run(self, x: Tensor, real: Tensor, layers: Sequence[int] = (), cache: Any = None) -> tuple[Tensor, dict[int, Tensor]]:
        """Final states [B, S, d], and those of layers. With a cache ``real`` [B, past + S] tells of all positions so far."""
        position = (real.cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
        with recording(self.layers, layers) as states:
            where: dict[str, Any] = {"attention_mask": real.long(), "position_ids": position}
            out = self.body(inputs_embeds=x, past_key_values=cache, use_cache=cache is not None, **where)
        return out.last_hidden_state, states

    def _in_slots(self, states: Mapping[int, Tensor], ids: Tensor) -> dict[int, Tensor]:
        return {layer: h[(ids == SLOT).to(h.device)].unflatten(0, (len(ids), -1)) for layer, h in states.items()}

    # --- the two flows ---

    def understanding_flow(self, batch: Mapping[str, Any], layers: Sequence[int] | None = None) -> FlowOutput:
        """Image and instruction in, caption as target: next-token loss on the caption (DIVA Sec. 3.1).

        ``batch["prompts"]``, where there, holds for each image a question that its text answers, or None for a caption.
        """
        check_batch(batch)
        images = check_images(batch["images"], (self.image_size, self.image_size)).to(self.device)
        asked = [self.asked(prompt) for prompt in batch.get("prompts") or [None] * len(images)]
        said = [[*self.spoken(text), self.words.eos_token_id] for text in batch["texts"]]
        ids, real = self._rows([a + s for a, s in zip(asked, said, strict=True)])
        hidden, states = self._run(
            self._embed(ids, self.see(images, batch.get("codes"))), real, as_layers(layers, self.num_layers)
        )
        labels, mine = self._rows(said)
        labels = labels.masked_fill(~mine, IGNORE)
        start = torch.tensor([len(a) - 1 for a in asked], device=self.device)[:, None]
        before = (start + torch.arange(labels.shape[1], device=self.device)).clamp(max=ids.shape[1] - 1)
        logits = self.text_head(hidden.gather(1, before[..., None].expand(-1, -1, hidden.shape[-1])))
        loss, per_example = token_losses(logits, labels)
        return FlowOutput(loss, per_example, self._in_slots(states, ids), self.seen_grid, logits=logits, labels=labels)

    def _scored(
        self, batch: Mapping[str, Any], codes: Tensor, mask: Tensor, layers: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if batch.get("condition") is not None:
            raise NotImplementedError(f"{type(self).__name__} draws from words; it takes no vectors as condition")
        hidden, states = self._drawing(batch["texts"], codes, mask & ~mask.all(1, keepdim=True), layers)
        return self.code_logits(hidden), states

    def _drawing(
        self, texts: Sequence[str], codes: Tensor, hide: Tensor, layers: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """States that predict each code [B, N, d], and those of layers in the slots; ``hide`` [B, N] of the inputs."""
        return self._draw(*self._rows([self.told(text) for text in texts]), codes, hide, layers)

    def _draw(
        self, ids: Tensor, real: Tensor, codes: Tensor, hide: Tensor, layers: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        shown = torch.where(hide[..., None], self.stand_in().to(self.dtype), self.embed_codes(codes).to(self.dtype))
        hidden, states = self._run(self._embed(ids, shown), real, layers)
        before = (ids == SLOT).roll(-1, 1)  # no row begins with a slot
        return hidden[before].unflatten(0, (len(ids), -1)), self._in_slots(states, ids)

    def text_states(self, texts: Sequence[str], layers: Sequence[int] | None = None) -> dict[int, Float[Tensor, "B d"]]:
        """Layer -> mean state of each text, as generation reads it: the image would come after it, so it has seen none."""
        rows = [self.told(text) for text in texts]
        ids, real = self._rows([row[: row.index(SLOT)] for row in rows])
        states = self._run(self.embedding(ids), real, as_layers(layers, self.num_layers))[1]
        weight = (real / real.sum(1, keepdim=True))[..., None]
        return {layer: (h * weight.to(h)).sum(1) for layer, h in states.items()}

    def image_log_prob(
        self,
        texts: Sequence[str],
        images: Tensor | None = None,
        draws: int = 8,
        generator: torch.Generator | None = None,
        codes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> Float[Tensor, " B"]:
        """log p(codes | text) = sum over j of log p(code j | codes before it, text) [B], in nats, with gradient.

        It is exact: ``draws``, ``generator`` and ``masks``, which the estimates of other families take, change nothing.

        Raises:
            ValueError: neither images nor codes, or both.
        """
        if (images is None) == (codes is None):
            raise ValueError("expected images or codes, one of them")
        codes = self._codes({"images": images, "codes": codes})
        hidden = self._drawing(texts, codes, torch.zeros_like(codes, dtype=torch.bool), [])[0]
        log_p = self.code_logits(hidden).float().log_softmax(-1)
        return log_p.gather(-1, codes[..., None])[..., 0].sum(1)

    # --- understand ---

    @torch.no_grad()
    def understand(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        decoding: Decoding = Decoding(),
        generator: torch.Generator | None = None,
        codes: Tensor | None = None,
    ) -> list[str]:
        """Caption each image, or answer a question about each; of ``codes`` [B, N], where a family reads them, not the pixels."""
        from transformers import DynamicCache

        check_questions(images, prompts, self.image_size)
        if not len(images):
            return []
        asked = [self.asked(None)] * len(images) if prompts is None else [self.asked(prompt) for prompt in prompts]
        ids, real = self._rows(asked, left=True)
        cache, x = DynamicCache(), self._embed(ids, self.see(images.to(self.device), codes))
        said: list[list[int]] = [[] for _ in range(len(images))]
        ended = torch.zeros(len(images), dtype=torch.bool)
        for _ in range(min(decoding.max_new_tokens, self.longest)):
            logits = self.text_head(self._run(x, real, cache=cache)[0][:, -1]).float()
            chosen = decoding.word(logits, generator)
            ended |= chosen == self.words.eos_token_id
            if bool(ended.all()):
                break
            for row in torch.nonzero(~ended)[:, 0].tolist():
                said[row].append(int(chosen[row]))
            x = self.embedding(chosen.to(self.device)[:, None])
            real = nn.functional.pad(real, (0, 1), value=True)
        return [self.words.decode(row, skip_special_tokens=True).strip() for row in said]

    # --- generate ---

    @torch.no_grad()
    def generate_codes(
        self,
        texts: Sequence[str],
        codes: Tensor,
        hidden: Tensor,
        decoding: Decoding = Decoding(),
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Int[Tensor, "B N"]:
        """Fill the hidden positions of ``codes`` [B, N] from left to right: what is shown to the right of one cannot help it.

        Of ``decoding`` only temperature and guidance count. Noise is drawn on the CPU: one seed, one result on any device. With
        ``noise`` [B, N, K], the code of the largest sum of score and noise is taken.
        """
        from transformers import DynamicCache

        guided = decoding.guidance != 1
        rows = [self.told(text) for text in texts] + [self.untold(text) for text in texts if guided]
        first = rows[0].index(SLOT)
        image = rows[0][first:]  # the same in all rows: only what stands before it differs
        ids, real = self._rows([row[: row.index(SLOT)] for row in rows], left=True)
        cache, x, codes, j = DynamicCache(), self.embedding(ids), codes.clone(), 0
        for place, word in enumerate(image):
            if word == SLOT:
                scores = self.code_logits(self._run(x, real, cache=cache)[0][:, -1]).float()
                if guided:
                    told, untold = scores.chunk(2)
                    scores = untold + decoding.guidance * (told - untold)
                if noise is not None:
                    scores = scores + noise[:, j]
                elif decoding.temperature:
                    scores = scores / decoding.temperature + gumbel(scores.shape, generator).to(scores.device)
                codes[:, j] = torch.where(hidden[:, j], scores.argmax(-1), codes[:, j])
                following, j = self.embed_codes(codes[:, j : j + 1]).repeat(1 + guided, 1, 1), j + 1
            else:  # what separates rows of codes, say
                self._run(x, real, cache=cache)
                following = self.embedding(torch.full((len(rows), 1), word, device=self.device))
            if SLOT not in image[place + 1 :]:
                break
            x, real = following.to(x), nn.functional.pad(real, (0, 1), value=True)
        return codes
