"""The subcommands of `catlib`, one module each: `add_parser(subparsers)` and `run(args) -> int`."""
