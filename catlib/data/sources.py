"""Where labelled photos come from: five layouts, detected from what is there, each turned into one list of files."""

import csv
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from catlib.data.audit import PHOTO_ENDINGS, Finding
from catlib.data.records import Sample
from catlib.data.source_jsonl import is_jsonl, read_jsonl_source
from catlib.errors import InputError

PARTS = {"train": "train", "training": "train", "trainval": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
CSV_BREED = ("breed", "primary_breed", "label")
CSV_FILE = ("image", "file", "filename", "path", "photo")


@dataclass(frozen=True)
class Source:
    """The files of one layout, not opened yet. `findings` are sorted by path."""

    name: str
    root: Path
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()  # listed photos that are not there
    samples: Mapping[str, Sample] = field(default_factory=dict)  # conversations that came with the photos, by image path


def read_source(photos: Path, source: str) -> Source:
    """The photos below the folder `photos` in the layout `source` (auto: the one that is found there).

    Raises InputError when the folder is missing or empty, or does not have the layout.
    """
    if not photos.exists():
        raise InputError(f"photos: {photos} does not exist; give a folder of labelled photos (breed folders, for example)")
    if photos.is_file() and not is_jsonl(photos):
        raise InputError(f"photos: {photos} is a file; give a folder, a .jsonl file, or the dataset's images.tar.gz")
    name = detect(photos) if source == "auto" else source
    readers = {
        "oxford-pets": _oxford, "petfinder": _petfinder, "folders": _folders, "demo": _demo, "llava-jsonl": _jsonl,
    }  # fmt: skip
    found = readers[name](photos)
    if not found.findings:
        raise InputError(
            f"photos: no photo found in {photos} in the layout {name!r}. Expected one of: breed folders with photos in them, "
            "with or without train/val/test above; images/<Breed>/ with data/cats.csv; the Oxford-IIIT Pet folders; LLaVA JSONL"
        )
    ordered = tuple(sorted(found.findings, key=lambda finding: finding.image))
    return Source(found.name, found.root, ordered, found.notes, found.missing, found.samples)


def detect(photos: Path) -> str:
    """The layout of a folder, from the files that only this layout has."""
    if is_jsonl(photos):
        return "llava-jsonl"
    if (photos / "annotations" / "list.txt").is_file():
        return "oxford-pets"
    if (photos / "labels.csv").is_file() and (photos / "images").is_dir():
        return "demo"
    if (photos / "images").is_dir() and _has_folders(photos / "images"):
        return "petfinder"
    return "folders"


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
    present = {entry.name for entry in os.scandir(photos / "images")} if (photos / "images").is_dir() else set()
    findings, missing = [], []
    for stem, part in listed.items():
        if f"{stem}.jpg" not in present:
            missing.append(stem)
            continue
        findings.append(Finding(f"images/{stem}.jpg", "", source_name=stem.rsplit("_", 1)[0], official=part))
    notes = ["cats only: species 1 of annotations/list.txt"]
    if missing:
        notes.append(f"{len(missing)} of {len(listed)} listed photos are not in {photos / 'images'}")
    if unlisted := len([n for n in present if n.endswith(".jpg")]) - len(findings):
        notes.append(f"{unlisted} photos in images/ are not listed as cats and were not looked at")
    return Source("oxford-pets", photos, tuple(findings), tuple(notes), tuple(sorted(missing)))


def _petfinder(photos: Path) -> Source:
    """`images/<Breed>/*`; `data/cats.csv`, where there is one, tells the breed of the photos that it names."""
    if not (photos / "images").is_dir():
        raise InputError(f"{photos / 'images'}: no such folder; the petfinder layout has breed folders in it")
    table = photos / "data" / "cats.csv"
    labels, notes = _cats_csv(table) if table.is_file() else ({}, [])
    findings, matched, disagree = [], set(), 0
    for folder, file in _files(photos / "images"):
        name = folder.parts[0] if folder.parts else ""
        keys = [key for key in (f"images/{(folder / file).as_posix()}", file, Path(file).stem, file.split("_")[0]) if key in labels]
        if keys:
            matched.add(keys[0])
            disagree += bool(name) and labels[keys[0]] != name
            name = name or labels[keys[0]]
        findings.append(_finding(f"images/{(folder / file).as_posix()}", name))
    if table.is_file():
        notes.append(f"data/cats.csv describes {len(matched)} of {len(findings)} photos, {disagree} under another breed than their folder")
    return Source("petfinder", photos, tuple(findings), tuple(notes))


def _cats_csv(table: Path) -> tuple[dict[str, str], list[str]]:
    """The breed of each photo or cat id of a Kaggle `cats.csv`; the folder's name outranks it."""
    with table.open(encoding="utf-8", errors="replace", newline="") as stream:
        rows = csv.DictReader(stream)
        columns = rows.fieldnames or []
        breed = next((c for c in CSV_BREED if c in columns), None)
        key = next((c for c in (*CSV_FILE, "id") if c in columns), None)
        if breed is None or key is None:
            return {}, [f"{table} has no columns for breed and photo ({', '.join(columns)}): not used"]
        return {row[key]: row[breed] for row in rows if row[key] and row[breed]}, []


def _folders(photos: Path) -> Source:
    """`<Breed>/*`, or `train/<Breed>/*`, `val/<Breed>/*`, `test/<Breed>/*`; deeper folders belong to their breed."""
    parts = [entry for entry in sorted(os.listdir(photos)) if entry.casefold() in PARTS and (photos / entry).is_dir()]
    if parts and not any(_has_folders(photos / entry) for entry in parts):
        parts = []  # a breed that happens to be called like a part
    findings = []
    for folder, file in _files(photos):
        steps = list(folder.parts)
        official = ""
        if parts:
            if not steps or steps[0] not in parts:
                continue
            official = PARTS[steps.pop(0).casefold()]
        if steps:
            findings.append(_finding((folder / file).as_posix(), steps[0], official))
    has_val = any(finding.official == "val" for finding in findings)
    if parts and not has_val:  # the validation part is carved from train, so train is not fixed
        findings = [Finding(f.image, "", verdict=f.verdict, detail=f.detail, source_name=f.source_name,
                            official="" if f.official == "train" else f.official) for f in findings]  # fmt: skip
    notes = (f"official parts kept: {', '.join(parts)}",) if parts else ()
    return Source("folders", photos, tuple(findings), notes)


def _demo(photos: Path) -> Source:
    """`labels.csv` with columns image, breed, split (train | test), as `catlib.data.demo` writes it."""
    table = photos / "labels.csv"
    try:
        with table.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        findings = [
            Finding(row["image"], "", source_name=row["breed"], official="test" if row["split"] == "test" else "") for row in rows
        ]
    except OSError as error:
        raise InputError(f"{table}: {error.strerror}") from None
    except KeyError as error:
        raise InputError(f"{table}: column {error} is missing; expected image, breed, split") from None
    return Source("demo", photos, tuple(findings), ("the test part was drawn apart and is kept",))


def _jsonl(photos: Path) -> Source:
    root, findings, samples, notes = read_jsonl_source(photos)
    return Source("llava-jsonl", root, tuple(findings), tuple(notes), samples=samples)


def _finding(image: str, name: str, official: str = "") -> Finding:
    if Path(image).suffix.lower() in PHOTO_ENDINGS:
        return Finding(image, "", source_name=name, official=official)
    return Finding(image, "", verdict="no photo ending", detail="not opened", source_name=name, official=official)


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() for entry in os.scandir(folder))


def _files(root: Path) -> Iterator[tuple[Path, str]]:
    """Folder (relative to the root) and name of every file below `root` but hidden ones; links to folders are followed.

    A linked folder that leads out of the root is entered, so that its photos appear in the audit as left out; one that
    leads to a folder above itself is not, or the walk would never end.
    """
    for folder, folders, files in os.walk(root, followlinks=True):
        here = Path(folder).resolve()
        folders[:] = sorted(
            name for name in folders
            if not name.startswith(".") and not ((link := Path(folder, name)).is_symlink() and here.is_relative_to(link.resolve()))
        )  # fmt: skip
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder).relative_to(root), name
