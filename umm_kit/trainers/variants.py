"""Configuration of DIVA, and what changes with its variant: the paper, the code its authors published, our corrections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import HfArg

from umm_kit.models.factors import INJECTIONS, KINDS
from umm_kit.trainers.base import PostTrainArguments

PENALTIES = ("across", "within")
PAIRS = ("true", "shuffled")

# fmt: off
_VARIED = {
    #                               paper        released     corrected
    "injection":                   ("crosswise", "own",       "crosswise"),
    "penalty":                     ("across",    "within",    "across"),
    "encoder":                     ("gated",     "shallow",   "gated"),
    "rank":                        (24,          64,          24),
    "single_layer":                (False,       True,        False),
    "train_all_layers":            (False,       True,        False),
    "train_encoders":              (False,       True,        False),
    "stage1_alignment":            (False,       True,        True),
    "stage1_penalty":              (False,       False,       True),
    "orthogonality_weight":        (0.2,         0.0,         0.2),
    "stage2_orthogonality_weight": (0.0,         0.1,         0.0),
    "orthogonality":               ("batch",     "batch",     "overlap"),
    "mask_equal_facts":            (False,       False,       True),
    "queue":                       (0,           0,           256),
    "ema_decay":                   (0.999,       0.0,         0.999),
}
# fmt: on
#: variant -> option -> value, for options that were not chosen
VARIANTS: dict[str, dict[str, Any]] = {
    name: {option: values[k] for option, values in _VARIED.items()} for k, name in enumerate(("paper", "released", "corrected"))
}


def varied(text: str) -> Any:
    """An option that :data:`VARIANTS` fills unless it is chosen; its type is that of the values there."""
    return HfArg(default=None, help=f"{text} By default the variant's.")


def take_variant(config: Any, variants: Mapping[str, Mapping[str, Any]]) -> None:
    """Set every option of ``config.variant`` that was not chosen; ValueError for an unknown variant."""
    if config.variant not in variants:
        raise ValueError(f"variant is {config.variant!r}; expected one of {tuple(variants)}")
    for name, value in variants[config.variant].items():
        if getattr(config, name) is None:
            setattr(config, name, value)


@dataclass
class DIVAConfig(PostTrainArguments):
    """Configuration of :class:`DIVATrainer`; defaults are the paper's for Show-o (Tables 7, 8), its layers 8-18 of 24 scaled.

    The paper does not state factor_size, temperature, ramp_share and replay_every. Its batch is 6 on each of 8 GPUs, 12 times
    accumulated; a batch of 6 alone would bound InfoNCE by log 6 = 1.8 nats.

    ``variant`` sets the options of :data:`VARIANTS` that were not chosen, and nothing else:

    - "paper": the formulas as printed.
    - "released": the training script that its authors published and withdrew (2234dba, which does not parse). Biases from the
      flow's own shared factor; CLUB between shared and unique factor *within* each flow instead of NCE-CLUB between unique ones
      across flows; encoders with one layer beside the gate, trained in both stages; InfoNCE in stage 1, orthogonality (.1) in
      stage 2 only; one layer, 16 of 24; every parameter of the backbone trained; rank 64, cut to what factors and vocabularies
      allow; no averaged copy. It departs from that script where this kit has no other way: factors read the mean over *image*
      tokens, not over all; ramps, schedule, InfoNCE's temperature and weights, CLUB's networks, and stage 1's first half without
      unique factors are the paper's or ours.
    - "corrected": the paper, but orthogonality without scale (Eq. 9 as printed grows with the fourth power of the factors'
      scale: it starts at several hundred times the task losses at factor size 64, and shrinking factors satisfies it); pairs
      that say the same are no negatives of each other (in a small world many do); targets of earlier batches are negatives too
      (log 48 bounds what 48 anchors can show); and alignment and penalty act on the encoders already. As printed, stage 1 asks
      only that factors help the tasks, and its unique ones hold much of what both flows share: where the split was planted, .17
      of it, against .04 with both terms (``umm-kit reproduce planted``). On frozen encoders, stage 2's penalty can only change
      the backbone's states. What Eq. 7 needs to mean anything, a critic that keeps learning and is silent below .1 nats on
      pairs new to it, is in "paper" as well; the CLUB of "released" always pushes.
    """

    output_dir: str | None = "runs/diva"
    variant: str = HfArg(default="paper", help="'paper', 'released' or 'corrected'.")
    stage1_steps: int = 2000
    stage1_learning_rate: float = 2e-4
    stage1_warmup_steps: int = 200
    shared_only: float = HfArg(default=0.5, help="Share of stage 1 before the unique factors join.")
    stage1_alignment: bool = varied("InfoNCE between shared factors in stage 1 too, at shared_weight.")
    stage1_penalty: bool = varied("The penalty on unique factors in stage 1 too, at unique_weight.")
    orthogonality_weight: float = varied("In stage 1.")
    stage2_orthogonality_weight: float = varied("In stage 2.")
    orthogonality: str = varied("Reading of Eq. 9: 'batch' or 'sample'; 'overlap': free of scale, in [0, 1].")
    factor_size: int = 64
    encoder: str = varied("'gated', 'shallow', 'linear' or 'transformer' (then on tokens, not pooled).")
    rank: int = varied("Of the readouts; cut to what factors and vocabularies allow.")
    injection: str = varied("'crosswise' or 'own', see Readouts.")
    layers: list[int] = HfArg(default_factory=list, help="Layers to factorize and train; empty: the middle ones.")
    single_layer: bool = varied("With no layers chosen, one at two thirds of the depth instead of all middle ones.")
    train_all_layers: bool = varied("Stage 2 trains all parameters, not only the middle.")
    train_encoders: bool = varied("Stage 2 trains the encoders too.")
    lora_rank: int = HfArg(default=0, help="Of adapters on linear maps of trained layers, merged at the end; 0: full weights.")
    shared_weight: float = 0.6
    unique_weight: float = 0.6
    penalty: str = varied("On unique factors: 'across' flows (NCE-CLUB, Eq. 7) or 'within' each (CLUB as released).")
    ramp_share: float = HfArg(
        default=0.5, help="Share of stage 2 in which factor terms rise linearly from 0 (the penalty in stage 1's second part)."
    )
    understanding_weight: float = 1.0
    generation_weight: float = 1.0
    equalise_gradients: bool = HfArg(default=False, help="Scale both task gradients to the mean of their norms, before weights.")
    stop_gradient: bool = HfArg(default=True, help="Alignment is directed (Eq. 10); False: symmetric.")
    temperature: float = 0.1
    mask_equal_facts: bool = varied("Pairs that say the same are no negatives of each other.")
    queue: int = varied("Targets of earlier batches kept as further negatives (directed only).")
    pairs: str = HfArg(default="true", help="'shuffled' is a control: all of DIVA sees U of one anchor with G of the next.")
    random_encoders: bool = HfArg(default=False, help="A control: no stage 1, encoders stay as they were drawn.")
    bag_of_words: bool = HfArg(default=False, help="Control of stage 1: U's shared bias reads the words G was shown, not z_sh^G.")
    ema_role: str = HfArg(default="targets", help="Averaged weights are alignment's 'targets' (paper), or the final 'weights'.")
    reconstruction_weight: float = HfArg(
        default=0.0, help="Of drawing each image again from U's states (after RecA; a baseline)."
    )
    project_conflicts: bool = HfArg(default=False, help="PCGrad between the two task losses (a baseline).")
    max_steps: int = 12_000
    per_device_train_batch_size: int = 64
    learning_rate: float = 3e-5
    warmup_steps: float = 800
    weight_decay: float = 0.01
    ema_decay: float = varied("Decay of the averaged weights; 0 is off.")
    save_steps: float = 500

    def __post_init__(self) -> None:
        take_variant(self, VARIANTS)
        expected = {
            "ema_role": ("targets", "weights"), "orthogonality": ("batch", "sample", "overlap"), "penalty": PENALTIES,
            "pairs": PAIRS, "injection": INJECTIONS, "encoder": KINDS,
        }  # fmt: skip
        for name, known in expected.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {known}")
        for name in ("shared_only", "ramp_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share in [0, 1]")
        weights = ("shared_weight", "unique_weight", "orthogonality_weight", "stage2_orthogonality_weight")
        weights += ("understanding_weight", "generation_weight", "reconstruction_weight", "lora_rank", "queue")  # type: ignore[assignment]
        if negative := [name for name in weights if getattr(self, name) < 0]:
            raise ValueError(f"{negative} are negative; expected at least 0")
        anchors = self.per_device_train_batch_size * (1 - 1 / self.replay_every if self.replay_every else 1)
        if self.factors and anchors < 2:
            raise ValueError(
                f"per_device_train_batch_size {self.per_device_train_batch_size} with replay_every {self.replay_every} leaves a "
                "batch fewer than two anchors, and InfoNCE contrasts at least 2 pairs; raise per_device_train_batch_size"
            )
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers are {self.layers}; expected each once")
        if self.queue and not self.stop_gradient:
            raise ValueError(f"queue is {self.queue}, but without stop_gradient the alignment is symmetric and takes no queue")
        against = {
            ("random_encoders", "train_encoders"): "the first keeps encoders as they were drawn",
            ("equalise_gradients", "project_conflicts"): "they are two ways to combine the task gradients",
        }
        for (one, other), why in against.items():
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"{one} and {other} are both on, but {why}; choose one")
        terms = ("shared_weight", "unique_weight", "stage2_orthogonality_weight", "reconstruction_weight")
        if self.project_conflicts and (beside := [name for name in terms if getattr(self, name)]):
            raise ValueError(f"project_conflicts mixes the two task losses alone, but {beside} are above 0; set these to 0")
        if self.bag_of_words and self.injection != "crosswise":
            raise ValueError(f"bag_of_words stands for what crosswise injection leaks, but injection is {self.injection!r}")
        super().__post_init__()

    @property
    def factors(self) -> bool:
        """Whether stage 2 has any term on factors; fine-tuning without one needs no encoders."""
        return max(self.shared_weight, self.unique_weight, self.stage2_orthogonality_weight) > 0

    @classmethod
    def tiny(cls, **changes: Any) -> DIVAConfig:
        """Minutes on a laptop, for 4 to 12 layers: fewer steps at higher rates, a rank fit for a small vocabulary, and the
        orthogonality without scale (Eq. 9 as printed starts at several hundred times the task losses at factor size 64). Options
        in which another variant differs from the paper stay as that variant has them."""
        small: dict[str, Any] = dict(stage1_steps=200, stage1_learning_rate=1e-3, stage1_warmup_steps=20, rank=8, factor_size=32)
        small |= dict(orthogonality="overlap")
        small |= dict(max_steps=300, learning_rate=3e-4, warmup_steps=30, ema_decay=0.99, save_steps=100)
        paper, chosen = VARIANTS["paper"], VARIANTS.get(changes.get("variant", "paper"), {})
        small = {name: value for name, value in small.items() if chosen.get(name) == paper.get(name)}
        return cls(**{**small, **changes})
