"""An executed notebook as one HTML page that needs nothing else: figures inline, code folded, no script, no network."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
from nbconvert import HTMLExporter
from papermill.execute import remove_error_markers
from pygments.formatters import HtmlFormatter

TEMPLATE = Path(__file__).with_name("template")
WIDGET = "application/vnd.jupyter.widget-view+json"
# No page may fetch or execute anything: it opens offline, and a name in the data cannot smuggle in a script.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, nav: str, body: str, footer: str = "") -> str:
    """A whole HTML document around `nav`, `body` and `footer`, which are HTML; `title` is text."""
    style = (TEMPLATE / "style.css").read_text(encoding="utf-8") + HtmlFormatter().get_style_defs(".highlight")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>{style}</style></head>\n'
        f"<body><nav>{nav}</nav>\n<main>{body}</main>\n<footer>{footer}</footer></body></html>\n"
    )


@cache
def notebook_body(path: Path, changed: int) -> str:
    """The cells of an executed notebook as HTML; `changed`, its time of change, tells versions apart in the cache."""
    notebook = remove_error_markers(nbformat.read(path, as_version=4))
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        output.get("data", {}).pop(WIDGET, None)  # a page without scripts shows what stands in for a widget
    exporter = HTMLExporter(template_name=TEMPLATE.name, extra_template_basedirs=[str(TEMPLATE.parent)])
    exporter.log.setLevel(logging.ERROR)  # it warns of every figure that has no alternative text
    return exporter.from_notebook_node(notebook)[0]


def navigation(run: str, stages: Mapping[str, Mapping[str, Any]], pages: Collection[str], here: str) -> str:
    """The line of links between the pages of a run; the page `here` and stages that are not among `pages` are not links."""
    entries = [("../index.html", "all runs", True), ("index.html", run, True)]
    entries += [(f"{name}.html", stage["title"], name in pages) for name, stage in stages.items()]
    return " ".join(
        f"<b>{escape(text)}</b>"
        if target == here
        else f'<a href="{quote(target)}">{escape(text)}</a>'
        if exists
        else f"<span>{escape(text)} (not run)</span>"
        for target, text, exists in entries
    )


def facts(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and values as a small table."""
    cells = "".join(f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of text, all with the same keys, as a table with a header."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(key)}</th>" for key in rows[0])
    body = "".join("<tr>" + "".join(map(_cell, map(str, row.values()))) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    """A cell; a figure and its interval stay on one line."""
    kind = ' class="figure"' if "[" in text else ""
    return f"<td{kind}>{escape(text)}</td>"
