"""The figures in ``figures/``: each is drawn from one file of numbers that says how it was made, never from typed-in values.

To make a figure again from the start, run the command that its file records, then ``umm-kit figures``. Files are drawn as
PNG and PDF without dates, so that the same numbers give the same bytes on one machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.style
import pandas as pd
from matplotlib.figure import Figure

from umm_kit import plots
from umm_kit.diagnostics.report import Diagnosis
from umm_kit.evaluation.audit import HIGH, LEAK
from umm_kit.models import CHECKPOINTS
from umm_kit.models.card import learning_curves
from umm_kit.statistics import wilson


def _read(path: Path, key: str) -> Any:
    """One entry of a file of numbers; "rows" are those of a frame."""
    found = json.loads(path.read_text())[key]
    return pd.DataFrame(found) if key == "rows" else found


def conflict_along(frame: pd.DataFrame) -> Figure:
    """Gradient conflict along a training, for a shallow, a middle and a deep layer.

    Args:
        frame: as :func:`umm_kit.diagnostics.gradients.conflict_along` returns it.
    """
    layers = list(frame.layer.unique())
    chosen = {"shallow": layers[0], "middle": layers[len(layers) // 2], "deep": layers[-1]}
    titles = {
        "conflict": ("conflict of U and G", "1 - cos"),
        "within_understanding": ("noise ceiling of U", "cos within U"),
        "within_generation": ("noise ceiling of G", "cos within G"),
        "disattenuated_cosine": ("without the noise", "disattenuated cos"),
    }
    panels = []
    for metric, (title, unit) in titles.items():
        series = {}
        for where, layer in chosen.items():
            rows = frame[(frame.metric == metric) & (frame.layer == layer)].sort_values("step")
            series[f"{where} ({layer})"] = (rows.step, rows.value, rows.low, rows.high)
        panels.append(plots.Panel(title, f"training step (n = {frame.n.max()} pairs)", unit, series))
    return plots.curves(panels, columns=4, size=(2.6, 2.6))


def calibration(frame: pd.DataFrame) -> Figure:
    """Estimates of mutual information against the truth, on Gaussian pairs; CLUB and NCE-CLUB against what they bound by.

    Args:
        frame: columns family, method, truth, upper, value, low, high, as ``benchmarks/mutual_information.py`` writes them.
    """
    gaussian = frame[frame.family == "gaussian"].sort_values("truth")
    panels = []
    for title, methods, target, unit in (
        ("estimates of I", ("ksg", "gaussian", "infonce"), "truth", "I (nats)"),
        ("CLUB and NCE-CLUB", ("club", "nceclub"), "upper", "I + KL(p_x p_y || p_xy) (nats)"),
    ):
        end = gaussian[target].max()
        series: dict[str, Any] = {"exact": ([0, end], [0, end])}
        for method in methods:
            rows = gaussian[gaussian.method == method]
            series[method] = (rows[target], rows.value, rows.low, rows.high)
        panels.append(plots.Panel(title, f"{unit}, n = {gaussian.n.max()}", "estimate (nats)", series, nulls=("exact",)))
    return plots.curves(panels, columns=2, size=(3.3, 2.8))


def interference_atlas(frame: pd.DataFrame) -> Figure:
    """What the other task costs each task, by width, texture and seed: above 0 it hurts.

    Args:
        frame: as :func:`umm_kit.experiments.atlas.interference` returns it.
    """
    titles = {
        "understanding_loss": "understanding: nats",
        "generation_loss": "generation: nats",
        "understanding": "understanding: share",
        "generation": "generation: share",
    }
    named = {"width": "width {}", "texture": "texture {}", "every": "1 in {}", "steps": "{:,} steps", "seed": "seed {}"}
    frame = frame[frame.groupby(list(named)).metric.transform("nunique") == frame.metric.nunique()]
    frame = frame.sort_values(list(named), ascending=[True, False, False, True, True])
    told = [name for name in named if frame[name].nunique() > 1] or ["seed"]  # what all have in common says nothing
    panels = {}
    for metric, title in titles.items():
        rows = frame[frame.metric == metric]
        labels = (", ".join(named[name].format(row[name]) for name in told) for _, row in rows.iterrows())
        effects = zip(rows.interference, rows.low, rows.high, strict=True)
        panels[f"{title}\nn = {rows.n.min()}"] = [(label, *effect) for label, effect in zip(labels, effects, strict=True)]
    return plots.forest(panels, "interference\n(above 0: the other hurts)", columns=2)


def _atlas(path: Path) -> Figure:
    from umm_kit.experiments import Ledger, atlas  # with its trainers it takes seconds to import

    return interference_atlas(atlas.interference(Ledger(path).records()))


_ENDPOINT_TITLES = {
    "survival": "survival, mean over the cycles",
    "survival_first": "survival after one cycle",
    "told": "facts in a caption",
    "distinct": "captions nobody else has (share)",
    "understanding": "understanding (share)",
    "generation": "generation (share)",
    "understanding_loss": "understanding loss (nats)",
    "generation_loss": "generation loss (nats)",
    "understood_of_drawn": "understood of what was drawn",
    "drawn_of_understood": "drawn of what was understood",
}


def arms(frame: pd.DataFrame, against: str = "sft") -> Figure:
    """What each arm gains over the better fine-tuning (``against="base"``: over its own base), endpoint by endpoint.

    Above 0 = better, of losses too. An arm is not compared with itself: fine-tuning that is the better one has no row. There is a
    panel for each endpoint that the frame has.

    Args:
        frame: as ``umm_kit.experiments.comparison.effects`` returns it.
    """
    gain, rows = f"over_{against}", frame.dropna(subset=[f"over_{against}"])
    compared = rows.groupby("arm").metric.nunique()
    names = [arm for arm in dict.fromkeys(rows.arm) if compared[arm] == compared.max()]
    panels = {}
    for metric in (m for m in _ENDPOINT_TITLES if (rows.metric == m).any()):
        some = rows[rows.metric == metric].set_index("arm")
        values = [(arm, *some.loc[arm, [gain, f"{against}_low", f"{against}_high"]]) for arm in names]
        panels[f"{_ENDPOINT_TITLES[metric]}\nn = {some.n.min():,}"] = values
    return plots.forest(panels, "gain over " + ("the base" if against == "base" else "better fine-tuning"), columns=2)


def frontier(points: pd.DataFrame) -> Figure:
    """Both losses of each arm under each ratio of weights: down and left is better (DIVA Fig. 6).

    Args:
        points: as :func:`umm_kit.experiments.frontier.frontier` returns them.
    """
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    ax = figure.subplots()
    for k, (arm, rows) in enumerate(points.groupby("arm", sort=False)):
        rows = rows.sort_values("ratio")
        x, y = rows.generation_loss, rows.understanding_loss
        ax.plot(x, y, marker="osD^"[k % 4], markersize=4, color=f"C{k}", linewidth=1.2, label=arm)
        ax.hlines(y, rows.generation_loss_low, rows.generation_loss_high, color=f"C{k}", linewidth=0.8, alpha=0.6)
        ax.vlines(x, rows.understanding_loss_low, rows.understanding_loss_high, color=f"C{k}", linewidth=0.8, alpha=0.6)
        if len(rows) > 1:
            for row in rows.itertuples():
                place = (row.generation_loss, row.understanding_loss)
                ax.annotate(f"{row.ratio:g}", place, xytext=(3, 3), textcoords="offset points", fontsize=plots.TEXT_SIZE - 2)
    ax.set(xlabel="generation loss (nats per token)", ylabel="understanding loss (nats per token)")
    ax.legend(title="numbers: weight of U over G", fontsize=plots.TEXT_SIZE - 1, title_fontsize=plots.TEXT_SIZE - 1)
    return figure


def planted_levels(frame: pd.DataFrame) -> Figure:
    """Levels of each arm of the planted experiment, a point per seed; the dashed line is what is asked of the method.

    Args:
        frame: as :func:`umm_kit.experiments.planted.levels` returns it.
    """
    asked = {"recovery shared": HIGH, "recovery unique": HIGH, "leakage shared": LEAK, "leakage unique": LEAK}
    names = list(dict.fromkeys(frame.index.get_level_values("arm")))
    figure = Figure(figsize=(9.0, 0.75 + 0.22 * len(names)), layout="constrained")
    for ax, (level, limit) in zip(figure.subplots(1, 4, sharey=True), asked.items(), strict=True):
        for y, arm in enumerate(names):
            values = frame.loc[arm, level]
            ax.plot(values, [y] * len(values), "o", color="C0", markersize=3.5, alpha=0.7)
        ax.axvline(limit, color="0.4", linewidth=0.9, linestyle="--")
        worse = "lower = worse" if level.startswith("recovery") else "higher = worse"
        seeds = frame.index.get_level_values("seed").nunique()
        ax.set(
            title=level, xlabel=f"share of what h holds\n({worse}; {seeds} mixings)", yticks=range(len(names)), yticklabels=names
        )
        ax.set_ylim(len(names) - 0.5, -0.5)
    return figure


def oracle_honesty(pictures: Mapping[str, Mapping[str, float]]) -> Figure:
    """How far the oracle can be trusted: pictures read without any error, prompts with one wrong attribute that it lets pass.

    Intervals are Wilson's; those of accepted prompts take the prompts of one picture for independent, and are too narrow.

    Args:
        pictures: kind of damage -> shares and counts, as :func:`umm_kit.evaluation.reconstruction.audit_pictures` returns them.
    """
    panels = {
        "whole picture read right": ("exact", "n", 1.0, "share"),
        "wrong without a sign of it": ("silent", "n", 100.0, "%"),
        "wrong prompt accepted": ("false_accept", "n_edits", 100.0, "%"),
    }
    figure = Figure(figsize=(8.2, 2.4), layout="constrained")
    for ax, (title, (share, count, scale, unit)) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        for y, kind in enumerate(pictures.values()):
            n = int(kind[count])
            low, high = wilson(round(kind[share] * n), n)
            ax.plot([scale * low, scale * high], [y, y], color="C0", linewidth=1.2)
            ax.plot(scale * kind[share], y, "o", color="C0", markersize=4)
        ax.set(title=title, xlabel=f"{unit} (n = {n:,})", yticks=range(len(pictures)), yticklabels=list(pictures))
        ax.set_ylim(len(pictures) - 0.5, -0.5)
    return figure


def drift(rows: Any) -> Figure:
    """What survives the cycles, what bounds it, by category, and where latents go.

    Args:
        rows: as ``umm-kit drift --output`` writes them.
    """
    frame = pd.DataFrame(rows)
    kinds = frame[frame.metric.str.startswith("survival of ")]
    return plots.drift(frame, kinds.assign(category=kinds.metric.str.removeprefix("survival of ")))


def _planted(path: Path) -> Figure:
    from umm_kit.experiments import Ledger, planted

    return planted_levels(planted.levels(planted.frame_of(Ledger(path).records())))


def _scores(path: Path) -> Figure:
    content = json.loads(path.read_text())
    frame = pd.DataFrame(content["metrics"])
    better = ~frame.metric.str.contains("yes_rate|unreadable")  # of the others, higher is better
    return plots.scores(frame[better], content["chance"])


#: name -> its numbers, in figures/data, in the records of an experiment or in the folder of a shipped model; how they are drawn
FIGURES: dict[str, tuple[Path, Callable[[Path], Figure]]] = {
    "diagnosis": (Path("data/diagnosis.json"), lambda path: Diagnosis.load(path).plot()),
    "conflict_along": (Path("data/conflict_along.json"), lambda path: conflict_along(_read(path, "rows"))),
    "mutual_information": (Path("data/mutual_information.json"), lambda path: calibration(_read(path, "rows"))),
    "oracle": (Path("data/oracle.json"), lambda path: oracle_honesty(_read(path, "oracle"))),
    "drift": (Path("data/drift.json"), lambda path: drift(_read(path, "rows"))),
    "interference": (Path("../experiments/atlas.jsonl"), _atlas),
    "planted": (Path("../experiments/planted.jsonl"), _planted),
    "scores": (CHECKPOINTS / "tiny-masked/scores.json", _scores),
    "training": (CHECKPOINTS / "tiny-masked/run.json", lambda path: learning_curves(_read(path, "log"))),
}


def redraw(folder: str | Path = "figures") -> list[Path]:
    """Draw each figure to ``folder``/NAME.png and NAME.pdf, in the style of ``folder``/umm.mplstyle.

    Raises:
        ValueError: a file of numbers is missing.
    """
    folder, saved = Path(folder), []
    if missing := [str(folder / path) for path, _ in FIGURES.values() if not (folder / path).exists()]:
        raise ValueError(f"{missing} are missing; run this in a clone of the repository, or name its folder of figures")
    formats: dict[str, dict[str, Any]] = {
        ".png": {"dpi": 200, "metadata": {"Software": None}},
        ".pdf": {"metadata": {"CreationDate": None}},
    }
    with matplotlib.style.context(["default", {"pdf.fonttype": 42}, str(folder / "umm.mplstyle")]):
        for name, (path, draw) in FIGURES.items():
            figure = draw(folder / path)
            for suffix, options in formats.items():
                saved.append(folder / (name + suffix))
                figure.savefig(saved[-1], **options)
    return saved
