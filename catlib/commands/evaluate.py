"""`catlib evaluate`: accuracy, F1 by breed, calibration and latency of prediction files, with intervals."""

import argparse
from pathlib import Path
from typing import Any

from catlib.commands.options import add_settings_options, settings_from_args, show
from catlib.errors import InputError
from catlib.paths import given_path
from catlib.settings import EvaluationSettings

SHARED = ("priority_breeds", "bootstrap", "seed")


def add_options(parser: argparse.ArgumentParser) -> None:
    add_files(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="metrics file; other models' entries are kept")
    add_settings_options(parser, EvaluationSettings, only=SHARED)


def add_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--predictions", nargs="+", required=True, metavar="FILE", help="MODEL.jsonl with its sidecar")
    add("--val", nargs="*", default=[], metavar="FILE", help="validation predictions, to fit and choose on")


def run(args: argparse.Namespace) -> None:
    """Evaluate, write, print."""
    from catlib.evaluation import metrics_file
    from catlib.evaluation.results import Results
    from catlib.evaluation.tables import breed_table, model_table, text_table

    settings = settings_from_args(EvaluationSettings, args)
    metrics_file.existing(Path(args.out).expanduser())  # refused before anything is computed
    validation = {given_path(path).stem: path for path in args.val}
    models: dict[str, Any] = {}
    priority: tuple[str, ...] | None = None
    for path in args.predictions:  # one model in memory at a time: 126,000 photos with 67 scores are 300 MB
        sets = metrics_file.read_all([path])
        val = metrics_file.read_all([validation[name] for name in sets if name in validation])
        if models.keys() & sets.keys():
            raise InputError(f"{path}: a second file of the model {', '.join(sets)}; a model is named after its file")
        if priority is None:
            priority = metrics_file.choose_priority(settings.priority_breeds, list(sets.values()))
        models |= Results(sets, val, priority, settings.bootstrap, settings.seed).models
    out = metrics_file.write_metrics(Path(args.out).expanduser(), models=models, priority_breeds=list(priority or ()))
    text = ["per cent [95 % interval]", text_table(model_table(models))]
    for name, metrics in models.items():
        text += [f"\n{name}: by breed, lowest F1 first (*: priority)", text_table(breed_table(metrics))]
    show(args, {"models": models}, "\n".join([*text, f"\nwritten to {out}"]))
