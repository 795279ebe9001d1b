"""`catlib report`: run the notebooks of a profile in order, and render them to HTML in reports/RUN; what is unchanged is kept."""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import Queue, get_context
from pathlib import Path
from typing import Any

from catlib.commands.options import add_profile_options, parameters_given, results_only, say, show
from catlib.errors import CatlibError, InputError

Outcome = dict[str, Any] | CatlibError  # of a run of a sweep


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_profile_options(parser)
    add("--force", action="store_true", help="run every notebook, even where nothing has changed")
    add("--notebooks", default="", metavar="01,02", help="run only these")
    add("--gate", action="store_true", help="after the data, ask `catlib gate`, and go on only where it says to train")
    sweep = "a run for each value, and a page that compares them; repeatable: a run for each combination"
    add("--sweep", action="append", default=[], metavar="KEY=V1,V2,…", help=sweep)
    jobs = "runs of a sweep at the same time, where there are several GPUs: each run gets one (default: 1)"
    add("--jobs", type=int, default=1, metavar="N", help=jobs)


def run(args: argparse.Namespace) -> None:
    """Run, then print where the report is and the headline figures. Raises the error that a notebook ended with."""
    from catlib.settings import find_profile, run_parameters

    profile, overrides = find_profile(args.profile), parameters_given(args)
    name = run_parameters(str(profile), overrides)["run"]
    if args.sweep:
        _sweep(args, profile, overrides, name)
        return
    outcome = _run_one(args, profile, overrides, name)
    show(args, outcome, _summary(outcome))


def _run_one(args: argparse.Namespace, profile: Path, overrides: dict[str, Any], name: str) -> dict[str, Any]:
    """One run; what a program may want to know of it."""
    from catlib.paths import folder_of_run
    from catlib.reports.index import is_current, render_gate, report_path, results
    from catlib.reports.pipeline import run_profile

    def tell(line: str) -> None:
        _tell(args, f"{name}: {line}" if args.jobs > 1 else line)

    asked: dict[str, Any] = {}
    if args.gate and run_profile(profile, overrides, name, notebooks="01", tell=tell)["status"] != "failed":
        from catlib.evaluation.gate import gate  # imports torch

        verdict, asked = gate(str(profile), {**overrides, "run": name})
        tell(f"{'gate':<22} {verdict.decision}: {verdict.reasons[0]}")
        render_gate(asked)
    chosen = args.notebooks if not asked or verdict.decision == "train" else "01"
    state = run_profile(profile, overrides, name, force=args.force, notebooks=chosen, tell=tell)
    report, stages = report_path(name), state["stages"].items()
    for _, entry in stages:
        if "error" in entry and state["status"] == "failed":
            kind = InputError if entry["exit_code"] == InputError.exit_code else CatlibError
            raise kind(f"{entry['error']}\nThe report shows how far it came: {report}")
    told = {key: {"status": entry["status"], "duration_s": entry.get("duration_s")} for key, entry in stages}
    figures = {"gate": asked.get("recommendation")} | results(folder_of_run(name))
    facts = {"run": name, "status": state["status"], "current": is_current(state), "report": str(report)}
    return {**facts, "stages": told, **figures}


def _tell(args: argparse.Namespace, line: str) -> None:
    """A line on how far it is; standard output is left to a program that reads the result."""
    print(line, file=sys.stderr) if args.json else say(line)


def _summary(outcome: dict[str, Any]) -> str:
    """The headline figures as a table, the recommendation and the report's path."""
    from catlib.evaluation.tables import model_table, reasons_table, text_table

    lines = []
    if len(rows := model_table(outcome.get("models", {}))):
        lines += ["", "Test photos, per cent [95 % interval]", text_table(rows)]
    if (reasons := reasons_table(outcome.get("models", {}))) is not None:
        lines += ["", "Reasons, per cent", text_table(reasons)]
    if outcome["current"] and (advice := outcome.get("recommendation")):
        lines += ["", f"Recommendation: {advice['decision']}", *(f"  - {reason}" for reason in advice["reasons"])]
    return "\n".join([*lines, "", f"Report: {outcome['report']}"])


