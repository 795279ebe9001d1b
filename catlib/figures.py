"""Figures that show themselves, all in one theme: colours that stay apart for colour-blind readers, and sizes made for a report page."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from html import escape
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

WIDTH = 10.5  # inches; a report page shows them at about 100 pixels an inch

# Okabe and Ito, "Color universal design" (2008): distinguishable with every common colour blindness.
BLUE, SKY, ORANGE, RED, GREEN, PINK = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#CC79A7"
INK, GREY, PALE = "#22303C", "#8A949E", "#E4E8EC"
PRIORITY = "#A3356F"
RC: Any = {  # matplotlib types its keys as literals, which no dict of strings fits
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
    "text.parse_math": False,  # a name from the data with two dollar signs is a name, not a formula
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 2,
}


@dataclass(frozen=True)
class Shown:
    """A figure that shows itself in a notebook and on a page: picture, caption and text for those who do not see it.

    `caption` is a sentence computed from the data.
    """

    figure: Figure
    caption: str
    alt: str

    def _repr_html_(self) -> str:
        image = base64.b64encode(self.png()).decode()
        return (
            f'<figure><img alt="{escape(self.alt)}" src="data:image/png;base64,{image}" style="max-width:100%">'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>"
        )

    def png(self) -> bytes:
        """The picture as a PNG file."""
        stream = io.BytesIO()
        with plt.rc_context(RC):  # some labels are made only when the figure is drawn
            self.figure.savefig(stream, format="png")
        return stream.getvalue()


def figure(draw: Callable[..., tuple[Figure, str]]) -> Callable[..., Shown]:
    """Decorate a function that returns a figure and its caption: the theme inside, the figure closed (it shows itself once).

    The text alternative is the first line of the function's docstring and the caption.
    """
    what = (draw.__doc__ or "").strip().splitlines()[0].rstrip(".")

    @wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Shown:
        with sns.axes_style("whitegrid"), plt.rc_context(RC):
            drawn, caption = draw(*args, **kwargs)
            plt.close(drawn)
            return Shown(drawn, caption, f"{what}. {caption}")

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
