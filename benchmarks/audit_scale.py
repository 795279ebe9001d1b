"""Audit and split of N small JPEGs: photos per second, how time grows with N, and peak memory.

    python benchmarks/audit_scale.py --photos 5000 20000 80000

The photos are made first and are not timed: pictures of 256 x 192 pixels in 40 breeds, one in 50 a re-encoded near-duplicate of
the one before. Each N runs in a process of its own, so that peak memory is its own. The exponent is the slope of log(time)
over log(N): 1 is linear. CPU seconds (all threads) say what the work costs when other programs share the cores.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

BREEDS = 40
NEAR = 50  # one photo in so many is a near-duplicate


def make_photos(folder: Path, n: int) -> Path:
    """`folder`/<breed>/<number>.jpg, n of them, from smooth random fields; what is there already is kept."""
    for breed in range(BREEDS):
        (folder / f"breed {breed:02d}").mkdir(parents=True, exist_ok=True)
    for i in range(n):
        path = folder / f"breed {i // NEAR % BREEDS:02d}" / f"{i:06d}.jpg"
        if not path.exists():
            copy = i % NEAR == 1
            rng = np.random.default_rng(i - copy)
            field = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
                (256, 192), Image.Resampling.BICUBIC
            )
            field.save(path, quality=60 if copy else 85)
    return folder


class Memory(threading.Thread):
    """The most memory that this process and its children hold together, looked up a hundred times a second, MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0.0, threading.Event()

    def run(self) -> None:
        this = psutil.Process()
        while not self.over.wait(0.01):
            try:
                held = sum(process.memory_info().rss for process in (this, *this.children(recursive=True)))
            except psutil.NoSuchProcess:
                continue
            self.peak = max(self.peak, held / 2**20)


def measure(photos: Path, work: Path) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory (MB, threads and child processes included) of one `prepare`."""
    from catlib.data.prepare import prepare
    from catlib.settings import DataSettings

    memory = Memory()
    memory.start()
    start = time.perf_counter()
    before = time.process_time()
    dataset = prepare(DataSettings(photos=str(photos), data_dir=str(work), run_dir=str(work / "run")))
    seconds, cpu = time.perf_counter() - start, time.process_time() - before
    memory.over.set()
    memory.join()
    seen = dataset.card["files_seen"]
    return {
        "photos": seen,
        "seconds": round(seconds, 2),
        "photos_per_s": round(seen / seconds, 1),
        "cpu_seconds": round(cpu, 2),
        "photos_per_cpu_s": round(seen / cpu, 1),
        "peak_mb": round(memory.peak),
    }


def _slope(rows: list[dict[str, float]], key: str) -> float:
    return round(float(np.polyfit([math.log(r["photos"]) for r in rows], [math.log(r[key]) for r in rows], 1)[0]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs="+", default=[5000, 20000, 80000], metavar="N")
    parser.add_argument("--folder", type=Path, help="where photos are made and kept (default: a temporary folder)")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # measure this folder in this process
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if args.one:
            print(json.dumps(measure(args.one, Path(temporary))))
            return
        rows = []
        for n in sorted(args.photos):
            photos = make_photos((args.folder or Path(temporary)) / str(n), n)
            command = [sys.executable, __file__, "--one", str(photos)]
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
            print(json.dumps(rows[-1]), flush=True)
    if len(rows) > 1:
        slopes = {f"exponent_of_{key}": _slope(rows, key) for key in ("seconds", "cpu_seconds")}
        print(json.dumps(slopes))


if __name__ == "__main__":
    main()
