"""How fast scenes are made: in batches, against the floor of one scene at a time. Run by `make benchmarks`."""

import time

from umm_kit.data.shapes import Shapes


def test_rendering_in_batches_beats_one_by_one():
    """Rounds alternate, so that a busy machine slows both; the median round is reported."""
    data, n, rounds = Shapes("train", n=100_000, seed=0), 512, 7
    data.images(range(n))  # the sprites are drawn once
    batched, single = [], []
    for k in range(rounds):
        start = time.perf_counter()
        data.images(range(k * n, (k + 1) * n))
        batched.append((time.perf_counter() - start) / n)
        start = time.perf_counter()
        for i in range(k * n, k * n + n // 8):
            data.images([i])
        single.append((time.perf_counter() - start) / (n // 8))
    fast, slow = sorted(batched)[rounds // 2], sorted(single)[rounds // 2]
    print(f"\nscenes per second: {1 / fast:.0f} in batches of {n}, {1 / slow:.0f} one by one; ratio {slow / fast:.1f}")
    assert slow / fast > 2
