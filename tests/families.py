"""Small untrained models of every family, as the tests of one contract want them."""

import torch

from umm_kit.data.language import vocabulary_corpus
from umm_kit.models.autoregressive import AutoregressiveUMM
from umm_kit.models.flowmatching import FlowUMM
from umm_kit.models.masked import MaskedUMM
from umm_kit.models.samples import random_model

PRETRAINED = ("janus", "emu3", "liquid")
OWN = {"masked": MaskedUMM, "autoregressive": AutoregressiveUMM, "flow": FlowUMM}
FAMILIES = (*OWN, *PRETRAINED)


def small(kind):
    """An untrained model; of the pretrained families one of the real class, of half a million parameters."""
    torch.manual_seed(0)
    return OWN[kind].tiny(list(vocabulary_corpus())) if kind in OWN else random_model(kind)


def assert_foretold(score, weight, gradient, step=1e-5, tolerance=1e-4):
    """A gradient [m, n] of ``score()`` is what central differences say, at the places where it is largest."""
    for place in gradient.abs().flatten().argsort(descending=True)[[0, 3, 17]].tolist():
        at, values = divmod(place, weight.shape[1]), []
        with torch.no_grad():
            for sign in (1, -1):
                weight[at] += sign * step
                values.append(float(score()))
                weight[at] -= sign * step
        found = (values[0] - values[1]) / (2 * step)
        assert abs(float(gradient[at]) - found) <= tolerance * abs(found) + 1e-10, (at, float(gradient[at]), found)
