"""The same run with several values of parameters, and one page that compares them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from scipy import stats

from catlib.classifiers.tracks import TUNED, names_of, ordered, track
from catlib.errors import InputError
from catlib.evaluation.plots import learning_curve, slope
from catlib.evaluation.tables import points, share
from catlib.files import write_text
from catlib.paths import folder_of_run, resolve
from catlib.reports import html
from catlib.reports.index import render_all_runs, results
from catlib.settings import DataSettings, all_options, parse_assignment, parse_value, read_profile

SEED = "train_seed"
FIGURES = {"accuracy": "accuracy", "priority_macro_f1": "priority F1"}


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """`key=v1,v2,…` (`;` between texts with commas), the values typed as the parameter is. Raises InputError unless they differ."""
    key, _, values = text.partition("=")
    key = key.strip()
    texts = [value.strip() for value in values.split(";" if ";" in values else ",")]
    parse_assignment(f"{key}={texts[0]}")  # names an unknown key
    found = [parse_value(all_options()[key], text, "--sweep") for text in texts]
    if len(set(found)) < len(found) or len(found) < 2:
        raise InputError(f"--sweep {text}: expected two or more different values, as photos_per_breed=5,10,20")
    return key, found if isinstance(found[0], str) else sorted(found)


def member(run: str, profile: Path, overrides: Mapping[str, Any], key: str, value: Any) -> tuple[str, dict[str, Any]]:
    """Name and parameters of one run of a sweep. A parameter of the data gives each run a data folder of its own. Every
    run has its own checkpoint."""
    given = read_profile(profile) | dict(overrides)
    suffix = f"-{key}={written(value)}"
    own = {key: value}
    if key in {field.name for field in fields(DataSettings)}:
        own["data_dir"] = given.get("data_dir", all_options()["data_dir"].default) + suffix
    if "output_dir" in given:
        own["output_dir"] = given["output_dir"] + suffix
    return run + suffix, dict(overrides) | own


def written(value: Any) -> str:
    """A value as it stands in names and tables; what no file name may hold becomes an underscore."""
    return f"{value:g}" if isinstance(value, float) else re.sub(r'[/\\"<>|:*?\0]', "_", str(value))


def members(
    run: str, profile: Path, overrides: Mapping[str, Any], sweeps: Sequence[tuple[str, Sequence[Any]]]
) -> list[tuple[tuple[Any, ...], str, dict[str, Any]]]:
    """Values, name and parameters of each run: one for every combination of the swept parameters' values. Raises
    InputError where two runs would have one name."""
    found: list[tuple[tuple[Any, ...], str, dict[str, Any]]] = [((), run, dict(overrides))]
    for key, values in sweeps:
        found = [((*at, v), *member(name, profile, given, key, v)) for at, name, given in found for v in values]
    names, keys = {name for _, name, _ in found}, {key for key, _ in sweeps}
    if len(names) < len(found) or len(keys) < len(sweeps):
        raise InputError("--sweep: a parameter stands twice, or two of its values give a run the same name")
    return found


def curve_page(run: str, keys: Sequence[str], runs: Sequence[tuple[tuple[Any, ...], str]]) -> Path:
    """Write reports/sweep-RUN-KEYS.html from the metrics of `runs`, pairs of the keys' values and the run's name. Numbers of
    one parameter get a curve."""
    found = [(values, name, results(folder_of_run(name))) for values, name in runs]
    measured = [(values, metrics) for values, _, metrics in found if metrics.get("models")]
    if not measured:  # the notebooks that were asked for have no figures
        return render_all_runs()
    seeds = _over_seeds(keys, measured)
    curve = [(values[0], metrics) for values, metrics in measured if len(keys) == 1 and not seeds]
    if any(isinstance(value, (bool, str)) or value <= 0 for value, _ in curve):
        curve = []
    models = [name for name in (TUNED, *names_of("opponent")) if any(name in m["models"] for _, m in measured)]
    rows = [
        dict(zip(keys, map(written, values), strict=True))
        | {"model": track(name).short if name else "no figures"}
        | {what: share(metrics["models"][name][k]) if name else "-" for k, what in FIGURES.items()}
        for values, _, metrics in found
        for name in metrics.get("models", [""])
    ]
    table = pd.DataFrame(rows)
    if len(keys) == 1:  # a model with the same figures in several runs, as what was not trained has, gets one row
        same = [column for column in table if column not in keys]
        table = table.iloc[pd.factorize(table["model"])[0].argsort(kind="stable")]  # a model's rows stand together
        table = table.groupby(same, sort=False, as_index=False)[list(keys)].agg(", ".join)[list(table)]
    path = resolve("reports") / f"sweep-{run}-{'-'.join(keys)}.html"
    values = {
        "title": f"{run}: what {' and '.join(keys).replace('_', ' ')} change{'s' if len(keys) == 1 else ''}",
        "said": [slope(curve, keys[0], name, figure) for name in models for figure in FIGURES] if curve else seeds,
        "curve": Markup(learning_curve(curve, keys[0])._repr_html_()) if curve else "",
        "rows": table,
        "meaning": {key: all_options()[key].metadata["help"] for key in keys},
        "members": [name for _, name in runs],
    }
    write_text(path, html.render("sweep.html.j2", **values))
    render_all_runs()
    return path


def _over_seeds(keys: Sequence[str], runs: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> list[str]:
    """What runs that differ by their training seed alone say together, for each combination of the other parameters."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for values, metrics in runs if SEED in keys else ():
        others = (f"{key}={written(v)}" for key, v in zip(keys, values, strict=True) if key != SEED)
        groups.setdefault(", ".join(others), []).append(metrics)
    several = {name: own for name, own in groups.items() if len(own) > 1}
    return [f"{name}: {said}".removeprefix(": ") for name, own in several.items() for said in said_of_seeds(own)]


