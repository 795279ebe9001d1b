"""Where labelled photos come from: four layouts, detected from what is there, each turned into one list of files."""

import os
import re
from dataclasses import replace
from pathlib import Path

from catlib.data.dataset import read_card
from catlib.data.findings import NO_BREED, Finding, Source, found_file
from catlib.data.llava import one_question, plain_row, read_rows, slashed, without_photo
from catlib.data.petfinder import read_petfinder
from catlib.data.records import DATASET_CARD, PARTS, Sample, image_root_of, parse_sample
from catlib.data.walk import has_folders, is_photo, walk
from catlib.errors import InputError

FOLDERS = {"train": "train", "training": "train", "trainval": "train"}
FOLDERS |= {"val": "val", "valid": "val", "validation": "val", "test": "test"}
JSON = (".jsonl", ".json")
EXPECTED = (
    "Expected one of: breed folders with photos in them, with or without train/val/test above; images/<Breed>/ with data/cats.csv; "
    "the Oxford-IIIT Pet folders; LLaVA JSONL"
)


def read_source(photos: Path, source: str) -> Source:
    """The photos below the folder `photos` in the layout `source` (auto: the one that is found there). Raises
    InputError when there is no photo in it, or it does not have the layout."""
    if photos.is_file() and photos.suffix not in JSON:
        raise InputError(f"photos: {photos} is a file; give a folder, a .jsonl file, or the dataset's images.tar.gz")
    name = detect(photos) if source == "auto" else source
    readers = {"oxford-pets": _oxford, "petfinder": read_petfinder, "folders": _folders, "llava-jsonl": _jsonl}
    found = readers[name](photos)
    if not found.findings:
        raise InputError(f"photos: no photo found in {photos} in the layout {name!r}. {EXPECTED}")
    if all(f.verdict == NO_BREED for f in found.findings):
        example = f"(see {found.findings[0].image}); make one folder for each breed"
        raise InputError(f"photos: no photo in {photos} lies in a breed's folder {example}")
    return replace(found, findings=tuple(sorted(found.findings, key=lambda f: f.image)))


def detect(photos: Path) -> str:
    """The layout of a folder, from the files that only this layout has."""
    if photos.is_file() or (_jsonl_folder(photos) and not _holds_its_split(photos)):
        return "llava-jsonl"
    if (photos / "annotations" / "list.txt").is_file():
        return "oxford-pets"
    return "petfinder" if (photos / "images").is_dir() and has_folders(photos / "images") else "folders"


def _holds_its_split(photos: Path) -> bool:
    """Whether `photos`/vlm is the split that catlib has made from the photos in `photos`; the photos may have changed since."""
    made = photos / "vlm"
    if _jsonl_folder(photos) != made or not (made / DATASET_CARD).is_file():
        return False
    root = image_root_of(made / "train.jsonl")  # of photos behind links it is a folder above
    return photos.resolve().is_relative_to(root) and read_card(made).get("source") != "llava-jsonl"


def _oxford(photos: Path) -> Source:
    """`images/Breed_Name_12.jpg`, `annotations/{list,trainval,test}.txt`: image, class, species (1 = cat), breed number."""
    listed: dict[str, str] = {}
    for file, part in (("list.txt", ""), ("trainval.txt", ""), ("test.txt", "test")):
        path = photos / "annotations" / file
        if not path.is_file():
            if file == "list.txt":
                raise InputError(f"{path}: no such file; the Oxford-IIIT Pet layout has it")
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            words = line.split()
            if not words or line.startswith("#"):
                continue
            if len(words) != 4 or words[2] not in ("1", "2") or not re.search(r"._\d+$", words[0]):
                raise InputError(f"{path}:{number}: expected 'Breed_Name_12 class species breed', found {line[:80]!r}")
            if words[2] == "1":
                listed[words[0]] = part or listed.get(words[0], "")
    folder = photos / "images"
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    findings = [
        Finding(f"images/{stem}.jpg", "", source_name=stem.rsplit("_", 1)[0], official=part)
        for stem, part in listed.items()
        if f"{stem}.jpg" in present
    ]
    missing = sorted(stem for stem in listed if f"{stem}.jpg" not in present)
    notes = ["cats only: species 1 of annotations/list.txt"]
    if missing:
        some = ", ".join(missing[:3]) + (" and more (all are named in dataset.json)" if len(missing) > 3 else "")
        notes.append(f"{len(missing):,} of {len(listed):,} listed photos are not in {folder}: {some}")
        if "test" in listed.values() and not any(f.official for f in findings):
            notes.append("of the official test part no photo is there, so the test part is drawn from the other photos")
    if unlisted := len([n for n in present if n.endswith(".jpg") and not n.startswith(".")]) - len(findings):
        notes.append(f"{unlisted:,} photos in images/ are not listed as cats and were not looked at")
    return Source("oxford-pets", photos, tuple(findings), tuple(notes), tuple(missing))


