"""The card of a shipped model: README.md beside the weights, written from its run record and its scores, never by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_WORLDS = {"shapes": "pictures of one to four coloured shapes", "digits": "scans of handwritten digits"}


def learning_curves(log: list[dict[str, Any]]) -> Figure:
    """Training and validation loss of both flows, or of a model without flows, against the step, from the log of a run."""
    panels = {"understanding_loss": "understanding", "generation_loss": "generation"}
    unit = "nats per supervised token"
    if not any(name in entry for name in panels for entry in log):
        panels, unit = {"loss": ""}, "loss in nats"
    figure = Figure(figsize=(0.7 + 3.15 * len(panels), 2.6), layout="constrained")
    for axis, (loss, title) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        for name, style, label in ((loss, "-", "training"), (f"eval_{loss}", "o--", "validation")):
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            if points:
                axis.plot(*zip(*points, strict=True), style, markersize=3, label=label)
        axis.set(xlabel="step", ylabel=unit, title=title)
        axis.legend(frameon=False)
    return figure


def write_card(folder: str | Path) -> Path:
    """Write README.md and curves.png for a model folder that holds run.json, and scores*.json if it was evaluated.

    Raises:
        ValueError: no run.json in the folder.
    """
    folder = Path(folder)
    if not (folder / "run.json").exists():
        raise ValueError(f"{folder} has no run.json; only models that umm-kit train wrote can have a card")
    run, config = (json.loads((folder / name).read_text()) for name in ("run.json", "config.json"))
    world = _WORLDS.get(data := run["config"].get("data", "shapes"), data)
    learning_curves(run["log"]).savefig(folder / "curves.png", dpi=110)
    minutes = run["wall_seconds"] / 60
    lines = [
        f"# {folder.name}",
        "",
        f"`{config['architectures'][0]}`, trained on {world}; it knows nothing else: made for looking inside, not for use.",
        "",
        f"Made by `{run['command']}` (seed {run['seed']}) in {minutes:.0f} minutes on {run['device']}; "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        + f". {run['parameters']:,} trainable parameters. Licence Apache-2.0.",
        "",
        "Settings that differ from the defaults: " + (", ".join(f"{k} = {v}" for k, v in run["config"].items()) or "none") + ".",
        "",
        "![learning curves](curves.png)",
    ]
    if "image_tokenizer" in run:
        made = run["image_tokenizer"]
        scores = ", ".join(f"{name} {value:.4g}" for name, value in made["scores"].items())
        minutes = made["wall_seconds"] / 60
        lines[6:6] = [f"Its image tokenizer was made first, by `{made['command']}` in {minutes:.0f} minutes: {scores}.", ""]
    for path in sorted(folder.glob("scores*.json")):
        scores = json.loads(path.read_text())
        lines += ["", f"Scores, by `{scores['record']['command']}` (NOTATION.md of umm_kit says what each is the share of):", ""]
        lines += ["| metric | value | 95 % interval | n |", "|---|---|---|---|"]
        for row in scores["metrics"]:
            interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
            lines.append(f"| {row['metric']} | {row['value']:.3f} | {interval} | {row['n']} |")
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    return folder / "README.md"
