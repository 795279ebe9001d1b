"""What learns from the same photos on frozen features: logistic regression, nearest neighbours, Tip-Adapter, a tuned projection.

Each kind is a pair of functions, `fit` and `scores`, and a grid of its one or two settings, which are chosen by the log-loss of folds
held out within the training photos, whole groups at a time. An encoder's features are computed once and shared by all kinds.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

MAX_FOLDS = 5
MOST_CHOSEN_ON = 20_000  # photos that settings are chosen on; the fit is on all
# Products of a pass over the photos below which one thread is as fast: others spin while they wait for each other, and with another
# process on the cores 850 photos took 3 s in place of 0.06 s.
WORTH_THREADS = 2e8
UNSEEN_LOG_PROB = float(np.log(1e-9))  # a breed without a training photo: next to impossible, but a finite score
C_GRID = (0.0001, 0.001, 0.01, 0.1, 1.0)  # inverse penalty on standardised features; goes on while the largest is best
log = logging.getLogger(__name__)
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Photos:
    """Training photos as a fit sees them. `labels` (n,) indices below `breeds`; `weights` (n,) mean 1; `folds` (n,), -1: never held out.

    `texts`: of CLIP, the unit vectors (breeds, width) of its sentences, `scale` between cosine and logit, and the matrix of
    its last `projection` (width, inner).
    """

    features: Mapping[str, np.ndarray]  # (n, width) float32 for each pooling
    labels: np.ndarray
    breeds: int
    weights: np.ndarray
    folds: np.ndarray
    text: Mapping[str, np.ndarray] = field(default_factory=dict)

    def part(self, rows: np.ndarray, pooling: str) -> "Photos":
        """The given rows (indices or a mask) with one of the poolings."""
        kept = {pooling: self.features[pooling][rows]}
        return Photos(kept, self.labels[rows], self.breeds, self.weights[rows], self.folds[rows], self.text)


@dataclass(frozen=True)
class Kind:
    """A way to learn. `grid`: settings by name; `poolings`: which features it takes (empty: all that the encoder has).

    `fit(features, photos, **settings)` gives arrays, `scores(arrays, features)` unnormalised log-probabilities (n, breeds).
    """

    fit: Callable[..., Arrays]
    scores: Callable[[Arrays, np.ndarray], np.ndarray]
    grid: Mapping[str, tuple[float, ...]]
    poolings: tuple[str, ...] = ()


def choose_and_fit(kind: str, photos: Photos, seed: int = 0) -> tuple[str, Arrays, dict[str, Any]]:
    """(pooling, arrays, report): pooling and settings with the least log-loss on held-out folds, then a fit on all photos."""
    way = KINDS[kind]
    tried: list[dict[str, Any]] = []
    rng = np.random.default_rng(seed)
    some = np.sort(rng.permutation(len(photos.labels))[:MOST_CHOSEN_ON])
    names = [p for p in photos.features if p in way.poolings] if way.poolings else list(photos.features)
    for pooling in names:
        own = photos.part(some, pooling)
        for settings in _grid(way, tried, pooling):
            loss, accuracy = _cross_validate(way, own, pooling, settings)
            tried.append({"pooling": pooling, **settings, "log_loss": round(loss, 4), "accuracy": round(accuracy, 4)})
    best = min(tried, key=lambda row: row["log_loss"])
    settings = {name: best[name] for name in way.grid}
    given = {**settings, "C": settings["C"] * len(some) / len(photos.labels)} if "C" in settings else settings
    arrays = way.fit(photos.features[best["pooling"]], photos, **given)
    report = {"kind": kind, "pooling": best["pooling"], **settings, "folds": int(photos.folds.max()) + 1}
    return best["pooling"], arrays, {**report, "tried": tried}


def _grid(way: Kind, tried: list[dict[str, Any]], pooling: str) -> Iterator[dict[str, float]]:
    """All settings; of a penalty (C) further ones, ten times as large, while the largest is the best so far."""
    for values in product(*way.grid.values()):
        yield dict(zip(way.grid, values, strict=True))
    while "C" in way.grid:
        own = [row for row in tried if row["pooling"] == pooling]
        last = own[-1]
        if last is not min(own, key=lambda row: row["log_loss"]) or not last["log_loss"] > 0 or last["C"] >= 1e5:
            return
        yield {"C": last["C"] * 10}


def _cross_validate(way: Kind, photos: Photos, pooling: str, settings: Mapping[str, float]) -> tuple[float, float]:
    """Weighted log-loss and plain accuracy on the held-out photos; NaN-free 0 where nothing can be held out."""
    losses, hits, weights = [], [], []
    for held in (photos.folds == fold for fold in np.unique(photos.folds[photos.folds >= 0])):
        seen, unseen = photos.part(~held, pooling), photos.part(held, pooling)
        arrays = way.fit(seen.features[pooling], seen, **settings)
        log_probs = log_softmax(way.scores(arrays, unseen.features[pooling]), axis=1)
        losses.append(-log_probs[np.arange(held.sum()), unseen.labels])
        hits.append(log_probs.argmax(1) == unseen.labels)
        weights.append(unseen.weights)
    if not losses:
        return 0.0, 0.0
    loss = np.average(np.concatenate(losses), weights=np.concatenate(weights))
    return float(loss), float(np.concatenate(hits).mean())


def deal_folds(labels: np.ndarray, seed: int, groups: Sequence[Any] | None = None) -> np.ndarray:
    """The fold (n,) in which each photo is held out; -1 for a breed's only group, which is always trained on.

    Each breed's groups are shuffled and dealt out in turn, so that a breed with two of them is held out twice and never missing
    from training. (StratifiedGroupKFold would hold out single ones as well, and blame the classifier for them.)
    """
    rng = np.random.default_rng(seed)
    names = np.arange(len(labels)) if groups is None else np.asarray(groups)
    group = np.unique(names, return_inverse=True)[1].reshape(-1)
    folds, dealt = np.full(len(labels), -1), 0
    for label in np.unique(labels):
        members = rng.permutation(np.unique(group[labels == label]))
        if len(members) > 1:
            turn = dict(zip(members.tolist(), (dealt + np.arange(len(members))) % MAX_FOLDS, strict=True))
            rows = np.flatnonzero(labels == label)
            folds[rows] = [turn[g] for g in group[rows].tolist()]
            dealt += len(members)
    return folds


def fit_linear(features: np.ndarray, photos: Photos, C: float) -> Arrays:
    """Standardise and fit. A breed without a training photo gets zero weights and a bias far below all others."""
    mean, scale = features.mean(0), features.std(0)
    scale = np.where(scale > 1e-6, scale, np.float32(1.0))  # a feature that never varies stays zero
    present = np.unique(photos.labels)
    weights = np.zeros((photos.breeds, features.shape[1]), np.float32)
    bias = np.full(photos.breeds, UNSEEN_LOG_PROB, np.float32)
    if len(present) == 1:
        bias[present] = 0.0
        return {"mean": mean, "scale": scale, "weights": weights, "bias": bias}
    model = LogisticRegression(C=C, max_iter=500, tol=1e-3)
    threads = 1 if features.size * len(present) < WORTH_THREADS else None
    with warnings.catch_warnings(record=True) as caught, threadpool_limits(threads):
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit((features - mean) / scale, photos.labels, photos.weights)
    if any(issubclass(w.category, ConvergenceWarning) for w in caught):
        log.warning("linear probe with C = %g stopped after %d iterations before it converged", C, model.max_iter)
    if len(present) == 2:  # scikit-learn keeps one row for two classes
        weights[present[1]], bias[present] = model.coef_[0], np.array([0.0, model.intercept_[0]])
    else:
        weights[present], bias[present] = model.coef_, model.intercept_
    return {"mean": mean, "scale": scale, "weights": weights, "bias": bias}


def score_linear(a: Arrays, features: np.ndarray) -> np.ndarray:
    return ((features - a["mean"]) / a["scale"]) @ a["weights"].T + a["bias"]


def fit_neighbours(features: np.ndarray, photos: Photos, k: float) -> Arrays:
    return {"vectors": _unit(features), "votes": _votes(photos), "k": np.array(min(int(k), len(features)))}


def score_neighbours(a: Arrays, features: np.ndarray) -> np.ndarray:
    """The votes of the k nearest, each with exp(cosine / 0.07), as in DINO's evaluation (Caron et al. 2021, arXiv 2104.14294)."""
    near, k = _unit(features) @ a["vectors"].T, int(a["k"])
    rows = np.argpartition(-near, k - 1, axis=1)[:, :k]
    strength = np.exp((np.take_along_axis(near, rows, 1) - 1) / 0.07)
    votes = (strength[:, :, None] * a["votes"][rows]).sum(1)
    return np.log(votes / votes.sum(1, keepdims=True) + 1e-3 / votes.shape[1])


