"""The frontier of both losses: points and verdicts by hand, and one run of seconds."""

from dataclasses import replace

import numpy as np
import pytest

from umm_kit.data.language import vocabulary_corpus
from umm_kit.experiments import Ledger, comparison, diva, frontier
from umm_kit.models.masked import MaskedUMM


def runs(arm, ratio, u, g, bases=("a", "b")):
    """Losses around u and g, from two bases that differ by .01."""
    for k, base in enumerate(bases):
        rng = np.random.default_rng([k, len(arm), int(8 * ratio)])
        items = {
            metric: value + 0.01 * k + 0.01 * rng.standard_normal(100)
            for metric, value in zip(frontier.LOSSES, (u, g), strict=True)
        }
        name = f"{base}, {arm}, {ratio}"
        yield name, {"name": name, "arm": arm, "base": base, "ratio": ratio, "seed": 0, "items": items}


@pytest.mark.parametrize(
    ("u", "g", "said"), [(0.4, 2.9, "better"), (0.6, 3.1, "worse"), (0.4, 3.1, "a trade"), (0.4, 3.0, "undecided")]
)
def test_verdicts_by_hand(u, g, said):
    records = dict([*runs("sft_middle", 1.0, 0.5, 3.0), *runs("diva", 1.0, u, g)])
    if said == "undecided":  # what one base gains in generation, the other loses
        for base, shift in (("a", 0.1), ("b", -0.1)):
            records[f"{base}, diva, 1.0"]["items"]["generation_loss"] += shift
    row = frontier.verdicts(records).iloc[0]
    assert row.verdict == said and row.understanding_loss_value == pytest.approx(0.5 - u, abs=0.01), "above 0: DIVA's is lower"


def test_bases_that_disagree_are_no_verdict():
    """DIVA's losses are lower from all three bases, but not by gains that tell: .01, .02 and .06."""
    three = ("a", "b", "c")
    records = dict([*runs("sft_middle", 1.0, 0.5, 3.0, three), *runs("diva", 1.0, 0.5, 3.0, three)])
    for base, gain in zip(three, (0.01, 0.02, 0.06), strict=True):
        items = records[f"{base}, diva, 1.0"]["items"]
        records[f"{base}, diva, 1.0"]["items"] = {metric: values - gain for metric, values in items.items()}
    row = frontier.verdicts(records).iloc[0]
    assert row.verdict == "undecided" and row.understanding_loss_low < 0 < row.understanding_loss_value


def test_points_are_means_over_bases():
    points = frontier.frontier(
        dict([*runs("diva", 1.0, 0.5, 3.0), *runs("diva", 2.0, 0.4, 3.2), *runs("base", 1.0, 1, 4, ("a",))])
    )
    assert list(points.ratio) == [1, 2] and set(points.runs) == {2}, "one base is no point"
    np.testing.assert_allclose(points.understanding_loss, [0.505, 0.405], atol=0.003)
    assert (points.generation_loss_low < points.generation_loss).all()


@pytest.mark.slow
def test_a_frontier_of_seconds(tmp_path, monkeypatch):
    bases = []
    for k in range(2):
        MaskedUMM.tiny(list(vocabulary_corpus())).save_pretrained(tmp_path / f"base-{k}")
        bases.append(str(tmp_path / f"base-{k}"))
    settings = {"stage1_steps": 2, "max_steps": 2, "per_device_train_batch_size": 8, "warmup_steps": 0, "factor_size": 8}
    arms = replace(diva.PRESETS["tiny"], bases=tuple(bases), seeds=(100,), rates=(1e-4,), settings=settings)
    small = frontier.Preset(arms, ratios=(0.5,), n=8)
    tuning = Ledger(tmp_path / "diva-tuning.jsonl")
    for name in ("sft_middle", "diva"):
        tuning.add(f"cost of {name}", {"processor_seconds": 1})
        tuning.add(comparison.tuning_name(name, 1e-4), {"means": {"understanding": 0, "generation": 0}})
    said = frontier.run(small, tmp_path / "frontier.jsonl", tmp_path / "runs")
    records = Ledger(tmp_path / "frontier.jsonl").records()
    assert len(records) == 6 and "Is DIVA's frontier below" in said
    changes = next(r for r in records.values() if r["arm"] == "diva")["changes"]
    assert changes["understanding_weight"] == pytest.approx(2 / 3) and changes["generation_weight"] == pytest.approx(4 / 3)
