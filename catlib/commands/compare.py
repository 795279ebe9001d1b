"""`catlib compare`: two models on the same photos, the gain with its interval and where it comes from."""

import argparse
import json


def add_parser(subparsers: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "compare",
        parents=[common],
        help="the paired gain of one model over another",
        description="Compare two prediction files photo by photo. Every gain is that of A over B.",
    )
    parser.add_argument("a", metavar="A.jsonl", help="predictions of the model whose gain is wanted")
    parser.add_argument("b", metavar="B.jsonl", help="predictions of the model that it is measured against")
    parser.add_argument(
        "--priority", metavar="BREEDS", help="breeds reported apart, comma separated (default: the plan's seven)"
    )
    parser.add_argument(
        "--val", nargs=2, metavar=("A_VAL", "B_VAL"), help="validation predictions: the gain of combining both"
    )
    parser.add_argument(
        "--bootstrap", type=int, default=2000, metavar="N", help="resamples behind each interval (default: 2000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare and print."""
    from catlib.data.records import read_predictions
    from catlib.evaluation import inputs
    from catlib.evaluation.compare import compare
    from catlib.evaluation.tables import comparison_table, confusion_table, points, text_table

    inputs.check_bootstrap(args.bootstrap)
    a, b, *val = (read_predictions(inputs.given_file(path)) for path in (args.a, args.b, *(args.val or ())))
    priority = inputs.choose_priority(args.priority, [a, b])
    c = compare(
        a,
        b,
        priority,
        val_a=val[0] if val else None,
        val_b=val[1] if val else None,
        bootstrap=args.bootstrap,
        seed=args.seed,
    )
    if args.json:
        print(json.dumps(c, ensure_ascii=False, allow_nan=False))
        return 0
    print(f"Gain of A ({c['a']}) over B ({c['b']}) on {c['n']} photos that both have seen, points [95 % interval]")
    print(text_table(comparison_table([c])))
    if any(c["dropped"].values()):
        print(f"  left out, seen by one model only: {c['dropped']['a']} photos of A, {c['dropped']['b']} of B")
    print(
        f"  accuracy {c['accuracy']['a']:.1%} against {c['accuracy']['b']:.1%}; only A right {c['only_a_right']}, only "
        f"B {c['only_b_right']}"
    )
    print(
        f"  same answer for {c['agreement']:.1%}; always the right one of the two would reach "
        f"{c['oracle_accuracy']:.1%}"
    )
    if c["combination"]:
        mixed = c["combination"]
        print(
            f"  averaging both (weight of A {mixed['weight_a']:.2f}): {mixed['accuracy']:.1%}, "
            f"{points({'value': mixed['gain_points'], 'ci95': mixed['ci95']})} over {mixed['over']}"
        )
    for change in ("gains", "loses"):
        rows = [
            {
                "breed": r["breed"],
                "photos": str(r["support"]),
                "points": f"{r['gain_points']:+.0f}",
                "p, corrected": f"{r['p_adjusted']:.3f}",
            }
            for r in c["breeds"]
            if r["change"] == change
        ]
        print(f"\nBreeds where A surely {change}:\n{text_table(rows)}")
    print(f"\nConfusions that vanish in A:\n{text_table(confusion_table(c, 'vanish'))}")
    print(f"\nConfusions that appear in A:\n{text_table(confusion_table(c, 'appear'))}")
    return 0
