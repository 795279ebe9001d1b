"""Figures of one model: the confusion matrix ordered by similarity, F1 breed by breed, and the reliability diagram."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from catlib import figures
from catlib.classifiers.tracks import track
from catlib.colors import BLUE, GREY, INK, PRIORITY, RED
from catlib.evaluation.calibration import Calibrated, reliability
from catlib.evaluation.metrics import expected_calibration_error
from catlib.evaluation.outcomes import NO_ANSWER, Outcomes
from catlib.evaluation.tables import Entry
from catlib.figures import WIDTH, figure

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
    distance = 1 - (rates + rates.T) / 2
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(np.maximum(distance, 0), checks=False), "average", optimal_ordering=True))


@figure
def confusion(o: Outcomes, priority: Sequence[str] = ()) -> tuple[Figure, str]:
    """Confusion matrix: of each breed's photos, the share called so; right answers blue, errors orange."""
    counts, kept = confusion_counts(o)
    order = similarity_order(counts[:, :-1])
    rates = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    silent = bool(counts[:, -1].any())
    rates = rates[np.ix_(order, [*order, len(kept)] if silent else order)]
    names = [o.breeds[kept[i]] for i in order]
    k, font = len(names), figures.row_font(len(names))
    fig, axes = plt.subplots(figsize=(WIDTH, min(3.2 + 0.34 * k, 13.0) if k <= NUMBERS_UP_TO else 13.0))
    right = np.arange(len(rates))[:, None] == np.arange(rates.shape[1])
    for share, hue in ((np.where(right, rates, np.nan), BLUE), (np.where(right, np.nan, rates), RED)):
        colors = LinearSegmentedColormap.from_list("share", ["white", hue])
        # Confusions of a few per cent would be invisible on a linear scale.
        axes.imshow(share, cmap=colors, norm=PowerNorm(0.6, 0, 1), aspect="auto", interpolation="nearest")
    labels, flags = (
        [figures.breed_label(name, name in priority) for name in names],
        [name in priority for name in names],
    )
    columns = [*labels, "(no breed)"] if silent else labels
    photos = counts.sum(axis=1)[order]
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=min(font, 7.6) if k > 40 else font)
    axes.set_yticks(range(k), [f"{label} ({n})" for label, n in zip(labels, photos, strict=True)], fontsize=font)
    figures.mark_priority(axes.get_yticklabels(), flags)
    figures.mark_priority(axes.get_xticklabels()[:k], flags)
    axes.grid(False)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(k + 1) - 0.5, minor=True)
    axes.grid(True, which="minor", linewidth=0.4, color="#E9ECEF")
    axes.tick_params(which="minor", length=0)
    for row, column in zip(*np.nonzero(rates >= 0.005), strict=True) if k <= NUMBERS_UP_TO else ():
        ink: Any = {"color": "white" if rates[row, column] > 0.45 else INK, "fontsize": 8.5 if k <= 14 else 7.5}
        axes.text(column, row, f"{100 * rates[row, column]:.0f}", ha="center", va="center", **ink)
    axes.set_xlabel(f"said by the model, share of the row's photos{' in per cent' if k <= NUMBERS_UP_TO else ''}")
    axes.set_ylabel("true breed (photos)")
    axes.set_title(f"{track(o.name).short}: what each breed is called (blue: right, orange: wrong)", loc="center")
    return fig, _most_confused(o, counts, kept)


def _most_confused(o: Outcomes, counts: np.ndarray, kept: Sequence[int]) -> str:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    if not wrong.any():
        return f"{track(o.name).first} makes no mistake on these {len(o)} photos."
    rates = wrong / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    t, s = np.unravel_index(np.lexsort((rates.ravel(), wrong.ravel()))[-1], wrong.shape)
    said = "no breed at all" if s == len(kept) else o.breeds[kept[s]]
    top = np.sort(wrong.ravel())[::-1][:10].sum()
    return (
        f"The most frequent confusion is {o.breeds[kept[t]]} called {said} ({wrong[t, s]} of {counts[t].sum()} photos); "
        f"the ten most frequent confusions make up {top / wrong.sum():.0%} of all {wrong.sum()} mistakes."
    )


