# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Where do understanding and generation part inside one model, and how much of it is real?
#
# **Claim.** Each shape of [DIVA](https://arxiv.org/abs/2605.25328)'s Figure 2 (Sec. 2), by which understanding and generation
# interfere layer by layer, can be put as a number with an interval and a null, and for a small model not all of them hold.
#
# **Run time.** Under 90 s on two CPU cores with `PRESET = "full"`, under 30 s with `"tiny"`. Nothing is downloaded and
# nothing is trained.
#
# **How to read it.** Three readings of such a figure are traps: one measures the end of training and not the tasks, one test
# cannot fail, one curve is made by the holes in the picture. You will walk into each of them, so write your guesses down
# first.

# %%
# %matplotlib inline
import json
import warnings
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
import torch
from IPython.display import display

import umm_kit as uk
from umm_kit import plots
from umm_kit.plots import Panel

matplotlib.style.use("../figures/umm.mplstyle")
print(f"umm_kit {uk.__version__}, torch {torch.__version__}, matplotlib {matplotlib.__version__}")

# %% tags=["parameters"]
import os

PRESET = os.environ.get("UMM_KIT_PRESET", "full")  # "tiny" takes too few anchors to conclude anything; it shows that all runs
SEED = 0
DEVICE = "auto"
MODEL = "tiny-masked"  # or the path of a folder that `umm-kit train` wrote

# %% [markdown]
# The *anchors* are image-text pairs that both flows see. A second model has the same shape, the same image tokenizer and
# **random weights**: what it shows, training did not make.

# %%
n, few, batch, pairs_of = {"full": (256, 96, 64, 16), "tiny": (48, 16, 16, 8)}[PRESET]
RATIO, RATIOS = 0.4, (0.2, 0.4, 0.6)
model, data = uk.load(MODEL, device=DEVICE), uk.Shapes("test", n=n, seed=SEED)
untrained = model.untrained(SEED)
warnings.filterwarnings("ignore", "[0-9]+ rows in")  # the tiny preset has fewer anchors than dimensions, and says so each time
print(f"{n} anchors; {model.num_layers} layers of width {model.hidden_size}; {100 * RATIO:.0f} % of the image tokens hidden")

# %% [markdown]
# ## 1. What does the whole figure look like?
#
# Five questions, each asked at every layer: how much do the two tasks' gradients disagree (*conflict*)? How much of
# generation's states lies outside the directions that understanding uses (*residual*)? How many directions does generation
# add (*effective-rank increment*)? How fine are the patterns that each flow lays over the image (*high-frequency energy*)?
# And how alike are the flows as a whole (*CKA*, which the paper does not show)?
#
# **Write down what you expect.** Draw the five curves from the first layer to the last. Where does each peak? The paper has
# for large models: conflict high at both ends, residual and rank increment highest in the middle, generation finer than
# understanding.

# %%
found = uk.diagnose(
    model, data, mask_ratios=(RATIO,), untrained=untrained, batch_size=batch, gradient_batch=pairs_of, seed=SEED, progress=False
)
found.plot()

# %%
print(found.summary())
residual, random_one, redrawn = (found.series("residual", s) for s in ("residual", "random subspace", "another mask draw"))
below = float((residual.high.to_numpy() < random_one.value.to_numpy()).mean())
uk.expect(below, target=1.0, tol=0.0, n=n, claim="share of layers at which U holds more of G than chance does")
uk.expect(
    float(redrawn.value.max()), high=0.05, n=n, claim="with other tokens hidden, G stays in its own directions (share outside)"
)

