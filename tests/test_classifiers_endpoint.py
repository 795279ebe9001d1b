"""A served model as a classifier: what is sent, what is read, and what happens when the server is away, refuses or dies."""

import json
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from chat_server import BREEDS, answer_about
from PIL import Image
from tiny_encoders import SIZE, image_processor, photo, write_photos

from catlib.classifiers.base import BrokenOff
from catlib.classifiers.endpoint import EndpointClassifier, EndpointError, crop_side, cropped
from catlib.classifiers.predict import predict
from catlib.cli import main
from catlib.data.images import open_image
from catlib.data.records import Sample, read_predictions
from catlib.errors import InputError

SERVER = Path(__file__).with_name("chat_server.py")
FAST = {"tries": 3, "pause_s": 0.01}


@contextmanager
def served(log: Path, *options: str, port: int = 0):
    """A running server: its URL and process."""
    command = [sys.executable, str(SERVER), str(port), str(log), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1", process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def samples(tmp_path):
    return write_photos(tmp_path / "photos", [BREEDS[i % 3] for i in range(24)])


def asked(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def expected(samples: list[Sample], folder: Path) -> dict[str, str]:
    return {s.id: answer_about(open_image(folder / s.image)) for s in samples}


@pytest.mark.slow
def test_predictions_of_a_served_model(tmp_path, samples, monkeypatch):
    monkeypatch.setenv("CATLIB_API_KEY", "secret")
    with served(tmp_path / "log", "--engine", "vllm") as (url, _):
        classifier = EndpointClassifier(url, BREEDS, "Which breed?", concurrency=5, **FAST)
        result = predict(classifier, samples, tmp_path / "photos", tmp_path / "run" / "endpoint.jsonl")
    answers = expected(samples, tmp_path / "photos")
    assert [p.id for p in result.predictions] == [s.id for s in samples]
    assert {p.id: p.answer for p in result.predictions} == answers
    assert all(p.predicted in p.answer and p.scores is None and p.latency_ms > 0 for p in result.predictions)
    assert len({p.predicted for p in result.predictions}) == 3
    facts = asked(tmp_path / "log")
    assert len(facts) == len(samples)
    for fact in facts:
        assert fact["temperature"] == 0 and fact["max_tokens"] == 50 and fact["add_special_tokens"] is True
        assert fact["model"] == "cats" and fact["question"] == "Which breed?" and fact["key"] == "Bearer secret"
    assert result.meta["engine"] == "vllm" and result.meta["decoding"] == "free" and result.meta["endpoint"] == url


@pytest.mark.slow
@pytest.mark.parametrize(("begins", "asked_for"), [("1,1,9", False), ("1,9,9", True), ("9,8", True), ("9", True)])
def test_vllm_is_asked_for_one_bos_token(tmp_path, begins, asked_for):
    """Where the template writes <s> and the tokenizer adds it, a chat would begin with two."""
    with served(tmp_path / "log", "--engine", "vllm", "--begins", begins) as (url, _):
        EndpointClassifier(url, BREEDS, "?", **FAST).ask(photo(1))
    assert [fact["add_special_tokens"] for fact in asked(tmp_path / "log")] == [asked_for]


@pytest.mark.slow
def test_a_server_that_dies_midway_and_comes_back(tmp_path, samples):
    out, log = tmp_path / "run" / "endpoint.jsonl", tmp_path / "log"
    with served(log, "--die-after", "10", "--delay", "0.01") as (url, process):
        classifier = EndpointClassifier(url, BREEDS, "?", concurrency=3, **FAST)
        with pytest.raises(BrokenOff, match="does not answer after 3 tries.*same command"):
            predict(classifier, samples, tmp_path / "photos", out, batch_size=24)
        assert process.wait(5) == 1
    port = int(url.split(":")[2].split("/")[0])
    kept = read_predictions(out).predictions
    first = asked(log)
    # What was on the wire when it died may be lost; nothing else is, though the batch was not complete.
    assert len(first) - 3 <= len(kept) <= len(first) and 6 <= len(kept) < len(samples)
    lines = out.read_text().splitlines()
    log.unlink()
    with served(log, port=port) as (again, _):
        assert again == url
        classifier = EndpointClassifier(again, BREEDS, "?", concurrency=3, **FAST)
        result = predict(classifier, samples, tmp_path / "photos", out, batch_size=24)
    assert out.read_text().splitlines()[: len(lines)] == lines  # what was finished stays as it was
    assert Counter(p.id for p in result.predictions) == Counter(s.id for s in samples)  # none lost, none twice
    assert {p.id: p.answer for p in result.predictions} == expected(samples, tmp_path / "photos")
    assert len(asked(log)) == len(samples) - len(kept)  # a finished photo is not asked about again


@pytest.mark.slow
def test_a_server_that_is_restarted_while_the_run_waits(tmp_path, samples):
    log = tmp_path / "log"
    with served(log, "--die-after", "5") as (url, process):
        port = int(url.split(":")[2].split("/")[0])
        classifier = EndpointClassifier(url, BREEDS, "?", concurrency=2, tries=8, pause_s=0.05)
        found = {}
        run = threading.Thread(
            target=lambda: found.update(r=predict(classifier, samples[:12], tmp_path / "photos", tmp_path / "r.jsonl"))
        )
        run.start()
        process.wait(10)
    with served(log, port=port):
        run.join(30)
    assert {p.id: p.answer for p in found["r"].predictions} == expected(samples[:12], tmp_path / "photos")


@pytest.mark.slow
def test_a_server_that_is_still_loading_is_asked_again(tmp_path):
    with served(tmp_path / "log", "--fail-first", "2") as (url, _):
        classifier = EndpointClassifier(url, BREEDS, "?", **FAST)
        assert classifier.ask(photo(1)) == answer_about(photo(1))
    with served(tmp_path / "log", "--fail-first", "3") as (url, _):
        with pytest.raises(EndpointError, match="HTTP 503: loading the model"):
            EndpointClassifier(url, BREEDS, "?", **FAST).ask(photo(1))


@pytest.mark.slow
def test_a_refusal_names_the_photo_and_is_not_repeated(tmp_path, samples):
    Image.new("RGB", (1, 1)).save(tmp_path / "photos" / "tiny.png")
    photos = [*samples[:5], Sample("the tiny one", "tiny.png", (), {"breed": "Manx"}), *samples[5:8]]
    with served(tmp_path / "log") as (url, _):
        classifier = EndpointClassifier(url, BREEDS, "?", concurrency=1, **FAST)
        with pytest.raises(BrokenOff, match="'the tiny one'.*HTTP 400: the image is too small") as refused:
            predict(classifier, photos, tmp_path / "photos", tmp_path / "r.jsonl", batch_size=9)
    assert refused.value.exit_code == InputError.exit_code
    assert [p.id for p in read_predictions(tmp_path / "r.jsonl").predictions][:5] == [s.id for s in samples[:5]]


@pytest.mark.slow
def test_which_model_and_which_engine(tmp_path):
    with served(tmp_path / "log", "--models", "base,cat", "--engine", "llamacpp") as (url, _):
        with pytest.raises(InputError, match="several models.*base, cat"):
            EndpointClassifier(url, BREEDS, "?")
        with pytest.raises(InputError, match="serves no 'dog'"):
            EndpointClassifier(f"{url}#dog", BREEDS, "?")
        classifier = EndpointClassifier(f"{url}/#cat", BREEDS, "?")
        classifier.ask(photo(0))
        (fact,) = asked(tmp_path / "log")
        assert fact["model"] == "cat" and "add_special_tokens" not in fact and fact["key"] is None
    for wrong in ("localhost:8000", "ftp://x/v1", ""):
        with pytest.raises(InputError, match="http://HOST:PORT/v1"):
            EndpointClassifier(wrong, BREEDS, "?")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "key"), [("vllm", "structured_outputs"), ("llamacpp", "grammar")])
