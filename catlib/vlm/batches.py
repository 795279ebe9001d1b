"""From samples to training tensors: the chat template's own text, only the answer and its end token supervised."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from catlib.data.images import inside, open_image
from catlib.data.records import Sample
from catlib.errors import CatlibError
from catlib.vlm.families import image_token_of
from catlib.vlm.features import FrozenFeatures, PhotoFeatures, compute_features
from catlib.vlm.models import VLM
from catlib.vlm.prompting import answer_tokens, prompt_text

IGNORED = -100  # torch's ignore_index: no loss here


@dataclass(frozen=True)
class Batch:
    """Samples side by side, padded on the right, so that nothing real ever attends to padding.

    `input_ids`, `attention_mask`, `labels`: (rows, length); labels are IGNORED everywhere but at the answer and its end
    token. `features`: (image tokens of all rows, width) of the frozen tower, in the order of the image tokens in `input_ids`;
    None when the tower has to run, on the processor's tensors in `pixels`.
    """

    sample_ids: tuple[str, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor | None
    pixels: Mapping[str, torch.Tensor] | None

    def to(self, device: torch.device) -> "Batch":
        def move(value: torch.Tensor) -> torch.Tensor:
            return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)

        return Batch(
            self.sample_ids,
            move(self.input_ids),
            move(self.attention_mask),
            move(self.labels),
            None if self.features is None else move(self.features),
            None if self.pixels is None else {name: move(value) for name, value in self.pixels.items()},
        )


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
        self.vlm, self.image_root, self.features, self.augment = vlm, image_root, features, augment
        self.processor, self.image_token = vlm.processor, image_token_of(vlm.base.config)
        pad = vlm.processor.tokenizer.pad_token_id
        self.pad = 0 if pad is None else pad
        self._texts: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self._workers = ThreadPoolExecutor(workers, "photos") if workers else None
        self._coming: dict[str, Future[tuple[list[int], dict[str, torch.Tensor]]]] = {}
        self._reading = threading.Lock()  # a tokenizer serves one thread at a time

    def prefetch(self, samples: Sequence[Sample]) -> None:
        """Begin to decode, change and resize the photos of samples that will be asked for next; not where features are cached."""
        if self._workers is None or (self.features is not None and self.augment is None):
            return
        for sample in samples:
            if sample.id not in self._coming:  # a photo drawn twice is made ready for its first turn
                self._coming[sample.id] = self._workers.submit(self._photo, sample)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """A batch of samples. Raises CatlibError or InputError naming what is wrong with a photo or the template."""
        if self.features is not None and self.augment is None:
            found = self._features(self.features, samples)
            blocks = [one.block.tolist() for one in found]
            features, pixels = torch.cat([one.vectors for one in found]), None
        else:
            photos = [
                self._coming.pop(sample.id).result() if sample.id in self._coming else self._photo(sample)
                for sample in samples
            ]
            blocks, features, pixels = [block for block, _ in photos], None, _join([inputs for _, inputs in photos])
        rows, answers = [], []
        for sample, block in zip(samples, blocks, strict=True):
            prompt, answer = self._text(sample.question, sample.answer)
            rows.append(self._expand(prompt, block) + answer)
            answers.append(len(answer))
        shape = len(rows), max(map(len, rows))
        ids, mask, labels = (
            torch.full(shape, self.pad),
            torch.zeros(shape, dtype=torch.long),
            torch.full(shape, IGNORED),
        )
        for i, (row, n) in enumerate(zip(rows, answers, strict=True)):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
            labels[i, len(row) - n : len(row)] = ids[i, len(row) - n : len(row)]
        for name in self.vlm.family.along_text:
            if pixels is not None and name in self.processor.model_input_names:
                pixels[name] = (ids == self.image_token).long()
        return Batch(tuple(s.id for s in samples), ids, mask, labels, features, pixels)

    def answer_ids(self, sample: Sample) -> list[int]:
        """What is supervised of a sample: its answer's tokens and the end token."""
        return self._text(sample.question, sample.answer)[1]

    def prompt_ids(self, question: str, photo: PhotoFeatures) -> list[int]:
        """The prompt's tokens up to where the answer begins, the photo's in place."""
        prompt = self.processor.tokenizer(prompt_text(self.processor, question))["input_ids"]
        return self._expand(prompt, photo.block.tolist())

    def _expand(self, prompt: list[int], block: list[int]) -> list[int]:
        at = prompt.index(self.image_token)
        return [*prompt[:at], *block, *prompt[at + 1 :]]

    def _text(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """(prompt with one placeholder for the photo, answer with end token)."""
        key = (question, answer)
        if key not in self._texts:
            with self._reading:
                prompt = self.processor.tokenizer(prompt_text(self.processor, question))["input_ids"]
                answer_ids = answer_tokens(self.processor, question, answer)
            if len(answer_ids) < 2:
                raise CatlibError(f"the answer {answer!r} has no token of its own: nothing would be learned from it")
            if prompt.count(self.image_token) != 1:
                raise CatlibError(
                    f"the prompt holds {prompt.count(self.image_token)} image placeholders in place of one"
                )
            self._texts[key] = (prompt, answer_ids)
        return self._texts[key]

    def _features(self, cache: FrozenFeatures, samples: Sequence[Sample]) -> list[PhotoFeatures]:
        found = {i: one for i, s in enumerate(samples) if (one := cache.get(s.metadata["sha256"])) is not None}
        if missing := [i for i in range(len(samples)) if i not in found]:
            images = [open_image(inside(self.image_root, samples[i].image)) for i in missing]
            for i, computed in zip(missing, compute_features(self.vlm, images), strict=True):
                found[i] = replace(computed, vectors=computed.vectors.cpu())
        return [found[i] for i in range(len(samples))]

    def _photo(self, sample: Sample) -> tuple[list[int], dict[str, torch.Tensor]]:
        """What the processor makes of a photo: the tokens that replace the placeholder, and the tower's inputs."""
        image = open_image(inside(self.image_root, sample.image))
        if self.augment is not None:
            image = self.augment(image, sample.id)
        with self._reading:
            text = prompt_text(self.processor, sample.question)
            encoded = dict(self.processor(images=[image], text=text, return_tensors="pt"))
            plain = self.processor.tokenizer(text)["input_ids"]
        ids = encoded.pop("input_ids")[0].tolist()
        first = plain.index(self.image_token) if self.image_token in plain else 0
        block = ids[first : first + len(ids) - len(plain) + 1]
        if plain[:first] + block + plain[first + 1 :] != ids or self.image_token not in block:
            raise CatlibError("the processor changes the prompt beyond the photo's tokens; this model is not supported")
        along = (1, len(ids))  # what runs along the tokens is made anew for the whole text
        inputs = {k: v for k, v in encoded.items() if isinstance(v, torch.Tensor) and tuple(v.shape[:2]) != along}
        return block, inputs


def check_batch(vlm: VLM, batch: Batch) -> None:
    """Raise CatlibError unless each row supervises an answer up to the end token and holds the image tokens the model fills.

    A tokenizer that does not fit the model masks everything and trains on nothing, with a loss of 0.
    """
    end, token = vlm.processor.tokenizer.eos_token_id, image_token_of(vlm.base.config)
    for row, sample in enumerate(batch.sample_ids):
        supervised = batch.labels[row][batch.labels[row] != IGNORED]
        if len(supervised) < 2 or supervised[-1] != end:
            raise CatlibError(
                f"sample {sample!r}: its answer and end token are not supervised; does the tokenizer fit the model?"
            )
        if not (batch.input_ids[row] == token).any():
            raise CatlibError(f"sample {sample!r}: no image tokens in its text")
    found = int((batch.input_ids == token).sum())
    if batch.features is not None and found != len(batch.features):
        raise CatlibError(
            f"{found} image tokens, but the tower gives {len(batch.features)} vectors for {batch.sample_ids}"
        )


def segments(batch: Batch, row: int, processor: Any, image_token: int) -> list[tuple[str, str]]:
    """A row as text in order, each part with its role: `prompt`, `image` or `answer` (what is supervised)."""
    parts: list[tuple[str, list[int]]] = []
    n = int(batch.attention_mask[row].sum())
    for token, label in zip(batch.input_ids[row, :n].tolist(), batch.labels[row, :n].tolist(), strict=True):
        role = "answer" if label != IGNORED else "image" if token == image_token else "prompt"
        if not parts or parts[-1][0] != role:
            parts.append((role, []))
        parts[-1][1].append(token)
    decode = processor.tokenizer.decode
    return [(f"[{len(t)} image tokens]" if role == "image" else decode(t), role) for role, t in parts]


def _join(inputs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Concatenate each tensor over the photos; smaller ones (fewer tiles, smaller photos) are filled up with zeros."""
    joined = {}
    for name in inputs[0]:
        tensors = [one[name] for one in inputs]
        if tensors[0].dim() > 1:
            shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
            tensors = [_fill(t, shape) for t in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def _fill(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    if list(tensor.shape[1:]) == list(shape):
        return tensor
    filled = tensor.new_zeros(len(tensor), *shape)
    filled[tuple(slice(n) for n in tensor.shape)] = tensor
    return filled