# %% [markdown]
# **What you should see.** Each curve with a band that holds the truth in 95 of 100 such samples of anchors, dashed nulls, and
# grey crosses for the paper's points. The residual lies *far below* a random subspace (the flows share directions) and *far
# above* another mask draw (they do not share all). Where a curve runs with its *untrained* twin, as the residual may in the
# first layers, input and architecture make it, and not training. Whether anything peaks in the middle you now judge by eye;
# the next section does it by a rule.
#
# **If you see something else.** With `PRESET = "tiny"` there are fewer anchors than dimensions, so that residual and rank are
# limited by their number: read nothing into them. A `MODEL` of your own may have other curves altogether; that is what the
# figure is for.
#
# **Published value.** Grey crosses: Show-o, 24 layers, read by eye off DIVA's Fig. 2 (about ± .02, for the rank ± 2), on
# relative depth. They are of another model, another world and an unknown rank rule. Gradient conflict has no crosses: the
# paper gives its curve no formula, and its values, .41 at the highest, are implausible as 1 - cos.

# %% [markdown]
# ## 2. Which of the paper's shapes are here?
#
# "A peak in the middle" becomes a number: the mean of the middle third of the layers minus that of the *higher* of the two
# outer thirds, so that a curve that only rises has none. "A trough" is a peak upside down; "a gap" is the mean difference in
# the deeper half. All are signed so that above 0 is what the paper says. The rule is fixed in advance:
#
# - *reproduced*: the whole interval is above 0, and above what every null does by the same formula;
# - *not reproduced*: the whole interval is below 0, or a null does as much;
# - *undecided*: anything else; also where a claim asks for the twin with random weights, and there was none.
#
# **Write down what you expect.** One verdict per claim.

# %%
from umm_kit.diagnostics.claims import shape_claims

table = shape_claims(found)
display(table.style.hide(axis="index").format(precision=3, na_rep="-"))
uk.expect(
    float(table.paper.min()), low=0.0, claim="the paper's own points have the shapes that it describes", paper="Fig. 2, by eye"
)

# %% [markdown]
# **What you should see.** Five rows: the paper's contrast by the same formula, ours with its interval, the strongest null,
# the verdict. **This is where the small model agrees with the paper and where it does not**: believe the last column, and
# copy it out. When this text was written residual and rank increment had no peak in the middle: the residual rose with depth.
# The last row asks for the gap once more where both flows had the same input; section 7 says why that is the row to believe.
#
# **If you see something else.** *Undecided* is not *absent*: it says that this many anchors, taken at the widest possible
# error, do not tell. More anchors narrow it. At the tiny preset most verdicts are worth nothing.
#
# **Published value.** The column `paper`, from points read by eye. It has no entry for gradient conflict (no formula), and
# for the others signs compare, sizes do not: rank rule, stacking and cut-off are not stated.

# %% [markdown]
# <details><summary>Why the intervals are so wide (folded)</summary>
#
# All layers see the same anchors, so their errors go together, by an amount that a table of intervals does not tell. For any
# correlation the standard deviation of a mean is at most the mean of the standard deviations, and that of a difference at
# most their sum. Intervals are therefore averaged within a third and added across a difference: for this reason never too
# narrow, and often too wide.
# </details>

# %% [markdown]
# ## 3. Do the tasks fight, or is it the end of training and noise?
#
# First a model so small that it can be solved on paper. Two tasks share the weights w; task U wants w = a, task G wants w =
# b:
#
# $$L_U = \tfrac12 |w - a|^2, \quad L_G = \tfrac12 |w - b|^2, \qquad w(t) = m + e^{-2t}(w_0 - m), \quad m = \tfrac12 (a + b),$$
#
# the last being the exact path of a small-step descent on their sum. Two cases: tasks that want opposite things, and tasks
# that want *nearly the same*. Batches see the gradients through noise, as they do in a real model.
#
# **Write down what you expect.** At the end of training, which pair of tasks shows the larger conflict 1 - cos without noise?
# And measured on batches of 32?

# %%
from umm_kit.diagnostics.gradients import GradientConflict

rng, width = np.random.default_rng(SEED), 20


def through_batches(w, a, b, pairs=64, size=32):
    """Both tasks' gradients on pairs of batches; an example of a task with target t is y = x.t + noise."""
    x = rng.normal(size=(pairs, 2, size, width))
    errors = np.stack([x @ (w - t) - rng.normal(size=x.shape[:-1]) for t in (a, b)], 2)
    g = np.einsum("pkmd,pktm->pktd", x, errors).reshape(pairs, 4, width) / size
    return GradientConflict(np.einsum("pid,pjd->pij", g, g)[:, None], [("w", "all")], {}).estimates("w")


