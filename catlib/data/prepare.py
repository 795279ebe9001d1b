"""From any folder of labelled photos to data_dir/vlm/{train,val,test}.jsonl: source, names, audit, groups, split, conversations."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from catlib.data import archives, audit, cats, conversations, corrections, duplicates, splits
from catlib.data.dataset import Dataset, load_dataset, read_card, read_groups, write_dataset, writing
from catlib.data.findings import Finding, Source, write_audit
from catlib.data.names import Names, priority_of, restrict, understand
from catlib.data.records import PARTS, Sample, make_sample
from catlib.data.sources import read_source
from catlib.data.walk import led_away
from catlib.errors import InputError
from catlib.files import read_csv
from catlib.paths import resolve
from catlib.settings import DataSettings

# Another value of these means another split.
SPLIT_SETTINGS = ("seed", "val_share", "test_share", "min_val", "min_test", "draw_test", "group_by")
PLACES = {"run", "run_dir", "data_dir", "hint"}  # where it was written is no property of the data
log = logging.getLogger(__name__)


def prepare(settings: DataSettings, out: Path | None = None) -> Dataset:
    """Make the split that the settings describe and return it; the same settings and photos give the same bytes.

    Writes train.jsonl, val.jsonl, test.jsonl (not where photos come divided into train and val only), dataset.json and groups.csv
    to `out` (default: `data_dir`/vlm), and audit.csv with a verdict on every file to `run_dir`. Decisions in suspects.csv there are
    applied and recorded. Photos stay where they are and as they are. Raises InputError naming what is wrong.
    """
    splits.check_shares(settings)
    out = out or resolve(settings.data_dir) / "vlm"
    source = _photos(settings)
    names = understand((f.source_name for f in source.findings if f.kept), settings.unknown_breeds)
    table = resolve(settings.run_dir) / "audit.csv"
    opened = _open(source, names, settings, table)
    with writing(out):  # from reading the earlier split to the last file, so that two runs cannot mix theirs
        decided = corrections.read_corrections(out)
        opened, corrected = corrections.apply_corrections(opened, decided, {f.breed for f in opened if f.breed})
        opened = duplicates.judge_copies(opened)
        kin, similar = cats.kin_of(opened, settings.group_by), _similar(out, settings.join_similar)
        judged = duplicates.group_photos(opened, settings.near_duplicate_bits, kin.keys, similar)
        try:
            findings, remarks = splits.split(judged, settings, _earlier(out, settings))
        except InputError as error:
            write_audit(table, judged)  # whoever has to mend the photos needs the verdicts most
            raise InputError(f"{error}. The verdict on every file: {table}") from None
        write_audit(table, findings)
        samples = _samples(findings, kin.ids, source, settings)
        absent = {"test": splits.NO_TEST} if splits.NO_TEST in remarks else {}
        if empty := [part for part in PARTS if not samples[part] and part not in absent]:
            raise InputError(f"the {empty[0]} part would be empty: too few usable photos; see {table}")
        counts = {part: Counter(sample.breed for sample in samples[part]) for part in PARTS}
        used = sorted(set().union(*counts.values()))
        notes, doubts = [*source.notes, *corrected], [*source.doubts, *kin.said]
        left_out = Counter(finding.verdict for finding in findings if not finding.kept)
        card = {
            "breeds": used,
            "priority_breeds": list(priority_of(used, settings)),
            "counts": {part: dict(sorted(counts[part].items())) for part in PARTS},
            "files_seen": len(findings),
            "left_out": dict(sorted(left_out.items())),
            "source": source.name,
            "missing": {"count": len(source.missing), "images": list(source.missing)},
            "unknown_breeds": list(names.unknown),
            "names_mapped": list(names.merged),
            "notes": notes,
            "cats": {"said": doubts, "no_ids": kin.no_ids},
            "remarks": remarks,
            "absent": absent,
            "split": {"scheme": splits.SCHEME} | {name: getattr(settings, name) for name in SPLIT_SETTINGS},
            "settings": {key: value for key, value in asdict(settings).items() if key not in PLACES},
        }
        corrections.write_corrections(out, decided)
        write_dataset(out, source.root, samples, findings, card)
    for line in (*notes, *doubts, *names.notes(), *remarks):
        log.info("%s", line)
    log.info("%s: %s", out, ", ".join(f"{part} {len(samples[part])}" for part in PARTS))
    if left_out:
        log.info("left out: %s", ", ".join(f"{reason} {n}" for reason, n in left_out.most_common()))
    return load_dataset(out)


def _photos(settings: DataSettings) -> Source:
    """The photos that the settings name. Raises InputError, with the profile's hint, when there are none."""
    hint = f"; {settings.hint}" if settings.hint else ""
    if not settings.photos:
        raise InputError(f"photos is empty: name the folder of the labelled photos{hint}")
    try:
        folder = archives.unpacked(resolve(settings.photos), resolve(settings.data_dir) / "photos")
        if not folder.exists():
            raise InputError(f"photos: {folder} does not exist; give a folder of labelled photos{hint}")
        source = read_source(folder, settings.source)
    except PermissionError as error:
        raise InputError(f"photos: {error.filename}: {error.strerror}") from None
    # a link that the user has put there is meant; one out of an archive, or on the way of a path in a file, is not
    return source if source.samples or (folder / archives.ORIGIN).is_file() else _follow(source)


