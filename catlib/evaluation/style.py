"""The house style as it applies to models: their colours and markers in every figure of an evaluation."""

from catlib.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PINK,
    PRIORITY,
    RED,
    SKY,
    WIDTH,
    breed_label,
    mark_priority,
    percent_axis,
    row_font,
    styled,
)

__all__ = [
    "BLUE",
    "COLORS",
    "GREEN",
    "GREY",
    "INK",
    "MARKERS",
    "ORANGE",
    "PALE",
    "PINK",
    "PRIORITY",
    "RED",
    "SKY",
    "WIDTH",
    "breed_label",
    "color",
    "mark_priority",
    "marker",
    "percent_axis",
    "row_font",
    "styled",
]

COLORS = {
    "vlm-tuned": BLUE,
    "vlm-base": SKY,
    "clip-zero-shot": ORANGE,
    "clip-probe": RED,
    "tower-probe": GREEN,
}
MARKERS = {"vlm-tuned": "o", "vlm-base": "v", "clip-zero-shot": "s", "clip-probe": "D", "tower-probe": "^"}


def color(name: str) -> str:
    """A model's colour; models outside the usual five are grey."""
    return COLORS.get(name, GREY)


def marker(name: str) -> str:
    """A model's marker, so that no figure rests on colour alone."""
    return MARKERS.get(name, "X")
