"""Variants of DIVA's configuration: what each sets, that a choice wins, and what is refused."""

import pytest
from transformers import HfArgumentParser

from umm_kit.trainers.variants import VARIANTS, DIVAConfig


def differing(one, other):
    return {name for name in VARIANTS[one] if VARIANTS[one][name] != VARIANTS[other][name]}


def test_each_variant_sets_what_its_row_says(tmp_path):
    for name, values in VARIANTS.items():
        config = DIVAConfig(output_dir=str(tmp_path), variant=name, use_cpu=True)
        assert {option: getattr(config, option) for option in values} == values
    assert differing("corrected", "paper") == {
        "orthogonality", "mask_equal_facts", "queue", "stage1_alignment", "stage1_penalty"
    }  # fmt: skip
    assert {"injection", "penalty", "train_encoders", "train_all_layers", "stage1_alignment"} < differing("released", "paper")


def test_a_choice_wins_even_if_it_is_the_papers(tmp_path):
    config = DIVAConfig(output_dir=str(tmp_path), variant="released", rank=24, injection="crosswise", train_encoders=False)
    assert (config.rank, config.injection, config.train_encoders, config.penalty) == (24, "crosswise", False, "within")


def test_tiny_leaves_a_variant_its_own(tmp_path):
    paper, released, corrected = (DIVAConfig.tiny(output_dir=str(tmp_path), variant=name) for name in VARIANTS)
    assert (paper.rank, paper.ema_decay, paper.orthogonality) == (8, 0.99, "overlap")
    assert (released.rank, released.ema_decay, released.factor_size) == (64, 0.0, 32)
    assert (corrected.rank, corrected.queue, corrected.max_steps) == (8, 256, 300)


@pytest.mark.parametrize("said", ["true", "false"])
def test_flags_choose_too(tmp_path, said):
    flags = ["--output_dir", str(tmp_path), "--variant", "released", "--train_encoders", said, "--ema_decay", "0.5"]
    config = HfArgumentParser(DIVAConfig).parse_args_into_dataclasses(flags)[0]
    assert config.train_encoders == (said == "true") and config.ema_decay == 0.5 and config.rank == 64


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"variant": "published"}, r"variant is 'published'; expected one of \('paper', 'released', 'corrected'\)"),
        ({"penalty": "none"}, "penalty is 'none'"),
        ({"pairs": "random"}, "pairs is 'random'.*'shuffled'"),
        ({"injection": "cross"}, "injection is 'cross'"),
        ({"encoder": "mlp"}, "encoder is 'mlp'"),
        ({"lora_rank": -1}, "lora_rank.*negative"),
        ({"random_encoders": True, "train_encoders": True}, "random_encoders and train_encoders are both on"),
        ({"equalise_gradients": True, "project_conflicts": True}, "two ways to combine"),
        ({"bag_of_words": True, "variant": "released"}, "injection is 'own'"),
        ({"variant": "corrected", "stop_gradient": False}, "queue is 256, but without stop_gradient"),
    ],
)
def test_bad_choices_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        DIVAConfig(output_dir=str(tmp_path), **wrong)
