"""`catlib train`: fine-tune a vision-language model; the settings of a profile, or the plan's, with options on top."""

import argparse
import os
from dataclasses import replace

from catlib.commands.options import PREFIX, add_settings_options, settings_given, show
from catlib.errors import InputError
from catlib.settings import TrainSettings

EPILOG = """on several GPUs: accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes N -m catlib.cli train …"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every training setting, the profile that they start from, and the plan's --model_name."""
    add = parser.add_argument
    add("--profile", default="", metavar="NAME", help="start from notebooks/profiles/NAME.yaml, or a file")
    add("--model_name", "--model-name", metavar="REF", help="the plan's name of --base_model")
    add_settings_options(parser, TrainSettings)


def run(args: argparse.Namespace) -> None:
    """Train, and print where the checkpoint lies and its best figures."""
    settings = training_settings(args)
    if PREFIX + "output_dir" in args:
        settings = replace(settings, run="")  # a folder of its own: what lies in it is not set aside with a run

    from catlib.training.trainer import train

    result = train(settings)
    if os.environ.get("RANK", "0") == "0":  # one process of a distributed group speaks for all
        best = {key: value for key, value in result.best.items() if isinstance(value, int | float)}
        text = ", ".join(f"{key} {value:.4g}" for key, value in best.items())
        facts = {"checkpoint": result.checkpoint, "best": best}
        show(args, facts, f"checkpoint: {result.checkpoint}\nbest epoch: {text}")


def training_settings(args: argparse.Namespace) -> TrainSettings:
    """The profile's training settings with the options on top. Raises InputError when two options contradict each other."""
    given = settings_given(TrainSettings, args)
    if args.model_name is not None and given.setdefault("base_model", args.model_name) != args.model_name:
        raise InputError("--model_name and --base_model name two models; give one")
    return TrainSettings.of_profile(args.profile, given, "command line")
