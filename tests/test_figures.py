"""Figures from files of numbers: the same bytes twice, and no figure without its numbers."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from umm_kit import cli
from umm_kit.figures import FIGURES, arms, conflict_along, frontier, interference_atlas, oracle_honesty, planted_levels, redraw


@pytest.fixture
def folder(root, tmp_path):
    shutil.copytree(root / "figures/data", tmp_path / "figures/data")
    shutil.copy(root / "figures/umm.mplstyle", tmp_path / "figures")
    shutil.copytree(root / "experiments", tmp_path / "experiments")
    return tmp_path / "figures"


def test_the_same_numbers_give_the_same_bytes(folder, capsys):
    first = {path: path.read_bytes() for path in redraw(folder)}
    assert {path.name for path in first} == {name + end for name in FIGURES for end in (".png", ".pdf")}
    assert cli.main(["figures", "--folder", str(folder)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(first)
    assert all(path.read_bytes() == content for path, content in first.items())


def test_every_number_says_how_it_was_made(folder):
    for path, _ in FIGURES.values():
        lines = (folder / path).read_text().splitlines() if path.suffix == ".jsonl" else [(folder / path).read_text()]
        for content in map(json.loads, lines):
            record = content.get("record", content)
            assert record["command"].split()[0] in ("umm-kit", "python") and record["versions"]["torch"] and record["device"]


def test_committed_figures_are_drawn(root):
    assert {path.stem for path in (root / "figures").glob("*.png")} == set(FIGURES)


def test_a_missing_file_of_numbers_is_named(folder):
    (folder / "data/diagnosis.json").unlink()
    with pytest.raises(ValueError, match="diagnosis\\.json"):
        redraw(folder)


def test_conflict_along_draws_shallow_middle_and_deep():
    metrics = ("conflict", "within_understanding", "within_generation", "disattenuated_cosine")
    rows = [
        {"layer": f"layer {k}", "metric": m, "step": s, "value": s / 10, "low": 0.0, "high": 1.0, "n": 8}
        for k in range(1, 6) for m in metrics for s in (2, 1)
    ]  # fmt: skip
    figure = conflict_along(pd.DataFrame(rows))
    assert [ax.get_ylabel() for ax in figure.axes] == ["1 - cos", "cos within U", "cos within G", "disattenuated cos"]
    assert figure.axes[0].get_xlabel() == "training step (n = 8 pairs)"
    line = figure.axes[0].get_lines()[1]
    assert line.get_label() == "middle (layer 3)" and line.get_xdata().tolist() == [1, 2]
    assert line.get_ydata().tolist() == pytest.approx([0.1, 0.2])


def test_oracle_honesty_draws_shares_and_percent():
    kind = {"exact": 0.5, "n": 100, "silent": 0.02, "false_accept": 0.001, "n_edits": 10_000}
    figure = oracle_honesty({"clean": kind | {"exact": 1.0}, "noise": kind})
    points = [[float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == "o"] for ax in figure.axes]
    assert points == [[1.0, 0.5], pytest.approx([2.0, 2.0]), pytest.approx([0.1, 0.1])]
    low, high = figure.axes[0].lines[0].get_xdata()
    assert low == pytest.approx(100 / (100 + 1.96**2), abs=1e-4) and high == pytest.approx(1), "Wilson's interval of 100 of 100"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["clean", "noise"]


def rows_of_arms():
    metrics = (
        "understanding",
        "generation",
        "understanding_loss",
        "generation_loss",
        "understood_of_drawn",
        "drawn_of_understood",
    )
    for k, arm in enumerate(("base", "sft_all", "diva")):
        for metric in metrics:
            own = arm == "sft_all"  # it is the better fine-tuning
            gains = dict(over_sft=np.nan if own else 0.1 * k, sft_low=0.1 * k - 0.05, sft_high=0.1 * k + 0.05)
            yield dict(
                arm=arm, metric=metric, n=2048, **gains, over_base=np.nan if arm == "base" else 0.2, base_low=0.1, base_high=0.3
            )


@pytest.mark.parametrize(("against", "names"), [("sft", ["base", "diva"]), ("base", ["sft_all", "diva"])])
def test_arms_are_compared_with_others_alone(against, names):
    figure = arms(pd.DataFrame(rows_of_arms()), against)
    assert len(figure.axes) == 6 and figure.axes[0].get_title() == "understanding (share)\nn = 2,048"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == names
    points = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert points == pytest.approx([0.0, 0.2] if against == "sft" else [0.2, 0.2])


def test_frontier_joins_the_points_of_an_arm_in_the_order_of_ratios():
    rows = []
    for arm, ratios in (("base", (1.0,)), ("diva", (2.0, 0.5, 1.0))):
        for ratio in ratios:
            u = dict(understanding_loss=1 / ratio, understanding_loss_low=0.9 / ratio, understanding_loss_high=1.1 / ratio)
            g = dict(generation_loss=ratio, generation_loss_low=0.9 * ratio, generation_loss_high=1.1 * ratio)
            rows.append(dict(arm=arm, ratio=ratio, **u, **g))
    ax = frontier(pd.DataFrame(rows)).axes[0]
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_allclose(lines["diva"].get_xdata(), [0.5, 1.0, 2.0])
    np.testing.assert_allclose(lines["diva"].get_ydata(), [2.0, 1.0, 0.5])
    assert [text.get_text() for text in ax.texts] == ["0.5", "1", "2"], "a lone point needs no ratio"


def test_planted_levels_show_every_seed():
    index = pd.MultiIndex.from_product([("method", "no_unique_term"), (0, 1, 2)], names=["arm", "seed"])
    levels = ["recovery shared", "recovery unique", "leakage shared", "leakage unique"]
    frame = pd.DataFrame(np.arange(24.0).reshape(6, 4), index=index, columns=levels)
    figure = planted_levels(frame)
    assert [ax.get_title() for ax in figure.axes] == levels
    points = [line for line in figure.axes[1].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(points[1].get_xdata(), [13, 17, 21])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["method", "no_unique_term"]


def test_the_atlas_shows_complete_cells_alone():
    metrics = ("understanding_loss", "generation_loss", "understanding", "generation")
    rows = [
        dict(width=48, texture=t, every=4, steps=1600, seed=1, metric=m, n=9, interference=0.1, low=0.0, high=0.2)
        for t in ("none", "high") for m in (metrics if t == "none" else metrics[:2])
    ]  # fmt: skip
    figure = interference_atlas(pd.DataFrame(rows))
    assert [ax.get_title().split(":")[0] for ax in figure.axes] == ["understanding", "generation"] * 2
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["seed 1"]
    rows += [row | {"width": 96} for row in rows[:4]]
    labels = interference_atlas(pd.DataFrame(rows)).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["width 48", "width 96"], "what all have in common says nothing"
