"""Figures about confidence: the reliability diagram, and how much can be answered at what precision."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from catlib.evaluation.calibration import Calibrated, reliability, risk_coverage
from catlib.evaluation.metrics import expected_calibration_error
from catlib.evaluation.names import short, title
from catlib.evaluation.outcomes import Outcomes
from catlib.evaluation.style import GREY, INK, WIDTH, color, marker, percent_axis, styled


@styled
def reliability_figure(c: Calibrated) -> Figure:
    """Accuracy against confidence, as the model is and, beside it, after temperature scaling."""
    if c.raw.log_probs is None:
        return _no_scores(c.raw)
    panels = [("As it is", c.raw)]
    if c.scaled is not None:
        panels.append((f"Temperature {c.temperature:.2f}, from validation", c.scaled))
    figure, grid = plt.subplots(1, 2, figsize=(WIDTH, 4.9), sharey=True, width_ratios=[1, 1])
    for axes, (panel, o) in zip(grid, panels, strict=False):
        bins = reliability(o)
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2, zorder=1)
        for b in bins:
            axes.plot(
                [b.confidence] * 2,
                b.ci95,
                color=color(o.name),
                alpha=0.4,
                linewidth=3,
                zorder=2,
                solid_capstyle="round",
            )
        axes.plot(
            [b.confidence for b in bins],
            [b.accuracy for b in bins],
            marker(o.name),
            color=color(o.name),
            markersize=7,
            markeredgecolor="white",
            zorder=3,
        )
        percent_axis(axes, "x", -0.02, 1.02)
        percent_axis(axes, "y", -0.02, 1.02)
        axes.set_xlabel("confidence: probability that the model gives its answer")
        axes.set_title(f"{panel}: ECE {100 * expected_calibration_error(o.confidence, o.correct):.1f} points")
    grid[0].set_ylabel("accuracy, 95 % interval")
    grid[0].text(1.0, 0.03, "dashed: perfectly calibrated", ha="right", color=GREY, fontsize=9)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


def reliability_sentence(c: Calibrated) -> str:
    """What the reliability diagram shows: whether the model is too sure of itself, and what the temperature changes."""
    raw = c.raw
    if raw.log_probs is None:
        return f"{title(raw.name, first=True)} gives answers without scores, so its confidence cannot be judged."
    gap = float(raw.confidence.mean() - raw.correct.mean())
    ece = 100 * expected_calibration_error(raw.confidence, raw.correct)
    feeling = (
        "claims too much" if gap > 0.01 else "claims too little" if gap < -0.01 else "claims about as much as it keeps"
    )
    said = (
        f"{title(raw.name, first=True)} {feeling}: it is sure of its answers to {raw.confidence.mean():.0%} on average "
        "and right in "
        f"{raw.correct.mean():.0%} of the photos (expected calibration error {ece:.1f} points)"
    )
    if c.scaled is None:
        return said + "."
    after = 100 * expected_calibration_error(c.scaled.confidence, c.scaled.correct)
    return f"{said}; with the temperature {c.temperature:.2f}, fitted on validation photos, it is {after:.1f} points."


@styled
def risk_coverage_figure(models: Sequence[Calibrated]) -> Figure:
    """Precision against the share of photos answered, surest first, and where the first model is to be run."""
    shown_models = [c.scaled or c.raw for c in models if c.raw.log_probs is not None]
    if not shown_models:
        return _no_scores(models[0].raw)
    chosen = models[0].chosen
    figure, axes = plt.subplots(figsize=(WIDTH, 4.6))
    low = 1.0
    for o in shown_models:
        curve = risk_coverage(o)
        # Below about 20 photos the curve is noise.
        shown = curve.coverage * len(o) >= min(20, len(o) / 4)
        axes.plot(curve.coverage[shown], curve.precision[shown], color=color(o.name), label=short(o.name))
        axes.plot(curve.coverage[-1], curve.precision[-1], marker(o.name), color=color(o.name), markersize=8)
        low = min(low, curve.precision[shown].min())
    if chosen is not None:
        axes.axhline(chosen.target, color=GREY, linestyle="--", linewidth=1.2)
        axes.text(1.015, chosen.target, f"target {chosen.target:.0%}", va="bottom", ha="right", color=GREY, fontsize=9)
        if chosen.precision is not None:
            axes.errorbar(
                chosen.coverage,
                chosen.precision,
                yerr=_arms(chosen.precision, chosen.precision_ci95),
                color=INK,
                marker="*",
                markersize=14,
                capsize=3,
                linewidth=1.5,
                zorder=5,
                label="threshold chosen on validation",
            )
            low = min(low, chosen.precision_ci95[0])
    percent_axis(axes, "x", 0.0, 1.02)
    percent_axis(axes, "y", max(0.0, np.floor(low * 10 - 0.3) / 10), 1.01)
    axes.set_xlabel("share of the photos that are answered, the surest first")
    axes.set_ylabel("share of the answers that are right")
    figure.legend(loc="outside lower center", ncols=3)
    axes.set_title("How much can be answered at what precision")
    return figure


def risk_coverage_sentence(c: Calibrated, others: Sequence[Calibrated] = ()) -> str:
    """What the risk-coverage figure shows: how much of the test is answered at the precision asked for, and by `others`."""
    said = _answered(c)
    shares = [
        f"{title(o.raw.name)} {o.chosen.coverage:.0%}"
        + ("" if o.chosen.precision is None else f" ({o.chosen.precision:.0%} right)")
        for o in others
        if o.chosen is not None
    ]
    return said if not shares else f"{said} Thresholds chosen in the same way answer: {', '.join(shares)}."


def _answered(c: Calibrated) -> str:
    o, chosen = c.raw, c.chosen
    if chosen is None:
        return f"Without validation scores of {title(o.name)} no threshold can be chosen."
    if chosen.threshold is None:
        return (
            f"No confidence threshold brings {title(o.name)} to {chosen.target:.0%} precision on the validation "
            "photos, so none of "
            "its answers can be trusted that far."
        )
    if chosen.precision is None:
        return f"At the threshold that validation asks for, {title(o.name)} answers none of the {len(o)} test photos."
    low, high = chosen.precision_ci95
    missed = f", short of the {chosen.target:.0%} aimed at" if high < chosen.target else ""
    return (
        f"Answering only above the confidence that gave {chosen.target:.0%} precision on validation, {title(o.name)} "
        "answers "
        f"{chosen.coverage:.0%} of the test photos and is right in {chosen.precision:.1%} of them [{low:.1%}, "
        f"{high:.1%}]{missed}; the rest would go to a person."
    )


def _no_scores(o: Outcomes) -> Figure:
    figure = plt.figure(figsize=(WIDTH, 0.8))
    figure.text(0.02, 0.4, f"{short(o.name)}: answers without scores")
    return figure


def _arms(value: float, ends: tuple[float, float]) -> list[list[float]]:
    return [[max(value - ends[0], 0.0)], [max(ends[1] - value, 0.0)]]
