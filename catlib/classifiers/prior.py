"""How strongly to subtract what the model says without a photo: chosen on validation photos, never on the test."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from catlib.classifiers.base import log_softmax
from catlib.classifiers.photos import read_batches
from catlib.classifiers.vlm import VLMClassifier
from catlib.data.records import Sample
from catlib.errors import InputError
from catlib.progress import track

STRENGTHS = tuple(round(0.1 * step, 1) for step in range(16))
log = logging.getLogger(__name__)


def fit_prior(
    classifier: VLMClassifier, samples: Sequence[Sample], image_root: Path, batch_size: int = 16
) -> VLMClassifier:
    """Set the classifier's prior strength by accuracy on the validation `samples`, and what was tried into its sidecar.

    The photos are scored once; all strengths are judged on those scores. Returns the same classifier.
    """
    if classifier.decoding != "score":
        raise InputError("prior correction needs decoding 'score': generated text has no scores to correct")
    photos = track(
        read_batches(samples, image_root, batch_size), "prior correction", total=-(-len(samples) // batch_size)
    )
    scores = np.concatenate([classifier.raw_scores(images) for _, images, _ in photos])
    truth = [classifier.breeds.index(sample.breed) for sample in samples]
    strength, table = choose_strength(scores, classifier.uncorrected_prior(), truth)
    classifier.prior_strength = strength
    classifier.prior_fit = {"fitted_on": len(samples), "accuracy_by_strength": table}
    log.info(
        "%s: prior correction of strength %.1f, chosen on %d validation photos", classifier.name, strength, len(samples)
    )
    return classifier


def choose_strength(scores: np.ndarray, prior: np.ndarray, truth: Sequence[int]) -> tuple[float, dict[str, float]]:
    """The strength with the best accuracy of `scores - strength * prior`, and the accuracy of each.

    `scores`: (n, breeds), `prior`: (breeds,), `truth`: n breed indices. Ties go to the lower log-loss, then to the
    weaker correction, so that 0 wins where correction changes nothing.
    """
    rows, truth = np.arange(len(scores)), np.asarray(truth)
    judged = []
    for strength in STRENGTHS:
        log_probs = log_softmax(scores - strength * prior)
        accuracy = float((log_probs.argmax(1) == truth).mean())
        judged.append((-accuracy, float(-log_probs[rows, truth].mean()), strength))
    return min(judged)[2], {str(strength): round(-negative, 4) for negative, _, strength in judged}
