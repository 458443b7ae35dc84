"""Training a teacher: it learns, its records say so, an interrupted run goes on; pairs that say the same are no negatives."""

import json
import shutil

import pytest
import torch

from umm_kit.models.card import write_card
from umm_kit.models.teachers import load_teacher
from umm_kit.trainers.teacher import Contrastive, TeacherConfig, new_teacher, train


def config(folder, **changes):
    return TeacherConfig.tiny(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **changes)


def test_a_tiny_training_is_saved_with_its_record_and_resumes(tmp_path):
    whole = train(config(tmp_path / "a"))
    assert json.loads((tmp_path / "a/run.json").read_text())["parameters"] > 1000
    (score,) = json.loads((tmp_path / "a/scores.json").read_text())["metrics"]
    assert (score["metric"], score["n"]) == ("retrieval_at_1", 512) and 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    assert "retrieval_at_1" in write_card(tmp_path / "a").read_text()
    again = load_teacher(tmp_path / "a", device="cpu")
    kept = again.model.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in whole.model.state_dict().items())
    # Products of the same weights may differ in the last bit: where they lie in memory decides which kernel runs.
    torch.testing.assert_close(again.embed_text(["a red circle"]), whole.embed_text(["a red circle"]), atol=1e-6, rtol=0)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoint-4")
    resumed = train(config(tmp_path / "b", resume=True))
    torch.testing.assert_close(resumed.embed_text(["a blue square"]), whole.embed_text(["a blue square"]), atol=1e-6, rtol=0)


def test_the_loss_falls_on_a_few_pairs(tmp_path):
    torch.manual_seed(0)
    texts = ["a red circle", "a blue square", "a green triangle", "a yellow star"]
    teacher = new_teacher(TeacherConfig.tiny(output_dir=str(tmp_path), use_cpu=True), texts, 16)
    ids = teacher.tokenizer(texts, return_tensors="pt", padding=True)
    assert bool((ids["input_ids"] == teacher.tokenizer.eos_token_id).any(1).all()), "CLIP reads a text off at its end"
    model, pixels = Contrastive(teacher, 0.1).train(), torch.rand(4, 3, 16, 16)
    optimizer, losses = torch.optim.Adam(model.parameters(), 2e-3), []
    for _ in range(60):
        out = model(ids["input_ids"], ids["attention_mask"], pixels, torch.arange(4))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(float(out["loss"].detach()))
    assert losses[-1] < 0.3 * losses[0] and float(out["accuracy"]) == 1


def test_equal_facts_are_no_negatives(tmp_path):
    """Two equal pairs among three: with their facts named, they need not be told apart."""
    torch.manual_seed(0)
    teacher = new_teacher(TeacherConfig.tiny(output_dir=str(tmp_path), use_cpu=True), ["a red circle", "a blue square"], 16)
    ids = teacher.tokenizer(["a red circle", "a red circle", "a blue square"], return_tensors="pt", padding=True)
    pixels = torch.rand(2, 3, 16, 16)[[0, 0, 1]]
    loss = lambda facts: float(Contrastive(teacher, 0.1)(*ids.values(), pixels, torch.tensor(facts))["loss"].detach())  # noqa: E731
    ids = {k: ids[k] for k in ("input_ids", "attention_mask")}
    assert loss([0, 0, 1]) < loss([0, 1, 2])


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    with pytest.raises(ValueError, match="hidden_size 32 is not a multiple of num_heads 3"):
        TeacherConfig.tiny(output_dir=str(tmp_path), num_heads=3)
