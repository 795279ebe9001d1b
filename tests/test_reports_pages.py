"""The pages: they stand alone, link to each other, and nothing in the data can break out of them."""

import os
import re

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from catlib.reports import html, index, sweep
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


def test_notebook_page_stands_alone(run, tmp_path):
    index.render(run[1], run[0])
    text = (tmp_path / "reports" / "a run" / "01_first.html").read_text()
    assert not FETCHES.search(text)
    assert "default-src 'none'" in text  # the browser refuses scripts and fetches, whatever the data holds
    assert f"data:image/png;base64,{PIXEL[:40]}" in text and "<td>Manx</td>" in text
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
    nav = text[text.index("<nav>") : text.index("</nav>")]
    for target in re.findall(r'href="([^"]+)"', nav):
        assert (folder / target).is_file(), target
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
    assert "62.5 [52.5, 72.5]" in overview and "<b>adopt</b>" in overview and "it gains &lt;much&gt;" in overview
    all_runs = (tmp_path / "reports" / "index.html").read_text()
    assert '<a href="a%20run/index.html">a run</a>' in all_runs
    assert all(
        words in all_runs
        for words in ("90.0 [80.0, 100.0]", "62.5 [52.5, 72.5]", "30.0 [20.0, 40.0]", "<td>adopt</td>")
    )


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


def test_tables_escape_text_and_keep_a_figure_with_its_interval(run, tmp_path):
    frame = pd.DataFrame({"<a>": ["<b>&"], "F1": ["82.3 [79.4, 85.0]"]})
    text = re.sub(r"\s+", "", html.table(frame))
    assert "<th>&lt;a&gt;</th>" in text and "<td>&lt;b&gt;&amp;</td>" in text
    assert '<tdclass="figure">82.3[79.4,85.0]</td>' in text
    assert html.table(pd.DataFrame()) == ""
    named = re.sub(r"\s+", "", html.tidy(frame.set_index("F1")._repr_html_()))
    assert "<thead><tr><th>F1</th><th>&lt;a&gt;</th></tr></thead>" in named and "scoped" not in named


def test_dataframes_and_figures_show_themselves_on_a_page(run, tmp_path):
    run_dir, state = run
    frame = pd.DataFrame({"breed": ["Manx"], "F1": ["82.3 [79.4, 85.0]"]}).set_index("breed")
    caption = f"<figure><img alt='cats' src='data:image/png;base64,{PIXEL}'><figcaption>Cats.</figcaption></figure>"
    outputs = [new_output("display_data", {"text/html": text}) for text in (frame._repr_html_(), caption)]
    nbformat.write(new_notebook(cells=[new_code_cell("1", outputs=outputs)]), run_dir / "01_first.ipynb")
    index.render(state, run_dir)
    text = (tmp_path / "reports" / "a run" / "01_first.html").read_text()
    assert '<td class="figure">82.3 [79.4, 85.0]</td>' in text and "<figcaption>Cats.</figcaption>" in text
    assert "figcaption {" in text and 'class="output_html' in text.replace(
        "rendered_html ", ""
    )  # scrolls where it is wide


def test_learning_curve_page(run, tmp_path):
    for value, tuned in ((5, 0.4), (10, 0.7)):
        folder = run[0].parent / f"demo-photos_per_breed={value}"
        folder.mkdir()
        state = run[1] | {"run": folder.name, "stages": {}}
        write_run(folder, state, {"models": {"vlm-tuned": model(tuned, tuned), "clip-zero-shot": model(0.3, 0.1)}})
    runs = [(value, f"demo-photos_per_breed={value}") for value in (5, 10)]
    text = sweep.curve_page("demo", "photos_per_breed", runs).read_text()
    assert "data:image/png;base64," in text and not FETCHES.search(text)
    assert "70.0 [60.0, 80.0]" in text and "from 40.0% [30.0%, 50.0%] at 5" in text
    targets = list(re.findall(r'<a href="([^"]+)"', text))
    assert "demo-photos_per_breed%3D5/index.html" in targets
    assert 'href="sweep-demo-photos_per_breed.html"' in (tmp_path / "reports" / "index.html").read_text()


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
