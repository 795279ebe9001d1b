"""A verdict on every photo file: kept, kept with a remark, or left out and why. Nothing is changed or deleted."""

import hashlib
import io
import json
import operator
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from catlib.data.duplicates import perceptual_hashes
from catlib.data.findings import Finding
from catlib.data.images import ImageError, has_alpha, opening, to_8_bits, to_rgb
from catlib.errors import InputError
from catlib.files import appending, parse_json
from catlib.progress import track
from catlib.settings import split_list

CHUNK = 64  # photos that a worker takes at a time
WORKERS = 8  # more threads than this wait for one another's Python
DRAFT = 64  # pixels: JPEG decodes straight to a small size not below this, which is all that hash and quality need
MAX_BYTES = 300_000_000  # of one file, which is read whole: more is a video or a mistake
ORIENTATION, MAKE, MODEL, EXIF, TAKEN = 274, 271, 272, 0x8769, 36867  # EXIF tags
FLAT_LINE = 2.0  # grey levels: a row or column at an edge with less contrast is part of a border
QUALITY = {
    "brightness<": "dark",
    "brightness>": "light",
    "contrast<": "low contrast",
    "sharpness<": "blurred",
    "entropy<": "little information",
    "aspect>": "extreme aspect",
    "border>": "border",
}
GIVEN = {"image", "breed", "part", "group", "source_name", "official", "animal", "link"}
FOUND = [column.name for column in fields(Finding) if column.name not in GIVEN]  # what the audit fills in
Limits = Sequence[tuple[str, Callable[[float, float], bool], float, str]]  # measure, comparison, limit, remark


def audit(
    root: Path, findings: Sequence[Finding], min_side: int, quality: str = "", unfinished: Path | None = None
) -> list[Finding]:
    """Open every file once, in parallel, and fill in what it is; verdicts that concern one file alone.

    Threads rather than processes: reading, SHA-256, decoding and scaling all release Python's lock, and threads work from a
    notebook, a pipe or a script without a main guard alike. `quality`: limits as in the setting of that name. `unfinished`: the
    file that holds the verdicts until all are there; an audit that was interrupted goes on from it.
    """
    top, limits = root.resolve(), quality_limits(quality)
    chunks = [findings[i : i + CHUNK] for i in range(0, len(findings), CHUNK)]
    with _kept(unfinished, [str(top), min_side, quality, *FOUND]) as (known, keep):

        def judge(finding: Finding) -> tuple[str, Finding]:
            state = _state(top, finding)
            found = replace(finding, **known[state]) if state in known else inspect(top, finding, min_side, limits)
            return state, found

        def results() -> Iterator[Finding]:
            for judged in pool.map(lambda chunk: list(map(judge, chunk)), chunks):
                keep([(state, finding) for state, finding in judged if state not in known])
                yield from (finding for _, finding in judged)

        with warnings.catch_warnings(), ThreadPoolExecutor(min(os.cpu_count() or 1, WORKERS)) as pool:
            # once, here: filters are the process's, and threads that set them would undo one another's
            warnings.simplefilter("ignore")
            return list(track(results(), "audit", total=len(findings)))


def quality_limits(quality: str) -> Limits:
    """The limits of the setting. Raises InputError on what is none."""
    limits = []
    for text in split_list(quality):
        found = re.fullmatch(r"(\w+)\s*([<>])\s*(\d+(?:\.\d+)?)", text)
        if not found or (said := QUALITY.get(found[1] + found[2])) is None:
            raise InputError(f"quality: {text!r} is no limit; give MEASURE and NUMBER with one of {', '.join(QUALITY)}")
        limits.append((found[1], operator.lt if found[2] == "<" else operator.gt, float(found[3]), said))
    return limits


