"""`catlib train` and `catlib memory`: the plan's options, figures a program can read, errors in one paragraph."""

import json

import pytest
from tiny_models import save_llava, settings, write_dataset

from catlib.cli import main
from catlib.settings import TrainSettings
from catlib.vlm.memory import estimate, image_tokens_of, largest_batch, model_config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("commands")
    save_llava(root / "model")
    write_dataset(root / "data")
    return root


def test_train_takes_the_plans_options(place, capsys, monkeypatch):
    monkeypatch.setenv("CATLIB_ROOT", str(place))
    data = place / "data" / "vlm"
    code = main([
        "train", "--model_name", str(place / "model"), "--train_data", str(data / "train.jsonl"), "--val_data", str(data / "val.jsonl"),
        "--output_dir", str(place / "out"), "--epochs", "1", "--batch_size", "4", "--lr", "1e-3", "--device", "cpu",
        "--dtype", "float32", "--lora-r", "4", "--watch_photos", "4", "--json",
    ])  # fmt: skip
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
    code = main(["train", "--base_model", str(bare), "--train_data", str(data / "train.jsonl"), "--val_data", str(data / "val.jsonl")])
    assert code == 2
    assert "bare" in (error := capsys.readouterr().err) and "processor" in error


def test_a_photo_in_both_splits_is_refused(place, tmp_path, capsys):
    data = write_dataset(tmp_path / "leak")
    (data / "val.jsonl").write_text((data / "train.jsonl").read_text())
    options = ["--train_data", str(data / "train.jsonl"), "--val_data", str(data / "val.jsonl")]
    assert main(["train", "--base_model", str(place / "model"), *options]) == 2
    assert "12 photos stand in train.jsonl as well" in capsys.readouterr().err


def test_memory_of_the_plans_profile_as_json(capsys):
    assert main(["memory", "--profile", "llava-7b-qlora", "--vram", "24", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["trainable_parameters"] == 79_953_920
    assert figures["fits"] is True
    assert figures["image_tokens"] == 576
    assert 4e9 < figures["weights"] < 5e9
    assert figures["optimizer"] == 8 * 79_953_920
    modes = figures["modes"]
    assert modes["lora"]["peak"] > modes["lora, gradient checkpointing"]["peak"] > modes["qlora, gradient checkpointing"]["peak"]


def test_memory_as_text_says_what_fits_and_shows_the_plans_table(capsys):
    assert main(["memory", "--model_name", "llava-hf/llava-1.5-7b-hf", "--vram", "16"]) == 0
    text = capsys.readouterr().out
    assert "79,953,920" in text
    assert "16 GB: does not fit" in text
    assert "the plan's table: LoRA, r 16: 16 GB" in text


def test_the_largest_batch_fits_and_twice_as_many_do_not():
    chosen = TrainSettings(mode="qlora", gradient_checkpointing=True)
    from dataclasses import replace

    batch = largest_batch(chosen, 24e9)
    assert estimate(replace(chosen, batch_size=batch)).peak <= 24e9 < estimate(replace(chosen, batch_size=2 * batch)).peak
    assert largest_batch(chosen, 3e9) == 0


@pytest.mark.parametrize(
    ("name", "parameters", "tokens"),
    [
        ("llava-hf/llava-1.5-7b-hf", 7.063e9, 576),
        ("mistral-community/pixtral-12b", 12.68e9, 4160),
        ("HuggingFaceTB/SmolVLM-256M-Instruct", 0.256e9, 1156),
    ],
)
def test_shipped_configurations_have_the_models_size(name, parameters, tokens):
    config = model_config(name)
    assert image_tokens_of(config) == tokens
    assert estimate(TrainSettings(base_model=name, batch_size=1)).parameters == pytest.approx(parameters, rel=0.01)


def test_a_run_that_cannot_fit_is_refused_before_it_starts_unless_forced(place, capsys, monkeypatch):
    from catlib.vlm import memory

    monkeypatch.setenv("CATLIB_ROOT", str(place))
    monkeypatch.setattr(memory, "device_memory", lambda device: 1e5)
    data = place / "data" / "vlm"
    chosen = settings(place / "model", data, place / "refused", epochs=1, watch_photos=0)
    options = [f"--{key}={value}" for key, value in vars(chosen).items() if not isinstance(value, bool)]
    assert main(["train", *options]) == 2
    assert "--force" in (error := capsys.readouterr().err) and "GB" in error
    assert main(["train", *options, "--force"]) == 0
