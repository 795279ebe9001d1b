"""The HTML of a notebook made fit for a page: nothing in it can act, and every reader and screen finds tables and figures marked up."""

import ast
import base64
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache, lru_cache
from typing import Any

from bleach.css_sanitizer import CSSSanitizer
from bleach.sanitizer import Cleaner
from bs4 import BeautifulSoup
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image

from catlib.files import csv_text

TAGS = (
    "a b blockquote br caption code dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i img kbd li ol p pre s "
    "small span strong sub summary sup table tbody td tfoot th thead tr u ul"
)
PLAIN = ("class", "id", "title", "alt", "style", "colspan", "rowspan", "scope")
STYLES = ["color", "background", "background-color", "font-weight", "margin"]  # none that can move or cover anything
IMAGE = re.compile(r"data:image/(png|jpeg|webp|gif|svg\+xml);base64,[A-Za-z0-9+/=\s]*", re.ASCII)
QUALITY = 78  # of WebP, where a picture is lossy: photos lose nothing that a reader sees at this size
PICTURES = ("PNG", "JPEG", "WEBP", "GIF")  # what a notebook puts out; nothing else is decoded
WIDEST = 1400  # pixels
ACTIVE = re.compile(r"(?i)<script|<foreignObject|\bon\w+\s*=|javascript:|href=[\"'](?!#|data:image/)")  # in SVG
WIDE = 4  # tables with more columns become a block a row on narrow screens


@cache
def _cleaner(links: tuple[str, ...]) -> Cleaner:
    """What takes out all that can act or load; `links`: how the address of one that stays begins."""

    def kept(tag: str, name: str, value: str) -> bool:
        if name == "href":
            return tag == "a" and value.startswith(links)
        if name == "style":
            return not re.search(r"[(\\]", value)  # no url(…), however it is spelled
        return bool(IMAGE.fullmatch(value)) if name == "src" else name in PLAIN

    style, protocols = CSSSanitizer(allowed_css_properties=STYLES), ["http", "https", "mailto", "data"]
    return Cleaner(tags=TAGS.split(), attributes=kept, protocols=protocols, css_sanitizer=style)


def clean(text: str, links: tuple[str, ...] = ("#", "https://", "http://", "mailto:")) -> str:
    """HTML with what can act or load taken out; tags that a page has no use for become text."""
    return _cleaner(links).clean(re.sub(r"<style\b.*?</style>", "", str(text), flags=re.DOTALL | re.IGNORECASE))


def clean_output(text: str) -> str:
    """As `clean` for what code has put out: names from data stand in it, so no link leads out of the page."""
    return clean(text, ("#",))


def markdown_output(text: str) -> str:
    """Markdown that code has put out; HTML in it is text."""
    return clean_output(MarkdownWithMath(renderer=IPythonRenderer(escape=True)).render(text))


def code_label(source: str) -> str:
    """What a folded cell does, for its toggle: the comment that it begins with, else its first statement that is no import."""
    lines = source.strip().splitlines()
    try:
        body = ast.parse(source).body
        acts = [node.lineno - 1 for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))]
        label = source.splitlines()[acts[0]] if acts else "imports"
    except SyntaxError:  # a magic of IPython
        label = lines[0]
    if lines[0].startswith("#"):
        label = lines[0].lstrip("#% ")
    return f"code: {label[:70]}{'…' if len(label) > 70 else ''}"


def arrange(body: str, prefix: str) -> str:
    """The body of a page: anchors that are unique in a file of several pages, tables with scopes, pictures as WebP."""
    soup = BeautifulSoup(body, "html.parser")
    for element in soup.select("[id]"):
        if element["id"] != "error":
            element["id"] = f"{prefix}-{element['id']}"
    for link in soup.select('a[href^="#"]'):
        link["href"] = f"#{prefix}-{str(link['href'])[1:]}"
    for element in soup.select("a.anchor-link, img:not([src])"):
        element.decompose()
    for image in soup.select("img"):
        image["src"], (width, height) = compact(str(image["src"]))
        if width:
            image["width"], image["height"] = str(width), str(height)
        if image.parent is not None:
            image.parent["tabindex"] = "0"  # on narrow screens a picture is moved sideways
    return tidy(soup)


