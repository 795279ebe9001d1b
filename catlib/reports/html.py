"""Pages that need nothing else: from templates that escape all they are given, and from executed notebooks, code folded."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from os.path import exists
from pathlib import Path
from typing import Any

import jinja2
import nbformat
import pandas as pd
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from papermill.execute import remove_error_markers
from pygments.formatters import HtmlFormatter

from catlib.errors import InputError
from catlib.evaluation.tables import share
from catlib.evaluation.verdict import to_run
from catlib.paths import project_root
from catlib.reports.markup import arrange, clean, clean_output, code_label, downloads, markdown_output, tidy

TEMPLATE = Path(__file__).with_name("template")
SHOWN = ("text/html", "text/markdown", "image/png", "image/jpeg", "text/plain")  # of an output; nothing else can get in
FILTERS = {"clean_html": clean, **{f.__name__: f for f in (clean_output, markdown_output, code_label)}}
# No page may fetch, execute, send or move anything: it opens offline, and a name in the data cannot smuggle in a script.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
# Of terminals, and what turns the direction of the text around it.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")
NOT_BEFORE_PATH = r"(?<![\w/+=.~-])"  # what base64 is made of, too: a picture must not be changed
PATH = re.compile(rf"{NOT_BEFORE_PATH}/(?:[^\s<>\"'/,:;&()]+/)+[^\s<>\"'/,:;&()]*[^\s<>\"'/,:;&().]")
HEADING = re.compile(r'<h2 id="([^"]+)">(.*?)</h2>', re.DOTALL)


@dataclass(frozen=True)
class Body:
    """The cells of a notebook as HTML, its sections as (anchor, text), and its figures and tables as files by name."""

    html: Markup
    sections: list[tuple[str, str]]
    files: Mapping[str, bytes]


@cache
def _templates() -> jinja2.Environment:
    """The pages' templates, and the style of all of them, with the colours of code for light and for dark screens."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    own = (TEMPLATE / "style.css").read_text(encoding="utf-8")
    style = f"{own}{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}"
    made.globals |= {"policy": POLICY, "style": Markup(style), "table": table}
    made.filters |= {"took": took, "share": share, "to_run": to_run}
    return made


def part(template: str, values: Mapping[str, Any]) -> Markup:
    """A part of a page; see `render`."""
    return Markup(_templates().get_template(template).render(values))


def render(template: str, **values: Any) -> str:
    """A whole page. All `values` are text and are escaped; Markup is HTML. What would betray the author's machine, or
    hides in a terminal's control characters, does not get into it."""
    text = _templates().get_template(template).render(values)
    for folder, instead in ((project_root(), ""), (Path.home(), "~/")):  # these two may have spaces in their names
        if len(folder.parts) > 1:
            text = re.sub(rf"{NOT_BEFORE_PATH}{re.escape(str(Markup.escape(folder)))}(/|(?![\w.-]))", instead, text)
    return PATH.sub(lambda found: f"…/{Path(found[0]).name}" if exists(found[0]) else found[0], CONTROL.sub("", text))


@cache
def notebook_body(path: Path, changed: int) -> Body:
    """An executed notebook; `changed`, its time of change, tells versions apart in the cache. Raises InputError."""
    try:
        notebook = remove_error_markers(nbformat.read(path, as_version=4))
    except (ValueError, AttributeError, KeyError, OSError, nbformat.ValidationError) as error:
        raise InputError(f"{path}: not a notebook ({str(error).splitlines()[0][:200]})") from None
    notebook.metadata.pop("widgets", None)
    below = path.stem
    files: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (title := re.search(r"^#+ (.+)", cell.source, re.MULTILINE)):
            below = title[1]
        for output in cell.get("outputs", []):
            if "data" in output:
                slug = re.sub(r"\W+", "-", below.lower()).strip("-")[:40]
                for ending, content in downloads(output.data):
                    files[f"{path.stem}-{len(files) + 1:02d}-{slug}.{ending}"] = content
                output.data = {kind: output.data[kind] for kind in SHOWN if kind in output.data}
                output.metadata = {kind: {"alt": f"Picture below the heading {below}"} for kind in output.data}
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("data", True)]
    exporter = HTMLExporter(
        template_name=TEMPLATE.name, extra_template_basedirs=[str(TEMPLATE.parent)], filters=FILTERS, sanitize_html=True
    )
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)  # one fold for a cell's log
    exporter.log.setLevel(logging.ERROR)  # it warns of every figure that has no alternative text
    html = arrange(exporter.from_notebook_node(notebook)[0], path.stem)
    return Body(Markup(html), [(at, Markup(text).striptags()) for at, text in HEADING.findall(html)], files)


def table(rows: pd.DataFrame) -> Markup:
    """A DataFrame as a table with a header, its index as the first column where that has a name; the cells are text."""
    plain = rows.reset_index() if rows.index.name else rows
    return Markup("") if plain.empty else Markup(tidy(plain.to_html(index=False, border=0)))


def took(seconds: float | None) -> str:
    """A duration: "95 s", "12 min", "2 h 13 min", "-" where there is none."""
    if seconds is None or seconds < 120:
        return "-" if seconds is None else f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours >= 2 else f"{60 * hours + minutes} min"
