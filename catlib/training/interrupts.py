"""Ctrl-C waits for the end of a step, so that what is saved then is a whole state and not half of one."""

import signal
import threading
from types import FrameType, TracebackType


class AfterThisStep:
    """While open, the first Ctrl-C only sets `wanted`; a second one interrupts at once. Without effect outside the main thread."""

    def __init__(self) -> None:
        self.wanted = False
        self._before: signal.Handlers | None = None

    def __enter__(self) -> "AfterThisStep":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raise KeyboardInterrupt when one has been asked for."""
        if self.wanted:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
