"""Measures of collapse against hand values and loops; planted collapses raise the alarm that names them, health raises none."""

import json
import math

import numpy as np
import pytest
import torch

from umm_kit.diagnostics.collapse import Collapse, CollapseMonitor, collapse
from umm_kit.diagnostics.geometry import effective_rank

N, D = 96, 24


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(n=N, d=D, noise=0.3, seed=0):
    """Healthy latents: pairs agree up to noise, different items do not."""
    z = draws(n, d, seed=seed)
    return z, z + noise * draws(n, d, seed=seed + 1000)


def reasons(alarms):
    return {alarm.reason for alarm in alarms}


def after(*moved, **options):
    """Alarms on moved latents after a healthy first reading."""
    monitor = CollapseMonitor(**options)
    assert monitor.update(*pair()) == []
    return monitor.update(*moved)


# --- one reading -------------------------------------------------------------------------------------------------------


def test_by_hand():
    """a: two items at right angles; b: the first item's partner is right, the second's lies along the first."""
    a, b = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[3.0, 0], [1, 0]])
    now = collapse(a, b)
    assert (now.variance_a, now.variance_b, now.total_variance) == (pytest.approx(2.5), pytest.approx(2), pytest.approx(2))
    assert now.rank_a == pytest.approx(1) and now.rank_b == pytest.approx(1) and now.effective_rank == pytest.approx(1)
    assert now.positive_cosine == pytest.approx(0.5) and now.alignment == pytest.approx(1)  # (0 + 2) / 2
    assert now.negative_cosine == pytest.approx(0.5)  # (a_1, b_2): 1, (a_2, b_1): 0
    assert now.retrieval_at_1 == 0.25  # b_1 finds a_1; all else is tied, and ties are misses
    assert now.uniformity == pytest.approx(0)  # b has one direction; a by itself: log exp(-2 * 2) = -4
    assert collapse(a, a).uniformity == pytest.approx(-4) and now.n == 2


def looped(a, b):
    a, b = a.double(), b.double()
    n = len(a)
    ua, ub = (z / z.norm(dim=1, keepdim=True) for z in (a, b))
    cos = [[float(ua[i] @ ub[j]) for j in range(n)] for i in range(n)]
    others = [(i, j) for i in range(n) for j in range(n) if i != j]
    hits = sum(all(cos[i][i] > cos[i][j] for j in range(n) if j != i) for i in range(n))
    hits += sum(all(cos[i][i] > cos[j][i] for j in range(n) if j != i) for i in range(n))
    spread = [
        math.log(sum(math.exp(-2 * float((u[i] - u[j]).square().sum())) for i, j in others) / len(others)) for u in (ua, ub)
    ]
    distance = sum(float((ua[i] - ub[i]).square().sum()) for i in range(n)) / n
    negative = sum(cos[i][j] for i, j in others) / len(others)
    variances = [float(z.var(0).sum()) for z in (a, b)]
    return [*variances, 1 - distance / 2, negative, hits / (2 * n), max(spread), distance]


@pytest.mark.parametrize("noise", [0.3, 1.5])
def test_measures_are_their_loops(noise):
    a, b = pair(20, 6, noise)
    now = collapse(a + 1, 2 * b)
    measures = [now.variance_a, now.variance_b, now.positive_cosine, now.negative_cosine, now.retrieval_at_1, now.uniformity]
    assert [*measures, now.alignment] == pytest.approx(looped(a + 1, 2 * b))
    assert [now.rank_a, now.rank_b] == pytest.approx([effective_rank(a.double(), True), effective_rank(b.double(), True)])


def test_scale_changes_the_variance_only():
    """Which is why a monitor of cosines, rank and retrieval sleeps through a collapse of scale."""
    a, b = pair()
    whole, small = collapse(a, b).as_dict(), collapse(0.01 * a, 0.01 * b).as_dict()
    for name in ("variance_a", "variance_b", "total_variance"):
        assert small.pop(name) == pytest.approx(1e-4 * whole.pop(name))
    assert small == pytest.approx(whole, abs=1e-6)


def test_a_common_rotation_changes_nothing():
    (a, b), q = pair(), torch.linalg.qr(draws(D, D, seed=3)).Q
    assert collapse(a @ q, b @ q).as_dict() == pytest.approx(collapse(a, b).as_dict(), abs=1e-5)


