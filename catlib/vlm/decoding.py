"""Answers by generation: freely, as the plan does, or held to the breeds' names by a token trie."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from transformers import GenerationConfig

from catlib.vlm.models import VLM, Checkpoint
from catlib.vlm.prompting import end_tokens, inference_inputs, label_tokens

MAX_NEW_TOKENS = 50  # the plan's
MOST_NEW_TOKENS = 512


@torch.inference_mode()
def generate_free(vlm: VLM, images: Sequence[Image], question: str, max_new_tokens: int = 0) -> list[str]:
    """Greedy answers, one a photo, of at most `max_new_tokens` (0: `answer_limit`). Only new tokens are decoded: nothing of the
    prompt can be taken for an answer."""
    inputs = inference_inputs(vlm, images, [question] * len(images))
    output = generate_greedy(vlm, inputs, max_new_tokens or answer_limit(vlm.checkpoint))
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in vlm.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def answer_limit(checkpoint: Checkpoint) -> int:
    """The plan's 50 new tokens, or as many as the longest answer of the training had, where that gave reasons."""
    longest = checkpoint.training.get("answer_tokens")
    return max(MAX_NEW_TOKENS, min(longest, MOST_NEW_TOKENS)) if type(longest) is int else MAX_NEW_TOKENS


@torch.inference_mode()
def generate_constrained(
    vlm: VLM, images: Sequence[Image], question: str, breeds: Sequence[str], spelled: Mapping[str, str] | None = None
) -> list[str]:
    """The breed that greedy generation spells, one a photo, when each step may only go on with a name of the list.

    `spelled` as in `label_tokens`. Greedy choices are made token by token: the result need not be the likeliest whole name.
    """
    end = end_tokens(vlm)[0]
    labels = {tuple(label_tokens(vlm, question, breed, spelled)): breed for breed in breeds}
    allowed: dict[tuple[int, ...], dict[int, None]] = {}
    for label in labels:
        for n, token in enumerate(label):
            allowed.setdefault(label[:n], {})[token] = None
    inputs = inference_inputs(vlm, images, [question] * len(images))
    length = inputs["input_ids"].shape[1]

    def allow(_: int, tokens: torch.Tensor) -> list[int]:
        return list(allowed.get(tuple(tokens[length:].tolist()), [end]))  # a finished row goes on with end tokens

    longest = max(map(len, labels))
    output = generate_greedy(vlm, {**inputs, "prefix_allowed_tokens_fn": allow}, longest)
    rows = map(tuple, output[:, length:].tolist())
    return [next(labels[row[:n]] for n in range(1, longest + 1) if row[:n] in labels) for row in rows]


def generate_greedy(vlm: VLM, inputs: Mapping[str, Any], max_new_tokens: int = MAX_NEW_TOKENS, **more: Any) -> Any:
    """What `generate` gives, greedy up to any end token. `more`: settings of its configuration, which is a fresh one.

    `generate` fills what is left open from the model's own, and a folder's generation_config.json may hold a least
    length, biases, several answers or stop strings, so the model is shown without it.
    """
    ends, pad = end_tokens(vlm), vlm.processor.tokenizer.pad_token_id
    ending = {"eos_token_id": ends, "pad_token_id": ends[0] if pad is None else pad}
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, **ending, **more)
    bare = copy.copy(vlm.base)  # shares weights and hooks; the folder's own configuration is not touched
    bare.generation_config = config
    return bare.generate(**inputs, generation_config=config)
