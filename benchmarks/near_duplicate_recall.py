"""How many altered copies of real photos the near-duplicate search finds, by kind of change and number of bits.

    CATLIB_PHOTOS=FOLDER python benchmarks/near_duplicate_recall.py --photos 300

Each photo is altered in one way, saved and hashed as the audit hashes it. Found: its hash is at most so many
bits from the original's, or that of its mirror image half as many.
The last line counts the pairs of the folder's own photos by distance: what a higher limit would join.
"""

import argparse
import io
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from catlib.data.hashing import near_pairs, perceptual_hashes
from catlib.data.images import open_image

BITS = (4, 6, 8, 10)


def crop(share: float) -> Callable[[Image.Image], Image.Image]:
    """Cut off `share` of width and height, evenly on both sides."""
    low, high = share / 2, 1 - share / 2
    return lambda p: p.crop((int(p.width * low), int(p.height * low), int(p.width * high), int(p.height * high)))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "saved at JPEG quality 40": lambda p: _saved(p, 40),
    "half the size": lambda p: p.resize((p.width // 2, p.height // 2)),
    "30 % brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.3),
    "greyscale": lambda p: p.convert("L").convert("RGB"),
    "2 % cut off": crop(0.02),
    "5 % cut off": crop(0.05),
    "10 % cut off": crop(0.10),
    "mirrored": ImageOps.mirror,
    "mirrored, 2 % cut off": lambda p: crop(0.02)(ImageOps.mirror(p)),
}


def _saved(photo: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    photo.save(stream, "JPEG", quality=quality)
    return Image.open(stream)


def _plain(photo: Image.Image) -> int | None:
    both = perceptual_hashes(photo.convert("L"))
    return both and both[0]


def _distance(original: int, copy: tuple[int, int]) -> int:
    """The smallest limit at which the two are joined: mirror images are at half the limit."""
    plain, mirrored = copy
    return min((original ^ plain).bit_count(), 2 * (original ^ mirrored).bit_count())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=300, metavar="N")
    args = parser.parse_args()
    folder = os.environ.get("CATLIB_PHOTOS")
    if not folder:
        sys.exit("set CATLIB_PHOTOS to a folder of photos")
    paths = sorted(Path(folder).rglob("*.jpg"))
    photos = [open_image(path) for path in random.Random(0).sample(paths, min(args.photos, len(paths)))]
    hashes = [_plain(photo) for photo in photos]
    for name, change in CHANGES.items():
        changed = [perceptual_hashes(_saved(change(photo), 90).convert("L")) for photo in photos]
        away = np.array([_distance(a, both) for a, both in zip(hashes, changed, strict=True) if a and both])
        found = {f"within_{n}": round(float((away <= n).mean()), 3) for n in BITS}
        print(json.dumps({"change": name, "photos": len(away), **found}))
    everything = [_plain(open_image(path)) for path in paths]
    _, gaps = near_pairs(np.array([value for value in everything if value is not None], dtype=np.uint64), max(BITS) + 2)
    bits, count = np.unique(gaps, return_counts=True)
    print(json.dumps({"pairs_at_bits": dict(zip(bits.tolist(), count.tolist(), strict=True))}))


if __name__ == "__main__":
    main()
