"""Figures: arrays in, :class:`matplotlib.figure.Figure` out.

Nothing here touches pyplot's global state, because a widget's callback may draw while a cell runs. Tensors on any device are
arrays too. Colours stay apart under the common forms of colour blindness, and nothing is told by hue alone.
"""

from umm_kit.plots.lines import Panel, band, cumulative, curves, diagnosis, drift, forest, probes, scores, training
from umm_kit.plots.pictures import TEXT_SIZE, as_array, as_pixels, image_grid, token_colours, token_maps
from umm_kit.plots.points import gradient_arrows, heat_map, latent_map, paths, pushes, readings

__all__ = [
    "TEXT_SIZE", "Panel", "as_array", "as_pixels", "band", "cumulative", "curves", "diagnosis", "drift", "forest",
    "gradient_arrows", "heat_map", "image_grid", "latent_map", "paths", "probes", "pushes", "readings", "scores",
    "token_colours", "token_maps", "training",
]  # fmt: skip
