"""Reasons for a breed: the patches that drove its score, and the model's own words."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from catlib.classifiers.vlm import VLMClassifier
from catlib.data.records import Prediction, PredictionSet
from catlib.vlm.attribution import Label, occluded_scores, patch_gradients
from catlib.vlm.decoding import generate_free
from catlib.vlm.models import VLM

DRAWS = 14


@dataclass(frozen=True)
class Explanation:
    """Why a photo was called so. `seen`: the photo as the model saw it, cropped; `heat`: (h, w), nats.

    The map explains the lead of `predicted` over `rival`, the breed that came second: the log-likelihood of a sure
    answer alone hardly moves whatever is hidden. `fall`: what hiding the tenth of the patches that the map marks as
    strongest takes off that lead, in nats; `random_fall`: the mean of as many patches drawn at random. A map that is
    true has the larger.
    """

    seen: Image.Image
    heat: np.ndarray
    breed: str | None
    predicted: str
    rival: str
    probability: float
    answer: str
    fall: float
    random_fall: float

    @property
    def right(self) -> bool:
        return self.predicted == self.breed


def explain_prediction(classifier: VLMClassifier, image: Image.Image, breed: str | None) -> Explanation:
    """Classify a photo, ask for the answer in words, and attribute the lead of the predicted breed over the next.

    `breed`: the true one, None when it is not known. The classifier decodes by `score`.
    """
    log_probs = classifier.log_probs([image])[0]
    order = np.argsort(-log_probs, kind="stable")
    predicted, rival = (classifier.breeds[int(i)] for i in order[:2])
    probability = float(np.exp(log_probs[order[0]]))
    answer = generate_free(classifier.vlm, [image], classifier.prompt)[0]
    labels = [classifier.label_scorer.tokens(name) for name in (predicted, rival)]
    own, other = (patch_gradients(classifier.vlm, image, classifier.prompt, label) for label in labels)
    heat = own - other  # linear in the score, so that this explains the difference of the two scores
    falls = [falls_when_hidden(classifier.vlm, image, classifier.prompt, label, heat) for label in labels]
    fall, random_fall = (falls[0][i] - falls[1][i] for i in (0, 1))
    seen = seen_photo(classifier.vlm, image)
    return Explanation(seen, heat, breed, predicted, rival, probability, answer, fall, random_fall)


def falls_when_hidden(
    vlm: VLM, image: Image.Image, question: str, breed: Label, heat: np.ndarray
) -> tuple[float, float]:
    """The deletion test of a heat map (Petsiuk et al. 2018, arXiv 1806.07421): the fall of the breed's log-likelihood
    when the strongest tenth of its patches is hidden, and the mean fall of DRAWS random tenths, in nats."""
    count, rng = max(1, heat.size // 10), np.random.default_rng(0)
    strongest = np.argsort(-heat.ravel(), kind="stable")[:count]
    hidden = [strongest, *(rng.choice(heat.size, count, replace=False) for _ in range(DRAWS))]
    masks = [np.isin(np.arange(heat.size), chosen).reshape(heat.shape) for chosen in hidden]
    whole, best, *others = occluded_scores(vlm, image, question, breed, [np.zeros(heat.shape, dtype=bool), *masks])
    return float(whole - best), float(whole - np.mean(others))


def seen_photo(vlm: VLM, image: Image.Image) -> Image.Image:
    """The photo as the processor scaled and cropped it, turned back from normalised pixels; of tiles the last."""
    processor = vlm.processor.image_processor
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    pixels = torch.as_tensor(pixels).reshape(-1, *pixels.shape[-3:])[-1].float()
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    values = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def pick_examples(predictions: PredictionSet, priority: Sequence[str], each: int = 2) -> list[Prediction]:
    """Photos worth a look: the surest right, the surest wrong, and priority breeds (one right, where there is one),
    `each` of a kind; a photo once, and other breeds first."""
    named = [p for p in predictions.predictions if p.predicted and p.breed]
    named.sort(key=lambda p: -max(p.scores or (0.0,)))
    rare, common = ([p for p in named if (p.breed in priority) == flag] for flag in (True, False))
    right, wrong = ([p for p in common if (p.predicted == p.breed) == flag] for flag in (True, False))
    rare_right = [p for p in rare if p.predicted == p.breed][: min(1, each)]
    kinds = ((right, each), (wrong, each), (rare_right, len(rare_right)), (rare, each - len(rare_right)))
    picked: list[Prediction] = []
    for kind, count in kinds:
        for _ in range(count):
            shown = {p.breed for p in picked}
            left = [p for p in kind if p not in picked]
            picked += sorted(left, key=lambda p: p.breed in shown)[:1]  # stable: the surest of a breed not shown yet
    return picked
