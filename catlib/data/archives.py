"""The Oxford-IIIT Pet archives: downloaded with a checksum, resumed after an interruption, unpacked once."""

import fcntl
import hashlib
import logging
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from catlib.errors import CatlibError, InputError
from catlib.progress import track

PAGE = "https://www.robots.ox.ac.uk/~vgg/data/pets/"
BASE = "https://thor.robots.ox.ac.uk/~vgg/data/pets/"
BLOCK = 1 << 20  # bytes
TIMEOUT = 30  # seconds without a byte
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """A published file and its checksum."""

    name: str
    md5: str


OXFORD_PETS = (
    Archive("annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f"),
    Archive("images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
)


def fetch_oxford_pets(to: Path, base: str = BASE, archives: tuple[Archive, ...] = OXFORD_PETS) -> Path:
    """Download both archives into `to` and unpack them there; the folder, ready as `photos`.

    A finished file with the right checksum is not downloaded again, a partial one (.part) is continued. Raises CatlibError when
    there is no network or the bytes are not the published ones.
    """
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CatlibError(f"{to}: cannot write here: {error.strerror}") from None
    for archive in archives:
        _fetch(archive, to, base)
    return unpacked(to, to)


def unpacked(photos: Path, to: Path) -> Path:
    """The folder of photos behind `photos`: itself, or what its Oxford archives hold, unpacked into `to` once.

    `photos` may be a folder with images.tar.gz and annotations.tar.gz in it, or one of the two files. Raises InputError when
    the other one is missing or an archive is broken.
    """
    folder = photos.parent if photos.name.endswith((".tar.gz", ".tgz")) and photos.is_file() else photos
    names = [archive.name for archive in OXFORD_PETS]
    if folder == photos and ((folder / "images").is_dir() or not (folder / "images.tar.gz").is_file()):
        return photos
    if folder != photos and photos.name not in names:
        raise InputError(
            f"photos: {photos}: only the Oxford archives {' and '.join(names)} can be read packed; unpack it first"
        )
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"photos: {folder / name} is missing; both archives are needed ({PAGE})")
        _unpack_once(folder / name, to, name.removesuffix(".tar.gz"))
    return to


def _unpack_once(archive: Path, to: Path, top: str) -> None:
    """Unpack unless `to`/`top` has come from this archive already; what came from another one is replaced.

    A lock makes a second run wait. Raises InputError where `to`/`top` holds something that no archive has brought.
    """
    to.mkdir(parents=True, exist_ok=True)
    status = archive.stat()
    origin = f"{archive.resolve()} {status.st_size} bytes, changed {status.st_mtime_ns}\n"
    mark = to / f".{top}.from"
    with (to / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (to / top).is_dir():
            known = mark.read_text(encoding="utf-8") if mark.is_file() else ""
            if known == origin or (not known and archive.parent == to):  # beside its archive: unpacked by hand
                return
            if not known:
                raise InputError(
                    f"{to / top} is in the way: it did not come from {archive}; move it, or give {to} as the photos"
                )
        _unpack(archive, to, top, mark, origin)


def _unpack(archive: Path, to: Path, top: str, mark: Path, origin: str) -> None:
    """Unpack beside the target first: an interrupted run leaves no folder that looks complete, a broken archive replaces none."""
    work = Path(tempfile.mkdtemp(dir=to, prefix=".unpack."))
    log.info("unpacking %s into %s", archive, to)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")  # refuses members that leave the folder
        if not (work / top).is_dir():
            raise InputError(f"{archive}: has no folder {top}/ in it; is it the Oxford-IIIT Pet archive?")
        if (to / top).is_dir():
            os.rename(to / top, work / "old")
        mark.write_text(origin, encoding="utf-8")
        os.rename(work / top, to / top)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{archive}: cannot be unpacked: {error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch(archive: Archive, to: Path, base: str) -> None:
    target, part = to / archive.name, to / f"{archive.name}.part"
    if target.is_file():
        if _md5(target) == archive.md5:
            return
        raise CatlibError(
            f"{target}: its checksum is not {archive.md5}, so it is not the published file; delete it and run again"
        )
    have = -1
    while have < (have := _size(part)):  # again as long as each attempt brings something
        try:
            _download(base + archive.name, part)
            break
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", None) or error
            log.info("%s: %s after %d bytes", archive.name, reason, _size(part))
    else:
        raise CatlibError(
            f"cannot download {base + archive.name} ({reason}). On a machine with network, get images.tar.gz and annotations.tar.gz "
            f"from {PAGE} and put both into {to}; then run: catlib data {to} --out data/vlm. What has arrived is kept and continued"
        )
    found = _md5(part)
    if found != archive.md5:
        part.unlink()
        raise CatlibError(
            f"{base + archive.name}: checksum {found}, expected {archive.md5}; the download was damaged, run again"
        )
    os.replace(part, target)


def _download(url: str, part: Path) -> None:
    """Append to `part` what it lacks. A server that does not know ranges sends everything, and the file begins anew."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing beyond what is there; the checksum tells whether it is right
            return
        raise
    with answer, part.open("ab" if answer.status == 206 else "wb") as stream:
        length = int(answer.headers.get("Content-Length") or 0)
        blocks = iter(lambda: answer.read(BLOCK), b"")
        for block in track(blocks, f"downloading {part.stem}", total=-(-length // BLOCK) or None, unit="MB"):
            stream.write(block)
        got = stream.tell() - (have if answer.status == 206 else 0)
    if got < length:
        raise ConnectionError(f"the connection ended {length - got:,} bytes early")


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _md5(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()
