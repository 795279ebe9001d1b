"""The one walk over folders of photos: for the sources of a split and for `catlib predict`."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from catlib.data.images import PHOTO_ENDINGS
from catlib.data.records import DATASET_CARD
from catlib.errors import InputError

# Left by systems, beside the hidden files (.DS_Store, ._x.jpg, .ipynb_checkpoints): thumbnails and copies in them are no photos.
LEFTOVERS = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"})
LEFT = "hidden or a system's"


def is_photo(name: str) -> bool:
    """Whether the file's name ends as that of a photo."""
    return Path(name).suffix.lower() in PHOTO_ENDINGS


def photo_files(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The photos below a folder, sorted, and how many files (or whole folders) were skipped, by reason. Raises
    InputError on a folder that cannot be read."""
    skipped: Counter[str] = Counter()
    photos = []
    for inner, name in walk(folder, skipped):
        path = folder / inner / name
        if not is_photo(name):
            skipped["no photo ending"] += 1
        elif not path.is_file():  # a broken link, or a pipe, which whoever reads it would wait for
            skipped["not a file"] += 1
        else:
            photos.append(path)
    return sorted(photos), skipped


def walk(root: Path, skipped: Counter[str] | None = None) -> Iterator[tuple[Path, str]]:
    """Folder (relative to the root) and name of every file below `root` but leftovers and splits that were written
    there. Links to folders are followed, but for one to a folder above itself, or the walk would never end. Raises
    InputError on a folder that cannot be read: a breed would be gone without a word."""

    def refuse(error: OSError) -> None:
        raise InputError(f"photos: the folder {error.filename} cannot be read: {error.strerror}") from None

    skipped = Counter() if skipped is None else skipped
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        reasons = {name: _skip(Path(folder, name)) for name in folders}
        folders[:] = sorted(name for name in folders if not reasons[name])
        files = sorted(name for name in names if not _is_leftover(name))
        skipped.update([*filter(None, reasons.values()), *[LEFT] * (len(names) - len(files))])
        yield from ((Path(folder).relative_to(root), name) for name in files)


def led_away(root: Path, photos: Iterable[Path]) -> dict[Path, Path]:
    """Where those of the photos below `root` lie that a link of a file or of a folder leads out of it; dangling ones are left."""
    top = root.resolve()
    folders: dict[Path, Path] = {}
    away = {}
    for photo in photos:
        if photo.parent not in folders:
            folders[photo.parent] = photo.parent.resolve()
        real = Path(os.path.realpath(photo)) if photo.is_symlink() else folders[photo.parent] / photo.name
        named = str(real).encode(errors="replace").decode() == str(real)  # a name that is no UTF-8 cannot stand in JSON
        if not real.is_relative_to(top) and named and os.path.exists(real):
            away[photo] = real
    return away


def has_folders(folder: Path) -> bool:
    """Whether there is a folder in the folder."""
    return any(entry.is_dir() for entry in os.scandir(folder))


def _skip(folder: Path) -> str:
    """Why the walk does not enter a folder; empty when it does."""
    if _is_leftover(folder.name):
        return LEFT
    if folder.is_symlink() and any(above.resolve().is_relative_to(folder.resolve()) for above in folder.parents):
        return "a link to a folder above"
    return "a split" if all((folder / name).is_file() for name in (DATASET_CARD, "train.jsonl")) else ""


def _is_leftover(name: str) -> bool:
    return name.startswith(".") or name.casefold() in LEFTOVERS
