# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Why is one shared space not enough, and what does it take to tie the maps into it and out of it?
#
# **Claim.** [LatentUMM](https://arxiv.org/abs/2605.17766) (abstract): that understanding and generation share a latent space does
# not keep meaning from drifting between them; the maps *into* that space and *out of* it have to be aligned, first in the
# space of a stronger embedding model, then in the backbone, where a preference among the model's own rollouts makes them stable.
#
# **Run time.** Under four minutes on two CPU cores with `PRESET = "full"`, under one with `"tiny"`. Sections 2 and 3 train.
#
# **How to read it.** The paper's body was not at hand. What is called *released* follows the code that its authors published. A
# loss that falls is no proof of anything here: ask of each what else would make it fall.

# %%
# %matplotlib inline
import io
import logging
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib.style
import pandas as pd
import torch
from IPython.display import display

import umm_kit as uk
from umm_kit import plots
from umm_kit.widgets.live import LiveCurves

matplotlib.style.use("../figures/umm.mplstyle")
logging.getLogger("transformers").setLevel(logging.ERROR)
print(f"umm_kit {uk.__version__}, torch {torch.__version__}, matplotlib {matplotlib.__version__}")

# %% tags=["parameters"]
import os

PRESET = os.environ.get("UMM_KIT_PRESET", "full")  # "tiny" trains a few steps and concludes nothing; it shows that all runs
SEED = 0
DEVICE = "auto"
MODEL = "tiny-masked"  # or the path of a folder that `umm-kit train` wrote

# %% [markdown]
# First the disease, in three cells: a text, its drawing, what the model reads in it, and so on (notebook 05 measures it).

# %%
n, few, cycles, steps = {"full": (256, 24, 4, 200), "tiny": (32, 6, 1, 6)}[PRESET]
model, data = uk.load(MODEL, device=DEVICE), uk.Shapes("test", n=n, seed=SEED)
last, decoding = model.num_layers, uk.Decoding(steps=8)

# %%
sick = uk.drift(model, uk.Shapes("test", n=few, seed=SEED), cycles=cycles, decoding=decoding, progress=False)
print(sick)

# %% [markdown]
# One of them on its way, with what the model read in each drawing:

# %%
trace, item = sick.traces[0], 1
shown = sorted(trace.images)
print(trace.texts[0][item])
plots.image_grid(torch.stack([trace.images[k][item] for k in shown]), notes=[trace.texts[k + 1][item] for k in shown], size=2.0)

# %% [markdown]
# ## 1. Do a text and its picture land in the same place?
#
# They share a space: states of every layer have the same width, and the same weights made them. Take the last layer: the mean
# over the words of a text, before any image; and the mean over the tokens of its picture, as understanding reads it. Beside
# them a *teacher*: a small CLIP that was trained for nothing but to bring a text and its picture together.
#
# Two readings. *Cosines*: of a text with its own picture, and with all other pictures. *Retrieval*: how often is the nearest
# picture the right one? (A picture of the same things counts as right.)
#
# **Write down what you expect.** The model captions nearly every picture correctly. How often is the nearest picture the
# right one?

# %%
from umm_kit.diagnostics.collapse import collapse
from umm_kit.models.teachers import load_teacher, retrieval
from umm_kit.trainers.stages import facts_of

items = [data[i] for i in range(n)]
batch, facts = uk.collate(items), facts_of(items).tolist()
teacher = load_teacher("tiny-teacher", device=DEVICE)

# %% [markdown]
# The same items, as the model has them and as the teacher has them.

# %%
with torch.no_grad():
    z_text = model.text_states(batch["texts"], [last])[last]
    z_image = model.understanding_flow(batch, layers=[last]).hidden_states[last].mean(1)
pairs = {
    "the model's states": (z_text, z_image),
    "the teacher": (teacher.embed_text(batch["texts"]), teacher.embed_image(batch["images"])),
}

# %%
kept = ["positive_cosine", "negative_cosine", "total_variance", "effective_rank"]
rows = {}
for name, both in pairs.items():
    reading = collapse(*both).as_dict()
    rows[name] = {"retrieval": retrieval(*both, facts)} | {measure: reading[measure] for measure in kept}
display(pd.DataFrame(rows).T.style.format(precision=3))
own, taught = (rows[name]["retrieval"] for name in pairs)
uk.expect(taught - own, low=0.3, n=n, claim="the teacher finds partners that the model's states do not")
if PRESET == "full":
    uk.expect(own, high=0.1, n=n, claim="by the model's own states partners are hardly found")

# %% [markdown]
# **What you should see.** By its own states the model finds a text's picture hardly more often than by chance, though it could
# name every thing in it. Texts lie in one part of the space and pictures in another; the *decoders* know the way between
# them, and no distance does. The teacher finds nearly all.
#
# **If you see something else.** Try another layer: at the first, states are embeddings of words and of patches. With a model of
# your own, retrieval may be high where it was trained with a contrastive term.
#
# **Published value.** None to quote; the paper's teacher is a commercial embedding model.

