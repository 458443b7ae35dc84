"""The loss microscope: a term, its arrows on points, and where following them leads."""

from __future__ import annotations

import html
from collections.abc import Mapping

import ipywidgets

from umm_kit import plots
from umm_kit.losses.microscope import Scene
from umm_kit.widgets import png


class LossMicroscope(ipywidgets.VBox):
    """A menu of terms with their failures, and a slider along the walks of the chosen one.

    Args:
        scenes: name -> scene, such as ``{name: make() for name, make in SCENES.items()}``: all is computed before, in seconds.

    Attributes:
        term, step: the controls; setting their ``.value`` draws anew.
        said: what to look for, and every reading of both walks at this step.

    Raises:
        ValueError: no scene.

    Example:
        >>> from umm_kit.losses.microscope import shrinking
        >>> microscope = loss_microscope({"orthogonality": shrinking(n=16, steps=4)})
        >>> microscope.step.value = 4
        >>> "step 4 of 4; " in microscope.said.value
        True
    """

    def __init__(self, scenes: Mapping[str, Scene]):
        if not scenes:
            raise ValueError("there are no scenes; expected name -> scene, see umm_kit.losses.microscope.SCENES")
        self.scenes = dict(scenes)
        self.term = ipywidgets.Dropdown(options=list(scenes), description="term").add_class("umm-term")
        self.step = ipywidgets.IntSlider(0, 0, description="step", continuous_update=False).add_class("umm-step")
        self.said = ipywidgets.HTML().add_class("umm-said")
        size = [ipywidgets.Layout(width=f"{width}px", height="auto", align_self="flex-start") for width in (560, 960)]
        self.arrows, self.curves = (ipywidgets.Image(layout=layout) for layout in size)
        self.arrows.add_class("umm-arrows")
        self.curves.add_class("umm-readings")
        super().__init__([ipywidgets.HBox([self.term, self.step]), self.said, self.arrows, self.curves])
        self.term.observe(lambda _: self._begin(), "value")
        self.step.observe(lambda _: self._draw(), "value")
        self._begin()

    @property
    def shown(self) -> Scene:
        """The scene of the chosen term."""
        return self.scenes[self.term.value]

    def _begin(self) -> None:
        """The chosen scene from its first step; it is drawn once, by the slider where that moves."""
        moves = self.step.value > 0
        self.step.value = 0
        self.step.max = len(self.shown.x) - 1
        if not moves:
            self._draw()

    def _draw(self) -> None:
        scene, k = self.shown, self.step.value
        self.arrows.value = png(plots.gradient_arrows(scene, [k]))
        self.curves.value = png(plots.readings(scene, k))
        found = {
            axis: ", ".join(f"{name} {line[k]:.3g}" for name, line in lines.items()) for axis, lines in scene.readings.items()
        }
        numbers = "; ".join(f"{axis}: {values}" for axis, values in found.items())
        text = f"step {k} of {len(scene.x) - 1}; {numbers}"
        self.said.value = f"<p>Look for: {html.escape(scene.failure)}.</p><p>{html.escape(text)}</p>"


loss_microscope = LossMicroscope
