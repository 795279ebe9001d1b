"""One photo step by step, loads and memory, the table of engines and the choice that follows from it."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from serving_cases import QUESTION, one_thread, save_tuned  # noqa: F401
from tiny_encoders import SIZE, clip
from tiny_families import save_idefics3, save_qwen2_vl
from tiny_models import BREEDS, save_pixtral, write_dataset

from catlib.classifiers.vlm import VLMClassifier
from catlib.data.images import open_image
from catlib.errors import InputError
from catlib.evaluation.metrics_file import write_metrics
from catlib.serving.bench import Engine, Load, measure_load, memory_meter, open_serving, server_memory_mb
from catlib.serving.choice import choice, engines_figure, engines_table
from catlib.serving.steps import PARTS, steps_figure, walk_through
from catlib.settings import ServingSettings
from catlib.vlm.checkpoint import find_checkpoint, open_vlm
from catlib.vlm.decoding import generate_free


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a tuned model, a CLIP and data whose test photos are its validation photos."""
    folder = tmp_path_factory.mktemp("bench")
    save_tuned(folder)
    clip(folder / "clip")
    data = write_dataset(folder / "data", train=4, val=6)
    (data / "test.jsonl").write_text((data / "val.jsonl").read_text())
    return folder


@pytest.fixture
def settings(project, tmp_path):
    return ServingSettings(
        run_dir=str(tmp_path / "run"),
        base_model=str(project / "base"),
        checkpoint=str(project / "tuned"),
        test_data=str(project / "data/vlm/test.jsonl"),
        clip_model=str(project / "clip"),
        device="cpu",
        serving_photos=3,
        serving_precisions="float32,4-bit",
        serving_concurrency="3",
    )


@pytest.mark.slow
def test_steps_are_those_of_generation_and_scoring(project, settings):
    bench = open_serving(settings)
    assert QUESTION in bench.summary()
    classifier = bench.vlm()
    steps = walk_through(classifier, bench.photos[0], "Manx")
    assert steps.answer == generate_free(classifier.vlm, [steps.photo], QUESTION)[0]
    assert steps.image_tokens == 16 and steps.grid == 4 and steps.seen.size == (SIZE, SIZE)
    batch = classifier.classify([steps.photo])
    assert steps.scores[0][0] == batch.predicted[0] and sum(p for _, p in steps.scores) == pytest.approx(1)
    assert [p for _, p in steps.scores] == sorted((p for _, p in steps.scores), reverse=True)
    assert all(0 < p <= 1 for _, p in steps.written) and len(steps.tokens) == len(steps.written) <= 50
    assert len(steps.milliseconds) == len(PARTS) and all(ms > 0 for ms in steps.milliseconds)
    assert "[16 image tokens]" in steps.prompt and QUESTION in steps.prompt
    shown = steps_figure(steps)
    assert "no breed of the list" in shown.caption and "the photo shows Manx" in shown.caption
    axes = shown.figure.axes
    assert len(axes) == 4 and len(axes[3].patches) == len(PARTS)
    named = steps_figure(replace(steps, breed="Manx", answer="Manx")).caption
    assert "“Manx”, read as Manx (the photo shows it)" in named


@pytest.mark.slow
@pytest.mark.parametrize("save", [save_pixtral, save_idefics3, save_qwen2_vl])
def test_steps_of_other_families(project, save, tmp_path):
    vlm = open_vlm(find_checkpoint(save(tmp_path / "model"), question=QUESTION), precision="float32", device="cpu")
    steps = walk_through(VLMClassifier(vlm, BREEDS), project / "data/photos/000.jpg")
    assert steps.answer == generate_free(vlm, [steps.photo], QUESTION)[0]
    assert steps.image_tokens > 0 and all(ms > 0 for ms in steps.milliseconds)
    assert "the photo shows" not in steps_figure(steps).caption


def test_load_keeps_so_many_requests_under_way():
    photos, lock = [Path(f"{i}.jpg") for i in range(12)], threading.Lock()

    def load(concurrency):
        """The load, and the most requests under way: each, apart from the two before the clock runs, waits for so many to be there."""
        most, under_way, calls, together = 0, 0, 0, threading.Barrier(concurrency)

        def ask(photo):
            nonlocal most, under_way, calls
            with lock:
                calls, under_way = calls + 1, under_way + 1
                most, measured = max(most, under_way), calls > 2
            time.sleep(0.02)
            if measured:
                together.wait(timeout=60)
            with lock:
                under_way -= 1
            return photo.name

        return measure_load(ask, photos, concurrency), most

    (alone, one), (together, four) = load(1), load(4)
    assert (one, four) == (1, 4) and alone.answers == together.answers == tuple(p.name for p in photos)
    assert 20 <= alone.p50 <= alone.p95 and alone.photos_per_s < 50


def test_memory_counts_at_least_the_weights():
    growth_mb = memory_meter(torch.device("cpu"))
    layer = torch.nn.Linear(2000, 2000)
    layer.weight.data.fill_(1.0)
    assert growth_mb(layer) >= 16
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import http.server as h; s = h.HTTPServer(('127.0.0.1', 0), None); print(s.server_port, flush=True);"
            " x = bytearray(50_000_000); s.serve_forever()",
        ],
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        port = int(server.stdout.readline())
        deadline = time.monotonic() + 5
        while (found := server_memory_mb(f"http://127.0.0.1:{port}/v1") or 0) < 50 and time.monotonic() < deadline:
            time.sleep(0.05)
        server.kill()
    assert 50 < found < 500
    assert server_memory_mb("http://example.org/v1") is None and server_memory_mb("http://127.0.0.1:1/v1") is None


