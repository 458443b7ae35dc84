"""Images and text as discrete tokens: an FSQ image tokenizer and a word-level text tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from umm_kit.models.base import check_images

SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>", "<understand>", "<generate>")


def check_sizes(**sizes: Any) -> None:
    """Refuse sizes of a configuration that are no numbers, or that no model has: a file may say anything."""
    for name, value in sizes.items():
        if not isinstance(value, int) or not 1 <= value <= 2**20 or (name == "num_layers" and value > 1024):
            raise ValueError(f"{name} is {value!r}; expected a whole number from 1 to {1024 if name == 'num_layers' else 2**20}")


class ImageTokenizerConfig(PretrainedConfig):
    """Sizes of an :class:`ImageTokenizer`; the codebook has prod(levels) codes."""

    model_type = "umm_image_tokenizer"

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 4,
        channels: int = 96,
        depth: int = 3,
        levels: tuple[int, ...] = (8, 8, 8),
        **kwargs,
    ):
        check_sizes(image_size=image_size, patch_size=patch_size, channels=channels, num_layers=depth)
        check_sizes(codebook_size=math.prod(levels))
        self.image_size, self.patch_size, self.channels, self.depth = image_size, patch_size, channels, depth
        self.levels = list(levels)
        super().__init__(**kwargs)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of [B, C, H, W]."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv(gelu(conv(norm(x)))) at the token grid's resolution.

    With ``kernel`` 1 a token sees nothing but itself: one group of a group norm over one position is a layer norm.
    """

    def __init__(self, channels: int, kernel: int = 3):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels) if kernel > 1 else ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.conv2.init_gain = 0.3  # type: ignore[assignment]

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return x + self.conv2(nn.functional.gelu(self.conv1(self.norm(x))))


def fsq(z: Float[Tensor, "*batch k"], levels: Int[Tensor, " k"]) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """Finite scalar quantization (Mentzer et al. 2024): bound each channel, round it, pass the gradient straight through.

    Args:
        z: [..., k] unbounded. levels: [k] integers >= 2.
    Returns:
        quantized [..., k] on an even lattice in [-1, 1], and the digit of each channel [..., k] in {0, ..., level - 1}.
    """
    top = levels - 1
    bounded = torch.sigmoid(2 * z) * top
    digits = bounded.round()
    straight = bounded + (digits - bounded).detach()
    return straight / top * 2 - 1, digits.long()


def code_digits(codes: Int[Tensor, "*batch"], levels: Sequence[int]) -> Int[Tensor, "*batch {len(levels)}"]:
    """FSQ digits [..., k] of codes [...], the first level fastest: digit j is in {0, ..., levels[j] - 1}."""
    digits, rest = [], codes
    for level in levels:
        digits.append(rest % level)
        rest = rest // level
    return torch.stack(digits, -1)


