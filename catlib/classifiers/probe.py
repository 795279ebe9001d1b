"""The linear probe: logistic regression on frozen features, the fair opponent of anything that was fine-tuned."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from scipy.special import log_softmax

from catlib.classifiers.base import Batch, Classifier
from catlib.classifiers.encoder import FeatureExtractor
from catlib.classifiers.logistic import Linear, choose_and_fit
from catlib.classifiers.predict import read_batches
from catlib.data.records import Sample
from catlib.errors import InputError
from catlib.files import parse_json, replacing
from catlib.progress import track

log = logging.getLogger(__name__)


class LinearProbe(Classifier):
    """A linear classifier on the features of CLIP (`clip-probe`) or of the VLM's own tower (`tower-probe`)."""

    def __init__(
        self, extractor: FeatureExtractor, breeds: Sequence[str], linear: Linear, report: dict[str, Any], name: str
    ) -> None:
        self.extractor, self.breeds, self.linear = extractor, tuple(breeds), linear
        self.report, self.name = report, name

    @classmethod
    def fit(
        cls,
        extractor: FeatureExtractor,
        breeds: Sequence[str],
        samples: Sequence[Sample],
        image_root: Path,
        name: str,
        batch_size: int = 16,
        seed: int = 0,
    ) -> "LinearProbe":
        """Train on `samples`; C and the pooling come from cross-validation inside them; no other photo is touched."""
        breeds = tuple(breeds)
        if unknown := sorted({s.breed for s in samples} - set(breeds)):
            raise InputError(f"{name}: training photos of breeds that are not in the list: {', '.join(unknown)}")
        parts: dict[str, list[np.ndarray]] = {pooling: [] for pooling in extractor.poolings}
        batches = read_batches(samples, image_root, batch_size)
        total = -(-len(samples) // batch_size)
        for chunk, images, _ in track(batches, f"{name} features", total=total, unit="batches"):
            for pooling, matrix in extractor.features(images, [sample.id for sample in chunk]).items():
                parts[pooling].append(matrix)
        features = {pooling: np.concatenate(part).astype(np.float64) for pooling, part in parts.items()}
        labels = np.array([breeds.index(sample.breed) for sample in samples])
        linear, report = choose_and_fit(features, labels, len(breeds), seed)
        report |= {"trained_on": len(samples), "seed": seed}
        log.info("%s: %s features, C = %g (%d photos)", name, report["pooling"], report["C"], len(samples))
        return cls(extractor, breeds, linear, report, name)

    def classify(self, images: Sequence[Image], ids: Sequence[str] | None = None) -> Batch:
        features = self.extractor.features(images, ids)[self.linear.pooling]
        return self.from_log_probs(log_softmax(self.linear.logits(features.astype(np.float64)), axis=1))

    def describe(self) -> dict[str, Any]:
        return {**self.extractor.describe(), "decoding": "linear probe", "probe": self.report}

    def save(self, path: Path) -> None:
        """Write the fitted weights as .npz: plain arrays and one JSON text, nothing that runs code when it is read."""
        about = {"name": self.name, "breeds": self.breeds, "pooling": self.linear.pooling, "report": self.report}
        about |= {"extractor": self.extractor.describe()["base_model"], "kind": self.extractor.kind}
        arrays = {key: getattr(self.linear, key) for key in ("mean", "scale", "weights", "bias")}
        with replacing(path) as temporary:
            np.savez(temporary, about=np.array(json.dumps(about)), **arrays)

    def store(self, folder: Path) -> Path:
        path = folder / f"{self.name}.npz"
        self.save(path)
        return path

    @classmethod
    def restore(cls, path: Path, device: str = "auto", dtype: str = "auto") -> "LinearProbe":
        """Read what `save` wrote and load the extractor that it names. Raises InputError as `load` does."""
        from catlib.classifiers.encoder import ClipEncoder, TowerEncoder
        from catlib.vlm.checkpoint import open_vlm

        about = _read(path)[0]
        if about.get("kind") == "clip":
            return cls.load(path, ClipEncoder.load(about["extractor"], device, dtype))
        if about.get("kind") == "tower":
            return cls.load(path, TowerEncoder(open_vlm(about["extractor"], device=device, precision=dtype)))
        raise InputError(f"{path}: a probe on features of {about['extractor']}, which cannot be loaded by name")

    @classmethod
    def load(cls, path: Path, extractor: FeatureExtractor) -> "LinearProbe":
        """Read what `save` wrote. Raises InputError when the file is none, or belongs to another extractor."""
        about, arrays = _read(path)
        if about["extractor"] != (given := extractor.describe()["base_model"]):
            raise InputError(f"{path}: fitted on features of {about['extractor']}, not of {given}")
        linear = Linear(about["pooling"], **arrays)
        return cls(extractor, about["breeds"], linear, about["report"], about["name"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a saved probe says about itself, and its arrays."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            about = parse_json(str(stored["about"]), str(path))
            return about, {key: stored[key] for key in ("mean", "scale", "weights", "bias")}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a saved linear probe: {error}") from None
