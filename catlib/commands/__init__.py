"""The subcommands of `catlib`, one module each: its docstring is the help, `add_options(parser)`, `run(args) -> int`."""
