# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What is left of the meaning after eight times around?
#
# **Claim.** [LatentUMM](https://arxiv.org/abs/2605.17766) (abstract) starts from this: a unified model that draws what it is
# told, and then says what it drew, does not come back to where it began. Each crossing loses a little, and the losses add up.
# Here every loss is counted, by an oracle that knows every scene.
#
# **Run time.** Under eight minutes on two CPU cores with `PRESET = "full"`, one with `"tiny"`. Nothing is trained.
#
# **How to read it.** To agree with the start is not to have survived: two captions that have nothing to do with each other
# agree in part, for there are few colours. And 1 is out of reach where the image tokenizer blurs a picture. So everything
# below stands between a *floor* and a *ceiling*, both measured.

# %%
# %matplotlib inline
import logging

import matplotlib.style
import torch
from IPython.display import display

import umm_kit as uk
from umm_kit import plots

matplotlib.style.use("../figures/umm.mplstyle")
logging.getLogger("transformers").setLevel(logging.ERROR)
print(f"umm_kit {uk.__version__}, torch {torch.__version__}, matplotlib {matplotlib.__version__}")

# %% tags=["parameters"]
import os

PRESET = os.environ.get("UMM_KIT_PRESET", "full")  # "tiny" goes around a few times with a few items and concludes nothing
SEED = 0
DEVICE = "auto"
MODEL = "tiny-masked"  # or the path of a folder that `umm-kit train` wrote

# %% [markdown]
# The start is a caption from the test split. The model draws it, reads what it drew, draws what it read, and so on: a *cycle*
# is text → image → text. Everybody goes around three times, with other draws of the noise, to tell noise from drift (section 3).

# %%
n, cycles, few, short = {"full": (48, 8, 32, 4), "tiny": (8, 2, 6, 1)}[PRESET]
model, data = uk.load(MODEL, device=DEVICE), uk.Shapes("test", n=n, seed=SEED)
decoding = uk.Decoding(steps=8)  # a quarter of the usual rounds
print(f"{n} captions, such as {data.caption(0)!r}")

# %% [markdown]
# ## 1. How much survives?
#
# After k cycles, of everything that the first caption said, the share A(k) still stands in the k-th caption. The floor F(k)
# is the same share for the captions that *other* items have become: what agrees without memory. The ceiling C is what the
# oracle finds in the true pictures, or in their round trips through the image tokenizer if that is less. *Survival* is
#
# $$S(k) = \frac{A(k) - F(k)}{C - F(k)}$$
#
# A model that always says the same thing has S = 0. A caption that cannot be read counts as lost, and is never left out.
#
# **Write down what you expect.** This model is good: nearly every caption it gives to a true picture is right, and about
# four of five things that it is asked to draw are as told. What is S after one cycle? After eight? Does the curve level off?

# %%
found = uk.drift(model, data, cycles=cycles, repeats=3, seed=SEED, decoding=decoding, progress=False)
print(found)
found.plot()

# %%
curve = found.to_frame().pivot(index="cycle", columns="metric", values="value")
display(curve[["survival", "recall", "floor", "ceiling", "contradictions", "lost"]].style.format(precision=3))

# %%
S = curve.survival.to_numpy()
if PRESET == "full":  # few items say little
    uk.expect(found.mean_survival, high=0.95, n=n, claim="meaning is lost on the way")
    uk.expect(float(S[0] - S[-1]), low=0.05, n=n, claim="more is lost with every cycle, not all in the first")
    print(found.exponential_fit())
uk.expect(bool((curve.recall >= curve.floor).all()), True, n=n, claim="more than chance is left at every cycle")

# %% [markdown]
# **What you should see.** Survival falls fast at first, and then goes on falling. It stays above the floor for all of the
# eight cycles; half of the meaning is not gone by then, so the half-life is given as *longer than* what was run.
# *Contradictions* are facts of the start, per item, that the last caption denies: at first most of what is lost is left out,
# later more and more of it is said wrongly.
#
# **If you see something else.** With another model, first look at the ceiling: if its tokenizer loses much, little can
# survive. Where floor and ceiling are nearer than .2 the measure is refused, because it would divide noise by noise.
#
# **Published value.** None that could be quoted: the paper's body was not at hand, only its abstract and the code that its
# authors released. Other benchmarks measure one image → text → image cycle by a cosine, without a floor (section 5).

# %% [markdown]
# ## 2. What goes first?
#
# The same, for each kind of fact by itself: shapes, colours, sizes, places, relations; and two that are scored without
# counting in S: *objects* (is there still a thing of the very colour and shape?) and the *count* of things.
#
# **Write down what you expect.** Rank the kinds. Which one will be gone after a single cycle, and why that one?

