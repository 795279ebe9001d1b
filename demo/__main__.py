"""`python -m demo`: draw the demo's photos. A complete set is left alone, so it costs nothing to run it again."""

import argparse
import logging
import sys
from collections.abc import Sequence

from catlib.errors import CatlibError
from catlib.paths import resolve
from demo.photos import draw_photos


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--out", default="data/demo/photos", help="folder that gets the photos (default: %(default)s)")
    parser.add_argument("--photos", type=int, default=120, help="training photos of the most frequent breed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        draw_photos(resolve(args.out), args.photos, args.seed)
    except CatlibError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