# %%
times, start = np.linspace(0, 4, 13), 5 * np.eye(width)[1]
panels, final = [], {}
for name, apart in (("opposite tasks", 2.0), ("nearly the same task", 0.2)):
    a, b = apart / 2 * np.eye(width)[0], -apart / 2 * np.eye(width)[0]
    path = np.exp(-2 * times)[:, None] * start
    exact = [1 - (w - a) @ (w - b) / np.linalg.norm(w - a) / np.linalg.norm(w - b) for w in path]
    seen = [through_batches(w, a, b) for w in path]
    conflict = np.array([[e["conflict"].value, e["conflict"].low, e["conflict"].high] for e in seen])
    within = np.array([[e["within_understanding"].value, *e["within_understanding"].interval] for e in seen])
    series = {"noise-free": (times, exact), "batches of 32": (times, *conflict.T), "cos within a task": (times, *within.T)}
    panels.append(Panel(name, "time", "1 - cos, or cos", series, ("noise-free",)))
    final[name] = (exact[-1], seen[-1]["conflict"], seen[-1]["disattenuated_cosine"].value)
plots.curves(panels, size=(3.7, 2.6))

# %%
for name, (exact, measured, corrected) in final.items():
    print(f"{name}: noise-free {exact:.3f}, measured {measured}, disattenuated cosine {corrected:.2f}")
uk.expect(final["nearly the same task"][0], target=2.0, tol=0.01, claim="nearly equal tasks end in full conflict, noise-free")
uk.expect(final["nearly the same task"][1], target=1.0, tol=0.1, n=64, claim="and measured through noise they seem orthogonal")

# %% [markdown]
# Both dashed curves end at 2: at a stationary point of L_U + L_G the mean gradients add to zero, so they are *exactly
# opposite*, whether the tasks want nearly the same or not. It is a tautology, not a finding. Through noise the same point
# measures as anything between 1 and 2: where the gradient of one batch says nothing of the next (*cos within a task* near 0),
# any two tasks look orthogonal. The *disattenuated* cosine divides by that ceiling, and is nan where there is none: no
# signal, no answer.
#
# So of the real model, too, the conflict is shown with its ceilings: two batches of **one** task in the place of two tasks.

# %%
g = {name: found.series("gradients", name) for name in found.frame.query("panel == 'gradients'").series.unique()}
across = (g["conflict"].layer, 1 - g["conflict"].value, 1 - g["conflict"].high, 1 - g["conflict"].low)
band = lambda s: (s.layer, s.value, s.low, s.high)  # noqa: E731
cosines = {"U with G": across, "U with U": band(g["within_understanding"]), "G with G": band(g["within_generation"])}
plain = {"trained": band(g["conflict"]), "untrained": band(g["conflict, untrained"])}
corrected = {"U with G, disattenuated": band(g["disattenuated_cosine"])}
last = [Panel("conflict", "layer", "1 - cos", plain, ("untrained",)), Panel("disattenuated", "layer", "cos", corrected)]
plots.curves([Panel("cosine of two batches", "layer", "cos", cosines), *last])

# %%
conflict, ceiling, freed = (g[name] for name in ("conflict", "within_understanding", "disattenuated_cosine"))
print(f"the disattenuated cosine is undefined at {int(freed.value.isna().sum())} of {len(freed)} layers")
pairs, off = int(conflict.n.iloc[0]), float((conflict.value - 1).abs().max())
uk.expect(off, high=0.25, n=pairs, claim="at every layer batches of the two tasks are near orthogonal")
uk.expect(float(ceiling.value.min()), high=0.5, n=pairs, claim="at some layer U's gradient is less than half signal")

