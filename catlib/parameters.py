"""One parameter of a run: its meaning and range, and how a value from a cell, a profile or the command line is checked."""

import contextlib
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

from catlib.errors import InputError
from catlib.files import parse_yaml
from catlib.paths import public_url

RANGE = {"least": 0, "most": 2**31 - 1, "mapping": False}


def option(default: Any, help: str, *choices: str, **more: Any) -> Any:
    """A dataclass field with its meaning (units included) and what it may be: a text's choices (:N in one stands for any number), `least` and `most` of a number,
    `mapping` for a text that is a YAML mapping and may be given as one.
    """
    return field(default=default, metadata={"help": help, "choices": choices, **RANGE, **more})


def parse_value(option: Any, text: str, where: str) -> Any:
    """A parameter's value from text, typed as the parameter is."""
    value: Any = text
    if option.type is not str:
        with contextlib.suppress(InputError):
            value = parse_yaml(text, where)
    return check_value(option, value, where)


def check_value(option: Any, value: Any, where: str) -> Any:
    """`value` as the parameter's type, among its choices or in its range; else an InputError.

    What YAML and papermill read differently than it was meant is converted: 2e-4 from text to a number, a whole number
    to a float, and one that stands for a text (`serving_concurrency: 4`) to that.
    """
    kind, about = option.type, option.metadata
    number, choices = kind in (int, float), about["choices"]
    if about["mapping"] and isinstance(value, dict):
        value = json.dumps(value, default=str)
    if type(value) is bool and "true" in choices:
        value = str(value).lower()
    with contextlib.suppress(ValueError, OverflowError):
        if (kind is float and type(value) in (int, str)) or (kind is str and type(value) is int):
            value = kind(value)
    fits = type(value) is kind and (not number or about["least"] <= value <= about["most"])
    named = [re.escape(choice).replace(":N", ":[0-9]{1,3}") for choice in choices]
    if not fits or (choices and not re.fullmatch("|".join(named), value)):
        wanted = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
        wanted += f" from {about['least']} to {about['most']}" if number else ""
        wanted = f"one of {', '.join(choices)}" if choices else wanted
        raise InputError(f"{where}: {option.name} must be {wanted}, found {value!r:.200} ({about['help']})")
    if kind is str and value and (option.name.endswith("_url") or "://" in value):
        public_url(value, f"{where}: {option.name}", option.name.endswith("_url"))
    return value


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """ " (did you mean NAME?)" with the nearest of `names`; empty where none is near."""
    close = difflib.get_close_matches(name[:100], names, n=1, cutoff=cutoff)
    return f" (did you mean {close[0]}?)" if close else ""


def checked(values: Mapping[str, Any], known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` as the parameters in `known` want them. Raises InputError that begins with `where`."""
    return {key: check_value(known_option(str(key), known, where), value, where) for key, value in values.items()}


def known_option(key: str, known: Mapping[str, Any], where: str) -> Any:
    """The parameter of that name; else an InputError with the nearest."""
    if key in known:
        return known[key]
    near = did_you_mean(key, known) or f"; the valid ones are {', '.join(sorted(known))}"
    raise InputError(f"{where}: unknown parameter {key!r:.200}{near}")
