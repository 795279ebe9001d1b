"""The vision-language model as a classifier, untuned or tuned, with three ways to read a breed off it."""

import copy
import logging
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from scipy.special import log_softmax

from catlib.classifiers.base import Batch, Classifier, about_model
from catlib.classifiers.predict import read_batches
from catlib.data.records import Sample
from catlib.errors import InputError
from catlib.parsing import BreedParser
from catlib.progress import track
from catlib.settings import DECODINGS
from catlib.vlm.decoding import generate_constrained, generate_free
from catlib.vlm.models import VLM
from catlib.vlm.prompting import Prepared, prepared
from catlib.vlm.scoring import LabelScorer

STRENGTHS = tuple(round(0.1 * step, 1) for step in range(16))  # of the prior correction
log = logging.getLogger(__name__)


class VLMClassifier(Classifier):
    """Asks the model its question about each photo and reads the breed by `decoding`. `breeds`: by default the model's.

    score: every breed's label log-likelihood, summed or (`score_norm="mean"`) per token, less `prior_strength` times
    the same score without a photo (contextual calibration, Zhao et al. 2021, arXiv 2102.09690, in log space); then
    normalised over the breeds. constrained: generation that can only spell a breed. free: greedy generation, parsed;
    a text that names no breed is predicted as None. Only `score` yields log-probabilities. The question, and
    what the model learned to answer where that is more than a name, are the checkpoint's (`find_checkpoint`).
    """

    def __init__(
        self,
        vlm: VLM,
        breeds: Sequence[str] | None = None,
        decoding: str = "score",
        score_norm: str = "sum",
        prior_strength: float = 0.0,
        name: str | None = None,
        question: str = "",
    ) -> None:
        if decoding not in DECODINGS or score_norm not in ("sum", "mean"):
            way = f"decoding {decoding!r} with score_norm {score_norm!r}"
            raise InputError(f"{way}: no such way to read a breed off a model")
        self.vlm, self.prompt = vlm, question or vlm.question
        self.breeds = vlm.breeds if breeds is None else tuple(breeds)
        self.spelled = {breed: vlm.spelled[breed] for breed in self.breeds if breed in vlm.spelled}
        self.decoding, self.score_norm, self.prior_strength = decoding, score_norm, prior_strength
        self.prior_fit: dict[str, Any] | None = None
        self.name = name or ("vlm-tuned" if vlm.adapter or vlm.checkpoint.merged else "vlm-base")
        self.parser = BreedParser(self.breeds)
        self.ahead = vlm.device.type != "cpu"
        self._own, self._copying = threading.local(), threading.Lock()
        self.scorer = LabelScorer(vlm, self.breeds, self.prompt, spelled=self.spelled) if decoding == "score" else None

    def prepare(self, image: Image) -> Image | Prepared:
        """The photo as the processor makes it; on a CPU, which then has no time to spare, the photo itself."""
        if not self.ahead:
            return image
        if not hasattr(self._own, "processor"):
            with self._copying:
                self._own.processor = copy.deepcopy(self.vlm.processor)  # a tokenizer serves one thread at a time
        return prepared(self._own.processor, image, self.prompt)

    def classify(self, images: Sequence[Image], ids: Sequence[str] | None = None) -> Batch:
        if self.decoding == "score":
            return self.from_scores(self.scores(images))
        if self.decoding == "constrained":
            answers = generate_constrained(self.vlm, images, self.prompt, self.breeds, self.spelled)
            return Batch(answers, None, answers)
        answers = generate_free(self.vlm, images, self.prompt)
        return Batch([self.parser.parse(answer) for answer in answers], None, answers)

    def asking(self, question: str) -> "VLMClassifier":
        """The same model, read in the same way, with another question."""
        ways = (self.decoding, self.score_norm, self.prior_strength, self.name, question)
        return VLMClassifier(self.vlm, self.breeds, *ways)

    @property
    def label_scorer(self) -> LabelScorer:
        """Scores the breeds' names. Raises InputError where the model's words are read instead."""
        if self.scorer is None:
            raise InputError(f"decoding {self.decoding!r} gives no scores of breeds; this needs decoding 'score'")
        return self.scorer

    def raw_scores(self, images: Sequence[Image]) -> np.ndarray:
        """Label log-likelihoods (n, breeds) before prior correction, per token with `score_norm="mean"`."""
        return self._normed(self.label_scorer.score(images))

    @cached_property
    def prior(self) -> np.ndarray:
        """The scores of the prompt without a photo (breeds,)."""
        return self._normed(self.label_scorer.prior()[None])[0]

    def scores(self, images: Sequence[Image]) -> np.ndarray:
        """Scores (n, breeds), corrected by the prior and not normalised."""
        scores = self.raw_scores(images)
        return scores - self.prior_strength * self.prior if self.prior_strength else scores

    def log_probs(self, images: Sequence[Image]) -> np.ndarray:
        """Log-probabilities (n, breeds), corrected by the prior."""
        return log_softmax(self.scores(images), axis=1)

    def _normed(self, sums: np.ndarray) -> np.ndarray:
        return sums if self.score_norm == "sum" else self.label_scorer.mean(sums)

    def describe(self) -> dict[str, Any]:
        description = about_model(self.vlm.model, self.vlm.name, self.vlm.adapter)
        description |= {"question": self.prompt, "decoding": self.decoding}
        if self.vlm.checkpoint.training.get("reasons"):
            description["reasons"] = True  # it was trained to give them
        # Quantized weights are stored as bytes; the embeddings never are.
        description["dtype"] = str(self.vlm.dtype).removeprefix("torch.")
        if self.decoding == "score":
            description |= {"score_norm": self.score_norm, "label_pass": self.label_scorer.mode}
            if self.spelled:
                description["spelled"] = self.spelled
            description["prior_correction"] = {"strength": self.prior_strength, **(self.prior_fit or {})}
        return description


