"""Files: the one place that writes them whole, reads JSON, YAML and CSV strictly and holds a folder for one process."""

import csv
import errno
import glob
import io
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from catlib.errors import CatlibError, InputError

_FORMULA = re.compile(
    r"'*[=+\-@\t\r\n]"
)  # how a cell begins that a spreadsheet computes, or that has been made harmless
_LOCK = ".writing"  # in a folder that is being written
_LARGE = re.compile(r"\d{300}|[eE]\+?\d{3}")


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn what a full disk or a missing permission makes other libraries raise into a CatlibError that names `path`."""
    try:
        yield
    except CatlibError:
        raise
    except OSError as error:
        raise CatlibError(f"{path}: cannot be written: {error.strerror or error}") from None
    except Exception as error:  # torch, safetensors and tokenizers have each an exception of their own
        if _is_full(error):
            raise CatlibError(f"{path}: cannot be written: {os.strerror(errno.ENOSPC)}") from error
        raise


def _is_full(error: Exception) -> bool:
    return os.strerror(errno.ENOSPC) in str(error)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; at the end of the block it is synced and takes the name of `path`.

    A reader sees the former file or the whole new one, also after a power cut; an error in the block leaves the former file as
    it was and nothing else. The file gets the permissions that the umask gives. Raises CatlibError where it cannot be written.
    """
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        with saving(path):
            yield temporary
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
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
def appending(path: Path) -> Iterator[Callable[[str], None]]:
    """Add lines to the end of a file by calling what is yielded. A line is in the file when the call returns; one for which
    there is no room is taken back, so that the file ends with a whole line, and is a CatlibError that names the file.
    """

    def add(line: str) -> None:
        end, data = stream.seek(0, os.SEEK_END), line.encode()
        try:
            with saving(path):
                while data:
                    data = data[stream.write(data) :]
        except CatlibError:
            with suppress(OSError):  # a device has no end
                stream.truncate(end)
            raise

    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("ab", buffering=0)
    with stream:
        yield add


