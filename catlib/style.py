"""One look for every figure: colours that stay apart for colour-blind readers, and sizes made for a report page."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

WIDTH = 10.5  # inches; a report page shows them at about 100 pixels an inch

# Okabe and Ito, "Color universal design" (2008): distinguishable with every common colour blindness.
BLUE, SKY, ORANGE, RED, GREEN, PINK = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#CC79A7"
INK, GREY, PALE = "#22303C", "#8A949E", "#E4E8EC"
PRIORITY = "#A3356F"
RC = {
    "figure.dpi": 130,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": PALE,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 2,
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorate a function that returns a figure: the house style inside, and the figure closed so that it shows only
    once."""

    @wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        with plt.rc_context(RC):
            figure = draw(*args, **kwargs)
            plt.close(figure)
            return figure

    return wrapper


def breed_label(breed: str, priority: bool) -> str:
    """A breed's name on an axis: the part before " - ", a star on priority breeds."""
    return ("★ " if priority else "") + breed.split(" - ")[0]


def mark_priority(labels: list[Text], flags: list[bool]) -> None:
    """Set the tick labels of priority breeds in bold and in their colour."""
    for label, flag in zip(labels, flags, strict=True):
        if flag:
            label.set_color(PRIORITY)
            label.set_fontweight("bold")


def percent_axis(axes: Axes, which: str = "x", low: float = 0.0, high: float = 1.0) -> None:
    """Ticks in per cent on an axis that runs over shares."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(lambda value, _: f"{round(100 * value, 1):g} %")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)


def row_font(rows: int) -> float:
    """Font size in points of tick labels when so many rows share a page-high axis."""
    return 10.0 if rows <= 24 else 9.0 if rows <= 40 else 8.0
