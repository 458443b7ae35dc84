# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does it work on your model and your pictures, and what will it tell you?
#
# **Claim.** Both papers say that their methods fit any unified model ([DIVA](https://arxiv.org/abs/2605.25328), Sec. 4;
# [LatentUMM](https://arxiv.org/abs/2605.17766), abstract). A method that asks little of a model can be pointed at many; this
# notebook shows how little that is, and how to find out that a model does not give it.
#
# **Run time.** Two minutes on two CPU cores. Put the name or the folder of a model of yours into `MODEL`, and its time is its
# own.
#
# **How to read it.** Nothing here needs a download. Instead of large weights stands a random model of the *same class*: all
# paths are real, all results are those of noise, and that is used: noise shows what a diagnosis says when there is nothing to
# say.

# %%
# %matplotlib inline
import logging
import tempfile
from pathlib import Path

import matplotlib.style
import pandas as pd
import torch
from IPython.display import display
from torch import nn

import umm_kit as uk
from umm_kit import plots
from umm_kit.models.samples import random_model
from umm_kit.models.sizes import sizes

matplotlib.style.use("../figures/umm.mplstyle")
logging.getLogger("transformers").setLevel(logging.ERROR)
print(f"umm_kit {uk.__version__}, torch {torch.__version__}, matplotlib {matplotlib.__version__}")

# %% tags=["parameters"]
import os

PRESET = os.environ.get("UMM_KIT_PRESET", "full")  # "tiny" takes fewer pictures and steps
SEED = 0
DEVICE = "auto"
MODEL = ""  # a folder, or an id that is in the local cache; empty: a random Janus of the real class

# %%
n, steps, shown = {"full": (96, 30, 4), "tiny": (24, 4, 3)}[PRESET]
folder = Path(tempfile.mkdtemp())
data = uk.Shapes("test", n=n, seed=SEED)
batch = uk.collate([data[i] for i in range(4)])

# %% [markdown]
# ## 1. What must a model do, and would a mistake be noticed?
#
# Two things: take a picture and be scored on its caption, and take a caption with a partly hidden picture and be scored on
# what is hidden. Below is somebody's model: ten lines of torch that know nothing of this kit. `Mine` says how a pair goes
# into it; hooks take the states out.
#
# **Write down what you expect.** The second version below forgets to hide anything. Its losses look fine, even better. Which
# numbers of a diagnosis would it falsify?