def tidy(page: str | BeautifulSoup) -> str:
    """HTML with the tables that pandas wrote, for a page: one header row, `scope` on every header, a figure and its
    interval on one line, the column's name at the cells of wide tables."""
    soup = BeautifulSoup(page, "html.parser") if isinstance(page, str) else page
    for element in soup.select("table style, div > style"):
        element.decompose()
    for table in soup.select("table"):
        del table["border"]
        for row in table.select("[style]"):
            del row["style"]
        heads = table.select("thead tr")
        if len(heads) == 2:  # pandas writes an index's name in a header row of its own
            first, second = (row.find_all("th") for row in heads)
            if not first[0].get_text() and not any(cell.get_text() for cell in second[1:]):
                first[0].string = second[0].get_text()
                heads.pop().decompose()
        names = [cell.get_text(strip=True) for cell in heads[-1].find_all(["th", "td"])] if heads else []
        for cell in table.select("th"):
            cell["scope"] = "row" if cell.find_parent("tbody") else "col"
            if not cell.get_text(strip=True):  # the corner of a table heads nothing
                cell.name = "td"
                del cell["scope"]
        for cell in table.select("td"):
            if re.fullmatch(r"[^\[]*\[[^\]]*\]", cell.get_text()) and not cell.find(True):
                cell["class"] = "figure"
        if len(names) > WIDE:
            table["class"] = "dataframe wide"
            for row in table.select("tbody tr"):
                for cell, name in zip(row.find_all(["th", "td"], recursive=False), names, strict=False):
                    cell["data-label"] = name
        table["tabindex"] = "0"  # what can be scrolled has to be reached by the keyboard
        if table.parent is None or "scroll" not in (table.parent.get("class") or []):
            table.wrap(soup.new_tag("div", attrs={"class": "scroll"}))
    return str(soup)


def downloads(data: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Ending and content of what an output can be downloaded as: figures as PNG and SVG, tables as CSV."""
    soup = BeautifulSoup(tidy(str(data.get("text/html", ""))), "html.parser")
    pictures = [str(image["src"]) for image in soup.select('img[src^="data:image/png;base64,"]')]
    for picture in [*pictures, *filter(None, [data.get("image/png")])]:
        with suppress(ValueError):  # what is no base64 is no picture
            content = base64.b64decode(picture.rpartition(",")[2])
            if content.startswith(b"\x89PNG"):
                yield "png", content
    if (drawn := str(data.get("image/svg+xml", ""))) and not ACTIVE.search(drawn):
        yield "svg", drawn.encode()
    for table in soup.select("table"):
        rows = [[cell.get_text(" ", strip=True) for cell in row.select("th, td")] for row in table.select("tr")]
        if rows:
            yield "csv", csv_text(rows[0], rows[1:]).encode()


@lru_cache(512)
def compact(source: str) -> tuple[str, tuple[Any, Any]]:
    """A data URI of a picture at most WIDEST pixels wide as WebP where that is smaller, and its size."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])), formats=PICTURES) as opened:
            image = opened.convert("RGBA" if "A" in opened.getbands() else "RGB")
    except (OSError, ValueError):
        return source, ("", "")
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    drawing = len(source) < 0.4 * image.width * image.height  # letters and lines stay sharp; photos would be large
    lossy, *lossless = (webp(image, lossless=exact) for exact in ((False, True) if drawing else (False,)))
    best = lossless[0] if lossless and len(lossless[0]) <= 1.5 * len(lossy) else lossy
    return min(source, best, key=len), image.size


def webp(image: Image.Image, quality: int = QUALITY, lossless: bool = False) -> str:
    """A picture as a data URI."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", lossless=lossless, quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