# %% [markdown]
# **What you should see.** In the toy: dashed curves that end at 2 in both panels, measured ones that end between 1 and 2. In
# the model: the cosine between the tasks beside its ceilings. If *U with U* lies on zero, the model's understanding gradients
# are noise at this batch size: the task is learned, and a conflict of 1 is all that *any* pair of tasks could show. That is
# no evidence of peace, and none of a fight. The untrained model, for contrast, has strong gradients that agree from batch to
# batch, and a conflict that is measured sharply. In the right panel there is no point where a product within a task is not
# above 0, and values far outside [-1, 1], or without an interval, are noise divided by noise.
#
# **If you see something else.** *U with U* well above zero: the model is not done with the task, or batches are large. Then
# the conflict means something, and the disattenuated cosine has a value; read its interval before its sign.
#
# **Published value.** Show-o .41 at its highest (layer 3), about .15 in the middle, .32 at layer 23, by eye. No formula, no
# batch size, no spread and no ceiling are given, so no number here belongs beside them. The text of the paper calls the curve
# an inverted parabola; the curve drawn has a trough.

# %% [markdown]
# <details><summary>Disattenuation, from the old problem of unreliable tests (folded)</summary>
#
# Write a batch gradient as g = μ + ε, ε independent noise. On disjoint batches E⟨g_U, g_G'⟩ = ⟨μ_U, μ_G⟩ and E⟨g_U, g_U'⟩ =
# |μ_U|². So ⟨g_U, g_G'⟩ / √(⟨g_U, g_U'⟩⟨g_G, g_G'⟩), each averaged over pairs of batches, estimates the cosine of the noise-free
# gradients (Spearman 1904, for correlations). If the average of ⟨g_U, g_U'⟩ is at or below 0, there is no root to take.
# </details>

# %% [markdown]
# ## 4. Was it always so?
#
# Only the end of a training is a stationary point. On the way there gradients are large, and the same numbers say more. The
# figure follows the gradient conflict through the checkpoints that this model's own training left behind.
#
# **Write down what you expect.** When is the noise ceiling highest: at the first checkpoint or at the last? Will the conflict
# at the ends of the network ever exceed that in the middle?

# %%
# conflict along training
from umm_kit.figures import conflict_along

numbers = Path("../figures/data/conflict_along.json")
missing = "Not in this copy. To make it: umm-kit diagnose RUN_FOLDER --along --output figures/data/conflict_along.json"
display(conflict_along(pd.DataFrame(json.loads(numbers.read_text())["rows"])) if numbers.exists() else missing)

# %% [markdown]
# **What you should see.** From left to right: the measured conflict, what two batches of one task have in common (the
# ceilings), and the cosine freed from noise, at a shallow, a middle and a deep layer. Compare the *first* checkpoints with
# the last: a conflict that is real should show while the ceilings are still high, and a drift of the disattenuated cosine
# towards -1 at the end is the tautology. Here the ceilings are near 1 at step 0, where the model is random: that conflict is
# measured well, and says nothing of training. Later understanding's ceiling is near 0 and the conflict sits at 1, and no drift
# of the freed cosine towards -1 is to be seen: while there is signal, there is no fight.
#
# **If you see something else.** No figure: the numbers are not in this copy; the line that is printed makes them from a
# training that kept its checkpoints. Gaps in a curve are points at which the cosine is undefined.
#
# **Published value.** None: the paper shows the conflict of finished models only.

# %% [markdown]
# ## 5. What can a shuffle tell, and what not?
#
# A tempting null for "understanding does not contain generation": pair each generation state with *another* image's
# understanding state, and see the residual rise. There are two residuals. In **feature space** generation is projected on
# understanding's principal directions. In **sample space** each generation feature is predicted from understanding's, image
# by image, held out.
#
# **Write down what you expect.** By how much does each rise when the pairs are shuffled?

# %%
from umm_kit.diagnostics.geometry import reconstruction_residual, residual_curve, shuffled_ids_residual