def fit_tip(features: np.ndarray, photos: Photos, alpha: float, beta: float) -> Arrays:
    fitted = {"vectors": _unit(features), "votes": _votes(photos), "alpha": np.array(alpha), "beta": np.array(beta)}
    return fitted | dict(photos.text)


def score_tip(a: Arrays, features: np.ndarray) -> np.ndarray:
    """Zero-shot logits and a cache of the training photos (Tip-Adapter without training: Zhang et al. 2022, arXiv 2207.09519)."""
    own = _unit(features)
    near = np.exp(-a["beta"] * (1 - own @ a["vectors"].T)) @ a["votes"]
    return a["scale"] * (own @ a["texts"].T) + a["alpha"] * near


def fit_projection(features: np.ndarray, photos: Photos, penalty: float) -> Arrays:
    """CLIP's last projection tuned, with a penalty on its distance from the pretrained one (ProLIP, Fahes et al. 2024, arXiv
    2410.05270), in full batches by L-BFGS."""
    x, y, sample = torch.tensor(features), torch.tensor(photos.labels), torch.tensor(photos.weights).float()
    names = ("texts", "scale", "projection")
    texts, scale, pretrained = (torch.tensor(np.asarray(photos.text[name], dtype=np.float32)) for name in names)
    matrix = pretrained.clone().requires_grad_()
    solver = torch.optim.LBFGS([matrix], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        logits = scale * torch.nn.functional.normalize(x @ matrix.T, dim=1) @ texts.T
        moved = ((matrix - pretrained) ** 2).sum() / (pretrained**2).sum()
        value = (sample * torch.nn.functional.cross_entropy(logits, y, reduction="none")).mean() + penalty * moved
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return {"matrix": matrix.detach().numpy(), "texts": photos.text["texts"], "scale": photos.text["scale"]}


def score_projection(a: Arrays, features: np.ndarray) -> np.ndarray:
    return a["scale"] * (_unit(features @ a["matrix"].T) @ a["texts"].T)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _votes(photos: Photos) -> np.ndarray:
    """(n, breeds): each photo's weight at its breed."""
    votes = np.zeros((len(photos.labels), photos.breeds), np.float32)
    votes[np.arange(len(photos.labels)), photos.labels] = photos.weights
    return votes


_TIP = {"alpha": (0.3, 1.0, 3.0, 10.0), "beta": (1.0, 5.5, 15.0)}
KINDS = {
    "linear": Kind(fit_linear, score_linear, {"C": C_GRID}),
    "knn": Kind(fit_neighbours, score_neighbours, {"k": (1, 3, 5, 10, 20, 50)}),
    "tip-adapter": Kind(fit_tip, score_tip, _TIP, ("image_embedding",)),
    "projection": Kind(fit_projection, score_projection, {"penalty": (0.1, 1.0, 10.0, 100.0)}, ("before_projection",)),
}
