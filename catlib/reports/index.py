"""The pages of a run and the page over all runs, written from state.json and metrics.json alone."""

import os
from collections.abc import Collection, Mapping
from html import escape
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from catlib.classifiers.tracks import TUNED, ZERO_SHOT
from catlib.errors import InputError
from catlib.evaluation.metrics_file import METRICS_FILE, read_metrics
from catlib.evaluation.tables import criteria_table, model_table, share
from catlib.files import read_json, write_text
from catlib.paths import relative, resolve
from catlib.reports import html

STATE_FIELDS = {"run", "profile", "status", "pid", "started", "commit", "versions", "stages"}
FIELDS = {"title", "status"}  # of each stage


def read_state(run_dir: Path) -> dict[str, Any] | None:
    """The state of a run; None where there is none or it cannot be read. One whose process is gone was interrupted."""
    try:
        state = read_json(run_dir / "state.json")
        entries = state["stages"].values()
        if not (state.keys() >= STATE_FIELDS and all(entry.keys() >= FIELDS for entry in entries)):
            return None
    except (InputError, KeyError, AttributeError):
        return None
    state["run"] = run_dir.name  # as the training may have set the run aside under another name
    if state["status"] == "running" and not _alive(state["pid"]):
        state["status"] = "interrupted"
        for entry in entries:
            entry["status"] = "interrupted" if entry["status"] == "running" else entry["status"]
    return state


def settle(state: Mapping[str, Any], run_dir: Path) -> None:
    """Bring a run's state in line with its folder: results whose executed notebook is gone count as not run."""
    for name, entry in state["stages"].items():
        if entry["status"] in ("done", "outdated") and not (run_dir / f"{name}.ipynb").is_file():
            entry["status"] = "not run"


def results(run_dir: Path) -> dict[str, Any]:
    """The run's metrics, empty where there are none yet."""
    path = run_dir / METRICS_FILE
    return read_metrics(path) if path.is_file() else {}


