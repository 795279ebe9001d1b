"""A made-up run of 67 breeds and 5,000 test photos: how large its report is, and how long it takes to render and to open.

    python benchmarks/report_size.py FOLDER [--photos 5000]

Draws the photos, splits them with catlib, makes up the predictions of five models, and executes what notebooks 01, 03 and 04
show. Opening is timed in headless Chromium where it is installed.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image, ImageDraw, ImageFilter

from catlib.breeds import BREEDS, PRIORITY_BREEDS

MODELS = {"vlm-tuned": 0.72, "vlm-base": 0.2, "clip-zero-shot": 0.5, "clip-probe": 0.75, "tower-probe": 0.7}
CHROMIUM = "chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
CHROMIUM += " --disable-background-networking --disable-component-update --dump-dom"


def draw(path: Path, rng: random.Random) -> None:
    """A picture of the size of a photo with soft shapes and some noise."""
    tone = [rng.randrange(60, 220) for _ in range(3)]
    image = Image.new("RGB", (320, 240), tuple(tone))
    pen = ImageDraw.Draw(image)
    for _ in range(14):
        x, y, w, h = rng.randrange(320), rng.randrange(240), rng.randrange(20, 160), rng.randrange(20, 120)
        pen.ellipse((x - w, y - h, x + w, y + h), fill=tuple(rng.randrange(256) for _ in range(3)))
    noise = Image.effect_noise((320, 240), 40).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.blend(image.filter(ImageFilter.GaussianBlur(3)), noise, 0.15).save(path, quality=85)


def predict(run_dir: Path, samples: list[Any], breeds: list[str], rng: np.random.Generator) -> None:
    """Predictions of five models of made-up accuracies, whose scores are those of a softmax."""
    place = {breed: i for i, breed in enumerate(breeds)}
    hard = rng.normal(0, 1, len(samples))
    for name, accuracy in MODELS.items():
        logits = rng.normal(0, 1, (len(samples), len(breeds)))
        true = np.array([place[sample.breed] for sample in samples])
        logits[np.arange(len(true)), true] += 7 * accuracy + hard
        scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        path = run_dir / "predictions" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as stream:
            for sample, row in zip(samples, scores, strict=True):
                said = {"id": sample.id, "image": sample.image, "breed": sample.breed, "group": sample.group}
                said |= {"predicted": breeds[int(row.argmax())], "scores": row.round(5).tolist(), "latency_ms": 9.0}
                stream.write(json.dumps(said) + "\n")
        path.with_suffix(".meta.json").write_text(json.dumps({"name": name, "breeds": breeds}))


def notebook(path: Path, title: str, shown: list[Any]) -> None:
    """A notebook that shows these tables and figures."""
    cells = [new_markdown_cell(f"# {title}")]
    for number, each in enumerate(shown):
        data = each._repr_mimebundle_() if hasattr(each, "_repr_mimebundle_") else {"text/html": each._repr_html_()}
        cells.append(new_markdown_cell(f"## Part {number}"))
        cells.append(new_code_cell("figure", outputs=[new_output("display_data", data)]))
    nbformat.write(new_notebook(cells=cells), path)


def build(root: Path, photos: int) -> Path:
    """The run's folder with everything that a report is made of."""
    from catlib.data import plots as data_plots
    from catlib.data import tables as data_tables
    from catlib.data.findings import read_audit
    from catlib.data.prepare import prepare
    from catlib.data.records import read_samples
    from catlib.evaluation import plots, plots_model, plots_photos, tables
    from catlib.evaluation.metrics_file import read_folder
    from catlib.evaluation.results import Results
    from catlib.settings import DataSettings

    rng, breeds = random.Random(0), [breed.name for breed in BREEDS]
    run_dir = root / "outputs/runs/large"
    run_dir.mkdir(parents=True)
    for i in range(round(photos / 0.8)):
        draw(root / "data/photos" / breeds[i % len(breeds)] / f"{i}.jpg", rng)
    settings = DataSettings(photos="data/photos", run_dir=str(run_dir), test_share=0.8, val_share=0.05)
    dataset, findings = prepare(settings), read_audit(run_dir / "audit.csv")
    samples = read_samples(root / "data/vlm/test.jsonl")
    predict(run_dir, samples, list(dataset.breeds), np.random.default_rng(0))
    results = Results(read_folder(run_dir / "predictions"), {}, tuple(PRIORITY_BREEDS), bootstrap=500)
    results.save(run_dir)
    tuned, versus, image_root = results.calibrated["vlm-tuned"], results.versus, dataset.image_root
    inspected = [data_plots.counts(dataset), data_plots.samples(dataset, 0), data_plots.quality(findings)]
    inspected += [data_plots.worst(findings, image_root), data_tables.counts(dataset)]
    notebook(run_dir / "01_data_inspection.ipynb", "Data inspection", inspected)
    models = results.models
    shown = [tables.model_table(models), plots.overview(models), plots_model.f1_by_breed(models, "vlm-tuned")]
    shown += [tables.breed_table(models["vlm-tuned"]), plots_model.confusion(tuned.raw), plots_model.confidence(tuned)]
    shown += [plots_photos.mistakes(tuned.raw, image_root)]
    notebook(run_dir / "03_evaluation.ipynb", "Evaluation", shown)
    compared = [plots.gains(versus), tables.confusion_table(versus, "vanish")]
    compared += [plots_photos.disagreements(versus, image_root), plots.precision_by_coverage([tuned])]
    notebook(run_dir / "04_clip_comparison.ipynb", "Comparison with CLIP", compared)
    stages = {p.stem: {"title": p.stem, "status": "done", "parameters": {}} for p in sorted(run_dir.glob("*.ipynb"))}
    state = {"run": "large", "profile": "large", "status": "done", "pid": 1, "started": "2026-01-01T00:00:00+00:00"}
    (run_dir / "state.json").write_text(json.dumps(state | {"commit": None, "versions": {}, "stages": stages}))
    return run_dir


def main() -> None:
    """Build, render, open, and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=int, default=5000)
    args = parser.parse_args()
    os.environ["CATLIB_ROOT"] = str(args.folder.resolve())
    from catlib.reports import index

    run_dir = args.folder.resolve() / "outputs/runs/large"
    if not (run_dir / "state.json").is_file():
        build(args.folder.resolve(), args.photos)
    state = index.read_state(run_dir)
    assert state is not None
    start, cpu = time.perf_counter(), time.process_time()
    index.render(state, run_dir)
    print(f"rendered in {time.perf_counter() - start:.1f} s, {time.process_time() - cpu:.1f} s of them on the CPU")
    for page in sorted(index.report_path("large").parent.rglob("*.html")):
        said = f"{page.relative_to(args.folder.resolve())!s:<50} {page.stat().st_size / 1e6:6.2f} MB"
        if shutil.which("chromium"):
            with tempfile.TemporaryDirectory() as profile:
                command = [*CHROMIUM.split(), f"--user-data-dir={profile}", page.as_uri()]
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                said += f"  opened in {time.perf_counter() - start:.1f} s, the browser's start included"
        print(said)


if __name__ == "__main__":
    main()