pooled = uk.extract(model, data, mask_ratio=RATIO, batch_size=batch, seed=SEED, progress=False)
layers, rows = pooled.layers("generation"), []
generator = torch.Generator().manual_seed(SEED)
mixed = torch.randperm(n, generator=generator)
for layer in layers:
    u, g_states = pooled.states["understanding", layer], pooled.states["generation", layer]
    feature, shuffled = (reconstruction_residual(g_states, other, 0.9) for other in (u, u[mixed]))
    sample = reconstruction_residual(g_states, u, 0.9, space="sample")
    null = shuffled_ids_residual(g_states, u, sample.components, draws=10, generator=generator)
    rows.append((feature.value, shuffled.value, sample.value, null.mean(), null.min(), null.max()))
true_f, mixed_f, true_s, *mixed_s = np.array(rows).T
feature = {"true pairs": (layers, true_f), "shuffled": (layers, mixed_f)}
sample = {"true pairs": (layers, true_s), "shuffled (all draws)": (layers, *mixed_s)}

# %%
left = Panel("feature space", "layer", "residual", feature, ("shuffled",))
display(plots.curves([left, Panel("sample space", "layer", "residual", sample)], size=(3.7, 2.5)))
uk.expect(float(abs(true_f - mixed_f).max()), target=0.0, tol=1e-9, n=n, claim="a shuffle changes no feature-space residual")
uk.expect(float((mixed_s[1] - true_s).min()), low=0.0, n=n, claim="each shuffle raises the sample-space residual of each layer")

# %% [markdown]
# **What you should see.** On the left one curve, not two: a subspace has no memory of which row it came from, so this test
# could never have failed, and passing it means nothing. On the right the shuffle lifts the residual to about 1 or just above:
# understanding does know *this* image.
#
# **If you see something else.** Curves apart on the left would be a bug. A true curve near 1 on the right means that at this
# layer the flows share directions but not the image; it can exceed 1, since a prediction that is held out can be worse than
# the mean.
#
# **Published value.** The paper states neither space nor null for its residual; its formula, ‖G - Π_U G‖² / ‖G‖², is the left
# one. Its nulls have to be others: section 1 has a random subspace, another mask draw and random weights.

# %% [markdown]
# <details><summary>Why the left one cannot move (folded)</summary>
#
# The principal directions of U are eigenvectors of U<sup>T</sup>U = Σ<sub>i</sub> u<sub>i</sub>u<sub>i</sub><sup>T</sup>, a
# sum over rows: a permutation P leaves it as it is, (PU)<sup>T</sup>PU = U<sup>T</sup>U. The same holds for effective rank
# with flows stacked as rows.
# </details>

# %% [markdown]
# ## 6. How many directions *are* "understanding"?
#
# The residual needs a rank: how many of understanding's directions count as its subspace. The paper names no rule. Ours was
# "as many as hold 99 % of its variance". Others are as good.
#
# **Write down what you expect.** Does the layer with the largest residual depend on the rule?

# %%
curves = {layer: residual_curve(pooled.states["generation", layer], pooled.states["understanding", layer]) for layer in layers}
own = {layer: residual_curve(*[pooled.states["understanding", layer]] * 2) for layer in layers}
rules = {"4 components": 4, "16 components": 16, "64 components": 64, "90 % of variance": 0.9, "99 % of variance": 0.99}
kept = {name: [int((own[m] <= 1 - r).argmax()) if r < 1 else r for m in layers] for name, r in rules.items()}
by_rule = {name: [curves[m][k] for m, k in zip(layers, ks, strict=True)] for name, ks in kept.items()}
every = np.arange(1, model.hidden_size + 1)
chosen = [layers[round(share * (len(layers) - 1))] for share in (0.2, 0.5, 0.8)]
sweep = {f"layer {m}": (every, curves[m][1:]) for m in chosen} | {"random subspace": (every, 1 - every / every[-1])}
one = Panel("residual by rank", "components kept", "residual", sweep, ("random subspace",), log=True)
plots.curves(
    [one, Panel("residual by layer", "layer", "residual", {k: (layers, v) for k, v in by_rule.items()})], size=(3.7, 2.8)
)

