"""The figures of notebook 01: counts, sizes, samples, near-duplicates, the worst files, and what the test can tell."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from catlib.data.audit import Finding
from catlib.data.dataset import PARTS, Dataset
from catlib.data.images import inside, open_image
from catlib.data.inspection import TOO_WIDE, counts, f1_width
from catlib.data.inspection_pairs import Pair, one_of_each_group
from catlib.figures import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PALE,
    PRIORITY,
    RED,
    SKY,
    WIDTH,
    breed_label,
    mark_priority,
    row_font,
    styled,
)

COLORS = {"train": BLUE, "val": SKY, "test": ORANGE}
NAMES = {"train": "training", "val": "validation", "test": "test"}
SIDE = 150  # pixels of a photo in a figure
PHOTO_DPI = 100  # photos make large PNGs: so a page with hundreds of them stays at a few MB
LONGEST = 24  # characters of a file's name below its photo
MOST_BREEDS = 24  # rows of the sample grid


@styled
def counts_figure(dataset: Dataset) -> Figure:
    """Photos of each breed in each part, the rarest last; priority breeds in bold with a star."""
    table = counts(dataset)
    rows = np.arange(len(table))[::-1]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.3 + 0.24 * len(table)))
    left = np.zeros(len(table))
    for part in PARTS:
        width = np.array([n[part] for n in table.values()])
        axes.barh(rows, width, left=left, color=COLORS[part], label=NAMES[part], height=0.78)
        left += width
    for row, total in zip(rows, left, strict=True):
        axes.text(
            total + left.max() * 0.008, row, f"{total:.0f}", va="center", fontsize=row_font(len(table)) - 1, color=INK
        )
    flags = [breed in dataset.priority_breeds for breed in table]
    labels = [breed_label(breed, flag) for breed, flag in zip(table, flags, strict=True)]
    axes.set_yticks(rows, labels, fontsize=row_font(len(table)))
    mark_priority(axes.get_yticklabels(), flags)
    axes.grid(axis="y", visible=False)
    axes.set(
        xlabel="photos", ylim=(-0.7, len(table) - 0.3), xlim=(0, left.max() * 1.07), title="Photos by breed and part"
    )
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=len(PARTS))
    return figure


@styled
def sizes_figure(findings: Sequence[Finding]) -> Figure:
    """Shorter sides and aspect ratios of the kept photos."""
    kept = [finding for finding in findings if finding.kept and finding.width]
    short = np.array([min(f.width, f.height) for f in kept])
    aspect = np.array([f.width / f.height for f in kept])
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.2))
    left.hist(short, bins=np.linspace(0, short.max() * 1.05, 50), color=BLUE)
    left.set(xlabel="shorter side, pixels", ylabel="photos", title="Sizes")
    if short.min() < 336 < 2 * short.max():
        left.axvline(336, color=RED, linestyle="--", linewidth=1.5)
        left.annotate(
            "336: LLaVA-1.5's tower",
            (336, 0.96),
            xycoords=("data", "axes fraction"),
            xytext=(-5, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            color=RED,
            fontsize=8.5,
        )
    right.hist(np.log2(aspect), bins=np.linspace(-2, 2, 49), color=BLUE)
    right.set_xticks(range(-2, 3), ["1 : 4", "1 : 2", "square", "2 : 1", "4 : 1"])
    right.set(xlabel="width : height", title="Aspect ratios")
    return figure


@styled
def samples_figure(dataset: Dataset, seed: int = 0, columns: int = 7) -> Figure:
    """Training photos of each breed in a row; of more than MOST_BREEDS breeds the priority ones and an even choice of the others."""
    breeds = _choose(list(counts(dataset)), dataset.priority_breeds)
    rng = np.random.default_rng(seed)
    size = (WIDTH, len(breeds) * (WIDTH - 1.9) / columns)
    figure, grid = plt.subplots(len(breeds), 1, figsize=size, dpi=PHOTO_DPI, squeeze=False)
    for axes, breed in zip(grid[:, 0], breeds, strict=True):
        paths = [inside(dataset.image_root, sample.image) for sample in dataset.train if sample.breed == breed]
        chosen = [paths[i] for i in rng.permutation(len(paths))[:columns]]
        axes.imshow(_strip(chosen, columns))
        _bare(axes)
        flag = breed in dataset.priority_breeds
        label = breed_label(breed, flag).replace(" ", "\n")
        axes.set_ylabel(
            label,
            rotation=0,
            ha="right",
            va="center",
            color=PRIORITY if flag else INK,
            fontweight="bold" if flag else "normal",
        )
    return figure


@styled
def pairs_figure(pairs: Sequence[Pair], image_root: Path, most: int = 12) -> Figure:
    """Pairs side by side with their files, parts and the number of bits in which their hashes differ: of more than `most`, one of
    each group and then an even choice, the closest first."""
    spread = sorted(
        one_of_each_group(pairs)[: max(most, len({a.group for a, _, _ in pairs}))], key=lambda pair: pair[2]
    )
    chosen = [spread[i * len(spread) // min(most, len(spread))] for i in range(min(most, len(spread)))]
    captions = []
    for a, b, bits in chosen:
        breeds = a.breed if a.breed == b.breed else f"{a.breed} / {b.breed}"
        places = [finding.part or "left out" for finding in (a, b)]
        parts = places[0] if places[0] == places[1] else " / ".join(places)
        text = f"{breeds}, {parts}, {bits} bit{'' if bits == 1 else 's'}\n{_name(a)}  |  {_name(b)}"
        captions.append((text, INK if a.breed == b.breed else RED))
    strips = [_strip([inside(image_root, a.image), inside(image_root, b.image)], 2) for a, b, _ in chosen]
    return _panels(strips, captions, 3, 0.5)


@styled
def worst_figure(files: Sequence[tuple[Finding, str]], image_root: Path) -> Figure:
    """Photos with the reason why they are shown."""
    strips = [_strip([inside(image_root, finding.image)], 1) for finding, _ in files]
    captions = [(f"{finding.breed.split(' - ')[0]}, {reason}\n{_name(finding)}", INK) for finding, reason in files]
    return _panels(strips, captions, 4, 1.0)


@styled
def widths_figure(dataset: Dataset) -> Figure:
    """How wide the interval of a breed's F1 is at the number of its test photos."""
    support: Mapping[str, int] = {breed: n["test"] for breed, n in counts(dataset).items()}
    top = max(30, *support.values())
    figure, axes = plt.subplots(figsize=(WIDTH, 3.4))
    grid = np.unique(np.geomspace(2, top * 1.1, 40).astype(int))
    axes.plot(grid, [100 * f1_width(int(n)) for n in grid], color=GREY, linewidth=1.5, zorder=1)
    for flag, hue, marker, name in ((False, BLUE, "o", "other breeds"), (True, PRIORITY, "*", "priority breeds")):
        shown = [n for breed, n in support.items() if (breed in dataset.priority_breeds) == flag]
        if shown:
            size = 90 if flag else 32
            axes.scatter(
                shown, [100 * f1_width(n) for n in shown], color=hue, marker=marker, s=size, label=name, zorder=2 + flag
            )
    axes.axhspan(100 * TOO_WIDE, 105, color=RED, alpha=0.07)
    axes.text(
        top * 1.1,
        100 * TOO_WIDE + 2,
        "too wide to tell a good model from a middling one",
        color=RED,
        ha="right",
        fontsize=9,
    )
    axes.set(xlabel="test photos of the breed", ylabel="points", ylim=(0, 105), xlim=(0, top * 1.12))
    axes.set_title("Width of the 95 % interval of a breed's F1 (true F1 70 %)")
    axes.legend(loc="lower left")
    return figure


