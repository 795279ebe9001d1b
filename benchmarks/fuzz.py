"""Spoil inputs of every kind for minutes, and see that each is read or refused: no traceback, no hang, no file changed but the output.

    python benchmarks/fuzz.py [--cases 400] [--photos 2000] [--models 60] [--only photos,HTML] [--seed 0] [--keep DIR]

The kinds and strategies are those of tests/fuzz_cases.py, of which tests/test_fuzz.py tries a few seconds. Each kind runs in a process
of its own, so that a crash or a hang costs that kind alone. Prints a table of cases tried and failed; exit code 1 when one failed. With
--keep the failing inputs are written to DIR.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MODELS = ("adapter configs", "training records", "model configs", "adapter weights", "profiles", "profiles as text")


def try_kind(kind: str, count: int, seed_of_draws: int, results: Any) -> None:
    """Try so many cases of a kind; puts (cases, how many failed, an input for each thing said) after each."""
    from fuzz_cases import Place, quiet
    from hypothesis import HealthCheck, given, seed, settings

    quiet()
    warnings.simplefilter("ignore")  # Pillow warns of each spoilt TIFF
    tried = failed = 0
    failures: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder) / "place")

        @seed(seed_of_draws)
        @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(place.strategy(kind))
        def case(data: bytes) -> None:
            nonlocal tried, failed
            tried += 1
            try:
                place.survives(kind, data)
            except Exception as error:
                failed += 1
                lines = str(error).strip().splitlines() or [""]
                failures.setdefault(f"{type(error).__name__}: {lines[-1][:300]}", data)
            results.put((tried, failed, dict(failures)))

        case()
    results.put(None)


def watch(kind: str, count: int, seed: int, limit_s: float) -> tuple[int, int, dict[str, bytes]]:
    """(cases, how many failed, inputs that failed) of a kind, tried in a process that is ended when a case takes longer than `limit_s`."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=try_kind, args=(kind, count, seed, results), daemon=True)
    process.start()
    tried, failed, failures, heard = 0, 0, {}, time.monotonic()
    while True:
        try:
            found = results.get(timeout=1)
        except Exception:  # queue.Empty
            if not process.is_alive() or time.monotonic() - heard > limit_s:
                failures["the process crashed or hung in the case after this one"] = b""
                process.kill()
                return tried + 1, failed + 1, failures
            continue
        heard = time.monotonic()
        if found is None:
            process.join()
            return tried, failed, failures
        tried, failed, failures = found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400, help="of each kind")
    parser.add_argument("--photos", type=int, default=2000, help="spoilt photos, over all formats")
    parser.add_argument("--models", type=int, default=60, help="of each kind for which a model is loaded")
    parser.add_argument("--only", default="", help="kinds, comma separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="DIR")
    args = parser.parse_args()
    from fuzz_cases import KINDS, SECONDS

    total = failed = 0
    print(f"{'kind':<18} {'cases':>6} {'passed':>7} {'seconds':>8}")
    for kind in args.only.split(",") if args.only else KINDS:
        count = args.photos if kind == "photos" else args.models if kind in MODELS else args.cases
        start = time.monotonic()
        tried, bad, failures = watch(kind, count, args.seed, 10 * SECONDS)
        print(f"{kind:<18} {tried:>6} {tried - bad:>7} {time.monotonic() - start:>8.0f}", flush=True)
        for number, (said, data) in enumerate(failures.items()):
            print(f"  {said}\n  {data[:200]!r}")
            if args.keep:
                args.keep.mkdir(parents=True, exist_ok=True)
                (args.keep / f"{kind}-{number}").write_bytes(data)
        total, failed = total + tried, failed + bad
    print(f"{total} cases, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
