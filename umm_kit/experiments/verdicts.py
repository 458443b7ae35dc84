"""What the two papers report, as far as it was transcribed, beside what was measured here: one verdict a line, from records.

*reproduced*: our interval lies on the side that the paper found; *not reproduced*: it lies on the other, or a rule that was fixed
before is not met; *undecided*: the interval holds 0, or the paper's own numbers have no common sign; *not run*: a command here
would do it; *not attempted*: it needs weights or a benchmark that are not here. Of LatentUMM only the abstract was read. All of
it is at the scale of this kit's models, on its scenes: a line says what was found there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from umm_kit.experiments import Ledger, atlas, comparison, diva, frontier, intervention, latentumm, planted

VERDICTS = ("reproduced", "not reproduced", "undecided", "not run", "not attempted")
_SAID = {
    "yes": "reproduced",
    "no, it is worse": "not reproduced",
    "reversed": "not reproduced",
    "the paper is divided": "undecided",
}
_NO_RECORD = "too few runs have a record"
DIVA, LATENTUMM = "DIVA", "LatentUMM"
#: How the paper reads its diagnostics: task, panel, series, and the sign that their correlation with interference should have.
SIGNS = (
    ("understanding", "gradients", "conflict", 1),
    ("generation", "gradients", "conflict", 1),
    ("generation", "residual", "residual", 1),
    ("generation", "rank", "increment", 1),
)
Records = Mapping[str, Mapping[str, Any]]


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

    def read(name: str) -> Records:
        return Ledger(root / "experiments" / f"{name}.jsonl").records()

    found = [*figure_2(root / "figures/data/diagnosis.json"), *premise(read("atlas")), *split(read("planted"))]
    found += [*halves(read("intervention")), *arms(read("diva")), *trade_off(read("frontier"))]
    found += [*meaning(root / "figures/data/drift.json"), *stabilized(read("latentumm")), *_NOT_HERE]
    return pd.DataFrame([asdict(v) for v in found]).sort_values("paper", kind="stable", ignore_index=True)


def _interval(row: Any, value: str = "here") -> str:
    low, high = (row["sft_low"], row["sft_high"]) if value == "over_sft" else (row["low"], row["high"])
    return f"{row[value]:+.3f} [{low:+.3f}, {high:+.3f}]"


def figure_2(path: Path) -> Iterator[Verdict]:
    """The shapes of its curves, of the model that was diagnosed into this file."""
    from umm_kit.diagnostics.claims import shape_claims
    from umm_kit.diagnostics.report import Diagnosis

    found = Diagnosis.load(path)
    for row in shape_claims(found).to_dict("records"):
        measured = f"{_interval(row)}, n = {row['n']}, {found.record['model']}"
        yield Verdict(DIVA, "Fig. 2", row["claim"], row["verdict"], measured, found.record["command"])


def premise(records: Records) -> Iterator[Verdict]:
    """Is there interference, and do the diagnostics tell where?"""
    claim, command = "one backbone for both tasks costs both of them", "umm-kit reproduce atlas"
    frame = atlas.interference(records) if records else pd.DataFrame()
    cells = atlas.verdicts(frame) if len(frame) else pd.DataFrame({"understanding": [], "generation": []})
    both = int(((cells.understanding == "yes") & (cells.generation == "yes")).sum())
    neither = bool(len(cells)) and bool(((cells.understanding == "no") | (cells.generation == "no")).all())
    said = "reproduced" if both else "not run" if not len(cells) else "not reproduced" if neither else "undecided"
    yield Verdict(DIVA, "Sec. 1 and 2", claim, said, f"both tasks pay in {both} of {len(cells)} settings", command)

    claim = "the diagnostics show where the tasks hurt each other"
    rows: list[dict[Any, Any]] = atlas.predictors(records).to_dict("records") if len(frame) else []
    ranked = {(row["task"], row["panel"], row["series"]): row for row in rows}
    known = [(ranked[task, panel, series], sign) for task, panel, series, sign in SIGNS if (task, panel, series) in ranked]
    level, models = 0.05 / len(SIGNS), max((row["n"] for row, _ in known), default=0)
    if models < 2 or 2 / math.factorial(models) > level:
        found = f"{models} models are too few for any rank correlation to be told from chance"
        yield Verdict(DIVA, "Sec. 2", claim, "not run", found, command)
        return
    sure = [row["spearman"] * sign > 0 for row, sign in known if row["p_value"] < level]
    said = "reproduced" if sure and all(sure) else "not reproduced" if sure and not any(sure) else "undecided"
    found = f"{sum(sure)} of {len(known)} rank correlations with measured interference have the sign of the paper for certain"
    yield Verdict(DIVA, "Sec. 2", claim, said, f"{found}, {models} models", command)


def split(records: Records) -> Iterator[Verdict]:
    """Do encoders find factors that were planted?"""
    claim, command = "encoders split states into shared and unique factors", "umm-kit reproduce planted"
    frame = planted.frame_of(records) if records else pd.DataFrame({"arm": []})
    if planted.METHOD not in set(frame["arm"]):
        yield Verdict(DIVA, "Sec. 3.2", claim, "not run", _NO_RECORD, command)
        return
    row = planted.verdicts(frame).set_index("arm").loc[planted.METHOD]
    found = (
        f"where the truth was planted {row['recovery shared']:.2f} of the shared and {row['recovery unique']:.2f} of the unique "
        f"bits are found in their half, {row['leakage shared']:.2f} of the shared in the wrong one; every limit was met in "
        f"{row['passed']} of {row['seeds']} mixings"
    )
    yield Verdict(DIVA, "Sec. 3.2", claim, "reproduced" if row["passed"] == row["seeds"] else "not reproduced", found, command)


def halves(records: Records) -> Iterator[Verdict]:
    """Do the halves of a trained model's states hold what they should, as an audit against the truth of the scenes asks?"""
    claim, command = "in a trained model each half holds what it is named for", "umm-kit reproduce intervention"
    done = {name: r for name, r in records.items() if r["encoder"] == "gated" and "audit" in r}
    if not done:
        yield Verdict(DIVA, "Sec. 3.2", claim, "not run", _NO_RECORD, command)
        return
    table, passed = intervention.audits(done), sum(r["audit"]["passed"] for r in done.values())
    lead = table.asked.str.startswith("ahead of")
    rows, rivals = (table[which].to_dict("records") for which in (~lead, lead))
    found = ", ".join(f"{row['asked']} {row['found']:.2f} (asked {row['wanted']})" for row in rows)
    behind = [row["asked"].removeprefix("ahead of ") for row in rivals if row["passed"] < row["of"]]
    found += f"; not always ahead of {', '.join(behind)}" if behind else "; ahead of every rival" if rivals else ""
    unasked = sorted({kind for r in done.values() for kind in r["audit"]["unjudged"]})
    found += f"; no {' or '.join(unasked)} factor could be judged" if unasked else ""
    said = f"on {next(iter(done.values()))['model']} the audit passes in {passed} of {len(done)} trainings: {found}"
    failed = bool(behind) or any(row["passed"] < row["of"] for row in rows)
    verdict = "not reproduced" if failed else "reproduced" if passed == len(done) > 1 else "undecided"
    yield Verdict(DIVA, "Sec. 3.2", claim, verdict, said, command)


