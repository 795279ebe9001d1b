"""The petfinder layout, as the Kaggle "cat breeds" collection has it: `images/<Breed>/<id>_<n>.jpg` and `data/cats.csv`."""

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from catlib.data.cats import MOST_PHOTOS
from catlib.data.findings import Finding, Source, found_file
from catlib.data.names import SHOWN
from catlib.data.walk import is_photo, walk
from catlib.errors import InputError

FIELD = 2**31 - 1  # the csv module's own limit, 131,072 characters, is less than people's tables hold in a field
# Columns of cats.csv, in lower case, letters and digits only, that may hold the breed,
BREED = ("breed", "primarybreed", "breedprimary", "breedsprimary", "label", "breedname")
# … the photo,
FILE = ("image", "file", "filename", "path", "photo", "imagepath", "filepath", "imagefile", "imagename")
ID = ("id", "catid", "animalid", "petid", "petfinderid")  # … the cat,
ABOUT = ("age", "gender", "size", "coat")  # … and what else goes into a sample's metadata
TABLES = (".csv", ".tsv", ".txt", ".xlsx", ".xls", ".ods", ".json")  # the last four are named as not readable
DELIMITERS = ",;\t|"
_THOUSANDS = re.compile(r"\d{1,3}(?:([.,' \u00a0\u202f])\d{3})(?:\1\d{3})*")
_EXPONENT = re.compile(r"(\d)(?:[.,](\d+))?e\+0*(\d{1,2})", re.IGNORECASE)


@dataclass(frozen=True)
class _Table:
    """The rows of cats.csv by photo and by the cat's id; their columns are `breed`, `file`, `id` and those of ABOUT."""

    rows: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a reader should know, and what could not be used

    def row(self, image: str) -> Mapping[str, str] | None:
        """The row of a photo: by its path, its name, its name without the ending, or the id before the underscore."""
        path = Path(image)
        names = (image, path.name, path.stem, path.stem.split("_")[0])
        return next((row for name in names if (row := self.rows.get(_plain(name)))), None)


def read_petfinder(photos: Path) -> Source:
    """The files below `images/`, remarks, and what the table says of each photo's cat.

    A folder's name outranks the breed in the table. Raises InputError when there is no folder `images/`.
    """
    if not (photos / "images").is_dir():
        raise InputError(f"{photos / 'images'}: no such folder; the petfinder layout has breed folders in it")
    path = _found(photos)
    table = _read(path) if path else _Table()
    walked = [(f"images/{(folder / name).as_posix()}", folder) for folder, name in walk(photos / "images")]
    rows = {image: row for image, _ in walked if is_photo(image) and (row := table.row(image))}
    number = Counter(row["id"] for row in rows.values() if row.get("id"))
    many = {id for id, count in number.items() if count > MOST_PHOTOS}
    found: list[Finding] = []
    about: dict[str, dict[str, str]] = {}
    disagree = 0
    for image, folder in walked:
        name, row = folder.parts[0] if folder.parts else "", rows.get(image, {})
        if row:
            disagree += bool(name and row.get("breed")) and row["breed"] != name
            name = name or row.get("breed", "")
            about[image] = {
                key: row[key] for key in ("id", *ABOUT) if key in row and (key != "id" or row[key] not in many)
            }
        if name or is_photo(image):
            found.append(found_file(image, name, animal=about.get(image, {}).get("id", "")))
    doubts, notes = list(table.notes), []
    if table.rows:
        notes.append(
            f"the table {path} describes {len(about):,} of {len(found):,} photos, {disagree:,} under another breed than their "
            "folder, which is what counts"
        )
        if not about:
            doubts.append(
                f"{path}: none of its rows is of one of the {len(found):,} photos, so it says nothing of their cats"
            )
    if many:
        some = ", ".join(sorted(many)[:SHOWN])
        doubts.append(f"{path}: the id {some} stands for more than {MOST_PHOTOS} photos each and is taken for no cat's")
    known = [row["id"] for row in about.values() if row.get("id")]
    if len(cats := set(known)) < len(known):
        notes.append(
            f"{len(known):,} photos show {len(cats):,} cats by their id; all photos of one cat stay in one part"
        )
    return Source("petfinder", photos, tuple(found), tuple(notes), doubts=tuple(doubts), about=about)


