"""A collection in the shape of Petfinder's, made of N small photos: audit, split, check and notebook 01, and how time grows with N.

    python benchmarks/audit_scale.py --photos 5000 20000 --notebook

The photos are made first and are not timed: 67 breeds whose sizes fall as in the real collection (nearly half are domestic short
hairs, the rarest have a few dozen at 126,000), one to six photos of 256 x 192 pixels a cat, `data/cats.csv`, one photo in 50 saved
again, one in 100 a copy, one in 200 broken. Each N runs in a process of its own, so that peak memory is its own. The exponent is
the slope of log(time) over log(N): 1 is linear. CPU seconds say what the work costs when other programs share the cores.
"""

import argparse
import io
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from catlib.breeds import BREEDS

FALL = 1.55  # the r-th breed has r ** -FALL of the first one's photos
COMMON = "Domestic Short Hair"
SMALLEST = 8  # photos of a breed


def make_collection(folder: Path, n: int) -> Path:
    """`folder`/images/<Breed>/<id>_<k>.jpg, n of them, and data/cats.csv; a folder that is complete already is kept."""
    if (folder / "data" / "cats.csv").is_file():
        return folder
    names = sorted((breed.name for breed in BREEDS), key=lambda name: (name != COMMON, name))
    weights = np.arange(1, len(names) + 1) ** -FALL
    sizes = np.maximum(SMALLEST, np.round(n * weights / weights.sum()).astype(int))
    rows, id, number = ["id,age,gender,breed"], 46_000_000, 0
    rng = np.random.default_rng(0)
    for name, size in zip(names, sizes.tolist(), strict=True):
        breed = folder / "images" / name.replace("/", " ")
        breed.mkdir(parents=True, exist_ok=True)
        made = 0
        while made < size:
            id += int(rng.integers(1, 9))
            rows.append(f"{id},{('Baby', 'Young', 'Adult', 'Senior')[id % 4]},{('Male', 'Female')[id % 2]},{name}")
            for k in range(1, min(int(rng.integers(1, 7)), size - made) + 1):
                (breed / f"{id}_{k}.jpg").write_bytes(photo(number))
                number, made = number + 1, made + 1
    (folder / "data").mkdir()
    (folder / "data" / "cats.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


class Memory(threading.Thread):
    """The most memory that this process and its children hold together, looked up a hundred times a second, MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0.0, threading.Event()

    def __enter__(self) -> "Memory":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    @property
    def peak_mb(self) -> int:
        return round(self.peak)

    def run(self) -> None:
        this = psutil.Process()
        while not self.over.wait(0.01):
            try:
                held = sum(process.memory_info().rss for process in (this, *this.children(recursive=True)))
            except psutil.NoSuchProcess:
                continue
            self.peak = max(self.peak, held / 2**20)


def photo(number: int) -> bytes:
    """The bytes of a photo of smooth random fields; some like the one before it, some broken."""
    near, copy = number % 50 == 1, number % 100 == 2
    rng = np.random.default_rng(number - near - 2 * copy)
    field = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
        (256, 192), Image.Resampling.BICUBIC
    )
    stream = io.BytesIO()
    field.save(stream, "JPEG", quality=60 if near else 85)
    return stream.getvalue()[: 3000 if number % 200 == 7 else None]


def measure(photos: Path, work: Path, notebook: bool) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory (MB, threads and child processes included) of `prepare`; seconds of the rest."""
    from catlib.data.check import check
    from catlib.data.prepare import prepare
    from catlib.settings import DataSettings

    chosen = DataSettings(photos=str(photos), data_dir=str(work), run_dir=str(work / "run"))
    with Memory() as memory:
        dataset, row = timed(lambda: prepare(chosen), "")
    seen = dataset.card["files_seen"]
    row = {"photos": seen, **row, "photos_per_cpu_s": round(seen / row["cpu_seconds"], 1), "peak_mb": memory.peak_mb}
    checked, more = timed(lambda: check(work / "vlm"), "check_")
    assert not checked.problems, checked.problems[:3]
    row |= more
    if notebook:
        with Memory() as memory:
            page, more = timed(lambda: render(photos, work), "notebook_")
        row |= {"notebook_seconds": more["notebook_seconds"], "page_mb": round(page.stat().st_size / 1e6, 1)}
        row |= {"notebook_peak_mb": memory.peak_mb}
    return row


def timed(work: Callable[[], Any], name: str) -> tuple[Any, dict[str, float]]:
    """What the work returns, and its seconds."""
    start, before = time.perf_counter(), time.process_time()
    result = work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - before
    return result, {f"{name}seconds": round(seconds, 2), f"{name}cpu_seconds": round(cpu, 2)}


def render(photos: Path, work: Path) -> Path:
    """Notebook 01 executed and rendered as a page."""
    source, done = Path(__file__).parents[1] / "notebooks" / "01_data_inspection.ipynb", work / "01.ipynb"
    given = {"profile": "photos", "photos": photos, "data_dir": work / "nb", "run_dir": work / "nb", "hint": ""}
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(source),
        str(done),
        "--no-progress-bar",
        "--cwd",
        str(source.parents[1]),
    ]
    for name, value in given.items():
        command += ["-p", name, str(value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run(
        [sys.executable, "-m", "jupyter", "nbconvert", "--to", "html", "--no-input", str(done)],
        check=True,
        capture_output=True,
    )
    return done.with_suffix(".html")


def _slope(rows: list[dict[str, float]], key: str) -> float:
    return round(float(np.polyfit([math.log(r["photos"]) for r in rows], [math.log(r[key]) for r in rows], 1)[0]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs="+", default=[5000, 20000], metavar="N")
    parser.add_argument("--folder", type=Path, help="where photos are made and kept (default: a temporary folder)")
    parser.add_argument("--notebook", action="store_true", help="render notebook 01, too")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # measure this folder in this process
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if args.one:
            print(json.dumps(measure(args.one, Path(temporary), args.notebook)))
            return
        rows = []
        for n in sorted(args.photos):
            photos = make_collection((args.folder or Path(temporary)) / str(n), n)
            command = [sys.executable, __file__, "--one", str(photos)] + ["--notebook"] * args.notebook
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
            print(json.dumps(rows[-1]), flush=True)
    if len(rows) > 1:
        slopes = {f"exponent_of_{key}": _slope(rows, key) for key in ("seconds", "cpu_seconds")}
        print(json.dumps(slopes))


if __name__ == "__main__":
    main()