def _follow(source: Source) -> Source:
    """The source with links that lead out of its folder replaced by what they lead to, below a root that holds all photos."""
    away = led_away(source.root, (source.root / f.image for f in source.findings if f.kept))
    if not away:
        return source
    top = source.root.resolve()
    root = Path(os.path.commonpath([top, *(real.parent for real in away.values())]))
    places = [away.get(source.root / f.image, top / f.image).relative_to(root).as_posix() for f in source.findings]
    findings = [replace(f, image=at, link=f.image) for f, at in zip(source.findings, places, strict=True)]
    note = (
        f"{len(away):,} of {len(findings):,} files are links that lead out of {source.root}, as to {next(iter(away.values()))}: followed, "
        f"and the samples' paths are relative to {root}"
    )
    ordered = tuple(sorted(findings, key=lambda f: (f.image, f.link)))
    return replace(source, root=root, findings=ordered, notes=(*source.notes, note))


def _open(source: Source, names: Names, settings: DataSettings, table: Path) -> list[Finding]:
    """Every file of the wanted breeds opened; an interrupted run has left what it had beside the `table` of the audit."""
    wanted = restrict(sorted(set(names.breed_of.values())), settings)
    if len(wanted) == 1:
        raise InputError(
            f"photos: the only breed in {source.root} is {next(iter(wanted))!r}, and telling breeds apart takes two. Give the folder "
            "that holds one folder for each breed (it may lie a level deeper), or name more in breeds="
        )
    found = [replace(finding, breed=names.breed_of.get(finding.source_name, "")) for finding in source.findings]
    found = [finding for finding in found if finding.breed in wanted or not finding.breed]
    return audit.audit(source.root, found, settings.min_side, settings.quality, table.with_name(".audit.unfinished"))


def _similar(out: Path, least: float) -> list[tuple[str, str]]:
    """The pairs of similar.csv that are at least so similar. Raises InputError where it is asked for and missing."""
    if not least:
        return []
    path = out / corrections.SIMILAR
    if not path.is_file():
        make = f"make it with: catlib data suspects {out} --encoder MODEL"
        raise InputError(f"join_similar: {path} does not exist; {make}")
    return [(row["sha256"], row["other_sha256"]) for row in read_csv(path)[1] if float(row["cosine"]) >= least]


def _earlier(out: Path, settings: DataSettings) -> dict[str, str]:
    """SHA-256 -> part of the split that the folder holds, when it is one of the same seed and shares."""
    card = read_card(out) if settings.keep_split else {}
    made_with = {"scheme": splits.SCHEME} | {name: getattr(settings, name) for name in SPLIT_SETTINGS}
    earlier = {"draw_test": False, "group_by": ""} | card.get("split", {})
    if changed := [name for name, value in made_with.items() if card and earlier.get(name) != value]:
        log.warning("%s: the split there was made with another %s, so it is made anew", out, ", ".join(changed))
    return {row["sha256"]: row["part"] for row in read_groups(out)} if card and not changed else {}


def _samples(
    findings: Sequence[Finding], ids: Sequence[str], source: Source, settings: DataSettings
) -> dict[str, list[Sample]]:
    """The conversations of each part, in the order of the image paths; those that came with the photos stay as they are."""
    samples: dict[str, list[Sample]] = {part: [] for part in PARTS}
    for f, id in zip(findings, ids, strict=True):
        if not f.kept:
            continue
        answer = conversations.answer_for(f.breed, settings.answer_style, f.image)
        about = {"breed": f.breed, "source": source.name, "sha256": f.sha256, "split": f.part}
        if given := source.samples.get(f.image):
            human, gpt = given.conversations
            turns = (human, {**gpt, "value": answer} if corrections.RELABELLED in f.remarks else gpt)
            made = replace(given, conversations=turns, metadata={**given.metadata, **about, "group": f.group})
        else:
            cat = ({"id": id} if id else {}) | dict(source.about.get(f.name, {}))
            more: dict[str, Any] = {"group": f.group} | ({"cat": cat} if cat else {})
            question = conversations.question_for(f.sha256, f.part, settings.seed)
            made = make_sample(f.image, f.image, question, answer, **about, **more)
        samples[f.part].append(made)
    return samples
