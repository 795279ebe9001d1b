"""Photos beside the test's: of none of the breeds, which a model should be unsure of, and test photos that were changed."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter

from catlib.classifiers.base import Batch, Classifier
from catlib.classifiers.tracks import UNKNOWN
from catlib.data.conversations import evenly
from catlib.data.records import Sample, image_root_of, read_samples
from catlib.data.walk import photo_files
from catlib.errors import InputError
from catlib.paths import resolve
from catlib.settings import ComparisonSettings, EvaluationSettings, split_list

MOST_CHANGED = 500  # test photos that are predicted changed, drawn evenly over breeds


def _jpeg(image: Image.Image) -> Image.Image:
    image.save(data := io.BytesIO(), "JPEG", quality=20)
    return Image.open(data).convert("RGB")


def _crop(image: Image.Image) -> Image.Image:
    width, height = image.size
    return image.crop((width // 5, height // 5, width - width // 5, height - height // 5))


CHANGES: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(max(image.size) / 100)),
    "jpeg20": _jpeg,
    "crop": _crop,  # the middle three fifths of each side
    "grey": lambda image: image.convert("L").convert("RGB"),
    "small": lambda image: image.resize(
        (max(1, 64 * image.width // max(image.size)), max(1, 64 * image.height // max(image.size)))
    ),
}


@dataclass(frozen=True)
class PhotoSet:
    """Photos that tracks predict into predictions/NAME; each is changed by what CHANGES has under the name."""

    name: str
    samples: tuple[Sample, ...]
    image_root: Path

    def predicted_by(self, classifier: Classifier) -> Classifier:
        """The classifier for these photos: it changes them, and keeps their features apart from those of equal ids."""
        return _Changed(classifier, self.name)


class _Changed(Classifier):
    def __init__(self, inner: Classifier, set_name: str) -> None:
        self.inner, self.set_name, self.name, self.breeds = inner, set_name, inner.name, inner.breeds
        self.row_by_row = inner.row_by_row

    def classify(self, images: Sequence[Image.Image], ids: Sequence[str] | None = None) -> Batch:
        change = CHANGES.get(self.set_name, lambda image: image)
        return self.inner.classify(list(map(change, images)), ids and [f"{self.set_name}/{key}" for key in ids])

    def describe(self) -> dict[str, Any]:
        return {**self.inner.describe(), "photos": self.set_name}


def further_sets(
    settings: EvaluationSettings | ComparisonSettings, test: Sequence[Sample], root: Path, breeds: Sequence[str]
) -> tuple[PhotoSet, ...]:
    """The sets that the settings name. Raises InputError for an unknown change, and for photos of unknown breed that are of a known one."""
    wanted = split_list(settings.robustness)
    if wrong := set(wanted) - set(CHANGES):
        raise InputError(f"robustness: {', '.join(sorted(wrong))}: expected some of {', '.join(CHANGES)}")
    some = evenly(test, MOST_CHANGED, settings.seed)
    sets = [PhotoSet(change, some, root) for change in wanted]
    if settings.unknown_data:
        place = resolve(settings.unknown_data)
        if place.is_dir():
            names = [path.relative_to(place).as_posix() for path in photo_files(place)[0]]
            others, root = [Sample(name, name, (), {"breed": "(none of the breeds)"}) for name in names], place
        else:
            root = image_root_of(place)
            others = read_samples(place, root)
        known = {s.breed for s in others} & set(breeds)
        if known or not others:
            said = f"photos of {', '.join(sorted(known))}, which the models know" if others else "no photos"
            raise InputError(f"unknown_data {settings.unknown_data}: {said}; name photos of none of the breeds")
        sets.append(PhotoSet(UNKNOWN, tuple(others), root))
    return tuple(sets)
