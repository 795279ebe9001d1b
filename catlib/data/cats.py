"""Which photos show one cat: the id in a file's name, `<id>_<n>.jpg`, and what must hold before it is believed."""

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath

from catlib.data.findings import Finding
from catlib.data.names import SHOWN

MOST_PHOTOS = 30  # of one cat; a number that more photos share is a class, a camera's prefix or a date
_NUMBERED = re.compile(
    r"(\d+)_\d+(?!\d)"
)  # what follows the second number marks a copy: 7003_1 (1).jpg, 7003_1_small.jpg


def id_in_name(image: str) -> str:
    """The id at the beginning of a photo's name, without leading zeros; empty where the name has none."""
    found = _NUMBERED.match(PurePosixPath(image).name)
    return found.group(1).lstrip("0") or "0" if found else ""


def ids_in_names(
    findings: Sequence[Finding], refused: Collection[str] = ()
) -> tuple[list[str], list[str], tuple[str, ...]]:
    """The cat's id in the name of each photo (empty: none), the ids that were not believed, and what is to be said of them.

    An id whose photos span breeds (and which no table gives), or that more than MOST_PHOTOS photos share, is none. Where most photos with such names are of that
    kind, the names count something else, and none of them is believed. `refused`: ids that are known to be none.
    """
    ids = [id_in_name(f.name) if f.kept else "" for f in findings]
    members: dict[str, list[Finding]] = defaultdict(list)
    for finding, id in zip(findings, ids, strict=True):
        if id:
            members[id].append(finding)
    told = {f.animal for f in findings}  # what a table says is one cat may span breeds
    spanning = {id for id, photos in members.items() if len({photo.breed for photo in photos}) > 1} - told
    many = {id for id, photos in members.items() if len(photos) > MOST_PHOTOS} - spanning
    wrong = spanning | many
    said = [
        f"the number {_named(some)} at the beginning of file names is no cat's id: {why}"
        for some, why in (
            (spanning, "its photos lie under several breeds"),
            (many, f"more than {MOST_PHOTOS} photos share it"),
        )
        if some
    ]
    if 2 * sum(len(members[id]) for id in wrong) > sum(map(len, members.values())) and len(wrong) < len(members):
        said.append("as that holds for most photos with such names, no number in a name is taken for a cat's id")
        wrong = set(members)
    wrong |= set(refused)
    believed = [id for id in members if id not in wrong | told]
    if photos := sum(len(members[id]) for id in believed):
        said.append(
            f"{photos:,} photos show {len(believed):,} cats by the id in their names; all of one cat stay in one part"
        )
    return ["" if id in wrong else id for id in ids], sorted(wrong & set(members)), tuple(said)


def _named(ids: Collection[str]) -> str:
    some = ", ".join(sorted(ids)[:SHOWN])
    return some + (f" (and {len(ids) - SHOWN:,} more)" if len(ids) > SHOWN else "")
