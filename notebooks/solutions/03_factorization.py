# %% [markdown]
# # Solutions to notebook 03
#
# Run from top to bottom (`python notebooks/solutions/03_factorization.py`), or open as a notebook through jupytext. Each
# answer is checked.

# %%
import math

import torch

import umm_kit as uk
from umm_kit.losses.factorization import club, infonce, orthogonality

rng = torch.Generator().manual_seed(0)


def gaussian_pairs(n: int, rho: float, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """n pairs of k independent dimensions, each with correlation rho."""
    x = torch.randn(n, k, generator=rng)
    return x, rho * x + math.sqrt(1 - rho**2) * torch.randn(n, k, generator=rng)


def log_ratio(x: torch.Tensor, y: torch.Tensor, rho: float) -> torch.Tensor:
    """log p(x, y) / p(x) p(y) of every x with every y, [n, n]."""
    x, y = x[:, None], y[None]
    terms = (2 * rho * x * y - rho**2 * (x**2 + y**2)) / (2 * (1 - rho**2)) - math.log(1 - rho**2) / 2
    return terms.sum(-1)


# %% [markdown]
# **1.** Six dimensions with .5 nats each (1 - rho² = e⁻¹) share 3 nats. A batch of 16 stops at log 16 = 2.8, below the truth
# whatever the critic; to come within a tenth of a nat takes about five hundred pairs and more, not the twenty (e³) that log N
# alone would suggest.

# %%
rho, sizes = math.sqrt(1 - math.exp(-1)), (16, 32, 64, 128, 256, 512, 1024)
estimates = {}
for size in sizes:
    runs = [infonce(log_ratio(*gaussian_pairs(size, rho, 6), rho)).estimate.item() for _ in range(100)]
    estimates[size] = sum(runs) / len(runs)
    print(f"N = {size:4}: estimate {estimates[size]:.2f}, bound {math.log(size):.2f}")
uk.expect(estimates[16], high=math.log(16), claim="16 pairs cannot show 3 nats")
enough = min(size for size in sizes if estimates[size] > 2.9)
uk.expect(enough, low=256, high=1024, claim="pairs that it takes to come within a tenth of a nat")

# %% [markdown]
# **2.** Both readings are products of two factors, squared: a tenth of each makes them 10⁻⁴. `overlap` has no scale and
# stays. So Eq. 9 can be met by shrinking, where nothing holds the scale.

# %%
a, b = torch.randn(64, 8, generator=rng), torch.randn(64, 8, generator=rng)
for reading in ("batch", "sample"):
    before, after = orthogonality(a, b, reading), orthogonality(a / 10, b / 10, reading)
    uk.expect(float(after.loss / before.loss), target=1e-4, tol=1e-6, claim=f"{reading}: the loss falls by 10^4")
    uk.expect(float(after.overlap - before.overlap), target=0.0, tol=1e-5, claim=f"{reading}: the overlap stays")

# %% [markdown]
# **3.** Take s² - 1 as the unique factor of a normal s: their product has mean 0, yet s decides it.

# %%
s = torch.randn(20_000, 1, generator=rng)
uk.expect(float(orthogonality(s, s**2 - 1).overlap), high=0.01, claim="overlap of s and s^2 - 1, which s decides")

# %% [markdown]
# **4.** The contrast is I + KL(p_x p_y || p_xy): it also counts what the negatives gain by being negatives.

# %%
contrasts = [club(log_ratio(*gaussian_pairs(512, 0.75), 0.75)).item() for _ in range(200)]
found = sum(contrasts) / len(contrasts)
uk.expect(found, target=0.75**2 / (1 - 0.75**2), tol=0.1, claim="contrast of the true critic at rho = .75")
uk.expect(found - (-0.5 * math.log(1 - 0.75**2)), low=0.7, claim="and that exceeds the mutual information")
