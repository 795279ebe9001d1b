"""One thread that owns a model: calls wait in a queue, and those that can share a forward pass are run together."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from PIL.Image import Image

from catlib.errors import CatlibError

DECODERS = 2  # threads; Pillow releases the interpreter lock while it decodes
log = logging.getLogger(__name__)


class Busy(CatlibError):
    """Too many calls are waiting; try again later."""


@dataclass(eq=False)
class _Call:
    """A question about a photo, which `work` decodes; or, without a question, a task that wants the thread for itself."""

    question: str | None
    work: Callable[[], Any]
    result: Future = field(default_factory=Future)
    photo: "Future[Image] | None" = None  # set when a decoder has been asked


class Worker:
    """Runs `answer(question, photos)` in one thread, never two calls at once, in the order in which calls came.

    The oldest call decides the question; waiting calls with the same question share its batch, at most `max_batch` of them.
    When a batch fails, its calls are run one by one, so that each fails or succeeds by itself. Photos are decoded ahead in
    threads, but only those of the first two batches in the queue, so that a long queue does not fill the memory with pixels.
    """

    def __init__(
        self, answer: Callable[[str, Sequence[Image]], Sequence[Any]], max_batch: int = 8, max_waiting: int = 1000
    ) -> None:
        self.answer, self.max_batch, self.max_waiting = answer, max_batch, max_waiting
        self._waiting: deque[_Call] = deque()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    def submit(self, question: str, read: Callable[[], Image]) -> Future:
        """Queue a call; `read` decodes its photo, in another thread. What it raises is what the call raises.

        Raises Busy when `max_waiting` calls are queued, CatlibError after `close`.
        """
        return self._queue(_Call(question, read))

    def run(self, task: Callable[[], Any]) -> Future:
        """Queue a task that has the thread, and so the model, for itself: after the calls before it, before those after it."""
        return self._queue(_Call(None, task))

    def close(self) -> None:
        """Finish what is queued and end the threads."""
        self._thread.shutdown()
        self._decoders.shutdown()

    def _queue(self, call: _Call) -> Future:
        with self._lock:
            if call.question is not None and len(self._waiting) >= self.max_waiting:
                raise Busy(f"{len(self._waiting)} calls are waiting for the model; try again later")
            try:
                self._thread.submit(self._next)  # one turn a call; turns left over by a shared batch find nothing to do
            except RuntimeError:
                raise CatlibError("the service is closed") from None
            self._waiting.append(call)
            self._decode_ahead()
        return call.result

    def _decode_ahead(self, batch: Sequence[_Call] = ()) -> None:
        """Give the decoders the photos of a batch that is due, and those of the next ones in the queue."""
        for call in (*batch, *islice(self._waiting, 2 * self.max_batch)):
            if call.question is not None and call.photo is None:
                call.photo = self._decoders.submit(call.work)

    def _next(self) -> None:
        with self._lock:
            batch = self._take()
            self._decode_ahead(batch)
        batch = [call for call in batch if call.result.set_running_or_notify_cancel()]  # the others' callers have gone
        asked: list[tuple[_Call, Any]] = []
        for call in batch:
            try:
                found = call.photo.result() if call.photo else call.work()
            except Exception as error:
                call.result.set_exception(error)
            else:
                asked.append((call, found))
        if asked and batch[0].question is None:
            batch[0].result.set_result(asked[0][1])
        elif asked:
            self._ask(batch[0].question or "", asked)

    def _take(self) -> list[_Call]:
        """The oldest call and those that may share its batch; nothing overtakes a task."""
        if not self._waiting:
            return []
        batch, others = [self._waiting.popleft()], deque[_Call]()
        question = batch[0].question
        while question is not None and self._waiting and len(batch) < self.max_batch:
            if self._waiting[0].question is None:
                break
            call = self._waiting.popleft()
            (batch if call.question == question else others).append(call)
        self._waiting.extendleft(reversed(others))
        return batch

    def _ask(self, question: str, asked: Sequence[tuple[_Call, Image]]) -> None:
        try:
            answered = list(zip(asked, self.answer(question, [photo for _, photo in asked]), strict=True))
        except Exception as error:
            if len(asked) == 1:
                asked[0][0].result.set_exception(error)
                return
            log.warning("a batch of %d photos failed (%s); trying them one by one", len(asked), error)
            for pair in asked:
                self._ask(question, [pair])
        else:
            for (call, _), answer in answered:
                call.result.set_result(answer)