# %% [markdown]
# ## 2. Pull pairs together: what else makes that loss fall?
#
# Stage 1 trains a map φ from the teacher's embeddings into a latent z, and a map G back out of it:
#
# $$L = |z_t - z_i|^2 + |z - \phi(G(z))|^2, \qquad z_t = \phi(e_t),\ z_i = \phi(e_i)$$
#
# Here it is trained twice with the released shape: with these terms alone, as released, and with a guard that wants pairs to
# be told from other pairs (InfoNCE). The curves grow while it trains. Look at the *total variance* of z beside the loss.
#
# **Write down what you expect.** Which map has the lowest loss of all? Is it a useful one?

# %%
from umm_kit.models.aligner import LatentAligner, LatentAlignerConfig
from umm_kit.models.teachers import EmbeddingTable
from umm_kit.trainers.latentumm import AlignerConfig, AlignerTrainer

scenes = uk.Shapes("train", n={"full": 2048, "tiny": 64}[PRESET], seed=SEED)
every = [scenes[i] for i in range(len(scenes))]
vectors = teacher.embed_text([i["texts"] for i in every]), teacher.embed_image(torch.stack([i["images"] for i in every]))
table = EmbeddingTable([i["id"] for i in every], *vectors)

# %% [markdown]
# `AlignerTrainer` takes readings of collapse as it goes, and raises an alarm by name when there is one.