# %%
kinds = found.by_category()
chosen = kinds[kinds.cycle.isin([1, cycles])].pivot(index="category", columns="cycle", values=["recall", "value"])
display(chosen.style.format(precision=2))

# %%
first = found.first_failure()
display(first.style.hide(axis="index").format(precision=2))
if PRESET == "full":
    counted = first[~first.category.isin(["none", "lost"])].set_index("category").value
    uk.expect(str(counted.idxmax()), "position", n=n, claim="what goes first most often")

# %% [markdown]
# And then? From one cycle to the next, what becomes of a fact that is kept so far, and of one that was lost?

# %%
steps = found.transitions()
kept = steps[steps.before == "kept"].pivot_table(index="category", columns="after", values="share", sort=False)
back = steps[(steps.before == "lost") & (steps.after == "regained")].set_index("category").share.rename("lost, then regained")
display(kept.join(back).style.format(precision=2, na_rep="none"))

# %% [markdown]
# **What you should see.** Places go first, and at once: the model's captions mostly leave them out, so the next drawing puts
# the things anywhere. That is not forgetting but *saying less*. Of the rest, colours last longest. And what is lost mostly
# stays lost: few facts come back. *Count* falls although few things vanish:
# drawings gain things that nobody asked for, and recall does not see what is added.
#
# **If you see something else.** Kinds that few captions mention (relations) have wide intervals; look at `n`.
#
# **Published value.** None. Without known facts only one number is there, and one cannot see that a model keeps colours and
# drops places.

# %% [markdown]
# ## 3. Is it noise, or is it drift?
#
# Drawing is random: a fact may be lost because of an unlucky draw. All runs start from the same captions. Where the *same*
# facts are lost in all, it is the model; where others are, it is chance.
#
# **Write down what you expect.** A fact was lost in one run. What is the probability that another has lost it, too?

# %%
noise = found.noise()
display(noise.style.hide(axis="index").format(precision=3))
again = noise.iloc[-1]
uk.expect(float(again.lost_again), low=float(again.lost), n=n, claim="what one run loses, another loses more often than others")

# %% [markdown]
# The same can be seen in the latents. Each caption has a *family* of ways, one per run, on a plane that was fitted to the
# captions of the start. Four families, and a number over all: of how the captions of a cycle differ, which share is told by
# where they began?

# %%
where = found.paths()  # [runs, cycles + 1, captions, 2]
within, whole = where.var(0, ddof=1).mean(1).sum(-1), where.var((0, 2), ddof=1).sum(-1)
print("told by the origin, cycle by cycle:", *(f"{share:.2f}" for share in 1 - within[1:] / whole[1:]))
if PRESET == "full":
    uk.expect(float(1 - within[-1] / whole[-1]), low=0.3, high=0.95, n=n, claim="families spread, and still know their origin")
some = [k for k in range(n) if len(data.caption(k)) < 45][1:5]
plots.paths(where, some, names=[data.caption(k) for k in some], size=4.6)

# %% [markdown]
# **What you should see.** `lost` is the share of facts that are gone, `lost_again` the same among those that another run has
# lost. If luck alone decided, the two would be equal; if only the fact did, `lost_again` would be 1. At first it is near that
# end: most of the loss is systematic, and averaging over draws would not bring it back. By the last cycle it lies in between,
# so that luck has a good part. In the map families fan out, and two may meet; but most of the way is made in the first cycle,
# and members of a family often go it together. `drift` is the recall that is lost on average; `sampling_sd` is how far one
# item's recall varies between runs, `item_sd` how far items differ in truth.
#
# **If you see something else.** With a `Decoding` of temperature 0 all runs are the same, and `lost_again` is 1.
#
# **Published value.** None. LatentUMM's second stage draws noise on purpose, to choose between outcomes; that is for notebook
# 04.

# %% [markdown]
# ## 4. Who forgets: the reader, the writer, or the tokenizer?
#
# Three suspects. Exchange one at a time: the *oracle* reads whatever is drawn without a fault (and says all of it, places
# included); the *renderer* draws whatever is said. If survival rises when the reader is exchanged, the reader forgets: *gain*
# is over the model with itself, item by item.
# *Tokenized*: both are perfect, but each picture is encoded and decoded. *On codes*: the model reads the codes that it drew,
# without the way through pixels.
#
# **Write down what you expect.** Order the suspects by guilt.

# %%
from umm_kit.evaluation.blame import blame

guilt = blame(model, uk.Shapes("test", n=few, seed=SEED), cycles=short, decoding=decoding, progress=False)
display(guilt.style.hide(axis="index").format(precision=2))

