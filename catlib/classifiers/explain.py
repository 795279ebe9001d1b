"""Reasons for a breed: the patches that drove its score, and the model's own words beside the breed's standard."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from catlib.breeds import describe, find
from catlib.classifiers.vlm import VLMClassifier
from catlib.data.records import Prediction, PredictionSet
from catlib.vlm.attribution import occluded_scores, patch_gradients, patch_occlusion
from catlib.vlm.decoding import generate_free

if TYPE_CHECKING:
    from catlib.vlm.models import VLM


@dataclass(frozen=True)
class Explanation:
    """A row of the panel. `seen`: the photo as the model saw it, cropped; `heat`: (h, w), nats, for `predicted`.

    `fall`: what hiding the tenth of the patches that the map marks as strongest takes off the log-likelihood of
    `predicted`, in nats; `random_fall`: the mean of as many patches drawn at random. A map that is true has the larger.
    """

    seen: Image.Image
    heat: np.ndarray
    breed: str | None
    predicted: str
    probability: float
    answer: str
    fall: float
    random_fall: float


def explain(vlm: "VLM", image: Image.Image, question: str, breed: str, method: str = "gradient") -> np.ndarray:
    """Heat map (h, w): how much each image patch raised (negative: lowered) the breed's log-likelihood, in nats.

    `method`: gradient (eight forward and backward passes) or occlusion (a forward pass for each window of patches,
    about fifty).
    """
    return (patch_occlusion if method == "occlusion" else patch_gradients)(vlm, image, question, breed)


def explain_prediction(
    classifier: VLMClassifier, image: Image.Image, breed: str | None, method: str = "gradient"
) -> Explanation:
    """Classify a photo, ask for the answer in words, and attribute the score of the predicted breed.

    `breed`: the true one, None when it is not known. The classifier decodes by `score`.
    """
    batch = classifier.classify([image])
    predicted = batch.predicted[0]
    probability = float(np.exp(batch.log_probs[0].max()))
    answer = generate_free(classifier.vlm, [image], classifier.prompt)[0]
    heat = explain(classifier.vlm, image, classifier.prompt, predicted, method)
    fall, random_fall = falls_when_hidden(classifier.vlm, image, classifier.prompt, predicted, heat)
    seen = seen_photo(classifier.vlm, image)
    return Explanation(seen, heat, breed, predicted, probability, answer, fall, random_fall)


def falls_when_hidden(
    vlm: "VLM", image: Image.Image, question: str, breed: str, heat: np.ndarray, draws: int = 14, seed: int = 0
) -> tuple[float, float]:
    """The deletion test of a heat map (Petsiuk et al. 2018, arXiv 1806.07421): the fall of the breed's log-likelihood
    when the strongest tenth of its patches is hidden, and the mean fall of `draws` random tenths, in nats."""
    count, rng = max(1, heat.size // 10), np.random.default_rng(seed)
    strongest = np.argsort(-heat.ravel(), kind="stable")[:count]
    hidden = [strongest, *(rng.choice(heat.size, count, replace=False) for _ in range(draws))]
    masks = [np.isin(np.arange(heat.size), chosen).reshape(heat.shape) for chosen in hidden]
    whole, best, *others = occluded_scores(vlm, image, question, breed, [np.zeros(heat.shape, dtype=bool), *masks])
    return float(whole - best), float(whole - np.mean(others))


def seen_photo(vlm: "VLM", image: Image.Image) -> Image.Image:
    """The photo as the processor scaled and cropped it, turned back from normalised pixels; of tiles the last."""
    processor = vlm.processor.image_processor
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    pixels = torch.as_tensor(pixels).reshape(-1, *pixels.shape[-3:])[-1].float()
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    values = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def pick_examples(predictions: PredictionSet, priority: Sequence[str], each: int = 2) -> list[Prediction]:
    """Photos worth a look: the surest right, the surest wrong, and priority breeds, `each` of a kind, a photo once."""

    def sureness(prediction: Prediction) -> float:
        return -max(prediction.scores) if prediction.scores else 0.0

    ordered = sorted((p for p in predictions.predictions if p.predicted and p.breed), key=sureness)
    kinds = (
        [p for p in ordered if p.predicted == p.breed and p.breed not in priority],
        [p for p in ordered if p.predicted != p.breed],
        [p for p in ordered if p.breed in priority],
    )
    picked: dict[str, Prediction] = {}
    for kind in kinds:
        picked |= {p.id: p for p in [p for p in kind if p.id not in picked][:each]}
    return list(picked.values())


def explanation_figure(rows: Sequence[Explanation]) -> Figure:
    """A panel with a line for each photo: the photo, the heat map over it, answer and traits in words."""
    figure = Figure(figsize=(11, 2.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 3, width_ratios=(1, 1, 1.9), squeeze=False)
    for (left, middle, right), row in zip(axes, rows, strict=True):
        left.imshow(row.seen)
        left.set_title(row.breed or "breed not known", fontsize=10)
        middle.imshow(row.seen.convert("L"), cmap="gray")
        limit = float(np.quantile(np.abs(row.heat), 0.99)) or 1.0  # a single extreme patch would leave all others pale
        heat = np.array(Image.fromarray(row.heat.astype(np.float32)).resize(row.seen.size, Image.Resampling.BICUBIC))
        middle.imshow(heat, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.55)
        middle.set_title(f"what spoke for {row.predicted} (red)", fontsize=10)
        verdict = "" if row.breed is None else ("right" if row.predicted == row.breed else "wrong")
        right.text(0, 1, _words(row, verdict), va="top", fontsize=9.5, linespacing=1.35, transform=right.transAxes)
        for axis in (left, middle, right):
            axis.axis("off")
    return figure


def _words(row: Explanation, verdict: str) -> str:
    lines = [f"predicted: {row.predicted}, {row.probability:.0%} sure" + (f" – {verdict}" if verdict else "")]
    lines.append(textwrap.fill(f"in its own words: “{row.answer}”", 62, max_lines=3, placeholder=" …”"))
    for title, name in (("standard of the predicted breed", row.predicted), ("standard of the true breed", row.breed)):
        if name and (name == row.predicted) == (title == "standard of the predicted breed"):
            lines.append(textwrap.fill(f"{title}: {_standard(name)}", 62, max_lines=5, placeholder=" …"))
    return "\n".join(lines)


def _standard(name: str) -> str:
    """The breed's traits in a line."""
    return describe(name) if find(name) else "not in the list of breeds"
