"""Shared and unique factors of both flows, and the logit biases through which they are learned (DIVA Sec. 3.2 and 3.3).

A factor encoder reads the states of one middle layer at the image tokens. It is the same for all middle layers: call it once
for each, and average what comes of it (how the paper combines layers is not stated).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from umm_kit.models.base import FLOWS

KINDS = ("gated", "shallow", "linear", "transformer")
INJECTIONS = ("crosswise", "own")


def middle_layers(num_layers: int) -> range:
    """Middle layers of a model of L layers: L/3 to 3L/4, both rounded down, both included.

    DIVA factorizes layers 8-18 of 24 (Show-o); of 12 this gives 4-9. Layer l is the output of block l, 0 the embedding.

    Raises:
        ValueError: fewer than one layer.

    Example:
        >>> middle_layers(24), middle_layers(12)
        (range(8, 19), range(4, 10))
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; expected at least 1")
    return range(max(1, num_layers // 3), max(1, 3 * num_layers // 4) + 1)


class FactorEncoder(nn.Module):
    """One factor of one flow from the states h of a layer.

    gated:        z = LN( sigmoid(W h) * phi(h) ),  phi a 3-layer MLP with GELU      (DIVA Eq. 5 and 13; only 13 prints LN)
    shallow:      z = LN( sigmoid(W h) * V h )                       (the depth of the module that the authors released)
    linear:       z = LN( W h )                                                     (ablated in the paper: worse)
    transformer:  gated, on what one layer of self-attention makes of all tokens    (ablated: about equal, heavier)

    The paper reads pooled states h [B, d] (mean over image tokens); all but transformer also read each token of [B, N, d]
    by itself.
    The width of phi is our choice: d. LN has a learned scale and shift, as torch's has: a loss on z's scale can still shrink z.

    Args:
        hidden_size: d. factor_size: f. kind: one of ``KINDS``.
    Raises:
        ValueError: unknown kind; states of another width or shape; pooled states for "transformer".

    Example:
        >>> FactorEncoder(32, 8)(torch.randn(4, 32)).shape, FactorEncoder(32, 8)(torch.randn(4, 16, 32)).shape
        (torch.Size([4, 8]), torch.Size([4, 16, 8]))
    """

    def __init__(self, hidden_size: int, factor_size: int, kind: str = "gated"):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; expected one of {KINDS}")
        if hidden_size < 1 or factor_size < 2:
            raise ValueError(f"hidden_size={hidden_size}, factor_size={factor_size}; expected >= 1 and >= 2 (LN of one is 0)")
        d = self.hidden_size = hidden_size
        self.kind = kind
        if kind in ("linear", "shallow"):
            self.phi: nn.Module = nn.Linear(d, factor_size)
        else:
            self.phi = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d), nn.GELU(), nn.Linear(d, factor_size))
        if kind != "linear":
            self.gate = nn.Linear(d, factor_size, bias=False)
        if kind == "transformer":
            heads = math.gcd(4, d)
            self.tokens = nn.TransformerEncoderLayer(d, heads, 2 * d, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(factor_size)

    def forward(self, h: Float[Tensor, "B *N d"]) -> Float[Tensor, "B *N f"]:
        if h.ndim not in (2, 3) or h.shape[-1] != self.hidden_size:
            raise ValueError(f"states are {tuple(h.shape)}; expected [B, {self.hidden_size}] or [B, N, {self.hidden_size}]")
        h = h.to(self.norm.weight.dtype)  # states may come in bf16, encoders stay in float32
        if self.kind == "linear":
            return self.norm(self.phi(h))
        if self.kind == "transformer":
            if h.ndim != 3:
                raise ValueError(f"states are {tuple(h.shape)}; a transformer encoder needs tokens [B, N, d], not pooled ones")
            h = self.tokens(h)
        return self.norm(torch.sigmoid(self.gate(h)) * self.phi(h))


@dataclass(frozen=True)
class Factors:
    """Factors of one layer: flow -> z, [B, f] from pooled states, [B, N, f] from tokens."""

    shared: dict[str, Tensor]
    unique: dict[str, Tensor]


class FactorEncodersConfig(PretrainedConfig):
    """Sizes and kind of :class:`FactorEncoders`; the default factor_size is our choice."""

    model_type = "umm_factor_encoders"

    def __init__(self, hidden_size: int = 128, factor_size: int = 64, kind: str = "gated", **kwargs: Any):
        self.hidden_size, self.factor_size, self.kind = hidden_size, factor_size, kind
        super().__init__(**kwargs)


class FactorEncoders(PreTrainedModel):
    """One shared and one unique encoder for each flow, E_sh^i and E_uni^i, the same for all middle layers (DIVA Sec. 3.2).

    ``save_pretrained(folder)`` and ``from_pretrained(folder)`` write and read safetensors beside a config.json.

    Example:
        >>> encoders = FactorEncoders(FactorEncodersConfig(hidden_size=32, factor_size=8))
        >>> z = encoders({"understanding": torch.randn(4, 32), "generation": torch.randn(4, 32)})
        >>> z.shared["understanding"].shape, sorted(z.unique)
        (torch.Size([4, 8]), ['generation', 'understanding'])
    """

    config_class = FactorEncodersConfig
    main_input_name = "states"

    def __init__(self, config: FactorEncodersConfig):
        super().__init__(config)
        sizes = (config.hidden_size, config.factor_size, config.kind)
        self.shared = nn.ModuleDict({flow: FactorEncoder(*sizes) for flow in FLOWS})
        self.unique = nn.ModuleDict({flow: FactorEncoder(*sizes) for flow in FLOWS})
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Each layer keeps the start that torch gave it."""

    def forward(self, states: Mapping[str, Tensor]) -> Factors:
        """Factors of the given flows (one or both) from their states at one layer, [B, d] or [B, N, d]."""
        if not states or not set(states) <= set(FLOWS):
            raise ValueError(f"states are of flows {sorted(states)}; expected some of {FLOWS}")
        return Factors(
            {flow: self.shared[flow](h) for flow, h in states.items()}, {flow: self.unique[flow](h) for flow, h in states.items()}
        )


class Readouts(nn.Module):
    """Logit biases from factors: what an encoder must find out to lower the task losses of a frozen backbone (DIVA Eq. 8).

    s~_U = s_U + A_U z_sh^G + B_U z_uni^U,   s~_G = s_G + A_G z_sh^U + B_G z_uni^G,   A = P Q^T and B = R S^T of rank r

    ``injection="crosswise"`` is the paper's and an earlier release's (1f2854c): a flow is helped by the *other* flow's shared
    factor. "own" is the last release's (2234dba): by its own, which asks nothing of what flows share.

    A pooled z gives one bias for all positions. A token-level z biases each image position of G by the token there (for which
    both flows' grids must be equal), and all text positions of U by the mean over tokens. P and R start at zero: injection
    starts as no change, and the encoders get no gradient in the very first step.

    Args:
        factor_size: f. vocabulary: flow -> V, the last axis of its logits. rank: r <= min(f, V); 24 in the paper, nearly full
            rank for a vocabulary of 45, where 8 will do.
    Raises:
        ValueError: other flows, unknown injection, a rank out of its range, shapes that do not match.

    Example:
        >>> readouts = Readouts(8, {"understanding": 45, "generation": 512}, rank=4)
        >>> z = Factors(*({flow: torch.randn(2, 8) for flow in FLOWS} for _ in range(2)))
        >>> readouts({"understanding": torch.zeros(2, 7, 45)}, z)["understanding"].shape
        torch.Size([2, 7, 45])
    """

    def __init__(self, factor_size: int, vocabulary: Mapping[str, int], rank: int = 24, injection: str = "crosswise"):
        super().__init__()
        if set(vocabulary) != set(FLOWS):
            raise ValueError(f"vocabulary is for {sorted(vocabulary)}; expected {FLOWS}")
        if injection not in INJECTIONS:
            raise ValueError(f"injection is {injection!r}; expected one of {INJECTIONS}")
        full = min(factor_size, *vocabulary.values())
        if not 1 <= rank <= full:
            raise ValueError(f"rank is {rank}; expected 1 to {full}, which is full rank: choose less, or wider factors")
        self.injection = injection
        self.shared = nn.ModuleDict({flow: self._low_rank(factor_size, rank, vocabulary[flow]) for flow in FLOWS})  # A
        self.unique = nn.ModuleDict({flow: self._low_rank(factor_size, rank, vocabulary[flow]) for flow in FLOWS})  # B

    @staticmethod
    def _low_rank(inputs: int, rank: int, outputs: int) -> nn.Sequential:
        """P Q^T z: first Q^T, then P."""
        last = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(last.weight)
        return nn.Sequential(nn.Linear(inputs, rank, bias=False), last)

    def read_words(self) -> None:
        """From now on the shared readout of U takes, instead of a factor, one number for each word of U's vocabulary."""
        words, rank = self.shared["understanding"].get_parameter("1.weight").shape
        self.shared["understanding"] = self._low_rank(words, rank, words)

    def bias(self, flow: str, factors: Factors, unique: bool = True) -> Tensor:
        """What is added to the logits of a flow: [B, 1, V], or [B, N, V] for G and token-level factors."""
        other = FLOWS[1 - FLOWS.index(flow)]
        source = other if self.injection == "crosswise" else flow
        terms = [(self.shared, factors.shared, source)] + [(self.unique, factors.unique, flow)] * unique
        biases = []
        for readout, factor, where in terms:
            if where not in factor:
                raise ValueError(f"factors of {sorted(factor)} only; the bias of {flow} needs that of {where}")
            z = factor[where]
            z = z[:, None] if z.ndim == 2 else z.mean(1, keepdim=True) if flow == "understanding" else z
            biases.append(readout[flow](z))
        return sum(biases[1:], start=biases[0])

    def forward(
        self, logits: Mapping[str, Float[Tensor, "B _positions _V"]], factors: Factors, unique: bool = True
    ) -> dict[str, Tensor]:
        """s~ of the given flows from their logits s [B, positions, V]; ``unique=False`` in the shared-only phase."""
        if not logits or not set(logits) <= set(FLOWS):
            raise ValueError(f"logits are of flows {sorted(logits)}; expected some of {FLOWS}")
        out = {}
        for flow, s in logits.items():
            bias = self.bias(flow, factors, unique)
            if s.ndim != 3 or s.shape[::2] != bias.shape[::2] or bias.shape[1] not in (1, s.shape[1]):
                raise ValueError(
                    f"{flow} logits are {tuple(s.shape)}, their bias is {tuple(bias.shape)}; expected [B, positions, V], and for "
                    "factors of tokens as many positions as tokens (pool the factors, or the states, if the grids differ)"
                )
            out[flow] = s + bias
        return out
