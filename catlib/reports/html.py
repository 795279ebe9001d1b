"""An executed notebook as one HTML page that needs nothing else: figures inline, code folded, no script, no network."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from html import escape
from os.path import exists
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pandas as pd
from nbconvert import HTMLExporter
from papermill.execute import remove_error_markers
from pygments.formatters import HtmlFormatter

from catlib.paths import project_root
from catlib.reports.markup import arrange, clean, clean_output, code_label, markdown_output, tidy

TEMPLATE = Path(__file__).with_name("template")
SHOWN = ("text/html", "text/markdown", "image/png", "image/jpeg", "text/plain")  # of an output; nothing else can get in
FILTERS = {
    "clean_html": clean,
    "clean_output": clean_output,
    "markdown_output": markdown_output,
    "code_label": code_label,
}
# No page may fetch, execute, send or move anything: it opens offline, and a name in the data cannot smuggle in a script.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
HEADING = re.compile(r'<h2 id="([^"]+)">(.*?)</h2>', re.DOTALL)
NOT_BEFORE_PATH = r"(?<![\w/+=.~-])"  # what base64 is made of, too: a picture must not be changed
PATH = re.compile(rf"{NOT_BEFORE_PATH}/(?:[^\s<>\"'/,:;&()]+/)+[^\s<>\"'/,:;&()]*[^\s<>\"'/,:;&().]")
TAG = re.compile(r"<[^>]*>")


@cache
def _style() -> str:
    """The style of all pages, with the colours of code for light and for dark screens."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    own = (TEMPLATE / "style.css").read_text(encoding="utf-8")
    return f"{own}{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}"


def page(title: str, nav: str, body: str, footer: str = "") -> str:
    """A whole HTML document around `nav`, `body` and `footer`, which are HTML; `title` is text.

    What would betray the author's machine, or hides in a terminal's control characters, does not get into it.
    """
    text = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>{_style()}</style></head>\n'
        f'<body><nav aria-label="Pages">{nav}</nav>\n<main>{body}</main>\n<footer>{footer}</footer></body></html>\n'
    )
    for folder, instead in ((project_root(), ""), (Path.home(), "~/")):  # these two may have spaces in their names
        if len(folder.parts) > 1:
            text = re.sub(rf"{NOT_BEFORE_PATH}{re.escape(escape(str(folder)))}(/|(?![\w.-]))", instead, text)
    return PATH.sub(lambda found: f"…/{Path(found[0]).name}" if exists(found[0]) else found[0], CONTROL.sub("", text))


@cache
def notebook_body(path: Path, changed: int) -> str:
    """The cells of an executed notebook as HTML; `changed`, its time of change, tells versions apart in the cache."""
    notebook = remove_error_markers(nbformat.read(path, as_version=4))
    notebook.metadata.pop("widgets", None)
    below = path.stem
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (title := re.search(r"^#+ (.+)", cell.source, re.MULTILINE)):
            below = title[1]
        for output in cell.get("outputs", []):
            if "data" in output:
                output.data = {kind: output.data[kind] for kind in SHOWN if kind in output.data}
                output.metadata = {kind: {"alt": f"Picture below the heading {below}"} for kind in output.data}
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("data", True)]
    exporter = HTMLExporter(
        template_name=TEMPLATE.name, extra_template_basedirs=[str(TEMPLATE.parent)], filters=FILTERS, sanitize_html=True
    )
    exporter.log.setLevel(logging.ERROR)  # it warns of every figure that has no alternative text
    return arrange(exporter.from_notebook_node(notebook)[0], path.stem)


def sections(body: str) -> str:
    """The sections of `body` as a list of links."""
    found = [(at, TAG.sub("", text)) for at, text in HEADING.findall(body)]
    return "".join(["<ul>", *(f'<li><a href="#{at}">{text}</a></li>' for at, text in found), "</ul>"])


def contents(body: str, least: int = 3) -> str:
    """The list of the sections of a page; none where there are fewer than `least`."""
    if len(HEADING.findall(body)) < least:
        return ""
    return f'<nav class="contents" aria-label="Contents">{sections(body)}</nav>'


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
    cells = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>' for name, value in rows
    )
    return f"<table>{cells}</table>"


def table(rows: pd.DataFrame) -> str:
    """A DataFrame as a table with a header, its index as the first column where that has a name; the cells are text."""
    plain = rows.reset_index() if rows.index.name else rows
    return "" if plain.empty else tidy(plain.to_html(index=False, border=0))


def html_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are HTML, below the names of its columns, which are text."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return tidy(f"<table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table>")
