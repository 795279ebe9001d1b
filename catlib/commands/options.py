"""Command-line options made from a settings class, so that name, type, default and meaning are stated there alone."""

import argparse
from collections.abc import Collection
from dataclasses import fields
from typing import Any, TypeVar

from catlib.settings import Settings, parse_value

S = TypeVar("S", bound=Settings)
PREFIX = "setting:"  # keeps the namespace entries apart from a command's own options of the same name


def add_settings_options(
    parser: argparse.ArgumentParser, settings_class: type[Settings], skip: Collection[str] = ()
) -> None:
    """An option for every field not in `skip`: `--batch_size 4` and `--batch-size 4`, bools as `--flag` and `--no-flag`.

    The options have no default of their own: what is not given is left to the settings class.
    """
    group = parser.add_argument_group("settings", "underscores or dashes, as you like")
    for option in fields(settings_class):
        if option.name in (*skip, "hint"):
            continue
        names = list(dict.fromkeys((f"--{option.name.replace('_', '-')}", f"--{option.name}")))
        text = option.metadata["help"].replace("%", "%%")
        shared = {"dest": PREFIX + option.name, "default": argparse.SUPPRESS}
        if option.type is bool:
            help = f"{text} (default: {'yes' if option.default else 'no'})"
            group.add_argument(*names, action=argparse.BooleanOptionalAction, help=help, **shared)
            continue
        choices = option.metadata.get("choices", ())
        metavar = "{" + ",".join(choices) + "}" if choices else {str: "TEXT", int: "N", float: "X"}[option.type]
        default = repr(option.default) if option.default == "" else option.default
        group.add_argument(*names, metavar=metavar, help=f"{text} (default: {default})", **shared)


def settings_given(settings_class: type[Settings], args: argparse.Namespace) -> dict[str, Any]:
    """The settings that stand on the command line. Raises InputError naming one that is ill-typed or none of its choices."""
    given = {
        name: value for name in settings_class.names() if (value := getattr(args, PREFIX + name, None)) is not None
    }
    known = {option.name: option for option in fields(settings_class)}
    return {n: v if isinstance(v, bool) else parse_value(known[n], v, "command line") for n, v in given.items()}


def settings_from_args(settings_class: type[S], args: argparse.Namespace, **values: Any) -> S:
    """The settings as given on the command line; `values` come from the command's own arguments."""
    return settings_class.build(values | settings_given(settings_class, args), "command line")
