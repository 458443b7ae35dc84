# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What does each flow keep of a scene, layer by layer, and when may a map of it be believed?
#
# **Claim.** The two flows of one network take the same image-text pair apart as they go up: they end in different places and
# keep different things ([DIVA](https://arxiv.org/abs/2605.25328), Sec. 2, by residuals and spectra, and Fig. 5, by a map). A map
# alone cannot show this: beside every picture below stands the number that says what of it is true.
#
# **Run time.** Under 90 s on two CPU cores with `PRESET = "full"`, under 30 s with `"tiny"`. Nothing is downloaded and nothing
# is trained.
#
# **How to read it.** As before: write down what you expect *before* you run a cell. Sentences with a ✓ or a ✗ are claims that
# the code checks here and now; a *verdict* is computed from intervals, and "undecided" is one of its values. A ✓ says that a
# measurement works or that a null is where it must be; what the *model* does is told by verdicts, which may go either way.

# %%
# %matplotlib inline
import matplotlib.style
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from sklearn.cluster import KMeans

import umm_kit as uk
from umm_kit import plots
from umm_kit.diagnostics.maps import latent_map, nearness, paired_map
from umm_kit.diagnostics.probes import probe
from umm_kit.diagnostics.similarity import cka_matrix
from umm_kit.features import FLOWS
from umm_kit.widgets.latent import latent_explorer

matplotlib.style.use("../figures/umm.mplstyle")
print(f"umm_kit {uk.__version__}, torch {torch.__version__}, matplotlib {matplotlib.__version__}")

# %% tags=["parameters"]
import os

PRESET = os.environ.get("UMM_KIT_PRESET", "full")  # "tiny" takes fewer scenes; nothing else changes
SEED = 0
DEVICE = "auto"
MODEL = "tiny-masked"  # or the path of a folder that `umm-kit train` wrote

# %% [markdown]
# Both flows run over the same pairs. *Understanding* sees the whole image and never the caption; *generation* sees the caption
# and 60 % of the image tokens. At each layer the states at the 64 image tokens are averaged to one point of 128 numbers per scene
# and flow (DIVA, Sec. 3.1). Generation runs twice, with another draw of the hidden tokens: whatever differs between those two
# runs is due to the mask alone.

# %%
model = uk.load(MODEL, device=DEVICE)
data = uk.Shapes("test", n={"full": 192, "tiny": 64}[PRESET], seed=SEED)
states = uk.extract(model, data, mask_ratio=0.4, seed=SEED, progress=False)
redrawn = uk.extract(model, data, ["generation"], mask_ratio=0.4, seed=SEED + 1, progress=False)
U, G = ([states.states[flow, layer] for layer in states.layers(flow)] for flow in FLOWS)
again = [redrawn.states["generation", layer] for layer in redrawn.layers("generation")]
n, last = len(states), model.num_layers
print(f"{n} scenes, layers 0 (embedding) to {last}, width {model.hidden_size}")

# %% [markdown]
# ## 1. What can a pretty cloud hide?
#
# Before any map of a model, a map of nothing: points drawn from one Gaussian in as many dimensions. There is no cluster, no gap
# and no line in them. t-SNE (van der Maaten and Hinton 2008) places points so that near ones stay near; its *perplexity* is
# about the number of neighbours that it tries to keep. Under each title: *trust*, trustworthiness (1 = no false neighbour, a
# random map has 0.5), and *kept*, the share of the ten nearest neighbours that are still among the ten nearest on the map.
#
# **Write down what you expect.** How many clusters will you see at perplexity 2, and how many at 20?

# %%
noise = np.random.default_rng(SEED).normal(size=(n, model.hidden_size))
clouds = {"PCA": latent_map(noise)}
for perplexity in (2, 20):
    clouds[f"t-SNE, perplexity {perplexity}"] = latent_map(noise, "tsne", seed=SEED, perplexity=perplexity)
plots.latent_map(clouds, columns=3, size=2.0)

# %% [markdown]
# Now believe the picture: let k-means find eight clusters on the map at perplexity 2, as an eye would. Then ask of every point
# whether a member of its own cluster is nearer to it than a point of another. On the map, and in the space that the map shows.

# %%
cloud = clouds["t-SNE, perplexity 2"]
cluster = KMeans(8, n_init=4, random_state=SEED).fit_predict(cloud.positions)
seen, true = nearness(cloud.positions, cluster), nearness(noise, cluster)
print(f"own cluster nearer, on the map: {seen.nearer}; in the original space: {true.nearer}; by chance 0.5")
uk.expect(seen.nearer, low=0.8, n=8, claim="on the map of noise the clusters look real")
uk.expect(true.nearer.value - 0.5, high=0.5 * (seen.nearer.value - 0.5), claim="most of that is not in the data")
uk.expect(cloud.neighbour_overlap, high=0.6, n=n, claim="the score beside the map gives it away")

