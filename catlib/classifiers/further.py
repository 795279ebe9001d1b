"""Photos beside the test's: of none of the breeds, which a model should be unsure of, and test photos that were changed."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter, ImageOps

from catlib.classifiers.base import Batch, Classifier
from catlib.classifiers.tracks import UNKNOWN
from catlib.data.conversations import evenly
from catlib.data.images import open_image
from catlib.data.records import Sample, image_root_of, read_samples
from catlib.data.walk import photo_files
from catlib.errors import InputError
from catlib.paths import resolve
from catlib.settings import ComparisonSettings, EvaluationSettings, split_list

MOST_CHANGED = 500  # test photos that are predicted changed, drawn evenly over breeds


def _jpeg(image: Image.Image) -> Image.Image:
    image.save(data := io.BytesIO(), "JPEG", quality=20)
    data.seek(0)
    return open_image(data)


CHANGES: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "blur": lambda x: x.filter(ImageFilter.GaussianBlur(max(x.size) / 100)),
    "jpeg20": _jpeg,
    "crop": lambda x: ImageOps.fit(
        x, (-(-3 * x.width // 5), -(-3 * x.height // 5)), bleed=0.2
    ),  # the middle three fifths
    "grey": lambda x: x.convert("L").convert("RGB"),
    "small": lambda x: ImageOps.contain(x, (64, 64)),
}


@dataclass(frozen=True)
class PhotoSet:
    """Photos that tracks predict into predictions/NAME; each is changed by what CHANGES has under the name."""

    name: str
    samples: tuple[Sample, ...]
    image_root: Path


class OnSet(Classifier):
    """A classifier for a set of photos, which it changes; features of equal ids are kept apart."""

    def __init__(self, inner: Classifier, photos: str) -> None:
        self.inner, self.photos, self.name, self.breeds = inner, photos, inner.name, inner.breeds
        self.row_by_row, self.change = inner.row_by_row, CHANGES.get(photos)

    def classify(self, images: Sequence[Image.Image], ids: Sequence[str] | None = None) -> Batch:
        changed = list(map(self.change, images)) if self.change else images
        return self.inner.classify(changed, ids and [f"{self.photos}/{key}" for key in ids])

    def describe(self) -> dict[str, Any]:
        return {**self.inner.describe(), "photos": self.photos}


def further_sets(
    settings: EvaluationSettings | ComparisonSettings, test: Sequence[Sample], root: Path, breeds: Sequence[str]
) -> tuple[PhotoSet, ...]:
    """The sets that the settings name. Raises InputError for an unknown change, and for unknown photos of a known breed."""
    wanted = split_list(settings.robustness)
    if wrong := set(wanted) - set(CHANGES):
        raise InputError(f"robustness: {', '.join(sorted(wrong))}: expected some of {', '.join(CHANGES)}")
    sets = [PhotoSet(change, evenly(test, MOST_CHANGED, settings.seed), root) for change in wanted]
    if settings.unknown_data:
        place = resolve(settings.unknown_data)
        if place.is_dir():
            names, root = [path.relative_to(place).as_posix() for path in photo_files(place)[0]], place
            others = [Sample(name, name, (), {"breed": "(none of the breeds)"}) for name in names]
        else:
            others = read_samples(place, root := image_root_of(place))
        if not others or (known := {s.breed for s in others} & set(breeds)):
            said = f"photos of {', '.join(sorted(known))}, which the models know" if others else "no photos"
            raise InputError(f"unknown_data {settings.unknown_data}: {said}; name photos of none of the breeds")
        sets.append(PhotoSet(UNKNOWN, tuple(others), root))
    return tuple(sets)
