"""CKA of 12 x 12 layers, against named peers and the matmul floor: one run, one thread, rounds alternated, ratios printed.

    python benchmarks/similarity.py [--cases 1000x128 8000x512] [--rounds 3]

The peers, torch-cka and pytorch-cka, bring a torchvision that breaks a CPU-only torch, so they are no dependency of this
package: give them an environment of their own, put this repository on its PYTHONPATH and run the script there. Where they
are missing it says so and goes on. The floor is the time one plain square matrix product needs for as many operations.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch
from torch import nn

from umm_kit.diagnostics.similarity import cka_matrix

LAYERS = 12
OFFSET = 30.0  # shared by all features, as in transformers: what breaks a Gram matrix that was not centred first


class Replay(nn.Module):
    """A model whose layers put out given states: torch-cka reads features through hooks only."""

    def __init__(self, states):
        super().__init__()
        self.states, self.layers = states, nn.ModuleList(nn.Identity() for _ in states)

    def forward(self, _):
        for layer, x in zip(self.layers, self.states, strict=True):
            layer(x)


def torch_cka(Xs, Ys):
    CKA = import_module("torch_cka").CKA

    n, names = len(Xs[0]), [f"layers.{k}" for k in range(LAYERS)]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(n)), batch_size=n)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        comparison = CKA(Replay(Xs), Replay(Ys), "X", "Y", names, names)
        comparison.compare(loader, loader)
    return comparison.export()["CKA"]


def pytorch_cka(Xs, Ys):
    cka_from_features = import_module("cka").cka_from_features

    return cka_from_features(list(Xs), list(Ys))


def floor(n, d):
    """Seconds one square product needs for the operations of the cheaper form, counted as in umm_kit."""
    gram, feature = 2 * LAYERS * n * n * d, 2 * n * d * d * (LAYERS**2 + 2 * LAYERS)
    a = torch.ones(1024, 1024)
    start = time.perf_counter()
    a @ a
    return (time.perf_counter() - start) * min(gram, feature) / (2 * 1024**3)


def reference(X, Y):
    """The textbook unbiased CKA in float64, from Gram matrices without a diagonal."""
    n, grams = len(X), []
    for states in (X, Y):
        states = states.double() - states.double().mean(0)
        grams.append((states @ states.T).fill_diagonal_(0))

    def hsic(K, L):
        return (K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * K.sum(0) @ L.sum(0)

    K, L = grams
    return hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()


def peak():
    """Largest resident memory of this process so far in bytes; NaN where the system does not tell."""
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peers(n):
    """name and version -> function, for the peers that are here and end in reasonable time; the others are named."""
    out = {}
    for name, run in (("torch-cka", torch_cka), ("pytorch-cka", pytorch_cka)):
        try:
            title = f"{name} {version(name)}"
        except PackageNotFoundError:
            print(f"  {name:20} skipped: not installed in this environment")
            continue
        if run is torch_cka and n > 2000:
            print(f"  {title:20} skipped: multiplies {LAYERS + 2 * LAYERS**2} pairs of {n} x {n} matrices at full batch")
        else:
            out[title] = run
    return out


def compare(n, d, rounds):
    """One case, in a process of its own so that its peak of memory is its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shared = torch.randn(n, d // 4)
    flows = [[torch.randn(n, d).addmm_(shared, torch.randn(d // 4, d)).add_(OFFSET) for _ in range(LAYERS)] for _ in range(2)]
    print(f"{LAYERS} x {LAYERS} layers, n = {n}, d = {d}, all features offset by {OFFSET:g}; 1 thread, {rounds} rounds")
    before = peak()
    matrices, seconds = {"umm_kit": cka_matrix(*flows)}, {}
    memory = (peak() - before) / 1e9
    runs = {"umm_kit": cka_matrix, **peers(n)}
    for _ in range(rounds):
        seconds.setdefault("matmul floor", []).append(floor(n, d))
        for name, run in runs.items():
            start = time.perf_counter()
            try:
                matrices[name] = torch.as_tensor(run(*flows))
            except (AssertionError, RuntimeError, MemoryError) as error:  # torch-cka asserts that nothing is NaN
                print(f"  {name:20} failed: {error}")
                matrices[name] = torch.full((LAYERS, LAYERS), float("nan"))
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    corners = [(0, LAYERS // 2), (LAYERS - 1, 0)]  # the reference is slow
    truth = torch.stack([reference(flows[0][i], flows[1][j]) for i, j in corners])
    ours = median(seconds["umm_kit"])
    for name, times in seconds.items():
        error = ""
        if name in matrices:
            error = f"  error {float((torch.stack([matrices[name][c] for c in corners]) - truth).abs().max()):.1e}"
        print(f"  {name:20} {median(times):8.3f} s  {median(times) / ours:7.2f} x umm_kit{error}")
    print(f"  umm_kit held {memory:.2f} GB beside its inputs")
    worst = float((torch.stack([matrices["umm_kit"][c] for c in corners]) - truth).abs().max())
    assert worst < 1e-5 and not memory > 1.2, f"error {worst:.1e} (at most 1e-5), {memory:.2f} GB (at most 1.2)"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", default=["1000x128", "4000x128", "8000x512"], metavar="NxD")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # for the processes below, before they import torch
    failed = False
    for case in options.cases:
        n, d = map(int, case.split("x"))
        process = multiprocessing.get_context("spawn").Process(target=compare, args=(n, d, options.rounds))
        process.start()
        process.join()
        failed |= process.exitcode != 0
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