# %%
by = guilt.set_index(["reader", "writer"])[["mean_survival", "low", "high"]]
rows = [(f"{reader} / {writer}", *values) for (reader, writer), values in zip(by.index, by.to_numpy(), strict=True)]
alone, perfect = by.loc[("model", "model")], by.loc[("oracle", "oracle")]
uk.expect(perfect.mean_survival, low=0.97, n=few, claim="two perfect partners lose nothing")
if PRESET == "full":
    uk.expect(alone.mean_survival, high=float(perfect.low), n=few, claim="the model loses what perfect partners keep")
plots.forest({f"reader / writer, {short} cycles (n = {few})": rows}, "mean survival")

# %% [markdown]
# **What you should see.** With a perfect *writer* the model keeps more, item by item, and the interval of the gain lies above 0:
# its drawings forget. With a perfect *reader* the gain cannot be told from 0 by so few items. Both exchanged, nothing is lost.
# The tokenizer is innocent here: perfect partners lose next to nothing through it, and on codes the model gains nothing.
# (Survival can exceed 1: the ceiling was measured on its own pictures. And where nothing at all was lost a bootstrap has no
# width, so a wider interval is given.)
#
# **If you see something else.** A perfect reader also says *places*, which the model's captions leave out; the writer then
# has more to follow, and more to get wrong: its gain can be below 0.
#
# **Published value.** None. The paper aligns both maps at once, into the latent space and out of it.

# %% [markdown]
# ## 5. What do the latents see of it, and does the model agree with itself?
#
# Two short cuts are common. One is a cosine: the pooled states of the last text, against those of the first. The other is to
# let the model judge itself: does it read out of its own picture what it was told to draw? A model could do that by a
# *private code*, a picture that says "red" to it and to nobody else. The detector takes what the model reads in its pictures
# minus what the oracle reads in them.
#
# **Write down what you expect.** Survival has fallen by a third or more. How far has the cosine fallen?

# %%
name = "latent_cosine"
display(curve[["survival", name, f"{name}_floor", "retrieval_rank"]].style.format(precision=3))
print(f"private code: {found.private_code}")

# %%
above = (curve[name] - curve[f"{name}_floor"]) / (1 - curve[f"{name}_floor"])  # as survival is, between floor and ceiling
fall = float(above.iloc[0] - above.iloc[-1])
print(f"cycles 1 to {cycles}: the cosine above its floor fell by {fall:.2f}, survival by {S[0] - S[-1]:.2f}")
uk.expect(float(curve[f"{name}_floor"].min()), low=0.5, n=n, claim="even the states of unrelated texts are nearly parallel")
if PRESET == "full":
    uk.expect(not found.private_code.low > 0, True, n=n, claim="there is no private code")

# %% [markdown]
# **What you should see.** The cosine itself hardly falls, which looks like nothing was lost; but two texts that have nothing to
# do with each other have nearly as much. Measured above that floor, cycle by cycle as survival is, it does fall, though by
# less than survival: a cosine may warn, but not without its floor, and it is no measure of what was kept. There is no
# private code: what the model reads in its pictures is what the oracle reads.
#
# **If you see something else.** After training on its own judgement (notebook 04's preference) a private code is just what
# one should look for: self-agreement is then rewarded.
#
# **Published value.** None to quote. UnifiedBench takes the cosine of an image embedding after one cycle, without floor or
# ceiling; with both, by a CLIP or DINO that you name: `umm-kit drift MODEL --unified-bench NAME`.

# %% [markdown]
# ## 6. Watch one go around, and make it drift
#
# The player: an item, a half-step, and each fact of the start with what became of it (✓ kept, – gone, ✗ denied). On the right
# the way of its latent over a plane that was fitted at the start.
#
# **Write down what you expect.** Choose an item by its caption: which of its facts will go first?

# %%
from umm_kit.widgets.drift import drift_player

drift_player(found)

# %%
trace, item = found.traces[0], 1
shown = [k for k in trace.images if k <= 2 * 5]
told = [f"{k // 2 + 1}: {trace.texts[k + 1][item]}" for k in shown]
print(trace.texts[0][item])
plots.image_grid(torch.stack([trace.images[k][item] for k in shown]), notes=told, columns=5, size=2.0)

# %% [markdown]
# Below, words of your own, or a picture. Say something that the world does not have, or drop a photograph: where does the
# model take it? Whatever it cannot say, it cannot keep.

# %%
from umm_kit.widgets.drift import make_it_drift

make_it_drift(model, "a large green ring at the left and a small red circle at the top", cycles=short, decoding=decoding)

# %%
from umm_kit.evaluation.cycles import around

