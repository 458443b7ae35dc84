# %% [markdown]
# # Solutions to notebook 05
#
# Run from top to bottom (`python notebooks/solutions/05_drift.py`), or open as a notebook through jupytext. Each answer is
# checked.

# %%
import os

import numpy as np

import umm_kit as uk
from umm_kit.data.language import caption
from umm_kit.evaluation.blame import PerfectReader

PRESET = os.environ.get("UMM_KIT_PRESET", "full")
n, cycles = {"full": (48, 6), "tiny": (8, 2)}[PRESET]
model, data = uk.load("tiny-masked"), uk.Shapes("test", n=n, seed=0)
options = {"cycles": cycles, "decoding": uk.Decoding(steps=8), "layers": (), "keep": 0, "progress": False}
found = uk.drift(model, data, **options)

# %% [markdown]
# **1.** S(k) = S(1)^k would give a half-life of log 2 / -log S(1). It is far too short: the first cycle loses most of what
# captions leave out (places), which later cycles cannot lose again. What is left after that decays more slowly. A rate needs
# the whole curve, and a test that the curve is exponential at all.

# %%
S = found.survival().value
predicted = np.log(0.5) / np.log(S[0])
print(f"predicted from one cycle: {predicted:.1f} cycles; measured over {cycles}: {found.half_life}")
print(f"predicted S({cycles}) = {S[0] ** cycles:.2f}, measured {S[-1]:.2f}")
if PRESET == "full":
    uk.expect(float(S[-1] - S[0] ** cycles), low=0.05, n=n, claim="one cycle predicts more loss than there is")

# %% [markdown]
# **2.** Its captions agree with the start wherever that says "red", "circle", "small" and so on: its recall is the floor, because
# it agrees with every other start as much. So survival is 0 at every cycle. (Without the floor it would look as if a part of
# the meaning lasted for ever.)


# %%
class Constant:
    def understand(self, images, prompts=None, decoding=None, generator=None):
        return ["a small red circle and a large blue square"] * len(images)


constant = uk.drift(model, data, reader=Constant(), **options)
curve = constant.to_frame().pivot(index="cycle", columns="metric", values="value")
print(curve[["survival", "recall", "floor"]].round(3))
uk.expect(float(curve.recall.min()), low=0.1, n=n, claim="a constant reader recalls something")
uk.expect(float(curve.survival.abs().max()), high=0.15, n=n, claim="but nothing of it has survived")

# %% [markdown]
# **3.** Without places the perfect reader is a reader of the model's kind, only without errors. What it still gains over the
# model's own reading are the model's mistakes; the rest of the gain was places. (With this few items the intervals
# overlap: take more before you believe an order.)


# %%
class Placeless(PerfectReader):
    def understand(self, images, prompts=None, decoding=None, generator=None):
        return [caption(reading.objects, "list") if reading.objects else "" for reading in self.oracle.read(images)]


readers = {"perfect": PerfectReader(data), "perfect, no places": Placeless(data)}
read = {"model": found} | {name: uk.drift(model, data, reader=reader, **options) for name, reader in readers.items()}
for name, drift in read.items():
    print(f"{name:20} {drift.mean_survival}")
own, placed = (
    read[name].by_category().query("category == 'position' and cycle == 1").value.iloc[0] for name in ("model", "perfect")
)
print(f"survival of places after one cycle: {own:.2f} with its own captions, {placed:.2f} with the perfect reader's")
if PRESET == "full":
    uk.expect(float(placed - own), low=0.1, n=n, claim="the perfect reader brings places back")

# %% [markdown]
# **4.** Greedy drawing is more often right about the surest things, and loses variety: all pictures of one caption become the
# same one. Look at both numbers before you call it an improvement.

# %%
greedy = uk.drift(model, data, **{**options, "decoding": uk.Decoding(steps=8, temperature=0.0)})
print(f"drawn at temperature 1: {found.mean_survival}\ndrawn at temperature 0: {greedy.mean_survival}")
texts = [data.caption(0)] * 8
spread = [float(model.generate(texts, decoding=uk.Decoding(steps=8, temperature=t)).std(0).mean()) for t in (1.0, 0.0)]
print(f"spread of eight pictures of one caption: {spread[0]:.3f} and {spread[1]:.3f}")
uk.expect(spread[0] - spread[1], low=0.0, claim="greedy pictures of one caption differ less")
