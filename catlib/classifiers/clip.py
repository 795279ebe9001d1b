"""Zero-shot CLIP: the breed whose sentences lie nearest to the photo, with no training at all."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL.Image import Image

from catlib.classifiers.base import Batch, Classifier, log_softmax
from catlib.classifiers.encoder import ClipEncoder
from catlib.classifiers.prompts import breed_prompts


class ClipZeroShot(Classifier):
    """Softmax over breeds of the scaled cosine between photo and breed.

    A breed's vector is the mean of its sentences' unit vectors, normalised again (prompt ensembling, Radford et al.
    2021, section 3.1.4); sentences are encoded once. SigLIP was trained with a sigmoid for each pair, which answers
    "does this sentence fit?" for each breed apart. Given that exactly one breed is right, Bayes' rule makes of
    independent sigmoids of logits z the probabilities exp(z_i) / sum exp(z_j): again the softmax, in which SigLIP's
    bias cancels.
    """

    def __init__(
        self, encoder: ClipEncoder, breeds: Sequence[str], prompts: str = "ensemble", name: str = "clip-zero-shot"
    ) -> None:
        self.encoder, self.breeds, self.prompts, self.name = encoder, tuple(breeds), prompts, name
        sentences = [breed_prompts(breed, prompts) for breed in self.breeds]
        encoded = encoder.text_features([sentence for group in sentences for sentence in group])
        ends = np.cumsum([len(group) for group in sentences])[:-1]
        means = np.stack([group.mean(axis=0) for group in np.split(encoded, ends)])
        self.text_vectors = means / np.linalg.norm(means, axis=1, keepdims=True)

    def classify(self, images: Sequence[Image], ids: Sequence[str] | None = None) -> Batch:
        vectors = self.encoder.features(images, ids)[self.encoder.poolings[0]]
        cosines = vectors.astype(np.float64) @ self.text_vectors.T
        return self.from_log_probs(log_softmax(self.encoder.logit_scale * cosines))

    def describe(self) -> dict[str, Any]:
        example = breed_prompts(self.breeds[0], self.prompts)
        return {**self.encoder.describe(), "prompt": f"{self.prompts}: {example[0]}", "decoding": "cosine"}
