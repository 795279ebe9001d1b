"""Photos a second of preprocessing alone (decode, resize, tiles, tokens): threads as the collator has them, and processes.

    CATLIB_PHOTOS=DIR CATLIB_SMALL_LLAVA=DIR OMP_NUM_THREADS=1 python benchmarks/preprocessing.py [--photos 32] [--repeat 3]

Processors: the small LLaVA's, those of tiny Qwen2-VL and Idefics3 models of tests/, and Idefics3's with tiles of 512 pixels, its real
size. All ways of a row are timed in turn, --repeat times; printed are the medians.
"""

import argparse
import copy
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from catlib.data.images import open_image
from catlib.data.walk import photo_files
from catlib.vlm.processors import load_processor
from catlib.vlm.prompting import model_inputs, prompt_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


class Photos(Dataset):
    """A photo's tensors by its number."""

    def __init__(self, processor: Any, paths: list[Path]) -> None:
        self.processor, self.paths = processor, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        text = prompt_text(self.processor, "What breed is this cat?")
        return model_inputs(self.processor, [open_image(self.paths[i])], [text])


def threads(processor: Any, paths: list[Path], n: int) -> float:
    """Photos a second of `n` threads with a processor each."""
    here, own = threading.local(), [Photos(copy.deepcopy(processor), paths) for _ in range(n)]

    def give() -> None:
        here.photos = own.pop()

    with ThreadPoolExecutor(n, initializer=give) as pool:
        list(pool.map(lambda i: here.photos[i], range(n)))
        start = time.perf_counter()
        list(pool.map(lambda i: here.photos[i], range(len(paths))))
        return len(paths) / (time.perf_counter() - start)


def processes(processor: Any, paths: list[Path], n: int) -> float:
    """Photos a second of a DataLoader with `n` worker processes, from when they are up."""
    photos = Photos(processor, [*paths, *paths[: 2 * n]])
    coming = iter(DataLoader(photos, batch_size=1, num_workers=n, collate_fn=list, prefetch_factor=1))
    for _ in range(2 * n):
        next(coming)
    start = time.perf_counter()
    return sum(1 for _ in coming) / (time.perf_counter() - start)


def main() -> int:
    from family_matrix import Case, offline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    if missing := [name for name in ("CATLIB_SMALL_LLAVA", "CATLIB_PHOTOS") if not os.environ.get(name)]:
        print(f"skipped: set {' and '.join(missing)} (a LLaVA folder, a folder of photos)")
        return 0
    torch.set_num_threads(1)
    found, _ = photo_files(Path(os.environ["CATLIB_PHOTOS"]))
    paths = found[:: max(1, len(found) // args.photos)][: args.photos]
    ways: dict[str, Callable[[Any], float]] = {
        f"{n} threads": lambda processor, n=n: threads(processor, paths, n) for n in (1, 2, 4)
    }
    ways["2 processes"] = lambda processor: processes(processor, paths, 2)
    print(f"| processor | {' | '.join(ways)} |\n{'| --- ' * (1 + len(ways))}|", flush=True)
    with tempfile.TemporaryDirectory() as folder, offline(Path(folder)):
        idefics, qwen = (load_processor(Case(name, Path(folder)).base) for name in ("Idefics3", "Qwen2-VL"))
        real = copy.deepcopy(idefics)
        real.image_processor.size = {"longest_edge": 2048}
        real.image_processor.max_image_size = {"longest_edge": 512}
        small = load_processor(os.environ["CATLIB_SMALL_LLAVA"])
        named = {"LLaVA": small, "Qwen2-VL, tiny": qwen, "Idefics3, tiny": idefics, "Idefics3, tiles of 512": real}
        for name, processor in named.items():
            speeds = [[run(processor) for run in ways.values()] for _ in range(args.repeat)]
            print(f"| {name} | {' | '.join(f'{median(way):.1f}' for way in zip(*speeds, strict=True))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