@contextmanager
def whole_folder(
    out: Path, force: bool, keep: Sequence[Path] = (), ours: Callable[[Path], bool] = lambda folder: True
) -> Iterator[Path]:
    """A temporary folder beside `out` that gets its name at the end; an error or interruption leaves nothing behind.

    Raises InputError when `out` holds something already (unless `force`, and it is a folder that `ours` knows as one of its
    kind), when another process writes it, or one of the `keep` folders is in it.
    """
    out = out.resolve()
    for folder in keep:
        if folder.exists() and folder.resolve().is_relative_to(out):
            raise InputError(f"{out} holds what is to be exported; name another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not force:
            raise InputError(f"{out} exists and is not empty: name another folder, or replace it with --force")
        if not out.is_dir() or not ours(out):
            raise InputError(
                f"{out} was not written by this command, so --force does not replace it: name another folder"
            )
    with saving(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for other in out.parent.glob(f".{glob.escape(out.name)}.writing-*"):
            with locked(other / _LOCK, f"{out}: another process writes it; wait for its end, or name another folder"):
                shutil.rmtree(other)  # its process was killed
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.writing-", dir=out.parent))
    try:
        with locked(temporary / _LOCK):
            yield temporary
            (temporary / _LOCK).unlink()
            mode = 0o777 & ~_umask()
            for path in (temporary, *temporary.rglob("*")):
                path.chmod(mode if path.is_dir() else mode & 0o666)
            if out.exists():
                former = Path(tempfile.mkdtemp(prefix=f".{out.name}.former-", dir=out.parent))
                out.rename(former / out.name)
                temporary.rename(out)
                shutil.rmtree(former)
            else:
                temporary.rename(out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, Exception) and not isinstance(error, CatlibError) and _is_full(error):
            raise CatlibError(f"{out}: cannot be written: {os.strerror(errno.ENOSPC)}") from error
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


def read_text(path: Path) -> str:
    """A text file, line ends as they are. Raises InputError where it is missing, not UTF-8 or no file (a pipe never ends)."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a file")
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return stream.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(path: Path, kind: type = dict) -> Any:
    """The value in a JSON file, of type `kind`. Raises InputError naming the file (see `parse_json`)."""
    return parse_json(read_text(path), str(path), kind)


def parse_json(text: str, where: str, kind: type = dict) -> Any:
    """A JSON text, strictly: no NaN or infinity, no key twice, of type `kind`. Raises InputError that begins with `where`."""
    bad: list[str] = []

    def number(text: str) -> Any:
        value = float(text)
        if not math.isfinite(value):
            bad.append(text)
            return bad
        return value

    def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(entries)
        if len(found) < len(entries):
            keys = [key for key, _ in entries]
            raise InputError(f"{where}: the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
        if bad and (key := next((key for key, value in entries if _holds(value, bad)), None)) is not None:
            raise InputError(f"{where}: key {key!r}: {bad[0]} is no JSON number")
        return found

    # a function in the place of float takes half as long again, so it is given only where a number may be infinite
    floats = number if _LARGE.search(text) else None
    try:
        value = json.loads(text, parse_constant=number, parse_float=floats, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise InputError(f"{where}: not JSON ({error.msg}, {line}column {error.colno})") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{where}: {error}") from None
    if bad:
        raise InputError(f"{where}: {bad[0]} is no JSON number")
    if not isinstance(value, kind):
        expected = {"dict": "a JSON object", "list": "a JSON list"}.get(kind.__name__, kind.__name__)
        raise InputError(f"{where}: expected {expected}, found {type(value).__name__}")
    return value


def _holds(value: Any, bad: list[str]) -> bool:
    return value is bad or (type(value) is list and any(_holds(entry, bad) for entry in value))


class _StrictLoader(yaml.SafeLoader):
    """YAML's plain values and nothing that a file of settings does not need: no key twice, no NaN, no aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "an alias (*) is not allowed here", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
            if value_node.tag == "tag:yaml.org,2002:float":
                self.construct_finite(value_node, f"key {key!r}: ")
        return super().construct_mapping(node, deep)

    def construct_finite(self, node: Any, where: str = "") -> float:
        value = self.construct_yaml_float(node)
        if not math.isfinite(value):
            raise yaml.MarkedYAMLError(None, None, f"{where}{node.value} is no number", node.start_mark)
        return value


_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_finite)


def parse_yaml(text: str, where: str) -> Any:
    """A YAML text, strictly: plain values, no key twice, no NaN or infinity as a value. Raises InputError that begins with `where`."""
    try:
        return yaml.load(text, _StrictLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(f"{where}: not YAML: {line}{error.problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date that does not exist, thousands of digits
        raise InputError(f"{where}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV. A text that a spreadsheet would take for a formula gets an apostrophe in front (see `read_csv`)."""
    text = io.StringIO()
    plain, quoted = (csv.writer(text, lineterminator="\n", quoting=how) for how in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    plain.writerow(columns)
    for row in rows:
        cells = [_as_text(cell) for cell in row]
        (quoted if any("\r" in str(cell) for cell in cells) else plain).writerow(cells)  # Python leaves \r unquoted
    return text.getvalue()


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a table that `csv_text` has made. Raises InputError naming file and line."""
    rows = []
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        columns = next(reader, [])
        if len(set(columns)) < len(columns):
            raise InputError(f"{path}: the column {next(c for c in columns if columns.count(c) > 1)!r} stands twice")
        for row in reader:
            if row and len(row) != len(columns):
                raise InputError(f"{path}:{reader.line_num}: {len(row)} cells in place of {len(columns)}")
            if row:
                cells = (cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell for cell in row)
                rows.append(dict(zip(columns, cells, strict=True)))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not CSV: {error}") from None
    return columns, rows


def _as_text(cell: Any) -> Any:
    """A text that begins like a formula, or like one that has been made harmless, with an apostrophe; others as they are."""
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each non-empty line. Raises InputError naming file and line."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a file")
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
