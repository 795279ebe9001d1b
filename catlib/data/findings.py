"""What is found out about each photo file, and audit.csv, the table that holds it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from catlib.data.records import Sample
from catlib.data.walk import is_photo
from catlib.errors import InputError
from catlib.files import csv_text, read_csv, write_text

KEPT = "kept"
NO_BREED = "no breed"  # the verdict on a photo that lies outside the breed folders


@dataclass(frozen=True)
class Finding:
    """What the audit says of one file; a line of audit.csv."""

    image: str  # relative to the image root
    breed: str
    part: str = ""  # train | val | test; empty when left out
    verdict: str = KEPT  # kept, or the reason why it is left out
    detail: str = ""  # the reason in words, naming the other photo where there is one
    remarks: str = ""  # what is unusual of a kept photo, comma separated
    quality: str = ""  # the limits of the setting `quality` that a kept photo is beyond, comma separated
    group: str = ""  # photos of one group are not independent: near-duplicates, or photos of one cat
    width: int = 0  # pixels, after EXIF rotation
    height: int = 0
    bytes: int = 0
    format: str = ""
    mode: str = ""
    sha256: str = ""
    phash: str = ""  # 16 hexadecimal digits; empty for a photo without contrast
    mirrored: str = ""  # the same of the photo mirrored left to right
    taken: str = ""  # camera|time of the EXIF data, where both are there
    brightness: float = 0.0  # mean of the grey levels, 0 to 255; these five are 0 where the photo was not decoded
    contrast: float = 0.0  # their standard deviation
    sharpness: float = 0.0  # mean Laplacian over mean step between pixels side by side: whatever the contrast
    entropy: float = 0.0  # bits of the distribution of grey levels
    border: float = 0.0  # share of the rows and columns at the edges that hold one colour
    source_name: str = ""  # the breed as the source names it
    official: str = ""  # the part that the source gives it: test, val, train, or empty
    animal: str = ""  # the cat's id, or the group that the source states: such photos stay in one part
    link: str = ""  # the file's place below the folder that the user named, where a link leads out of it

    @property
    def kept(self) -> bool:
        return self.verdict == KEPT

    @property
    def aspect(self) -> float:
        """Longer side over shorter; 0 where the size is not known."""
        return max(self.width, self.height) / min(self.width, self.height) if self.width and self.height else 0.0

    @property
    def name(self) -> str:
        """The path of the file in the folder of photos that the user named."""
        return self.link or self.image


@dataclass(frozen=True)
class Source:
    """The files of one layout, not opened yet. `findings` are sorted by path."""

    name: str
    root: Path
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()  # listed photos that are not there
    doubts: tuple[str, ...] = ()  # what went wrong in finding out which photos show one cat
    # by image path: conversations that came with the photos, and what a table says of a photo's cat
    samples: Mapping[str, Sample] = field(default_factory=dict)
    about: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def found_file(image: str, name: str, official: str = "", animal: str = "") -> Finding:
    """A file that a source has found; one that cannot be a photo, or has no breed, has its verdict already."""
    try:
        image.encode()
    except UnicodeEncodeError:
        shown = image.encode(errors="backslashreplace").decode()
        detail = "the name is not UTF-8, so no JSON can hold it: rename the file"
        return Finding(shown, "", verdict="bad name", detail=detail)
    if not name:
        return Finding(image, "", verdict=NO_BREED, detail="lies in no breed's folder, and no table names its breed")
    if is_photo(image):
        return Finding(image, "", source_name=name, official=official, animal=animal)
    return Finding(image, "", verdict="no photo ending", detail="not opened", source_name=name, official=official)


def write_audit(path: Path, findings: Sequence[Finding]) -> None:
    """Write audit.csv, a line a file. Raises CatlibError where that is not possible."""
    write_text(path, table([column.name for column in fields(Finding)], findings))


def table(columns: Sequence[str], findings: Sequence[Finding]) -> str:
    """Some columns of the findings as CSV text."""
    return csv_text(columns, ([getattr(finding, name) for name in columns] for finding in findings))


def read_audit(path: Path) -> list[Finding]:
    """Read audit.csv. Raises InputError when it is not one."""
    numbers: dict[str, Any] = {f.name: f.type for f in fields(Finding) if f.type in (int, float)}
    rows: list[dict[str, Any]] = read_csv(path)[1]
    try:
        return [Finding(**row | {name: kind(row[name]) for name, kind in numbers.items()}) for row in rows]
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not an audit table of this version ({error}); run catlib data again") from None
