"""Does a model know what it does not know? How well its scores tell photos of none of the breeds from test photos."""

from typing import Any

import numpy as np
from scipy.stats import rankdata

from catlib.data.records import Prediction, PredictionSet
from catlib.evaluation.bootstrap import Z, wilson
from catlib.evaluation.outcomes import joined


def told_apart(known: PredictionSet, unknown: PredictionSet) -> dict[str, Any]:
    """AUROC of test photos against those of `unknown` breed: the share of pairs in which the test photo is the surer one.

    By the probability of the likeliest breed (Hendrycks and Gimpel 2017, arXiv 1610.02136) and by the energy of the scores (Liu et al.
    2020, arXiv 2010.03759); None for a model without them.
    """
    measures = {"max_probability": _likeliest, "energy": lambda p: p.energy}
    found: dict[str, Any] = {"n": len(unknown.predictions)}
    for name, measure in measures.items():
        values = [[measure(p) for p in s.predictions] for s in (known, unknown)]
        groups = [joined([p.group or p.id for p in s.predictions]) for s in (known, unknown)]
        there = all(value is not None for side in values for value in side)
        found[name] = auroc(np.array(values[0]), np.array(values[1]), *groups) if there else None
    return found


def auroc(high: np.ndarray, low: np.ndarray, high_group: np.ndarray, low_group: np.ndarray) -> dict[str, Any]:
    """The share of pairs with high > low, ties half (DeLong et al. 1988, its variance over groups: Obuchowski 1997), the interval on
    the logit scale. Where the variance is 0 it is Wilson's for as many pairs as the smaller side has groups.
    """
    m, n = len(high), len(low)
    both = rankdata(np.concatenate([high, low]))
    places = ((both[:m] - rankdata(high)) / n, 1 - (both[m:] - rankdata(low)) / m)
    area, variance, groups = float(places[0].mean()), 0.0, []
    for place, group in zip(places, (high_group, low_group), strict=True):
        total = np.bincount(group, weights=place - area)
        groups.append(len(total))
        variance += float((total**2).sum()) * len(total) / max(len(total) - 1, 1) / len(place) ** 2
    if variance <= 0 or not 0 < area < 1:
        return {"value": area, "ci95": list(wilson(area * min(groups), min(groups)))}
    middle, half = np.log(area / (1 - area)), Z * np.sqrt(variance) / (area * (1 - area))
    return {"value": area, "ci95": [float(1 / (1 + np.exp(-end))) for end in (middle - half, middle + half)]}


def _likeliest(p: Prediction) -> float | None:
    return None if p.scores is None else max(p.scores)
