"""`catlib runs`: the runs of the project, listed, shown, compared and removed."""

import argparse
from textwrap import shorten

from catlib.commands.options import show
from catlib.errors import InputError

EPILOG = """Without an action: list. `compare A B` writes a page with the gain of B over A. `rm` removes a run's folder and report, which
must be catlib's; its checkpoint stays."""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("action", nargs="?", choices=("list", "show", "compare", "rm"), default="list")
    add("names", nargs="*", metavar="RUN", help="a run; two to compare")


def run(args: argparse.Namespace) -> None:
    """Do what the action says, and print it."""
    from catlib.reports import comparison, index

    expected = {"list": 0, "show": 1, "compare": 2}.get(args.action, max(1, len(args.names)))
    if len(args.names) != expected:
        raise InputError(f"catlib runs {args.action}: expected {expected} names of runs, found {len(args.names)}")
    if args.action == "list":
        _list(args)
    elif args.action == "show":
        _show(args)
    elif args.action == "compare":
        path, found = comparison.compare_runs((args.names[0], args.names[1]))
        gains = (f"{m}: {c['accuracy_gain_points']:+.1f} points of accuracy" for m, c in found["models"].items())
        show(args, {"page": str(path), **found}, "\n".join([*gains, f"Page: {path}"]))
    else:
        removed = index.remove_runs(args.names)
        show(args, {"removed": removed}, "\n".join(f"removed {folder}" for folder in removed))


def _list(args: argparse.Namespace) -> None:
    from catlib.evaluation.tables import text_table
    from catlib.reports import index

    runs, unreadable = index.all_runs()
    rows = index.listed(runs)
    facts = [row | {"models": metrics.get("models", {})} for row, (_, metrics) in zip(rows, runs, strict=True)]
    lines = [f"cannot be read: {folder}" for folder in unreadable]
    table = text_table([{k: shorten(v, 60, placeholder=" …") for k, v in row.items()} for row in rows], indent="")
    show(args, {"runs": facts, "unreadable": unreadable}, "\n".join([table, *lines]))


def _show(args: argparse.Namespace) -> None:
    from catlib.evaluation.tables import model_table, text_table
    from catlib.paths import folder_of_run
    from catlib.reports import comparison, index

    state = comparison.find_run(args.names[0])
    metrics = index.results(folder_of_run(state["run"]))
    lines = [f"{state['run']}: profile {state['profile']}, {state['status']}, started {state['started']}"]
    for name, entry in state["stages"].items():
        changed = f" (changed since: {', '.join(entry['changed'])})" if entry.get("changed") else ""
        lines.append(f"  {name:<22} {entry['status']}{changed}")
    lines += [text_table(model_table(metrics["models"]))] if metrics.get("models") else []
    show(args, state | metrics, "\n".join([*lines, f"Report: {index.report_path(state['run'])}"]))