# %%
class Theirs(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.letters, self.patches, self.places = nn.Embedding(128, width), nn.Linear(192, width), nn.Embedding(512, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.to_letters, self.to_patches = nn.Linear(width, 128), nn.Linear(width, 192)

    def forward(self, x):  # every position sees those before it
        later = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.body(x + self.places.weight[: x.shape[1]], mask=later)


# %% [markdown]
# Whoever brings a model knows how its text becomes numbers, and its pictures become patches:


# %%
def letters(texts):
    rows = [torch.tensor([ord(c) for c in text] + [0]) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def patches(images):  # 16 patches of 8 x 8 pixels
    return nn.functional.unfold(images, 8, stride=8).mT


# %% [markdown]
# Now the two methods. Each runs the model once and returns a `Pass`: scores, what they should have been, and where the image
# tokens stood in the sequence that the blocks saw.


# %%
class Mine(uk.HookedUMM):
    def read(self, batch):  # picture, then caption; the last patch predicts the first letter
        m, said = self.module, letters(batch["texts"])
        x = m(torch.cat([m.patches(patches(batch["images"])), m.letters(said[:, :-1].clamp(min=0))], 1))
        return uk.Pass(m.to_letters(x[:, 15:]), said, torch.arange(16))

    def draw(self, batch, mask):  # caption, then what is shown of the picture
        m, seen = self.module, patches(batch["images"])
        told = m.letters(letters(batch["texts"]).clamp(min=0))
        x = m(torch.cat([told, m.patches(seen.masked_fill(mask[..., None], 0.5))], 1))
        return uk.Pass(m.to_patches(x[:, -16:]), seen, torch.arange(told.shape[1], x.shape[1]))


# %% [markdown]
# And a version with a mistake that is easily made and shows in no shape: nothing is hidden.

# %%
from umm_kit.models.contract import RULES


class Careless(Mine):
    def draw(self, batch, mask):
        return super().draw(batch, torch.zeros_like(mask))


theirs = Theirs()
for kind in (Mine, Careless):
    report = uk.check_model(kind(theirs, theirs.body.layers, theirs.letters, grid=(4, 4)), batch)
    print(
        f"{kind.__name__}: {report.tier}",
        *(f"{rule} fails: {why}" for rule, why in report.missing.items() if rule in RULES),
        sep="\n  ",
    )
uk.expect("hidden_unseen" in report.missing, True, claim="the check finds the careless version, and says why")

# %% [markdown]
# The same check on every family that the kit knows, each with random weights. *Drivable* means that it captions and draws,
# *preference-trainable* that the likelihood of a drawing can be had.

# %%
from umm_kit.data.language import vocabulary_corpus
from umm_kit.models.autoregressive import AutoregressiveUMM
from umm_kit.models.flowmatching import FlowUMM
from umm_kit.models.masked import MaskedUMM

families = {kind.__name__: kind.tiny(list(vocabulary_corpus())) for kind in (MaskedUMM, AutoregressiveUMM, FlowUMM)}
families |= {f"{kind} (real class)": random_model(kind, SEED) for kind in ("janus", "emu3", "liquid")}
reports = {name: uk.check_model(model, batch) for name, model in families.items()}
pd.Series({name: report.tier for name, report in reports.items()}, name="tier").to_frame().style

# %%
diagnosable = sum("diagnosable" in report.tier for report in reports.values())
uk.expect(diagnosable, 6, claim="families that can be diagnosed, of six")
print({name: report.missing for name, report in reports.items() if report.missing})

# %% [markdown]
# **What you should see.** `Mine` is diagnosable; `Careless` is not, because a change of what is hidden moves its states:
# every "shared" quantity would have measured a copy. All six families can be diagnosed. Liquid cannot draw, and says why:
# transformers has only the encoder of its image tokenizer.
#
# **If you see something else.** A `fails` line says which rule, by how much, and what to change. A rule that cannot be tried
# on a model is *not asked*, with the reason.
#
# **Published value.** None.

# %% [markdown]
# ## 2. What would the real weights take?
#
# Before anything is fetched: how large is it, what does a training hold in memory, how many operations is a step? All of that
# stands in a configuration.
#
# **Write down what you expect.** A model of 7 billion parameters, trained in full with AdamW in 32 bits: how many bytes per
# parameter, activations aside?

# %%
print(sizes(MODEL) if MODEL else sizes(random_model("janus", SEED), "a random Janus"))

# %% [markdown]
# Then it is loaded, and checked as the others were. What does each trained parameter cost beside itself? Not by the table,
# but by what an optimizer holds after one real step:

# %%
model = uk.load(MODEL, device=DEVICE) if MODEL else random_model("janus", SEED)
seen = uk.Shapes("test", n=n, seed=SEED, image_size=model.image_size)
print(uk.check_model(model, uk.collate([seen[i] for i in range(2)])).tier)

# %%
block = [nn.Parameter(p.detach().clone().float()) for p in next(iter(model.layer_parameters().values()))]
optimizer = torch.optim.AdamW(block)
for p in block:
    p.grad = torch.zeros_like(p)
optimizer.step()
held = sum(t.numel() * t.element_size() for p in block for t in (p.grad, *optimizer.state[p].values()))
uk.expect(held / sum(p.numel() for p in block), 12, 0.1, claim="bytes of gradient and moments for every trained parameter")

# %% [markdown]
# **What you should see.** Four bytes of weight, four of gradient, eight of AdamW's moments, four of the averaged copy: twenty
# for each trained parameter. That is why a 7B model does not train in full on one card of 80 GB, and why adapters, which
# train a few thousandths of it, do. For the shape of Janus-Pro 7B, [CLUSTER.md](../CLUSTER.md) has the table, and what to
# launch.
#
# **If you see something else.** `umm-kit info MODEL` prints the same for any model, and `uk.load(ID, download=True)` before
# it fetches. Ids that transformers' own classes load: `deepseek-community/Janus-Pro-1B` and `-7B`, `BAAI/Emu3-Chat-hf`,
# `BAAI/Emu3-Gen-hf`. **We have not yet run these weights ourselves.**
#
# **Published value.** DIVA: 8 cards of 24 GB, 46 to 89 hours (App. B.2), with a batch of six each.

# %% [markdown]
# ## 3. What does a diagnosis say of a model that knows nothing?
#
# A curve over layers always has some shape. So first look at the shapes of noise: left out of a paper, they are the most
# useful control there is.
#
# **Write down what you expect.** In a random model, will generation's states lie inside those of understanding? Will the two
# flows be similar (CKA) in the first layers? In the last?

# %%
panels = ["residual", "rank", "spectrum", "similarity"]
of_noise = uk.diagnose(model, seen, panels, [0.4], seed=SEED, progress=False)
of_noise.plot(published=False)

# %% [markdown]
# The same pictures through the shipped model, which has learned from 450,000 others:

# %%
trained = uk.load("tiny-masked", device=DEVICE)
of_trained = uk.diagnose(trained, data, panels, [0.4], seed=SEED, progress=False)
of_trained.plot(published=False)

# %%
other = uk.diagnose(random_model("emu3", SEED), data, ["similarity"], [0.4], seed=SEED, progress=False)
named = {"trained": of_trained, "noise": of_noise, "noise, Emu3": other}
cka = {name: d.series("similarity", "cka").value for name, d in named.items()}
print({name: f"CKA {values.iloc[0]:.2f} to {values.iloc[-1]:.2f}" for name, values in cka.items()})
uk.expect(
    cka["trained"].iloc[0] - cka["trained"].iloc[-1], low=0.5, n=n, claim="in the trained model the flows part with depth (CKA)"
)
uk.expect(cka["noise, Emu3"].iloc[0], low=0.3, n=n, claim="one vocabulary: the flows begin alike even in noise (CKA)")

# %%
if not MODEL:
    chance = {"full": 0.1, "tiny": 0.3}[PRESET]  # of few pictures, chance alone is larger
    uk.expect(cka["noise"].max(), high=chance, n=n, claim="two towers: the flows have nothing in common at any depth (CKA)")
    residual = of_noise.series("residual", "residual").value
    uk.expect(residual.iloc[-1] / residual.iloc[0], high=0.7, n=n, claim="the residual falls with depth, of noise alone (ratio)")

# %% [markdown]
# **What you should see.** Four panels for noise, then for the trained model. Noise has slopes, too: from the first layer to
# the last the residual falls by half, the rank increment climbs, and generation loses nearly all of its fine detail in the
# first block. None of this was learned. The two flows of this Janus have nothing in common at any depth (CKA 0): it sees by
# one tower and draws by another's codes ("decoupled"), where a random Emu3, which sees the codes that it draws, begins with
# .6. In the trained masked model both flows start from the same codes, too, and part with depth.
#
# **If you see something else.** With a `MODEL` of your own the first figure is yours; compare it with `uk.diagnose(...,
# untrained=...)`, which lays a random copy over it.
#
# **Published value.** Fig. 2 of DIVA has no control of this kind.

# %% [markdown]
# ## 4. What does an adapter change?
#
# For a large model DIVA trains low-rank adapters in the middle layers: the weights stay, W + B A takes their place. Here on
# the model of section 2, for a few steps, to see what moves. (What it does to understanding and drawing, notebook 03
# measures, on models that know something.)
#
# **Write down what you expect.** Which layers move? Of which rank is the change?

# %%
import copy

before = copy.deepcopy(model)
settings = {
    "max_steps": steps,
    "stage1_steps": steps // 2,
    "per_device_train_batch_size": 8,
    "warmup_steps": 0,
    "learning_rate": 1e-3,
}
quiet = {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 1000}
config = uk.DIVAConfig.tiny(output_dir=str(folder / "run"), lora_rank=4, seed=SEED, **settings, **quiet)
trainer = uk.DIVATrainer(model, config, uk.Shapes("train", n=256, seed=SEED, image_size=model.image_size))
trainer.train()
print(f"trained: adapters in layers {trainer.layers} of {model.num_layers}")

# %% [markdown]
# How far did each matrix of each layer move, measured by its own size, and along how many directions?

# %%
changes = uk.weight_changes(before, model)
kinds = changes.name.str.extract(r"(\w+)\.weight")[0]
lines = {kind: (rows.layer, rows.relative) for kind, rows in changes.groupby(kinds)}
display(plots.curves([plots.Panel("what moved", "layer", "|D| / |W|", lines)], columns=1, size=(4.6, 3.0)))
moved = changes[changes.relative > 0]
uk.expect(int(moved["rank"].max()), high=4, claim="rank of every change")
uk.expect(sorted(set(moved.layer)) == trainer.layers, True, claim="the middle layers move, and no other")

# %% [markdown]
# The adapter is kept by itself, kilobytes beside the megabytes of its base, and knows which base it belongs to.

# %%
kept = sorted((folder / "run/adapter").iterdir())
print({path.name: f"{path.stat().st_size / 1e3:.0f} kB" for path in kept})
counted = sizes(model).trained("lora", rank=4)
uk.expect(kept[1].stat().st_size / 4 / counted, 1, 0.15, claim="size of its file, in parameters that `sizes` had counted")

# %% [markdown]
# **What you should see.** Nothing outside the middle layers, and every change of rank four at most, however long the
# training. Full fine-tuning has no such bound (exercise 3).
#
# **If you see something else.** If nothing moved at all, the terms had no gradient, and the training's log said so.
#
# **Published value.** DIVA trains the middle layers in full; adapters are an option of this kit.

# %% [markdown]
# ## 5. And pictures of your own?
#
# A folder of pictures with texts is all it takes. Here one is made of scanned digits; yours may have any sizes, and its texts
# in `metadata.csv` with the columns `file_name` and `text`.
#
# **Write down what you expect.** No oracle knows your pictures. What can still be said of a model that goes image → text →
# image on them?

# %%
from PIL import Image

scans, place, rows = uk.Digits("test"), folder / "pictures", []
place.mkdir()
for k in range(n // 2):
    pixels = (scans[k]["images"] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).resize((100, 100)).save(place / f"{k:03d}.png")
    rows.append({"file_name": f"{k:03d}.png", "text": scans[k]["texts"]})
pd.DataFrame(rows).to_csv(place / "metadata.csv", index=False)

# %% [markdown]
# The shipped reader of digits on them; left of the bar stands the text of the folder, right of it what the model says.

# %%
reader = uk.load("digits-masked", device=DEVICE)
pictures = uk.ImageText(place, image_size=reader.image_size)
few = uk.collate([pictures[k] for k in range(6)])
plots.image_grid(
    few["images"],
    notes=[f"{a} | {b}" for a, b in zip(few["texts"], reader.understand(few["images"]), strict=True)],
    columns=6,
    size=1.6,
)

# %%
went = uk.drift(reader, pictures, cycles=shown, start="image", decoding=uk.Decoding(steps=8), seed=SEED, progress=False)
frame = went.to_frame()
display(plots.drift(frame))
print(*went.notes, sep="\n")
uk.expect(len(went.notes), low=1, claim="what cannot be measured without known facts is said")

# %% [markdown]
# **What you should see.** Each scan with its own text and what the model reads. On pictures without known facts there is no
# survival; what remains are cosines beside their floor, how far the caption moves, and whether a picture still finds its
# origin among the others. The notes say so.
#
# **If you see something else.** A picture that cannot be read is named, with the reason, before anything is computed. On
# photographs these small models see nothing that they know: train one on your folder, `umm-kit train masked --data my_folder
# --output_dir runs/mine`, which trains an image tokenizer first (hours on a laptop, for a few thousand pictures).
#
# **Published value.** None.

# %% [markdown]
# ## What held, what did not, and what cannot be said
#
# **Held, if its ✓ stands above:** two methods are enough for a model that the kit has never seen; a leak in it is found;
# three families of ours and three classes of transformers meet one contract; an adapter changes what it should and is kept
# alone.
#
# **Did not hold, or only in part:** Liquid cannot draw here.
#
# **Limits.** No real checkpoint was run. Trained models ship for the masked family only, so whether a *finding* depends on
# the way of generating cannot be asked yet; `umm-kit train autoregressive` and `umm-kit train flow` would make the other two.

# %% [markdown]
# ## Exercises (answers: `solutions/06_your_model.py`)
#
# 1. Write the flow `read` of section 1 with the caption *before* the picture. Which rule finds it, and what would gradient
#    conflict or CKA have measured?
# 2. Of how many parameters is an adapter of rank r on a map d → d, and from which r on does it no longer save anything?
# 3. Train the middle layers in full (`lora_rank=0`) for as many steps. Of which rank is the change now, and of which
#    effective rank?
