"""Photos in batches, decoded ahead in threads while the model computes."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL.Image import Image

from catlib.data.images import inside, open_image
from catlib.data.records import Sample
from catlib.errors import InputError

OnError = Callable[[Sample, InputError], None]
DECODERS = 2  # threads; Pillow releases the interpreter lock while it decodes


def read_batches(
    samples: Sequence[Sample], image_root: Path, batch_size: int, on_error: OnError | None = None
) -> Iterator[tuple[list[Sample], list[Image], list[float]]]:
    """Yield batches of samples with their upright RGB photos and the milliseconds that decoding each one took.

    One batch is read ahead. A photo that cannot be opened raises an InputError, or, with `on_error`, is reported to
    it and left out; a batch in which nothing is left is not yielded.
    """
    with ThreadPoolExecutor(DECODERS, thread_name_prefix="decode") as pool:

        def start(first: int) -> list[tuple[Sample, Future]]:
            return [(s, pool.submit(_read, image_root, s)) for s in samples[first : first + batch_size]]

        try:
            ahead = start(0)
            for first in range(batch_size, len(samples) + batch_size, batch_size):
                current, ahead = ahead, start(first)
                read = [entry for entry in (_result(*pair, on_error) for pair in current) if entry]
                if read:
                    chunk, images, decode_ms = zip(*read, strict=True)
                    yield list(chunk), list(images), list(decode_ms)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read(image_root: Path, sample: Sample) -> tuple[Image, float]:
    start = time.perf_counter()
    image = open_image(inside(image_root, sample.image))
    return image, 1000 * (time.perf_counter() - start)


def _result(sample: Sample, future: Future, on_error: OnError | None) -> tuple[Sample, Image, float] | None:
    try:
        return sample, *future.result()
    except InputError as error:
        if on_error is None:
            raise
        on_error(sample, error)
        return None
