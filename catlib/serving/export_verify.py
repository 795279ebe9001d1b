"""Is an export the same model? The same photos through the original and the export: agreement, largest score difference."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from catlib.data.images import inside, open_image
from catlib.data.records import image_root_of, read_samples
from catlib.errors import InputError
from catlib.paths import resolve
from catlib.vlm.checkpoint import VLM, Checkpoint
from catlib.vlm.decoding import generate_free
from catlib.vlm.scoring import LabelScorer

log = logging.getLogger(__name__)
BATCH = 4
LIMITS = {"float32": 0.01, "float16": 0.1, "bfloat16": 1.0}  # nats of a whole label that rounding the weights may cost


@dataclass(frozen=True)
class Photos:
    """What an export is verified on: names, images, and in words where they come from."""

    names: tuple[str, ...]
    images: tuple[Image.Image, ...]
    origin: str


@dataclass(frozen=True)
class Answers:
    """What a model says about n photos: greedy `texts`, and label log-likelihoods `scores` (n, breeds) in nats."""

    texts: tuple[str, ...]
    scores: np.ndarray


@dataclass(frozen=True)
class Verification:
    """Two models on the same photos. `largest_difference`: of any label's log-likelihood, nats."""

    photos: int
    origin: str
    same_breed: int
    same_answer: int
    largest_difference: float
    limit: float
    differing: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """The scores decide: within the limit a breed or a text can only differ where two were nearly equal."""
        return self.largest_difference <= self.limit

    def __str__(self) -> str:
        same = f"same breed for {self.same_breed}, same answer for {self.same_answer}"
        limit = f" (limit {self.limit:g})" if self.limit < float("inf") else ""
        largest = f"largest score difference {self.largest_difference:.2g} nats{limit}"
        return "\n  ".join([f"{self.photos} photos ({self.origin}): {same}, {largest}", *self.differing])


def choose_photos(given: Sequence[Path], checkpoint: Checkpoint, count: int) -> Photos:
    """The given photos; else `count` validation photos of the training, as far as they are still there; else plain patterns."""
    if count < 1:
        raise InputError(f"at least one photo is needed to verify an export, found {count}")
    if given:
        return Photos(tuple(p.name for p in given), tuple(open_image(p) for p in given), "given")
    if named := checkpoint.training.get("settings", {}).get("val_data", ""):
        try:
            root = image_root_of(resolve(named))
            samples = read_samples(resolve(named), root)
            n = min(count, len(samples))
            chosen = [samples[i * len(samples) // n] for i in range(n)]
            images = tuple(open_image(inside(root, sample.image)) for sample in chosen)
            return Photos(tuple(sample.id for sample in chosen), images, "of the validation data")
        except (InputError, OSError) as error:
            log.info("the training's validation photos cannot be read, random patterns take their place: %s", error)
    colors = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    patterns = tuple(Image.fromarray(squares).resize((336, 336), Image.Resampling.BICUBIC) for squares in colors)
    return Photos(tuple(f"pattern {i}" for i in range(count)), patterns, "random patterns, no photos")


def ask(vlm: VLM, photos: Photos) -> Answers:
    """Greedy answers to the checkpoint's question, and every breed's label log-likelihood."""
    scorer = LabelScorer(vlm, vlm.breeds, vlm.question, spelled=vlm.spelled)
    texts, scores = [], []
    for first in range(0, len(photos.images), BATCH):
        images = photos.images[first : first + BATCH]
        texts += generate_free(vlm, images, vlm.question)
        scores.append(scorer.score(images))
    return Answers(tuple(texts), np.concatenate(scores))


def compare(original: Answers, export: Answers, breeds: Sequence[str], photos: Photos, limit: float) -> Verification:
    """Agreement of two models; photos with another breed or text are listed with the original's lead over the next breed."""
    difference = np.abs(original.scores - export.scores).max(1)
    a, b = original.scores.argmax(1), export.scores.argmax(1)
    leads = np.diff(np.sort(original.scores)[:, -2:])[:, 0]
    same_text = np.array([x == y for x, y in zip(original.texts, export.texts, strict=True)])
    differing = tuple(
        f"{photos.names[i]}: {breeds[a[i]]} ({original.texts[i]!r}), exported {breeds[b[i]]} ({export.texts[i]!r}); lead "
        f"{leads[i]:.2g} nats, largest difference {difference[i]:.2g}"
        for i in np.flatnonzero((a != b) | ~same_text)
    )
    largest = float(difference.max()) if np.isfinite(difference).all() else float("inf")
    same = int((a == b).sum()), int(same_text.sum())
    return Verification(len(photos.names), photos.origin, *same, largest, limit, differing)
