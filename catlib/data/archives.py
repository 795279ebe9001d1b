"""Photos that come packed, unpacked once; the Oxford-IIIT Pet archives, downloaded with a checksum and resumed."""

import logging
import tarfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from catlib.data.export import read_parquet
from catlib.errors import CatlibError, InputError
from catlib.files import digest_of, locked, saving, write_text
from catlib.folders import whole_folder
from catlib.transfer import Client, Reply, TransferError

PAGE = "https://www.robots.ox.ac.uk/~vgg/data/pets/"
BASE = "https://thor.robots.ox.ac.uk/~vgg/data/pets/"
LARGEST = 1_000_000_000  # bytes; the photos are 791,918,971
WITHIN_S = 6 * 3600.0  # for a file, all attempts together
ORIGIN = ".from"  # names the archives that an unpacked folder comes from
OXFORD_PETS = {  # file → MD5
    "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
    "images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
}
log = logging.getLogger(__name__)


def fetch_oxford_pets(to: Path, base: str = BASE, archives: Mapping[str, str] = OXFORD_PETS) -> Path:
    """Download both archives into `to`; the folder, ready as `photos`: `unpacked` does the rest. A finished file with
    the right checksum is not downloaded again, a partial one (.part) is continued. Raises CatlibError when there is no
    network or the bytes are not the published ones."""
    with saving(to):
        to.mkdir(parents=True, exist_ok=True)
    for name, md5 in archives.items():
        target, part = to / name, to / f"{name}.part"
        if target.is_file() and digest_of(target, "md5") != md5:
            other = f"its checksum is not {md5}, so it is not the published file; delete it and run again"
            raise CatlibError(f"{target}: {other}")
        if not target.is_file():
            _fetch(base + name, part)
            if (found := digest_of(part, "md5")) != md5:
                part.unlink()
                damaged = f"checksum {found}, expected {md5}; the download was damaged, run again"
                raise CatlibError(f"{base + name}: {damaged}")
            part.replace(target)
    return to


def unpacked(photos: Path, to: Path) -> Path:
    """The folder of photos behind `photos`: itself, or `to`, where what is packed in it is unpacked once.

    Packed are a folder with images.tar.gz and annotations.tar.gz in it, or one of the two files, and the parquet files that
    `catlib data export hf` writes. Raises InputError when a file is missing or broken (the folder stays as it was), or `to` holds
    something else.
    """
    folder = photos.parent if photos.is_file() and photos.name.endswith((".tar.gz", ".tgz")) else photos
    packed, unpack = sorted((photos / "data").glob("*.parquet")), read_parquet
    if not packed:
        if folder == photos and ((folder / "images").is_dir() or not (folder / "images.tar.gz").is_file()):
            return photos
        if folder != photos and photos.name not in OXFORD_PETS:
            names = " and ".join(OXFORD_PETS)
            raise InputError(f"photos: {photos}: only the archives {names} can be read packed; unpack it first")
        packed, unpack = [folder / name for name in OXFORD_PETS], _unpack
        if missing := next((archive for archive in packed if not archive.is_file()), None):
            raise InputError(f"photos: {missing} is missing; both archives are needed ({PAGE})")
    facts = ((path.resolve(), path.stat()) for path in packed)
    origin = "".join(f"{path} {stat.st_size} bytes, changed {stat.st_mtime_ns}\n" for path, stat in facts)
    mark = to / ORIGIN
    with locked(to.parent / f".{to.name}.lock"):
        if mark.is_file() and mark.read_text(encoding="utf-8") == origin:
            return to
        if to.exists() and not mark.is_file():
            other = f"did not come from {packed[0].parent}; move it, or give it as the photos"
            raise InputError(f"{to} is in the way: it {other}")
        with whole_folder(to, force=True) as new:
            for path in packed:
                unpack(path, new)
            write_text(new / ORIGIN, origin)
    return to


def _unpack(file: Path, to: Path) -> None:
    log.info("unpacking %s", file)
    try:
        with tarfile.open(file) as tar:
            tar.extractall(to, filter="data")  # refuses members that leave the folder
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{file}: cannot be unpacked: {error}") from None
    top = file.name.removesuffix(".tar.gz")
    if not (to / top).is_dir():
        raise InputError(f"{file}: has no folder {top}/ in it; is it the Oxford-IIIT Pet archive?")


def _fetch(url: str, part: Path) -> None:
    """Append to `part` what it lacks, again as long as each attempt brings something."""
    end, had, have = time.monotonic() + WITHIN_S, -1, 0
    while (have := part.stat().st_size if part.is_file() else 0) > had:
        try:
            return _download(url, part, have, end - time.monotonic())
        except TransferError as error:
            reason, had = error, have
            log.info("%s: %s", part.stem, reason)
    raise CatlibError(
        f"cannot download {url} ({reason}). On a machine with network, get {' and '.join(OXFORD_PETS)} from {PAGE} and put both into "
        f"{part.parent}; then run: catlib data {part.parent} --out data/vlm. What has arrived is kept and continued"
    )


def _download(url: str, part: Path, have: int, within_s: float) -> None:
    """Append to `part` what it lacks. A server that does not know ranges sends everything, and the file begins anew."""
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(saving(part))

        def begin(reply: Reply) -> Callable[[bytes], object]:
            length = reply.headers.get("content-length", "")
            total = int(length) if length.isdecimal() and len(length) < 16 else None
            stream = enter(part.open("ab" if reply.status == 206 else "wb"))
            bar = enter(tqdm(total=total, desc=part.stem, unit="B", unit_scale=True, disable=None))
            return lambda block: bar.update(stream.write(block))

        ranges = {"Range": f"bytes={have}-"} if have else {}
        reply = enter(Client()).send("GET", url, within_s=within_s, headers=ranges, most=LARGEST - have, sink=begin)
    if not reply.ok and reply.status != 416:  # nothing beyond what is there; the checksum tells whether it is right
        raise TransferError(f"HTTP {reply.status}")
