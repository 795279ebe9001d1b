"""Which photos are not independent, by their names and EXIF data: one cat's id, numbered runs, one camera within minutes."""

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import PurePosixPath

from catlib.data.corrections import RELABELLED
from catlib.data.findings import Finding
from catlib.data.names import SHOWN
from catlib.errors import InputError
from catlib.settings import split_list

MOST_PHOTOS = 30  # of one cat; a number that more photos share is a class, a camera's prefix or a date
SESSION = 600  # seconds between two photos of one camera that are taken for one sitting
# Numbers in a block, by the least number of photos in the run: small enough that every part gets its share of blocks.
BLOCKS = ((50, 3), (20, 2), (0, 1))
AUTO = ("id", "numbers", "exif")
RULES = (*AUTO, "folder")
# What follows the second number marks a copy: 7003_1 (1).jpg, 7003_1_small.jpg
_NUMBERED = re.compile(r"(\d+)_\d+(?!\d)")
ENDS = re.compile(r"(.*?)(\d{1,18})$")


@dataclass(frozen=True)
class Kin:
    """What joins photos beside their pixels."""

    keys: list[set[tuple[str, ...]]]  # of each photo; photos with a key in common are one group
    ids: list[str]  # the cat's id in each photo's name; empty: none
    no_ids: list[str]  # numbers that look like an id and are none
    said: list[str]


def rules_of(group_by: str) -> tuple[str, ...]:
    """The rules that the setting joins. Raises InputError on one that does not exist."""
    known = {"auto": AUTO, "none": (), **{rule: (rule,) for rule in RULES}}
    words = split_list(group_by)
    if wrong := [word for word in words if word not in known]:
        raise InputError(f"group_by: {wrong[0]!r} is none of {', '.join(known)}")
    if not words or ("none" in words and len(words) > 1):
        raise InputError(f"group_by: give one or several of {', '.join(RULES)}, or auto, or none alone")
    return tuple(dict.fromkeys(rule for word in words for rule in known[word]))


def kin_of(findings: Sequence[Finding], group_by: str) -> Kin:
    """What joins the kept photos by the rules of `group_by`."""
    rules = rules_of(group_by)
    ids, no_ids, said = ids_in_names(findings) if "id" in rules else ([""] * len(findings), [], [])
    keys: list[set[tuple[str, ...]]] = [{("id", id)} if id else set() for id in ids]
    runs: dict[tuple[str, ...], list[tuple[float, int]]] = defaultdict(list)
    for i, finding in enumerate(findings):
        name, at = PurePosixPath(finding.name), (finding.breed, finding.official)
        if not finding.kept:
            continue
        if "numbers" in rules and (ends := run_of(finding.name, any_text="numbers" in split_list(group_by))):
            runs["numbers", *at, str(name.parent), ends[0]].append((ends[1], i))
        if "exif" in rules and finding.taken:
            camera, _, time = finding.taken.partition("|")
            runs["exif", *at, camera].append((datetime.fromisoformat(time).timestamp(), i))
        if "folder" in rules and name.parent.name not in ("", "images", finding.source_name):
            keys[i].add(("folder", *at, str(name.parent)))
    for (rule, *where), run in runs.items():
        size = next(size for least, size in BLOCKS if len(run) >= least)
        run.sort()
        sitting = 0
        for (before, _), (value, i) in pairwise([run[0], *run]):
            sitting += value - before > SESSION
            keys[i].add((rule, *where, str(int(value) // size if rule == "numbers" else sitting)))
    if blocks := [key for some in keys for key in some if key[0] == "numbers"]:  # of each photo one at most
        stay = f"near numbers ({len(set(blocks)):,} blocks) stay in one part"
        said.append(f"{len(blocks):,} photos have numbered names: {stay}")
    return Kin(keys, ids, no_ids, said)


def run_of(image: str, any_text: bool = False) -> tuple[str, int] | None:
    """The text and the number at the end of a photo's name (`Bengal_12.jpg`, `IMG_0012.jpg`); None where it has none.
    The text holds a letter, or with `any_text` it may be empty (`0012.jpg`). An id and a number (`7003_1.jpg`) are no
    run."""
    stem = PurePosixPath(image).stem
    found = ENDS.match(stem)
    if not found or _NUMBERED.match(stem) or not (any_text or re.search(r"[^\W\d_]", found.group(1))):
        return None
    return found.group(1), int(found.group(2))


def id_in_name(image: str) -> str:
    """The id at the beginning of a photo's name, without leading zeros; empty where the name has none."""
    found = _NUMBERED.match(PurePosixPath(image).name)
    return found.group(1).lstrip("0") or "0" if found else ""


def ids_in_names(findings: Sequence[Finding], refused: Collection[str] = ()) -> tuple[list[str], list[str], list[str]]:
    """The cat's id in the name of each photo (empty: none), the ids that were not believed, and what is to be said of them.

    An id whose photos span breeds (and which no table gives), or that more than MOST_PHOTOS photos share, is none. Where most
    photos with such names are of that kind, the names count something else, and none of them is believed. `refused`: more of them.
    """
    ids = [id_in_name(f.name) if f.kept else "" for f in findings]
    members: dict[str, list[Finding]] = defaultdict(list)
    for finding, id in zip(findings, ids, strict=True):
        if id:
            members[id].append(finding)
    told = {f.animal for f in findings}  # what a table says is one cat may span breeds
    under = {id: {f.breed for f in photos if RELABELLED not in f.remarks} for id, photos in members.items()}
    spanning = {id for id, breeds in under.items() if len(breeds) > 1} - told
    many = {id for id, photos in members.items() if len(photos) > MOST_PHOTOS} - spanning
    reasons = ((spanning, "its photos lie under several breeds"), (many, f"more than {MOST_PHOTOS} photos share it"))
    no_id = "at the beginning of file names is no cat's id"
    said = [f"the number {named(some)} {no_id}: {why}" for some, why in reasons if some]
    wrong = spanning | many
    if 2 * sum(len(members[id]) for id in wrong) > sum(map(len, members.values())) and len(wrong) < len(members):
        said.append("as that holds for most photos with such names, no number in a name is taken for a cat's id")
        wrong = set(members)
    wrong |= set(refused)
    believed = [id for id in members if id not in wrong | told]
    if photos := sum(len(members[id]) for id in believed):
        cats = f"{len(believed):,} cats by the id in their names"
        said.append(f"{photos:,} photos show {cats}; all of one cat stay in one part")
    return ["" if id in wrong else id for id in ids], sorted(wrong & set(members)), said


def named(values: Collection[str]) -> str:
    """The first of the values, and how many more there are."""
    some = ", ".join(sorted(values)[:SHOWN])
    return some + (f" (and {len(values) - SHOWN:,} more)" if len(values) > SHOWN else "")
