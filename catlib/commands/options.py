"""What the commands share: options made from a settings class, so that a name is stated there alone, and printing."""

import argparse
import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from catlib.settings import Settings, parse_value

S = TypeVar("S", bound=Settings)
PREFIX = "setting:"  # keeps the namespace entries apart from a command's own options of the same name


def add_settings_options(
    parser: argparse.ArgumentParser,
    settings_class: type[Settings],
    only: Collection[str] = (),
    skip: Collection[str] = (),
    also: Mapping[str, str] | None = None,
) -> None:
    """An option for every field (those in `only`, or those not in `skip`): `--batch_size 4` and `--batch-size 4`; bools as `--flag`
    and `--no-flag`. `also`: a further name of an option. What is not given is left to the settings class.
    """
    group = parser.add_argument_group("settings", "underscores or dashes, as you like")
    for option in fields(settings_class):
        if option.name in skip or (only and option.name not in only):
            continue
        names = [
            f"--{option.name.replace('_', '-')}",
            f"--{option.name}",
            *filter(None, [(also or {}).get(option.name)]),
        ]
        text = option.metadata["help"].replace("%", "%%")
        default = repr(option.default) if option.default == "" else option.default
        more: dict[str, Any] = {"help": f"{text} (default: {default})"}
        if option.type is bool:
            more = {"help": f"{text} (default: {'yes' if default else 'no'})", "action": argparse.BooleanOptionalAction}
        elif choices := option.metadata.get("choices"):
            if "true" in choices:  # as a flag too: --name, --no-name
                more |= {"nargs": "?", "const": "true"}
                off = [f"--no-{name[2:]}" for name in names]
                text = {
                    "action": "store_const",
                    "const": "false",
                    "default": argparse.SUPPRESS,
                    "help": argparse.SUPPRESS,
                }
                group.add_argument(*dict.fromkeys(off), dest=PREFIX + option.name, **text)
            more["metavar"] = "{" + ",".join(choices) + "}"
        else:
            more["metavar"] = {"str": "TEXT", "int": "N", "float": "X"}[getattr(option.type, "__name__", "str")]
        group.add_argument(*dict.fromkeys(names), dest=PREFIX + option.name, default=argparse.SUPPRESS, **more)


def settings_given(settings_class: type[Settings], args: argparse.Namespace) -> dict[str, Any]:
    """The settings that stand on the command line. Raises InputError naming one that is ill-typed or none of its choices."""
    texts = {option: getattr(args, PREFIX + option.name, None) for option in fields(settings_class)}
    given = {option: text for option, text in texts.items() if text is not None}
    return {o.name: v if isinstance(v, bool) else parse_value(o, v, "command line") for o, v in given.items()}


def settings_from_args(settings_class: type[S], args: argparse.Namespace, **values: Any) -> S:
    """The settings as given on the command line; `values` come from the command's own arguments."""
    return settings_class.build(values | settings_given(settings_class, args), "command line")


def show(args: argparse.Namespace, facts: Any, text: str) -> None:
    """The result of a command on standard output: `facts` with --json, else `text`."""
    print(json.dumps(facts, ensure_ascii=False, allow_nan=False, default=str) if args.json else text, flush=True)
