"""The pages of a run and the page over all runs, written from state.json, metrics.json and the predictions."""

import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import psutil
from markupsafe import Markup

from catlib.classifiers.tracks import ordered, track
from catlib.errors import InputError
from catlib.evaluation.metrics_file import METRICS_FILE, read_metrics
from catlib.evaluation.tables import criteria_table, model_table, reasons_table
from catlib.files import read_json, write_bytes, write_text
from catlib.paths import RUNS, folder_of_run, relative, resolve
from catlib.reports import html, photos

STATE = {"run": str, "profile": str, "status": str, "pid": int, "started": str, "versions": dict, "stages": dict}
STAGE, FURTHER = {"title": str, "status": str}, {"parameters": dict, "data": dict, "outputs": dict, "changed": list}
METRICS = {"models": dict, "recommendation": dict, "criteria": list}  # what the pages show of metrics.json
GO_THERE = Markup('{} ended with an error. <a href="#error">Go there.</a>')
NAMES = ("run", "run_dir", "output_dir", "checkpoint", "hint", "data_dir", "train_data", "val_data", "test_data")
MARKS = ('name="generator" content="catlib"', "· catlib report</title>")  # in pages of this version and of earlier ones
log = logging.getLogger(__name__)


def read_state(run_dir: Path) -> dict[str, Any] | None:
    """The state of a run; None where there is none or it cannot be read. One whose process is gone was interrupted."""
    try:
        state = read_json(run_dir / "state.json")
    except InputError:
        return None
    if not _is_built(state, STATE) or not all(_is_built(entry, STAGE, FURTHER) for entry in state["stages"].values()):
        return None
    state["run"] = run_dir.name  # as the training may have set the run aside under another name
    if state["status"] == "running" and not psutil.pid_exists(state["pid"]):
        for entry in (state, *state["stages"].values()):
            entry["status"] = "interrupted" if entry["status"] == "running" else entry["status"]
    return state


def _is_built(entry: Any, required: Mapping[str, type], optional: Mapping[str, type] | None = None) -> bool:
    fields = {**required, **{key: kind for key, kind in (optional or {}).items() if key in (entry or ())}}
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in fields.items())


def settle(state: Mapping[str, Any], run_dir: Path) -> None:
    """Bring a run's state in line with its folder: results whose executed notebook is gone or damaged count as not run."""
    for name, entry in state["stages"].items():
        if entry["status"] in ("done", "outdated") and _body(run_dir / f"{name}.ipynb") is None:
            entry["status"] = "not run"


def _body(path: Path) -> html.Body | None:
    try:
        return html.notebook_body(path, path.stat().st_mtime_ns) if path.is_file() else None
    except InputError as error:
        log.warning("%s", error)
        return None


