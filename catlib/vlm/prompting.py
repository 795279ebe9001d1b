"""From question and photo to the model's inputs, and from a breed to the tokens that training taught as its answer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from catlib.errors import CatlibError
from catlib.vlm.families import ALONG_TEXT, PROMPT_ENDS
from catlib.vlm.models import VLM


def messages(question: str, answer: str | None = None, photo: bool = True) -> list[dict[str, Any]]:
    """Chat messages of one photo and a question, with the answer as the assistant's turn when it is given."""
    asked = {"role": "user", "content": [{"type": "image"}] * photo + [{"type": "text", "text": question}]}
    given = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return [asked] if answer is None else [asked, given]


def prompt_text(processor: Any, question: str, photo: bool = True) -> str:
    """The prompt as the chat template writes it, up to where the answer begins; without its image when not `photo`."""
    return processor.apply_chat_template(messages(question, photo=photo), add_generation_prompt=True)


def special_tokens(processor: Any, text: str) -> dict[str, bool]:
    """The tokenizer's option for a rendered text: no second BOS where the template wrote one, as in the processor's own templates."""
    bos = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if bos and text.startswith(bos) else {}


def text_tokens(processor: Any, text: str) -> list[int]:
    """The tokens of a rendered text, a photo's placeholder unexpanded."""
    return processor.tokenizer(text, **special_tokens(processor, text))["input_ids"]


def known_ends(vlm: VLM) -> list[int]:
    """The tokens that end generation: the tokenizer's EOS and those of the model's generation configuration."""
    named = getattr(getattr(vlm.base, "generation_config", None), "eos_token_id", None)
    ends = [vlm.processor.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return [end for end in dict.fromkeys(ends) if end is not None]


def end_tokens(vlm: VLM) -> list[int]:
    """Where an answer ends: first the token that ends a label, then the others that stop the model."""
    known = known_ends(vlm)
    return list(dict.fromkeys([_training_text(vlm.processor, vlm.question, "cat", known)[2], *known]))


def answer_tokens(processor: Any, question: str, answer: str, ends: Sequence[int] = ()) -> list[int]:
    """The tokens of `answer` with the end token, as they follow the prompt in a training text.

    `ends` (see `known_ends`; by default the tokenizer's EOS) tells which token that the template writes behind the answer ends
    the turn; where it writes none of them it is the last of the first special tokens there (`<|im_end|>`), and where it
    writes no special token at all the EOS is appended. White space around the end token is no part of the answer.

    Prompt and answer are tokenized together, because a name gets other tokens after a colon or a space than alone.
    Raises CatlibError when the prompt's own tokens change by that: then no score of the answer alone is defined.
    """
    prompt, text, end = _training_text(processor, question, answer, ends)
    if not text.startswith(prompt):
        raise CatlibError(f"the chat template writes another prompt before an answer: {text!r}, not {prompt!r}")
    before, whole = text_tokens(processor, prompt), text_tokens(processor, text)
    if whole[: len(before)] != before:
        raise CatlibError(f"the answer {answer!r} changes the prompt's last token: end the prompt where a token ends")
    return [*whole[len(before) :], end]


def _training_text(processor: Any, question: str, answer: str, ends: Sequence[int]) -> tuple[str, str, int]:
    """The prompt, prompt and answer up to the token that ends the answer as the chat template writes them, and that token."""
    tokenizer, answer, prompt = processor.tokenizer, answer.strip(), prompt_text(processor, question)
    text = processor.apply_chat_template(messages(question, answer), add_generation_prompt=False)
    start = text.find(answer, len(prompt) if text.startswith(prompt) else 0)
    if start < 0:
        raise CatlibError(f"the chat template changes the answer {answer!r}: {text!r}")
    text, rest, eos = text[: start + len(answer)], text[start + len(answer) :], tokenizer.eos_token_id
    known = {tokenizer.convert_ids_to_tokens(end) for end in (ends or [eos]) if end is not None} - {None}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    either = "|".join(map(re.escape, sorted(known | special, key=len, reverse=True)))
    if either and (found := re.match(rf"(.*?)((?:{either})+)", rest, re.DOTALL)):
        run = re.findall(either, found[2])
        last = next((i for i, token in enumerate(run) if token in known), len(run) - 1)
        return prompt, text + found[1].rstrip() + "".join(run[:last]), tokenizer.convert_tokens_to_ids(run[last])
    if eos is None:
        raise CatlibError("neither the chat template nor the tokenizer has a token that ends an answer")
    return prompt, text + rest.rstrip(), eos


def label_tokens(vlm: VLM, question: str, breed: str, spelled: Mapping[str, str] | None = None) -> list[int]:
    """The tokens that stand for a breed in scoring: its name and the end token.

    `spelled` holds, for breeds whose answers are longer than the name, the text that settles the breed (`Manx.`); it is
    scored without an end token when it ends with a full stop, as further sentences may follow.
    """
    text = (spelled or {}).get(breed, breed)
    tokens = answer_tokens(vlm.processor, question, text, known_ends(vlm))
    return tokens[:-1] if text != breed and text.endswith(".") else tokens


def continued(vlm: VLM, inputs: Mapping[str, Any], answer: Sequence[int] | torch.Tensor) -> dict[str, Any]:
    """A processor's inputs, rows that end where an answer begins, with the answer's tokens (n,) or (rows, n) appended.
    What runs along the text goes on as it stands at the prompt's end, or as the family says.
    """
    ids, own = inputs["input_ids"], vlm.family.answer_along
    tails = {"input_ids": torch.as_tensor(answer, device=ids.device).expand(len(ids), -1)}
    for name in set(ALONG_TEXT) & set(inputs):
        last = inputs[name][:, -1:]
        last = torch.full_like(last, own[name]) if name in own else last
        tails[name] = last.expand(-1, tails["input_ids"].shape[1], *last.shape[2:])
    return {**inputs, **{name: torch.cat([inputs[name], tail], dim=1) for name, tail in tails.items()}}


def model_inputs(processor: Any, images: Sequence[Image], text: Sequence[str]) -> dict[str, torch.Tensor]:
    """What the processor makes of photos with a rendered prompt each, padded on the left. Raises CatlibError for a
    tensor of which it is not known whether it runs along the text.
    """
    end = PROMPT_ENDS.get(type(processor).__name__, "")
    encoded = processor(
        images=[[image] for image in images],
        text=[prompt.removesuffix(end) for prompt in text],
        padding=True,
        padding_side="left",
        return_tensors="pt",
        **special_tokens(processor, text[0]),
    )
    encoded.pop("labels", None)  # of the prompt
    known = {"input_ids", *ALONG_TEXT, *processor.image_processor.model_input_names}
    if unknown := sorted(set(encoded) - known):
        gives = f"{type(processor).__name__} gives {', '.join(unknown)}"
        raise CatlibError(f"{gives}, and whether that runs along the text is not known; this model is not supported")
    return {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor)}