def test_engines_are_held_to_the_breeds_as_they_are_spelled(tmp_path, samples, engine, key):
    spelled = {"Manx": 'A "Manx", é.', "Siamese": "It is a Siamese" + " cat" * 30}
    log = tmp_path / "log"
    with served(log, "--engine", engine) as (url, _):
        classifier = EndpointClassifier(url, BREEDS, "?", decoding="constrained", spelled=spelled, **FAST)
        result = predict(classifier, samples[:6], tmp_path / "photos", tmp_path / "run" / "held.jsonl")
        classifier.close()
    free = {s.id: answer_about(open_image(tmp_path / "photos" / s.image)) for s in samples[:6]}
    for p in result.predictions:
        assert p.predicted in free[p.id] and p.answer == spelled.get(p.predicted, p.predicted)
    assert result.meta["decoding"] == "constrained" and all(key in fact for fact in asked(log))
    assert min(fact["max_tokens"] for fact in asked(log)) >= len(spelled["Siamese"])
    log.unlink()
    with served(log, "--engine", engine) as (url, _):  # without --decoding, too
        out = tmp_path / "unasked.jsonl"
        command = ["predict", "--model", f"endpoint:{url}", "--breeds", ",".join(BREEDS), "--out", str(out)]
        assert main([*command, *(str(tmp_path / "photos" / s.image) for s in samples[:3])]) == 0
    assert all(key in fact for fact in asked(log)) and len(asked(log)) == 3
    assert all(p.answer == p.predicted and p.predicted in BREEDS for p in read_predictions(out).predictions)
    with served(log, "--engine", engine, "--deaf") as (url, _):
        classifier = EndpointClassifier(url, BREEDS, "?", decoding="constrained", **FAST)
        with pytest.raises(EndpointError, match="held to 3 breeds"):
            classifier.ask(photo(1))
        classifier.close()


