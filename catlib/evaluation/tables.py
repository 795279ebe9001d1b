"""Figures as tables: DataFrames of text cells for a notebook or a page, aligned text for a terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from catlib.classifiers.tracks import ordered, track

Entry = Mapping[str, Any]
Rows = list[dict[str, str]]

# A table of 67 breeds, or a criterion's whole name, is meant to be read, not abridged.
pd.set_option("display.max_rows", None, "display.max_columns", None, "display.max_colwidth", None)


def frame(rows: Rows) -> pd.DataFrame:
    """Rows of text as a table that is labelled by its first column."""
    table = pd.DataFrame(rows)
    return table if table.empty else table.set_index(table.columns[0])


def _reasons(r: Entry | None) -> dict[str, str]:
    """The columns on reasons: how many are whole, and whose traits they name."""
    names = ("whole reasons", "traits of the breed named", "traits of the true breed", "breeds with several reasons")
    keys = ("complete", "of_breed_named", "of_true_breed", "breeds_with_several")
    return {name: percent(r[key] if r else None) for name, key in zip(names, keys, strict=True)}


def model_table(models: Mapping[str, Entry]) -> pd.DataFrame:
    """The headline figures of each model with their 95 % intervals, and its time for a photo."""
    return frame(
        [
            {
                "model": track(name).short,
                "photos": str(m["n"]),
                "accuracy": share(m["accuracy"]),
                "macro-F1": share(m["macro_f1"]),
                "priority F1": share(m["priority_macro_f1"]),
                "priority right": right_of_total(m),
                "top 3": share(m["top3_accuracy"]),
                "ECE": share(m["ece"]),
                "no breed": "-" if m["invalid_rate"] is None else f"{m['invalid_rate']['value']:.1%}",
                "ms, median": milliseconds(m),
                "ms, p95": number(m["latency_ms"]["p95"]),
                "time for 1,000": cost(m),
                **(_reasons(m.get("reason_figures")) if any(m.get("reason_figures") for m in models.values()) else {}),
            }
            for name, m in ((name, models[name]) for name in ordered(models))
        ]
    )


def right_of_total(m: Entry) -> str:
    """ "14 of 35": photos of the priority breeds that are named rightly; "-" without such breeds."""
    rare, photos = m.get("priority_accuracy"), sum(row["support"] for row in m["per_breed"].values() if row["priority"])
    return "-" if rare is None else f"{round(rare['value'] * photos)} of {photos}"


def milliseconds(m: Entry) -> str:
    """ "91 ms [88, 94]": the median time of a model for a photo with its interval."""
    ms = m["latency_ms"]
    if ms["p50"] is None:
        return "not measured"
    return f"{number(ms['p50'])} ms{within(ms.get('p50_ci95'), number)}"


def cost(m: Entry, price_per_hour: float = 0.0) -> str:
    """ "4.2 min": how long a model works on 1,000 photos, and, with a price, what that costs."""
    rate, p50 = m.get("photos_per_second"), m["latency_ms"]["p50"]
    if not rate and p50 is None:
        return "not measured"
    seconds = 1000 / rate if rate else p50
    said = f"{number(seconds)} s" if seconds < 120 else f"{number(seconds / 60)} min"
    return said + (f" (price {price_per_hour * seconds / 3600:.2g})" if price_per_hour else "")


def breed_table(metrics: Entry, only_priority: bool = False) -> pd.DataFrame:
    """Precision, recall, F1 and support of each breed with photos or wrong calls, lowest F1 first (*: priority)."""
    table = metrics["per_breed"]
    kept = [b for b, r in table.items() if (r["support"] or r["predicted"]) and (r["priority"] or not only_priority)]
    return frame(
        [
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
    )


def comparison_table(comparisons: Sequence[Entry]) -> pd.DataFrame:
    """The paired gains of a over b, in points with 95 % intervals, and the paired test's p."""
    return frame(
        [
            {
                "gain of": track(c["a"]).short,
                "over": track(c["b"]).short,
                "photos": str(c["n"]),
                "accuracy, points": points({"value": c["accuracy_gain_points"], "ci95": c["ci95"]}),
                "p": "< 0.001" if c["p"] < 0.001 else f"{c['p']:.3f}",
                "macro-F1, points": points(c["macro_f1_gain_points"]),
                "priority F1, points": points(c["priority_f1_gain_points"]),
            }
            for c in comparisons
        ]
    )