def results(run_dir: Path) -> dict[str, Any]:
    """The run's metrics, empty where there are none yet; a damaged file counts as none, and is warned of."""
    path = run_dir / METRICS_FILE
    try:
        metrics = read_metrics(path) if path.is_file() else {}
        if not _is_built(metrics, {}, METRICS):
            raise InputError("no metrics of catlib's")
        model_table(metrics.get("models", {}))
        return metrics
    except (InputError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: cannot be read (%s)", path, error)
        return {}


def report_path(run: str) -> Path:
    """Where the report of a run begins."""
    return resolve("reports") / run / "index.html"


def render(state: Mapping[str, Any], run_dir: Path) -> None:
    """Write the pages of a run and the page over all runs."""
    render_run(state, run_dir)
    render_all_runs()


def render_gate(gate: Mapping[str, Any]) -> Path:
    """Write the page of a gate's answer (the content of gate.json), to which the run's pages link; its path."""
    run, state = gate["wishes"]["run"], read_state(resolve(gate["wishes"]["run_dir"]))
    path = report_path(run).with_name("gate.html")
    values = {"gate": gate, "rules": criteria_table(gate["criteria"]), "measured": model_table(gate["models"])}
    links = [("index.html", run, state is not None), ("gate.html", "Gate", True)]
    new = not path.is_file()  # else the run's pages, which take longer than the answer, link to it already
    write_text(path, html.render("gate.html.j2", run=run, pages=links, title=f"Gate · {run}", **values))
    if state and new:
        render_run(state, resolve(gate["wishes"]["run_dir"]))
    render_all_runs()
    return path


def render_run(state: Mapping[str, Any], run_dir: Path) -> None:
    """Write the pages of a run, and all of them as one file to mail; those without an executed notebook are removed."""
    folder, run, stages, metrics = report_path(state["run"]).parent, state["run"], state["stages"], results(run_dir)
    bodies = {name: body for name in stages if (body := _body(run_dir / f"{name}.ipynb"))}
    mailed = sum(len(body.html) for body in bodies.values())
    every, chosen = photos.albums(run_dir, parameters_of(state), metrics.get("models", {}), mailed)
    links = [(f"{name}.html", entry["title"], name in bodies) for name, entry in stages.items()]
    links = [("index.html", run, True), *[("gate.html", "Gate", True)] * (folder / "gate.html").is_file(), *links]
    links += [("photos/index.html", "Photos", True)] * bool(every)
    common: dict[str, Any] = {"state": state, "bodies": bodies, "pages": links, "metrics": metrics, "run": run}
    common["reasons"] = reasons_table(metrics.get("models", {}))
    common |= {"figures": model_table(metrics.get("models", {})), "title": f"{run} · catlib report", "go_there": ""}
    common["current"] = is_current(state)
    if common["current"]:
        common |= {"advice": metrics.get("recommendation"), "criteria": criteria_table(metrics.get("criteria", []))}
    pages: dict[str, tuple[str, dict[str, Any]]] = {}
    pages |= {"photos/index.html": ("photos.html.j2", {"album": every, "up": "../"})} if every else {}
    pages[f"catlib-{run}.html"] = ("mail.html.j2", {"album": chosen, "go_there": GO_THERE.format("A notebook")})
    for name in bodies:
        title = stages[name]["title"]
        values = {"name": name, "title": f"{title} · {run}", "go_there": GO_THERE.format(title)}
        pages[f"{name}.html"] = ("notebook.html.j2", values)
    for file, (template, values) in pages.items():
        write_text(folder / file, html.render(template, **{**common, **values}))
    common["size"] = f"{(folder / f'catlib-{run}.html').stat().st_size / 1e6:.1f}"
    write_text(folder / "index.html", html.render("run.html.j2", **common))
    for path in {folder / f"{name}.html" for name in (*stages, "photos/index")} - {folder / file for file in pages}:
        path.unlink(missing_ok=True)
    files = {name: content for body in bodies.values() for name, content in body.files.items()}
    files |= {METRICS_FILE: (run_dir / METRICS_FILE).read_bytes()} if metrics else {}
    for path in (folder / "files").glob("*"):
        if path.name not in files:
            path.unlink()
    for name, content in files.items():
        if not (path := folder / "files" / name).is_file() or path.read_bytes() != content:
            write_bytes(path, content)


def is_current(state: Mapping[str, Any]) -> bool:
    """Whether a run's figures and verdict are those of its notebooks: each that has written some is done, whatever the others are."""
    wrote = [e for e in state["stages"].values() if METRICS_FILE in {Path(path).name for path in e.get("outputs", {})}]
    return state["status"] == "done" or (bool(wrote) and all(entry["status"] == "done" for entry in wrote))


def parameters_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a run by name."""
    return {key: value for entry in state["stages"].values() for key, value in entry.get("parameters", {}).items()}


def all_runs() -> tuple[list[tuple[dict[str, Any], dict[str, Any]]], list[str]]:
    """State and metrics of each run, the latest first, and the folders of runs that cannot be read."""
    folders = sorted(path.parent for path in resolve(RUNS).glob("*/state.json"))
    states = {folder: read_state(folder) for folder in folders}
    found = [(state, results(folder)) for folder, state in states.items() if state]
    unreadable = [relative(folder) for folder, state in states.items() if state is None]
    return sorted(found, key=lambda run: run[0]["started"], reverse=True), unreadable


def differences(states: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each run the parameters in which it differs from what most of the runs have; names and folders are left out."""
    settings = [parameters_of(state) for state in states]
    usual: dict[str, str | None] = {}
    for key in dict.fromkeys(key for values in settings for key in values if key not in NAMES):
        counts = Counter(str(values[key]) for values in settings if key in values).most_common(2)
        usual[key] = counts[0][0] if len(counts) == 1 or counts[0][1] > counts[1][1] else None
    return [{key: own[key] for key, most in usual.items() if key in own and str(own[key]) != most} for own in settings]


def listed(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[dict[str, str]]:
    """A row for each run: what it is, on which data, what differs, and its verdict."""
    rows = []
    for (state, metrics), own in zip(runs, differences([state for state, _ in runs]), strict=True):
        parts = {part: digest for entry in state["stages"].values() for part, digest in entry.get("data", {}).items()}
        advice = metrics.get("recommendation", {}) if is_current(state) else {}
        rows.append(
            {
                "run": state["run"],
                "started": state["started"][:16].replace("T", " "),
                "status": state["status"],
                "data": ", ".join(f"{part} {digest}" for part, digest in parts.items()) or "-",
                "base model": str(parameters_of(state).get("base_model", "-")),
                "what differs": ", ".join(f"{key}={value}" for key, value in own.items()) or "-",
                "verdict": advice.get("decision", "-"),
            }
        )
    return rows


def leaderboard(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Each run's models with accuracy and priority F1, in the order of each column."""
    rows = [
        {"run": state["run"], "model": track(name).short, "accuracy": model.get("accuracy")}
        | {"priority F1": model.get("priority_macro_f1")}
        for state, metrics in runs
        for name, model in ((name, metrics["models"][name]) for name in ordered(metrics.get("models", {})))
    ]
    best = {c: lambda row, c=c: -((row[c] or {}).get("value") or 0.0) for c in ("accuracy", "priority F1")}
    keys = best | {column: itemgetter(column) for column in ("model", "run")}
    return {column: sorted(rows, key=key) for column, key in keys.items()}


def render_all_runs() -> Path:
    """Write reports/index.html: every run, the latest first, their figures sorted in several ways, and further pages."""
    runs, unreadable = all_runs()
    for state, _ in runs:
        folder = folder_of_run(state["run"])
        if not report_path(state["run"]).is_file():
            try:
                settle(state, folder)
                render_run(state, folder)
            except Exception as error:  # whatever a damaged folder holds, it stops no other run
                log.warning("%s: no report could be made of it (%s)", folder, error)
                unreadable.append(relative(folder))
    found = (path for kind in ("sweep-*", "compare-*", "*/gate") for path in resolve("reports").glob(f"{kind}.html"))
    further = sorted(path.relative_to(resolve("reports")).as_posix() for path in found)
    values = {"runs": listed(runs), "orders": leaderboard(runs), "unreadable": unreadable, "further": further}
    path = resolve("reports") / "index.html"
    write_text(path, html.render("runs.html.j2", title="catlib reports", **values))
    return path


def remove_runs(names: Sequence[str]) -> list[str]:
    """Remove the folders and reports of runs; what was removed. Checkpoints stay. Raises InputError, before anything is
    removed, for a run that is not there, is in progress or does not carry catlib's mark."""
    folders: list[Path] = []
    for name in names:
        folder, report = folder_of_run(name), report_path(name).parent
        state = read_state(folder) if Path(name).name == name and not folder.is_symlink() else None
        if state is None:
            raise InputError(f"{folder}: not a run of catlib's (no readable state.json), so it is not removed")
        if state["status"] == "running":
            raise InputError(f"run {name!r} is in progress (process {state['pid']})")
        folders.append(folder)
        if report.is_dir():
            page = report / "index.html"
            head = page.read_text(encoding="utf-8", errors="replace")[:1000] if page.is_file() else ""
            if report.is_symlink() or not any(mark in head for mark in MARKS):
                raise InputError(f"{report}: not a report of catlib's, so nothing is removed")
            folders.append(report)
    for folder in folders:
        shutil.rmtree(folder)
    render_all_runs()
    return [relative(folder) for folder in folders]
