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
# **Run time.** Three minutes on two CPU cores. Put the name or the folder of a model of yours into `MODEL`, and its time is its
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
from umm_kit.data.language import vocabulary_corpus
from umm_kit.models.autoregressive import AutoregressiveUMM
from umm_kit.models.flowmatching import FlowUMM
from umm_kit.models.masked import MaskedUMM
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
families = {kind.__name__: kind.tiny(list(vocabulary_corpus())) for kind in (MaskedUMM, AutoregressiveUMM, FlowUMM)}
families |= {f"{kind} (real class)": random_model(kind, SEED) for kind in ("janus", "emu3", "liquid")}
reports = {name: uk.check_model(model, batch) for name, model in families.items()}
display(pd.Series({name: report.tier for name, report in reports.items()}, name="tier").to_frame())
uk.expect(sum("diagnosable" in r.tier for r in reports.values()), 6, claim="families that can be diagnosed, of six")
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
of_trained.plot(published=False)  # few pictures for states this wide: look at shapes, not at heights

# %%
other = uk.diagnose(random_model("emu3", SEED), data, ["similarity"], [0.4], seed=SEED, progress=False)
named = {"trained": of_trained, "noise": of_noise, "noise, Emu3": other}
cka = {name: d.series("similarity", "cka").value for name, d in named.items()}
print({name: f"CKA {values.iloc[0]:.2f} to {values.iloc[-1]:.2f}" for name, values in cka.items()})
uk.expect(
    cka["trained"].iloc[0] - cka["trained"].iloc[-1], low=0.5, n=n, claim="in the trained model the flows part with depth (CKA)"
)
uk.expect(cka["noise, Emu3"].iloc[0], low=0.3, n=n, claim="one vocabulary: the flows begin alike even in noise (CKA)")
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
# ## 4. Does a finding depend on how the model draws?
#
# Two trained models, one world, one judge: `tiny-masked` fills hidden codes in any order, `tiny-autoregressive` writes words
# and codes one after another, as Liquid, Emu3 and Janus do. (They differ in size and in training, too: 10 layers of width 128
# against 6 of 96. What agrees, agrees in spite of it; what differs may have more than one cause. So `umm-kit reproduce families`
# trains an autoregressive model of the width, depth, steps and scenes of the masked `tiny-tight-0`, .37 million parameters each:
# its records come last.)
#
# **Write down what you expect.** DIVA's Figure 2 is of a masked model, Show-o. In which of the two will its bulges in the
# middle layers be found?

# %%
import json

from umm_kit.models import CHECKPOINTS

two = {"masked": trained, "autoregressive": uk.load("tiny-autoregressive", device=DEVICE)}
how = {"masked": uk.Decoding(steps=8), "autoregressive": uk.Decoding(guidance=2, temperature=0.7)}
asked = ["a red circle", "two blue squares", "a small green ring and a large yellow triangle", "a circle above a square"]
drawn = [m.generate(asked, decoding=how[k], generator=torch.Generator().manual_seed(SEED)) for k, m in two.items()]
display(plots.image_grid(torch.cat(drawn), titles=asked * 2, notes=[k for k in two for _ in asked], columns=4, size=1.5))
rows = ["caption_f1", "qa_relation", "qa_count", "generation_overall", "inpainting_objects"]
cards = {k: json.loads((CHECKPOINTS / f"tiny-{k}" / "scores.json").read_text())["metrics"] for k in two}
known = {k: pd.DataFrame(card).set_index("metric").loc[rows] for k, card in cards.items()}
said = {k: [f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}], n = {r.n:.0f}" for r in f.itertuples()] for k, f in known.items()}
display(pd.DataFrame(said, index=rows))

# %%
scenes = uk.Shapes("test", n={"full": 256, "tiny": 24}[PRESET], seed=SEED)
quiet = {"seed": SEED, "progress": False}
both = {k: uk.diagnose(m, scenes, panels[:3], [0.4], untrained=m.untrained(SEED), **quiet) for k, m in two.items()}
band = lambda d, *names: tuple(d.series(*names)[part] for part in ("depth", "value", "low", "high"))  # noqa: E731
what, x = {"residual": ("residual", "share of energy"), "rank": ("increment", "%")}, f"relative depth (n = {len(scenes)})"
plots.curves([plots.Panel(p, x, unit, {k: band(d, p, s) for k, d in both.items()}) for p, (s, unit) in what.items()])

# %%
from umm_kit.diagnostics.claims import shape_claims
from umm_kit.experiments import Ledger

claims = pd.concat({k: shape_claims(d).set_index("claim") for k, d in both.items()}, axis=1)
display(claims.loc[:, (slice(None), ["paper", "here", "low", "high", "verdict"])].style.format(precision=2, na_rep="-"))
for text in claims.index[:2] if PRESET == "full" else []:
    uk.expect(claims.loc[text, ("autoregressive", "verdict")], "reproduced", n=len(scenes), claim=f"autoregressive: {text}")
    uk.expect(claims.loc[text, ("masked", "verdict")], "not reproduced", n=len(scenes), claim=f"masked: {text}")

small = {name: r["claims"][1:3] for name, r in Ledger(Path("../experiments/families.jsonl")).records().items()}
told = "{here:+.3f} [{low:+.3f}, {high:+.3f}]".format
display(pd.DataFrame({c["claim"]: told(**c) for c in r} | {"": name} for name, r in small.items()).set_index(""))
of = lambda kind, k, end: [r[k][end] for name, r in small.items() if name.startswith(kind)]  # noqa: E731
for k, text in enumerate(claims.index[:2]):
    apart = min(of("autoregressive", k, "low")) - max(of("masked", k, "high"))
    uk.expect(apart, high=0, claim=f"at one size intervals do not part the families (gap between the nearest): {text}")

