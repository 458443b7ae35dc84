# %% [markdown]
# # Solutions to notebook 04
#
# Run from top to bottom (`python notebooks/solutions/04_alignment.py`), or open as a notebook through jupytext. Each answer is
# checked.

# %%
import os

import torch

import umm_kit as uk
from umm_kit.diagnostics.collapse import collapse
from umm_kit.losses.alignment import latent_alignment
from umm_kit.losses.preference import released_preference
from umm_kit.models.aligner import LatentAligner, LatentAlignerConfig
from umm_kit.models.teachers import load_teacher

PRESET = os.environ.get("UMM_KIT_PRESET", "full")
n, steps = {"full": (256, 300), "tiny": (48, 60)}[PRESET]
teacher, data = load_teacher("tiny-teacher"), uk.Shapes("test", n=n, seed=0)
batch = uk.collate([data[i] for i in range(n)])
e_text, e_image = teacher.embed_text(batch["texts"]), teacher.embed_image(batch["images"])

# %% [markdown]
# **1.** With a last map of zeros φ(e) = b for every e: z_t = z_i = b, so the modal term is 0; and φ(G(b)) = b again, so the
# capacity term is 0, too. Both are sums of squares: this is their least value, and no gradient leads away. The guard is at
# log n, which is what guessing gives: it sees that no pair can be told from another.

# %%
torch.manual_seed(0)
aligner = LatentAligner(LatentAlignerConfig(embedding_size=teacher.dim, hidden_size=64, num_heads=4, num_layers=1)).eval()
with torch.no_grad():
    aligner.latent.weight.zero_()
    out = aligner(e_text, e_image)
    terms = latent_alignment((out.z_text, out.z_image), (out.z, out.z_hat), guard="infonce")
print(f"modal {float(terms.modal):.2g}, capacity {float(terms.capacity):.2g}, InfoNCE {float(terms.infonce):.3f} nats")
uk.expect(float(terms.modal + terms.capacity), 0.0, tol=1e-9, n=n, claim="a constant map has both released terms at 0")
uk.expect(float(collapse(out.z_text, out.z_image).total_variance), 0.0, tol=1e-9, n=n, claim="and says nothing of any item")

# %% [markdown]
# **2.** The total variance falls to a hundredth, and with it both losses, which are squares. Cosines, retrieval and effective
# rank do not move at all: whoever watches only those sees nothing happen while the loss falls.

# %%
small = (0.1 * e_text, 0.1 * e_image)
before, after = collapse(e_text, e_image), collapse(*small)
for name in ("total_variance", "positive_cosine", "negative_cosine", "retrieval_at_1", "effective_rank"):
    print(f"{name:18} {getattr(before, name):.4f} -> {getattr(after, name):.4f}")
fall = float(latent_alignment(small).modal / latent_alignment((e_text, e_image)).modal)
uk.expect(fall, 0.01, tol=1e-4, n=n, claim="the modal loss falls to a hundredth")
uk.expect(after.retrieval_at_1 - before.retrieval_at_1, 0.0, tol=1e-6, n=n, claim="retrieval does not move")

# %% [markdown]
# **3.** With the worst one detached the loss is -log σ(max - const): only the best is pushed, and upwards. The mean no longer
# falls. It is still no preference between *behaviours*: nothing asks how likely the model makes the good rollout. That is
# what DPO does.


# %%
def train(detached):
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]]).repeat(8, 1).requires_grad_()
    optimizer = torch.optim.SGD([scores], 1.0)
    for _ in range(steps):
        worst = scores.amin(1)
        best = scores.amax(1)
        loss = released_preference(scores)
        if detached:
            loss = -torch.nn.functional.logsigmoid(best - worst.detach()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(scores.mean().detach())


free, held = train(detached=False), train(detached=True)
print(f"mean score, from .75: {free:.2f} as released, {held:.2f} with the worst detached")
uk.expect(free, 0.75, tol=1e-3, claim="free scores: what the best gains, the worst loses")
uk.expect(held, low=0.76, claim="with the worst detached the mean rises")