def _found(photos: Path) -> Path | None:
    """The table of the cats: `data/cats.csv`, or what comes nearest to it."""
    tables = [path for folder in (photos / "data", photos) if folder.is_dir() for path in sorted(folder.iterdir())]
    tables = [path for path in tables if path.stem.casefold() == "cats" and path.suffix.casefold() in TABLES]
    return min(tables, key=lambda path: TABLES.index(path.suffix.casefold()), default=None)


def _read(path: Path) -> _Table:
    """The table, whatever program wrote it: comma, semicolon, tab or bar, UTF-8, UTF-16 or Windows text, headers in any case."""
    if path.suffix.casefold() not in TABLES[:3]:
        return _Table(notes=(f"{path}: only text tables are read; export it as cats.csv: not used",))
    former = csv.field_size_limit(FIELD)
    try:
        text = _decoded(path.read_bytes())
        first, _, rest = text.partition("\n")
        if hint := re.fullmatch(r"sep=(.)\s*", first, re.IGNORECASE):  # a line that Excel writes and reads
            text = rest
        delimiters = hint.group(1) if hint else DELIMITERS
        columns, rows = max((_parsed(text, delimiter) for delimiter in delimiters), key=lambda parsed: len(parsed[0]))
        if not columns.keys() & {"file", "id"}:
            header = ", ".join(next(csv.reader(io.StringIO(text)), []))[:200]
            return _Table(
                notes=(f"{path}: no column names the photo or the cat's id (its first line: {header}): not used",)
            )
        return _indexed(path, columns, rows)
    except (OSError, csv.Error) as error:
        return _Table(notes=(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}): not used",))
    finally:
        csv.field_size_limit(former)  # it counts for the whole process


def _parsed(text: str, delimiter: str) -> tuple[dict[str, int], Iterator[list[str]]]:
    """The place of each known column, and the rows below."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    header = [re.sub(r"[\W_]", "", name).casefold() for name in next(rows, [])]
    wanted = {"breed": BREED, "file": FILE, "id": ID} | {name: (name,) for name in ABOUT}
    return {
        column: header.index(name)
        for column, names in wanted.items()
        if (name := next((name for name in names if name in header), ""))
    }, rows


def _indexed(path: Path, columns: Mapping[str, int], rows: Iterator[list[str]]) -> _Table:
    """The rows by photo and id. What stands for cats of several breeds names no cat."""
    found: dict[str, dict[str, str]] = {}
    unclear: set[str] = set()
    rounded = 0
    for cells in rows:
        row = {name: cells[place].strip() if place < len(cells) else "" for name, place in columns.items()}
        if "id" in row:
            rounded += _is_rounded(row["id"])
            row["id"] = _plain(row["id"])
        if key := _plain(row.get("file", "").replace("\\", "/")) or row.get("id", ""):
            other = found.setdefault(key, row)
            if (other.get("breed"), other.get("id")) != (row.get("breed"), row.get("id")):
                unclear.add(key)
    for key in unclear:
        del found[key]
    names = Counter(Path(key).name for key in found)
    found |= {name: row for key, row in found.items() if names[name := Path(key).name] == 1}
    notes = []
    if rounded:
        notes.append(
            f"{path}: {rounded:,} ids are rounded, as in 4.6E+07: a spreadsheet has cut their digits, so they name no cat; format the "
            "column as text or whole numbers and export it again"
        )
    if unclear:
        some = ", ".join(sorted(unclear)[:SHOWN])
        notes.append(
            f"{path}: {len(unclear):,} ids or files stand in rows that contradict each other and name no cat: {some}"
        )
    return _Table(found, tuple(notes))


def _plain(value: str) -> str:
    """An id or a file's name as it is compared: a whole number without separators, zeros before it or behind a decimal point."""
    value = value.strip()
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


def _decoded(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")