def test_what_cannot_be_held_to_a_list_is_refused(tmp_path):
    with served(tmp_path / "log", "--engine", "other") as (url, _):
        for decoding in ("constrained", "score", "loud"):
            with pytest.raises(InputError):
                EndpointClassifier(url, BREEDS, "?", decoding=decoding, **FAST)
        assert EndpointClassifier(url, BREEDS, "?", decoding="", **FAST).decoding == "free"


@pytest.mark.parametrize("seed", range(4))
def test_a_cropped_photo_is_what_the_processor_sees(tmp_path, seed):
    processor = image_processor()
    (tmp_path / "preprocessor_config.json").write_text(processor.to_json_string())
    assert crop_side(tmp_path) == SIZE
    for image in (photo(seed, 61 + seed), photo(seed, 40).transpose(Image.Transpose.ROTATE_90)):
        ours = processor(images=[cropped(image, SIZE)], return_tensors="np")["pixel_values"]
        assert cropped(image, SIZE).size == (SIZE, SIZE)
        assert np.array_equal(ours, processor(images=[image], return_tensors="np")["pixel_values"])
    assert cropped(photo(seed), 0) is not None and cropped(photo(seed), 0).size == photo(seed).size


@pytest.mark.slow
def test_predict_from_the_command_line(tmp_path, samples, capsys):
    processor = {
        "image_processor": {
            "do_center_crop": True,
            "crop_size": {"height": 20, "width": 20},
            "size": {"shortest_edge": 20},
        }
    }
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "processor_config.json").write_text(json.dumps(processor))
    record = {"breeds": list(BREEDS), "question": "Which?"}
    (tmp_path / "checkpoint" / "training.json").write_text(json.dumps(record))
    with served(tmp_path / "log") as (url, _):
        command = ["predict", "--model", f"endpoint:{url}", "--concurrency", "3", str(tmp_path / "photos")]
        assert (
            main([*command, "--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "served.jsonl")]) == 0
        )
        assert {(f["question"], tuple(f["size"])) for f in asked(tmp_path / "log")} == {("Which?", (20, 20))}
        assert main([*command, "--breeds", ",".join(BREEDS), "--prompt", "What?"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(rows) == len(samples) and all(row["scores"] is None and row["answer"] for row in rows)
        assert main([*command, "--decoding", "score"]) == 2 and "only --decoding free" in capsys.readouterr().err
    result = read_predictions(tmp_path / "served.jsonl")
    assert len(result.predictions) == len(samples) and result.meta["crop"] == 20
    labelled = tmp_path / "labelled.jsonl"
    rows = [json.loads(line) | {"breed": "Manx"} for line in (tmp_path / "served.jsonl").read_text().splitlines()]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "labelled.meta.json").write_text((tmp_path / "served.meta.json").read_text())
    command = ["evaluate", "--predictions", str(labelled), "--out", str(tmp_path / "m.json"), "--priority", "Manx"]
    assert main([*command, "--bootstrap", "100", "--json"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["models"]["labelled"]["accuracy"]["value"]
    assert accuracy == np.mean([row["predicted"] == "Manx" for row in rows])
    (tmp_path / "again.jsonl").write_text(labelled.read_text())
    (tmp_path / "again.meta.json").write_text((tmp_path / "served.meta.json").read_text())
    command = [
        "compare",
        str(labelled),
        str(tmp_path / "again.jsonl"),
        "--priority",
        "Manx",
        "--bootstrap",
        "100",
        "--json",
    ]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["agreement"] == 1
