"""The figures of notebook 01: counts, what photos are like, samples, near-duplicates, doubted labels, nearness to training."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from catlib.colors import BLUE, GREY, INK, ORANGE, PALE, RED, SKY
from catlib.data.dataset import Dataset
from catlib.data.duplicates import close_pairs
from catlib.data.findings import Finding
from catlib.data.images import inside, open_image
from catlib.data.nearness import MEASURES, UNRELATED, warnings_of
from catlib.data.records import PARTS
from catlib.data.splits import MOST_BITS
from catlib.data.suspects import Suspects
from catlib.data.tables import by_breed
from catlib.figures import WIDTH, breed_label, figure, mark_priority, row_font

COLORS: dict[Any, Any] = {**dict(zip(PARTS, (BLUE, SKY, ORANGE), strict=True)), UNRELATED: GREY}
TOWER = 336  # pixels of the square that the plan's base model reads
SIDE, GAP = 150, 6  # pixels of a photo in a figure, and between two of them
PHOTO_DPI = 100  # photos make large PNGs: so a page with hundreds of them stays at a few MB
LONGEST = 24  # characters of a file's name below its photo
MOST_BREEDS = 24  # rows of the sample grid
BEYOND = 4  # bits beyond the limit up to which pairs are looked for that were not joined
LIKE: dict[str, tuple[str, tuple[str, ...]]] = {  # measure of a photo → title of its histogram, ends worth a look
    "side": ("shorter side, pixels", ("nsmallest",)),
    "aspect": ("longer side : shorter side", ("nlargest",)),
    "brightness": ("brightness, grey levels", ("nsmallest", "nlargest")),
    "contrast": ("contrast, grey levels", ("nsmallest",)),
    "sharpness": ("sharpness", ("nsmallest",)),
    "entropy": ("information, bits", ("nsmallest",)),
    "border": ("uniform border, share", ("nlargest",)),
}
Pair = tuple[Finding, Finding, int]  # two photos and the number of bits in which their hashes differ
Panel = tuple[Sequence[str], str, str]  # photos that stand side by side, the text below them and its colour


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
    train, total = table["train"], ", ".join(f"{table[part].sum():,} {part}" for part in PARTS)
    ends = f"{train.idxmax()} has {train.max()} training photos, {train.idxmin()} {train.min()}"
    uneven = f"{train.max() / max(1, train.min()):.1f} to 1"
    return drawn, f"{len(table)} breeds, {total} photos. {ends}: {uneven}."


@figure
def quality(findings: Sequence[Finding]) -> tuple[Figure, str]:
    """What the kept photos are like: sizes, shapes, brightness, contrast, sharpness, information and borders."""
    like = _like(findings)
    drawn, grid = plt.subplots(2, 4, figsize=(WIDTH, 4.6))
    for axes, (name, (title, _)) in zip(grid.flat, LIKE.items(), strict=False):
        sns.histplot(x=like[name], bins=40, color=BLUE, alpha=1, ax=axes)
        axes.set(xlabel=title, ylabel="")
    grid.flat[-1].set_axis_off()
    side, said = like["side"], Counter(text for f in findings if f.kept for text in f.quality.split(", ") if text)
    remarked = ", ".join(f"{n:,} {text}" for text, n in said.most_common()) or "none"
    return drawn, (
        f"Half of the photos have a shorter side of at most {side.median():.0f} pixels, {100 * (side < TOWER).mean():.0f} % are below the "
        f"{TOWER} that the plan's base model reads and are enlarged. Beyond the limits of the setting quality: {remarked}."
    )


@figure
def worst(findings: Sequence[Finding], image_root: Path) -> tuple[Figure, str]:
    """The kept photos from which a model can learn least, those at the ends of each measure."""
    panels = [((f.image,), f"{f.breed.split(' - ')[0]}\n{why}", INK) for f, why in worst_files(findings)]
    beyond = sum(bool(f.quality) for f in findings if f.kept)
    said = f"{beyond:,} of the kept photos are beyond a limit of the setting quality."
    return _panels(image_root, panels, 5), said


@figure
def samples(dataset: Dataset, seed: int = 0, columns: int = 7) -> tuple[Figure, str]:
    """Training photos of each breed in a row; of more than MOST_BREEDS breeds the priority ones and an even choice of the others."""
    breeds = choose(by_breed(dataset).index.tolist(), dataset.priority_breeds)
    rng = np.random.default_rng(seed)
    size = (WIDTH, len(breeds) * (WIDTH - 1.9) / columns)
    drawn, grid = plt.subplots(len(breeds), 1, figsize=size, dpi=PHOTO_DPI, squeeze=False)
    for axes, breed in zip(grid[:, 0], breeds, strict=True):
        images = [sample.image for sample in dataset.train if sample.breed == breed]
        chosen = [images[i] for i in rng.permutation(len(images))[:columns]]
        axes.imshow(_strip(dataset.image_root, chosen, columns))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        name = breed_label(breed, flag := breed in dataset.priority_breeds).replace(" ", "\n")
        mark_priority([axes.set_ylabel(name, rotation=0, ha="right", va="center")], [flag])
    return drawn, f"Training photos of {len(breeds)} of {len(dataset.breeds)} breeds, drawn at random with seed {seed}."


@figure
def pairs(findings: Sequence[Finding], image_root: Path, bits: int, most: int = 12) -> tuple[Figure, str]:
    """Near-duplicates side by side with their files, parts and the number of bits in which their hashes differ; in grey, the closest
    pairs that were not joined."""
    joined, beyond = pairs_to_show(findings, bits, most)
    panels: list[Panel] = []
    for a, b, gap in [*joined, *beyond]:
        breeds, places = dict.fromkeys((a.breed, b.breed)), dict.fromkeys(f.part or "left out" for f in (a, b))
        hue = GREY if a.group != b.group else RED if a.breed != b.breed else INK
        where = "not joined" if hue == GREY else " / ".join(places)
        text = f"{' / '.join(breeds)}\n{where}, {gap} bit{'' if gap == 1 else 's'}"
        panels.append(((a.image, b.image), text, hue))
    groups = [n for n in Counter(finding.group for finding in findings if finding.group).values() if n > 1]
    if not groups:
        said = f"No two photos are near-duplicates (hashes at most {bits} bits apart)."
        return _panels(image_root, panels, 3), said
    across = sum(a.breed != b.breed for a, b, _ in close_pairs(findings, bits))
    doubt = f" {across} of the pairs carry two different breeds (red): look at their labels." if across else ""
    return _panels(image_root, panels, 3), (
        f"{sum(groups):,} photos have relatives (hashes at most {bits} bits apart, or one cat, run or session by group_by): groups of up "
        f"to {max(groups)}, each kept in one part.{doubt}"
    )


@figure
def distances(near: pd.DataFrame) -> tuple[Figure, str]:
    """How far the photos of each part are from the nearest training photo of their breed, beside unrelated training photos."""
    measures = [name for name in MEASURES if near[name].notna().any()]
    drawn, grid = plt.subplots(1, max(1, len(measures)), figsize=(WIDTH, 3.2), squeeze=False)
    for axes, name in zip(grid[0], measures, strict=False):
        sns.ecdfplot(data=near, x=name, hue="part", palette=COLORS, ax=axes)
        axes.set(xlabel=f"nearest training photo by {MEASURES[name]}", ylabel="share of the photos")
    said = "; ".join(warnings_of(near)) or "No part is nearer to training than unrelated photos are to each other"
    return drawn, f"{said}."


@figure
def suspects(found: Suspects, image_root: Path, most: int = 25) -> tuple[Figure, str]:
    """The photos whose labels are doubted most: label, likely breed and their probabilities."""
    panels: list[Panel] = []
    for row in found.table.head(most).to_dict("records"):
        doubt = f"{row['breed']} ({100 * row['p_breed']:.0f} %)\n→ {row['likely']} ({100 * row['p_likely']:.0f} %)?"
        panels.append(((row["image"],), doubt, RED))
    return _panels(image_root, panels, 5), found.caption


@figure
def similar(found: pd.DataFrame, image_root: Path, most: int = 12) -> tuple[Figure, str]:
    """Photos of different groups whose features are most alike: candidates for one group."""
    panels: list[Panel] = []
    for row in found.head(most).to_dict("records"):
        hue = INK if row["breed"] == row["other_breed"] else RED
        panels.append(((row["image"], row["other"]), f"cosine {row['cosine']:.3f}", hue))
    said = f"{len(found):,} pairs of photos of different groups are alike in their features; join_similar joins them."
    return _panels(image_root, panels, 3), said


def worst_files(findings: Sequence[Finding], each: int = 2) -> list[tuple[Finding, str]]:
    """The photos of `worst`, each with the reason; where all are alike in a measure, none is worth showing."""
    kept = [finding for finding in findings if finding.kept and finding.width]
    like, chosen = _like(kept), dict[int, str]()
    for name, (title, ends) in LIKE.items():
        usual = like[name].median()
        for end in ends:
            for i, value in getattr(like[name], end)(each).items():
                if abs(value - usual) > 0.1 * abs(usual):
                    chosen.setdefault(i, f"{title.split(',')[0]} {value:.3g}")
    return [(kept[i], why) for i, why in chosen.items()]


def pairs_to_show(findings: Sequence[Finding], bits: int, most: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs of near-duplicates, and a row of the closest pairs that were not joined: whether the limit is in the right
    place. Of more than `most` together every group has its turn, then an even choice is shown, the closest first."""
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
    return _evenly(sorted(first, key=lambda pair: pair[2]), room), beyond


