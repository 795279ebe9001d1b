"""Figures as tables: rows for a notebook, aligned text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from catlib.evaluation.names import ordered, short

Rows = list[dict[str, str]]


def model_rows(models: Mapping[str, Mapping[str, Any]]) -> Rows:
    """The headline figures of each model with their 95 % intervals, and its time for a photo."""
    return [
        {
            "model": short(name),
            "photos": str(m["n"]),
            "accuracy": share(m["accuracy"]),
            "macro-F1": share(m["macro_f1"]),
            "priority F1": share(m["priority_macro_f1"]),
            "top 3": share(m["top3_accuracy"]),
            "ECE": share(m["ece"]),
            "no breed": "-" if m["invalid_rate"] is None else f"{m['invalid_rate']['value']:.1%}",
            "ms p50 / p95": f"{number(m['latency_ms']['p50'])} / {number(m['latency_ms']['p95'])}",
            "photos/s": number(m.get("photos_per_second")),
        }
        for name, m in ((name, models[name]) for name in ordered(list(models)))
    ]


def breed_rows(metrics: Mapping[str, Any], only_priority: bool = False) -> Rows:
    """Precision, recall, F1 and support of each breed with photos or wrong calls, lowest F1 first."""
    table = metrics["per_breed"]
    kept = [b for b, r in table.items() if (r["support"] or r["predicted"]) and (r["priority"] or not only_priority)]
    return [
        {
            "breed": ("* " if table[breed]["priority"] else "") + breed,
            "precision": percent(table[breed]["precision"]),
            "recall": percent(table[breed]["recall"]),
            "F1": share({"value": table[breed]["f1"], "ci95": table[breed]["f1_ci95"]}),
            "photos": str(table[breed]["support"]),
            "no breed": str(table[breed]["no_answer"]),
        }
        for breed in sorted(kept, key=lambda b: (table[b]["f1"] is None, table[b]["f1"], b))
    ]


def comparison_rows(comparisons: Sequence[Mapping[str, Any]]) -> Rows:
    """The paired gains of a over b, in points with 95 % intervals, and McNemar's exact p."""
    return [
        {
            "gain of": short(c["a"]),
            "over": short(c["b"]),
            "photos": str(c["n"]),
            "accuracy, points": points({"value": c["accuracy_gain_points"], "ci95": c["ci95"]}),
            "McNemar p": "< 0.001" if c["mcnemar_p"] < 0.001 else f"{c['mcnemar_p']:.3f}",
            "macro-F1, points": points(c["macro_f1_gain_points"]),
            "priority F1, points": points(c["priority_f1_gain_points"]),
        }
        for c in comparisons
    ]


def confusion_rows(comparison: Mapping[str, Any], which: str) -> Rows:
    """The confusions that `vanish` or `appear` in a against b, with their photos."""
    return [
        {
            "true breed": c["breed"],
            "called": c["said"],
            short(comparison["b"]): str(c["b"]),
            short(comparison["a"]): str(c["a"]),
        }
        for c in comparison["confusions"][which]
    ]


def text_table(rows: Rows, indent: str = "  ") -> str:
    """Rows as aligned columns, the first flush left and the others flush right."""
    if not rows:
        return f"{indent}(none)"
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    lines = [dict(zip(rows[0], rows[0], strict=True)), *rows]
    return "\n".join(
        indent
        + "  ".join(f"{line[k]:<{w}}" if i == 0 else f"{line[k]:>{w}}" for i, (k, w) in enumerate(widths.items()))
        for line in lines
    )


def markdown_table(rows: Rows) -> str:
    """Rows as a Markdown table, for a cell that is shown as text in a report."""
    if not rows:
        return "(none)"
    escaped = [[_unbroken(row[key].replace("|", "\\|")) for key in rows[0]] for row in rows]
    lines = [list(rows[0]), [":--", *["--:"] * (len(rows[0]) - 1)], *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _unbroken(cell: str) -> str:
    """A figure and its interval stay on one line."""
    return cell.replace(" ", "\u00a0") if "[" in cell or " / " in cell else cell


def share(figure: Mapping[str, Any] | None) -> str:
    """ "84.8 [82.7, 86.7]": per cent with its 95 % interval; "-" where there is none."""
    if figure is None or figure["value"] is None:
        return "-"
    low, high = figure["ci95"]
    return f"{100 * figure['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def points(figure: Mapping[str, Any] | None) -> str:
    """ "+3.1 [+0.2, +6.0]": points with their 95 % interval; "-" where there are none."""
    if figure is None:
        return "-"
    return f"{signed(figure['value'])} [{signed(figure['ci95'][0])}, {signed(figure['ci95'][1])}]"


def signed(points: float) -> str:
    """Points with their sign; a second digit where one would say "-0.0", which is neither a loss nor none."""
    return f"{points:+.2f}" if 0 < abs(points) < 0.05 else f"{points:+.1f}"


def percent(value: float | None) -> str:
    """ "84.8", or "-" where there is nothing to divide by."""
    return "-" if value is None else f"{100 * value:.1f}"


def number(value: float | None) -> str:
    """A time or a rate with as many digits as it deserves."""
    return "-" if value is None else f"{value:.1f}" if value < 10 else f"{value:.0f}"
