"""Panels of photos: mistakes of one model, and photos that two models name differently."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import ImageOps

from catlib.data.images import inside, open_image
from catlib.evaluation.names import short, title
from catlib.evaluation.outcomes import NO_ANSWER, Outcomes
from catlib.evaluation.style import BLUE, INK, PALE, RED, WIDTH, breed_label, styled

SIDE = 320  # pixels: photos are reduced to this before they go into a figure, or the report would weigh tens of MB


@styled
def photo_panel(
    photos: Sequence[tuple[Path, Sequence[tuple[str, str]]]], columns: int = 4, heading: str = ""
) -> Figure:
    """A grid of photos, each with lines of (text, colour) below it."""
    if not photos:
        figure = plt.figure(figsize=(WIDTH, 0.8))
        figure.text(0.02, 0.5, "no such photos", va="center")
        return figure
    count = -(-len(photos) // columns)
    lines = max(len(texts) for _, texts in photos)
    font = 9.5 if max(len(text) for _, texts in photos for text, _ in texts) <= 34 else 8.2
    figure, grid = plt.subplots(
        count,
        columns,
        figsize=(WIDTH, count * (WIDTH / columns * 0.97 + 0.23 * lines + 0.1) + (0.4 if heading else 0)),
        squeeze=False,
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (path, texts) in zip(grid.flat, photos, strict=False):
        # Padded to squares, so that the captions of a row stand on one line.
        axes.imshow(ImageOps.pad(open_image(path), (SIDE, SIDE), color=PALE))
        for number, (text, hue) in enumerate(texts):
            axes.text(
                0.5,
                -0.02 - 0.08 * number,
                textwrap.shorten(text, 46, placeholder="…"),
                color=hue,
                ha="center",
                va="top",
                fontsize=font,
                transform=axes.transAxes,
            )
    if heading:
        figure.suptitle(heading, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def mistakes_figure(o: Outcomes, image_root: Path, priority: Sequence[str] = (), most: int = 12) -> Figure:
    """The mistakes that the model was surest of, at most two of one breed."""
    rows = mistakes(o, most)
    photos = []
    for i in rows:
        true = breed_label(o.breeds[o.true[i]], o.breeds[o.true[i]] in priority)
        said = (
            "no breed"
            if o.predicted[i] == NO_ANSWER
            else breed_label(o.breeds[o.predicted[i]], o.breeds[o.predicted[i]] in priority)
        )
        sure = f" ({o.confidence[i]:.0%})" if o.log_probs is not None else ""
        photos.append((inside(image_root, o.images[i]), [(f"true: {true}", INK), (f"said {said}{sure}", RED)]))
    return photo_panel(photos, heading=f"{short(o.name)}: the mistakes that it is surest of")


def mistakes(o: Outcomes, most: int) -> np.ndarray:
    """Rows of wrong answers, the surest first, at most two of one true breed."""
    wrong = np.flatnonzero(~o.correct)
    sure = o.confidence[wrong] if o.log_probs is not None else np.zeros(len(wrong))
    chosen: list[int] = []
    for i in wrong[np.argsort(-sure, kind="stable")]:
        if sum(o.true[j] == o.true[i] for j in chosen) < 2:
            chosen.append(int(i))
    return np.array(chosen[:most], dtype=int)


def mistakes_sentence(o: Outcomes) -> str:
    """What the mistakes are: how many, and in how many of them the true breed came second."""
    wrong = np.flatnonzero(~o.correct)
    if not len(wrong):
        return f"{title(o.name, first=True)} has all {len(o)} photos right."
    said = f"{title(o.name, first=True)} is wrong on {len(wrong)} of {len(o)} photos"
    if o.log_probs is None:
        return said + "."
    rank = (o.log_probs[wrong] > o.log_probs[wrong, o.true[wrong]][:, None]).sum(axis=1)
    return (
        f"{said}; in {(rank == 1).mean():.0%} of these the true breed came second, in "
        f"{(rank <= 2).mean():.0%} among the first three."
    )


def disagreement_figure(
    comparison: Mapping[str, Any], image_root: Path, priority: Sequence[str] = (), most: int = 12
) -> Figure:
    """The photos on which two models differ most, with what each of them says: blue is right, orange is wrong."""
    photos = []
    for row in comparison["disagreements"][:most]:
        texts = [(f"true: {breed_label(row['breed'], row['breed'] in priority)}", INK)]
        for side in ("a", "b"):
            said = "no breed" if row[side] is None else breed_label(row[side], row[side] in priority)
            texts.append((f"{short(comparison[side])}: {said}", BLUE if row[side] == row["breed"] else RED))
        photos.append((inside(image_root, row["image"]), texts))
    return photo_panel(photos, heading="Where the two disagree most (blue: right, orange: wrong)")


def disagreement_sentence(comparison: Mapping[str, Any]) -> str:
    """How often the two agree, who is right where they differ, and what a perfect choice between them would reach."""
    a, b, n = title(comparison["a"]), title(comparison["b"]), comparison["n"]
    return (
        f"The two say the same for {comparison['agreement']:.0%} of the photos; only {a} is right on "
        f"{comparison['only_a_right']}, only "
        f"{b} on {comparison['only_b_right']} of {n}; whoever always picked the right one would reach "
        f"{comparison['oracle_accuracy']:.1%}."
    )
