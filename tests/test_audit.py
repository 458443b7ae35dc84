"""Audits of known outcome: perfect, swapped and leaking encoders of planted flows, and the truth about scenes."""

import pytest
import torch

from umm_kit.data.digits import Digits
from umm_kit.data.language import vocabulary_corpus
from umm_kit.data.shapes import Shapes
from umm_kit.evaluation.audit import OWN, audit, recovery, score, truth_table
from umm_kit.evaluation.known import Split, collect, planted_flows
from umm_kit.features import FLOWS
from umm_kit.models.factors import FactorEncoders, FactorEncodersConfig
from umm_kit.models.masked import MaskedUMM


@pytest.fixture(scope="module")
def planted():
    return planted_flows(n=400, shared=1, unique_u=1, unique_g=1, d=8)


def perfect(p, flows=FLOWS):
    return Split({flow: p.sources["shared"] for flow in flows}, {flow: p.sources[OWN[flow]] for flow in flows})


def leaking(p):
    """As perfect, but for the unique half of understanding, which also holds what is shared."""
    out = perfect(p)
    return Split(out.shared, out.unique | {"understanding": torch.cat([p.sources["U-only"], p.sources["shared"]], 1)})


def test_perfect_encoders_pass_and_beat_linear_splits(planted):
    out = score(lambda flows: perfect(planted), planted.flows, planted.factors, planted.kinds)
    assert out.passed, out.summary()
    assert len(out.judged) == 8 and set(out.judged["verdict"]) == {"pass"} and not out.unjudged
    assert out.summary().startswith("The audit is passed: 8 of 8")
    frame = out.to_frame().query("method == 'encoders' and flow == 'understanding'").set_index(["factor", "z"])
    assert frame.loc[("U-only 0", "unique"), "r"] > 0.8 and frame.loc[("U-only 0", "gain"), "r"] > 0.6
    assert abs(frame.loc[("shared 0", "gain"), "r"]) < 0.2 and frame.loc[("shared 0", "h"), "r"] == 1
    # Nothing of G's own is in U: there is no share to judge.
    assert torch.isnan(torch.tensor(frame.loc[("G-only 0", "unique"), "r"])) and frame.loc[("G-only 0", "unique"), "wanted"] == ""
    rivals = out.rivals.set_index("method")
    assert set(rivals.index) == {"encoders", "CCA", "PCA", "random"} and (rivals["low"].dropna() > 0).all()
    assert rivals.loc["encoders", "separation"] > 0.7 > rivals.loc["random", "separation"]


def test_swapped_encoders_fail_and_do_not_beat_the_right_ones(planted):
    right = perfect(planted)
    out = score(
        lambda flows: Split(right.unique, right.shared),
        planted.flows,
        planted.factors,
        planted.kinds,
        {"perfect": lambda seen, size: lambda flows: right},
    )
    assert not out.passed and set(out.judged["verdict"]) == {"fail"}
    assert "not ahead of the perfect split" in out.summary() and out.rivals["ahead"].iloc[-1] < -1


def test_a_tie_is_no_lead(planted):
    same = lambda seen, size: lambda flows: perfect(planted)  # noqa: E731
    out = score(lambda flows: perfect(planted), planted.flows, planted.factors, planted.kinds, {"same": same})
    assert set(out.judged["verdict"]) == {"pass"} and not out.passed and "not ahead of the same split" in out.summary()


def test_a_leak_is_named(planted):
    out = score(lambda flows: leaking(planted), planted.flows, planted.factors, planted.kinds, {})
    bad = out.judged.query("verdict == 'fail'")
    assert bad[["flow", "factor", "z"]].values.tolist() == [["understanding", "shared 0", "unique"]] and not out.passed
    assert "'shared 0' (shared) leaks into the unique half of understanding" in out.summary()


def test_recovery_tells_a_leak_from_chance(planted):
    good = recovery(lambda flows: perfect(planted), planted, permutations=5)
    assert good["ok"].all() and len(good) == 8 and (good["null"] < 0.2).all()
    bad = recovery(lambda flows: leaking(planted), planted, permutations=5).query("not ok")
    assert bad[["flow", "factor", "z", "quantity"]].values.tolist() == [["understanding", "shared 0", "unique", "leakage"]]