@dataclass(frozen=True)
class Prepared:
    """A photo with a question as a processor has made it: one row of a model's inputs, on the CPU."""

    question: str
    inputs: Mapping[str, torch.Tensor]


def prepared(processor: Any, image: Image, question: str) -> Prepared:
    """A photo made ready for `inference_inputs`. A processor serves one thread at a time."""
    return Prepared(question, model_inputs(processor, [image], [prompt_text(processor, question)]))


def join(inputs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Concatenate each tensor over the photos; smaller ones (fewer tiles, smaller photos) are filled up with zeros."""
    joined = {}
    for name in inputs[0]:
        tensors = [one[name] for one in inputs]
        most = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        joined[name] = tensors[0].new_zeros(sum(map(len, tensors)), *most)
        start = 0
        for tensor in tensors:
            end = start + len(tensor)
            joined[name][(slice(start, end), *map(slice, tensor.shape[1:]))] = tensor
            start = end
    return joined


def _join_rows(rows: Sequence[Mapping[str, torch.Tensor]], pad: int) -> dict[str, torch.Tensor]:
    """`join`, with what runs along the text padded on the left."""
    length = max(row["input_ids"].shape[1] for row in rows)
    filled = []
    for row in rows:
        along = {name: x for name, x in row.items() if name in ("input_ids", *ALONG_TEXT)}
        missing = length - row["input_ids"].shape[1]
        for name, x in along.items():
            before = x.new_full((1, missing, *x.shape[2:]), pad if name == "input_ids" else 0)
            along[name] = torch.cat([before, x], dim=1)
        filled.append({**row, **along})
    return join(filled)


def inference_inputs(
    vlm: VLM, images: Sequence[Image | Prepared] | None, questions: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Model inputs for photos with a question each (`images` None: without a photo), on the model's device, padded on
    the left, so that every row ends where its answer begins. Photos that are `prepared` have to be so for these questions.
    """
    ready = [image for image in images or () if isinstance(image, Prepared)]
    if ready and [photo.question for photo in ready] != list(questions):
        raise CatlibError("photos were prepared for other questions than they are asked")
    if ready:
        inputs = _join_rows([photo.inputs for photo in ready], vlm.processor.tokenizer.pad_token_id or 0)
    elif images is None:
        text = [prompt_text(vlm.processor, question, photo=False) for question in questions]
        special = special_tokens(vlm.processor, text[0])
        inputs = vlm.processor.tokenizer(text, padding=True, padding_side="left", return_tensors="pt", **special)
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    else:
        text = [prompt_text(vlm.processor, question) for question in questions]
        inputs = model_inputs(vlm.processor, images, text)  # type: ignore[arg-type]
    return {k: v.to(vlm.device, vlm.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
