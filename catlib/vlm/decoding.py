"""Answers by generation: freely, as the plan does, or held to the breeds' names by a token trie."""

from collections.abc import Mapping, Sequence

import torch
from PIL.Image import Image

from catlib.vlm.models import VLM
from catlib.vlm.prompting import inference_inputs, label_tokens

MAX_NEW_TOKENS = 50  # the plan's


@torch.inference_mode()
def generate_free(vlm: VLM, images: Sequence[Image], question: str, max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
    """Greedy answers, one a photo. Only new tokens are decoded: nothing of the prompt can be taken for an answer."""
    inputs = inference_inputs(vlm, images, [question] * len(images))
    output = vlm.base.generate(**inputs, **greedy_options(vlm, max_new_tokens))
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in vlm.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


@torch.inference_mode()
def generate_constrained(
    vlm: VLM, images: Sequence[Image], question: str, breeds: Sequence[str], spelled: Mapping[str, str] | None = None
) -> list[str]:
    """The breed that greedy generation spells, one a photo, when each step may only go on with a name of the list.

    `spelled` as in `label_tokens`. Greedy choices are made token by token: the result need not be the breed with the highest whole-name likelihood.
    """
    end = vlm.processor.tokenizer.eos_token_id
    labels = {tuple(label_tokens(vlm.processor, question, breed, spelled)): breed for breed in breeds}
    allowed: dict[tuple[int, ...], list[int]] = {}
    for label in labels:
        for n in range(len(label)):
            following = allowed.setdefault(label[:n], [])
            if label[n] not in following:
                following.append(label[n])
    inputs = inference_inputs(vlm, images, [question] * len(images))
    length = inputs["input_ids"].shape[1]

    def allow(_: int, tokens: torch.Tensor) -> list[int]:
        return allowed.get(tuple(tokens[length:].tolist()), [end])  # a finished row goes on with end tokens

    longest = max(map(len, labels))
    output = vlm.base.generate(**inputs, prefix_allowed_tokens_fn=allow, **greedy_options(vlm, longest))
    rows = [tuple(row) for row in output[:, length:].tolist()]
    return [next(labels[row[:n]] for n in range(1, longest + 1) if row[:n] in labels) for row in rows]


def greedy_options(vlm: VLM, max_new_tokens: int = MAX_NEW_TOKENS) -> dict[str, int | bool | float | None]:
    """Options that switch sampling off, whatever the checkpoint's generation_config.json proposes."""
    tokenizer = vlm.processor.tokenizer
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "repetition_penalty": 1.0,
        "eos_token_id": end,
        "pad_token_id": pad,
    }
