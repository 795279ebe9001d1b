"""The two file formats that connect the rooms: samples (LLaVA conversations) and predictions, both JSONL."""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from sys import intern
from typing import Any

from catlib.data.images import inside
from catlib.data.llava import IMAGE_TOKEN, plain_row, read_rows, slashed, without_photo
from catlib.errors import InputError
from catlib.files import read_json, read_jsonl, write_text

CONVERT = "convert the file by `catlib data FILE --out DIR`"
PARTS = ("train", "val", "test")
SCORES_EQUAL = 1e-4  # relative: the higher of two scores may be written as the lower one (five significant digits)
DATASET_CARD = "dataset.json"  # beside the JSONL files: image root, breeds, priority breeds, split settings


@dataclass(frozen=True)
class Sample:
    """One line of train/val/test.jsonl: a photo and a conversation in LLaVA's format, with the breed as metadata."""

    id: str
    image: str  # relative to the image root
    conversations: tuple[Mapping[str, str], ...]  # {from: human, value: "<image>\n…"}, {from: gpt, value: …}
    metadata: Mapping[str, Any]  # breed, source, sha256, split, group

    @property
    def breed(self) -> str:
        return self.metadata["breed"]

    @property
    def animal(self) -> str:
        """The id of the photo's cat, where its source has one; else empty."""
        about = self.metadata.get("cat")
        return str(about.get("id") or "") if isinstance(about, dict) else ""

    @property
    def group(self) -> str:
        """The same for photos that are not independent (one cat, near-duplicates); a photo without one is its own group."""
        return str(self.metadata.get("group") or self.metadata.get("sha256") or self.id)

    @property
    def question(self) -> str:
        """The text of the human turn without the image placeholder."""
        return self.conversations[0]["value"].replace(IMAGE_TOKEN, "").strip()

    @property
    def answer(self) -> str:
        """The text of the model's turn: what training supervises."""
        return self.conversations[1]["value"]


def make_sample(id: str, image: str, question: str, answer: str, **metadata: Any) -> Sample:
    """A sample with one question about one photo. `metadata`: breed, source, sha256, split, and what more is known of it."""
    turns = ({"from": "human", "value": f"{IMAGE_TOKEN}\n{question}"}, {"from": "gpt", "value": answer})
    return Sample(id, image, turns, metadata)


def read_samples(path: Path, image_root: Path | None = None) -> list[Sample]:
    """Read and validate a JSONL file of samples. With `image_root`, each image path must stay inside it and exist.
    Raises InputError naming file, line and key."""
    card = path.parent / DATASET_CARD
    if not path.is_file() and card.is_file() and (reason := read_json(card).get("absent", {}).get(path.stem)):
        raise InputError(f"{path}: {reason}")
    samples, ids = [], dict[str, str]()
    for where, row in read_rows(path):
        sample = parse_sample(row, where, ids, image_root)
        there = image_root is None or (image_root / sample.image).is_file()
        _need(there, where, f"photo {sample.image!r} is not below the image root {image_root}")
        samples.append(sample)
    _need(samples, path, "no samples in it")
    return samples


