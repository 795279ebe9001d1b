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
    """The rows, reduced to those of `columns` (name → the headers that mean it, in small letters and digits) that are
    there. A row that ends early has empty cells. Raises InputError where the file cannot be read or has none of the
    `needed` columns."""
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
            known = ((name, [alias for alias in aliases if alias in header]) for name, aliases in columns.items())
            found = {name: header.index(there[0]) for name, there in known if there}
            if len(found) > len(best[0]):
                best = found, list(cells)
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    finally:
        csv.field_size_limit(former)  # it counts for the whole process
    places, rows = best
    if not places.keys() & set(needed):
        wanted = f"no column names the {' or the '.join(needed)}"
        raise InputError(f"{path}: {wanted} (its first line: {first[:200].strip()})")
    return [{name: row[at].strip() if at < len(row) else "" for name, at in places.items()} for row in rows]


def _decoded(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")
