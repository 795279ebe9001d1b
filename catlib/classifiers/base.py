"""The idea that holds the house together: a model is anything that turns photos into one score per breed."""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from scipy.special import log_softmax, logsumexp

from catlib.errors import CatlibError, NotFinite
from catlib.vlm.models import out_of_memory

log = logging.getLogger(__name__)
SAMPLED = 1024  # values of each tensor that are hashed: training changes all of them


@dataclass(frozen=True)
class Batch:
    """What a classifier says about n photos.

    `log_probs`: (n, breeds) log-probabilities, each row's exp sums to 1; None when the decoding gives no scores.
    `predicted`: n breeds, None for an answer that names none. `answers`: n raw texts, or None for models that say
    nothing. `energy`: (n,) log-sum-exp of the scores before they were normalised, which tells what no breed fits.
    """

    predicted: Sequence[str | None]
    log_probs: np.ndarray | None = None
    answers: Sequence[str] | None = None
    energy: np.ndarray | None = None


class BrokenOff(CatlibError):
    """A classifier failed within a batch; `done` holds what it has found by then: row of the batch to (breed, answer)."""

    def __init__(self, message: str, done: Mapping[int, tuple[str | None, str]], exit_code: int = 1) -> None:
        super().__init__(message)
        self.done, self.exit_code = done, exit_code


class Classifier(ABC):
    """Photos in, a score per breed out: the tuned VLM, zero-shot CLIP, a linear probe, a served endpoint."""

    name: str
    breeds: tuple[str, ...]
    at_once = 2**20  # the most photos that the device's memory is known to take
    row_by_row = False  # True: no photo's result depends on its batch, so that none is ever computed again

    @abstractmethod
    def classify(self, images: Sequence[Image], ids: Sequence[str] | None = None) -> Batch:
        """Score a batch of upright RGB photos. `ids` lets an implementation look up cached features."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What goes into the sidecar, as far as it applies: base_model, adapter, weights, question, decoding, device, dtype."""

    def prepare(self, image: Image) -> Any:
        """What `classify` takes in place of a photo, made in a decoder's thread while the model works on the batch before."""
        return image

    def classify_in_memory(self, images: Sequence[Image], ids: Sequence[str] | None = None) -> Batch:
        """`classify`, of half as many photos at a time from when the device has run out of memory."""
        parts: list[Batch] = []
        while (start := sum(len(part.predicted) for part in parts)) < len(images):
            some = slice(start, start + self.at_once)
            try:
                parts.append(self.classify(images[some], None if ids is None else ids[some]))
                continue
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if (size := len(images[some])) == 1:
                    raise CatlibError(f"{self.name}: out of memory with a single photo ({error})") from error
            self.at_once = size // 2
            torch.cuda.empty_cache()
            log.warning("out of memory with %d photos in a batch: %d at a time from here", size, self.at_once)
        if len(parts) == 1:
            return parts[0]

        def together(arrays: list[Any]) -> np.ndarray | None:
            return None if any(one is None for one in arrays) else np.concatenate(arrays)

        answers = [part.answers for part in parts]
        return Batch(
            [breed for part in parts for breed in part.predicted],
            together([part.log_probs for part in parts]),
            None if any(one is None for one in answers) else [text for one in answers for text in one or ()],
            together([part.energy for part in parts]),
        )

    def store(self, folder: Path) -> None:
        """Write what was fitted to photos into `folder`; nothing for a classifier that fits nothing."""
        return None

    def from_log_probs(self, log_probs: np.ndarray, answers: Sequence[str] | None = None) -> Batch:
        """A batch that predicts the best-scored breed. Raises NotFinite."""
        for row in np.flatnonzero(~np.isfinite(log_probs).all(axis=1)):
            raise NotFinite(int(row))
        return Batch([self.breeds[i] for i in log_probs.argmax(axis=1)], log_probs, answers)

    def from_scores(self, scores: np.ndarray) -> Batch:
        """The same of scores (n, breeds) that are not normalised, with their energy. Raises NotFinite."""
        return replace(self.from_log_probs(log_softmax(scores, axis=1)), energy=logsumexp(scores, axis=1))


def about_model(model: torch.nn.Module, name: object, adapter: object = None) -> dict[str, Any]:
    """What a sidecar says about a model in memory; `name`: its folder or hub name."""
    parameter = next(model.parameters())
    return {
        "base_model": str(name),
        "adapter": str(adapter) if adapter else None,
        "weights": weights_digest(model),
        "device": parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }


def weights_digest(model: torch.nn.Module) -> str:
    """16 hex digits over names, shapes and evenly spaced values of all tensors; another dtype gives another digest.

    Predictions of a model that was trained again under the same name are told apart by it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or not tensor.numel():
            continue
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // SAMPLED)].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
