"""Maps of the latent space: scores against scikit-learn, pairs and groups by hand, a cache that survives damage, figures."""

import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.manifold import trustworthiness

from umm_kit import plots
from umm_kit.diagnostics import maps
from umm_kit.diagnostics.maps import LatentMap, latent_map, nearness, paired_map
from umm_kit.widgets import png

FAST = {"method": "tsne", "max_iter": 250}


def cloud(n=60, d=5, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)) * np.arange(1, d + 1)


# --- maps --------------------------------------------------------------------------------------------------------------


def test_pca_by_hand():
    """Points on a cross: the long arm is the first axis, the short one the second."""
    X = np.array([[0.0, 4, 0], [0, -4, 0], [2, 0, 0], [-2, 0, 0], [0, 0, 0]])
    made = latent_map(X + 30)
    assert np.allclose(made.positions, [[4, 0], [-4, 0], [0, 2], [0, -2], [0, 0]])
    assert np.allclose(made.variance, [0.8, 0.2])
    assert (made.method, made.neighbours, made.chance, made.scored) == ("pca", 2, 0.5, 5)


def test_pca_axes_point_where_their_largest_loading_is_positive():
    X = cloud() @ np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    made = latent_map(X)
    loadings = np.linalg.lstsq(made.positions, X - X.mean(0), rcond=None)[0]
    assert all(row[abs(row).argmax()] > 0 for row in loadings)
    order = np.random.default_rng(2).permutation(len(X))
    assert np.allclose(latent_map(X[order]).positions, made.positions[order])


def naive_scores(X, positions, k):
    """Trustworthiness and overlap from full rank tables."""
    ranks = [np.linalg.norm(s[:, None] - s, axis=2).argsort(1).argsort(1) for s in (X, positions)]  # rank 0: the row itself
    n, near = len(X), [(r > 0) & (r <= k) for r in ranks]
    trust = 1 - 2 / (n * k * (2 * n - 3 * k - 1)) * np.maximum(ranks[0] - k, 0)[near[1]].sum()
    return trust, (near[0] & near[1]).sum() / (n * k)


@pytest.mark.parametrize("k", [1, 7])
def test_scores_are_the_naive_ones_and_scikit_learns(k):
    X = cloud(d=9)
    made = latent_map(X, neighbours=k)
    assert (made.trustworthiness, made.neighbour_overlap) == pytest.approx(naive_scores(X, made.positions, k))
    assert made.trustworthiness == pytest.approx(trustworthiness(X, made.positions, n_neighbors=k))
    assert made.chance == k / 59 and 0 < made.neighbour_overlap < 1


def test_scores_do_not_depend_on_the_block(monkeypatch):
    whole = latent_map(cloud())
    monkeypatch.setattr(maps, "_BLOCK", 130)
    assert latent_map(cloud()).trustworthiness == pytest.approx(whole.trustworthiness, abs=1e-12)


def test_scores_of_a_sample_are_near_those_of_all(monkeypatch):
    X = cloud(600, 20)
    every = latent_map(X)
    monkeypatch.setattr(maps, "SCORED", 200)
    some = latent_map(X)
    assert (every.scored, some.scored) == (600, 200)
    assert some.trustworthiness == pytest.approx(every.trustworthiness, abs=0.02)
    assert some.neighbour_overlap == pytest.approx(every.neighbour_overlap, abs=0.03)
    assert np.array_equal(some.positions, every.positions)


def test_a_random_map_is_not_trusted(monkeypatch):
    monkeypatch.setattr(maps, "_embedded", lambda x, *_: np.random.default_rng(9).normal(size=(len(x), 2)))
    made = latent_map(cloud(400), "tsne")
    assert made.trustworthiness == pytest.approx(0.5, abs=0.03)
    assert made.neighbour_overlap == pytest.approx(made.chance, abs=0.02)


def test_a_plane_is_mapped_without_loss_whatever_turns_it():
    flat, turn = cloud(80, 2), np.linalg.qr(np.random.default_rng(3).normal(size=(7, 7)))[0][:2]
    made = latent_map(flat @ turn + 100)
    assert made.trustworthiness == 1 and made.neighbour_overlap == 1 and sum(made.variance) == pytest.approx(1)


