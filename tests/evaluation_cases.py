"""Prediction sets with planted properties for the tests of the evaluation room."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from catlib.data.records import Prediction, PredictionSet, meta_path, prediction_line

BREEDS = ("Abyssinian", "Bengal", "Birman", "Bombay", "Burmilla", "Cymric", "Manx", "Persian", "Ragdoll", "Siamese")
RARE = ("Burmilla", "Cymric")


def make_set(
    name: str,
    true: Sequence[str],
    said: Sequence[str | None],
    *,
    breeds: Sequence[str] = BREEDS,
    log_probs: np.ndarray | None = None,
    latency_ms: float = 20.0,
    prefix: str = "photo",
    **meta: Any,
) -> PredictionSet:
    """Predictions of photos photo-0000, photo-0001, …"""
    rows = tuple(
        Prediction(
            f"{prefix}-{i:04d}",
            f"{t}/{i}.jpg",
            t,
            s,
            None if log_probs is None else tuple(map(float, log_probs[i])),
            None,
            latency_ms,
        )
        for i, (t, s) in enumerate(zip(true, said, strict=True))
    )
    return PredictionSet(name, rows, {"breeds": list(breeds), **meta})


def truth(photos: Mapping[str, int] | int, breeds: Sequence[str] = BREEDS) -> list[str]:
    """True breeds: so many photos of each."""
    return [b for b in breeds for _ in range(photos if isinstance(photos, int) else photos[b])]


def scored_set(
    name: str,
    true: Sequence[str],
    accuracy: Mapping[str, float] | float,
    *,
    breeds: Sequence[str] = BREEDS,
    seed: int = 0,
    noise: np.ndarray | None = None,
    **options: Any,
) -> PredictionSet:
    """A model with scores that is right with about the given probability; `noise` (n, breeds) makes models alike."""
    rng = np.random.default_rng(seed)
    index = np.array([breeds.index(t) for t in true])
    noise = rng.normal(size=(len(true), len(breeds))) if noise is None else noise
    right = np.array([accuracy if isinstance(accuracy, float) else accuracy[t] for t in true])
    scores = 0.5 * noise
    wanted = rng.random(len(true)) < right
    other = (index + 1 + rng.integers(len(breeds) - 1, size=len(true))) % len(breeds)
    scores[np.arange(len(true)), np.where(wanted, index, other)] += 4.0
    log_probs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    said = [breeds[i] for i in log_probs.argmax(axis=1)]
    return make_set(name, true, said, breeds=breeds, log_probs=log_probs, **options)


def grouped(predictions: PredictionSet, groups: Sequence[str | None]) -> PredictionSet:
    """The same predictions with groups."""
    rows = tuple(replace(p, group=g) for p, g in zip(predictions.predictions, groups, strict=True))
    return replace(predictions, predictions=rows)


def copied(predictions: PredictionSet, times: int) -> PredictionSet:
    """Every prediction so many times under new ids: of the same photo."""
    rows = tuple(replace(p, id=f"{p.id}/{i}") for p in predictions.predictions for i in range(times))
    return replace(predictions, predictions=rows)


def write_set(predictions: PredictionSet, folder: Path) -> Path:
    """The predictions file and its sidecar."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{predictions.name}.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for row in predictions.predictions:
            stream.write(prediction_line(row))
    meta_path(path).write_text(json.dumps(dict(predictions.meta)), encoding="utf-8")
    return path
