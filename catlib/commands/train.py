"""`catlib train`: fine-tune a vision-language model; the settings of a profile, or the plan's, with options on top."""

import argparse
import json
import os
import sys
from typing import Any

from catlib.commands.options import PREFIX, add_settings_options, settings_given
from catlib.errors import InputError
from catlib.settings import TrainSettings


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """The options of `catlib train`: every training setting, and the plan's --model_name."""
    parser = subparsers.add_parser(
        "train",
        parents=[common],
        help="fine-tune a model",
        description=__doc__,
        epilog="on several GPUs: accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes N -m catlib.cli train … ",
    )
    parser.add_argument(
        "--profile", metavar="NAME", help="take the settings of notebooks/profiles/NAME.yaml, or of a file"
    )
    parser.add_argument("--model_name", "--model-name", metavar="REF", help="the plan's name of --base_model")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_settings_options(parser, TrainSettings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, and print where the checkpoint lies and its best figures."""
    settings = training_settings(args)

    from catlib.training.trainer import train

    result = train(settings)
    if os.environ.get("RANK", "0") != "0":
        return 0  # one process of a team speaks for all
    figures = {key: value for key, value in result.best.items() if isinstance(value, int | float)}
    if args.json:
        json.dump({"checkpoint": str(result.checkpoint), "best": figures}, sys.stdout)
        print()
        return 0
    print(f"checkpoint: {result.checkpoint}")
    print("best epoch: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    return 0


def training_settings(args: argparse.Namespace) -> TrainSettings:
    """The profile's training settings with the options on top. Raises InputError when two options contradict each other."""
    named = vars(args)
    if args.model_name is not None:
        if named.get(PREFIX + "base_model", args.model_name) != args.model_name:
            raise InputError("--model_name and --base_model name two models; give one")
        setattr(args, PREFIX + "base_model", args.model_name)
    return TrainSettings.of_profile(args.profile or "", settings_given(TrainSettings, args), "command line")
