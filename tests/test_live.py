"""Curves of a running training: one picture per stage, redrawn in place; nothing on other processes."""

from types import SimpleNamespace

import pytest

from umm_kit.widgets import live


class Shown:
    def __init__(self, figure):
        self.figures = [figure]

    def update(self, figure):
        self.figures.append(figure)


@pytest.fixture
def shown(monkeypatch):
    pictures = []

    def display(figure, display_id):
        assert display_id
        pictures.append(Shown(figure))
        return pictures[-1]

    monkeypatch.setattr(live, "display", display)
    return pictures


def state(*losses, first=True):
    history = [{"step": k, "loss": v, "understanding_loss": v} for k, v in enumerate(losses)]
    return SimpleNamespace(is_world_process_zero=first, log_history=history)


def test_each_stage_has_one_picture_that_grows(shown):
    curves = live.LiveCurves()
    for _ in range(2):
        curves.on_train_begin(None, None, None)
        curves.on_log(None, state(), None)  # before the first loss: nothing to draw
        curves.on_log(None, state(2.0), None)
        curves.on_log(None, state(2.0, 1.0), None)
    assert [len(picture.figures) for picture in shown] == [2, 2]
    assert list(shown[0].figures[-1].axes[0].lines[0].get_ydata()) == [2.0, 1.0]


def test_only_the_first_process_draws(shown):
    curves = live.LiveCurves()
    curves.on_train_begin(None, None, None)
    curves.on_log(None, state(1.0, first=False), None)
    assert not shown
