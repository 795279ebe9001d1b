"""`catlib memory`: how much memory a training run will need, whether it fits, and which batch would."""

import argparse
import json
from dataclasses import replace
from typing import Any

from catlib.commands.options import add_settings_options
from catlib.commands.train import training_settings
from catlib.errors import InputError
from catlib.settings import TrainSettings

PLAN = (
    ("LoRA, r 16", "lora", 16, 16.0),
    ("LoRA, r 32", "lora", 32, 24.0),
    ("QLoRA, r 32", "qlora", 32, 20.0),
)  # GB of a GPU
PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "features", "transient")


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """The options of `catlib memory`."""
    parser = subparsers.add_parser("memory", parents=[common], help="memory that training needs", description=__doc__)
    parser.add_argument(
        "--profile", metavar="NAME", help="take the settings of notebooks/profiles/NAME.yaml, or of a file"
    )
    parser.add_argument("--model_name", "--model-name", metavar="REF", help="the plan's name of --base_model")
    parser.add_argument("--vram", type=float, metavar="GB", help="memory of the device, GB (10^9 bytes)")
    parser.add_argument(
        "--image_tokens", "--image-tokens", type=int, metavar="N", help="tokens of one photo; default: the model's most"
    )
    parser.add_argument("--json", action="store_true", help="print bytes as JSON")
    add_settings_options(parser, TrainSettings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the estimate of these settings, of the other modes beside it, and the plan's figures."""
    settings = training_settings(args)
    for name in ("vram", "image_tokens"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise InputError(f"--{name} must be above 0, found {value}")
    facts = gather(settings, args.vram, args.image_tokens)
    if args.json:
        print(json.dumps(facts))
    else:
        print("\n".join(lines(settings, facts)))
    return 0


def gather(settings: TrainSettings, vram: float | None, image_tokens: int | None) -> dict[str, Any]:
    """All figures, in bytes: the estimate of the settings, `modes` (LoRA and QLoRA, with and without gradient checkpointing) and
    `plan` (the plan's hardware table beside ours). `largest_batch` and `fits` are null without `vram`.
    """
    from catlib.training.memory import ANSWER_TOKENS, GB, TEXT_TOKENS, Footprint, largest_batch, model_config
    from catlib.training.memory_trace import Shape
    from catlib.vlm.image_tokens import image_tokens_of

    config = model_config(settings.base_model)
    shape = Shape(image_tokens or image_tokens_of(config), TEXT_TOKENS, ANSWER_TOKENS)
    limit = vram * GB if vram else None
    made: dict[TrainSettings, Footprint] = {}

    def footprint(**changes: Any) -> Footprint:
        variant = replace(settings, **changes)
        if variant not in made:
            made[variant] = Footprint.of(variant, config, shape)
        return made[variant]

    def row(of: Footprint, limit: float | None) -> dict[str, Any]:
        return {
            "peak": of.at(settings.batch_size).peak,
            "largest_batch": None if limit is None else largest_batch(of, limit),
        }

    modes = {
        f"{mode}{', gradient checkpointing' if checkpointing else ''}": row(
            footprint(mode=mode, gradient_checkpointing=checkpointing), limit
        )
        for mode in ("lora", "qlora")
        for checkpointing in (False, True)
    }
    plan = []
    for what, mode, rank, gb in PLAN:
        plain, saving = (
            row(footprint(mode=mode, lora_r=rank, lora_alpha=2 * rank, gradient_checkpointing=on), gb * GB)
            for on in (False, True)
        )
        plan.append({"what": what, "plan": gb * GB, "ours": plain, "ours_gradient_checkpointing": saving})
    chosen = footprint()
    need = chosen.at(settings.batch_size)
    return {
        **need.as_dict(),
        "vram": limit,
        "fits": None if limit is None else need.peak <= limit,
        "largest_batch": None if limit is None else largest_batch(chosen, limit),
        "modes": modes,
        "plan": plan,
    }


def lines(settings: TrainSettings, facts: dict[str, Any]) -> list[str]:
    """The figures as text, GB of 10^9 bytes."""
    batch, limit = settings.batch_size, facts["vram"]

    def gb(value: float) -> str:
        return f"{value / 1e9:.2f} GB"

    def most(value: int | None) -> str:
        return "none" if value == 0 else str(value)

    text = [
        f"{settings.base_model}, mode {settings.mode}, r {settings.lora_r}, batch {batch}, gradient checkpointing "
        f"{'on' if settings.gradient_checkpointing else 'off'}, {facts['image_tokens']} image tokens a photo",
        f"{'trainable parameters':<32} {facts['trainable_parameters']:>15,}   of {facts['parameters']:,}",
    ]
    text += [f"{part:<32} {gb(facts[part]):>18}" for part in PARTS]
    text += [f"{f'peak in the {phase}':<32} {gb(value):>18}" for phase, value in facts["phases"].items()]
    text.append(f"{'peak':<32} {gb(facts['peak']):>18}")
    if limit:
        text += [
            "",
            f"{limit / 1e9:g} GB: {'fits' if facts['fits'] else 'does not fit'}; "
            f"largest batch that does: {most(facts['largest_batch'])}",
        ]
    text += ["", f"at batch {batch}" + (f", and the largest batch in {limit / 1e9:g} GB" if limit else "")]
    text += [
        f"{label:<32} {gb(way['peak']):>18}" + ("" if limit is None else f"   {most(way['largest_batch'])}")
        for label, way in facts["modes"].items()
    ]
    text += [
        "",
        f"{'the plan says':<32} {'ours, batch ' + str(batch):>18}   with checkpointing   largest batch in the plan's memory",
    ]
    for entry in facts["plan"]:
        plain, saving = entry["ours"], entry["ours_gradient_checkpointing"]
        text.append(
            f"{entry['what'] + ': ' + format(entry['plan'] / 1e9, 'g') + ' GB':<32} {gb(plain['peak']):>18}   {gb(saving['peak']):>18}"
            f"   {most(plain['largest_batch'])}, with checkpointing {most(saving['largest_batch'])}"
        )
    return [*text, "(elsewhere the plan says 8 GB for QLoRA)"]
