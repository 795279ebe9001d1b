"""`catlib memory` and what it computes: the plan's figures, every phase of a run, straight lines that meet the counted steps."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_models import save_llava, save_wide_llava, settings, write_dataset

from catlib.cli import main
from catlib.settings import TrainSettings
from catlib.training import memory_trace
from catlib.training.memory import RESERVE, Footprint, choose, largest_batch, model_config
from catlib.training.memory_trace import LiveBytes, Shape, trace_step
from catlib.vlm.families import find_family

SHAPE = Shape(image_tokens=9, text_tokens=12, answer_tokens=4)


def estimate(settings, *given):
    return Footprint(settings, *given).at(settings.batch_size)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return model_config(str(save_llava(tmp_path_factory.mktemp("memory") / "model")))


@pytest.mark.long
@pytest.mark.slow
def test_memory_of_the_plans_profile_as_json(capsys):
    assert main(["memory", "--profile", "llava-7b-lora", "--vram", "24", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["trainable_parameters"] == 79_953_920
    assert figures["fits"] is True and figures["largest_batch"] >= figures["batch_size"] == 4
    assert figures["image_tokens"] == 576
    assert figures["optimizer"] == 8 * 79_953_920
    assert figures["peak"] == max(figures["phases"].values())
    modes = figures["modes"]
    assert modes["lora, gradient checkpointing"]["peak"] == figures["peak"]
    assert (
        modes["lora"]["peak"]
        > modes["lora, gradient checkpointing"]["peak"]
        > modes["qlora, gradient checkpointing"]["peak"]
    )
    assert [(row["what"], row["plan"]) for row in figures["plan"]] == [
        ("LoRA, r 16", 16e9),
        ("LoRA, r 32", 24e9),
        ("QLoRA, r 32", 20e9),
    ]
    assert figures["plan"][1]["ours"]["peak"] == modes["lora"]["peak"]


@pytest.mark.slow
def test_memory_as_text_says_what_fits_and_shows_the_plans_table(tiny, tmp_path, capsys):
    model = save_llava(tmp_path / "model")
    assert main(["memory", "--model_name", str(model), "--vram", "0.001"]) == 0
    text = capsys.readouterr().out
    assert "0.001 GB: does not fit; largest batch that does: none" in text
    assert "LoRA, r 16: 16 GB" in text and "QLoRA, r 32: 20 GB" in text and "peak in the validation" in text


@pytest.mark.slow
def test_the_largest_batch_fits_and_twice_as_many_do_not():
    footprint = Footprint(TrainSettings(mode="qlora", gradient_checkpointing=True))
    batch = largest_batch(footprint, 24e9)
    assert footprint.at(batch).peak <= 24e9 < footprint.at(2 * batch).peak
    assert largest_batch(footprint, 3e9) == 0
    assert 4e9 < footprint.weights < 5e9


def test_a_projector_that_reads_several_layers_is_estimated_too(tiny, tmp_path):
    chosen, both = settings(tmp_path, tmp_path, tmp_path), type(tiny).from_dict(tiny.to_dict())
    both.vision_feature_layer = [-2, -1]
    peaks = [estimate(chosen, config, SHAPE, torch.float32).peak for config in (tiny, both)]
    assert peaks[0] < peaks[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "tokens", "at_once"),
    [
        ("llava-hf/llava-1.5-7b-hf", 7.063e9, 576, 16),
        ("mistral-community/pixtral-12b", 12.68e9, 4160, 2),
        ("HuggingFaceTB/SmolVLM-256M-Instruct", 0.256e9, 1156, 7),
    ],
)
def test_shipped_configurations_have_the_models_size(name, parameters, tokens, at_once):
    config = model_config(name)
    family = find_family(config)
    assert family.image_tokens(config) == tokens and family.photos_at_once(config) == at_once
    assert estimate(TrainSettings(base_model=name, batch_size=1)).parameters == pytest.approx(parameters, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["projector", "lora", "qlora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_line_through_small_slices_meets_what_a_larger_one_allocates(tiny, mode, checkpointing):
    tiny.text_config.num_hidden_layers = 5
    chosen = TrainSettings(mode=mode, gradient_checkpointing=checkpointing, train_projector="full", lora_r=4)
    trace = trace_step(tiny, chosen, torch.bfloat16, SHAPE)
    kept, logits, transient = memory_trace._trace(tiny, chosen, torch.bfloat16, SHAPE, layers=5, batch=8)
    assert trace.kept(8) == pytest.approx(kept, rel=0.02)
    assert trace.logits(8) == pytest.approx(logits, rel=0.02)
    assert trace.transient(8) == pytest.approx(transient, rel=0.15)


def test_a_storage_counts_from_its_first_sight_until_it_is_freed():
    with LiveBytes() as tracker:
        a = torch.empty(100)
        b = a[10:] * 2
        assert tracker.live == 400 + 360
        del a
        assert tracker.live == 360
        del b
    assert tracker.live == 0 and tracker.peak == 760


@pytest.mark.slow
def test_gradients_overlap_activations_only_without_accumulation(tiny):
    accumulated = estimate(TrainSettings(gradient_accumulation=2), tiny, SHAPE)
    alone = estimate(TrainSettings(gradient_accumulation=1), tiny, SHAPE)
    assert accumulated.gradients == 4 * accumulated.trainable_parameters
    assert alone.gradients == max(0, accumulated.gradients - accumulated.activations)


@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused_with_what_would_fit(tmp_path, monkeypatch, capsys):
    from catlib.training import memory_check

    model, data = save_llava(tmp_path / "model"), write_dataset(tmp_path / "data")
    monkeypatch.setenv("CATLIB_ROOT", str(tmp_path))
    chosen = settings(model, data, tmp_path / "out", epochs=1, watch_photos=0, batch_size=16)
    need = memory_check.check_fits(chosen, str(model), pairs(data))
    monkeypatch.setattr(memory_check, "device_memory", lambda device: need.heap + (need.peak - need.heap) / 2.0)
    with pytest.raises(memory_check.InputError, match=r"What fits: batch_size [248]; mode lora without"):
        memory_check.check_fits(chosen, str(model), pairs(data))
    assert memory_check.check_fits(replace(chosen, force=True), str(model), pairs(data)).peak == need.peak
    options = [f"--{key}={value}" for key, value in vars(chosen).items() if not isinstance(value, bool)]
    assert main(["train", *options]) == 2
    assert "--force" in (error := capsys.readouterr().err) and "GB free" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_on_a_cpu_the_estimate_holds_the_heap_that_is_not_given_back(tmp_path, monkeypatch):
    from catlib.training.memory import CPU_HEAP
    from catlib.training.memory_check import check_fits

    model, data = save_llava(tmp_path / "model"), write_dataset(tmp_path / "data")
    chosen = settings(model, data, tmp_path / "out", watch_photos=0)
    need = check_fits(chosen, str(model), pairs(data))
    assert need.heap == CPU_HEAP and min(need.phases.values()) > CPU_HEAP
    assert estimate(chosen).heap == 0, "of a GPU"


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux's list of mapped files")
def test_a_4bit_model_does_not_keep_the_weights_file_resident(tmp_path):
    from catlib.vlm.checkpoint import open_vlm

    vlm = open_vlm(str(save_wide_llava(tmp_path / "wide")), device="cpu", precision="4-bit")
    assert "4bit" in " ".join(type(m).__name__ for m in vlm.model.modules())
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def pairs(data):
    from catlib.data.records import image_root_of, read_samples

    root = image_root_of(data / "train.jsonl")
    return [(sample, root / sample.image) for sample in read_samples(data / "train.jsonl", root)]


@pytest.mark.slow
def test_auto_takes_the_largest_batch_that_fits_and_recomputes_only_where_it_must(tiny):
    more = {"lora_r": 4, "watch_photos": 0, "batch_size": 4, "gradient_accumulation": 6}
    chosen = TrainSettings(**more, gradient_checkpointing="auto")

    @cache
    def of(way):
        return Footprint(way, tiny, SHAPE, torch.float32)

    plain, less = (of(replace(chosen, gradient_checkpointing=way)) for way in ("false", "true"))
    room = 1 / (1 - RESERVE)
    for footprint, free, batch in (
        (plain, 1e12, 24),
        (plain, room * plain.at(12).peak + 9, 12),
        (plain, room * plain.at(4).peak + 9, 4),
        (
            less,
            room * plain.at(4).peak - 9,
            max(n for n in (1, 2, 3, 4, 6, 8, 12) if less.at(n).peak < plain.at(4).peak),
        ),
        # without a reserve, rather than not at all
        (less, less.at(1).peak, max(n for n in (1, 2, 3, 4, 6) if less.at(n).peak <= less.at(1).peak)),
    ):
        found = choose(chosen, of, free)
        assert (found.batch_size, found.gradient_checkpointing) == (batch, footprint is less)
        assert found.peak <= free
    assert choose(chosen, of, 1).peak > 1
    given = replace(chosen, gradient_checkpointing="false")
    assert choose(given, of, 1e12).batch_size == 4 == choose(chosen, of, 1e12, any_batch=False).batch_size


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("vram", "batch", "recomputes"), [(80, 8, False), (42, 8, False), (24, 8, True)])
def test_auto_of_the_7b_profile_on_the_plans_cards(vram, batch, recomputes, capsys):
    assert main(["memory", "--profile", "llava-7b-lora", "--vram", str(vram), "--json"]) == 0
    auto = json.loads(capsys.readouterr().out)["auto"]
    assert (auto["batch_size"], auto["gradient_checkpointing"]) == (batch, recomputes) and auto["peak"] < vram * 1e9


@pytest.mark.slow
def test_a_run_says_and_records_what_auto_came_to(tmp_path, monkeypatch, caplog):
    from catlib.training import memory_check
    from catlib.training.report import setup_table
    from catlib.training.trainer import Trainer

    model, data = save_llava(tmp_path / "model"), write_dataset(tmp_path / "data")
    monkeypatch.setenv("CATLIB_ROOT", str(tmp_path))
    more = {"epochs": 1, "watch_photos": 0, "batch_size": 4, "gradient_checkpointing": "auto"}
    chosen = settings(model, data, tmp_path / "out", **more)
    less = memory_check.check_fits(replace(chosen, gradient_checkpointing="true"), str(model), pairs(data))
    assert not memory_check.check_fits(chosen, str(model), pairs(data)).gradient_checkpointing
    monkeypatch.setattr(memory_check, "device_memory", lambda device: float(less.peak))
    trainer = Trainer(chosen)
    assert trainer.vlm.base.is_activation_checkpointing
    assert setup_table(trainer).loc["a forward pass", "value"] == "4 photos, with gradient checkpointing"
    outcome = trainer.fit().outcome
    assert outcome["gradient_checkpointing"] is True and outcome["micro_batch"] == 4


def test_hours_say_how_many_photos_of_each_breed_fit(capsys):
    assert main(["memory", "--profile", "llava-7b-lora", "--photos", "67000", "--hours", "3", "--json"]) == 0
    work = json.loads(capsys.readouterr().out)["work"]
    assert work["breeds"] == 67
    for row in work["time"]:
        assert row["photos_per_breed"] == int(1000 * 3 / row["hours"])


@pytest.mark.slow
def test_steps_are_measured_on_this_device(tmp_path, capsys):
    model, data = save_llava(tmp_path / "model"), write_dataset(tmp_path / "data")
    given = ["--model_name", model, "--train_data", data / "train.jsonl", "--val_data", data / "val.jsonl"]
    more = ["--batch_size", 2, "--gradient_accumulation", 1, "--photos", 500, "--epochs", 2, "--measure", "--json"]
    assert main(["memory", *map(str, [*given, *more])]) == 0
    (row,) = [row for row in json.loads(capsys.readouterr().out)["work"]["time"] if "train" in row]
    assert row["hours"] == pytest.approx(2 * 500 / row["train"] / 3600) and row["train"] > 0
    assert row["predict_hours"] == pytest.approx(500 / row["predict"] / 3600)
