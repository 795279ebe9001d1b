"""`catlib train`: the plan's options, figures a program can read, errors in one paragraph."""

import json

import pytest
from tiny_models import save_llava, write_dataset

from catlib.cli import build_parser, main
from catlib.commands.train import training_settings
from catlib.errors import InputError
from catlib.settings import TrainSettings


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("commands")
    save_llava(root / "model")
    write_dataset(root / "data")
    return root


@pytest.mark.slow
def test_train_takes_the_plans_options(place, capsys, monkeypatch):
    monkeypatch.setenv("CATLIB_ROOT", str(place))
    data = place / "data" / "vlm"
    code = main(
        [
            "train",
            "--model_name",
            str(place / "model"),
            "--train_data",
            str(data / "train.jsonl"),
            "--val_data",
            str(data / "val.jsonl"),
            "--output_dir",
            str(place / "out"),
            "--epochs",
            "1",
            "--batch_size",
            "4",
            "--lr",
            "1e-3",
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--lora-r",
            "4",
            "--watch_photos",
            "4",
            "--json",
        ]
    )
    assert code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["checkpoint"] == str(place / "out")
    assert {"val_loss", "accuracy"} <= result["best"].keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "many"], "epochs must be a whole number"),
        (["--train_data", "nowhere.jsonl"], "no such file"),
        (["--model_name", "a", "--base_model", "b"], "name two models"),
        (["--profile", "lava-7b-lora"], "no profile 'lava-7b-lora'"),
        (["--mode", "fast"], "mode must be one of projector, lora, qlora"),
    ],
)
def test_wrong_options_are_refused_in_a_paragraph(place, capsys, monkeypatch, arguments, message):
    if "--profile" not in arguments:
        monkeypatch.setenv("CATLIB_ROOT", str(place))
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_model_folder_without_processor_is_named(place, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((place / "model" / "config.json").read_text())
    data = place / "data" / "vlm"
    code = main(
        [
            "train",
            "--base_model",
            str(bare),
            "--train_data",
            str(data / "train.jsonl"),
            "--val_data",
            str(data / "val.jsonl"),
        ]
    )
    assert code == 2
    assert "bare" in (error := capsys.readouterr().err) and "processor" in error


def test_a_photo_in_both_splits_is_refused(place, tmp_path, capsys):
    data = write_dataset(tmp_path / "leak")
    (data / "val.jsonl").write_text((data / "train.jsonl").read_text())
    options = ["--train_data", str(data / "train.jsonl"), "--val_data", str(data / "val.jsonl")]
    assert main(["train", "--base_model", str(place / "model"), *options]) == 2
    assert "12 photos stand in train.jsonl as well" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "false"),
        (["--gradient_checkpointing"], "true"),
        (["--no-gradient-checkpointing"], "false"),
        (["--gradient-checkpointing", "auto", "--epochs", "1"], "auto"),
        (["--profile", "llava-7b-lora"], "auto"),
        (["--profile", "llava-7b-lora", "--no-gradient_checkpointing"], "false"),
    ],
)
def test_a_choice_that_has_true_and_false_is_a_flag_too(given, expected):
    settings = training_settings(build_parser().parse_args(["train", *given]))
    assert settings.gradient_checkpointing == expected and settings.recomputes == (expected == "true")


def test_yaml_and_python_booleans_are_such_choices():
    for value, expected in ((True, "true"), (False, "false"), ("auto", "auto")):
        assert TrainSettings.build({"gradient_checkpointing": value}).gradient_checkpointing == expected
    with pytest.raises(InputError, match="one of auto, true, false"):
        TrainSettings.build({"gradient_checkpointing": "sometimes"})
