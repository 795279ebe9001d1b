"""`catlib data`: make a split from photos that can be trusted, check one, or fetch a public data set."""

import argparse
from pathlib import Path

from catlib.commands.options import add_settings_options, settings_from_args, show
from catlib.errors import InputError
from catlib.paths import resolve
from catlib.settings import DataSettings

USAGE = """catlib data PHOTOS --out DIR [option …]   split a folder of labelled photos
       catlib data check DIR                    prove that no near-duplicate group crosses the parts of a split
       catlib data fetch oxford-pets --to DIR   download the Oxford-IIIT Pet photos"""
EPILOG = """A folder that is itself called check or fetch is given as ./check or ./fetch. Exit codes: 0 done, 1 the check found problems
or the download failed, 2 wrong input."""
DEFAULT_OUT = "data/vlm"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `catlib data`; those of the split come from DataSettings."""
    add = parser.add_argument
    add("what", nargs="*", metavar="PHOTOS", help="folder, archive or JSONL; or: check DIR; or: fetch NAME")
    add("--out", default=DEFAULT_OUT, metavar="DIR", help=f"folder of the samples (default: {DEFAULT_OUT})")
    add("--to", metavar="DIR", default="data/oxford-pets", help="fetch: folder (default: data/oxford-pets)")
    add("--run-dir", "--run_dir", default="", metavar="DIR", help="folder of audit.csv (default: --out)")
    add_settings_options(parser, DataSettings, skip=("photos", "data_dir", "run", "run_dir"))


def run(args: argparse.Namespace) -> int:
    """Split, check or fetch; 1 when a check found problems."""
    match args.what:
        case ["check", *words]:
            return _check(args, words)
        case ["fetch", *words]:
            return _fetch(args, words)
        case [] | [_]:
            return _split(args, *args.what)
        case words:
            raise InputError(f"catlib data takes one folder of photos, found {len(words)}: {', '.join(words)}")


def _split(args: argparse.Namespace, photos: str = "") -> int:
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
    return 0


def _check(args: argparse.Namespace, words: list[str]) -> int:
    from catlib.data.check import check

    if len(words) != 1:
        raise InputError("catlib data check needs one folder, the one with train.jsonl: catlib data check data/vlm")
    here = Path(words[0]).expanduser()
    result = check(here if here.exists() else resolve(here))
    counts = ", ".join(f"{part} {n}" for part, n in result.counts.items())
    verdict = f"{len(result.problems)} problems" if result.problems else "no group is in two parts"
    said = f"{result.photos} photos hashed anew ({counts}), {result.groups} groups at {result.bits} bits: {verdict}"
    show(args, result.as_json(), "\n".join([*result.remarks, *result.problems, said]))
    return 1 if result.problems else 0


def _fetch(args: argparse.Namespace, words: list[str]) -> int:
    from catlib.data.archives import fetch_oxford_pets

    if words != ["oxford-pets"]:
        raise InputError("catlib data fetch knows one data set: catlib data fetch oxford-pets --to DIR")
    folder = fetch_oxford_pets(resolve(args.to))
    show(args, {"photos": str(folder)}, f"{folder}: ready, now run: catlib data {folder} --out {DEFAULT_OUT}")
    return 0
