"""`catlib render`: a notebook that was executed in JupyterLab as the HTML page that `catlib report` would make of it."""

import argparse
from pathlib import Path

from catlib.commands.options import show
from catlib.errors import InputError
from catlib.paths import given_path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("notebook", metavar="NOTEBOOK.ipynb", type=Path, help="an executed notebook; it is not changed")
    parser.add_argument("--out", metavar="PAGE.html", type=Path, help="the page (default: beside the notebook)")


def run(args: argparse.Namespace) -> None:
    """Write the page and print its path."""
    from catlib.files import write_text
    from catlib.reports import html

    source = given_path(args.notebook)
    if not source.is_file():
        raise InputError(f"{source}: no such notebook")
    page = args.out or source.with_suffix(".html")
    if page.resolve() == source.resolve():
        raise InputError(f"--out {page}: that is the notebook itself")
    body = html.notebook_body(source, source.stat().st_mtime_ns)
    write_text(page, html.render("page.html.j2", title=source.stem, body=body.html, alone=True))
    show(args, {"page": str(page)}, f"Page: {page}")