# %% [markdown]
# **What you should see.** PCA shows one round cloud. t-SNE at perplexity 2 shows clumps, at 20 hardly any.
# *Kept* stays low: most neighbours on the map are not neighbours in the data.
#
# **If you see something else.** With another seed the clumps lie elsewhere; that they are there does not depend on it.
#
# **Published value.** None. "How to use t-SNE effectively" (Wattenberg, Viégas and Johnson 2016) shows the same by eye.
#
# <details><summary>What the two scores are (folded)</summary>
#
# Let r(i, j) be the rank of j among all others by distance from i in the original space, and k = 10. Trustworthiness (Venna and
# Kaski 2001) is 1 − 2 / (nk(2n − 3k − 1)) · Σ<sub>i</sub> Σ<sub>j</sub> max(0, r(i, j) − k), j over the k nearest of i *on the
# map*: each false neighbour costs by how far away it really is. The overlap just counts. A map of 128 dimensions in two must
# lose neighbours; the scores say how many. Neither says whether *gaps* and *sizes* on a t-SNE map mean anything. They do not.
# </details>

# %% [markdown]
# ## 2. What orders the states of each flow?
#
# Now the model, by the most honest map: PCA is a projection, so that it can hide a structure but cannot invent one. One map per
# flow and layer; the colour is the number of objects in the scene, which captions say.
#
# **Write down what you expect.** In which flow will the number of objects be visible first? Will it still be in the last layer?

