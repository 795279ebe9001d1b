"""`catlib gate`: train or skip, by what CLIP and probes reach and what training needs; written to gate.json of the run."""

import argparse

from catlib.commands.options import show

EPILOG = "exit codes: 0 answered, whether train or skip (--json has the decision), 1 failed, 2 wrong input"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `catlib gate`."""
    add = parser.add_argument
    add("profile", metavar="PROFILE", help="name in notebooks/profiles, or path of a YAML file")
    add(
        "-p", dest="parameters", action="append", default=[], metavar="KEY=VALUE", help="set one parameter (repeatable)"
    )
    add("--run", dest="run_name", metavar="NAME", help="name of the run (default: the profile's)")


def run(args: argparse.Namespace) -> int:
    """Answer and print."""
    from catlib.evaluation.gate import gate, gate_file
    from catlib.evaluation.tables import criteria_table, text_table
    from catlib.files import read_json
    from catlib.settings import parse_assignment, run_parameters

    given = dict(parse_assignment(text) for text in args.parameters)
    if args.run_name is not None:
        given["run"] = args.run_name
    verdict = gate(args.profile, given)
    path = gate_file(run_parameters(args.profile, given)["run_dir"])
    text = [verdict.text.replace("**", ""), "", text_table(criteria_table(verdict.criteria)), f"\nwritten to {path}"]
    show(args, read_json(path), "\n".join(text))
    return 0
