"""Classifiers on frozen features, the fair opponents of anything that was fine-tuned: made from photos, stored, read back."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from catlib.classifiers.base import Batch, Classifier
from catlib.classifiers.clip import ClipZeroShot
from catlib.classifiers.encoder import ClipEncoder, DinoEncoder, FeatureExtractor, TowerEncoder
from catlib.classifiers.opponents import KINDS, Arrays, Photos, choose_and_fit, deal_folds
from catlib.data.conversations import balance_weights
from catlib.data.records import Sample
from catlib.errors import InputError
from catlib.files import parse_json, replacing
from catlib.vlm.checkpoint import open_vlm

log = logging.getLogger(__name__)


@dataclass
class Probe(Classifier):
    """A fitted classifier on the features of CLIP or of the VLM's own tower; `kind`: one of `opponents.KINDS`."""

    extractor: FeatureExtractor
    breeds: tuple[str, ...]
    kind: str
    pooling: str
    arrays: Arrays
    report: dict[str, Any]
    name: str

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
        kind: str = "linear",
        balance: str = "none",
    ) -> "Probe":
        """Train on `samples`; settings and pooling come from cross-validation inside them; no other photo is touched.

        `balance`: photos are weighted as the VLM's training draws them. Raises InputError for a breed that is not in the list.
        """
        breeds = tuple(breeds)
        if unknown := sorted({s.breed for s in samples} - set(breeds)):
            raise InputError(f"{name}: training photos of breeds that are not in the list: {', '.join(unknown)}")
        labels = np.array([breeds.index(sample.breed) for sample in samples])
        photos = Photos(
            extractor.of_samples(samples, image_root, name, batch_size),
            labels,
            len(breeds),
            balance_weights(samples, balance),
            deal_folds(labels, seed, [s.group for s in samples]),
            _text(extractor, breeds) if kind in ("tip-adapter", "projection") else {},
        )
        pooling, arrays, report = choose_and_fit(kind, photos, seed)
        report |= {"trained_on": len(samples), "seed": seed, "balance": balance}
        chosen = ", ".join(f"{key} = {report[key]:g}" for key in KINDS[kind].grid)
        log.info("%s: %s features, %s (%d photos)", name, pooling, chosen, len(samples))
        return cls(extractor, breeds, kind, pooling, arrays, report, name)

    def prepare(self, image: Image) -> Any:
        return self.extractor.prepare(image)

    def classify(self, images: Sequence[Image], ids: Sequence[str] | None = None) -> Batch:
        features = self.extractor.features(images, ids)[self.pooling].astype(np.float32)
        return self.from_scores(KINDS[self.kind].scores(self.arrays, features).astype(float))

    def describe(self) -> dict[str, Any]:
        return {**self.extractor.describe(), "decoding": f"{self.kind} on features", "probe": self.report}

    def store(self, folder: Path) -> None:
        self.save(folder / f"{self.name}.npz")

    def save(self, path: Path) -> None:
        """Write what was fitted as .npz: plain arrays and one JSON text, nothing that runs code when it is read."""
        about = {"name": self.name, "breeds": self.breeds, "pooling": self.pooling, "report": self.report}
        name, kind = self.extractor.describe()["base_model"], self.extractor.kind
        about |= {"extractor": name, "kind": kind, "learner": self.kind}
        with replacing(path) as temporary:
            np.savez(temporary, allow_pickle=False, about=np.array(json.dumps(about)), **self.arrays)

    @classmethod
    def load(
        cls, path: Path, extractor: FeatureExtractor | None = None, device: str = "auto", dtype: str = "auto"
    ) -> "Probe":
        """Read what `save` wrote; without an `extractor` the one that it names is loaded.

        Raises InputError when the file is none, belongs to another extractor, or names one that cannot be loaded.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                about = parse_json(str(stored["about"]), str(path))
                arrays = {key: stored[key] for key in stored.files if key != "about"}
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: not a saved linear probe: {error}") from None
        named, kind = about["extractor"], about.get("kind")
        if extractor is None and kind in ("clip", "dino"):
            extractor = (ClipEncoder if kind == "clip" else DinoEncoder).load(named, device, dtype)
        elif extractor is None and kind == "tower":
            extractor = TowerEncoder(open_vlm(named, device=device, precision=dtype))
        elif extractor is None:
            raise InputError(f"{path}: a probe on features of {named}, which cannot be loaded by name")
        elif named != (given := extractor.describe()["base_model"]):
            raise InputError(f"{path}: fitted on features of {named}, not of {given}")
        learner, breeds = about.get("learner", "linear"), tuple(about["breeds"])
        return cls(extractor, breeds, learner, about["pooling"], arrays, about["report"], about["name"])


def _text(extractor: FeatureExtractor, breeds: Sequence[str]) -> Arrays:
    """What CLIP's text tower gives to those that begin with zero-shot scores."""
    assert isinstance(extractor, ClipEncoder)
    texts = {"texts": ClipZeroShot(extractor, breeds).text_vectors, "scale": np.array(extractor.logit_scale)}
    return texts if extractor.projection is None else {**texts, "projection": extractor.projection}
