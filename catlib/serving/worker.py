"""One thread that owns a model: calls wait in a queue, and those that can share a forward pass are run together."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from PIL.Image import Image

from catlib.classifiers.predict import DECODERS
from catlib.errors import CatlibError, InputError

READ_S = 60.0  # longest wait for a photo's pixels: a file on a dead share must not hold up the others
log = logging.getLogger(__name__)


class Busy(CatlibError):
    """Too many calls are waiting; try again later."""


@dataclass(eq=False)
class _Call:
    question: str
    read: Callable[[], Image]
    result: Future = field(default_factory=Future)
    photo: "Future[Image] | None" = None  # set when a decoder has been asked


class Worker:
    """Runs `answer(question, photos)` in one thread, never two calls at once, in the order in which calls came.

    The oldest call decides the question; waiting calls with the same question share its batch, at most `max_batch` of them.
    When a batch fails, its calls are run one by one, so that each fails or succeeds by itself: whatever is raised, a panic
    of a tokenizer included, every call gets an answer or an exception. Photos are decoded ahead in threads, but only those
    of the first two batches in the queue, so that a long queue does not fill the memory with pixels.
    """

    def __init__(
        self, answer: Callable[[str, Sequence[Image]], Sequence[Any]], max_batch: int = 8, max_waiting: int = 1000
    ) -> None:
        if max_batch < 1 or max_waiting < 1:
            raise InputError(f"max_batch and max_waiting must be at least 1; found {max_batch} and {max_waiting}")
        self.answer, self.max_batch, self.max_waiting = answer, max_batch, max_waiting
        self._waiting: deque[_Call] = deque()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self._closed = False

    def submit(self, question: str, read: Callable[[], Image]) -> Future:
        """Queue a call; `read` decodes its photo, in another thread. Raises Busy when `max_waiting` calls are queued."""
        call = _Call(question, read)
        with self._lock:
            self._refuse_closed()
            if len(self._waiting) >= self.max_waiting:
                raise Busy(f"{len(self._waiting)} calls are waiting for the model; try again later")
            self._thread.submit(self._next)  # one turn a call; turns left over by a shared batch find nothing to do
            self._waiting.append(call)
            self._decode_ahead()
        return call.result

    def run(self, task: Callable[[], Any]) -> Future:
        """Queue a task that has the thread, and so the model, for itself, after the calls before it."""
        result: Future = Future()
        with self._lock:
            self._refuse_closed()
            self._thread.submit(_settle, result, task)
        return result

    def close(self) -> None:
        """Finish what is queued and end the threads; a second time nothing is done."""
        with self._lock:
            self._closed = True
        self._thread.shutdown()
        self._decoders.shutdown()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise CatlibError("the service is closed")

    def _decode_ahead(self, batch: Sequence[_Call] = ()) -> None:
        """Give the decoders the photos of a batch that is due, and those of the next ones in the queue."""
        for call in (*batch, *islice(self._waiting, 2 * self.max_batch)):
            call.photo = call.photo or self._decoders.submit(call.read)

    def _next(self) -> None:
        """Answer the oldest call, with those that may share its batch."""
        batch: list[_Call] = []
        others: deque[_Call] = deque()
        with self._lock:
            while self._waiting and len(batch) < self.max_batch:
                call = self._waiting.popleft()
                (batch if not batch or call.question == batch[0].question else others).append(call)
            self._waiting.extendleft(reversed(others))
            self._decode_ahead(batch)
        asked: list[tuple[_Call, Image]] = []
        for call in batch:
            if call.photo is None or not call.result.set_running_or_notify_cancel():
                continue  # its caller has gone
            try:
                asked.append((call, call.photo.result(READ_S)))
            except TimeoutError:
                call.result.set_exception(InputError(f"the photo could not be read within {READ_S:g} s"))
            except BaseException as error:
                call.result.set_exception(_told(error))
        if asked:
            self._ask(asked)

    def _ask(self, asked: Sequence[tuple[_Call, Image]]) -> None:
        try:
            answers = list(self.answer(asked[0][0].question, [photo for _, photo in asked]))
            if len(answers) != len(asked):
                raise CatlibError(f"the model gave {len(answers)} answers about {len(asked)} photos")
        except BaseException as error:
            if len(asked) == 1:
                asked[0][0].result.set_exception(_told(error))
                return
            log.warning("a batch of %d photos failed (%s); trying them one by one", len(asked), error)
            for pair in asked:
                self._ask([pair])
            return
        for (call, _), answer in zip(asked, answers, strict=True):
            call.result.set_result(answer)


def _settle(result: Future, task: Callable[[], Any]) -> None:
    if result.set_running_or_notify_cancel():
        try:
            result.set_result(task())
        except BaseException as error:
            result.set_exception(_told(error))


def _told(error: BaseException) -> Exception:
    """The exception that callers get. Some would do harm there: a StopIteration leaves an awaiting task hanging, a
    CancelledError looks like its own cancellation, a SystemExit or a Rust library's panic ends its event loop.
    """
    if isinstance(error, Exception) and not isinstance(error, StopIteration | CancelledError):
        return error
    told = CatlibError(f"the model's thread failed: {type(error).__name__}: {error}")
    told.__cause__ = error
    return told
