"""The table and figure of the engines, and which of them to choose: computed from the figures."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from catlib.evaluation.style import BLUE, GREEN, GREY, INK, ORANGE, PINK, RED, SKY, WIDTH, styled
from catlib.evaluation.tables import Rows, number
from catlib.serving.bench import Engine

AGREE = 0.95  # an engine that names another breed than the reference more often than this allows is not a way to run it
STEPS = (1, 2, 5)  # ticks within a decade
HUES = {"process": (BLUE, SKY, PINK), "server": (GREEN, GREY), "clip": (ORANGE,), "probe": (RED, INK)}


def engine_rows(engines: Sequence[Engine], budget_ms: float) -> Rows:
    """A line for each engine: time alone against the budget, photos a second at each load, memory, agreement."""
    most = sorted({load.concurrency for engine in engines for load in engine.loads})
    rows = []
    for engine in engines:
        alone, rates = engine.alone, {load.concurrency: load.photos_per_s for load in engine.loads}
        rows.append(
            {
                "engine": engine.name,
                "p50, ms": number(alone.p50) if alone else "-",
                "p95, ms": number(alone.p95) if alone else "-",
                f"within {budget_ms:g} ms": ("yes" if alone.p50 <= budget_ms else "no") if alone else "-",
                **{f"photos/s, {n} at a time": number(rates.get(n)) for n in most},
                "memory, MB": "-" if engine.memory_mb is None else f"{engine.memory_mb:,.0f}",
                "same answer": _share(engine.same_answer),
                "same breed": _share(engine.same_breed),
                "same under load": _share(engine.under_load),
            }
        )
    return rows


def notes_sentence(engines: Sequence[Engine]) -> str:
    """Why some engines were not measured, and where figures are not from here; what the agreement is with."""
    reference = next(engine.name for engine in engines if engine.loads)
    notes = [f"- {engine.name}: {engine.note}" for engine in engines if engine.note]
    return "\n".join([f"Agreement is with {reference}, asked about one photo at a time.", "", *notes])


@styled
def engines_figure(engines: Sequence[Engine], budget_ms: float) -> Figure:
    """Left, milliseconds for a photo that comes alone, median to 95th percentile; right, photos a second by load."""
    shown = [engine for engine in engines if engine.loads]
    hues = _hues(shown)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 1.9 + 0.38 * len(shown)), width_ratios=(1.25, 1))
    for row, engine in enumerate(reversed(shown)):
        p50, p95 = engine.alone.p50, engine.alone.p95
        left.plot([p50, p95], [row, row], color=hues[engine.name], alpha=0.45, linewidth=6, solid_capstyle="round")
        left.plot(p50, row, "o", color=hues[engine.name], markersize=8)
    left.axvline(budget_ms, color=RED, linestyle="--", linewidth=1.5)
    left.text(budget_ms, len(shown) - 0.45, f" budget {budget_ms:g} ms", color=RED, fontsize=9, va="bottom")
    left.set_xscale("log")
    times = [ms for engine in shown for ms in (engine.alone.p50, engine.alone.p95)] + [budget_ms]
    left.set_xlim(min(times) / 2, max(times) * 2)
    left.xaxis.set_major_locator(LogLocator(subs=STEPS))
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.set_yticks(range(len(shown)), [engine.name for engine in reversed(shown)])
    for label, engine in zip(left.get_yticklabels(), reversed(shown), strict=True):
        label.set_color(hues[engine.name])  # the lines on the right have no other legend
    left.set_ylim(-0.6, len(shown) - 0.1)
    left.set_xlabel("milliseconds for a photo alone")
    for engine in shown:
        loads = engine.loads
        right.plot(
            [load.concurrency for load in loads],
            [load.photos_per_s for load in loads],
            "o-",
            color=hues[engine.name],
            markersize=6,
        )
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    ticks = sorted({load.concurrency for engine in shown for load in engine.loads})
    right.set_xticks(ticks, [str(tick) for tick in ticks])
    left.minorticks_off()
    right.minorticks_off()
    right.yaxis.set_major_locator(LogLocator(subs=STEPS))
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.set_xlabel("requests under way")
    right.set_ylabel("photos a second")
    return figure


def choice(engines: Sequence[Engine], budget_ms: float) -> str:
    """The conclusion in Markdown: which engine to run the tuned model with, and whether the budget leaves it a place."""
    measured = [e for e in engines if e.kind in ("process", "server") and e.loads]
    agreeing = [e for e in measured if e.same_breed >= AGREE]
    rivals = [e for e in engines if e.kind in ("clip", "probe") and e.loads]
    quick = [e for e in agreeing if e.alone.p50 <= budget_ms]
    lines = []
    if quick:
        best = max(quick, key=lambda e: e.fastest.photos_per_s)
        others = len(quick) - 1
        lines.append(
            f"**Run it with {best.name}**: {number(best.alone.p50)} ms for a photo alone, within the budget of {budget_ms:g} ms, "
            f"and {number(best.fastest.photos_per_s)} photos/s with {best.fastest.concurrency} under way, "
            + (
                f"the most of {others + 1} engines that keep the budget."
                if others
                else "the only engine that keeps the budget."
            )
        )
    else:
        best = min(agreeing, key=lambda e: e.alone.p50)
        lines.append(
            f"**No measured engine keeps the budget of {budget_ms:g} ms on this machine.** The fastest is {best.name} with "
            f"{number(best.alone.p50)} ms, {best.alone.p50 / budget_ms:.1f} times the budget; the plan says to skip the VLM where "
            "the budget is firm."
        )
    light = min((e for e in agreeing if e.memory_mb), key=lambda e: e.memory_mb, default=None)
    if light and light is not best and best.memory_mb and light.memory_mb < 0.8 * best.memory_mb:
        lines.append(
            f"Where memory is short, {light.name} needs {light.memory_mb:,.0f} MB in place of {best.memory_mb:,.0f} MB, at "
            f"{light.alone.p50 / best.alone.p50:.1f} times the time."
        )
    if rivals:
        rival = min(rivals, key=lambda e: e.alone.p50)
        lines.append(
            f"{rival.name} answers in {number(rival.alone.p50)} ms: the tuned VLM takes {best.alone.p50 / rival.alone.p50:.1f} times "
            f"as long. Whether it is worth that is notebook 04's question."
        )
    for engine in measured:
        if engine not in agreeing:
            lines.append(
                f"{engine.name} names another breed on {1 - engine.same_breed:.0%} of the photos: not the same model."
            )
    shaky = [e.name for e in measured if e.under_load < 1]
    if shaky:
        lines.append(f"Under load some answers change with {', '.join(shaky)}: rounding differs with the batch.")
    if left_out := [e.name for e in engines if not e.loads]:
        lines.append(f"Not measured: {', '.join(left_out)}.")
    return "\n- ".join(["", *lines]).strip()


def _hues(engines: Sequence[Engine]) -> dict[str, str]:
    left = {kind: list(hues) for kind, hues in HUES.items()}
    return {engine.name: left[engine.kind].pop(0) if left[engine.kind] else GREY for engine in engines}


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
