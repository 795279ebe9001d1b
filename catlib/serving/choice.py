"""The engines side by side: their table, their figure, and which of them to choose, computed from the figures."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from catlib.colors import BLUE, GREEN, GREY, INK, ORANGE, PINK, RED, SKY
from catlib.evaluation.tables import number
from catlib.figures import WIDTH, figure
from catlib.serving.bench import Engine

AGREE = 0.95  # an engine that names another breed than the reference more often than this allows is not a way to run it
HUES = {"process": (BLUE, SKY, PINK), "server": (GREEN, GREY), "clip": (ORANGE,), "probe": (RED, INK)}


def engines_table(engines: Sequence[Engine], budget_ms: float) -> pd.DataFrame:
    """A line for each engine: time alone against the budget, photos a second at each load, memory, agreement."""
    rows = {}
    for engine in engines:
        alone = engine.alone if engine.loads else None
        rates = {load.concurrency: load.photos_per_s for load in engine.loads}
        shares = {
            "same answer": engine.same_answer,
            "same breed": engine.same_breed,
            "same under load": engine.under_load,
        }
        kept = ("yes" if alone.p50 <= budget_ms else "no") if alone else "-"
        rows[engine.name] = {
            "p50, ms": number(alone.p50 if alone else None),
            "p95, ms": number(alone.p95 if alone else None),
            **({f"within {budget_ms:g} ms": kept} if budget_ms else {}),
            **{f"photos/s, {n} at a time": number(rates.get(n)) for n in _loads(engines)},
            "memory, MB": "-" if engine.memory_mb is None else f"{engine.memory_mb:,.0f}",
            **{name: "-" if value is None else f"{value:.0%}" for name, value in shares.items()},
        }
    return pd.DataFrame.from_dict(rows, orient="index")


@figure
def engines_figure(engines: Sequence[Engine], budget_ms: float) -> tuple[Figure, str]:
    """Left, milliseconds for a photo that comes alone, median to 95th percentile; right, photos a second by load."""
    shown = [engine for engine in engines if engine.loads]
    spare = {kind: list(hues) for kind, hues in HUES.items()}
    hues = [spare[engine.kind].pop(0) if spare[engine.kind] else GREY for engine in shown]
    drawn, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 1.9 + 0.38 * len(shown)), width_ratios=(1.25, 1))
    for row, (engine, hue) in enumerate(zip(shown, hues, strict=True)):
        left.plot([engine.alone.p50, engine.alone.p95], [row, row], color=hue, alpha=0.45, linewidth=6)
        left.plot(engine.alone.p50, row, "o", color=hue, markersize=8)
        loads, rates = zip(*((load.concurrency, load.photos_per_s) for load in engine.loads), strict=True)
        right.plot(loads, rates, "o-", color=hue, markersize=6)
    if budget_ms:
        left.axvline(budget_ms, color=RED, linestyle="--", linewidth=1.5)
        left.text(budget_ms, -0.55, f" budget {budget_ms:g} ms", color=RED, fontsize=9, va="top")
    left.set_yticks(range(len(shown)), [engine.name for engine in shown])
    for label, hue in zip(left.get_yticklabels(), hues, strict=True):
        label.set_color(hue)  # the lines on the right have no other legend
    left.set_ylim(len(shown) - 0.4, -0.9)  # the first engine on top
    times = [ms for engine in shown for ms in (engine.alone.p50, engine.alone.p95)] + [budget_ms] * (budget_ms > 0)
    left.set(xscale="log", xlim=(min(times) / 2, max(times) * 2), xlabel="milliseconds for a photo alone")
    right.set_xscale("log", base=2)
    right.set(yscale="log", xlabel="requests under way", ylabel="photos a second")
    right.set_xticks(_loads(shown), [str(n) for n in _loads(shown)])
    for axes, axis in ((left, left.xaxis), (right, right.yaxis)):
        axes.minorticks_off()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    quick = min(shown, key=lambda engine: engine.alone.p50)
    most = max(shown, key=lambda engine: engine.fastest.photos_per_s)
    return drawn, (
        f"{quick.name} is fastest for a photo alone ({number(quick.alone.p50)} ms); most photos go through {most.name} "
        f"({number(most.fastest.photos_per_s)} a second, {most.fastest.concurrency} under way)."
    )


def choice(engines: Sequence[Engine], budget_ms: float) -> str:
    """The conclusion in Markdown: which engine to run the tuned model with, and whether the budget leaves it a place."""
    measured = [e for e in engines if e.kind in ("process", "server") and e.loads]
    agreeing = [e for e in measured if (e.same_breed or 0) >= AGREE]
    quick = [e for e in agreeing if not budget_ms or e.alone.p50 <= budget_ms]
    best = max(quick, key=lambda e: e.fastest.photos_per_s) if quick else min(agreeing, key=lambda e: e.alone.p50)
    alone, fastest = number(best.alone.p50), best.fastest
    which = f"the most of {len(quick)} engines that keep" if len(quick) > 1 else "the only engine that keeps"
    which += f" the budget of {budget_ms:g} ms" if budget_ms else " to its breeds"
    lines = [
        f"**Run it with {best.name}**: {alone} ms for a photo alone, and {number(fastest.photos_per_s)} photos/s with "
        f"{fastest.concurrency} under way, {which}."
        if quick
        else f"**No measured engine keeps the budget of {budget_ms:g} ms on this machine.** The fastest is {best.name} with {alone} "
        f"ms, {best.alone.p50 / budget_ms:.1f} times the budget; the plan says to skip the VLM where the budget is firm."
    ]
    light = min(agreeing, key=lambda e: e.memory_mb or float("inf"))
    if best.memory_mb and light.memory_mb and light.memory_mb < 0.8 * best.memory_mb:
        lines.append(
            f"Where memory is short, {light.name} needs {light.memory_mb:,.0f} MB in place of {best.memory_mb:,.0f} MB, at "
            f"{light.alone.p50 / best.alone.p50:.1f} times the time."
        )
    if rivals := [e for e in engines if e.kind in ("clip", "probe") and e.loads]:
        rival = min(rivals, key=lambda e: e.alone.p50)
        lines.append(
            f"{rival.name} answers in {number(rival.alone.p50)} ms: the tuned VLM takes {best.alone.p50 / rival.alone.p50:.1f} times "
            "as long. Whether it is worth that is notebook 04's question."
        )
    others = [(e.name, 1 - (e.same_breed or 0)) for e in measured if e not in agreeing]
    lines += [f"{name} names another breed on {other:.0%} of the photos: not the same model." for name, other in others]
    if shaky := [e.name for e in measured if e.under_load != 1]:
        lines.append(f"Under load some answers change with {', '.join(shaky)}: rounding differs with the batch.")
    if left_out := [f"{e.name} ({e.note})" for e in engines if not e.loads]:
        lines.append(f"Not measured: {'; '.join(left_out)}.")
    return "\n".join(f"- {line}" for line in lines)


def _loads(engines: Sequence[Engine]) -> list[int]:
    """The numbers of requests at which some engine was measured."""
    return sorted({load.concurrency for engine in engines for load in engine.loads})
