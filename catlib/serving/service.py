"""The tuned model, or whatever won, inside an application's own process: loaded and asked without blocking its event loop."""

import asyncio
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from catlib.classifiers.base import Classifier
from catlib.classifiers.vlm import VLMClassifier
from catlib.data.images import check_size, open_image, to_rgb
from catlib.errors import CatlibError, InputError
from catlib.evaluation.calibration import stored_calibration
from catlib.serving.winner import Winner, open_winner
from catlib.serving.worker import Busy, Worker
from catlib.settings import DECODINGS
from catlib.vlm.checkpoint import Checkpoint, find_checkpoint, open_vlm
from catlib.vlm.decoding import generate_free

Source = str | Path | Checkpoint
Photo = str | Path | bytes | Image.Image  # a file, a file's content, or a picture already decoded
T = TypeVar("T")
log = logging.getLogger(__name__)
DEFAULT = Path("outputs/vlm_checkpoints/llava-cat-breeds")  # the plan's
__all__ = ["BreedAnswer", "Busy", "Photo", "VLMService", "read_photo"]


@dataclass(frozen=True)
class BreedAnswer:
    """What the model says about a photo, and the breed in it: None when its words name none of the list, or several.

    `probabilities`: with scores, that of each breed, the likeliest first, at the temperature fitted on validation photos.
    `sure`: whether the likeliest reaches the threshold fitted there; None where nothing was fitted.
    """

    answer: str
    breed: str | None
    probabilities: Mapping[str, float] | None = field(default=None, hash=False)
    sure: bool | None = None


Outcome = BreedAnswer | BaseException


