"""`catlib evaluate`: metrics with intervals from prediction files."""

import argparse
import json
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "evaluate",
        parents=[common],
        help="accuracy, F1 by breed, calibration, latency, each with its 95 %% interval",
        description="Compute the metrics of prediction files and merge them into a metrics file.",
    )
    parser.add_argument("--predictions", nargs="+", required=True, metavar="FILE", help="MODEL.jsonl with its sidecar")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="metrics file; entries of other models in it are kept"
    )
    parser.add_argument(
        "--priority",
        metavar="BREEDS",
        help="breeds reported apart, comma separated (default: the plan's seven, if the models know them)",
    )
    parser.add_argument(
        "--val",
        nargs="*",
        default=[],
        metavar="FILE",
        help="validation predictions of the same models: fits the temperature",
    )
    parser.add_argument(
        "--bootstrap", type=int, default=2000, metavar="N", help="resamples behind each interval (default: 2000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write, print."""
    from catlib.evaluation import inputs
    from catlib.evaluation.metrics_file import merge_into
    from catlib.evaluation.results import Results
    from catlib.evaluation.tables import breed_table, model_table, text_table

    inputs.check_bootstrap(args.bootstrap)
    sets = inputs.read_all(args.predictions)
    validation = inputs.read_all(args.val)
    priority = inputs.choose_priority(args.priority, list(sets.values()))
    models = Results(sets, validation, priority, args.bootstrap, args.seed).models
    out = merge_into(Path(args.out).expanduser(), models=models, priority_breeds=list(priority))
    if args.json:
        print(json.dumps({"models": models}, ensure_ascii=False, allow_nan=False))
        return 0
    print("per cent [95 % interval]")
    print(text_table(model_table(models)))
    for name, metrics in models.items():
        print(f"\n{name}: by breed, lowest F1 first (*: priority)")
        print(text_table(breed_table(metrics)))
    print(f"\nwritten to {out}")
    return 0
