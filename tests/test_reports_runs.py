"""Runs beside each other: listed, compared, removed; the photos behind their figures; what a notebook is run with."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from test_figures import bars

from catlib import cli
from catlib.data.records import Prediction, PredictionSet
from catlib.evaluation.results import Results
from catlib.reports import index, photos

BREEDS = ("Manx", "Cymric", "R&D <b>bold</b>")


class Page(HTMLParser):
    """Anchors, links and tags of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.tags, self.classes = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        self.classes += (attributes.get("class") or "").split()


def predictions(name, wrong, n=30):
    """Predictions of `n` photos, of which those numbered in `wrong` are called the next breed."""
    rows = []
    for i in range(n):
        true = i % 3
        said = (true + (i in wrong)) % 3
        scores = tuple(-0.1 if k == said else -3.0 for k in range(3))
        image = f"photos/{i}.jpg"
        rows.append(Prediction(f"id {i}", image, BREEDS[true], BREEDS[said], scores, f"It is a {BREEDS[said]}.", 5.0))
    return PredictionSet(name, tuple(rows), {"name": name, "breeds": list(BREEDS)})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project with the photos of a test and two runs of two models."""
    root = tmp_path_factory.mktemp("made")
    (root / "data/photos").mkdir(parents=True)
    for i in range(30):
        Image.effect_noise((60, 40), 20 + i).convert("RGB").save(root / f"data/photos/{i}.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATLIB_ROOT", str(root))
        make_run(root, "first", {"vlm-tuned": {0, 3, 4}, "clip-zero-shot": {0, 1, 2, 5, 7, 8}}, lr=0.1)
        make_run(root, "second", {"vlm-tuned": {4, 6}, "clip-zero-shot": {0, 1, 2, 5, 7, 8}}, lr=0.2)
    return root


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    """A copy of it."""
    monkeypatch.setenv("CATLIB_ROOT", str(tmp_path))
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def make_run(root, name, models, **parameters):
    run_dir = root / "outputs/runs" / name
    sets = {model: predictions(model, wrong) for model, wrong in models.items()}
    (run_dir / "predictions").mkdir(parents=True)
    for model, found in sets.items():
        lines = [json.dumps(asdict(p)) for p in found.predictions]
        (run_dir / f"predictions/{model}.jsonl").write_text("\n".join(lines))
        (run_dir / f"predictions/{model}.meta.json").write_text(json.dumps(found.meta))
    Results(sets, {}, ("Manx",), bootstrap=100).save(run_dir)
    output = new_output("display_data", {"text/html": "<table><tr><th>a</th></tr><tr><td>=1+1</td></tr></table>"})
    drawn = new_output("display_data", bars(["Manx"])._repr_mimebundle_())
    hostile = new_output("display_data", {"text/html": "<p>x</p>", "image/svg+xml": "<svg><script>1</script></svg>"})
    cells = [new_markdown_cell("# Evaluation\n## One"), new_code_cell("1", outputs=[output, drawn, hostile])]
    nbformat.write(new_notebook(cells=cells), run_dir / "03_evaluation.ipynb")
    given = {"run": name, "base_model": "a/base", "test_data": "data/vlm/test.jsonl", **parameters}
    entry = {"title": "Evaluation", "status": "done", "parameters": given, "data": {"test": "12ab34cd"}}
    state = {"run": name, "profile": "small", "status": "done", "pid": os.getpid(), "commit": None, "versions": {}}
    state |= {"started": "2026-01-02T03:04:05+00:00", "stages": {"03_evaluation": entry}}
    (run_dir / "state.json").write_text(json.dumps(state))
    index.render(index.read_state(run_dir), run_dir)


@pytest.mark.slow
def test_a_number_of_the_matrix_leads_to_its_photos(project):
    text = (project / "reports/first/photos/index.html").read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)) and "script" not in page.tags
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    outward = [link for link in page.links if not link.startswith("#")]
    assert outward and all((project / "reports/first/photos" / link).is_file() for link in outward)
    assert 'href="#g1-0-1" title="Manx called Cymric">2</a>' in text  # photos 0 and 3
    group = text[text.index('id="g1-0-1"') :].split("</figure>")[0]
    assert "0.jpg" in group and "Cymric 90%" in group and "It is a Cymric." in group
    assert text.count('class="card"') == 30 and "R&amp;D &lt;b&gt;bold" in text
    pictures = re.findall(r"\.p\d+\{background-image:url\(data:image/webp;base64,", text)
    assert len(pictures) == len({name for name in page.classes if re.fullmatch(r"p\d+", name)}) <= 30


@pytest.mark.slow
def test_equal_photos_are_held_once_and_lost_ones_are_said_to_be(project):
    for i in range(11, 20):
        shutil.copyfile(project / "data/photos/10.jpg", project / f"data/photos/{i}.jpg")
    (project / "data/photos/3.jpg").unlink()
    run_dir = project / "outputs/runs/first"
    os.utime(run_dir / "predictions/vlm-tuned.jsonl", (1, 1))  # the predictions count as others
    index.render(index.read_state(run_dir), run_dir)
    text = (project / "reports/first/photos/index.html").read_text()
    assert text.count("{background-image:url(") == 20 and '"t gone"' in text


@pytest.mark.slow
def test_what_the_mail_leaves_out_is_counted_and_is_never_what_is_wrong(project, monkeypatch):
    monkeypatch.setattr(photos, "RIGHT_TO_MAIL", 2)
    run_dir = project / "outputs/runs/first"
    index.render(index.read_state(run_dir), run_dir)
    text = (project / "reports/first/catlib-first.html").read_text()
    # wrong 0, 3, 4; named differently 1, 7 and 2, 5, 8; of those and of the other 22 at most two of each breed
    assert text.count('class="card"') == 3 + 4 + 6 and "17 photos are left out" in text
    shown = set(re.findall(r"<b>(\d+)\.jpg</b>", text))
    assert {"0", "3", "4", "1", "2", "5", "7"} <= shown and "8" not in shown
    assert "17 photos" not in (project / "reports/first/photos/index.html").read_text()


def test_the_leaderboard_sorts_and_says_what_differs(project, capsys):
    text = (project / "reports/index.html").read_text()
    page = Page(text)
    assert {"by-accuracy", "by-priority-F1", "by-model", "by-run"} <= set(page.ids) and "script" not in page.tags
    ranked = text[text.index('id="by-accuracy"') : text.index('id="by-priority-F1"')]
    assert ranked.index("second/index.html") < ranked.index("first/index.html") < ranked.index("CLIP")
    assert all(said in text for said in ("lr=0.1", "lr=0.2", "test 12ab34cd", "a/base"))
    assert cli.main(["runs", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["runs"]
    assert {run["run"] for run in listed} == {"first", "second"} and "vlm-tuned" in listed[0]["models"]
    assert cli.main(["runs", "show", "first"]) == 0 and "03_evaluation" in capsys.readouterr().out
    assert cli.main(["runs", "show", "third"]) == 2 and "first, second" in capsys.readouterr().err


def test_two_runs_are_compared_photo_by_photo(project, capsys):
    assert cli.main(["runs", "compare", "first", "second", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == {"lr": ["0.1", "0.2"]}
    assert found["models"]["vlm-tuned"]["accuracy_gain_points"] == pytest.approx(100 / 30)
    text = Path(found["page"]).read_text()
    assert "became right in second: 2" in text and "became wrong in second: 1" in text  # 0 and 3; 6
    assert "compare-first-second.html" in (project / "reports/index.html").read_text()
    shutil.rmtree(project / "outputs/runs/second/predictions")
    assert cli.main(["runs", "compare", "first", "second"]) == 2


def test_only_what_carries_the_mark_is_removed(project, capsys):
    mine = project / "outputs/runs/mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    for content in (None, "{}", '{"stages": {}}', "[]"):
        if content is not None:
            (mine / "state.json").write_text(content)
        assert cli.main(["runs", "rm", "first", "mine"]) == 2
    assert cli.main(["runs", "rm", "../runs/first"]) == cli.main(["runs", "rm"]) == cli.main(["runs", "rm", "."]) == 2
    (project / "outputs/runs/link").symlink_to(project / "outputs/runs/first")
    assert cli.main(["runs", "rm", "link"]) == 2
    (project / "reports/second/index.html").write_text("<title>a page of mine</title>")
    assert cli.main(["runs", "rm", "second"]) == 2
    assert (mine / "notes.txt").is_file() and (project / "outputs/runs/first/metrics.json").is_file()
    assert (project / "outputs/runs/second").is_dir()
    capsys.readouterr()
    assert cli.main(["runs", "rm", "first", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": ["outputs/runs/first", "reports/first"]}
    assert not (project / "reports/first").exists() and not (project / "outputs/runs/first").exists()
    assert "first/index.html" not in (project / "reports/index.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", "{}"),
        ("state.json", "[]"),
        ("state.json", '{"run": 1, "stages": null}'),
        ("state.json", b"\xff\xfe"),
        ("state.json", '{"data": [], "parameters": null}'),  # of the stage
        ("metrics.json", "[]"),
        ("metrics.json", '{"models": {"vlm-tuned": {}}}'),
        ("metrics.json", '{"models": []}'),
        ("03_evaluation.ipynb", '{"cells": ['),
        ("predictions/vlm-tuned.jsonl", "no json"),
        ("predictions/vlm-tuned.meta.json", "{}"),
    ],
)
def test_a_damaged_run_stops_no_other(project, file, content):
    path = project / "outputs/runs/second" / file
    if '"parameters": null' in str(content):
        state = json.loads(path.read_text())
        state["stages"]["03_evaluation"] |= json.loads(content)
        content = json.dumps(state)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    shutil.rmtree(project / "reports/second")
    run_dir = project / "outputs/runs/first"
    index.render(index.read_state(run_dir), run_dir)
    text = (project / "reports/index.html").read_text()
    assert "first/index.html" in text and "second" in text
    links = [link for link in Page(text).links if link.endswith(".html")]
    assert all((project / "reports" / link).is_file() for link in links)


def test_figures_and_tables_are_files_to_download(project):
    page = Page((project / "reports/first/03_evaluation.html").read_text())
    offered = [link for link in page.links if link.startswith("files/")]
    assert [link.rpartition(".")[2] for link in offered] == ["csv", "png", "svg"]  # none of what could act
    assert (project / "reports/first" / offered[0]).read_text() == "a\n'=1+1\n"  # no formula
    assert (project / "reports/first" / offered[1]).read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (project / "reports/first" / offered[2]).read_bytes()
    assert 'href="files/metrics.json"' in (project / "reports/first/index.html").read_text()
    assert json.loads((project / "reports/first/files/metrics.json").read_text())["models"]


def test_a_notebook_run_by_hand_gets_the_same_page(project, capsys, tmp_path):
    source = project / "outputs/runs/first/03_evaluation.ipynb"
    assert cli.main(["render", str(source), "--out", str(tmp_path / "page.html")]) == 0
    body = (tmp_path / "page.html").read_text().split("<main>")[1].split("</main>")[0].strip()
    assert body in (project / "reports/first/03_evaluation.html").read_text() and "=1+1" in body
    (tmp_path / "broken.ipynb").write_text("{")
    assert cli.main(["render", str(tmp_path / "broken.ipynb")]) == cli.main(["render", "none.ipynb"]) == 2
    assert cli.main(["render", str(source), "--out", str(source)]) == 2 and nbformat.read(source, as_version=4)
    capsys.readouterr()


def test_params_are_what_papermill_reads(capsys, monkeypatch):
    monkeypatch.setenv("CATLIB_ROOT", str(Path(__file__).resolve().parents[1]))
    assert cli.main(["params", "demo", "03_evaluation.ipynb", "-p", "bootstrap=500"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["profile"] == found["run"] == "demo" and found["bootstrap"] == 500 and "lora_r" not in found
    assert cli.main(["params", "demo"]) == 0 and "lora_r" in yaml.safe_load(capsys.readouterr().out)
    assert cli.main(["params", "demo", "09"]) == cli.main(["params", "nothing"]) == 2


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_clean_leaves_what_other_runs_use_and_lab_keeps_outputs_out_of_git():
    root = Path(__file__).resolve().parents[1]
    said = {
        target: subprocess.run(["make", "-n", target], cwd=root, capture_output=True, text=True, check=True).stdout
        for target in ("clean", "lab")
    }
    assert "outputs/runs/demo" in said["clean"] and "cache" not in said["clean"].replace("__pycache__", "").replace(
        "_cache", ""
    )
    assert "nbstripout --install" in said["lab"] and "--keep-id" in said["lab"]
