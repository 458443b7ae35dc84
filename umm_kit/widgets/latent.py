"""The latent space under the pointer: pick points of a map, see what they are and who is near them in the other flow."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd

from umm_kit.diagnostics.maps import PairedMap
from umm_kit.features import FLOWS
from umm_kit.plots import as_array
from umm_kit.widgets import pixel_png

SHOWN = 3  # picked points whose pictures are shown
_JOINED = 100  # picked points that are joined with their partners
#: Okabe and Ito's without yellow, as in figures/umm.mplstyle
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_STYLE = """<style>
.umm-picked { max-height: 460px; overflow: auto; }
.umm-picked table { border-collapse: collapse; }
.umm-picked td { vertical-align: top; padding: 4px 10px 4px 0; }
.umm-picked img { width: 72px; height: 72px; image-rendering: pixelated; }
.umm-picked p { margin: 0; max-width: 15em; line-height: 1.25; }
</style>"""


class LatentExplorer(ipywidgets.VBox):
    """A map of both flows to pick points in, with a slider for the layer and menus for the method and the colour.

    A click picks a point; the second button at the plot's left edge turns dragging into a lasso. Everything shown of
    a pick is read from the maps: neighbours in the other flow are those of the original space, not of the picture. Large points
    are understanding, small ones generation; a line joins what is picked with its partner.

    Args:
        maps: method -> layer -> :class:`umm_kit.diagnostics.maps.PairedMap`, all of the same ids in the same order.
        images: [n, 3, H, W] in [0, 1]. texts: n captions. factors: name -> [n] values to colour by and to list.
        side: of the map on the screen, in pixels.

    Attributes:
        layer, method, colour: the controls; setting their ``.value`` draws anew.
        selection: rows of the picked points, 0 to n - 1 of understanding, n to 2 n - 1 of generation; can be set.
        said, picked_said: labels that tell in words what the map shows and what was picked.

    Raises:
        ValueError: no maps, or maps, images, texts and factors that are not of the same n ids.
        ImportError: jupyter-scatter is not installed.
    """

    def __init__(
        self,
        maps: Mapping[str, Mapping[int, PairedMap]],
        images: Any,
        texts: Sequence[str],
        factors: Mapping[str, Any],
        side: int = 440,
    ):
        try:
            import jscatter
        except ImportError as error:
            raise ImportError(
                "the explorer needs jupyter-scatter: pip install jupyter-scatter (plots.latent_map needs none)"
            ) from error
        everything = [m for by_layer in maps.values() for m in by_layer.values()]
        if not everything:
            raise ValueError("there are no maps; expected method -> layer -> paired_map(...)")
        self.ids, n = list(everything[0].ids), len(everything[0].ids)
        self._factors = {name: as_array(values) for name, values in factors.items()}
        sizes = {"images": len(images), "texts": len(texts)} | {name: len(values) for name, values in self._factors.items()}
        if any(list(m.ids) != self.ids for m in everything) or any(size != n for size in sizes.values()):
            raise ValueError(f"maps of {n} ids came with {sizes}; expected one of each per id, and the same ids in every map")
        if reserved := {"x", "y", "flow"} & set(self._factors):
            raise ValueError(f"factors are named {sorted(reserved)}; these names are the map's own, choose others")
        if any(values.ndim != 1 for values in self._factors.values()):
            raise ValueError(f"factors are { ({k: v.shape for k, v in self._factors.items()}) }; expected one value for each id")
        self._maps, self._images, self._texts = maps, images, texts
        self.method = ipywidgets.Dropdown(options=list(maps), description="method").add_class("umm-method")
        layers = sorted(maps[self.method.value])
        self.layer = ipywidgets.SelectionSlider(options=layers, description="layer", continuous_update=False).add_class(
            "umm-layer"
        )
        self.colour = ipywidgets.Dropdown(options=["flow", *self._factors], description="colour").add_class("umm-colour")
        self.said, self.picked_said = (ipywidgets.Label().add_class("umm-said") for _ in range(2))
        self.pictures = ipywidgets.HTML().add_class("umm-picked")
        # Lines of all pairs (connect_by) would stop jupyter-scatter 1.0.1 for good where a selection precedes the first drawing.
        self._line = jscatter.Line
        self.scatter = jscatter.Scatter(
            "x", "y", data=self._frame(), x_scale=(-1.05, 1.05), y_scale=(-1.05, 1.05), width=side, height=side, legend=True,
            size_by="flow", size_map=[8, 5], opacity=0.8, axes=False, zoom_on_selection=False,
        )  # fmt: skip
        self.plot = self.scatter.widget.add_class("umm-scatter")
        self.plot.observe(lambda _: self._describe(), "selection")
        self.method.observe(lambda _: self._offer(), "value")
        self.layer.observe(lambda _: self._draw(), "value")
        self.colour.observe(lambda _: self._draw(), "value")
        row = ipywidgets.HBox([self.plot, self.pictures])
        controls = ipywidgets.HBox([self.layer, self.method, self.colour])
        super().__init__([ipywidgets.HTML(_STYLE), controls, self.said, self.picked_said, row])
        self._draw()
        self._describe()

    @property
    def shown(self) -> PairedMap:
        """The map of the chosen method and layer."""
        return self._maps[self.method.value][self.layer.value]

    @property
    def selection(self) -> np.ndarray:
        return np.asarray(self.scatter.selection(), dtype=int)

    @selection.setter
    def selection(self, rows: Sequence[int]) -> None:
        picked = np.asarray(rows, dtype=int).reshape(-1)
        if ((picked < 0) | (picked >= 2 * len(self.ids))).any():
            raise ValueError(f"points {picked.tolist()} were picked; expected rows from 0 to {2 * len(self.ids) - 1}")
        self.scatter.selection(picked)

    def _frame(self) -> pd.DataFrame:
        """Points scaled into [-1, 1] by one factor for both axes, so that no distance is stretched."""
        points, n = self.shown.positions, len(self.ids)
        points = points - (points.max(0) + points.min(0)) / 2
        points = points / abs(points).max()
        frame = pd.DataFrame({"x": points[:, 0], "y": points[:, 1]})
        frame["flow"] = pd.Categorical(np.repeat(FLOWS, n), categories=FLOWS)
        for name, values in self._factors.items():
            number = np.issubdtype(values.dtype, np.floating)
            frame[name] = np.tile(values, 2) if number else pd.Categorical(np.tile(values.astype(str), 2))
        return frame

    def _offer(self) -> None:
        """The layers that there are by the chosen method; the nearest to the present one is kept."""
        layers, before = tuple(sorted(self._maps[self.method.value])), self.layer.value
        if layers != self.layer.options:
            self.layer.options = layers
            self.layer.value = min(layers, key=lambda layer: abs(layer - before))
        self._draw()

    def _draw(self) -> None:
        m, colour = self.shown, self.colour.value
        frame = self._frame()
        classes = frame[colour].cat.categories if frame[colour].dtype == "category" else None
        by = "cividis" if classes is None else _COLOURS[: len(classes)] if len(classes) <= len(_COLOURS) else "auto"
        with self.plot.hold_sync():  # one message with everything: while the page draws it drops what comes after
            self.scatter.data(frame)
            self.scatter.color(by=colour, map=by)
            self.plot.non_spatial_points_update = False  # color() had set it, and picking would use the old places
        self.said.value = (
            f"layer {self.layer.value}, {self.method.value}, coloured by {colour}: trustworthiness {m.trustworthiness:.2f}, "
            f"neighbours kept {m.neighbour_overlap:.2f} (chance {m.chance:.2f})"
            + (f", partner nearest {m.pairs.nearest.value:.2f} (chance {m.pairs.chance:.3f})" if m.pairs else "")
        )
        self._describe()

    def _describe(self) -> None:
        """Pictures and words for what is picked, at the layer that is shown."""
        picked, n = np.sort(self.selection), len(self.ids)
        ends = self._frame()[["x", "y"]].to_numpy()
        joined = [self._line([tuple(ends[k]), tuple(ends[k + n])], "#777777") for k in np.unique(picked % n)[:_JOINED]]
        self.scatter.annotations(joined)
        if not len(picked):
            self.picked_said.value = "nothing is picked: click on a point, or press the lasso and draw around some"
            self.pictures.value = ""
            return
        at_home = int((self.shown.others[picked, 0] == picked % n).sum())
        first = int((picked < n).sum())
        self.picked_said.value = (
            f"picked {len(picked)}: {first} of {FLOWS[0]}, {len(picked) - first} of {FLOWS[1]}; {at_home} with their own partner "
            "nearest in the other flow" + (f"; the first {SHOWN} are shown" if len(picked) > SHOWN else "")
        )
        self.pictures.value = f"<table>{''.join(self._row(point) for point in picked[:SHOWN])}</table>"

    def _row(self, point: int) -> str:
        """One picked point with its neighbours in the other flow."""
        n = len(self.ids)
        flow, item = divmod(int(point), n)
        cells = [self._card(item, f"<b>{FLOWS[flow]}</b>", factors=True)]
        for other in self.shown.others[point]:
            cells.append(self._card(int(other), "its partner" if other == item else f"near in {FLOWS[1 - flow]}"))
        return f"<tr>{''.join(cells)}</tr>"

    def _card(self, item: int, head: str, factors: bool = False) -> str:
        picture = base64.b64encode(pixel_png(self._images[item])).decode()
        values = [f"{k} {v[item]:.2f}" if v.dtype.kind == "f" else f"{k} {v[item]}" for k, v in self._factors.items()]
        more = f"<p><small>{html.escape(', '.join(values))}</small></p>" if factors and values else ""
        lines = f"<p>{head}</p><p>{html.escape(str(self._texts[item]))}</p>{more}"
        return f'<td><img alt="{html.escape(str(self.ids[item]))}" src="data:image/png;base64,{picture}">{lines}</td>'


latent_explorer = LatentExplorer
