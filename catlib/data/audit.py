"""A verdict on every photo file: kept, kept with a remark, or left out and why. Nothing is changed or deleted."""

import csv
import hashlib
import io
import os
import stat
import struct
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from catlib.data.hashing import perceptual_hashes
from catlib.data.images import MAX_PIXELS, to_8_bits
from catlib.data.records import write_atomically
from catlib.errors import CatlibError, InputError
from catlib.progress import track

CHUNK = 64  # photos that a worker takes at a time
WORKERS = 8  # more threads than this wait for one another's Python
DRAFT = 64  # pixels: JPEG decodes straight to a small size not below this, which is all that the hash needs
MAX_BYTES = 300_000_000  # of one file, which is read whole: more is a video or a mistake
ORIENTATION = 274  # EXIF tag
PHOTO_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
KEPT = "kept"


@dataclass(frozen=True)
class Finding:
    """What the audit says of one file; a line of audit.csv."""

    image: str  # relative to the image root
    breed: str
    part: str = ""  # train | val | test; empty when left out
    verdict: str = KEPT  # kept, or the reason why it is left out
    detail: str = ""  # the reason in words, naming the other photo where there is one
    remarks: str = ""  # what is unusual of a kept photo, comma separated
    group: str = ""  # photos of one group are near-duplicates of one another
    width: int = 0  # pixels, after EXIF rotation
    height: int = 0
    bytes: int = 0
    format: str = ""
    mode: str = ""
    sha256: str = ""
    phash: str = ""  # 16 hexadecimal digits; empty for a photo without contrast
    mirrored: str = ""  # the same of the photo mirrored left to right
    source_name: str = ""  # the breed as the source names it
    official: str = ""  # the part that the source gives it: test, val, train, or empty
    animal: str = ""  # the cat's id, where the source has one: all photos of a cat stay in one part

    @property
    def kept(self) -> bool:
        return self.verdict == KEPT


def audit(root: Path, findings: Sequence[Finding], min_side: int) -> list[Finding]:
    """Open every file once, in parallel, and fill in what it is; verdicts that concern one file alone.

    Threads rather than processes: reading, SHA-256, decoding and scaling all release Python's lock, and threads work from a
    notebook, a pipe or a script without a main guard alike.
    """
    chunks = [findings[i : i + CHUNK] for i in range(0, len(findings), CHUNK)]
    top = root.resolve()
    done: list[Finding] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(min(os.cpu_count() or 1, WORKERS)) as pool:
        # once, here: filters are the process's, and threads that set them would undo one another's
        warnings.simplefilter("ignore")
        results = pool.map(lambda chunk: [inspect(top, finding, min_side) for finding in chunk], chunks)
        for finding in track((f for result in results for f in result), "audit", total=len(findings)):
            done.append(finding)
    return done


def inspect(root: Path, finding: Finding, min_side: int) -> Finding:
    """The finding of one file, `root` being resolved already. Never raises on account of the file's content."""
    path = root / finding.image
    if not finding.kept:
        return finding
    try:
        leads_away = path.is_symlink() or ".." in Path(finding.image).parts or _linked(root, path)
        if leads_away and not path.resolve().is_relative_to(root):
            return replace(finding, verdict="outside the root", detail=f"leads to {path.resolve()}")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            return replace(finding, verdict="unreadable", detail="not a regular file")
        if status.st_size > MAX_BYTES:
            return replace(
                finding,
                verdict="too large",
                detail=f"{status.st_size:,} bytes, limit {MAX_BYTES:,}",
                bytes=status.st_size,
            )
        data = path.read_bytes()
    except FileNotFoundError:
        return replace(finding, verdict="missing", detail="no such file")
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
        return replace(finding, verdict="unreadable", detail=getattr(error, "strerror", None) or str(error))
    finding = replace(finding, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    if not data:
        return replace(finding, verdict="empty", detail="the file has no bytes")
    return _decode(data, finding, min_side)


def _linked(root: Path, path: Path) -> bool:
    """Whether a folder between the root and the file is a symbolic link."""
    return any(folder.is_symlink() for folder in path.parents if folder != root and folder.is_relative_to(root))


def _decode(data: bytes, finding: Finding, min_side: int) -> Finding:
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            turn = image.getexif().get(ORIENTATION, 1)
            remarks = _remarks(image, turn)
            if isinstance(turn, int) and turn >= 5:
                width, height = height, width
            finding = replace(finding, width=width, height=height, format=image.format or "", mode=image.mode)
            if width * height > MAX_PIXELS:
                return replace(finding, verdict="too large", detail=f"{width * height:,} pixels, limit {MAX_PIXELS:,}")
            if min(width, height) < min_side:
                return replace(
                    finding, verdict="too small", detail=f"{width} x {height}, smallest side wanted {min_side}"
                )
            image.draft("L", (DRAFT, DRAFT))
            image.load()
            hashes = perceptual_hashes(_grey(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return replace(finding, verdict="too large", detail=str(error))
    except UnidentifiedImageError:
        return replace(finding, verdict="not an image", detail=f"begins with {data[:8]!r}")
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        IndexError,
        MemoryError,
        KeyError,
        TypeError,
    ) as error:
        reason = "truncated" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "broken"
        return replace(finding, verdict=reason, detail=str(error))
    if hashes is None:
        return replace(finding, remarks=", ".join([*remarks, "flat"]))
    return replace(finding, remarks=", ".join(remarks), phash=f"{hashes[0]:016x}", mirrored=f"{hashes[1]:016x}")


def _remarks(image: Image.Image, turn: object) -> list[str]:
    """What training code without care would trip over; `images.open_image` handles all of it."""
    remarks = []
    if getattr(image, "is_animated", False):
        remarks.append("animated")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        remarks.append("alpha")
    if image.mode == "P":
        remarks.append("palette")
    if image.mode == "CMYK":
        remarks.append("CMYK")
    if image.mode in ("L", "LA", "1", "I", "I;16", "F"):
        remarks.append("greyscale")
    if isinstance(turn, int) and 2 <= turn <= 8:
        remarks.append("EXIF rotation")
    return remarks


def _grey(image: Image.Image) -> Image.Image:
    """Upright greyscale, transparency on white: the same picture that `images.open_image` gives."""
    image = to_8_bits(ImageOps.exif_transpose(image))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "L" else image.convert("L")


def write_audit(path: Path, findings: Sequence[Finding]) -> None:
    """Write audit.csv, a line a file. Raises CatlibError where that is not possible."""
    names = [field.name for field in fields(Finding)]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names)
    table.writerows([getattr(finding, name) for name in names] for finding in findings)
    try:
        write_atomically(path, text.getvalue())
    except OSError as error:
        raise CatlibError(f"{path}: cannot write: {error.strerror}") from None


def read_audit(path: Path) -> list[Finding]:
    """Read audit.csv. Raises InputError when it is not one."""
    whole = {"width", "height", "bytes"}
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        return [Finding(**{key: int(value) if key in whole else value for key, value in row.items()}) for row in rows]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: not an audit table of this version ({error}); run catlib data again") from None
