"""What do DIVA's encoders hold of a trained model, and if one factor of a picture is moved to another's, what does the model say?

What a factor *holds*, an audit shows (:func:`umm_kit.evaluation.audit.audit`), beside rivals: encoders trained alike, but on
shuffled pairs, among them. Whether the model *uses* it takes a change. In the understanding flow, at a middle layer,
find the smallest shift of the states h_i of picture i (Adam on the shift alone; encoders and backbone frozen)

    min over delta   |E_a(h_i + delta) - E_a(h_j)|^2 / D_a + |E_b(h_i + delta) - E_b(h_i)|^2 / D_b + w |delta|^2

with a = shared and b = unique, or the reverse, D the mean of |E(h_i) - E(h_j)|^2 (a factor may hardly vary), and delta in units
of each channel's spread; let the model go on from there, and read its caption. Encoders read the mean over image tokens, so one
shift of it is the same at every token; a transformer encoder reads tokens, and each has a shift of its own.

Shifts that are judged beside it: none; *all* of what the encoder reads replaced by that of picture j, which bounds what any shift
of this kind can do; and for each of shared, unique and all its *control*, as long in the same units, towards a third picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from umm_kit.data.language import parse
from umm_kit.data.shapes import SceneObject, Shapes
from umm_kit.evaluation.audit import audit
from umm_kit.evaluation.known import RIVALS
from umm_kit.experiments import Ledger, mine
from umm_kit.features import batches, evaluating
from umm_kit.models import load
from umm_kit.models.factors import FactorEncoders, Factors, middle_layers
from umm_kit.statistics import hierarchical_bootstrap
from umm_kit.trainers.diva import DIVAConfig, DIVATrainer

FLOW = "understanding"
JUDGED = ("shared", "unique", "all")
CONTROLS = {shift: f"control of {shift}" for shift in JUDGED}
SHIFTS = ("none", *JUDGED, *CONTROLS.values())
ATTRIBUTES = ("count", "colour", "shape", "size")
#: What stage 1 changes of ``DIVAConfig.tiny``.
ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "gated": {},
    "aligned": {"stage1_alignment": True},
    "transformer": {"encoder": "transformer"},
}


@dataclass(frozen=True)
class Preset:
    """Sizes; ``settings`` go to ``DIVAConfig.tiny``. Each seed is another training of the encoders, on one backbone."""

    model: str = "tiny-masked"
    encoders: tuple[str, ...] = ("gated", "aligned", "transformer")
    n_audit: int = 4000
    seeds: tuple[int, ...] = (0, 1, 2)
    n: int = 512
    steps: int = 300
    weight: float = 0.01  # of |delta|^2, per number that is shifted
    settings: Mapping[str, Any] = field(default_factory=dict)


PRESETS = {"full": Preset()}


@contextmanager
def shifted(model: Any, layer: int, delta: Tensor) -> Iterator[None]:
    """Within, the understanding flow adds ``delta`` [B, N or 1, d] to its image states after block ``layer``."""
    n = model.num_image_tokens

    def add(module: nn.Module, inputs: Any, x: Tensor) -> Tensor:
        if x.shape[1] < 2 + n:  # a word that is said later: the image is in the cache
            return x
        return torch.cat([x[:, :2], x[:, 2 : 2 + n] + delta.to(x), x[:, 2 + n :]], 1)

    handle = model.blocks[layer - 1].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def move(
    encoders: FactorEncoders, h: Tensor, others: Tensor, which: str, steps: int, weight: float, rate: float = 0.05
) -> tuple[Tensor, dict[str, float]]:
    """Smallest shift of states h that takes one factor to that of ``others`` and leaves the other factor.

    Returns:
        The shift, as h; and ``moved``, the share of the way that the one factor went, ``strayed``, by how much the other factor
        left its place, in units of its distance to that of ``others`` (both of squared distances, means over items); ``apart``,
        that distance of the one factor per number: 2 of numbers of variance 1, 0 of a factor that is a constant.
    """
    spread = spread_of(h)
    with torch.no_grad():
        here, there = encoders({FLOW: h}), encoders({FLOW: others})
    a, b = ("shared", "unique") if which == "shared" else ("unique", "shared")

    def distance(name: str, x: Factors, y: Factors) -> Tensor:
        return (getattr(x, name)[FLOW] - getattr(y, name)[FLOW]).square().mean(-1)

    unit = {name: distance(name, here, there).mean().clamp(min=1e-12) for name in (a, b)}
    step = torch.zeros_like(h).requires_grad_()
    optimizer = torch.optim.Adam([step], lr=rate)
    for _ in range(steps):
        z = encoders({FLOW: h + step * spread})
        away = distance(a, z, there) / unit[a] + distance(b, z, here) / unit[b]
        loss = (away + weight * step.square().mean(-1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    delta = (step * spread).detach()
    with torch.no_grad():
        z = encoders({FLOW: h + delta})
    left, strayed = (float(distance(name, z, goal).mean() / unit[name]) for name, goal in ((a, there), (b, here)))
    return delta, {"moved": 1 - left, "strayed": strayed, "apart": float(unit[a])}


def spread_of(h: Tensor) -> Tensor:
    """Of each channel, over items and tokens: the unit of a shift."""
    return h.flatten(0, -2).std(0).clamp(min=1e-6)


def as_long(away: Tensor, delta: Tensor, spread: Tensor) -> Tensor:
    """Shifts in the directions of ``away``, each as long as that of ``delta`` for the same item, in units of spread."""
    squares = [(v / spread).square().sum(tuple(range(1, v.ndim)), True) for v in (delta, away)]
    return away * (squares[0] / squares[1]).sqrt()


def values(objects: Sequence[Any]) -> dict[str, Counter]:
    """What a scene, or the phrases of a caption, say of each attribute: how many objects there are, how many red, and so on."""
    number = [getattr(o, "number", 1) for o in objects]
    out = {"count": Counter({"objects": sum(number)})}
    for name in ATTRIBUTES[1:]:
        out[name] = Counter()
        for o, k in zip(objects, number, strict=True):
            out[name][getattr(o, name)] += k
    return out


def outcomes(texts: Sequence[str], mine: Sequence[Sequence[SceneObject]], theirs: Sequence[Sequence[SceneObject]]) -> Any:
    """Per attribute, of pairs that differ in it: caption says what is so of the other picture (moved), of its own (kept): 0 or 1.

    Returns:
        attribute -> {"moved": [n], "kept": [n]}, NaN where both pictures agree. Words that cannot be read are neither.
    """
    out = {a: {"moved": np.full(len(texts), np.nan), "kept": np.full(len(texts), np.nan)} for a in ATTRIBUTES}
    for k, (text, own, other) in enumerate(zip(texts, mine, theirs, strict=True)):
        said = values(parse(text).phrases)
        truth, goal = values(own), values(other)
        for a in ATTRIBUTES:
            if truth[a] != goal[a]:
                out[a]["moved"][k], out[a]["kept"][k] = said[a] == goal[a], said[a] == truth[a]
    return out


@torch.no_grad()
def captions(model: Any, images: Tensor, layer: int, delta: Tensor, batch_size: int = 64) -> list[str]:
    """What the model says of images [n, 3, H, W] when states after ``layer`` are shifted by ``delta`` [n, N or 1, d]."""
    said: list[str] = []
    with evaluating(model):
        for start in range(0, len(images), batch_size):
            at = slice(start, start + batch_size)
            with shifted(model, layer, delta[at]):
                said += model.understand(images[at])
    return said


def run(preset: Preset, records: str | Path, folder: str | Path, part: tuple[int, int] = (1, 1)) -> str:
    """Train encoders (stage 1 of DIVA), audit them, shift, and read captions, for every kind and seed without a record.

    An audit pools states; encoders that read tokens have none.
    """
    ledger = Ledger(Path(records), preset)
    title = "{} encoder, seed {}".format
    wanted = [(kind, seed) for seed in preset.seeds for kind in preset.encoders]
    for kind, seed in mine(wanted, part, lambda run: title(*run) in ledger.records()):
        model = load(preset.model, device="cpu")
        encoders = stage_one(model, kind, preset, seed, Path(folder))
        content: dict[str, Any] = {"encoder": kind, "seed": seed, "model": Path(preset.model).name}
        if encoders.config.kind != "transformer":
            shuffled = stage_one(model, kind, preset, seed, Path(folder) / "shuffled", pairs="shuffled")
            content["audit"] = judged_split(model, encoders, shuffled, preset, seed)
        ledger.add(title(kind, seed), {**content, **judge(model, encoders, preset, seed)})
    return summary(ledger.records())


def stage_one(model: Any, kind: str, preset: Preset, seed: int, folder: Path, **more: Any) -> FactorEncoders:
    """Encoders of :data:`ENCODERS`, trained, or those that are finished in the folder."""
    where = {"output_dir": str(folder / f"{kind}-{seed}"), "disable_tqdm": True}
    config = DIVAConfig.tiny(**{**preset.settings, **ENCODERS[kind], **more, **where, "seed": seed})
    return DIVATrainer(model, config, Shapes("train", seed=seed)).warm_up().eval().requires_grad_(False)


def judged_split(model: Any, encoders: FactorEncoders, shuffled: FactorEncoders, preset: Preset, seed: int) -> dict[str, Any]:
    """The audit of encoders on test scenes: every judged line, and how far ahead of each rival they are."""
    data = Shapes("test", n=preset.n_audit, seed=seed, image_size=model.image_size)
    found = audit(encoders, model, data, rivals={**RIVALS, "shuffled pairs": lambda flows, size: shuffled}, seed=seed)
    lines = found.judged[["flow", "factor", "kind", "z", "r", "low", "high", "wanted", "verdict"]]
    return {
        "passed": found.passed, "unjudged": found.unjudged, "n": preset.n_audit,
        "lines": lines.round(4).to_dict("split", index=False), "rivals": found.rivals.round(4).to_dict("split", index=False),
    }  # fmt: skip


def audits(records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """By encoder, over its trainings: lines of the audit by what they ask (mean r; how many pass), and the lead over each rival
    in separation (its mean; in how many trainings its interval is above 0).
    """
    rows = []
    for kind in dict.fromkeys(r["encoder"] for r in records.values() if "audit" in r):
        some = [r["audit"] for r in records.values() if r["encoder"] == kind]
        lines = pd.concat([pd.DataFrame(**a["lines"]) for a in some])
        for (factors, half), group in lines.groupby(["kind", "z"]):
            row = {"encoder": kind, "asked": f"{factors} in {half}", "wanted": group.wanted.iloc[0], "found": group.r.mean()}
            rows.append(row | {"passed": int((group.verdict == "pass").sum()), "of": len(group)})
        rivals = pd.concat([pd.DataFrame(**a["rivals"]) for a in some])
        for rival, group in rivals.dropna().groupby("method", sort=False):
            row = {"encoder": kind, "asked": f"ahead of {rival}", "wanted": "> 0", "found": group.ahead.mean()}
            rows.append(row | {"passed": int((group.low > 0).sum()), "of": len(group)})
    return pd.DataFrame(rows, columns=["encoder", "asked", "wanted", "found", "passed", "of"])


def judge(model: Any, encoders: FactorEncoders, preset: Preset, seed: int) -> dict[str, Any]:
    """One record: how far each shift went, and what was then said."""
    layers = middle_layers(model.num_layers)
    layer, data = layers[len(layers) // 2], Shapes("test", n=preset.n, seed=seed, image_size=model.image_size)
    with torch.no_grad(), evaluating(model):
        flows = [model.understanding_flow(batch, layers=[layer]).hidden_states[layer].float() for batch in batches(data, 64)]
    tokens = torch.cat(flows)
    h = tokens if encoders.config.kind == "transformer" else tokens.mean(1)
    images, scenes = data.images(range(preset.n)), data.scenes(range(preset.n))
    objects = [scenes.objects(k) for k in range(preset.n)]
    other, third = (torch.arange(preset.n).roll(-k) for k in (1, 2))
    deltas, found = {"none": torch.zeros_like(h), "all": h[other] - h}, {}
    for which in ("shared", "unique"):
        deltas[which], found[which] = move(encoders, h, h[other], which, preset.steps, preset.weight)
    deltas |= {control: as_long(h[third] - h, deltas[shift], spread_of(h)) for shift, control in CONTROLS.items()}
    items: dict[str, Any] = {}
    for name in SHIFTS:
        delta = deltas[name] if h.ndim == 3 else deltas[name][:, None]
        result = outcomes(captions(model, images, layer, delta), objects, [objects[int(k)] for k in other])
        items[name] = {a: {w: [None if np.isnan(x) else int(x) for x in v] for w, v in r.items()} for a, r in result.items()}
        found.setdefault(name, {})["length"] = float((deltas[name] / spread_of(h)).square().mean().sqrt())
    return {"layer": layer, "n": preset.n, "shifts": found, "items": items}


def effects(records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """By encoder, shift and attribute: shares of captions that moved and that kept, and what the shift moved beyond its control.

    ``moved_over_control`` with a 95 % interval over trainings of the encoders, of which it takes two, and pictures (pairs that
    differ in the attribute).
    """
    rows = []
    for kind in dict.fromkeys(r["encoder"] for r in records.values()):
        some = [r["items"] for r in records.values() if r["encoder"] == kind]
        for shift in SHIFTS:
            for a in ATTRIBUTES:
                beside = (shift, CONTROLS.get(shift, shift))
                mine, control = ([np.array(r[s][a]["moved"], dtype=float) for r in some] for s in beside)
                kept = [np.array(r[shift][a]["kept"], dtype=float) for r in some]
                row = {"encoder": kind, "shift": shift, "attribute": a, "runs": len(some), "n": int(np.isfinite(mine[0]).sum())}
                row |= {"moved": float(np.nanmean(mine)), "kept": float(np.nanmean(kept))}
                if shift in CONTROLS and len(some) > 1:
                    differences = [x[np.isfinite(x)] - y[np.isfinite(y)] for x, y in zip(mine, control, strict=True)]
                    e = hierarchical_bootstrap(differences)
                    row |= {"moved_over_control": e.value, "low": e.low, "high": e.high}
                rows.append(row)
    return pd.DataFrame(rows)


def verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    """Does moving a factor move what is said? *Yes* if the interval beyond the control lies above 0, *no* if its upper end is
    below a twentieth, else *undecided*."""
    rows = frame[frame["shift"].isin(JUDGED)]
    said = np.select([rows.low > 0, rows.high < 0.05], ["yes", "no"], "undecided")
    return rows[["encoder", "shift", "attribute", "moved", "kept", "moved_over_control", "low", "high"]].assign(verdict=said)


def summary(records: Mapping[str, Mapping[str, Any]]) -> str:
    """How far the shifts went, what was then said, and the verdicts."""
    lines, frame = list[str](), effects(records)
    how = "{} ({apart:.1g} apart) moved {moved:.2f}, strayed {strayed:.2f}"
    for name, r in records.items():
        went = [how.format(k, **v) for k, v in r["shifts"].items() if "moved" in v]
        lines.append(f"{name}, layer {r['layer']}, {r['n']} pictures: {'; '.join(went)}")
    judged = verdicts(frame) if "low" in frame else frame
    table = judged.to_string(index=False, float_format="%.3f")
    said = "\n".join(lines) + f"\n\nDoes moving a factor move what the model says?\n{table}"
    held = audits(records)
    return said + (f"\n\nWhat do the halves hold?\n{held.to_string(index=False, float_format='%.2f')}" if len(held) else "")
