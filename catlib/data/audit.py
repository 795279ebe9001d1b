"""A verdict on every photo file: kept, kept with a remark, or left out and why. Nothing is changed or deleted."""

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageOps

from catlib.data.findings import Finding
from catlib.data.hashing import perceptual_hashes
from catlib.data.images import ImageError, has_alpha, opening, to_8_bits, to_rgb
from catlib.progress import track

CHUNK = 64  # photos that a worker takes at a time
WORKERS = 8  # more threads than this wait for one another's Python
DRAFT = 64  # pixels: JPEG decodes straight to a small size not below this, which is all that the hash needs
MAX_BYTES = 300_000_000  # of one file, which is read whole: more is a video or a mistake
ORIENTATION = 274  # EXIF tag


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
            detail = f"{status.st_size:,} bytes, limit {MAX_BYTES:,}"
            return replace(finding, verdict="too large", detail=detail, bytes=status.st_size)
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
        with opening(io.BytesIO(data)) as image:
            width, height = image.size
            turn = image.getexif().get(ORIENTATION, 1)
            remarks = _remarks(image, turn)
            if turn in (5, 6, 7, 8):
                width, height = height, width
            finding = replace(finding, width=width, height=height, format=image.format or "", mode=image.mode)
            if min(width, height) < min_side:
                detail = f"{width} x {height}, smallest side wanted {min_side}"
                return replace(finding, verdict="too small", detail=detail)
            image.draft("L", (DRAFT, DRAFT))
            image.load()
            hashes = perceptual_hashes(_grey(image))
    except ImageError as error:
        begins = f"begins with {data[:8]!r}, " if error.verdict == "not an image" else ""
        return replace(finding, verdict=error.verdict, detail=begins + error.detail)
    if hashes is None:
        return replace(finding, remarks=", ".join([*remarks, "flat"]))
    return replace(finding, remarks=", ".join(remarks), phash=f"{hashes[0]:016x}", mirrored=f"{hashes[1]:016x}")


def _remarks(image: Image.Image, turn: object) -> list[str]:
    """What training code without care would trip over; `images.open_image` handles all of it."""
    remarks = []
    if getattr(image, "is_animated", False):
        remarks.append("animated")
    if has_alpha(image):
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
    """Upright greyscale: the same picture that `images.open_image` gives."""
    image = to_8_bits(ImageOps.exif_transpose(image))
    return image if image.mode == "L" and not has_alpha(image) else to_rgb(image).convert("L")