def test_name(c: Entry) -> str:
    """The paired test behind a comparison's p."""
    single = c.get("groups", c["n"]) == c["n"]
    return "McNemar's exact test" if single else f"exact sign-flip test over {c['groups']} groups"


def confusion_table(comparison: Entry, which: str) -> pd.DataFrame:
    """The confusions that `vanish` or `appear` in a against b, with their photos."""
    columns = [track(comparison[side]).short for side in ("b", "a")]
    return frame(
        [
            {"true breed": c["breed"], "called": c["said"], columns[0]: str(c["b"]), columns[1]: str(c["a"])}
            for c in comparison["confusions"][which]
        ]
    )


def criteria_table(criteria: Sequence[Entry]) -> pd.DataFrame:
    """The plan's criteria and rules: target, what was measured, and whether it is met or applies."""
    said = {"success": ("met", "not met"), "skip": ("applies", "does not apply"), "do": ("applies", "does not apply")}
    return frame(
        [
            {
                "criterion": c["name"],
                "target": c["target"],
                "measured": measured(c),
                "result": c["met"] if isinstance(c["met"], str) else said[c["kind"]][not c["met"]],
            }
            for c in criteria
        ]
    )


def text_table(rows: pd.DataFrame | Rows, indent: str = "  ") -> str:
    """A table as aligned columns, the first flush left and the others flush right."""
    table = pd.DataFrame(rows)
    table = table.reset_index() if table.index.name else table
    if table.empty:
        return f"{indent}(none)"
    lines = [list(table.columns), *table.to_numpy().tolist()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    aligned = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in lines
    ]
    return "\n".join(indent + "  ".join(line) for line in aligned)


def measured(c: Entry) -> str:
    """A criterion's value with its interval, in its unit: "54.2 % [38.0, 70.1]"."""
    if c["value"] is None:
        return c["note"] if c["unit"] == "" else "not measured"
    scale, unit = {"share": (100, " %"), "points": (1, " points"), "ms": (1, " ms")}[c["unit"]]
    write = signed if c["unit"] == "points" else "{:.1f}".format
    return f"{write(c['value'] * scale)}{unit}{within(c['ci95'], lambda end: write(end * scale)) if c['unit'] != 'ms' else ''}"


def share(figure: Entry | None) -> str:
    """ "84.8 [82.7, 86.7]": per cent with its 95 % interval; "-" where there is none."""
    if figure is None or figure["value"] is None:
        return "-"
    return f"{100 * figure['value']:.1f}{within(figure['ci95'], lambda end: f'{100 * end:.1f}')}"


def in_words(figure: Entry | None) -> str:
    """ "84.8% [82.7%, 86.7%]": a share in a sentence."""
    if figure is None:
        return "-"
    return f"{figure['value']:.1%}{within(figure['ci95'], '{:.1%}'.format)}"


def points(figure: Entry | None, unit: str = "") -> str:
    """ "+3.1 [+0.2, +6.0]": points with their 95 % interval; "-" where there are none."""
    if figure is None:
        return "-"
    return f"{signed(figure['value'])}{unit}{within(figure['ci95'], signed)}"


def within(ci95: Sequence[float] | None, write: Callable[[float], str]) -> str:
    """An interval after its figure, " [82.7, 86.7]", or that too few groups allow none."""
    return " [no interval]" if ci95 is None else f" [{write(ci95[0])}, {write(ci95[1])}]"


def signed(points: float) -> str:
    """Points with their sign; a second digit where one would say "-0.0", which is neither a loss nor none."""
    return f"{points:+.2f}" if 0 < abs(points) < 0.05 else f"{points:+.1f}"


def percent(value: float | None) -> str:
    """ "84.8", or "-" where there is nothing to divide by."""
    return "-" if value is None else f"{100 * value:.1f}"


def number(value: float | None) -> str:
    """A time or a rate with as many digits as it deserves."""
    return "-" if value is None else f"{value:.1f}" if value < 10 else f"{value:.0f}"