def test_what_h_does_not_hold_is_not_judged(planted):
    flows = planted.flows | {"generation": torch.randn(400, 8, generator=torch.Generator().manual_seed(1))}
    out = score(lambda flows: perfect(planted), flows, planted.factors, planted.kinds, {})
    assert out.unjudged == ["G-only"] and not out.passed and set(out.judged["flow"]) == {"understanding"}
    assert "No G-only factor could be judged" in out.summary()


def test_refuses_bad_input(planted):
    right, p = (lambda flows: perfect(planted)), planted
    holes = p.flows | {"generation": p.flows["generation"].clone().fill_(torch.nan)}
    with pytest.raises(ValueError, match="NaN"):
        score(right, holes, p.factors, p.kinds)
    with pytest.raises(ValueError, match="same n items"):
        score(right, p.flows | {"generation": p.flows["generation"][:-1]}, p.factors, p.kinds)
    with pytest.raises(ValueError, match=r"shared half of understanding is \(3, 2\)"):
        score(lambda flows: Split(*[dict.fromkeys(FLOWS, torch.zeros(3, 2))] * 2), p.flows, p.factors, p.kinds)
    with pytest.raises(ValueError, match="'flat' is constant"):
        score(right, p.flows, {"flat": torch.zeros(400, dtype=torch.long)}, {"flat": "shared"})
    with pytest.raises(ValueError, match="40 items"):
        score(right, {flow: h[:40] for flow, h in p.flows.items()}, p.factors, p.kinds)


# --- scenes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return MaskedUMM.tiny(list(vocabulary_corpus()))


@pytest.mark.parametrize(
    ("u", "g", "kind"),
    [(0.9, 0.2, "shared"), (0.2, 0.05, "U-only"), (0.9, 0.1, "undecided"), (0.0, 0.5, "G-only"), (0.1, 0.9, "undecided"),
     (0.05, -0.02, "neither"), (0.1, 0.0, "undecided")],
)  # fmt: skip
def test_rule_of_truth_by_hand(monkeypatch, u, g, kind):
    shares = {"u": (u, "pixels", 1.0), "g": (g, "words", 1.0)}
    monkeypatch.setattr("umm_kit.evaluation.audit._shares", lambda part, factors, seed: [shares[part]])
    row = truth_table({"understanding": "u", "generation": "g"}, {"f": None}).iloc[0]
    assert row["kind"] == kind and row["understanding"] == u and row["generation part"] == "words"


def test_truth_about_scenes(model):
    scenes = collect(model, Shapes("test", n=600))
    asked = {name: scenes.factors[name] for name in ("red", "hidden texture", "style", "mask side")}
    table = truth_table(scenes.inputs, asked).set_index("factor")
    kinds = {"red": "shared", "hidden texture": "U-only", "style": "G-only", "mask side": "G-only"}
    assert table["kind"].to_dict() == kinds, table.to_string()
    assert table.loc["hidden texture", "understanding part"] == "ground" and table.loc["style", "generation part"] == "words"
    assert table.loc["style", "entropy"] == pytest.approx(1, abs=0.1)
    hidden = scenes.inputs["generation"]["mask"].float()
    assert (hidden.mean(0) == 1).sum() == round(0.3 * 64) and 0.4 < float(hidden.mean()) < 0.5


def test_an_audit_from_model_to_summary(model):
    class Halves(torch.nn.Module):
        def forward(self, flows):
            assert not self.training
            return Split({flow: h[:, :4] for flow, h in flows.items()}, {flow: h[:, 4:8] for flow, h in flows.items()})

    encoders = Halves().train()
    out = audit(encoders, model, Shapes("test", n=200), layer=1, rivals={})
    assert encoders.training and set(out.truth["factor"]) == set(out.relevance["factor"]) == set(out.frame["factor"])
    relevance = out.relevance.set_index("factor")
    assert relevance.loc["style", "understanding"] > 0.5 > 0.1 > relevance.loc["style", "generation"]
    assert not out.passed and "not passed" in out.summary()


def test_refuses_other_data_and_grids(model):
    tokens = FactorEncoders(FactorEncodersConfig(hidden_size=32, factor_size=8, kind="transformer"))
    with pytest.raises(ValueError, match="'transformer' read tokens, an audit pools states; expected 'gated'"):
        audit(tokens, model, Shapes("test", n=8))
    with pytest.raises(ValueError, match=r"uk\.Shapes"):
        audit(lambda flows: flows, model, Digits("test", n=8))

    class Finer:
        grid, num_layers = (16, 16), 2

    with pytest.raises(ValueError, match="does not divide"):
        audit(lambda flows: flows, Finer(), Shapes("test", n=8))
