"""Figures over several models: the headline figures side by side, the gain by breed, and the learning curve of a
sweep."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from catlib.evaluation.names import ordered, short, title
from catlib.evaluation.style import (
    GREEN,
    GREY,
    INK,
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
from catlib.evaluation.tables import signed

HEADLINES = {
    "accuracy": "Accuracy",
    "macro_f1": "Macro-F1",
    "priority_macro_f1": "Priority macro-F1",
    "top3_accuracy": "Top-3 accuracy",
}


@styled
def overview_figure(models: Mapping[str, Mapping[str, Any]], shown: Sequence[str] = tuple(HEADLINES)) -> Figure:
    """The headline figures of all models with their 95 % intervals, a panel a figure. `models`: entries of
    metrics.json."""
    names = ordered(list(models))
    shown = [key for key in shown if any(models[name].get(key) for name in names)]
    figure, grid = plt.subplots(1, len(shown), figsize=(WIDTH, 1.3 + 0.42 * len(names)), sharey=True, squeeze=False)
    for axes, key in zip(grid[0], shown, strict=True):
        for row, name in enumerate(reversed(names)):
            if (entry := models[name].get(key)) is None:
                axes.text(0.02, row, "no scores", va="center", fontsize=9, color=GREY)
                continue
            axes.plot(entry["ci95"], [row, row], color=color(name), alpha=0.35, linewidth=6, solid_capstyle="round")
            axes.plot(entry["value"], row, marker(name), color=color(name), markersize=8)
            left = entry["value"] > 0.6
            edge = entry["ci95"][0] - 0.04 if left else entry["ci95"][1] + 0.04
            axes.text(
                edge, row, f"{100 * entry['value']:.1f}", va="center", ha="right" if left else "left", fontsize=9.5
            )
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([0, 0.5, 1.0], ["0", "50", "100"])
        axes.set_title(HEADLINES[key], fontsize=10.5)
        axes.set_ylim(-0.6, len(names) - 0.4)
    grid[0][0].set_yticks(range(len(names)), [short(name) for name in reversed(names)])
    figure.supxlabel("per cent, with 95 % interval", fontsize=10)
    return figure


def overview_sentence(models: Mapping[str, Mapping[str, Any]]) -> str:
    """What the overview shows: the most accurate model, and the best one on the priority breeds."""
    best = max(models, key=lambda name: models[name]["accuracy"]["value"])
    said = f"{title(best, first=True)} is the most accurate on these photos ({_share(models[best]['accuracy'])})"
    rare = {name: m["priority_macro_f1"] for name, m in models.items() if m.get("priority_macro_f1")}
    if not rare:
        return said + "."
    top = max(rare, key=lambda name: (rare[name]["value"], name == best))
    if rare[top]["value"] == 0:
        return f"{said}; of the priority breeds no model has a single photo right."
    again = "it is also best" if top == best else f"{title(top)} is best"
    return f"{said}; {again} on the priority breeds (macro-F1 {_share(rare[top])})."


@styled
def gain_figure(comparison: Mapping[str, Any]) -> Figure:
    """Gain in recall of each breed with its paired 95 % interval, the recalls of both models beside it (dumbbell)."""
    rows = comparison["breeds"][::-1]
    k, font, y = len(rows), row_font(len(rows)), np.arange(len(rows))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 1.7 + k * (0.28 if k <= 24 else 0.2)), sharey=True, width_ratios=[1, 1.15]
    )
    a, b = comparison["a"], comparison["b"]
    for i, row in enumerate(rows):
        left.plot([row["recall_b"], row["recall_a"]], [i, i], color=GREY, linewidth=1.5, zorder=1)
    left.plot([r["recall_b"] for r in rows], y, marker(b), color=color(b), markersize=6, linestyle="", label=short(b))
    left.plot([r["recall_a"] for r in rows], y, marker(a), color=color(a), markersize=6, linestyle="", label=short(a))
    percent_axis(left, "x", -0.03, 1.03)
    left.set_xlabel("recall: share of the breed's photos that are right")
    left.set_yticks(y, [f"{breed_label(r['breed'], r['priority'])} ({r['support']})" for r in rows], fontsize=font)
    mark_priority(left.get_yticklabels(), [r["priority"] for r in rows])
    hues = {"gains": GREEN, "loses": RED, "undecided": GREY}
    shapes = {"gains": ">", "loses": "<", "undecided": "o"}
    for i, row in enumerate(rows):
        right.plot(row["ci95"], [i, i], color=hues[row["change"]], alpha=0.4, linewidth=4, solid_capstyle="round")
        right.plot(row["gain_points"], i, shapes[row["change"]], color=hues[row["change"]], markersize=5.5)
    right.axvline(0, color=INK, linewidth=1)
    reach = min(104, 5 + max(abs(end) for row in rows for end in row["ci95"]))
    right.set_xlim(-reach, reach)
    right.set_xlabel("gain in recall, points, paired 95 % interval")
    for change, hue in hues.items():
        right.plot([], [], shapes[change], color=hue, label=change)
    left.set_ylim(-0.7, k - 0.3)
    handles = [h for axes in (left, right) for h in axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), columnspacing=1.2, handletextpad=0.3)
    return figure


def gain_sentence(comparison: Mapping[str, Any]) -> str:
    """What the gain figure shows: how many breeds surely gain or lose, and the overall gain."""
    change = {key: [r["breed"] for r in comparison["breeds"] if r["change"] == key] for key in ("gains", "loses")}
    low, high = comparison["ci95"]
    gain = comparison["accuracy_gain_points"]
    return (
        f"Against {title(comparison['b'])}, {title(comparison['a'])} is {abs(gain):.1f} points "
        f"{'more' if gain >= 0 else 'less'} "
        f"accurate [{signed(low)}, {signed(high)}] on {comparison['n']} photos; of {len(comparison['breeds'])} breeds "
        f"{_listed(change['gains'])} surely better and {_listed(change['loses'])} surely worse "
        "(corrected for testing them all)."
    )


@styled
def learning_curve_figure(
    runs: Sequence[tuple[float, Mapping[str, Any]]],
    parameter: str,
    shown: Sequence[str] = ("accuracy", "priority_macro_f1"),
) -> Figure:
    """Headline figures against a swept parameter, a line a model with its 95 % band.

    `runs`: pairs of the parameter's value and that run's metrics.json content (its `models` are drawn).
    """
    runs = sorted(runs, key=lambda run: run[0])
    models = ordered(list({name for _, metrics in runs for name in metrics["models"]}))
    shown = [key for key in shown if any(m.get(key) for _, metrics in runs for m in metrics["models"].values())]
    figure, grid = plt.subplots(1, max(len(shown), 1), figsize=(WIDTH, 4.4), sharey=True, squeeze=False)
    for axes, key in zip(grid[0], shown, strict=True):
        for name in models:
            points = [(x, m["models"][name][key]) for x, m in runs if m["models"].get(name, {}).get(key)]
            if points:
                x = [p[0] for p in points]
                low, high = zip(*[p[1]["ci95"] for p in points], strict=True)
                axes.fill_between(x, low, high, color=color(name), alpha=0.15, linewidth=0)
                axes.plot(x, [p[1]["value"] for p in points], marker=marker(name), color=color(name), label=short(name))
        axes.set_xscale("log")
        axes.set_xticks([run[0] for run in runs], [f"{run[0]:g}" for run in runs], minor=False)
        axes.minorticks_off()
        axes.set_xlabel(parameter.replace("_", " "))
        axes.set_title(HEADLINES[key])
        percent_axis(axes, "y", 0.0, 1.0)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5) or 1)
    return figure


def learning_curve_sentence(
    runs: Sequence[tuple[float, Mapping[str, Any]]],
    parameter: str,
    name: str = "vlm-tuned",
    key: str = "priority_macro_f1",
) -> str:
    """What the learning curve shows: where the model starts and ends, and whether the last step still brought
    something."""
    points = [
        (x, m["models"][name][key]) for x, m in sorted(runs, key=lambda r: r[0]) if m["models"].get(name, {}).get(key)
    ]
    if len(points) < 2:
        return f"There are not enough runs with {HEADLINES[key].lower()} of {title(name)} for a curve."
    (first, start), (before, almost), (last, end) = points[0], points[-2], points[-1]
    unit, rise = parameter.replace("_", " "), 100 * (end["value"] - almost["value"])
    verdict = (
        "still rising"
        if end["ci95"][0] > almost["value"]
        else "falling"
        if end["ci95"][1] < almost["value"]
        else "level within its uncertainty"
    )
    return (
        f"{HEADLINES[key]} of {title(name)} goes from {_share(start)} at {first:g} to {_share(end)} at {last:g} "
        f"{unit}; the last step, from "
        f"{before:g} to {last:g}, changes it by {rise:+.1f} points: the curve is {verdict}."
    )


def _share(figure: Mapping[str, Any]) -> str:
    return f"{figure['value']:.1%} [{figure['ci95'][0]:.1%}, {figure['ci95'][1]:.1%}]"


def _listed(breeds: Sequence[str]) -> str:
    """ "none is", "1 is (Manx)", "7 are (A, B, C and 4 more)"."""
    if not breeds:
        return "none is"
    names = ", ".join(breeds[:3]) + (f" and {len(breeds) - 3} more" if len(breeds) > 3 else "")
    return f"{len(breeds)} {'is' if len(breeds) == 1 else 'are'} ({names})"
