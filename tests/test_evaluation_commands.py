"""`catlib evaluate` and `catlib compare`: readable tables, JSON for programs, and honest exit codes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from evaluation_cases import RARE, scored_set, truth, write_set

from catlib.cli import main
from catlib.data.records import make_sample, write_samples
from catlib.runs import TRAINING


@pytest.fixture
def files(tmp_path):
    true, val = truth(12), truth(8)
    made = {
        "tuned": scored_set("vlm-tuned", true, 0.8, seed=1),
        "clip": scored_set("clip-zero-shot", true, 0.5, seed=2),
        "val_tuned": scored_set("vlm-tuned", val, 0.8, seed=3, prefix="val"),
        "val_clip": scored_set("clip-zero-shot", val, 0.5, seed=4, prefix="val"),
    }
    return {key: str(write_set(s, tmp_path / ("val" if key.startswith("val") else "test"))) for key, s in made.items()}


def test_evaluate_writes_and_prints(files, tmp_path, capsys):
    out = tmp_path / "run" / "metrics.json"
    arguments = [
        "evaluate",
        "--predictions",
        files["tuned"],
        "--out",
        str(out),
        "--priority",
        ",".join(RARE),
        "--bootstrap",
        "200",
    ]
    assert main([*arguments, "--val", files["val_tuned"]]) == 0
    printed = capsys.readouterr().out
    assert "VLM, tuned" in printed and "* Burmilla" in printed
    tuned = json.loads(out.read_text())["models"]["vlm-tuned"]
    assert tuned["n"] == 120 and tuned["calibration"]["temperature"] > 0
    contract = ["accuracy", "macro_f1", "priority_macro_f1", "top3_accuracy", "ece", "invalid_rate"]
    assert all({"value", "ci95"} <= set(tuned[key]) for key in contract)
    assert {"p50", "p95"} <= set(tuned["latency_ms"]) and set(RARE) <= set(tuned["per_breed"])
    arguments[2] = files["clip"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"]["clip-zero-shot"]["n"] == 120
    assert set(json.loads(out.read_text())["models"]) == {"vlm-tuned", "clip-zero-shot"}


def test_compare_prints_a_table_and_json(files, capsys):
    assert main(["compare", files["tuned"], files["clip"], "--bootstrap", "200"]) == 0
    printed = capsys.readouterr().out
    assert (
        "(vlm-tuned)" in printed and "(clip-zero-shot)" in printed and "120 photos" in printed and "vanish" in printed
    )
    val = ["--val", files["val_tuned"], files["val_clip"]]
    assert main(["compare", files["tuned"], files["clip"], "--json", "--bootstrap", "200", *val]) == 0
    content = json.loads(capsys.readouterr().out)
    assert {"a", "b", "accuracy_gain_points", "ci95", "p"} <= set(content)
    assert content["accuracy_gain_points"] > 0 and content["combination"]["weight_a"] > 0


def test_default_priority_breeds_are_those_of_the_plan_that_the_models_know(files, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    assert main(["evaluate", "--predictions", files["tuned"], "--out", str(out), "--bootstrap", "100"]) == 0
    assert json.loads(out.read_text())["models"]["vlm-tuned"]["priority_breeds"] == ["Burmilla", "Cymric"]
    assert "know 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["evaluate", "--predictions", "missing.jsonl", "--out", "m.json"],
            "missing.jsonl: no such predictions file",
        ),
        (["evaluate", "--predictions", "{tuned}", "--out", "m.json", "--priority", "Sokoke"], "Sokoke"),
        (["evaluate", "--predictions", "{tuned}", "{val_tuned}", "--out", "m.json"], "second file of the model"),
        (["evaluate", "--predictions", "{tuned}", "--out", "m.json", "--bootstrap", "5"], "at least 100"),
        (["evaluate", "--predictions", "{broken}", "--out", "m.json"], "broken.jsonl:1"),
        (["compare", "{tuned}", "{val_clip}"], "no photo in common"),
    ],
)
def test_wrong_input_is_exit_code_2_with_one_paragraph(files, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"id": \n')
    (tmp_path / "broken.meta.json").write_text('{"breeds": ["Manx"]}')
    names = {**files, "broken": str(tmp_path / "broken.jsonl")}
    assert main([argument.format(**names) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "m.json").exists()


def test_files_are_found_from_the_working_directory(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path / "test")
    assert main(["evaluate", "--predictions", "vlm-tuned.jsonl", "--out", "here.json", "--bootstrap", "100"]) == 0
    assert (tmp_path / "test" / "here.json").is_file()


def test_verdict_from_files_alone(files, capsys):
    tests, val = [files["tuned"], files["clip"]], [files["val_tuned"], files["val_clip"]]
    assert main(["verdict", "--predictions", *tests, "--val", *val, "--bootstrap", "200"]) == 0
    printed = capsys.readouterr().out
    assert "Recommendation" in printed and "VLM, tuned" in printed and "no record of the training" in printed
    assert main(["verdict", "--predictions", *tests, "--bootstrap", "200", "--latency-budget-ms", "5", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["recommendation"]["decision"] == "keep-clip" and content["recommendation"]["use"] == "clip-zero-shot"
    assert {c["key"] for c in content["criteria"]} >= {"priority", "gain", "priority-gain", "latency", "skip", "do"}


def test_models_on_unequal_photos_are_judged_on_the_common_ones(files, tmp_path, capsys):
    true = truth(12)
    few = scored_set("clip-zero-shot", true, 0.5, seed=2)
    few = replace(few, predictions=few.predictions[::2])
    path = str(write_set(few, tmp_path / "few"))
    assert main(["verdict", "--predictions", files["tuned"], path, "--bootstrap", "100", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert {m["n"] for m in content["models"].values()} == {60}
    assert any("120 photos" in reason and "60" in reason for reason in content["recommendation"]["reasons"])
    other = scored_set("clip-zero-shot", true, 0.5, seed=2, prefix="other")
    assert main(["verdict", "--predictions", files["tuned"], str(write_set(other, tmp_path / "other"))]) == 2
    assert "no photo in common" in capsys.readouterr().err


def test_photos_that_were_trained_or_fitted_on_are_refused(files, tmp_path, capsys):
    """By id, by digest where that is the group, and by what the checkpoint's own record says that it was trained on."""
    tests = [files["tuned"], files["clip"]]
    assert main(["verdict", "--predictions", *tests, "--val", files["tuned"], files["clip"], "--bootstrap", "100"]) == 2
    assert "validation predictions" in capsys.readouterr().err
    digest = "a" * 64
    train = [make_sample("x", "x.jpg", "Which?", "Manx", breed="Manx", source="s", sha256=digest, split="train")]
    write_samples(tmp_path / "train.jsonl", train)
    ours = scored_set("vlm-tuned", truth(12), 0.8, seed=1)
    seen = replace(ours, predictions=(replace(ours.predictions[0], group=digest), *ours.predictions[1:]))
    path = str(write_set(seen, tmp_path / "seen"))
    command = ["verdict", "--predictions", path, files["clip"], "--bootstrap", "100"]
    assert main(command) == 0
    assert main([*command, "--train", str(tmp_path / "train.jsonl")]) == 2
    assert "1 of 120 test photos" in capsys.readouterr().err
    record = {
        "settings": {"train_data": str(tmp_path / "train.jsonl")},
        "outcome": {"finished": True, "val_loss_fell": True},
    }
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / TRAINING).write_text(json.dumps(record))
    path = str(write_set(replace(seen, meta={**seen.meta, "adapter": str(tmp_path / "adapter")}), tmp_path / "own"))
    assert main(["verdict", "--predictions", path, files["clip"], "--bootstrap", "100"]) == 2
    assert "trained on" in capsys.readouterr().err


@pytest.mark.slow
def test_figures_from_files_load_no_model_library(files):
    """evaluate and verdict read files: what takes seconds to import for nothing stays out of their process."""
    program = (
        "import sys; from catlib.cli import main; "
        "code = main(['verdict', '--predictions', *sys.argv[1:], '--bootstrap', '100', '--json']); "
        "print(code, sorted({'torch', 'peft', 'transformers', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, files["tuned"], files["clip"]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "0 []"