def _folders(photos: Path) -> Source:
    """`<Breed>/*`, or `train/<Breed>/*`, `val/<Breed>/*`, `test/<Breed>/*`; deeper folders belong to their breed."""
    parts = [entry for entry in sorted(os.listdir(photos)) if entry.casefold() in FOLDERS and (photos / entry).is_dir()]
    if parts and not any(has_folders(photos / entry) for entry in parts):
        parts = []  # a breed that happens to be called like a part
    findings = []
    for folder, file in walk(photos):
        steps, official = list(folder.parts), ""
        if parts:
            official = FOLDERS[steps[0].casefold()] if steps and steps[0] in parts else ""
            steps = steps[1:] if official else []
        if steps or is_photo(file):  # a README beside the breed folders is no matter
            findings.append(found_file((folder / file).as_posix(), steps[0] if steps else "", official))
    if not any(f.official == "val" for f in findings):  # validation is carved from train, so train is not fixed
        findings = [replace(f, official="") if f.official == "train" else f for f in findings]
    notes = (f"official parts kept: {', '.join(parts)}",) if parts else ()
    return Source("folders", photos, tuple(findings), notes)


def _jsonl(photos: Path) -> Source:
    """The photos and samples of one LLaVA file, or of a folder's three; lines without a photo are left out, and that is said."""
    folder = _jsonl_folder(photos)
    if folder is None and not photos.is_file():
        raise InputError(f"{photos}: no train.jsonl in it, nor in its folder 'vlm'")
    paths = [path for part in PARTS if (path := _part(folder, part))] if folder else [photos]
    root = _root(paths[0])
    # with no validation file the validation photos come out of train, so train is not fixed then
    fixed_parts = PARTS if any(path.stem == "val" for path in paths) else ("val", "test")
    findings, samples, ids = [], dict[str, Sample](), dict[str, str]()
    texts, longer = [], []
    for fixed, (where, row) in ((path.stem, entry) for path in paths for entry in read_rows(path)):
        if without_photo(row):
            texts.append(where)
            continue
        asked = one_question(plain := plain_row(row, where), where)
        longer += [where] * (asked.get("conversations") != plain.get("conversations"))
        sample = parse_sample(asked, where, ids, root)
        if samples.setdefault(sample.image, sample) is not sample:
            raise InputError(f"{where}: photo {sample.image!r} stands in two lines; one conversation a photo")
        part, together = fixed if fixed in fixed_parts else "", str(sample.metadata.get("group") or sample.animal)
        findings.append(Finding(sample.image, "", source_name=sample.breed, official=part, animal=together))
    if not findings:
        raise InputError(f"{paths[0]}: no samples in it" + " that name a photo by the key 'image'" * bool(texts))
    notes = [f"conversations taken from {', '.join(path.name for path in paths)} as they are"]
    if texts:
        notes.append(f"{len(texts):,} lines without a photo are left out, the first is {texts[0]}")
    if longer:
        used = "only the question about the breed is used"
        notes.append(f"of {len(longer):,} longer conversations {used}; first {longer[0]}")
    return Source("llava-jsonl", root, tuple(findings), tuple(notes), samples=samples)


def _jsonl_folder(photos: Path) -> Path | None:
    """The folder that holds train.jsonl or train.json: this one or its folder `vlm`."""
    return next((folder for folder in (photos, photos / "vlm") if _part(folder, "train")), None)


def _part(folder: Path, part: str) -> Path | None:
    return next((path for ending in JSON if (path := folder / f"{part}{ending}").is_file()), None)


def _root(path: Path) -> Path:
    """The image root: the card's, else the first of the folder above (`data/` of `data/vlm`) and the folder itself that fits."""
    if (path.parent / DATASET_CARD).is_file():
        return image_root_of(path)
    image = next((row["image"] for where, raw in read_rows(path) if (row := plain_row(raw, where)).get("image")), "")
    roots = (path.resolve().parent.parent, path.resolve().parent)
    return next((root for root in roots if (root / slashed(root, str(image))).is_file()), image_root_of(path))
