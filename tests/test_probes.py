"""Probes against planted factors, a naive ridge and naive neighbours, nulls, groups, and what must be refused."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import balanced_accuracy_score, r2_score
from sklearn.neighbors import KNeighborsRegressor

from umm_kit.data.shapes import COLOURS, SceneObject, Scenes, Shapes
from umm_kit.diagnostics import probes
from umm_kit.diagnostics.probes import Target, probe, probe_targets
from umm_kit.features import Features, extract
from umm_kit.models.masked import MaskedUMM


def features(states, masks=None, grid=(2, 2), **factors):
    states = states if isinstance(states, dict) else {("understanding", 1): states}
    n = len(next(iter(states.values())))
    return Features([f"{i}" for i in range(n)], states, {}, dict.fromkeys(("understanding", "generation"), grid), masks, factors)


def one(frame, **where):
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


@pytest.fixture
def planted():
    """States that hold a number and a class, and two factors they do not hold."""
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(240, 6, generator=rng)
    noise = torch.randn(240, generator=rng)
    digit = (h[:, 1] > 0.5).long() + (h[:, 1] > 1).long()
    number = h[:, 0] + 0.5 * noise
    return features(h @ torch.randn(6, 6, generator=rng), number=number, digit=digit, absent=torch.randn(240, generator=rng))


def test_targets_of_a_scene_by_hand():
    objects = [SceneObject("top", "circle", "red", "small"), SceneObject("left", "ring", "red", "large")]
    scenes = Scenes.of([objects, [SceneObject("centre", "cross", "blue", "large")]])
    factors = {name: torch.from_numpy(values) for name, values in scenes.factors().items()}
    jitter = torch.zeros(2, 4, 2)
    jitter[0, 0], jitter[0, 1], jitter[:, 2:] = torch.tensor([0.5, 0.0]), torch.tensor([0.5, -0.5]), 9.0
    texture = torch.arange(128.0).reshape(2, 8, 8)
    out = probe_targets(factors | {"jitter": jitter, "texture": texture})
    assert out["count"].values.tolist() == [2, 1] and out["count"].said and not out["count"].classes
    assert out["colour"].values[:, COLOURS.index("red")].tolist() == [2, 0]
    assert out["shape"].values.tolist() == [[1, 0, 0, 0, 1], [0, 0, 0, 1, 0]] and out["size"].values.tolist() == [[1, 1], [0, 1]]
    assert out["cell"].values.sum(1).tolist() == [2, 1] and out["cell"].values[0, 1] == 1
    assert out["jitter"].values.tolist() == [[0.5, -0.25], [0.0, 0.0]] and not out["jitter"].said
    assert out["texture"].values.tolist() == [31.5, 95.5] and out["patch texture"].patches
    assert (
        probe_targets({"digit": torch.arange(5)})["digit"].classes and not probe_targets({"id": torch.arange(50)})["id"].classes
    )


def test_linear_finds_what_is_there_and_only_that(planted):
    frame = probe(planted).to_frame()
    number, absent, digit = (one(frame, factor=name) for name in ("number", "absent", "digit"))
    assert number["measure"] == "R^2" and number["kind"] == "unsaid" and number["chance"] == 0
    assert number["score"] == pytest.approx(0.8, abs=0.06)  # var h / (var h + 0.25)
    assert number["low"] < number["score"] < number["high"] and number["n"] == 240
    assert absent["score"] < 0.03 and absent["low"] < 0.03
    assert digit["measure"] == "balanced accuracy" and digit["kind"] == "said" and digit["chance"] == pytest.approx(1 / 3)
    assert digit["score"] > 0.6 and digit["control"] == pytest.approx(1 / 3, abs=0.1)
    assert (frame["selectivity"] == frame["score"] - frame["control"]).all()
    assert number["control"] < 0.02


def test_ridge_is_ridge_with_an_inner_leave_one_out(planted):
    x = planted.states["understanding", 1].double()
    y, fold = torch.stack([planted.factors["number"], planted.factors["absent"]], 1).double(), torch.arange(240) % 4
    predicted, mean = probes._ridge(x, y, fold)
    for f in range(4):
        train, test = fold != f, fold == f
        for column in range(2):
            alphas = np.array(probes.PENALTIES) * int(train.sum())
            alpha = RidgeCV(alphas).fit(x[train], y[train, column]).alpha_
            naive = Ridge(alpha).fit(x[train], y[train, column]).predict(x[test])
            np.testing.assert_allclose(predicted[test, column], naive, atol=1e-9)
        torch.testing.assert_close(mean[test], y[train].mean(0).expand(int(test.sum()), -1))


def test_neighbours_are_those_of_other_folds(planted):
    x, y, fold = planted.states["understanding", 1].double(), planted.factors["number"].double()[:, None], torch.arange(240) % 3
    predicted, _ = probes._nearest(x, y, fold, 7)
    for f in range(3):
        naive = KNeighborsRegressor(7).fit(x[fold != f], y[fold != f]).predict(x[fold == f])
        np.testing.assert_allclose(predicted[fold == f], naive, atol=1e-12)
    near = features(torch.stack([planted.factors["number"], planted.factors["absent"]], 1), **planted.factors)
    assert one(probe(near, method="knn").to_frame(), factor="number")["score"] > 0.9


def test_scores_are_those_of_sklearn():
    rng = torch.Generator().manual_seed(1)
    truth, guess = torch.randn(50, 2, generator=rng).double(), torch.randn(50, 2, generator=rng).double()
    lost, total = probes._errors(truth, guess, truth.mean(0).expand(50, 2), False)
    assert float(probes._score(lost.sum(0), total.sum(0))) == pytest.approx(r2_score(truth, guess))
    label, votes = torch.randint(3, (50,), generator=rng), torch.rand(50, 3, generator=rng).double()
    hot = torch.nn.functional.one_hot(label).double()
    lost, total = probes._errors(hot, votes, hot.mean(0).expand(50, 3), True)
    answers = (votes / hot.mean(0)).argmax(1)
    assert float(probes._score(lost.sum(0), total.sum(0))) == pytest.approx(balanced_accuracy_score(label, answers))


def test_a_rotation_a_shift_and_a_scale_change_nothing(planted):
    h = planted.states["understanding", 1]
    moved = features(1000 + 7 * h, **planted.factors)
    a, b = probe(planted).to_frame(), probe(moved).to_frame()
    np.testing.assert_allclose(a["score"], b["score"], atol=1e-3)
    wide = torch.cat([h.double(), torch.zeros(240, 300), torch.ones(240, 1)], 1)  # constant columns say nothing
    np.testing.assert_allclose(a["score"], probe(features(wide, **planted.factors)).to_frame()["score"], atol=1e-5)
    many = torch.randn(240, 500, generator=torch.Generator().manual_seed(2)).double()
    rotated = probes._standardised(many, "here")
    assert rotated.shape == (240, 240)
    standard = (many - many.mean(0)) / many.std(0)
    torch.testing.assert_close(rotated @ rotated.T, standard @ standard.T)


def test_groups_are_held_out_together():
    rng = torch.Generator().manual_seed(0)
    h, label = torch.randn(60, 8, generator=rng).repeat_interleave(4, 0), torch.randn(60, generator=rng).repeat_interleave(4)
    seen = features(h + 1e-3 * torch.randn(240, 8, generator=rng), label=label)
    apart = probe(seen, method="knn", neighbours=3).to_frame()["score"][0]
    together = probe(seen, method="knn", neighbours=3, groups=np.arange(240) // 4).to_frame().iloc[0]
    assert apart > 0.7 and together["score"] < 0.1 and together["n"] == 60


def test_texture_of_every_patch_needs_tokens_and_is_split_by_the_mask():
    rng = torch.Generator().manual_seed(0)
    texture = torch.randn(80, 4, 4, generator=rng)
    coarse = torch.nn.functional.avg_pool2d(texture[:, None], 2).flatten(1)  # onto a 2 x 2 token grid
    mask = torch.rand(80, 4, generator=rng) < 0.5
    tokens = coarse[:, :, None] + 0.01 * torch.randn(80, 4, 3, generator=rng)
    states = {("generation", 2): tokens * ~mask[:, :, None], ("understanding", 2): tokens}
    frame = probe(features(states, mask, texture=texture)).to_frame()
    assert one(frame, flow="understanding", factor="patch texture")["score"] > 0.99
    visible, hidden = (one(frame, factor=f"patch texture, {view}") for view in ("visible", "hidden"))
    assert visible["score"] > 0.9 and hidden["score"] < 0.05 and abs(visible["control"]) < 0.05
    assert list(frame["flow"].unique()) == ["understanding", "generation"]
    pooled = features({key: value.mean(1) for key, value in states.items()}, mask, texture=texture)
    assert set(probe(pooled).to_frame()["factor"]) == {"texture"}
    with pytest.raises(ValueError, match=r"does not divide into the token grid \(3, 3\)"):
        probe(features({("understanding", 0): torch.randn(80, 9, 3)}, grid=(3, 3), texture=texture))


def test_all_factors_of_a_model_and_its_image():
    data = Shapes("test", n=64)
    model = MaskedUMM.tiny([item["texts"] for item in data])
    frame = probe(extract(model, data, layers=[0, 2], progress=False), folds=4).to_frame()
    assert len(frame) == 2 * 2 * 10 and frame.notna().all(axis=None)
    assert set(frame[frame["kind"] == "said"]["factor"]) == {"count", "cell", "shape", "colour", "size"}
    grey = one(frame, flow="understanding", layer=0, factor="grey")
    assert grey["score"] > 0.2 > grey["control"]
    again = probe(extract(model, data, layers=[0, 2], progress=False), folds=4).to_frame()
    assert again.equals(frame)


def test_interval_covers_what_many_scenes_say(monkeypatch):
    monkeypatch.setattr(probes, "_RESAMPLES", 300)
    monkeypatch.setattr(probes, "_CONTROLS", 1)

    def draw(n, seed):
        rng = torch.Generator().manual_seed(seed)
        h = torch.randn(n, 2, generator=rng)
        return features(h, number=h[:, 0] + torch.randn(n, generator=rng))

    found = [probe(draw(150, seed)).to_frame().iloc[0] for seed in range(40)]
    assert np.mean([row["low"] <= 0.5 <= row["high"] for row in found]) >= 0.85
    assert np.mean([row["high"] - row["low"] for row in found]) == pytest.approx(0.22, abs=0.04)


def test_float16_strides_and_constants(planted):
    h = planted.states["understanding", 1]
    strided = torch.stack([h, h], 2)[:, :, 0]
    assert not strided.is_contiguous()
    a = probe(planted).to_frame()
    assert probe(features(strided, **planted.factors)).to_frame().equals(a)
    half = probe(features(h.half(), **planted.factors)).to_frame()
    np.testing.assert_allclose(half["score"], a["score"], atol=0.01)
    with pytest.warns(UserWarning, match="'still' is constant"):
        frame = probe(
            planted, {"still": Target(torch.ones(240), True), "number": Target(planted.factors["number"], True)}
        ).to_frame()
    assert list(frame["factor"]) == ["number"]
    with pytest.warns(UserWarning, match="the same in every scene"):
        frame = probe(features(torch.ones(240, 4), **planted.factors)).to_frame()
    assert abs(one(frame, factor="number")["score"]) < 1e-9 and one(frame, factor="digit")["score"] == pytest.approx(1 / 3)


def test_refusals(planted):
    h = planted.states["understanding", 1]
    with pytest.raises(ValueError, match="method 'deep'"):
        probe(planted, method="deep")
    with pytest.raises(ValueError, match="3 group labels for 240 scenes"):
        probe(planted, groups=[1, 2, 3])
    with pytest.raises(ValueError, match="4 groups, 5 folds"):
        probe(planted, groups=np.arange(240) % 4)
    with pytest.raises(ValueError, match="understanding at layer 1"):
        probe(features(h.masked_fill(torch.eye(240, 6, dtype=torch.bool), torch.nan), number=torch.randn(240)))
    with pytest.raises(ValueError, match="no factor to probe"):
        probe(features(h))
    with pytest.raises(ValueError, match="target 'short' is"):
        probe(planted, {"short": Target(torch.ones(3), True)})
    with pytest.raises(ValueError, match="0 states"):
        probe(Features(planted.ids, {}, {}, {}, factors=planted.factors))
