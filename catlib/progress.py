"""Progress that is a bar in a terminal or notebook and a line every few seconds in a log file."""

import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TextIO, TypeVar

from tqdm import tqdm  # not tqdm.auto: it warns in notebooks without ipywidgets

Item = TypeVar("Item")
LOG_EVERY_S = 15.0
TELL_EVERY_S = 60.0
CLEAR = "\r\x1b[2K"  # the line of a terminal
# What `track` and the training (`step 40 of 159, 3 min left: epoch 0.8, loss 0.21, …`) log.
PROGRESS = re.compile(r"\b(\d+) of (\d+)\b.*?, ([\d.]+ (?:min|s)) (?:left|to go)(?:.*?\bloss ([\d.e+-]+))?")
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


class Console:
    """A text stream for what a notebook logs: all of it goes to `log_file`, and to `out` with its progress as one moving line.

    Where `out` is no terminal, the progress is a line a minute there; None: nothing is shown.
    """

    def __init__(self, name: str, log_file: TextIO, out: TextIO | None) -> None:
        self.name, self.log_file, self.out = name, log_file, out
        self.moves = out is not None and out.isatty()
        self.told, self.rest = -TELL_EVERY_S, ""

    def write(self, text: str) -> None:
        """Take some text, which need not be whole lines."""
        self.log_file.write(text)
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines if self.out else ():
            done = PROGRESS.search(line)
            if done is None:
                print(f"{CLEAR if self.moves else ''}{line}", file=self.out)
            elif self.moves or time.monotonic() - self.told >= TELL_EVERY_S:
                self.told = time.monotonic()
                loss = f" · loss {done[4]}" if done[4] else ""
                said = f"{self.name} {done[1]}/{done[2]}{loss} · {done[3]} left"
                print(f"{CLEAR if self.moves else ''}{said}", end="" if self.moves else "\n", file=self.out, flush=True)

    def flush(self) -> None:
        """Write down what is held back."""
        self.log_file.flush()

    def close(self) -> None:
        """Take the moving line away."""
        if self.moves:
            print(CLEAR, end="", file=self.out, flush=True)
