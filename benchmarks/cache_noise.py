"""Do cached features change the loss by more than bf16 does anyway? The untuned losses of the first batches, in bf16 against float32.

    CATLIB_SMALL_LLAVA=DIR CATLIB_PHOTOS=DIR python benchmarks/cache_noise.py [--batches 8]

The same batches of four photos are worked through in ways that differ in rounding only: without the cache four, two or one photo at
a time, and with a cache that the tower filled 16, 4 or one photo at a time. Prints, for each way, how far the losses lie from
float32's: the root mean square and the largest, in per cent. One thread; the figures do not depend on the machine's speed.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from training_speed import settings, training_samples, write_data

from catlib.data.images import inside
from catlib.data.records import Sample
from catlib.training.kernels import fuse
from catlib.training.lora import add_lora
from catlib.training.loss import AnswerLoss
from catlib.vlm.batches import Collator
from catlib.vlm.checkpoint import open_vlm
from catlib.vlm.families import Family
from catlib.vlm.features import FrozenFeatures
from catlib.vlm.models import VLM

BATCH = 4


def model(work: Path, dtype: str) -> VLM:
    """The untuned base as training sees it, without dropout."""
    torch.manual_seed(0)
    vlm = open_vlm(os.environ["CATLIB_SMALL_LLAVA"], device="cpu", precision=dtype)
    add_lora(vlm, settings(work, 1))
    fuse(vlm.model)
    vlm.model.eval()
    return vlm


@torch.no_grad()
def losses(vlm: VLM, root: Path, samples: Sequence[Sample], cache: FrozenFeatures | None, rows: int) -> torch.Tensor:
    """Mean loss of each batch, worked through `rows` photos at a time."""
    collate, loss = Collator(vlm, root, cache), AnswerLoss(vlm)
    found = []
    for start in range(0, len(samples), BATCH):
        parts = [samples[i : i + rows] for i in range(start, start + BATCH, rows)]
        with torch.autocast("cpu", torch.bfloat16, enabled=vlm.base.dtype is torch.bfloat16):
            sums = [loss(collate(part)) for part in parts]
        found.append(sum(float(s) for s, _ in sums) / sum(n for _, n in sums))
    return torch.tensor(found)


def filled(vlm: VLM, root: Path, samples: Sequence[Sample], photos: int) -> FrozenFeatures:
    """A new cache that the tower fills so many photos at a time."""
    Family.photos_at_once = lambda *_: photos
    cache = FrozenFeatures(vlm, Path(tempfile.mkdtemp(dir=root)), 1.0)
    cache.fill([(inside(root, s.image), s.metadata["sha256"]) for s in samples], 1)
    return cache


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8)
    args = parser.parse_args()
    missing = [name for name in ("CATLIB_SMALL_LLAVA", "CATLIB_PHOTOS") if not os.environ.get(name)]
    if missing:
        print(f"skipped: set {' and '.join(missing)} (a LLaVA folder, a folder of photos)")
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_data(work, 6)
        samples, root = training_samples(work)
        samples = samples[: args.batches * BATCH]
        exact = losses(model(work, "float32"), root, samples, None, BATCH)
        print("float32:", " ".join(f"{x:.3f}" for x in exact))
        vlm = model(work, "bfloat16")
        ways: list[tuple[str, FrozenFeatures | None, int]] = [(f"no cache, {n} at a time", None, n) for n in (4, 2, 1)]
        ways += [
            (f"cache filled {n} at a time, {m} at a time", filled(vlm, root, samples, n), m)
            for n in (16, 4, 1)
            for m in (4, 2)
        ]
        print(f"{'bf16':<42} {'rms %':>6} {'most %':>7}")
        for name, cache, rows in ways:
            apart = 100 * (losses(vlm, root, samples, cache, rows) / exact - 1)
            print(
                f"{name:<42} {float(apart.square().mean().sqrt()):>6.2f} {float(apart.abs().max()):>7.2f}", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
