"""The door: what a folder or a hub name says about base, question, breeds and spelling, before anything is loaded, and opened."""

import json

import pytest
from tiny_models import save_llava

from catlib.breeds import BREEDS
from catlib.data.conversations import QUESTION
from catlib.errors import InputError
from catlib.vlm.checkpoint import find_checkpoint, open_vlm

RECORD = {
    "base_model": "owner/model",
    "breeds": ["Manx", "Siamese"],
    "question": "Which breed?",
    "spelled": {"Manx": "Manx."},
    "settings": {"mode": "qlora"},
}


def folder(path, record=RECORD, adapter=True):
    """A checkpoint's small files; of its weights only the name."""
    path.mkdir(parents=True)
    names = ["adapter_config.json", "adapter_model.safetensors"] if adapter else ["config.json"]
    for name in names:
        (path / name).write_text(json.dumps({"base_model_name_or_path": "owner/other"}))
    if record is not None:
        (path / "training.json").write_text(json.dumps(record))
    return path


def test_an_adapter_says_what_it_was_trained_with(tmp_path):
    found = find_checkpoint(folder(tmp_path / "tuned"))
    assert (found.base, found.adapter, found.folder) == ("owner/model", tmp_path / "tuned", tmp_path / "tuned")
    assert found.question == found.trained_question == "Which breed?" and found.breeds == ("Manx", "Siamese")
    assert found.spelled == {"Manx": "Manx."} and found.mode == "qlora" and not found.merged and not found.remarks


def test_the_base_of_a_checkpoint_is_asked_the_same(tmp_path):
    for adapter in (True, False):
        found = find_checkpoint(folder(tmp_path / str(adapter), adapter=adapter), tuned=False)
        assert found.base == "owner/model" and found.adapter is None and not found.merged
        assert found.question == "Which breed?" and found.breeds == ("Manx", "Siamese")


def test_another_question_base_or_breed_is_taken_and_said(tmp_path):
    found = find_checkpoint(
        folder(tmp_path / "tuned"), base_model="owner/mine", question="What is it?", breeds=["Manx", "Bengal"]
    )
    assert found.base == "owner/mine" and found.question == "What is it?" and found.trained_question == "Which breed?"
    assert found.breeds == ("Manx", "Bengal")
    said = " ".join(found.remarks)
    assert "What is it?" in said and "Which breed?" in said and "Bengal" in said and "Manx" not in said


def test_a_merged_model_and_a_plain_one(tmp_path):
    merged, plain = (find_checkpoint(folder(tmp_path / name, r, False)) for name, r in (("m", RECORD), ("p", None)))
    assert merged.merged and merged.base == str(tmp_path / "m") and merged.question == "Which breed?"
    assert not plain.merged and plain.question == QUESTION and not plain.remarks and plain.mode == ""


def test_what_no_record_tells_is_the_standard_and_said(tmp_path):
    hub = find_checkpoint("owner/model")
    assert hub.base == "owner/model" and hub.folder is None and hub.question == QUESTION and not hub.trained_question
    assert hub.breeds == tuple(breed.name for breed in BREEDS) and not hub.remarks
    bare = find_checkpoint(folder(tmp_path / "bare", None))
    assert bare.base == "owner/other" and bare.question == QUESTION and "training.json" in bare.remarks[0]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**RECORD, "breeds": "Manx"}, "wrong kind"),
        ({**RECORD, "question": 3}, "wrong kind"),
        ({**RECORD, "spelled": {"Manx": None}}, "wrong kind"),
        ([], "JSON object"),
    ],
)
def test_an_ill_formed_record_is_named(tmp_path, record, message):
    with pytest.raises(InputError, match=rf"training\.json.*{message}"):
        find_checkpoint(folder(tmp_path / "tuned", record))


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", tmp_path / "nowhere", "./nowhere", "a/b/c", " "):
        with pytest.raises(InputError, match=r"adapter|no such folder|no model is named"):
            find_checkpoint(name)
    (folder(tmp_path / "half") / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="adapter_model"):
        find_checkpoint(tmp_path / "half")


def test_an_opened_model_asks_its_checkpoints_question_and_its_remarks_are_logged(tmp_path, caplog):
    vlm = open_vlm(
        find_checkpoint(save_llava(tmp_path / "model"), question="Breed?"), device="cpu", precision="float32"
    )
    assert vlm.question == "Breed?" and "Breed?" in caplog.text and vlm.family.name == "LLaVA-1.5"
    assert str(vlm.dtype) == "torch.float32" and vlm.device.type == "cpu" and vlm.adapter is None
    with pytest.raises(InputError, match="precision"):
        open_vlm(vlm.checkpoint, precision="int3")
    with pytest.raises(InputError, match="64"):  # layers of 32 do not fill NF4's blocks
        open_vlm(vlm.checkpoint, device="cpu", precision="4-bit")


def test_a_record_without_weights_is_not_opened(tmp_path):
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "training.json").write_text(json.dumps(RECORD))
    found = find_checkpoint(tmp_path / "gguf")
    assert found.question == "Which breed?"
    with pytest.raises(InputError, match="no weights"):
        open_vlm(found)