def arms(records: Records) -> Iterator[Verdict]:
    """Tables 1, 2, 4, 6 and 9: what DIVA and its parts gain."""
    command = "umm-kit reproduce diva"
    compared = {name: r for name, r in records.items() if r["arm"] in ("base", "diva", *diva.STUDY.rivals)}
    bases = {arm: {r["base"] for r in compared.values() if r["arm"] == arm} for arm in ("base", "diva", *diva.STUDY.rivals)}
    rivals = max(len(bases[arm] & bases["diva"]) for arm in diva.STUDY.rivals)
    if min(len(bases["base"] & bases["diva"]), rivals) < 2:
        yield Verdict(DIVA, "Tables 1, 2, 4, 6, 9", "DIVA improves understanding and generation", "not run", _NO_RECORD, command)
        return
    frame = comparison.effects(compared, comparison.HEADLINES, diva.STUDY.rivals)
    for row in comparison.verdict(frame, "diva").to_dict("records"):
        found = f"{_interval(row, 'over_sft')} over the better fine-tuning, {row['runs']} runs, n = {row['n']}"
        claim = f"DIVA improves {row['metric']}"
        yield Verdict(DIVA, "abstract, Table 1", claim, _SAID.get(row["verdict"], row["verdict"]), found, command)
    for row in diva.against_paper(records).to_dict("records"):
        if (row["lower"], row["higher"]) == ("sft", "diva"):
            continue  # the headline is judged above
        better, worse = (row["higher"], row["lower"]) if "+" in row["published"].split(", ")[0] else (row["lower"], row["higher"])
        claim = f"{better} beats {worse} in {row['metric']}"
        if row["published"].endswith("(divided)"):
            claim = f"{worse} against {better} in {row['metric']}: {row['published']}"
        found = _NO_RECORD if row["verdict"] == "not run" else f"{_interval(row)}, {row['runs']} runs"
        yield Verdict(DIVA, row["source"], claim, _SAID.get(row["verdict"], row["verdict"]), found, command)
    for row in diva.by_category(records).to_dict("records"):
        claim = f"DIVA meets more prompts of {row['category'].replace('_', ' ')} than its base"
        found = f"{_interval(row)}, {row['runs']} runs, n = {row['n']} (published {row['published']:+.2f})"
        yield Verdict(DIVA, "Table 9", claim, _SAID.get(row["verdict"], row["verdict"]), found, command)


