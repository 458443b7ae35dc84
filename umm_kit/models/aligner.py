"""LatentUMM's maps into and out of a shared latent, as its authors *released* them (arXiv 2605.17766).

Sizes, layers and dropout are the release's; what is our choice says so. phi maps embeddings of a stronger model into the
latent, G maps out of it, and what G makes is read again: z -> x_hat = G(z) -> z_hat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

SOURCES = ("text", "fused")
REENCODERS = ("phi", "mlp")


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def _floats(x: Tensor, width: int, dtype: torch.dtype, name: str) -> Tensor:
    """[B, width], in the weights' precision: embeddings and states may come in bf16 or float16."""
    if x.ndim != 2 or x.shape[1] != width or not x.is_floating_point():
        raise ValueError(f"{name} is {tuple(x.shape)} of {x.dtype}; expected floats [B, {width}]")
    return x.to(dtype)


@dataclass(frozen=True)
class Aligned:
    """What :class:`LatentAligner` returns: all that the alignment losses need, and nothing that none of them trains."""

    z_text: Float[Tensor, "B z"]  # phi(e_text)
    z_image: Float[Tensor, "B z"]  # phi(e_image)
    z_fused: Float[Tensor, "B z"] | None  # phi(e_text, e_image), with source="fused" only
    z: Float[Tensor, "B z"]  # where the cycle starts: z_text or z_fused
    x_hat: Float[Tensor, "B e"]  # G(z)
    z_hat: Float[Tensor, "B z"]  # the re-encoded x_hat


class LatentAlignerConfig(PretrainedConfig):
    """Sizes of :class:`LatentAligner`; ``latent_size=None`` makes the latent as wide as the embeddings, as released."""

    model_type = "umm_latent_aligner"

    def __init__(
        self,
        embedding_size: int = 128,
        latent_size: int | None = None,
        hidden_size: int = 1024,
        num_layers: int = 2,
        num_heads: int = 8,
        dropout: float = 0.1,
        source: str = "text",
        reencoder: str = "phi",
        **kwargs: Any,
    ):
        self.embedding_size, self.latent_size = embedding_size, embedding_size if latent_size is None else latent_size
        self.hidden_size, self.num_layers, self.num_heads, self.dropout = hidden_size, num_layers, num_heads, dropout
        self.source, self.reencoder = source, reencoder
        super().__init__(**kwargs)


