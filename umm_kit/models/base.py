"""The contract of a unified model: one backbone, two information flows (DIVA Sec. 3.1).

*Understanding* (U): image and an instruction in, caption out. *Generation* (G): caption and a partly masked image in,
the masked content out. Both flows look at the same image-text pair, the *anchor*; what the kit studies are the hidden
states of the two flows at the positions of the image tokens.
"""

from __future__ import annotations

import math
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

FLOWS = ("understanding", "generation")
MASK_RATIO = (0.2, 0.6)  # DIVA Sec. 3.1: the ratio is drawn anew for every example
MASK_LAYOUTS = ("dispersed", "contiguous")


@dataclass
class FlowOutput:
    """What one flow leaves behind.

    Attributes:
        loss: scalar, mean over supervised tokens (nats).
        per_example_loss: [B], mean over each example's supervised tokens.
        hidden_states: layer -> [B, N, d] at the *input* positions of the image tokens in raster order. Layer 0 is the
            input embedding, layer l the output of block l (no final norm).
        grid: (rows, columns) of the image tokens, rows * columns = N.
        mask: [B, N] bool, True where the image token was hidden (generation only).
        logits, labels: over the flow's own vocabulary block, -100 where unsupervised; or
        prediction, target: for continuous heads.
    """

    loss: Float[Tensor, ""]
    per_example_loss: Float[Tensor, " B"]
    hidden_states: dict[int, Float[Tensor, "B N d"]]
    grid: tuple[int, int]
    mask: Bool[Tensor, "B N"] | None = None
    logits: Float[Tensor, "B positions V"] | None = None
    labels: Int[Tensor, "B positions"] | None = None
    prediction: Float[Tensor, " B *content"] | None = None
    target: Float[Tensor, " B *content"] | None = None


