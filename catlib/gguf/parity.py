"""Does an engine say what this process says? Greedy answers and the log-probabilities of their tokens, photo by photo."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from catlib.classifiers.endpoint import EndpointClassifier, EndpointError
from catlib.errors import InputError
from catlib.vlm.decoding import generate_greedy
from catlib.vlm.models import VLM
from catlib.vlm.prompting import inference_inputs


@dataclass(frozen=True)
class Spoken:
    """A greedy answer. `logprobs`: of each token that was written, nats; `lead`: the smallest distance, in nats, between the
    token that was written and the next best one, where it is known: how near the answer is to another one.
    """

    text: str
    logprobs: tuple[float, ...]
    lead: float | None = None


@dataclass(frozen=True)
class Parity:
    """Two engines on the same photos. `largest_difference`: of a token's log-probability in answers that are the same."""

    photos: int
    same: int
    largest_difference: float
    differing: tuple[str, ...]
    largest_lead: float  # of the first engine, among the photos that differ

    def within(self, limit: float) -> bool:
        """Whether the answers are the same up to differences of `limit` nats."""
        return self.largest_difference <= limit and self.largest_lead <= limit

    def __str__(self) -> str:
        lines = [f"same answer for {self.same} of {self.photos} photos"]
        if self.same:
            lines[0] += f", log-probabilities of their tokens within {self.largest_difference:.2g} nats"
        return "\n".join([*lines, *(f"  {line}" for line in self.differing)])


class Speaker(EndpointClassifier):
    """A served model that is asked for the log-probabilities, too."""

    def speak(self, image: Image) -> Spoken:
        """The answer about a photo. Raises EndpointError when the server gives no log-probabilities."""
        reply = self._send("POST", "/chat/completions", {**self.request(image), "logprobs": True}, threading.Event())
        choice = reply["choices"][0]
        tokens = (choice.get("logprobs") or {}).get("content")
        if tokens is None:
            raise EndpointError(f"{self.url}: no log-probabilities in its reply")
        return Spoken((choice["message"]["content"] or "").strip(), tuple(float(t["logprob"]) for t in tokens))


@torch.inference_mode()
def speak_here(vlm: VLM, image: Image, question: str) -> Spoken:
    """The answer of the model in this process, generated as `catlib.vlm.decoding.generate_free` does."""
    inputs = inference_inputs(vlm, [image], [question])
    output = generate_greedy(vlm, inputs, return_dict_in_generate=True, output_logits=True)
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    scores = torch.stack([step[0].float().log_softmax(-1) for step in output.logits])
    best = scores.topk(2, dim=-1).values
    written = scores.gather(-1, new[:, None])[:, 0]
    text = vlm.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    return Spoken(text, tuple(written.tolist()), float((best[:, 0] - best[:, 1]).min()))


def compare_spoken(here: Sequence[Spoken], there: Sequence[Spoken], names: Sequence[str]) -> Parity:
    """Agreement of `there` with `here`; what differs is listed. Raises InputError when the numbers of answers differ."""
    if not len(here) == len(there) == len(names):
        raise InputError(f"{len(here)} answers against {len(there)} for {len(names)} photos")
    largest, differing, leads = 0.0, [], [0.0]
    for a, b, name in zip(here, there, names, strict=True):
        if a.text == b.text:
            pairs = zip(a.logprobs, b.logprobs, strict=False)  # an engine may leave the end token out
            largest = max([largest, *(abs(x - y) for x, y in pairs)])
        else:
            leads.append(float("inf") if a.lead is None else a.lead)
            differing.append(f"{name}: {a.text!r} against {b.text!r}, the first leading by {leads[-1]:.2g} nats")
    return Parity(len(names), len(names) - len(differing), largest, tuple(differing), max(leads))


@contextmanager
def class_token_last(vlm: VLM) -> Iterator[None]:
    """While open, a LLaVA with CLIP's tower sees as llama.cpp builds do that put the class token behind the patches.

    llama.cpp issue 25814: each patch gets the position of its left neighbour, the class token the last one; then the first
    row is dropped as if it were the class token's. So the first patch is lost and the class token is read as a patch.
    """
    embeddings: Any = vlm.tower.get_submodule("embeddings")
    positions = embeddings.position_embedding.weight

    def rearrange(_: torch.nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
        tokens = output - positions
        return torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1) + positions

    with embeddings.register_forward_hook(rearrange):
        yield
