"""The figures of one model on labelled photos, each headline figure with its 95 % interval."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse
from scipy.stats import binom, chi2
from sklearn.metrics import precision_recall_fscore_support
from threadpoolctl import threadpool_limits

from catlib.data.records import PredictionSet
from catlib.evaluation import bootstrap as boot
from catlib.evaluation.bootstrap import PSEUDO_SINGLE, effective_share, interval, resample_cells, sums
from catlib.evaluation.outcomes import NO_ANSWER, Outcomes, outcomes

ECE_BINS = 15
RESAMPLED_PHOTOS = 10_000_000
ALONE = "one photo at a time"


# Thousands of small products, at which several threads only wait for each other.
@threadpool_limits.wrap(limits=1, user_api="blas")
def evaluate(
    predictions: PredictionSet | Outcomes, priority: Sequence[str] = (), *, bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """The metrics of one model: the entry `models.NAME` of metrics.json.

    Headline figures are {"value", "ci95": [low, high]} in 0..1, `ci95` being None where too few groups allow no interval;
    figures that cannot be computed (no scores, no priority breeds given) are None. Averages over breeds take those with at
    least one photo. Raises InputError when a priority breed has no photo, or when the file cannot be evaluated.
    """
    o = predictions if isinstance(predictions, Outcomes) else outcomes(predictions)
    chosen, support, k, scores = o.index(priority), o.support, len(o.breeds), o.log_probs
    own = None if scores is None else scores[np.arange(len(o)), o.true]
    # A tie counts against the model.
    top3 = None if scores is None or own is None else (scores >= own[:, None]).sum(axis=1) <= 3
    cells = boot.make_cells(o.true, o.predicted, o.correct if top3 is None else top3, o.group)
    report, by_photo = per_breed(o, priority), cells.widening()
    point = np.array([report[b]["f1"] or 0.0 for b in o.breeds])
    scored = calibration_figures(o, bootstrap, seed)  # first, as it takes most memory
    counts = resample_cells(cells, bootstrap, seed, PSEUDO_SINGLE)

    def averages(some: np.ndarray) -> list[dict[str, Any]]:
        """Accuracy and macro-F1 of the breeds `some`."""
        f1, only = boot.f1_by_breed(cells, counts, k), np.isin(np.arange(k), some)
        right = sums(counts, np.where(cells.said[:, 0] == cells.true, cells.true, -1), k)[some].sum(0)
        rows, by_breed = np.isin(o.true, some), cells.widening(np.minimum(support, 1) * only)
        accuracy = _figure(o.correct[rows].mean(), right / rows.sum(), cells.widening(support * only))
        return [accuracy, _figure(point[some].mean(), f1[some].mean(0), by_breed)]

    present, silent = np.flatnonzero(support), o.predicted == NO_ANSWER
    accuracy, macro = averages(present)
    draws = support @ boot.f1_by_breed(cells, counts, k) / len(o)
    weighted = _figure(point @ support / len(o), draws, by_photo)
    top3 = None if top3 is None else _figure(top3.mean(), cells.mark @ counts / len(o), by_photo)
    if len(chosen):
        resample_cells(cells, bootstrap, seed, PSEUDO_SINGLE, chosen, counts)
    rare_accuracy, rare_macro = averages(chosen) if len(chosen) else (None, None)
    return {
        "n": len(o),
        "groups": len(np.unique(o.group)),
        "breeds": len(present),
        "accuracy": accuracy,
        "macro_f1": macro,
        "weighted_f1": weighted,
        "priority_macro_f1": rare_macro,
        "priority_accuracy": rare_accuracy,
        "priority_breeds": list(priority),
        "top3_accuracy": top3,
        **scored,
        "nll": None if own is None else float(-own.mean()),
        "invalid_rate": boot.share(silent, o.group),
        "latency_ms": latency(o),
        "device": o.meta.get("device"),
        "photos_per_second": o.meta.get("images_per_second"),
        "reasons": bool(o.meta.get("reasons")) or o.meta.get("answer_style") == "label+traits",
        "per_breed": report,
    }


def per_breed(o: Outcomes, priority: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Precision, recall, F1 and support of each breed; `no_answer` counts its photos for which the model named no breed.

    F1's interval is Wilson's for J = TP / (TP + FP + FN), carried over by F1 = 2 J / (1 + J), for as many photos as grouped ones are
    worth (`effective_share`). A breed without photos has no recall and no F1 (None), but stays with what was wrongly called so.
    """
    labels = np.arange(len(o.breeds))
    precision, recall, f1, support = precision_recall_fscore_support(
        o.true, o.predicted, labels=labels, zero_division=0.0
    )
    predicted = np.bincount(o.predicted[o.predicted >= 0], minlength=len(labels))
    hits = np.bincount(o.true[o.correct], minlength=len(labels))
    silent = np.bincount(o.true[o.predicted == NO_ANSWER], minlength=len(labels))
    table, grouped = {}, len(np.unique(o.group)) < len(o)
    for i, breed in enumerate(o.breeds):
        worth = 1.0
        if grouped:
            named = (o.true == i) | (o.predicted == i)
            worth = effective_share(o.correct[named].astype(float), o.group[named])
        jaccard = np.array(boot.wilson(hits[i] * worth, (support[i] + predicted[i] - hits[i]) * worth))
        table[breed] = {
            "precision": float(precision[i]) if predicted[i] else None,
            "recall": float(recall[i]) if support[i] else None,
            "f1": float(f1[i]) if support[i] else None,
            "f1_ci95": [float(end) for end in 2 * jaccard / (1 + jaccard)] if support[i] else None,
            "support": int(support[i]),
            "predicted": int(predicted[i]),
            "no_answer": int(silent[i]),
            "priority": breed in priority,
        }
    return table


