"""Figures and widgets: colours by hand, the same picture for the same states, refusals, and what the controls say."""

import io
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from umm_kit import plots, widgets


def states(n=4, tokens=6, width=5, seed=0):
    rng = np.random.default_rng(seed)
    spread = np.array([8, 4, 2, 0.5, 0.1])[:width]
    return {flow: rng.normal(size=(n, tokens, width)) * spread + shift for flow, shift in (("u", 0.0), ("g", 3.0))}


def drawn(ax) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


# --- pictures ----------------------------------------------------------------------------------------------------------


def test_image_grid_shows_each_image_with_its_texts_and_mask():
    images = torch.rand(3, 3, 8, 8)
    masks = torch.zeros(3, 2, 4, dtype=torch.bool)
    masks[1, 1, 3] = True
    figure = plots.image_grid(images, ["one", "two", "three"], ["a", "b", "c"], masks, columns=2)
    assert isinstance(figure, Figure) and len(figure.axes) == 3
    for ax, image in zip(figure.axes, images, strict=True):
        assert np.array_equal(drawn(ax), image.permute(1, 2, 0).numpy())
    assert [ax.get_title() for ax in figure.axes] == ["one", "two", "three"]
    assert [ax.get_xlabel() for ax in figure.axes] == ["a", "b", "c"]
    assert [len(ax.patches) for ax in figure.axes] == [0, 1, 0]
    # Row 1 of 2 and column 3 of 4 of an image of 8 x 8 pixels: x in [6, 8], y in [4, 8].
    assert figure.axes[1].patches[0].get_bbox().bounds == (6, 4, 2, 4)


def test_long_texts_are_wrapped_and_kept_whole():
    text = "a large yellow circle at the top left and a small purple ring at the bottom right"
    title = plots.image_grid(np.zeros((1, 3, 4, 4)), [text]).axes[0].get_title()
    assert "\n" in title and title.replace("\n", " ") == text


@pytest.mark.parametrize(
    ("images", "options", "says"),
    [
        (np.zeros((3, 8, 8)), {}, "expected .n, 3, height, width"),
        (np.zeros((0, 3, 8, 8)), {}, "n >= 1"),
        (np.zeros((2, 3, 8, 8)), {"titles": ["one"]}, "1 titles came with 2 images"),
        (np.zeros((2, 3, 8, 8)), {"masks": np.zeros((1, 2, 2))}, "1 masks came with 2 images"),
    ],
)
def test_image_grid_refuses(images, options, says):
    with pytest.raises(ValueError, match=says):
        plots.image_grid(images, **options)


def test_nothing_imports_pyplot():
    """Pyplot's state is shared by all figures of a process: a callback that used it could draw into another cell's figure."""
    import subprocess

    code = (
        "import sys, numpy; from umm_kit import plots; plots.image_grid(numpy.zeros((1, 3, 4, 4)))\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


# --- states as colours -------------------------------------------------------------------------------------------------


def test_colours_by_hand():
    """Two tokens at +-2 and +-1 on two axes: component 1 is the axis of larger variance, dark at the negative end."""
    x = np.zeros((1, 4, 3))
    x[0, :, 1] = [2, -2, 0, 0]
    x[0, :, 0] = [0, 0, 1, -1]
    colours, shares = plots.token_colours({"u": x})
    assert shares == pytest.approx([8 / 10, 2 / 10, 0])
    light, dark, yellow_side, blue_side = colours["u"][0]
    assert light[0] == light[1] == light[2] > 0.75 and dark[0] == dark[1] == dark[2] < 0.25
    assert yellow_side[2] < 0.5 < yellow_side[0] and blue_side[0] < 0.5 < blue_side[2]


def test_flows_share_one_basis_and_scale():
    """Equal states get equal colours in either flow, and shares agree with a singular value decomposition."""
    a = states()["u"]
    colours, shares = plots.token_colours({"u": a, "g": a.copy()})
    assert np.allclose(colours["u"], colours["g"])
    both = np.concatenate([(a - a.mean((0, 1))).reshape(-1, 5)] * 2)
    singular = np.linalg.svd(both, compute_uv=False) ** 2
    assert shares == pytest.approx(singular[:3] / singular.sum())


def test_colours_ignore_a_constant_and_the_sign_of_eigenvectors():
    given = states()
    colours, _ = plots.token_colours(given)
    shifted, _ = plots.token_colours({flow: 7 * a + 100 for flow, a in given.items()})
    turned, _ = plots.token_colours({"g": given["g"], "u": given["u"]})  # another order of summation
    for flow in given:
        assert np.allclose(colours[flow], shifted[flow]) and np.allclose(colours[flow], turned[flow])
        assert colours[flow].shape == (4, 6, 3) and 0 <= colours[flow].min() and colours[flow].max() <= 1


def test_offset_shows_a_constant_difference():
    a = np.random.default_rng(0).normal(size=(4, 6, 5)) * 0.1
    given = {"u": a, "g": a + 10}
    without, with_offset = plots.token_colours(given)[0], plots.token_colours(given, offset=True)[0]
    assert np.allclose(without["u"], without["g"])
    assert abs(with_offset["u"].mean((0, 1)) - with_offset["g"].mean((0, 1))).max() > 0.3


def test_constant_states_are_grey():
    colours, shares = plots.token_colours({"u": torch.full((2, 4, 3), 5.0, dtype=torch.bfloat16)})
    assert np.array_equal(colours["u"], np.full((2, 4, 3), 0.5)) and np.array_equal(shares, np.zeros(3))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "expected .images, tokens, width"),
        ({"u": np.zeros((2, 4))}, "expected .images, tokens, width"),
        ({"u": np.zeros((2, 4, 5)), "g": np.zeros((2, 4, 6))}, "of one width"),
        ({"u": np.zeros((2, 4, 2))}, "need at least 3"),
        ({"u": np.full((2, 4, 5), np.nan)}, "NaN"),
    ],
)
def test_colours_refuse(given, says):
    with pytest.raises(ValueError, match=says):
        plots.token_colours(given)


