"""An image tokenizer whose codes are vectors: a small convolutional autoencoder of diffusers, its latents standardised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from transformers import PretrainedConfig, PreTrainedModel

from umm_kit.models.base import check_images
from umm_kit.models.own import drawn_by
from umm_kit.models.tokenizers import check_sizes, reconstruction_loss


def _deviation(z: Tensor) -> Tensor:
    """Standard deviation of each channel of [B, c, h, w] over the batches of all processes, with gradient."""
    sums = torch.stack([z.sum((0, 2, 3)), z.square().sum((0, 2, 3)), torch.full_like(z[0, :, 0, 0], z[:, 0].numel())])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        sums = all_reduce(sums)
    total, square, n = sums
    return ((square - total**2 / n) / (n - 1)).clamp(min=1e-12).sqrt()[:, None, None]


class LatentTokenizerConfig(PretrainedConfig):
    """Sizes of a :class:`LatentTokenizer`; an image has (image_size / patch_size)^2 latents of ``latent_channels`` numbers.

    ``noise`` is added to latents in training, in units of their deviation: pictures then bear the errors of a model that draws.
    """

    model_type = "umm_latent_tokenizer"

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 4,
        channels: int = 48,
        depth: int = 2,
        latent_channels: int = 8,
        noise: float = 0.5,
        **kwargs: Any,
    ):
        check_sizes(image_size=image_size, patch_size=patch_size, channels=channels, num_layers=depth)
        check_sizes(latent_channels=latent_channels)
        if patch_size & (patch_size - 1) or image_size % patch_size:
            raise ValueError(f"patch_size is {patch_size}; expected a power of 2 that divides image_size {image_size}")
        if not noise >= 0:
            raise ValueError(f"noise is {noise}; expected at least 0")
        self.image_size, self.patch_size, self.channels, self.depth = image_size, patch_size, channels, depth
        self.latent_channels, self.noise = latent_channels, noise
        super().__init__(**kwargs)


class LatentTokenizer(PreTrainedModel):
    """Image [B, 3, H, W] <-> latents [B, N, c] in raster order, each channel of mean 0 and deviation 1 over the data.

    It is used like :class:`ImageTokenizer`, with vectors in the place of numbers. Its convolutions see a little beyond each
    patch, so the latents of neighbours tell something of a token that is hidden.

    Example:
        >>> tokenizer = LatentTokenizer(LatentTokenizerConfig(channels=8, depth=1))
        >>> tokenizer.encode(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 64, 8])
    """

    config_class = LatentTokenizerConfig
    main_input_name = "images"
    shift: Tensor
    scale: Tensor

    def __init__(self, config: LatentTokenizerConfig):
        from diffusers import AutoencoderTiny

        super().__init__(config)
        halvings, c = int(math.log2(config.patch_size)), config.channels
        self.autoencoder: Any = AutoencoderTiny(
            encoder_block_out_channels=(c,) * (halvings + 1), num_encoder_blocks=(1, *(config.depth,) * halvings),
            decoder_block_out_channels=(c,) * (halvings + 1), num_decoder_blocks=(*(config.depth,) * halvings, 1),
            latent_channels=config.latent_channels,
        )  # fmt: skip
        self.grid = (config.image_size // config.patch_size,) * 2
        for name, value in (("shift", 0.0), ("scale", 1.0)):
            self.register_buffer(name, torch.full((config.latent_channels,), value))
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """diffusers has drawn them."""

    @torch.no_grad()
    def standardise(self, images: Float[Tensor, "B 3 H W"]) -> None:
        """Let the latents of these images have mean 0 and deviation 1, channel by channel."""
        self.shift.zero_(), self.scale.fill_(1.0)
        z = self.encode(images).flatten(0, 1)
        self.shift.copy_(z.mean(0)), self.scale.copy_(z.std(0).clamp(min=1e-6))

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N c"]:
        """Latents; autocast is off, so that they do not depend on the precision of the model around them."""
        check_images(images, (self.config.image_size, self.config.image_size))
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            z = self.autoencoder.encode(images.to(self.dtype) * 2 - 1).latents
            return (z.flatten(2).transpose(1, 2) - self.shift) / self.scale

    def decode(self, codes: Float[Tensor, "B N c"]) -> Float[Tensor, "B 3 H W"]:
        """Images in [0, 1] of latents."""
        expected = (self.grid[0] * self.grid[1], self.config.latent_channels)
        if codes.ndim != 3 or tuple(codes.shape[1:]) != expected:
            raise ValueError(f"latents are {tuple(codes.shape)}; expected [batch, {expected[0]}, {expected[1]}]")
        with torch.no_grad():
            z = (codes.to(self.dtype) * self.scale + self.shift).transpose(1, 2).unflatten(2, self.grid)
            return (self.autoencoder.decode(z).sample / 2 + 0.5).clamp(0, 1)

    def reconstruct(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """decode(encode(images))."""
        return self.decode(self.encode(images))

    def forward(self, images: Float[Tensor, "B 3 H W"], numbers: Sequence[int] = ()) -> dict[str, Float[Tensor, " ..."]]:
        """:func:`reconstruction_loss`, as of the tokenizer with codes; in training, of latents with noise that belongs to the
        examples' numbers."""
        z = self.autoencoder.encode(images * 2 - 1).latents
        if self.training:
            rows = [torch.Generator().manual_seed(k) for k in numbers] or None
            z = z + self.config.noise * _deviation(z) * drawn_by(torch.randn, z.shape, rows).to(z)
        output = self.autoencoder.decode(z).sample / 2 + 0.5
        return {"loss": reconstruction_loss(output, images), "reconstructions": output}
