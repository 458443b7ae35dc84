# %% [markdown]
# # Solutions to notebook 02
#
# Run from top to bottom (`python notebooks/solutions/02_latent_space.py`), or open as a notebook through jupytext. Each answer is
# checked.

# %%
import os
import tempfile

import numpy as np
import torch

import umm_kit as uk
from umm_kit.diagnostics.maps import latent_map, nearness, paired_map
from umm_kit.diagnostics.probes import probe

PRESET = os.environ.get("UMM_KIT_PRESET", "full")
MODEL = "tiny-masked"
model = uk.load(MODEL)
data = uk.Shapes("test", n={"full": 192, "tiny": 64}[PRESET], seed=0)
states = uk.extract(model, data, mask_ratio=0.4, progress=False)
middle = model.num_layers // 2
U, G = (states.states[flow, middle] for flow in ("understanding", "generation"))

# %% [markdown]
# **1.** The two scores need not agree: a larger perplexity makes false neighbours less false (trustworthiness), but what is kept
# of exactly ten neighbours does not go on rising. No perplexity makes the map true: in 128 dimensions each point has neighbours
# on all sides, and no plane has room for them.

# %%
noise = np.random.default_rng(0).normal(size=(len(data), model.hidden_size))
made = {perplexity: latent_map(noise, "tsne", perplexity=perplexity) for perplexity in (2, 10, 50)}
for perplexity, m in made.items():
    print(f"perplexity {perplexity:2}: trustworthiness {m.trustworthiness:.2f}, kept {m.neighbour_overlap:.2f} ({m.chance:.2f})")
uk.expect(max(m.neighbour_overlap for m in made.values()), high=0.6, n=len(data), claim="no perplexity makes the map true")

# %% [markdown]
# **2.** Two random starts give two maps which agree on most neighbours, but not on all. They agree with each other far *more*
# than either does with the data: that a picture comes out again is no proof that it is true. *Partner nearest* is measured in
# the original space, so it cannot change with any map.

# %%
first, second = (paired_map(U, G, states.ids, method="tsne", init="random", seed=seed) for seed in (0, 1))
order = [np.linalg.norm(m.positions[:, None] - m.positions, axis=2).argsort(1)[:, 1:11] for m in (first, second)]
shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*order, strict=True)])
print(
    f"neighbours that both maps have: {shared:.2f}; each keeps {first.neighbour_overlap:.2f} and {second.neighbour_overlap:.2f}"
)
uk.expect(shared - first.neighbour_overlap, low=0.02, n=len(data), claim="the maps agree more with each other than with the data")
uk.expect(first.pairs.nearest.value - second.pairs.nearest.value, target=0.0, tol=0.0, claim="partner nearest is the same")

# %% [markdown]
# **3.** Hardly at all: the average over 64 tokens smooths the draw of the hidden ones away. What keeps the variants of an anchor
# apart in generation are grey, gradient and brightness, which differ between them; section 5 switches those off.

# %%
n = {"full": 24, "tiny": 10}[PRESET]
variants, anchor = uk.Shapes.anchors("colour", n=n, seed=0), np.arange(4 * n) // 4
batch = uk.collate([variants[i] for i in range(4 * n)])
own, same = (
    uk.draw_mask(rows, model.grid, 0.4, generator=torch.Generator().manual_seed(0)).repeat_interleave(4 * n // rows, 0)
    for rows in (4 * n, n)
)
with torch.no_grad():
    found = [
        nearness(model.generation_flow(batch, mask=mask, layers=[middle]).hidden_states[middle].mean(1), anchor).nearer
        for mask in (own, same)
    ]
print(f"own mask for each variant: {found[0]}; one mask for the four: {found[1]}")
uk.expect(found[1].value - found[0].value, target=0.0, tol=0.15, n=n, claim="the mask moves the curve little")

# %% [markdown]
# **4.** Where a token is visible, generation can read the texture of its own patch, if not perfectly: it is in the token's code.
# Where it is hidden nobody can, for the texture is drawn independently for every patch.

# %%
few = uk.Shapes("test", n={"full": 64, "tiny": 32}[PRESET], seed=1)
tokens = uk.extract(model, few, layers=[0, middle], pooled=False, mask_ratio=0.4, progress=False)
table = probe(tokens).to_frame().query("factor.str.startswith('patch')").set_index(["flow", "layer", "factor"]).score
print(table.round(2).to_string())
hidden, visible = (table["generation", middle, f"patch texture, {where}"] for where in ("hidden", "visible"))
uk.expect(hidden, high=0.1, n=len(few), claim="the texture of a hidden patch cannot be guessed")
uk.expect(visible - hidden, low=0.1, n=len(few), claim="that of a visible one can be read")

# %% [markdown]
# **5.** UMAP gives another picture and with it another trustworthiness and overlap. Partner nearest stays, since no map is asked
# for it. A second call reads the positions from the cache. (At the tiny preset t-SNE stands in: importing UMAP takes longer
# than all else here.)

# %%
with tempfile.TemporaryDirectory() as cache:
    method = {"full": "umap", "tiny": "tsne"}[PRESET]
    drawn, again = (paired_map(U, G, states.ids, centre=True, method=method, cache=cache) for _ in range(2))
flat = paired_map(U, G, states.ids, centre=True)
for m in (flat, drawn):
    print(f"{m.method}: trust {m.trustworthiness:.2f}, kept {m.neighbour_overlap:.2f}, partner nearest {m.pairs.nearest}")
uk.expect(bool((drawn.positions == again.positions).all()), target=True, claim="the cache gives the same map")
uk.expect(
    drawn.pairs.nearest.value - flat.pairs.nearest.value, target=0.0, tol=0.0, claim="partner nearest does not depend on it"
)
