"""`catlib params`: the settings of a profile as YAML, for papermill NOTEBOOK.ipynb OUT.ipynb -f FILE."""

import argparse
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `catlib params`."""
    add = parser.add_argument
    add("profile", metavar="PROFILE", help="name in notebooks/profiles, or path of a YAML file")
    add("notebook", metavar="NOTEBOOK", nargs="?", default="", help="one of them: 03, or 03_evaluation")
    add(
        "-p", dest="parameters", action="append", default=[], metavar="KEY=VALUE", help="set one parameter (repeatable)"
    )


def run(args: argparse.Namespace) -> int:
    """Print them; those of all notebooks where none is named."""
    import yaml

    from catlib.commands.options import show
    from catlib.reports.stages import plan, select
    from catlib.settings import find_profile, parse_assignment

    stages = plan(find_profile(args.profile), dict(parse_assignment(text) for text in args.parameters))
    chosen = select([stage.name for stage in stages], args.notebook.removesuffix(".ipynb"))
    found: dict[str, Any] = {}
    for stage in stages:
        if stage.name in chosen:
            found |= {"profile": stage.injected["profile"], **stage.parameters}
    show(args, found, yaml.safe_dump(found, sort_keys=False, allow_unicode=True).rstrip())
    return 0
