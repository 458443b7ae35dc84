"""The loss microscope: arrows against gradients by hand, each failure as a number, and what its widget says and draws."""

import math

import numpy as np
import pytest
import torch

from umm_kit import plots, widgets
from umm_kit.diagnostics.mutual_information import mutual_information
from umm_kit.losses.factorization import alignment, infonce, orthogonality
from umm_kit.losses.microscope import (
    SCENES,
    anti_alignment,
    arrows,
    false_negatives,
    follow,
    information,
    saturation,
    shrinking,
)


@pytest.fixture(scope="module")
def found():
    return {name: make() for name, make in SCENES.items()}


def scene_of(found, word):
    return next(scene for name, scene in found.items() if word in name)


def both(scene, reading):
    return [scene.readings[reading][name] for name in scene.walks]


def draw(n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 2, generator=generator, dtype=torch.float64) for _ in range(2))


# --- arrows and walks --------------------------------------------------------------------------------------------------


def test_arrows_of_eq_9_by_hand():
    """L = ||S^T U||^2 / N^2 has dL / dS = 2 U (U^T S) / N^2, so an arrow is -2 U (U^T S) / N."""
    s, u = draw()
    loss, on_s, on_u = arrows(lambda x, y: orthogonality(x, y, gather=False).loss, s, u)
    torch.testing.assert_close(on_s, -2 * u @ (u.T @ s) / 5)
    torch.testing.assert_close(on_u, -2 * s @ (s.T @ u) / 5)
    assert float(loss) == pytest.approx(float((s.T @ u).square().sum()) / 25)


def test_arrows_of_infonce_by_hand():
    """Of scores x.y the arrow on x_i is y_i - sum_j p_ij y_j, and on y_j it is x_j - sum_i p_ij x_i."""
    x, y = draw()
    _, on_x, on_y = arrows(lambda a, b: infonce(a @ b.T).loss, x, y)
    p = torch.softmax(x @ y.T, 1)
    torch.testing.assert_close(on_x, y - p @ y)
    torch.testing.assert_close(on_y, x - p.T @ x)


def test_arrows_are_finite_differences():
    x, y = draw()
    term = lambda a, b: alignment(a, b, facts=torch.tensor([0, 0, 1, 2, 2]), gather=False).loss  # noqa: E731
    _, on_x, _ = arrows(term, x, y)
    for i, k in np.ndindex(5, 2):
        step = torch.zeros_like(x)
        step[i, k] = 1e-5
        assert float(on_x[i, k]) == pytest.approx(-5 * float(term(x + step, y) - term(x - step, y)) / 2e-5, abs=1e-6)


def test_a_walk_follows_its_arrows():
    x, y = draw()
    walk = follow(lambda a, b: (a - b).square().sum(1).mean(), x, y, steps=3, rate=0.1, circle=False)
    assert walk.points.shape == walk.arrows.shape == (2, 4, 5, 2) and walk.loss.shape == (4,)
    np.testing.assert_allclose(walk.points[:, 1:], walk.points[:, :-1] + 0.1 * walk.arrows[:, :-1])
    apart = np.linalg.norm(walk.points[0] - walk.points[1], axis=-1)
    np.testing.assert_allclose(apart[1:] / apart[:-1], 1 - 4 * 0.1)  # both come 2 x rate of the way nearer
    np.testing.assert_allclose(walk.loss, np.square(apart).mean(1))
    turned = follow(lambda a, b: (a - b).square().sum(1).mean(), x, y, steps=2, rate=0.1)
    np.testing.assert_allclose(np.linalg.norm(turned.points[:, 1:], axis=-1), 1)


def test_no_step_raises_the_loss(found):
    for word in ("shrinking", "false negatives"):
        for walk in scene_of(found, word).walks.values():
            assert np.diff(walk.loss).max() <= 1e-5


# --- the failures ------------------------------------------------------------------------------------------------------


