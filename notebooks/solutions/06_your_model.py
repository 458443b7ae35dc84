# %% [markdown]
# # Solutions to notebook 06
#
# Run from top to bottom (`python notebooks/solutions/06_your_model.py`), or open as a notebook through jupytext. Each answer
# is checked.

# %%
import copy
import os
import tempfile

import torch
from torch import nn

import umm_kit as uk
from umm_kit.models.samples import random_model
from umm_kit.trainers.stages import adapters

steps = {"full": 30, "tiny": 4}[os.environ.get("UMM_KIT_PRESET", "full")]
data = uk.Shapes("test", n=8)
batch = uk.collate([data[i] for i in range(4)])

# %% [markdown]
# **1.** `caption_unseen` finds it: with another caption, the states of the picture move. Generation reads the caption before
# the picture, and now understanding does too: both flows' states hold a copy of the caption, CKA between them rises, the
# residual falls, and all of it would be called shared meaning.


# %%
class Theirs(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.letters, self.patches, self.to_letters = nn.Embedding(128, width), nn.Linear(192, width), nn.Linear(width, 128)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 4, 64, 0.0, batch_first=True), 3)

    def forward(self, x):
        return self.body(x, mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]))


class CaptionFirst(uk.HookedUMM):
    def read(self, batch):
        m, rows = self.module, [torch.tensor([ord(c) for c in text]) for text in batch["texts"]]
        said = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        pixels = m.patches(nn.functional.unfold(batch["images"], 8, stride=8).mT)
        x = m(torch.cat([m.letters(said), pixels], 1))
        return uk.Pass(m.to_letters(x[:, : said.shape[1] - 1]), said[:, 1:], torch.arange(said.shape[1], x.shape[1]))


theirs = Theirs()
report = uk.check_model(CaptionFirst(theirs, theirs.body.layers, theirs.letters, grid=(4, 4)), batch)
uk.expect("caption_unseen" in report.missing, True, claim="the rule that finds it is caption_unseen")

# %% [markdown]
# **2.** A map d → d has d² weights, its adapter B A has 2 r d. They are equal at r = d / 2; from there on nothing is saved.

# %%
d = 64
map_ = nn.Sequential(nn.Linear(d, d, bias=False))
with adapters(map_, list(map_.parameters()), rank=d // 2):
    counted = sum(p.numel() for name, p in map_.named_parameters() if ".lora_" in name)
uk.expect(counted, d * d, claim="parameters of an adapter of rank d / 2, against those of the map")

# %% [markdown]
# **3.** Of full rank, after however few steps: AdamW divides every entry of the gradient by its own size, so that even a
# gradient of rank one, u vᵀ, becomes a matrix of signs, and noise in its smallest entries counts as much as its largest. The
# effective rank shows how little of that rank is used.

# %%
model = random_model("janus")
before = copy.deepcopy(model)
settings = {"max_steps": steps, "stage1_steps": 2, "per_device_train_batch_size": 8, "warmup_steps": 0, "learning_rate": 1e-3}
quiet = {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 1000}
config = uk.DIVAConfig.tiny(output_dir=tempfile.mkdtemp(), **settings, **quiet)
uk.DIVATrainer(model, config, uk.Shapes("train", n=256)).train()
changes = uk.weight_changes(before, model).dropna()
squares = changes[changes.name.str.contains("q_proj")]
print(squares[["layer", "rank", "effective_rank"]])
uk.expect(int(squares["rank"].min()), 64, claim="rank of a change of 64 x 64 by full training")
uk.expect(float((squares.effective_rank / 64).max()), high=0.9, claim="effective rank, as a share of it")
