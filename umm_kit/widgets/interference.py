"""The explorer of DIVA's Figure 2: everything is measured once, so that each control answers at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ipywidgets
import numpy as np

from umm_kit import plots
from umm_kit.diagnostics.geometry import effective_rank_increment, residual_curve
from umm_kit.diagnostics.spectrum import Spectrum, filling, token_spectrum
from umm_kit.features import FLOWS, Features
from umm_kit.widgets import png

VARIANCES = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)  # shares of understanding's variance, as rank rules
CUTOFFS = tuple(round(0.1 * k, 1) for k in range(1, 14))  # in units of Nyquist


@dataclass(frozen=True)
class Measured:
    """Of one layer at one mask ratio, for every setting of the other two controls.

    Attributes:
        residual: [d + 1], share of generation outside the first k components of understanding.
        missing: [d + 1], share of understanding's own variance outside them, by which the variance rule counts.
        increment: of the effective rank, in percent.
        spectra: of "understanding" and "generation", and of both at the "... visible" positions only.
    """

    residual: np.ndarray
    missing: np.ndarray
    increment: float
    spectra: dict[str, Spectrum]

    def components(self, rule: float) -> int:
        """By a share of variance below 1, or by a number of components."""
        return int((self.missing <= 1 - rule + 1e-12).argmax()) if rule < 1 else min(int(rule), len(self.residual) - 1)

    def above(self, name: str, cutoff: float) -> float:
        """High-frequency share, the mean over examples whose map is not constant."""
        return float(self.spectra[name].above(cutoff).nanmean())


def measure(states: Features) -> dict[int, Measured]:
    """Residuals at every rank, rank increment and spectra of the token states of all layers."""
    tokens = all(H.ndim == 3 for H in states.states.values())
    if set(states.grids) != set(FLOWS) or len(set(states.grids.values())) > 1 or not tokens or states.masks is None:
        raise ValueError(f"the features have grids {states.grids}, tokens: {tokens}; expected token states of both flows on one "
                         "grid: extract(model, data, pooled=False, mask_ratio=...)")  # fmt: skip
    grid, found = states.grids["generation"], {}
    fill = filling(states.masks, grid)  # the masked positions from the visible ones, alike for both flows
    for layer in states.layers("generation"):
        H = {flow: states.states[flow, layer] for flow in FLOWS}
        u, g = (H[flow] for flow in FLOWS)
        spectra = {flow: token_spectrum(H[flow], grid) for flow in FLOWS}
        spectra |= {f"{flow}, visible": token_spectrum(fill @ H[flow].double(), grid) for flow in FLOWS}
        increment = effective_rank_increment(g, u).percent
        found[layer] = Measured(residual_curve(g, u), residual_curve(u, u), increment, spectra)
    return found


class InterferenceExplorer(ipywidgets.VBox):
    """Curves over layers and, at one layer, over rank and frequency, with a control each for layer, mask ratio, rank and cut-off.

    Args:
        states: mask ratio -> token states of both flows, from ``extract(model, data, pooled=False, mask_ratio=...)``; some 100
            anchors serve. They are measured once, here (a few seconds), and not kept.
        conflict: rows of a diagnosis' gradient conflict by layer, drawn as they are: it depends on none of the controls.

    Attributes:
        layer, mask_ratio, cutoff, rank: the controls; setting their ``.value`` draws anew. A rank below 1 is a share of
            understanding's variance to keep, from 1 on a number of components.
        said: a label that tells in words what the picture shows.

    Raises:
        ValueError: no states, pooled states, or flows whose grids differ.
    """

    def __init__(self, states: Mapping[float, Features], conflict: Any = None):
        if not states:
            raise ValueError("there are no states; expected mask ratio -> features with pooled=False")
        self.found = {ratio: measure(features) for ratio, features in sorted(states.items())}
        self._conflict, ratios = conflict, list(self.found)
        self.layers = list(self.found[ratios[0]])
        one = self.found[ratios[0]][self.layers[-1]]
        width, some = len(one.residual) - 1, one.spectra["generation"]
        counts = [2**k for k in range(width.bit_length()) if 2**k < width]
        ranks = [(f"{100 * v:g} % of variance", v) for v in VARIANCES] + [(f"{k} components", k) for k in counts]
        cutoffs = [c for c in CUTOFFS if c < 2**0.5 and 0 < some.white(c) < 1]

        def slider(name: str, options: list, value: float) -> ipywidgets.SelectionSlider:
            made = ipywidgets.SelectionSlider(options=options, value=value, description=name, continuous_update=False)
            made.observe(lambda _: self._draw(), "value")
            return made.add_class(f"umm-{name.replace(' ', '-')}")

        self.layer = slider("layer", self.layers, self.layers[len(self.layers) // 2])
        self.mask_ratio = slider("mask ratio", ratios, ratios[len(ratios) // 2])
        self.cutoff = slider("cut-off", cutoffs, min(cutoffs, key=lambda c: abs(c - 0.5)))
        self.rank = slider("rank rule", ranks, 0.99)
        size = ipywidgets.Layout(width="960px", height="auto", align_self="flex-start")
        self.picture = ipywidgets.Image(layout=size).add_class("umm-interference")
        self.said = ipywidgets.Label().add_class("umm-said")
        controls = [ipywidgets.HBox([self.layer, self.mask_ratio]), ipywidgets.HBox([self.rank, self.cutoff])]
        super().__init__([*controls, self.said, self.picture])
        self._draw()

    def _draw(self) -> None:
        self.picture.value = png(plots.curves(self.panels()))
        here, cutoff = self.found[self.mask_ratio.value][self.layer.value], self.cutoff.value
        k = here.components(self.rank.value)
        u, g = (here.above(flow, cutoff) for flow in FLOWS)
        self.said.value = (
            f"layer {self.layer.value} of {self.layers[-1]}, mask ratio {self.mask_ratio.value:g}: {here.residual[k]:.3f} of "
            f"generation outside {k} components of understanding (random: {1 - k / (len(here.residual) - 1):.3f}); "
            f"above {cutoff:g} of Nyquist {g:.3f} of generation, {u:.3f} of understanding"
        )

    def panels(self) -> list[plots.Panel]:
        """Over layers: conflict where given, residual, rank increment, high frequencies; at the chosen layer: rank, spectrum."""
        layers, chosen, cutoff = self.layers, self.layer.value, self.cutoff.value
        found = self.found[self.mask_ratio.value]
        here, width = found[chosen], len(found[chosen].residual) - 1
        ks = [found[layer].components(self.rank.value) for layer in layers]
        residual = {
            "generation outside understanding": (layers, [found[layer].residual[k] for layer, k in zip(layers, ks, strict=True)]),
            "random subspace": (layers, [1 - k / width for k in ks]),
        }
        increment = {"generation on understanding": (layers, [found[layer].increment for layer in layers])}
        rough = {name: (layers, [found[layer].above(name, cutoff) for layer in layers]) for name in here.spectra}
        every = np.arange(1, width + 1)
        sweep = {"generation outside understanding": (every, here.residual[1:]), "random subspace": (every, 1 - every / width)}
        rings = {}
        for flow in FLOWS:
            centres, share, white = here.spectra[flow].radial(8)
            rings[flow] = (centres, share.nanmean(0) / white)
        visible, at, null = [n for n in rough if "visible" in n], f"layer {chosen}: ", ["random subspace"]
        panels = []
        if (c := self._conflict) is not None:
            band = {"1 - cos (U, G)": (c.layer, c.value, c.low, c.high)}
            panels.append(plots.Panel("gradient conflict (fixed)", "layer", "1 - cos", band, (), chosen))
        return [
            *panels,
            plots.Panel("residual", "layer", "share of energy", residual, null, chosen),
            plots.Panel("effective-rank increment", "layer", "%", increment, (), chosen),
            plots.Panel(f"energy above {cutoff:g} of Nyquist", "layer", "share of energy", rough, visible, chosen),
            plots.Panel(
                f"{at}residual by rank", "components kept", "share of energy", sweep, null, ks[layers.index(chosen)], True
            ),
            plots.Panel(f"{at}spectrum", "frequency / Nyquist", "energy / white noise", rings, (), cutoff),
        ]


interference_explorer = InterferenceExplorer
