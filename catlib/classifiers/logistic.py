"""Multinomial logistic regression, its strength and input chosen by cross-validation that is fair to rare breeds."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

C_GRID = (0.0001, 0.001, 0.01, 0.1, 1.0)  # inverse penalty on standardised features
MAX_FOLDS = 5
# Products of a pass over the photos below which one thread is as fast: others spin while they wait for each other, and with another
# process on the cores 850 photos took 3 s in place of 0.06 s.
WORTH_THREADS = 2e8
UNSEEN_LOG_PROB = np.log(1e-9)  # a breed without a training photo: next to impossible, but a finite score
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Linear:
    """A fitted classifier: log p(breed | x) = log softmax(weights ((x - mean) / scale) + bias)."""

    pooling: str
    mean: np.ndarray  # (width,)
    scale: np.ndarray  # (width,)
    weights: np.ndarray  # (breeds, width)
    bias: np.ndarray  # (breeds,); for a breed that training did not have, see `fit_linear`

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Unnormalised log-probabilities (n, breeds) of features (n, width)."""
        return ((features - self.mean) / self.scale) @ self.weights.T + self.bias


def choose_and_fit(
    features: Mapping[str, np.ndarray], labels: np.ndarray, breeds: int, seed: int = 0
) -> tuple[Linear, dict[str, Any]]:
    """Pick pooling and C by the log-loss on held-out folds, then fit on everything.

    `features`: (n, width) for each pooling; `labels`: (n,) indices below `breeds`. Returns the classifier and a report:
    pooling, C, folds, and log-loss and accuracy of every candidate.
    """
    folds = deal_folds(labels, seed)
    tried: list[dict[str, Any]] = []
    for pooling, matrix in features.items():
        for c in C_GRID if folds.max() >= 0 else (C_GRID[len(C_GRID) // 2],):
            loss, accuracy = _cross_validate(matrix, labels, folds, c, breeds)
            tried.append({"pooling": pooling, "C": c, "log_loss": round(loss, 4), "accuracy": round(accuracy, 4)})
    best = min(tried, key=lambda row: row["log_loss"])
    report = {"pooling": best["pooling"], "C": best["C"], "folds": int(folds.max()) + 1, "tried": tried}
    return fit_linear(features[best["pooling"]], labels, breeds, best["C"], best["pooling"]), report


def deal_folds(labels: np.ndarray, seed: int) -> np.ndarray:
    """The fold (n,) in which each photo is held out; -1 for the only photo of a breed, which is always trained on.

    Each breed's photos are shuffled and dealt out in turn, so that a breed with two photos is held out twice and never
    missing from training. (StratifiedKFold would hold out single photos as well, and blame the classifier for them.)
    """
    rng = np.random.default_rng(seed)
    folds = np.full(len(labels), -1)
    dealt = 0
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) > 1:
            folds[members] = (dealt + np.arange(len(members))) % MAX_FOLDS
            dealt += len(members)
    return folds


def fit_linear(features: np.ndarray, labels: np.ndarray, breeds: int, c: float, pooling: str = "") -> Linear:
    """Standardise and fit. A breed without a training photo gets zero weights and a bias far below all others."""
    mean, scale = features.mean(0), features.std(0)
    scale = np.where(scale > 1e-6, scale, 1.0)  # a feature that never varies stays zero instead of exploding
    present = np.unique(labels)
    weights, bias = np.zeros((breeds, features.shape[1])), np.full(breeds, UNSEEN_LOG_PROB)
    if len(present) == 1:
        bias[present] = 0.0
        return Linear(pooling, mean, scale, weights, bias)
    model = LogisticRegression(C=c, max_iter=500, tol=1e-3)
    threads = 1 if features.size * len(present) < WORTH_THREADS else None
    with warnings.catch_warnings(record=True) as caught, threadpool_limits(threads):
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit((features - mean) / scale, labels)
    if any(issubclass(w.category, ConvergenceWarning) for w in caught):
        log.warning("linear probe with C = %g stopped after %d iterations before it converged", c, model.max_iter)
    if len(present) == 2:  # scikit-learn keeps one row for two classes
        weights[present] = np.vstack([np.zeros_like(model.coef_[0]), model.coef_[0]])
        bias[present] = np.array([0.0, model.intercept_[0]])
    else:
        weights[present], bias[present] = model.coef_, model.intercept_
    return Linear(pooling, mean, scale, weights, bias)


def _cross_validate(
    features: np.ndarray, labels: np.ndarray, folds: np.ndarray, c: float, breeds: int
) -> tuple[float, float]:
    losses: list[float] = []
    hits: list[bool] = []
    for fold in range(folds.max() + 1):
        held = folds == fold
        if not held.any():
            continue
        model = fit_linear(features[~held], labels[~held], breeds, c)
        log_probs = log_softmax(model.logits(features[held]), axis=1)
        losses += (-log_probs[np.arange(held.sum()), labels[held]]).tolist()
        hits += (log_probs.argmax(1) == labels[held]).tolist()
    return (float(np.mean(losses)), float(np.mean(hits))) if losses else (float("nan"), float("nan"))
