"""How fast this device trains and predicts, from a few steps of a training that is thrown away."""

import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from transformers import TrainerCallback

from catlib.data.conversations import evenly
from catlib.data.images import inside, open_image
from catlib.data.records import DATASET_CARD, image_root_of, read_samples, write_samples
from catlib.files import write_json
from catlib.paths import resolve
from catlib.settings import TrainSettings
from catlib.training.trainer import Trainer
from catlib.vlm.scoring import LabelScorer

STEPS, WARM = 10, 2  # measured, and before them
AT_ONCE = 16  # photos that are scored together, as notebook 03 does


class _Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def measured_rates(settings: TrainSettings) -> dict[str, float]:
    """Photos a second: {"train", "predict"}, medians over steps after the first. Predictions score the data's breeds, by the base.

    The data's photos are drawn evenly over the breeds. Loading, filling a feature cache and validation are not counted.
    Raises InputError as a training does.
    """
    size = settings.batch_size * settings.gradient_accumulation
    given: dict[str, Any] = {"watch_photos": 0, "early_stopping": 0, "report_to": "none", "priority_breeds": ""}
    with tempfile.TemporaryDirectory() as folder:
        for part, most in (("train", size * (WARM + STEPS)), ("val", AT_ONCE)):
            path, there = resolve(getattr(settings, f"{part}_data")), Path(folder) / part
            root = image_root_of(path)
            samples = evenly(read_samples(path, root), most, settings.seed)
            given[f"{part}_data"] = str(there / path.name)
            write_samples(there / path.name, samples)
            write_json(there / DATASET_CARD, {"image_root": str(root.resolve())})
            if part == "train":
                given["epochs"] = -(-size * (WARM + STEPS) // len(samples))
        trainer = Trainer(replace(settings, **given, output_dir=folder))
        trainer.add_callback(clock := _Clock())
        trainer.fit()
        steps = np.diff(clock.ends)[WARM - 1 :]
        scorer = LabelScorer(trainer.vlm, trainer.run.data.breeds, trainer.run.data.question)
        root, photos = image_root_of(resolve(settings.val_data)), trainer.run.data.val
        marks = [time.perf_counter()]
        with trainer.vlm.model.disable_adapter():  # a checkpoint's adapter is merged before it predicts
            for _ in range(1 + 2):
                scorer.score([open_image(inside(root, sample.image)) for sample in photos])
                marks.append(time.perf_counter())
    seconds = [after - before for before, after in pairwise(marks)][1:]
    return {"train": size / float(np.median(steps)), "predict": len(photos) / median(seconds)}
