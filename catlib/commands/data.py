"""`catlib data`: make a split from photos that can be trusted, check one, or fetch a public data set."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from catlib.commands.options import add_settings_options, settings_from_args, show
from catlib.errors import InputError
from catlib.paths import given_path, resolve
from catlib.settings import DataSettings

USAGE = """catlib data PHOTOS --out DIR [option …]   split a folder of labelled photos
       catlib data check DIR                    prove that no near-duplicate group crosses the parts of a split
       catlib data suspects DIR --encoder MODEL  rank labels that are probably wrong, for a person to decide
       catlib data export hf DIR --to FOLDER    parquet files with the images and a card, for Hugging Face datasets
       catlib data fetch oxford-pets --to DIR   download the Oxford-IIIT Pet photos"""
EPILOG = """A folder that is itself called check, suspects, export or fetch is given as ./check and so on. Exit codes: 0 done, 1 the check found problems
or the download failed, 2 wrong input."""
DEFAULT_OUT = "data/vlm"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", nargs="*", metavar="PHOTOS", help="folder, archive or JSONL; or one of the words above")
    add("--out", default=DEFAULT_OUT, metavar="DIR", help=f"folder of the samples (default: {DEFAULT_OUT})")
    add("--to", metavar="DIR", default="", help="fetch, export: folder (default: data/oxford-pets, data/export)")
    add("--run-dir", "--run_dir", default="", metavar="DIR", help="folder of audit.csv (default: --out)")
    add("--force", action="store_true", help="export: replace the folder")
    add_settings_options(parser, DataSettings, skip=("photos", "data_dir", "run", "run_dir"))


def run(args: argparse.Namespace) -> int | None:
    """Split, check or fetch; 1 when a check found problems."""
    word, *words = args.what or [""]
    if word in ACTIONS:
        return ACTIONS[word](args, words)
    if words:
        raise InputError(f"catlib data takes one folder of photos, found {len(args.what)}: {', '.join(args.what)}")
    _split(args, word)
    return None


def _split(args: argparse.Namespace, photos: str) -> None:
    from catlib.data.prepare import prepare

    out = resolve(args.out)
    here = Path(photos).expanduser()
    if photos and here.exists():  # typed in a shell: from the working directory first
        photos = str(here.absolute())
    run_dir = args.run_dir or str(out)
    settings = settings_from_args(DataSettings, args, photos=photos, data_dir=str(out.parent), run_dir=run_dir)
    card, audit = prepare(settings, out).card, resolve(run_dir) / "audit.csv"
    parts = {part: sum(breeds.values()) for part, breeds in card["counts"].items()}
    counts = ", ".join(f"{part} {n}" for part, n in parts.items())
    text = f"{out}: {counts} photos of {len(card['breeds'])} breeds\n"
    text += f"left out: {sum(card['left_out'].values())} of {card['files_seen']} files; reasons in {audit}"
    show(args, {"out": str(out), "audit": str(audit), "parts": parts, **card}, text)


def _check(args: argparse.Namespace, words: list[str]) -> int:
    from catlib.data.check import check

    result = check(_split_folder("check", words))
    counts = ", ".join(f"{part} {n}" for part, n in result.counts.items())
    verdict = f"{len(result.problems)} problems" if result.problems else "no group is in two parts"
    said = f"{result.photos} photos hashed anew ({counts}), {result.groups} groups at {result.bits} bits: {verdict}"
    show(args, vars(result) | {"ok": not result.problems}, "\n".join([*result.remarks, *result.problems, said]))
    return 1 if result.problems else 0


def _split_folder(command: str, words: list[str]) -> Path:
    if len(words) != 1:
        what = f"catlib data {command}"
        raise InputError(f"{what} needs one folder, the one with train.jsonl: {what} data/vlm")
    return given_path(words[0])


def _suspects(args: argparse.Namespace, words: list[str]) -> None:
    from catlib.classifiers.photo_features import photo_features
    from catlib.data.corrections import write_suspects
    from catlib.data.dataset import load_dataset
    from catlib.data.records import PARTS
    from catlib.data.suspects import find_suspects, similar_pairs

    folder, settings = _split_folder("suspects", words), settings_from_args(DataSettings, args)
    if not settings.encoder:
        raise InputError("catlib data suspects needs --encoder: a CLIP model or a VLM, as a folder or hub name")
    dataset = load_dataset(folder)
    samples = [sample for part in PARTS for sample in dataset.part(part)]
    features = photo_features(settings.encoder, samples, dataset.image_root)
    found = find_suspects(samples, features, settings.seed)
    similar = similar_pairs(samples, features)
    path = write_suspects(folder, found.table, similar)
    noise = {breed: round(float(value), 4) for breed, value in found.by_breed["estimated noise"].items()}
    facts: dict[str, Any] = {"suspects": str(path), "judged": found.judged, "found": len(found.table)}
    facts |= {name: round(getattr(found, name), 4) for name in ("noise", "noise_at_most")}
    facts |= {"noise_by_breed": noise, "accuracy": round(found.accuracy, 4), "similar_pairs": len(similar)}
    facts["confusion"] = found.confusion.head(10).to_dict("records")
    text = f"{found.table.head(20).drop(columns=['sha256', 'group']).to_string()}\n{found.caption}\n{path}: "
    show(args, facts, text + "fill in the column action (keep, relabel, drop) and run catlib data again")


def _export(args: argparse.Namespace, words: list[str]) -> None:
    from catlib.data.export import export_hf

    if words[:1] != ["hf"]:
        raise InputError("catlib data export knows one format: catlib data export hf data/vlm --to FOLDER")
    to = export_hf(_split_folder("export hf", words[1:]), resolve(args.to or "data/export"), args.force)
    show(args, {"folder": str(to)}, f"{to}: ready; read it with datasets.load_dataset({str(to)!r})")


def _fetch(args: argparse.Namespace, words: list[str]) -> None:
    from catlib.data.archives import fetch_oxford_pets

    if words != ["oxford-pets"]:
        raise InputError("catlib data fetch knows one data set: catlib data fetch oxford-pets --to DIR")
    folder = fetch_oxford_pets(resolve(args.to or "data/oxford-pets"))
    show(args, {"photos": str(folder)}, f"{folder}: ready, now run: catlib data {folder} --out {DEFAULT_OUT}")


Action = Callable[[argparse.Namespace, list[str]], int | None]
ACTIONS: dict[str, Action] = {"check": _check, "suspects": _suspects, "export": _export, "fetch": _fetch}
