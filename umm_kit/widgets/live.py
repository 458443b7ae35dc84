"""Curves that grow in the cell while a model trains; the last ones stay there."""

from __future__ import annotations

from typing import Any

from IPython.display import display
from transformers import TrainerCallback

from umm_kit import plots


class LiveCurves(TrainerCallback):
    """For ``DIVATrainer(..., callbacks=[LiveCurves()])``: draws :func:`umm_kit.plots.training` anew whenever the trainer logs.

    Each stage gets curves of its own, one below the other.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def on_train_begin(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        self._handle = None

    def on_log(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        if not state.is_world_process_zero or not any("loss" in entry for entry in state.log_history):
            return
        figure = plots.training(state.log_history)
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)
