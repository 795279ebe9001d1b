"""Figures of one model breed by breed: the confusion matrix ordered by similarity, and F1 with interval and support."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from catlib.evaluation.names import short, title
from catlib.evaluation.outcomes import NO_ANSWER, Outcomes
from catlib.evaluation.style import (
    BLUE,
    GREY,
    INK,
    PRIORITY,
    RED,
    WIDTH,
    breed_label,
    color,
    mark_priority,
    marker,
    percent_axis,
    row_font,
    styled,
)

NUMBERS_UP_TO = 24  # with more breeds the percentages no longer fit into their cells


def confusion_counts(o: Outcomes) -> tuple[np.ndarray, list[int]]:
    """Photos (rows: true, columns: said, last column: no breed) of the breeds that occur, and their indices."""
    kept = [int(i) for i in np.unique(np.concatenate([o.true, o.predicted[o.predicted != NO_ANSWER]]))]
    place = {index: i for i, index in enumerate(kept)} | {NO_ANSWER: len(kept)}
    counts = np.zeros((len(kept), len(kept) + 1), dtype=int)
    np.add.at(counts, ([place[i] for i in o.true.tolist()], [place[i] for i in o.predicted.tolist()]), 1)
    return counts, kept


def similarity_order(counts: np.ndarray) -> np.ndarray:
    """An order of k breeds in which those often confused stand side by side.

    `counts` (k, k): photos. Average-linkage clustering on 1 - the mutual confusion rate, leaves in the optimal order
    (Bar-Joseph et al. 2001).
    """
    if len(counts) < 3:
        return np.arange(len(counts))
    rates = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    mutual = (rates + rates.T) / 2
    distance = 1 - mutual
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(np.maximum(distance, 0), checks=False), "average", optimal_ordering=True))


@styled
def confusion_figure(o: Outcomes, priority: Sequence[str] = ()) -> Figure:
    """Row-normalised confusion matrix: of each breed's photos, the share called so. Right answers blue, errors
    orange."""
    counts, kept = confusion_counts(o)
    order = similarity_order(counts[:, :-1])
    rates = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    silent = bool(counts[:, -1].any())
    rates = rates[np.ix_(order, [*order, len(kept)] if silent else order)]
    names = [o.breeds[kept[i]] for i in order]
    k, font = len(names), row_font(len(names))
    figure, axes = plt.subplots(figsize=(WIDTH, min(3.2 + 0.34 * k, 13.0) if k <= NUMBERS_UP_TO else 13.0))
    right = np.eye(*rates.shape, dtype=bool)
    for share, hue in ((np.where(right, rates, np.nan), BLUE), (np.where(right, np.nan, rates), RED)):
        colors = LinearSegmentedColormap.from_list("share", ["white", hue])
        # Confusions of a few per cent would be invisible on a linear scale.
        axes.imshow(share, cmap=colors, norm=PowerNorm(0.6, 0, 1), aspect="auto", interpolation="nearest")
    labels = [breed_label(name, name in priority) for name in names]
    columns = [*labels, "(no breed)"] if silent else labels
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=min(font, 7.6) if k > 40 else font)
    axes.set_yticks(
        range(k), [f"{label} ({n})" for label, n in zip(labels, _support(counts, order), strict=True)], fontsize=font
    )
    mark_priority(axes.get_yticklabels(), [name in priority for name in names])
    mark_priority(axes.get_xticklabels()[:k], [name in priority for name in names])
    axes.grid(False)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(k + 1) - 0.5, minor=True)
    axes.grid(True, which="minor", linewidth=0.4, color="#E9ECEF")
    axes.tick_params(which="minor", length=0)
    if k <= NUMBERS_UP_TO:
        _write_shares(axes, rates, 8.5 if k <= 14 else 7.5)
    axes.set_xlabel(f"said by the model, share of the row's photos{' in per cent' if k <= NUMBERS_UP_TO else ''}")
    axes.set_ylabel("true breed (photos)")
    axes.set_title(f"{short(o.name)}: what each breed is called (blue: right, orange: wrong)", loc="center")
    return figure


def confusion_sentence(o: Outcomes) -> str:
    """What the confusion matrix shows: the most frequent confusion, and how much of all errors few pairs explain."""
    counts, kept = confusion_counts(o)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    if not wrong.any():
        return f"{title(o.name, first=True)} makes no mistake on these {len(o)} photos."
    rates = wrong / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    t, s = np.unravel_index(np.lexsort((rates.ravel(), wrong.ravel()))[-1], wrong.shape)
    said = "no breed at all" if s == len(kept) else o.breeds[kept[s]]
    top = np.sort(wrong.ravel())[::-1][:10].sum()
    return (
        f"The most frequent confusion is {o.breeds[kept[t]]} called {said} ({wrong[t, s]} of {counts[t].sum()} "
        "photos); "
        f"the ten most frequent confusions make up {top / wrong.sum():.0%} of all {wrong.sum()} mistakes."
    )


@styled
def f1_figure(models: Mapping[str, Mapping[str, Any]], name: str, beside: str | None = None) -> Figure:
    """F1 of each breed with its 95 % interval, worst last, photos in the margin; `beside`: a second model as hollow
    marks.

    `models`: the entries of metrics.json.
    """
    beside = beside if beside in models else None
    table = models[name]["per_breed"]
    breeds = sorted((b for b in table if table[b]["support"]), key=lambda b: (table[b]["f1"], b))
    k, font, rows = len(breeds), row_font(len(breeds)), np.arange(len(breeds))
    flags = [table[b]["priority"] for b in breeds]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.6 + k * (0.27 if k <= 24 else 0.2)))
    for row, breed in zip(rows, breeds, strict=True):
        hue = PRIORITY if table[breed]["priority"] else color(name)
        axes.plot(table[breed]["f1_ci95"], [row, row], color=hue, alpha=0.35, linewidth=4, solid_capstyle="round")
        axes.plot(table[breed]["f1"], row, marker(name), color=hue, markersize=6)
    if beside is not None:
        other = [models[beside]["per_breed"].get(b, {}).get("f1") or 0.0 for b in breeds]
        axes.plot(other, rows, marker(beside), markerfacecolor="white", markeredgecolor=INK, markersize=5, linestyle="")
    axes.axvline(models[name]["macro_f1"]["value"], color=GREY, linestyle=":", linewidth=1.5)
    axes.set_yticks(rows, [breed_label(b, f) for b, f in zip(breeds, flags, strict=True)], fontsize=font)
    mark_priority(axes.get_yticklabels(), flags)
    for row, breed in zip(rows, breeds, strict=True):
        axes.text(
            1.02,
            row,
            f"{table[breed]['support']}",
            va="center",
            fontsize=font,
            color=INK,
            transform=axes.get_yaxis_transform(),
        )
    axes.text(1.02, k - 0.2, "photos", va="bottom", fontsize=9, color=GREY, transform=axes.get_yaxis_transform())
    axes.set_ylim(-0.7, k - 0.3)
    percent_axis(axes, "x", -0.01, 1.01)
    axes.set_xlabel("F1 with 95 % interval; dotted: macro-F1")
    handles = [_handle(marker(name), color(name), short(name)), _handle(marker(name), PRIORITY, "★ priority breed")]
    handles += [] if beside is None else [_handle(marker(beside), "white", short(beside), INK)]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    axes.set_title("F1 by breed")
    return figure


def f1_sentence(models: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """What the F1 figure shows: best, worst, and how the priority breeds do against the others."""
    table = {b: row for b, row in models[name]["per_breed"].items() if row["support"]}
    ranked = sorted(table, key=lambda b: table[b]["f1"])
    said = (
        f"F1 runs from {table[ranked[0]]['f1']:.0%} ({ranked[0]}, {table[ranked[0]]['support']} photos) to "
        f"{table[ranked[-1]]['f1']:.0%} ({ranked[-1]}, {table[ranked[-1]]['support']} photos)"
    )
    rare = [row["f1"] for row in table.values() if row["priority"]]
    if not rare or len(rare) == len(table):
        return said + "."
    common = [row["f1"] for row in table.values() if not row["priority"]]
    return (
        f"{said}; the {len(rare)} priority breeds average {np.mean(rare):.0%}, the other {len(common)} breeds "
        f"{np.mean(common):.0%}."
    )


def _support(counts: np.ndarray, order: np.ndarray) -> list[int]:
    return [int(n) for n in counts.sum(axis=1)[order]]


def _write_shares(axes: plt.Axes, rates: np.ndarray, font: float) -> None:
    for row, column in zip(*np.nonzero(rates >= 0.005), strict=True):
        share = rates[row, column]
        axes.text(
            column,
            row,
            f"{100 * share:.0f}",
            ha="center",
            va="center",
            fontsize=font,
            color="white" if share > 0.45 else INK,
        )


def _handle(shape: str, face: str, label: str, edge: str | None = None) -> Line2D:
    return Line2D([], [], marker=shape, linestyle="", markerfacecolor=face, markeredgecolor=edge or face, label=label)
