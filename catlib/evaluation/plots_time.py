"""The time that a photo takes each model, against the budget."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from catlib.evaluation.names import ordered, short, title
from catlib.evaluation.style import RED, WIDTH, color, marker, styled
from catlib.evaluation.tables import number


@styled
def time_figure(models: Mapping[str, Mapping[str, Any]], budget_ms: float) -> Figure:
    """Median and 95th percentile of the milliseconds for one photo, on a logarithmic axis, and the budget."""
    names = [name for name in ordered(list(models)) if models[name]["latency_ms"]["p50"] is not None][::-1]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.3 + 0.42 * max(len(names), 1)))
    for row, name in enumerate(names):
        p50, p95 = models[name]["latency_ms"]["p50"], models[name]["latency_ms"]["p95"]
        axes.plot([p50, p95], [row, row], color=color(name), alpha=0.45, linewidth=6, solid_capstyle="round")
        axes.plot(p50, row, marker(name), color=color(name), markersize=9)
        axes.text(1.01, row, f"{number(p50)} ms, p95 {number(p95)}", va="center", transform=axes.get_yaxis_transform())
    axes.axvline(budget_ms, color=RED, linestyle="--", linewidth=1.5)
    axes.text(budget_ms, len(names) - 0.45, f" budget {budget_ms:g} ms", color=RED, fontsize=9, va="bottom")
    axes.set_xscale("log")
    slowest = max([models[name]["latency_ms"]["p95"] for name in names] + [budget_ms])
    fastest = min([models[name]["latency_ms"]["p50"] for name in names] + [budget_ms])
    axes.set_xlim(fastest / 2, slowest * 2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(-0.6, len(names) - 0.2)
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_xlabel("milliseconds for one photo: mark at the median, line to the 95th percentile")
    return figure


def time_sentence(models: Mapping[str, Mapping[str, Any]], budget_ms: float) -> str:
    """Which models keep the budget, and how much slower the slowest is than the fastest."""
    times = {name: m["latency_ms"]["p50"] for name, m in models.items() if m["latency_ms"]["p50"] is not None}
    if not times:
        return "No model's time was measured."
    over = [title(name) for name in ordered(list(times)) if times[name] > budget_ms]
    fast, slow = min(times, key=times.get), max(times, key=times.get)
    kept = "every model keeps" if not over else f"{_together(over)} exceed{'s' if len(over) == 1 else ''}"
    kinds = sorted({m["latency_ms"]["kind"] for m in models.values()})
    return (
        f"Measured as {' and '.join(kinds)}: {kept} the budget of {budget_ms:g} ms; {title(slow)} takes "
        f"{times[slow] / times[fast]:.1f} times as long as {title(fast)}."
    )


def _together(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
