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
        return {"train": self.train, "val": self.val, "test": self.test}[name]


def load_dataset(vlm_dir: Path) -> Dataset:
    """Read the split in a folder; its photos must exist inside the image root.

    A folder of LLaVA-format JSONL without a card is read too: its breeds are those of its samples. There may be no test part. Raises InputError naming
    file, line and key, also when the files are not those that the card was written with.
    """
    if not (vlm_dir / "train.jsonl").is_file():
        raise InputError(f"{vlm_dir}: no train.jsonl in it; make the split with: catlib data PHOTOS --out {vlm_dir}")
    card = _card_of_its_files(vlm_dir)
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
    """Hold the folder for one writer; a second run waits its turn. The lock goes with the process that holds it.

    Raises InputError where the folder holds samples of another origin, CatlibError where it cannot be written.
    """
    with locked(vlm_dir / ".lock"):
        remove_leftovers(vlm_dir)
        ours = any(
            (vlm_dir / name).is_file() for name in (GROUPS, DATASET_CARD)
        )  # the first and the last file of a split
        if (vlm_dir / "train.jsonl").is_file() and not ours:
            raise InputError(
                f"{vlm_dir}: holds a train.jsonl that catlib has not written and would replace; give another folder"
            )
        yield


def write_dataset(
    vlm_dir: Path,
    root: Path,
    samples: Mapping[str, Sequence[Sample]],
    findings: Sequence[Finding],
    card: Mapping[str, Any],
) -> None:
    """Write all files of a split; call it inside `writing`. The card goes last and holds the others' digests."""
    files = {GROUPS: table(GROUP_COLUMNS, [finding for finding in findings if finding.part])}
    files |= {f"{part}.jsonl": "".join(map(sample_line, samples[part])) for part in PARTS if samples[part]}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    whole = {"image_root": _root_from(vlm_dir, root), **card, "files": digests}
    for name, text in files.items():
        _write_when_new(vlm_dir / name, text)
    if "test.jsonl" not in files:
        (vlm_dir / "test.jsonl").unlink(missing_ok=True)  # of an earlier split
    _write_when_new(vlm_dir / DATASET_CARD, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


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


def _card_of_its_files(vlm_dir: Path) -> dict[str, Any]:
    """The card, once the files are those it was written with; a writer that is at work is waited for."""
    for pause in (0.2, 1.0, 2.0, None):
        card = read_card(vlm_dir)
        wrong = [
            name
            for name, digest in card.get("files", {}).items()
            if not (vlm_dir / name).is_file() or digest_of(vlm_dir / name) != digest
        ]
        if not wrong:
            return card
        if pause:
            time.sleep(pause)
    raise InputError(
        f"{vlm_dir / wrong[0]}: not the file that {DATASET_CARD} was written with (a run was cut short, or it was edited). Run "
        f"catlib data again; to use edited files as they are, move {DATASET_CARD} and {GROUPS} away"
    )


def _root_from(vlm_dir: Path, root: Path) -> str:
    """The image root as the card states it: relative where the photos lie in the folder above, so that both can be moved."""
    root, above = root.resolve(), vlm_dir.resolve().parent
    return os.path.relpath(root, vlm_dir.resolve()) if root.is_relative_to(above) else str(root)


def _write_when_new(path: Path, text: str) -> None:
    """An unchanged file keeps its time, so that later stages of a report see that nothing is new."""
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)
