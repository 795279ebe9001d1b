"""Runs that differ by their training seed alone: does a gain exceed what another seed would give?"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from catlib.classifiers.tracks import TUNED, ordered, track
from catlib.errors import InputError
from catlib.evaluation.tables import points


def gains_over_seeds(runs: Sequence[Mapping[str, Any]], candidate: str = TUNED) -> list[dict[str, Any]]:
    """The candidate's gain in accuracy over each other model, in points: {"b", "n", "mean", "sd", "ci95"}. `runs`: their metrics.json.

    `ci95` is where the gain of another training would lie, on other test photos: the prediction interval of Student's t with the
    variance between seeds, sd^2 (1 + 1/n), and that of the test photos, from the runs' own intervals; None where a run has
    none. Raises InputError for fewer than two runs.
    """
    if len(runs) < 2:
        raise InputError(f"the spread of training seeds needs at least two runs; there are {len(runs)}")
    found = []
    for name in ordered({c["b"] for run in runs for c in run.get("comparisons", ()) if c["a"] == candidate}):
        rows = [c for run in runs for c in run["comparisons"] if (c["a"], c["b"]) == (candidate, name)]
        if len(rows) < 2:
            continue
        gains, n = np.array([c["accuracy_gain_points"] for c in rows]), len(rows)
        mean, sd, ci95 = float(gains.mean()), float(gains.std(ddof=1)), None
        if all(c["ci95"] for c in rows):
            photos = float(np.mean([(c["ci95"][1] - c["ci95"][0]) / 2 for c in rows])) / 1.96
            seeds = sd * float(stats.t.ppf(0.975, n - 1)) * math.sqrt(1 + 1 / n)
            half = math.hypot(seeds, 1.96 * photos)
            ci95 = [mean - half, mean + half]
        found.append({"b": name, "n": n, "mean": mean, "sd": sd, "ci95": ci95})
    return found


def said_of_seeds(runs: Sequence[Mapping[str, Any]], candidate: str = TUNED) -> list[str]:
    """For each other model a sentence: the gain's mean and spread, and whether another seed would give it as well."""
    sentences = []
    for row in gains_over_seeds(runs, candidate):
        gain = points({"value": row["mean"], "ci95": row["ci95"]}, " points")
        low, high = row["ci95"] or (-math.inf, math.inf)
        sure = "another seed would gain as well" if low > 0 else "another seed would lose as well" if high < 0 else ""
        judged = sure or "another seed, or other test photos, may turn it round"
        sentences.append(
            f"Over {track(row['b']).title} {track(candidate).title} gains {gain} in the mean of {row['n']} training seeds, standard "
            f"deviation {row['sd']:.1f}: {judged}."
        )
    return sentences
