"""The modes projector, lora and qlora side by side on real photos: accuracy, F1 of the priority breeds, time, memory.

    CATLIB_SMALL_LLAVA=DIR CATLIB_PHOTOS=DIR python benchmarks/training_modes.py --priority "Birman,Bombay,Egyptian Mau"

Every mode trains on the same photos with the settings of notebooks/profiles/photos.yaml, in a process of its own and with a
feature cache of its own, and then names the breeds of the same test photos by label likelihood. `base` is the untuned model;
`lora/2` is lora with image_pool 2 (--modes lora,lora/2).
Time is that of `catlib.training.trainer.train`, loading and validation included; memory is the peak resident set of that process.
Prints a Markdown table; --keep FOLDER keeps checkpoints and predictions.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import torch

from catlib.settings import DataSettings, TrainSettings, read_profile

PROFILE = Path(__file__).resolve().parents[1] / "notebooks" / "profiles" / "photos.yaml"
MODES = ("base", "projector", "lora", "qlora")


def run_one(mode: str, work: Path, epochs: int, test_photos: int, priority: str) -> dict[str, Any]:
    """Train in one mode and evaluate; `base` only evaluates."""
    from catlib.classifiers.predict import predict
    from catlib.classifiers.vlm import VLMClassifier
    from catlib.data.conversations import evenly
    from catlib.data.records import image_root_of, read_samples
    from catlib.evaluation.metrics import evaluate
    from catlib.provenance import peak_resident_gb
    from catlib.settings import split_list
    from catlib.training.trainer import train
    from catlib.vlm.checkpoint import find_checkpoint, open_vlm

    data, model, row = work / "vlm", os.environ["CATLIB_SMALL_LLAVA"], {"mode": mode, "seconds": 0.0, "peak_gb": 0.0}
    kind, _, pool = mode.partition("/")
    folder = work / mode.replace("/", "-")
    if mode != "base":
        profile = read_profile(PROFILE)
        known = {field.name for field in fields(TrainSettings)}
        values = {key: value for key, value in profile.items() if key in known} | {
            "base_model": model,
            "train_data": str(data / "train.jsonl"),
            "val_data": str(data / "val.jsonl"),
            "output_dir": str(folder),
            "mode": kind,
            "image_pool": int(pool or 1),
            "epochs": epochs,
            "priority_breeds": priority,
            "resume": False,
            "watch_photos": 0,
        }
        start = time.perf_counter()
        result = train(TrainSettings.build(values))
        row |= {"seconds": time.perf_counter() - start, "peak_gb": peak_resident_gb()}
        row["val_loss"] = result.best["val_loss"]
        row["step"] = median(line["photos_per_second"] for line in result.history if line["kind"] == "step")
    breeds = sorted({sample.breed for sample in read_samples(data / "train.jsonl")})
    samples = read_samples(data / "test.jsonl")
    samples = evenly(samples, test_photos, 0) if test_photos else samples
    dtype = read_profile(PROFILE)["dtype"]
    found = find_checkpoint(model if mode == "base" else folder, question=samples[0].question, breeds=breeds)
    vlm = open_vlm(found, precision="4-bit" if kind == "qlora" else dtype)
    out = work / "predictions" / f"{folder.name}.jsonl"
    predictions = predict(VLMClassifier(vlm), samples, image_root_of(data / "test.jsonl"), out)
    row["scored"] = predictions.meta["images_per_second"]
    metrics = evaluate(predictions, split_list(priority), bootstrap=1000)
    return (
        row
        | {key: metrics[key] for key in ("accuracy", "macro_f1", "priority_macro_f1")}
        | {"test_photos": len(samples)}
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos-per-breed", type=int, default=0, help="training photos of each breed; 0: all")
    parser.add_argument("--val-photos", type=int, default=0, help="validation photos in all; 0: all")
    parser.add_argument("--test-photos", type=int, default=0, help="test photos, drawn evenly over the breeds; 0: all")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--priority", default="", help="breeds reported apart, comma separated")
    parser.add_argument("--keep", type=Path, help="folder for checkpoints and predictions")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # this mode in this process
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one, args.keep, args.epochs, args.test_photos, args.priority)))
        return 0
    missing = [name for name in ("CATLIB_SMALL_LLAVA", "CATLIB_PHOTOS") if not os.environ.get(name)]
    if missing:
        print(f"skipped: set {' and '.join(missing)} (a LLaVA folder, a folder of photos)")
        return 0
    with nullcontext(str(args.keep)) if args.keep else tempfile.TemporaryDirectory() as folder:
        work = Path(folder).absolute()
        trained_on = write_data(work, args.photos_per_breed, args.val_photos)
        print(f"{trained_on} training photos, {args.epochs} epochs, {torch.get_num_threads()} threads", flush=True)
        print(
            "| mode | accuracy | macro-F1, priority breeds | macro-F1, all | scored | validation loss | training | step | peak memory |"
        )
        print("| --- " * 9 + "|", flush=True)
        for mode in args.modes.split(","):
            options = [f"--keep={work}", f"--epochs={args.epochs}", f"--test-photos={args.test_photos}"]
            options.append(f"--priority={args.priority}")
            environment = {**os.environ, "CATLIB_ROOT": str(work / "cache" / mode)}
            done = subprocess.run(
                [sys.executable, __file__, "--one", mode, *options],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            row = json.loads(done.stdout.splitlines()[-1])
            cells = [interval(row[key]) for key in ("accuracy", "priority_macro_f1", "macro_f1")]
            cells.append(f"{row['scored']:.2f} photos/s")
            cost = ["–"] * 4
            if "val_loss" in row:
                cost = [f"{row['val_loss']:.3f}", f"{row['seconds']:.0f} s", f"{row['step']:.2f} photos/s"]
                cost.append(f"{row['peak_gb']:.2f} GB")
            print("| " + " | ".join([mode, *cells, *cost]) + " |", flush=True)
    return 0


def interval(figure: dict[str, Any] | None) -> str:
    """A figure in per cent with its 95 % interval."""
    if figure is None:
        return "–"
    low, high = figure["ci95"]
    return f"{figure['value']:.0%} ({low:.0%}–{high:.0%})"


def write_data(work: Path, photos_per_breed: int, val_photos: int) -> int:
    """The split in work/vlm, with at most so many photos; returns how many are trained on."""
    from catlib.data.conversations import evenly
    from catlib.data.prepare import prepare
    from catlib.data.records import read_samples, write_samples

    chosen = DataSettings(
        photos=os.environ["CATLIB_PHOTOS"],
        data_dir=str(work),
        run_dir=str(work / "run"),
        photos_per_breed=photos_per_breed,
    )
    dataset = prepare(chosen)
    if val_photos:
        path = work / "vlm" / "val.jsonl"
        write_samples(path, evenly(read_samples(path), val_photos, 0))
    return len(dataset.train)


if __name__ == "__main__":
    sys.exit(main())
