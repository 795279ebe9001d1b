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

from catlib.data.duplicates import near_pairs, perceptual_hashes
from catlib.data.images import open_image

BITS = (4, 6, 8, 10)
COSINES = (0.7, 0.8, 0.85, 0.9, 0.95)


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


def cosines(encoder: str, photos: list[Image.Image]) -> None:
    """The same by frozen features: found at each cosine (of deviations from the mean photo), and pairs of the photos themselves."""
    from catlib.classifiers.photo_features import open_encoder

    model = open_encoder(encoder)

    def vectors(some: list[Image.Image]) -> np.ndarray:
        parts = [model.compute(some[i : i + 16])[model.poolings[-1]] for i in range(0, len(some), 16)]
        return np.concatenate(parts)

    own = vectors(photos)
    mean = own.mean(0)
    own = (own - mean) / np.linalg.norm(own - mean, axis=1, keepdims=True)
    for name, change in CHANGES.items():
        changed = vectors([_saved(change(photo), 90).convert("RGB") for photo in photos]) - mean
        near = (own * changed).sum(1) / np.linalg.norm(changed, axis=1)
        print(
            json.dumps({"change": name, **{f"cosine {c}": round(float((near >= c).mean()), 3) for c in COSINES}}),
            flush=True,
        )
    pairs = (own @ own.T)[np.triu_indices(len(own), 1)]
    print(json.dumps({"pairs of the folder itself": {f"cosine {c}": int((pairs >= c).sum()) for c in COSINES}}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=300, metavar="N")
    parser.add_argument("--encoder", help="CLIP or VLM: measure the cosine of its frozen features as well")
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
    if args.encoder:
        cosines(args.encoder, photos)


if __name__ == "__main__":
    main()
