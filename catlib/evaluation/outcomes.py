"""Prediction files as arrays: the one form that every metric, interval, comparison and plot is computed from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from catlib.data.duplicates import components
from catlib.data.records import Prediction, PredictionSet
from catlib.errors import InputError

NO_ANSWER = -1  # index of "named no breed": always wrong, in no breed's precision, visible as the invalid rate
LOG_FLOOR = -50.0  # scores below are raised to it, so that one impossible breed does not make the NLL infinite
NORMALISED_WITHIN = 0.02  # how far the sum of a row's probabilities may be from 1


@dataclass(frozen=True)
class Outcomes:
    """What one model said about n photos of known breed.

    `breeds`: k names, the sidecar's in its order, then true breeds that the model could not have named.
    `true`: (n,) index of the true breed. `predicted`: (n,) index, or NO_ANSWER.
    `log_probs`: (n, k) log-probabilities floored at LOG_FLOOR, or None for a model without scores.
    `latency_ms`: (n,) milliseconds for each photo, NaN where unknown.
    `group`: (n,) number of the photo's group; photos of one group are not independent (one cat, near-duplicates). Equal
    photos (one file under several ids) are one group, and so are chains of groups that they join.
    """

    name: str
    breeds: tuple[str, ...]
    ids: tuple[str, ...]
    images: tuple[str, ...]
    true: np.ndarray
    predicted: np.ndarray
    log_probs: np.ndarray | None
    latency_ms: np.ndarray
    group: np.ndarray
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def correct(self) -> np.ndarray:
        """(n,) whether the true breed was predicted."""
        return self.true == self.predicted

    @property
    def support(self) -> np.ndarray:
        """(k,) photos of each breed."""
        return np.bincount(self.true, minlength=len(self.breeds))

    @property
    def confidence(self) -> np.ndarray:
        """(n,) probability that the model gives to its own answer; 0 where it named no breed."""
        if self.log_probs is None:
            raise InputError(f"{self.name}: its predictions carry no scores, so there is no confidence to look at")
        said = np.exp(self.log_probs[np.arange(len(self)), np.maximum(self.predicted, 0)])
        return np.where(self.predicted == NO_ANSWER, 0.0, said)

    def index(self, names: Sequence[str]) -> np.ndarray:
        """Indices of priority breeds by name. Raises InputError for one without a photo in the data: its F1 would be an empty average."""
        support = dict(zip(self.breeds, self.support, strict=True))
        if absent := [name for name in names if not support.get(name)]:
            raise InputError(
                f"{self.name}: priority breed without a single photo in the data: {', '.join(absent)}. "
                f"Breeds with photos: {', '.join(b for b, count in support.items() if count)}"
            )
        return np.array([self.breeds.index(name) for name in names], dtype=int)


def outcomes(predictions: PredictionSet, breeds: Sequence[str] | None = None) -> Outcomes:
    """Arrays of a prediction set. Raises InputError when it is empty, has photos of unknown breed, or scores that are none.

    `breeds` puts the arrays in another order of breeds than the sidecar's. In a file that has scores, a photo without
    any (an answer that could not be scored) counts as uniform: the model knew nothing.
    """
    rows, listed = predictions.predictions, predictions.breeds
    if not rows:
        raise InputError(f"{predictions.name}: no predictions in the file")
    if unlabelled := [p.id for p in rows if p.breed is None]:
        raise InputError(
            f"{predictions.name}: {len(unlabelled)} photos have no true breed (the first: {unlabelled[0]!r}), so they "
            "cannot be evaluated"
        )
    truth = [p.breed for p in rows if p.breed is not None]
    extra = sorted(set(truth) - set(listed))
    order = tuple(breeds) if breeds is not None else (*listed, *extra)
    if missing := {*listed, *extra} - set(order):
        raise InputError(f"{predictions.name}: breeds outside the given list: {', '.join(sorted(missing))}")
    number = {breed: i for i, breed in enumerate(order)}
    return Outcomes(
        name=predictions.name,
        breeds=order,
        ids=tuple(p.id for p in rows),
        images=tuple(p.image for p in rows),
        true=np.array([number[breed] for breed in truth]),
        predicted=np.array([NO_ANSWER if p.predicted is None else number[p.predicted] for p in rows]),
        log_probs=_log_probs(predictions.name, rows, listed, number),
        latency_ms=np.array([np.nan if p.latency_ms is None else p.latency_ms for p in rows], dtype=float),
        group=joined(
            # A photo that names no group is one of its own.
            [f"group {p.group}" if p.group else f"photo {p.id}" for p in rows],
            [f"file {p.image}" if p.image else f"photo {p.id}" for p in rows],
        ),
        meta=dict(predictions.meta),
    )


def joined(*labels: Any) -> np.ndarray:
    """(n,) number of each photo's group: photos that share any label (sequences of n) are one. Numbers in order of appearance."""
    n = nodes = len(labels[0])
    edges = []
    for row in labels:
        code, names = pd.factorize(np.asarray(row, dtype=object))
        edges.append(np.column_stack([np.arange(n), nodes + code]))
        nodes += len(names)
    _, first, found = np.unique(components(nodes, np.concatenate(edges))[:n], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[found.reshape(-1)]


def _log_probs(
    name: str, rows: Sequence[Prediction], listed: Sequence[str], number: dict[str, int]
) -> np.ndarray | None:
    if all(p.scores is None for p in rows):
        return None
    uniform = tuple([-np.log(len(listed))] * len(listed))
    scores = np.array([uniform if p.scores is None else p.scores for p in rows])
    with np.errstate(over="ignore"):
        total = np.exp(scores).sum(axis=1)
    if (off := np.flatnonzero(~(np.abs(total - 1) < NORMALISED_WITHIN))).size:
        raise InputError(
            f"{name}: the scores of photo {rows[off[0]].id!r} are no log-probabilities: their exp sums to "
            f"{total[off[0]]:.4g} and not to 1"
        )
    log_probs = np.full((len(rows), len(number)), LOG_FLOOR, scores.dtype)
    log_probs[:, [number[breed] for breed in listed]] = np.maximum(scores, LOG_FLOOR)
    return log_probs
