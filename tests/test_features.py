"""Streaming of hidden states: equal to a loop over examples, paired by id, resumable, one batch in memory."""

import copy
import gc
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch

from umm_kit.data.shapes import Shapes
from umm_kit.features import _join, batches, extract, read
from umm_kit.models.base import collate
from umm_kit.models.masked import MaskedUMM

N = 10


@pytest.fixture(scope="module")
def model():
    from umm_kit.data.language import vocabulary_corpus

    torch.manual_seed(0)
    return MaskedUMM.tiny(list(vocabulary_corpus()))


@pytest.fixture(scope="module")
def data():
    return Shapes("test", n=N)


@pytest.fixture(scope="module")
def features(model, data):
    return extract(model, data, batch_size=4)


def assert_same(a, b, exact=True):
    assert a.ids == b.ids and a.states.keys() == b.states.keys() and a.grids == b.grids
    same = torch.equal if exact else lambda x, y: torch.allclose(x, y, atol=1e-5)
    for left, right in ((a.states, b.states), (a.losses, b.losses), (a.factors, b.factors)):
        assert left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    assert (a.masks is None) == (b.masks is None) and (a.masks is None or torch.equal(a.masks, b.masks))


class Counting:
    """A model that counts its flows, and can break down after some of them."""

    def __init__(self, model, fail_at=None):
        self.model, self.calls, self.fail_at = model, 0, fail_at

    def __getattr__(self, name):
        return getattr(self.model, name)

    def understanding_flow(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the machine goes down")
        return self.model.understanding_flow(*args, **kwargs)


class Listed(torch.utils.data.Dataset):
    """A plain data set: no __getitems__, ids of our choice."""

    def __init__(self, data, ids):
        self.items = [{**data[i], "id": name} for i, name in enumerate(ids)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_understanding_equals_a_loop_over_single_examples(model, data, features):
    for i in range(N):
        out = model.understanding_flow(collate([data[i]]))
        assert features.ids[i] == data[i]["id"]
        assert features.losses["understanding"][i].item() == pytest.approx(out.loss.item(), rel=1e-5)
        for layer in range(model.num_layers + 1):
            pooled = sum(out.hidden_states[layer][0, token] for token in range(64)) / 64
            assert torch.allclose(features.states["understanding", layer][i], pooled, atol=1e-5)


def test_pooled_is_the_mean_of_tokens(model, data, features):
    tokens = extract(model, data, pooled=False, batch_size=4)
    assert tokens.states["generation", 1].shape == (N, 64, model.hidden_size)
    for key, states in tokens.states.items():
        assert torch.allclose(states.mean(1), features.states[key], atol=1e-6)


def test_understanding_does_not_depend_on_the_batch_size(model, data, features):
    for batch_size in (1, 3, 64):
        assert_same(
            extract(model, data, ["understanding"], batch_size=batch_size),
            extract(model, data, ["understanding"], batch_size=4),
            exact=False,
        )


def test_masks_are_a_function_of_the_seed_alone(model, data, features):
    """Not of the flows or layers that were asked for, nor of the global generator."""
    torch.manual_seed(77)
    alone = extract(model, data, ["generation"], layers=[1], batch_size=4)
    assert torch.equal(alone.masks, features.masks)
    assert torch.equal(alone.states["generation", 1], features.states["generation", 1])
    assert not torch.equal(extract(model, data, ["generation"], seed=1, batch_size=4).masks, features.masks)
    assert len({tuple(row.tolist()) for row in features.masks}) == N  # no two examples share a mask
    assert extract(model, data, ["understanding"], batch_size=4).masks is None


def test_mask_ratio_and_layout_are_honoured(model, data, features):
    share = features.masks.float().mean(1)
    assert share.min() >= 0.2 - 1 / 64 and share.max() <= 0.6 + 1 / 64 and share.std() > 0.02
    quarter = extract(model, data, ["generation"], mask_ratio=0.25, batch_size=4)
    assert (quarter.masks.sum(1) == 16).all()
    block = extract(model, data, ["generation"], mask_ratio=0.25, mask_layout="contiguous", batch_size=4).masks.unflatten(
        1, (8, 8)
    )
    for mask in block:
        assert int(mask.sum()) == int(mask.any(1).sum()) * int(mask.any(0).sum())  # one full rectangle
    with pytest.raises(ValueError, match="mask ratio"):
        extract(model, data, ["generation"], mask_ratio=0.0)


def test_generation_states_are_those_of_the_recorded_mask(model, data, features):
    batch = collate([data[i] for i in range(4)])
    codes = model.image_tokenizer.encode(batch["images"])
    with torch.no_grad():
        _, states = model._generation(codes, features.masks[:4], model.pack_captions(batch["texts"]), [0, 3])
    for layer in (0, 3):
        assert torch.allclose(states[layer].mean(1), features.states["generation", layer][:4], atol=1e-6)


def test_layers(model, data, features):
    assert features.layers("understanding") == features.layers("generation") == [0, 1, 2, 3]
    some = extract(model, data, ["understanding"], layers=[-1, 0], batch_size=4)
    assert some.layers("understanding") == [0, 3] and some.layers("generation") == []
    assert torch.equal(some.states["understanding", 3], features.states["understanding", 3])
    with pytest.raises(ValueError, match="layers"):
        extract(model, data, layers=[7])


def test_select_pairs_by_id(features):
    wanted = [features.ids[7], features.ids[2]]
    chosen = features.select(wanted)
    assert chosen.ids == wanted and len(chosen) == 2
    assert torch.equal(chosen.states["generation", 2][0], features.states["generation", 2][7])
    assert torch.equal(chosen.masks[1], features.masks[2])
    assert all(torch.equal(chosen.factors[k][1], features.factors[k][2]) for k in features.factors)
    with pytest.raises(ValueError, match="have no features"):
        features.select(["nobody"])


def test_repeated_ids_are_refused_even_across_batches(model, data):
    for ids in (["a", "a", "b", "c"], ["a", "b", "c", "a"]):
        with pytest.raises(ValueError, match="repeat"):
            extract(model, Listed(data, ids), batch_size=2)


def test_the_model_is_left_as_it_was(model, data):
    model.train()
    extract(model, data, batch_size=4)
    assert model.training
    model.eval()
    with pytest.raises(RuntimeError, match="goes down"):
        extract(Counting(model.train(), fail_at=2), data, batch_size=4)
    assert model.training
    model.eval()
    assert all(p.grad is None for p in model.parameters())


def test_folder_equals_memory(model, data, features, tmp_path):
    assert extract(model, data, batch_size=4, folder=tmp_path / "new") == tmp_path / "new"
    assert_same(read(tmp_path / "new"), features)
    assert len(list((tmp_path / "new").glob("part-*.safetensors"))) == 3  # one for each batch
    assert not list((tmp_path / "new").glob("*.partial"))


def test_a_stopped_run_goes_on_where_it_was(model, data, features, tmp_path):
    with pytest.raises(RuntimeError, match="goes down"):
        extract(Counting(model, fail_at=3), data, batch_size=4, folder=tmp_path)
    assert len(list(tmp_path.glob("part-*"))) == 2
    second = Counting(model)
    extract(second, data, batch_size=4, folder=tmp_path)
    assert second.calls == 1  # only the third batch
    assert_same(read(tmp_path), features)
    third = Counting(model)
    extract(third, data, batch_size=4, folder=tmp_path)
    assert third.calls == 0


def test_other_settings_or_data_are_refused(model, data, tmp_path):
    extract(model, data, batch_size=4, layers=[1], folder=tmp_path)
    for changed in (
        {"layers": [2]},
        {"pooled": False},
        {"seed": 1},
        {"batch_size": 5},
        {"mask_ratio": 0.5},
        {"mask_layout": "contiguous"},
        {"flows": ["generation"]},
    ):
        with pytest.raises(ValueError, match="other settings"):
            extract(model, data, **{**dict(batch_size=4, layers=[1]), **changed}, folder=tmp_path)
    with pytest.raises(ValueError, match="other examples"):
        extract(model, Shapes("test", n=N, seed=5), batch_size=4, layers=[1], folder=tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].mlp[0].weight.add_(0.1)
    with pytest.raises(ValueError, match="model"):
        extract(other, data, batch_size=4, layers=[1], folder=tmp_path)
    with pytest.raises(ValueError, match="no feature shards"):
        read(tmp_path / "nowhere")


def test_one_batch_in_memory(model, tmp_path, monkeypatch):
    """While batch k is computed, the states of no earlier batch are alive, and all earlier shards are on the disk."""
    import umm_kit.features as features

    alive, most = weakref.WeakSet(), []
    part = features.Features

    class Watched(part):
        __hash__ = object.__hash__

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            alive.add(self)
            gc.collect()
            most.append((len(alive), len(list(tmp_path.glob("part-*.safetensors")))))

    monkeypatch.setattr(features, "Features", Watched)
    extract(model, Shapes("test", n=12), batch_size=2, folder=tmp_path)
    assert [written for _, written in most] == list(range(6))
    assert max(n for n, _ in most) <= 2  # the one being made and, at most, the one just written


def test_batches_in_order(data):
    sizes = [len(b["ids"]) for b in batches(data, 4)]
    assert sizes == [4, 4, 2] and [i for b in batches(data, 4) for i in b["ids"]] == [data[i]["id"] for i in range(N)]
    assert [b["ids"] for b in batches(data, 2, [3, 1, 2])] == [[data[3]["id"], data[1]["id"]], [data[2]["id"]]]


def test_joining_is_concatenation(model, data, features):
    first, second = features.select(features.ids[:3]), features.select(features.ids[3:])
    assert_same(_join([first, second]), features)


def test_bad_input(model, data, tmp_path):
    for flows in ([], ["understanding", "dreaming"]):
        with pytest.raises(ValueError, match="flows are"):
            extract(model, data, flows)
    with pytest.raises(ValueError, match="empty"):
        extract(model, Listed(data, []))
    with pytest.raises(ValueError, match="empty"):
        extract(model, Listed(data, []), folder=tmp_path)
    with pytest.raises(ValueError, match="batch_size"):
        extract(model, data, batch_size=0)


def test_shards_say_what_they_are(model, data, tmp_path):
    extract(model, data, batch_size=4, folder=tmp_path)
    about = json.loads((tmp_path / "features.json").read_text())
    assert about["settings"]["batch_size"] == 4 and about["settings"]["mask_ratio"] == [0.2, 0.6]


# --- several processes -------------------------------------------------------------------------------------------------


def test_processes_share_the_shards(model, data, features, tmp_path, monkeypatch):
    """As torchrun numbers them: each makes every second shard, and together they made each example once."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, made in ((0, 2), (1, 1)):
        monkeypatch.setenv("RANK", str(rank))
        counting = Counting(model)
        extract(counting, data, batch_size=4, folder=tmp_path)
        assert counting.calls == made
        if rank == 0:
            with pytest.raises(ValueError, match="holds 2 of 3 shards; extract again"):
                read(tmp_path)
    assert_same(read(tmp_path), features)
    assert len(extract(model, data, batch_size=4).ids) == N, "what is returned, and not written, is whole in every process"


def test_ids_that_two_processes_have_are_found_when_read(model, data, tmp_path, monkeypatch):
    twice = Listed(data, [0, 1, 0, 2])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        extract(model, twice, batch_size=2, folder=tmp_path)
    with pytest.raises(ValueError, match="ids repeat"):
        read(tmp_path)


def test_some_layers_alone_are_read(model, data, features, tmp_path):
    extract(model, data, batch_size=4, folder=tmp_path)
    found = read(tmp_path, layers=[1])
    assert (
        {layer for _, layer in found.states} == {1}
        and found.ids == features.ids
        and found.losses.keys() == features.losses.keys()
    )
    with pytest.raises(ValueError, match=r"holds no layers \[9\]; it has \[\]"):
        read(tmp_path, layers=[9])


def test_a_shard_that_was_cut_short_is_named(model, data, tmp_path):
    extract(model, data, batch_size=4, folder=tmp_path)
    shard = tmp_path / "part-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"part-000001\.safetensors cannot be read .* delete it"):
        read(tmp_path)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_command_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "umm_kit.cli"]
    command += ["extract", "tiny-masked", str(tmp_path / "out"), "--items", "12", "--batch-size", "4", "--layers", "0", "5"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "process 1 of 2" in done.stdout and "process 2 of 2" in done.stdout
    found = read(tmp_path / "out")
    assert len(found) == 12 and found.layers("generation") == [0, 5]