def test_sides_can_be_swapped():
    a, b = pair()
    one, other = collapse(a, 3 * b).as_dict(), collapse(3 * b, a).as_dict()
    for name in set(one) - {"variance_a", "variance_b", "rank_a", "rank_b"}:
        assert one[name] == pytest.approx(other[name]), name
    assert (one["variance_a"], one["rank_b"]) == pytest.approx((other["variance_b"], other["rank_a"]))


def test_healthy_and_constant_limits():
    far = collapse(*pair(400, 256))
    assert abs(far.negative_cosine) < 0.01 and far.retrieval_at_1 == 1
    assert -4.1 < far.uniformity < -3.9  # nearly orthogonal: distance^2 = 2
    for value in (torch.ones(8, 3), torch.full((8, 3), 0.1, dtype=torch.float16)):
        still = collapse(value, value)
        assert (still.total_variance, still.effective_rank, still.retrieval_at_1) == (0, 0, 0)
        assert (still.negative_cosine, still.uniformity) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    zero = collapse(torch.zeros(8, 3), torch.zeros(8, 3))
    assert (zero.total_variance, zero.effective_rank, zero.positive_cosine, zero.retrieval_at_1) == (0, 0, 0, 0)


def test_arrays_and_half_precision():
    a, b = pair()
    assert collapse(a.double().numpy(), b.double().numpy()[::1]) == collapse(a.double(), b.double())
    assert collapse(a.half(), b.half()) == collapse(a.half().float(), b.half().float())
    tiny = collapse(1e-25 * a, 1e-25 * b)
    assert tiny.positive_cosine == pytest.approx(collapse(a, b).positive_cosine, abs=1e-5)


def test_refusals():
    a, b = pair()
    for bad in (a[:1], a[0], a[None], a.long(), a[:, :0], np.arange(6).reshape(3, 2)):
        with pytest.raises(ValueError, match=r"z_a is .*expected floats \[n, d\], n >= 2"):
            collapse(bad, b)
    for other in (b[:-1], b[:, :-1]):
        with pytest.raises(ValueError, match="expected the same items"):
            collapse(a, other)
    b[3, 2] = math.nan
    with pytest.raises(ValueError, match="z_b holds 1 NaN"):
        collapse(a, b)


# --- planted collapses -------------------------------------------------------------------------------------------------


def test_scale():
    a, b = pair()
    alarms = after(0.01 * a, 0.01 * b)
    assert reasons(alarms) == {"scale"} and {alarm.measure for alarm in alarms} == {"variance_a", "variance_b"}
    assert str(alarms[0]).startswith("scale: variance_a is 0.00")


def test_scale_although_the_effective_rank_rises():
    """Strong directions shrink until an even floor is left: the spectrum becomes flatter and the rank higher."""
    strength = torch.cat([torch.full((3,), 3.0), torch.full((D - 3,), 0.3)])
    monitor = CollapseMonitor()
    monitor.update(draws(N, D) * strength, draws(N, D, seed=1) * strength)
    left = 0.05 * draws(N, D)
    assert reasons(monitor.update(left, left)) == {"scale"}
    ranks = monitor.to_frame()["effective_rank"]
    assert ranks[1] > 1.2 * ranks[0]


@pytest.mark.parametrize("side", [0, 1])
def test_scale_of_one_side_however_large_it_was(side):
    monitor, moved = CollapseMonitor(), list(pair())
    moved[side] = 30 * moved[side]
    monitor.update(*moved)
    moved[side] = moved[side] / 25  # still above the other side
    assert [alarm.measure for alarm in monitor.update(*moved)] == [("variance_a", "variance_b")[side]]


def test_rank():
    """All on one direction, at unchanged total variance."""
    direction = torch.nn.functional.normalize(draws(1, D, seed=5))
    flat = [(z @ direction.T) @ direction for z in pair()]
    flat = [z * (p.var(0).sum() / z.var(0).sum()).sqrt() for z, p in zip(flat, pair(), strict=True)]
    alarms = after(*flat)
    assert "rank" in reasons(alarms) and "scale" not in reasons(alarms)
    assert {a.measure for a in alarms} >= {"rank_a", "rank_b", "retrieval_at_1"}


def test_mode_few_centres():
    centres = draws(3, D, seed=7)
    z = centres[torch.arange(N) % 3]
    alarms = after(z + 0.01 * draws(N, D, seed=8), z + 0.01 * draws(N, D, seed=9))
    assert {"mode", "rank"} <= reasons(alarms) and "retrieval_at_1" in {a.measure for a in alarms}


