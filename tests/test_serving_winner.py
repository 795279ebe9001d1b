"""The winner behind one door: what a run has measured is what predicts, is served and is asked by an application."""

import json
import logging
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from serving_cases import QUESTION, one_thread, save_tuned  # noqa: F401
from tiny_encoders import clip
from tiny_models import write_dataset

from catlib.cli import main
from catlib.data.images import open_image
from catlib.data.records import read_predictions
from catlib.errors import InputError
from catlib.evaluation.calibration import stored_calibration
from catlib.evaluation.combine import mix
from catlib.evaluation.metrics_file import write_metrics
from catlib.evaluation.runs import open_bench, predict_candidates, predict_opponents
from catlib.files import read_json, write_json
from catlib.serving.service import VLMService
from catlib.serving.winner import choose, open_winner
from catlib.settings import ComparisonSettings, EvaluationSettings

TRACKS = (
    "vlm-tuned",
    "vlm-tuned-constrained",
    "vlm-tuned-free",
    "vlm-base",
    "clip-zero-shot",
    "clip-probe",
    "tower-probe",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A run of tiny models over a few photos: all tracks predicted, one recommended."""
    root = tmp_path_factory.mktemp("winner")
    save_tuned(root)
    clip(root / "clip")
    data = write_dataset(root / "data", train=32, val=8)
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(lines[:16]))
    (data / "test.jsonl").write_text("".join(lines[16:]))
    common = {
        "run_dir": str(root / "outputs/runs/small"),
        "base_model": str(root / "base"),
        "test_data": str(data / "test.jsonl"),
        "val_data": str(data / "val.jsonl"),
        "priority_breeds": "Burmilla",
        "eval_batch_size": 3,
        "device": "cpu",
        "dtype": "float32",
        "bootstrap": 100,
    }
    tuned = EvaluationSettings(checkpoint=str(root / "tuned"), **common)
    bench = open_bench(tuned)
    predict_candidates(bench, tuned).save(root / "outputs/runs/small")
    predict_candidates(bench, tuned, readings=True).save(root / "outputs/runs/small")
    others = ComparisonSettings(clip_model=str(root / "clip"), train_data=str(data / "train.jsonl"), **common)
    results = predict_opponents(open_bench(others), others)
    results.save(root / "outputs/runs/small")
    write_metrics(root / "outputs/runs/small", verdict={"recommendation": {"decision": "adopt", "use": "vlm-tuned"}})
    return root


@pytest.fixture
def root(project, monkeypatch):
    monkeypatch.setenv("CATLIB_ROOT", str(project))
    monkeypatch.chdir(project)
    return project


def photos_of(root):
    rows = [json.loads(line) for line in (root / "data/vlm/test.jsonl").read_text().splitlines()]
    return [str(root / "data" / row["image"]) for row in rows]


def same(found, measured):
    """Predictions line by line, whatever the ids."""
    assert len(found) == len(measured)
    for a, b in zip(found, measured, strict=True):
        assert a.predicted == b.predicted and a.answer == b.answer
        assert a.scores is None if b.scores is None else np.allclose(a.scores, b.scores, rtol=2e-5)


@pytest.mark.long
@pytest.mark.slow
def test_every_way_to_read_the_model_is_a_track(project):
    folder = project / "outputs/runs/small"
    assert {path.stem for path in (folder / "predictions").glob("*.jsonl")} >= set(TRACKS)
    metrics = read_json(folder / "metrics.json")["models"]
    for name in TRACKS:
        assert metrics[name]["latency_ms"]["p50"] > 0 and metrics[name]["n"] == 16
    assert metrics["vlm-tuned-constrained"]["invalid_rate"]["value"] == 0
    meta = {name: read_json(folder / f"predictions/{name}.meta.json") for name in TRACKS}
    assert [meta[name]["decoding"] for name in TRACKS[:3]] == ["score", "constrained", "free"]
    assert len({meta[name]["weights"] for name in TRACKS[:3]}) == 1
    fitted = stored_calibration(project / "tuned")
    assert fitted.photos == 8 and fitted.way["question"] == QUESTION


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRACKS, "clip-tip", "clip-projection", "tower-knn"])
def test_predict_by_run_equals_the_runs_file(root, tmp_path, capsys, caplog, name):
    write_metrics(root / "outputs/runs/small", verdict={"recommendation": {"use": name}})
    assert choose("small")[1] == name
    out = tmp_path / "again.jsonl"
    assert main(["predict", "--run", "small", "--out", str(out), *photos_of(root)]) == 0
    measured = read_predictions(root / f"outputs/runs/small/predictions/{name}.jsonl").predictions
    same(read_predictions(out).predictions, measured)
    with VLMService.from_run("small", max_batch=1) as service:
        answers = [service.predict_finetuned(path) for path in photos_of(root)]
        assert [a.breed for a in answers] == [p.predicted for p in measured]
        assert all((a.probabilities is None) == (p.scores is None) for a, p in zip(answers, measured, strict=True))
        json.dumps([asdict(answer) for answer in answers])  # plain values
        capsys.readouterr()
        assert main(["predict", "--run", "small", *photos_of(root)]) == 0
        for line, answer in zip(capsys.readouterr().out.splitlines(), answers, strict=True):
            told = json.loads(line)
            assert told.get("sure") == answer.sure and ("probability" in told) == (answer.probabilities is not None)
            if answer.probabilities:
                assert told["probability"] == pytest.approx(max(answer.probabilities.values()), abs=2e-4)
        if name in TRACKS[4:]:
            with pytest.raises(InputError, match="no questions"):
                service.predict_finetuned(photos_of(root)[0], "Which breed?")


@pytest.mark.slow
def test_the_average_of_two_is_the_fitted_one(root, caplog):
    folder = root / "outputs/runs/small"
    pair = next(c for c in read_json(folder / "metrics.json")["comparisons"] if c["b"] == "clip-probe")
    write_metrics(folder, verdict={"recommendation": {"use": "vlm-tuned+clip-probe"}})
    winner = open_winner(folder)
    images = [open_image(path) for path in map(type(folder), photos_of(root))]
    found = np.concatenate([winner.classifier.classify([image]).log_probs for image in images])
    own, other = (read_predictions(folder / f"predictions/{n}.jsonl").predictions for n in ("vlm-tuned", "clip-probe"))
    fitted = pair["combination"]
    temperatures = (fitted["temperature_a"], fitted["temperature_b"])
    scores = [np.array([p.scores for p in rows]) for rows in (own, other)]
    assert np.allclose(
        found, mix(fitted["weight_a"], temperatures, *scores), atol=5e-3
    )  # five digits at a low temperature
    assert "combination" in winner.classifier.describe()
    write_metrics(folder, verdict={"recommendation": {"use": "vlm-tuned-free+clip-probe"}})
    with pytest.raises(InputError, match="no weight was fitted"):
        open_winner("small")


@pytest.mark.slow
def test_another_choice_is_possible_and_warns(root, caplog):
    write_metrics(root / "outputs/runs/small", verdict={"recommendation": {"use": "clip-probe"}})
    with caplog.at_level(logging.WARNING):
        assert open_winner("small", "clip-zero-shot").use == "clip-zero-shot"
        assert "clip-probe" in caplog.text and "clip-zero-shot" in caplog.text
        caplog.clear()
        open_winner("small", "clip-probe")
        assert "asked for" not in caplog.text


@pytest.mark.slow
def test_what_is_not_there_any_more_is_refused(root, tmp_path, capsys):
    folder = root / "outputs/runs/small"
    write_metrics(folder, verdict={"recommendation": {"use": "vlm-tuned"}})
    photo = photos_of(root)[0]
    assert main(["predict", "--run", "nowhere", photo]) == 2 and "nowhere" in capsys.readouterr().err
    assert main(["predict", "--run", "small", "--model", "../x", photo]) == 2
    assert main(["predict", "--run", "small", "--checkpoint", str(root / "tuned"), photo]) == 2
    assert "checkpoint" in capsys.readouterr().err
    for advice in ("adopt", {}, {"use": 7}, {"use": ""}, None):
        write_json(tmp_path / "other" / "metrics.json", {"recommendation": advice})
        with pytest.raises(InputError, match="no verdict"):
            open_winner(tmp_path / "other")
    copy = shutil.copytree(folder, tmp_path / "copy")
    sidecar = copy / "predictions/vlm-tuned.meta.json"
    about = read_json(sidecar)
    write_json(sidecar, about | {"weights": "0123456789abcdef"})
    with pytest.raises(InputError, match="not those that copy has measured"):
        VLMService.from_run(copy)
    write_json(sidecar, about | {"endpoint": "http://127.0.0.1:9/v1"})
    with pytest.raises(InputError, match="endpoint:URL"):
        open_winner(copy)
    write_json(sidecar, about | {"decoding": "guess"})
    with pytest.raises(InputError, match="guess"):
        open_winner(copy)
