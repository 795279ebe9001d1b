"""Signals that ask a program to end."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def handling(
    *numbers: int, handler: Callable[..., Any] = signal.default_int_handler, ignored: bool = True
) -> Iterator[None]:
    """While open, `handler` takes these signals; by default they raise KeyboardInterrupt as Ctrl-C does.

    `ignored`: also those that the process ignores (nohup). Without effect outside the main thread.
    """
    main = threading.current_thread() is threading.main_thread()
    taken = [n for n in numbers if main and (ignored or signal.getsignal(n) is not signal.SIG_IGN)]
    before = {number: signal.signal(number, handler) for number in taken}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
