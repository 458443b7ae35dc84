"""What a tokenizer keeps: nuisance recovery against factors planted by hand, and the audit of pictures."""

import pytest
import torch

from umm_kit.data.shapes import Nuisance, Shapes
from umm_kit.evaluation.reconstruction import audit_pictures, nuisance_recovery

FACTORS = ("brightness", "texture", "grey", "gradient", "jitter")


@pytest.fixture(scope="module")
def scenes():
    data = Shapes("validation", n=96, seed=4)
    items = data.__getitems__(range(96))
    factors = {k: torch.stack([item["factors"][k] for item in items]) for k in items[0]["factors"]}
    return data, torch.stack([item["images"] for item in items]), factors


def test_originals_are_recovered_exactly(scenes):
    _, images, factors = scenes
    found = nuisance_recovery(images, factors)
    assert set(found) == set(FACTORS)
    assert all(value > 0.995 for value in found.values()), found


def test_each_factor_is_lost_when_it_is_erased(scenes):
    """Render the same scenes with one factor switched off: its R^2 falls to 0 or below, the others' do not."""
    data, _, factors = scenes
    for name, strength in (("brightness", 0.0), ("texture", "none"), ("gradient", 0.0), ("jitter", 0.0)):
        found = nuisance_recovery(data.with_nuisance(**{name: strength}).images(range(96)), factors)
        assert found[name] < 0.1, (name, found)
        # Grey is read off after dividing by the known brightness, so only a missing brightness disturbs it.
        assert name == "brightness" or found["grey"] > 0.9, (name, found)


def test_absent_factors_are_left_out():
    data = Shapes("validation", n=16, seed=4, nuisance=Nuisance(texture="none", jitter=0.0))
    items = data.__getitems__(range(16))
    factors = {k: torch.stack([item["factors"][k] for item in items]) for k in items[0]["factors"]}
    found = nuisance_recovery(torch.stack([item["images"] for item in items]), factors)
    assert set(found) == {"brightness", "grey", "gradient"}


class Copy:
    """A tokenizer that loses nothing: its codes are numbers of the images it was shown."""

    codebook_size = 4096

    def __init__(self):
        self.seen = []

    def encode(self, images):
        self.seen += list(images)
        return torch.arange(len(self.seen) - len(images), len(self.seen))[:, None]

    def decode(self, codes):
        return torch.stack([self.seen[int(code)] for code in codes])


def test_audit_of_a_perfect_tokenizer():
    data = Shapes("validation", n=40, seed=4)
    result = audit_pictures(Copy(), data, batch_size=16)
    assert result["oracle"]["reconstructed"] == result["oracle"]["clean"] and result["oracle"]["clean"]["exact"] == 1
    assert result["oracle"]["noise 0.1"]["exact"] < 1
    assert result["nuisance_r2"]["clean"] == result["nuisance_r2"]["reconstructed"]
    assert result["codebook"]["used"] == 40 and result["codebook"]["perplexity"] == pytest.approx(40)
