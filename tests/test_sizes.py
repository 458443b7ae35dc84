"""Sizes are counted from the configuration and agree with the model; memory is the sum of named parts."""

import re

import pytest
from conftest import ROOT
from families import PRETRAINED, small
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from umm_kit import cli
from umm_kit.models import load
from umm_kit.models.factors import middle_layers
from umm_kit.models.sizes import GIB, Sizes, sizes

TOY = Sizes("toy", 1000, (100, 100, 100), ((4, 6), (6, 4)), 8, 2)


@pytest.mark.parametrize("kind", PRETRAINED)
def test_a_configuration_alone_says_what_the_weights_would(kind, tmp_path):
    model = small(kind)
    model.save_pretrained(tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    found = sizes(tmp_path)
    assert found.parameters == sum(p.numel() for p in model.model.parameters())
    assert found.blocks == tuple(sum(p.numel() for p in group) for group in model.layer_parameters().values())
    assert found.hidden_size == model.hidden_size and found.stored == 4 and found.download == 4 * found.parameters


def test_a_model_is_counted_as_it_is():
    model = load("tiny-tight-0", device="cpu")
    found = sizes(model)
    assert found == sizes("tiny-tight-0").__class__(**{**vars(sizes("tiny-tight-0")), "name": found.name})
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_lora_is_as_large_as_its_matrices():
    """Three layers; the middle ones of DIVA; each linear map in -> out takes rank (in + out)."""
    assert TOY.trained("lora", rank=3) == 3 * 20 * len(middle_layers(3))
    assert TOY.trained("middle") == 100 * len(middle_layers(3)) and TOY.trained("all") == 300 and TOY.trained("none") == 0
    with pytest.raises(ValueError, match="expected one of"):
        TOY.trained("some")


def test_memory_by_hand():
    table = TOY.memory(pairs=2, tokens=5)
    row = table.loc["all shared layers"] * GIB
    assert (row["weights"], row["gradients"], row["optimizer"], row["averages"]) == (4000, 1200, 2400, 1200)
    assert row["activations"] == 34 * 8 * 2 * 2 * 5 * 3 and row["sum"] == row[list(table.columns[1:-1])].sum()
    assert (table.loc["read only"] * GIB)[["weights", "gradients"]].tolist() == [2000, 0]
    assert TOY.operations(pairs=2, tokens=5) == 6 * 300 * 2 * 2 * 5


def test_info_prints_it_without_reading_weights(tmp_path, capsys):
    model = small("janus")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert cli.main(["info", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"{sizes(tmp_path).parameters:,} parameters in 32 bits" in said and "LoRA in the middle layers" in said
    assert cli.main(["info", "nowhere"]) == 2


def test_the_page_on_clusters_says_what_info_says(tmp_path):
    """CLUSTER.md's tables are those of a configuration in the shape of Janus-Pro 7B, their sums rounded to whole GiB; in the
    second one everything but the activations is divided by 8 devices."""
    words = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32, num_hidden_layers=30,
        vocab_size=102400,
    )  # fmt: skip
    wide = {"projection_dim": 4096}
    seen, drawn = JanusVisionConfig(**wide), JanusVQVAEConfig(**wide, image_token_embed_dim=4096)
    JanusConfig(text_config=words, vision_config=seen, vq_config=drawn).save_pretrained(tmp_path)
    found, page = sizes(tmp_path), (ROOT / "CLUSTER.md").read_text()
    assert f"{found.parameters / 1e9:.2f} billion" in page
    rows = re.findall(r"^\| (read only|LoRA.*?|the middle layers|all shared layers)\b.*\| (\d+) \|$", page, re.M)
    memory = found.memory()
    pieces = (memory["sum"] - memory["activations"]) / 8 + memory["activations"]
    assert [int(total) for _, total in rows] == [*memory["sum"].round(), *pieces[-2:].round()]
    assert f"{found.operations() / 1e14:.1f} · 10¹⁴" in page
