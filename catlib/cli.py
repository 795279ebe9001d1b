"""The command `catlib`: parses, runs one subcommand, and turns every failure into one paragraph and its exit code."""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from catlib import __version__
from catlib.commands.options import results_only
from catlib.errors import CatlibError

RUNS, WORK = ("report", "runs", "params", "render"), ("data", "train", "predict", "evaluate", "compare")
COMMANDS = RUNS + WORK + ("verdict", "gate", "memory", "export", "serve")
COMMON = {
    "--debug": "show the traceback of a failure",
    "--quiet": "log warnings only",
    "--json": "print the result as JSON, for a program to read",
}


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, one module of `catlib.commands` a subcommand: docstring, EPILOG, USAGE, `add_options`, `run`."""
    about = "Fine-tune a VLM to name cat breeds; compare it with CLIP."
    parser = argparse.ArgumentParser(prog="catlib", description=about)
    parser.add_argument("--version", action="version", version=f"catlib {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"catlib.commands.{name}")
        about = (module.__doc__ or "").partition(": ")[2]
        usage, epilog = (getattr(module, text, None) for text in ("USAGE", "EPILOG"))
        command = subparsers.add_parser(name, help=about, description=about, usage=usage, epilog=epilog)
        for flag, meaning in COMMON.items():
            command.add_argument(flag, action="store_true", help=meaning)
        module.add_options(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    args = argparse.Namespace(debug=True)  # until they are read
    try:
        args = build_parser().parse_args(argv)  # imports every command, and may be interrupted in it
        level = logging.WARNING if args.quiet else logging.INFO
        logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
        for noisy in ("httpx", "matplotlib", "PIL", "bitsandbytes"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        logging.getLogger("papermill").setLevel(logging.ERROR)  # warns of parameters that are no knobs; catlib checks
        with results_only():
            return args.run(args) or 0
    except KeyboardInterrupt:
        print("catlib: interrupted; what was finished is kept, run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if args.debug:
            raise
        if isinstance(error, CatlibError):
            print(f"catlib: {error}", file=sys.stderr)
            return error.exit_code
        print(f"catlib: {type(error).__name__}: {error} (run again with --debug for the traceback)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
