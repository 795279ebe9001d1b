"""Wrong labels, ranked: out-of-fold probabilities of a linear probe on frozen features, judged by confident learning.

Confident learning (Northcutt, Jiang and Chuang 2021, arXiv 1911.00068) is cleanlab's: a photo counts as another breed where its
probability for that breed is at least the mean that the breed's own photos have. Nothing here changes a label.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from cleanlab.count import compute_confident_joint, estimate_joint
from cleanlab.dataset import find_overlapping_classes, rank_classes_by_label_quality
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from catlib.data.records import Sample
from catlib.errors import InputError

FOLDS = 5
SURE_PHOTOS = 100  # at least so many of the surest answers are asked for the share of wrong labels
PENALTIES = (0.0003, 0.003, 0.03)  # C of the probe; the one with the least log-loss out of fold is taken
SIMILAR = 0.9  # cosine; what is less alike is not listed
SIMILAR_AT_ONCE = 512  # photos whose cosines are computed together
MOST_SIMILAR = 20_000  # pairs that are kept, the most similar ones


@dataclass(frozen=True)
class Suspects:
    """What the probe doubts."""

    # a row for each suspected photo, the surest first: image, part, breed, likely, p_breed, p_likely, …
    table: pd.DataFrame
    by_breed: pd.DataFrame  # breed → photos, estimated noise
    confusion: pd.DataFrame  # pairs of breeds: label, likely, photos (estimated)
    judged: int  # photos; those of a breed with a single group cannot be
    noise: float  # estimated share of wrong labels: that of the surest fifth of the probe's answers that differ
    noise_at_most: float  # the same by confident learning; the probe's own errors are in it
    accuracy: float  # of the probe against the labels, out of fold

    @property
    def caption(self) -> str:
        return (
            f"{len(self.table):,} of {self.judged:,} labels are doubted. About {100 * self.noise:.0f} % are wrong, at most "
            f"{100 * self.noise_at_most:.0f} % (the probe agrees with {100 * self.accuracy:.0f} % of the labels)."
        )


def find_suspects(samples: Sequence[Sample], features: np.ndarray, seed: int = 0) -> Suspects:
    """Rank the samples whose label is probably wrong. `features`: (n, width), of any frozen encoder. No fold splits a
    group. Raises InputError when fewer than two breeds have two groups."""
    about = [(s.image, str(s.metadata.get("split", "")), s.breed, _sha(s), s.group) for s in samples]
    frame = pd.DataFrame(about, columns=["image", "part", "breed", "sha256", "group"])
    judged = frame.groupby("breed")["group"].transform("nunique") > 1
    frame = frame[judged].reset_index(drop=True)
    if frame["breed"].nunique() < 2:
        raise InputError("labels can only be judged where at least two breeds have two groups of photos each")
    labels, breeds = pd.factorize(frame["breed"], sort=True)
    found = out_of_fold(np.asarray(features)[judged.to_numpy()], labels, frame["group"].tolist(), seed)
    likely, row = found.argmax(1), np.arange(len(frame))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a breed that the probe never names is told by the table
        doubted = find_label_issues(labels, found, filter_by="prune_by_noise_rate", min_examples_per_class=0, n_jobs=1)
        joint = estimate_joint(labels, found, confident_joint=compute_confident_joint(labels, found))
        about_joint = {"joint": joint, "num_examples": len(frame), "class_names": list(breeds)}
        by_breed = rank_classes_by_label_quality(labels, **about_joint).set_index("Class Name")
        confusion = find_overlapping_classes(labels, asymmetric=True, **about_joint)
    frame = frame.assign(
        likely=np.asarray(breeds)[likely],
        p_breed=found[row, labels].round(4),
        p_likely=found[row, likely].round(4),
        score=get_label_quality_scores(labels, found, method="normalized_margin").round(5),
    )
    shown = frame[doubted & (likely != labels)].sort_values(["score", "image"], ignore_index=True)
    # The probe's own errors are in the joint distribution. Where it is surest it hardly errs, so that what differs there are labels.
    sure = np.argsort(-found.max(1), kind="stable")[: max(SURE_PHOTOS, len(frame) // 5)]
    agrees, noise, most = (likely == labels).mean(), (likely != labels)[sure].mean(), 1 - np.trace(joint)
    part = noise / max(most, 1e-12)
    by_breed = pd.DataFrame({"estimated noise": by_breed["Label Noise"] * part}).rename_axis("breed")
    by_breed.insert(0, "photos", frame["breed"].value_counts())
    confusion["Num Overlapping Examples"] *= part
    names = {"Class Name A": "label", "Class Name B": "likely", "Num Overlapping Examples": "photos (estimated)"}
    confusion = confusion.rename(columns=names)[list(names.values())]
    return Suspects(shown, by_breed, confusion, len(frame), float(noise), float(most), float(agrees))


def out_of_fold(features: np.ndarray, labels: np.ndarray, groups: Sequence[str], seed: int = 0) -> np.ndarray:
    """Probabilities (n, breeds) of each photo from a probe that has seen none of its group."""
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    tried = []
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # breeds of fewer groups than folds; iterations that end before the last digit
        for penalty in PENALTIES:
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=300, tol=1e-3))
            found = cross_val_predict(probe, features, labels, groups=groups, cv=folds, method="predict_proba")
            found = np.clip(found.astype(np.float64), 1e-6, None)
            tried.append(found / found.sum(1, keepdims=True))
    return min(tried, key=lambda found: log_loss(labels, found, labels=np.unique(labels)))


def similar_pairs(samples: Sequence[Sample], features: np.ndarray, least: float = SIMILAR) -> pd.DataFrame:
    """Pairs of photos of different groups whose features have at least this cosine (of deviations from the mean photo): crops,
    other frames of one shoot. The most similar first, at most MOST_SIMILAR."""
    vectors = np.asarray(features, dtype=np.float32) - np.mean(features, axis=0, dtype=np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    group = pd.factorize(pd.Series([sample.group for sample in samples]))[0]
    found: list[tuple[float, int, int]] = []
    for start in range(0, len(samples), SIMILAR_AT_ONCE):
        rows = slice(start, start + SIMILAR_AT_ONCE)
        cosines = vectors[rows] @ vectors[start:].T
        a, b = np.nonzero((cosines >= least) & (group[rows, None] != group[start:]))
        near = zip(cosines[a, b].tolist(), (a + start).tolist(), (b + start).tolist(), strict=True)
        found = sorted([*found, *(pair for pair in near if pair[1] < pair[2])], reverse=True)[:MOST_SIMILAR]
    columns = ["cosine", "image", "other", "breed", "other_breed", "sha256", "other_sha256"]
    pairs = [(round(cosine, 4), samples[i], samples[j]) for cosine, i, j in found]
    table = [(c, a.image, b.image, a.breed, b.breed, _sha(a), _sha(b)) for c, a, b in pairs]
    return pd.DataFrame(table, columns=columns)


def _sha(sample: Sample) -> str:
    return str(sample.metadata.get("sha256", ""))