def _choose(breeds: list[str], priority: Sequence[str]) -> list[str]:
    """At most MOST_BREEDS of the breeds, in their order."""
    others = [breed for breed in breeds if breed not in priority]
    room = max(0, MOST_BREEDS - len(priority))
    kept = set(priority) | {others[i * len(others) // room] for i in range(min(room, len(others)))}
    return [breed for breed in breeds if breed in kept][:MOST_BREEDS] if len(breeds) > MOST_BREEDS else breeds


def _name(finding: Finding) -> str:
    """The file's name, its beginning left out where it is long."""
    name = Path(finding.image).name
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _strip(paths: Sequence[Path], columns: int) -> Image.Image:
    """Photos side by side, each padded to a square."""
    gap = 6
    strip = Image.new("RGB", (columns * SIDE + (columns - 1) * gap, SIDE), "white")
    for place, path in enumerate(paths):
        strip.paste(ImageOps.pad(open_image(path), (SIDE, SIDE), color=PALE), (place * (SIDE + gap), 0))
    return strip


def _panels(strips: Sequence[Image.Image], captions: Sequence[tuple[str, str]], columns: int, shape: float) -> Figure:
    """Strips in a grid with a caption below each; `shape` is the height of a strip beside its width."""
    if not strips:
        figure, axes = plt.subplots(figsize=(WIDTH, 0.6))  # without axes, a notebook shows no figure at all
        axes.set_axis_off()
        axes.text(0.0, 0.5, "nothing to show", va="center", color=GREY)
        return figure
    count = -(-len(strips) // columns)
    height = count * (WIDTH / columns * shape + 0.55)
    figure, grid = plt.subplots(count, columns, figsize=(WIDTH, height), dpi=PHOTO_DPI, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, strip, (text, hue) in zip(grid.flat, strips, captions, strict=False):
        axes.imshow(strip)
        axes.text(0.5, -0.03, text, color=hue, ha="center", va="top", fontsize=9, transform=axes.transAxes)
    return figure


def _bare(axes: plt.Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
