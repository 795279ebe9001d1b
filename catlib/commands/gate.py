"""`catlib gate`: train or skip, by what CLIP and probes reach and what training needs; written to gate.json of the run and a page."""

import argparse

from catlib.commands.options import add_profile_options, parameters_given, show

EPILOG = "exit codes: 0 answered, whether train or skip (--json has the decision), 1 failed, 2 wrong input"
add_options = add_profile_options


def run(args: argparse.Namespace) -> None:
    """Answer and print."""
    from catlib.evaluation.gate import gate
    from catlib.evaluation.tables import criteria_table, text_table
    from catlib.reports.index import render_gate

    verdict, facts = gate(args.profile, parameters_given(args))
    page = render_gate(facts)
    text = [verdict.text.replace("**", ""), "", text_table(criteria_table(verdict.criteria)), f"\nPage: {page}"]
    show(args, {**facts, "page": str(page)}, "\n".join(text))
