"""What averaging two models gives, with temperatures and weight from validation photos alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import log_softmax

from catlib.data.records import PredictionSet
from catlib.evaluation import bootstrap as boot
from catlib.evaluation.bootstrap import PSEUDO_PAIRED, resample_cells
from catlib.evaluation.calibration import fit_temperature
from catlib.evaluation.outcomes import Outcomes, outcomes

WEIGHTS = np.linspace(0.0, 1.0, 21)


def mix(weight: float, temperatures: Sequence[float], *scores: np.ndarray) -> np.ndarray:
    """The log-probabilities (n, breeds) of two models, `weight` being the first one's, each at its temperature, averaged."""
    own, other = (log_softmax(s / t, axis=1) for s, t in zip(scores, temperatures, strict=True))
    return log_softmax(weight * own + (1 - weight) * other, axis=1)


def fit_mix(first: Outcomes, second: Outcomes) -> tuple[float, list[float]]:
    """(weight of the first, both temperatures) with the least negative log-likelihood on photos of the same order, both with scores."""
    temperatures, rows = [fit_temperature(s) for s in (first, second)], np.arange(len(first))
    assert first.log_probs is not None and second.log_probs is not None
    loss = [-mix(w, temperatures, first.log_probs, second.log_probs)[rows, first.true].mean() for w in WEIGHTS]
    return round(float(WEIGHTS[int(np.argmin(loss))]), 2), temperatures


def combine(
    a: Outcomes, b: Outcomes, val_a: PredictionSet | None, val_b: PredictionSet | None, *, bootstrap: int, seed: int
) -> dict[str, Any] | None:
    """What averaging two models gives on test photos that both have seen (`a`, `b` in the same order); None without scores.

    Temperatures and the weight of `a` come from validation predictions alone: the weight with the least negative
    log-likelihood. The gain in points is over the model that is the better one on these test photos, the harder
    opponent; its interval is paired. None as well when the validation files are missing or share no photo.
    """
    if val_a is None or val_b is None or a.log_probs is None or b.log_probs is None:
        return None
    shared = {p.id for p in val_a.predictions} & {p.id for p in val_b.predictions}
    first, second = (_only(s, shared, o.breeds) for s, o in ((val_a, a), (val_b, b)))
    if first is None or second is None or first.log_probs is None or second.log_probs is None:
        return None
    weight, temperatures = fit_mix(first, second)
    said = mix(weight, temperatures, a.log_probs, b.log_probs).argmax(axis=1)
    better = a if a.correct.mean() >= b.correct.mean() else b
    cells = boot.make_cells(a.true, np.column_stack([said, better.predicted]), group=a.group)
    counts = resample_cells(cells, bootstrap, seed, PSEUDO_PAIRED)
    right = (cells.said == cells.true[:, None]).astype(float)
    gain = 100 * float((said == a.true).mean() - better.correct.mean())
    return {
        "weight_a": weight,
        "temperature_a": temperatures[0],
        "temperature_b": temperatures[1],
        "accuracy": float((said == a.true).mean()),
        "over": better.name,
        "gain_points": gain,
        "ci95": boot.interval(
            gain, 100 * (right[:, 0] - right[:, 1]) @ counts / len(a), -100.0, 100.0, cells.widening()
        ),
    }


def _only(predictions: PredictionSet, ids: set[str], breeds: tuple[str, ...]) -> Outcomes | None:
    """The photos `ids` sorted by id, or None when there are none or they are of breeds that the test knows nothing of."""
    rows = tuple(sorted((p for p in predictions.predictions if p.id in ids), key=lambda p: p.id))
    if not rows or not {p.breed for p in rows} <= set(breeds):
        return None
    return outcomes(PredictionSet(predictions.name, rows, predictions.meta), breeds)
