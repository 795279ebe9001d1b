"""The embedded photo set: drawn cats of 20 breeds, the seven rare ones with few pictures, with a test split of its own.

Layout: `images/<Breed>/<split>_NNNN.jpg` and `labels.csv` with the columns image (relative to the folder of
labels.csv), breed, split (train or test). Every picture has its own random stream, named by seed, stream, breed and
number: the test pictures share none with training pictures, nor with those that the demo models have seen.
"""

import argparse
import csv
import hashlib
import io
import json
import logging
import shutil
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL.Image import Image

from catlib.breeds import TABLE, find
from catlib.data.records import write_atomically
from catlib.errors import CatlibError
from catlib.progress import track
from demo.drawing import draw_cat
from demo.drawing_look import look_of

log = logging.getLogger(__name__)
LABELS = "labels.csv"
CARD = "demo.json"
SIZE = 160  # pixels
STREAMS = {"train": 1, "test": 2, "demo-models": 3}
TEST_SHARE = 0.2  # test pictures of each breed, as a share of the most frequent breed's training pictures
MIN_PICTURES = 3
# training pictures of each breed, as a share of the most frequent breed's
SHARES: Mapping[str, float] = {
    "Domestic Short Hair": 1.0,
    "Maine Coon": 0.85,
    "Siamese": 0.8,
    "Persian": 0.7,
    "Calico": 0.65,
    "American Shorthair": 0.6,
    "Ragdoll": 0.5,
    "Russian Blue": 0.45,
    "Bengal": 0.4,
    "Abyssinian": 0.35,
    "Manx": 0.3,
    "Sphynx - Hairless Cat": 0.25,
    "Oriental Short Hair": 0.22,
    "Oriental Long Hair": 0.19,
    "Chinchilla": 0.19,
    "Cymric": 0.18,
    "Burmilla": 0.18,
    "York Chocolate": 0.16,
    "American Wirehair": 0.16,
    "Canadian Hairless": 0.16,
}


def draw_dataset(out: Path, photos: int, seed: int) -> Path:
    """Draw the set into the folder `out` and return its labels.csv; a complete set of the same kind is left alone.

    `photos` is the number of training pictures of the most frequent breed. Same arguments, same bytes.
    """
    labels = out / LABELS
    card = {"photos": photos, "seed": seed, "size": SIZE, "drawing": _fingerprint()}
    jobs = _jobs(photos)
    if _is_complete(out, card, jobs):
        return labels
    if (out / CARD).is_file():
        shutil.rmtree(out / "images", ignore_errors=True)
    labels.unlink(missing_ok=True)
    write_atomically(out / CARD, json.dumps(card, indent=1))
    for name in SHARES:
        (out / "images" / name).mkdir(parents=True, exist_ok=True)
    # The helper is a command of its own: forking does not mix with a notebook's threads, and spawning imports main.
    command = [
        sys.executable,
        "-m",
        "demo.photos",
        str(out),
        "--photos",
        str(photos),
        "--seed",
        str(seed),
        "--half",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as helper:
        for job in track(jobs[::2], "drawing cats (each stands for two)"):
            _draw_file(out, *job, seed)
        _, trouble = helper.communicate()
    if helper.returncode:
        raise CatlibError(f"drawing cats into {out} failed: {trouble.strip()}")
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("image", "breed", "split"))
    rows.writerows((_relative(*job), job[0], job[1]) for job in jobs)
    write_atomically(labels, table.getvalue())  # last: a set without it is not complete
    log.info("%d drawn cats of %d breeds in %s", len(jobs), len(SHARES), out)
    return labels


def count(name: str, split: str, photos: int) -> int:
    """How many pictures of a breed a split has when the most frequent breed has `photos` training pictures."""
    return max(MIN_PICTURES, round(photos * (SHARES[name] if split == "train" else TEST_SHARE)))


def draw_breed(name: str, stream: str, index: int, seed: int, size: int = SIZE) -> Image:
    """Picture number `index` of a breed in one of the STREAMS."""
    rng = np.random.default_rng((seed, STREAMS[stream], zlib.crc32(name.encode()), index))
    return draw_cat(look_of(find(name).traits, rng), rng, size)


def _jobs(photos: int) -> list[tuple[str, str, int]]:
    """Breed, split and number of every picture."""
    return [
        (name, split, i) for name in SHARES for split in ("train", "test") for i in range(count(name, split, photos))
    ]


def _draw_file(out: Path, name: str, split: str, index: int, seed: int) -> None:
    quality = 80 + 7 * (index % 3)
    draw_breed(name, split, index, seed).save(out / _relative(name, split, index), quality=quality)


def _relative(name: str, split: str, index: int) -> str:
    return f"images/{name}/{split}_{index:04d}.jpg"


def _is_complete(out: Path, card: Mapping[str, object], jobs: list[tuple[str, str, int]]) -> bool:
    if not (out / LABELS).is_file() or not (out / CARD).is_file():
        return False
    if json.loads((out / CARD).read_text(encoding="utf-8")) != card:
        return False
    return all((out / _relative(*job)).is_file() for job in jobs)


def _fingerprint() -> str:
    """Changes when the drawing changes, so that an old set is drawn again."""
    sources = sorted(Path(__file__).parent.glob("drawing*.py")) + [Path(__file__), TABLE]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--photos", type=int, default=120, help="training pictures of the most frequent breed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--half", action="store_true", help=argparse.SUPPRESS)  # the other half is draw_dataset's own
    args = parser.parse_args()
    if args.half:
        for job in _jobs(args.photos)[1::2]:
            _draw_file(args.out, *job, args.seed)
    else:
        draw_dataset(args.out, args.photos, args.seed)


if __name__ == "__main__":
    main()
