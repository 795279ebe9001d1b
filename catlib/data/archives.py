"""The Oxford-IIIT Pet archives: downloaded with a checksum, resumed after an interruption, unpacked once."""

import hashlib
import logging
import tarfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from catlib.errors import CatlibError, InputError
from catlib.files import locked, saving, whole_folder, write_text
from catlib.transfer import Client, Reply, TransferError

PAGE = "https://www.robots.ox.ac.uk/~vgg/data/pets/"
BASE = "https://thor.robots.ox.ac.uk/~vgg/data/pets/"
LARGEST = 1_000_000_000  # bytes; the photos are 791,918,971
WITHIN_S = 6 * 3600.0  # for a file, all attempts together
ORIGIN = ".from"  # names the archives that an unpacked folder comes from
log = logging.getLogger(__name__)


OXFORD_PETS = {  # file → MD5
    "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
    "images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
}


def fetch_oxford_pets(to: Path, base: str = BASE, archives: Mapping[str, str] = OXFORD_PETS) -> Path:
    """Download both archives into `to`; the folder, ready as `photos`: `unpacked` does the rest.

    A finished file with the right checksum is not downloaded again, a partial one (.part) is continued. Raises CatlibError when
    there is no network or the bytes are not the published ones.
    """
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CatlibError(f"{to}: cannot be written: {error.strerror}") from None
    for name, md5 in archives.items():
        _fetch(base + name, to / name, md5)
    return to


def unpacked(photos: Path, to: Path) -> Path:
    """The folder of photos behind `photos`: itself, or `to`, where what its Oxford archives hold is unpacked once.

    `photos` may be a folder with images.tar.gz and annotations.tar.gz in it, or one of the two files. Raises InputError when
    the other one is missing, an archive is broken (the folder stays as it was), or `to` holds something else.
    """
    folder = photos.parent if photos.is_file() and photos.name.endswith((".tar.gz", ".tgz")) else photos
    if folder == photos and ((folder / "images").is_dir() or not (folder / "images.tar.gz").is_file()):
        return photos
    if folder != photos and photos.name not in OXFORD_PETS:
        raise InputError(
            f"photos: {photos}: only the archives {' and '.join(OXFORD_PETS)} can be read packed; unpack it first"
        )
    origin = ""
    for archive in (folder / name for name in OXFORD_PETS):
        if not archive.is_file():
            raise InputError(f"photos: {archive} is missing; both archives are needed ({PAGE})")
        origin += f"{archive.resolve()} {archive.stat().st_size} bytes, changed {archive.stat().st_mtime_ns}\n"
    mark = to / ORIGIN
    with locked(to.parent / f".{to.name}.lock"):
        if mark.is_file() and mark.read_text(encoding="utf-8") == origin:
            return to
        if to.exists() and not mark.is_file():
            raise InputError(f"{to} is in the way: it did not come from {folder}; move it, or give it as the photos")
        with whole_folder(to, force=True) as new:
            for name in OXFORD_PETS:
                _unpack(folder / name, new)
            write_text(new / ORIGIN, origin)
    return to


def _unpack(archive: Path, to: Path) -> None:
    log.info("unpacking %s", archive)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(to, filter="data")  # refuses members that leave the folder
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{archive}: cannot be unpacked: {error}") from None
    top = archive.name.removesuffix(".tar.gz")
    if not (to / top).is_dir():
        raise InputError(f"{archive}: has no folder {top}/ in it; is it the Oxford-IIIT Pet archive?")


def _fetch(url: str, target: Path, md5: str) -> None:
    if target.is_file():
        if _md5(target) == md5:
            return
        raise CatlibError(
            f"{target}: its checksum is not {md5}, so it is not the published file; delete it and run again"
        )
    part, end = target.with_name(f"{target.name}.part"), time.monotonic() + WITHIN_S
    have, reason = -1, ""
    while have < (have := _size(part)):  # again as long as each attempt brings something
        try:
            _download(url, part, have, end - time.monotonic())
            break
        except TransferError as error:
            reason = str(error)
            log.info("%s: %s", target.name, reason)
    else:
        raise CatlibError(
            f"cannot download {url} ({reason}). On a machine with network, get {' and '.join(OXFORD_PETS)} from {PAGE} and put both "
            f"into {target.parent}; then run: catlib data {target.parent} --out data/vlm. What has arrived is kept and continued"
        )
    if (found := _md5(part)) != md5:
        part.unlink()
        raise CatlibError(f"{url}: checksum {found}, expected {md5}; the download was damaged, run again")
    part.replace(target)


def _download(url: str, part: Path, have: int, within_s: float) -> None:
    """Append to `part` what it lacks. A server that does not know ranges sends everything, and the file begins anew."""
    with ExitStack() as stack:
        stack.enter_context(saving(part))

        def begin(reply: Reply) -> Callable[[bytes], None]:
            stream = stack.enter_context(part.open("ab" if reply.status == 206 else "wb"))
            length = reply.headers.get("content-length", "")
            total = int(length) if length.isdecimal() and len(length) < 16 else None
            bar = stack.enter_context(tqdm(total=total, desc=part.stem, unit="B", unit_scale=True, disable=None))

            def add(block: bytes) -> None:
                stream.write(block)
                bar.update(len(block))

            return add

        ranges = {"Range": f"bytes={have}-"} if have else {}
        with Client() as client:
            reply = client.send("GET", url, within_s=within_s, headers=ranges, most=LARGEST - have, sink=begin)
    if not reply.ok and reply.status != 416:  # nothing beyond what is there; the checksum tells whether it is right
        raise TransferError(f"HTTP {reply.status}")


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _md5(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()
