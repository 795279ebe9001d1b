"""Progress that is a bar in a terminal or notebook and a line every few seconds in a log file."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm  # not tqdm.auto: it warns in notebooks without ipywidgets

Item = TypeVar("Item")
LOG_EVERY_S = 15.0
log = logging.getLogger(__name__)


def track(items: Iterable[Item], what: str, total: int | None = None, unit: str = "photos") -> Iterator[Item]:
    """Yield `items`, showing how many are done, at what rate, and how long the rest will take.

    On a terminal this is a tqdm bar. Elsewhere (papermill, CI, a pipe) it is one log line every LOG_EVERY_S seconds, so that
    a log stays readable. `total` is taken from `len(items)` when it is not given.
    """
    if total is None:
        total = len(items) if isinstance(items, Sized) else None
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total, unit=f" {unit}", leave=False)
        return
    start = last = time.monotonic()
    done = 0
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= LOG_EVERY_S:
            last = now
            rate = done / (now - start)
            rest = f", {(total - done) / rate:.0f} s to go" if total else ""
            log.info("%s: %d%s %s, %.1f/s%s", what, done, f" of {total}" if total else "", unit, rate, rest)