@dataclass(frozen=True)
class Decoding:
    """How to decode. Text is greedy at temperature 0; images take ``steps`` rounds of masked prediction.

    ``order`` decides which tokens a round fixes. "random" draws from the distribution the model was trained on, one token
    given those before it in a random order, up to the few tokens of one round. "confidence" keeps the surest (MaskGIT, Chang
    et al. 2022): where a prompt leaves the place of an object open, the ground is the surest guess at *every* single token,
    and crowds the object out in a model that is not sure of it; exercise 5 of notebook 00 counts how often.
    """

    max_new_tokens: int = 64
    text_temperature: float = 0.0
    steps: int = 32
    temperature: float = 1.0
    order: str = "random"
    choice_temperature: float = 4.0  # of the Gumbel noise on confidence, annealed to 0; for order "confidence" alone
    guidance: float = 3.0  # classifier-free guidance: logits = uncond + guidance * (cond - uncond); 1 switches it off

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.steps < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}, steps={self.steps}; expected at least 1 of each")
        if self.order not in ("random", "confidence"):
            raise ValueError(f"order is {self.order!r}; expected 'random' or 'confidence'")
        if min(self.text_temperature, self.temperature, self.choice_temperature, self.guidance) < 0:
            raise ValueError(f"temperatures and guidance must not be negative: {self}")

    def word(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """The next words [B] of logits [B, V], the likeliest or drawn; on the CPU: one seed, one result on any device."""
        if not self.text_temperature:
            return logits.argmax(-1).cpu()
        return torch.multinomial((logits / self.text_temperature).softmax(-1).cpu(), 1, generator=generator)[:, 0]


@runtime_checkable
class UnifiedModel(Protocol):
    """Structural contract over any ``nn.Module``; ``umm-kit check MODEL`` reports which tier a model meets.

    *Diagnosable*: both flows and ``layer_parameters``. *Drivable*: ``understand`` and ``generate``.
    *Preference-trainable*: ``image_log_prob``. What a family cannot do raises NotImplementedError with the reason.

    ``embedding`` is that of text; ``grid`` that of the generation flow (each FlowOutput names its own); ``layer_parameters``
    holds the blocks both flows share, without towers, aligners or heads. A family without a mask token documents what stands
    in for a hidden token. ``generation_flow`` draws its mask unless it is given one ([B, N] bool, True = hidden).
    """

    embedding: nn.Module
    num_layers: int
    hidden_size: int
    grid: tuple[int, int]

    def understanding_flow(self, batch: Mapping[str, Any], layers: Sequence[int] | None = None) -> FlowOutput: ...

    def generation_flow(
        self,
        batch: Mapping[str, Any],
        mask_ratio: float | tuple[float, float] = MASK_RATIO,
        mask_layout: str = "dispersed",
        generator: torch.Generator | None = None,
        layers: Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> FlowOutput: ...

    def layer_parameters(self) -> OrderedDict[str, list[nn.Parameter]]: ...

    def understand(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        decoding: Decoding = Decoding(),
        generator: torch.Generator | None = None,
    ) -> list[str]: ...

    def generate(
        self,
        texts: Sequence[str],
        images: Tensor | None = None,
        mask: Tensor | None = None,
        decoding: Decoding = Decoding(),
        generator: torch.Generator | None = None,
    ) -> Tensor: ...


def as_layers(layers: Sequence[int] | None, num_layers: int) -> list[int]:
    """All layers 0..L by default; refuses unknown ones (negative numbers count from the last)."""
    wanted = range(num_layers + 1) if layers is None else layers
    out = [layer + num_layers + 1 if layer < 0 else layer for layer in wanted]
    bad = [layer for layer in out if not 0 <= layer <= num_layers]
    if bad:
        raise ValueError(f"layers {bad} do not exist: this model has layers 0 (embedding) to {num_layers}")
    return out


def scores_of(out: FlowOutput) -> Float[Tensor, "B positions V"]:
    """What a flow predicts, and what factors put biases on: logits, or of a continuous head the prediction itself.

    For logits that is DIVA's Eq. 8; for a velocity it is a surrogate of ours.
    """
    found = out.logits if out.logits is not None else out.prediction
    if found is None:
        raise NotImplementedError("a flow has neither logits nor a prediction to put biases on (Eq. 8)")
    return found


def example_losses(out: FlowOutput, scores: Float[Tensor, "B positions V"]) -> Float[Tensor, " B"]:
    """What each example would cost with other scores: cross-entropy in nats, or the squared error of a continuous head."""
    if out.labels is not None:
        return token_losses(scores, out.labels)[1]
    assert out.target is not None and out.mask is not None
    error = (scores.float() - out.target).square().mean(-1) * out.mask
    return error.sum(1) / out.mask.sum(1)


@contextmanager
def recording(blocks: Sequence[nn.Module], layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While it is open, states are kept: what goes into the first block under 0, the output of block l under l.

    transformers' own ``output_hidden_states`` ends with a *normalised* state; this is the residual stream everywhere, of any
    module whose blocks take their states first and return them, or a tuple that begins with them.

    Example:
        >>> blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        >>> with recording(blocks, [0, 2]) as states:
        ...     out = nn.Sequential(*blocks)(torch.ones(1, 2))
        >>> sorted(states), states[0], states[2].shape
        ([0, 2], tensor([[1., 1.]]), torch.Size([1, 2]))
    """
    states: dict[int, Tensor] = {}

    def keep_input(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        states[0] = args[0] if args else next(iter(named.values()))

    def keep(layer: int) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            states[layer] = out[0] if isinstance(out, tuple) else out

        return hook

    hooks = [blocks[layer - 1].register_forward_hook(keep(layer)) for layer in layers if layer > 0]
    if 0 in layers:
        hooks.append(blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Evaluation mode of all that are modules; every module's own mode after."""
    modules = nn.ModuleList(model for model in models if isinstance(model, nn.Module))
    modes = [(module, module.training) for module in modules.modules()]
    try:
        modules.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_images(images: Float[Tensor, "B 3 H W"], size: tuple[int, int] | None = None) -> Float[Tensor, "B 3 H W"]:
    """Refuse what is not a batch of RGB images in [0, 1]."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images are {shape}; expected a tensor [batch, 3, height, width]")
    if not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}; expected floats in [0, 1] (divide bytes by 255)")
    if size is not None and tuple(images.shape[-2:]) != tuple(size):
        raise ValueError(f"images are {tuple(images.shape[-2:])} pixels; this model reads {tuple(size)}; resize them")
    if images.numel():
        low, high = images.detach().aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError("images hold NaN or infinite values; expected floats in [0, 1]")
        if low < -1e-3 or high > 1 + 1e-3:
            raise ValueError(f"images range from {float(low):.3g} to {float(high):.3g}; expected [0, 1]")
    return images


def check_batch(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch pairs by position inside itself and by id with the world: lengths agree, ids are unique."""
    missing = {"images", "texts", "ids"} - set(batch)
    if missing:
        raise ValueError(f"the batch lacks {sorted(missing)}; it has {sorted(batch)} (uk.collate makes one from data set items)")
    n = {key: len(batch[key]) for key in ("images", "texts", "ids")}
    if len(set(n.values())) != 1:
        raise ValueError(f"images, texts and ids differ in number: {n}")
    if n["ids"] == 0:
        raise ValueError("the batch is empty; expected at least one image-text pair")
    if len(set(batch["ids"])) < n["ids"]:
        repeated = sorted({i for i in batch["ids"] if list(batch["ids"]).count(i) > 1})
        raise ValueError(f"ids repeat within the batch: {repeated[:5]}; pairing is by id, so each must be unique")
    return batch


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Items of a data set (id, images, texts, factors) to one batch (ids, images, texts, factors)."""
    if not items:
        raise ValueError("no items to collate; expected at least one")
    batch: dict[str, Any] = {
        "ids": [item["id"] for item in items],
        "texts": [item["texts"] for item in items],
        "images": torch.stack([item["images"] for item in items]),
    }
    if all("factors" in item for item in items):
        batch["factors"] = {k: torch.stack([item["factors"][k] for item in items]) for k in items[0]["factors"]}
    return check_batch(batch)  # type: ignore[return-value]


def draw_mask(
    n: int,
    grid: tuple[int, int],
    ratio: float | tuple[float, float] = MASK_RATIO,
    layout: str = "dispersed",
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "{n} {grid[0]*grid[1]}"]:
    """Masks [n, rows * columns] (True = hidden), a fixed share of the tokens or one drawn from a range per example.

    "dispersed" hides positions drawn without replacement; "contiguous" one rectangle of about the same area at a random
    place (the ablation of DIVA). At least one token is hidden and, below ratio 1, at least one stays visible.
    Draws happen on the CPU, so that one seed means one mask on every device.
    """
    low, high = (ratio, ratio) if isinstance(ratio, int | float) else ratio
    if not 0 < low <= high <= 1:
        raise ValueError(f"mask ratio is {ratio}; expected a number in (0, 1] or a range within it")
    if layout not in MASK_LAYOUTS:
        raise ValueError(f"mask layout is {layout!r}; expected one of {MASK_LAYOUTS}")
    rows, columns = grid
    total = rows * columns
    share = low + (high - low) * torch.rand(n, generator=generator)
    count = (share * total).round().long().clamp(1, total if high == 1 else max(total - 1, 1))
    if layout == "dispersed":
        order = torch.rand(n, total, generator=generator).argsort(1).argsort(1)
        return order < count[:, None]
    u = torch.rand(n, 3, generator=generator)
    mask = torch.zeros(n, rows, columns, dtype=torch.bool)
    for i in range(n):
        area = int(count[i])
        # A height between what the width allows and the whole image, then the width that gives the area.
        smallest = math.ceil(area / columns)
        height = min(rows, smallest + int(u[i, 0] * (min(rows, area) - smallest + 1)))
        width = min(columns, max(1, round(area / height)))
        if height * width == total > area:  # rounding up must not hide the whole image
            width -= 1
        top, left = int(u[i, 1] * (rows - height + 1)), int(u[i, 2] * (columns - width + 1))
        mask[i, top : top + height, left : left + width] = True
    return mask.flatten(1)


def elbo_masks(
    n: int, total: int, draws: int = 8, generator: torch.Generator | None = None
) -> Bool[Tensor, "{draws} {n} {total}"]:
    """Masks [draws, n, total], True = hidden: the mean over them of total * (mean log p of the hidden) is an unbiased estimate of
    the any-order bound.

    How many are hidden is uniform on 1 ... total: one draw from each of ``draws`` equal strata. Masks come in pairs: the second
    hides what the first shows, and one token more, so that each token is hidden about as often as any other.

    Raises:
        ValueError: draws are not even, or less than 2.

    Example:
        >>> elbo_masks(1, 4, draws=2).sum((1, 2)).sum().item()  # k hidden, then 5 - k
        5
    """
    if draws < 2 or draws % 2 or n < 1 or total < 1:
        raise ValueError(f"{draws=}, {n=}, {total=}; expected an even number of draws from 2 on, and some example and token")
    pairs = draws // 2
    u = (torch.arange(pairs)[:, None] + 1 - torch.rand(pairs, n, generator=generator)) / draws  # in (0, 1/2]
    hidden = (u * total).ceil().long().clamp(1, total)[..., None]
    place = torch.rand(pairs, n, total, generator=generator).argsort(2).argsort(2)
    return torch.stack([place < hidden, place >= hidden - 1], 1).flatten(0, 1)


def choose_mask(
    mask: Bool[Tensor, "{n} {grid[0]*grid[1]}"] | None,
    n: int,
    grid: tuple[int, int],
    ratio: float | tuple[float, float],
    layout: str,
    generator: torch.Generator | None,
) -> Bool[Tensor, "{n} {grid[0]*grid[1]}"]:
    """The mask a generation flow uses: the given one, checked, or a drawn one."""
    if mask is None:
        return draw_mask(n, grid, ratio, layout, generator)
    if tuple(mask.shape) != (n, grid[0] * grid[1]) or mask.dtype != torch.bool:
        raise ValueError(f"the mask is {tuple(mask.shape)} of {mask.dtype}; expected a bool tensor {(n, grid[0] * grid[1])}")
    if not bool(mask.any(1).all()):
        raise ValueError("the mask hides nothing in some examples; expected at least one hidden token in each")
    return mask


def token_losses(
    logits: Float[Tensor, "B positions V"], labels: Int[Tensor, "B positions"]
) -> tuple[Float[Tensor, ""], Float[Tensor, " B"]]:
    """Cross-entropy in nats over labels that are not -100: (mean over supervised tokens, [B] mean per example)."""
    flat = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
    token = flat.view_as(labels)
    supervised = labels != -100
    if not bool(supervised.any()):
        raise ValueError("no token is supervised in this batch: every label is -100 (empty captions or an empty mask?)")
    per_example = token.sum(1) / supervised.sum(1).clamp(min=1)
    return token.sum() / supervised.sum(), per_example


class Draws:
    """Drawing and inpainting for families with an ``image_tokenizer`` and a ``grid``; what is hidden, a family fills in."""

    def _fill(
        self: Any, texts: Sequence[str], images: Tensor | None, hidden: Tensor, decoding: Decoding, generator: Any
    ) -> Float[Tensor, "B 3 H W"]:
        """Images whose hidden tokens [B, N] are drawn, the others as in ``images``; all are hidden if there are none."""
        raise NotImplementedError

    def _codes(self: Any, batch: Mapping[str, Any]) -> Tensor:
        codes = batch.get("codes")
        if codes is None:
            check_images(batch["images"], (self.image_size, self.image_size))
            codes = self.image_tokenizer.encode(batch["images"].to(self.device))
        return codes.to(self.device)

    def generate(
        self: Any,
        texts: Sequence[str],
        images: Tensor | None = None,
        mask: Tensor | None = None,
        decoding: Decoding = Decoding(),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw each text [B, 3, H, W]; with ``images`` and ``mask`` [B, rows, columns] (True = redraw), inpaint.

        Inpainting returns the given pixels wherever nothing was hidden.
        """
        if (images is None) != (mask is None):
            raise ValueError("inpainting needs both images= and mask=; drawing from text needs neither")
        if not len(texts):
            return torch.zeros(0, 3, self.image_size, self.image_size)
        hidden = torch.ones(len(texts), self.grid[0] * self.grid[1], dtype=torch.bool, device=self.device)
        if images is not None and mask is not None:
            check_images(images, (self.image_size, self.image_size))
            if tuple(mask.shape) != (len(texts), *self.grid) or len(images) != len(texts) or mask.dtype != torch.bool:
                raise ValueError(
                    f"{len(texts)} texts, images {tuple(images.shape)} and mask {tuple(mask.shape)} ({mask.dtype}) do not fit; "
                    f"expected as many images, and a bool mask [{len(texts)}, {self.grid[0]}, {self.grid[1]}]"
                )
            hidden = mask.flatten(1).to(self.device)
        with torch.no_grad():
            drawn = self._fill(texts, images, hidden, decoding, generator)
        if images is None or mask is None:
            return drawn
        p = self.image_size // self.grid[0]
        pixels = mask.to(self.device).repeat_interleave(p, 1).repeat_interleave(p, 2)[:, None]
        return torch.where(pixels, drawn, images.to(drawn))


class DrawsCodes(Draws):
    """Of a family with ``generate_codes``, that says by ``_scored`` what it predicts of the codes of a batch."""

    def generation_flow(
        self: Any,
        batch: Mapping[str, Any],
        mask_ratio: float | tuple[float, float] = MASK_RATIO,
        mask_layout: str = "dispersed",
        generator: torch.Generator | None = None,
        layers: Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> FlowOutput:
        """Caption and partly hidden image in, hidden codes as target: cross-entropy of these codes (DIVA Sec. 3.1).

        ``batch["condition"]`` [B, C, d], where there and the family takes any, are vectors to draw by beside the caption, such as
        states of an image.
        """
        check_batch(batch)
        codes = self._codes(batch)
        mask = choose_mask(mask, len(codes), self.grid, mask_ratio, mask_layout, generator).to(self.device)
        logits, states = self._scored(batch, codes, mask, as_layers(layers, self.num_layers))
        labels = torch.where(mask, codes, -100)
        loss, per_example = token_losses(logits, labels)
        return FlowOutput(loss, per_example, states, self.grid, mask=mask, logits=logits, labels=labels)

    def _fill(
        self: Any, texts: Sequence[str], images: Tensor | None, hidden: Tensor, decoding: Decoding, generator: Any
    ) -> Float[Tensor, "B 3 H W"]:
        codes = torch.zeros(hidden.shape, dtype=torch.long, device=self.device)
        if images is not None:
            codes = self.image_tokenizer.encode(images.to(self.device))
        return self.image_tokenizer.decode(self.generate_codes(texts, codes, hidden, decoding, generator)).float()


def check_questions(images: Float[Tensor, "B 3 H W"], prompts: Sequence[str] | None, size: int) -> None:
    """Refuse images of another size, prompts of another number, and empty ones."""
    check_images(images, (size, size))
    if prompts is not None and len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts came with {len(images)} images; expected one each")
    if prompts is not None and not all(prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty; expected a question, or prompts=None for captions")


def checksum(model: Any) -> int:
    """Of all weights and buffers: what belongs to one stage of a training must not be mixed with what belongs to another."""
    check = 0
    for tensor in model.state_dict().values():
        check = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), check)
    return check


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model in another precision, but for its image tokenizer, which is in float32 whatever the backbone is: codes near an
    edge must not depend on it."""
    tokenizer = getattr(model.image_tokenizer, "vq", model.image_tokenizer)
    kept = {id(t) for t in (*tokenizer.parameters(), *tokenizer.buffers())}
    for t in (*model.parameters(), *model.buffers()):
        if t.is_floating_point():
            t.data = t.data.to(torch.float32 if id(t) in kept else dtype)
    return model


def check_loaded(info: Mapping[str, Any], name: Any) -> None:
    """Refuse weights that are not those of the model: transformers would draw anew what is missing, and only warn.

    Args:
        info: what ``from_pretrained(..., ignore_mismatched_sizes=True, output_loading_info=True)`` says.
    """
    said = {"missing_keys": "lack", "mismatched_keys": "have other shapes of", "unexpected_keys": "know no"}
    for kind, verb in said.items():
        if keys := sorted(key if isinstance(key, str) else key[0] for key in info[kind]):
            raise ValueError(f"the weights in {name} {verb} {', '.join(keys[:3])}{' ...' * (len(keys) > 3)}: not this model's")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" prefers cuda (under torchrun the GPU of this process), then mps, then the CPU."""
    if str(device) != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device is {device!r}; expected 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ...") from error
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "LOCAL_RANK" in os.environ else torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is bf16 where a matrix product of about 50 ms runs faster in it than in float32, else float32."""
    if dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype is {dtype!r}; expected 'auto', 'float32', 'bfloat16', ...")
        return getattr(torch, dtype)
    return torch.bfloat16 if bf16_is_faster(device) else torch.float32


@cache
def bf16_is_faster(device: torch.device) -> bool:
    """A probe of 50 ms: a processor without instructions for bf16 is many times slower in it than in float32."""
    return product_rate(device, torch.bfloat16, 512, 0.025) > product_rate(device, torch.float32, 512, 0.025)


def product_rate(device: torch.device, dtype: torch.dtype, n: int, seconds: float) -> float:
    """Operations per second of products of n x n matrices."""
    a = torch.ones(n, n, dtype=dtype, device=device)
    (a @ a).sum().item()  # the first product pays for set-up
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        (a @ a).sum().item()
        rounds += 1
    return 2 * n**3 * rounds / (time.perf_counter() - start)
