"""`catlib gate`: train or skip, by what CLIP and probes reach and what training needs; written to gate.json of the run."""

import argparse

from catlib.commands.options import add_profile_options, parameters_given, show

EPILOG = "exit codes: 0 answered, whether train or skip (--json has the decision), 1 failed, 2 wrong input"
add_options = add_profile_options


def run(args: argparse.Namespace) -> None:
    """Answer and print."""
    from catlib.evaluation.gate import gate, gate_file
    from catlib.evaluation.tables import criteria_table, text_table
    from catlib.files import read_json
    from catlib.settings import run_parameters

    given = parameters_given(args)
    verdict = gate(args.profile, given)
    path = gate_file(run_parameters(args.profile, given)["run_dir"])
    text = [verdict.text.replace("**", ""), "", text_table(criteria_table(verdict.criteria)), f"\nwritten to {path}"]
    show(args, read_json(path), "\n".join(text))