def parse_sample(row: Mapping[str, Any], where: str, ids: dict[str, str], image_root: Path | None) -> Sample:
    """A sample from a JSON object; with `image_root`, its photo's path as it stands there. `ids`: where each id stands,
    its own from now on. Raises InputError naming `where` and the key."""
    row = plain_row(row, where)
    _need(not without_photo(row), where, f"no photo in it; {CONVERT}, which leaves such lines out")
    for key, kind, name in (("id", str, "text"), ("image", str, "text"), ("conversations", list, "list")):
        _need(isinstance(row.get(key), kind), where, f"key {key!r} is missing or no {name}")
    turns = row["conversations"]
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    wanted = f"key 'conversations' must be one human turn and one gpt turn, found {speakers}; {CONVERT}"
    _need(speakers == ["human", "gpt"], where, wanted)
    human, gpt = (turn.get("value") for turn in turns)
    both = all(isinstance(value, str) and value.strip() for value in (human, gpt))
    _need(both, where, "key 'conversations': each turn needs a non-empty text 'value'")
    _need(human.count(IMAGE_TOKEN) == 1, where, f"the human turn must hold {IMAGE_TOKEN} exactly once")
    _need(IMAGE_TOKEN not in gpt, where, f"the gpt turn holds {IMAGE_TOKEN}; only the human turn may")
    metadata = row.get("metadata", {})
    breed = metadata.get("breed") if isinstance(metadata, dict) else None
    _need(isinstance(breed, str) and breed.strip(), where, "key 'metadata' must be an object with a text 'breed'")
    first = ids.setdefault(row["id"], where)
    _need(first == where, where, f"id {row['id']!r} stands already in {first}; ids are unique")
    image = row["image"]
    if image_root is not None:
        image = slashed(image_root, image)
        try:
            inside(image_root, image)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    return Sample(row["id"], image, tuple(turns), metadata)


