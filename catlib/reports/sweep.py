"""The same run with several values of one parameter, and one page with the learning curve."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from catlib.classifiers.tracks import TUNED, names_of, track
from catlib.errors import InputError
from catlib.evaluation.plots import learning_curve, slope
from catlib.evaluation.tables import share
from catlib.files import write_text
from catlib.paths import resolve
from catlib.reports import html
from catlib.reports.index import render_all_runs, results
from catlib.settings import DataSettings, all_options, parse_assignment, parse_value, read_profile


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """`key=v1,v2,…`, the values typed as the parameter is. Raises InputError unless two or more numbers differ."""
    key, _, values = text.partition("=")
    key = key.strip()
    parse_assignment(f"{key}={values.split(',')[0]}")  # names an unknown key
    found = [parse_value(all_options()[key], value.strip(), "--sweep") for value in values.split(",")]
    if len(set(found)) < 2 or any(isinstance(value, (bool, str)) or value <= 0 for value in found):
        raise InputError(
            f"--sweep {text}: expected two or more different positive numbers, as photos_per_breed=5,10,20"
        )
    return key, sorted(set(found))


def member(run: str, profile: Path, overrides: Mapping[str, Any], key: str, value: Any) -> tuple[str, dict[str, Any]]:
    """Name and parameters of one run of a sweep.

    A parameter of the data gives each run a data folder of its own. Every run has its own checkpoint.
    """
    given = read_profile(profile) | dict(overrides)
    suffix = f"-{key}={value:g}"
    own = {key: value}
    if key in {field.name for field in fields(DataSettings)}:
        own["data_dir"] = given.get("data_dir", all_options()["data_dir"].default) + suffix
    if "output_dir" in given:
        own["output_dir"] = given["output_dir"] + suffix
    return run + suffix, dict(overrides) | own


def curve_page(run: str, key: str, runs: Sequence[tuple[float, str]]) -> Path:
    """Write reports/sweep-RUN-KEY.html from the metrics of `runs`, pairs of value and run name."""
    measured = [(value, results(resolve("outputs/runs") / name)) for value, name in runs]
    measured = [(value, metrics) for value, metrics in measured if metrics.get("models")]
    if not measured:  # the notebooks that were asked for have no figures
        return render_all_runs()
    curve = learning_curve(measured, key)
    rows = [
        {
            key: f"{value:g}",
            "model": track(name).short,
            "accuracy": share(m["accuracy"]),
            "priority F1": share(m["priority_macro_f1"]),
        }
        for value, metrics in measured
        for name, m in metrics["models"].items()
    ]
    title = f"{run}: what {key.replace('_', ' ')} changes"
    said = [
        slope(measured, key, name, figure)
        for name in (TUNED, *names_of("opponent"))
        for figure in ("priority_macro_f1", "accuracy")
        if any(metrics["models"].get(name, {}).get(figure) for _, metrics in measured)
    ]
    body = f"<h1>{escape(title)}</h1><ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in said)}</ul>"
    body += f"{curve._repr_html_()}{html.table(pd.DataFrame(rows))}"
    body += (
        f"<p>Meaning of {key}: {escape(all_options()[key].metadata['help'])}. Per cent, 95 % intervals in brackets.</p>"
    )
    links = " ".join(f'<a href="{quote(name)}/index.html">{escape(name)}</a>' for _, name in runs)
    path = resolve("reports") / f"sweep-{run}-{key}.html"
    write_text(path, html.page(title, f'<a href="index.html">all runs</a> {links}', body))
    render_all_runs()
    return path
