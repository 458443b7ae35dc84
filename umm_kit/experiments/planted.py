"""Planted truth: does the factorization find factors that we planted, and does the check see when one part of it is broken?

Two flows are nonlinear mixtures of known factors (:func:`planted_flows`): shared ones s in both, u_U and u_G in one each. There
is **no backbone**. A task is to name words drawn from softmax(a(s) + b(u)), a and b random networks, from logits of zero: what
the readouts' biases (Eq. 8) do not explain stays unexplained, and the shared part must come crosswise. As there is nothing else
to train, **all terms act on the encoders**: task losses, orthogonality (Eq. 9, without scale), alignment in both directions
(Eq. 10) and I_uni (Eq. 7). The paper trains encoders by the first two alone and puts the others on the backbone later: the arm
"stage 1 as printed" does that. Encoders see words, never a factor's class; they are scored on rows they have not met.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from umm_kit.evaluation.audit import LEAK, OWN, recovery
from umm_kit.evaluation.known import Planted, planted_flows
from umm_kit.experiments import Ledger, mine
from umm_kit.features import FLOWS
from umm_kit.losses.factorization import UniqueCritic, alignment, club, orthogonality
from umm_kit.models.factors import FactorEncoders, FactorEncodersConfig, Factors, Readouts

MARGIN = LEAK  # by which a level must be worse than the reference's to tell an arm from it (:func:`verdicts`)
METHOD, CONTROL, PRINTED = "method", "another start", "stage 1 as printed"


@dataclass(frozen=True)
class Arm:
    """What the encoders are trained by; the defaults are the method."""

    injection: str = "crosswise"
    orthogonality: bool = True
    alignment: bool = True
    unique: str = "critic"  # I_uni by a critic that keeps up; "fixed": by cosines, never trained; "none"
    shuffled: bool = False  # each batch pairs rows of U with other rows of G
    start: int = 0  # another start of the encoders, on the same data


ARMS: Mapping[str, Arm] = {
    METHOD: Arm(),
    CONTROL: Arm(start=1),  # must not be told apart from the method, or the rule is worth nothing
    "no_unique_term": Arm(unique="none"),
    "fixed_critic": Arm(unique="fixed"),
    "own_injection": Arm(injection="own"),
    "no_orthogonality": Arm(orthogonality=False),
    "shuffled_pairs": Arm(shuffled=True),
    PRINTED: Arm(alignment=False, unique="none"),
    "stage 1, no orthogonality": Arm(alignment=False, unique="none", orthogonality=False),
}
BREAKAGES = ("no_unique_term", "fixed_critic", "own_injection", "no_orthogonality", "shuffled_pairs")
REFERENCES = {"stage 1, no orthogonality": PRINTED}  # the others are compared with the method


@dataclass(frozen=True)
class Preset:
    """Sizes and settings, tuned on seeds 100-103."""

    seeds: tuple[int, ...] = (0, 1, 2)
    factors: int = 2  # of each kind: a normal one and one of four levels
    width: int = 32  # of the flows
    factor_size: int = 5
    rank: int = 4
    vocabulary: int = 16
    words: int = 16
    sharpness: float = 2.0  # sd of the words' true logits, of each part
    steps: int = 2400
    shared_only: float = 0.3  # share of the steps before the unique factors join
    ramp: float = 0.3  # share of the steps in which I_uni then rises from 0 (as the paper's weights do)
    batch: int = 128
    learning_rate: float = 2e-3
    temperature: float = 0.05
    orthogonality: float = 1.0  # weights of the terms; the tasks have 1 each
    shared: float = 1.0
    unique: float = 2.0
    critic_steps: int = 6
    critic_buffer: int = 2048
    threshold: float = 0.0
    held_out: int = 2000
    permutations: int = 20


PRESETS = {
    "full": Preset(),
    "tiny": Preset(
        seeds=(0,), factors=1, width=8, factor_size=4, rank=2, steps=12, batch=16, critic_buffer=64, held_out=400, permutations=2
    ),
}


def words(s: Tensor, u: Tensor, vocabulary: int, number: int, sharpness: float, generator: torch.Generator) -> Tensor:
    """[n, number] words of each row, independent draws from softmax(sharpness * (a(s) + b(u))), a and b of sd 1."""
    logits = torch.zeros(len(s), vocabulary)
    for v in (s, u):
        into, shift = torch.randn(v.shape[1], 32, generator=generator), torch.randn(32, generator=generator)
        out = torch.tanh(v @ into + shift) @ torch.randn(32, vocabulary, generator=generator)
        logits += sharpness * out / out.std()
    return torch.multinomial(logits.softmax(1), number, replacement=True, generator=generator)


def plant(preset: Preset, seed: int) -> tuple[Planted, dict[str, Tensor]]:
    """Rows for every step, each used once, then the held-out ones; and each flow's words."""
    k, n = preset.factors, preset.steps * preset.batch + preset.held_out
    planted = planted_flows(n, k, k, k, preset.width, seed)
    rng, sources = torch.Generator().manual_seed(seed), planted.sources
    how = (preset.vocabulary, preset.words, preset.sharpness, rng)
    return planted, {flow: words(sources["shared"], sources[OWN[flow]], *how) for flow in FLOWS}


