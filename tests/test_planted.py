"""Planted truth: words by hand, what each arm switches off, the rule of the verdicts, and one run of seconds."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from umm_kit.experiments import Ledger, planted
from umm_kit.features import FLOWS
from umm_kit.losses.factorization import UniqueCritic
from umm_kit.models.factors import Factors

TINY = planted.PRESETS["tiny"]


def test_words_follow_both_parts():
    """Very sharp words are a function of the factors; rows with equal factors say the same, and either part changes it."""
    rng = torch.Generator().manual_seed(0)
    s, u = torch.randn(4, 1, generator=rng), torch.randn(4, 1, generator=rng)
    rows = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1])
    at = torch.cat([s[rows[0]], torch.randn(60, 1, generator=rng)]), torch.cat([u[rows[1]], torch.randn(60, 1, generator=rng)])
    said = planted.words(*at, 16, 3, 1e4, torch.Generator().manual_seed(1))
    assert said.shape == (64, 3) and bool((said[:, :1] == said).all()), "at this sharpness a row has one word"
    assert said[0, 0] == said[1, 0]
    for part in (0, 1):  # the other part held still
        mixed = [at[0], at[1]]
        mixed[part] = mixed[part][torch.randperm(64, generator=rng)]
        other = planted.words(*mixed, 16, 3, 1e4, torch.Generator().manual_seed(1))
        assert 0.1 < float((other != said).float().mean()) < 1


@torch.no_grad()
def factors(seed=0, n=16, f=4):
    rng = torch.Generator().manual_seed(seed)
    new = lambda: torch.nn.functional.layer_norm(torch.randn(n, f, generator=rng), (f,))  # noqa: E731
    return Factors({flow: new() for flow in FLOWS}, {flow: new() for flow in FLOWS})


def terms(z, ramp, **changes):
    critic = UniqueCritic(4, 64, 16, 1, learning_rate=0.01, threshold=0.0, seed=0)
    return planted.factor_terms(z, planted.Arm(**changes), TINY, critic, torch.arange(16), ramp)


def test_each_arm_switches_off_its_term():
    z = factors()
    assert float(terms(z, 1, alignment=False, unique="none", orthogonality=False)) == 0
    both = [terms(z, 1, unique="none", **{name: False}) for name in ("alignment", "orthogonality")]
    assert float(sum(both)) == pytest.approx(float(terms(z, 1, unique="none")), rel=1e-6)
    with_unique = terms(z, 1, alignment=False, orthogonality=False, unique="fixed")
    unique = [torch.nn.functional.normalize(z.unique[flow], dim=1) for flow in FLOWS]
    scores = unique[0] @ unique[1].T / TINY.temperature
    apart = scores[~torch.eye(16, dtype=torch.bool)].mean()
    assert float(with_unique) == pytest.approx(TINY.unique * float(scores.diag().mean() - apart), rel=1e-4)


def test_unique_terms_wait_and_rise():
    """Before ramp 0 only the alignment acts; then I_uni in proportion, up to its weight."""
    z = factors()
    assert float(terms(z, -0.1)) == pytest.approx(float(terms(z, 1, unique="none", orthogonality=False)), rel=1e-6)
    alone = dict(alignment=False, orthogonality=False, unique="fixed")
    half, whole, later = (float(terms(z, ramp, **alone)) for ramp in (0.5, 1, 3))
    assert half == pytest.approx(whole / 2) and later == whole


@pytest.mark.parametrize("arm", ["method", "shuffled_pairs"])
def test_shuffled_rows_keep_words_with_their_flow(monkeypatch, arm):
    """What is broken is the pairing alone: U meets G of another row, but each flow's words still belong to its own states."""
    small, states, targets = replace(TINY, steps=2), [], []
    data, said = planted.plant(small, 0)
    encode, cross_entropy = planted.FactorEncoders.forward, planted.nn.functional.cross_entropy

    def spied(self, at):
        states.append(at)
        return encode(self, at)

    monkeypatch.setattr(planted.FactorEncoders, "forward", spied)
    monkeypatch.setattr(planted.nn.functional, "cross_entropy", lambda s, y: targets.append(y) or cross_entropy(s, y))
    planted.factorize(data, said, planted.ARMS[arm], small, 0)
    rows = {flow: torch.cat([rows_among(at[flow], data.flows[flow]) for at in states]) for flow in FLOWS}
    for k, flow in enumerate(FLOWS):
        assert torch.equal(torch.cat(targets[k::2]), said[flow][rows[flow]].flatten())
        assert sorted(rows[flow].tolist()) == list(range(2 * small.batch)), "each row is used once"
    met = rows["understanding"] == rows["generation"]
    assert bool(met.all()) if arm == "method" else not bool(met.any())


def rows_among(some, every):
    """Which rows these are."""
    return torch.cdist(some, every).argmin(1)


def lines(arm, seed, leak=0.02, reco=0.95, overlap=0.0):
    rows = [
        ("understanding", "s", "shared", "shared", "recovery", reco, 0.8, reco >= 0.8),
        ("understanding", "s", "shared", "unique", "leakage", leak, 0.05, leak <= 0.05),
        ("understanding", "u", "U-only", "unique", "recovery", 0.9, 0.8, True),
        ("understanding", "u", "U-only", "shared", "leakage", 0.0, 0.05, True),
        ("understanding", "", "", "both", "overlap", overlap, 0.05, True),
    ]
    frame = pd.DataFrame(rows, columns=["flow", "factor", "kind", "z", "quantity", "r", "limit", "ok"])
    return frame.assign(arm=arm, seed=seed)


def test_verdicts_by_hand():
    margin = planted.MARGIN
    frame = pd.concat(
        [lines(planted.METHOD, s) for s in (0, 1)]
        + [lines("no_unique_term", s, leak=0.02 + 1.5 * margin) for s in (0, 1)]
        + [lines("own_injection", 0, reco=0.95 - 1.5 * margin), lines("own_injection", 1)]
    )
    found = planted.verdicts(frame).set_index("arm")
    assert found.verdict[planted.METHOD] == "" and found.passed[planted.METHOD] == 2
    assert found.verdict["no_unique_term"] == "told apart" and found.by["no_unique_term"] == "leakage shared"
    assert found.passed["no_unique_term"] == 0
    assert found.verdict["own_injection"] == "not told apart" and found.told["own_injection"] == 1, "in one seed of two"
    said = planted.summary(frame)
    assert "told apart from method (2 of 2 seeds, by leakage shared)" in said


def test_a_better_arm_is_not_told_apart():
    frame = pd.concat([lines(planted.METHOD, 0, leak=0.5, reco=0.5), lines("no_orthogonality", 0, leak=0.0, reco=1.0)])
    assert planted.verdicts(frame).set_index("arm").told["no_orthogonality"] == 0, "only a worse level tells"


def test_the_tiny_preset_runs_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(planted, "ARMS", {name: planted.ARMS[name] for name in (planted.METHOD, "fixed_critic")})
    path = tmp_path / "planted.jsonl"
    planted.run(TINY, path, tmp_path, (1, 2))
    assert list(Ledger(path).records()) == ["method, seed 0"]
    said = planted.run(TINY, path, tmp_path)
    assert len(Ledger(path).records()) == 2 and "fixed_critic" in said
    stamp = path.read_bytes()
    assert planted.run(TINY, path, tmp_path) == said and path.read_bytes() == stamp
    frame = planted.frame_of(Ledger(path).records())
    assert set(frame.quantity) == {"recovery", "leakage", "overlap"} and np.isfinite(frame.r).all()