# %%
print("largest residual at layer", {name: layers[int(np.argmax(values))] for name, values in by_rule.items()})
u, g_states = (pooled.states[flow, layers[-1]] for flow in ("understanding", "generation"))
single = reconstruction_residual(g_states, u, components=16).value
uk.expect(by_rule["16 components"][-1], target=single, tol=1e-9, n=n, claim="the sweep holds the residual of a single rule")
rises = max(float(np.diff(curve).max()) for curve in curves.values())
uk.expect(rises, high=1e-9, n=n, claim="keeping more of understanding never raises the residual")

# %% [markdown]
# **What you should see.** Left: the residual falls from 1 to 0 as directions are added, below the straight share of a random
# subspace (curved here, on a log axis). By choosing the rule one can get almost any residual. Right: the same flows under five
# rules. If the curves peak at different layers, "the residual peaks at layer l" is a statement about the rule, too.
#
# **If you see something else.** A curve that stays flat after a while: understanding has no more directions there (its rank
# is reached), or fewer anchors than dimensions could show them.
#
# **Published value.** .25 to .31 at layer 1, .78 near layer 14, .57 at layer 23 (Show-o, by eye), of an unknown number of
# directions.

# %% [markdown]
# ## 7. Does generation keep finer detail, or only more holes?
#
# The share of spatial energy above half of the Nyquist frequency says how fine a layer's pattern over the 8 x 8 tokens is.
# DIVA finds it much higher in generation. But generation's input has holes: 40 % of the tokens are one and the same mask
# token.
#
# **Write down what you expect.** Take understanding's own states and write their mean into those 40 % of the tokens. No
# generation has taken place. Does the share rise?

# %%
from umm_kit.diagnostics.spectrum import high_frequency_energy_ratio as roughness
from umm_kit.diagnostics.spectrum import input_matched

some = uk.Shapes("test", n=few, seed=SEED)
states = {r: uk.extract(model, some, pooled=False, mask_ratio=r, seed=SEED, progress=False) for r in RATIOS}
mask, rows = states[RATIO].masks, []
for layer in layers:
    u, g_states = states[RATIO].states["understanding", layer], states[RATIO].states["generation", layer]
    punched = torch.where(mask[..., None], u.mean((0, 1)), u)
    matched = [roughness(input_matched(x, mask, model.grid), model.grid) for x in (u, g_states, punched)]
    rows.append([roughness(x, model.grid) for x in (u, g_states, punched)] + matched)
plain_u, plain_g, holes, visible_u, visible_g, visible_holes = np.array(rows).T
plain = {"understanding": (layers, plain_u), "generation": (layers, plain_g), "understanding, holes": (layers, holes)}
visible = {"understanding": (layers, visible_u), "generation": (layers, visible_g)}

# %%
left = Panel("all positions", "layer", "share above 0.5", plain, ("understanding, holes",))
display(plots.curves([left, Panel("visible positions only", "layer", "share above 0.5", visible)], size=(3.7, 2.5)))
uk.expect(float(plain_g[0] - plain_u[0]), low=0.0, n=few, claim="layer 0: mask tokens alone make generation's map rougher")
uk.expect(float(visible_g[0] - visible_u[0]), target=0.0, tol=1e-5, n=few, claim="layer 0: no gap at visible positions")
uk.expect(float(abs(visible_u - visible_holes).max()), target=0.0, tol=1e-9, n=few, claim="holes do not fool that control")

# %% [markdown]
# **What you should see.** Left: at layer 0, before any computation, generation is already rougher, and understanding with
# holes punched into it becomes as rough as generation, or rougher, at every layer: a gap like this needs no generation at
# all. Right: each map is kept at visible positions only and continued smoothly over the others, by one linear map for both
# flows. Now they start level, and what opens later is the layers' doing. It is the row "at visible positions alone" of the
# table in section 2.
#
# **If you see something else.** A right panel without a gap: all of the left one was mask tokens. Levels must not be compared
# between the panels, nor between mask ratios: a map that is filled in is smoother.
#
# **Published value.** Generation .55 to .95, understanding falling from .81 to .12 (by eye; no cut-off, no window and no
# control are stated). There the gap is already .14 at layer 0.