# %%
walked = uk.Shapes("test", n={"full": 48, "tiny": 8}[PRESET], seed=SEED)
kept = {k: uk.drift(m, walked, shown, seed=SEED, decoding=how[k], layers=(), progress=False) for k, m in two.items()}
print(*(f"{k}: mean survival over {shown} cycles {d.mean_survival}" for k, d in kept.items()), sep="\n")
first = [d.to_frame().query("metric == 'survival' and cycle == 1").value.iloc[0] for d in kept.values()]
uk.expect(max(first), high=0.999, n=len(walked), claim="both lose facts in their first cycle (survival)")

# %% [markdown]
# **What you should see.** Both read captions without error and draw three to four prompts of five. The diagnosis parts them. In
# the autoregressive model generation's states leave those of understanding most, and add most rank, *in the middle layers*, as
# in Figure 2, and above both nulls; in the masked model, of the paper's own kind, the residual rises into the deep layers and
# the rank has no bulge. So "the middle layers" is a finding about a model, and not yet one about unified models. Over four
# cycles both keep about three quarters of the meaning; of 48 scenes, that is as much as can be said.
#
# At one size, narrow and shallow, little of it is left. The rank sags less in both autoregressive models than in both masked
# ones, but the nearest two intervals touch, and only one of the four models bulges, by a sixth of what the large one shows. The
# residual parts nothing: models that differ in their seed alone lie as far apart as the two ways of drawing. So the bulges
# above may come from size or training as well as from the way of drawing.
#
# **If you see something else.** Two models of a kind say little of what a seed does. `umm-kit reproduce families --arms masked
# autoregressive --seeds 102` trains a third pair.
#
# **Published value.** DIVA's Figure 2, of Show-o, read off by eye: column *paper*.

# %% [markdown]
# ## 5. What does an adapter change?
#
# For a large model DIVA trains low-rank adapters in the middle layers: the weights stay, W + B A takes their place. Here on
# the model of section 2, for a few steps, to see what moves. (What it does to understanding and drawing, notebook 03
# measures, on models that know something.)
#
# **Write down what you expect.** Which layers move? Of which rank is the change?

# %%
import copy
import io
from contextlib import redirect_stdout

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
with redirect_stdout(io.StringIO()):  # the terms of its losses are notebook 03's subject
    trainer.train()
print(f"trained: adapters in layers {trainer.layers} of {model.num_layers}")

# %% [markdown]
# How far did each matrix of each layer move, measured by its own size, and along how many directions?

# %%
changes = uk.weight_changes(before, model)
lines = {kind: (r.layer, r.relative) for kind, r in changes.groupby(changes.name.str.extract(r"(\w+)\.weight")[0])}
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
# ## 6. And pictures of your own?
#
# A folder of pictures with texts is all it takes. Here one is made of scanned digits; yours may have any sizes, and its texts
# in `metadata.csv` with the columns `file_name` and `text`.
#
# **Write down what you expect.** No oracle knows your pictures. What can still be said of a model that goes image → text →
# image on them?

# %%
from PIL import Image

scans, place, names = uk.Digits("test"), Path(tempfile.mkdtemp()), [f"{k:03d}.png" for k in range(n // 2)]
for k, name in enumerate(names):
    Image.fromarray((scans[k]["images"].permute(1, 2, 0) * 255).round().byte().numpy()).resize((100, 100)).save(place / name)
said = {"file_name": names, "text": [scans[k]["texts"] for k in range(len(names))]}
pd.DataFrame(said).to_csv(place / "metadata.csv", index=False)

# %% [markdown]
# The shipped reader of digits on them; left of the bar stands the text of the folder, right of it what the model says.

# %%
reader = uk.load("digits-masked", device=DEVICE)
pictures = uk.ImageText(place, image_size=reader.image_size)
few = uk.collate([pictures[k] for k in range(6)])
display(
    plots.image_grid(
        few["images"],
        notes=[f"{a} | {b}" for a, b in zip(few["texts"], reader.understand(few["images"]), strict=True)],
        columns=6,
        size=1.6,
    )
)
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
#
# ## What held, what did not, and what cannot be said
#
# **Held, if its ✓ stands above:** two methods are enough for a model that the kit has never seen; a leak in it is found;
# three families of ours and three classes of transformers meet one contract; an adapter changes what it should and is kept
# alone.
#
# **Did not hold, or only in part:** Liquid cannot draw here. The bulge in the middle layers that DIVA shows is there in one of
# the two shipped models; of four narrow models of one size only one has it, in rank alone, so it cannot be put down to the way
# of drawing.
#
# **Limits.** No real checkpoint was run. Of each of two families one trained model ships, of different sizes; `umm-kit train
# flow` makes a model of the third.

# %% [markdown]
# ## Exercises (answers: `solutions/06_your_model.py`)
#
# 1. Write the flow `read` of section 1 with the caption *before* the picture. Which rule finds it, and what would gradient
#    conflict or CKA have measured?
# 2. Of how many parameters is an adapter of rank r on a map d → d, and from which r on does it no longer save anything?
# 3. Train the middle layers in full (`lora_rank=0`) for as many steps. Of which rank is the change now, and of which
#    effective rank?
