"""What the commands share: options made from a settings class, so that a name is stated there alone, and printing."""

import argparse
import json
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import fields
from typing import Any, TextIO, TypeVar

from catlib.settings import Settings, parse_assignment, parse_value

S = TypeVar("S", bound=Settings)
ALSO = {"priority_breeds": ("--priority",)}  # further names of an option
PREFIX = "setting:"  # keeps the namespace entries apart from a command's own options of the same name
_output: ContextVar[TextIO | None] = ContextVar("output", default=None)


def add_profile_options(parser: argparse.ArgumentParser, run: bool = True) -> None:
    """A profile, its parameters one by one, and, where the command has one, the run's name."""
    add = parser.add_argument
    add("profile", metavar="PROFILE", help="name in notebooks/profiles, or path of a YAML file")
    one = "set one parameter (repeatable)"
    add("-p", dest="parameters", action="append", default=[], metavar="KEY=VALUE", help=one)
    if run:
        add("--run", dest="run_name", metavar="NAME", help="name of the run (default: the profile's)")


def parameters_given(args: argparse.Namespace) -> dict[str, Any]:
    """What stands on the command line on top of the profile. Raises InputError."""
    named = {} if getattr(args, "run_name", None) is None else {"run": args.run_name}
    return dict(parse_assignment(text) for text in args.parameters) | named


def add_settings_options(
    parser: argparse.ArgumentParser, kind: type[Settings], only: Collection[str] = (), skip: Collection[str] = ()
) -> None:
    """An option for every field (those in `only`, or those not in `skip`): `--batch_size 4` and `--batch-size 4`; bools as `--flag`
    and `--no-flag`. What is not given is left to the settings class.
    """
    group = parser.add_argument_group("settings", "underscores or dashes, as you like")
    for option in fields(kind):
        if option.name in skip or (only and option.name not in only):
            continue
        names = (f"--{option.name.replace('_', '-')}", f"--{option.name}", *ALSO.get(option.name, ()))
        choices, dest = option.metadata["choices"], PREFIX + option.name
        if option.type is bool:
            default = "yes" if option.default else "no"
            more: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            default = "''" if option.default == "" else str(option.default)
            letter = {str: "TEXT", int: "N", float: "X"}[option.type]  # type: ignore[index]
            more = {"metavar": f"{{{','.join(choices)}}}" if choices else letter}
            if "true" in choices:  # a flag too: --name, --no-name
                more |= {"nargs": "?", "const": "true"}
                off: dict[str, Any] = {"const": "false", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
                flags = dict.fromkeys(f"--no-{name[2:]}" for name in names)
                group.add_argument(*flags, dest=dest, action="store_const", **off)
        text = f"{option.metadata['help'].replace('%', '%%')} (default: {default})"
        group.add_argument(*dict.fromkeys(names), dest=dest, help=text, default=argparse.SUPPRESS, **more)


def settings_given(kind: type[Settings], args: argparse.Namespace) -> dict[str, Any]:
    """The settings that stand on the command line. Raises InputError naming one that is ill-typed or none of its choices."""
    found = ((option, getattr(args, PREFIX + option.name, None)) for option in fields(kind))
    given = ((o, v if isinstance(v, bool) else parse_value(o, v, "command line")) for o, v in found if v is not None)
    return {option.name: value for option, value in given}


def settings_from_args(kind: type[S], args: argparse.Namespace, **values: Any) -> S:
    """The settings as given on the command line; `values` come from the command's own arguments."""
    return kind.build(values | settings_given(kind, args), "command line")


def show(args: argparse.Namespace, facts: Any, text: str) -> None:
    """The result of a command on standard output: `facts` with --json, else `text`."""
    say(json.dumps(facts, ensure_ascii=False, allow_nan=False, default=str) if args.json else text)


def say(text: object) -> None:
    """A line of a command's result on standard output."""
    print(text, file=_output.get() or sys.stdout, flush=True)


@contextmanager
def results_only() -> Iterator[None]:
    """While open, standard output gets what `say` is given; what libraries print there goes to standard error."""
    before = _output.set(_output.get() or sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _output.reset(before)
