"""`catlib evaluate`: accuracy, F1 by breed, calibration and latency of prediction files, with intervals."""

import argparse
from pathlib import Path

from catlib.commands.options import add_settings_options, settings_from_args, show
from catlib.settings import EvaluationSettings

SHARED = ("priority_breeds", "bootstrap", "seed")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `catlib evaluate`."""
    add = parser.add_argument
    add("--predictions", nargs="+", required=True, metavar="FILE", help="MODEL.jsonl with its sidecar")
    add("--out", required=True, metavar="FILE", help="metrics file; other models' entries are kept")
    add(
        "--val", nargs="*", default=[], metavar="FILE", help="validation predictions: the temperature is fitted on them"
    )
    add_settings_options(parser, EvaluationSettings, only=SHARED)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    from catlib.evaluation import inputs
    from catlib.evaluation.metrics_file import existing, merge_into
    from catlib.evaluation.results import Results
    from catlib.evaluation.tables import breed_table, model_table, text_table

    settings = settings_from_args(EvaluationSettings, args)
    inputs.check_bootstrap(settings.bootstrap)
    existing(Path(args.out).expanduser())  # refused before anything is computed
    sets, validation = inputs.read_all(args.predictions), inputs.read_all(args.val)
    priority = inputs.choose_priority(settings.priority_breeds, list(sets.values()))
    models = Results(sets, validation, priority, settings.bootstrap, settings.seed).models
    out = merge_into(Path(args.out).expanduser(), models=models, priority_breeds=list(priority))
    text = ["per cent [95 % interval]", text_table(model_table(models))]
    for name, metrics in models.items():
        text += [f"\n{name}: by breed, lowest F1 first (*: priority)", text_table(breed_table(metrics))]
    show(args, {"models": models}, "\n".join([*text, f"\nwritten to {out}"]))
    return 0