def test_one_column_and_half_precision():
    line = torch.arange(12.0)[:, None]
    made = latent_map(line.bfloat16())
    assert np.allclose(made.positions, np.stack([line[:, 0] - 5.5, 0 * line[:, 0]], 1)) and made.variance == (1, 0)
    assert latent_map(line.half().numpy()).neighbour_overlap == made.neighbour_overlap


def test_tsne_is_seeded_and_shows_planted_groups():
    X = np.concatenate([cloud(30), cloud(30, seed=1) + 100])
    made, again, other = (latent_map(X, seed=s, init="random", **FAST) for s in (0, 0, 1))
    assert np.array_equal(made.positions, again.positions) and not np.array_equal(made.positions, other.positions)
    made = latent_map(X, seed=0, **FAST)
    groups = np.repeat([0, 1], 30)
    assert nearness(made.positions, groups, permutations=1).nearest.value > 0.9
    assert (made.seed, other.seed, made.variance) == (0, 1, None)


@pytest.mark.slow
def test_umap_is_seeded_and_shows_planted_groups():
    X = np.concatenate([cloud(30), cloud(30, seed=1) + 100])
    made, again = (latent_map(X, "umap", seed=3) for _ in range(2))
    assert np.array_equal(made.positions, again.positions) and made.positions.dtype == float
    assert nearness(made.positions, np.repeat([0, 1], 30), permutations=1).nearest.value == 1


def test_umap_is_imported_only_when_it_is_asked_for(monkeypatch):
    def missing(package):
        raise maps.PackageNotFoundError(package)

    monkeypatch.setattr(maps, "version", missing)
    assert latent_map(cloud()).method == "pca"
    with pytest.raises(ImportError, match="pip install umap-learn"):
        latent_map(cloud(), "umap")


@pytest.mark.parametrize(
    ("X", "options", "says"),
    [
        (cloud(), {"method": "pacmap"}, "'pacmap' .* is unknown; there are"),
        (cloud(), {"perplexity": 5}, "'pca' with settings .'perplexity'."),
        (cloud(2), {}, r"\(2, 5\), varies, .* at least 3 rows"),
        (np.ones((9, 4)), {}, "does not vary"),
        (cloud(), {"neighbours": 0}, "0 neighbours"),
        (np.full((5, 2), np.nan), {}, "10 NaN or infinite"),
        (np.zeros((5, 2, 3)), {}, "pool the tokens"),
        (np.zeros((5, 2), int), {}, "expected floats"),
        (torch.zeros(5, 2, dtype=torch.long), {}, "expected floats"),
    ],
)
def test_latent_map_refuses(X, options, says):
    with pytest.raises(ValueError, match=says):
        latent_map(X, **options)


# --- cache -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """t-SNE replaced by something quick that counts how often it ran."""
    runs = []

    def embedded(x, method, seed, settings):
        runs.append(method)
        return x[:, :2] + seed

    monkeypatch.setattr(maps, "_embedded", embedded)
    return runs


def test_cache_is_by_content(tmp_path, counted):
    first = latent_map(cloud(), "tsne", cache=tmp_path / "maps")
    again = latent_map(cloud().astype(np.float64), "tsne", cache=tmp_path / "maps")
    assert len(counted) == 1 and np.array_equal(first.positions, again.positions)
    changed = cloud()
    changed[0, 0] += 1e-9
    for X, options in ((changed, {}), (cloud(), {"seed": 1}), (cloud(), {"perplexity": 4}), (cloud(), {"method": "umap"})):
        latent_map(X, **({"method": "tsne"} | options), cache=tmp_path / "maps")
    assert len(counted) == 5 == len(list((tmp_path / "maps").iterdir()))


def test_cache_is_by_version_of_the_library(tmp_path, counted, monkeypatch):
    latent_map(cloud(), "tsne", cache=tmp_path)
    monkeypatch.setattr(maps, "version", lambda package: "0.0")
    latent_map(cloud(), "tsne", cache=tmp_path)
    assert len(counted) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "pickle", "other rows", "other name"])
