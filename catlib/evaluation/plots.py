"""Figures over several models: headline figures, paired gains, precision when only sure answers count, time, learning curve."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from catlib.classifiers.tracks import TUNED, ordered, track
from catlib.colors import GREEN, GREY, INK, RED
from catlib.evaluation.calibration import Calibrated, risk_coverage
from catlib.evaluation.tables import Entry, in_words, signed, within
from catlib.figures import WIDTH, breed_label, figure, mark_priority, percent_axis, row_font

HEADLINES = {
    "accuracy": "Accuracy",
    "macro_f1": "Macro-F1",
    "priority_macro_f1": "Priority macro-F1",
    "top3_accuracy": "Top-3 accuracy",
}
Runs = Sequence[tuple[float, Mapping[str, Any]]]  # a swept value and the content of that run's metrics.json


@figure
def overview(models: Mapping[str, Entry]) -> tuple[Figure, str]:
    """Headline figures of all models with their 95 % intervals, a panel a figure. `models`: entries of metrics.json."""
    names = ordered(models)
    shown = [key for key in HEADLINES if any(models[name].get(key) for name in names)]
    fig, grid = plt.subplots(1, len(shown), figsize=(WIDTH, 1.3 + 0.42 * len(names)), sharey=True, squeeze=False)
    for axes, key in zip(grid[0], shown, strict=True):
        for row, look in enumerate(track(name) for name in reversed(names)):
            if (entry := models[look.name].get(key)) is None:
                axes.text(0.02, row, "no scores", va="center", fontsize=9, color=GREY)
                continue
            value, (low, high) = entry["value"], entry["ci95"] or [entry["value"]] * 2
            axes.plot([low, high], [row, row], color=look.color, alpha=0.35, linewidth=6, solid_capstyle="round")
            axes.plot(value, row, look.marker, color=look.color, markersize=8)
            edge, side = (low - 0.04, "right") if value > 0.6 else (high + 0.04, "left")
            axes.text(edge, row, f"{100 * value:.1f}", va="center", ha=side, fontsize=9.5)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([0, 0.5, 1.0], ["0", "50", "100"])
        axes.set_title(HEADLINES[key], fontsize=10.5)
        axes.set_ylim(-0.6, len(names) - 0.4)
    grid[0][0].set_yticks(range(len(names)), [track(name).short for name in reversed(names)])
    fig.supxlabel("per cent, with 95 % interval", fontsize=10)
    return fig, _best(models)


def _best(models: Mapping[str, Entry]) -> str:
    best = max(models, key=lambda name: models[name]["accuracy"]["value"])
    equal = [n for n in ordered(models) if models[n]["accuracy"]["value"] == models[best]["accuracy"]["value"]]
    names = " and ".join([track(best).first, *(track(n).title for n in equal if n != best)])
    said = f"{names} {'is' if len(equal) == 1 else 'are'} the most accurate on these photos ({in_words(models[best]['accuracy'])})"
    rare = {name: m["priority_macro_f1"] for name, m in models.items() if m.get("priority_macro_f1")}
    if not rare:
        return said + "."
    top = max(rare, key=lambda name: (rare[name]["value"], name == best))
    if rare[top]["value"] == 0:
        return f"{said}; of the priority breeds no model has a single photo right."
    again = "it is also best" if top == best else f"{track(top).title} is best"
    return f"{said}; {again} on the priority breeds (macro-F1 {in_words(rare[top])})."


@figure
def gains(comparison: Entry) -> tuple[Figure, str]:
    """Gain in recall of each breed with its paired 95 % interval, the recalls of both models beside it."""
    rows, (a, b) = comparison["breeds"][::-1], (track(comparison[side]) for side in ("a", "b"))
    k, font, y = len(rows), row_font(len(rows)), np.arange(len(rows))
    size = (WIDTH, 1.7 + k * (0.28 if k <= 24 else 0.2))
    fig, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, width_ratios=[1, 1.15])
    for i, row in enumerate(rows):
        left.plot([row["recall_b"], row["recall_a"]], [i, i], color=GREY, linewidth=1.5, zorder=1)
    for look, key in ((b, "recall_b"), (a, "recall_a")):
        recalls = [row[key] for row in rows]
        left.plot(recalls, y, look.marker, color=look.color, markersize=6, linestyle="", label=look.short)
    percent_axis(left, "x", -0.03, 1.03)
    left.set_xlabel("recall: share of the breed's photos that are right")
    left.set_yticks(y, [f"{breed_label(r['breed'], r['priority'])} ({r['support']})" for r in rows], fontsize=font)
    mark_priority(left.get_yticklabels(), [r["priority"] for r in rows])
    looks = {"gains": (GREEN, ">"), "loses": (RED, "<"), "undecided": (GREY, "o")}
    for i, row in enumerate(rows):
        hue, shape = looks[row["change"]]
        right.plot(row["ci95"], [i, i], color=hue, alpha=0.4, linewidth=4, solid_capstyle="round")
        right.plot(row["gain_points"], i, shape, color=hue, markersize=5.5)
    right.axvline(0, color=INK, linewidth=1)
    reach = min(104, 5 + max(abs(end) for row in rows for end in row["ci95"]))
    right.set_xlim(-reach, reach)
    right.set_xlabel("gain in recall, points, paired 95 % interval")
    for change, (hue, shape) in looks.items():
        right.plot([], [], shape, color=hue, label=change)
    left.set_ylim(-0.7, k - 0.3)
    handles = [h for axes in (left, right) for h in axes.get_legend_handles_labels()[0]]
    fig.legend(handles=handles, loc="outside upper left", ncols=len(handles), columnspacing=1.2, handletextpad=0.3)
    gain, bounds = comparison["accuracy_gain_points"], within(comparison["ci95"], signed)
    better, worse = (_listed([r["breed"] for r in rows[::-1] if r["change"] == way]) for way in ("gains", "loses"))
    return fig, (
        f"Against {b.title}, {a.title} is {abs(gain):.1f} points {'more' if gain >= 0 else 'less'} accurate{bounds} on "
        f"{comparison['n']} photos; of {k} breeds {better} surely better and {worse} surely worse (corrected for testing them "
        "all)."
    )


def _listed(breeds: Sequence[str]) -> str:
    """ "none is", "1 is (Manx)", "7 are (A, B, C and 4 more)"."""
    if not breeds:
        return "none is"
    names = ", ".join(breeds[:3]) + (f" and {len(breeds) - 3} more" if len(breeds) > 3 else "")
    return f"{len(breeds)} {'is' if len(breeds) == 1 else 'are'} ({names})"


@figure
def precision_by_coverage(models: Sequence[Calibrated]) -> tuple[Figure, str]:
    """Precision against the share of photos answered, surest first, and where the first model is to be run."""
    drawn = [c.scaled or c.raw for c in models if c.raw.log_probs is not None]
    fig, axes = plt.subplots(figsize=(WIDTH, 4.6 if drawn else 0.8))
    if not drawn:
        axes.set_axis_off()
        return fig, f"{track(models[0].raw.name).first} gives answers without scores, so that no threshold can be set."
    chosen, low = models[0].chosen, 1.0
    for o in drawn:
        curve, own = risk_coverage(o), track(o.name)
        # Below about 20 photos the curve is noise.
        sure = curve.coverage * len(o) >= min(20, len(o) / 4)
        look: Any = {"color": own.color, "marker": own.marker, "markevery": 0.08, "markersize": 6}
        axes.plot(curve.coverage[sure], curve.precision[sure], label=own.short, **look)
        low = min(low, curve.precision[sure].min())
    if chosen is not None:
        axes.axhline(chosen.target, color=GREY, linestyle="--", linewidth=1.2)
        axes.text(1.015, chosen.target, f"target {chosen.target:.0%}", va="bottom", ha="right", color=GREY, fontsize=9)
        if chosen.precision is not None:
            right, ends = chosen.precision["value"], chosen.precision["ci95"]
            arms = [[max(right - ends[0], 0.0)], [max(ends[1] - right, 0.0)]]
            look = {"color": INK, "marker": "*", "markersize": 14, "capsize": 3, "linewidth": 1.5, "zorder": 5}
            axes.errorbar(chosen.coverage["value"], right, arms, label="threshold chosen on validation", **look)
            low = min(low, ends[0])
    percent_axis(axes, "x", 0.0, 1.02)
    percent_axis(axes, "y", max(0.0, np.floor(low * 10 - 0.3) / 10), 1.01)
    axes.set_xlabel("share of the photos that are answered, the surest first")
    axes.set_ylabel("share of the answers that are right")
    fig.legend(loc="outside lower center", ncols=3)
    axes.set_title("How much can be answered at what precision")
    return fig, _answered(models[0], models[1:])


def _answered(first: Calibrated, others: Sequence[Calibrated]) -> str:
    title, chosen = track(first.raw.name).title, first.chosen
    if chosen is None:
        return f"Without validation scores of {title} no threshold can be chosen."
    if chosen.threshold is None:
        said = f"No confidence threshold brings {title} to {chosen.target:.0%} precision on the validation photos"
        return f"{said}, so none of its answers can be trusted that far."
    if chosen.precision is None:
        return f"At the threshold that validation asks for, {title} answers none of the {len(first.raw)} test photos."
    missed = f", short of the {chosen.target:.0%} aimed at" if chosen.precision["ci95"][1] < chosen.target else ""
    said = (
        f"Answering only above the confidence that gave {chosen.target:.0%} precision on validation, {title} answers "
        f"{chosen.coverage['value']:.0%} of the test photos and is right in {in_words(chosen.precision)} of them{missed}; the rest "
        "would go to a person."
    )
    shares = [
        f"{track(o.raw.name).title} {c.coverage['value']:.0%}"
        + (f" ({c.precision['value']:.0%} right)" if c.precision else "")
        for o in others
        if (c := o.chosen) is not None
    ]
    return f"{said} Thresholds chosen in the same way answer: {', '.join(shares)}." if shares else said


@figure
def learning_curve(runs: Runs, parameter: str) -> tuple[Figure, str]:
    """Headline figures against a swept parameter, a line a model with its 95 % band. The caption is about the tuned VLM."""
    runs = sorted(runs, key=lambda run: run[0])
    models = ordered({model for _, metrics in runs for model in metrics["models"]})
    every = [m for _, metrics in runs for m in metrics["models"].values()]
    shown = [key for key in ("accuracy", "priority_macro_f1") if any(m.get(key) for m in every)]
    fig, grid = plt.subplots(1, max(len(shown), 1), figsize=(WIDTH, 4.4), sharey=True, squeeze=False)
    for axes, key in zip(grid[0], shown, strict=True):
        for look in map(track, models):
            if found := _points(runs, look.name, key):
                x, values = [p[0] for p in found], [p[1]["value"] for p in found]
                low, high = zip(*(entry["ci95"] or [entry["value"]] * 2 for _, entry in found), strict=True)
                axes.fill_between(x, low, high, color=look.color, alpha=0.15, linewidth=0)
                axes.plot(x, values, marker=look.marker, color=look.color, label=look.short)
        axes.set_xscale("log")
        axes.set_xticks([run[0] for run in runs], [f"{run[0]:g}" for run in runs], minor=False)
        axes.minorticks_off()
        axes.set_xlabel(parameter.replace("_", " "))
        axes.set_title(HEADLINES[key])
        percent_axis(axes, "y", 0.0, 1.0)
    handles, labels = grid[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5) or 1)
    return fig, slope(runs, parameter)


def slope(runs: Runs, parameter: str, name: str = TUNED, key: str = "priority_macro_f1") -> str:
    """Where a model's learning curve starts and ends, and whether the last step still brought something."""
    found = _points(sorted(runs, key=lambda run: run[0]), name, key)
    if len(found) < 2:
        return f"There are not enough runs with {HEADLINES[key].lower()} of {track(name).title} for a curve."
    (first, start), (before, almost), (last, end) = found[0], found[-2], found[-1]
    low, high = end["ci95"] or (-np.inf, np.inf)
    rising, falling = low > almost["value"], high < almost["value"]
    trend = "still rising" if rising else "falling" if falling else "level within its uncertainty"
    return (
        f"{HEADLINES[key]} of {track(name).title} goes from {in_words(start)} at {first:g} to {in_words(end)} at {last:g} "
        f"{parameter.replace('_', ' ')}; the last step, from {before:g} to {last:g}, changes it by "
        f"{100 * (end['value'] - almost['value']):+.1f} points: the curve is {trend}."
    )


def _points(runs: Runs, name: str, key: str) -> list[tuple[float, Entry]]:
    return [(x, m["models"][name][key]) for x, m in runs if m["models"].get(name, {}).get(key)]
