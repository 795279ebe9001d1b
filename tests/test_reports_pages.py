"""The pages: they stand alone, link to each other, and nothing in the data can break out of them."""

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from catlib.figures import Shown
from catlib.figures import figure as figure_of
from catlib.reports import html, index, markup, sweep
from catlib.settings import find_profile, run_parameters

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
NASTY = "<script>alert(1)</script>"
FETCHES = re.compile(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(\s*["']?https?:""", re.IGNORECASE)


def figure(value):
    return {"value": value, "ci95": [value - 0.1, value + 0.1]}


def model(accuracy, priority):
    return {
        "n": 40,
        "accuracy": figure(accuracy),
        "macro_f1": figure(accuracy),
        "priority_macro_f1": figure(priority),
        "top3_accuracy": None,
        "ece": None,
        "invalid_rate": None,
        "per_breed": {},
        "latency_ms": {"p50": 12.0, "p95": 20.0},
    }


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a finished run with one executed notebook, and its state."""
    monkeypatch.setenv("CATLIB_ROOT", str(tmp_path))
    run_dir = tmp_path / "outputs" / "runs" / "a run"
    run_dir.mkdir(parents=True)
    image = new_output("display_data", {"image/png": PIXEL, "text/plain": "figure"})
    table = new_output("display_data", {"text/html": "<table><tr><td>Manx</td></tr></table>"})
    log = new_output("stream", name="stderr", text="a line of log\n")
    cells = [
        new_markdown_cell(f"# Title\nProse with $x^2$ and {NASTY}"),
        new_code_cell("print('folded')", outputs=[log, image, table]),
    ]
    nbformat.write(new_notebook(cells=cells), run_dir / "01_first.ipynb")
    entry = {"title": "First <b>", "status": "done", "page": True, "duration_s": 8000.0, "parameters": {"seed": NASTY}}
    state = {
        "run": "a run",
        "profile": "small",
        "status": "done",
        "pid": os.getpid(),
        "started": "2026-01-02T03:04:05+00:00",
        "commit": "abc123",
        "versions": {"torch": "1.2.3"},
        "stages": {"01_first": entry, "02_second": {"title": "Second", "status": "not run", "page": False}},
    }
    return run_dir, state


def write_run(run_dir, state, metrics):
    import json

    (run_dir / "state.json").write_text(json.dumps(state))
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    index.render(state, run_dir)


@pytest.mark.slow
def test_notebook_page_stands_alone(run, tmp_path):
    index.render(run[1], run[0])
    text = (tmp_path / "reports" / "a run" / "01_first.html").read_text()
    assert not FETCHES.search(text)
    assert "default-src 'none'" in text  # the browser refuses scripts and fetches, whatever the data holds
    assert f"data:image/png;base64,{PIXEL[:40]}" in text and "<td>Manx</td>" in text
    assert 'alt="Picture below the heading Title"' in text
    folded = re.search(r'<details class="code">.*?</details>', text, re.DOTALL)
    assert folded and "folded" in folded.group() and "<details open" not in text
    assert re.search(r'<details class="log">.*a line of log', text, re.DOTALL)
    footer = text[text.index("<footer>") :]
    assert all(word in footer for word in ("abc123", "torch 1.2.3", "2 h 13 min", "seed", "&lt;script&gt;alert(1)"))
    assert NASTY not in footer


def test_navigation_links_what_exists(run, tmp_path):
    index.render(run[1], run[0])
    folder = tmp_path / "reports" / "a run"
    text = (folder / "01_first.html").read_text()
    nav = text[text.index('<nav aria-label="Pages">') : text.index("</nav>")]
    for target in re.findall(r'href="([^"]+)"', nav):
        assert (folder / unquote(target)).is_file(), target
    assert "<b>First &lt;b&gt;</b>" in nav and "<span>Second (not run)</span>" in nav
    overview = (folder / "index.html").read_text()
    assert '<a href="01_first.html">First &lt;b&gt;</a>' in overview and '<a href="02_second.html">' not in overview


def test_figures_and_recommendation_in_both_indexes(run, tmp_path):
    metrics = {
        "models": {"vlm-tuned": model(0.9, 0.625), "clip-zero-shot": model(0.3, 0.1)},
        "recommendation": {"decision": "adopt", "use": "vlm-tuned", "reasons": ["it gains <much>"]},
    }
    write_run(*run, metrics)
    overview = (tmp_path / "reports" / "a run" / "index.html").read_text()
    assert "62.5 [52.5, 72.5]" in overview and "<b>adopt</b>. To run: the tuned VLM." in overview
    assert "it gains &lt;much&gt;" in overview
    all_runs = (tmp_path / "reports" / "index.html").read_text()
    assert '<a href="a%20run/index.html">a run</a>' in all_runs
    assert all(
        words in all_runs for words in ("90.0 [80.0, 100.0]", "62.5 [52.5, 72.5]", "30.0 [20.0, 40.0]", ">adopt</td>")
    )


@pytest.mark.parametrize("use", [7, ["vlm-tuned"], {}, None, ""])
def test_a_recommendation_that_names_no_track_is_shown_without(run, tmp_path, use):
    advice = {"decision": "adopt", "use": use, "reasons": ["it gains"]}
    write_run(*run, {"models": {"vlm-tuned": model(0.9, 0.6)}, "recommendation": advice})
    overview = (tmp_path / "reports" / "a run" / "index.html").read_text()
    assert "<b>adopt</b>" in overview and "it gains" in overview and "To run" not in overview


def test_the_gate_s_page_is_text_and_the_run_links_to_it(run, tmp_path):
    run_dir, state = run
    write_run(run_dir, state, {})
    rule = {
        "name": NASTY,
        "target": NASTY,
        "value": None,
        "ci95": None,
        "met": True,
        "kind": "skip",
        "unit": "",
        "note": NASTY,
    }
    advice = {"decision": "skip", "use": "", "reasons": [NASTY, "and more"]}
    gate = {"profile": NASTY, "seconds": 7.5, "models": {"clip-zero-shot": model(0.3, 0.1)}, "criteria": [rule]}
    gate |= {"recommendation": advice, "wishes": {"run": "a run", "run_dir": str(run_dir)}}
    path = index.render_gate(gate)
    text = path.read_text()
    assert path == tmp_path / "reports/a run/gate.html" and NASTY not in text and "default-src 'none'" in text
    assert "<b>skip</b>" in text and "7.5 s" in text and "30.0 [20.0, 40.0]" in text and text.count("&lt;script") >= 4
    assert 'href="gate.html"' in (path.parent / "index.html").read_text() and 'href="index.html"' in text
    assert 'href="a%20run/gate.html"' in (tmp_path / "reports/index.html").read_text()
    index.render(state, run_dir)
    assert path.is_file() and 'href="gate.html"' in (path.parent / "01_first.html").read_text()
    written = (path.parent / "index.html").stat().st_mtime_ns
    index.render_gate(gate | {"seconds": 8.5})  # the run's pages, which take long, have the link already
    assert "8.5 s" in path.read_text() and (path.parent / "index.html").stat().st_mtime_ns == written


def test_no_recommendation_of_a_run_that_failed(run, tmp_path):
    run[1]["status"] = "failed"
    write_run(
        *run,
        {
            "models": {"vlm-tuned": model(0.9, 0.6)},
            "recommendation": {"decision": "adopt", "use": "vlm-tuned", "reasons": []},
        },
    )
    assert "adopt" not in (tmp_path / "reports" / "a run" / "index.html").read_text()
    assert "adopt" not in (tmp_path / "reports" / "index.html").read_text()


@pytest.mark.parametrize(
    ("statuses", "current"),
    [
        (("done", "done", "interrupted"), True),  # the third has nothing to do with the figures
        (("done", "done", "not run"), True),
        (("done", "failed", "outdated"), False),
        (("done", "outdated", "outdated"), False),
        (("outdated", "done", "done"), False),
    ],
)
def test_figures_count_when_the_notebooks_that_wrote_them_are_done(run, tmp_path, statuses, current):
    run_dir, state = run
    wrote = ("outputs/runs/a run/metrics.json", "outputs/runs/a run/metrics.json", "files/other.json")
    entries = [{"title": "One", "status": s, "outputs": {path: "1"}} for path, s in zip(wrote, statuses, strict=True)]
    state |= {"status": "incomplete", "stages": dict(zip(("01_first", "02_second", "03_third"), entries, strict=True))}
    advice = {"decision": "adopt", "use": "vlm-tuned", "reasons": []}
    write_run(run_dir, state, {"models": {"vlm-tuned": model(0.9, 0.6)}, "recommendation": advice})
    text = (tmp_path / "reports" / "a run" / "index.html").read_text()
    assert ("<b>adopt</b>" in text, "earlier state of this run" not in text) == (current, current)
    assert ("adopt" in (tmp_path / "reports" / "index.html").read_text()) == current


def test_tables_escape_text_and_keep_a_figure_with_its_interval(run, tmp_path):
    frame = pd.DataFrame({"<a>": ["<b>&"], "F1": ["82.3 [79.4, 85.0]"]})
    text = re.sub(r"\s+", "", html.table(frame))
    assert '<thscope="col">&lt;a&gt;</th>' in text and "<td>&lt;b&gt;&amp;</td>" in text
    assert '<tdclass="figure">82.3[79.4,85.0]</td>' in text
    assert html.table(pd.DataFrame()) == ""
    named = re.sub(r"\s+", "", html.tidy(frame.set_index("F1")._repr_html_()))
    assert (
        "<thead><trstyle" not in named
        and '<thead><tr><thscope="col">F1</th><thscope="col">&lt;a&gt;</th></tr></thead>' in named
        and "scoped" not in named
    )


def test_dataframes_and_figures_show_themselves_on_a_page(run, tmp_path):
    run_dir, state = run
    frame = pd.DataFrame({"breed": ["Manx"], "F1": ["82.3 [79.4, 85.0]"]}).set_index("breed")
    caption = f"<figure><img alt='cats' src='data:image/png;base64,{PIXEL}'><figcaption>Cats.</figcaption></figure>"
    outputs = [new_output("display_data", {"text/html": text}) for text in (frame._repr_html_(), caption)]
    nbformat.write(new_notebook(cells=[new_code_cell("1", outputs=outputs)]), run_dir / "01_first.ipynb")
    index.render(state, run_dir)
    text = (tmp_path / "reports" / "a run" / "01_first.html").read_text()
    assert '<td class="figure">82.3 [79.4, 85.0]</td>' in text and "<figcaption>Cats.</figcaption>" in text
    assert "figcaption {" in text and '<div class="scroll"><table' in text


@pytest.mark.slow
def test_learning_curve_page(run, tmp_path):
    for value, tuned in ((5, 0.4), (10, 0.7)):
        folder = run[0].parent / f"demo-photos_per_breed={value}"
        folder.mkdir()
        state = run[1] | {"run": folder.name, "stages": {}}
        write_run(folder, state, {"models": {"vlm-tuned": model(tuned, tuned), "clip-zero-shot": model(0.3, 0.1)}})
    runs = [((value,), f"demo-photos_per_breed={value}") for value in (5, 10)]
    text = sweep.curve_page("demo", ["photos_per_breed"], runs).read_text()
    assert "data:image/png;base64," in text and not FETCHES.search(text)
    assert "70.0 [60.0, 80.0]" in text and "from 40.0% [30.0%, 50.0%] at 5" in text
    assert text.count("30.0 [20.0, 40.0]") == text.count(">5, 10<") == 1  # CLIP's row, which is that of both runs
    targets = list(re.findall(r'<a href="([^"]+)"', text))
    assert "demo-photos_per_breed%3D5/index.html" in targets
    assert 'href="sweep-demo-photos_per_breed.html"' in (tmp_path / "reports" / "index.html").read_text()


def test_a_sweep_over_seeds_and_modes_tells_the_seeds_of_each_mode_together(run, tmp_path):
    gains = {("lora", 0): 5.0, ("lora", 1): 5.2, ("qlora", 0): 9.0, ("qlora", 1): -9.0}
    runs = []
    for (mode, seed), gain in gains.items():
        folder = run[0].parent / f"demo-{mode}-{seed}"
        folder.mkdir()
        against = {"a": "vlm-tuned", "b": "clip-zero-shot", "accuracy_gain_points": gain, "ci95": [gain - 1, gain + 1]}
        metrics = {
            "models": {"vlm-tuned": model(0.5, 0.5), "clip-zero-shot": model(0.3, 0.1)},
            "comparisons": [against],
        }
        write_run(folder, run[1] | {"run": folder.name, "stages": {}}, metrics)
        runs.append(((mode, seed), folder.name))
    runs.append((("lora", 2), "a run that failed"))
    page = Elements(sweep.curve_page("demo", ["mode", "train_seed"], runs).read_text())
    assert "mode=lora: Over" in page.text and "mode=qlora: Over" in page.text and "5.1" in page.text
    assert "no figures" in page.text and "img" not in {tag for tag, _ in page.found}  # no curve over texts
    assert sweep.parse_sweep("lora_targets=q_proj,v_proj;all")[1] == ["q_proj,v_proj", "all"]


def test_members_of_a_sweep_do_not_share_what_differs(monkeypatch, tmp_path):
    profile = tmp_path / "p.yaml"
    profile.write_text("data_dir: data/x\noutput_dir: models/x\n")
    monkeypatch.setenv("CATLIB_ROOT", str(tmp_path))
    found = find_profile(str(profile))
    name, parameters = sweep.member("demo", found, {"seed": 1}, "photos_per_breed", 5)
    assert name == "demo-photos_per_breed=5"
    assert parameters == {
        "seed": 1,
        "photos_per_breed": 5,
        "data_dir": "data/x-photos_per_breed=5",
        "output_dir": "models/x-photos_per_breed=5",
    }
    derived = run_parameters(str(found), parameters)
    assert derived["checkpoint"] == "models/x-photos_per_breed=5"
    for part in ("train", "val", "test"):
        assert derived[f"{part}_data"] == f"data/x-photos_per_breed=5/vlm/{part}.jsonl"
    _, parameters = sweep.member("demo", found, {}, "lora_r", 8)
    assert "data_dir" not in parameters  # the same data for every rank


HOSTILE = (
    "R&D <b>bold</b> $x^{2$ [text](https://evil.example/) \x1b[31mred\x1b]8;;https://evil.example\x07"
    '<meta http-equiv="refresh" content="0; url=https://evil.example/"><base href="https://evil.example/">'
    '<form action="https://evil.example/"><input><button>send</button></form><iframe src="//evil.example"></iframe>'
    "<script>alert(1)</script></div></main></body><style>body{display:none}</style>"
    '<svg onload="alert(1)"><a xlink:href="javascript:alert(1)">x</a></svg><img src="https://evil.example/p.png" onerror="alert(1)">'
    '<a class="x" href="https://evil.example/">out</a><a href="javascript:alert(1)">x</a><a href="data:text/html,x">x</a>'
    '<p style="position:fixed;inset:0;background:url(https://evil.example/)">x</p>'
)


class Elements(HTMLParser):
    """The tags of a page with their attributes, as a browser sees them; `text` is all that stands between them."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def hostile_outputs():
    """Every way in which a name gets into a notebook."""
    shown = Shown(plt.figure(figsize=(1, 1)), HOSTILE, HOSTILE)
    frame = pd.DataFrame({HOSTILE: [HOSTILE]}, index=pd.Index([HOSTILE], name=HOSTILE))
    whole = {
        "text/html": HOSTILE,
        "image/svg+xml": HOSTILE,
        "application/javascript": "alert(1)",
        "text/latex": HOSTILE,
    }
    yield from (new_output("display_data", {"text/html": each._repr_html_()}) for each in (shown, frame))
    yield new_output("display_data", {"text/markdown": HOSTILE, "text/plain": HOSTILE})
    yield new_output("execute_result", whole, metadata={"text/html": {"isolated": True}})
    yield from (new_output("display_data", {kind: text}) for kind, text in whole.items())
    yield new_output("display_data", {"image/png": f'{PIXEL}"><script>alert(1)</script>'})
    yield from (new_output("stream", name=name, text=HOSTILE) for name in ("stdout", "stderr"))
    yield new_output("error", ename=HOSTILE, evalue=HOSTILE, traceback=[HOSTILE])


def test_a_hostile_report_does_nothing(run, tmp_path):
    run_dir, state = run
    cells = [new_markdown_cell("# Title"), new_code_cell(f"name = {HOSTILE!r}", outputs=list(hostile_outputs()))]
    cells.append(new_markdown_cell(HOSTILE))
    nbformat.write(new_notebook(cells=cells), run_dir / "01_first.ipynb")
    state["stages"]["01_first"] |= {"title": HOSTILE, "parameters": {HOSTILE: HOSTILE}, "error": HOSTILE}
    state |= {"profile": HOSTILE, "commit": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    advice = {"decision": HOSTILE, "use": f"vlm-tuned+{HOSTILE}", "reasons": [HOSTILE]}
    write_run(run_dir, state, {"models": {"vlm-tuned": model(0.9, 0.6)}, "recommendation": advice})
    pages = [*(tmp_path / "reports").rglob("*.html")]
    assert len(pages) == 4
    for path in pages:
        text = path.read_text()
        assert "form-action 'none'; base-uri 'none'" in text and "\x1b" not in text and "\x07" not in text
        page = Elements(text)
        tags = {tag for tag, _ in page.found}
        assert not tags & {"script", "base", "form", "input", "button", "iframe", "svg", "object", "embed", "link"}
        assert [tag for tag, _ in page.found].count("style") == [tag for tag, _ in page.found].count("main") == 1
        assert [a["http-equiv"] for tag, a in page.found if "http-equiv" in a] == ["Content-Security-Policy"]
        for _, attributes in page.found:
            assert not any(name.startswith("on") for name in attributes), attributes
            assert not re.search("position|url", attributes.get("style") or ""), attributes
            assert (attributes.get("src") or "data:image/").startswith("data:image/"), attributes
    notebook = Elements((tmp_path / "reports/a run/01_first.html").read_text())
    assert notebook.text.count("<script>alert(1)</script>") > 5  # what is no markup of ours is read as it is written
    outward = [a["href"] for tag, a in notebook.found if tag == "a" and "//" in a.get("href", "")]
    assert len(outward) == 3  # of the markdown cell alone, which an author writes


def test_a_name_with_dollar_signs_is_drawn_as_it_is_written():
    @figure_of
    def drawn():
        """Bars."""
        fig, axes = plt.subplots()
        axes.set_yticks([0, 1], ["$\\frac{$", "A $x^{2$ cat"])
        axes.set_title("$}{$")
        return fig, "A caption."

    assert drawn().png()


def test_one_file_holds_all_pages_and_only_links_into_itself(run, tmp_path):
    run_dir, state = run
    for name in ("01_first", "02_second"):
        source = "# Title\n## Part one\n## Part two\n[there](#Part-one) [gone](../docs/data.md)\n\n## Part three"
        said = new_output("stream", name="stdout", text=f"{tmp_path}/data/a.jpg and {Path.home()}/x\n{__file__}")
        notebook = new_notebook(cells=[new_markdown_cell(source), new_code_cell("1", outputs=[said])])
        notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {"dead": {}}}}
        nbformat.write(notebook, run_dir / f"{name}.ipynb")
        state["stages"][name] |= {"status": "done"}
    index.render(state, run_dir)
    folder = tmp_path / "reports" / "a run"
    for path in folder.glob("*.html"):
        text = path.read_text()
        found = Elements(text).found
        ids = [attributes["id"] for _, attributes in found if "id" in attributes]
        assert len(ids) == len(set(ids))
        targets = [attributes["href"] for tag, attributes in found if tag == "a" and "href" in attributes]
        for target in targets:
            assert unquote(target[1:]) in ids if target.startswith("#") else (folder / unquote(target)).is_file(), (
                target
            )
        if path.name == "catlib-a run.html":
            assert all(target.startswith("#") for target in targets)
            assert "#01_first-Part-one" in targets and "#02_second-Part-three" in targets and "#02_second" in targets
        elif path.name != "index.html":
            assert 'aria-label="Contents"' in text and "data/a.jpg and " in text
        assert not any(
            word in text for word in (str(tmp_path), str(Path.home()), str(Path(__file__).parent), "widget-state")
        )
    assert 'href="catlib-a%20run.html"' in (folder / "index.html").read_text()


def test_tables_have_scopes_and_pictures_are_small():
    rows = pd.DataFrame({name: ["1.0 [0.5, 1.5]"] for name in "abcdef"}, index=pd.Index(["Manx"], name="breed"))
    text = re.sub(r"\s+", "", html.tidy(rows._repr_html_()))
    assert text.count('scope="col"') == 7 and text.count('scope="row"') == 1 and 'data-label="breed"' in text
    assert text.count('class="figure"data-label=') == 6 and 'class="dataframewide"' in text
    noise = Image.effect_noise((1600, 400), 90)
    stream = io.BytesIO()
    noise.save(stream, "PNG")
    source = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    small, size = markup.compact(source)
    assert small.startswith("data:image/webp") and len(small) < len(source) / 2 and size == (1400, 350)


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("import a\nfrom b import (\n    c,\n)", "code: imports"),
        ("import a\n\nresult = a.b(\n    c\n)", "code: result = a.b("),
        ("# What is left\nx = 1", "code: What is left"),
        ("%time x = 1", "code: %time x = 1"),
    ],
)
def test_a_folded_cell_says_what_it_does(source, label):
    assert markup.code_label(source) == label
