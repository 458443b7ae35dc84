"""Experiments: records that survive a stop, endpoints in one order for all models, verdicts by the stated rule."""

import json
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from umm_kit.data.language import vocabulary_corpus
from umm_kit.experiments import Ledger, atlas, diva, endpoints, families, frontier, intervention, latentumm
from umm_kit.experiments import planted as planted_truth
from umm_kit.models.masked import MaskedUMM


def test_ledger_keeps_runs_and_what_stands_behind_them(tmp_path):
    ledger = Ledger(tmp_path / "new/runs.jsonl")
    assert ledger.records() == {}
    ledger.add("a", {"score": 1})
    Ledger(tmp_path / "new/runs.jsonl").add("b", {"score": 2})  # another process
    assert {name: r["score"] for name, r in ledger.records().items()} == {"a": 1, "b": 2}
    assert {"command", "versions", "device"} <= set(ledger.records()["a"])


def test_ledger_survives_half_a_line(tmp_path):
    ledger = Ledger(tmp_path / "runs.jsonl")
    ledger.add("a", {"score": 1})
    with open(ledger.path, "a") as file:
        file.write('{"name": "b", "sco')
    ledger.add("c", {"score": 3})
    assert list(ledger.records()) == ["a", "c"]


@dataclass
class Sizes:
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 100
    settings: dict = field(default_factory=lambda: {"rate": 1e-3})


def test_runs_of_other_sizes_do_not_mix(tmp_path):
    file = tmp_path / "runs.jsonl"
    Ledger(file).add("from before records kept it", {"score": 0})
    Ledger(file, Sizes()).add("a", {"score": 1})
    assert Ledger(file, Sizes(seeds=(7,))).records()["a"]["preset"] == {"steps": 100, "settings": {"rate": 1e-3}}
    assert len(Ledger(file).records()) == 2, "without a preset all are read"
    with pytest.raises(ValueError, match=r"holds 'a' with steps 100 \(now 200\); choose another --records"):
        Ledger(file, Sizes(steps=200)).records()
    with pytest.raises(ValueError, match=r"settings {'rate': 0.001} .now"):
        Ledger(file, Sizes(settings={"rate": 1e-2})).records()


def test_a_preset_within_a_preset_is_kept_too(tmp_path):
    """Of the frontier's arms nothing was kept, and a file of another texture was taken."""
    chosen = frontier.PRESETS["tiny"]
    Ledger(tmp_path / "runs.jsonl", chosen).add("a", {"score": 1})
    arms = Ledger(tmp_path / "runs.jsonl", chosen).records()["a"]["preset"]["arms"]
    assert arms["texture"] == "none" and arms["n_tuning"] == 512 and not {"bases", "seeds", "rates"} & set(arms)
    with pytest.raises(ValueError, match=r"holds 'a' with arms {.*'none'.*} \(now {.*'high'.*}\); choose another --records"):
        Ledger(tmp_path / "runs.jsonl", replace(chosen, arms=replace(chosen.arms, texture="high"))).records()


@pytest.mark.parametrize("study", [diva.STUDY, latentumm.STUDY], ids=["diva", "latentumm"])
def test_rates_that_were_tuned_for_other_settings_are_refused(study, tmp_path):
    tuned = replace(latentumm.PRESETS["tiny"], bases=(), arms=tuple(study.arms)[:1])  # so that nothing runs
    Ledger(tmp_path / "x-tuning.jsonl", tuned).add("trial", {})
    study.run(tuned, tmp_path / "x.jsonl", tmp_path)
    with pytest.raises(ValueError, match=r"x-tuning.jsonl holds 'trial' with texture none \(now high\)"):
        study.run(replace(tuned, texture="high"), tmp_path / "x.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        *(("atlas", atlas), ("diva", diva), ("diva-tuning", diva), ("families", families), ("intervention", intervention)),
        *(("latentumm", latentumm), ("latentumm-tuning", latentumm), ("planted", planted_truth)),
    ],
)
def test_committed_records_go_on_with_the_preset(name, module, root):
    assert Ledger(root / f"experiments/{name}.jsonl", next(iter(module.PRESETS.values()))).records()


@pytest.fixture(scope="module")
def found():
    model = MaskedUMM.tiny(list(vocabulary_corpus()))
    return [endpoints(model, "validation", 8, 2, seed=1, progress=False) for _ in range(2)]


def test_endpoints_are_the_same_twice_and_one_per_item(found):
    first, second = found
    assert first == second
    sizes = {metric: len(values) for metric, values in first.items()}
    scenes = ("understanding_loss", "generation_loss", "caption_f1", "caption_exact", "questions", "understanding", "inpainting")
    assert {sizes[metric] for metric in scenes} == {8}
    assert sizes["generation"] == sizes["generation_strict"] == 12 and sizes["understood_of_drawn"] == 4
    assert all(0 <= value <= 1 for metric in sizes if not metric.endswith("_loss") for value in first[metric])
    assert min(first["understanding_loss"]) > 1, "an untrained model knows nothing"


def made(task, items, diagnosis=None, **cell):
    record = {"name": f"{cell}{task}", "task": task, "items": items, "width": 48, "texture": "none", "every": 4, "steps": 1600}
    record |= {"seed": 1, **cell}
    return record | ({"diagnosis": diagnosis} if diagnosis else {})


def series(value):
    return {"columns": atlas.SERIES, "data": [["gradients", "conflict", layer, value, 0, 0] for layer in (1, 2)]}


