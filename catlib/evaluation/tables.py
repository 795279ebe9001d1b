"""Figures as tables: DataFrames of text cells for a notebook or a page, aligned text for a terminal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec

import pandas as pd

from catlib.classifiers.tracks import UNKNOWN, ordered, track

Entry = Mapping[str, Any]
P = ParamSpec("P")
REASONS = {  # of the photos; of the reasons; of the traits that are named, twice; of the breeds
    "with a reason": "given",
    "of these whole": "complete",
    "traits of the breed named": "of_breed_named",
    "traits of the true breed": "of_true_breed",
    "breeds with several reasons": "breeds_with_several",
}

# A table of 67 breeds, or a criterion's whole name, is meant to be read, not abridged.
pd.set_option("display.max_rows", None, "display.max_columns", None, "display.max_colwidth", None)


def _table(rows: Callable[P, Iterator[dict[str, str]]]) -> Callable[P, pd.DataFrame]:
    """What a function yields as a table that is labelled by its first column."""

    @wraps(rows)
    def made(*args: P.args, **kwargs: P.kwargs) -> pd.DataFrame:
        table = pd.DataFrame(rows(*args, **kwargs))
        return table if table.empty else table.set_index(table.columns[0])

    return made


@_table
def model_table(models: Mapping[str, Entry]) -> Iterator[dict[str, str]]:
    """The headline figures of each model with their 95 % intervals, and its time for a photo."""
    for name, m in ((name, models[name]) for name in ordered(models)):
        yield {
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
        }


@_table
def confidence_table(models: Mapping[str, Entry]) -> Iterator[dict[str, str]]:
    """How far confidence can be believed: Brier score, calibration error before and after the fitted temperature, area under the
    risk-coverage curve, AUROC against photos of none of the breeds, and gains of accuracy on changed photos, in points."""
    sets = dict.fromkeys(photos for m in models.values() for photos in m.get("further") or ())
    for name, m in ((name, models[name]) for name in ordered(models)):
        fitted, area = m.get("calibration") or {}, (m.get("calibration") or {}).get("area_under_risk_coverage")
        row = {"model": track(name).short, "Brier": _told(m.get("brier"), "{:.3f}".format), "ECE": share(m["ece"])}
        row |= {"ECE, calibrated": share(fitted.get("ece")), "area, risk-coverage": percent(area)}
        for own, photos in (((m.get("further") or {}).get(photos) or {}, photos) for photos in sets):
            if photos == UNKNOWN:
                row["unknown, by probability"] = share(own.get("max_probability"))
                row["by energy"] = share(own.get("energy"))
            else:
                row[photos] = points(own.get("gain_points"))
        yield row


def reasons_table(models: Mapping[str, Entry]) -> pd.DataFrame | None:
    """What the reasons of each model are worth (`results.reason_figures`), per cent, beside accuracy and time, and those of the
    model without words. None, which a notebook does not show, where no model gives any."""
    told = {name: m.get("reason_figures") or {} for name, m in models.items()}
    kept = [n for n in ordered(models) if told[n] or any(told[m] and track(m).of == n for m in models)]
    table = pd.DataFrame({title: [percent(told[n].get(key)) for n in kept] for title, key in REASONS.items()})
    table["traits a reason"] = [number(told[n].get("traits")) for n in kept]
    table["accuracy"] = [share(models[n]["accuracy"]) for n in kept]
    table["ms, median"] = [milliseconds(models[n]) for n in kept]
    return table.set_index(pd.Index([track(n).short for n in kept], name="model")) if kept else None


def right_of_total(m: Entry) -> str:
    """ "14 of 35": photos of the priority breeds that are named rightly; "-" without such breeds."""
    rare, photos = m.get("priority_accuracy"), sum(row["support"] for row in m["per_breed"].values() if row["priority"])
    return "-" if rare is None else f"{round(rare['value'] * photos)} of {photos}"


def milliseconds(m: Entry) -> str:
    """ "91 ms [88, 94]": the median time of a model for a photo with its interval."""
    ms = m["latency_ms"]
    return "not measured" if ms["p50"] is None else f"{number(ms['p50'])} ms{within(ms.get('p50_ci95'), number)}"


def cost(m: Entry, price_per_hour: float = 0.0) -> str:
    """ "4.2 min": how long a model works on 1,000 photos, and, with a price, what that costs."""
    rate, p50 = m.get("photos_per_second"), m["latency_ms"]["p50"]
    if not rate and p50 is None:
        return "not measured"
    seconds = 1000 / rate if rate else p50
    said = f"{number(seconds)} s" if seconds < 120 else f"{number(seconds / 60)} min"
    return said + (f" (price {price_per_hour * seconds / 3600:.2g})" if price_per_hour else "")


@_table
def breed_table(metrics: Entry, only_priority: bool = False) -> Iterator[dict[str, str]]:
    """Precision, recall, F1 and support of each breed with photos or wrong calls, lowest F1 first (*: priority)."""
    table = metrics["per_breed"]
    kept = [b for b, r in table.items() if (r["support"] or r["predicted"]) and (r["priority"] or not only_priority)]
    for breed in sorted(kept, key=lambda b: (table[b]["f1"] is None, table[b]["f1"], b)):
        row = table[breed]
        yield {
            "breed": ("* " if row["priority"] else "") + breed,
            "precision": percent(row["precision"]),
            "recall": percent(row["recall"]),
            "F1": share({"value": row["f1"], "ci95": row["f1_ci95"]}),
            "photos": str(row["support"]),
            "no breed": str(row["no_answer"]),
        }


@_table
def comparison_table(comparisons: Sequence[Entry]) -> Iterator[dict[str, str]]:
    """The paired gains of a over b, in points with 95 % intervals, and the paired test's p."""
    for c in comparisons:
        yield {
            "gain of": track(c["a"]).short,
            "over": track(c["b"]).short,
            "photos": str(c["n"]),
            "accuracy, points": points({"value": c["accuracy_gain_points"], "ci95": c["ci95"]}),
            "p": "< 0.001" if c["p"] < 0.001 else f"{c['p']:.3f}",
            "macro-F1, points": points(c["macro_f1_gain_points"]),
            "priority F1, points": points(c["priority_f1_gain_points"]),
        }