noise_picture = torch.rand(3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(SEED))
way = around(model, noise_picture, cycles=short, seed=SEED, decoding=decoding)
uk.expect(way[1].count(",") + 1, low=5, claim="things it names in pure noise, where no training picture has more than four")
plots.image_grid(torch.stack(way[::2]), notes=[*way[1::2], ""], size=2.0)

# %% [markdown]
# **What you should see.** The last row starts from pure noise, which is no scene. The model has no words for that: it names one
# thing after the other until its words are used up, and draws as many as there is room for. No training picture had more than
# four. So drift has an end, but not a plausible one: what it falls into may be a place where nobody has ever been.
#
# **If you see something else.** Another seed gives other pictures, but again crowds of shapes.
#
# **Published value.** None.

# %% [markdown]
# ## 7. Does training keep more of it?
#
# LatentUMM says so (notebook 04 takes its losses apart). Here its stage 2, as corrected, against plain fine-tuning with
# adapters of the same rank and as much processor time, from the same three models. They are narrow (`tiny-tight-0`, -1, -2) and
# draw badly, so that much is lost and there is much to gain. The learning rates of fine-tuning and LatentUMM are the best of
# four on validation items, by survival alone, and DPO alone takes LatentUMM's (the highest tried); both abilities are measured
# beside it, for whoever says or draws less may drift less: *told* counts the facts in a caption after one cycle, right or
# wrong, and *distinct* is 1 where no other item ends with the same caption.
#
# **Write down what you expect.** Which will survival tell from the base: fine-tuning, LatentUMM, both? At what price?

# %%
from pathlib import Path

from umm_kit import figures
from umm_kit.experiments import Ledger, comparison, latentumm

records = Ledger(Path("../experiments/latentumm.jsonl")).records()
effects = latentumm.STUDY.effects(records)
display(figures.arms(effects[~effects.metric.isin(["survival_first", "survival_last", "distinct"])], against="base"))

# %%
said = comparison.verdict(effects, "latentumm")
display(said.style.hide(axis="index").format(precision=4))
gain = said.set_index("metric")
uk.expect(gain.sft_low["survival"], high=0, n=288, claim="LatentUMM is not shown to keep more than fine-tuning (lower end)")
uk.expect(gain.sft_high["generation"], high=0, n=2052, claim="it draws fewer prompts right (upper end of the interval)")

# %% [markdown]
# **What you should see.** Nothing is shown to keep more: survival of every arm is undecided, against the base and against
# fine-tuning, and the design could have told a gain of about .075 (*detectable*). But there is a price: LatentUMM draws eight
# points fewer prompts right than fine-tuning, and DPO alone seven: the preference is the part to look at. By its own lights it
# succeeds: in all six runs a frozen copy of the model finds the prompts more easily in the drawings of the second round than of
# the first, by .2 to .33 nats per word (`rollout_mean_by_round` in the records). An oracle does not. A model that is its own
# judge may learn what its judge likes; and DPO moves chosen and rejected apart while *both* become less likely
# (`chosen_shift`).
#
# **If you see something else.** Records are data: this figure is the same on every machine. `umm-kit reproduce latentumm` trains
# and judges whatever has no record.
#
# **Published value.** None to quote: the abstract claims that drift is reduced, and its numbers are of a model of 7 billion
# parameters.

# %% [markdown]
# ## What held, what did not, and what cannot be said
#
# **Held, if its ✓ stands above:** meaning is lost with every cycle and not only in the first; places go first, because they
# are not said; at first most of it is systematic and not bad luck; two perfect partners lose nothing.
#
# **Did not hold, or only in part:** that a high cosine, or a model's agreement with itself, shows that meaning was kept.
# Whether reader or writer forgets more cannot be told from so few items.
#
# **Limits.** One model, one world of one to four objects, a quarter of the usual drawing rounds. Facts are what captions say:
# what a caption never says (texture, grey) is not followed. Section 7 has one training seed, narrow models, and
# the same 1,024 training scenes for every arm.

# %% [markdown]
# ## Exercises (answers: `solutions/05_drift.py`)
#
# 1. If every cycle lost the same share of what is left, one cycle would be enough to know the half-life. Predict it from S(1)
#    and compare with the fit over all cycles. Why is it so far off?
# 2. A model that always says "a small red circle and a large blue square" has a recall above 0. Show that its survival is 0,
#    by handing it to `uk.drift` as the reader.
# 3. Give the model a perfect reader that leaves places out. How much of what the perfect reader brought was places?
# 4. Draw greedily (`uk.Decoding(steps=8, temperature=0.0)`). Is less lost? And what is lost besides?