@figure
def f1_by_breed(models: Mapping[str, Entry], name: str, beside: str | None = None) -> tuple[Figure, str]:
    """F1 of each breed with its 95 % interval, worst last, photos in the margin; hollow: a second model.

    `models`: the entries of metrics.json. `beside`: the second model, left out where it was not run.
    """
    other = track(beside) if beside is not None and beside in models else None
    look, table = track(name), {b: row for b, row in models[name]["per_breed"].items() if row["support"]}
    breeds = sorted(table, key=lambda b: (table[b]["f1"], b))
    k, font, rows = len(breeds), figures.row_font(len(breeds)), range(len(breeds))
    flags = [table[b]["priority"] for b in breeds]
    fig, axes = plt.subplots(figsize=(WIDTH, 1.6 + k * (0.27 if k <= 24 else 0.2)))
    margin = axes.get_yaxis_transform()
    for row, breed in zip(rows, breeds, strict=True):
        hue = PRIORITY if table[breed]["priority"] else look.color
        axes.plot(table[breed]["f1_ci95"], [row, row], color=hue, alpha=0.35, linewidth=4, solid_capstyle="round")
        axes.plot(table[breed]["f1"], row, look.marker, color=hue, markersize=6)
        axes.text(1.02, row, str(table[breed]["support"]), va="center", fontsize=font, color=INK, transform=margin)
    handles = [_handle(look.marker, look.color, look.short), _handle(look.marker, PRIORITY, "★ priority breed")]
    if other is not None:
        theirs = [models[other.name]["per_breed"].get(b, {}).get("f1") or 0.0 for b in breeds]
        axes.plot(theirs, rows, other.marker, mfc="white", mec=INK, markersize=5, linestyle="")
        handles.append(_handle(other.marker, "white", other.short, INK))
    axes.axvline(models[name]["macro_f1"]["value"], color=GREY, linestyle=":", linewidth=1.5)
    axes.set_yticks(rows, [figures.breed_label(b, f) for b, f in zip(breeds, flags, strict=True)], fontsize=font)
    figures.mark_priority(axes.get_yticklabels(), flags)
    axes.text(1.02, k - 0.2, "photos", va="bottom", fontsize=9, color=GREY, transform=margin)
    axes.set_ylim(-0.7, k - 0.3)
    figures.percent_axis(axes, "x", -0.01, 1.01)
    axes.set_xlabel("F1 with 95 % interval; dotted: macro-F1")
    fig.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    axes.set_title("F1 by breed")
    ends = [f"{table[b]['f1']:.0%} ({b}, {table[b]['support']} photos)" for b in (breeds[0], breeds[-1])]
    said = f"F1 runs from {ends[0]} to {ends[1]}"
    rare, common = ([row["f1"] for row in table.values() if row["priority"] is flag] for flag in (True, False))
    if not rare or not common:
        return fig, said + "."
    return fig, (
        f"{said}; the {len(rare)} priority breeds average {np.mean(rare):.0%}, the other {len(common)} breeds "
        f"{np.mean(common):.0%}."
    )


def _handle(shape: str, face: str, label: str, edge: str | None = None) -> Line2D:
    return Line2D([], [], marker=shape, linestyle="", markerfacecolor=face, markeredgecolor=edge or face, label=label)


@figure
def confidence(c: Calibrated) -> tuple[Figure, str]:
    """Accuracy against confidence (reliability diagram), as the model is and after temperature scaling."""
    raw, look = c.raw, track(c.raw.name)
    if raw.log_probs is None:
        fig = plt.figure(figsize=(WIDTH, 0.8))
        return fig, f"{look.first} gives answers without scores, so its confidence cannot be judged."
    panels = [("As it is", raw)]
    if c.scaled is not None:
        panels.append((f"Temperature {c.temperature:.2f}", c.scaled))
    errors = [100 * expected_calibration_error(o.confidence, o.correct) for _, o in panels]
    fig, grid = plt.subplots(1, 2, figsize=(WIDTH, 4.9), sharey=True, width_ratios=[1, 1])
    for axes, (panel, o), ece in zip(grid, panels, errors, strict=False):
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2, zorder=1)
        for b in reliability(o):
            style = {"color": look.color, "solid_capstyle": "round"}
            axes.plot([b.confidence] * 2, b.accuracy["ci95"], alpha=0.4, linewidth=3, zorder=2, **style)
            axes.plot(
                b.confidence, b.accuracy["value"], look.marker, markersize=7, markeredgecolor="white", zorder=3, **style
            )
        figures.percent_axis(axes, "x", -0.02, 1.02)
        figures.percent_axis(axes, "y", -0.02, 1.02)
        axes.set_xlabel("confidence: probability that the model gives its answer")
        axes.set_title(f"{panel}: ECE {ece:.1f} points")
    grid[0].set_ylabel("accuracy, 95 % interval")
    grid[0].text(1.0, 0.03, "dashed: perfectly calibrated", ha="right", color=GREY, fontsize=9)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    gap = float(raw.confidence.mean() - raw.correct.mean())
    claim = "is overconfident" if gap > 0.01 else "is underconfident" if gap < -0.01 else "is as sure as it is right"
    said = (
        f"{look.first} {claim}: its mean confidence is {raw.confidence.mean():.0%}, its accuracy {raw.correct.mean():.0%} "
        f"(expected calibration error {errors[0]:.1f} points)"
    )
    if c.scaled is None:
        return fig, said + "."
    return fig, f"{said}; with the temperature {c.temperature:.2f}, fitted on validation photos, it is {errors[1]:.1f}."
