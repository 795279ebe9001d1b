"""The tuned model inside an application's own process: loaded and asked without blocking its event loop."""

import asyncio
import io
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from catlib.data.images import open_image, to_rgb
from catlib.errors import CatlibError, InputError
from catlib.parsing import BreedParser
from catlib.serving.worker import Worker
from catlib.vlm.checkpoint import VLM, Checkpoint, find_checkpoint, open_vlm
from catlib.vlm.decoding import generate_free

Source = str | Path | Checkpoint
Photo = str | Path | bytes | Image.Image  # a file, a file's content, or a picture already decoded


@dataclass(frozen=True)
class BreedAnswer:
    """What the model said about a photo, and the breed in it: None when it names none of the list, or several."""

    answer: str
    breed: str | None


Outcome = BreedAnswer | BaseException


class VLMService:
    """A tuned model that one thread owns. Every method may be called from any thread and any number of tasks.

    Calls wait in a queue; those with the same question are answered together, at most `max_batch` at once. Answers are
    greedy, at most 50 new tokens, and the breed is read from the answer alone. Which calls share a batch does not change
    an answer in float32; in bfloat16 and 4-bit, rounding differs with the batch, so that near ties may go the other way
    (`max_batch=1` rules that out).
    """

    def __init__(self, max_batch: int = 8, max_waiting: int = 1000) -> None:
        self._worker = Worker(self._answer, max_batch, max_waiting)
        self._chunk = min(4 * max_batch, max_waiting)  # photos of a batch call that wait at the same time
        self._loaded: tuple[VLM, BreedParser] | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether there is a model to ask."""
        return self._loaded is not None

    @property
    def model(self) -> torch.nn.Module | None:
        """The loaded model, to be looked at, not run: it belongs to the service's thread."""
        return None if self._loaded is None else self._loaded[0].model

    async def load_finetuned_model(
        self, checkpoint_path: Source, device: str = "auto", precision: str = "auto"
    ) -> None:
        """Load an adapter with the base that it names, or a merged model; the event loop goes on meanwhile.

        `checkpoint_path`: the folder, or what `find_checkpoint` gives for it (with another base or question, say). A model that
        was loaded before is given up first, after the calls that wait for it. `precision`: auto, bfloat16, float32 or 4-bit.
        Raises InputError when the checkpoint cannot be used; what was loaded then stays when the folder itself is wrong.
        """
        checkpoint = await asyncio.to_thread(_found, checkpoint_path)
        await asyncio.wrap_future(self._load(checkpoint, device, precision))

    def load(self, checkpoint_path: Source, device: str = "auto", precision: str = "auto") -> None:
        """`load_finetuned_model` for code without an event loop."""
        self._load(_found(checkpoint_path), device, precision).result()

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
        """Answers about several photos in their order; an error in the place of an answer that failed."""
        answers: list[Outcome] = []
        for first in range(0, len(images), self._chunk):
            calls = [self._submit(image, prompt) for image in images[first : first + self._chunk]]
            answers += [call.exception() or call.result() for call in calls]
        return answers

    async def predict_batch_async(self, images: Sequence[Photo], prompt: str | None = None) -> list[Outcome]:
        """`predict_batch` for an event loop."""
        answers: list[Outcome] = []
        for first in range(0, len(images), self._chunk):
            part = images[first : first + self._chunk]
            calls = [asyncio.wrap_future(self._submit(image, prompt)) for image in part]
            answers += await asyncio.gather(*calls, return_exceptions=True)
        return answers

    async def unload(self) -> None:
        """Give up the model and its memory, after the calls that wait for it. Another may be loaded then."""
        await asyncio.wrap_future(self._worker.run(self._unload))

    def close(self) -> None:
        """Answer what waits, give up the model and end the threads. The service cannot be used afterwards."""
        self._worker.run(self._unload)
        self._worker.close()

    def _submit(self, image: Photo, prompt: str | None) -> "Future[BreedAnswer]":
        if self._loaded is None:
            raise CatlibError("no model is loaded: await load_finetuned_model(checkpoint_path=…) first")
        return self._worker.submit(prompt or "", lambda: read_photo(image))

    def _answer(self, question: str, photos: Sequence[Image.Image]) -> list[BreedAnswer]:
        if self._loaded is None:
            raise CatlibError("the model was unloaded before this call's turn came")
        vlm, parser = self._loaded
        return [BreedAnswer(text, parser.parse(text)) for text in generate_free(vlm, photos, question or vlm.question)]

    def _load(self, checkpoint: Checkpoint, device: str, precision: str) -> Future:
        def load() -> None:
            self._unload()
            vlm = open_vlm(checkpoint, device=device, precision=precision)
            self._loaded = vlm, BreedParser(vlm.breeds)

        return self._worker.run(load)

    def _unload(self) -> None:
        self._loaded = None  # no cycles hold a model; gc.collect() would stop the loop for 0.2 s
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _found(checkpoint: Source) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else find_checkpoint(Path(checkpoint))


def read_photo(image: Photo) -> Image.Image:
    """An upright RGB photo. Raises InputError when it cannot be read or has too many pixels."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, bytes | bytearray | memoryview):
        stream = io.BytesIO(image)
        stream.name = f"photo of {len(image)} bytes"
        return open_image(stream)
    if isinstance(image, str | Path):
        return open_image(Path(image).expanduser())
    raise InputError(f"a photo is a path, a file's bytes or a PIL image, not a {type(image).__name__}")
