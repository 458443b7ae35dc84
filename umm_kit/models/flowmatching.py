"""The third family, in the way of Transfusion, BAGEL and JanusFlow: next-token loss on text, rectified flow on image latents.

With latents z of an image, noise e and a level s in (0, 1]:

    x_s = (1 - s) z + s e,     v = e - z,     L_Gen = mean |v_model(x_s, s, caption) - v|^2 over hidden tokens and channels

The transformer is that of :mod:`umm_kit.models.omni`; what stands at an image token is its latent, and its level: 0 where the
token is shown. So a hidden token stands as noise, and with DIVA's masks some tokens of one image are clean and others noisy. The
draws of noise and level belong to the ids of the examples unless a generator is given: the same batch has the same loss.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from umm_kit.models.base import MASK_RATIO, Decoding, Draws, FlowOutput, as_layers, check_batch, choose_mask
from umm_kit.models.latents import LatentTokenizer, LatentTokenizerConfig
from umm_kit.models.omni import Block, OmniUMM
from umm_kit.models.own import OwnUMMConfig, drawn_by

LOWEST = 0.02  # level of noise: below it the target is all noise that no model can see
SHIFT = 2.0  # levels are 2 u / (1 + u) of even draws u: what stands where is settled at high ones, as in Stable Diffusion 3


class FlowUMMConfig(OwnUMMConfig):
    """``separate_encoder``: understanding sees pixels through an encoder of its own ("decoupled"), not the latents of drawing."""

    model_type = "umm_flow"
    image_tokenizer_config = LatentTokenizerConfig
    separate_encoder: bool = False


class FlowUMM(Draws, OmniUMM):
    """A small unified model that writes captions and answers, and draws and inpaints by a velocity.

    Example:
        >>> model = FlowUMM.tiny(["a red circle", "a blue square"])
        >>> model.generate(["a red circle"], decoding=Decoding(steps=2)).shape
        torch.Size([1, 3, 32, 32])
    """

    config_class = FlowUMMConfig
    small_tokenizer = {"channels": 8, "depth": 1, "latent_channels": 4}

    def __init__(self, config: FlowUMMConfig, text_tokenizer: PreTrainedTokenizerFast | None = None):
        super().__init__(config)
        d = config.hidden_size
        self.image_tokenizer = LatentTokenizer(LatentTokenizerConfig(**config.image_tokenizer)).requires_grad_(False)
        self.text_tokenizer = text_tokenizer
        self.grid = self.image_tokenizer.grid
        self.num_image_tokens = self.grid[0] * self.grid[1]
        self.num_layers, self.hidden_size, self.image_size = config.num_layers, d, self.image_tokenizer.config.image_size
        c, p = self.image_tokenizer.config.latent_channels, self.image_tokenizer.config.patch_size
        self.embedding = nn.Embedding(config.text_vocab_size, d)
        self.latent_embedding = nn.Linear(c, d)
        self.level_embedding = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.encoder = None
        if config.separate_encoder:  # patches and their surroundings, as a vision tower in miniature
            self.encoder = nn.Sequential(nn.Conv2d(3, d, p, p), nn.GELU(), nn.Conv2d(d, d, 3, padding=1))
        self.text_position = nn.Embedding(config.max_text, d)
        self.row, self.column = nn.Embedding(self.grid[0], d), nn.Embedding(self.grid[1], d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(d)
        self.text_head = nn.Linear(d, config.text_vocab_size, bias=False)
        self.image_head = nn.Linear(d, c)
        self.post_init()

    # --- what stands at an image token ---

    def _at(self, x: Float[Tensor, "B N c"], level: Float[Tensor, "B N"]) -> Float[Tensor, "B N d"]:
        """Latents under noise of a level, their place, and the level as sines and cosines of it."""
        half = (self.hidden_size + 1) // 2
        waves = 1000 * level[..., None] * torch.exp(-torch.arange(half, device=x.device) / half * 9.21)  # down to 1 / 10,000
        told = torch.cat([waves.sin(), waves.cos()], -1)[..., : self.hidden_size]
        return self.latent_embedding(x.to(self.dtype)) + self.level_embedding(told.to(self.dtype)) + self._place()

    def _embed_image(self, codes: Tensor) -> Tensor:
        """A whole image, clean; with an encoder of its own, what understanding sees is the image that the latents decode to."""
        if self.encoder is None:
            return self._at(codes, torch.zeros(codes.shape[:2], device=codes.device))
        seen = self.encoder(self.image_tokenizer.decode(codes).to(self.dtype) * 2 - 1)
        return seen.flatten(2).transpose(1, 2) + self._place()

    def _noisy(self, codes: Tensor, mask: Tensor, level: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents with noise of the level [B] at hidden tokens, and the level of each token [B, N]."""
        levels = level[:, None] * mask
        return (1 - levels[..., None]) * codes + levels[..., None] * noise, levels

    def _drawn_from(self, n: int, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """A level [n] in (LOWEST, 1], drawn by ``SHIFT``, and noise [n, N, c], on the CPU: of one generator, or one each."""
        shape = (self.num_image_tokens, self.image_tokenizer.config.latent_channels)
        rows = [generators[k % len(generators)] for k in range(n)]
        u = torch.stack([1 - torch.rand((), generator=g) for g in rows])
        level = LOWEST + (1 - LOWEST) * SHIFT * u / (1 + (SHIFT - 1) * u)
        return level.to(self.device), torch.stack([torch.randn(shape, generator=g) for g in rows]).to(self.device)

    def _velocity(
        self, x: Tensor, levels: Tensor, ids: Tensor, layers: Sequence[int] = (), condition: Tensor | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        hidden, states = self._drawing(self._at(x, levels), ids, layers, condition)
        return self.image_head(hidden), states

    def _generation_loss(self, codes: Tensor, mask: Tensor, ids: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Sum over hidden tokens of the mean squared error of their velocity."""
        numbers = torch.randint(2**62, (len(codes),)) if seeds is None else seeds
        level, noise = self._drawn_from(len(codes), [torch.Generator().manual_seed(int(k)) for k in numbers])
        v = self._velocity(*self._noisy(codes, mask, level, noise), ids)[0].float()
        return ((v - (noise - codes)).square().mean(-1) * mask).sum()

    # --- the generation flow ---

    def generation_flow(
        self,
        batch: Mapping[str, Any],
        mask_ratio: float | tuple[float, float] = MASK_RATIO,
        mask_layout: str = "dispersed",
        generator: torch.Generator | None = None,
        layers: Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> FlowOutput:
        """Caption and partly noisy image in, the velocity of the noisy tokens as target.

        ``prediction`` and ``target`` are [B, N, c]; only hidden tokens count. The loss is a squared error, in no nats.
        """
        check_batch(batch)
        codes = self._codes(batch)
        mask = choose_mask(mask, len(codes), self.grid, mask_ratio, mask_layout, generator).to(self.device)
        seeds = [torch.Generator().manual_seed(zlib.crc32(f"noise {name}".encode())) for name in batch["ids"]]
        level, noise = self._drawn_from(len(codes), [generator] if generator is not None else seeds)
        v, states = self._velocity(
            *self._noisy(codes, mask, level, noise), self.pack_captions(batch["texts"]).to(self.device),
            as_layers(layers, self.num_layers), batch.get("condition"),
        )  # fmt: skip
        target = noise - codes
        error = (v.float() - target).square().mean(-1) * mask
        loss, each = error.sum() / mask.sum(), error.sum(1) / mask.sum(1)
        return FlowOutput(loss, each, states, self.grid, mask=mask, prediction=v, target=target)

    def regenerate(
        self,
        texts: Sequence[str],
        layers: Sequence[int] | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> dict[int, Float[Tensor, "B N d"]]:
        """Draw each text by one Euler step from noise and read what was drawn, with gradient through both: z -> image -> z_hat.

        x = temperature e, z_hat is read from x - v_model(x, 1, text): the mean of the images that the text may mean, not one of
        them. Without a generator e = 0. Several generators are one for each text.

        Returns:
            Layer -> states of the drawn image's tokens in the understanding flow.
        Raises:
            NotImplementedError: understanding sees pixels by an encoder of its own; the image tokenizer passes no gradient.
            ValueError: temperature not above 0.
        """
        if self.encoder is not None:
            raise NotImplementedError(
                "FlowUMM with a separate encoder reads pixels, and its image tokenizer passes no gradient; "
                "use LatentUMM's --capacity heads, or a model without separate_encoder"
            )
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected above 0")
        ids = self.pack_captions(texts).to(self.device)
        shape = (len(ids), self.num_image_tokens, self.image_tokenizer.config.latent_channels)
        x = torch.zeros(shape) if generator is None else temperature * drawn_by(torch.randn, shape, generator)
        x, level = x.to(self.device), torch.ones(shape[:2], device=self.device)
        drawn = x - self._velocity(x, level, ids)[0]
        return self._read(self._at(drawn, torch.zeros_like(level)), as_layers(layers, self.num_layers))

    # --- generate ---

    def _fill(
        self, texts: Sequence[str], images: Tensor | None, hidden: Tensor, decoding: Decoding, generator: Any
    ) -> Float[Tensor, "B 3 H W"]:
        """From noise times ``temperature`` to the image, which each step predicts and noises anew, to the next, lower level:
        x' = (1 - s') (x - s v) + s' e. Fresh noise e hides errors that steps along v would keep. Shown tokens stay at level 0."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        ids, empty = (self.pack_captions(t).to(self.device) for t in (texts, [""] * len(texts)))
        shape = (len(texts), self.num_image_tokens, self.image_tokenizer.config.latent_channels)
        noise = torch.randn(shape, generator=generator).to(self.device) * decoding.temperature
        known = torch.zeros_like(noise) if images is None else self.image_tokenizer.encode(images.to(self.device)).float()
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=SHIFT, stochastic_sampling=True)
        scheduler.set_timesteps(sigmas=[1 - k / decoding.steps for k in range(decoding.steps)], device=self.device)
        x = torch.where(hidden[..., None], noise, known)
        for k, step in enumerate(scheduler.timesteps):
            levels = scheduler.sigmas[k] * hidden
            v = self._velocity(x, levels, ids)[0].float()
            if decoding.guidance != 1:
                free = self._velocity(x, levels, empty)[0].float()
                v = free + decoding.guidance * (v - free)
            x = torch.where(hidden[..., None], scheduler.step(v, step, x, generator=generator).prev_sample, known)
        return self.image_tokenizer.decode(x).float()

    def image_log_prob(
        self,
        texts: Sequence[str],
        images: Tensor | None = None,
        draws: int = 8,
        generator: torch.Generator | None = None,
        codes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> Float[Tensor, " B"]:
        """Surrogate of a log-likelihood [B], with gradient (higher = more likely): minus half the squared error of the velocity,
        summed over tokens and channels, its mean over ``draws`` of level and noise.

        Levels are drawn with ``SHIFT`` as in training: a reweighted surrogate (Diffusion-DPO's), no likelihood and not its bound;
        two images, or two models, are to be compared under one generator's draws. ``masks`` change nothing.
        """
        if (images is None) == (codes is None):
            raise ValueError("expected images or codes, one of them")
        codes = self._codes({"images": images, "codes": codes}).float()
        ids, own = self.pack_captions(texts).to(self.device), generator or torch.Generator().manual_seed(0)
        all_hidden, terms = torch.ones(codes.shape[:2], dtype=torch.bool, device=codes.device), []
        for _ in range(draws):
            level, noise = (x.expand(len(codes), *x.shape[1:]) for x in self._drawn_from(1, [own]))  # the same for every image
            v = self._velocity(*self._noisy(codes, all_hidden, level, noise), ids)[0].float()
            terms.append(-(v - (noise - codes)).square().sum((1, 2)) / 2)
        return torch.stack(terms).mean(0)