def said_of_seeds(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each other model a sentence: mean and spread of the tuned VLM's gain, and whether another seed would give it as well."""
    sentences = []
    for row in gains_over_seeds(runs):
        gain = points({"value": row["mean"], "ci95": row["ci95"]}, " points")
        low, high = row["ci95"] or (-math.inf, math.inf)
        sure = "another seed would gain as well" if low > 0 else "another seed would lose as well" if high < 0 else ""
        judged = sure or "another seed, or other test photos, may turn it round"
        sentences.append(
            f"Over {track(row['b']).title} {track(TUNED).title} gains {gain} in the mean of {row['n']} training seeds, standard "
            f"deviation {row['sd']:.1f}: {judged}."
        )
    return sentences


def gains_over_seeds(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tuned VLM's gain in accuracy over each other model, in points: {"b", "n", "mean", "sd", "ci95"}. `runs`: their metrics.json.

    `ci95` is where the gain of another training would lie, on other test photos: the prediction interval of Student's t with the
    variance between seeds, sd^2 (1 + 1/n), and that of the test photos, from the runs' own intervals; None where a run has
    none. Raises InputError for fewer than two runs.
    """
    if len(runs) < 2:
        raise InputError(f"the spread of training seeds needs at least two runs; there are {len(runs)}")
    found = []
    for name in ordered({c["b"] for run in runs for c in run.get("comparisons", ()) if c["a"] == TUNED}):
        rows = [c for run in runs for c in run["comparisons"] if (c["a"], c["b"]) == (TUNED, name)]
        if (n := len(rows)) < 2:
            continue
        gains, ci95 = np.array([c["accuracy_gain_points"] for c in rows]), None
        mean, sd = float(gains.mean()), float(gains.std(ddof=1))
        if all(c["ci95"] for c in rows):
            photos = float(np.mean([(c["ci95"][1] - c["ci95"][0]) / 2 for c in rows]))
            half = math.hypot(sd * float(stats.t.ppf(0.975, n - 1)) * math.sqrt(1 + 1 / n), photos)
            ci95 = [mean - half, mean + half]
        found.append({"b": name, "n": n, "mean": mean, "sd": sd, "ci95": ci95})
    return found