def trade_off(records: Records) -> Iterator[Verdict]:
    """Fig. 6, against fine-tuning at the same weights."""
    claim, command = "DIVA's losses lie below the baseline's at every weight of the tasks", "umm-kit reproduce frontier"
    table = frontier.verdicts(records) if records else pd.DataFrame()
    wanted = len(frontier.PRESETS["tiny"].ratios)
    if len(table) < wanted:
        yield Verdict(DIVA, "Fig. 6", claim, "not run", f"{len(table)} of {wanted} weights have records", command)
        return
    said = table.verdict.tolist()
    verdict = "reproduced" if set(said) == {"better"} else "not reproduced" if "worse" in said else "undecided"
    yield Verdict(DIVA, "Fig. 6", claim, verdict, f"by weight of understanding: {', '.join(said)}", command)


def meaning(path: Path) -> Iterator[Verdict]:
    """Does meaning drift? Of the model that went around into this file."""
    content = json.loads(path.read_text())
    rows = pd.DataFrame(content["rows"]).query("metric == 'survival'").sort_values("cycle")
    first, last, mean = rows.iloc[0], rows.iloc[-1], content["results"]["mean_survival"]
    found = (
        f"of {content['record']['model']}, {first['value']:.2f} of the facts survive one cycle, {last['value']:.2f} "
        f"[{last['low']:.2f}, {last['high']:.2f}] survive {int(last['cycle'])}; mean {mean['value']:.2f}, n = {int(last['n'])}"
    )
    drifts, further, stays = first["high"] < 1, last["high"] < first["low"], first["low"] >= 1 or last["low"] > first["high"]
    verdict = "reproduced" if drifts and further else "not reproduced" if stays else "undecided"
    claim = "meaning is lost at modality transitions, and more of it after many cycles than after one"
    yield Verdict(LATENTUMM, "abstract", claim, verdict, found, content["record"]["command"])


def stabilized(records: Records) -> Iterator[Verdict]:
    """Does LatentUMM's training keep more of it than fine-tuning does?"""
    claim, command = "LatentUMM keeps meaning over the cycles", "umm-kit reproduce latentumm"
    bases = {arm: {r["base"] for r in records.values() if r["arm"] == arm} for arm in ("latentumm", *latentumm.STUDY.rivals)}
    if max(len(bases["latentumm"] & bases[arm]) for arm in latentumm.STUDY.rivals) < 2:
        yield Verdict(LATENTUMM, "abstract", claim, "not run", _NO_RECORD, command)
        return
    frame = comparison.effects(records, ["survival"], latentumm.STUDY.rivals)
    row = comparison.verdict(frame, "latentumm").iloc[0]
    found = f"survival {_interval(row, 'over_sft')} over fine-tuning ({row['rival']}), {row['runs']} runs"
    yield Verdict(LATENTUMM, "abstract", claim, _SAID.get(row["verdict"], row["verdict"]), found, command)


_REAL = "umm-kit diagnose MODEL, then umm-kit train diva (CLUSTER.md)"
_NOT_HERE = (
    Verdict(DIVA, "Table 1", "it helps Nexus-Gen, Show-o and Liquid alike", "not attempted",
            "needs their weights, and benchmarks of photographs", _REAL),
    Verdict(DIVA, "Table 2", "layers 8-18 are as good a range as 7-19, and better than 9-17 and 7-17", "not attempted",
            "a model of 4 layers has no such ranges (arms all_layers and last_layer are there)", "umm-kit reproduce diva"),
    Verdict(DIVA, "Table 3", "more and more mixed data help", "not attempted", "needs 200,000 pairs of photographs", _REAL),
    Verdict(DIVA, "Table 5", "it helps editing (ImgEdit, GEdit)", "not attempted",
            "no model here edits by instruction, and the judges are large models", _REAL),
    Verdict(DIVA, "Table 10", "it helps drawing what asks for world knowledge (WISE)", "not attempted",
            "scenes of shapes hold no world knowledge", _REAL),
    Verdict(DIVA, "Fig. 5", "shared factors of near-duplicates lie together in a t-SNE map", "not attempted",
            "of factors; of raw states notebook 02 (section 5) measures it, with a null", "umm-kit reproduce"),
    Verdict(LATENTUMM, "abstract", "it works across architectures", "not attempted",
            "trained here on the masked family alone, others can be", "umm-kit train latentumm --model tiny-autoregressive"),
)  # fmt: skip
