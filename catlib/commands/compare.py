"""`catlib compare`: the gain of model A over model B, photo by photo, with its interval and where it comes from."""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from catlib.commands.evaluate import SHARED
from catlib.commands.options import add_settings_options, settings_from_args, show
from catlib.paths import given_path
from catlib.settings import EvaluationSettings


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("a", metavar="A.jsonl", help="predictions of the model whose gain is wanted")
    add("b", metavar="B.jsonl", help="predictions of the model that it is measured against")
    add("--val", nargs=2, metavar=("A_VAL", "B_VAL"), help="validation predictions: the gain of combining both")
    add_settings_options(parser, EvaluationSettings, only=SHARED)


def run(args: argparse.Namespace) -> None:
    """Compare and print."""
    from catlib.data.records import read_predictions
    from catlib.evaluation import metrics_file
    from catlib.evaluation.compare import compare

    settings = settings_from_args(EvaluationSettings, args)
    a, b, *val = (read_predictions(given_path(path)) for path in (args.a, args.b, *(args.val or ())))
    priority = metrics_file.choose_priority(settings.priority_breeds, [a, b])
    both = dict(zip(("val_a", "val_b"), val, strict=False))
    found = compare(a, b, priority, **both, bootstrap=settings.bootstrap, seed=settings.seed)
    show(args, found, "\n".join(lines(found)))


def lines(c: Mapping[str, Any]) -> Iterator[str]:
    """The comparison as text."""
    from catlib.evaluation.tables import comparison_table, confusion_table, points, text_table

    yield f"Gain of A ({c['a']}) over B ({c['b']}) on {c['n']} photos that both have seen, points [95 % interval]"
    yield text_table(comparison_table([c]))
    if any(c["dropped"].values()):
        yield f"  left out, seen by one model only: {c['dropped']['a']} photos of A, {c['dropped']['b']} of B"
    yield f"  accuracy {c['accuracy']['a']:.1%} against {c['accuracy']['b']:.1%}"
    yield f"  only A right {c['only_a_right']}, only B {c['only_b_right']}; same answer for {c['agreement']:.1%}"
    yield f"  always the right one of the two would reach {c['oracle_accuracy']:.1%}"
    if mixed := c["combination"]:
        gain = points({"value": mixed["gain_points"], "ci95": mixed["ci95"]})
        yield f"  both averaged (weight of A {mixed['weight_a']:.2f}): {mixed['accuracy']:.1%}, {gain} over {mixed['over']}"
    for change in ("gains", "loses"):
        rows = [
            {
                "breed": row["breed"],
                "photos": str(row["support"]),
                "points": f"{row['gain_points']:+.0f}",
                "p, corrected": f"{row['p_adjusted']:.3f}",
            }
            for row in c["breeds"]
            if row["change"] == change
        ]
        yield f"\nBreeds where A surely {change}:\n{text_table(rows)}"
    for which in ("vanish", "appear"):
        yield f"\nConfusions that {which} in A:\n{text_table(confusion_table(c, which))}"