class LatentAligner(PreTrainedModel):
    """Alignment encoder phi, generation map G and re-encoder of LatentUMM's stage 1, on embeddings of a teacher.

    tokens = [W_m e_m + b_m + modality_m]  ->  transformer  ->  LN  ->  z_m = V token_m,   z_fused = MLP(token_text, token_image)
    x_hat = G(z),   z_hat = phi(x_hat)

    LatentUMM, as released: 2 layers of 8 heads, hidden 1024, dropout .1; MLPs of two layers with GELU. Our choices: layers are
    pre-norm with GELU and 4 x hidden inside; x_hat is re-encoded as an image, which the target term makes of it. A text or
    an image alone is one token: attention then has nothing to attend to, and phi is in effect a residual MLP.

    ``source``: the latent z that the cycle starts from, "text" (released default) or "fused". ``reencoder``: "phi" reads x_hat
    again by the alignment encoder, as the release does where widths match; "mlp" by a two-layer map of its own, which can
    close the cycle without phi. Only what the two options use is built: no parameter is without a gradient.
    ``save_pretrained(folder)`` and ``from_pretrained(folder)`` write and read safetensors beside a config.json.

    Raises:
        ValueError: sizes below 1, heads that do not divide hidden_size, dropout outside [0, 1), an unknown source or
            reencoder; embeddings or latents of another shape; fuse without ``source="fused"``.

    Example:
        >>> model = LatentAligner(LatentAlignerConfig(embedding_size=16, hidden_size=32, num_layers=1, num_heads=2))
        >>> out = model(torch.randn(4, 16), torch.randn(4, 16))
        >>> out.z_text.shape, out.x_hat.shape, out.z_hat.shape
        (torch.Size([4, 16]), torch.Size([4, 16]), torch.Size([4, 16]))
    """

    config_class = LatentAlignerConfig
    main_input_name = "e_text"

    def __init__(self, config: LatentAlignerConfig):
        super().__init__(config)
        e, z, d = config.embedding_size, config.latent_size, config.hidden_size
        if min(e, z, d, config.num_layers, config.num_heads) < 1 or d % config.num_heads:
            raise ValueError(
                f"embedding_size={e}, latent_size={z}, hidden_size={d}, num_layers={config.num_layers}, "
                f"num_heads={config.num_heads}; expected all >= 1 and a hidden_size that the heads divide"
            )
        if not 0 <= config.dropout < 1:
            raise ValueError(f"dropout is {config.dropout}; expected [0, 1)")
        if config.source not in SOURCES or config.reencoder not in REENCODERS:
            raise ValueError(f"source={config.source!r}, reencoder={config.reencoder!r}; expected of {SOURCES} and {REENCODERS}")
        self.text, self.image = nn.Linear(e, d), nn.Linear(e, d)
        self.modality = nn.Parameter(0.02 * torch.randn(2, d))
        # Layers one by one: nn.TransformerEncoder would start all of them as copies of one.
        options: dict[str, Any] = {"dropout": config.dropout, "activation": "gelu", "batch_first": True, "norm_first": True}
        layers = [nn.TransformerEncoderLayer(d, config.num_heads, 4 * d, **options) for _ in range(config.num_layers)]
        self.encoder = nn.Sequential(*layers, nn.LayerNorm(d))
        self.latent = nn.Linear(d, z)
        self.generation = _mlp(z, d, e)
        self.fusion = _mlp(2 * d, d, z) if config.source == "fused" else None
        self.reencoder = _mlp(e, d, z) if config.reencoder == "mlp" else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Each layer keeps the start that torch gave it."""

    def _text_token(self, e: Tensor) -> Tensor:
        return self.text(_floats(e, self.config.embedding_size, self.modality.dtype, "e_text")) + self.modality[0]

    def _image_token(self, e: Tensor) -> Tensor:
        return self.image(_floats(e, self.config.embedding_size, self.modality.dtype, "e_image")) + self.modality[1]

    def encode_text(self, e: Float[Tensor, "B e"]) -> Float[Tensor, "B z"]:
        """z_text = phi(e_text) of the teacher's embeddings of texts."""
        return self.latent(self.encoder(self._text_token(e)[:, None])[:, 0])

    def encode_image(self, e: Float[Tensor, "B e"]) -> Float[Tensor, "B z"]:
        """z_image = phi(e_image) of the teacher's embeddings of images."""
        return self.latent(self.encoder(self._image_token(e)[:, None])[:, 0])

    def fuse(self, e_text: Float[Tensor, "B e"], e_image: Float[Tensor, "B e"]) -> Float[Tensor, "B z"]:
        """z_fused = phi(e_text, e_image): both tokens see each other, then an MLP reads both; needs ``source="fused"``."""
        if self.fusion is None:
            raise ValueError("source is 'text': nothing would train the fusion, so it was not made; make one with source='fused'")
        text, image = self._text_token(e_text), self._image_token(e_image)
        if len(text) != len(image):
            raise ValueError(f"there are {len(text)} texts and {len(image)} images; expected row i of both from one item")
        return self.fusion(self.encoder(torch.stack([text, image], 1)).flatten(1))

    def generate(self, z: Float[Tensor, "B z"]) -> Float[Tensor, "B e"]:  # type: ignore[override]
        """x_hat = G(z), out of the latent into the space of embeddings."""
        return self.generation(_floats(z, self.config.latent_size, self.modality.dtype, "z"))

    def reencode(self, x: Float[Tensor, "B e"]) -> Float[Tensor, "B z"]:
        """z_hat, what is read from generated x_hat: by phi as from an image, or by the re-encoder's own MLP."""
        if self.reencoder is None:
            return self.encode_image(x)
        return self.reencoder(_floats(x, self.config.embedding_size, self.modality.dtype, "x_hat"))

    def forward(self, e_text: Float[Tensor, "B e"], e_image: Float[Tensor, "B e"]) -> Aligned:
        """Both latents, and one cycle out of the latent and back, from row i of both embeddings of the same item."""
        z_text, z_image = self.encode_text(e_text), self.encode_image(e_image)
        if len(z_text) != len(z_image):
            raise ValueError(f"there are {len(z_text)} texts and {len(z_image)} images; expected row i of both from one item")
        z_fused = None if self.fusion is None else self.fuse(e_text, e_image)
        z = z_text if z_fused is None else z_fused
        x_hat = self.generate(z)
        return Aligned(z_text, z_image, z_fused, z, x_hat, self.reencode(x_hat))


class LatentHeads(nn.Module):
    """The two MLPs that the release puts beside the backbone in stage 2, where they stand for generation and re-encoding.

    x_hat = G(h),  h_hat = R(x_hat),   G: hidden -> embedding, R: embedding -> hidden, two layers with GELU each

    LatentUMM, as released: h is the mean of the last hidden states over text or over image positions. No picture is generated
    on this path. The width inside both is our choice, that of the states.

    Args:
        hidden_size: width of the backbone's states. embedding_size: of the teacher's embeddings.
    Raises:
        ValueError: sizes below 1; states or embeddings of another shape.

    Example:
        >>> heads = LatentHeads(hidden_size=32, embedding_size=16)
        >>> x_hat = heads.generate(torch.randn(4, 32))
        >>> x_hat.shape, heads.reencode(x_hat).shape
        (torch.Size([4, 16]), torch.Size([4, 32]))
    """

    def __init__(self, hidden_size: int, embedding_size: int):
        super().__init__()
        if min(hidden_size, embedding_size) < 1:
            raise ValueError(f"hidden_size={hidden_size}, embedding_size={embedding_size}; expected both >= 1")
        self.hidden_size, self.embedding_size = hidden_size, embedding_size
        self.generation = _mlp(hidden_size, hidden_size, embedding_size)
        self.reencoder = _mlp(embedding_size, hidden_size, hidden_size)

    def generate(self, h: Float[Tensor, "B d"]) -> Float[Tensor, "B e"]:
        """x_hat = G(h), in the space of embeddings."""
        return self.generation(_floats(h, self.hidden_size, next(self.parameters()).dtype, "h"))

    def reencode(self, x: Float[Tensor, "B e"]) -> Float[Tensor, "B d"]:
        """h_hat = R(x_hat), back among the backbone's states."""
        return self.reencoder(_floats(x, self.embedding_size, next(self.parameters()).dtype, "x_hat"))

    def forward(self, h: Float[Tensor, "B d"]) -> tuple[Float[Tensor, "B e"], Float[Tensor, "B d"]]:
        """(x_hat, h_hat) of pooled states: one cycle out and back."""
        x_hat = self.generate(h)
        return x_hat, self.reencode(x_hat)
