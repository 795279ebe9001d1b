"""Every file below a folder of labelled photos, as a finding that waits for the audit."""

import os
from collections.abc import Iterator
from pathlib import Path

from catlib.data.audit import PHOTO_ENDINGS, Finding
from catlib.data.records import DATASET_CARD
from catlib.errors import InputError

NO_BREED = "no breed"  # the verdict on a photo that lies outside the breed folders


def finding(image: str, name: str, official: str = "", animal: str = "") -> Finding:
    """A file that a source has found; one that cannot be a photo, or has no breed, has its verdict already."""
    try:
        image.encode()
    except UnicodeEncodeError:
        shown = image.encode(errors="backslashreplace").decode()
        return Finding(
            shown, "", verdict="bad name", detail="the name is not UTF-8, so no JSON can hold it: rename the file"
        )
    if not name:
        return Finding(image, "", verdict=NO_BREED, detail="lies in no breed's folder, and no table names its breed")
    if is_photo(image):
        return Finding(image, "", source_name=name, official=official, animal=animal)
    return Finding(image, "", verdict="no photo ending", detail="not opened", source_name=name, official=official)


def is_photo(image: str) -> bool:
    """Whether the file's name ends as that of a photo."""
    return Path(image).suffix.lower() in PHOTO_ENDINGS


def has_folders(folder: Path) -> bool:
    """Whether there is a folder in the folder."""
    return any(entry.is_dir() for entry in os.scandir(folder))


def files(root: Path) -> Iterator[tuple[Path, str]]:
    """Folder (relative to the root) and name of every file below `root` but hidden ones and splits that were written there.

    Links to folders are followed. A linked folder that leads out of the root is entered, so that its photos appear in the audit
    as left out; one that leads to a folder above itself is not, or the walk would never end. Raises InputError on a folder that
    cannot be read: a breed would be gone without a word.
    """
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_refuse):
        here = Path(folder).resolve()
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and not _is_split(path := Path(folder, name))
            and not (path.is_symlink() and here.is_relative_to(path.resolve()))
        )
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder).relative_to(root), name


def _is_split(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (DATASET_CARD, "train.jsonl"))


def _refuse(error: OSError) -> None:
    raise InputError(f"photos: the folder {error.filename} cannot be read: {error.strerror}") from None
