"""`catlib verdict`: which model to run, from prediction files alone."""

import argparse

from catlib.classifiers.tracks import TUNED
from catlib.commands.evaluate import SHARED, add_files
from catlib.commands.options import add_settings_options, settings_from_args, show
from catlib.paths import given_path
from catlib.settings import ComparisonSettings

TARGETS = ("target_priority_f1", "target_gain_points", "clip_good_enough", "clip_priority_f1")
WISHES = ("latency_budget_ms", "explanations_wanted", "accuracy_first", "price_per_hour")


def add_options(parser: argparse.ArgumentParser) -> None:
    add_files(parser)
    parser.add_argument("--candidate", default=TUNED, metavar="NAME", help=f"the tuned VLM's file (default: {TUNED})")
    parser.add_argument("--train", metavar="FILE", help="samples that were trained on: no test photo may be among them")
    add_settings_options(parser, ComparisonSettings, only=(*SHARED, *TARGETS, *WISHES))


def run(args: argparse.Namespace) -> None:
    """Judge and print."""
    from catlib.evaluation import metrics_file
    from catlib.evaluation.results import Results
    from catlib.evaluation.tables import criteria_table, model_table, text_table

    settings = settings_from_args(ComparisonSettings, args)
    sets, validation = metrics_file.read_all(args.predictions), metrics_file.read_all(args.val)
    priority = metrics_file.choose_priority(settings.priority_breeds, list(sets.values()))
    found = Results(sets, validation, priority, settings.bootstrap, settings.seed, candidate=args.candidate).only(sets)
    verdict = found.judge(settings, given_path(args.train) if args.train else None)
    text = [verdict.text.replace("**", ""), "\nper cent [95 % interval]", text_table(model_table(found.models))]
    facts = {**verdict.as_json(), "models": found.models, "comparisons": found.comparisons}
    show(args, facts, "\n".join([*text, "", text_table(criteria_table(verdict.criteria))]))
