"""Zero-shot CLIP: the breed whose sentences lie nearest to the photo, with no training at all; and these sentences."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from catlib.breeds import describe, features, find
from catlib.classifiers.base import Batch, Classifier
from catlib.classifiers.encoder import ClipEncoder
from catlib.data.records import Sample
from catlib.settings import PROMPTS

PLAIN = "a photo of a {} cat."  # the word at its side: a Chinchilla, a Tiger or a Silver is something else
# In the manner of the pet templates of CLIP (Radford et al. 2021, arXiv 2103.00020), varied in framing and quality.
TEMPLATES = (
    "a photo of a {} cat, a type of pet.",
    "a close-up photo of a {} cat.",
    "a cropped photo of a {} cat.",
    "a bright photo of a {} cat.",
    "a blurry photo of a {} cat.",
    "a photo of the face of a {} cat.",
    "a photo of a {} cat lying down.",
    PLAIN,
)


def breed_prompts(breed: str, style: str = "ensemble") -> list[str]:
    """The sentences for a breed. `plain`: one; `ensemble`: all templates and the known traits; `traits`: one a trait;
    `descriptions`: one with all traits.

    A name of two halves, `Sphynx - Hairless Cat`, stands in the templates as either, else as the first. A breed whose
    traits are not known falls back to the plain sentence.
    """
    names, known = breed.split(" - "), find(breed)
    sentences = trait_sentences(breed)
    if style == "descriptions" and known:
        return [_fill(f"a photo of a {{}} cat, {describe(known)}.", names[0])]
    if style == "traits" and known:
        return sentences
    if style != "ensemble":
        return [_fill(PLAIN, names[0])]
    return [_fill(template, name) for name in names for template in TEMPLATES] + sentences


def trait_sentences(breed: str) -> list[str]:
    """What a judge looks at, a sentence each; empty for an unknown breed (Menon & Vondrick 2022, arXiv 2210.07183)."""
    known, name = find(breed), breed.split(" - ")[0]
    if known is None:
        return []
    build, *others = features(known)
    article = "an" if build[0] in "aeiou" else "a"
    sentences = [f"a photo of a {{}} cat with {feature}." for feature in others]
    return [_fill(sentence, name) for sentence in (*sentences, f"a photo of {article} {build} {{}} cat.")]


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
        prompts = "ensemble" if prompts == "auto" else prompts  # `choose` it
        self.encoder, self.breeds, self.prompts, self.name = encoder, tuple(breeds), prompts, name
        self.prior, self.how = np.zeros(len(self.breeds)), dict[str, Any]()  # `how`: further entries of the sidecar
        sentences = [breed_prompts(breed, prompts) for breed in self.breeds]
        encoded = encoder.text_features([sentence for group in sentences for sentence in group])
        ends = np.cumsum([len(group) for group in sentences])[:-1]
        means = np.stack([group.mean(axis=0) for group in np.split(encoded, ends)])
        self.text_vectors = means / np.linalg.norm(means, axis=1, keepdims=True)

    @classmethod
    def choose(
        cls, encoder: ClipEncoder, breeds: Sequence[str], samples: Sequence[Sample], image_root: Path, name: str
    ) -> "ClipZeroShot":
        """The sentences with the best accuracy on the (validation) `samples`, the first of equal ones; tried is each style as it is
        and less each breed's mean logit over these photos, which frequent words have higher (Allingham et al. 2023, arXiv 2302.06235).
        """
        vectors = encoder.of_samples(samples, image_root, name)[encoder.poolings[0]]
        true, tried, made = np.array([breeds.index(s.breed) for s in samples]), list[dict[str, Any]](), []
        for style in PROMPTS:
            made.append(cls(encoder, breeds, style, name))
            logits = made[-1].logits(vectors)
            for prior in (np.zeros(len(breeds)), logits.mean(axis=0)):
                accuracy = float(((logits - prior).argmax(axis=1) == true).mean())
                tried.append({"prompts": style, "prior_corrected": bool(prior.any()), "accuracy": round(accuracy, 4)})
        best = max(tried, key=lambda row: row["accuracy"])
        chosen = made[PROMPTS.index(best["prompts"])]
        prior = chosen.logits(vectors).mean(axis=0).round(5).tolist() if best["prior_corrected"] else None
        chosen.prior = chosen.prior if prior is None else np.array(prior)
        chosen.how = {"prior": prior, "prompts_tried": tried}
        return chosen

    def logits(self, vectors: np.ndarray) -> np.ndarray:
        """(n, breeds) of unit vectors (n, width) of photos."""
        return self.encoder.logit_scale * vectors.astype(np.float64) @ self.text_vectors.T - self.prior

    def prepare(self, image: Image) -> Any:
        return self.encoder.prepare(image)

    def classify(self, images: Sequence[Image], ids: Sequence[str] | None = None) -> Batch:
        vectors = self.encoder.features(images, ids)[self.encoder.poolings[0]]
        return self.from_scores(self.logits(vectors))

    def describe(self) -> dict[str, Any]:
        example = breed_prompts(self.breeds[0], self.prompts)
        said = {"prompt": f"{self.prompts}: {example[0]}", "decoding": "cosine"}
        return {**self.encoder.describe(), **said, **self.how}
