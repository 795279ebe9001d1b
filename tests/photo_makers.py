"""Small pictures for the data tests: each number gives a picture of its own, unlike the others."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Smooth random blobs: a perceptual hash of their own for every number."""
    small = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as the bytes of a file of the format `kind`."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def jpeg(number: int, **options: Any) -> bytes:
    """A picture as JPEG bytes."""
    return encoded(picture(number), "JPEG", **{"quality": 90, **options})


def fill(root: Path, counts: dict[str, int], start: int = 0) -> Path:
    """`root/<breed>/NNN.jpg`, all pictures different; the folder."""
    number = start
    for breed, count in counts.items():
        (root / breed).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / breed / f"{start + i:03d}.jpg").write_bytes(jpeg(number + 1000 * len(breed)))
            number += 1
    return root
