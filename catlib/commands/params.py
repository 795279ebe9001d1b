"""`catlib params`: the settings of a profile as YAML, for papermill NOTEBOOK.ipynb OUT.ipynb -f FILE."""

import argparse
from typing import Any

from catlib.commands.options import add_profile_options, parameters_given, show


def add_options(parser: argparse.ArgumentParser) -> None:
    add_profile_options(parser, run=False)
    which = "one of them: 03, or 03_evaluation"
    parser.add_argument("notebook", metavar="NOTEBOOK", nargs="?", default="", help=which)


def run(args: argparse.Namespace) -> None:
    """Print them; those of all notebooks where none is named."""
    import yaml

    from catlib.reports.stages import plan, select
    from catlib.settings import find_profile

    stages = plan(find_profile(args.profile), parameters_given(args))
    chosen = select([stage.name for stage in stages], args.notebook.removesuffix(".ipynb"))
    found: dict[str, Any] = {}
    for stage in stages:
        if stage.name in chosen:
            found |= {"profile": stage.injected["profile"], **stage.parameters}
    show(args, found, yaml.safe_dump(found, sort_keys=False, allow_unicode=True).rstrip())
