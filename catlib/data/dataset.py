"""A finished split on disk: three JSONL files, the card that describes them and the table of groups, always of one run."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catlib.data.findings import Finding, table
from catlib.data.records import DATASET_CARD, PARTS, Sample, image_root_of, read_samples, sample_line
from catlib.errors import InputError
from catlib.files import digest_of, locked, read_csv, read_json, remove_leftovers, write_text

GROUPS = "groups.csv"  # every photo of the split with its hashes and group: what `catlib data check` goes by
GROUP_COLUMNS = ("image", "breed", "part", "verdict", "group", "sha256", "phash")


@dataclass(frozen=True)
class Dataset:
    """A split, read back and validated."""

    image_root: Path
    breeds: tuple[str, ...]
    priority_breeds: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    card: Mapping[str, Any]

    def part(self, name: str) -> tuple[Sample, ...]:
        """The samples of `train`, `val` or `test`."""
        return getattr(self, name)


def load_dataset(vlm_dir: Path) -> Dataset:
    """Read the split in a folder; its photos must exist inside the image root. A folder of LLaVA-format JSONL without a
    card is read too: its breeds are those of its samples. There may be no test part. Raises InputError naming file,
    line and key, also when the files are not those that the card was written with."""
    if not (vlm_dir / "train.jsonl").is_file():
        raise InputError(f"{vlm_dir}: no train.jsonl in it; make the split with: catlib data PHOTOS --out {vlm_dir}")
    for pause in (0.2, 1.0, 2.0, 0.0):  # a writer that is at work is waited for
        card = read_card(vlm_dir)
        files = {vlm_dir / name: digest for name, digest in card.get("files", {}).items()}
        wrong = [path for path, digest in files.items() if not path.is_file() or digest_of(path) != digest]
        if not wrong:
            break
        time.sleep(pause)
    else:
        raise InputError(
            f"{wrong[0]}: not the file that {DATASET_CARD} was written with (a run was cut short, or it was edited). Run "
            f"catlib data again; to use edited files as they are, move {DATASET_CARD} and {GROUPS} away"
        )
    root = image_root_of(vlm_dir / "train.jsonl")
    if not root.is_dir():
        raise InputError(f"{vlm_dir / DATASET_CARD}: its image_root {root} does not exist; were the photos moved?")
    given = [part for part in PARTS if part != "test" or (vlm_dir / "test.jsonl").is_file()]
    parts = {part: tuple(read_samples(vlm_dir / f"{part}.jsonl", root)) if part in given else () for part in PARTS}
    found = sorted({sample.breed for samples in parts.values() for sample in samples})
    if strange := sorted(set(found) - set(card.get("breeds", found))):
        raise InputError(f"{vlm_dir}: breeds {', '.join(strange)} are in the samples but not in {DATASET_CARD}")
    return Dataset(root, tuple(card.get("breeds", found)), tuple(card.get("priority_breeds", ())), **parts, card=card)


@contextmanager
def writing(vlm_dir: Path) -> Iterator[None]:
    """Hold the folder for one writer; a second run waits its turn. The lock goes with the process that holds it. Raises
    InputError where the folder holds samples of another origin, CatlibError where it cannot be written."""
    with locked(vlm_dir / ".lock"):
        remove_leftovers(vlm_dir)
        ours = any((vlm_dir / name).is_file() for name in (GROUPS, DATASET_CARD))  # first and last file of a split
        if (vlm_dir / "train.jsonl").is_file() and not ours:
            theirs = "holds a train.jsonl that catlib has not written and would replace; give another folder"
            raise InputError(f"{vlm_dir}: {theirs}")
        yield


def write_dataset(
    vlm_dir: Path,
    root: Path,
    samples: Mapping[str, Sequence[Sample]],
    findings: Sequence[Finding],
    card: Mapping[str, Any],
) -> None:
    """Write all files of a split; call it inside `writing`. The card goes last and holds the others' digests. An
    unchanged file keeps its time, so that later stages of a report see that nothing is new."""
    files = {GROUPS: table(GROUP_COLUMNS, [finding for finding in findings if finding.part])}
    files |= {f"{part}.jsonl": "".join(map(sample_line, samples[part])) for part in PARTS if samples[part]}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    here, root = vlm_dir.resolve(), root.resolve()
    movable = root.is_relative_to(here.parent)  # photos in the folder above and the split can be moved together
    whole = {"image_root": os.path.relpath(root, here) if movable else str(root), **card, "files": digests}
    if not samples["test"]:
        (vlm_dir / "test.jsonl").unlink(missing_ok=True)  # of an earlier split
    for name, text in {**files, DATASET_CARD: json.dumps(whole, indent=1, ensure_ascii=False) + "\n"}.items():
        if not (path := vlm_dir / name).is_file() or path.read_bytes() != text.encode():
            write_text(path, text)


def read_groups(vlm_dir: Path) -> list[dict[str, str]]:
    """The rows of groups.csv. Raises InputError when it is missing or has other columns."""
    path = vlm_dir / GROUPS
    if not path.is_file():
        raise InputError(f"{path}: no such file; it is written with the split by catlib data")
    columns, rows = read_csv(path)
    if tuple(columns) != GROUP_COLUMNS:
        raise InputError(f"{path}: expected the columns {', '.join(GROUP_COLUMNS)}")
    return rows


def read_card(vlm_dir: Path) -> dict[str, Any]:
    """The dataset card; empty when there is none. Raises InputError when it is no JSON object."""
    path = vlm_dir / DATASET_CARD
    return read_json(path) if path.is_file() else {}
