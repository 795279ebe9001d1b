"""From samples to training tensors: the chat template's own text, only the answer and its end token supervised."""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch.nn.utils.rnn import pad_sequence

from catlib.data.images import inside, open_image
from catlib.data.records import Sample
from catlib.errors import CatlibError
from catlib.vlm import prompting
from catlib.vlm.families import image_token_of
from catlib.vlm.features import FrozenFeatures, PhotoFeatures, compute_features
from catlib.vlm.models import VLM

IGNORED = -100  # torch's ignore_index: no loss here


@dataclass(frozen=True)
class Batch:
    """Samples side by side, padded on the right, so that nothing real ever attends to padding.

    `input_ids`, `attention_mask`, `labels`: (rows, length); labels are IGNORED everywhere but at the answer and its end
    token. `features`: (image tokens of all rows, width) of the frozen tower, in their order; None when the tower has to
    run, on the processor's tensors in `pixels`. `answer_at`, `image_at`: positions of supervised and image tokens in
    the flattened rows, worked out before the batch moves to a GPU, which need not be waited for then.
    """

    sample_ids: tuple[str, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor | None
    pixels: Mapping[str, torch.Tensor] | None
    answer_at: torch.Tensor | None = None
    image_at: torch.Tensor | None = None
    padded: bool = True

    def to(self, device: torch.device) -> "Batch":
        def move(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: move(one) for name, one in value.items()}
            if not isinstance(value, torch.Tensor):
                return value
            return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)

        return Batch(*map(move, vars(self).values()))


