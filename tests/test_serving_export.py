"""`catlib export merge`: the same model in one plain folder of the hub's layout, or nothing at all."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny_models import (
    BREEDS,
    save_llava,
    save_pixtral,
    save_wide_llava,
    settings,
    write_dataset,
)
from transformers import AutoModelForImageTextToText

from catlib.cli import main
from catlib.folders import whole_folder
from catlib.serving import export
from catlib.serving.export import (
    Answers,
    Photos,
    choose_photos,
    compare,
    find_mergeable,
    hub_name,
    lacks_hub_names,
    merge,
    weight_names,
)
from catlib.training.lora import add_lora
from catlib.vlm.adapters import save_adapter
from catlib.vlm.checkpoint import find_checkpoint, open_vlm
from catlib.vlm.models import Checkpoint
from catlib.vlm.processors import load_processor

OWN_QUESTION = "Tell me the breed."
MARK = '{"kind": "merged", "base_model": "owner/model", "adapter": null}'  # an earlier export's record


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    save_llava(root / "model")
    write_dataset(root / "data", val=3)
    return root


def tuned(root, name, base, quantize=False, **more):
    """An adapter with random, visible changes, and the record that training leaves."""
    chosen = settings(root / base, root / "data" / "vlm", root / name, **more)
    vlm = open_vlm(root / base, precision="4-bit" if quantize else "float32")
    add_lora(vlm, chosen)
    torch.manual_seed(1)
    for parameter_name, parameter in vlm.model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.requires_grad and "modules_to_save" in parameter_name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    save_adapter(vlm, root / name)
    record = {"base_model": str(root / base), "breeds": BREEDS, "question": OWN_QUESTION, "settings": vars(chosen)}
    (root / name / "training.json").write_text(json.dumps(record))
    return root / name


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"train_projector": "full"},
        {"train_projector": "lora"},
        {"train_projector": "none"},
        {"mode": "projector"},
        {"use_dora": True},
    ],
    ids=["full", "lora", "none", "projector alone", "dora"],
)
def test_the_export_answers_as_the_adapter_in_one_plain_folder(place, tmp_path, more):
    checkpoint = tuned(place, tmp_path.name, "model", **more)
    result = merge(find_mergeable(checkpoint), tmp_path / "out", count=3)
    assert result.verification.passed and result.verification.photos == 3 and result.verification.same_breed == 3
    assert result.dtype == "float32" and result.verification.largest_difference < 1e-3
    names = weight_names(result.folder)
    assert {"vision_tower.vision_model.embeddings.class_embedding", "language_model.model.embed_tokens.weight"} <= names
    assert not [n for n in names if "lora" in n or n.startswith("vision_tower.encoder")]
    files = {path.name for path in result.folder.iterdir()}
    assert {
        "processor_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "config.json",
        "training.json",
        "export.json",
        "README.md",
    } <= files
    found = find_checkpoint(checkpoint)
    photos = choose_photos([], found, 3)
    plain = open_vlm(result.folder, precision="float32")
    assert plain.question == found.question == OWN_QUESTION and plain.breeds == found.breeds == tuple(BREEDS)
    base = open_vlm(find_checkpoint(checkpoint, tuned=False), precision="float32")
    changed = compare(export.ask(base, photos), export.ask(plain, photos), BREEDS, photos, 0.01)
    assert not changed.passed  # the adapter says something else than its base


@pytest.mark.slow
def test_a_pixtral_keeps_its_own_names(place, tmp_path):
    save_pixtral(place / "pixtral")
    checkpoint = tuned(place, "pixtral-tuned", "pixtral", train_projector="full")
    result = merge(find_mergeable(checkpoint), tmp_path / "out", count=2)
    assert result.verification.passed and result.verification.same_answer == 2
    assert "vision_tower.patch_conv.weight" in weight_names(result.folder)
    assert load_processor(str(result.folder)).tokenizer.convert_tokens_to_ids("[IMG_BREAK]") > 3


@pytest.mark.slow
def test_a_qlora_adapter_goes_into_the_plain_base_and_says_what_that_means(place, tmp_path, capsys):
    save_wide_llava(place / "wide")
    checkpoint = tuned(place, "qlora", "wide", quantize=True, mode="qlora")
    assert (
        main(["export", "merge", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--count", "2"]) == 0
    )
    text = capsys.readouterr()
    assert "4-bit" in text.err and "plain base" in text.err
    assert "verified on 2 photos" in text.out and "beside the 4-bit model as it was trained, on 2 photos" in text.out
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["against_4bit"]["largest_difference"] > record["verification"]["largest_difference"]


def test_a_4bit_base_is_refused(place, tmp_path, capsys):
    checkpoint = tuned(place, "on-4bit", "model")
    shutil.copytree(place / "model", place / "bnb")
    config = json.loads((place / "bnb" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (place / "bnb" / "config.json").write_text(json.dumps(config))
    command = [
        "export",
        "merge",
        "--checkpoint",
        str(checkpoint),
        "--base-model",
        str(place / "bnb"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(command) == 2
    assert "never merged" in capsys.readouterr().err and not (tmp_path / "o").exists()


@pytest.mark.slow
def test_a_failed_verification_exits_with_1_and_leaves_nothing(place, tmp_path, capsys, monkeypatch):
    checkpoint = tuned(place, "broken", "model")
    before = export.save_plain

    def damaged(vlm, folder, dtype):
        vlm.model.lm_head.weight.data.mul_(1.5)
        before(vlm, folder, dtype)

    monkeypatch.setattr(export, "save_plain", damaged)
    command = ["export", "merge", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--count", "2"]
    assert main(command) == 1
    assert "verification failed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_interruption_leaves_nothing_and_an_existing_folder_stays(place, tmp_path, monkeypatch):
    checkpoint = tuned(place, "interrupted", "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    (tmp_path / "out" / "export.json").write_text(MARK)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "save_processor", interrupted)  # when the weights lie there already
    command = ["export", "merge", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    assert main(command) == 2  # not empty
    assert main([*command, "--force"]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (
        tmp_path / "out" / "mine.txt"
    ).read_text() == "keep"


@pytest.mark.slow
def test_force_replaces_a_folder_but_never_the_source(place, tmp_path, capsys):
    checkpoint = tuned(place, "source", "model")
    out = tmp_path / "out"
    (out / "old").mkdir(parents=True)
    (out / "export.json").write_text(MARK)
    command = ["export", "merge", "--checkpoint", str(checkpoint), "--count", "1", "--force", "--json", "--out"]
    assert main([*command, str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["verification"]["same_breed"] == 1
    assert (
        not (out / "old").exists()
        and (out / "config.json").is_file()
        and [p.name for p in tmp_path.iterdir()] == ["out"]
    )
    assert main([*command, str(place)]) == 2
    assert "holds what is to be exported" in capsys.readouterr().err and (checkpoint / "adapter_config.json").is_file()


@pytest.mark.slow
def test_a_plain_model_is_written_anew_in_the_hubs_layout_and_predict_reads_an_export(place, tmp_path, capsys):
    checkpoint = tuned(place, "twice", "model")
    first = merge(find_mergeable(checkpoint), tmp_path / "first", count=1, dtype="bfloat16")
    assert first.dtype == "bfloat16" and first.verification.limit == 1.0
    second = merge(find_mergeable(first.folder), tmp_path / "second", count=1)
    assert second.verification.largest_difference == 0 and weight_names(second.folder) == weight_names(first.folder)
    photo = next((place / "data" / "photos").glob("*.jpg"))
    assert main(["predict", "--checkpoint", str(second.folder), str(photo)]) == 0
    assert list(json.loads(capsys.readouterr().out)["scores"]) == list(BREEDS)  # of the training's record


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "nowhere"], "no such folder"),
        (["--checkpoint", "DATA"], "neither an adapter"),
        (["--checkpoint", "MODEL", "--count", "0"], "at least one photo"),
        (["--checkpoint", "MODEL", "--photos", "nowhere.jpg"], "no such photo"),
    ],
)
def test_wrong_input_exits_with_2(place, tmp_path, capsys, arguments, words):
    arguments = [a.replace("DATA", str(place / "data")).replace("MODEL", str(place / "model")) for a in arguments]
    assert main(["export", "merge", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert words in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_photos_come_from_the_data_and_else_are_patterns(place):
    def trained(val_data):
        return Checkpoint("x", "x", training={"settings": {"val_data": val_data}})

    record = trained(str(place / "data" / "vlm" / "val.jsonl"))
    assert choose_photos([], record, 2).names == ("val-0", "val-1")
    for none in (trained("gone.jsonl"), Checkpoint("x", "x")):
        patterns = choose_photos([], none, 22)
        assert "no photos" in patterns.origin and len(patterns.images) == 22 == len(set(patterns.names))
        assert len({image.tobytes() for image in patterns.images}) == 22
    assert choose_photos([place / "data" / "photos" / "000.jpg"], record, 2).names == ("000.jpg",)


@pytest.mark.slow
def test_an_export_is_verified_with_the_checkpoints_question(place, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(export, "generate_free", lambda vlm, images, q: asked.append(q) or [""] * len(images))
    merge(find_mergeable(tuned(place, "asked", "model")), tmp_path / "out", count=1)
    assert asked == [OWN_QUESTION] * 2


def test_a_comparison_lists_what_differs_with_the_lead():
    photos = Photos(("a", "b"), (None, None), "given")
    original = Answers(("Manx", "Siamese"), np.array([[-1.0, -3.0], [-2.0, -1.9]]))
    other = Answers(("Manx", "Manx"), np.array([[-1.0, -3.1], [-1.8, -1.9]]))
    result = compare(original, other, ("Manx", "Siamese"), photos, 0.15)
    assert (result.same_breed, result.same_answer, result.passed) == (1, 1, False)
    assert result.largest_difference == pytest.approx(0.2)
    assert "b: Siamese ('Siamese'), exported Manx ('Manx'); lead 0.1 nats" in str(result)
    assert not compare(original, Answers(other.texts, other.scores * np.nan), ("Manx", "Siamese"), photos, 9).passed


def test_hub_names_hold_across_shards(place, tmp_path):
    vlm = open_vlm(place / "model", precision="float32")
    model = vlm.base
    assert lacks_hub_names(place / "model")
    export.save_plain(vlm, tmp_path, torch.float32, shard="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and not lacks_hub_names(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(tmp_path / file, framework="pt") as tensors:
            assert name in tensors.keys()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert hub_name("vision_tower.patch_conv.weight", "pixtral") == "vision_tower.patch_conv.weight"


def test_a_whole_folder_or_none(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out", force=False) as folder:
        (folder / "half").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "deep" / "out", force=False) as folder:
        (folder / "whole").write_text("x")
    assert (tmp_path / "deep" / "out" / "whole").is_file()