def choose(breeds: list[str], priority: Sequence[str]) -> list[str]:
    """At most MOST_BREEDS of the breeds, in their order: the priority breeds and an even choice of the others."""
    others = [breed for breed in breeds if breed not in priority]
    kept = {*priority, *_evenly(others, max(0, MOST_BREEDS - len(priority)))}
    return [breed for breed in breeds if breed in kept][:MOST_BREEDS] if len(breeds) > MOST_BREEDS else breeds


def _evenly(items: list[Any], most: int) -> list[Any]:
    most = min(most, len(items))
    return [items[i * len(items) // most] for i in range(most)]


def _like(findings: Sequence[Finding]) -> pd.DataFrame:
    kept = [f for f in findings if f.kept and f.width]
    rows = [(min(f.width, f.height), *(getattr(f, name) for name in LIKE if name != "side")) for f in kept]
    return pd.DataFrame(rows, columns=list(LIKE))


def _strip(image_root: Path, images: Sequence[str], columns: int) -> Image.Image:
    """Photos side by side, each padded to a square."""
    strip = Image.new("RGB", (columns * (SIDE + GAP) - GAP, SIDE), "white")
    for place, image in enumerate(images):
        photo = ImageOps.pad(open_image(inside(image_root, image)), (SIDE, SIDE), color=PALE)
        strip.paste(photo, (place * (SIDE + GAP), 0))
    return strip


def _panels(image_root: Path, panels: Sequence[Panel], columns: int) -> Figure:
    """Photos in a grid, below each a text and their files' names, of which the beginning is left out where they are long."""
    if not panels:
        drawn, axes = plt.subplots(figsize=(WIDTH, 0.6))  # without axes, a notebook shows no figure at all
        axes.set_axis_off()
        axes.text(0.0, 0.5, "nothing to show", va="center", color=GREY)
        return drawn
    rows, lines = -(-len(panels) // columns), 2 + max(text.count("\n") for _, text, _ in panels)
    height = rows * (WIDTH / columns / len(panels[0][0]) + 0.15 + 0.2 * lines)
    drawn, grid = plt.subplots(rows, columns, figsize=(WIDTH, height), dpi=PHOTO_DPI, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
        axes.set_anchor("N")  # the text has its place below
    for axes, (images, text, hue) in zip(grid.flat, panels, strict=False):
        axes.imshow(_strip(image_root, images, len(images)))
        names = (Path(image).name for image in images)
        short = "  |  ".join(name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}" for name in names)
        below: dict[str, Any] = {"color": hue, "ha": "center", "va": "top", "fontsize": 9, "transform": axes.transAxes}
        axes.text(0.5, -0.03, f"{text}\n{short}", **below).set_in_layout(False)
    return drawn