def factorize(planted: Planted, said: Mapping[str, Tensor], arm: Arm, preset: Preset, seed: int) -> FactorEncoders:
    """Encoders trained on the first ``steps * batch`` rows, shared factors alone at first, then unique ones with them."""
    size, steps = preset.factor_size, preset.steps
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2 * seed + arm.start)
        encoders = FactorEncoders(FactorEncodersConfig(hidden_size=preset.width, factor_size=size))
        readouts = Readouts(size, dict.fromkeys(FLOWS, preset.vocabulary), preset.rank, arm.injection)
    critic = UniqueCritic(
        size, preset.critic_buffer, preset.batch, preset.critic_steps, learning_rate=preset.learning_rate,
        threshold=preset.threshold, seed=seed, repeats=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW([*encoders.parameters(), *readouts.parameters()], preset.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, preset.learning_rate, total_steps=steps, pct_start=0.1)
    zero = dict.fromkeys(FLOWS, torch.zeros(preset.batch, preset.words, preset.vocabulary))
    for step in range(steps):
        rows = torch.arange(step * preset.batch, (step + 1) * preset.batch)
        at = dict(zip(FLOWS, (rows, rows.roll(1) if arm.shuffled else rows), strict=True))
        z = encoders({flow: h[at[flow]] for flow, h in planted.flows.items()})
        unique = step >= preset.shared_only * steps
        loss = sum(
            nn.functional.cross_entropy(s.flatten(0, 1), said[flow][at[flow]].flatten())
            for flow, s in readouts(zero, z, unique).items()
        )
        loss = loss + factor_terms(z, arm, preset, critic, rows, (step / steps - preset.shared_only) / preset.ramp)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return encoders.eval()


def factor_terms(z: Factors, arm: Arm, preset: Preset, critic: UniqueCritic, rows: Tensor, ramp: float) -> Tensor:
    """Weighted sum of the terms that look at factors alone; those of unique factors from ramp 0 on, I_uni in full from 1 on."""
    (sh_u, sh_g), (uni_u, uni_g) = ([half[flow] for flow in FLOWS] for half in (z.shared, z.unique))
    total = torch.zeros(())
    if arm.alignment:
        for x, y in ((sh_u, sh_g), (sh_g, sh_u)):
            total = total + preset.shared * alignment(x, y, directed=True, temperature=preset.temperature).loss
    if ramp >= 0 and arm.orthogonality:
        for x, y in ((sh_u, uni_u), (sh_g, uni_g)):
            total = total + preset.orthogonality * orthogonality(x, y).overlap
    if ramp >= 0 and arm.unique == "critic":
        total = total + min(1.0, ramp) * preset.unique * critic(uni_u, uni_g, rows).loss
    elif ramp >= 0 and arm.unique == "fixed":
        cosines = nn.functional.normalize(uni_u, dim=1) @ nn.functional.normalize(uni_g, dim=1).T
        total = total + min(1.0, ramp) * preset.unique * club(cosines / preset.temperature)
    return total


def score(encoders: FactorEncoders, planted: Planted, permutations: int, seed: int) -> pd.DataFrame:
    """Rows of :func:`recovery`, and for each flow how far its halves overlap (Eq. 9 without scale), by the same limit."""
    found, rows, rng = recovery(encoders, planted, permutations, seed), [], torch.Generator().manual_seed(seed)
    with torch.no_grad():
        z = encoders(planted.flows)
    for flow in FLOWS:
        orders = [torch.randperm(len(z.shared[flow]), generator=rng) for _ in range(permutations)]
        r, *chance = (
            float(orthogonality(z.shared[flow], half, gather=False).overlap)
            for half in (z.unique[flow], *(z.unique[flow][order] for order in orders))
        )
        null = float(np.quantile(chance, 0.95))
        about = {"flow": flow, "factor": "", "kind": "", "z": "both", "quantity": "overlap"}
        rows.append(about | {"r": r, "null": null, "limit": null + LEAK, "ok": r <= null + LEAK})
    return pd.concat([found, pd.DataFrame(rows)], ignore_index=True)


def run(preset: Preset, records: str | Path, folder: str | Path, part: tuple[int, int] = (1, 1)) -> str:
    """Train and score what has no record yet: every arm with every seed, each another mixing, other words, another start."""
    ledger = Ledger(Path(records), preset)
    title = "{}, seed {}".format
    wanted = [(arm, seed) for seed in preset.seeds for arm in ARMS]
    for name, seed in mine(wanted, part, lambda run: title(*run) in ledger.records()):
        planted, said = plant(preset, seed)
        encoders = factorize(planted, said, ARMS[name], preset, seed)
        last = ({k: v[-preset.held_out :] for k, v in d.items()} for d in (planted.flows, planted.factors, planted.sources))
        flows, factors, sources = last
        found = score(encoders, Planted(flows, factors, planted.kinds, sources), preset.permutations, seed).round(4)
        content = {"arm": name, "seed": seed, "settings": {"preset": asdict(preset), "arm": asdict(ARMS[name])}}
        ledger.add(title(name, seed), {**content, "rows": found.to_dict("split", index=False)})
    return summary(frame_of(ledger.records()))


def frame_of(records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """All lines of all runs: columns arm, seed, and those of :func:`score`."""
    frames = [pd.DataFrame(**r["rows"]).assign(arm=r["arm"], seed=r["seed"]) for r in records.values()]
    return pd.concat(frames, ignore_index=True)


def levels(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per arm and seed: mean r of each quantity over flows and factors; ``met``, the share of lines within their limit.

    "leakage shared" is how much of what is shared the unique halves hold, "leakage unique" the reverse.
    """
    kind = frame["kind"].map(lambda kind: {"shared": " shared", "": ""}.get(kind, " unique"))
    by = [frame["arm"], frame["seed"]]
    table = frame["r"].groupby([*by, (frame["quantity"] + kind).rename(None)], sort=False).mean().unstack()
    return table.assign(met=frame["ok"].astype(float).groupby(by, sort=False).mean())


def verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    """Which arms can be told from the method, by a rule fixed before the reported runs.

    An arm is *told apart* in a seed if any of its levels is worse than that of its reference in this seed by more than
    ``MARGIN``: a recovery lower, a leakage or the overlap higher. It must be so in every seed. Another start of the method is
    held to the same rule: where it is told apart, the rule mistakes chance for a breakage.

    Returns:
        Columns arm, reference, seeds, told (in how many of them), by (the levels that told, in any seed), passed (in how many
        seeds every line is within its limit), verdict, and the levels, averaged over seeds.
    """
    table, rows = levels(frame), []
    for arm in dict.fromkeys(frame["arm"]):
        reference = REFERENCES.get(arm, METHOD)
        mine, theirs = table.loc[arm], table.loc[reference]
        values = mine.drop(columns="met")
        sign = np.where(values.columns.str.startswith("recovery"), -1, 1)
        worse = (values - theirs.drop(columns="met").loc[values.index]) * sign > MARGIN
        told, n = int(worse.any(axis=1).sum()), len(mine)
        rows.append({
            "arm": arm, "reference": "" if arm == reference else reference, "seeds": n, "told": told,
            "by": ", ".join(values.columns[worse.any()]), "passed": int((mine["met"] == 1).sum()),
            "verdict": "" if arm == reference else "told apart" if told == n else "not told apart", **mine.mean(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def summary(frame: pd.DataFrame) -> str:
    """One line per arm: its levels, limits and verdict."""
    lines, names = [], levels(frame).columns.drop("met")
    for row in verdicts(frame).to_dict("records"):
        line = f"{row['arm']}: {', '.join(f'{name} {row[name]:.2f}' for name in names)}; "
        line += f"all limits met in {row['passed']} of {row['seeds']} seeds"
        if row["reference"]:
            line += f"; {row['verdict']} from {row['reference']} ({row['told']} of {row['seeds']} seeds"
            line += f", by {row['by']})" if row["by"] else ")"
        lines.append(line)
    return "\n".join(lines)
