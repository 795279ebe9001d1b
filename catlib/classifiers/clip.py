"""Zero-shot CLIP: the breed whose sentences lie nearest to the photo, with no training at all; and these sentences."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL.Image import Image
from scipy.special import log_softmax

from catlib.breeds import features, find
from catlib.classifiers.base import Batch, Classifier
from catlib.classifiers.encoder import ClipEncoder

PLAIN = "a photo of a {}, a cat breed."
# In the manner of the pet templates of CLIP (Radford et al. 2021, arXiv 2103.00020), varied in framing and quality.
TEMPLATES = (
    "a photo of a {} cat, a type of pet.",
    "a photo of a {} cat.",
    "a close-up photo of a {} cat.",
    "a cropped photo of a {} cat.",
    "a bright photo of a {} cat.",
    "a blurry photo of a {} cat.",
    "a photo of the face of a {} cat.",
    "a photo of a {} cat lying down.",
    PLAIN,
)


def breed_prompts(breed: str, style: str = "ensemble") -> list[str]:
    """The sentences for a breed. `plain`: one; `ensemble`: all templates and the known traits; `traits`: traits alone.

    A name of two halves, `Sphynx - Hairless Cat`, stands in the templates as either. With `traits`, a breed whose
    traits are not known falls back to the plain sentence.
    """
    names = breed.split(" - ")
    if style == "plain":
        return [_fill(PLAIN, " ".join(names))]
    sentences = trait_sentences(breed)
    if style == "traits":
        return sentences or [_fill(PLAIN, " ".join(names))]
    return [_fill(template, name) for name in names for template in TEMPLATES] + sentences


def trait_sentences(breed: str) -> list[str]:
    """What a judge looks at, a sentence each; empty for an unknown breed (Menon & Vondrick 2022, arXiv 2210.07183)."""
    known, name = find(breed), breed.split(" - ")[0]
    if known is None:
        return []
    build = known.traits.build.partition(", with ")[0]
    sentences = [f"a photo of a {{}}, a cat with {feature}." for feature in features(known)[1:]]
    article = "an" if build[0] in "aeiou" else "a"
    return [_fill(sentence, name) for sentence in (*sentences, f"a photo of a {{}}, {article} {build} cat.")]


def _fill(template: str, name: str) -> str:
    """The template with the breed's name: the article fitted to it, and no `cat` after a name that ends in it."""
    if name.casefold().endswith(" cat"):
        template = template.replace("{} cat", "{}")
    article = "an" if name[0].casefold() in "aeio" else "a"
    return template.replace("a {}", f"{article} {{}}").format(name)


class ClipZeroShot(Classifier):
    """Softmax over breeds of the scaled cosine between photo and breed.

    A breed's vector is the mean of its sentences' unit vectors, normalised again (prompt ensembling, Radford et al.
    2021, section 3.1.4); sentences are encoded once. Some encoders were trained with a sigmoid for each pair, which answers
    "does this sentence fit?" for each breed apart. Given that exactly one breed is right, Bayes' rule makes of
    independent sigmoids of logits z the probabilities exp(z_i) / sum exp(z_j): again the softmax, in which their bias
    cancels.
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
        return self.from_log_probs(log_softmax(self.encoder.logit_scale * cosines, axis=1))

    def describe(self) -> dict[str, Any]:
        example = breed_prompts(self.breeds[0], self.prompts)
        return {**self.encoder.describe(), "prompt": f"{self.prompts}: {example[0]}", "decoding": "cosine"}