class VLMService:
    """A model that one thread owns. Every method may be called from any thread and any number of tasks.

    Calls wait in a queue; those with the same question are answered together, at most `max_batch` at once. In bfloat16 and
    4-bit, rounding differs with the batch, so that near ties may go the other way (`max_batch=1` rules that out).

    `decoding`: free, as the plan has it: greedy words, the breed read from them alone; constrained: words held to the breeds'
    names; score: the likelihood of every name, with probabilities. `reasons`: with the last two, the model's own words are
    written as well (the time of `free` on top). What `from_run` loads decodes as the run has measured it.
    """

    def __init__(
        self, max_batch: int = 8, max_waiting: int = 1000, *, decoding: str = "free", reasons: bool = False
    ) -> None:
        if decoding not in DECODINGS:
            raise InputError(f"decoding must be one of {', '.join(DECODINGS)}; found {decoding!r}")
        self.decoding, self.reasons = decoding, reasons
        self._worker = Worker(self._answer, max_batch, max_waiting)
        self._chunk = min(4 * max_batch, max_waiting)  # photos of a batch call that wait at the same time
        self._loaded: Winner | None = None
        self._open: Callable[[], Winner] | None = None  # loads the same once more

    @classmethod
    def from_run(cls, run: str | Path, use: str = "", device: str = "auto", **options: Any) -> "VLMService":
        """A service, made with the constructor's `options`, after `load_run`."""
        service = cls(**options)
        try:
            service.load_run(run, use, device)
        except BaseException:
            service.close()
            raise
        return service

    def load_run(self, run: str | Path, use: str = "", device: str = "auto") -> None:
        """Load what the verdict of a run (its name or folder) says, as the run has measured it.

        `use`: another of its models, which is warned of. Raises InputError as `open_winner` does.
        """
        self._swap(partial(open_winner, run, use, device)).result()

    @property
    def is_loaded(self) -> bool:
        """Whether there is a model to ask."""
        return self._loaded is not None

    @property
    def classifier(self) -> Classifier | None:
        """What is loaded, to be looked at, not run: it belongs to the service's thread."""
        return self._loaded.classifier if self._loaded else None

    async def load_finetuned_model(
        self, checkpoint_path: Source = DEFAULT, device: str = "auto", precision: str = "auto"
    ) -> None:
        """Load an adapter with the base that it names, or a merged model; calls meanwhile are answered by the model before.

        `checkpoint_path`: the folder, or what `find_checkpoint` gives for it (with another base or question, say). `precision`:
        auto, bfloat16, float32 or 4-bit. Raises InputError for a checkpoint that cannot be used; the model before stays then.
        """
        load = await asyncio.to_thread(self._load, checkpoint_path, device, precision)
        await asyncio.wrap_future(load)

    def load(self, checkpoint_path: Source = DEFAULT, device: str = "auto", precision: str = "auto") -> None:
        """`load_finetuned_model` for code without an event loop."""
        self._load(checkpoint_path, device, precision).result()

    def predict_finetuned(self, image: Photo, prompt: str | None = None) -> BreedAnswer:
        """Answer about one photo, waiting for the turn; inside an event loop use `predict_finetuned_async`.

        `prompt`: the question; None is the checkpoint's. Raises InputError for a photo that cannot be read, CatlibError when
        no model is loaded, Busy when too many calls wait.
        """
        return self._submit(image, prompt).result()

    async def predict_finetuned_async(self, image: Photo, prompt: str | None = None) -> BreedAnswer:
        """`predict_finetuned` for an event loop. A call that is cancelled before its turn costs nothing."""
        return await asyncio.wrap_future(self._submit(image, prompt))

    def predict_batch(self, images: Sequence[Photo], prompt: str | None = None) -> list[Outcome]:
        """Answers about several photos in their order; an error (Busy among them) in the place of an answer that failed."""
        chunks = self._chunks(images, prompt)
        return [call.exception() or call.result() for calls in chunks for call in calls]

    async def predict_batch_async(self, images: Sequence[Photo], prompt: str | None = None) -> list[Outcome]:
        """`predict_batch` for an event loop."""
        answers: list[Outcome] = []
        for calls in self._chunks(images, prompt):
            answers += await asyncio.gather(*map(asyncio.wrap_future, calls), return_exceptions=True)
        return answers

    def with_model(self, task: Callable[[Classifier], T]) -> "Future[T]":
        """Run `task` on the classifier in the thread that owns it. Raises CatlibError when no model is loaded."""
        self._require()
        return self._worker.run(lambda: task(self._require().classifier))

    async def unload(self) -> None:
        """Give up the model and its memory, after the calls that wait for it. Another may be loaded then."""
        await asyncio.wrap_future(self._worker.run(self._release))

    def close(self) -> None:
        """Answer what waits, give up the model and end the threads. The service cannot be used afterwards."""
        self._worker.close()
        self._release()

    def __enter__(self) -> "VLMService":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require(self) -> Winner:
        if self._loaded is None:
            raise CatlibError("no model is loaded: await load_finetuned_model(checkpoint_path=…) first")
        return self._loaded

    def _submit(self, image: Photo, prompt: str | None) -> "Future[BreedAnswer]":
        self._require()
        return self._worker.submit(prompt or "", lambda: read_photo(image))

    def _chunks(self, images: Sequence[Photo], prompt: str | None) -> "Iterator[list[Future[BreedAnswer]]]":
        """The calls of a batch, a part of it at a time; one that is refused is a call that has failed."""
        self._require()
        for first in range(0, len(images), self._chunk):
            calls = []
            for image in images[first : first + self._chunk]:
                try:
                    calls.append(self._submit(image, prompt))
                except CatlibError as error:
                    calls.append(Future())
                    calls[-1].set_exception(error)
            yield calls

    def _answer(self, question: str, photos: Sequence[Image.Image]) -> list[BreedAnswer]:
        loaded = self._require()
        classifier = own = loaded.classifier
        if question:
            if not isinstance(own, VLMClassifier):
                raise InputError(f"{own.name} answers no questions: leave the prompt out")
            classifier = own if question == own.prompt else own.asking(question)
        batch = classifier.classify(photos)
        words: Sequence[str] = batch.answers or [breed or "" for breed in batch.predicted]
        if self.reasons and isinstance(classifier, VLMClassifier) and classifier.decoding != "free":
            words = generate_free(classifier.vlm, photos, classifier.prompt)
        if batch.log_probs is None:
            return [BreedAnswer(text, breed) for text, breed in zip(words, batch.predicted, strict=True)]
        fitted = loaded.calibration if classifier is own else None
        chances = np.exp(fitted.scaled(batch.log_probs) if fitted else batch.log_probs)
        ranked = [{classifier.breeds[i]: float(row[i]) for i in np.argsort(-row, kind="stable")} for row in chances]
        sure = [fitted.is_sure(row.max()) if fitted else None for row in chances]
        return [BreedAnswer(*answer) for answer in zip(words, batch.predicted, ranked, sure, strict=True)]

    def _load(self, source: Source, device: str, precision: str) -> "Future[None]":
        checkpoint = source if isinstance(source, Checkpoint) else find_checkpoint(Path(source))

        def open_it() -> Winner:
            vlm = open_vlm(checkpoint, device=device, precision=precision)
            fitted = stored_calibration(checkpoint.folder) if checkpoint.folder and self.decoding == "score" else None
            way = fitted.way if fitted else {}
            if fitted and (list(vlm.breeds), vlm.question) != (way.get("breeds"), way.get("question")):
                log.warning("%s was calibrated with other breeds or another question: not used", checkpoint.name)
                fitted, way = None, {}
            more = (way.get("score_norm") or "sum", way.get("prior_strength") or 0.0)
            return Winner(VLMClassifier(vlm, None, self.decoding, *more), fitted)

        return self._swap(open_it)

    def _swap(self, open_it: Callable[[], Winner]) -> "Future[None]":
        """Load in the model's thread. On a GPU, which may not hold two models, the one before makes room, and comes back on a failure."""

        def load() -> None:
            again = self._open if self._loaded else None
            if torch.cuda.is_available():
                self._release()
            try:
                self._loaded, self._open = open_it(), open_it
            except BaseException:
                if self._loaded is None and again:
                    self._loaded = again()
                raise

        return self._worker.run(load)

    def _release(self) -> None:
        self._loaded = None  # no cycles hold a model; gc.collect() would stop the loop for 0.2 s
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def read_photo(image: Photo) -> Image.Image:
    """An upright RGB photo. Raises InputError when it cannot be read or has too many pixels."""
    try:
        if isinstance(image, Image.Image):
            check_size(image, "photo")
            return to_rgb(image)
        if isinstance(image, bytes | bytearray | memoryview):
            stream = io.BytesIO(image)
            stream.name = f"photo of {len(stream.getbuffer())} bytes"
            return open_image(stream)
        if isinstance(image, str | Path):
            return open_image(Path(image).expanduser())
    except (OSError, ValueError, RuntimeError, SyntaxError) as error:  # a lazy picture is broken; `~nobody/x.jpg`
        raise InputError(f"the photo cannot be read: {error}") from None
    raise InputError(f"a photo is a path, a file's bytes or a PIL image, not a {type(image).__name__}")
