# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What can one small model see, say and draw, and what do its two flows look like inside?
#
# **Claim.** One transformer with one set of weights runs two information flows over the same image-text pair: *understanding*
# (image in, words out) and *generation* (words and a partly hidden image in, the hidden part out). Both leave states at the
# same 64 image tokens, so they can be laid side by side ([DIVA](https://arxiv.org/abs/2605.25328), Sec. 3.1).
#
# **Run time.** Under 90 s on two CPU cores with `PRESET = "full"`, under 30 s with `"tiny"`. Nothing is downloaded and nothing
# is trained.
#
# **How to read it.** Each section asks a question. Write down what you expect *before* you run the cell: a guess that turns out
# wrong teaches more than a figure that looks right. Sentences with a ✓ or a ✗ are claims that the code checks here and now.

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from PIL import Image

import umm_kit as uk
from umm_kit import plots, widgets
from umm_kit.statistics import bootstrap

matplotlib.style.use("../figures/umm.mplstyle")
print(f"umm_kit {uk.__version__}, torch {torch.__version__}, matplotlib {matplotlib.__version__}")

# %% tags=["parameters"]
import os

PRESET = os.environ.get("UMM_KIT_PRESET", "full")  # "tiny" scores fewer scenes; nothing else changes
SEED = 0
DEVICE = "auto"
MODEL = "tiny-masked"  # or the path of a folder that `umm-kit train` wrote

# %%
model = uk.load(MODEL, device=DEVICE)
oracle = uk.Oracle()
data = uk.Shapes("test", n=512, seed=SEED)
millions = sum(p.numel() for p in model.parameters()) / 1e6
print(f"{millions:.1f} million parameters, {model.num_layers} layers of width {model.hidden_size}")
print(f"an image is {model.grid[0]} x {model.grid[1]} tokens out of {model.codebook_size} codes")

# %% [markdown]
# ## 1. What is in the world, and what is never said?
#
# A scene holds one to four objects. A caption may say their shape, colour, size and place: the *said* factors. No caption ever
# mentions the grey of the ground, its gradient, the brightness, the jitter of an object or the checkered texture: the
# *nuisance* factors. Every factor of every scene is known, which is what makes exact scoring possible.
#
# **Write down what you expect.** Do captions name every object? Do they always name the place?

# %%
batch = uk.collate([data[i] for i in range(4)])
plots.image_grid(batch["images"], titles=batch["texts"])

# %% [markdown]
# Below, one scene is drawn six times; only the nuisances are drawn anew. The second check asks how well the *oracle*, which
# reads pictures back into objects from their pixels alone, reads scenes whose objects we know. All scores in this notebook rest
# on it.
#
# Models do not draw clean renders. So the oracle is tried on damaged pictures and on what the image tokenizer gives back, too,
# and asked about texts that differ from the truth in *one* attribute. Accepting such a text is the error that would flatter a
# model; not being able to read a picture (*unclear*) only costs it.

# %%
from umm_kit.evaluation.reconstruction import audit_pictures

views = uk.collate([data.with_nuisance(nuisance_seed=s)[3] for s in range(6)])
known = zip(views["factors"]["grey"], views["factors"]["brightness"], strict=True)
uk.expect(len(set(views["texts"])), target=1, claim="six nuisance draws of one scene have one caption")
readings = oracle.read(data.images(range(256)))
exact = bootstrap([float(r.shows(data.objects(i))) for i, r in enumerate(readings)])
uk.expect(exact, low=0.99, n=exact.n, claim="the oracle reads whole scenes exactly")

few = uk.Shapes("test", n={"full": 128, "tiny": 24}[PRESET], seed=SEED)
honesty = pd.DataFrame(audit_pictures(model.image_tokenizer, few, SEED)["oracle"]).T
display(honesty[["exact", "unclear", "silent", "false_accept", "n", "n_edits"]].style.format(precision=4))
for pictures in ("clean", "reconstructed"):
    accepted = honesty.loc[pictures, "false_accept"]
    uk.expect(
        accepted, high=0.005, n=int(honesty.loc[pictures, "n_edits"]), claim=f"edited texts accepted of {pictures} pictures"
    )
