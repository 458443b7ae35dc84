"""Does LatentUMM keep meaning from drifting? Its parts against fine-tuning with as much time, and against DIVA and RecA.

How arms are matched, tuned and judged is in :mod:`umm_kit.experiments.comparison`. Stage 1 alone is no arm: it trains a map
between a teacher's embeddings and leaves the backbone as it is, so that its drift is the base's. Whoever says less may drift
less: so what captions tell, and how many of them differ, stand beside survival, which alone chooses the learning rate of an arm:
each is to be at its best at what the method is for, and what that costs the two abilities is then seen. (That rule replaced the
mean of survival, understanding and generation after the trials on validation items, before any test item was seen. By the mean
LatentUMM would have had 3e-5, at which the trial hardly differs from the base, and "sft" 1e-3.)
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umm_kit.data.shapes import Nuisance, Shapes
from umm_kit.evaluation.drift import WHOLE, Drift, drift
from umm_kit.evaluation.facts import facts
from umm_kit.experiments import ASYMMETRIC, comparison, diva, endpoints
from umm_kit.experiments.comparison import DECODING, Arm, Study, content_of
from umm_kit.models import load
from umm_kit.trainers.diva import DIVAConfig, DIVATrainer
from umm_kit.trainers.latentumm import LatentUMMConfig, LatentUMMTrainer

_NATIVE: dict[str, Any] = {"preference": "none", "capacity": "generation", "guard": "none"}
_NATIVE |= {f"{part}_weight": 0.0 for part in ("modal", "capacity", "target")}
DIVA_RATE = 1e-5  # the best of four in experiments/diva-tuning.jsonl
ARMS: dict[str, Arm] = {
    "sft": Arm(_NATIVE, "sft", "time"),
    "sft_full": Arm({**_NATIVE, "lora_rank": 0}, "sft_full", "time"),
    "latentumm": Arm({}, "latentumm"),
    "sft_examples": Arm(_NATIVE, "sft", "examples"),
    "no_preference": Arm({"preference": "none"}, "latentumm"),
    "dpo": Arm({**_NATIVE, "preference": "dpo"}, "latentumm"),
    "released": Arm({"variant": "released"}, "latentumm"),
    "reca": Arm(diva.ARMS["reca"].changes, "reca", "time"),
    "diva": Arm({}, rate=DIVA_RATE),
    "diva_latentumm": Arm({}, "latentumm"),
}
OF_DIVA = ("reca", "diva")  # trained by DIVA's trainer


@dataclass(frozen=True)
class Preset(comparison.Preset):
    """Also how drift is measured: so many items (of validation, ``n_drift_tuning``), for so many cycles."""

    n_drift: int = 288
    n_drift_tuning: int = 96
    cycles: int = 8


#: Adapters take higher rates than whole weights: the four are half a decade above those of DIVA's arms.
PRESETS = {"tiny": Preset(rates=(3e-5, 1e-4, 3e-4, 1e-3))}


def config_of(arm: str, preset: comparison.Preset, seed: int, folder: Path, rate: float, steps: int | None = None) -> Any:
    """The configuration of one run, of the trainer that the arm has; ``steps`` replaces those of a plain arm."""
    if ARMS[arm].plain and steps is None:
        raise ValueError("a plain arm needs its number of steps")
    more: dict[str, Any] = {"max_steps": steps} if ARMS[arm].plain else {}
    more |= {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 25}
    more |= {"output_dir": str(folder), "seed": seed, "learning_rate": rate}
    if arm in OF_DIVA:
        return DIVAConfig.tiny(**{**ARMS[arm].changes, **more})
    return LatentUMMConfig.tiny(**{**preset.settings, **ARMS[arm].changes, **more})


def length(preset: comparison.Preset) -> int:
    return int(config_of("latentumm", preset, 0, Path("unused"), 1e-4).max_steps)


def post_train(
    base: str, arm: str, preset: comparison.Preset, seed: int, folder: Path, rate: float, steps: int | None
) -> tuple[Any, dict[str, Any]]:
    """A base model trained on by one arm, and what the run was; "diva_latentumm" is DIVA's two stages, and then LatentUMM's."""
    model, started, data = load(base, device="cpu"), time.process_time(), preset.data(seed)
    if arm == "diva_latentumm":
        DIVATrainer(model, config_of("diva", preset, seed, folder / "diva", DIVA_RATE), data).train()
    config = config_of(arm, preset, seed, folder, rate, steps)
    trainer = (DIVATrainer if arm in OF_DIVA else LatentUMMTrainer)(model, config, data)
    trainer.train()
    content = content_of(config, trainer, started, ARMS[arm])
    if arm not in OF_DIVA:
        content["rollouts"] = trainer.before_and_after()
    return model.eval(), content


def judge(model: Any, split: str, n: int, n_prompts: int, seed: int, preset: Preset) -> dict[str, list[float]]:
    """Both abilities, and what is left of meaning after ``preset.cycles`` cycles (:func:`of_drift`)."""
    found = endpoints(model, split, n, n_prompts, seed, preset.texture, progress=False, inpaint=False, decoding=DECODING)
    items = preset.n_drift if split == "test" else preset.n_drift_tuning
    data = Shapes(split, n=items, seed=seed, nuisance=Nuisance(texture=preset.texture), without=ASYMMETRIC)
    return found | of_drift(drift(model, data, preset.cycles, seed=seed, decoding=DECODING, layers=(), keep=0, progress=False))


def of_drift(found: Drift) -> dict[str, list[float]]:
    """Item by item: what of an item survives, what its caption tells, and whether others' captions are the same.

    - ``survival``: mean over cycles of (A_i - F_i) / (C - F), with the C and F of all items: its mean is that of S(k);
      ``survival_first``, ``survival_last``: of the first and of the last cycle alone.
    - ``told``: facts in the caption after one cycle, right or wrong, things and their number among them.
      ``distinct``: 1 / the number of items with the same last caption.
    """
    found.survival()  # or the reason why there is none
    kept, floor, ceiling = found.shares(WHOLE)
    gap = ceiling.mean() - floor.mean((0, 2))
    survival = ((kept - floor) / gap[None, :, None]).mean(0)
    trace, last = found.traces[0], found.traces[0].texts[2 * found.cycles]
    same = Counter(last)
    values = {
        "survival": survival.mean(0),
        "survival_first": survival[0],
        "survival_last": survival[-1],
        "told": np.array([0 if content is None else len(facts(content)) for content in trace.contents[2]]),
        "distinct": np.array([1 / same[text] for text in last]),
    }
    return {metric: [round(float(v), 4) for v in array] for metric, array in values.items()}


STUDY = Study(
    reference="latentumm",
    arms=ARMS,
    core=("latentumm", "dpo", "sft", "sft_full"),
    rivals=("sft", "sft_full", "sft_examples"),
    endpoints=(
        *("survival", "survival_first", "survival_last", "told", "distinct"),
        *("understanding", "generation", "understanding_loss", "generation_loss"),
    ),
    length=length,
    train=post_train,
    judge=judge,
    headlines=("survival", "understanding", "generation"),
    chosen_by=("survival",),
)
tune, run = STUDY.tune, STUDY.run