def test_mode_cone():
    """A common offset swallows all directions; variance and rank stay as they were."""
    alarms = after(*(z + 20 for z in pair()))
    assert [(a.reason, a.measure) for a in alarms] == [("mode", "negative_cosine")]


def test_constant_map_also_as_the_first_reading():
    z = torch.ones(N, D)
    assert {"constant", "mode"} == reasons(after(z, z))
    assert reasons(CollapseMonitor().update(z, z)) == {"constant"}
    almost = z + 1e-6 * draws(N, D)
    assert {"scale", "mode"} <= reasons(after(almost, almost))


def test_retrieval_is_held_against_the_best_reading():
    a, b = pair()
    monitor = CollapseMonitor()
    monitor.update(a, draws(N, D, seed=11))  # untrained: chance
    assert monitor.update(a, b) == []
    (alarm,) = monitor.update(a, b.roll(1, 0))
    assert (alarm.reason, alarm.measure, alarm.reference) == ("mode", "retrieval_at_1", 1)


# --- health ------------------------------------------------------------------------------------------------------------


def test_no_alarm_on_rotation_or_mild_rescale():
    q = torch.linalg.qr(draws(D, D, seed=3)).Q
    assert after(*(z @ q for z in pair())) == []
    assert after(*(0.8 * z for z in pair())) == []
    assert after(*(5 * z for z in pair())) == []


@pytest.mark.parametrize(("rows", "noise"), [(96, 0.3), (32, 0.3), (16, 1.5), (8, 0.5)])
def test_no_alarm_on_batches_of_healthy_training(rows, noise):
    """100 batches of other items, pairs that come closer, slow changes of scale: noise of small batches raises nothing."""
    monitor = CollapseMonitor()
    for step in range(100):
        a, b = pair(rows, D, noise * (1 - step / 200), seed=2000 + step)
        assert monitor.update((1 - step / 500) * a, (1 + step / 500) * b, step) == []
    assert len(monitor.to_frame()) == 100


def test_few_hits_of_small_batches_raise_nothing():
    """Retrieval near .4 of 16 items often falls to less than half of the luckiest batch's."""
    monitor = CollapseMonitor()
    alarms = [monitor.update(*pair(16, D, 3.0, seed=5000 + k)) for k in range(100)]
    found = monitor.to_frame()["retrieval_at_1"]
    assert found.min() < 0.5 * found.max() and not any(alarms)


# --- shares, logs, resuming --------------------------------------------------------------------------------------------


def test_thresholds_are_where_they_are_said_to_be():
    a, b = pair()
    for factor, share, expected in ((0.51, 0.25, set()), (0.49, 0.25, {"scale"}), (0.49, 0.2, set())):
        assert reasons(after(factor * a, factor * b, variance_share=share)) == expected
    for measure in ("variance_share", "rank_share", "angle_share", "retrieval_share"):
        for share in (0, 1, -0.1, math.nan):
            with pytest.raises(ValueError, match="expected all between 0 and 1"):
                CollapseMonitor(**{measure: share})


def test_log():
    monitor, (a, b) = CollapseMonitor(), pair()
    monitor.update(a, b)
    monitor.update(0.1 * a, 0.1 * b, step=50)
    frame = monitor.to_frame()
    assert frame["step"].tolist() == [0, 50] and frame["alarm"].tolist() == ["", "scale"]
    assert frame.iloc[0].drop(["step", "alarm"]).to_dict() == collapse(a, b).as_dict()
    assert CollapseMonitor().to_frame().empty


def test_resumed_monitor_goes_on_as_if_uninterrupted():
    whole, (a, b) = CollapseMonitor(), pair()
    for step, factor in enumerate((1.0, 0.3, 0.9)):
        whole.update(factor * a, factor * b, step)
    resumed = CollapseMonitor()
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert resumed.readings == whole.readings and isinstance(resumed.readings[0][1], Collapse)
    assert resumed.update(0.2 * a, b) == whole.update(0.2 * a, b)


def test_readings_of_another_size_are_refused():
    monitor, (a, b) = CollapseMonitor(), pair()
    monitor.update(a, b)
    with pytest.raises(ValueError, match="has 10 rows, the first had 96"):
        monitor.update(a[:10], b[:10])
    assert len(monitor.readings) == 1