def test_token_maps_place_each_token():
    given = states()
    by_layer = {flow: {0: a, 1: 2 * a, 2: a[..., ::-1]} for flow, a in given.items()}
    mask = np.zeros((4, 6), dtype=bool)
    mask[1, 5] = True  # row 1, column 2 of a grid of 2 x 3
    figure = plots.token_maps(by_layer, (2, 3), [0, 2], item=1, images=np.zeros((4, 3, 6, 6)), masks={"g": mask})
    axes = np.array(figure.axes).reshape(2, 3)
    colours, shares = plots.token_colours(given)
    for row, flow in enumerate(("u", "g")):
        assert np.allclose(drawn(axes[row, 1]), colours[flow][1].reshape(2, 3, 3))
    assert [ax.get_title() for ax in axes[0]] == ["", "layer 0", "layer 2"]
    assert axes[1, 1].get_xlabel() == " + ".join(f"{100 * s:.0f}" for s in shares) + " %"
    assert not axes[0, 1].lines and axes[1, 1].lines[0].get_xydata().tolist() == [[2.5, 1.5]]
    assert [len(ax.patches) for ax in axes[:, 0]] == [0, 1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": [3]}, r"layers \[3\]"),
        ({"layers": []}, r"layers \[\]"),
        ({"item": 4}, "item 4"),
        ({"grid": (2, 2)}, r"\(2, 2\) grid"),
    ],
)
def test_token_maps_refuse(options, says):
    by_layer = {flow: {0: a, 1: a} for flow, a in states().items()}
    with pytest.raises(ValueError, match=says):
        plots.token_maps(by_layer, **{"grid": (2, 3), **options})


# --- numbers -----------------------------------------------------------------------------------------------------------


def test_scores_draw_value_interval_and_chance():
    import pandas as pd

    frame = pd.DataFrame({"metric": ["a_b", "c"], "value": [0.8, 0.4], "low": [0.7, 0.2], "high": [0.9, 0.6], "n": [10, 20]})
    ax = plots.scores(frame, {"c": 0.25}).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["c (n=20)", "a b (n=10)"]
    assert [segment[:, 0].tolist() for segment in ax.collections[0].get_segments()] == [[0.2, 0.6], [0.7, 0.9]]
    assert ax.lines[0].get_xydata().tolist() == [[0.4, 0], [0.8, 1]] and ax.lines[1].get_xydata().tolist() == [[0.25, 0]]
    with pytest.raises(ValueError, match="no rows"):
        plots.scores(frame[:0])


def test_cumulative_places_values():
    figure = plots.cumulative([1, 2, 3, 4], {"small": 0.5, "middle": 2.5, "large": 9}, "error")
    lines = figure.axes[0].lines
    assert lines[0].get_xydata().tolist() == [[1, 0.25], [2, 0.5], [3, 0.75], [4, 1]]
    assert [line.get_xydata().tolist() for line in lines[1:]] == [[[0.5, 0]], [[2.5, 0.5]], [[9, 1]]]
    assert "middle: above 50%" in [t.get_text() for t in figure.legends[0].get_texts()]
    with pytest.raises(ValueError, match="all positive and finite"):
        plots.cumulative([1, 0], {}, "error")


