"""`catlib export`: a tuned model as a plain checkpoint (merge) or as llama.cpp's files (gguf), verified before it is done."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from catlib.commands.options import add_settings_options, settings_from_args, show
from catlib.errors import InputError
from catlib.paths import resolve
from catlib.settings import ServingSettings

ONLY = {"merge": ("dtype", "limit"), "gguf": ("outtype", "llama_cpp", "binary")}
DEFECT = """the files are right, {engine} is not: it feeds the class token of a CLIP tower to the language model in place of the first
patch (llama.cpp issue 25814). Its answers are those of this process with the same defect: {with_defect}
But against the model as it is: {verified}
Serve it by vLLM, or by a llama.cpp that has the fix"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("kind", choices=[*ONLY], help="merge: into a plain checkpoint, the hub's names; gguf: text model and mmproj")
    add("--checkpoint", required=True, metavar="DIR", help="adapter, or a plain model to write anew")
    add("--out", required=True, metavar="DIR", help="new folder; it appears when all is verified")
    add("--base-model", default="", metavar="REF", help="base model; default: as the checkpoint says")
    photos = "photos to verify on; default: the validation data, else random patterns"
    add("--photos", nargs="+", type=Path, default=[], metavar="PHOTO_OR_FOLDER", help=photos)
    add("--count", type=int, default=8, metavar="N", help="so many (default: 8; given photos: all)")
    add("--force", action="store_true", help="replace an existing folder, once the new one is verified")
    dtypes = ["auto", "bfloat16", "float16", "float32"]
    add("--dtype", choices=dtypes, help="merge: weights (default: as trained, else the base's)")
    add("--limit", type=float, metavar="NATS", help="merge: score difference that passes (default: by dtype)")
    add("--outtype", choices=["f32", "f16", "bf16", "q8_0"], help="gguf: weights (default: f16)")
    add("--llama-cpp", metavar="DIR", help="gguf: llama.cpp's source; or CATLIB_LLAMA_CPP")
    add("--binary", metavar="PATH", help="gguf: llama-server; or CATLIB_LLAMA_SERVER")
    add_settings_options(parser, ServingSettings, only=("device",))


def run(args: argparse.Namespace) -> None:
    """Write the export, and print what was verified."""
    from catlib.commands.predict import find_photos
    from catlib.serving.export import find_mergeable

    if args.photos and args.count < 1:
        raise InputError(f"--count must be at least 1, found {args.count}")
    given = {name: v for names in ONLY.values() for name in names if (v := getattr(args, name)) is not None}
    if strange := [name for name in given if name not in ONLY[args.kind]]:
        raise InputError(f"--{strange[0].replace('_', '-')} is no option of catlib export {args.kind}")
    source = find_mergeable(resolve(args.checkpoint), args.base_model)
    root, samples = find_photos(args.photos) if args.photos else (Path(), [])
    given |= {"device": settings_from_args(ServingSettings, args).device, "count": args.count, "force": args.force}
    make = _merge if args.kind == "merge" else _gguf
    facts, text = make(source, resolve(args.out), photos=[root / sample.image for sample in samples], **given)
    show(args, facts, text)


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
    verified = f"verified with {result.engine}: {result.verified}"
    if result.verified is None:
        verified = "not verified: llama-server is not installed"
    elif result.with_defect is not None:
        verified = DEFECT.format(**vars(result))
    return asdict(result), f"text model: {result.text}\nmmproj: {result.mmproj}\n{result.gigabytes:.3g} GB\n{verified}"
