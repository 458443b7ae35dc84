"""Each table, figure and claim of the two papers beside what was measured here: one verdict a line, computed from records.

*reproduced*: our interval lies on the side that the paper found; *not reproduced*: it lies on the other, or a rule that was fixed
before is not met; *undecided*: the interval holds 0; *not run*: a command here would do it; *not attempted*: it needs weights or
a benchmark that are not here. All of it at the scale of this kit's models, on its scenes: a line says what was found there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from umm_kit.experiments import Ledger, atlas, comparison, diva, planted

VERDICTS = ("reproduced", "not reproduced", "undecided", "not run", "not attempted")
_SAID = {"yes": "reproduced", "no, it is worse": "not reproduced", "reversed": "not reproduced"}
DIVA, LATENTUMM = "DIVA", "LatentUMM"


@dataclass(frozen=True)
class Verdict:
    """``source``: where it stands; ``evidence``: what was found, or what is missing; ``command``: what would do it (again)."""

    paper: str
    source: str
    claim: str
    verdict: str
    evidence: str
    command: str


def collect(root: str | Path = ".") -> pd.DataFrame:
    """All verdicts from the records in a clone of the repository: a row each, columns as in :class:`Verdict`.

    Raises:
        ValueError: the folder holds no records.
    """
    root = Path(root)
    if not (root / "experiments").is_dir():
        raise ValueError(f"{root} holds no folder experiments; name that of a clone of the repository")
    found = [*_figure_2(root / "figures/data/diagnosis.json"), *_premise(_read(root, "atlas")), *_planted(_read(root, "planted"))]
    found += [*_arms(_read(root, "diva")), *_frontier(_read(root, "frontier"))]
    found += [*_drift(root / "figures/data/drift.json"), *_stabilized(_read(root, "latentumm")), *_NOT_HERE]
    return pd.DataFrame([asdict(v) for v in found]).sort_values("paper", kind="stable", ignore_index=True)


def _read(root: Path, name: str) -> dict[str, dict[str, Any]]:
    return Ledger(root / "experiments" / f"{name}.jsonl").records()


def _interval(row: Any, value: str = "here") -> str:
    low, high = (row["sft_low"], row["sft_high"]) if value == "over_sft" else (row["low"], row["high"])
    return f"{row[value]:+.3f} [{low:+.3f}, {high:+.3f}]"


def _figure_2(path: Path) -> Iterator[Verdict]:
    from umm_kit.diagnostics.claims import shape_claims
    from umm_kit.diagnostics.report import Diagnosis

    found = Diagnosis.load(path)
    for row in shape_claims(found).to_dict("records"):
        measured = f"{_interval(row)}, n = {row['n']}, {found.record['model']}"
        yield Verdict(DIVA, "Fig. 2", row["claim"], row["verdict"], measured, found.record["command"])


def _premise(records: dict[str, dict[str, Any]]) -> Iterator[Verdict]:
    cells = atlas.verdicts(atlas.interference(records))
    both = int(((cells.understanding == "yes") & (cells.generation == "yes")).sum())
    found = f"both tasks pay in {both} of {len(cells)} settings of one width, two seeds each"
    yield Verdict(
        DIVA, "Sec. 1 and 2", "one backbone for both tasks costs both of them", "reproduced" if both else "not reproduced",
        found, "umm-kit reproduce atlas",
    )  # fmt: skip
    ranked = atlas.predictors(records)
    good = int((ranked.p_value < 0.05 / max(len(ranked), 1)).sum())
    models = int(ranked.n.max()) if len(ranked) else 0
    found = f"{good} of {len(ranked)} rank correlations with measured interference are significant (Bonferroni), {models} models"
    yield Verdict(
        DIVA, "Sec. 2", "the diagnostics show where the tasks hurt each other", "reproduced" if good else "undecided",
        found, "umm-kit reproduce atlas",
    )  # fmt: skip


def _planted(records: dict[str, dict[str, Any]]) -> Iterator[Verdict]:
    row = planted.verdicts(planted.frame_of(records)).set_index("arm").loc[planted.METHOD]
    found = (
        f"where the truth was planted {row['recovery shared']:.2f} of the shared and {row['recovery unique']:.2f} of the unique "
        f"bits are found in their half, {row['leakage shared']:.2f} of the shared in the wrong one; every limit was met in "
        f"{row['passed']} of {row['seeds']} mixings"
    )
    verdict = "reproduced" if row["passed"] == row["seeds"] else "not reproduced"
    claim = "encoders split states into shared and unique factors"
    yield Verdict(DIVA, "Sec. 3.2", claim, verdict, found, "umm-kit reproduce planted")


def _arms(records: dict[str, dict[str, Any]]) -> Iterator[Verdict]:
    command = "umm-kit reproduce diva"
    compared = {name: r for name, r in records.items() if r["arm"] in ("base", "diva", *diva.STUDY.rivals)}
    frame = comparison.effects(compared, comparison.HEADLINES, diva.STUDY.rivals)
    for row in comparison.verdict(frame, "diva").to_dict("records"):
        found = f"{_interval(row, 'over_sft')} over the better fine-tuning, {row['runs']} runs, n = {row['n']}"
        claim = f"DIVA improves {row['metric']}"
        yield Verdict(DIVA, "abstract, Table 1", claim, _SAID.get(row["verdict"], row["verdict"]), found, command)
    for row in diva.against_paper(records).to_dict("records"):
        if row["verdict"] == "the paper is divided" or (row["lower"], row["higher"]) == ("sft", "diva"):
            continue  # there is no side to be on; and the headline is judged above
        gains = row["published"].split(", ")
        better, worse = (row["higher"], row["lower"]) if "+" in gains[0] else (row["lower"], row["higher"])
        found = "no run has a record" if row["verdict"] == "not run" else f"{_interval(row)}, {row['runs']} runs"
        claim = f"{better} beats {worse} in {row['metric']}"
        yield Verdict(DIVA, row["source"], claim, _SAID.get(row["verdict"], row["verdict"]), found, command)
    for row in diva.by_category(records).to_dict("records"):
        claim = f"DIVA meets more prompts of {row['category'].replace('_', ' ')} than its base"
        found = f"{_interval(row)}, {row['runs']} runs, n = {row['n']} (published {row['published']:+.2f})"
        yield Verdict(DIVA, "Table 9", claim, _SAID.get(row["verdict"], row["verdict"]), found, command)


def _frontier(records: dict[str, dict[str, Any]]) -> Iterator[Verdict]:
    from umm_kit.experiments import frontier

    claim, command = "DIVA's losses lie below the base's at every weight of the tasks", "umm-kit reproduce frontier"
    if not records:
        yield Verdict(DIVA, "Fig. 6", claim, "not run", "no run has a record", command)
        return
    said = frontier.verdicts(records).verdict.tolist()
    verdict = "reproduced" if set(said) == {"better"} else "not reproduced" if "worse" in said else "undecided"
    yield Verdict(DIVA, "Fig. 6", claim, verdict, f"by weight of understanding: {', '.join(said)}", command)


def _drift(path: Path) -> Iterator[Verdict]:
    content = json.loads(path.read_text())
    rows = pd.DataFrame(content["rows"]).query("metric == 'survival'").sort_values("cycle")
    first, last = rows.iloc[0], rows.iloc[-1]
    mean = content["results"]["mean_survival"]
    found = (
        f"of tiny-masked, {first['value']:.2f} of the facts survive one cycle, {last['value']:.2f} [{last['low']:.2f}, "
        f"{last['high']:.2f}] survive {int(last['cycle'])}; mean {mean['value']:.2f}, n = {int(last['n'])}"
    )
    verdict = "reproduced" if last["high"] < 1 and last["high"] < first["low"] else "undecided"
    claim = "meaning drifts at modality transitions, further with each cycle"
    yield Verdict(LATENTUMM, "abstract", claim, verdict, found, content["record"]["command"])


def _stabilized(records: dict[str, dict[str, Any]]) -> Iterator[Verdict]:
    claim, command = "LatentUMM keeps meaning over the cycles", "umm-kit reproduce latentumm"
    if not any(r["arm"] == "latentumm" for r in records.values()):
        yield Verdict(LATENTUMM, "abstract", claim, "not run", "no run has a record", command)
        return
    from umm_kit.experiments import latentumm

    for row in comparison.verdict(latentumm.STUDY.effects(records), "latentumm").to_dict("records"):
        found = f"{row['metric']}: {_interval(row, 'over_sft')} over the better fine-tuning, {row['runs']} runs"
        yield Verdict(LATENTUMM, "abstract", claim, _SAID.get(row["verdict"], row["verdict"]), found, command)


_REAL = "umm-kit diagnose MODEL, then umm-kit train diva (CLUSTER.md)"
_NOT_HERE = (
    Verdict(DIVA, "Table 1", "it helps Nexus-Gen, Show-o and Liquid alike", "not attempted",
            "needs their weights, and benchmarks of photographs", _REAL),
    Verdict(DIVA, "Table 3", "more and more mixed data help", "not attempted", "needs 200,000 pairs of photographs", _REAL),
    Verdict(DIVA, "Table 5", "it helps editing (ImgEdit, GEdit)", "not attempted",
            "no model here edits by instruction, and the judges are large models", _REAL),
    Verdict(DIVA, "Table 10", "it helps drawing what asks for world knowledge (WISE)", "not attempted",
            "scenes of shapes hold no world knowledge", _REAL),
    Verdict(DIVA, "Fig. 5", "shared factors of near-duplicates lie together in a t-SNE map", "not attempted",
            "of factors; of raw states notebook 02 (section 5) measures it, with a null", "umm-kit reproduce"),
    Verdict(LATENTUMM, "abstract", "it works across architectures", "not attempted",
            "only the masked family ships trained models", "umm-kit train autoregressive, then latentumm"),
)  # fmt: skip
