"""The petfinder layout, as the Kaggle "cat breeds" collection has it: `images/<Breed>/<id>_<n>.jpg` and `data/cats.csv`."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from catlib.data.cats import MOST_PHOTOS, named
from catlib.data.findings import Source, found_file
from catlib.data.sheets import read_sheet
from catlib.data.walk import is_photo, walk
from catlib.errors import InputError

ABOUT = ("age", "gender", "size", "coat")  # what goes from the table into a sample's metadata, beside the id
COLUMNS = {  # of the table, each with the headers that mean it, in small letters and digits
    "breed": ("breed", "primarybreed", "breedprimary", "breedsprimary", "label", "breedname"),
    "photo": ("image", "file", "filename", "path", "photo", "imagepath", "filepath", "imagefile", "imagename"),
    "id": ("id", "catid", "animalid", "petid", "petfinderid"),
    **{name: (name,) for name in ABOUT},
}
TABLES = (".csv", ".tsv", ".txt", ".xlsx", ".xls", ".ods", ".json")  # the last four are named as not readable
_THOUSANDS = re.compile(r"\d{1,3}(?:([.,' \u00a0\u202f])\d{3})(?:\1\d{3})*")
_EXPONENT = re.compile(r"(\d)(?:[.,](\d+))?e\+0*(\d{1,2})", re.IGNORECASE)
Rows = Mapping[str, Mapping[str, str]]  # by photo and by the cat's id


def read_petfinder(photos: Path) -> Source:
    """The files below `images/`, remarks, and what the table says of each photo's cat. A folder's name outranks the
    breed in the table. Raises InputError when there is no folder `images/`."""
    if not (photos / "images").is_dir():
        raise InputError(f"{photos / 'images'}: no such folder; the petfinder layout has breed folders in it")
    path, table, doubts = _table(photos)
    walked = [(f"images/{(folder / name).as_posix()}", folder) for folder, name in walk(photos / "images")]
    rows = {image: row for image, _ in walked if is_photo(image) and (row := _row(table, image))}
    shown = Counter(row["id"] for row in rows.values() if row.get("id"))
    many = {id for id, count in shown.items() if count > MOST_PHOTOS}
    about = {
        image: {key: row[key] for key in ("id", *ABOUT) if key in row and (key != "id" or row[key] not in many)}
        for image, row in rows.items()
    }
    found, disagree = [], 0
    for image, folder in walked:
        name, said = folder.parts[0] if folder.parts else "", rows.get(image, {}).get("breed", "")
        disagree += bool(name and said) and said != name
        if (name := name or said) or is_photo(image):
            found.append(found_file(image, name, animal=about.get(image, {}).get("id", "")))
    notes = []
    if table:
        under = f"{disagree:,} under another breed than their folder, which is what counts"
        notes.append(f"the table {path} describes {len(about):,} of {len(found):,} photos, {under}")
        if not about:
            none = f"none of its rows is of one of the {len(found):,} photos, so it says nothing of their cats"
            doubts.append(f"{path}: {none}")
    if many:
        stands = f"stands for more than {MOST_PHOTOS} photos each and is taken for no cat's"
        doubts.append(f"{path}: the id {named(many)} {stands}")
    known = [row["id"] for row in about.values() if row.get("id")]
    if len(cats := set(known)) < len(known):
        stay = "all photos of one cat stay in one part"
        notes.append(f"{len(known):,} photos show {len(cats):,} cats by their id; {stay}")
    return Source("petfinder", photos, tuple(found), tuple(notes), doubts=tuple(doubts), about=about)


def _row(table: Rows, image: str) -> Mapping[str, str] | None:
    """The row of a photo: by its path, its name, its name without the ending, or the id before the underscore."""
    path = Path(image)
    names = (image, path.name, path.stem, path.stem.split("_")[0])
    return next((row for name in names if (row := table.get(_plain(name)))), None)


def _table(photos: Path) -> tuple[Path | None, Rows, list[str]]:
    """`data/cats.csv` or what comes nearest to it, its rows by photo and id, and what could not be used of it. What
    stands for cats of several breeds names no cat."""
    files = [path for folder in (photos / "data", photos) if folder.is_dir() for path in sorted(folder.iterdir())]
    files = [path for path in files if path.stem.casefold() == "cats" and path.suffix.casefold() in TABLES]
    path = min(files, key=lambda path: TABLES.index(path.suffix.casefold()), default=None)
    if path is None:
        return None, {}, []
    if path.suffix.casefold() not in TABLES[:3]:
        return path, {}, [f"{path}: only text tables are read; export it as cats.csv: not used"]
    try:
        rows = read_sheet(path, COLUMNS, ("photo", "id"))
    except InputError as error:
        return path, {}, [f"{error}: not used"]
    found: dict[str, dict[str, str]] = {}
    unclear: set[str] = set()
    rounded = sum(_is_rounded(row.get("id", "")) for row in rows)
    for row in rows:
        row |= {"id": _plain(row["id"])} if "id" in row else {}
        if key := _plain(row.get("photo", "").replace("\\", "/")) or row.get("id", ""):
            other = found.setdefault(key, row)
            if (other.get("breed"), other.get("id")) != (row.get("breed"), row.get("id")):
                unclear.add(key)
    found = {key: row for key, row in found.items() if key not in unclear}
    names = Counter(Path(key).name for key in found)
    found |= {name: row for key, row in found.items() if names[name := Path(key).name] == 1}
    doubts = []
    if rounded:
        doubts.append(
            f"{path}: {rounded:,} ids are rounded, as in 4.6E+07: a spreadsheet has cut their digits, so they name no cat; format the "
            "column as text or whole numbers and export it again"
        )
    if unclear:
        contradict = "ids or files stand in rows that contradict each other and name no cat"
        doubts.append(f"{path}: {len(unclear):,} {contradict}: {named(unclear)}")
    return path, found, doubts


def _plain(value: str) -> str:
    """An id or a file's name as it is compared: a whole number without separators, zeros before it or behind a decimal point."""
    value = value.strip("=\"' \t")  # ="46001234" and '46001234 keep a spreadsheet from rounding
    if found := _EXPONENT.fullmatch(value):
        digits, power = found.group(1) + (found.group(2) or ""), int(found.group(3))
        return "" if _is_rounded(value) else digits[: power + 1].lstrip("0") or "0"
    if _THOUSANDS.fullmatch(value):
        value = re.sub(r"\D", "", value)
    if found := re.fullmatch(r"(\d+)(?:[.,]0*)?", value):
        return found.group(1).lstrip("0") or "0"
    return value


def _is_rounded(value: str) -> bool:
    """Whether a number in exponential form has fewer digits than the whole number that it stands for."""
    found = _EXPONENT.fullmatch(value.strip())
    return found is not None and len(found.group(2) or "") < int(found.group(3))