class Collator:
    """Samples to a batch. Nothing is ever truncated: a photo alone may be 576 tokens.

    With `features` a photo is read from the cache, and goes through the frozen tower only when it is not there. `augment`
    changes (image, sample id) to an image. `workers` threads make photos ready that are announced by `prefetch`.
    """

    def __init__(
        self,
        vlm: VLM,
        image_root: Path,
        features: FrozenFeatures | None = None,
        augment: Callable[[Image, str], Image] | None = None,
        workers: int = 0,
    ) -> None:
        self.vlm, self.image_root, self.augment = vlm, image_root, augment
        self.features = features if augment is None else None
        self.image_token = image_token_of(vlm.base.config)
        self.pad = vlm.processor.tokenizer.pad_token_id or 0
        self.ends = prompting.known_ends(vlm)
        self._prompts: dict[str, list[int]] = {}
        self._answers: dict[tuple[str, str], list[int]] = {}
        self._coming: dict[str, Future[dict[str, torch.Tensor]]] = {}
        self._thread = thread = threading.local()  # a tokenizer serves one thread at a time: each has its own processor
        own = [copy.deepcopy(vlm.processor) for _ in range(workers)]

        def give() -> None:  # a worker holds this as long as it lives: it must not name `self`, nor the model with it
            thread.processor = own.pop()

        self._workers = ThreadPoolExecutor(workers, "photos", initializer=give) if workers else None

    @property
    def processor(self) -> Any:
        """The one of this thread."""
        return getattr(self._thread, "processor", self.vlm.processor)

    def prefetch(self, samples: Sequence[Sample]) -> None:
        """Begin to decode, change and resize the photos of samples that will be asked for next; not where features are cached."""
        if self._workers is None or self.features is not None:
            return
        for sample in samples:
            if sample.id not in self._coming:  # a photo drawn twice is made ready for its first turn
                self._coming[sample.id] = self._workers.submit(self._photo, sample)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """A batch of samples. Raises CatlibError or InputError naming what is wrong with a photo or the template."""
        if self.features is not None:
            found = self._features(self.features, samples)
            pairs = zip(samples, found, strict=True)
            rows = [torch.tensor(self.prompt_ids(s.question, one) + self.answer_ids(s)) for s, one in pairs]
            features, pixels = torch.cat([one.vectors.cpu() for one in found]), None
        else:
            ready = self._coming
            photos = [ready.pop(s.id).result() if s.id in ready else self._photo(s) for s in samples]
            rows = [inputs.pop("input_ids")[0] for inputs in photos]
            features, pixels = None, prompting.join(photos)
        ids = pad_sequence(rows, True, self.pad)
        mask = pad_sequence([torch.ones_like(row) for row in rows], True)
        labels = torch.full_like(ids, IGNORED)
        for label, row, sample in zip(labels, rows, samples, strict=True):
            answer = slice(len(row) - len(self.answer_ids(sample)), len(row))
            label[answer] = row[answer]
        at, images = answer_positions(labels), (ids == self.image_token).flatten().nonzero()[:, 0]
        padded = not bool(mask.all())
        return Batch(tuple(s.id for s in samples), ids, mask, labels, features, pixels, at, images, padded)

    def answer_ids(self, sample: Sample) -> list[int]:
        """What is supervised of a sample: its answer's tokens and the end token."""
        key = sample.question, sample.answer
        if key not in self._answers:
            tokens = prompting.answer_tokens(self.processor, *key, self.ends)
            if len(tokens) < 2:
                raise CatlibError(f"the answer {key[1]!r} has no token of its own: nothing would be learned from it")
            self._answers[key] = tokens
        return self._answers[key]

    def prompt_ids(self, question: str, photo: PhotoFeatures) -> list[int]:
        """The prompt's tokens up to where the answer begins, the photo's in the place of its placeholder."""
        if question not in self._prompts:
            self._prompts[question] = prompting.text_tokens(
                self.processor, prompting.prompt_text(self.processor, question)
            )
        prompt = self._prompts[question]
        if (count := prompt.count(self.image_token)) != 1:
            raise CatlibError(f"the prompt holds {count} image placeholders in place of one")
        at = prompt.index(self.image_token)
        block = photo.block[: len(photo.block) // self.vlm.checkpoint.image_pool**2].tolist()
        return [*prompt[:at], *block, *prompt[at + 1 :]]

    def _features(self, cache: FrozenFeatures, samples: Sequence[Sample]) -> list[PhotoFeatures]:
        found = [cache.get(sample.metadata["sha256"]) for sample in samples]
        paths = [inside(self.image_root, s.image) for s, one in zip(samples, found, strict=True) if one is None]
        computed = iter(compute_features(self.vlm, list(map(open_image, paths))) if paths else ())
        return [next(computed) if one is None else one for one in found]

    def _photo(self, sample: Sample) -> dict[str, torch.Tensor]:
        """What the processor makes of photo and question, the answer's tokens appended."""
        image = open_image(inside(self.image_root, sample.image))
        if self.augment is not None:
            image = self.augment(image, sample.id)
        inputs = prompting.model_inputs(
            self.processor, [image], [prompting.prompt_text(self.processor, sample.question)]
        )
        inputs = prompting.continued(self.vlm, inputs, self.answer_ids(sample))
        del inputs["attention_mask"]  # made anew for the whole batch
        return inputs


def answer_positions(labels: torch.Tensor) -> torch.Tensor:
    """Positions of the supervised tokens in the flattened rows; a row's first token is predicted from nothing."""
    supervised = labels != IGNORED
    supervised[:, 0] = False
    return supervised.flatten().nonzero()[:, 0]


def check_batch(vlm: VLM, batch: Batch) -> None:
    """Raise CatlibError unless each row supervises an answer up to the end token and holds the image tokens the model fills.

    A tokenizer that does not fit the model masks everything and trains on nothing, with a loss of 0.
    """
    ends, images = prompting.end_tokens(vlm), batch.input_ids == image_token_of(vlm.base.config)
    for sample, labels, photo in zip(batch.sample_ids, batch.labels, images, strict=True):
        supervised = labels[labels != IGNORED]
        if len(supervised) < 2 or supervised[-1] not in ends:
            why = "its answer and end token are not supervised; does the tokenizer fit the model?"
            raise CatlibError(f"sample {sample!r}: {why}")
        if not photo.any():
            raise CatlibError(f"sample {sample!r}: no image tokens in its text")
    count = int(images.sum()) * vlm.checkpoint.image_pool**2
    if batch.features is not None and count != len(batch.features):
        raise CatlibError(
            f"image tokens for {count} vectors, but {len(batch.features)} vectors of the tower for {batch.sample_ids}"
        )


def segments(batch: Batch, row: int, processor: Any, image_token: int) -> list[tuple[str, str]]:
    """A row as text in order, each part with its role: `prompt`, `image` or `answer` (what is supervised)."""
    n = int(batch.attention_mask[row].sum())
    pairs = list(zip(batch.input_ids[row, :n].tolist(), batch.labels[row, :n].tolist(), strict=True))

    def role(pair: tuple[int, int]) -> str:
        return "answer" if pair[1] != IGNORED else "image" if pair[0] == image_token else "prompt"

    parts = [(kind, [token for token, _ in part]) for kind, part in groupby(pairs, role)]
    decode = processor.tokenizer.decode
    return [(f"[{len(t)} image tokens]" if kind == "image" else decode(t), kind) for kind, t in parts]
