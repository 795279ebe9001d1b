"""Files: the one place that writes them whole, reads JSON strictly and holds a folder for one process."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from catlib.errors import CatlibError, InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; at the end of the block it is synced and takes the name of `path`.

    A reader sees the former file or the whole new one, also after a power cut; an error in the block leaves the former file as
    it was and nothing else. The file gets the permissions that the umask gives. Raises CatlibError where it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=path.suffix)
    except OSError as error:
        raise CatlibError(f"{path}: cannot be written: {error.strerror}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CatlibError(f"{path}: cannot be written: {error.strerror or error}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every system lets a folder be opened; then the name is as safe as it gets
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, line ends as they are, whole or not at all (see `replacing`)."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, indented, without NaN or infinity (ValueError), whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def whole_folder(out: Path, force: bool, keep: Sequence[Path] = ()) -> Iterator[Path]:
    """A temporary folder beside `out` that gets its name at the end; an error or interruption leaves nothing behind.

    Raises InputError when `out` holds something already (unless `force`), or one of the `keep` folders is in it.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise InputError(f"{out} exists and is not empty: name another folder, or replace it with --force")
    for folder in keep:
        if folder.exists() and folder.resolve().is_relative_to(out):
            raise InputError(f"{out} holds what is to be exported; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        mode = 0o777 & ~_umask()
        for path in (temporary, *temporary.rglob("*")):
            path.chmod(mode if path.is_dir() else mode & 0o666)
        if out.exists():
            former = Path(tempfile.mkdtemp(prefix=f".{out.name}.former.", dir=out.parent))
            out.rename(former / out.name)
            temporary.rename(out)
            shutil.rmtree(former)
        else:
            temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def locked(path: Path, busy: str = "") -> Iterator[None]:
    """Hold the lock file `path` for this process; the system lets go of it however the process ends.

    With `busy`, a lock that another process holds is an InputError with this text; without, it is waited for.
    """
    lock = FileLock(path, thread_local=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0 if busy else -1)
    except Timeout:
        raise InputError(busy) from None
    except OSError as error:
        raise CatlibError(f"{path.parent}: cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def read_json(path: Path, kind: type = dict) -> Any:
    """The value in a JSON file, of type `kind`. Raises InputError naming the file (see `parse_json`)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    return parse_json(text, str(path), kind)


def parse_json(text: str, where: str, kind: type = dict) -> Any:
    """A JSON text, strictly: no NaN or infinity, no key twice, of type `kind`. Raises InputError that begins with `where`."""

    def number(name: str) -> float:
        raise InputError(f"{where}: {name} is no JSON number")

    def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(entries)
        if len(found) < len(entries):
            keys = [key for key, _ in entries]
            raise InputError(f"{where}: the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
        return found

    try:
        value = json.loads(text, parse_constant=number, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise InputError(f"{where}: not JSON ({error.msg}, {line}column {error.colno})") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{where}: {error}") from None
    if not isinstance(value, kind):
        expected = {"dict": "a JSON object", "list": "a JSON list"}.get(kind.__name__, kind.__name__)
        raise InputError(f"{where}: expected {expected}, found {type(value).__name__}")
    return value


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each non-empty line. Raises InputError naming file and line."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, parse_json(line.rstrip(), f"{path}:{number}")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
