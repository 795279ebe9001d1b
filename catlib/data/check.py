"""A proof that anybody can rerun: no photo, copy or near-duplicate group of a split is in two parts."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from catlib.data import cats, nearness
from catlib.data.audit import audit
from catlib.data.dataset import Dataset, load_dataset, read_groups
from catlib.data.duplicates import labels_of
from catlib.data.findings import Finding
from catlib.data.records import PARTS
from catlib.errors import InputError
from catlib.settings import DataSettings


@dataclass(frozen=True)
class Check:
    """What a check found; `problems` is empty when the split can be trusted."""

    photos: int
    groups: int
    bits: int  # near-duplicates differ in at most so many bits of the hash
    counts: Mapping[str, int]
    problems: tuple[str, ...]
    remarks: tuple[str, ...] = ()  # what the split says of how the photos of one cat were found


def check(vlm_dir: Path) -> Check:
    """Validate the JSONL files, hash every photo anew and look for groups that cross parts.

    Nothing that the split wrote down is trusted: SHA-256, perceptual hashes, ids and groups come from the photos and their names as
    they are now, and are then compared with groups.csv. Photos that `photos_per_breed` left out of training count as well.
    `remarks`: what the split says of the table of cats, and that a part is nearer to training than it should be. Raises InputError
    when the folder holds no valid split.
    """
    dataset = load_dataset(vlm_dir)
    made, known = dataset.card.get("settings", {}), dataset.card.get("cats", {})
    bits = made.get("near_duplicate_bits", DataSettings().near_duplicate_bits)
    entries = _entries(dataset, vlm_dir)
    found = audit(dataset.image_root, [finding for finding, _ in entries], min_side=1)
    problems = [f"{f.image}: {f.verdict} ({f.detail})" for f in found if not f.kept]
    problems += [
        f"{f.image}: its bytes are not those of the split (SHA-256 {f.sha256[:12]}, recorded {recorded[:12]})"
        for f, (_, recorded) in zip(found, entries, strict=True)
        if f.kept and recorded and recorded != f.sha256
    ]
    by_id = "id" in cats.rules_of(made.get("group_by", "auto"))
    ids, _, said = cats.ids_in_names(found if by_id else [], known.get("no_ids", ()))
    hashed = [f for f in found if f.phash]
    labels = labels_of(hashed, bits).tolist()
    problems += _crossing(((f.sha256, f) for f in found), "the same bytes")
    problems += _crossing(((f.animal, f) for f in found), "photos of the same cat")
    problems += _crossing(zip(ids, found, strict=by_id), "photos of the same cat by the id in their names")
    problems += _crossing(((f.group, f) for f in found), "photos of one group")
    problems += _crossing(zip(labels, hashed, strict=True), f"near-duplicates (at most {bits} bits)")
    groups = len(set(labels)) + len({f.sha256 for f in found if f.kept and not f.phash})
    remarks = (*known.get("said", said), *nearness.warnings_of(nearness.nearness(found)))
    return Check(len(found), groups, bits, dict(Counter(f.part for f in found)), tuple(problems), remarks)


def _entries(dataset: Dataset, vlm_dir: Path) -> list[tuple[Finding, str]]:
    """Every photo of the split with its part and recorded SHA-256; the problem of a photo in two parts is found by its bytes."""
    entries = []
    for part in PARTS:
        for sample in dataset.part(part):
            group = str(sample.metadata.get("group") or "")
            finding = Finding(sample.image, sample.breed, part=part, animal=sample.animal, group=group)
            entries.append((finding, str(sample.metadata.get("sha256", ""))))
    inside = {finding.image for finding, _ in entries}
    for row in read_groups(vlm_dir) if dataset.card else ():
        if row["image"] in inside:
            continue
        if row["verdict"] == "kept":
            gone = f"{row['image']} is in groups.csv and in no JSONL file; run catlib data again"
            raise InputError(f"{vlm_dir}: {gone}")
        entries.append((Finding(row["image"], row["breed"], row["part"], group=row["group"]), row["sha256"]))
    return entries


def _crossing(photos: Iterable[tuple[object, Finding]], what: str) -> list[str]:
    """A problem for each key whose photos are in more than one part."""
    members: dict[object, dict[str, str]] = defaultdict(dict)
    for key, finding in photos:
        if key != "" and finding.kept:
            members[key].setdefault(finding.part, finding.image)
    return [
        f"{what} in {' and '.join(where)}: {', '.join(where.values())}" for where in members.values() if len(where) > 1
    ]
