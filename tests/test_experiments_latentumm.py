"""LatentUMM's arms: configurations, what is taken from a drift, and one run of seconds."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

import umm_kit as uk
from umm_kit.data.shapes import Shapes
from umm_kit.evaluation.blame import PerfectReader, PerfectWriter
from umm_kit.experiments import Ledger, diva, latentumm

TINY = latentumm.PRESETS["tiny"]
DATA = Shapes("test", n=24, seed=6)


class Forgetful(PerfectReader, PerfectWriter):
    """Forgets everything about one picture in ``every``."""

    def __init__(self, every):
        PerfectReader.__init__(self, DATA)
        PerfectWriter.__init__(self, DATA)
        self.every = every

    def understand(self, images, **options):
        said = super().understand(images)
        return ["nothing that can be read" if i % self.every == 0 else text for i, text in enumerate(said)]


def test_every_arm_is_a_configuration_that_its_trainer_takes(tmp_path):
    for name, arm in latentumm.ARMS.items():
        config = latentumm.config_of(name, TINY, 0, tmp_path, 1e-4, 7 if arm.plain else None)
        assert (config.max_steps == 7) == arm.plain, name
    plain = latentumm.config_of("sft", TINY, 0, tmp_path, 1e-4, 7)
    assert not plain.draws_pairs and not any((plain.modal_weight, plain.capacity_weight, plain.target_weight))
    assert latentumm.config_of("released", TINY, 0, tmp_path, 1e-4).capacity == "heads"
    with pytest.raises(ValueError, match="number of steps"):
        latentumm.config_of("sft", TINY, 0, tmp_path, 1e-4)


def test_items_of_a_drift_have_its_mean_survival():
    found = uk.drift(Forgetful(4), DATA, cycles=2, progress=False)
    items = latentumm.of_drift(found)
    assert np.mean(items["survival"]) == pytest.approx(found.mean_survival.value, abs=1e-4)
    by_cycle = found.to_frame().query("metric == 'survival'").set_index("cycle").value
    for name, cycle in (("survival_first", 1), ("survival_last", 2)):
        assert np.mean(items[name]) == pytest.approx(by_cycle[cycle], abs=1e-4)
    lost = np.arange(24) % 4 == 0
    assert np.all(np.array(items["survival"])[lost] < 0.1) and np.all(np.array(items["survival"])[~lost] > 0.5)
    assert np.all(np.array(items["told"])[lost] == 0) and np.all(np.array(items["told"])[~lost] >= 4)
    assert np.allclose(np.array(items["distinct"])[lost], 1 / 6, atol=1e-3), "six items ended in the same words"


def test_survival_alone_chooses_the_rate():
    means = [{"survival": 0.1 * k, "understanding": 0.9 - 0.3 * k, "generation": 0.5} for k in range(len(TINY.rates))]
    trials = {f"sft at {rate:g}": {"arm": "sft", "rate": rate, "means": m} for rate, m in zip(TINY.rates, means, strict=True)}
    assert latentumm.STUDY.best_rate(trials, "sft", TINY) == TINY.rates[-1]
    assert latentumm.STUDY.tuning_table(trials).best.tolist() == [False, False, False, True]


def test_diva_keeps_the_rate_that_its_own_trials_chose():
    trials = Ledger(ROOT / "experiments/diva-tuning.jsonl").records()
    assert diva.STUDY.best_rate(trials, "diva", diva.PRESETS["tiny"]) == latentumm.DIVA_RATE == latentumm.ARMS["diva"].rate
    assert "diva" not in latentumm.STUDY.tuned(TINY)


@pytest.mark.slow
def test_arms_run_and_resume(tmp_path):
    base = "tiny-tight-0"  # drift asks for a tokenizer that keeps pictures
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0, "prompts": 4, "rounds": 1, "pairs": 2}
    settings |= {"rollouts": 2, "draws": 2, "drawing_steps": 1, "threshold": 0.0, "target_weight": 0.0}
    small = replace(TINY, bases=(base,), seeds=(0,), rates=(1e-4,), arms=("sft", "dpo"), settings=settings)
    small = replace(small, n=8, n_prompts=1, n_tuning=8, n_drift=8, n_drift_tuning=8, cycles=1)
    arms = {name: latentumm.ARMS[name] for name in ("sft", "latentumm", "dpo")}
    study = replace(latentumm.STUDY, arms=arms)
    study.tune(small, tmp_path / "latentumm-tuning.jsonl", tmp_path / "tuning")
    study.run(small, tmp_path / "latentumm.jsonl", tmp_path / "runs")
    done = Ledger(tmp_path / "latentumm.jsonl").records()
    assert set(done) == {"tiny-tight-0, base", "tiny-tight-0, sft, seed 0", "tiny-tight-0, dpo, seed 0"}
    assert {"survival", "told", "distinct"} < set(done["tiny-tight-0, dpo, seed 0"]["items"])
    assert done["tiny-tight-0, dpo, seed 0"]["changes"]["preference"] == "dpo"
    assert "2 trained models" in study.summary(done)
