"""What the diagnosis costs: gradient conflict against its floor, and the whole of DIVA's Figure 2. Run by `make benchmarks`."""

import time
from statistics import median

import torch

import umm_kit as uk
from umm_kit.diagnostics.gradients import gradient_conflict, parameter_groups
from umm_kit.features import batches


def test_gradient_conflict_costs_little_more_than_its_gradients():
    """The floor: per batch a forward of each flow and `torch.autograd.grad` of each loss. Rounds alternate."""
    model, data, size = uk.load("tiny-masked", device="cpu"), uk.Shapes("test", n=128, seed=0), 32
    flat = [p for parameters in parameter_groups(model).values() for p in parameters]

    def floor():
        for batch in batches(data, size):
            torch.autograd.grad(model.understanding_flow(batch, layers=[]).loss, flat, allow_unused=True)
            torch.autograd.grad(model.generation_flow(batch, (0.2, 0.6), layers=[]).loss, flat, allow_unused=True)

    def ours():
        gradient_conflict(model, data, size, progress=False)

    seconds = {floor: [], ours: []}
    for _ in range(4):
        for run, taken in seconds.items():
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    low, high = (median(taken[1:]) for taken in seconds.values())  # the first round warms up
    print(f"\ngradient conflict: {high / 4:.2f} s per batch of {size}, {low / 4:.2f} s for its gradients; ratio {high / low:.2f}")
    assert high / low < 1.15


def test_a_whole_diagnosis():
    """512 anchors, three mask ratios, all panels."""
    model, data = uk.load("tiny-masked", device="cpu"), uk.Shapes("test", n=512, seed=0)
    seconds = uk.diagnose(model, data, progress=False).record["seconds"]
    print(f"\na diagnosis of 512 anchors, all panels: {seconds:.0f} s")
    assert seconds < 60