class ImageTokenizer(PreTrainedModel):
    """Patch-wise autoencoder with an FSQ bottleneck: image [B, 3, H, W] <-> codes [B, (H/p)(W/p)].

    The image is unshuffled to patches, so nothing is lost before the bottleneck, and residual blocks share context
    between neighbouring tokens on both sides.

    Example:
        >>> tokenizer = ImageTokenizer(ImageTokenizerConfig(channels=16, depth=1))
        >>> tokenizer.encode(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 64])
    """

    config_class = ImageTokenizerConfig
    main_input_name = "images"
    _no_split_modules = ["ResidualBlock"]

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__(config)
        c, p = config.channels, config.patch_size
        if config.image_size % p:
            raise ValueError(f"image_size {config.image_size} is not a multiple of patch_size {p}")
        self.grid = (config.image_size // p, config.image_size // p)
        self.levels = tuple(config.levels)
        self.codebook_size = math.prod(self.levels)
        k = len(self.levels)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(p),
            nn.Conv2d(3 * p * p, c, 1),
            *(ResidualBlock(c, kernel=1) for _ in range(config.depth)),
            nn.Conv2d(c, k, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(k, c, 3, padding=1),
            *(ResidualBlock(c) for _ in range(config.depth)),
            nn.Conv2d(c, 3 * p * p, 1),
            nn.PixelShuffle(p),
        )
        for last in (self.encoder[-1], self.decoder[-2]):  # codes start near the middle of the lattice, pixels at grey
            last.init_gain = 0.3  # type: ignore[assignment]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):  # transformers' own default, std 0.02 everywhere, learns far more slowly
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=getattr(module, "init_gain", 1.0) * fan_in**-0.5)
            nn.init.zeros_(cast(Tensor, module.bias))

    def _quantize(self, images: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(images * 2 - 1).permute(0, 2, 3, 1)
        return fsq(z, torch.tensor(self.levels, device=z.device))

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B N"]:
        """Codes [B, N] in raster order; code = sum of digits in mixed radix, the first level fastest.

        Autocast is off here: a code near a rounding edge must not depend on the precision of the model around it.
        """
        check_images(images, (self.config.image_size, self.config.image_size))
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            _, digits = self._quantize(images.to(self.dtype))
        radix = torch.cumprod(torch.tensor([1, *self.levels[:-1]], device=digits.device), 0)
        return (digits * radix).sum(-1).flatten(1)

    def quantized(self, codes: Int[Tensor, "B N"]) -> Float[Tensor, "B N k"]:
        """FSQ lattice points [B, N, k] of codes [B, N]."""
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.codebook_size):
            raise ValueError(f"codes range from {int(codes.min())} to {int(codes.max())}; expected 0 to {self.codebook_size - 1}")
        return code_digits(codes, self.levels) / (torch.tensor(self.levels, device=codes.device) - 1) * 2 - 1

    def decode(self, codes: Int[Tensor, "B N"]) -> Float[Tensor, "B 3 H W"]:
        """Images [B, 3, H, W] in [0, 1] of codes [B, N]."""
        if codes.ndim != 2 or codes.shape[1] != self.grid[0] * self.grid[1]:
            raise ValueError(f"codes are {tuple(codes.shape)}; expected [batch, {self.grid[0] * self.grid[1]}]")
        with torch.no_grad():
            return self._pixels(self.quantized(codes).to(self.dtype)).clamp(0, 1)

    def _pixels(self, quantized: Tensor) -> Tensor:
        if quantized.ndim == 3:
            quantized = quantized.unflatten(1, self.grid)
        return (self.decoder(quantized.permute(0, 3, 1, 2)) + 1) / 2

    def reconstruct(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """decode(encode(images))."""
        return self.decode(self.encode(images))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Float[Tensor, " ..."]]:
        """:func:`reconstruction_loss` of what is encoded and decoded."""
        quantized, _ = self._quantize(images)
        output = self._pixels(quantized)
        return {"loss": reconstruction_loss(output, images), "reconstructions": output}


def reconstruction_loss(output: Float[Tensor, "B 3 H W"], images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
    """Squared and absolute error, coloured pixels weighing 8 times as much as grey ones.

    Coloured objects cover a small part of a scene: an unweighted error would spend the codes on the ground.
    """
    coloured = (images.amax(1, keepdim=True) - images.amin(1, keepdim=True)) > 0.05
    error = (output - images).float()
    return ((1 + 7 * coloured) * (10 * error**2 + 0.3 * error.abs())).mean()


@dataclass(frozen=True)
class CodebookUse:
    """How much of a codebook a data set uses."""

    used: int  # codes seen at least once
    size: int
    perplexity: float  # exp(entropy of the code frequencies), between 1 and size


def codebook_use(codes: Int[Tensor, "*batch N"], size: int) -> CodebookUse:
    """Count of used codes and perplexity exp(-sum p log p) of codes [..., N]."""
    if not codes.numel():
        raise ValueError("no codes were given; expected at least one")
    if codes.min() < 0 or codes.max() >= size:
        raise ValueError(f"codes range from {int(codes.min())} to {int(codes.max())}; expected 0 to {size - 1}")
    frequency = torch.bincount(codes.flatten(), minlength=size).double()
    p = frequency / frequency.sum()
    return CodebookUse(int((frequency > 0).sum()), size, float(torch.exp(-(p[p > 0] * p[p > 0].log()).sum())))


def train_text_tokenizer(corpus: Iterable[str], max_words: int = 8192) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose words are those of the corpus; unknown words become <unk>.

    Lower case; punctuation stands alone. ``tokenizers`` does the work, so that saving and loading are the library's.

    Raises:
        ValueError: the corpus holds no word, or ``max_words`` (special tokens included) leaves room for none.
    """
    if max_words <= len(SPECIAL_TOKENS):
        raise ValueError(f"max_words is {max_words}; expected more than the {len(SPECIAL_TOKENS)} special tokens")
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(corpus, trainers.WordLevelTrainer(vocab_size=max_words, special_tokens=list(SPECIAL_TOKENS)))
    if tokenizer.get_vocab_size() == len(SPECIAL_TOKENS):
        raise ValueError("the corpus holds no words; expected at least one caption")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]), split_special_tokens=True,  # "<eos>" in a caption is only words
    )  # fmt: skip