def test_fixed_critic_leads_to_opposite_partners(found):
    """Known from outside the scene by nearest neighbours: dependence has grown, where the critic keeps up it is gone."""
    scene = scene_of(found, "anti-alignment")
    fixed, fresh = both(scene, "cosine of partners")
    assert fixed[0] == fresh[0] > 0.8 and fixed[-1] < -0.95 and abs(fresh[-1]) < 0.1
    fixed, fresh = both(scene, "share of G told by U (linear)")
    assert fixed[-1] > 0.95 > fixed[0] and fresh[-1] < 0.05
    fixed, fresh = both(scene, "NCE-CLUB penalty (nats)")
    assert fixed[-1] < -2 < 2 < fixed[0] and abs(fresh[-1]) < 0.1  # far below 0 looks like success
    start, end_fixed, end_fresh = (
        mutual_information(*scene.walks[name].points[:, k].astype(float)).value
        for name, k in (("fixed critic", 0), ("fixed critic", -1), ("critic keeps up", -1))
    )
    assert end_fixed > start + 1 > 1.5 and end_fresh < 0.15


def test_small_n_saturates(found):
    scene = scene_of(found, "saturation")
    lines, weights = scene.readings["InfoNCE estimate (nats)"], scene.readings["N |d loss / d score of a pair|"]
    for n in (6, 96):
        assert (lines[f"N = {n}"] <= math.log(n)).all()
        assert weights[f"N = {n}"][0] == pytest.approx(1 - 1 / n, abs=0.02)  # no information: partners weigh as much as others
    assert (lines["N = 96"] <= scene.x + 0.05).all()  # below the truth, but for chance
    end, middle = -1, int(np.searchsorted(scene.x, 2.5))
    assert lines["N = 6"][end] > math.log(6) - 0.05 and scene.x[end] > 2.5 * math.log(6)
    assert weights["N = 6"][end] < 0.05 and weights["N = 6"][middle] < 0.3 < 0.8 < weights["N = 96"][middle]


def test_information_by_integration():
    """I = integral of p log(p / p_0) over the circle, p the density of the noise and p_0 = 1 / 2 pi."""
    angle = np.linspace(-np.pi, np.pi, 20001)[:-1]
    for k in (0.0, 0.7, 30.0):
        p = np.exp(k * (np.cos(angle) - 1))
        p /= p.mean()
        assert information(k) == pytest.approx((p * np.log(p)).mean(), abs=1e-9)
    assert information(1e5) == pytest.approx(0.5 * math.log(2 * math.pi * 1e5 / math.e), abs=1e-4)  # narrow noise is normal


def test_eq_9_shrinks_and_leaves_the_overlap(found):
    scene = scene_of(found, "shrinking")
    (loss, _), (length, steady), (overlap, parted) = (both(scene, axis) for axis in scene.readings)
    k = int((length < length[0] / 2.5).argmax())  # 2.5^4 = 39
    assert k > 0 and loss[k] < loss[0] / 35 and overlap[k] > 0.95 * overlap[0]
    assert abs(steady / steady[0] - 1).max() < 0.05 and parted[-1] < 0.05


def test_equal_facts_are_parted_unless_given(found):
    scene = scene_of(found, "false negatives")
    (apart, together), partners, (loss, _) = (both(scene, axis) for axis in list(scene.readings)[:3])
    assert apart[0] == together[0] > 0.98 and apart[-1] < 0.9 and together[-1] >= together[0] - 1e-4
    assert partners[0][-1] > 0.999  # each pair stays together
    assert loss[-1] < math.log(5) - 0.5  # by parting what is the same, InfoNCE goes below its value for facts in one place


@pytest.mark.parametrize("make", [lambda s: shrinking(16, 3, s), lambda s: saturation((3, 8), 3, 2, s)])
def test_same_seed_same_scene(make):
    one, same, other = make(1), make(1), make(2)
    for name, walk in one.walks.items():
        assert np.array_equal(walk.points, same.walks[name].points) and not np.array_equal(walk.points, other.walks[name].points)


def test_scenes_are_complete(found):
    for scene in found.values():
        assert len(scene.walks) == 2 and set(scene.references) <= {name for lines in scene.readings.values() for name in lines}
        values = [line for lines in scene.readings.values() for line in lines.values()]
        assert all(line.shape == scene.x.shape and np.isfinite(line).all() for line in values)
        first, second = scene.walks.values()
        for walk in (first, second):
            assert np.isfinite(walk.points).all() and walk.points.shape[:2] == (2, len(scene.x))
        assert first.points.shape != second.points.shape or np.array_equal(first.points[:, 0], second.points[:, 0])


