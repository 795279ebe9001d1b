"""How well `catlib data suspects` finds labels that were flipped on purpose, on real photos with frozen features.

    python benchmarks/label_noise.py --photos FOLDER --encoder MODEL

So many per cent of the labels are flipped, at random or to one of the two breeds that the probe confuses most with the true one.
Precision of the first 30 and 100 of the ranking, recall (flipped photos among all suspects), how often the likely breed is the true
one, and the estimated share of wrong labels, and the most by confident learning, beside the true one: mean of the seeds. Groups are the blocks of near numbers.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace

import numpy as np

from catlib.classifiers.photo_features import photo_features
from catlib.data.prepare import prepare
from catlib.data.records import PARTS
from catlib.data.suspects import find_suspects, out_of_fold
from catlib.settings import DataSettings


def flipped(labels: np.ndarray, share: float, targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The labels with `share` of them replaced; `targets` (breeds, breeds): the weight of each breed in the place of another."""
    noisy = labels.copy()
    for i in rng.choice(len(labels), round(share * len(labels)), replace=False):
        noisy[i] = rng.choice(len(targets), p=targets[labels[i]])
    return noisy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        dataset = prepare(DataSettings(photos=args.photos, data_dir=work, run_dir=work, group_by="auto"))
        samples = [sample for part in PARTS for sample in dataset.part(part)]
        features = photo_features(args.encoder, samples, dataset.image_root)
    labels = np.array([dataset.breeds.index(sample.breed) for sample in samples])
    k = len(dataset.breeds)
    clean = out_of_fold(features, labels, [sample.group for sample in samples])
    confused = np.stack([clean[labels == b].mean(0) for b in range(k)])
    np.fill_diagonal(confused, 0)
    similar = np.where(confused >= np.sort(confused, axis=1)[:, -2:-1], 0.5, 0.0)
    at_random = (1 - np.eye(k)) / (k - 1)
    print(
        f"{len(samples)} photos, {k} breeds, probe {100 * (clean.argmax(1) == labels).mean():.1f} % right out of fold"
    )
    for kind, targets in (("random", at_random), ("similar", similar)):
        for share in args.shares:
            rows = []
            for seed in range(args.seeds if share else 1):
                noisy = flipped(labels, share, targets, np.random.default_rng(seed))
                given = [
                    replace(s, metadata={**s.metadata, "breed": dataset.breeds[b]})
                    for s, b in zip(samples, noisy, strict=True)
                ]
                start = time.perf_counter()
                found = find_suspects(given, features, seed)
                wrong = {s.image: s.breed for s, a, b in zip(samples, labels, noisy, strict=True) if a != b}
                hits = found.table["image"].isin(list(wrong))
                right = [wrong[row.image] == row.likely for row in found.table[hits].itertuples()]
                row = {
                    "suspects": len(found.table),
                    "recall": hits.sum() / max(1, len(wrong)),
                    "estimated": found.noise,
                    "at_most": found.noise_at_most,
                }
                row |= {f"precision_{n}": hits.head(n).mean() for n in (30, 100)}
                rows.append(
                    row
                    | {
                        "true": len(wrong) / len(samples),
                        "likely_right": np.mean(right or [0.0]),
                        "seconds": time.perf_counter() - start,
                    }
                )
            print(
                json.dumps(
                    {"flips": kind, "share": share}
                    | {key: round(float(np.mean([r[key] for r in rows])), 3) for key in rows[0]}
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
