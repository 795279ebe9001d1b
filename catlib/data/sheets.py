"""Tables that people's programs have written: comma, semicolon, tab or bar, UTF-8, UTF-16 or Windows text, headers in any case."""

import codecs
import csv
import io
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from catlib.errors import InputError

FIELD = 2**31 - 1  # the csv module's own limit, 131,072 characters, is less than people's tables hold in a field
DELIMITERS = ",;\t|"


def read_sheet(path: Path, columns: Mapping[str, Sequence[str]], needed: Collection[str]) -> list[dict[str, str]]:
    """The rows, reduced to those of `columns` (name → the headers that mean it, in small letters and digits) that are there.

    A row that ends early has empty cells. Raises InputError where the file cannot be read or has none of the `needed` columns.
    """
    former = csv.field_size_limit(FIELD)
    try:
        if not path.is_file():  # a pipe would be waited for
            raise InputError(f"{path}: not a file")
        text = _decoded(path.read_bytes())
        first, _, rest = text.partition("\n")
        hint = re.fullmatch(r"sep=(.)\s*", first, re.IGNORECASE)  # a line that Excel writes and reads
        best: tuple[dict[str, int], list[list[str]]] = ({}, [])
        for delimiter in hint.group(1) if hint else DELIMITERS:
            stream = io.StringIO(rest if hint else text, newline="")
            cells = csv.reader(stream, delimiter=delimiter, skipinitialspace=True)
            header = [re.sub(r"[\W_]", "", name).casefold() for name in next(cells, [])]
            found = {name: header.index(at) for name, at in _places(header, columns)}
            if len(found) > len(best[0]):
                best = found, list(cells)
        if not best[0].keys() & set(needed):
            raise InputError(
                f"{path}: no column names the {' or the '.join(needed)} (its first line: {first[:200].strip()})"
            )
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    finally:
        csv.field_size_limit(former)  # it counts for the whole process
    return [
        {name: row[place].strip() if place < len(row) else "" for name, place in best[0].items()} for row in best[1]
    ]


def _places(header: list[str], columns: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Each column that is there, and what its header is."""
    found = ((name, next((alias for alias in aliases if alias in header), "")) for name, aliases in columns.items())
    return [(name, alias) for name, alias in found if alias]


def _decoded(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")