def _sweep(args: argparse.Namespace, profile: Path, overrides: dict[str, Any], name: str) -> None:
    """A run for each combination of the swept values, then the page that compares them. One that fails stops no other."""
    from catlib.reports import stages, sweep

    if args.jobs < 1:
        raise InputError(f"--jobs {args.jobs}: expected 1 or more")
    sweeps = [sweep.parse_sweep(text) for text in args.sweep]
    members = sweep.members(name, profile, overrides, sweeps)
    for _, member, parameters in members:  # wrong input stops before anything is run
        stages.plan(profile, parameters | {"run": member})
    outcomes: dict[str, Outcome] = {}
    for member, outcome in _outcomes(args, profile, {member: parameters for _, member, parameters in members}):
        outcomes[member] = outcome
        if isinstance(outcome, CatlibError):
            print(f"catlib: {member}: {outcome}", file=sys.stderr)
    failed = {member: outcome for member, outcome in outcomes.items() if isinstance(outcome, CatlibError)}
    done = [outcomes[member] for _, member, _ in members if member not in failed]
    page = sweep.curve_page(name, [key for key, _ in sweeps], [(values, member) for values, member, _ in members])
    errors = {member: str(error) for member, error in failed.items()}
    show(args, {"page": str(page), "runs": done, "failed": errors}, f"\nSweep: {page}")
    if failed:
        kind = InputError if all(isinstance(error, InputError) for error in failed.values()) else CatlibError
        raise kind(f"{len(failed)} of {len(members)} runs failed: {', '.join(failed)}; the others are finished")


def _outcomes(args: argparse.Namespace, profile: Path, members: Mapping[str, Any]) -> Iterator[tuple[str, Outcome]]:
    """Each run's name with its outcome, or with the error that ended it: one after the other, or `--jobs` at a time."""
    if args.jobs == 1:
        for number, (member, parameters) in enumerate(members.items(), start=1):
            _tell(args, f"{member} ({number} of {len(members)})")
            yield member, _tried(args, profile, parameters, member)
        return
    from catlib.reports import stages

    chosen = stages.select(list(stages.find_notebooks()), args.notebooks)
    data, others = (",".join(name for name in chosen if name.startswith("01") == own) for own in (True, False))
    outcomes: dict[str, Outcome] = {}
    if data:  # runs may share a folder of data, which is written by one at a time
        first = argparse.Namespace(**vars(args) | {"notebooks": data, "gate": False})
        outcomes = {member: _tried(first, profile, parameters, member) for member, parameters in members.items()}
    over = [member for member, outcome in outcomes.items() if not others or isinstance(outcome, CatlibError)]
    yield from ((member, outcomes[member]) for member in over)
    context = get_context("spawn")
    gpus = context.Queue()
    for number in range(args.jobs):
        gpus.put(number)
    rest = argparse.Namespace(**vars(args) | {"notebooks": others})
    with ProcessPoolExecutor(args.jobs, context, _take_gpu, (gpus,)) as pool:
        waiting = {pool.submit(_tried, rest, profile, members[m], m): m for m in members if m not in over}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def _take_gpu(gpus: "Queue[int]") -> None:
    """Leave one of the GPUs that this process may use to its runs; without GPUs nothing changes."""
    import torch

    own = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = own.split(",") if own else [str(n) for n in range(torch.cuda.device_count())]
    if names:
        os.environ["CUDA_VISIBLE_DEVICES"] = names[gpus.get() % len(names)]


def _tried(args: argparse.Namespace, profile: Path, parameters: dict[str, Any], member: str) -> Outcome:
    try:
        with results_only():  # it may be called in a process of its own
            return _run_one(args, profile, parameters, member)
    except CatlibError as error:  # as a plain one, which another process can read
        return (InputError if isinstance(error, InputError) else CatlibError)(str(error))
