"""Views and factors of scenes by hand, planted flows that hold what they should, and splits against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA

from umm_kit.data.shapes import Shapes
from umm_kit.evaluation.known import CCASplit, PCASplit, RandomSplit, known_factors, look, planted_flows
from umm_kit.features import FLOWS

GRID = (8, 8)


def test_look_by_hand():
    images = torch.full((1, 3, 32, 32), 0.5)
    images[0, :, :4, :4] += 0.05  # texture of the first patch
    images[0, :, 8:12, 8:12] = torch.tensor([0.8, 0.0, 0.0])[:, None, None]  # patch 18 is all red
    everywhere = torch.ones(1, 64, dtype=torch.bool)
    out = look(images, everywhere, GRID)
    rest = out["ground"][0, 3:]
    assert out["ground"][0, 0] == pytest.approx(0.5, abs=0.01) and rest[0] > 0.03 and rest[18] == 0
    assert out["colour"][0, 18] == pytest.approx(0.8) and out["colour"][0].sum() == pytest.approx(0.8)
    assert out["hues"].shape == (1, 24) and out["hues"].sum() == pytest.approx(0.8 * 16) and (out["hues"] > 0).sum() == 1
    hidden = everywhere.clone()
    hidden[0, 18] = False
    assert look(images, hidden, GRID)["hues"].sum() == 0


def test_look_sees_nothing_that_is_hidden():
    images = Shapes("test", n=4).images(range(4))
    visible = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    pixels = visible.view(4, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    for a, b in zip(
        look(images, visible, GRID).values(), look(torch.where(pixels, images, 0.1), visible, GRID).values(), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_factors_of_scenes_by_hand():
    texture = torch.zeros(4, 8, 8)
    texture[0, 0, 0], texture[1, 0, 0], texture[2, 0, 0], texture[3, 7, 7] = 0.05, -0.05, 0.05, 0.05
    scenes = {
        "texture": texture, "count": torch.tensor([1, 2, 1, 1]), "grey": torch.tensor([0.4, 0.5, 0.6, 0.7]),
        "colour": torch.tensor([[0, -1], [1, 2], [1, -1], [5, -1]]), "size": torch.tensor([[0, -1], [1, 0], [0, -1], [1, -1]]),
    }  # fmt: skip
    masks, always, shown = torch.zeros(4, 64, dtype=torch.bool), torch.zeros(64, dtype=torch.bool), torch.ones(4, 64) > 0
    always[0] = True
    masks[:, 0], masks[2:, 32:40], shown[2, 0] = True, True, False
    texts = ["a small red circle at the top", "two circles", "a ring", "a ring at the left"]
    out = known_factors(scenes, texts, shown, masks, always, GRID)
    assert out["red"].tolist() == [1, 0, 0, 0] and out["large"].tolist() == [0, 1, 0, 1]
    assert out["style"].tolist() == [1, 0, 0, 1] and out["grey"].tolist() == [0, 1, 2, 3]
    assert out["hidden texture"].tolist() == [1, 0, 1, 1]  # scene 2 shows none there: 0, as scene 3
    assert out["mask side"].tolist() == [0, 0, 1, 1] and len(set(out["mask share"].tolist())) == 2


def explained(x, y):
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    return 1 - float(((y - x @ torch.linalg.lstsq(x, y).solution) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


def test_planted_flows_hold_their_own_factors_only():
    p = planted_flows(n=2000, d=16)
    u, g = (p.flows[flow] for flow in FLOWS)
    assert explained(u, p.sources["shared"]) > 0.4 and explained(g, p.sources["shared"]) > 0.4
    assert explained(u, p.sources["U-only"]) > 0.4 and explained(g, p.sources["U-only"]) < 0.05
    assert explained(u, p.sources["G-only"]) < 0.05
    assert explained(torch.cat(list(p.sources.values()), 1), u) < 0.97  # the mixing is not linear
    assert p.factors["shared 1"].unique().tolist() == [0, 1, 2, 3] and p.kinds["U-only 0"] == "U-only"
    again, other = planted_flows(n=2000, d=16), planted_flows(n=2000, d=16, seed=1)
    assert torch.equal(again.flows["generation"], g) and not torch.equal(other.flows["generation"], g)
    with pytest.raises(ValueError, match="at least 1 of each"):
        planted_flows(shared=0)


@pytest.fixture(scope="module")
def linear():
    """Two shared directions, one of them weak, beside four of each flow's own."""
    rng = torch.Generator().manual_seed(0)
    shared = torch.randn(800, 2, generator=rng) * torch.tensor([1.0, 0.5])
    own = {flow: torch.randn(800, 4, generator=rng) for flow in FLOWS}
    mix = {flow: torch.randn(6, 6, generator=rng) for flow in FLOWS}
    return {flow: torch.cat([shared, own[flow]], 1) @ mix[flow] for flow in FLOWS}, shared, own


def test_cca_split_recovers_linear_truth(linear):
    flows, shared, own = linear
    out = CCASplit(flows, 4)(flows)
    for flow in FLOWS:
        assert out.shared[flow].shape == (800, 2) and explained(out.shared[flow], shared) > 0.98
        assert explained(out.unique[flow], own[flow]) > 0.98 and explained(out.unique[flow], shared) < 0.05
        cross = out.shared[flow].T @ out.unique[flow] / 800
        assert cross.abs().max() < 1e-3
        h = flows[flow] - flows[flow].mean(0)
        left = h - out.shared[flow] @ torch.linalg.lstsq(out.shared[flow], h).solution
        np.testing.assert_allclose(out.unique[flow].abs(), np.abs(PCA(4).fit_transform(left.numpy())), atol=0.01)
    theirs = CCA(n_components=1, scale=False, max_iter=5000).fit_transform(*(flows[flow].numpy() for flow in FLOWS))
    ours = [out.shared[flow][:, 0].numpy() for flow in FLOWS]
    assert np.corrcoef(*ours)[0, 1] >= abs(np.corrcoef(theirs[0][:, 0], theirs[1][:, 0])[0, 1]) - 1e-4


def test_pca_split_is_that_of_sklearn_and_random_is_fixed(linear):
    flows = linear[0]
    out, h = PCASplit(flows, 2)(flows), flows["generation"]
    naive = PCA(4).fit_transform(h.numpy())
    np.testing.assert_allclose(out.shared["generation"].abs(), np.abs(naive[:, :2]), atol=1e-3)
    np.testing.assert_allclose(out.unique["generation"].abs(), np.abs(naive[:, 2:]), atol=1e-3)
    assert PCASplit(flows, 5)(flows).unique["generation"].shape == (800, 3)  # six directions are halved
    a, b = RandomSplit(flows, 3)(flows), RandomSplit(flows, 3)(flows)
    assert torch.equal(a.shared["generation"], b.shared["generation"]) and a.shared["generation"].shape == (800, 3)
    assert not torch.equal(a.shared["generation"], a.unique["generation"])
