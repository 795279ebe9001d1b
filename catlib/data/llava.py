"""The forms in which LLaVA conversations come, brought to catlib's own: a photo, a question, an answer a line.

What can be read in one way only is read. For the rest the error names the line and how to convert it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from catlib.breeds import BREEDS
from catlib.errors import InputError
from catlib.files import parse_json, read_jsonl
from catlib.parsing import BreedParser

IMAGE_TOKEN = "<image>"
SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
KEEP_ONE = "leave the one question about the breed and its answer in the line"
_DECODER, _SPACE = json.JSONDecoder(), re.compile(r"[\s,]*")
_PLACED = re.compile(r"[A-Za-z]:[\\/]|[a-z]+://")  # a Windows drive or a web address


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`FILE:LINE` and object of each sample of a JSONL file or of a JSON list. Raises InputError naming file and line."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            is_list = stream.read(4096).lstrip().startswith("[")
    except (OSError, UnicodeDecodeError):
        is_list = False  # read_jsonl says why
    if not is_list:
        yield from ((f"{path}:{number}", row) for number, row in read_jsonl(path))
        return
    text = path.read_text(encoding="utf-8-sig")
    end = text.index("[") + 1
    line = 1 + text.count("\n", 0, end)
    for row in parse_json(text, str(path), list):
        start = _SPACE.match(text, end).end()  # type: ignore[union-attr]  # it matches nothing, too
        line += text.count("\n", end, start)
        if not isinstance(row, dict):
            raise InputError(f"{path}:{line}: expected a JSON object, found {type(row).__name__}")
        yield f"{path}:{line}", row
        end = _DECODER.raw_decode(text, start)[1]
        line += text.count("\n", start, end)


def plain_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A sample's object with its names and types as catlib writes them; nothing that it says is lost. Numbers as ids, a
    list of one photo, `messages` with roles, and a photo that no turn places (it stands first) are understood. Raises
    InputError for several photos, and for a photo that is no relative path."""
    row = dict(row)
    if isinstance(row.get("id"), int) and not isinstance(row["id"], bool):
        row["id"] = str(row["id"])
    image = row.get("image", row.get("images"))
    if isinstance(image, list):
        if len(image) != 1:
            raise InputError(f"{where}: key 'image' lists {len(image)} photos; write a line for each photo")
        image = image[0]
    if isinstance(image, str):
        row = {"id": image, **row, "image": image}
        if _PLACED.match(image):
            there = "is no path below the image root: copy the photo there and name it"
            raise InputError(f"{where}: image {image!r} {there}")
    turns = row.get("conversations", row.get("messages"))
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        row["conversations"] = turns = [_turn(turn) for turn in turns]
        asked = next((turn for turn in turns if turn["from"] == "human"), None)
        if isinstance(image, str) and asked and not any(IMAGE_TOKEN in str(turn["value"]) for turn in turns):
            asked["value"] = f"{IMAGE_TOKEN}\n{asked['value']}"
    return row


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    said, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if isinstance(value, list) and all(isinstance(piece, dict) for piece in value):
        pieces = (IMAGE_TOKEN if piece.get("type") == "image" else str(piece.get("text", "")) for piece in value)
        value = "\n".join(pieces)
    more = {key: kept for key, kept in turn.items() if key not in ("role", "content")}
    return {**more, "from": SPEAKERS.get(said, said) if isinstance(said, str) else said, "value": value}


def without_photo(row: Mapping[str, Any]) -> bool:
    """Whether a sample's object is a conversation about no photo, as LLaVA's own data mix has them."""
    turns = row.get("conversations", row.get("messages"))
    return bool(turns) and not row.get("image", row.get("images")) and IMAGE_TOKEN not in json.dumps(turns)


def one_question(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The object with its breed, and of a longer conversation the one question whose answer names the breed. A missing
    `metadata.breed` is taken from the answers, each of which may name one breed of the list, in its first sentence or
    as a whole. Raises InputError when they name none or several."""
    metadata, turns = row.get("metadata", {}), row.get("conversations")
    if not isinstance(metadata, dict) or not isinstance(turns, list):
        return row  # parse_sample names what is wrong
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        return row
    known, speakers = metadata.get("breed"), [turn.get("from") for turn in turns]
    turns = turns[speakers[:1] == ["system"] :]
    pairs = list(zip(turns[::2], turns[1::2], strict=False))
    if not turns or [turn["from"] for turn in turns] != ["human", "gpt"] * len(pairs):
        return row
    if known and len(pairs) == 1:
        return {**row, "conversations": turns}
    named = [(pair, _breed_in(pair[1]["value"], known)) for pair in pairs]
    named = [(pair, breed) for pair, breed in named if breed and breed == (known or breed)]
    breeds = sorted({breed for _, breed in named if breed})
    if len(breeds) > 1:
        raise InputError(f"{where}: its answers name {' and '.join(breeds)}; {KEEP_ONE}")
    if not breeds and known:
        raise InputError(f"{where}: none of its {len(pairs)} answers names the breed {known!r}; {KEEP_ONE}")
    if not breeds:
        said = ", ".join(json.dumps(answer["value"], ensure_ascii=False)[:60] for _, answer in pairs[:3])
        lacks = f"key 'metadata' has no 'breed', and none of its {len(pairs)} answers names one breed ({said})"
        raise InputError(f'{where}: {lacks}; add "metadata": {{"breed": …}} to the line')
    (human, gpt), breed = named[0]
    if len(pairs) > 1:
        if sum(turn["value"].count(IMAGE_TOKEN) for turn in turns) > 1:
            twice = f"the conversation holds {IMAGE_TOKEN} more than once; write a line for each photo"
            raise InputError(f"{where}: {twice}")
        human = {"from": "human", "value": f"{IMAGE_TOKEN}\n{human['value'].replace(IMAGE_TOKEN, '').strip()}"}
    return {**row, "conversations": [human, gpt], "metadata": {**metadata, "breed": breed}}


def _breed_in(answer: str, known: str | None) -> str | None:
    parser = _parser(known)
    return parser.parse(answer.split(".")[0]) or parser.parse(answer)  # reasons may name other breeds


@cache
def _parser(known: str | None) -> BreedParser:
    names = [breed.name for breed in BREEDS]
    return BreedParser(names if known is None or known in names else [*names, known])


def slashed(root: Path, image: str) -> str:
    """The image path with `/` where it was written on Windows; a name that holds a backslash and is there stays."""
    return image.replace("\\", "/") if "\\" in image and not (root / image).is_file() else image