# %% [markdown]
# ## 8. Does it look the same at every setting?
#
# Every figure above froze four choices: layer, mask ratio, rank rule, cut-off. The explorer frees them. It uses *token*
# states of a few anchors, each token a row, where the sections above averaged over tokens; so its residuals differ from those
# above, which is one more choice that the paper leaves open. Below stands its first picture, and then residual and roughness
# at three mask ratios.
#
# **Write down what you expect.** The paper finds nearly the same curves at mask ratios .2, .4 and .6. Here, too?

# %%
from umm_kit.widgets.interference import interference_explorer

explorer = interference_explorer(states, found.series("gradients", "conflict"))
plots.curves(explorer.panels(), size=(2.9, 2.4))

# %%
measured = explorer.found
outside = {f"mask ratio {r:g}": (layers, [m[x].residual[m[x].components(0.99)] for x in layers]) for r, m in measured.items()}
rough = {f"mask ratio {r:g}": (layers, [m[x].above("generation", 0.5) for x in layers]) for r, m in measured.items()}
left = Panel("residual, 99 % of variance", "layer", "share", outside)
display(plots.curves([left, Panel("generation's energy above 0.5", "layer", "share", rough)], size=(3.7, 2.5)))
direct = reconstruction_residual(*(states[RATIO].states[flow, layers[-1]] for flow in ("generation", "understanding")))
uk.expect(
    outside[f"mask ratio {RATIO:g}"][1][-1], target=direct.value, tol=1e-9, n=few, claim="the explorer's numbers are the kit's"
)

# %% [markdown]
# Now move the sliders. (In a page without a kernel only the two figures above are left.)

# %%
explorer

# %% [markdown]
# **What you should see.** Three tasks for the sliders. Is there a rank rule under which the residual is largest in the
# *middle*? Is there a cut-off at which the flows are equally rough? Go through the layers and watch the spectrum at the lower
# right: where do the flows part, at coarse or at fine patterns? Keys work: click on a slider and use the arrows.
#
# **If you see something else.** Nothing moves: this page has no kernel; open it in JupyterLab and run it. The gradient panel
# never moves: it depends on none of the four choices.
#
# In single tokens (the explorer's states) the last layers share no more directions than a random subspace.
#
# **Published value.** Residuals at mask ratios .2, .4 and .6 within .1 of each other at every layer (read by eye); largest
# near layer 14 of 24 at each.

# %% [markdown]
# ## What held, what did not, and what cannot be said
#
# **Held, if its ✓ stands above:** averaged over tokens, the flows share more directions than chance and fewer than another mask
# draw would; a finished model's gradients hardly tell whether its tasks fight; a shuffle is no test of a subspace; the mask
# alone makes generation's maps rougher.
#
# **Did not hold:** every *not reproduced* in section 2. The model is small, its world is synthetic, and it was trained on
# both tasks at once: that a shape of a large model is missing here does not say that it is not there.
#
# **Cannot be said:** every *undecided*. And no interval here covers another training: one trained model is one draw.
#
# **Limits.** Directions and spectra are linear readings; what a nonlinear readout could find is another question. Intervals
# are over anchors (for gradients over pairs of batches), and hold the fitted directions fixed.
#
# ## Exercises (answers: `solutions/01_interference.py`)
#
# 1. In the toy of section 3, let the two tasks want *exactly* the same (a = b). What is the noise-free conflict on the way,
#    and what becomes of it at the end?
# 2. Which is blind to shuffled pairs: the effective-rank increment with the flows stacked as rows, the same stacked as
#    columns, CKA?
# 3. Hide one *block* of tokens instead of scattered ones (`mask_layout="contiguous"`). What happens to generation's roughness
#    at layer 0?
# 4. Raise the cut-off from 0.3 to 1.1 and draw the gap at the last layer, and the ratio of white noise. Is there a cut-off at
#    which generation is rougher than noise?
# 5. Ask `gradient_conflict(...).to_frame(parts=("attention", "mlp", "norm"))`: do the parts disagree with each other? Check
#    that the parts' inner products add up to those of the whole layer.
