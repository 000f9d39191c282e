"""Axes for the plotting functions, which import matplotlib only when they draw."""

from typing import Any

import numpy as np


def new_axes(panels: int = 1) -> Any:
    """Empty matplotlib axes of a new figure: one by itself, several side by side as an array.

    They need no display, leave matplotlib's current figure alone, and go with their last reference.

    >>> new_axes().figure.axes == new_axes(2)[1].figure.axes
    False
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5 if panels == 1 else 4.2 * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels)
    for ax in np.ravel(axes):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return axes
