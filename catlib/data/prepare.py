"""From any folder of labelled photos to data_dir/vlm/{train,val,test}.jsonl: source, names, audit, groups, split, conversations."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from catlib.data.archives import unpacked
from catlib.data.audit import audit
from catlib.data.conversations import answer_for, question_for
from catlib.data.dataset import Dataset, load_dataset, read_card, read_groups, write_dataset, writing
from catlib.data.duplicates import group_photos, judge_copies
from catlib.data.findings import Finding, write_audit
from catlib.data.names import Names, priority_of, restrict, understand
from catlib.data.records import PARTS, Sample, make_sample
from catlib.data.sources import Source, read_source
from catlib.data.splits import SCHEME, check_shares, split
from catlib.errors import InputError
from catlib.paths import resolve
from catlib.settings import DataSettings

SPLIT_SETTINGS = ("seed", "val_share", "test_share", "min_val", "min_test")  # another value of these: another split
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Judged:
    """The photos of a run after everything but the split."""

    source: Source
    names: Names
    findings: list[Finding]


def prepare(settings: DataSettings, out: Path | None = None) -> Dataset:
    """Make the split that the settings describe and return it; the same settings and photos give the same bytes.

    Writes train.jsonl, val.jsonl, test.jsonl, dataset.json and groups.csv to `out` (default: `data_dir`/vlm), and audit.csv with
    a verdict on every file to `run_dir`. Photos stay where they are and as they are. Raises InputError naming what is wrong.
    """
    check_shares(settings)
    out = out or resolve(settings.data_dir) / "vlm"
    judged = _judge(_photos(settings), settings)
    with writing(out):  # from reading the earlier split to the last file, so that two runs cannot mix theirs
        table = resolve(settings.run_dir) / "audit.csv"
        try:
            findings, remarks = split(judged.findings, settings, _earlier(out, settings))
        except InputError as error:
            write_audit(table, judged.findings)  # whoever has to mend the photos needs the verdicts most
            raise InputError(f"{error}. The verdict on every file: {table}") from None
        write_audit(table, findings)
        used = [finding for finding in findings if finding.kept]
        breeds = sorted({finding.breed for finding in used})
        card = _card(settings, judged, findings, remarks, priority_of(breeds, settings))
        samples = _samples(used, judged.source, settings)
        for part in PARTS:
            if not samples[part]:
                raise InputError(f"the {part} part would be empty: {len(used)} usable photos are too few; see {table}")
        write_dataset(out, judged.source.root, samples, findings, card)
    for line in (*judged.source.notes, *judged.names.notes(), *remarks):
        log.info("%s", line)
    left_out = Counter(finding.verdict for finding in findings if not finding.kept)
    log.info("%s: %s", out, ", ".join(f"{part} {len(samples[part])}" for part in PARTS))
    if left_out:
        log.info("left out: %s", ", ".join(f"{reason} {n}" for reason, n in left_out.most_common()))
    return load_dataset(out)


def _photos(settings: DataSettings) -> Source:
    """The photos that the settings name. Raises InputError, with the profile's hint, when there are none."""
    said = getattr(settings, "hint", "")
    hint = f". {said}" if said else ""
    if not settings.photos:
        raise InputError(f"photos is empty: name the folder of the labelled photos{hint}")
    try:
        folder = unpacked(resolve(settings.photos), resolve(settings.data_dir) / "photos")
        if not folder.exists():
            raise InputError(f"photos: {folder} does not exist; give a folder of labelled photos{hint}")
        return read_source(folder, settings.source)
    except PermissionError as error:
        raise InputError(f"photos: {error.filename}: {error.strerror}") from None


def _judge(source: Source, settings: DataSettings) -> _Judged:
    """Names and breeds, then every file opened, then copies and near-duplicates."""
    names = understand((f.source_name for f in source.findings if f.kept), settings.unknown_breeds)
    wanted = restrict(names.breeds, settings)
    if len(wanted) == 1:
        raise InputError(
            f"photos: the only breed in {source.root} is {next(iter(wanted))!r}, and telling breeds apart takes two. Give the folder "
            "that holds one folder for each breed (it may lie a level deeper), or name more in breeds="
        )
    named = [replace(finding, breed=names.breed_of.get(finding.source_name, "")) for finding in source.findings]
    findings = audit(source.root, [f for f in named if f.breed in wanted or not f.breed], settings.min_side)
    return _Judged(source, names, group_photos(judge_copies(findings), settings.near_duplicate_bits))


def _earlier(out: Path, settings: DataSettings) -> dict[str, str]:
    """SHA-256 -> part of the split that the folder holds, when it is one of the same seed and shares."""
    card = read_card(out) if settings.keep_split else {}
    made_with = {"scheme": SCHEME} | {name: getattr(settings, name) for name in SPLIT_SETTINGS}
    if not card or {key: card.get("split", {}).get(key) for key in made_with} != made_with:
        return {}
    return {row["sha256"]: row["part"] for row in read_groups(out)}


def _samples(used: Sequence[Finding], source: Source, settings: DataSettings) -> dict[str, list[Sample]]:
    """The conversations of each part, in the order of the image paths; those that came with the photos stay as they are."""
    samples: dict[str, list[Sample]] = {part: [] for part in PARTS}
    for f in used:
        about = {"breed": f.breed, "source": source.name, "sha256": f.sha256, "split": f.part}
        more: dict[str, Any] = {"group": f.group}
        if given := source.samples.get(f.image):
            samples[f.part].append(replace(given, metadata={**given.metadata, **about, **more}))
            continue
        if f.image in source.about:
            more["cat"] = source.about[f.image]
        question = question_for(f.sha256, f.part, settings.seed)
        answer = answer_for(f.breed, settings.answer_style)
        samples[f.part].append(make_sample(f.image, f.image, question, answer, **about, **more))
    return samples


def _card(
    settings: DataSettings,
    judged: _Judged,
    findings: Sequence[Finding],
    remarks: Sequence[str],
    priority: Sequence[str],
) -> dict[str, Any]:
    used = [finding for finding in findings if finding.kept]
    skip = {"run", "run_dir", "data_dir", "hint"}  # where it was written is no property of the data
    counts: Mapping[str, Counter[str]] = {part: Counter(f.breed for f in used if f.part == part) for part in PARTS}
    return {
        "breeds": sorted({finding.breed for finding in used}),
        "priority_breeds": list(priority),
        "source": judged.source.name,
        "counts": {part: dict(sorted(counts[part].items())) for part in PARTS},
        "files_seen": len(findings),
        "left_out": dict(sorted(Counter(f.verdict for f in findings if not f.kept).items())),
        "missing": {"count": len(judged.source.missing), "images": list(judged.source.missing)},
        "unknown_breeds": list(judged.names.unknown),
        "names_mapped": list(judged.names.merged),
        "notes": list(judged.source.notes),
        "remarks": list(remarks),
        "split": {"scheme": SCHEME} | {name: getattr(settings, name) for name in SPLIT_SETTINGS},
        "settings": {key: value for key, value in asdict(settings).items() if key not in skip},
    }