def planted(hurt_u, hurt_g, **cell):
    """Three models of one cell whose losses differ by a known amount."""
    rng = np.random.default_rng(cell["seed"])
    base = {metric: rng.random(64) for metrics in atlas.METRICS.values() for metric in metrics}
    joint = {
        metric: values + {"understanding_loss": hurt_u, "generation_loss": hurt_g}.get(metric, 0) + 0.01 * rng.standard_normal(64)
        for metric, values in base.items()
    }
    return [made("understanding", base, **cell), made("generation", base, **cell), made("joint", joint, series(hurt_u), **cell)]


def ledgers(records):
    return {record["name"]: json.loads(json.dumps(record, default=list)) for record in records}


def test_interference_by_hand():
    """A joint loss that is higher by .3, and a joint score that is lower by .25, both mean that the other task hurts."""
    alone = {metric: [1.0, 0.5, 1.0, 0.5] for metrics in atlas.METRICS.values() for metric in metrics}
    joint = alone | {"understanding_loss": [1.3, 0.8, 1.3, 0.8], "generation": [0.75, 0.25, 0.75, 0.25]}
    frame = atlas.interference(ledgers([made("understanding", alone), made("generation", alone), made("joint", joint)]))
    value = frame.set_index("metric").interference
    assert value["understanding_loss"] == pytest.approx(0.3) and value["generation"] == pytest.approx(0.25)
    assert value["caption_exact"] == 0 and set(frame.n) == {4}
    assert atlas.interference(ledgers([made("understanding", alone)])).empty, "no joint model, nothing to compare"


def test_verdicts_follow_the_rule_in_every_seed():
    cells = [*planted(0.3, 0.3, seed=1, width=48), *planted(0.3, -0.3, seed=2, width=48)]
    cells += [*planted(-0.2, 0.2, seed=1, width=96), *planted(-0.2, 0.2, seed=2, width=96)]
    frame = atlas.verdicts(atlas.interference(ledgers(cells))).set_index("width")
    assert frame.loc[48, "understanding"] == "yes" and frame.loc[48, "generation"] == "undecided"
    assert frame.loc[96, "understanding"] == "no" and frame.loc[96, "generation"] == "yes"


def test_headroom_has_limits_on_both_sides():
    items = {"caption_f1": [0.8, 0.9], "generation": [0.0, 0.2]}
    joint = [made("joint", items, seed=1), made("joint", {**items, "caption_f1": [1.0, 0.9]}, seed=2)]
    frame = atlas.headroom(ledgers([*joint[:1], {**joint[1], "name": "other"}, made("generation", items)]))
    assert frame.headroom.tolist() == ["yes", "too weak", "no room", "too weak"]
    assert frame.value.tolist()[:2] == pytest.approx([0.85, 0.1])


def test_a_planted_predictor_is_found():
    cells = [r for seed, hurt in enumerate((0.1, 0.2, 0.3, 0.4, 0.5, 0.6)) for r in planted(hurt, 0.1, seed=seed)]
    row = atlas.predictors(ledgers(cells)).set_index(["task", "series"]).loc[("understanding", "conflict")]
    assert row.spearman == pytest.approx(1) and np.isnan(row.low) and row.n == 6
    assert row.p_value == pytest.approx(2 / math.factorial(6))
    other = atlas.predictors(ledgers(cells)).set_index(["task", "series"]).loc[("generation", "conflict")]
    assert other.low < 0 < other.high, "noise is not called a predictor"


def test_spearman_interval_by_hand():
    """r = .5, n = 28: z = .5493, half = 1.96 * 1.03 / 5 = .4038, so tanh(.1456) and tanh(.9531)."""
    x = np.arange(28)
    rng = np.random.default_rng(0)
    y = next(p for _ in range(10_000) if abs(atlas.spearman(x, p := rng.permutation(28)).value - 0.5) < 0.01)
    e = atlas.spearman(x, y)
    z = np.arctanh(e.value)
    assert e.interval == pytest.approx((np.tanh(z - 0.40376), np.tanh(z + 0.40376)), abs=1e-4)


@pytest.mark.slow
def test_the_tiny_atlas_runs_and_resumes(tmp_path):
    tiny = atlas.PRESETS["tiny"]
    said = atlas.run(tiny, tmp_path / "atlas.jsonl", tmp_path / "runs", (1, 2))
    done = Ledger(tmp_path / "atlas.jsonl").records()
    assert len(done) == len(list(tiny.runs())) // 2
    stamp = (tmp_path / "atlas.jsonl").read_bytes()
    assert said == atlas.run(tiny, tmp_path / "atlas.jsonl", tmp_path / "runs", (1, 2))
    assert (tmp_path / "atlas.jsonl").read_bytes() == stamp, "what is there is not run again"
    joint = next(r for r in done.values() if r["task"] == "joint")
    assert {"gradients", "residual"} <= {row[0] for row in joint["diagnosis"]["data"]}


def test_generation_alone_is_trained_once_for_every_share_of_reading():
    """It sees no understanding, so its model serves the cells that differ in nothing else; understanding alone does not."""
    preset = atlas.Preset((atlas.Cell(48, "none", every=1), atlas.Cell(48, "none"), atlas.Cell(96, "none")), seeds=(1,))
    runs = [(cell.width, cell.every, task) for cell, _, task in preset.runs()]
    assert len(runs) == len(set(runs)) == 8 and (48, 4, "generation") not in runs and (96, 4, "generation") in runs
    records = [*planted(0.3, 0.3, seed=1, every=1), *(r for r in planted(0.1, 0.2, seed=1, every=4) if r["task"] != "generation")]
    frame = atlas.interference(ledgers(records)).set_index(["every", "metric"]).interference
    assert frame[1, "generation_loss"] == pytest.approx(0.3, abs=0.01)
    assert frame[4, "generation_loss"] == pytest.approx(0.2, abs=0.01)
    assert frame[4, "understanding_loss"] == pytest.approx(0.1, abs=0.01)
