"""The split: by breed, by group, by content. No photo's part depends on its position or on the order of files.

Every group gets a number in [0, 1) from the seed and its name, which comes from its photos' bytes. Breed by breed, groups with the
smallest numbers go to the test until it has its share, then from a second number to validation. Where the photos of a breed are
numbered (`Bengal_12.jpg`) and `group_by` takes numbers for runs, or the photos come with a test part, nothing is drawn: the test is
the block of the highest numbers and validation the block below, as photos with near numbers often show one cat.

No group is in two parts, and an official part stays what it is. Same photos and settings give the same split. In a folder that holds
a split of the same settings (`keep_split`), known photos keep their part; one that joins photos of two parts brings their group to
the part nearest to training, so that no photo which an earlier model has trained on is ever tested. Elsewhere, added photos move an
old one only where a breed's floor or its limits (TOLERANCE) bind, where they join its group, or where numbers decide.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from catlib.data.cats import ENDS, rules_of, run_of
from catlib.data.findings import Finding
from catlib.data.records import PARTS
from catlib.errors import InputError
from catlib.settings import DataSettings, split_list

SCHEME = "group-hash-2"  # changes when the same photos would get another split
TOLERANCE = 0.2  # a breed's share may be off by so much of itself before chance is corrected
NO_TEST = (
    "there is no test part: the photos come divided into train and val, and taking test photos from train changes what others train on; "
    "with draw_test=true it is drawn from train, by group"
)
MOST_BITS = 16  # of 64: beyond, hashes of unlike photos meet
MOST = {"test": 0.4, "val": 0.2}  # shares of a breed that floors may take; the rest is for training


@dataclass(frozen=True)
class Group:
    """Photos that must stay together."""

    name: str
    breed: str  # of most of its photos
    size: int
    number: tuple[str, int] | None  # the highest text and number at the end of its photos' names, where all have one
    is_run: bool  # whether such numbers are taken for the order of upload


def check_shares(settings: DataSettings) -> None:
    """Raises InputError when the shares leave nothing to train on or a number is out of its range."""
    val, test = settings.val_share, settings.test_share
    if not (val > 0 and test > 0 and val + test < 1):
        raise InputError(f"val_share {val} and test_share {test} must each be above 0 and leave a part for training")
    for name in ("min_val", "min_test", "photos_per_breed", "min_side"):
        if getattr(settings, name) < 0:
            raise InputError(f"{name} must not be negative, found {getattr(settings, name)}")
    if not 0 <= settings.near_duplicate_bits <= MOST_BITS:
        raise InputError(f"near_duplicate_bits must be from 0 to {MOST_BITS}, found {settings.near_duplicate_bits}")
    if not 0 <= settings.join_similar <= 1:
        raise InputError(f"join_similar is a cosine from 0 to 1, found {settings.join_similar}")
    rules_of(settings.group_by)


def split(
    findings: Sequence[Finding], settings: DataSettings, earlier: Mapping[str, str] | None = None
) -> tuple[list[Finding], list[str]]:
    """Give every kept photo its part; findings and remarks about breeds that could not have what was asked for.

    `earlier` maps SHA-256 to the part in an earlier split. Photos that come divided into train and val have no test part. A breed
    with too few photos to be split is in training only (`small_breeds`). Raises InputError naming the breeds that cannot be split.
    """
    if settings.draw_test and _lacks_test(findings):
        findings = [replace(f, official="" if f.official == "train" else f.official) for f in findings]
    members = defaultdict(list)
    for finding in findings:
        if finding.kept:
            members[finding.group].append(finding)
    if not members:
        shown = "; ".join(f"{finding.image} ({finding.verdict})" for finding in findings[:3])
        more = f" and {len(findings) - 3} more" if len(findings) > 3 else ""
        raise InputError(f"no usable photo is left: {shown}{more}")
    parts: dict[str, str] = {}
    free = defaultdict(list)
    for name, photos in sorted(members.items()):
        group = _group(name, photos, settings.group_by)
        if official := photos[0].official:
            parts[name] = official
        elif known := {part for photo in photos if (part := (earlier or {}).get(photo.sha256))}:
            parts[name] = min(known, key=PARTS.index)
        free[group.breed].append(group)
    given = {(finding.breed, finding.official) for finding in findings if finding.kept and finding.official}
    drawn = ("val",) if _lacks_test(findings) else ("test", "val")
    remarks, hopeless = [], []
    for breed, groups in sorted(free.items()):
        wanted = [part for part in drawn if (breed, part) not in given]
        if remark := _cannot_split(breed, groups, parts, wanted):
            trained = [group.name for group in groups if parts.get(group.name, "train") == "train"]
            if settings.small_breeds == "train" and trained:
                parts.update(dict.fromkeys(trained, "train"))
                tested = any(parts[group.name] == "test" for group in groups)
                remarks.append(f"{remark}: trained on" + ", but not measurable in the test" * (not tested))
                continue
            hopeless.append(remark)
            for group in groups:
                parts.pop(group.name, None)
        elif remark := _split_breed(breed, groups, parts, settings, wanted):
            remarks.append(remark)
    if hopeless and settings.small_breeds != "leave-out":
        advice = "Add photos, restrict with breeds=…, or leave such breeds out with small_breeds=leave-out"
        raise InputError(f"cannot split: {'; '.join(hopeless)}. {advice}")
    remarks += [f"left out: {remark}" for remark in hopeless] + [NO_TEST] * ("test" not in drawn)
    done = [replace(f, part=parts.get(f.group, "")) if f.kept else f for f in findings]
    detail = "too few different photos of this breed to split"
    done = [replace(f, verdict="breed too small", detail=detail) if f.kept and not f.part else f for f in done]
    return _limit_training(done, settings), remarks


def _lacks_test(findings: Sequence[Finding]) -> bool:
    """Whether the photos come divided into train and val only."""
    given = {finding.official for finding in findings}
    return "train" in given and "test" not in given


def _group(name: str, photos: Sequence[Finding], group_by: str) -> Group:
    breed = min(Counter(photo.breed for photo in photos).items(), key=lambda item: (-item[1], item[0]))[0]
    ends = [ENDS.match(PurePosixPath(photo.name).stem) for photo in photos]
    number = max((end[1], int(end[2])) for end in ends if end) if all(ends) else None
    any_text = "numbers" in split_list(group_by)
    is_run = "numbers" in rules_of(group_by) and all(run_of(photo.name, any_text) for photo in photos)
    return Group(name, breed, len(photos), number, is_run)


def _cannot_split(breed: str, groups: list[Group], parts: Mapping[str, str], wanted: Sequence[str]) -> str:
    """Why a breed cannot have a training and a test part; empty when it can. Only validation may be done without."""
    have = {parts[group.name] for group in groups if group.name in parts}
    open_groups = len(groups) - sum(group.name in parts for group in groups)
    needed = [part for part in ("train", *wanted) if part not in have]
    if open_groups >= len(needed) or needed == ["val"] or (needed == ["train", "val"] and open_groups):
        return ""
    photos = sum(group.size for group in groups)
    alike = f" ({len(groups)} when near-duplicates count once)" if len(groups) < photos else ""
    missing = " and ".join(needed[open_groups:])
    return f"{breed} has {_count(photos, 'usable photo')}{alike}, no {missing} part can be made"


def _split_breed(
    breed: str, groups: list[Group], parts: dict[str, str], settings: DataSettings, wanted: Sequence[str]
) -> str:
    """Assign, in `parts`, the groups of a breed that have no part yet; a remark when a floor could not be had."""
    short = []
    pool = [group for group in groups if "test" in wanted or parts.get(group.name) != "test"]
    for part in wanted:
        have = {parts[group.name] for group in groups if group.name in parts}
        spare = ("train" not in have) + (part == "test" and "val" in wanted and "val" not in have)
        got = _take(part, pool, parts, settings, spare, test_given="test" not in wanted)
        if got < (least := getattr(settings, f"min_{part}")):
            short.append(f"{_count(got, part + ' photo')} instead of {least}")
    for group in pool:
        parts.setdefault(group.name, "train")
    return f"{breed} ({_count(sum(group.size for group in groups), 'photo')}): {', '.join(short)}" if short else ""


def _take(
    part: str, pool: list[Group], parts: dict[str, str], settings: DataSettings, spare: int, test_given: bool
) -> int:
    """Move groups of `pool` into `part` in the order of their numbers; how many photos it has then. At least `spare`
    groups are left over. The floor yields where it would take more than the most that a part may have of the breed."""
    share, least = getattr(settings, f"{part}_share"), getattr(settings, f"min_{part}")
    sizes: Counter[str] = Counter()
    for group in pool:
        sizes[parts.get(group.name, "")] += group.size
    total, got = sizes.total(), sizes[part]
    low = max(1, min(least, int(MOST[part] * total)), math.floor((1 - TOLERANCE) * share * total))
    high = max(low, math.ceil((1 + TOLERANCE) * share * total))
    # validation is drawn from what the test has left, so its chance is higher by that
    chance = share if part == "test" else min(1.0, share * total / max(1, total - sizes["test"]))
    open_groups = sorted((group for group in pool if group.name not in parts), key=lambda group: group.name)
    drawn = {group.name: _number(settings.seed, part, group.name) for group in open_groups}
    if block := all(group.number is not None and (test_given or group.is_run) for group in open_groups):
        low = max(low, round(share * total))  # a block has no chance that would bring it there
        open_groups.sort(key=lambda group: group.number or ("", 0), reverse=True)
    else:
        open_groups.sort(key=lambda group: drawn[group.name])
    for group in open_groups[: max(0, len(open_groups) - spare)]:
        if got < low or (not block and drawn[group.name] < chance and got + group.size <= high):
            if got and got + group.size > max(high, int(MOST[part] * total)):
                continue  # one big group of near-duplicates must not eat the breed
            parts[group.name] = part
            got += group.size
    return got


def _number(seed: int, part: str, name: str) -> float:
    """A number in [0, 1) from the seed, the part that is drawn and the group's name."""
    digest = hashlib.sha256(f"group-hash-1 {seed} {part} {name}".encode()).digest()  # as every split so far was drawn
    return int.from_bytes(digest[:7], "big") / 2**56


def _limit_training(findings: list[Finding], settings: DataSettings) -> list[Finding]:
    """Keep at most `photos_per_breed` training photos of each breed, the same ones when more are added later or allowed."""
    if not settings.photos_per_breed:
        return findings
    trained = [i for i, finding in enumerate(findings) if finding.part == "train"]
    seen: Counter[str] = Counter()
    for i in sorted(trained, key=lambda i: _number(settings.seed, "limit", findings[i].sha256)):
        seen[findings[i].breed] += 1
        if seen[findings[i].breed] > settings.photos_per_breed:
            detail = f"beyond the {settings.photos_per_breed} training photos of a breed that were asked for"
            findings[i] = replace(findings[i], verdict="over the limit", detail=detail)
    return findings


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