def headline(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """The headline figures of each model as text."""
    return model_table(metrics.get("models", {}))


def report_path(run: str) -> Path:
    """Where the report of a run begins."""
    return resolve("reports") / run / "index.html"


def render(state: Mapping[str, Any], run_dir: Path) -> None:
    """Write the pages of a run and the page over all runs."""
    render_run(state, run_dir)
    render_all_runs()


def render_run(state: Mapping[str, Any], run_dir: Path) -> None:
    """Write the pages of a run, and all of them as one file to mail; those without an executed notebook are removed."""
    folder = report_path(state["run"]).parent
    pages = {name for name in state["stages"] if (run_dir / f"{name}.ipynb").is_file()}
    parts = {}
    for name, entry in state["stages"].items():
        page, source = folder / f"{name}.html", run_dir / f"{name}.ipynb"
        if name not in pages:
            page.unlink(missing_ok=True)
            continue
        body = _problem(entry, f'{escape(entry["title"])} ended with an error. <a href="#error">Go there.</a>')
        body += html.notebook_body(source, source.stat().st_mtime_ns)
        nav = html.navigation(state["run"], state["stages"], pages, page.name)
        footer = html.facts([("notebook", f"{name} ({entry['status']})"), *_origin(state, entry)])
        footer += f"<details><summary>parameters</summary>{html.facts(entry.get('parameters', {}).items())}</details>"
        parts[name] = body, footer
        title = f"{entry['title']} · {state['run']}"
        write_text(page, html.page(title, nav, html.contents(body) + body, footer))
    title, metrics = f"{state['run']} · catlib report", results(run_dir)
    origin = html.facts(_origin(state, state))
    body = _overview(state, metrics, pages, "#{}") + _all_contents(state, parts)
    for name, (part, footer) in parts.items():
        body += f'<section class="page" id="{escape(name)}">{part}<footer>{footer}</footer></section>'
    nav = " ".join(_link(f"#{name}", state["stages"][name]["title"]) for name in parts)
    mail = folder / f"catlib-{state['run']}.html"
    write_text(mail, html.page(title, nav, body, origin))
    size = f"{mail.stat().st_size / 1e6:.1f} MB"
    body = _overview(state, metrics, pages, "{}.html")
    body += f"<p>All pages in one file, to mail: {_link(mail.name, mail.name)} ({size}).</p>"
    nav = html.navigation(state["run"], state["stages"], pages, "index.html")
    write_text(folder / "index.html", html.page(title, nav, body, origin))


def _all_contents(state: Mapping[str, Any], parts: Mapping[str, tuple[str, str]]) -> str:
    entries = "".join(
        f"<li>{_link(f'#{name}', state['stages'][name]['title'])}{html.sections(body)}</li>"
        for name, (body, _) in parts.items()
    )
    return f'<h2>Contents</h2><nav class="contents" aria-label="Contents"><ul>{entries}</ul></nav>' if entries else ""


def _overview(state: Mapping[str, Any], metrics: Mapping[str, Any], pages: Collection[str], target: str) -> str:
    """Verdict, notebooks, figures and criteria of a run; `target`: how a link to the page of a notebook is written."""
    body = f"<h1>{escape(state['run'])}</h1><p>Profile {escape(state['profile'])}, {_status(state['status'])}.</p>"
    for name, entry in state["stages"].items():
        body += _problem(entry, f"<b>{escape(name)}</b>")
    complete = state["status"] == "done"
    if complete and (advice := metrics.get("recommendation")):
        reasons = "".join(f"<li>{escape(reason)}</li>" for reason in advice["reasons"])
        body += f'<div class="box good">Recommendation: <b>{escape(advice["decision"])}</b><ul>{reasons}</ul></div>'
    rows = [
        [
            _link(target.format(name), entry["title"]) if name in pages else escape(entry["title"]),
            _status(entry["status"]),
            _duration(entry),
        ]
        for name, entry in state["stages"].items()
    ]
    body += f"<h2>Notebooks</h2>{html.html_table(('page', 'status', 'took'), rows)}"
    if len(figures := headline(metrics)):
        note = "" if complete else " They are of an earlier state of this run: some notebooks have not been run since."
        body += f"<h2>Figures on the test photos</h2>{html.table(figures)}"
        body += f"<p>Per cent, with 95 % intervals in brackets.{note}</p>"
    if complete and metrics.get("criteria"):
        body += f"<h2>Criteria</h2>{html.table(criteria_table(metrics['criteria']))}"
    return body


def render_all_runs() -> Path:
    """Write reports/index.html: every run with its headline figures, the latest first, then the learning curves."""
    states, unreadable = [], []
    for path in sorted(resolve("outputs/runs").glob("*/state.json")):
        state = read_state(path.parent)
        try:
            if state is None:
                raise InputError("not the state of a run")
            states.append((state["started"], state, results(path.parent)))
            if not report_path(state["run"]).is_file():
                settle(state, path.parent)
                render_run(state, path.parent)
        except InputError:
            unreadable.append(path.parent)
    rows = []
    for _, state, metrics in sorted(states, key=itemgetter(0), reverse=True):
        models = metrics.get("models", {})
        figures = [
            share(models.get(m, {}).get(k)) for m in (TUNED, ZERO_SHOT) for k in ("accuracy", "priority_macro_f1")
        ]
        verdict = metrics.get("recommendation", {}).get("decision", "-") if state["status"] == "done" else "-"
        cells = [_link(f"{state['run']}/index.html", state["run"]), escape(state["started"][:16].replace("T", " "))]
        rows.append([*cells, _status(state["status"]), *map(escape, figures), escape(verdict)])
    head = ["run", "started", "status"]
    head += [f"{model}: {figure}" for model in ("tuned", "CLIP") for figure in ("accuracy", "priority F1")]
    body = f"<h1>All runs</h1>{html.html_table([*head, 'verdict'], rows)}"
    body += "<p>Per cent, with 95 % intervals in brackets. CLIP: zero-shot.</p>"
    if unreadable:
        body += f"<p>Cannot be read: {escape(', '.join(relative(folder) for folder in unreadable))}.</p>"
    if curves := sorted(resolve("reports").glob("sweep-*.html")):
        body += "<h2>Learning curves</h2><ul>" + "".join(f"<li>{_link(p.name, p.stem)}</li>" for p in curves) + "</ul>"
    path = resolve("reports") / "index.html"
    write_text(path, html.page("catlib reports", "<b>all runs</b>", body))
    return path


def _origin(state: Mapping[str, Any], part: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What produced a page: run, time, duration, commit, versions."""
    versions = ", ".join(f"{name} {version}" for name, version in state["versions"].items())
    times = [("started", part.get("started") or state["started"])]
    if "duration_s" in part:
        times.append(("took", _duration(part)))
    return [
        ("run", state["run"]),
        ("profile", state["profile"]),
        *times,
        ("commit", state["commit"] or "-"),
        ("versions", versions),
    ]


def _problem(entry: Mapping[str, Any], before: str) -> str:
    """What a reader must know before the results: that they ended with an error, or that they are outdated."""
    if "error" in entry:
        return f'<div class="box">{before}<p>{escape(entry["error"])}</p></div>'
    if entry["status"] == "outdated":
        changed = escape(", ".join(entry.get("changed", [])))
        return f'<div class="box">{escape(entry["title"])} is outdated. Changed since: {changed}.</div>'
    return ""


def _link(target: str, text: str) -> str:
    return f'<a href="{quote(target, safe="/#")}">{escape(text)}</a>'


def _status(status: str) -> str:
    return f'<span class="{escape(status.replace(" ", "-"))}">{escape(status)}</span>'


def _duration(entry: Mapping[str, Any]) -> str:
    seconds = entry.get("duration_s")
    if seconds is None:
        return "-"
    minutes = round(seconds) // 60
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{minutes} min"
        if minutes < 120
        else f"{minutes // 60} h {minutes % 60} min"
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it belongs to someone else, but it is there
    return True
