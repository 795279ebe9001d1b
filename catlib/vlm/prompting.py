"""From question and photo to the model's inputs, and from a breed to the tokens that training taught as its answer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image

from catlib.errors import CatlibError
from catlib.vlm.models import VLM


def messages(question: str, answer: str | None = None, photo: bool = True) -> list[dict[str, Any]]:
    """Chat messages of one photo and a question, with the answer as the assistant's turn when it is given."""
    content = [{"type": "image"}] * photo + [{"type": "text", "text": question}]
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def prompt_text(processor: Any, question: str, photo: bool = True) -> str:
    """The prompt as the chat template writes it, up to where the answer begins; without its image when not `photo`."""
    return processor.apply_chat_template(messages(question, photo=photo), add_generation_prompt=True)


def answer_tokens(processor: Any, question: str, answer: str) -> list[int]:
    """The tokens of `answer` with the end token, as they follow the prompt in a training text.

    Prompt and answer are tokenized together, because a name gets other tokens after a colon or a space than alone.
    Raises CatlibError when the prompt's own tokens change by that: then no score of the answer alone is defined.
    """
    tokenizer = processor.tokenizer
    prompt = prompt_text(processor, question)
    text = processor.apply_chat_template(messages(question, answer), add_generation_prompt=False)
    if not text.startswith(prompt):
        raise CatlibError(
            f"the chat template writes another prompt before an answer: {text!r} does not begin with {prompt!r}"
        )
    before, whole = tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"]
    if whole[: len(before)] != before:
        raise CatlibError(f"the answer {answer!r} changes the prompt's last token: end the prompt where a token ends")
    tokens = whole[len(before) :]
    if tokenizer.eos_token_id in tokens:
        return tokens[: tokens.index(tokenizer.eos_token_id) + 1]
    return [*tokens, tokenizer.eos_token_id]


def label_tokens(processor: Any, question: str, breed: str, spelled: Mapping[str, str] | None = None) -> list[int]:
    """The tokens that stand for a breed in scoring: its name and the end token.

    `spelled` holds, for breeds whose answers are longer than the name, the text that settles the breed (`Manx.`); it is
    scored without an end token when it ends with a full stop, as further sentences may follow.
    """
    text = (spelled or {}).get(breed, breed)
    tokens = answer_tokens(processor, question, text)
    return tokens[:-1] if text != breed and text.endswith(".") else tokens


def inference_inputs(vlm: VLM, images: Sequence[Image] | None, questions: Sequence[str]) -> dict[str, torch.Tensor]:
    """Model inputs for a batch of photos with a question each, on the model's device, padded on the left.

    Left, so that every row ends where its answer begins. `images` None: the questions alone, without a photo.
    """
    text = [prompt_text(vlm.processor, question, photo=images is not None) for question in questions]
    if images is None:
        inputs = vlm.processor.tokenizer(text, padding=True, padding_side="left", return_tensors="pt")
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    else:
        inputs = vlm.processor(
            images=[[image] for image in images], text=text, padding=True, padding_side="left", return_tensors="pt"
        )
    return {k: v.to(vlm.device, vlm.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