def equal_mass_bins(confidence: np.ndarray, bins: int = ECE_BINS) -> np.ndarray:
    """(n,) bin of each photo: photos sorted by confidence, cut into `bins` groups of equal size (at least 5 photos each)."""
    bins = max(1, min(bins, len(confidence) // 5))
    code = np.empty(len(confidence), dtype=int)
    for number, rows in enumerate(np.array_split(np.argsort(confidence, kind="stable"), bins)):
        code[rows] = number
    return code


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = ECE_BINS) -> float:
    """ECE = sum over bins of share x |accuracy - mean confidence|, 15 equal-mass bins of the confidence in the answer.

    Definition: Naeini et al. 2015; Guo et al. 2017 (there with equal-width bins). Equal-mass bins are less biased with
    few photos: Roelofs et al. 2022, "Mitigating bias in calibration error estimation".
    """
    gap = correct - confidence
    return float(np.abs(np.bincount(equal_mass_bins(confidence, bins), weights=gap)).sum() / len(gap))


def latency(o: Outcomes) -> dict[str, Any]:
    """p50 with its 95 % interval and p95 of the milliseconds for one photo, and `kind`: how they were measured.

    Photos measured one at a time (the sidecar's `latency_single_ms`: a list of times, or p50, p95 and n) come first; a photo's
    share of its batch's time says what a queue costs and not how long one person waits. The interval is the exact one between
    two of the sorted times (there is none for fewer than six); without the times they are taken as log-normal, n as 1 if not given.
    """
    single = o.meta.get("latency_single_ms")
    if isinstance(single, dict) and single.get("p50") is not None:
        p50, p95 = float(single["p50"]), float(single["p50"] if single.get("p95") is None else single["p95"])
        deviation = np.log(max(p95, p50, 1e-9) / max(p50, 1e-9)) / 1.645
        wide = float(np.exp(1.96 * 1.2533 * deviation / np.sqrt(single.get("n") or 1)))
        return {"p50": p50, "p95": p95, "p50_ci95": [p50 / wide, p50 * wide], "kind": ALONE}
    times, kind = o.latency_ms[~np.isnan(o.latency_ms)], "share of a batch"
    if isinstance(single, list | tuple) and single:
        times, kind = np.array(single, dtype=float), ALONE
    if not len(times):
        return {"p50": None, "p95": None, "p50_ci95": None, "kind": "not measured"}
    ordered, cut = np.sort(times), int(binom.ppf(0.025, len(times), 0.5))
    p50, p95 = map(float, np.percentile(times, [50, 95]))
    ends = [float(ordered[cut - 1]), float(ordered[len(ordered) - cut])] if cut else None
    return {"p50": p50, "p95": p95, "p50_ci95": ends, "kind": kind}


def _figure(value: float, draws: np.ndarray, widen: float | None, high: float = 1.0) -> dict[str, Any]:
    return {"value": float(value), "ci95": interval(float(value), draws, 0.0, high, widen)}


def calibration_figures(o: Outcomes, bootstrap: int, seed: int) -> dict[str, Any]:
    """ECE and Brier score (0 to 2, Brier 1950) with their intervals, None without scores.

    With few photos the ECE is too large, as absolute gaps cannot cancel: its interval is the span of two basic intervals (Efron and
    Tibshirani 1993, chapter 13), from the gaps as they are and shrunk by their noise, of one from draws centred on it (right where all
    gaps have one sign), and of the ECE itself. It reaches down to 0 when a chi-squared test of the gaps, whose variance is then that of
    honest confidences, c (1 - c) times the design effect, does not refute perfect calibration at 5 %.
    """
    if o.log_probs is None:
        return {"ece": None, "brier": None}
    claimed = np.exp(o.log_probs)
    distance = (claimed**2).sum(axis=1) + 1 - 2 * claimed[np.arange(len(o)), o.true]
    confidence, code = o.confidence, equal_mass_bins(o.confidence)
    gap = o.correct - confidence
    # Here every photo is a row of its own: with very many photos fewer resamples do, and the time stays in bounds.
    resamples = min(bootstrap, max(200, RESAMPLED_PHOTOS // len(o)))
    unit = boot.units(o.true, o.group)
    breed, ones = np.zeros(unit.max() + 1, dtype=int), np.ones(len(o))
    breed[unit] = o.true
    kinds = sparse.csc_array((ones, (np.arange(len(o)), unit)))
    groups = np.bincount(breed, minlength=len(o.breeds))
    widen = boot.widening(o.support, groups, o.support)
    counts = boot.resample(kinds, breed, np.ones(len(breed)), groups, o.support, resamples, seed)
    brier = _figure(distance.mean(), distance @ counts / len(o), widen, high=2.0)
    counts *= gap[:, None]
    draws = sums(counts, code, code.max() + 1) / len(o)
    seen = np.bincount(code, weights=gap) / len(o)
    if widen not in (None, 1.0):
        draws = seen[:, None] + widen * (draws - seen[:, None])
    shrunk = np.sign(seen) * np.sqrt(np.maximum(seen**2 - draws.var(axis=1), 0))
    ece, ends = expected_calibration_error(confidence, o.correct), []
    for gaps in (seen, shrunk):
        error = np.abs(draws - seen[:, None] + gaps[:, None]).sum(0) - np.abs(gaps).sum()
        ends += [ece, *(ece - np.quantile(error, [0.975, 0.025]))]
    total = np.abs(draws).sum(axis=0)
    ends += list(ece + np.quantile(total - total.mean(), [0.025, 0.975]))
    honest = np.maximum(np.bincount(code, weights=confidence * (1 - confidence)) / len(o) ** 2, 1e-12)
    honest /= effective_share(gap, o.group)
    if (seen**2 / honest).sum() < chi2.ppf(0.95, len(seen)):
        ends.append(0.0)
    span = None if widen is None else [float(np.clip(min(ends), 0, 1)), float(np.clip(max(ends), 0, 1))]
    return {"ece": {"value": ece, "ci95": span}, "brier": brier}
