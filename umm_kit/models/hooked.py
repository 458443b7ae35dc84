"""A module of your own behind the contract: two methods say how a pair goes in, hooks take the states out.

Nothing of the module is changed or copied. With these two methods a model can be diagnosed, extracted, audited and trained by
DIVA; ``understand`` and ``generate``, written as :class:`UnifiedModel` has them, let it be evaluated and followed over cycles,
too. ``check_model`` tells what is missing, and tries what no shape shows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from umm_kit.models.base import MASK_RATIO, FlowOutput, as_layers, check_batch, check_images, choose_mask, recording, token_losses


@dataclass(frozen=True)
class Pass:
    """What one forward pass of your module gave.

    Attributes:
        scores: [B, T, V] logits; or, of a continuous head, what it predicts for every image token, [B, N, D].
        targets: [B, T] what ``scores[:, t]`` should say, -100 where nothing is asked; or [B, N, D] of floats, of which the
            hidden tokens count.
        places: [N] or [B, N], where the image tokens stood in the sequence that the blocks saw, in raster order.
        grid: their (rows, columns), where they are not those of the model.
    """

    scores: Tensor
    targets: Tensor
    places: Tensor
    grid: tuple[int, int] | None = None


class HookedUMM(nn.Module):
    """Write a subclass with :meth:`read` and :meth:`draw`; the flows, their losses, masks and states come from here.

    Args:
        module: yours. blocks: those of its modules that both flows go through, in order; each takes its states [B, sequence,
            d] first, and returns them, or a tuple that begins with them.
        embedding: that of text. grid: (rows, columns) of the image tokens that generation hides.
        hidden_size: d, or None for the width of the embedding.
    Raises:
        ValueError: no blocks, or some that are not within the module.

    Example:
        >>> class Reader(nn.Module):  # a model that the kit does not know: letters, and pictures of 2 x 2 pixels
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.words, self.pixels = nn.Embedding(256, 8), nn.Linear(3, 8)
        ...         self.body = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2))
        ...         self.to_words, self.to_pixels = nn.Linear(8, 256), nn.Linear(8, 3)
        ...
        ...     def forward(self, x):  # each position sees itself and those before it
        ...         later = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        ...         for block in self.body:
        ...             x = block(x, src_mask=later)
        ...         return x
        >>> class Mine(HookedUMM):
        ...     def letters(self, batch):
        ...         rows = [[ord(letter) for letter in text] for text in batch["texts"]]
        ...         return torch.tensor(rows, device=batch["images"].device)
        ...
        ...     def read(self, batch):  # picture, then caption
        ...         m, letters = self.module, self.letters(batch)
        ...         pixels = m.pixels(batch["images"].flatten(2).mT)
        ...         x = m(torch.cat([pixels, m.words(letters[:, :-1])], 1))
        ...         return Pass(m.to_words(x[:, 3:]), letters, torch.arange(4))  # the last pixel predicts a letter
        ...
        ...     def draw(self, batch, mask):  # caption, then what is shown of the picture
        ...         m, pixels = self.module, batch["images"].flatten(2).mT
        ...         letters = m.words(self.letters(batch))
        ...         x = m(torch.cat([letters, m.pixels(pixels.masked_fill(mask[..., None], 0.5))], 1))
        ...         return Pass(m.to_pixels(x[:, -4:]), pixels, torch.arange(letters.shape[1], x.shape[1]))
        >>> mine = Reader()
        >>> model = Mine(mine, mine.body, mine.words, grid=(2, 2))
        >>> batch = {"images": torch.rand(2, 3, 2, 2), "texts": ["red", "sky"], "ids": ["a", "b"]}
        >>> model.generation_flow(batch, 0.5).hidden_states[2].shape
        torch.Size([2, 4, 8])
        >>> from umm_kit.models.contract import check_model
        >>> check_model(model, batch).tier
        'diagnosable'
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module],
        embedding: nn.Module,
        grid: tuple[int, int],
        hidden_size: int | None = None,
    ):
        super().__init__()
        self.module, self.grid = module, grid
        inside = {id(part) for part in module.modules()}
        if not len(blocks):
            raise ValueError("0 blocks came; expected those that both flows go through, in order")
        if any(id(part) not in inside for part in (*blocks, embedding)):
            raise ValueError(f"of {len(blocks)} blocks and the embedding, some are not parts of the {type(module).__name__}")
        if hidden_size is None and not isinstance(getattr(embedding, "weight", None), Tensor):
            raise ValueError(f"the embedding is a {type(embedding).__name__} without weight; give hidden_size=")
        self._parts = (embedding, *blocks)  # a tuple: they are registered in the module already
        self.hidden_size = hidden_size or int(embedding.get_parameter("weight").shape[1])

    def read(self, batch: Mapping[str, Any]) -> Pass:
        """Image (and of ``batch["prompts"]``, where there, a question each, or None) in, the text as target; its loss is on the
        words, and the image must not see them."""
        raise NotImplementedError(f"{type(self).__name__} does not read: write read(batch) -> Pass")

    def draw(self, batch: Mapping[str, Any], mask: Tensor) -> Pass:
        """Text, and the image without its tokens under ``mask`` [B, N] (True = hidden) in; the hidden ones as target."""
        raise NotImplementedError(f"{type(self).__name__} does not draw: write draw(batch, mask) -> Pass")

    # --- what the contract asks ---

    @property
    def embedding(self) -> nn.Module:
        return self._parts[0]

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return self._parts[1:]

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def layer_parameters(self) -> OrderedDict[str, list[nn.Parameter]]:
        """Parameters of each block in order: "block 1" ... "block L"."""
        return OrderedDict((f"block {i}", list(block.parameters())) for i, block in enumerate(self.blocks, start=1))

    def understanding_flow(self, batch: Mapping[str, Any], layers: Sequence[int] | None = None) -> FlowOutput:
        """:meth:`read`, with its loss and states."""
        return self._flow(batch, layers, None)

    def generation_flow(
        self,
        batch: Mapping[str, Any],
        mask_ratio: float | tuple[float, float] = MASK_RATIO,
        mask_layout: str = "dispersed",
        generator: torch.Generator | None = None,
        layers: Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> FlowOutput:
        """:meth:`draw`, with its mask, loss and states."""
        mask = choose_mask(mask, len(batch["ids"]), self.grid, mask_ratio, mask_layout, generator)
        return self._flow(batch, layers, mask.to(self.device))

    def _flow(self, batch: Mapping[str, Any], layers: Sequence[int] | None, mask: Tensor | None) -> FlowOutput:
        images = check_images(check_batch(batch)["images"]).to(self.device)
        wanted, said = as_layers(layers, self.num_layers), {**batch, "images": images}
        with recording(self.blocks, wanted) as states:
            done = self.read(said) if mask is None else self.draw(said, mask)
        if unseen := [layer for layer in wanted if layer not in states]:
            raise ValueError(f"the blocks of layers {unseen} did not run; expected every block in both flows")
        grid, places = done.grid or self.grid, done.places.to(images.device).expand(len(images), -1)
        if places.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"{places.shape[1]} places of image tokens came for a grid of {grid[0]} x {grid[1]}")
        found = {layer: self._at(places, states[layer], layer) for layer in wanted}
        if not done.targets.is_floating_point():
            if done.scores.ndim != 3 or done.scores.shape[:2] != done.targets.shape:
                raise ValueError(
                    f"scores are {tuple(done.scores.shape)} and targets {tuple(done.targets.shape)}; expected [B, T, V] and "
                    "[B, T], where scores[:, t] say targets[:, t]"
                )
            loss, each = token_losses(done.scores, done.targets)
            return FlowOutput(loss, each, found, grid, mask, logits=done.scores, labels=done.targets)
        if mask is None or done.scores.shape != done.targets.shape or done.scores.shape[1] != mask.shape[1]:
            raise ValueError(
                f"scores {tuple(done.scores.shape)} and targets {tuple(done.targets.shape)} of floats; expected both [B, N, D], "
                "of generation alone (text is scored by logits and ids)"
            )
        error = (done.scores.float() - done.targets).square().mean(-1) * mask
        each, loss = error.sum(1) / mask.sum(1), error.sum() / mask.sum()
        return FlowOutput(loss, each, found, grid, mask, prediction=done.scores, target=done.targets)

    def _at(self, places: Tensor, states: Tensor, layer: int) -> Tensor:
        """States [B, N, d] of the image tokens."""
        if states.ndim != 3 or len(states) != len(places) or states.shape[2] != self.hidden_size:
            raise ValueError(f"layer {layer} gave {tuple(states.shape)}; expected [{len(places)}, sequence, {self.hidden_size}]")
        if int(places.max()) >= states.shape[1] or int(places.min()) < 0:
            raise ValueError(f"image tokens stand up to {int(places.max())}, and layer {layer} saw {states.shape[1]} positions")
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[2]))
