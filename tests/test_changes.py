"""What training changed, by hand: ranks, relative sizes, and refusals."""

import copy

import pytest
import torch
from families import small

from umm_kit.diagnostics.changes import weight_changes


@pytest.fixture(scope="module")
def model():
    return small("masked")


def test_a_change_of_known_rank_and_size(model):
    """A rank-one change of a tenth of the norm in one matrix, nothing elsewhere."""
    after = copy.deepcopy(model)
    weight = after.blocks[1].mlp[0].weight
    u, v = torch.randn(weight.shape[0], 1), torch.randn(1, weight.shape[1])
    with torch.no_grad():
        weight += 0.1 * weight.norm() * (u @ v) / (u @ v).norm()
    frame = weight_changes(model, after)
    moved = frame[frame.relative > 0]
    assert len(frame) == 3 * 4 and list(moved.name) == ["blocks.1.mlp.0.weight"] and moved.layer.item() == 2
    assert moved.relative.item() == pytest.approx(0.1, rel=1e-4) and moved["rank"].item() == 1
    assert moved.effective_rank.item() == pytest.approx(1, abs=0.01) and 0.99 < moved.cosine.item() < 1
    assert frame.drop(moved.index)["rank"].isna().all()


def test_scaling_moves_every_direction_and_turns_nothing(model):
    after = copy.deepcopy(model)
    with torch.no_grad():
        after.blocks[0].attention.out.weight *= 1.5
    row = weight_changes(model, after).set_index("name").loc["blocks.0.attention.out.weight"]
    assert row.relative == pytest.approx(0.5) and row.cosine == pytest.approx(1) and row["rank"] == 32
    with torch.no_grad():
        values = torch.linalg.svdvals(model.blocks[0].attention.out.weight.double())
    p = values / values.sum()
    assert row.effective_rank == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-3)


def test_models_of_other_sizes_are_refused(model):
    with pytest.raises(ValueError, match="the models differ: 3 layers"):
        weight_changes(model, small("janus"))
