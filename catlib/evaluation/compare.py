"""Two models on the same photos: the paired gain with its interval, and where it comes from."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.stats import binom, binomtest, false_discovery_control
from threadpoolctl import threadpool_limits

from catlib.data.records import PredictionSet
from catlib.errors import InputError
from catlib.evaluation import bootstrap as boot
from catlib.evaluation.bootstrap import PSEUDO_PAIRED, f1_by_breed, resample_cells
from catlib.evaluation.combine import combine
from catlib.evaluation.metrics import per_breed
from catlib.evaluation.outcomes import NO_ANSWER, Outcomes, joined, outcomes

FALSE_DISCOVERY_RATE = 0.05
NO_BREED = "(no breed)"


def pair(a: PredictionSet, b: PredictionSet) -> tuple[Outcomes, Outcomes]:
    """Both models' outcomes on the photos that both have predicted, in a's order, with one list of breeds.

    Groups that either file names count for both. Raises InputError when no photo is common, or when the two files disagree about a photo's true breed.
    """
    in_b = {p.id: p for p in b.predictions}
    common = [p for p in a.predictions if p.id in in_b]
    if not common:
        raise InputError(f"{a.name} and {b.name} have no photo in common: were they run on the same test file?")
    if wrong := [p for p in common if p.breed != in_b[p.id].breed]:
        first = wrong[0]
        raise InputError(
            f"{a.name} and {b.name} disagree about the true breed of {len(wrong)} photos; the first: {first.id!r} "
            f"is {first.breed!r} in {a.name} and {in_b[first.id].breed!r} in {b.name}"
        )
    extra = {p.breed for p in common if p.breed is not None} | set(b.breeds)
    order = (*a.breeds, *sorted(extra - set(a.breeds)))
    same = PredictionSet(b.name, tuple(in_b[p.id] for p in common), b.meta)
    left, right = outcomes(PredictionSet(a.name, tuple(common), a.meta), order), outcomes(same, order)
    group = joined(left.group, right.group)
    return replace(left, group=group), replace(right, group=group)


def compare(
    a: PredictionSet,
    b: PredictionSet,
    priority: Sequence[str] = (),
    *,
    val_a: PredictionSet | None = None,
    val_b: PredictionSet | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The gain of model `a` over model `b` on the photos that both have seen: an entry of `comparisons` in metrics.json.

    Every gain is a minus b. With validation predictions of both, `combination` holds what averaging the two gives.
    Raises InputError when the photos do not match or a priority breed has none.
    """
    first, second = pair(a, b)
    net = first.correct.astype(int) - second.correct
    gains = paired_gains(first, second, priority, bootstrap=bootstrap, seed=seed)
    return {
        "a": a.name,
        "b": b.name,
        "n": len(first),
        "groups": len(np.unique(first.group)),
        "dropped": {"a": len(a.predictions) - len(first), "b": len(b.predictions) - len(first)},
        "accuracy": {"a": float(first.correct.mean()), "b": float(second.correct.mean())},
        "accuracy_gain_points": gains["accuracy"]["value"],
        "ci95": gains["accuracy"]["ci95"],
        "macro_f1_gain_points": gains["macro_f1"],
        "priority_f1_gain_points": gains["priority_macro_f1"],
        "accuracy_gain_elsewhere_points": gains["accuracy_elsewhere"],
        "p": sign_flip(net, first.group),
        "only_a_right": int((net > 0).sum()),
        "only_b_right": int((net < 0).sum()),
        "agreement": float((first.predicted == second.predicted).mean()),
        "oracle_accuracy": float((first.correct | second.correct).mean()),
        "breeds": breed_gains(first, second, priority),
        "confusions": confusion_changes(first, second),
        "disagreements": disagreements(first, second),
        "combination": combine(first, second, val_a, val_b, bootstrap=bootstrap, seed=seed),
    }


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test: the two-sided p of so uneven a split of the photos that only one model has right."""
    return 1.0 if only_a + only_b == 0 else float(binomtest(only_a, only_a + only_b).pvalue)


def sign_flip(net: np.ndarray, group: np.ndarray) -> float:
    """The exact two-sided p of the gain, by exchanging the two models' answers in whole groups.

    `net` (n,): 1 where only a is right, -1 where only b is. If the models are equally good, each group's sum is as likely
    with the other sign, whatever the correlation within the group; p is the share of all sign patterns whose total is at least
    as far from 0. It is McNemar's exact test where no group has two discordant photos, and unlike the corrections of
    McNemar's chi-squared for clusters (Obuchowski 1998, Durkalski et al. 2003) it holds for few groups.
    """
    weight = np.bincount(group, weights=net).round().astype(int)
    sizes, counts = np.unique(np.abs(weight[weight != 0]), return_counts=True)
    if sizes.max(initial=1) == 1:
        return mcnemar(int((weight > 0).sum()), int((weight < 0).sum()))
    chance = np.ones(1)
    for size, count in zip(sizes, counts, strict=True):  # the sum of the groups that go a's way, size by size
        way = np.zeros(size * count + 1)
        way[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chance = np.convolve(chance, way)
    total = len(chance) - 1
    return min(1.0, float(chance[np.abs(2 * np.arange(total + 1) - total) >= abs(weight.sum())].sum()))


@threadpool_limits.wrap(limits=1, user_api="blas")  # as metrics.evaluate
def paired_gains(a: Outcomes, b: Outcomes, priority: Sequence[str], *, bootstrap: int, seed: int) -> dict[str, Any]:
    """Accuracy (all, and outside the priority breeds), macro-F1 and priority macro-F1 of a minus b, in points, each {"value", "ci95"};
    the same photos are drawn for both."""
    chosen, present, k = a.index(priority), np.flatnonzero(a.support), len(a.breeds)
    cells = boot.make_cells(a.true, np.column_stack([a.predicted, b.predicted]), group=a.group)
    every, rare = np.minimum(a.support, 1), np.isin(np.arange(k), chosen)
    counts = resample_cells(cells, bootstrap, seed, PSEUDO_PAIRED)
    difference = (cells.said[:, 0] == cells.true).astype(float) - (cells.said[:, 1] == cells.true)
    by_breed = f1_by_breed(cells, counts, k, 0) - f1_by_breed(cells, counts, k, 1)
    f1_a, f1_b = (np.array([row["f1"] or 0.0 for row in per_breed(o, priority).values()]) for o in (a, b))
    gain = f1_a - f1_b
    gains = {
        "accuracy": _points(a.correct.mean() - b.correct.mean(), difference @ counts / len(a), cells.widening()),
        "macro_f1": _points(gain[present].mean(), by_breed[present].mean(0), cells.widening(every)),
        "priority_macro_f1": None,
        "accuracy_elsewhere": None,
    }
    if len(chosen):
        common, elsewhere = ~np.isin(a.true, chosen), ~np.isin(cells.true, chosen)
        if common.any():
            gain_there = a.correct[common].mean() - b.correct[common].mean()
            draws = (difference * elsewhere) @ counts / common.sum()
            gains["accuracy_elsewhere"] = _points(gain_there, draws, cells.widening(a.support * ~rare))
        resample_cells(cells, bootstrap, seed, PSEUDO_PAIRED, chosen, counts)
        by_breed = f1_by_breed(cells, counts, k, 0) - f1_by_breed(cells, counts, k, 1)
        gains["priority_macro_f1"] = _points(
            gain[chosen].mean(), by_breed[chosen].mean(0), cells.widening(every * rare)
        )
    return gains


def breed_gains(a: Outcomes, b: Outcomes, priority: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Each breed's recall and F1 in both models, and whether it gains or loses, best gain first.

    The paired test (`sign_flip`) on the breed's photos, the p-values corrected for the many breeds (Benjamini and Hochberg
    1995, at most 5 % of the breeds called changed are false calls). `gain_points` is the gain in recall, its `ci95`
    paired.
    """
    tables = {"a": per_breed(a, priority), "b": per_breed(b, priority)}
    found = []
    for i in np.flatnonzero(a.support):
        rows, breed = a.true == i, a.breeds[i]
        net, group = a.correct[rows].astype(int) - b.correct[rows], a.group[rows]
        row: dict[str, Any] = {"breed": breed, "support": len(net), "priority": breed in priority}
        row |= {f"{key}_{side}": tables[side][breed][key] for key in ("recall", "f1") for side in tables}
        row |= {"gain_points": 100 * int(net.sum()) / len(net), "ci95": _paired_interval(net, group)}
        found.append({**row, "p": sign_flip(net, group)})
    adjusted = false_discovery_control([row["p"] for row in found])
    for row, p in zip(found, adjusted, strict=True):
        row["p_adjusted"] = float(p)
        row["change"] = ("gains" if row["gain_points"] > 0 else "loses") if p < FALSE_DISCOVERY_RATE else "undecided"
    return sorted(found, key=lambda row: (-row["gain_points"], row["breed"]))