def test_name(c: Entry) -> str:
    """The paired test behind a comparison's p."""
    single = c.get("groups", c["n"]) == c["n"]
    return "McNemar's exact test" if single else f"exact sign-flip test over {c['groups']} groups"


@_table
def confusion_table(comparison: Entry, which: str) -> Iterator[dict[str, str]]:
    """The confusions that `vanish` or `appear` in a against b, with their photos."""
    a, b = (track(comparison[side]).short for side in ("a", "b"))
    for c in comparison["confusions"][which]:
        yield {"true breed": c["breed"], "called": c["said"], b: str(c["b"]), a: str(c["a"])}


@_table
def criteria_table(criteria: Sequence[Entry]) -> Iterator[dict[str, str]]:
    """The plan's criteria and rules: target, what was measured, and whether it is met or applies."""
    said = {"success": ("met", "not met"), "skip": ("applies", "does not apply"), "do": ("applies", "does not apply")}
    for c in criteria:
        result = c["met"] if isinstance(c["met"], str) else said[c["kind"]][not c["met"]]
        yield {"criterion": c["name"], "target": c["target"], "measured": measured(c), "result": result}


def text_table(rows: pd.DataFrame | list[dict[str, str]], indent: str = "  ") -> str:
    """A table as aligned columns, the first flush left and the others flush right."""
    table = pd.DataFrame(rows)
    table = table.reset_index() if table.index.name else table
    if table.empty:
        return f"{indent}(none)"
    lines = [list(table.columns), *table.to_numpy().tolist()]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    aligned = ([line[0].ljust(first), *map(str.rjust, line[1:], others)] for line in lines)
    return "\n".join(indent + "  ".join(line) for line in aligned)


def measured(c: Entry) -> str:
    """A criterion's value with its interval, in its unit: "54.2 % [38.0, 70.1]"."""
    if c["value"] is None:
        return c["note"] if c["unit"] == "" else "not measured"
    if c["unit"] == "ms":
        return f"{c['value']:.1f} ms"
    return points(c, " points") if c["unit"] == "points" else share(c, " %")


def share(figure: Entry | None, unit: str = "") -> str:
    """ "84.8 [82.7, 86.7]": per cent with its 95 % interval; "-" where there is none."""
    return _told(figure, percent, unit)


def in_words(figure: Entry | None) -> str:
    """ "84.8% [82.7%, 86.7%]": a share in a sentence."""
    return _told(figure, "{:.1%}".format)


def points(figure: Entry | None, unit: str = "") -> str:
    """ "+3.1 [+0.2, +6.0]": points with their 95 % interval; "-" where there are none."""
    return _told(figure, signed, unit)


def _told(figure: Entry | None, write: Callable[[float], str], unit: str = "") -> str:
    if figure is None or figure["value"] is None:
        return "-"
    return f"{write(figure['value'])}{unit}{within(figure['ci95'], write)}"


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
