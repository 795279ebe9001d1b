"""Frozen features of many photos, computed once and kept on disk: for wrong labels, near test photos and near-duplicates."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import AutoConfig

from catlib.classifiers.encoder import ClipEncoder, FeatureExtractor, TowerEncoder
from catlib.classifiers.predict import read_batches
from catlib.data.corrections import write_suspects
from catlib.data.dataset import Dataset
from catlib.data.findings import Finding
from catlib.data.nearness import nearness
from catlib.data.records import PARTS, Sample
from catlib.data.suspects import Suspects, find_suspects, similar_pairs
from catlib.errors import InputError
from catlib.files import csv_text, replacing, write_text
from catlib.paths import resolve
from catlib.progress import track
from catlib.settings import DataSettings
from catlib.vlm.checkpoint import model_folder, open_vlm
from catlib.vlm.processors import from_files

CACHE = "outputs/cache/photo_features"
BATCH = 16
SAVED_EVERY = 200  # batches
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Closer:
    """What the audit alone cannot tell of a split."""

    near: pd.DataFrame  # of each photo the nearest training photo (see catlib.data.nearness)
    suspects: Suspects | None = None  # these two need an encoder
    similar: pd.DataFrame | None = None


def look_closer(settings: DataSettings, dataset: Dataset, findings: Sequence[Finding]) -> Closer:
    """Nearness to training (nearness.csv in `run_dir`) and, with an `encoder`, wrong labels and similar photos, beside the split."""
    by_photo = suspects = similar = None
    if settings.encoder:
        samples = [sample for part in PARTS for sample in dataset.part(part)]
        features = photo_features(settings.encoder, samples, dataset.image_root)
        by_photo = {str(s.metadata.get("sha256")): vector for s, vector in zip(samples, features, strict=True)}
        suspects, similar = find_suspects(samples, features, settings.seed), similar_pairs(samples, features)
        write_suspects(resolve(settings.data_dir) / "vlm", suspects.table, similar)
    near = nearness(findings, by_photo)
    rows = near.reset_index().round(4)
    rows = rows.astype(object).where(rows.notna(), "")
    write_text(resolve(settings.run_dir) / "nearness.csv", csv_text(rows.columns.tolist(), rows.to_numpy().tolist()))
    return Closer(near, suspects, similar)


def open_encoder(ref: str) -> FeatureExtractor:
    """A model of the CLIP family, or the vision tower of a VLM, by hub name or folder. Raises InputError when it is neither."""
    try:
        named = from_files(AutoConfig, str(model_folder(ref) or ref)).architectures
    except (OSError, ValueError, InputError):  # no config.json: an adapter, or nothing, which open_vlm says
        named = ["ConditionalGeneration"]
    is_vlm = any("ConditionalGeneration" in name for name in named or ())
    return TowerEncoder(open_vlm(ref)) if is_vlm else ClipEncoder.load(ref)


def photo_features(ref: str, samples: Sequence[Sample], image_root: Path, cache: Path | None = None) -> np.ndarray:
    """The features (n, width) of the samples' photos by the encoder `ref`; float16 on disk, by SHA-256, one file a model.

    The model is only loaded when a photo is new. A changed model folder (names, sizes, times of its files) is another model.
    """
    folder = model_folder(ref)
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder else []
    about = [ref, *(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)]
    path = (cache or resolve(CACHE)) / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:24]}.npz"
    known = _read(path)
    keys = [_key(sample) for sample in samples]
    new = {key: sample for key, sample in zip(keys, samples, strict=True) if key not in known}
    if new:
        encoder = open_encoder(ref)
        pooling = "image_embedding" if isinstance(encoder, ClipEncoder) else encoder.poolings[-1]
        batches = read_batches(list(new.values()), image_root, BATCH, prepare=encoder.prepare)
        total = -(-len(new) // BATCH)
        for n, (chunk, images, _) in enumerate(track(batches, "photo features", total=total, unit="batches"), start=1):
            vectors = encoder.compute(images)[pooling].astype(np.float16)
            known |= dict(zip(map(_key, chunk), vectors, strict=True))
            if n % SAVED_EVERY == 0 or n == total:
                with replacing(path) as temporary, temporary.open("wb") as stream:
                    np.savez(stream, keys=np.array(list(known)), vectors=np.stack(list(known.values())))
    return np.stack([known[key] for key in keys]).astype(np.float32)


def _key(sample: Sample) -> str:
    return str(sample.metadata.get("sha256") or sample.id)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(zip(stored["keys"].tolist(), stored["vectors"], strict=True))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError) as error:
        log.warning("%s: not a cache of features (%s), computed anew", path, error)
        return {}
