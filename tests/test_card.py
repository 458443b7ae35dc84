"""The model card says what its files say."""

import json

import pytest

from umm_kit.models.card import write_card

CONFIG = {"architectures": ["MaskedUMM"]}
LOG = [
    {"step": 1, "understanding_loss": 2.0, "generation_loss": 5.0},
    {"step": 2, "eval_understanding_loss": 1.5, "eval_generation_loss": 4.5},
]
RUN = {
    "command": "umm-kit train masked --max_steps 2",
    "seed": 3,
    "wall_seconds": 120.0,
    "device": "a CPU",
    "versions": {"torch": "2"},
}


def test_card(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**RUN, "config": {"max_steps": 2}, "parameters": 1234, "log": LOG}))
    score = {"metric": "caption_f1", "value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    (tmp_path / "scores.json").write_text(json.dumps({"record": {"command": "umm-kit evaluate x"}, "metrics": [score]}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    text = write_card(tmp_path).read_text()
    row = "| caption_f1 | 0.500 | 0.400 to 0.600 | 10 |"
    about = ("`MaskedUMM`", "coloured shapes")
    for piece in ("umm-kit train masked --max_steps 2", "seed 3", "2 minutes", "1,234", "max_steps = 2", *about, row):
        assert piece in text
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_says_how_the_tokenizer_was_made(tmp_path):
    made = {"command": "umm-kit train tokenizer", "wall_seconds": 60.0, "scores": {"psnr_db": 30.74}}
    (tmp_path / "run.json").write_text(json.dumps({**RUN, "config": {}, "parameters": 1, "log": LOG, "image_tokenizer": made}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    text = write_card(tmp_path).read_text()
    assert "by `umm-kit train tokenizer` in 1 minutes: psnr_db 30.74." in text
    assert text.index("train masked") < text.index("train tokenizer")


def test_refuses_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"no run\.json"):
        write_card(tmp_path)
