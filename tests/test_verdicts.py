"""One verdict for each table, figure and claim: computed from records, each with a command, and a changed record changes it."""

import json
import shutil

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


def of(frame, claim):
    found = frame[frame.claim == claim]
    assert len(found) == 1, claim
    return found.iloc[0]


def test_every_line_has_a_verdict_a_reason_and_a_command(clone):
    frame = verdicts.collect(clone)
    assert list(frame.columns) == ["paper", "source", "claim", "verdict", "evidence", "command"]
    assert set(frame.verdict) <= set(verdicts.VERDICTS) and (frame.map(len) > 0).all(axis=None)
    assert not frame.duplicated(["paper", "source", "claim"]).any() and list(frame.paper) == sorted(frame.paper)
    known = {"Fig. 2", "Fig. 5", "Fig. 6", *(f"Table {k}" for k in (1, 2, 3, 4, 5, 6, 9, 10))}
    assert known <= set(frame[frame.paper == "DIVA"].source)


def test_a_verdict_follows_its_record(clone, tmp_path):
    """DIVA's items of understanding are raised by .1: what was a loss becomes a gain, and no other line of Table 1 moves."""
    shutil.copytree(clone, tmp_path / "other")
    ledger = Ledger(clone / "experiments/diva.jsonl")
    (tmp_path / "other/experiments/diva.jsonl").unlink()
    with (tmp_path / "other/experiments/diva.jsonl").open("w") as file:
        for record in ledger.records().values():
            if record["arm"] == "diva":
                record["items"]["understanding"] = [value + 0.1 for value in record["items"]["understanding"]]
            file.write(json.dumps(record) + "\n")
    before, after = verdicts.collect(clone), verdicts.collect(tmp_path / "other")
    assert of(after, "DIVA improves understanding").verdict == "reproduced" != of(before, "DIVA improves understanding").verdict
    assert of(after, "diva beats base in understanding").verdict == "reproduced"
    assert of(after, "DIVA improves generation").verdict == of(before, "DIVA improves generation").verdict


def test_a_drift_that_stops_at_the_ceiling_is_none(clone, tmp_path):
    claim = "meaning drifts at modality transitions, further with each cycle"
    content = json.loads((clone / "figures/data/drift.json").read_text())
    assert of(verdicts.collect(clone), claim).verdict == "reproduced"
    for row in content["rows"]:
        if row["metric"] == "survival":
            row |= {"value": 1.0, "low": 0.98, "high": 1.02}
    shutil.copytree(clone, tmp_path / "still")
    (tmp_path / "still/figures/data/drift.json").write_text(json.dumps(content))
    assert of(verdicts.collect(tmp_path / "still"), claim).verdict == "undecided"


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no folder experiments"):
        verdicts.collect(tmp_path)
