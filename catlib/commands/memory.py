"""`catlib memory`: how much memory a training run will need, whether it fits, and which batch would."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from catlib.breeds import BREEDS
from catlib.commands.options import show
from catlib.commands.train import add_options as add_training_options
from catlib.commands.train import training_settings
from catlib.errors import InputError
from catlib.paths import resolve
from catlib.settings import TrainSettings

PLAN = (("LoRA, r 16", "lora", 16, 16.0), ("LoRA, r 32", "lora", 32, 24.0), ("QLoRA, r 32", "qlora", 32, 20.0))  # GB
PHOTOS = 10_000  # where no training file is there to count
PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "features", "transient")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--vram", type=float, metavar="GB", help="memory of the device, GB (10^9 bytes)")
    add("--photos", type=int, metavar="N", help="training photos; default: those of train_data, or 10,000")
    add("--price", type=float, metavar="X", help="price of a GPU for an hour")
    add("--hours", type=float, metavar="H", help="hours that the training may take: how many photos of each breed fit")
    add("--measure", action="store_true", help="train ten steps and predict on this device, and tell its hours as well")
    tokens = "tokens of one photo; default: the model's most"
    add("--image_tokens", "--image-tokens", type=int, metavar="N", help=tokens)
    add_training_options(parser)


def run(args: argparse.Namespace) -> None:
    """Print the estimate of these settings, of the other modes beside it, and the plan's figures."""
    settings = training_settings(args)
    for name in ("vram", "image_tokens", "photos", "price", "hours"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise InputError(f"--{name} must be above 0, found {value}")
    path = resolve(settings.train_data)
    photos = args.photos or (len(path.read_bytes().splitlines()) if path.is_file() else PHOTOS)
    facts = gather(settings, args.vram, args.image_tokens, photos, args.price)
    rows = facts["work"]["time"]
    if args.measure:
        from catlib.training.rates import measured_rates

        rates = measured_rates(settings)
        hours = {
            f"{what}hours": photos / rate / 3600 for what, rate in zip(("", "predict_"), rates.values(), strict=True)
        }
        hours["hours"] *= settings.epochs
        rows.append({"card": "this device", **hours, "share": None, "measured": True, "cost": None, **rates})
    if args.hours:
        from catlib.data.records import read_samples

        breeds = len({sample.breed for sample in read_samples(path)} if path.is_file() else BREEDS)
        facts["work"] |= {"breeds": breeds, "hours": args.hours}
        for row in rows:
            row["photos_per_breed"] = int(photos * args.hours / row["hours"] / breeds)
    show(args, facts, "\n".join(lines(settings, facts)))


def gather(
    settings: TrainSettings, vram: float | None, image_tokens: int | None, photos: int, price: float | None
) -> dict[str, Any]:
    """All figures, in bytes: the estimate of the settings, `modes` (LoRA and QLoRA, with and without gradient checkpointing) and
    `plan` (the plan's hardware table beside ours). `largest_batch`, `fits`, `auto` (what it comes to): null without `vram`.
    """
    from catlib.training import memory

    config = memory.model_config(settings.base_model)
    shape = memory.usual_shape(config, settings, image_tokens or 0)
    limit = vram * memory.GB if vram else None
    of = cache(lambda variant: memory.Footprint(variant, config, shape))

    def row(limit: float | None, **changes: Any) -> dict[str, Any]:
        footprint = of(replace(settings, **changes))
        most = None if limit is None else memory.largest_batch(footprint, limit)
        return {"peak": footprint.at(settings.batch_size).peak, "largest_batch": most}

    auto = memory.choose(settings, of, limit) if limit and settings.gradient_checkpointing == "auto" else None
    recomputes = auto.gradient_checkpointing if auto else settings.recomputes
    settings = replace(settings, gradient_checkpointing=str(recomputes).lower())
    saving = {"": {"gradient_checkpointing": "false"}, ", gradient checkpointing": {"gradient_checkpointing": "true"}}
    modes = {mode + way: row(limit, mode=mode, **on) for mode in ("lora", "qlora") for way, on in saving.items()}
    plan = []
    for what, mode, rank, gb in PLAN:
        plain, less = (row(gb * memory.GB, mode=mode, lora_r=rank, **on) for on in saving.values())
        plan.append({"what": what, "plan": gb * memory.GB, "ours": plain, "ours_gradient_checkpointing": less})
    need, largest = of(settings).at(settings.batch_size), row(limit)["largest_batch"]
    fits = None if limit is None else need.peak <= limit
    more = {"vram": limit, "fits": fits, "largest_batch": largest, "modes": modes, "plan": plan}
    chosen = auto and {key: auto.as_dict()[key] for key in ("batch_size", "gradient_checkpointing", "peak")}
    total = of(settings).flops() * photos * settings.epochs
    time = []
    for card, rate in memory.CARDS.items():
        share = memory.MEASURED.get(card, memory.ASSUMED)
        hours = total / rate / share / 3600
        cost = None if price is None else price * hours
        time.append({"card": card, "hours": hours, "share": share, "measured": card in memory.MEASURED, "cost": cost})
    steps = settings.epochs * math.ceil(photos / (settings.batch_size * settings.gradient_accumulation))
    work = {"photos": photos, "epochs": settings.epochs, "steps": steps, "flops": total, "time": time}
    return {**need.as_dict(), **more, "auto": chosen, "work": work}


def lines(settings: TrainSettings, facts: dict[str, Any]) -> Iterator[str]:
    """The figures as text, GB of 10^9 bytes."""
    batch, limit = settings.batch_size, facts["vram"]

    def gb(label: str, value: float) -> str:
        return f"{label:<32} {value / 1e9:>15.2f} GB"

    def most(row: dict[str, Any]) -> str:
        return "none" if row["largest_batch"] == 0 else str(row["largest_batch"])

    checkpointing = "on" if facts["gradient_checkpointing"] else "off"
    yield f"{settings.base_model}, mode {settings.mode}, r {settings.lora_r}, batch {batch}, gradient checkpointing {checkpointing}"
    yield f"{facts['image_tokens']} image tokens a photo; {facts['trainable_parameters']:,} of {facts['parameters']:,} parameters trained"
    yield from (gb(part, facts[part]) for part in PARTS)
    yield from (gb(f"peak in the {phase}", value) for phase, value in facts["phases"].items())
    yield gb("peak", facts["peak"])
    if limit:
        yield f"\n{limit / 1e9:g} GB: {'fits' if facts['fits'] else 'does not fit'}; largest batch that does: {most(facts)}"
    if auto := facts["auto"]:
        way = "with" if auto["gradient_checkpointing"] else "without"
        yield f"auto: {auto['batch_size']} photos in a pass, {way} gradient checkpointing: {auto['peak'] / 1e9:.2f} GB"
    work = facts["work"]
    yield f"\n{work['photos']:,} photos, {work['epochs']} epochs: {work['steps']:,} steps, {work['flops'] / 1e18:.3g} EFLOP"
    for row in work["time"]:
        basis = "measured" if row["measured"] else "assumed"
        said = "measured" if row["share"] is None else f"at {row['share']:.0%} of its rate, {basis}"
        said += "" if row["cost"] is None else f", {row['cost']:,.2f} at that price"
        if "predict_hours" in row:
            said += f"; {row['predict_hours']:.1f} to predict as many photos"
        if "photos_per_breed" in row:
            said += (
                f"; in {work['hours']:g} hours {row['photos_per_breed']:,} photos of each of {work['breeds']} breeds"
            )
        yield f"{row['card']:<32} {row['hours']:>15.1f} hours {said}"
    yield f"\nat batch {batch}" + (f", and the largest batch in {limit / 1e9:g} GB" if limit else "")
    yield from (gb(way, row["peak"]) + (f"   {most(row)}" if limit else "") for way, row in facts["modes"].items())
    yield f"\n{'the plan says':<32} {f'ours, batch {batch}':>18}   with checkpointing   largest batch in the plan's memory"
    for row in facts["plan"]:
        plain, less = row["ours"], row["ours_gradient_checkpointing"]
        label = f"{row['what']}: {row['plan'] / 1e9:g} GB"
        yield f"{gb(label, plain['peak'])}{less['peak'] / 1e9:>18.2f} GB   {most(plain)}, with checkpointing {most(less)}"
    yield "(elsewhere the plan says 8 GB for QLoRA)"
