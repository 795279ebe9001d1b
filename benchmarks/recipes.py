"""Recipes for the VLM's training, compared on validation photos over several training seeds; test photos are not looked at.

    python benchmarks/recipes.py DATA/vlm --base DIR [--out outputs/recipes] [--seeds 0,1] [--jobs 1] [--only plain,augment4]
        [--set image_pool=2 …]

DATA/vlm: a folder that `catlib data` has made. Each recipe is `catlib train --profile photos` with the options in RECIPES, and
with those of `--set` in all of them. What was trained and predicted already is taken up. Rows of further recipes cost no training:

  + prior    scores less the logarithm of each breed's share of the training photos (Menon et al. 2021, arXiv 2007.07314)
  + probe    the average with the linear probe on the model's own tower, its weight found on the same validation photos

Columns are means over the seeds, of the validation photos: accuracy and macro-F1 in per cent; log-loss in nats, as it is and at the
temperature that fits best, by which recipes are chosen: it counts every photo's probability and needs no threshold.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from catlib.data.records import Sample, image_root_of, read_predictions, read_samples
from catlib.evaluation.calibration import fit_temperature
from catlib.evaluation.combine import fit_mix, mix
from catlib.evaluation.metrics import per_breed
from catlib.evaluation.outcomes import Outcomes, outcomes
from catlib.evaluation.tables import text_table

PLAIN = {"augment": False, "epochs": 3, "lora_r": 16}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "calm": PLAIN | {"projector_lr": 5e-5, "weight_decay": 0.05, "lora_dropout": 0.1},
    "augment4": PLAIN | {"augment": True, "epochs": 4},
    "augment4 r32": {"augment": True, "epochs": 4, "lora_r": 32},  # the profile's own, chosen by this table
}
PROBE = "tower-probe"


def train(folder: Path, data: Path, base: str, options: dict[str, Any], seed: int) -> Path:
    """Train a recipe, unless that is done, and predict the validation photos with it; the predictions' file."""
    out = folder / "val.jsonl"
    if not out.with_suffix(".meta.json").is_file():
        given = {**options, "train_seed": seed, "base_model": base, "output_dir": str(folder / "checkpoint")}
        given |= {f"{part}_data": str(data / f"{part}.jsonl") for part in ("train", "val")}
        command = [sys.executable, "-m", "catlib.cli", "train", "--profile", "photos"]
        for key, value in given.items():
            command += [f"--{'' if value else 'no-'}{key}"] if isinstance(value, bool) else [f"--{key}", str(value)]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
            here = [sys.executable, __file__, str(data), "--base", base, "--predict", str(folder)]
            subprocess.run(here, check=True, stdout=log, stderr=log)
    return out


def predict_val(folder: Path, data: Path) -> None:
    """The validation photos by the checkpoint in `folder`, in this process."""
    from catlib.classifiers.predict import predict
    from catlib.classifiers.vlm import VLMClassifier
    from catlib.vlm.checkpoint import find_checkpoint, open_vlm

    found = find_checkpoint(folder / "checkpoint")
    classifier = VLMClassifier(open_vlm(found, device="cpu", precision="bfloat16"), found.breeds)
    samples = read_samples(data / "val.jsonl")
    predict(classifier, samples, image_root_of(data / "val.jsonl"), folder / "val.jsonl")


def fit_probe(data: Path, base: str, out: Path, train: Sequence[Sample]) -> Outcomes:
    """The linear probe on the base's tower, on the validation photos."""
    from catlib.classifiers.encoder import TowerEncoder
    from catlib.classifiers.predict import predict
    from catlib.classifiers.probe import Probe
    from catlib.vlm.checkpoint import open_vlm

    if not out.with_suffix(".meta.json").is_file():
        tower, breeds = TowerEncoder(open_vlm(base, device="cpu")), sorted({s.breed for s in train})
        probe = Probe.fit(tower, breeds, train, image_root_of(data / "train.jsonl"), PROBE, seed=0, kind="linear")
        predict(probe, read_samples(data / "val.jsonl"), image_root_of(data / "val.jsonl"), out)
    return outcomes(read_predictions(out))


def figures(o: Outcomes) -> np.ndarray:
    """(accuracy, macro-F1, log-loss, log-loss at the best temperature)."""
    assert o.log_probs is not None
    rows = np.arange(len(o))
    fitted = log_softmax(o.log_probs / fit_temperature(o), axis=1)
    f1 = [row["f1"] for row in per_breed(o).values() if row["support"]]
    return np.array(
        [100 * o.correct.mean(), 100 * np.mean(f1), *(-s[rows, o.true].mean() for s in (o.log_probs, fitted))]
    )


def rescored(o: Outcomes, scores: np.ndarray) -> Outcomes:
    return replace(o, log_probs=log_softmax(scores, axis=1), predicted=scores.argmax(1))


def with_probe(o: Outcomes, probe: Outcomes) -> Outcomes:
    """The average of both at their temperatures, at the weight with the least log-loss."""
    order = [probe.ids.index(name) for name in o.ids]
    assert o.log_probs is not None and probe.log_probs is not None and probe.breeds == o.breeds
    other = replace(o, log_probs=probe.log_probs[order])
    weight, temperatures = fit_mix(o, other)
    return rescored(o, mix(weight, temperatures, o.log_probs, other.log_probs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--base", required=True)
    parser.add_argument("--out", type=Path, default=Path("outputs/recipes"))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--only", default=",".join(RECIPES))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of every recipe")
    parser.add_argument("--predict", type=Path, help=argparse.SUPPRESS)  # the validation photos by what lies there
    args = parser.parse_args()
    if args.predict:
        predict_val(args.predict, args.data)
        return
    shared, seeds = dict(text.split("=", 1) for text in args.set), [int(seed) for seed in args.seeds.split(",")]
    names = args.only.split(",")

    def work(task: tuple[int, str]) -> Path:
        seed, name = task
        return train(
            args.out / f"{name.replace(' ', '-')}-{seed}", args.data, args.base, {**shared, **RECIPES[name]}, seed
        )

    with ThreadPoolExecutor(args.jobs) as pool:
        done = dict(zip(product(seeds, names), pool.map(work, product(seeds, names)), strict=True))
    samples = read_samples(args.data / "train.jsonl")
    probe = fit_probe(args.data, args.base, args.out / f"{PROBE}.jsonl", samples)
    table: dict[str, list[np.ndarray]] = {PROBE: [figures(probe)]}
    for (_, name), path in done.items():
        o = outcomes(read_predictions(path))
        assert o.log_probs is not None
        share = np.array([sum(s.breed == breed for s in samples) for breed in o.breeds]) / len(samples)
        for added, variant in (
            ("", o),
            (" + prior", rescored(o, o.log_probs - np.log(share))),
            (" + probe", with_probe(o, probe)),
        ):
            table.setdefault(name + added, []).append(figures(variant))
    columns = ("accuracy", "macro-F1", "log-loss", "at the best temperature")
    rows = [
        {
            "recipe": name,
            "seeds": str(len(found)),
            **{
                c: f"{x:.{1 if i < 2 else 3}f}" for i, (c, x) in enumerate(zip(columns, np.mean(found, 0), strict=True))
            },
        }
        for name, found in table.items()
    ]
    print(text_table(rows))


if __name__ == "__main__":
    main()
