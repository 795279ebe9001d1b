"""The figures of notebook 01: counts, sizes, samples, near-duplicates, the worst files, and what the test can tell."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from catlib.data.dataset import Dataset
from catlib.data.duplicates import close_pairs
from catlib.data.findings import Finding
from catlib.data.images import inside, open_image
from catlib.data.records import PARTS
from catlib.data.splits import MOST_BITS
from catlib.data.tables import SUPPOSED_F1, TOO_WIDE, by_breed, f1_width
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
    figure,
    mark_priority,
    row_font,
)

COLORS: dict[Any, Any] = dict(zip(PARTS, (BLUE, SKY, ORANGE), strict=True))
TOWER = 336  # pixels of the square that LLaVA-1.5's vision tower reads
UNUSUAL_ASPECT = 1.6  # longer side over shorter; camera formats end at 16 : 9, most photos at 3 : 2
SIDE = 150  # pixels of a photo in a figure
PHOTO_DPI = 100  # photos make large PNGs: so a page with hundreds of them stays at a few MB
LONGEST = 24  # characters of a file's name below its photo
MOST_BREEDS = 24  # rows of the sample grid
BEYOND = 4  # bits beyond the limit up to which pairs are looked for that were not joined
Pair = tuple[Finding, Finding, int]  # two photos and the number of bits in which their hashes differ
Panel = tuple[Sequence[Path], str, str]  # photos that stand side by side, the text below them and its colour


@figure
def counts(dataset: Dataset) -> tuple[Figure, str]:
    """Photos of each breed in each part, the rarest last; priority breeds in bold with a star."""
    table = by_breed(dataset)
    drawn, axes = plt.subplots(figsize=(WIDTH, 1.3 + 0.24 * len(table)))
    font = row_font(len(table))
    table.iloc[::-1][list(PARTS)].plot.barh(ax=axes, stacked=True, color=COLORS, width=0.78)
    for row, total in enumerate(table["all"].tolist()[::-1]):
        axes.text(total, row, f" {total}", va="center", fontsize=font - 1, color=INK)
    flags = table["priority"].tolist()[::-1]
    axes.set_yticklabels([breed_label(b, f) for b, f in zip(table.index[::-1], flags, strict=True)], fontsize=font)
    mark_priority(axes.get_yticklabels(), flags)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="photos", ylabel="", xlim=(0, table["all"].max() * 1.07), title="Photos by breed and part")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(PARTS))
    train = table["train"]
    total = ", ".join(f"{table[part].sum():,} {part}" for part in PARTS)
    return drawn, (
        f"{len(table)} breeds, {total} photos. {train.idxmax()} has {train.max()} training photos, {train.idxmin()} {train.min()}: "
        f"{train.max() / max(1, train.min()):.1f} to 1."
    )


@figure
def sizes(findings: Sequence[Finding]) -> tuple[Figure, str]:
    """Shorter sides and aspect ratios of the kept photos."""
    kept = [finding for finding in findings if finding.kept and finding.width]
    short = np.array([min(f.width, f.height) for f in kept])
    aspect = np.array([f.width / f.height for f in kept])
    drawn, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.2))
    sns.histplot(x=short, bins=50, binrange=(0, short.max() * 1.05), color=BLUE, alpha=1, ax=left)
    left.set(xlabel="shorter side, pixels", ylabel="photos", title="Sizes")
    if short.min() < TOWER < 2 * short.max():
        left.axvline(TOWER, color=RED, linestyle="--", linewidth=1.5)
        top = left.get_xaxis_transform()
        left.text(TOWER, 0.96, "LLaVA-1.5's tower ", transform=top, rotation=90, ha="right", va="top", color=RED)
    sns.histplot(x=np.log2(aspect), bins=48, binrange=(-2, 2), color=BLUE, alpha=1, ax=right)
    right.set_xticks(range(-2, 3), ["1 : 4", "1 : 2", "square", "2 : 1", "4 : 1"])
    right.set(xlabel="width : height", ylabel="", title="Aspect ratios")
    wide = np.mean(np.abs(np.log2(aspect)) > 1)
    return drawn, (
        f"Half of the photos have a shorter side of at most {np.median(short):.0f} pixels, {100 * np.mean(short < TOWER):.0f} % are below "
        f"the {TOWER} that LLaVA-1.5's tower reads and are enlarged, {100 * wide:.1f} % are more than twice as long as wide."
    )


@figure
def samples(dataset: Dataset, seed: int = 0, columns: int = 7) -> tuple[Figure, str]:
    """Training photos of each breed in a row; of more than MOST_BREEDS breeds the priority ones and an even choice of the others."""
    breeds = choose(by_breed(dataset).index.tolist(), dataset.priority_breeds)
    rng = np.random.default_rng(seed)
    size = (WIDTH, len(breeds) * (WIDTH - 1.9) / columns)
    drawn, grid = plt.subplots(len(breeds), 1, figsize=size, dpi=PHOTO_DPI, squeeze=False)
    for axes, breed in zip(grid[:, 0], breeds, strict=True):
        paths = [inside(dataset.image_root, sample.image) for sample in dataset.train if sample.breed == breed]
        axes.imshow(_strip([paths[i] for i in rng.permutation(len(paths))[:columns]], columns))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        flag = breed in dataset.priority_breeds
        weight = "bold" if flag else "normal"
        label = breed_label(breed, flag).replace(" ", "\n")
        axes.set_ylabel(label, rotation=0, ha="right", va="center", color=PRIORITY if flag else INK, fontweight=weight)
    return drawn, f"Training photos of {len(breeds)} of {len(dataset.breeds)} breeds, drawn at random with seed {seed}."


@figure
def pairs(findings: Sequence[Finding], image_root: Path, bits: int, most: int = 12) -> tuple[Figure, str]:
    """Near-duplicates side by side with their files, parts and the number of bits in which their hashes differ; in grey, the closest
    pairs that were not joined."""
    joined, beyond = pairs_to_show(findings, bits, most)
    shown = [(pair, RED if pair[0].breed != pair[1].breed else INK) for pair in joined] + [
        (pair, GREY) for pair in beyond
    ]
    panels = []
    for (a, b, gap), hue in shown:
        breeds, places = dict.fromkeys((a.breed, b.breed)), dict.fromkeys(f.part or "left out" for f in (a, b))
        where = "not joined" if hue == GREY else " / ".join(places)
        text = f"{' / '.join(breeds)}, {where}, {gap} bit{'' if gap == 1 else 's'}\n{_name(a)}  |  {_name(b)}"
        panels.append(([inside(image_root, finding.image) for finding in (a, b)], text, hue))
    groups = [n for n in Counter(finding.group for finding in findings if finding.group).values() if n > 1]
    if not groups:
        return _panels(panels, 3), f"No two photos are near-duplicates (hashes at most {bits} bits apart)."
    by_id = ", or show one cat by its id" if any(finding.animal for finding in findings) else ""
    across = sum(a.breed != b.breed for a, b, _ in close_pairs(findings, bits))
    doubt = f" {across} of the pairs carry two different breeds (red): look at their labels." if across else ""
    return _panels(panels, 3), (
        f"{sum(groups):,} photos are alike (hashes at most {bits} bits apart{by_id}): groups of up to {max(groups)}, each kept in one "
        f"part.{doubt}"
    )


@figure
def worst(findings: Sequence[Finding], image_root: Path) -> tuple[Figure, str]:
    """The kept photos from which a model can learn least: the smallest, and the longest beside their width."""
    files = worst_files(findings)
    panels = [
        ([inside(image_root, f.image)], f"{f.breed.split(' - ')[0]}, {reason}\n{_name(f)}", INK) for f, reason in files
    ]
    long = sum(_aspect(f) > UNUSUAL_ASPECT for f in findings if f.kept)
    return _panels(panels, 4), f"{long:,} of the kept photos have sides of more than {UNUSUAL_ASPECT} : 1."


@figure
def widths(dataset: Dataset) -> tuple[Figure, str]:
    """How wide the interval of a breed's F1 is at the number of its test photos."""
    table = by_breed(dataset)
    top = max(30, table["test"].max())
    drawn, axes = plt.subplots(figsize=(WIDTH, 3.4))
    grid = np.unique(np.geomspace(2, top * 1.1, 40).astype(int))
    axes.plot(grid, [100 * f1_width(int(n)) for n in grid], color=GREY, linewidth=1.5, zorder=1)
    for flag, hue, marker, size, name in (
        (False, BLUE, "o", 32, "other breeds"),
        (True, PRIORITY, "*", 90, "priority breeds"),
    ):
        if len(mine := table[table["priority"] == flag]):
            axes.scatter(
                mine["test"], 100 * mine["width"], color=hue, marker=marker, s=size, label=name, zorder=2 + flag
            )
    axes.axhspan(100 * TOO_WIDE, 105, color=RED, alpha=0.07)
    text = "too wide to tell a good model from a middling one"
    axes.text(top * 1.1, 100 * TOO_WIDE + 2, text, color=RED, ha="right", fontsize=9)
    axes.set(xlabel="test photos of the breed", ylabel="points", ylim=(0, 105), xlim=(0, top * 1.12))
    axes.set_title(f"Width of the 95 % interval of a breed's F1 (true F1 {100 * SUPPOSED_F1:.0f} %)")
    axes.legend(loc="lower left")
    wide = sum(table["width"] > TOO_WIDE)
    small = f"{wide} of {len(table)} breeds cannot be measured alone" if wide else "Every breed can be measured"
    return drawn, (
        f"{small} within ± {50 * TOO_WIDE:.0f} points of F1; the widest interval, {100 * table['width'].max():.0f} points, is that of "
        f"{table['width'].idxmax()} with {table['test'].min()} test photos."
    )