# --- widgets -----------------------------------------------------------------------------------------------------------


def pixels(value: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(value)).convert("RGB"))


def test_painter_reads_and_sets_the_mask_and_fills():
    asked = []

    def fill(mask):
        asked.append(mask)
        return torch.ones(3, 8, 8) * torch.tensor([1.0, 0.0, 0.0])[:, None, None]

    painter = widgets.paint_mask(torch.zeros(3, 8, 8), (2, 4), fill)
    button = next(b for b in walk(painter) if getattr(b, "description", "") == "Fill in")
    button.click()
    assert not asked and painter.said.value.startswith("nothing is hidden")
    painter._tokens[6].value = True  # row 1, column 2
    assert painter.said.value == "1 of 8 tokens hidden"
    expected = np.zeros((2, 4), dtype=bool)
    expected[1, 2] = True
    assert np.array_equal(painter.mask, expected)
    button.click()
    assert np.array_equal(asked[0], expected) and painter.said.value == "filled in 1 tokens"
    assert (pixels(painter.result.value) == [255, 0, 0]).all() and (pixels(painter.picture.value) == 0).all()
    next(b for b in walk(painter) if getattr(b, "description", "") == "Clear").click()
    assert not painter.mask.any() and painter.said.value == "0 of 8 tokens hidden"
    with pytest.raises(ValueError, match=r"expected \(2, 4\) of bool"):
        painter.mask = np.zeros((4, 2), dtype=bool)


def test_explorer_draws_the_layer_that_it_names():
    by_layer = {flow: {0: a, 1: a**3, 2: a[..., ::-1] ** 2} for flow, a in states().items()}
    images = np.random.default_rng(1).random((4, 3, 6, 6))
    layer, item, picture, said = widgets.layer_explorer(by_layer, (2, 3), images).children
    first = picture.value
    assert said.value == "layer 0 of 2, image 0"
    layer.value = 2
    assert said.value == "layer 2 of 2, image 0" and picture.value != first
    item.value = 3
    assert said.value == "layer 2 of 2, image 3"
    direct = widgets.png(plots.token_maps(by_layer, (2, 3), [2], 3, images, size=2.4))
    assert np.array_equal(pixels(picture.value), pixels(direct))


