"""Estimators of mutual information on distributions of known truth: pairs of Gaussian columns, and tasks of a public benchmark.

    python benchmarks/mutual_information.py [--output figures/data/mutual_information.json]

One minute on two cores. `umm-kit figures` draws what it writes.
"""

import argparse
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from umm_kit.diagnostics.mutual_information import METHODS, mutual_information
from umm_kit.records import machine, versions, write_json

N, DIMENSIONS, SEED = 2000, 2, 0
RHO = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
TASKS = Path(__file__).parent.parent / "tests" / "data" / "mi"


def samples():
    """(family, name, I, I + KL(p_x p_y || p_xy) where it is known, x, y)"""
    for rho in RHO:
        rng = np.random.default_rng(SEED)
        x, noise = rng.normal(size=(2, N, DIMENSIONS))
        truth, upper = -DIMENSIONS / 2 * np.log(1 - rho**2), DIMENSIONS * rho**2 / (1 - rho**2)
        yield "gaussian", f"rho {rho:g}", truth, upper, x, rho * x + np.sqrt(1 - rho**2) * noise
    for path in sorted(TASKS.glob("*.npz")):
        task = np.load(path)
        yield "benchmark-mi", path.stem, float(task["truth"]), None, task["x"], task["y"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="figures/data/mutual_information.json")
    output, rows = parser.parse_args().output, []
    for family, name, truth, upper, x, y in tqdm(list(samples()), desc="tasks"):
        for method in METHODS:
            row = {"family": family, "name": name, "method": method, "truth": truth, "upper": upper, "n": len(x)}
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    e = mutual_information(x, y, method, seed=SEED)
                rows.append(row | {"value": e.value, "low": e.low, "high": e.high})
                print(f"{name:40} {method:9} {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]  I = {truth:.3f}", flush=True)
            except RuntimeError as error:  # a failed fit is told, not drawn as zero
                print(f"{name:40} {method:9} {error}", flush=True)
    record = {"command": shlex.join(["python", *sys.argv]), "seed": SEED, "versions": versions(), "device": machine()}
    write_json(output, {"record": record, "rows": rows})


if __name__ == "__main__":
    main()