plots.image_grid(views["images"], notes=[f"grey {g:.2f}\nbrightness {b:.2f}" for g, b in known])

# %% [markdown]
# **What you should see.** Four scenes whose captions name every object, some with places; then six views of one more that
# differ in light, ground and texture but not in what a caption would say. In the table: *exact* is the share of whole scenes
# read right, *silent* the share read wrong without a word of doubt, *false_accept* the share of `n_edits` edited texts accepted.
#
# **If you see something else.** A ✗ at the oracle means that no score below can be trusted: run `pytest tests/test_oracle.py`.
#
# **Published value.** None: this world was made for this kit.

# %% [markdown]
# ## 2. Does it describe what it sees?
#
# The model reads the 64 image tokens and writes a caption, word by word, always the likeliest next word.
#
# **Write down what you expect.** Which attribute will it get wrong first: shape, colour, size, number or place?

# %%
from umm_kit.data.oracle import score_caption, score_prompt


def verdict(right: bool, reasons: list[str]) -> str:
    """One line for a picture: a tick, or a cross with what is wrong; remarks stand after either."""
    return " ".join(["✓" if right else "✗", "; ".join(reasons)])


said = model.understand(batch["images"])
verdicts = [score_caption(text, data.objects(i)) for i, text in enumerate(said)]
plots.image_grid(batch["images"], titles=said, notes=[verdict(v.exact, v.reasons) for v in verdicts])

# %% [markdown]
# **What you should see.** Above each picture what the model says; below it a tick, or a cross with each reason, as in "expected
# red, found orange". A caption may be right in other words than the data's own: facts are compared, not words.
#
# **If you see something else.** The same caption above every picture means that the model ignores the image; words in no order
# mean that it is not trained (`MODEL` names the wrong folder?).
#
# **Published value.** None for this world; section 10 gives the score with its interval.

# %% [markdown]
# ## 3. Does it answer questions?
#
# The same weights answer when a question stands where "describe" stood.
#
# **Write down what you expect.** Which is harder for it: naming a colour, counting, or telling how two things stand to each
# other?

# %%
asked = [pairs[0] for pairs in data.questions(range(4), 1)]
answers = model.understand(batch["images"], [question for question, _ in asked])
notes = [f"says: {answer}\ntrue: {truth}" for answer, (_, truth) in zip(answers, asked, strict=True)]
plots.image_grid(batch["images"], titles=[question for question, _ in asked], notes=notes)

# %% [markdown]
# **What you should see.** One question per picture, the model's answer and the true one. Answers are single words or places.
#
# **If you see something else.** A sentence instead of a word means that the model took the question for a caption: it knows
# only questions of the six kinds in `umm_kit.data.language.QUESTION_KINDS`, in these words. Ask something else and it will
# answer anyway, without any sign of doubt.
#
# **Published value.** None for this world. Existence questions follow POPE (Li et al. 2023); its numbers are of photographs.

# %% [markdown]
# ## 4. Does it draw what it is told?
#
# All 64 tokens start hidden. In each of 32 rounds the model predicts every hidden token, keeps a few, in random order, and hides
# the rest again. (MaskGIT, Chang et al. 2022, keeps the *surest*. Exercise 5 shows what that does where a prompt leaves the
# place of an object open.) The prompts go from easy to hard along the categories of GenEval (Ghosh et al. 2023).
#
# **Write down what you expect.** From which prompt on will it fail, and how?

# %%
prompts = [
    "a red circle", "three squares", "a blue cross and a yellow ring", "a ring above a square",
    "a small green triangle and a large purple square", "two orange circles and a blue triangle",
]  # fmt: skip
drawn = model.generate(prompts, generator=torch.Generator().manual_seed(SEED))
verdicts = [score_prompt(p, seen) for p, seen in zip(prompts, oracle.read(drawn), strict=True)]
plots.image_grid(drawn, titles=prompts, notes=[verdict(v.ok, v.reasons) for v in verdicts])

