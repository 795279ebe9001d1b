"""`catlib predict`: the breed of photos, labelled or not, one JSON line a photo."""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catlib.commands.options import PREFIX, add_settings_options, say, settings_from_args
from catlib.errors import InputError
from catlib.paths import given_path, resolve
from catlib.settings import EvaluationSettings, split_list

if TYPE_CHECKING:
    from catlib.classifiers.base import Classifier
    from catlib.data.records import Sample
    from catlib.vlm.models import Checkpoint

EPILOG = "exit codes: 0 all photos predicted, 1 some could not be read (listed), 2 wrong input"
SHARED = ("prompt", "decoding", "score_norm", "quantize", "dtype", "device")  # as in an evaluation
RUN = """a run: what its verdict says to use, as measured; another of its models by --model NAME. Without --out, lines have the
calibrated probability of the breed and whether it is sure"""
KINDS = """tuned (default), base (the checkpoint without its adapter), clip:REF, probe:FILE (a linear probe that a run has left in
its folder), or endpoint:URL[#MODEL], a served model (with --checkpoint, breeds, question and cropping are that one's)"""
log = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("photos", nargs="+", type=Path, metavar="PHOTO_OR_FOLDER", help="folders are searched for photos")
    add("--checkpoint", metavar="DIR", help="fine-tuned checkpoint: adapter, or merged model")
    add("--run", dest="of_run", metavar="RUN", help=RUN)
    add("--model", default="", metavar="KIND", help=KINDS)
    add("--base-model", default="", metavar="REF", help="base model; default: as the checkpoint says")
    add("--breeds", metavar="LIST", help="candidates, comma separated, or a text file with one a line")
    add("--batch-size", type=int, metavar="N", help="photos in one forward pass (default: 8)")
    add("--concurrency", type=int, default=4, metavar="N", help="endpoint: requests at a time (default: 4)")
    add("--crop", type=int, metavar="PIXELS", help="endpoint: send the middle square, scaled to this; 0: whole photos")
    add("--timeout", type=float, default=120.0, metavar="S", help="endpoint: seconds for an answer (default: 120)")
    add("--out", type=Path, metavar="FILE.jsonl", help="predictions file with sidecar; default: standard output")
    add_settings_options(parser, EvaluationSettings, only=SHARED)


def run(args: argparse.Namespace) -> int:
    """Predict; 1 when a photo could not be read."""
    if args.batch_size is None and not args.of_run:
        args.batch_size = 4 * max(1, args.concurrency) if args.model.startswith("endpoint:") else 8
    if args.batch_size is not None and args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, found {args.batch_size}")
    from catlib.classifiers.predict import iterate, predict, refuse_foreign

    main, alone = os.environ.get("RANK", "0") == "0", os.environ.get("WORLD_SIZE", "1") == "1"
    if not alone and not args.out:
        raise InputError("several processes put what they find into one file: name it by --out")
    root, samples = find_photos(args.photos)
    out = args.out and args.out.expanduser()
    if out:
        refuse_foreign(out)
    classifier = load_classifier(args)
    failed = []

    def report(sample: "Sample", error: InputError) -> None:
        failed.append(sample)
        print(f"catlib: {error}", file=sys.stderr)

    if out:
        found = predict(classifier, samples, root, out, args.batch_size, on_error=report)
        missing = len(samples) - len(found.predictions) if main else 0  # a launcher ends all for one that fails
    else:
        for prediction in iterate(classifier, samples, root, args.batch_size, on_error=report):
            row = asdict(prediction)
            if row["scores"] is not None and args.fitted:
                chance = math.exp(args.fitted.scaled([row["scores"]]).max())
                row |= {"probability": round(chance, 4), "sure": args.fitted.is_sure(chance)}
            if row["scores"] is not None:  # a reader of a stream has no sidecar that tells the order
                row["scores"] = dict(zip(classifier.breeds, (round(s, 6) for s in row["scores"]), strict=True))
            say(json.dumps(row, ensure_ascii=False))
        missing = len(failed)
    if missing:
        log.warning("%d of %d photos could not be read", missing, len(samples))
    return 1 if missing else 0


def find_photos(arguments: Sequence[Path]) -> tuple[Path, list["Sample"]]:
    """The image root and a sample of unknown breed for each photo, in the order given, a folder's photos sorted.

    A file is taken whatever its name, a folder's photos as the audit takes them. The root is the working directory when all
    photos lie in it, else the folder that they share; a link is followed, its name stays the id. Raises InputError when an
    argument does not exist or there is no photo.
    """
    from catlib.data.records import Sample
    from catlib.data.walk import led_away, photo_files

    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(os.path.abspath(argument.expanduser()))  # keeps symbolic links: their names are the ids
        if path.is_dir():
            photos, skipped = photo_files(path)
            found |= dict.fromkeys(photos)
            if skipped:
                log.warning("%s: left out: %s", argument, ", ".join(f"{n} {reason}" for reason, n in skipped.items()))
        elif path.exists():
            found[path] = None
        else:
            raise InputError(f"{argument}: no such photo or folder")
    if not found:
        raise InputError(f"no photos in {', '.join(map(str, arguments))}")
    root = Path.cwd()
    if not all(path.is_relative_to(root) for path in found):
        root = Path(os.path.commonpath([path.parent for path in found]))
    names = [path.relative_to(root).as_posix() for path in found]
    if away := led_away(root, found):  # links that the user named, or put into a named folder
        root = Path(os.path.commonpath([root.resolve(), *(real.parent for real in away.values())]))
        first, links = next(iter(away.values())), f"{len(away)} of {len(found)} photos are links"
        log.warning("%s that lead elsewhere, as to %s: followed", links, first)
    real = [away.get(path, path.resolve()).relative_to(root).as_posix() for path in found] if away else names
    return root, [Sample(name, image, (), {"breed": None}) for name, image in zip(names, real, strict=True)]


