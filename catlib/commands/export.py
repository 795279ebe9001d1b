"""`catlib export`: a tuned model as a plain checkpoint (merge) or as llama.cpp's files (gguf), verified before it is done."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from catlib.commands.options import add_settings_options, settings_from_args, show
from catlib.errors import InputError
from catlib.paths import resolve
from catlib.settings import ServingSettings

OPTIONS = {"merge": ("dtype", "limit"), "gguf": ("outtype", "llama_cpp", "binary")}
DEFECT = """the files are right, {engine} is not: it feeds the class token of a CLIP tower to the language model in place of the first
patch (llama.cpp issue 25814). Its answers are those of this process with the same defect: {with_defect}
But against the model as it is: {verified}
Serve it by vLLM, or by a llama.cpp that has the fix"""


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """The two kinds of export."""
    parser = subparsers.add_parser("export", help="a plain checkpoint, or llama.cpp's files", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    shared = argparse.ArgumentParser(add_help=False, parents=[common])
    shared.add_argument("--checkpoint", required=True, metavar="DIR", help="adapter, or a plain model to write anew")
    shared.add_argument("--out", required=True, metavar="DIR", help="new folder; it appears when all is verified")
    shared.add_argument("--base-model", default="", metavar="REF", help="base model; default: as the checkpoint says")
    shared.add_argument(
        "--photos",
        nargs="+",
        type=Path,
        default=[],
        metavar="PHOTO_OR_FOLDER",
        help="photos to verify on; default: the validation data, else random patterns",
    )
    shared.add_argument("--count", type=int, default=8, metavar="N", help="so many (default: 8; given photos: all)")
    shared.add_argument("--force", action="store_true", help="replace an existing folder, once the new one is verified")
    add_settings_options(shared, ServingSettings, only=("device",))
    merge = kinds.add_parser(
        "merge",
        parents=[shared],
        help="adapter and projector merged into a plain checkpoint",
        description="Merge adapter and projector into the plain base (never into 4-bit weights), with the hub's key names.",
    )
    dtypes = ["auto", "bfloat16", "float16", "float32"]
    merge.add_argument(
        "--dtype", default="auto", choices=dtypes, help="of the weights (default: as trained, else the base's)"
    )
    merge.add_argument("--limit", type=float, metavar="NATS", help="score difference that passes (default: by dtype)")
    gguf = kinds.add_parser(
        "gguf",
        parents=[shared],
        help="text model and mmproj for llama.cpp",
        description="Convert a tuned model by llama.cpp's own converter, and ask llama-server, if there is one, about photos.",
    )
    gguf.add_argument("--outtype", default="f16", choices=["f32", "f16", "bf16", "q8_0"], help="weights (default: f16)")
    gguf.add_argument("--llama-cpp", default="", metavar="DIR", help="llama.cpp's source; or CATLIB_LLAMA_CPP")
    gguf.add_argument("--binary", default="", metavar="PATH", help="llama-server; or CATLIB_LLAMA_SERVER")
    for kind in (merge, gguf):
        kind.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the export, and print what was verified."""
    from catlib.serving.export import find_mergeable

    if args.photos and args.count < 1:
        raise InputError(f"--count must be at least 1, found {args.count}")
    source, device = (
        find_mergeable(resolve(args.checkpoint), args.base_model),
        settings_from_args(ServingSettings, args).device,
    )
    more = {name: getattr(args, name) for name in ("count", "force", *OPTIONS[args.kind])}
    make = _merge if args.kind == "merge" else _gguf
    facts, text = make(source, resolve(args.out), device=device, photos=_photos(args.photos), **more)
    show(args, facts, text)
    return 0


def _merge(*source: Any, **options: Any) -> tuple[dict[str, Any], str]:
    from catlib.serving.export import merge

    result = merge(*source, **options)
    facts = asdict(result)
    text = (
        f"merged model: {result.folder} ({result.dtype}, {result.gigabytes:.3g} GB)\nverified on {result.verification}"
    )
    if result.as_trained is not None:
        facts["as_trained"].pop("limit")
        text += f"\nbeside the 4-bit model as it was trained, on {result.as_trained}"
    return facts, text


def _gguf(*source: Any, **options: Any) -> tuple[dict[str, Any], str]:
    from catlib.gguf.export import export_gguf

    result = export_gguf(*source, **options)
    text = f"text model: {result.text}\nmmproj: {result.mmproj}\n{result.gigabytes:.3g} GB\n"
    if result.verified is None:
        return asdict(result), text + "not verified: llama-server is not installed"
    if result.with_defect is None:
        return asdict(result), text + f"verified with {result.engine}: {result.verified}"
    return asdict(result), text + DEFECT.format(**vars(result))


def _photos(arguments: list[Path]) -> list[Path]:
    """The photos named on the command line; folders are searched."""
    from catlib.commands.predict import find_photos

    if not arguments:
        return []
    root, samples = find_photos(arguments)
    return [root / sample.image for sample in samples]
