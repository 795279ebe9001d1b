"""The parameters that a notebook's own cells have set: its parameters cell, and the one that papermill injects."""

import ast
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from catlib.errors import InputError

INJECTED = "# Parameters"  # how papermill begins the cell that it adds after the parameters cell
PROFILE_CELL = re.compile(r"(?:\s*#[^\n]*\n|\s)*profile\s*=\s*['\"]")  # how the parameters cell begins, comments aside


def bound_parameters(namespace: Mapping[str, Any]) -> dict[str, Any] | None:
    """Name and value of what these two cells bind, in the order in which they ran; None outside IPython.

    They are found in IPython's history: the parameters cell begins with `profile = "…"`, papermill's with its comment. So a
    variable of another cell that has the name of a setting is none, and a misspelt name in these two is seen. A parameters
    cell that is run again replaces all that was set before. Raises InputError where neither has been run.
    """
    history = namespace.get("In")
    if not isinstance(history, list):
        return None
    if "get_ipython" in namespace:
        _show_log()
    found: dict[str, Any] | None = None
    for source in history:
        try:
            body = ast.parse(source).body
        except SyntaxError:
            continue
        if source.lstrip().startswith(INJECTED):
            found = (found or {}) | dict(_bindings(body, namespace))
        elif PROFILE_CELL.match(source):
            found = dict(_bindings(body, namespace))
    if found is None:
        raise InputError('the parameters cell has not been run: it begins with profile = "NAME"')
    return found


def _show_log() -> None:
    """Let a notebook show what catlib logs, its progress above all, unless the notebook has arranged that itself."""
    log = logging.getLogger("catlib")
    if not (log.handlers or logging.getLogger().handlers):
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)


def _bindings(body: list[ast.stmt], namespace: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The names that the statements bind; values as written where they are literals, as a later cell may have used the name."""
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in namespace:
                yield node.id, namespace[node.id]
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            with suppress(ValueError):
                yield statement.targets[0].id, ast.literal_eval(statement.value)