def confusion_changes(a: Outcomes, b: Outcomes, most: int = 10) -> dict[str, list[dict[str, Any]]]:
    """Confusions that a makes less often than b (`vanish`) and more often (`appear`), the largest changes first."""
    counts = [Counter(zip(o.true[~o.correct].tolist(), o.predicted[~o.correct].tolist(), strict=True)) for o in (a, b)]
    names = dict(enumerate(a.breeds)) | {NO_ANSWER: NO_BREED}
    changes: list[dict[str, Any]] = [
        {"breed": names[t], "said": names[s], "a": counts[0][t, s], "b": counts[1][t, s]}
        for t, s in sorted(counts[0].keys() | counts[1].keys())
    ]
    changes.sort(key=lambda c: c["a"] - c["b"])
    return {
        "vanish": [c for c in changes[:most] if c["a"] < c["b"]],
        "appear": [c for c in changes[::-1][:most] if c["a"] > c["b"]],
    }


def disagreements(a: Outcomes, b: Outcomes, most: int = 24) -> list[dict[str, Any]]:
    """Photos that the two name differently, those with the most different scores (total variation distance) first."""
    rows = np.flatnonzero(a.predicted != b.predicted)
    distance = np.zeros(len(a))
    if a.log_probs is not None and b.log_probs is not None:
        distance = np.abs(np.exp(a.log_probs) - np.exp(b.log_probs)).sum(axis=1) / 2
    names = dict(enumerate(a.breeds)) | {NO_ANSWER: None}
    return [
        {
            "id": a.ids[i],
            "image": a.images[i],
            "breed": names[a.true[i]],
            "a": names[a.predicted[i]],
            "b": names[b.predicted[i]],
            "distance": float(distance[i]),
        }
        for i in sorted(rows, key=lambda i: (-distance[i], a.ids[i]))[:most]
    ]


def _paired_interval(net: np.ndarray, group: np.ndarray) -> list[float]:
    """A breed's gain in points: Wald's interval, half a photo added to each joint outcome (Agresti and Min 2005)."""
    worth = boot.effective_share(net.astype(float), group)
    plus, minus = (int((net == sign).sum()) * worth + 0.5 for sign in (1, -1))
    total = len(net) * worth + PSEUDO_PAIRED
    middle = (plus - minus) / total
    half = 1.959964 * np.sqrt((plus + minus) - (plus - minus) ** 2 / total) / total
    return [float(100 * max(middle - half, -1.0)), float(100 * min(middle + half, 1.0))]


def _points(value: float, draws: np.ndarray, widen: float | None) -> dict[str, Any]:
    return {"value": float(100 * value), "ci95": boot.interval(float(100 * value), 100 * draws, -100.0, 100.0, widen)}
