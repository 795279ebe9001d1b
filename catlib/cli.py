"""The command `catlib`: parses, runs one subcommand, and turns every failure into one paragraph and its exit code."""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from catlib import __version__
from catlib.errors import CatlibError

COMMANDS = (
    "report",
    "runs",
    "params",
    "render",
    "data",
    "train",
    "predict",
    "evaluate",
    "compare",
    "memory",
    "export",
    "serve",
)
log = logging.getLogger("catlib")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; each module in `catlib.commands` adds its own subcommand."""
    parser = argparse.ArgumentParser(
        prog="catlib", description="Fine-tune a VLM to name cat breeds; compare it with CLIP."
    )
    parser.add_argument("--version", action="version", version=f"catlib {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    common.add_argument("--quiet", action="store_true", help="log warnings only")
    common.add_argument("--json", action="store_true", help="print the result as JSON, for a program to read")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        import_module(f"catlib.commands.{name}").add_parser(subparsers, common)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.WARNING if args.quiet else logging.INFO, format="%(message)s", stream=sys.stderr, force=True
    )
    for noisy in ("httpx", "matplotlib", "PIL", "bitsandbytes"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("papermill").setLevel(
        logging.ERROR
    )  # warns of parameters that are no knobs, which catlib checks itself
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("catlib: interrupted; what was finished is kept, run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except CatlibError as error:
        if args.debug:
            raise
        print(f"catlib: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if args.debug:
            raise
        print(f"catlib: {type(error).__name__}: {error} (run again with --debug for the traceback)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
