"""The notebooks keep the rules of the house, and the whole demo chain runs with small parameters."""

import ast
import io
import json
import re
import tokenize
from pathlib import Path

import nbformat
import pytest

from catlib.reports.pipeline import run_profile
from catlib.reports.stages import find_notebooks
from catlib.settings import NOTEBOOK_SETTINGS
from demo.photos import draw_photos

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))}
MOST_CODE_LINES = 80
MOST_CELL_LINES = 8
MOST_NAMES = 8  # imported from catlib
MOST_KNOBS = 12


def test_every_notebook_has_its_settings():
    assert set(NOTEBOOKS) == set(NOTEBOOK_SETTINGS)
    assert list(NOTEBOOKS) == list(find_notebooks())


@pytest.fixture(params=sorted(NOTEBOOKS))
def notebook(request):
    return request.param, nbformat.read(NOTEBOOKS[request.param], as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_parameters_cell(notebook):
    name, content = notebook
    (cell,) = [cell for cell in content.cells if "parameters" in cell.metadata.get("tags", [])]
    knobs = {}
    for line in cell.source.splitlines():
        (node,) = ast.parse(line).body  # one assignment a line
        assert isinstance(node, ast.Assign) and len(node.targets) == 1, line
        knobs[node.targets[0].id] = ast.literal_eval(node.value)
        tokens = tokenize.generate_tokens(io.StringIO(line).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        assert comments and len(comments[0]) > 5, f"no comment: {line}"
    assert next(iter(knobs)) == "profile" and knobs.pop("profile") == "demo"
    assert len(knobs) <= MOST_KNOBS and set(knobs.values()) == {None}
    assert set(knobs) <= set(NOTEBOOK_SETTINGS[name].names())


def test_thin_and_clean(notebook):
    _, content = notebook
    nbformat.validate(content)
    assert content.metadata.kernelspec.name == "python3"
    assert all(not cell.outputs and cell.execution_count is None for cell in code(content))
    bodies = [cell.source for cell in code(content) if "parameters" not in cell.metadata.get("tags", [])]
    nodes = [node for source in bodies for node in ast.walk(ast.parse(source))]
    assert not [
        node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    imports = [
        source for source in bodies if any(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.parse(source).body)
    ]
    assert len(imports) == 1
    lent = [n for n in nodes if isinstance(n, ast.ImportFrom) and str(n.module).startswith("catlib")]
    names = [alias.name for node in lent for alias in node.names]
    assert len(names) <= MOST_NAMES and not [name for name in names if name.endswith("_sentence")]
    assert sum(map(lines, bodies)) <= MOST_CODE_LINES
    assert max(lines(source) for source in bodies if source not in imports) <= MOST_CELL_LINES


def lines(source):
    return len([line for line in source.splitlines() if line.strip()])


def test_story(notebook):
    _, content = notebook
    first, last = content.cells[0], content.cells[-1]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "?" in first.source
    assert last.cell_type == "code" and ("Markdown" in last.source or "conclusion" in last.source)  # it is computed
    kinds = "".join(cell.cell_type[0] for cell in content.cells)
    assert "cccc" not in kinds  # imports, parameters, derived values; prose stands before everything else
    prose = [cell for cell in content.cells if cell.cell_type == "markdown"]
    assert len(prose) >= 3 and sum(len(cell.source.split()) for cell in prose) >= 80  # it reads on its own


SMALL = {
    "epochs": 1,
    "bootstrap": 200,
    "batch_size": 8,
    "watch_photos": 8,
    "max_test_photos": 40,
    "data_dir": "data/demo",
    "num_workers": 0,
    "serving_photos": 4,
    "serving_concurrency": "1,2",
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """One run of the whole demo chain in a project folder of its own; its state, figures and pages."""
    root = tmp_path_factory.mktemp("project")
    for folder in ("notebooks", "demo"):
        (root / folder).symlink_to(ROOT / folder)
    draw_photos(root / "data/demo/photos", photos=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATLIB_ROOT", str(root))
        patch.setenv("OMP_NUM_THREADS", "1")  # threads of tiny models wait for each other on a busy machine
        state = run_profile(ROOT / "notebooks/profiles/demo.yaml", SMALL, "small")
        assert state["status"] == "done", [entry.get("error") for entry in state["stages"].values()]
        metrics = json.loads((root / "outputs/runs/small/metrics.json").read_text())
        pages = {path.stem: path.read_text(encoding="utf-8") for path in (root / "reports/small").glob("*.html")}
        assert "data:image/" in pages.pop("catlib-small")  # all of them in one file
        yield state, metrics, pages, root


def text_of(page: str) -> str:
    """A page's visible words: no code, no log, no tags."""
    page = re.sub(r'<details class="(code|log)">.*?</details>|<style>.*?</style>', " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


@pytest.mark.long
@pytest.mark.slow
def test_chain_has_every_page_and_figure(chain):
    _state, metrics, pages, _ = chain
    assert set(pages) == {*NOTEBOOKS, "index"}
    assert {"vlm-base", "vlm-tuned", "clip-zero-shot", "clip-probe", "tower-probe"} <= set(metrics["models"])
    assert metrics["recommendation"]["use"] and metrics["criteria"] and metrics["comparisons"]
    for page in pages.values():
        assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)


@pytest.mark.long
@pytest.mark.slow
def test_chain_figures_stand_in_the_pages(chain):
    _, metrics, pages, _ = chain
    tuned = 100 * metrics["models"]["vlm-tuned"]["accuracy"]["value"]
    for name in ("03_evaluation", "04_clip_comparison", "index"):
        assert f"{tuned:.1f}" in text_of(pages[name]), name
    assert metrics["recommendation"]["decision"] in text_of(pages["index"])


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("01_data_inspection", ["Burmilla", "photos"]),
        ("02_training", ["alidation loss", "parameters"]),
        ("03_evaluation", ["priority", "macro-F1"]),
        ("04_clip_comparison", ["CLIP", "ecommend"]),
        ("05_serving", ["image tokens", "transformers, float32", "(no URL given)", "budget"]),
    ],
)
def test_chain_pages_say_what_they_are_for(chain, name, words):
    _, _, pages, _ = chain
    text = text_of(pages[name])
    assert all(word in text for word in words), [word for word in words if word not in text]
    if name != "01_data_inspection":
        assert re.search(r"data:image/(png|webp);base64,", pages[name])


@pytest.mark.long
@pytest.mark.slow
def test_chain_writes_the_plan_s_files(chain):
    _, _, _, root = chain
    checkpoint = root / "outputs/vlm_checkpoints/small"
    for name in ("adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json"):
        assert (checkpoint / name).is_file(), name
    counts = [sum(1 for _ in (root / f"data/demo/vlm/{split}.jsonl").open()) for split in ("train", "val", "test")]
    assert min(counts) > 0


@pytest.mark.long
@pytest.mark.slow
def test_chain_has_nothing_to_do_a_second_time(chain):
    state, _, _, root = chain
    assert (root / "outputs/vlm_checkpoints/small/calibration.json").is_file(), (
        "written by 03 into a folder that it reads"
    )
    told = []
    again = run_profile(ROOT / "notebooks/profiles/demo.yaml", SMALL, "small", tell=told.append)
    begun = [[entry["started"] for entry in one["stages"].values()] for one in (state, again)]
    assert begun[0] == begun[1] and sum("unchanged" in line for line in told) == 5, told