# %% [markdown]
# **What you should see.** A drawing per prompt and the oracle's verdict below it. A tick means that everything asked for is
# there; what is there beside it is still named ("expected nothing more, found ..."), and so is everything unclear.
#
# **If you see something else.** Half shapes or two colours in one shape: tokens chosen in one round did not agree with each
# other. More rounds (`uk.Decoding(steps=64)`) or less temperature may help; exercise 2 measures one such setting.
#
# **Published value.** None for this world; GenEval's own numbers are of photographs.
#
# <details><summary>Why a few tokens at a time, and why in random order (folded)</summary>
#
# The model is trained on p(code<sub>i</sub> | visible codes, text) for every hidden i. Drawing all hidden codes at once would
# treat them as independent given the visible ones, which neighbours in one object are not. Round t of T leaves floor(64 cos(πt
# / 2T)) tokens hidden: few are fixed at first, while little is known, and many at the end, when each is nearly decided by the
# others. One code at a time in a random order is exact: it is what training hides and asks. Keeping the surest changes the
# distribution. "A ring" may stand in nine places, so at every single token the ground is the likeliest code and is kept
# first; the more ground is fixed, the fewer places are left, and none may be.
# </details>

# %% [markdown]
# ## 5. Can it fill in what you hide?
#
# Inpainting shows the model the visible tokens and a text, and lets it draw the hidden ones. Below, one object is hidden; the
# text names it truly once, and with another colour twice. Pixels outside the mask are returned as they came.
#
# **Write down what you expect.** Will the model believe the text, or draw what it saw most often in training?

# %%
from umm_kit.data.oracle import edits
from umm_kit.data.shapes import CELLS
from umm_kit.evaluation.generation import object_mask

image, truth = batch["images"][:1], data.caption(0, "placed")
mask = object_mask(np.array([CELLS.index(data.objects(0)[0].cell)]), model.grid, data.image_size)
texts = [truth, *edits(truth)["colour"][:2]]
filled = model.generate(
    texts, images=image.repeat(3, 1, 1, 1), mask=mask.repeat(3, 1, 1), generator=torch.Generator().manual_seed(SEED)
).cpu()
shown = torch.cat([mask, torch.zeros_like(mask).repeat(3, 1, 1)])
display(plots.image_grid(torch.cat([image, filled]), ["hidden", *texts], masks=shown))
pixels = data.image_size // model.grid[0]
outside = ~mask.repeat_interleave(pixels, 1).repeat_interleave(pixels, 2)[0]
change = (filled - image).abs()[:, :, outside].max()
uk.expect(change, target=0.0, tol=0.0, claim="inpainting leaves visible pixels as they came")

# %% [markdown]
# **What you should see.** The hidden tokens hatched, then three fillings: the objects outside the mask are the same in all; if
# the model reads the text, the one inside follows it.
#
# **If you see something else.** An empty ground where the object was: the mask touches a neighbour and the model completed
# that, or it gave more weight to what it saw than to what it read. Raise `guidance` in `uk.Decoding`.
#
# **Published value.** None for this world.
#
# Now paint your own mask: click on the picture, then press *Fill in*. (In a page without a kernel only the figure above is
# left.)


# %%
def fill(hidden: np.ndarray) -> torch.Tensor:
    """What the model draws into the hidden tokens of the scene above, by the true caption; a fresh draw each time."""
    return model.generate([truth], images=image, mask=torch.from_numpy(hidden)[None])[0]


painter = widgets.paint_mask(image[0], model.grid, fill, mask=mask[0].numpy())
painter

# %% [markdown]
# ## 6. What survives a trip from words to a picture and back?
#
# One cycle: the model draws a caption, then describes its own drawing. What is lost was lost while drawing or while describing,
# and the oracle, which reads the drawing in between, tells which.
#
# **Write down what you expect.** Which half of the trip loses more?