def worst_files(findings: Sequence[Finding], most: int = 8) -> list[tuple[Finding, str]]:
    """The photos of `worst`, each with the reason."""
    kept = [finding for finding in findings if finding.kept and finding.width]
    usual = np.median([min(f.width, f.height) for f in kept]) if kept else 0
    small = [f for f in kept if min(f.width, f.height) < usual]  # where all are of one size, none is worth showing
    small = sorted(small, key=lambda f: (min(f.width, f.height), f.image))[: most // 2]
    long = sorted((f for f in kept if _aspect(f) > UNUSUAL_ASPECT), key=lambda f: (-_aspect(f), f.image))
    chosen = [(f, f"{f.width} × {f.height} pixels") for f in small]
    return chosen + [(f, f"sides {_aspect(f):.1f} : 1") for f in long if f not in small][: most - len(chosen)]


def pairs_to_show(findings: Sequence[Finding], bits: int, most: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs of near-duplicates, and a row of the closest pairs that were not joined: whether the limit is in the right place.

    Of more than `most` together every group has its turn, then an even choice is shown, the closest first.
    """
    close = close_pairs(findings, min(MOST_BITS, bits + BEYOND))
    beyond = [pair for pair in close if pair[0].group != pair[1].group][:3]
    seen: Counter[str] = Counter()
    turns = []
    for pair in close:
        if pair[0].group == pair[1].group and pair[2] <= bits:
            turns.append((seen[pair[0].group], pair))
            seen[pair[0].group] += 1
    room = most - len(beyond)
    first = [pair for _, pair in sorted(turns, key=lambda item: item[0])][: max(room, len(seen))]
    spread = sorted(first, key=lambda pair: pair[2])
    return [spread[i * len(spread) // min(room, len(spread))] for i in range(min(room, len(spread)))], beyond


def choose(breeds: list[str], priority: Sequence[str]) -> list[str]:
    """At most MOST_BREEDS of the breeds, in their order: the priority breeds and an even choice of the others."""
    others = [breed for breed in breeds if breed not in priority]
    room = max(0, MOST_BREEDS - len(priority))
    kept = set(priority) | {others[i * len(others) // room] for i in range(min(room, len(others)))}
    return [breed for breed in breeds if breed in kept][:MOST_BREEDS] if len(breeds) > MOST_BREEDS else breeds


def _aspect(finding: Finding) -> float:
    return max(finding.width, finding.height) / max(1, min(finding.width, finding.height))


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


def _panels(panels: Sequence[Panel], columns: int) -> Figure:
    """Photos in a grid with a text below each."""
    if not panels:
        drawn, axes = plt.subplots(figsize=(WIDTH, 0.6))  # without axes, a notebook shows no figure at all
        axes.set_axis_off()
        axes.text(0.0, 0.5, "nothing to show", va="center", color=GREY)
        return drawn
    rows = -(-len(panels) // columns)
    height = rows * (WIDTH / columns / len(panels[0][0]) + 0.55)
    drawn, grid = plt.subplots(rows, columns, figsize=(WIDTH, height), dpi=PHOTO_DPI, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (paths, text, hue) in zip(grid.flat, panels, strict=False):
        axes.imshow(_strip(paths, len(paths)))
        axes.text(0.5, -0.03, text, color=hue, ha="center", va="top", fontsize=9, transform=axes.transAxes)
    return drawn
