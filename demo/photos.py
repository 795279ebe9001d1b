"""The demo's photo folder: drawn cats of 20 breeds, the seven rare ones with few photos, with a test part of its own.

Layout: `<part>/<Breed>/<part>_NNNN_drawn.jpg` with the parts train and test, as anyone's photos in folders. The names end in no
number: numbered photos are taken for a sequence, and each of these is drawn apart. Every photo has its own random stream, named
by seed, stream, breed and number: those of the test share none with training photos, nor with those that the demo's models saw.
"""

import hashlib
import logging
import multiprocessing
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL.Image import Image

from catlib.breeds import TABLE, find
from catlib.errors import InputError
from catlib.files import read_json, write_json
from catlib.folders import whole_folder
from catlib.progress import track
from demo.drawing import draw_cat
from demo.drawing_look import look_of

log = logging.getLogger(__name__)
CARD = "drawn.json"  # lies in the photo folder, and says what was drawn
SIZE = 160  # pixels
STREAMS = {"train": 1, "test": 2, "demo-models": 3}
TEST_SHARE = 0.2  # test photos of each breed, as a share of the most frequent breed's training photos
MIN_PHOTOS = 3
# training photos of each breed, as a share of the most frequent breed's
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
Job = tuple[str, str, int]  # breed, part and number of a photo


def draw_photos(out: Path, photos: int = 120, seed: int = 0) -> list[Path]:
    """Draw the photos into the folder `out` and return their paths; a complete set of the same kind is left alone.

    `photos` is the number of training photos of the most frequent breed. Same arguments, same bytes. Raises InputError when
    `out` holds anything that was not drawn here.
    """
    jobs = [(name, part, i) for part in ("train", "test") for name in SHARES for i in range(count(name, part, photos))]
    paths = [out / _relative(job) for job in jobs]
    card = {"photos": photos, "seed": seed, "size": SIZE, "drawing": _fingerprint()}
    drawn_before = (out / CARD).is_file()
    if drawn_before and read_json(out / CARD) == card and all(path.is_file() for path in paths):
        return paths
    if drawn_before and (foreign := _foreign(out)):
        raise InputError(
            f"{foreign} was not drawn here, and {out} would be drawn anew: move it away, or name another folder"
        )
    with whole_folder(out, force=drawn_before) as folder:
        for job in jobs:
            (folder / _relative(job)).parent.mkdir(parents=True, exist_ok=True)
        with multiprocessing.get_context("spawn").Pool() as pool:
            tasks = [(folder, job, seed) for job in jobs]
            for _ in track(pool.imap(_draw_file, tasks, chunksize=8), "drawing cats", total=len(jobs)):
                pass
        write_json(folder / CARD, card)
    log.info("%d drawn cats of %d breeds in %s", len(jobs), len(SHARES), out)
    return paths


def count(name: str, part: str, photos: int) -> int:
    """How many photos of a breed a part has when the most frequent breed has `photos` training photos."""
    return max(MIN_PHOTOS, round(photos * (SHARES[name] if part == "train" else TEST_SHARE)))


def draw_breed(name: str, stream: str, index: int, seed: int, size: int = SIZE) -> Image:
    """Photo number `index` of a breed in one of the STREAMS. Raises InputError for a breed that is not in the table."""
    breed = find(name)
    if breed is None:
        raise InputError(f"{name!r} is none of the breeds that can be drawn")
    rng = np.random.default_rng((seed, STREAMS[stream], zlib.crc32(name.encode()), index))
    return draw_cat(look_of(breed.traits, rng), rng, size)


def _draw_file(task: tuple[Path, Job, int]) -> None:
    folder, job, seed = task
    name, part, index = job
    draw_breed(name, part, index, seed).save(folder / _relative(job), quality=80 + 7 * (index % 3))


def _relative(job: Job) -> str:
    name, part, index = job
    return f"{part}/{name}/{part}_{index:04d}_drawn.jpg"


def _foreign(folder: Path) -> Path | None:
    """A file below the folder that is neither a drawn photo nor the card."""
    for path in sorted(folder.rglob("*")):
        drawn = re.fullmatch(r"(train|test)_\d{4,}_drawn\.jpg|\..*", path.name) or path == folder / CARD
        if path.is_file() and not drawn:
            return path
    return None


def _fingerprint() -> str:
    """Changes when the drawing changes, so that an old set is drawn again."""
    sources = [*sorted(Path(__file__).parent.glob("drawing*.py")), Path(__file__), TABLE]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