# %%
captions = [data.caption(i, "list") for i in range({"full": 48, "tiny": 12}[PRESET])]
pictures = model.generate(captions, generator=torch.Generator().manual_seed(SEED))
seen, back = oracle.read(pictures), model.understand(pictures)
drawing = [score_prompt(text, reading) for text, reading in zip(captions, seen, strict=True)]
describing = [score_caption(text, reading.objects) for text, reading in zip(back, seen, strict=True)]
notes = [
    f"says: {text}\ndrawing {verdict(d.strict, d.reasons)}\ndescribing {verdict(c.exact, c.reasons)}"
    for text, d, c in zip(back, drawing, describing, strict=True)
]
kept = bootstrap([score_caption(text, data.objects(i)).recall for i, text in enumerate(back)])
strict = bootstrap([float(d.strict) for d in drawing])
clear = [not reading.unclear for reading in seen]  # a caption is judged only where the oracle can read the whole drawing
faithful = bootstrap([float(c.exact) for c, whole in zip(describing, clear, strict=True) if whole])
print(f"facts of the first caption that the second still says: {kept}")
print(f"drawings that show the caption and nothing else:       {strict}")
print(f"captions that are right about a drawing that is clear: {faithful}")
plots.image_grid(pictures[:4], titles=captions[:4], notes=notes[:4], columns=4, size=2.0)

# %% [markdown]
# **What you should see.** Four drawings with the first caption above and the second below, each half of the trip with its own
# verdict; then, over all drawings, the share of facts that survived with its 95 % interval. Do the intervals of the two halves
# overlap? Then so few trips do not tell which loses more. (In a drawing with an *unclear* thing a caption cannot be judged: it
# may name what the oracle could not.)
#
# **If you see something else.** If both halves score well and little survives, the model draws other scenes than it was told
# but describes them well.
#
# **Published value.** None for this world. One cycle of this kind is what UnifiedBench scores; longer chains come with notebook
# 05.

# %% [markdown]
# ## 7. What do the two flows hold at the same token?
#
# Both flows run over the same 32 pairs. Understanding sees the whole image behind its instruction, and never the caption.
# Generation sees the caption and 60 % of the tokens; the hidden ones are crossed. Each layer's states at the 64 tokens become a
# picture: the first three principal components, *one basis for both flows*, as dark-light, blue-yellow and green-red. Equal
# colours in one column mean equal scores; colours of different columns cannot be compared.
#
# **Write down what you expect.** At which layer do the two rows differ most? Can you still see the objects in the last layer?

# %%
anchors = uk.collate([data[i] for i in range(32)])
with torch.no_grad():
    u = model.understanding_flow(anchors)
    g = model.generation_flow(anchors, mask_ratio=0.4, generator=torch.Generator().manual_seed(SEED))
    swapped = model.understanding_flow(anchors | {"texts": anchors["texts"][::-1]})
states = {"understanding": u.hidden_states, "generation": g.hidden_states}
masks, last = {"generation": g.mask}, model.num_layers
some = sorted({round(last * share) for share in (0, 0.1, 0.3, 0.5, 0.8, 1)})
plots.token_maps(states, model.grid, some, item=3, images=anchors["images"], masks=masks)

# %%
start = (u.hidden_states[0] - g.hidden_states[0]).abs()[~g.mask].max()
uk.expect(start, target=0.0, tol=1e-6, claim="layer 0: both flows start alike where the token is visible")
leak = (u.hidden_states[last] - swapped.hidden_states[last]).abs().max()
uk.expect(leak, target=0.0, tol=1e-3, claim="understanding states at image tokens do not depend on the caption")

# %% [markdown]
# **What you should see.** At layer 0 the rows agree but for the crossed tokens. Further right every token has seen its
# surroundings, so objects may spread beyond their outline and the rows may drift apart: compare with what you wrote down. Below
# each column stand the percentages of variance that the three components hold: what is not in them is not in the picture
# either.
#
# **If you see something else.** Grey maps: the states hardly vary there. Objects that cannot be made out do not mean that they
# are not represented, only that they are not in the three strongest directions; notebook 01 will measure instead of look.
#
# **Published value.** None for these pictures. DIVA draws the mask ratio from [0.2, 0.6] (Sec. 3.1); here it is fixed at 0.4 to
# be the same for all.
#
# <details><summary>How states become colours (folded)</summary>
#
# At one layer, stack the states of both flows, all images and all tokens, take off each flow's own mean and call the result X.
# The directions v<sub>1</sub>, v<sub>2</sub>, v<sub>3</sub> are the eigenvectors of X<sup>T</sup>X with the largest
# eigenvalues, each turned so that its largest entry is positive (an eigenvector's sign is arbitrary). The scores
# x·v<sub>k</sub>, divided by the 98th percentile of their size, move a colour away from mid-grey. Taking off each flow's mean
# hides one thing: a constant difference between the flows. `offset=True` shows it.
# </details>
#
# Now move through all layers and images yourself:

