"""`catlib export`: a tuned model as a plain checkpoint (merge) or as llama.cpp's files (gguf), verified before it is done."""

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from catlib.errors import InputError
from catlib.paths import resolve

log = logging.getLogger(__name__)


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """The two kinds of export."""
    parser = subparsers.add_parser("export", help="a plain checkpoint, or llama.cpp's files", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    shared = argparse.ArgumentParser(add_help=False, parents=[common])
    shared.add_argument("--checkpoint", required=True, metavar="DIR", help="adapter, or a plain model to write anew")
    shared.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="new folder; it appears when all is verified"
    )
    shared.add_argument("--base-model", default="", metavar="REF", help="base model; default: as the checkpoint says")
    shared.add_argument(
        "--photos",
        nargs="+",
        type=Path,
        default=[],
        metavar="PHOTO_OR_FOLDER",
        help="photos to verify on; default: the validation data, else random patterns",
    )
    shared.add_argument(
        "--count", type=int, default=8, metavar="N", help="so many of them (default: 8; given photos: all)"
    )
    shared.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: the GPU, if any"
    )
    shared.add_argument("--force", action="store_true", help="replace an existing folder, once the new one is verified")
    merge = kinds.add_parser(
        "merge",
        parents=[shared],
        help="adapter and projector merged into a plain checkpoint",
        description="Merge adapter and projector into the plain base (never into 4-bit weights), with the hub's key names.",
    )
    merge.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="weights of the export (default: as trained, else the base's own)",
    )
    merge.add_argument(
        "--limit", type=float, metavar="NATS", help="largest score difference that passes (default: by dtype)"
    )
    merge.set_defaults(run=run_merge)
    gguf = kinds.add_parser(
        "gguf",
        parents=[shared],
        help="text model and mmproj for llama.cpp",
        description="Convert a tuned model by llama.cpp's own converter, and ask llama-server, if there is one, about photos.",
    )
    gguf.add_argument("--outtype", default="f16", choices=["f32", "f16", "bf16", "q8_0"], help="weights (default: f16)")
    gguf.add_argument(
        "--llama-cpp", default="", metavar="DIR", help="llama.cpp's source, for its converter; or CATLIB_LLAMA_CPP"
    )
    gguf.add_argument(
        "--binary", default="", metavar="PATH", help="llama-server to verify with; or CATLIB_LLAMA_SERVER"
    )
    gguf.set_defaults(run=run_gguf)


def run_merge(args: argparse.Namespace) -> int:
    """Merge, and print what was verified."""
    from catlib.serving.export import find_mergeable, merge

    result = merge(
        find_mergeable(resolve(args.checkpoint), args.base_model),
        resolve(args.out),
        dtype=args.dtype,
        device=args.device,
        photos=_photos(args),
        count=args.count,
        limit=args.limit,
        force=args.force,
    )
    if args.json:
        facts = asdict(result) | {"folder": str(result.folder)}
        if facts["as_trained"]:
            facts["as_trained"].pop("limit")
        json.dump(facts, sys.stdout, ensure_ascii=False)
        print()
        return 0
    print(f"merged model: {result.folder} ({result.dtype}, {result.gigabytes:.3g} GB)")
    print(f"verified on {result.verification}")
    if result.as_trained is not None:
        print(f"beside the 4-bit model as it was trained, on {result.as_trained}")
    return 0


def run_gguf(args: argparse.Namespace) -> int:
    """Convert, and print what was verified, and where the engine itself is at fault."""
    from catlib.gguf.export import export_gguf
    from catlib.serving.export import find_mergeable

    result = export_gguf(
        find_mergeable(resolve(args.checkpoint), args.base_model),
        resolve(args.out),
        outtype=args.outtype,
        llama_cpp=args.llama_cpp,
        binary=args.binary,
        device=args.device,
        photos=_photos(args),
        count=args.count,
        force=args.force,
    )
    if args.json:
        json.dump(asdict(result), sys.stdout, ensure_ascii=False, default=str)
        print()
        return 0
    print(f"text model: {result.text}\nmmproj: {result.mmproj}\n{result.gigabytes:.3g} GB")
    if result.verified is None:
        print("not verified: llama-server is not installed")
    elif result.with_defect is None:
        print(f"verified with {result.engine}: {result.verified}")
    else:
        print(
            f"the files are right, {result.engine} is not: it feeds the class token of a CLIP tower to the language model in place of "
            f"the first patch (llama.cpp issue 25814). Its answers are those of this process with the same defect: "
            f"{result.with_defect}\nBut against the model as it is: {result.verified}\nServe it by vLLM, or by a llama.cpp that has the fix"
        )
    return 0


def _photos(args: argparse.Namespace) -> list[Path]:
    """The photos named on the command line; folders are searched."""
    from catlib.commands.predict import find_photos

    if not args.photos:
        return []
    if args.count < 1:
        raise InputError(f"--count must be at least 1, found {args.count}")
    root, samples = find_photos(args.photos)
    return [root / sample.image for sample in samples]
