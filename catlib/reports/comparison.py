"""A page that compares two runs: what differs in their parameters, the paired gain of each model, and the photos that flipped."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from catlib.classifiers.tracks import ordered, track
from catlib.data.records import PredictionSet
from catlib.errors import InputError
from catlib.evaluation.compare import compare
from catlib.evaluation.metrics_file import read_folder
from catlib.evaluation.tables import comparison_table, milliseconds, reasons_table
from catlib.files import write_text
from catlib.paths import RUNS, folder_of_run, resolve
from catlib.reports import html, index, photos


def compare_runs(runs: tuple[str, str]) -> tuple[Path, dict[str, Any]]:
    """Write reports/compare-A-B.html and return its path and what it says; every gain is that of the second run over
    the first. Raises InputError for a run that is not there, or where no model has predicted a photo in both."""
    settings = [index.parameters_of(find_run(run)) for run in runs]
    changed = {
        key: [str(values.get(key, "-")) for values in settings]
        for key in settings[0] | settings[1]
        if key not in index.NAMES and settings[0].get(key) != settings[1].get(key)
    }
    folders = [folder_of_run(run) for run in runs]
    first, second = (read_folder(folder / "predictions") for folder in folders)
    if not (common := ordered(first.keys() & second.keys())):
        raise InputError(f"{runs[0]} and {runs[1]} have no predictions of the same model")
    rare = index.results(folders[1]).get("priority_breeds", [])
    found = {name: _gain(second[name], first[name], rare) for name in common}
    thumbnails = photos.Thumbnails(photos.image_root(settings[1]), photos.ROOM_TO_MAIL)
    table = comparison_table(list(found.values())).drop(columns="over").rename_axis("model")
    for at, run, side in ((1, runs[0], "b"), (2, runs[1], "a")):
        table.insert(at, f"accuracy of {run}", [f"{c['accuracy'][side]:.1%}" for c in found.values()])
    measured = [index.results(folder).get("models", {}) for folder in folders]
    for run, models in zip(runs, measured, strict=True):
        table[f"ms of {run}"] = [milliseconds(models[name]) if name in models else "-" for name in common]
    table["left out"] = [str(sum(c["dropped"].values())) for c in found.values()]
    path = resolve("reports") / f"compare-{runs[0]}-{runs[1]}.html"
    values = {"title": f"{runs[0]} and {runs[1]}", "runs": runs, "changed": changed, "rows": table, "album": thumbnails}
    values["reasons"] = [(run, reasons_table(models)) for run, models in zip(runs, measured, strict=True)]
    values["flips"] = {track(name).short: _flips(first[name], second[name], thumbnails) for name in common}
    write_text(path, html.render("compare.html.j2", **values))
    index.render_all_runs()
    return path, {"runs": list(runs), "parameters": changed, "models": found}


def find_run(run: str) -> dict[str, Any]:
    """The state of a run by name. Raises InputError where there is none that can be read."""
    state = index.read_state(folder_of_run(run)) if Path(run).name == run else None
    if state is None:
        known = ", ".join(state["run"] for state, _ in index.all_runs()[0]) or "none"
        raise InputError(f"no run {run!r} that can be read in {resolve(RUNS)}; there are: {known}")
    return state


def _gain(a: PredictionSet, b: PredictionSet, priority: Sequence[str]) -> dict[str, Any]:
    tested = {p.breed for p in a.predictions} & {p.breed for p in b.predictions}
    found = compare(a, replace(b, name=a.name), [breed for breed in priority if breed in tested])
    return {key: value for key, value in found.items() if key not in ("breeds", "confusions", "disagreements")}


def _flips(a: PredictionSet, b: PredictionSet, thumbnails: photos.Thumbnails) -> dict[str, list[tuple[Any, Any, str]]]:
    """The photos that only one of two runs has right, by which one it is, with thumbnails as far as there is room."""
    before = {p.id: p for p in a.predictions}
    found: dict[str, list[tuple[Any, Any, str]]] = {"became right": [], "became wrong": []}
    for photo in b.predictions:
        former = before.get(photo.id, photo)
        if (now := photo.predicted == photo.breed) != (former.predicted == former.breed):
            picture = thumbnails.add(photo.image) or "gone"
            found["became right" if now else "became wrong"].append((former, photo, picture))
    return found
