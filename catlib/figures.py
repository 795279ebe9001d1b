"""Figures that show themselves, all in one theme: colours that stay apart for colour-blind readers, and sizes made for a report page."""

import base64
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from html import escape
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.image import AxesImage
from matplotlib.text import Text

from catlib.colors import GREY, INK, PALE, PRIORITY

WIDTH = 10.5  # inches; a report page shows them at about 100 pixels an inch, and never at less than 90
SMALLEST = 7.5  # points: 9 pixels there
LONGEST = 30  # letters of a breed's name on an axis
# For letters that matplotlib's own font lacks, those of these that are installed.
FONTS = {"Noto Sans CJK JP", "Noto Sans", "Noto Sans Arabic", "Arial Unicode MS", "Microsoft YaHei", "Hiragino Sans"}

RC: Any = {  # over seaborn's whitegrid; matplotlib types its keys as literals, which no dict of strings fits
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "figure.constrained_layout.use": True,
    "figure.dpi": 130,
    "font.family": ["DejaVu Sans", *sorted({font.name for font in fontManager.ttflist} & FONTS)],
    "font.size": 10,
    "grid.color": PALE,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name from the data with two dollar signs is a name, not a formula
}


@dataclass(frozen=True)
class Shown:
    """A figure that shows itself in a notebook and on a page. `caption`: computed from the data; `alt`: for who does not see it."""

    figure: Figure
    caption: str
    alt: str

    def _repr_html_(self) -> str:
        (picture, missing), kind = self._saved(format="png"), "png"
        drawing = "" if self._has_photos() else ' class="drawing"'  # a page turns its colours on dark screens
        if drawing and max(missing, default=0) >= ord(" "):  # the reader's own fonts write the names
            kind, picture = "svg+xml", self.svg()
        source = f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
        return (
            f'<figure><img alt="{escape(self.alt)}" src="{source}" style="max-width:100%"{drawing}>'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>"
        )

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        drawn = {} if self._has_photos() else {"image/svg+xml": self.svg().decode()}  # a report offers it as a file
        return {"text/html": self._repr_html_(), **drawn}

    def _has_photos(self) -> bool:
        return any(np.ndim(np.asarray(image.get_array())) == 3 for image in self.figure.findobj(AxesImage))

    def png(self) -> bytes:
        """The picture as a PNG file."""
        return self._saved(format="png")[0]

    def svg(self) -> bytes:
        """The picture as an SVG file, its letters as text; the margin is for names that are wider than matplotlib thinks."""
        drawn, _ = self._saved(format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.3)
        return re.sub(rb"[\x00-\x08\x0b-\x1f]", b"", drawn)  # which XML cannot hold

    def _saved(self, **how: Any) -> tuple[bytes, set[int]]:
        """The picture in a format, and the letters that no font at hand has."""
        stream = io.BytesIO()
        with plt.rc_context(RC), warnings.catch_warnings(record=True) as found:  # some labels are made only now
            warnings.simplefilter("always")
            self.figure.savefig(stream, **how)
        missing = (re.match(r"Glyph (\d+)", str(warning.message)) for warning in found)
        return stream.getvalue(), {int(match[1]) for match in missing if match}


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
            for text in drawn.findobj(Text):
                text.set_fontsize(max(text.get_fontsize(), SMALLEST))
            return Shown(drawn, caption, f"{what}. {caption}")

    return wrapper


def breed_label(breed: str, priority: bool) -> str:
    """A breed's name on an axis: the part before " - ", the middle of a long one left out, a star on priority breeds."""
    name = breed.split(" - ")[0]
    short = name if len(name) <= LONGEST else f"{name[: LONGEST * 2 // 3]}…{name[-(LONGEST // 3) :]}"
    return ("★ " if priority else "") + short


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
