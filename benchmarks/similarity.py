"""CKA of 12 x 12 layers, against named peers and the matmul floor: one run, one thread, rounds alternated, ratios printed.

    python benchmarks/similarity.py [--cases 1000x128 8000x512] [--rounds 3] [--output benchmarks/similarity.json]

The peers, torch-cka and pytorch-cka, serve nothing else here and are no dependency of this package: `pip install -c
constraints.txt . torch-cka pytorch-cka` in an environment of their own, and run the script there. Where they are missing it
says so and goes on. The floor is the time one plain square matrix product needs for as many operations. Seconds are of the
processor, so that other programs on the machine count little. 8000x512 takes five minutes and 11 GB with both peers.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch
from torch import nn

from umm_kit.diagnostics.similarity import cka_matrix
from umm_kit.records import machine, versions, write_json

LAYERS = 12
OFFSET = 30.0  # shared by all features, as in transformers: what breaks a Gram matrix that was not centred first
PEERS = ("torch-cka", "pytorch-cka")


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


def operation(repeats=20):
    """Seconds of one multiplication and addition within a plain square product."""
    a = torch.ones(1024, 1024)
    start = time.process_time()
    for _ in range(repeats):
        a @ a
    return (time.process_time() - start) / repeats / 1024**3


def operations(n, d):
    """Multiplications and additions of the cheaper form, counted as in umm_kit."""
    return min(LAYERS * n * n * d, n * d * d * (LAYERS**2 + 2 * LAYERS))


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
    """Name and version -> function of the peers that are here and end in reasonable time, and -> why not of the others."""
    found, left_out = {}, {}
    for name, run in zip(PEERS, (torch_cka, pytorch_cka), strict=True):
        try:
            title = f"{name} {version(name)}"
        except PackageNotFoundError:
            left_out[name] = "not installed in this environment"
            continue
        if run is torch_cka and n > 2000:
            products = LAYERS + 2 * LAYERS**2
            left_out[title] = f"its {products} products of n x n matrices alone take {products * n**3 * operation():.0f} s"
        else:
            found[title] = run
    return found, left_out


def compare(n, d, rounds, offset):
    """One case, in a process of its own so that its peak of memory is its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shared = torch.randn(n, d // 4)
    flows = [[torch.randn(n, d).addmm_(shared, torch.randn(d // 4, d)).add_(offset) for _ in range(LAYERS)] for _ in range(2)]
    print(
        f"{LAYERS} x {LAYERS} layers, n = {n}, d = {d}, all features offset by {offset:g}; 1 thread, {rounds} rounds", flush=True
    )
    found, left_out = peers(n)
    runs, before = {"umm_kit": cka_matrix, **found}, peak()
    matrices, seconds, held = {}, {"matmul floor": []}, {}
    for _ in range(rounds):
        seconds["matmul floor"].append(operations(n, d) * operation())
        for name, run in runs.items():
            start = time.process_time()
            try:
                matrices[name] = torch.as_tensor(run(*flows))
            except (AssertionError, RuntimeError, MemoryError) as error:  # torch-cka asserts that nothing is NaN
                print(f"  {name:20} failed: {error}")
                matrices[name] = torch.full((LAYERS, LAYERS), float("nan"))
            seconds.setdefault(name, []).append(time.process_time() - start)
            held.setdefault(name, (peak() - before) / 1e9)  # of this one and those before it: umm_kit is the first
    corners = [(0, LAYERS // 2), (LAYERS - 1, 0)]  # the reference is slow
    truth = torch.stack([reference(flows[0][i], flows[1][j]) for i, j in corners])
    ours, rows = median(seconds["umm_kit"]), []
    for name, times in seconds.items():
        row = {"name": name, "seconds": median(times), "times_umm_kit": median(times) / ours, "rounds": times}
        said = f"  {name:20} {row['seconds']:8.3f} s  {row['times_umm_kit']:7.2f} x umm_kit"
        if name in matrices:
            row["error"] = float((torch.stack([matrices[name][c] for c in corners]) - truth).abs().max())
            row["peak_gb_so_far"] = held[name]
            said += f"  error {row['error']:.1e}  peak so far {held[name]:5.2f} GB beside the inputs"
        rows.append(row)
        print(said)
    for name, why in left_out.items():
        print(f"  {name:20} left out: {why}", flush=True)
    return {"n": n, "d": d, "layers": LAYERS, "offset": offset, "rows": rows, "left_out": left_out}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["200x32", "1000x128", "4000x128", "8000x512"], metavar="NxD")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--offset", type=float, default=OFFSET, help="of all features; at 0 the peers are at their best")
    parser.add_argument("--output", default="benchmarks/similarity.json")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # for the processes below, before they import torch
    cases = []
    for case in options.cases:
        n, d = map(int, case.split("x"))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            cases.append(pool.submit(compare, n, d, options.rounds, options.offset).result())
    record = {"command": shlex.join(["python", *sys.argv]), "seed": 0, "versions": versions(), "device": machine()}
    write_json(options.output, {"record": record, "cases": cases})
    for case in cases:
        ours = next(row for row in case["rows"] if row["name"] == "umm_kit")
        assert ours["error"] < 1e-5 and not ours["peak_gb_so_far"] > 1.2, f"{ours} (error at most 1e-5, peak at most 1.2 GB)"


if __name__ == "__main__":
    main()