def fit_prior(
    classifier: VLMClassifier, samples: Sequence[Sample], image_root: Path, batch_size: int = 16
) -> VLMClassifier:
    """Set the classifier's prior strength by accuracy on the validation `samples`, and what was tried into its sidecar.

    The photos are scored once; all strengths are judged on those scores. Returns the same classifier.
    """
    if classifier.decoding != "score":
        raise InputError("prior correction needs decoding 'score': generated text has no scores to correct")
    batches = read_batches(samples, image_root, batch_size, prepare=classifier.prepare)
    photos = track(batches, "prior correction", total=-(-len(samples) // batch_size))
    scores = np.concatenate([classifier.raw_scores(images) for _, images, _ in photos])
    truth = [classifier.breeds.index(sample.breed) for sample in samples]
    strength, table = choose_strength(scores, classifier.prior, truth)
    classifier.prior_strength = strength
    classifier.prior_fit = {"fitted_on": len(samples), "accuracy_by_strength": table}
    said = "%s: prior correction of strength %.1f, chosen on %d validation photos"
    log.info(said, classifier.name, strength, len(samples))
    return classifier


def choose_strength(scores: np.ndarray, prior: np.ndarray, truth: Sequence[int]) -> tuple[float, dict[str, float]]:
    """The strength with the best accuracy of `scores - strength * prior`, and the accuracy of each.

    `scores`: (n, breeds), `prior`: (breeds,), `truth`: n breed indices. Ties go to the lower log-loss, then to the
    weaker correction, so that 0 wins where correction changes nothing.
    """
    rows = np.arange(len(scores))
    judged = []
    for strength in STRENGTHS:
        log_probs = log_softmax(scores - strength * prior, axis=1)
        accuracy = float(np.mean(log_probs.argmax(1) == np.asarray(truth)))
        judged.append((-accuracy, float(-log_probs[rows, truth].mean()), strength))
    return min(judged)[2], {str(strength): round(-negative, 4) for negative, _, strength in judged}
