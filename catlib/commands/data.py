"""`catlib data`: make a split from photos, check one, or fetch a public data set."""

import argparse
import json
from pathlib import Path
from typing import Any

from catlib.commands.options import add_settings_options, settings_from_args
from catlib.errors import InputError
from catlib.paths import resolve
from catlib.settings import DataSettings

USAGE = """catlib data PHOTOS --out DIR [option …]   split a folder of labelled photos
       catlib data check DIR                    prove that no near-duplicate group crosses the parts of a split
       catlib data fetch oxford-pets --to DIR   download the Oxford-IIIT Pet photos"""
DEFAULT_OUT = "data/vlm"


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """The options of `catlib data`; those of the split come from DataSettings."""
    parser = subparsers.add_parser(
        "data",
        parents=[common],
        usage=USAGE,
        help="photos to a split that can be trusted",
        description=__doc__,
        epilog="A folder that is itself called check or fetch is given as ./check or ./fetch. Exit codes: 0 done, 1 the check found "
        "problems or the download failed, 2 wrong input.",
    )
    parser.add_argument(
        "what", nargs="*", metavar="PHOTOS", help="folder, Oxford archive or JSONL; or: check DIR; or: fetch NAME"
    )
    parser.add_argument(
        "--out", metavar="DIR", help=f"folder that gets train, val and test.jsonl (default: {DEFAULT_OUT})"
    )
    parser.add_argument(
        "--to", metavar="DIR", default="data/oxford-pets", help="folder for fetch (default: data/oxford-pets)"
    )
    add_settings_options(parser, DataSettings, skip=("photos", "data_dir", "run_dir"))
    parser.add_argument(
        "--run-dir", "--run_dir", metavar="DIR", help="folder that gets audit.csv (default: beside the split)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Split, check or fetch; 1 when a check found problems."""
    words = args.what
    if words[:1] == ["check"]:
        return _check(args, words[1:])
    if words[:1] == ["fetch"]:
        return _fetch(args, words[1:])
    if len(words) > 1:
        raise InputError(f"catlib data takes one folder of photos, found {len(words)}: {', '.join(words)}")
    return _split(args, words[0] if words else "")


def _split(args: argparse.Namespace, photos: str) -> int:
    from catlib.data.prepare import prepare

    out = resolve(args.out or DEFAULT_OUT)
    here = Path(photos).expanduser()
    if photos and here.exists():  # typed in a shell: from the working directory first
        photos = str(here.absolute())
    run_dir = args.run_dir or str(out)
    settings = settings_from_args(DataSettings, args, photos=photos, data_dir=str(out.parent), run_dir=run_dir)
    dataset = prepare(settings, out)
    counts = {part: sum(breeds.values()) for part, breeds in dataset.card["counts"].items()}
    if args.json:
        print(
            json.dumps({"out": str(out), "audit": str(resolve(run_dir) / "audit.csv"), "parts": counts, **dataset.card})
        )
        return 0
    left_out = sum(dataset.card["left_out"].values())
    print(f"{out}: {', '.join(f'{part} {n}' for part, n in counts.items())} photos of {len(dataset.breeds)} breeds")
    print(f"left out: {left_out} of {dataset.card['files_seen']} files; reasons in {resolve(run_dir) / 'audit.csv'}")
    return 0


def _check(args: argparse.Namespace, words: list[str]) -> int:
    from catlib.data.check import check

    if len(words) != 1:
        raise InputError("catlib data check needs one folder, the one with train.jsonl: catlib data check data/vlm")
    here = Path(words[0]).expanduser()
    result = check(here if here.exists() else resolve(here))
    if args.json:
        print(json.dumps(result.as_json()))
        return 1 if result.problems else 0
    for problem in result.problems:
        print(problem)
    counts = ", ".join(f"{part} {n}" for part, n in result.counts.items())
    verdict = f"{len(result.problems)} problems" if result.problems else "no group is in two parts"
    print(f"{result.photos} photos hashed anew ({counts}), {result.groups} groups at {result.bits} bits: {verdict}")
    return 1 if result.problems else 0


def _fetch(args: argparse.Namespace, words: list[str]) -> int:
    from catlib.data.archives import fetch_oxford_pets

    if words != ["oxford-pets"]:
        raise InputError("catlib data fetch knows one data set: catlib data fetch oxford-pets --to DIR")
    folder = fetch_oxford_pets(resolve(args.to))
    print(
        json.dumps({"photos": str(folder)})
        if args.json
        else f"{folder}: ready, now run: catlib data {folder} --out {DEFAULT_OUT}"
    )
    return 0