# %%
explorer = widgets.layer_explorer(states, model.grid, anchors["images"], masks)
explorer

# %% [markdown]
# ## 8. And real images?
#
# The digits are real: 1,797 handwritten scans that come with scikit-learn. "Thick", "thin" and "slanted" are measured on the
# scan. The model above has never seen one.
#
# **Write down what you expect.** What will a model say of a *seven* if all it knows is circles and squares?

# %%
digits = uk.Digits("test", n=4, seed=SEED)
scans = uk.collate([digits[i] for i in range(4)])
said = model.understand(scans["images"])
display(plots.image_grid(scans["images"], scans["texts"], notes=[f"scene model: {text}" for text in said]))

# %% [markdown]
# The scene model describes scans in the only words it has, with no sign that it is lost: what a model says is no warning that it
# left its world. Now the same family, trained on scans:

# %%
reader = uk.load("digits-masked", device=DEVICE)
written = reader.generate(scans["texts"], generator=torch.Generator().manual_seed(SEED))
display(plots.image_grid(scans["images"], [f"says: {text}" for text in reader.understand(scans["images"])]))
display(plots.image_grid(written, [f"drawn: {text}" for text in scans["texts"]]))

# %% [markdown]
# **What you should see.** Above, four scans with true captions. Here the digit is named right far more often than its thickness
# and slant, and the drawings can be read. The card of `digits-masked` says how often, judged by a classifier that never saw a
# drawing. It was trained on a thousand scans only: it knows many of them by heart, which its card's learning curves show.
#
# **If you see something else.** The captions above the scans are computed, so they do not depend on any model.
#
# **Published value.** None: captions of these scans exist only here.

# %% [markdown]
# ## 9. How far from this world are your own pictures?
#
# Point `FOLDER` at a folder with images and a `metadata.csv` of the columns `file_name,text`. Without one, the cell makes a
# small folder. Each picture goes through the image tokenizer and back. The error of that, placed among the errors of test
# scenes, says how foreign the picture is *to the tokenizer*: what it cannot write in its 64 codes, the transformer will never
# see.
#
# **Write down what you expect.** Rank the four pictures from familiar to foreign.

# %%
FOLDER = ""  # the path of your own folder
folder = Path(FOLDER or tempfile.mkdtemp())
if not FOLDER:
    y, x = np.mgrid[:96, :96] / 96
    made = {
        "a scene of this world": data.images([300])[0].permute(1, 2, 0).numpy(),
        "an evening sky": np.stack([0.3 + 0.6 * y, 0.4 + 0.2 * y, 0.8 - 0.5 * y], -1),
        "a checkerboard": np.stack([((12 * x).astype(int) + (12 * y).astype(int)) % 2.0] * 3, -1),
        "a grey wall": np.full((96, 96, 3), 0.5),
    }
    for k, pixels in enumerate(made.values()):
        Image.fromarray((255 * pixels).astype(np.uint8)).save(folder / f"{k}.png")
    lines = [f"{k}.png,{text}" for k, text in enumerate(made)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))

# %%
tokenizer = model.image_tokenizer
mine = uk.ImageText(folder)
own = uk.collate([mine[i] for i in range(min(len(mine), 4))])
known = data.images(range(256))
decoded = tokenizer.reconstruct(own["images"].to(model.device)).cpu()
errors = (decoded - own["images"]).square().mean((1, 2, 3))
reference = (tokenizer.reconstruct(known.to(model.device)).cpu() - known).square().mean((1, 2, 3))
titles = [*own["texts"], *["through the tokenizer"] * len(own["texts"])]
plots.image_grid(torch.cat([own["images"], decoded]), titles, columns=len(decoded))

