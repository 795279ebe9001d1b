"""`catlib report`: run the notebooks of a profile in order, and render them to HTML in reports/RUN; what is unchanged is kept."""

import argparse
import sys
from pathlib import Path
from typing import Any

from catlib.commands.options import show
from catlib.errors import CatlibError, InputError


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `catlib report`."""
    add = parser.add_argument
    add("profile", metavar="PROFILE", help="name in notebooks/profiles, or path of a YAML file")
    one = "set one parameter (repeatable)"
    add("-p", dest="parameters", action="append", default=[], metavar="KEY=VALUE", help=one)
    add("--run", dest="run_name", metavar="NAME", help="name of the run (default: the profile's)")
    add("--force", action="store_true", help="run every notebook, even where nothing has changed")
    add("--notebooks", default="", metavar="01,02", help="run only these")
    sweep = "a run for each value, and a page that compares them; repeatable: a run for each combination"
    add("--sweep", action="append", default=[], metavar="KEY=V1,V2,…", help=sweep)


def run(args: argparse.Namespace) -> int:
    """Run, then print where the report is and the headline figures. Raises the error that a notebook ended with."""
    from catlib.settings import find_profile, parse_assignment, run_parameters

    profile = find_profile(args.profile)
    overrides = dict(parse_assignment(text) for text in args.parameters)
    if args.run_name is not None:
        overrides["run"] = args.run_name
    name = run_parameters(str(profile), overrides)["run"]
    if args.sweep:
        return _sweep(args, profile, overrides, name)
    outcome = _run_one(args, profile, overrides, name)
    show(args, outcome, _summary(outcome))
    return 0


def _run_one(args: argparse.Namespace, profile: Path, overrides: dict[str, Any], name: str) -> dict[str, Any]:
    """One run; what a program may want to know of it."""
    from catlib.paths import folder_of_run
    from catlib.reports.index import report_path, results
    from catlib.reports.pipeline import run_profile

    def tell(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    state = run_profile(profile, overrides, name, force=args.force, notebooks=args.notebooks, tell=tell)
    report, stages = report_path(name), state["stages"].items()
    for _, entry in stages:
        if "error" in entry and state["status"] == "failed":
            kind = InputError if entry["exit_code"] == InputError.exit_code else CatlibError
            raise kind(f"{entry['error']}\nThe report shows how far it came: {report}")
    told = {key: {"status": entry["status"], "duration_s": entry.get("duration_s")} for key, entry in stages}
    figures = results(folder_of_run(name))
    return {"run": name, "status": state["status"], "report": str(report), "stages": told, **figures}


def _summary(outcome: dict[str, Any]) -> str:
    """The headline figures as a table, the recommendation and the report's path."""
    from catlib.evaluation.tables import model_table, text_table

    lines = []
    if len(rows := model_table(outcome.get("models", {}))):
        lines += ["", "Test photos, per cent [95 % interval]", text_table(rows)]
    if outcome["status"] == "done" and (advice := outcome.get("recommendation")):
        lines += ["", f"Recommendation: {advice['decision']}", *(f"  - {reason}" for reason in advice["reasons"])]
    return "\n".join([*lines, "", f"Report: {outcome['report']}"])


def _sweep(args: argparse.Namespace, profile: Path, overrides: dict[str, Any], name: str) -> int:
    """A run for each combination of the swept values, then the page that compares them. One that fails stops no other."""
    from catlib.reports import stages, sweep

    sweeps = [sweep.parse_sweep(text) for text in args.sweep]
    members = sweep.members(name, profile, overrides, sweeps)
    for _, member, parameters in members:  # wrong input stops before anything is run
        stages.plan(profile, parameters | {"run": member})
    outcomes: list[dict[str, Any]] = []
    failed: dict[str, CatlibError] = {}
    for number, (_, member, parameters) in enumerate(members, start=1):
        print(f"{member} ({number} of {len(members)})", file=sys.stderr if args.json else sys.stdout, flush=True)
        try:
            outcomes.append(_run_one(args, profile, parameters, member))
        except CatlibError as error:
            failed[member] = error
            print(f"catlib: {member}: {error}", file=sys.stderr)
    page = sweep.curve_page(name, [key for key, _ in sweeps], [(values, member) for values, member, _ in members])
    errors = {member: str(error) for member, error in failed.items()}
    show(args, {"page": str(page), "runs": outcomes, "failed": errors}, f"\nSweep: {page}")
    if failed:
        kind = InputError if all(isinstance(error, InputError) for error in failed.values()) else CatlibError
        raise kind(f"{len(failed)} of {len(members)} runs failed: {', '.join(failed)}; the others are finished")
    return 0
