"""`catlib memory`: how much memory a training run will need, whether it fits, and which batch would."""

import argparse
import json
from dataclasses import replace
from typing import Any

from catlib.commands.options import add_settings_options
from catlib.commands.train import training_settings
from catlib.errors import InputError
from catlib.settings import TrainSettings

PLAN = (("LoRA, r 16", 16.0), ("LoRA, r 32", 24.0), ("QLoRA", 20.0))  # the plan's hardware table, GB of GPU memory


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """The options of `catlib memory`."""
    parser = subparsers.add_parser("memory", parents=[common], help="memory that training needs", description=__doc__)
    parser.add_argument("--profile", metavar="NAME", help="take the settings of notebooks/profiles/NAME.yaml, or of a file")
    parser.add_argument("--model_name", "--model-name", metavar="REF", help="the plan's name of --base_model")
    parser.add_argument("--vram", type=float, metavar="GB", help="memory of the device, GB (10^9 bytes)")
    parser.add_argument("--image_tokens", "--image-tokens", type=int, metavar="N", help="tokens of one photo; default: the model's most")
    parser.add_argument("--json", action="store_true", help="print bytes as JSON")
    add_settings_options(parser, TrainSettings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the estimate of these settings, of the other modes beside it, and the plan's figures."""
    settings = training_settings(args)
    for name in ("vram", "image_tokens"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise InputError(f"--{name} must be above 0, found {value}")

    from catlib.vlm.memory import GB, estimate, largest_batch, model_config

    config = model_config(settings.base_model)
    chosen = estimate(settings, config, args.image_tokens)
    limit = args.vram * GB if args.vram else None
    others = {}
    for mode in ("lora", "qlora"):
        for checkpointing in (False, True):
            variant = replace(settings, mode=mode, gradient_checkpointing=checkpointing)
            label = f"{mode}{', gradient checkpointing' if checkpointing else ''}"
            batch = largest_batch(variant, limit, args.image_tokens) if limit else None
            others[label] = (estimate(variant, config, args.image_tokens).peak, batch)
    largest = largest_batch(settings, limit, args.image_tokens) if limit else None
    fits = None if limit is None else chosen.peak <= limit
    if args.json:
        rows = {label: {"peak": peak, "largest_batch": batch} for label, (peak, batch) in others.items()}
        print(json.dumps({**chosen.as_dict(), "vram": limit, "fits": fits, "largest_batch": largest, "modes": rows}))
        return 0
    print(f"{settings.base_model}, mode {settings.mode}, r {settings.lora_r}, batch {settings.batch_size}, "
          f"{chosen.image_tokens} image tokens a photo")  # fmt: skip
    print(f"trainable parameters {chosen.trainable_parameters:>15,}   of {chosen.parameters:,}")
    for part in ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "features", "transient", "peak"):
        value = chosen.peak if part == "peak" else getattr(chosen, part)
        print(f"{part:<20} {value / GB:>15.2f} GB")
    if limit:
        print(f"\n{args.vram:g} GB: {'fits' if fits else 'does not fit'}; largest batch that does: {largest or 'none'}")
    print(f"\nat batch {settings.batch_size}" + (f", and the largest batch in {args.vram:g} GB" if limit else ""))
    for label, (peak, batch) in others.items():
        print(f"{label:<32} {peak / GB:>6.1f} GB" + ("" if batch is None else f"   {batch or 'none'}"))
    print("\nthe plan's table: " + "; ".join(f"{what}: {gb:g} GB" for what, gb in PLAN) + " (elsewhere it says 8 GB for QLoRA)")
    return 0
