"""CPU time and memory of `catlib evaluate` and `catlib verdict` on large prediction files, which are drawn at random.

    python benchmarks/evaluate_scale.py [--photos 126000] [--folder DIR]

Five models, 67 breeds, three photos a cat, a validation part of a tenth for each. Files that are there already are used again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from scipy.special import log_softmax

from catlib.breeds import BREEDS

MODELS = {"vlm-tuned": 3.0, "vlm-base": 1.0, "clip-zero-shot": 2.0, "clip-probe": 2.6, "tower-probe": 2.8}


def draw(path: Path, photos: int, lead: float, seed: int) -> None:
    """Predictions of a model that gives the true breed `lead` nats on average; the photos depend on their number alone."""
    names, rng = [breed.name for breed in BREEDS], np.random.default_rng(seed)
    true = np.random.default_rng(photos).integers(len(names), size=-(-photos // 3)).repeat(3)[:photos]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        for i, breed in enumerate(true.tolist()):
            scores = rng.normal(size=len(names))
            scores[breed] += lead
            row = {"id": f"{photos}-{i}", "image": f"{names[breed]}/{photos}-{i}.jpg", "breed": names[breed]}
            row |= {"group": f"cat {photos}-{i // 3}", "predicted": names[int(scores.argmax())]}
            row |= {
                "scores": [float(f"{s:.5g}") for s in log_softmax(scores)],
                "answer": None,
                "latency_ms": 90 + i % 7,
            }
            stream.write(json.dumps(row) + "\n")
    meta = {"name": path.stem, "breeds": names, "latency_single_ms": [90 + i / 7 for i in range(32)]}
    path.with_suffix(".meta.json").write_text(json.dumps(meta))


def main() -> None:
    """Print a line a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=126_000)
    parser.add_argument("--folder", type=Path, default=Path("outputs/scale"), help="where the files lie")
    args = parser.parse_args()
    places = {"--predictions": (args.folder, args.photos), "--val": (args.folder / "val", args.photos // 10)}
    files: list[str] = []
    for option, (folder, photos) in places.items():
        files.append(option)
        for seed, (name, lead) in enumerate(MODELS.items()):
            if not (folder / f"{name}.meta.json").is_file():
                draw(folder / f"{name}.jsonl", photos, lead, seed)
            files.append(str(folder / f"{name}.jsonl"))
    for command in (["evaluate", *files[:6], "--out", str(args.folder / "metrics.json")], ["verdict", *files]):
        start = time.perf_counter()
        done = subprocess.Popen([sys.executable, "-m", "catlib.cli", *command], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(done.pid, 0)
        spent, peak = (
            used.ru_utime + used.ru_stime,
            used.ru_maxrss / 2**20 * (1 if sys.platform == "linux" else 1 / 1024),
        )
        print(
            f"{command[0]}: exit {os.waitstatus_to_exitcode(status)}, {spent:.1f} CPU s, {time.perf_counter() - start:.0f} s,"
            f" {peak:.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
