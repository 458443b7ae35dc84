"""One verdict for each table, figure and claim: computed from records, each with a command, and a changed record changes it."""

import json
import shutil

import pandas as pd
import pytest
from conftest import ROOT

from umm_kit.experiments import Ledger, verdicts


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    (folder / "figures/data").mkdir(parents=True)
    for name in ("diagnosis", "drift"):
        shutil.copy(ROOT / f"figures/data/{name}.json", folder / f"figures/data/{name}.json")
    return folder


@pytest.fixture(scope="module")
def frame(clone):
    return verdicts.collect(clone)


def of(frame, claim):
    found = frame[frame.claim == claim]
    assert len(found) == 1, claim
    return found.iloc[0]


def test_every_line_has_a_verdict_a_reason_and_a_command(frame):
    assert list(frame.columns) == ["paper", "source", "claim", "verdict", "evidence", "command"]
    assert set(frame.verdict) <= set(verdicts.VERDICTS) and (frame.map(len) > 0).all(axis=None)
    assert not frame.duplicated(["paper", "source", "claim"]).any() and list(frame.paper) == sorted(frame.paper)
    known = {"Fig. 2", "Fig. 5", "Fig. 6", *(f"Table {k}" for k in (1, 2, 3, 4, 5, 6, 9, 10))}
    assert known <= set(frame[frame.paper == "DIVA"].source)


def test_a_verdict_follows_its_record(clone, frame):
    """DIVA's items of understanding are raised by .1: what was a loss becomes a gain, and no line of generation moves."""
    records = Ledger(clone / "experiments/diva.jsonl").records()
    for record in records.values():
        if record["arm"] == "diva":
            record["items"]["understanding"] = [value + 0.1 for value in record["items"]["understanding"]]
    after = pd.DataFrame([vars(v) for v in verdicts.arms(records)])
    gain, drawing = "DIVA improves understanding", "DIVA improves generation"
    assert of(after, gain).verdict == "reproduced" != of(frame, gain).verdict
    assert of(after, "diva beats base in understanding").verdict == "reproduced"
    assert of(after, drawing).verdict == of(frame, drawing).verdict


def test_an_audit_has_to_pass_more_than_once():
    def audited(passed, r, unjudged=()):
        lines = {"columns": ["flow", "factor", "kind", "z", "r", "low", "high", "wanted", "verdict"]}
        lines["data"] = [["understanding", "colour", "shared", "unique", r, r, r, "<= 0.2", "pass" if r <= 0.2 else "fail"]]
        rivals = {"columns": ["method", "separation", "ahead", "low", "high"], "data": [["random", 0.1, 0.1, 0.2 - r, 0.3]]}
        found = {"passed": passed, "unjudged": list(unjudged), "lines": lines, "rivals": rivals}
        return {"encoder": "gated", "model": "m", "audit": found}

    said = next(verdicts.halves({"a": audited(True, 0.1), "b": audited(False, 0.5)}))
    assert said.verdict == "not reproduced" and "1 of 2 trainings" in said.evidence
    assert "shared in unique 0.30 (asked <= 0.2)" in said.evidence and "not always ahead of random" in said.evidence
    assert next(verdicts.halves({"a": audited(True, 0.1), "b": audited(True, 0.1)})).verdict == "reproduced"
    assert next(verdicts.halves({"a": audited(True, 0.1)})).verdict == "undecided", "one training is not enough"
    half = next(verdicts.halves({"a": audited(False, 0.1, ["U-only"]), "b": audited(False, 0.1, ["U-only"])}))
    assert half.verdict == "undecided" and "no U-only factor could be judged" in half.evidence
    assert next(verdicts.halves({})).verdict == "not run"


def test_a_drift_that_stops_at_the_ceiling_is_none(clone, frame, tmp_path):
    claim = "meaning is lost at modality transitions, and more of it after many cycles than after one"
    assert of(frame, claim).verdict == "reproduced"
    content = json.loads((clone / "figures/data/drift.json").read_text())
    for row in content["rows"]:
        if row["metric"] == "survival":
            row |= {"value": 1.0, "low": 0.98, "high": 1.02}
    (tmp_path / "still.json").write_text(json.dumps(content))
    assert next(verdicts.meaning(tmp_path / "still.json")).verdict == "undecided"


@pytest.mark.parametrize("lines", [0, 1, 4])
def test_an_experiment_that_has_just_begun_is_not_run(clone, tmp_path, lines):
    """Whatever was finished first, no line is missing, and none says more than its records."""
    shutil.copytree(clone, tmp_path / "begun")
    for file in (tmp_path / "begun/experiments").glob("*.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:lines]))
    for name in ("frontier", "latentumm"):
        (tmp_path / f"begun/experiments/{name}.jsonl").write_text("")
    begun = verdicts.collect(tmp_path / "begun")
    assert of(begun, "DIVA improves understanding and generation").verdict == "not run"
    assert of(begun, "one backbone for both tasks costs both of them").verdict in ("not run", "undecided")
    assert of(begun, "LatentUMM keeps meaning over the cycles").verdict == "not run"


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no folder experiments"):
        verdicts.collect(tmp_path)
