# %% [markdown]
# # Solutions to notebook 01
#
# Run from top to bottom (`python notebooks/solutions/01_interference.py`), or open as a notebook through jupytext. Each
# answer is checked.

# %%
import os

import numpy as np
import torch

import umm_kit as uk
from umm_kit.diagnostics.geometry import effective_rank_increment
from umm_kit.diagnostics.gradients import gradient_conflict
from umm_kit.diagnostics.similarity import cka
from umm_kit.diagnostics.spectrum import token_spectrum

PRESET = os.environ.get("UMM_KIT_PRESET", "full")
MODEL = "tiny-masked"
model = uk.load(MODEL)
data = uk.Shapes("test", n={"full": 256, "tiny": 32}[PRESET], seed=0)
last = model.num_layers

# %% [markdown]
# **1.** On the way both gradients are w - a: conflict 0. At the end both are 0, and the angle between two zero vectors is
# undefined. The limits disagree, too: let a and b come together and the conflict *at* the optimum stays 2 for every distance
# but 0.

# %%
for apart in (1.0, 1e-3, 1e-6):
    a, b = np.array([apart / 2, 0]), np.array([-apart / 2, 0])
    optimum = (a + b) / 2
    u, g = optimum - a, optimum - b
    uk.expect(
        1 - u @ g / np.linalg.norm(u) / np.linalg.norm(g), target=2.0, tol=1e-9, claim=f"conflict with targets {apart:g} apart"
    )
way = np.array([3.0, 1.0])
uk.expect(
    1 - way @ way / np.linalg.norm(way) ** 2, target=0.0, tol=1e-9, claim="one and the same task never conflicts on the way"
)

# %% [markdown]
# **2.** Stacked as rows the increment is about a subspace, which has no memory of rows: blind. Stacked as columns each image
# is one row of both flows, and CKA compares which images are alike in each flow: both see the pairs.

# %%
pooled = uk.extract(model, data, layers=[2], mask_ratio=0.4, progress=False)
u, g = pooled.states["understanding", 2], pooled.states["generation", 2]
mixed = u[torch.randperm(len(u), generator=torch.Generator().manual_seed(0))]
readings = {
    "rows": lambda other: effective_rank_increment(g, other, stack="rows").percent,
    "columns": lambda other: effective_rank_increment(g, other, stack="columns").percent,
    "CKA": lambda other: cka(g, other),
}
change = {name: abs(reading(mixed) - reading(u)) for name, reading in readings.items()}
print({name: f"{value:.2g}" for name, value in change.items()})
uk.expect(change["rows"], target=0.0, tol=1e-6, claim="stacked as rows: blind to a shuffle")
uk.expect(change["columns"], low=0.1, claim="stacked as columns: not blind (points of percent)")
uk.expect(change["CKA"], low=0.1, claim="CKA: not blind")

# %% [markdown]
# **3.** A block has fewer borders than as many scattered tokens, so the mask adds less that is fine. Part of "generation is
# rougher" is the layout of the mask.

# %%
layouts = {}
for layout in ("dispersed", "contiguous"):
    tokens = uk.extract(model, data, ["generation"], [0], pooled=False, mask_ratio=0.4, mask_layout=layout, progress=False)
    layouts[layout] = float(token_spectrum(tokens.states["generation", 0], model.grid).above(0.5).mean())
print(layouts)
uk.expect(layouts["dispersed"] - layouts["contiguous"], low=0.0, claim="scattered holes are rougher than a block")

# %% [markdown]
# **4.** Whether there is one depends on the weights, so look; what must hold is that each share falls as the cut-off rises.
# White noise is the line to compare with: a map above it is rougher than noise.

# %%
some = uk.Shapes("test", n=32, seed=0)
tokens = uk.extract(model, some, layers=[last], pooled=False, mask_ratio=0.4, progress=False)
spectra = {flow: token_spectrum(tokens.states[flow, last], model.grid) for flow in ("understanding", "generation")}
cutoffs = np.arange(3, 12) / 10
shares = {flow: np.array([float(s.above(c).mean()) for c in cutoffs]) for flow, s in spectra.items()}
white = np.array([spectra["generation"].white(c) for c in cutoffs])
gap = shares["generation"] - shares["understanding"]
for row in zip(cutoffs, gap, shares["generation"], white, strict=True):
    print("above {:.1f}: gap {:+.3f}, generation {:.3f}, white noise {:.3f}".format(*row))
uk.expect(float(np.diff(shares["generation"]).max()), high=0.0, claim="the share falls as the cut-off rises")

# %% [markdown]
# **5.** Cosines of parts may differ, in sign too: the conflict of a layer is a mixture, weighted by the size of the
# gradients. Only inner products add up.

# %%
found = gradient_conflict(model, data, batch_size=8, mask_ratio=0.4, progress=False)
parts = ("attention", "mlp", "norm")
print(found.to_frame(parts=parts).query("metric == 'conflict'").pivot(index="layer", columns="part", values="value").round(3))
layer = found.layers[-1]
there = [part for part in (*parts, "other") if (layer, part) in found.groups]
total, whole = sum(found.gram(layer, part) for part in there), found.gram(layer)
uk.expect(float(abs(total - whole).max() / abs(whole).max()), target=0.0, tol=1e-9, claim="the parts' inner products add up")