@pytest.mark.slow
def test_engines_are_measured_or_say_why_not(settings):
    bench = open_serving(settings)
    assert bench.concurrency == (1, 3) and len(bench.photos) == 3 and "3 test photos" in bench.summary()
    times = {"p50": 4.0, "p95": 5.0, "kind": "single photos"}
    run_dir = Path(settings.run_dir)
    write_metrics(run_dir, models={"clip-probe": {"latency_ms": times}, "vlm-tuned": {"latency_ms": times}})
    engines = {e.name: e for e in open_serving(replace(settings, vllm_url="http://127.0.0.1:1/v1")).measure()}
    assert list(engines) == [
        "transformers, float32",
        "transformers, 4-bit",
        "vLLM",
        "llama.cpp",
        "CLIP, zero-shot",
        "CLIP, linear probe",
    ]
    first = engines["transformers, float32"]
    assert first.same_answer == first.same_breed == first.under_load == 1 and first.memory_mb > 0
    assert [load.concurrency for load in first.loads] == [1, 3] and len(first.alone.answers) == 3
    direct = bench.vlm().vlm
    answers = [generate_free(direct, [open_image(path)], QUESTION)[0] for path in bench.photos]
    assert list(first.alone.answers) == answers  # as it was trained to be asked
    assert "multiple of 64" in engines["transformers, 4-bit"].note and not engines["transformers, 4-bit"].loads
    assert "does not answer" in engines["vLLM"].note and "no URL" in engines["llama.cpp"].note
    assert engines["CLIP, zero-shot"].alone.p50 > 0 and engines["CLIP, linear probe"].alone.p50 == 4.0
    written = json.loads((run_dir / "serving.json").read_text())
    assert [row["name"] for row in written] == list(engines) and written[0]["loads"][0]["p50"] == first.alone.p50


@pytest.mark.slow
def test_a_server_is_asked_the_checkpoints_question(settings, tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("chat_server.py")), "0", str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        engines = open_serving(replace(settings, vllm_url=url, serving_precisions="float32")).measure()
        server.kill()
    assert next(e for e in engines if e.name == "vLLM").loads
    asked = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert asked and {row["question"] for row in asked} == {QUESTION}
    assert {tuple(row["size"]) for row in asked} == {(SIZE, SIZE)}  # cropped as the checkpoint's processor would


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"serving_concurrency": "1,x"}, "serving_concurrency"),
        ({"serving_precisions": "int3"}, "serving_precisions"),
        ({"serving_photos": 0}, "at least 1"),
        ({"checkpoint": "/nowhere"}, "no such folder"),
    ],
)
def test_wrong_settings_are_named(settings, change, words):
    with pytest.raises(InputError, match=words):
        open_serving(replace(settings, **change))


def engine(name, p50, rate, kind="process", same=1.0, memory=1000.0, steady=1.0):
    loads = (Load(1, p50, 2 * p50, 1000 / p50, ()), Load(8, 8 * p50, 9 * p50, rate, ()))
    return Engine(name, kind, loads, memory, same, same, steady) if kind == "process" else Engine(name, kind, loads)


def test_the_choice_follows_from_the_figures():
    slow, quick = engine("slow", 200, 6), engine("quick", 100, 20, memory=4000)
    light, wrong = engine("light", 120, 12, memory=900), engine("wrong", 10, 500, same=0.9)
    clip = engine("CLIP", 5, 300, kind="clip")
    missing = Engine("vLLM", "server", note="no URL given")
    told = choice([slow, quick, light, wrong, clip, missing], 150)
    assert (
        "quick" in told.splitlines()[0] and "100 ms" in told.splitlines()[0] and "20 photos/s with 8 under way" in told
    )
    assert "900 MB in place of 4,000 MB" in told and "1.2 times" in told
    assert "5.0 ms" in told and "20.0 times" in told
    assert "wrong names another breed on 10%" in told and "Not measured: vLLM (no URL given)" in told
    assert "the only engine" in choice([slow, quick, clip], 150)
    over = choice([slow, quick, clip], 50)
    assert "budget of 50 ms" in over and "quick with 100 ms, 2.0 times" in over
    assert "change with shaky" in choice([engine("shaky", 10, 20, steady=0.9)], 150)


def test_table_and_figure_show_every_engine():
    engines = [
        engine("a", 200, 6),
        engine("CLIP", 5, 300, kind="clip"),
        Engine("vLLM", "server", note="no URL given"),
    ]
    table = engines_table(engines, 150)
    assert list(table.index) == ["a", "CLIP", "vLLM"] and list(table["within 150 ms"]) == ["no", "yes", "-"]
    assert table.loc["a", "photos/s, 8 at a time"] == "6.0" and table.loc["vLLM", "p50, ms"] == "-"
    assert table.loc["a", "same breed"] == "100%" and table.loc["CLIP", "same breed"] == "-"
    shown = engines_figure(engines, 150)
    left, right = shown.figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["a", "CLIP"] and len(right.lines) == 2
    assert "CLIP is fastest for a photo alone" in shown.caption
