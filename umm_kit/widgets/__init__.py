"""Controls around :mod:`umm_kit.plots`; they compute nothing themselves, and say in words what they did."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from umm_kit import plots

_STYLE = """<style>
.umm-painter { position: relative; overflow: hidden; }
.umm-painter .umm-canvas { position: absolute; inset: 0; width: 100%; height: 100%; image-rendering: pixelated; }
.umm-painter button.umm-token { background: transparent; border: 1px solid #8886; margin: 0; padding: 0; z-index: 1; }
.umm-painter button.umm-token.mod-active { background: repeating-linear-gradient(45deg, #222, #222 3px, #777 3px, #777 4px); }
</style>"""


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches=figure.bbox_inches)  # "tight", as in our style, would draw it twice
    return file.getvalue()


class MaskPainter(ipywidgets.VBox):
    """A picture under a grid of buttons; the pressed ones are the mask to click together.

    Args:
        image: [3, H, W] in [0, 1]. grid: (rows, columns) of tokens.
        fill: takes the mask [rows, columns] and returns an image [3, H, W], shown beside when "Fill in" is pressed.
        mask: [rows, columns] bool to begin with; ``.mask`` is that of now (True = hidden), and can be set.
        side: of the picture on the screen, in pixels.

    Example:
        >>> painter = paint_mask(np.zeros((3, 32, 32)), (8, 8))
        >>> painter.mask = np.eye(8, dtype=bool)
        >>> painter.said.value
        '8 of 64 tokens hidden'
    """

    def __init__(
        self,
        image: Any,
        grid: tuple[int, int],
        fill: Callable[[np.ndarray], Any] | None = None,
        mask: Any = None,
        side: int = 256,
    ):
        self._fill, self.mask_shape = fill, tuple(grid)
        size, square = ipywidgets.Layout(width="auto", height="auto"), {"width": f"{side}px", "height": f"{side}px"}
        self._tokens = [
            ipywidgets.ToggleButton(layout=size, tooltip=f"row {row + 1}, column {column + 1}").add_class("umm-token")
            for row, column in np.ndindex(*grid)
        ]
        self.picture = ipywidgets.Image(value=pixel_png(image)).add_class("umm-canvas")
        spread = {"grid_template_rows": f"repeat({grid[0]}, 1fr)", "grid_template_columns": f"repeat({grid[1]}, 1fr)"}
        canvas = ipywidgets.GridBox([self.picture, *self._tokens], layout=ipywidgets.Layout(**square, **spread))
        self.result = ipywidgets.Image(value=pixel_png(image), layout=ipywidgets.Layout(**square)).add_class("umm-result")
        self.said = ipywidgets.Label().add_class("umm-said")
        shown, buttons = [canvas.add_class("umm-painter")], [ipywidgets.Button(description="Clear").add_class("umm-clear")]
        buttons[0].on_click(lambda _: setattr(self, "mask", np.zeros(grid, dtype=bool)))
        if fill is not None:
            shown.append(self.result)
            buttons.append(ipywidgets.Button(description="Fill in").add_class("umm-fill"))
            buttons[-1].on_click(lambda _: self._filled())
        super().__init__([ipywidgets.HTML(_STYLE), ipywidgets.HBox(shown), ipywidgets.HBox(buttons), self.said])
        self.mask = np.zeros(grid, dtype=bool) if mask is None else mask
        for token in self._tokens:
            token.observe(lambda _: self._announce(), "value")

    @property
    def mask(self) -> np.ndarray:
        """[rows, columns] bool, True = hidden."""
        return np.array([token.value for token in self._tokens]).reshape(self.mask_shape)

    @mask.setter
    def mask(self, mask: Any) -> None:
        pressed = np.asarray(mask)
        if pressed.shape != self.mask_shape or pressed.dtype != bool:
            raise ValueError(f"the mask is {pressed.shape} of {pressed.dtype}; expected {self.mask_shape} of bool")
        for token, value in zip(self._tokens, pressed.ravel().tolist(), strict=True):
            token.value = value
        self._announce()

    def _announce(self) -> None:
        self.said.value = f"{int(self.mask.sum())} of {len(self._tokens)} tokens hidden"

    def _filled(self) -> None:
        hidden = int(self.mask.sum())
        if not hidden:
            self.said.value = "nothing is hidden: click on the picture first"
            return
        assert self._fill is not None
        self.said.value = f"filling in {hidden} tokens ..."
        self.result.value = pixel_png(self._fill(self.mask))
        self.said.value = f"filled in {hidden} tokens"


def pixel_png(image: Any) -> bytes:
    """The pixels of one image [3, H, W] as a PNG file, without margins."""
    pixels, file = np.rint(plots.as_pixels(image[None])[0] * 255).astype(np.uint8), io.BytesIO()
    Image.fromarray(pixels).resize((256, 256), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


paint_mask = MaskPainter


def layer_explorer(
    states: Mapping[str, Mapping[int, Any]], grid: tuple[int, int], images: Any, masks: Mapping[str, Any] | None = None
) -> ipywidgets.VBox:
    """:func:`umm_kit.plots.token_maps` of one layer and one image, with a slider for each.

    Arguments are those of ``token_maps``. The widget's children are the two sliders, the picture and what was done.
    """
    layers = sorted(next(iter(states.values())))
    layer = ipywidgets.SelectionSlider(options=layers, description="layer", continuous_update=False).add_class("umm-layer")
    item = ipywidgets.IntSlider(0, 0, len(images) - 1, description="image", continuous_update=False).add_class("umm-item")
    size = ipywidgets.Layout(width="480px", height="auto", align_self="flex-start")  # or a box would stretch it to the page
    picture, said = ipywidgets.Image(layout=size).add_class("umm-maps"), ipywidgets.Label().add_class("umm-said")

    def draw(_: Any = None) -> None:
        picture.value = png(plots.token_maps(states, grid, [layer.value], item.value, images, masks, size=2.4))
        said.value = f"layer {layer.value} of {layers[-1]}, image {item.value}"

    for control in (layer, item):
        control.observe(draw, "value")
    draw()
    return ipywidgets.VBox([layer, item, picture, said])


from umm_kit.widgets.microscope import loss_microscope as loss_microscope  # noqa: E402  (it needs png, from above)
