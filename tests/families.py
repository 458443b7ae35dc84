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
