"""The petfinder layout, as the Kaggle "cat breeds" collection has it: `images/<Breed>/<id>_<n>.jpg` and `data/cats.csv`."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from catlib.data.findings import Finding, Source, found_file
from catlib.data.walk import is_photo, walk
from catlib.errors import InputError

BREED = ("breed", "primary_breed", "label")  # columns of cats.csv that may hold the breed,
FILE = ("image", "file", "filename", "path", "photo")  # … the photo,
ABOUT = ("id", "age", "gender", "size", "coat")  # … and what goes into a sample's metadata


@dataclass(frozen=True)
class _Table:
    """The rows of cats.csv by photo, or by the animal's id where no column names photos."""

    breed: str = ""  # the column that holds the breed
    rows: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    note: str = ""

    def row(self, image: str) -> Mapping[str, str] | None:
        """The row of a photo: by its path, its name, its name without the ending, or the id before the underscore."""
        path = Path(image)
        return next(
            (self.rows[key] for key in (image, path.name, path.stem, path.stem.split("_")[0]) if key in self.rows), None
        )


def read_petfinder(photos: Path) -> Source:
    """The files below `images/`, remarks, and what the table says of each photo's cat.

    A folder's name outranks the breed in the table. Raises InputError when there is no folder `images/`.
    """
    if not (photos / "images").is_dir():
        raise InputError(f"{photos / 'images'}: no such folder; the petfinder layout has breed folders in it")
    path = photos / "data" / "cats.csv"
    table = _read(path) if path.is_file() else _Table()
    found: list[Finding] = []
    about: dict[str, dict[str, str]] = {}
    disagree = 0
    for folder, file in walk(photos / "images"):
        image = f"images/{(folder / file).as_posix()}"
        name, row = folder.parts[0] if folder.parts else "", table.row(image) if is_photo(file) else None
        if row:
            disagree += bool(name) and row[table.breed] != name
            name = name or row[table.breed]
            about[image] = {key: row[key] or "" for key in ABOUT if key in row}
        if name or is_photo(file):
            found.append(found_file(image, name, animal=about.get(image, {}).get("id", "")))
    notes = [table.note] if table.note else []
    if table.rows:
        notes.append(
            f"the table data/cats.csv describes {len(about):,} of {len(found):,} photos, {disagree:,} under another breed than their "
            "folder, which is what counts"
        )
    cats = {cat["id"] for cat in about.values() if cat.get("id")}
    if cats and len(cats) < len(about):
        notes.append(
            f"{len(about):,} photos show {len(cats):,} cats by their id; all photos of one cat stay in one part"
        )
    return Source("petfinder", photos, tuple(found), tuple(notes), about=about)


def _read(path: Path) -> _Table:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        rows = csv.DictReader(stream)
        columns = rows.fieldnames or []
        breed = next((c for c in BREED if c in columns), None)
        key = next((c for c in (*FILE, "id") if c in columns), None)
        if breed is None or key is None:
            return _Table(note=f"{path} has no columns for breed and photo ({', '.join(columns)}): not used")
        return _Table(breed, {row[key]: row for row in rows if row[key] and row[breed]})
