"""Long experiments: named runs whose records are lines of one file, so that a stopped experiment goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from umm_kit.data.shapes import ONE_FLOW, Nuisance, Shapes
from umm_kit.evaluation import generation, understanding
from umm_kit.evaluation.understanding import Examiner
from umm_kit.features import Features, evaluating, extract
from umm_kit.models.base import Decoding
from umm_kit.records import command, machine, versions

#: Scenes with one of these are kept from one flow (PretrainConfig.asymmetric), and from every other comparison.
ASYMMETRIC = (*ONE_FLOW["understanding"], *ONE_FLOW["generation"])


@dataclass
class Ledger:
    """The runs of one experiment: a file of JSON lines, one per finished run, each with its ``name``.

    Lines are appended whole, so several processes may share a file; the runs of two files are those of both. With a ``preset``
    each keeps the sizes and settings it was made with (its tuples, such as seeds, say which runs there are, not how they go).
    """

    path: Path
    preset: Any = None

    @property
    def settings(self) -> dict[str, Any]:
        """Of the preset and of presets within it, as they are written."""
        kept = lambda pairs: {k: v for k, v in pairs if isinstance(v, bool | int | float | str | dict)}  # noqa: E731
        return {} if self.preset is None else json.loads(json.dumps(asdict(self.preset, dict_factory=kept)))

    def records(self) -> dict[str, dict[str, Any]]:
        """Finished runs by name. A line that a full disk cut short is no run; the next one starts on a line of its own.

        Raises:
            ValueError: a run of another preset, whose numbers these runs' cannot stand beside.
        """
        out = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            out[record["name"]] = record
            made = record.get("preset", {})
            if other := [f"{k} {made[k]} (now {v})" for k, v in self.settings.items() if made.get(k, v) != v]:
                raise ValueError(f"{self.path} holds {record['name']!r} with {', '.join(other)}; choose another --records")
        return out

    def add(self, name: str, content: Mapping[str, Any]) -> None:
        """Append one run with what stands behind its numbers."""
        record = {"name": name, "command": command(), "versions": versions(), "device": machine(), **content}
        record |= {"preset": self.settings} if self.preset is not None else {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = not self.path.exists() or not self.path.stat().st_size or self.path.read_bytes().endswith(b"\n")
        line = ("" if whole else "\n") + json.dumps(record, default=str) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)


def mine(runs: Sequence[Any], part: tuple[int, int], done: Callable[[Any], bool]) -> Iterator[Any]:
    """Every m-th run from the k-th on, of ``part`` (k, m), without those that are done when their turn comes."""
    for number, run in enumerate(runs, start=1):
        if (number - part[0]) % part[1] == 0 and not done(run):
            print(f"[{number}/{len(runs)}] {run}", flush=True)
            yield run


def endpoints(
    model: Any,
    split: str,
    n: int,
    n_prompts: int,
    seed: int,
    texture: str = "mid",
    progress: bool = True,
    inpaint: bool = True,
    decoding: Decoding = Decoding(),
) -> dict[str, list[float]]:
    """What the experiments compare models on: metric -> one outcome per item, in an order that is the same for every model.

    - ``understanding_loss``, ``generation_loss``: nats per token of each scene's caption, and of its image under one mask (ratio
      in [0.2, 0.6]); lower = better.
    - ``caption_f1``, ``caption_exact``; ``questions``: share of a scene's questions, one of each kind, answered right;
      ``understanding``: mean of caption_f1 and questions. ``generation``, ``generation_strict``: prompts met, as many of each of
      GenEval's categories. ``inpainting``: hidden objects drawn again. All higher = better.
    - ``understood_of_drawn``: caption_f1 of scenes with a composition that training showed to generation alone;
      ``drawn_of_understood``: prompts met that name a composition shown to understanding alone. No other metric sees either.

    Args:
        n: scenes; n_prompts: per category. inpaint: whether hidden objects are drawn, a quarter of the time.
    """
    nuisance = Nuisance(texture=texture)
    data = Shapes(split, n=n, seed=seed, nuisance=nuisance, without=ASYMMETRIC)
    exam = Examiner(model, decoding, seed=seed, progress=progress, n_questions=n, n_prompts=n_prompts)
    with evaluating(model):
        flows = extract(model, data, layers=[0], seed=seed, progress=progress)
        assert isinstance(flows, Features)
        understanding.scene_captions(exam, data, agreement=False)
        understanding.scene_questions(exam, data)
        generation.scene_prompts(exam, data, heldout=False)
        if inpaint:
            generation.scene_inpainting(exam, data)
        for flow, other in (("generation", "understanding"), ("understanding", "generation")):
            few = Shapes(split, n=n // 2, seed=seed, nuisance=nuisance, containing=ONE_FLOW[flow], without=ONE_FLOW[other])
            if flow == "generation":
                understanding.scene_captions(exam, few, "_drawn")
            else:
                generation.composition_prompts(exam, "generation_understood", few, ONE_FLOW[flow])
    ids = list(exam.items["caption_f1"])
    asked = [metric for metric in exam.items if metric in {f"qa_{kind}" for kind in understanding.QUESTION_KINDS}]
    answers = [[exam.items[metric][key] for metric in asked if key in exam.items[metric]] for key in ids]
    out = {f"{flow}_loss": values.tolist() for flow, values in flows.losses.items()}
    names = {
        "caption_f1": "caption_f1",
        "caption_exact": "caption_exact",
        "generation": "generation_overall",
        "generation_strict": "generation_strict",
        "inpainting": "inpainting_objects",
        "understood_of_drawn": "caption_f1_drawn",
        "drawn_of_understood": "generation_understood",
    }
    out |= {ours: list(exam.items[theirs].values()) for ours, theirs in names.items() if inpaint or ours != "inpainting"}
    out["questions"] = [sum(a) / len(a) for a in answers]
    out["understanding"] = [(f1 + right) / 2 for f1, right in zip(out["caption_f1"], out["questions"], strict=True)]
    return {metric: [round(float(value), 4) for value in values] for metric, values in out.items()}