def walk(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from walk(child)


def test_curves_keep_values_bands_marks_and_order():
    x, y = np.arange(5), np.array([1.0, 2, np.nan, 4, 5])
    band = {"here": (x, y, y - 1, y + 2), "null": (x, torch.ones(5))}
    panels = [plots.Panel(f"panel {k}", "layer", "share", band, nulls=("null",), mark=3, log=k == 1) for k in range(4)]
    figure = plots.curves(panels)
    assert [ax.get_title() for ax in figure.axes] == ["panel 0", "panel 1", "panel 2", "panel 3"]  # 2 rows, 2 places empty
    assert [ax.get_xscale() for ax in figure.axes] == ["linear", "log", "linear", "linear"]
    ax = figure.axes[0]
    here, null, mark = ax.get_lines()
    assert np.array_equal(here.get_ydata(), y, equal_nan=True) and np.array_equal(null.get_ydata(), np.ones(5))
    assert (here.get_linestyle(), null.get_linestyle(), null.get_marker()) == ("-", "--", "") and list(mark.get_xdata()) == [3, 3]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["here", "null"]
    bottom, top = ax.get_ylim()
    assert bottom < 0 and top > 7  # the band is inside, with room above it


@pytest.mark.parametrize("series", [([1, 2], [1, 2], [0, 1]), ([1, 2], [1, 2, 3]), ([1, 2], np.ones((2, 1)))])
def test_curves_refuse_what_is_no_curve(series):
    with pytest.raises(ValueError, match="expected x, y or x, y, low, high"):
        plots.curves([plots.Panel("a", "x", "y", {"s": series})])
    with pytest.raises(ValueError, match="no panels"):
        plots.curves([])


def test_training_draws_the_terms_that_a_log_holds_with_dashed_bounds():
    log = [{"step": k, "understanding_loss": 2.0 - k, "shared_estimate": 0.1 * k, "shared_bound": 3.0} for k in (0, 1)]
    figure = plots.training([*log, {"step": 2, "learning_rate": 1.0}])
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["task losses", "shared factors"]
    estimate, bound = figure.axes[1].lines
    assert list(estimate.get_ydata()) == [0, 0.1] and bound.get_linestyle() == "--"
    with pytest.raises(ValueError, match="no entry of the log"):
        plots.training([{"step": 1, "loss": 3.0}])


def test_forest_fills_what_excludes_zero_and_asks_for_equal_labels():
    rows = [("sure", 0.2, 0.1, 0.3), ("open", 0.1, -0.1, 0.3), ("worse", -0.2, -0.3, -0.1)]
    figure = plots.forest({"a": rows, "b": rows}, "gain", columns=1)
    assert [ax.get_title() for ax in figure.axes] == ["a", "b"]
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [p.get_markerfacecolor() == "white" for p in points] == [False, True, False]
    assert [list(p.get_xdata()) for p in points] == [[0.2], [0.1], [-0.2]]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["sure", "open", "worse"]
    assert 0.5 < figure.axes[0].lines[-1].get_zorder() < 2 and set(figure.axes[0].lines[-1].get_xdata()) == {0}  # on the grid
    for bad in ({}, {"a": []}, {"a": rows, "b": rows[:2]}):
        with pytest.raises(ValueError, match="same labels"):
            plots.forest(bad, "gain")


# --- drift -------------------------------------------------------------------------------------------------------------


def drift_frame(metrics):
    rows = [(k, m, 1 / (k + j + 1), 0.0, 1.0, 64) for j, m in enumerate(metrics) for k in (1, 2, 3)]
    return pd.DataFrame(rows, columns=["cycle", "metric", "value", "low", "high", "n"])


def test_drift_draws_the_panels_that_have_numbers():
    figure = plots.drift(drift_frame(["survival", "recall", "floor", "ceiling", "latent_cosine"]))
    assert [ax.get_title() for ax in figure.axes] == ["what survives", "facts", "latents"]
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    np.testing.assert_allclose(lines["recall"].get_ydata(), [1 / 3, 1 / 4, 1 / 5])
    assert lines["floor"].get_linestyle() == lines["ceiling"].get_linestyle() == "--" != lines["recall"].get_linestyle()
    assert "n = 64" in figure.axes[0].get_xlabel()


def test_drift_by_category_leaves_out_what_could_not_be_measured():
    rows = [(c, k, v, v, v) for c, v in (("colour", 0.5), ("size", np.nan)) for k in (1, 2)]
    figure = plots.drift(drift_frame(["survival"]), pd.DataFrame(rows, columns=["category", "cycle", "value", "low", "high"]))
    assert [ax.get_title() for ax in figure.axes] == ["what survives", "by category"]
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["colour"]
    with pytest.raises(ValueError, match="none of the metrics"):
        plots.drift(drift_frame(["loss"]))


def test_paths_end_where_they_are_asked_to():
    points = np.random.default_rng(0).normal(size=(4, 5, 2))
    ax = plots.paths(points, [2], upto=1).axes[0]
    np.testing.assert_allclose(ax.lines[0].get_xydata(), points[:2, 2])
    assert "this item" in [text.get_text() for text in ax.get_legend().get_texts()]
    for bad in (dict(items=[5]), dict(upto=4)):
        with pytest.raises(ValueError):
            plots.paths(points, **bad)


def test_paths_of_several_runs_are_families_of_one_colour():
    points = np.random.default_rng(0).normal(size=(3, 4, 5, 2))
    figure = plots.paths(points, [1, 4], names=["a red circle", "a square"])
    ways = [line for line in figure.axes[0].lines if len(line.get_xydata()) == 4]
    assert len(ways) == 6 and [way.get_color() for way in ways] == ["C0"] * 3 + ["C1"] * 3
    np.testing.assert_allclose(ways[5].get_xydata(), points[2, :, 4])
    assert {"a red circle", "a square", "cycle 3"} <= {text.get_text() for text in figure.legends[0].get_texts()}


def test_pushes_point_the_way_of_the_push_and_none_where_there_is_none():
    rows = [("best", 0.9, 2.0), ("middle", 0.5, 0.0), ("worst", 0.1, -1.0)]
    figure = plots.pushes({"a": rows, "b": rows[:2]}, "score")
    first, second = figure.axes
    ends = [(arrow.xy[0] - arrow.xyann[0]) for arrow in first.texts]
    assert ends == pytest.approx([0.4, -0.2]), "the longest is half as long as the values are apart"
    assert len(second.texts) == 1 and [t.get_text() for t in first.get_yticklabels()] == ["best", "middle", "worst"]
    for wrong in ({}, {"a": []}):
        with pytest.raises(ValueError, match="at least one panel"):
            plots.pushes(wrong, "score")


def test_training_draws_latentumm_and_its_collapse():
    log = [{"step": k, "modal_loss": 1.0 / (k + 1), "total_variance": 2.0, "retrieval_at_1": 0.5} for k in range(3)]
    assert [ax.get_title() for ax in plots.training(log).axes] == ["alignment", "scale", "told apart?"]
