"""Panels of photos: a model's mistakes, photos that two models name differently, and what drove an answer."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from catlib.breeds import describe, find
from catlib.classifiers.explain import Explanation
from catlib.classifiers.tracks import track
from catlib.colors import BLUE, INK, PALE, RED
from catlib.data.images import inside, open_image
from catlib.evaluation.outcomes import NO_ANSWER, Outcomes
from catlib.evaluation.tables import Entry
from catlib.figures import WIDTH, breed_label, figure

SIDE = 320  # pixels: photos are reduced to this before they go into a figure, or the report would weigh tens of MB
LITTLE = 0.05  # nats; a fall below it changes a probability by less than 5 %
Photo = tuple[Path, Sequence[tuple[str, str]]]  # a file and the lines of (text, colour) below it


def _panel(photos: Sequence[Photo], heading: str, columns: int = 4) -> Figure:
    if not photos:
        fig = plt.figure(figsize=(WIDTH, 0.8))
        fig.text(0.02, 0.5, "no such photos", va="center")
        return fig
    count, lines = -(-len(photos) // columns), max(len(texts) for _, texts in photos)
    font = 9.5 if max(len(text) for _, texts in photos for text, _ in texts) <= 34 else 8.2
    height = count * (WIDTH / columns * 0.97 + 0.23 * lines + 0.1) + 0.4
    fig, grid = plt.subplots(count, columns, figsize=(WIDTH, height), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (path, texts) in zip(grid.flat, photos, strict=False):
        # Padded to squares, so that the captions of a row stand on one line.
        axes.imshow(ImageOps.pad(open_image(path), (SIDE, SIDE), color=PALE))
        for i, (text, hue) in enumerate(texts):
            short, style = textwrap.shorten(text, 46, placeholder="…"), {"ha": "center", "va": "top", "fontsize": font}
            axes.text(0.5, -0.02 - 0.08 * i, short, color=hue, transform=axes.transAxes, **style)
    fig.suptitle(heading, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return fig


def _named(breed: str | None, priority: Sequence[str]) -> str:
    return "no breed" if breed is None else breed_label(breed, breed in priority)


@figure
def mistakes(o: Outcomes, image_root: Path, priority: Sequence[str] = (), most: int = 12) -> tuple[Figure, str]:
    """The mistakes that the model was surest of, at most two of one breed."""
    photos: list[Photo] = []
    shown: Counter[int] = Counter()
    wrong, scored = np.flatnonzero(~o.correct), o.log_probs is not None
    for i in wrong[np.argsort(-o.confidence[wrong], kind="stable")] if scored else wrong:
        shown[o.true[i]] += 1
        if shown[o.true[i]] > 2 or len(photos) == most:
            continue
        true, said = o.breeds[o.true[i]], None if o.predicted[i] == NO_ANSWER else o.breeds[o.predicted[i]]
        sure = f" ({o.confidence[i]:.0%})" if scored else ""
        lines = [(f"true: {_named(true, priority)}", INK), (f"said {_named(said, priority)}{sure}", RED)]
        photos.append((inside(image_root, o.images[i]), lines))
    fig = _panel(photos, f"{track(o.name).short}: the mistakes that it is surest of")
    if not len(wrong):
        return fig, f"{track(o.name).first} has all {len(o)} photos right."
    caption = f"{track(o.name).first} is wrong on {len(wrong)} of {len(o)} photos"
    if o.log_probs is None:
        return fig, caption + "."
    rank = (o.log_probs[wrong] > o.log_probs[wrong, o.true[wrong]][:, None]).sum(axis=1)
    second, third = (f"{(rank <= most).mean():.0%}" for most in (1, 2))
    return fig, f"{caption}; in {second} of these the true breed came second, in {third} among the first three."


@figure
def disagreements(
    comparison: Entry, image_root: Path, priority: Sequence[str] = (), most: int = 12
) -> tuple[Figure, str]:
    """The photos on which two models differ most, with what each of them says: blue is right, orange is wrong."""
    photos: list[Photo] = []
    for row in comparison["disagreements"][:most]:
        lines = [(f"true: {_named(row['breed'], priority)}", INK)]
        for side in ("a", "b"):
            said = f"{track(comparison[side]).short}: {_named(row[side], priority)}"
            lines.append((said, BLUE if row[side] == row["breed"] else RED))
        photos.append((inside(image_root, row["image"]), lines))
    a, b, c = track(comparison["a"]).title, track(comparison["b"]).title, comparison
    return _panel(photos, "Where the two disagree most (blue: right, orange: wrong)"), (
        f"The two say the same for {c['agreement']:.0%} of the photos; only {a} is right on {c['only_a_right']}, only {b} on "
        f"{c['only_b_right']} of {c['n']}; whoever always picked the right one would reach {c['oracle_accuracy']:.1%}."
    )


@figure
def explanations(rows: Sequence[Explanation]) -> tuple[Figure, str]:
    """Which parts of a photo drove the answer: the photo, the heat map over it, answer and traits in words."""
    fig = plt.figure(figsize=(WIDTH, 2.75 * max(len(rows), 1)))
    grid = fig.subplots(len(rows), 3, width_ratios=(1, 1, 2.05), squeeze=False) if rows else ()
    for (left, middle, right), row in zip(grid, rows, strict=True):
        left.imshow(row.seen)
        left.set_title(row.breed or "breed not known", fontsize=10.5, loc="center")
        _draw_heat(middle, row)
        hue = INK if row.breed is None else BLUE if row.right else RED
        judged = "" if row.breed is None else f" – {'right' if row.right else 'wrong'}"
        right.set_title(f"predicted: {row.predicted}, {row.probability:.0%} sure{judged}", fontsize=10.5, color=hue)
        right.text(0, 0.99, _words(row), va="top", fontsize=10, linespacing=1.4, transform=right.transAxes)
        for axes in (left, middle, right):
            axes.set_axis_off()
    return fig, _evidence(rows)


def _draw_heat(axes: Axes, row: Explanation) -> None:
    axes.imshow(row.seen.convert("L"), cmap="gray", vmin=-60, vmax=315)  # paler, so that the map stands out
    limit = float(np.quantile(np.abs(row.heat), 0.99)) or 1.0  # a single extreme patch would leave all others pale
    heat = np.array(Image.fromarray(row.heat.astype(np.float32)).resize(row.seen.size, Image.Resampling.BICUBIC))
    strength = np.clip(np.abs(heat) / limit, 0, 1)
    axes.imshow(heat, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.85 * strength)
    axes.set_title(f"against {breed_label(row.rival, False)}", fontsize=10.5, loc="center")


def _words(row: Explanation) -> str:
    def standard(name: str) -> str:
        return describe(name) if find(name) else "not in the list of breeds"

    parts = [f'in its own words: "{row.answer}"', f"the breed's standard: {standard(row.predicted)}"]
    if row.breed and not row.right:
        parts.append(f"standard of {row.breed}: {standard(row.breed)}")
    falls = [f"{round(-fall, 2) + 0.0:+.2f}" for fall in (row.fall, row.random_fall)]  # adding 0.0 makes -0.0 plain 0
    parts.append(f"hiding the strongest tenth: {falls[0]} nats; a random tenth: {falls[1]}")
    return "\n".join(textwrap.fill(part, 68, max_lines=5, placeholder=" …") for part in parts)


def _evidence(rows: Sequence[Explanation]) -> str:
    """How concentrated the evidence is, for right and for wrong answers, and whether the maps mark what the model uses."""
    if not rows:
        return "No photo was explained."
    kinds = {"right": [r for r in rows if r.right], "wrong": [r for r in rows if not r.right]}
    shares = " and ".join(
        f"{np.mean([_top_tenth(r.heat) for r in own]):.0%} for the {len(own)} {kind} answer{'s' if len(own) > 1 else ''}"
        for kind, own in kinds.items()
        if own
    )
    fall, other = (float(np.mean(falls)) for falls in zip(*((r.fall, r.random_fall) for r in rows), strict=True))
    passed = sum(row.fall > row.random_fall for row in rows)
    sound = passed > len(rows) / 2 and fall > other
    judged = "the maps mark what the model uses" if sound else "the maps cannot be trusted"
    if fall > other and fall < LITTLE:
        judged += ", though no tenth of a photo decides much where the model is this sure"
    return (
        f"The strongest tenth of the patches holds {shares} of the evidence for the breed. Hiding it takes {fall:.2f} nats off "
        f"the breed's lead over the next, hiding as many random patches {round(other, 2) + 0.0:.2f}; it takes more in {passed} of "
        f"{len(rows)} photos: {judged}."
    )


def _top_tenth(heat: np.ndarray) -> float:
    """Share of the positive evidence in the strongest tenth of the patches; 0.1 when it is spread evenly."""
    positive = np.sort(np.maximum(heat, 0).ravel())[::-1]
    return float(positive[: max(1, len(positive) // 10)].sum() / max(positive.sum(), 1e-12))
