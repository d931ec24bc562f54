"""The look that all figures share: few colours, chosen to differ in lightness too, and type for a report's width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

WIDTH = 8.0
"""Inches; at 144 dots an inch a figure is as sharp at a report's 800 CSS pixels as the text around it."""
DPI = 144

INK, QUIET, FAINT = "#1f2933", "#5f6c7b", "#d5dbe1"
OURS, PLAIN, MARK = "#1768ac", "#d9822b", "#2fd27d"
SERIES = (PLAIN, OURS, "#7b4fa3", "#2a9d6f", "#b3344d", "#8a6d1d", "#3f8fa8", "#6b7280")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.0,
    "axes.labelcolor": QUIET,
    "axes.titlecolor": INK,
    "axes.edgecolor": FAINT,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "axes.grid": False,
    "grid.color": "#e8ecf0",
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "text.parse_math": False,
}


@contextmanager
def drawing(width: float, height: float, *, gap: float | None = None) -> Iterator[Figure]:
    """A figure of this size in inches, drawn in the shared style whatever the caller's settings are.

    `gap` is the distance in inches that panels keep from their neighbours, for panels that are pictures.

    It belongs to no pyplot state: nothing to close, no window, safe in any thread.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        layout = ConstrainedLayoutEngine()
        if gap is not None:
            layout.set(w_pad=gap, h_pad=gap, wspace=0.0, hspace=0.0)
        figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
        FigureCanvasAgg(figure)
        yield figure


def series_colour(name: str, position: int) -> str:
    """The colour of a method: "plain" and "ours" keep theirs in every figure, others take theirs by position."""
    named = {"plain": PLAIN, "baseline": PLAIN, "ours": OURS}
    return named.get(name.lower(), SERIES[position % len(SERIES)])


def percent(share: float, decimals: int = 0) -> str:
    """0.123 → "12 %", the way all figures and reports write shares."""
    return f"{100 * share:.{decimals}f} %"


def as_picture(axes: Axes) -> None:
    """Removes the axes' frame and ticks around an image."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