def sample_line(sample: Sample) -> str:
    """A sample as a line of JSONL: LLaVA's keys, which catlib reads, and the same turns as `prompt` and `completion`,
    which TRL's collator for vision-language data reads; its loss then falls on the answer only."""
    prompt = [{"role": "user", "content": sample.question}]
    completion = [{"role": "assistant", "content": sample.answer}]
    return json.dumps({**asdict(sample), "prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n"


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write samples as JSONL, whole or not at all."""
    write_text(path, "".join(map(sample_line, samples)))


def image_root_of(jsonl: Path) -> Path:
    """The folder that a JSONL file's image paths are relative to: as its dataset card says, else `data/` of `data/vlm/x.jsonl`."""
    card = jsonl.parent / DATASET_CARD
    if card.is_file() and (named := read_json(card).get("image_root")):
        return (jsonl.parent / str(named)).resolve()
    return jsonl.resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Prediction:
    """One line of predictions/MODEL.jsonl: what a model said about one photo."""

    id: str
    image: str
    breed: str | None  # the true breed; None where it is not known (catlib predict on unlabelled photos)
    group: str | None = field(default=None, kw_only=True)  # the sample's; None in files that do not say it
    predicted: str | None  # a breed of the list; None when the answer named none, which counts as wrong
    scores: Sequence[float] | None  # log-probabilities over the sidecar's breeds: exp(scores) sums to 1
    answer: str | None = None  # raw text, where the model produced text
    latency_ms: float | None = None  # the photo's share of its batch's wall time
    energy: float | None = None  # log-sum-exp of the scores before they were normalised


@dataclass(frozen=True)
class PredictionSet:
    """Predictions of one model with their sidecar. `meta["breeds"]` gives the order of the scores."""

    name: str
    predictions: tuple[Prediction, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()  # what a reader of figures from this file has to know

    @property
    def breeds(self) -> tuple[str, ...]:
        return tuple(self.meta["breeds"])


def prediction_line(prediction: Prediction) -> str:
    """A prediction as a line of JSONL."""
    row = asdict(prediction)
    if prediction.scores is not None:
        row["scores"] = [float(f"{s:.5g}") for s in prediction.scores]
    if prediction.latency_ms is not None:
        row["latency_ms"] = round(prediction.latency_ms, 3)
    if row["energy"] is None:
        del row["energy"]
    return json.dumps(row, ensure_ascii=False) + "\n"


def meta_path(predictions: Path) -> Path:
    """The sidecar of a predictions file: MODEL.jsonl → MODEL.meta.json."""
    return predictions.with_suffix(".meta.json")


def read_predictions(path: Path) -> PredictionSet:
    """Read and validate a predictions file and its sidecar. Raises InputError naming file, line and key."""
    sidecar = meta_path(path)
    _need(path.is_file(), path, "no such predictions file")
    unknown = f"its sidecar {sidecar.name} is missing; without it the order of the scores is unknown"
    _need(sidecar.is_file(), path, unknown)
    meta = read_json(sidecar)
    breeds = meta.get("breeds")
    listed = isinstance(breeds, list) and breeds and all(isinstance(breed, str) for breed in breeds)
    _need(listed, sidecar, "not a sidecar with a list 'breeds' of texts")
    if twice := [breed for breed, count in Counter(breeds).items() if count > 1]:
        raise InputError(f"{sidecar}: 'breeds' names {twice[0]!r} twice; each score belongs to one breed")
    for key in ("latency_single_ms", "images_per_second"):
        found = meta.get(key)
        values = found.values() if isinstance(found, dict) else found if isinstance(found, list) else [found]
        _need(all(map(_is_time, values)), sidecar, f"key {key!r} holds something that is no number of at least 0")
    rows: dict[str, Prediction] = {}
    place = {breed: i for i, breed in enumerate(breeds)}
    for number, row in read_jsonl(path):
        prediction = _parse_prediction(row, breeds, place, f"{path}:{number}")
        if rows.setdefault(prediction.id, prediction) is not prediction:
            raise InputError(f"{path}:{number}: id {prediction.id!r} stands twice; each photo is predicted once")
    remarks, n = [], f"of {len(rows):,} predictions"
    if alone := sum(prediction.group is None for prediction in rows.values()):
        remarks.append(f"{alone:,} {n} name no group: each such photo counts as independent")
    if copies := len(rows) - len({prediction.image or prediction.id for prediction in rows.values()}):
        remarks.append(f"{copies:,} {n} are of a photo that another id stands for: one group each")
    return PredictionSet(path.stem, tuple(rows.values()), meta, tuple(remarks))


_TEXT, _NUMBERS = {str, type(None)}, {int, float}


def _parse_prediction(row: Mapping[str, Any], breeds: Sequence[str], place: dict[str, int], where: str) -> Prediction:
    """A line's prediction; `place`: of each breed its number. Called 126,000 times a file, so texts are made only of what is wrong."""
    get, scores, given = row.get, row.get("scores"), None
    id, predicted, latency, energy = get("id"), get("predicted"), get("latency_ms"), get("energy")
    if type(id) is not str:
        raise InputError(f"{where}: key 'id' is missing or no text")
    for key in ("image", "breed", "group", "answer"):
        if type(get(key)) not in _TEXT:
            raise InputError(f"{where}: key {key!r} is no text")
    if predicted is not None and (type(predicted) is not str or predicted not in place):
        raise InputError(f"{where}: predicted breed {predicted!r} is not among the sidecar's breeds")
    if scores is not None:
        if type(scores) is not list or len(scores) != len(breeds):
            raise InputError(
                f"{where}: key 'scores' must hold {len(breeds)} numbers, one for each of the sidecar's breeds"
            )
        if not (_NUMBERS.issuperset(map(type, scores)) and abs(sum(scores)) < 1e300):
            raise InputError(f"{where}: key 'scores' holds something that is no number")
        if predicted is not None:
            said, best = scores[place[predicted]], max(scores)
            if best - said > SCORES_EQUAL * max(1.0, abs(best)):
                raise InputError(
                    f"{where}: predicted breed {predicted!r} has the score {said:.6g}, and {breeds[scores.index(best)]!r} "
                    f"the highest, {best:.6g}: one of them is wrong, or the sidecar's breeds stand in another order"
                )
        given = array("f", scores)  # of 126,000 photos with 67 scores 43 MB, as a tuple 270
    if not _is_time(latency):
        raise InputError(f"{where}: key 'latency_ms' is no time: a number of at least 0")
    if energy is not None and type(energy) is not float:
        raise InputError(f"{where}: key 'energy' is no number with a decimal point")
    # Texts that the files of several models have in common are in memory once.
    image, breed, group = (intern(text) if (text := get(key)) else text for key in ("image", "breed", "group"))
    predicted = predicted and intern(predicted)
    return Prediction(intern(id), image or "", breed, predicted, given, get("answer"), latency, energy, group=group)


def _is_time(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300)


def _need(holds: object, where: object, problem: str) -> None:
    if not holds:
        raise InputError(f"{where}: {problem}")