def test_a_damaged_cache_file_is_made_anew(tmp_path, counted, damage):
    first = latent_map(cloud(), "tsne", cache=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "other rows":
        np.savez(file, positions=np.zeros((3, 2)))
    elif damage == "other name":
        np.savez(file, places=first.positions)
    elif damage == "pickle":
        np.savez(file, positions=np.array([{"a": 1}], dtype=object))
    else:
        file.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not a map"}[damage])
    with pytest.warns(UserWarning, match="made anew"):
        again = latent_map(cloud(), "tsne", cache=tmp_path)
    assert len(counted) == 2 and np.array_equal(again.positions, first.positions)
    assert [p.name for p in tmp_path.iterdir()] == [file.name], "no partial file is left"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latent_map(cloud(), "tsne", cache=tmp_path)
    assert len(counted) == 2


# --- pairs -------------------------------------------------------------------------------------------------------------


def test_pairs_are_matched_by_id():
    U, order = cloud(), np.random.default_rng(1).permutation(60)
    G = U + 0.01
    made = paired_map(U, G[order], ids=[f"s{i}" for i in range(60)], G_ids=[f"s{i}" for i in order])
    assert made.pairs.nearest.value == 1 and made.pairs.chance == pytest.approx(1 / 60) and made.pairs.nearer.value == 1
    assert np.array_equal(made.others[:, 0], np.tile(np.arange(60), 2)) and made.others.shape == (120, 3)
    straight = paired_map(U, G, range(60))
    assert np.allclose(made.positions, straight.positions) and made.ids[:2] == ["s0", "s1"]
    assert isinstance(made, LatentMap) and made.positions.shape == (120, 2)
    wrong = paired_map(U, G[order], range(60))
    assert wrong.pairs.nearest.value < 0.1 and wrong.pairs.null[0] <= wrong.pairs.nearer.value <= wrong.pairs.null[1]


def test_neighbours_in_the_other_flow_by_hand():
    U, G = np.array([[0.0], [10], [20], [30]]), np.array([[11.0], [1], [12], [31]])
    made = paired_map(U, G, "abcd", nearest=2)
    assert made.others[:, 0].tolist() == [1, 0, 2, 3, 1, 0, 1, 3] and made.others.shape == (8, 2)
    assert made.pairs.nearest.value == pytest.approx((2 / 4 + 1 / 4) / 2)


def test_a_constant_difference_hides_pairs_unless_it_is_taken_off():
    U = cloud(40)
    G = U + 1000 * np.arange(5)
    assert paired_map(U, G, range(40)).pairs.nearest.value < 0.2
    assert paired_map(U, G, range(40), centre=True).pairs.nearest.value == 1


@pytest.mark.parametrize(
    ("U", "G", "ids", "G_ids", "says"),
    [
        (cloud(4), cloud(4), "abca", None, "repeat or differ"),
        (cloud(4), cloud(4), "abcd", "abce", "repeat or differ"),
        (cloud(4), cloud(3), "abcd", None, "a row for each"),
        (cloud(4), cloud(4, d=3), "abcd", None, "of one width"),
    ],
)
def test_paired_map_refuses(U, G, ids, G_ids, says):
    with pytest.raises(ValueError, match=says):
        paired_map(U, G, ids, G_ids)


# --- labels ------------------------------------------------------------------------------------------------------------


def naive_nearness(X, labels, Y=None, other=None):
    """By loops; one label's value is the mean over its rows, in both directions."""
    sides = [(X, labels, X, labels)] if Y is None else [(X, labels, Y, other), (Y, other, X, labels)]
    both = []
    for A, a, B, b in sides:
        values = {}
        for i, name in enumerate(a):
            d = [(np.linalg.norm(A[i] - B[j]), b[j] == name) for j in range(len(B)) if Y is not None or j != i]
            won = [(s < t) + 0.5 * (s == t) for s, same in d if same for t, also in d if not also]
            values.setdefault(name, []).append((np.mean(won), min(d, key=lambda pair: pair[0])[1]))
        both.append([np.mean(rows, 0) for rows in values.values()])
    return np.mean(both, (0, 1))


def test_nearness_within_is_the_naive_one():
    X, labels = cloud(24, 3), np.random.default_rng(2).permutation(np.repeat(list("abcdef"), 4))
    made = nearness(X, labels)
    assert (made.nearer.value, made.nearest.value) == pytest.approx(tuple(naive_nearness(X, labels)))
    assert made.nearer.n == 6 and made.chance == pytest.approx(3 / 23)


def test_nearness_across_is_the_naive_one():
    X, Y, labels = cloud(12, 3), cloud(12, 3) + cloud(12, 3, 1) / 3, list("aabbccddeeff")
    made = nearness(X, labels, Y)
    assert (made.nearer.value, made.nearest.value) == pytest.approx(tuple(naive_nearness(X, labels, Y, labels)))
    assert made.chance == pytest.approx(2 / 12)


def test_ties_are_no_knowledge():
    made = nearness(np.ones((12, 2)), list("aabbccddeeff"))
    assert made.nearer.value == 0.5 and made.nearest.value == pytest.approx(made.chance) and made.null == (0.5, 0.5)


def test_null_and_interval_cover_chance_for_labels_without_meaning():
    """Over 20 draws, the interval of random labels misses one half now and then, but not often; so does the null."""
    inside = []
    for seed in range(20):
        made = nearness(cloud(80, 6, seed), np.arange(80) // 4, permutations=100, seed=seed)
        inside.append((made.null[0] <= made.nearer.value <= made.null[1], made.nearer.low <= 0.5 <= made.nearer.high))
    assert np.mean(inside, 0).min() >= 0.75
    planted = nearness(cloud(80, 6) + 3 * cloud(20, 6, 5).repeat(4, 0), np.arange(80) // 4)
    assert planted.nearer.low > 0.8 > planted.null[1]


@given(shift=st.floats(-1e3, 1e3), scale=st.floats(0.1, 10), seed=st.integers(0, 20))
def test_nearness_is_blind_to_shift_scale_and_rotation(shift, scale, seed):
    X, labels = cloud(20, 4, seed), np.arange(20) // 4
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0]
    a, b = (nearness(x, labels, permutations=1) for x in (X, scale * X @ turn + shift))
    assert (a.nearer.value, a.nearest.value) == pytest.approx((b.nearer.value, b.nearest.value), abs=1e-9)


def test_large_sets_leave_out_whole_labels(monkeypatch):
    monkeypatch.setattr(maps, "SCORED", 40)
    made = nearness(cloud(400), np.arange(400) // 4, permutations=2)
    assert made.nearer.n == 10 and made.chance == pytest.approx(3 / 39)
    assert nearness(cloud(100), range(100), cloud(100), permutations=2).nearest.n == 20


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((cloud(4), "abcd"), "0 labels can be compared"),
        ((cloud(4), "abc"), "a label per row"),
        ((cloud(4), "aabb", cloud(4, 3), "aabb"), "one width"),
        ((cloud(4), "aaaa"), "1 labels can be compared"),
        ((cloud(4), "abcd", cloud(4), "efgh"), "0 labels can be compared"),
    ],
)
def test_nearness_refuses(args, says):
    with pytest.raises(ValueError, match=says):
        nearness(*args)


# --- figures -----------------------------------------------------------------------------------------------------------


def pair(n=12, seed=0, **options):
    U = cloud(n, seed=seed)
    return paired_map(U, U + cloud(n, seed=seed + 1) / 9, [f"s{i}" for i in range(n)], **options)


def test_figure_shows_every_point_its_flow_its_partner_and_the_scores():
    made = pair()
    figure = plots.latent_map({"layer 3": made, "one flow": latent_map(cloud())})
    both, single = figure.axes
    (circles, triangles), lines = both.collections[1:], both.collections[0]
    assert np.allclose(circles.get_offsets(), made.positions[:12]) and np.allclose(triangles.get_offsets(), made.positions[12:])
    assert not np.array_equal(circles.get_paths()[0].vertices, triangles.get_paths()[0].vertices), "not told by hue alone"
    assert np.allclose(lines.get_segments(), np.stack([made.positions[:12], made.positions[12:]], 1))
    title = both.get_title().split("\n")
    assert title[0] == "layer 3" and f"{made.trustworthiness:.2f}" in title[1] and f"{made.neighbour_overlap:.2f}" in title[2]
    assert f"{made.chance:.2f}" in title[2] and f"{made.pairs.nearest.value:.2f}" in title[3]
    assert both.get_xlabel() == f"{made.variance[0]:.0%} of variance"
    assert len(single.collections) == 1 and len(single.get_title().split("\n")) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["understanding", "generation"]


def test_figure_joins_no_more_pairs_than_asked():
    assert len(plots.latent_map({"a": pair()}, join=5).axes[0].collections[0].get_segments()) == 5
    assert len(plots.latent_map({"a": pair()}, join=0).axes[0].collections) == 2


def test_figure_colours_classes_and_numbers():
    classes = np.array(list("aabbccddeeff"))
    figure = plots.latent_map({"a": pair()}, classes)
    colours = figure.axes[0].collections[1].get_facecolors()
    assert len(np.unique(colours, axis=0)) == 6 and np.array_equal(colours[0], colours[1])
    assert np.array_equal(colours, figure.axes[0].collections[2].get_facecolors()), "both flows by the factor"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["understanding", "generation", *"abcdef"]
    figure = plots.latent_map({"a": pair()}, torch.linspace(0, 1, 12), "brightness")
    assert np.allclose(figure.axes[0].collections[1].get_array(), np.linspace(0, 1, 12))
    assert figure.axes[1].get_ylabel() == "brightness"


def test_rare_classes_are_named_other():
    many = np.repeat(np.arange(15), [9] * 10 + [1] * 5)
    figure = plots.latent_map({"a": latent_map(cloud(95))}, many)
    names = [t.get_text() for t in figure.legends[0].get_texts()]
    assert len(names) == 11 and names[-1] == "other"
    assert len(np.unique(figure.axes[0].collections[0].get_facecolors()[90:], axis=0)) == 1


def test_figure_is_the_same_again():
    assert png(plots.latent_map({"a": pair()}, np.arange(12) // 3)) == png(plots.latent_map({"a": pair()}, np.arange(12) // 3))


@pytest.mark.parametrize("values", [np.arange(11.0), np.full(12, np.nan), np.zeros((12, 2))])
def test_figure_refuses_values_that_are_not_one_each(values):
    with pytest.raises(ValueError, match="expected 12 finite ones"):
        plots.latent_map({"a": pair()}, values)


def test_figure_refuses_no_map():
    with pytest.raises(ValueError, match="no maps"):
        plots.latent_map({})


def test_heat_map_names_its_blocks():
    values = np.arange(25.0).reshape(5, 5) / 24
    figure = plots.heat_map(torch.from_numpy(values), {"u": [0, 1], "g": [0, 1, 2]}, "CKA")
    ax = figure.axes[0]
    assert np.allclose(ax.images[0].get_array(), values)
    assert [t.get_text() for t in ax.get_xticklabels()] == list("01012") and [t.get_text() for t in ax.texts] == [
        "u",
        "u",
        "g",
        "g",
    ]
    assert [line.get_xdata()[0] for line in ax.lines[1::2]] == [1.5]
    with pytest.raises(ValueError, match="as many rows and columns as labels"):
        plots.heat_map(values, {"u": [0, 1]})


def test_probe_curves_stand_by_flow_and_kind():
    from umm_kit.diagnostics.probes import Target, probe
    from umm_kit.features import Features

    X = torch.from_numpy(cloud(40))
    states = {(flow, layer): X * (1 + layer) for flow in ("understanding", "generation") for layer in (0, 1)}
    targets = {"first": Target(X[:, 0], said=True), "last": Target(X[:, 4], said=False)}
    figure = plots.probes(probe(Features([str(i) for i in range(40)], states, {}, {}), targets).to_frame())
    assert [ax.get_title() for ax in figure.axes] == [
        f"{f}: {k}" for f in ("understanding", "generation") for k in ("said", "unsaid")
    ]
    first, control = figure.axes[0].lines
    assert np.allclose(first.get_ydata(), 1, atol=0.01) and abs(control.get_ydata()).max() < 0.5


# --- the explorer ------------------------------------------------------------------------------------------------------


@pytest.fixture
def explorer():
    pytest.importorskip("jscatter")
    from umm_kit.widgets.latent import latent_explorer

    drawn = {"pca": {0: pair(), 1: pair(seed=4), 2: pair(seed=5)}, "t-SNE": {2: pair(seed=5, **FAST)}}
    images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    factors = {"count": np.arange(12) % 3, "grey": np.linspace(0, 1, 12)}
    return latent_explorer(drawn, images, [f"caption <{i}>" for i in range(12)], factors)


def test_explorer_draws_the_chosen_map(explorer):
    assert explorer.said.value.startswith("layer 0, pca, coloured by flow: trustworthiness")
    points = explorer.plot.points[:, :2].copy()
    explorer.layer.value = 1
    assert explorer.said.value.startswith("layer 1, pca") and not np.allclose(explorer.plot.points[:, :2], points)
    # One factor for both axes: distances on the screen are those of the map.
    now, true = explorer.plot.points[:, :2], explorer.shown.positions
    scale = np.linalg.norm(now[0] - now[5]) / np.linalg.norm(true[0] - true[5])
    assert np.allclose(np.linalg.norm(now - now[3], axis=1), scale * np.linalg.norm(true - true[3], axis=1), atol=1e-5)
    for colour in ("count", "grey", "flow"):
        explorer.colour.value = colour
        assert f"coloured by {colour}" in explorer.said.value and explorer.plot.color_title == colour
        assert not explorer.plot.non_spatial_points_update, "or picking might use the places of before"


def test_explorer_offers_the_layers_of_a_method(explorer):
    explorer.layer.value = 1
    explorer.method.value = "t-SNE"
    assert explorer.layer.options == (2,) and explorer.said.value.startswith("layer 2, t-SNE")
    explorer.method.value = "pca"
    assert explorer.layer.options == (0, 1, 2) and explorer.layer.value == 2


def test_explorer_tells_what_was_picked(explorer):
    assert explorer.picked_said.value.startswith("nothing is picked") and explorer.pictures.value == ""
    explorer.selection = [3, 12 + 7]
    others = explorer.shown.others[[3, 19]]
    own = int(others[0, 0] == 3) + int(others[1, 0] == 7)
    assert explorer.picked_said.value.startswith(f"picked 2: 1 of understanding, 1 of generation; {own} with their own partner")
    shown = explorer.pictures.value
    assert shown.count("<img ") == 8 and shown.count("data:image/png;base64,") == 8
    for item in {3, 7, *others.ravel().tolist()}:
        assert f'alt="s{item}"' in shown and f"caption &lt;{item}&gt;" in shown
    assert "count 0, grey 0.27" in shown
    ends = explorer.plot.annotations
    assert len(ends) == 2, "a line from each to its partner"
    explorer.layer.value = 1
    assert explorer.selection.tolist() == [3, 19] and explorer.pictures.value != shown
    explorer.selection = range(24)
    assert explorer.pictures.value.count("<tr>") == 3 and "the first 3 are shown" in explorer.picked_said.value
    explorer.selection = []
    assert explorer.pictures.value == "" and not explorer.plot.annotations


def test_explorer_refuses(explorer):
    from umm_kit.widgets.latent import latent_explorer

    with pytest.raises(ValueError, match="expected rows from 0 to 23"):
        explorer.selection = [24]
    images, texts = torch.rand(12, 3, 8, 8), ["x"] * 12
    for drawn, pictures, factors, says in (
        ({}, images, {}, "there are no maps"),
        ({"pca": {0: pair()}}, images[:5], {}, "one of each per id"),
        ({"pca": {0: pair(), 1: pair(11)}}, images, {}, "same ids in every map"),
        ({"pca": {0: pair()}}, images, {"flow": np.arange(12)}, "the map's own"),
        ({"pca": {0: pair()}}, images, {"jitter": np.zeros((12, 2))}, "one value for each id"),
    ):
        with pytest.raises(ValueError, match=says):
            latent_explorer(drawn, pictures, texts, factors)


def test_explorer_says_what_to_install(monkeypatch):
    from umm_kit.widgets.latent import latent_explorer

    monkeypatch.setitem(sys.modules, "jscatter", None)
    with pytest.raises(ImportError, match="pip install jupyter-scatter"):
        latent_explorer({"pca": {0: pair()}}, torch.rand(12, 3, 8, 8), ["x"] * 12, {})
