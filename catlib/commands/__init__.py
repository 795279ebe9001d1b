"""The subcommands of `catlib`, one module each: docstring for help, `add_options(parser)`, `run(args)` to an exit code or None."""