# %%
def stage_1(guard):
    options = {"max_steps": steps, "per_device_train_batch_size": min(128, len(scenes) // 2), "save_strategy": "no"}
    options["logging_steps"] = max(1, steps // 20)
    config = AlignerConfig.tiny(output_dir=tempfile.mkdtemp(), guard=guard, disable_tqdm=True, seed=SEED, **options)
    torch.manual_seed(SEED)
    aligner = LatentAligner(LatentAlignerConfig(embedding_size=table.dim, hidden_size=128, num_heads=4))
    trainer = AlignerTrainer(aligner, config, table, scenes, callbacks=[LiveCurves()])
    with redirect_stdout(io.StringIO()):  # the curves say it better
        trainer.train()
    return aligner.eval(), trainer.monitor


# %%
released, watched = stage_1("none")
guarded, calm = stage_1("infonce")

# %% [markdown]
# On items that no training saw: what became of the teacher's embeddings under each map?

# %%
e_text, e_image = pairs["the teacher"]
with torch.no_grad():
    maps = {name: phi(e_text, e_image) for name, phi in {"released": released, "guarded": guarded}.items()}
after = {name: collapse(out.z_text, out.z_image).as_dict() for name, out in maps.items()}
after = {name: {"retrieval": retrieval(maps[name].z_text, maps[name].z_image, facts), **r} for name, r in after.items()}
display(pd.DataFrame({"the teacher": rows["the teacher"], **after}).loc[["retrieval", *kept]].T.style.format(precision=3))

# %% [markdown]
# What did the monitor say on the way?

# %%
alarms = {
    name: sorted({a.reason for *_, found in m.readings for a in found}) for name, m in (("released", watched), ("guarded", calm))
}
print(alarms)
if PRESET == "full":
    shrunk = after["released"]["total_variance"] / watched.readings[0][1].total_variance
    uk.expect(shrunk, high=0.05, n=n, claim="released, the variance of z collapses")
    uk.expect(after["guarded"]["retrieval"] - after["released"]["retrieval"], low=0.2, n=n, claim="the guard keeps items apart")
    uk.expect("scale" in alarms["released"], True, claim="the monitor calls it a collapse of scale")

# %% [markdown]
# **What you should see.** Released, both losses fall to almost nothing, and so does the variance: all latents draw together
# towards one point. A constant φ makes both terms exactly 0 and nothing in them asks for more; derive it in exercise 1. The rank
# does not say so (after its first fall it rises), and a third of the partners are still found. So the monitor looks at scale,
# rank and angle, for no one of them sees every collapse. With the guard the losses end higher, and the map is worth something.
#
# **If you see something else.** With `PRESET = "tiny"` there are too few steps for either. A target weight above 0
# (`AlignerConfig(target_weight=...)`) does not prevent the collapse: it ties G, and not φ.
#
# **Published value.** The release sets the target weight to 0 in this stage and has no guard. No number is published with it.

# %% [markdown]
# ## 3. Best up, worst down: what does the preference want?
#
# Stage 2 draws several rollouts of a latent, scores how well each leads back to it, and adds
#
# $$L_{pref} = -\log\sigma(\max_k s_k - \min_k s_k)$$
#
# Arrows are minus the gradient. Beside it *direct preference optimisation*: it moves likelihoods, not scores; the best rollout's
# up and the worst one's down against a frozen copy of the model, while nothing is asked of the scores themselves.
#
# **Write down what you expect.** Five rollouts that all lead back perfectly: is that the best or the worst value of this loss?

# %%
from umm_kit.losses.preference import dpo, released_preference

scores = torch.tensor([[0.95, 0.9, 0.85, 0.8, 0.6]], requires_grad=True)
released_preference(scores).backward()
likelihoods = torch.zeros(2, requires_grad=True)
dpo(likelihoods[:1], likelihoods[1:], torch.zeros(1), torch.zeros(1)).loss.backward()

# %% [markdown]
# The arrows, each to the scale of its panel:

# %%
of_scores = [(f"rollout {k + 1}", float(s), -float(g)) for k, (s, g) in enumerate(zip(scores[0], scores.grad[0], strict=True))]
of_likelihoods = [("chosen", 0.0, -float(likelihoods.grad[0])), ("rejected", 0.0, -float(likelihoods.grad[1]))]
plots.pushes({"released: scores": of_scores, "DPO: log-likelihood": of_likelihoods}, "value, and where it is pushed")

# %% [markdown]
# Two values by hand:

# %%
perfect = float(released_preference(torch.ones(1, 5)))
spread = float(released_preference(torch.tensor([[1.0, 0.0, 0.0, 0.0, -1.0]])))
print(f"all five perfect: {perfect:.3f}; one perfect, one turned around: {spread:.3f} (lower is 'better')")
uk.expect(perfect, 0.6931, tol=1e-4, claim="perfect consistency has the highest loss there is, log 2")
uk.expect(float(scores.grad.sum()), 0.0, tol=1e-6, claim="the pushes add up to nothing: the mean is free to fall")

# %% [markdown]
# And if one trains by it alone? The two small maps that the release puts beside the backbone (G and its reverse), on the
# model's own text states, noise added to each of four rollouts.

# %%
from umm_kit.models.aligner import LatentHeads

torch.manual_seed(SEED)
heads, noise = LatentHeads(model.hidden_size, 64), torch.Generator().manual_seed(SEED)
z, log = torch.nn.functional.layer_norm(z_text.float(), z_text.shape[1:]), []


def rollouts():
    copies = z[:, None] + 0.05 * torch.randn(len(z), 4, z.shape[1], generator=noise)
    again = heads.reencode(heads.generate(copies.flatten(0, 1))).unflatten(0, copies.shape[:2])
    return torch.nn.functional.cosine_similarity(z[:, None], again, dim=-1)


# %% [markdown]
# For half of the steps the maps are taught to lead back; from then on they know only the preference.

# %%
optimizer = torch.optim.AdamW(heads.parameters(), 1e-3)
for step in range(steps + steps):
    s = rollouts()
    loss = (1 - s).mean() if step < steps else released_preference(s)  # first taught to lead back, then preferred
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    parts = {"best": s.amax(1), "mean": s.mean(1), "worst": s.amin(1)}
    log.append({"step": step, **{f"rollout_{name}": float(part.mean()) for name, part in parts.items()}})

# %%
before, now = log[steps - 1], log[-1]
print(f"mean score {before['rollout_mean']:.2f} before the preference, {now['rollout_mean']:.2f} after it")
if PRESET == "full":
    uk.expect(now["rollout_mean"] - before["rollout_mean"], high=-0.3, n=n, claim="the released preference lowers the mean score")
(figure := plots.training(log)).axes[0].axvline(steps, color="0.5", linestyle=":")  # from here on, the preference only
figure

# %% [markdown]
# **What you should see.** Two arrows of equal length: the best up, the worst *down*, the others not at all. Perfect
# consistency is the worst value. Left of the dotted line the maps are taught to lead back, right of it only preferred: the
# worst falls far, the mean with it, and even the best ends lower than where it was.
#
# **If you see something else.** Beside strong other terms (the release weighs this one .001) the harm is hidden, not gone.
#
# **Published value.** None. Here `PreferenceTrainer` offers what the term is named for: whole drawings of the *backbone*,
# ranked by a frozen reader, best and worst as chosen and rejected of DPO, with the chosen one's likelihood logged, which may
# fall, too.
#
# ## 4. Does drawing take part?
#
# The second alignment, of capacity, wants z → G(z) → z to close. In the released backbone G is one of the small maps beside
# it. So which weights of the *model* does that loss move? Beside it: the same loss through the model's own drawing, one step
# of it, read again by the model itself (`model.regenerate`), with gradient all the way.
#
# **Write down what you expect.** Which of the two gives the model's image head, that draws, a gradient?

# %%
few_texts, grounds = batch["texts"][: min(16, n)], {}
for form in ("side maps", "real drawing"):
    model.zero_grad()
    z = model.text_states(few_texts, [last])[last]
    if form == "side maps":
        z_hat = heads.reencode(heads.generate(z.float()))
    else:
        z_hat = model.regenerate(few_texts, [last], generator=torch.Generator().manual_seed(SEED))[last].mean(1)
    (z - z_hat).square().mean().backward()
    parts = {"blocks": model.blocks, "image head": model.image_head, "text head": model.text_head}
    grounds[form] = {k: sum(float(p.grad.norm()) for p in m.parameters() if p.grad is not None) for k, m in parts.items()}
model.zero_grad()
display(pd.DataFrame(grounds).T.style.format(precision=4))

# %% [markdown]
# Sums of gradient norms, by part of the model. Two of these numbers must be as they are:

# %%
uk.expect(grounds["side maps"]["image head"], 0.0, tol=0.0, claim="released: no gradient reaches what draws")
uk.expect(grounds["real drawing"]["image head"], low=1e-9, claim="through the real path it does")

# %% [markdown]
# **What you should see.** As released the loss moves the blocks, so that their states suit the side maps; nothing that draws is
# moved. Generation never happens. Through the real path the image head gets its share.
#
# **If you see something else.** `regenerate` draws all tokens in one step, straight through its choices; finite differences agree
# with its gradient where no choice is near a tie (a test of the kit).
#
# **Published value.** None.

# %% [markdown]
# ## 5. And in the backbone? Stage 2, from its run records
#
# `umm-kit reproduce latentumm` trains adapters in three narrow models with all corrected terms, with the preference alone, and
# plainly, for as much processor time (2,048 test scenes, 2,052 prompts, 288 items through eight cycles; one training seed). The
# preference draws, a frozen copy of the model ranks, DPO moves best and worst apart.
#
# **Write down what you expect.** The frozen reader finds the second round's drawings easier than the first's. Does an oracle,
# too? And the likelihood of the *chosen* drawing: up, or down?

# %%
from umm_kit import figures
from umm_kit.experiments import Ledger, latentumm

records = Ledger(Path("../experiments/latentumm.jsonl")).records()
effects = latentumm.STUDY.effects(records)
display(figures.arms(effects[effects.metric.isin(["survival", "generation", "understanding"])], against="base"))
preferred = {name: r for name, r in records.items() if "rollout_mean_by_round" in r}
rounds = [dict(zip(["round 1", "round 2"], r["rollout_mean_by_round"], strict=True)) for r in preferred.values()]
shifts = [{k: r["log"][-1][k] for k in ("chosen_shift", "rejected_shift")} for r in preferred.values()]
told = pd.DataFrame([a | b for a, b in zip(rounds, shifts, strict=True)], index=list(preferred))
display(told.style.format(precision=2))
easier = float((told["round 2"] - told["round 1"]).min())
uk.expect(easier, low=0, n=len(told), claim="by the frozen reader the second round is better, in every run (nats per word)")
uk.expect(told.chosen_shift.max(), high=0, n=len(told), claim="the chosen drawing becomes less likely, in every run (nats)")
drawn = effects.set_index(["arm", "metric"]).base_high["dpo", "generation"]
uk.expect(drawn, high=0, n=2052, claim="by the oracle, preference alone draws fewer prompts right than before")

# %% [markdown]
# **What you should see.** The judge that trains is content and the oracle is not: rounds score higher, fewer prompts are drawn
# right, and DPO parts chosen from rejected while *both* become less likely. (Each round draws other prompts, so its rise is not a
# paired difference.)
#
# **If you see something else.** Records are data: the figure is the same on every machine. `umm-kit reproduce latentumm` trains
# and judges what has no record yet; notebook 05, section 7, has every endpoint beside fine-tuning.
#
# **Published value.** None: of LatentUMM the abstract and the release were read, and neither prints one.
#
# ## What held, what did not, and what cannot be said
#
# **Held, if its ✓ stands above:** sharing weights and width brings no text near its picture; the released stage 1 collapses,
# and a guard prevents it; the released preference is at its worst where everything is perfect, and lowers the mean when it
# rules; the released capacity term never touches what draws.
#
# **What is measured elsewhere:** whether training a backbone with the corrected terms keeps meaning from drifting: notebook 05,
# section 7, from the records of `umm-kit reproduce latentumm`. Retrieval by a model's own states is not a goal in itself.
#
# **Limits.** One model, one teacher, one seed of each training; section 5: three narrow models, 1,024 training scenes for all.

# %% [markdown]
# ## Exercises (answers: `solutions/04_alignment.py`)
#
# 1. Derive the collapse: give φ a last map of zeros. What are both released terms then, and what does the guard say?
# 2. Shrink every latent of a good map to a tenth. Which readings of `collapse` change, and which losses fall?
# 3. Repair the preference with one `detach()`, so that the worst rollout is not pushed down. Does the mean still fall?