def test_refusals():
    x, y = draw()
    term = lambda a, b: (a * b).sum(1).mean()  # noqa: E731
    for u, g in ((x, y[:4]), (x[:1], y[:1]), (x[0], y[0]), (x * math.nan, y)):
        with pytest.raises(ValueError, match="expected \\[N, f\\] twice"):
            arrows(term, u, g)
    for steps, rate in ((0, 0.1), (2, 0.0), (2, math.nan)):
        with pytest.raises(ValueError, match="expected steps >= 1 and rate > 0"):
            follow(term, x, y, steps, rate)
    with pytest.raises(ValueError, match="a lower rate"):
        follow(lambda a, b: (a * b).pow(2).sum(1).mean(), x, y, 50, 1e3, circle=False)
    with pytest.raises(ValueError, match="at least two of both"):
        false_negatives(facts=3, each=1)
    with pytest.raises(ValueError, match="batch_size"):
        anti_alignment(n=3)


# --- pictures and controls ---------------------------------------------------------------------------------------------


def test_picture_places_points_and_arrows(found):
    scene = scene_of(found, "false negatives")
    figure = plots.gradient_arrows(scene, (0, 7), shown=6)
    assert len(figure.axes) == 4  # a row for each walk
    for ax, (walk, k) in zip(figure.axes, [(w, k) for w in scene.walks.values() for k in (0, 7)], strict=True):
        spec = ax.get_subplotspec()
        assert ax.get_title() == (f"step {k}" if spec.is_first_row() else "")
        assert ("6 of 20 pairs" in ax.get_ylabel()) == spec.is_first_col()
        for which, (line, quiver) in enumerate(zip(ax.lines, ax.collections[1:3], strict=True)):
            np.testing.assert_allclose(np.stack(line.get_data(), 1), walk.points[which, k, :6])
            np.testing.assert_allclose(np.stack([quiver.U, quiver.V], 1), walk.arrows[which, k, :6], rtol=1e-6)
    (alone, _) = plots.gradient_arrows(scene, [7], shown=6).axes
    assert "step 7; 6 of 20 pairs" in alone.get_title()
    scales = [ax.collections[3].U[0] for ax in figure.axes]
    assert len(set(scales)) == 1  # one term, one scale; two terms, two:
    others = [ax.collections[3].U[0] for ax in plots.gradient_arrows(scene_of(found, "shrinking"), [0]).axes]
    assert others[0] != others[1]
    for steps in ([], [-1], [61]):
        with pytest.raises(ValueError, match="the scene has those from 0 to 60"):
            plots.gradient_arrows(scene, steps)


def test_readings_are_drawn_as_they_are(found):
    scene = scene_of(found, "saturation")
    figure = plots.readings(scene, 3)
    first = figure.axes[0]
    drawn = {line.get_label(): line for line in first.lines}
    for name, values in scene.readings[first.get_ylabel()].items():
        np.testing.assert_allclose(drawn[name].get_ydata(), values)
        assert drawn[name].get_linestyle() == ("--" if name in scene.references else "-")
    assert first.lines[-1].get_xdata()[0] == scene.x[3]


def test_widget_draws_what_it_says(found):
    microscope = widgets.loss_microscope(found)
    for name, scene in found.items():
        microscope.term.value = name
        assert microscope.step.value == 0 and microscope.step.max == len(scene.x) - 1
        said, arrows_png, curves_png = microscope.said.value, microscope.arrows.value, microscope.curves.value
        microscope.step.value = microscope.step.max // 2
        assert microscope.said.value != said and microscope.arrows.value != arrows_png and microscope.curves.value != curves_png
        assert scene.failure in microscope.said.value
        for lines in scene.readings.values():
            for line, values in lines.items():
                assert f"{line} {values[microscope.step.value]:.3g}" in microscope.said.value
    assert microscope.arrows.value == widgets.png(plots.gradient_arrows(microscope.shown, [microscope.step.value]))


def test_widget_classes_and_refusal(found):
    microscope = widgets.loss_microscope(found)
    for control, name in ((microscope.term, "term"), (microscope.step, "step"), (microscope.arrows, "arrows")):
        assert f"umm-{name}" in control._dom_classes
    with pytest.raises(ValueError, match="no scenes"):
        widgets.loss_microscope({})
