"""Photos that come with conversations: LLaVA-format JSONL, used as it is."""

import json
from pathlib import Path

from catlib.breeds import BREEDS
from catlib.data.findings import Finding, Source
from catlib.data.images import inside
from catlib.data.records import DATASET_CARD, PARTS, Sample, image_root_of, parse_sample
from catlib.errors import InputError
from catlib.files import read_jsonl
from catlib.parsing import BreedParser

_ANSWERS = BreedParser([breed.name for breed in BREEDS])


def is_jsonl(photos: Path) -> bool:
    """Whether this is a .jsonl file, or a folder with train.jsonl in it (or in its folder `vlm`)."""
    return photos.suffix == ".jsonl" if photos.is_file() else jsonl_folder(photos) is not None


def jsonl_folder(photos: Path) -> Path | None:
    """The folder that holds train.jsonl."""
    return next((folder for folder in (photos, photos / "vlm") if (folder / "train.jsonl").is_file()), None)


def read_jsonl_source(photos: Path) -> Source:
    """The photos and samples of a .jsonl file, or of a folder's three.

    A missing `metadata.breed` is taken from the answer, where its first sentence, or all of it, names one breed of the list.
    Raises InputError naming file, line and key.
    """
    folder = photos.parent if photos.is_file() else jsonl_folder(photos)
    if folder is None:
        raise InputError(f"{photos}: no train.jsonl in it, nor in its folder 'vlm'")
    paths = [path for part in PARTS if (path := folder / f"{part}.jsonl").is_file()] if photos.is_dir() else [photos]
    root = _root(paths[0])
    # with no validation file the validation photos come out of train, so train is not fixed then
    fixed_parts = PARTS if folder / "val.jsonl" in paths else ("val", "test")
    findings: list[Finding] = []
    samples: dict[str, Sample] = {}
    ids: dict[str, str] = {}
    for path in paths:
        fixed = path.stem if path.stem in fixed_parts else ""
        for number, row in read_jsonl(path):
            where = f"{path}:{number}"
            sample = parse_sample(_with_breed(row, where), where)
            try:
                inside(root, sample.image)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            if (first := ids.setdefault(sample.id, where)) != where:
                raise InputError(f"{where}: id {sample.id!r} stands already in {first}; ids are unique")
            if sample.image in samples:
                raise InputError(f"{where}: photo {sample.image!r} stands in two lines; one conversation a photo")
            samples[sample.image] = sample
            together = str(sample.metadata.get("group") or sample.animal)
            findings.append(Finding(sample.image, "", source_name=sample.breed, official=fixed, animal=together))
    if not findings:
        raise InputError(f"{paths[0]}: no samples in it")
    note = f"conversations taken from {', '.join(path.name for path in paths)} as they are"
    return Source("llava-jsonl", root, tuple(findings), (note,), samples=samples)


def _root(path: Path) -> Path:
    """The image root: the card's, else the first of the folder above (`data/` of `data/vlm`) and the folder itself that fits."""
    if (path.parent / DATASET_CARD).is_file():
        return image_root_of(path)
    _, first = next(read_jsonl(path), (0, {}))
    roots = (path.resolve().parent.parent, path.resolve().parent)
    return next((root for root in roots if (root / str(first.get("image"))).is_file()), image_root_of(path))


def _with_breed(row: dict, where: str) -> dict:
    metadata = row.get("metadata", {})
    if not isinstance(metadata, dict) or metadata.get("breed"):
        return row
    turns = row.get("conversations")
    last = turns[-1] if isinstance(turns, list) and turns else {}
    answer = last.get("value", "") if isinstance(last, dict) else ""
    breed = _ANSWERS.parse(str(answer).split(".")[0]) or _ANSWERS.parse(str(answer))  # reasons may name other breeds
    if breed is None:
        said = f"the answer {json.dumps(answer)[:60]} does not name one breed of the list"
        raise InputError(
            f"{where}: key 'metadata' has no 'breed', and {said}; add \"metadata\": {{\"breed\": …}} to the line"
        )
    return {**row, "metadata": {**metadata, "breed": breed}}
