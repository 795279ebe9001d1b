"""How long one photo takes beside another process that keeps cores busy, with torch imported before catlib and after.

    python benchmarks/busy_neighbour.py CHECKPOINT PHOTOS [--photos 20] [--busy 1]

torch's threads spin while they wait for each other, unless OMP_WAIT_POLICY=PASSIVE is set before torch is loaded: catlib sets it, but
an application may import torch first. Each row is a process of its own; the checkpoint's own question, one photo at a time, on the CPU.
Prints the median and the largest time in milliseconds, in process and through `VLMService`, alone and beside the busy processes.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def spin() -> None:
    while True:
        pass


def measure(order: str, checkpoint: str, folder: Path, count: int) -> None:
    """Print the times of this process."""
    if order == "torch":
        import torch  # noqa: F401

    from catlib.classifiers.vlm import VLMClassifier
    from catlib.data.images import open_image
    from catlib.data.walk import photo_files
    from catlib.serving.service import VLMService
    from catlib.vlm.checkpoint import open_vlm

    paths = sorted(photo_files(folder)[0])[:count]
    photos = [open_image(path) for path in paths]
    for decoding in ("free", "score"):
        vlm = open_vlm(checkpoint, device="cpu")
        classifier = VLMClassifier(vlm, decoding=decoding)
        told("in process", decoding, [timed(partial(classifier.classify, [photo])) for photo in photos])

    for decoding in ("free", "score"):
        with VLMService(decoding=decoding) as service:
            service.load(checkpoint, device="cpu")
            told("service", decoding, [timed(partial(service.predict_finetuned, path)) for path in paths])


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def told(where: str, decoding: str, times: list[float]) -> None:
    warm = times[1:]
    print(
        f"  {where:<10} {decoding:<6} {1000 * statistics.median(warm):8.1f} ms, at most {1000 * max(warm):8.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=int, default=20)
    parser.add_argument("--busy", type=int, default=1, help="busy processes")
    parser.add_argument("--order", choices=("torch", "catlib"), help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args()
    if args.order:
        measure(args.order, args.checkpoint, args.folder, args.photos)
        return
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    for busy in (0, args.busy):
        neighbours = [multiprocessing.Process(target=spin, daemon=True) for _ in range(busy)]
        for neighbour in neighbours:
            neighbour.start()
        for order in ("catlib", "torch"):
            print(f"{busy} busy processes, {order} imported first", flush=True)
            subprocess.run(
                [sys.executable, *sys.argv, "--order", order], env=environment, stderr=subprocess.DEVNULL, check=True
            )
        for neighbour in neighbours:
            neighbour.terminate()


if __name__ == "__main__":
    main()
