"""An executed notebook as one HTML page that needs nothing else: figures inline, code folded, no script, no network."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pandas as pd
from nbconvert import HTMLExporter
from papermill.execute import remove_error_markers
from pygments.formatters import HtmlFormatter

TEMPLATE = Path(__file__).with_name("template")
WIDGET = "application/vnd.jupyter.widget-view+json"
# pandas writes an index's name in a header row of its own.
TWO_HEADER_ROWS = re.compile(
    r"<thead>\s*<tr[^>]*>\s*<th></th>(?P<columns>(?:\s*<th>[^<]*</th>)*)\s*</tr>\s*"
    r"<tr>\s*(?P<name><th>[^<]*</th>)(?:\s*<th></th>)*\s*</tr>\s*</thead>"
)
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
        data = output.get("data", {})
        data.pop(WIDGET, None)  # a page without scripts shows what stands in for a widget
        if 'class="dataframe"' in data.get("text/html", ""):
            data["text/html"] = tidy(data["text/html"])
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


def table(rows: pd.DataFrame) -> str:
    """A DataFrame as a table with a header, its index as the first column where that has a name; the cells are text."""
    plain = rows.reset_index() if rows.index.name else rows
    return "" if plain.empty else tidy(plain.to_html(index=False, border=0))


def tidy(text: str) -> str:
    """HTML with the tables that pandas wrote, for a page: one header row, no style of their own, a figure and its interval on one
    line.
    """
    text = re.sub(r"<style scoped>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' border="\d"', "", text)
    text = TWO_HEADER_ROWS.sub(r"<thead><tr>\g<name>\g<columns></tr></thead>", text)
    return re.sub(r"<td>(?=[^<\[]*\[[^<]*\]</td>)", '<td class="figure">', text)