def inspect(root: Path, finding: Finding, min_side: int, limits: Limits = ()) -> Finding:
    """The finding of one file, `root` being resolved already. Never raises on account of the file's content."""
    path, size, begins = root / finding.image, 0, ""
    if not finding.kept:
        return finding
    try:
        between = (folder for folder in path.parents if folder != root and folder.is_relative_to(root))
        linked = path.is_symlink() or any(folder.is_symlink() for folder in between)
        status = path.stat()
        if (linked or ".." in Path(finding.image).parts) and not path.resolve().is_relative_to(root):
            raise ImageError("", "outside the root", f"leads to {path.resolve()}")
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise ImageError("", "unreadable", "not a regular file")
        if (size := status.st_size) > MAX_BYTES:
            raise ImageError("", "too large", f"{size:,} bytes, limit {MAX_BYTES:,}")
        data = path.read_bytes()
        finding = replace(finding, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        if not data:
            raise ImageError("", "empty", "the file has no bytes")
        begins = f"begins with {data[:8]!r}, "
        with opening(io.BytesIO(data)) as image:
            (width, height), exif = image.size, image.getexif()
            turn = exif.get(ORIENTATION, 1)
            remarks = _remarks(image, turn)
            if turn in (5, 6, 7, 8):
                width, height = height, width
            finding = replace(finding, width=width, height=height, format=image.format or "", mode=image.mode)
            if min(width, height) < min_side:
                detail = f"{width} x {height}, smallest side wanted {min_side}"
                return replace(finding, verdict="too small", detail=detail)
            finding = replace(finding, taken=_taken(exif))
            image.draft("L", (DRAFT, DRAFT))
            image.load()
            image = to_8_bits(ImageOps.exif_transpose(image))  # upright: the same picture that `open_image` gives
            grey = image if image.mode == "L" and not has_alpha(image) else to_rgb(image).convert("L")
            hashes = perceptual_hashes(grey)
    except ImageError as error:
        detail = begins * (error.verdict == "not an image") + error.detail
        return replace(finding, verdict=error.verdict, detail=detail, bytes=size)
    except FileNotFoundError:
        return replace(finding, verdict="missing", detail="no such file")
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
        return replace(finding, verdict="unreadable", detail=getattr(error, "strerror", None) or str(error))
    finding = replace(finding, **_measured(grey))
    if hashes is None:
        remarks.append("flat")
    else:
        finding = replace(finding, phash=f"{hashes[0]:016x}", mirrored=f"{hashes[1]:016x}")
    beyond = [remark for name, compare, limit, remark in limits if compare(getattr(finding, name), limit)]
    return replace(finding, remarks=", ".join(remarks), quality=", ".join(beyond))


def _measured(grey: Image.Image) -> dict[str, Any]:
    """What the photo is like, at DRAFT pixels on the shorter side."""
    if (factor := DRAFT / min(grey.size)) < 1:
        width, height = (max(DRAFT, round(side * factor)) for side in grey.size)
        grey = grey.resize((width, height), reducing_gap=2)
    levels = np.asarray(grey, dtype=np.float32)
    steps = (np.abs(np.diff(levels, axis=0)).mean() + np.abs(np.diff(levels, axis=1)).mean()) / 2
    middle = levels[1:-1, 1:-1]
    laplacian = np.abs(4 * middle - levels[:-2, 1:-1] - levels[2:, 1:-1] - levels[1:-1, :-2] - levels[1:-1, 2:])
    edges = 0.0
    for flat in (levels.std(1) < FLAT_LINE, levels.std(0) < FLAT_LINE):
        textured = np.flatnonzero(~flat)
        edges = max(edges, 1 - (textured[-1] - textured[0] + 1) / len(flat) if len(textured) else 1.0)
    return {
        "brightness": round(float(levels.mean()), 1),
        "contrast": round(float(levels.std()), 1),
        "sharpness": round(float(laplacian.mean() / steps), 3) if steps > 0.1 and laplacian.size else 0.0,
        "entropy": round(grey.entropy(), 2) + 0.0,
        "border": round(float(edges), 3),
    }


def _taken(exif: Image.Exif) -> str:
    """Camera and time; empty where one is missing or the time is none, as in 0000:00:00 00:00:00."""
    camera = " ".join(str(exif.get(tag) or "").strip(" \0") for tag in (MAKE, MODEL)).strip()
    try:
        time = datetime.strptime(str(exif.get_ifd(EXIF).get(TAKEN) or "").strip(" \0"), "%Y:%m:%d %H:%M:%S")
    except ValueError:
        return ""
    return f"{camera}|{time.isoformat()}" if camera else ""


def _remarks(image: Image.Image, turn: object) -> list[str]:
    """What training code without care would trip over; `images.open_image` handles all of it."""
    seen = {
        "animated": getattr(image, "is_animated", False),
        "alpha": has_alpha(image),
        "palette": image.mode == "P",
        "CMYK": image.mode == "CMYK",
        "greyscale": image.mode in ("L", "LA", "1", "I", "I;16", "F"),
        "EXIF rotation": isinstance(turn, int) and 2 <= turn <= 8,
    }
    return [remark for remark, holds in seen.items() if holds]


def _state(root: Path, finding: Finding) -> str:
    """The file as its system describes it; another state means that it has to be opened anew."""
    try:
        status = (root / finding.image).stat()
        return f"{finding.image} {finding.verdict} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    except (OSError, ValueError, RuntimeError):
        return f"{finding.image} {finding.verdict} missing"


@contextmanager
def _kept(path: Path | None, about: list[Any]) -> Iterator[tuple[Mapping[str, Any], Callable[[Any], None]]]:
    """The verdicts of an audit that was cut short, and a function that adds to them; the file goes when the block ends well."""
    if path is None:
        yield {}, lambda judged: None
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    known: dict[str, Any] = {}
    if lines and lines[0] == json.dumps(about):
        for line in lines[1:]:
            with suppress(InputError):  # the last line may be cut off
                known |= parse_json(line, str(path))
    with appending(path) as add:
        if not known:
            path.write_bytes(b"")  # of another audit, perhaps
            add(json.dumps(about) + "\n")
        yield known, lambda judged: add(json.dumps({s: {n: getattr(f, n) for n in FOUND} for s, f in judged}) + "\n")
    path.unlink(missing_ok=True)
