"""The comparison of families: what is matched, what is compared, and one run of seconds."""

import numpy as np
import pytest

from umm_kit.experiments import Ledger, families
from umm_kit.models import load

SMALL = families.Preset(
    arms=("masked", "autoregressive"), seeds=(100,), width=16, layers=3, heads=2, steps=2, n=16, n_prompts=1,
    tokenizer_steps=2, n_diagnosis=128, n_drift=8, cycles=1,
)  # fmt: skip


def record(family, seed, understanding, loss=0.1):
    items = {metric: [0.5, 0.5, 0.5, 0.5] for metric in families.METRICS}
    items |= {"understanding": understanding, "understanding_loss": [loss] * 4}
    found = {"columns": families.SERIES, "data": [["gradients", "cosine", 1, 0.1 * seed, 0.0, 1.0]]}
    claims = [{"claim": "a peak", "here": 0.1 * seed, "verdict": "reproduced" if seed == 1 else "undecided"}]
    return {"arm": family, "base": str(seed), "seed": seed, "items": items, "diagnosis": found, "claims": claims}


def test_gains_are_paired_by_seed_and_item_and_a_loss_is_turned_round():
    records = {
        "a": record("masked", 1, [0.0, 1.0, 0.0, 1.0], loss=0.3),
        "b": record("masked", 2, [0.0, 1.0, 0.0, 1.0], loss=0.3),
        "c": record("flow", 1, [0.25, 1.25, 0.25, 1.25]),
        "d": record("flow", 2, [0.25, 1.25, 0.25, 1.25]),
    }
    found = families.effects(records).set_index(["metric", "family"])
    gain = found.loc[("understanding", "flow")]
    assert gain.over_masked == pytest.approx(0.25) and gain.low == pytest.approx(0.25) and gain.runs == 2
    assert found.loc[("understanding_loss", "flow")].over_masked == pytest.approx(0.2), "less loss is a gain"
    assert np.isnan(found.loc[("understanding", "masked")].over_masked)
    shapes = families.claims({"a": records["a"], "b": records["b"]})
    assert shapes.loc["a peak", ("masked", "reproduced")] == 1 and shapes.loc["a peak", ("masked", "undecided")] == 1


@pytest.mark.parametrize("family", families.CONFIGS)
def test_what_is_matched(family, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(families, "train_tokenizer", made.append)
    config = families.config_of(family, 100, SMALL, tmp_path)
    masked = load("tiny-tight-0", device="cpu").config
    full = families.Preset()
    assert (full.width, full.layers, full.heads) == (masked.hidden_size, masked.num_layers, masked.num_heads)
    assert (config.hidden_size, config.num_layers, config.max_steps, config.texture) == (16, 3, 2, "none")
    assert [c.latent for c in made] == [True] * (family == "flow"), "the other family takes the codes of tiny-masked"
    assert config.asymmetric and config.understanding_every == 1, "as the masked models were trained"


@pytest.mark.slow
def test_families_are_trained_judged_and_not_run_again(tmp_path, monkeypatch):
    file = tmp_path / "families.jsonl"
    said = families.run(SMALL, file, tmp_path / "runs")
    done = Ledger(file).records()
    assert set(done) == {f"{family}, seed {seed}" for family in SMALL.arms for seed in SMALL.seeds}
    assert "survival" in said and set(done["autoregressive, seed 100"]["items"]) == set(families.METRICS)
    stamp = file.read_bytes()
    families.run(SMALL, file, tmp_path / "runs")
    assert file.read_bytes() == stamp
