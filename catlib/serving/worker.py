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
Answer = Callable[[str, Sequence[Image]], Sequence[Any]]
log = logging.getLogger(__name__)


class Busy(CatlibError):
    """Too many calls are waiting; try again later."""


@dataclass
class _Call:
    """A photo, on its way through the decoders, and the question about it; or a task that wants the thread for itself."""

    result: Future = field(default_factory=Future)
    question: str = ""
    read: Callable[[], Image] | None = None
    photo: Future | None = None
    task: Callable[[], Any] | None = None


class Worker:
    """Runs `answer(question, photos)` in one thread, never two calls at once, in the order in which calls came.

    The oldest call decides the question; calls with the same question whose photos are decoded by then share its batch,
    at most `max_batch` of them. When a batch fails, its calls are run one by one, so that each fails or succeeds by
    itself. Photos are decoded ahead in threads, but only those of the first two batches in the queue, so that a long
    queue does not fill the memory with pixels.
    """

    def __init__(self, answer: Answer, max_batch: int = 8, max_waiting: int = 1000) -> None:
        self.answer, self.max_batch, self.max_waiting = answer, max_batch, max_waiting
        self._queue: deque[_Call] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, question: str, read: Callable[[], Image]) -> Future:
        """Queue a call; `read` decodes its photo, in another thread. What it raises is what the call raises.

        Raises Busy when `max_waiting` calls are queued, CatlibError after `close`.
        """
        call = _Call(question=question, read=read)
        with self._changed:
            self._check_open()
            if len(self._queue) >= self.max_waiting:
                raise Busy(f"{len(self._queue)} calls are waiting for the model; try again later")
            self._queue.append(call)
            self._decode_ahead()
        return call.result

    def run(self, task: Callable[[], Any]) -> Future:
        """Queue a task that has the thread, and so the model, for itself: after the calls before it."""
        call = _Call(task=task)
        with self._changed:
            self._check_open()
            self._queue.append(call)
            self._changed.notify_all()
        return call.result

    def close(self) -> None:
        """Finish what is queued and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._decoders.shutdown()

    def _check_open(self) -> None:
        if self._closed:
            raise CatlibError("the service is closed")

    def _decode_ahead(self) -> None:
        for call in islice(self._queue, 2 * self.max_batch):
            if call.read is not None and call.photo is None:
                call.photo = self._decoders.submit(call.read)
                call.photo.add_done_callback(lambda _: self._wake())

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready() or (self._closed and not self._queue))
                if not self._queue:
                    return
                batch = self._take()
                self._decode_ahead()
            if batch[0].task is None:
                self._answer_all(batch)
            elif batch[0].result.set_running_or_notify_cancel():
                self._settle(batch[0].result, batch[0].task)
            del batch  # or the last photos and answers would live on while the thread waits

    def _ready(self) -> bool:
        """Whether the oldest call can be served."""
        first = self._queue[0] if self._queue else None
        return first is not None and (first.task is not None or (first.photo is not None and first.photo.done()))

    def _take(self) -> list[_Call]:
        """The oldest call and those that may share its batch; nothing overtakes a task."""
        first = self._queue.popleft()
        if first.task is not None:
            return [first]
        batch, left = [first], deque()
        while self._queue and len(batch) < self.max_batch and self._queue[0].task is None:
            call = self._queue.popleft()
            fits = call.question == first.question and call.photo is not None and call.photo.done()
            (batch if fits else left).append(call)
        self._queue.extendleft(reversed(left))
        return batch

    def _answer_all(self, batch: list[_Call]) -> None:
        photos: list[tuple[_Call, Image]] = []
        for call in batch:
            if not call.result.set_running_or_notify_cancel():
                continue  # whoever asked has gone
            if error := call.photo.exception():
                call.result.set_exception(error)
            else:
                photos.append((call, call.photo.result()))
        if not photos:
            return
        question = batch[0].question
        try:
            answers = list(self.answer(question, [photo for _, photo in photos]))
        except Exception as error:
            if len(photos) == 1:
                photos[0][0].result.set_exception(error)
                return
            log.warning("a batch of %d photos failed (%s); trying them one by one", len(photos), error)
            for call, photo in photos:
                self._settle(call.result, lambda photo=photo: self.answer(question, [photo])[0])
            return
        for (call, _), answer in zip(photos, answers, strict=True):
            call.result.set_result(answer)

    @staticmethod
    def _settle(result: Future, work: Callable[[], Any]) -> None:
        try:
            result.set_result(work())
        except Exception as error:
            result.set_exception(error)
