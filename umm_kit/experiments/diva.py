"""Does DIVA help? Its arms against fine-tuning with as much time, over base models and training seeds, on the same test items.

How arms are matched, tuned and judged is in :mod:`umm_kit.experiments.comparison`. Every arm is the trainer of DIVA with other
settings, and sees the same mix of anchors, questions and full drawings.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from umm_kit import published
from umm_kit.data.language import CATEGORIES
from umm_kit.experiments import comparison, endpoints
from umm_kit.experiments.comparison import DECODING, HEADLINES, Arm, Preset, Records, Study, better, content_of, differences
from umm_kit.models import load
from umm_kit.trainers.diva import DIVAConfig, DIVATrainer

#: What the paper compares on Show-o, as our arms: (lower, higher, where the lower stands, where the higher), each a table and a
#: configuration in it. Table 2's first five stand as it has them, each with a part more than the one before.
_TABLE_2 = {
    "base": "base",
    "sft": "SFT",
    "no_unique": "without I_uni",
    "no_stop_gradient": "without stop-gradient",
    "diva": "DIVA",
    "linear": "encoders Linear+LN",
    "transformer": "encoders Transformer",
    "contiguous": "contiguous mask",
}
_ORDER = list(_TABLE_2)[:5]
PAPER_PAIRS: tuple[tuple[str, str, tuple[int, str], tuple[int, str]], ...] = (
    *(
        (a, b, (2, _TABLE_2[a]), (2, _TABLE_2[b]))
        for a, b in [("base", "diva"), ("sft", "diva"), *itertools.pairwise(_ORDER), *((c, "diva") for c in list(_TABLE_2)[5:])]
    ),
    ("unique_0.4", "diva", (4, "lambda_uni=0.4"), (4, "lambda_uni=0.6")),
    ("unique_0.8", "diva", (4, "lambda_uni=0.8"), (4, "lambda_uni=0.6")),
    ("reca", "diva", (6, "RecA"), (1, "DIVA")),
)
_TABLE_9 = {name: name.replace("_", " ").title().replace("Attribution", "Attribute") for name in CATEGORIES}
BENCHMARKS = {"understanding": ("MMMU", "POPE"), "generation": ("GenEval", "DPG-Bench")}

_PLAIN: dict[str, Any] = {"shared_weight": 0.0, "unique_weight": 0.0, "ema_decay": 0.0}
_ALL: dict[str, Any] = {**_PLAIN, "train_all_layers": True}
ARMS: dict[str, Arm] = {
    "sft_all": Arm(_ALL, "sft_all", "time"),
    "sft_middle": Arm(_PLAIN, "sft_middle", "time"),
    "diva": Arm({}, "diva"),
    "sft_all_examples": Arm(_ALL, "sft_all", "examples"),
    "sft_middle_examples": Arm(_PLAIN, "sft_middle", "examples"),
    "pcgrad": Arm({**_PLAIN, "project_conflicts": True}, "pcgrad", "time"),
    "reca": Arm({**_PLAIN, "reconstruction_weight": 1.0}, "reca", "time"),
}
_ABLATIONS: dict[str, dict[str, Any]] = {
    "no_unique": {"unique_weight": 0.0},
    "no_stop_gradient": {"stop_gradient": False},
    "all_layers": {"layers": [1, 2, 3, 4]},
    "last_layer": {"layers": [4]},
    "linear": {"encoder": "linear"},
    "transformer": {"encoder": "transformer"},
    "contiguous": {"mask_layout": "contiguous"},
    "equalised": {"equalise_gradients": True},
    "released": {"variant": "released"},
    "corrected": {"variant": "corrected"},
    "shuffled": {"pairs": "shuffled"},
    "bag_of_words": {"bag_of_words": True},
    "random_encoders": {"random_encoders": True},
    "unique_0.4": {"unique_weight": 0.4},
    "unique_0.8": {"unique_weight": 0.8},
    "unique_0.06": {"unique_weight": 0.06},
    "no_shared": {"shared_weight": 0.0},
    "aligned_warm_up": {"stage1_alignment": True},
}
ARMS |= {name: Arm(changes, "diva") for name, changes in _ABLATIONS.items()}
PRESETS = {"tiny": Preset()}


def config_of(arm: Arm, preset: Preset, seed: int, folder: Path, rate: float, steps: int | None = None) -> DIVAConfig:
    """The configuration of one run; ``steps`` replaces those of a plain arm."""
    if arm.plain and steps is None:
        raise ValueError("a plain arm needs its number of steps")
    more = {"max_steps": steps} if arm.plain else {}
    quiet = {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 50}
    quiet |= {"output_dir": str(folder), "seed": seed, "learning_rate": rate}
    return DIVAConfig.tiny(**{**preset.settings, **arm.changes, **more, **quiet})


def length(preset: Preset) -> int:
    """Steps of both stages."""
    config = config_of(ARMS["diva"], preset, 0, Path("unused"), 1e-4)
    return config.stage1_steps + config.max_steps


def post_train(
    base: str, arm: str | Arm, preset: Preset, seed: int, folder: Path, rate: float, steps: int | None
) -> tuple[Any, dict[str, Any]]:
    """A base model trained on by one arm, and what the run was."""
    arm = ARMS[arm] if isinstance(arm, str) else arm
    model, config = load(base, device="cpu"), config_of(arm, preset, seed, folder, rate, steps)
    started = time.process_time()
    trainer = DIVATrainer(model, config, preset.data(seed))
    trainer.train()
    return model.eval(), content_of(config, trainer, started, arm)


def judge(model: Any, split: str, n: int, n_prompts: int, seed: int, preset: Preset) -> dict[str, list[float]]:
    return endpoints(model, split, n, n_prompts, seed, preset.texture, progress=False, inpaint=False, decoding=DECODING)


def against_paper(records: Records) -> pd.DataFrame:
    """Is what the paper found better also better here? Pairs of arms, by ability; "sft" is the better fine-tuning.

    ``published`` is higher - lower on each of the paper's benchmarks, which are other tasks in other units: only signs compare.
    *reproduced* if our :func:`comparison.interval` lies on the side that all of them are on, *reversed* if on the other,
    *undecided* if it holds 0; *the paper is divided* if its benchmarks differ in sign, or one has none; *not run*: no records,
    whatever the paper says.

    Returns:
        Columns source (its table), metric, lower, higher, published, here, low, high, runs, verdict.
    """
    table = published.load("diva_tables").query("model == 'Show-o'")
    value = table.set_index(["table", "config", "metric"]).value.to_dict()
    rows = []
    for metric, benchmarks in BENCHMARKS.items():
        ours = {"sft": better(records, metric, STUDY.rivals)}
        for lower, higher, below, above in PAPER_PAIRS:
            both = [name for name in benchmarks if (*below, name) in value and (*above, name) in value]
            theirs = {name: value[(*above, name)] - value[(*below, name)] for name in both}
            row: dict[str, Any] = {"source": f"Table {below[0]}", "metric": metric, "lower": lower, "higher": higher}
            row["published"] = ", ".join(f"{name} {gain:+.3g}" for name, gain in theirs.items())
            sides = {int(np.sign(round(gain, 9))) for gain in theirs.values()}  # .75 - .75 may not be 0
            tree, said = differences(records, ours.get(higher, higher), ours.get(lower, lower), metric), "not run"
            if len(tree) > 1:
                e, _ = comparison.interval(tree)
                row |= {"here": e.value, "low": e.low, "high": e.high, "runs": sum(map(len, tree))}
                side = int(e.low > 0) - int(e.high < 0)
                said = "undecided" if not side else "reproduced" if sides == {side} else "reversed"
            if sides not in ({1}, {-1}):
                row["published"] += " (divided)"
                said = said if said == "not run" else "the paper is divided"
            row["verdict"] = said
            rows.append(row)
    columns = ["source", "metric", "lower", "higher", "published", "here", "low", "high", "runs", "verdict"]
    return pd.DataFrame(rows, columns=columns).astype({"runs": "Int64"})


def by_category(records: Records, arm: str = "diva", other: str = "base") -> pd.DataFrame:
    """Gain arm - other on each of GenEval's categories, beside that of DIVA over its base in the paper (Table 9, Show-o).

    Returns:
        Columns category, published, here, low, high (shares of prompts; 95 % interval), runs, n (prompts), verdict.
    Raises:
        ValueError: fewer than two base models have both.
    """
    table = published.load("diva_tables").query("table == 9 and model == 'Show-o'").set_index(["config", "metric"]).value
    tree = differences(records, arm, other, "generation")
    if len(tree) < 2:
        raise ValueError(f"{len(tree)} base models have records of both {arm} and {other}; expected two at least")
    rows = []
    for k, category in enumerate(CATEGORIES):
        name = _TABLE_9[category]
        mine = [[run.reshape(len(CATEGORIES), -1)[k] for run in seeds] for seeds in tree]  # prompts stand category by category
        e, _ = comparison.interval(mine)
        gain = float(table["DIVA", name] - table["base", name])
        side = int(e.low > 0) - int(e.high < 0)
        said = "undecided" if not side else "reproduced" if side == np.sign(gain) else "reversed"
        rows.append((category, gain, e.value, e.low, e.high, sum(map(len, mine)), mine[0][0].size, said))
    return pd.DataFrame(rows, columns=["category", "published", "here", "low", "high", "runs", "n", "verdict"])


def _paper(records: Records) -> str:
    table = against_paper(records).to_string(index=False, float_format="%.4f", na_rep="-")
    return f"\nWhat the paper found better, higher - lower (its benchmarks; our tasks):\n{table}"


STUDY = Study(
    reference="diva",
    arms=ARMS,
    core=("diva", "sft_middle", "sft_all"),
    rivals=tuple(name for name, arm in ARMS.items() if name.startswith("sft")),
    endpoints=(*HEADLINES, "understanding_loss", "generation_loss", "understood_of_drawn", "drawn_of_understood"),
    length=length,
    train=post_train,
    judge=judge,
    causes=("no_unique", "no_shared", "unique_0.06", "aligned_warm_up", "corrected"),  # what may be wrong with DIVA
    more=_paper,
)
tune, run = STUDY.tune, STUDY.run
