"""What llama.cpp's converter has to find beside the weights, so that a prompt becomes the same tokens there as here."""

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as proto

from catlib.errors import CatlibError
from catlib.files import read_json, write_bytes, write_json

MARK = "\u0001"  # stands for the question and the answer while a template is taken apart
# piece types of sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE, BPE = 1, 2, 3, 4, 6, 2
MARKER_END = "__>"  # llama-server puts the photo's place into a text as <__media_…__>


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is a SentencePiece BPE (Llama, Mistral v1–v3): bytes for what is unknown, "▁" for spaces."""
    model = tokenizer["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def write_sentencepiece(folder: Path) -> None:
    """tokenizer.model from tokenizer.json. transformers 5 writes none, and without it the converter gives every piece the
    same score, so that llama.cpp merges in another order.

    A piece's score is minus the rank of its first merge, which is what the order of merges was made from.
    """
    tokenizer = read_json(folder / "tokenizer.json")
    model, added = tokenizer["model"], {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    by_id = {i: piece for piece, i in model["vocab"].items()} | {i: entry["content"] for i, entry in added.items()}
    if sorted(by_id) != list(range(len(by_id))):
        raise CatlibError(f"{folder}: the tokenizer's ids have gaps; they cannot be written as a SentencePiece model")
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
    pieces = proto.ModelProto()
    pieces.trainer_spec.model_type = BPE
    pieces.trainer_spec.byte_fallback = True
    pieces.normalizer_spec.name = "identity"
    pieces.normalizer_spec.add_dummy_prefix = False
    pieces.normalizer_spec.remove_extra_whitespaces = False
    for i, text in sorted(by_id.items()):
        score = -float(ranks.get(text, len(ranks)))  # single letters are merged into nothing
        if text == model.get("unk_token"):
            kind = UNKNOWN
        elif i in added:
            kind = CONTROL if added[i]["special"] else USER_DEFINED
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = BYTE
        else:
            kind = NORMAL
        pieces.pieces.add(piece=text, score=score, type=kind)
    write_bytes(folder / "tokenizer.model", pieces.SerializeToString())


def name_added_tokens(folder: Path, prefix_space: bool | None) -> None:
    """Put into tokenizer_config.json what the converter reads there and transformers 5 leaves out: the added tokens with
    their types, and whether a text gets a space in front (llama.cpp would put one behind the photo, too).
    """
    added = read_json(folder / "tokenizer.json")["added_tokens"]
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    config["added_tokens_decoder"] = {str(e["id"]): {"content": e["content"], "special": e["special"]} for e in added}
    if prefix_space is not None:
        config["add_prefix_space"] = prefix_space
    write_json(path, config)


def string_template(processor: Any, prefix: str = "") -> str:
    """The processor's chat template for contents that are texts: llama-server joins photo and question to one text itself.

    `prefix` goes in front of a conversation. Raises CatlibError when the template cannot be taken apart that way.
    """
    image = getattr(processor, "image_token", "<image>")
    question, answer = f"{MARK}question{MARK}", f"{MARK}answer{MARK}"
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}

    def render(turns: list[dict[str, Any]], generate: bool) -> str:
        return processor.apply_chat_template(turns, add_generation_prompt=generate)

    asked, prompted, whole = render([user], False), render([user], True), render([user, reply], False)
    before, found, rest = asked.partition(image)
    between, known, after = rest.partition(question)
    body, there, end = whole.removeprefix(asked).partition(answer)
    if not (found and known and there and prompted.startswith(asked) and whole.startswith(asked)) or between.strip():
        raise CatlibError(f"the chat template cannot be written for llama.cpp: it renders {whole!r}")
    place = "message['content']"
    if (
        between
    ):  # whatever the server itself puts between photo and question is replaced by what the template puts there
        bare = f"{place} | replace({json.dumps(MARKER_END + between)}, {json.dumps(MARKER_END)})"
        place = f"{bare} | replace({json.dumps(MARKER_END)}, {json.dumps(MARKER_END + between)})"
    generation = prompted.removeprefix(asked)
    return (
        f"{_text(prefix)}{{% for message in messages %}}"
        f"{{% if message['role'] == 'user' %}}{_text(before)}{{{{ {place} }}}}{_text(after)}"
        f"{{% elif message['role'] == 'assistant' %}}{_text(body)}{{{{ message['content'] }}}}{_text(end)}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{_text(generation)}{{% endif %}}"
    )


def _text(text: str) -> str:
    """A literal in a template; as an expression, because template engines trim white space around statements."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
