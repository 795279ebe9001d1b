"""Files: the one place that writes them whole, reads JSON, YAML and CSV strictly and holds a folder for one process."""

import csv
import errno
import glob
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import yaml
from filelock import FileLock, Timeout

from catlib.errors import CatlibError, InputError

_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")  # a cell that a spreadsheet computes, or that has been made harmless
_FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))
# Of a number that may be none. A search that begins with one letter is four times as fast as one that begins with either.
_LONG, _LARGE, _POWER, _CAPITAL = map(re.compile, (r"\d{12}", r"\d{300}", r"e\+?\d{3}", r"E\+?\d{3}"))
WRITING = ".writing"  # in a folder that is being written, and in the name of what is not whole yet
# More than any file of ours has, and little enough to be refused within seconds.
DEEPEST = 100  # levels of JSON or YAML
LONGEST_YAML, LONGEST_LINE, LARGEST = 10**5, 2**26, 2**30  # characters


@contextmanager
def saving(path: Path, reads: bool = False) -> Iterator[None]:
    """Turn what a full disk or a missing permission makes other libraries raise into a CatlibError that names `path`; with
    `reads`, where the block reads other files as well, only a full disk.
    """
    try:
        yield
    except CatlibError:
        raise
    except Exception as error:  # torch, safetensors and tokenizers have each an exception of their own
        full = next((text for text in _FULL if text in str(error)), None)
        if full is None and (reads or not isinstance(error, OSError)):
            raise
        raise CatlibError(f"{path}: cannot be written: {full or getattr(error, 'strerror', None) or error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; at the end of the block it is synced and takes the name of `path`.

    A reader sees the former file or the whole new one, also after a power cut; an error in the block leaves the former file as
    it was and nothing else. The file gets the permissions that the umask gives. Raises CatlibError where it cannot be written.
    """
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name[:50]}{WRITING}-{secrets.token_hex(4)}{path.suffix}")
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
    try:
        with saving(path):
            yield temporary
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            temporary.chmod(mode)  # some libraries write a file of their own and rename it
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


def remove_leftovers(folder: Path, name: str = "", older_s: float = 0.0) -> None:
    """Remove what killed processes have left of a file in a folder, or of all in it and below; call it where nobody else writes,
    or with `older_s`: only what nobody has written to for so long.
    """
    of_file, of_all = f".{glob.escape(name[:50])}{WRITING}-*", f".*{WRITING}-*"
    for path in folder.glob(of_file) if name else folder.rglob(of_all):
        with suppress(OSError):
            if path.stat().st_mtime <= time.time() - older_s and not (path / WRITING).exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


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
def locked(path: Path, busy: str = "") -> Iterator[None]:
    """Hold the lock file `path` for this process; the system lets go of it however the process ends. A lock that another process
    holds is an InputError with the text `busy`, or is waited for.
    """
    lock = FileLock(path, thread_local=False)
    with saving(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0 if busy else -1)
        except Timeout:
            raise InputError(busy) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _reading(path: Path) -> Iterator[TextIO]:
    """A text file, line ends as they are. Raises InputError where it is missing, not UTF-8 or no file (a pipe never ends)."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a file")
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield stream
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def digest_of(path: Path, kind: str = "sha256") -> str:
    """The digest of a file's bytes, in hex. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, kind).hexdigest()


def read_text(path: Path) -> str:
    """The text of a file, line ends as they are. Raises InputError where it is missing, not UTF-8, no file or too large."""
    with _reading(path) as stream:
        if len(text := stream.read(LARGEST)) == LARGEST:
            raise InputError(f"{path}: larger than {LARGEST:,} characters")
    return text


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each non-empty line. Raises InputError naming file and line."""
    with _reading(path) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), ""), start=1):
            if len(line) == LONGEST_LINE:
                raise InputError(f"{path}:{number}: a line of more than {LONGEST_LINE:,} characters")
            if line.strip():
                yield number, parse_json(line.rstrip(), f"{path}:{number}")


def read_json(path: Path) -> Any:
    """The object in a JSON file. Raises InputError naming the file (see `parse_json`)."""
    return parse_json(read_text(path), str(path))


def _pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(entries)
    if len(found) < len(entries):
        raise KeyError(Counter(key for key, _ in entries).most_common(1)[0][0])
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs)  # one for all lines of a file: json.loads makes one at each call
_OF_LARGE = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_int=lambda text: int(text) if math.isfinite(float(text)) else math.inf
)


def parse_json(text: str, where: str, kind: type = dict) -> Any:
    """A JSON text, strictly: no NaN or infinity, no key twice, of type `kind`. Raises InputError that begins with `where`."""
    # what is checked again costs time: only where something may be wrong (300 digits are 12 in every 25th character)
    large = bool(_POWER.search(text) or _CAPITAL.search(text) or (_LONG.search(text[::25]) and _LARGE.search(text)))
    doubtful = large or "NaN" in text or "Infinity" in text or text.count("[") + text.count("{") > DEEPEST
    try:
        value = (_OF_LARGE if large else _DECODER).decode(text)
    except KeyError as error:
        raise InputError(f"{where}: the key {error.args[0]!r:.200} stands twice") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise InputError(f"{where}: not JSON ({error.msg}, {line}column {error.colno})") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    if doubtful:
        _check(value, where)
    if not isinstance(value, kind):
        expected = {"dict": "a JSON object", "list": "a JSON list"}.get(kind.__name__, kind.__name__)
        raise InputError(f"{where}: expected {expected}, found {type(value).__name__}")
    return value


def _check(value: Any, where: str, key: str = "", depth: int = 1) -> None:
    """Raise InputError for a number that is none (NaN, beyond 1.8e308) and for what is nested too deeply."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: {key}{json.dumps(value)} is no number")
    if depth > DEEPEST:
        raise InputError(f"{where}: nested too deeply")
    if isinstance(value, dict):
        for name, entry in value.items():
            _check(entry, where, f"key {name!r:.200}: ", depth + 1)
    for entry in value if isinstance(value, list) else ():
        _check(entry, where, key, depth + 1)


class _StrictLoader(yaml.SafeLoader):
    """YAML's plain values and nothing that a file of settings does not need: no key twice, no aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "an alias (*) is not allowed here", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            at = next(i for i, key in enumerate(keys) if key in keys[:i])
            mark = node.value[at][0].start_mark
            raise yaml.MarkedYAMLError(None, None, f"the key {keys[at]!r:.200} stands twice", mark)
        return found


def parse_yaml(text: str, where: str) -> Any:
    """A YAML text, strictly: plain values, no key twice, no NaN or infinity as a value. Raises InputError that begins with `where`."""
    if len(text) > LONGEST_YAML:
        raise InputError(f"{where}: longer than {LONGEST_YAML:,} characters")
    try:
        value = yaml.load(text, _StrictLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(f"{where}: not YAML: {line}{error.problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date that does not exist, thousands of digits
        raise InputError(f"{where}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    _check(value, where)
    return value


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV. A text that a spreadsheet would take for a formula gets an apostrophe in front (see `read_csv`)."""
    text = io.StringIO()
    plain, quoted = (csv.writer(text, lineterminator="\n", quoting=how) for how in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    plain.writerow(columns)
    for row in rows:
        cells = [f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell for cell in row]
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
        for row in filter(None, reader):
            if len(row) != len(columns):
                raise InputError(f"{path}:{reader.line_num}: {len(row)} cells in place of {len(columns)}")
            cells = (cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell for cell in row)
            rows.append(dict(zip(columns, cells, strict=True)))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not CSV: {error}") from None
    return columns, rows