# %%
foreign = {text: float(e) for text, e in zip(own["texts"], errors, strict=True)}
display(plots.cumulative(reference, foreign, "squared reconstruction error per value (lower = more familiar)"))
noise = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(SEED))
error = (tokenizer.reconstruct(noise.to(model.device)).cpu() - noise).square().mean((1, 2, 3))
beyond = bootstrap((error > reference.max()).float())
uk.expect(beyond, low=0.95, n=beyond.n, claim="noise is more foreign than any of 256 test scenes")

# %% [markdown]
# **What you should see.** Pictures above, what 64 codes keep of them below, and each one's place among 256 test scenes: the
# scene somewhere among them, what the tokenizer never saw at or beyond the right end.
#
# **If you see something else.** A low error does *not* mean that the model understands a picture: it may rebuild a grey wall
# well, and has no words for it. The score warns in one direction only: far to the right is foreign; on the left anything may
# stand.
#
# **Published value.** None. Training on your own folder: notebook 06, section 6.

# %% [markdown]
# ## 10. How good is it, in numbers?
#
# So far you saw single items. `uk.evaluate` scores many, on scenes drawn from another seed than those above, each with a 95 %
# bootstrap interval. Chance is what can be had without looking: another scene's caption or drawing, or always the most frequent
# answer.
#
# **Write down what you expect.** Order captions, questions, drawing and inpainting from best to worst.

# %%
n = {"full": 96, "tiny": 24}[PRESET]
result = uk.evaluate(model, uk.Shapes("test", n=n, seed=SEED + 1), n_questions=n // 2, n_prompts=n // 8)
frame = result.to_frame()
headlines = [m for m in frame["metric"] if not m.startswith(("caption_prec", "caption_rec", "caption_unr", "qa_existence_"))]
plots.scores(frame[frame["metric"].isin(headlines)], result.chance)

# %%
for metric in ("caption_f1", "qa_existence", "qa_colour", "generation_overall", "inpainting_objects"):
    e = result[metric]
    claim = f"{metric}: the whole interval lies above chance by .05"
    uk.expect(e.low - result.chance[metric], low=0.05, n=e.n, claim=claim)

# %% [markdown]
# **What you should see.** A dot per metric with its interval, and a tick where chance lies. With so few items intervals are
# wide: do not rank metrics whose intervals overlap. The five claims are modest on purpose: a model that meets them looks at the
# picture and reads the prompt.
#
# **If you see something else.** With another `MODEL`, read `notes` of the result first. The shipped model's scores on more
# items, and the one command that measures them, are in the card beside the checkpoint (`umm_kit/checkpoints`).
#
# **Published value.** None for this world. GenEval and POPE lend their categories and questions, not their numbers.

# %% [markdown]
# ## What held, what did not, and what cannot be said
#
# **Held, if its ✓ stands above:** one set of weights says, answers, draws and fills in better than chance; the two flows start
# from the same states, and understanding never sees the caption.
#
# **Did not hold:** every ✗ above, and every reason under a picture. Copy them out: they are the model's real weaknesses, and
# the later notebooks ask where in it they come from.
#
# **Limits.** The world is small and synthetic and so is the model; nothing here says how a large model behaves. The tokens'
# colours are a picture, not a measurement. The out-of-domain score is about the tokenizer. One trained model is one draw:
# another training seed gives another model, and no interval here covers that.
#
# ## Exercises (answers: `solutions/00_start_here.py`)
#
# 1. Inpaint with *everything* hidden. Which other call gives exactly the same picture, with the same generator? Check with
#    `torch.equal`.
# 2. Does guidance help? Draw the prompts of `uk.evaluate(..., tasks=["generation"])` with `uk.Decoding(guidance=1)` and with
#    the default, and compare them prompt by prompt with `uk.compare`. Is zero in the interval?
# 3. Swap the captions of the pairs in section 7 and run the *generation* flow again with the same mask. Which is the first
#    layer whose image states change, and why not layer 0?
# 4. Try to fool the oracle: for 50 scenes take every one-attribute edit of the true caption that is false of the scene
#    (`edits`, `parse`, `holds`). How many does `score_prompt` accept on the rendered picture?
# 5. Draw "a ring" 24 times with the default and 24 times with `uk.Decoding(order="confidence")`. How many pictures show a ring,
#    and what do the others show?
