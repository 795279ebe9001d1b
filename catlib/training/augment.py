"""Light changes to a training photo: a crop, a flip, a little colour. Breed marks stay visible."""

import random
from collections import Counter
from collections.abc import Iterable

from PIL import Image, ImageEnhance, ImageOps


class Augment:
    """A different, reproducible change each time a sample is seen: drawn from seed, sample and how often it was seen."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch = 0
        self._seen: Counter[str] = Counter()

    def start_epoch(self, epoch: int, seen: Iterable[str] = ()) -> None:
        """Draws depend on the epoch and on the turn within it; `seen`: ids of the samples before, where training is resumed."""
        self.epoch, self._seen = epoch, Counter(seen)

    def __call__(self, image: Image.Image, sample_id: str) -> Image.Image:
        """Crop 80-100 % of each side, flip half of the time, brightness, contrast and colour by up to 15 %."""
        draw = random.Random(f"{self.seed}/{self.epoch}/{sample_id}/{self._seen[sample_id]}")
        self._seen[sample_id] += 1
        width, height = (max(1, round(side * draw.uniform(0.8, 1.0))) for side in image.size)
        left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
        if draw.random() < 0.5:
            image = ImageOps.mirror(image)
        for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhancer(image).enhance(draw.uniform(0.85, 1.15))
        return image