def load_classifier(args: argparse.Namespace) -> "Classifier":
    """The classifier that the options name. Raises InputError when they do not add up."""
    settings, args.fitted = settings_from_args(EvaluationSettings, args), None
    if args.of_run:
        from catlib.serving.winner import open_winner

        given = ("checkpoint", "base_model", "breeds", *(f"{PREFIX}{name}" for name in SHARED if name != "device"))
        if more := [name.removeprefix(PREFIX) for name in given if getattr(args, name, None)]:
            raise InputError(f"--run {args.of_run} says by itself how to predict: leave out {', '.join(more)}")
        winner = open_winner(args.of_run, args.model, settings.device)
        args.batch_size, args.fitted = args.batch_size or winner.batch_size, winner.calibration
        return winner.classifier
    kind, colon, ref = (args.model or "tuned").partition(":")
    if kind not in (("clip", "probe", "endpoint") if ref else () if colon else ("tuned", "base")):
        raise InputError(f"--model must be tuned, base, clip:REF, probe:FILE or endpoint:URL; found {args.model!r}")
    if args.checkpoint and not resolve(args.checkpoint).is_dir():
        raise InputError(f"--checkpoint {args.checkpoint}: no such folder ({resolve(args.checkpoint)})")
    if not ref and not args.checkpoint and not (kind == "base" and args.base_model):
        raise InputError(
            "which model? give --checkpoint DIR, or --model base with --base-model REF, or --model clip:REF or probe:FILE"
        )
    if kind == "probe":
        from catlib.classifiers.probe import Probe

        if args.breeds:
            raise InputError("--breeds: a probe knows the breeds that it was trained on and no others")
        return Probe.load(given_path(ref), device=settings.device, dtype=settings.dtype)

    from catlib.vlm.checkpoint import Checkpoint, find_checkpoint, open_vlm

    about: dict[str, Any] = {"question": settings.prompt, "breeds": _breeds(args.breeds)}
    if kind == "clip" or not (args.checkpoint or args.base_model):  # of a server, no more may be known than its address
        found = Checkpoint("", "", **{name: value for name, value in about.items() if value})
    else:
        name = resolve(args.checkpoint) if args.checkpoint else args.base_model
        found = find_checkpoint(name, base_model=args.base_model, tuned=kind != "base", **about)
    if kind == "endpoint":
        return _endpoint(args, ref, found)
    if kind == "clip":
        from catlib.classifiers.clip import ClipZeroShot
        from catlib.classifiers.encoder import ClipEncoder

        return ClipZeroShot(ClipEncoder.load(ref, settings.device, settings.dtype), found.breeds)

    from catlib.classifiers.vlm import VLMClassifier

    vlm = open_vlm(found, device=settings.device, precision="4-bit" if settings.quantize else settings.dtype)
    return VLMClassifier(vlm, decoding=settings.decoding, score_norm=settings.score_norm, name=f"vlm-{kind}")


def _endpoint(args: argparse.Namespace, url: str, served: "Checkpoint") -> "Classifier":
    """The served model. It answers in words, held to the list unless --decoding free is given, so that there are no scores."""
    from catlib.classifiers.endpoint import EndpointClassifier, crop_side
    from catlib.vlm.decoding import answer_limit

    decoding = getattr(args, f"{PREFIX}decoding", None) or ""
    if decoding == "score":
        raise InputError("an endpoint answers in words: only --decoding free or constrained with --model endpoint:URL")
    crop = args.crop if args.crop is not None else crop_side(served.folder) if served.folder else 0
    more: dict[str, Any] = {"spelled": served.spelled, "max_tokens": answer_limit(served), "timeout_s": args.timeout}
    more |= {"concurrency": args.concurrency, "crop": crop, "decoding": decoding}
    return EndpointClassifier(url, served.breeds, served.question, **more)


def _breeds(option: str | None) -> list[str]:
    """The candidates that the option names; empty: those of the training, else all of the collection."""
    if not option:
        return []
    file = os.path.expanduser(option)
    is_file = os.path.isfile(file)  # unlike Path.is_file, no error for a list that is too long for a file name
    text = Path(file).read_text(encoding="utf-8").replace("\n", ",") if is_file else option
    breeds = list(dict.fromkeys(split_list(text)))
    if len(breeds) < 2:
        raise InputError(f"--breeds {option}: at least two different breeds are needed")
    return breeds
