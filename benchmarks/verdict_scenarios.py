"""The planted cases of tests/test_evaluation_verdict.py with what the verdict makes of each, as a table in Markdown.

    python benchmarks/verdict_scenarios.py [--only TEXT]

Each test is run as it is; every decision and track in it is a row, with the beginning of the reason.
"""

import argparse
import inspect
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import test_evaluation_verdict as cases

from catlib.errors import CatlibError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="tests whose name holds this")
    args, judge, name, seen = parser.parse_args(), cases.judge, "", set[tuple[str, str, str]]()

    def watched(*given: object, **more: object) -> object:
        verdict = judge(*given, **more)
        if (row := (name, verdict.decision, verdict.use)) not in seen:
            seen.add(row)
            reason = textwrap.shorten(verdict.reasons[0], 110, placeholder=" …")
            print(f"| {name} | `{verdict.decision}` | {verdict.use} | {reason} |", flush=True)
        return verdict

    cases.judge = watched
    print("| case | decision | to run | first reason |\n| --- | --- | --- | --- |")
    for title, case in vars(cases).items():
        if title.startswith("test_") and args.only in title and not inspect.signature(case).parameters:
            name = title.removeprefix("test_").replace("_", " ")
            try:
                case()
            except CatlibError as error:
                print(f"| {name} | refused | | {error} |")


if __name__ == "__main__":
    main()