# %%
some = [0, last // 2, last]
single = {f"{flow}, layer {layer}": latent_map(states.states[flow, layer]) for flow in FLOWS for layer in some}
plots.latent_map(single, states.factors["count"], columns=3, size=1.9)

# %% [markdown]
# The upper layers again, coloured by the brightness of the picture, which no caption ever mentions.

# %%
upper = {name: drawn for name, drawn in single.items() if "layer 0" not in name}
plots.latent_map(upper, states.factors["brightness"], "brightness", columns=2, size=1.9)

# %% [markdown]
# What the eye reads off such a picture is an impression. The share of variance on the axes says how much of the states the map
# shows at all; section 4 measures what is in all 128 dimensions.

# %%
print("share of variance on the map:")
print("\n".join(f"{sum(m.variance):.2f} {name}" for name, m in single.items()))
trust = min(m.trustworthiness for m in single.values())
uk.expect(trust, low=0.6, n=n, claim="every map is more faithful than a random one, by .1 at least")

# %% [markdown]
# **What you should see.** In the shipped model, bands by the number of objects in understanding, from the middle on; in
# generation a bow ordered by brightness, in both layers shown. Layer 0 is the same in both but for the hidden tokens. Look at
# *kept* before you call two points neighbours: above layer 0 about half of the neighbours on the maps are false.
#
# **If you see something else.** Other weights may give other maps. If *trust* is below 0.8, do not read neighbours off the map at
# all; if the axes hold under a third of the variance, what you look for may be in another plane.
#
# **Published value.** None for this world, and DIVA draws no map of the raw states.

# %% [markdown]
# ## 3. How far apart do the two flows lie, and is the partner still the nearest?
#
# Both flows in one map: circles are understanding, triangles generation, and a thin line joins the two states of one pair. On the
# left as they are; beside it with each flow's own mean taken off. *Partner nearest* is measured in the original space: for how
# many scenes is, of all states of the other flow, the one of the same scene the nearest?
#
# **Write down what you expect.** Draw a curve: partner nearest against the layer. Where is its top? Where does it end?

# %%
plain, centred = ([paired_map(u, g, states.ids, centre=centre) for u, g in zip(U, G, strict=True)] for centre in (False, True))
low = last // 4
three = {f"layer {low}, as they are": plain[low]}
three |= {f"layer {layer}, own means off": centred[layer] for layer in (low, last)}
plots.latent_map(three, columns=3, size=2.3, join=40)

# %% [markdown]
# A constant difference between the flows can be all that such a map shows. It says that the flows are told apart, which is easy
# (the inputs differ), and nothing about what they hold. Hence the second curve below. The third is a ceiling: generation against
# generation with other tokens hidden. The null pairs each state with that of the next scene.

# %%
ids = range(n)
curves = {"as they are": [m.pairs for m in plain], "own means off": [m.pairs for m in centred]}
curves["generation, other mask"] = [nearness(g, ids, a) for g, a in zip(G, again, strict=True)]
curves["shuffled ids"] = [nearness(u, ids, g.roll(1, 0)) for u, g in zip(U, G, strict=True)]

# %%
panels = []
for score, title in (("nearest", "partner is the nearest of all"), ("nearer", "partner is nearer than another scene")):
    found = {name: plots.band([getattr(p, score) for p in values]) for name, values in curves.items()}
    panels.append(plots.Panel(title, "layer", "share", found, ["shuffled ids"]))
plots.curves(panels, columns=2, size=(3.7, 3.0))

# %%
found = [m.pairs.nearest for m in centred]
best = int(np.argmax([e.value for e in found]))
verdict = "falls" if found[last].high < found[best].low else "undecided"
print(f"own means off: {found[best]} at layer {best}, {found[last]} at layer {last}; from the top to the last: {verdict}")
uk.expect(found[best], low=2 / n, n=n, claim="somewhere the flows know their pairs: above twice chance")
null = curves["shuffled ids"]
inside = np.mean([p.null[0] <= p.nearer.value <= p.null[1] for p in null])
uk.expect(inside, low=0.5, n=len(null), claim="layers at which shuffled ids lie within the null")
uk.expect(np.mean([p.nearest.value for p in null]), high=0.05, n=n, claim="a shuffled partner is hardly ever the nearest")

# %% [markdown]
# **What you should see.** In the shipped model the curve rises from the embedding, has its top in an early layer and falls from
# there: in the upper half a state says less and less about *which* scene the other flow has at the same place. It never reaches
# chance. As they are, the flows lie further apart than scenes do, so that the partner is rarely the nearest although it is
# nearer than another scene. The third curve is at the top from layer 2 on: *which* tokens are hidden hardly moves the mean of
# all, so that the mask does not explain why the flows part.
#
# **If you see something else.** At layer 0 nothing has been mixed yet: the mean of all embeddings against the mean of 60 % of
# them and the mask's. If the first curve is at chance everywhere and the second is not, you look at a pure offset.
#
# **Published value.** None for this share. DIVA's Fig. 2 asks a related question by subspaces; notebook 01 does, too.

# %% [markdown]
# Now pick points yourself. Choose a layer, click on a point, or press the lasso (second button) and draw around some: you see
# their pictures and captions, and which scenes are their nearest in the *other* flow, in the original space. Without a mouse,
# `explorer.selection = [0, 5]` picks rows. (In a page without a kernel only the figures above are left.)

# %%
labels = {name: states.factors[name] for name in ("count", "brightness", "grey")}
flat = {layer: paired_map(U[layer], G[layer], states.ids, centre=True, method="tsne") for layer in (low, last)}
maps = {"PCA": dict(enumerate(centred)), "t-SNE": flat}
explorer = latent_explorer(maps, data.images(ids), [data.caption(i) for i in ids], labels)
explorer.selection = [0]
explorer

# %% [markdown]
# ## 4. What does each flow keep, in words?
#
# A probe asks whether a factor can be read off the states by a linear map, on scenes that it was not fitted to. 1 means read
# exactly, 0 no better than the mean of all scenes. Some factors captions say: count, shape, colour, size, place (*cell*). Some
# none ever says: the grey of the ground, its gradient, the brightness, the jitter of the objects, the texture.
#
# **Write down what you expect.** Understanding must write a caption; generation must fill in hidden tokens. Which flow has a
# use for the gradient of the ground? Which for the place of an object?

# %%
scores = probe(states, seed=SEED).to_frame()
plots.probes(scores, size=(3.5, 3.1))

# %% [markdown]
# In words: what does the last layer of either flow hold that the other's does not? And what has a flow lost since the layer
# where it held most of it? Two scores differ when their 95 % intervals do not touch: a cautious rule, and "undecided" stands
# for all else.

# %%
u, g = (scores[(scores.flow == flow) & (scores.layer == last)].set_index("factor") for flow in FLOWS)
table = pd.DataFrame({"kind": u.kind, "understanding": u.score, "generation": g.score})
table["kept better by"] = np.select([u.low > g.high, g.low > u.high], FLOWS, "undecided")
display(table.style.format(precision=2))

# %%
for flow, end in zip(FLOWS, (u, g), strict=True):
    top = scores[scores.flow == flow].sort_values("score").groupby("factor").tail(1).set_index("factor").loc[end.index]
    lost = [f"{name} ({top.score[name]:.2f} to {end.score[name]:.2f})" for name in end.index[end.high < top.low]]
    print(f"{flow} has lost since its top: {', '.join(lost) or 'nothing'}")
uk.expect(scores.control.abs().mean(), high=0.1, n=n, claim="factors of other scenes cannot be read")
count = u.loc["count"]
uk.expect(count.score, low=0.5, interval=(count.low, count.high), n=n, claim="understanding knows how many objects there are")

# %% [markdown]
# **What you should see.** In the shipped model understanding keeps most of what captions say, but less and less of the places;
# of the rest it loses the gradient and part of the brightness on its way up. Generation builds up grey, gradient, brightness
# and texture, which it needs to paint, and gives up the places altogether: to a flow that fills in each token by itself, an
# *average* over all tokens need not say where things are. So far the two do keep different things; neither forgets all that it
# does not need.
#
# **If you see something else.** A low score is no absence: a factor may be there in a form that is not linear, or in single
# tokens and not in their mean (exercise 4). A high score is no use: the model may hold what it never reads.
#
# **Published value.** None: no paper can probe photographs for factors that nobody knows. It is the plain-words version of
# DIVA's spectra (Fig. 2), where generation keeps fine detail and understanding loses it.

# %% [markdown]
# ## 5. Do near-duplicates stay together, in both flows? (DIVA Fig. 5)
#
# DIVA draws ten anchors, each in four near-duplicates, by t-SNE, and the states of one anchor lie together, across flows too.
# But it draws the *shared factors* of trained encoders. This model has none (notebook 03 trains some), so the maps below are of
# the raw states that such factors are made from. Variants differ in the colour of one object. Each picture also has its own
# grey, gradient, brightness, jitter and texture; they vary among the variants on the left, and are switched off on the other
# maps. Circles are understanding, triangles generation; each flow's own mean is taken off.
#
# **Write down what you expect.** Will the four circles of an anchor lie together? The four triangles? On which map?

# %%
off, wanted = uk.Nuisance(grey=0, gradient=0, brightness=0, jitter=0, texture="none"), {"full": 24, "tiny": 10}[PRESET]
near = {}
for name, nuisance in (("nuisances vary", uk.Nuisance()), ("no nuisances", off)):
    variants = uk.Shapes.anchors("colour", n=wanted, variants=4, seed=SEED, nuisance=nuisance)
    near[name] = uk.extract(model, variants, mask_ratio=0.4, seed=SEED, progress=False)
figure5 = {}
for name, layer in (("nuisances vary", last // 2), ("no nuisances", last // 2), ("no nuisances", last)):
    forty = near[name].select(near[name].ids[:40])
    pair = (forty.states[flow, layer] for flow in FLOWS)
    figure5[f"layer {layer}, {name}"] = paired_map(*pair, forty.ids, centre=True, method="tsne", perplexity=10)
plots.latent_map(figure5, [f"anchor {k // 4}" for k in range(40)], columns=3, join=0, size=2.3)

# %% [markdown]
# The number behind the picture: take a state, one of the same anchor and one of another. How often is the one of the same anchor
# nearer? A half, by chance. Within each flow the two are variants of one scene; across flows they are any variant of it in the
# other flow. All anchors count now, not ten.

# %%
anchor, measured = np.arange(4 * wanted) // 4, {}
for name, f in near.items():
    u, g = ([f.states[flow, layer] for layer in f.layers(flow)] for flow in FLOWS)
    found = {flow: [nearness(x, anchor, permutations=50) for x in xs] for flow, xs in zip(FLOWS, (u, g), strict=True)}
    means_off = [(x - x.mean(0), y - y.mean(0)) for x, y in zip(u, g, strict=True)]
    measured[name] = found | {"across": [nearness(x, anchor, y, permutations=50) for x, y in means_off]}

# %%
panels = []
for name, found in measured.items():
    lines = {flow: plots.band([v.nearer for v in values]) for flow, values in found.items()}
    ends = zip(*(v.null for v in found["understanding"]), strict=True)
    lines["shuffled anchors"] = (range(last + 1), [0.5] * (last + 1), *ends)
    panels.append(plots.Panel(name, "layer", "same anchor is nearer", lines, ["shuffled anchors"]))
plots.curves(panels, columns=2, size=(3.7, 3.0))

# %%
for name, flow, layer in [(name, flow, k) for name in measured for flow in (*FLOWS, "across") for k in (last // 2, last)]:
    v = measured[name][flow][layer]
    word = "together" if v.nearer.low > v.null[1] else "apart" if v.nearer.high < v.null[0] else "undecided"
    print(f"{name:14}  {flow:13}  layer {layer:2}: {v.nearer}, null [{v.null[0]:.2f}, {v.null[1]:.2f}]: {word}")
best = max(measured["no nuisances"]["understanding"], key=lambda v: v.nearer.value)
uk.expect(best.nearer.low, low=best.null[1], n=wanted, claim="understanding: variants of a scene lie together somewhere")

# %% [markdown]
# **What you should see.** In the shipped model understanding brings the variants together whatever the nuisances are, nearly
# perfectly in the upper half. Generation does so too, but only where there are no nuisances: where they vary, its distances
# are mostly grey and brightness (section 4), and the scene drowns in them. It holds the scene, but does not *sort* by it. Across
# flows an anchor is recognised well in the lower layers, and hardly at the end.
#
# **If you see something else.** Each variant also has its own draw of hidden tokens; exercise 3 hides the same in all four.
#
# **Published value.** DIVA Fig. 5: U and G of one anchor lie together, in t-SNE of shared factors, without a number. Raw states
# of this model do so in part: read the verdicts of "across" above. What is left to do is what shared factors are trained for:
# to be blind to what only one flow needs.

# %% [markdown]
# ## 6. Which layers hold the same geometry?
#
# Centred kernel alignment (CKA, Kornblith et al. 2019) compares *all* distances among the scenes at two layers: 1 is the same
# geometry up to rotation and scale, 0 is none in common. It needs no map. Both flows in one matrix: the blocks on the
# diagonal are within a flow, the others across.
#
# **Write down what you expect.** Which layer of generation is most like the *last* layer of understanding?

# %%
similar = cka_matrix([*U, *G])
plots.heat_map(similar, {flow: range(last + 1) for flow in FLOWS}, "CKA, unbiased")

# %%
across = similar[: last + 1, last + 1 :]
print("same layer, U with G: ", ", ".join(f"{v:.2f}" for v in across.diagonal().tolist()))
shuffled = cka_matrix(U, [g.roll(1, 0) for g in G])
uk.expect(float((similar.diagonal() - 1).abs().max()), high=1e-5, n=n, claim="each layer is like itself")
uk.expect(float(shuffled.abs().max()), high=0.25, n=n, claim="with shuffled ids nothing is left")

# %% [markdown]
# **What you should see.** In the shipped model generation stays like the embedding all the way up, and understanding turns away
# from it within its first layers: its layers 0 and 1 are like every layer of generation, its upper layers like none. So it
# is mostly understanding that leaves.
#
# **If you see something else.** CKA weighs directions by their variance: one strong factor that both flows hold, such as the
# brightness, can keep it high while all else differs. So read it beside section 4.
#
# **Published value.** None: DIVA's Fig. 2 compares the flows by residuals, rank and spectra (notebook 01), not by CKA.

# %% [markdown]
# ## What held, what did not, and what cannot be said
#
# **Held, if its ✓ stands above:** a map of noise shows clusters that are not there, and its scores give it away; somewhere in the
# network the two states of a pair know each other; factors can be read where they are, and shuffled ones cannot; variants of a
# scene come together in understanding.
#
# **Did not hold, or only in part:** every "undecided" and "falls" above. In the shipped model the states of one pair do not come
# together as they go up; they part. DIVA's Fig. 5 is there in raw states only in part. With nuisances understanding's variants
# lie together and the flows meet in the middle, while generation's variants do not; without nuisances all three do, but across
# flows no longer in the last layer.
#
# **Limits.** Means over tokens: what is in single tokens is not seen here. Probes are linear. Intervals are over scenes of one
# world and one trained model; another training run would give another model. One mask ratio, 0.4. Distances are Euclidean,
# so that directions of large variance decide them.

# %% [markdown]
# ## Exercises (answers: `solutions/02_latent_space.py`)
#
# 1. Which perplexity makes the most trusted map of pure noise? Try 2, 10 and 50, by `trustworthiness` and by
#    `neighbour_overlap`. Does any of them make the map true?
# 2. Run t-SNE of the middle layer twice, from random starts with two seeds (`init="random"`). How many of the ten nearest
#    neighbours do the two *maps* share? Is that more or less than either shares with the data? And what changes in *partner
#    nearest*?
# 3. Hide the same tokens in all four variants of an anchor (`model.generation_flow(batch, mask=...)`) and repeat section 5 for
#    generation, with nuisances. How far does that move the curve?
# 4. Extract states with `pooled=False` and probe the texture of each token's own patch. Where is it visible, and can the
#    model guess it where it is hidden?
# 5. Draw section 3 by UMAP (`paired_map(..., method="umap", cache="maps")`; the first import compiles for about a minute).
#    Which of the numbers under the title change, and which cannot?
