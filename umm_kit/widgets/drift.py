"""Two controls for drift: a player of items on their way around, and one for words and pictures of your own."""

from __future__ import annotations

import html
import io
from typing import Any

import ipywidgets
import torch
from torch import Tensor

from umm_kit import plots
from umm_kit.data.imagetext import read_image
from umm_kit.evaluation.cycles import around
from umm_kit.evaluation.drift import Drift
from umm_kit.evaluation.facts import DENIED, KEPT
from umm_kit.models.base import Decoding
from umm_kit.widgets import pixel_png, png

_LOOK = {KEPT: ("✓", "#0b6e4f", "#e3f4ec"), DENIED: ("✗", "#9d0208", "#fde8e8")}  # a mark, and not the colour alone
_LOST = ("–", "#555555", "#eeeeee")


class DriftPlayer(ipywidgets.VBox):
    """Sliders over items and half-steps: the picture or the caption of then, and every fact of the origin.

    Args:
        drift: what :func:`umm_kit.drift` returned; it keeps the pictures of the first few items, and only those can be played.

    Attributes:
        item, step: the sliders; setting their ``.value`` draws anew.
        said: what stands at this step, in words.

    Raises:
        ValueError: no pictures were kept.
    """

    def __init__(self, drift: Drift):
        self.drift, self.trace = drift, drift.traces[0]
        kept = min((len(images) for images in self.trace.images.values()), default=0)
        if not kept:
            raise ValueError("no pictures were kept; run uk.drift(..., keep=8) to play the first eight items")
        steps = len(self.trace.kinds) - 1
        self.item = ipywidgets.IntSlider(0, 0, kept - 1, description="item", continuous_update=False).add_class("umm-item")
        self.step = ipywidgets.IntSlider(0, 0, steps, description="half-step", continuous_update=False).add_class("umm-step")
        square = ipywidgets.Layout(width="256px", height="256px")
        self.picture = ipywidgets.Image(layout=square).add_class("umm-picture")
        self.path = ipywidgets.Image(layout=ipywidgets.Layout(width="340px", height="auto")).add_class("umm-path")
        self.said, self.facts = ipywidgets.HTML().add_class("umm-said"), ipywidgets.HTML().add_class("umm-facts")
        controls = ipywidgets.HBox([self.item, self.step])
        super().__init__([controls, self.said, ipywidgets.HBox([self.picture, self.path]), self.facts])
        for control in (self.item, self.step):
            control.observe(lambda _: self._draw(), "value")
        self._draw()

    def _draw(self) -> None:
        k, i, trace = self.step.value, self.item.value, self.trace
        seen = max((step for step in trace.images if step <= k), default=None)  # of a text, the picture it was read from
        blank = plots.as_array(next(iter(trace.images.values()))[i]) * 0 + 1
        self.picture.value = pixel_png(blank if seen is None else trace.images[seen][i])
        told = max((step for step in trace.texts if step <= k), default=None)
        words = "" if told is None else html.escape(trace.texts[told][i])
        self.path.value = png(plots.paths(self.drift.paths()[0], [i], k // 2))
        self.facts.value = self._chips(k, i)
        state = f"half-step {k} of {len(trace.kinds) - 1} ({trace.kinds[k]}, {trace.status(k)[i]})"
        self.said.value = f"<p>{state}: {words}</p>"  # last: who reads it may trust the rest

    def _chips(self, k: int, i: int) -> str:
        if self.drift.facts is None:
            return "<p>These data have no known factors.</p>"
        table, chips = self.drift.table, []
        for row in (table.owner == i).nonzero()[0]:
            mark, ink, paper = _LOOK.get(int(self.drift.status[0, k, row]), _LOST)
            about = html.escape(table.describe(int(row)))
            look = f"color:{ink};background:{paper};border-radius:4px;padding:1px 6px;margin:2px;display:inline-block"
            chips.append(f'<span style="{look}">{mark} {about}</span>')
        return f"<p>{''.join(chips)}</p>"


class MakeItDrift(ipywidgets.VBox):
    """A text of your own, or a picture, on its way around.

    Args:
        model: drivable, with an ``image_size``. text: to begin with.

    Attributes:
        text, cycles, go, upload: the controls. steps: texts and pictures of the last run, in turn. said: what came of it.
    """

    def __init__(self, model: Any, text: str = "a small red circle", cycles: int = 4, decoding: Decoding = Decoding()):
        self.model, self.decoding, self.steps = model, decoding, list[str | Tensor]()
        wide = ipywidgets.Layout(width="420px")
        self.text = ipywidgets.Text(text, description="say", layout=wide, continuous_update=False).add_class("umm-text")
        self.cycles = ipywidgets.BoundedIntText(cycles, 1, 12, description="cycles").add_class("umm-cycles")
        self.go = ipywidgets.Button(description="Go around").add_class("umm-go")
        self.upload = ipywidgets.FileUpload(accept="image/*", description="or a picture").add_class("umm-upload")
        self.said = ipywidgets.HTML().add_class("umm-said")
        self.strip = ipywidgets.Image(layout=ipywidgets.Layout(width="100%", height="auto")).add_class("umm-strip")
        super().__init__([ipywidgets.HBox([self.text, self.cycles, self.go, self.upload]), self.said, self.strip])
        self.go.on_click(lambda _: self.run(self.text.value))
        self.upload.observe(self._uploaded, "value")

    def _uploaded(self, change: Any) -> None:
        if not change["new"]:
            return
        file = change["new"][0]
        try:
            picture = read_image(io.BytesIO(bytes(file["content"])), self.model.image_size)
        except ValueError as error:
            self.said.value = html.escape(f"{file['name']} cannot be read as a picture: {error}")
            return
        self.run(picture)

    def run(self, first: str | Tensor) -> None:
        """Go around from a text or a picture [3, H, W]; mistakes are said, not raised."""
        self.said.value = "going around ..."
        try:
            self.steps = around(self.model, first, self.cycles.value, decoding=self.decoding)
        except ValueError as error:
            self.said.value = html.escape(str(error))
            return
        at = [k for k, step in enumerate(self.steps) if isinstance(step, Tensor)]
        read = [str(self.steps[k + 1]) or "(no words)" if k + 1 < len(self.steps) else "" for k in at]
        titles = ["your picture" if k == 0 else f"cycle {(k + 1) // 2}" for k in at]
        self.strip.value = png(plots.image_grid(torch.stack([self.steps[k] for k in at]), titles, read))  # type: ignore[misc]
        words = [step for step in self.steps if isinstance(step, str)]
        origin = repr(first) if isinstance(first, str) else f"your picture, read as {words[0]!r},"
        self.said.value = html.escape(f"{origin} has become {words[-1]!r}")


drift_player = DriftPlayer
make_it_drift = MakeItDrift
