"""Every family's processor loads from its files and reads a photo without torchvision; what cannot is refused in words."""

import json
import pickle

import pytest
from tiny_encoders import photo, tokenizer
from tiny_models import write_processor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from catlib.errors import InputError
from catlib.vlm.processors import VideoSettings, load_processor

FAMILIES = {  # model type: what its chat template writes for a photo
    "llava_next": "<image>", "llava_onevision": "<image>", "mistral3": "[IMG]", "idefics3": "<image>", "smolvlm": "<image>",
    "qwen2_vl": "<|image_pad|>", "qwen2_5_vl": "<|image_pad|>", "qwen3_vl": "<|image_pad|>", "internvl": "<IMG_CONTEXT>",
    "gemma3": "<start_of_image>",
}  # fmt: skip
MARKS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
         "<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
         "<start_of_image>", "<end_of_image>", "<image_soft_token>")  # fmt: skip
NAMED = {  # special tokens that a family's processor asks its tokenizer for by name
    "internvl": {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                 "video_token": "<video>"},
    "gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
}  # fmt: skip
MORE = {
    "llava_next": {"patch_size": 14},
    "llava_onevision": {"num_image_tokens": 729},
    "idefics3": {"image_seq_len": 4},
}


def write(folder, family, video=None):
    """The files of a family's processor with its default sizes, and a configuration that tells its type."""
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>", *MARKS]})
    images = {"image_processor_type": IMAGE_PROCESSOR_MAPPING_NAMES[family]["torchvision"]}
    write_processor(
        folder, words, PROCESSOR_MAPPING_NAMES[family], FAMILIES.get(family, "<image>"), images, **MORE.get(family, {})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": NAMED.get(family, {})}), encoding="utf-8"
    )
    if video:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video), encoding="utf-8")
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_reads_a_photo_and_is_saved_and_copied(family, tmp_path):
    processor = load_processor(write(tmp_path / "model", family))
    assert type(processor).__name__ == PROCESSOR_MAPPING_NAMES[family]
    content = [{"type": "image"}, {"type": "text", "text": "Which?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[photo(0, 60)], text=text, return_tensors="pt")
    assert inputs["pixel_values"].isfinite().all() and inputs["input_ids"].shape[1] > 4
    processor.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    for other in (load_processor(str(tmp_path / "again")), pickle.loads(pickle.dumps(processor))):
        again = other(images=[photo(0, 60)], text=text, return_tensors="pt")
        assert type(other) is type(processor) and again["input_ids"].equal(inputs["input_ids"])
        assert again["pixel_values"].equal(inputs["pixel_values"])


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_video_settings_are_kept_for_others(tmp_path):
    processor = load_processor(
        write(tmp_path / "model", "qwen2_vl", {"video_processor_type": "Qwen2VLVideoProcessor", "max_frames": 9})
    )
    assert isinstance(processor.video_processor, VideoSettings)
    processor.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "processor_config.json").read_text())["video_processor"]
    assert (saved["video_processor_type"], saved["max_frames"]) == ("Qwen2VLVideoProcessor", 9)


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_what_needs_torchvision_is_refused_with_the_command(tmp_path):
    with pytest.raises(InputError, match="pip install torchvision"):
        load_processor(write(tmp_path, "lfm2_vl"))


def test_a_folder_without_template_or_processor_is_refused(tmp_path):
    folder = write(tmp_path / "model", "qwen2_vl")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"chat_template\.jinja"):
        load_processor(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"processor_config\.json"):
        load_processor(str(tmp_path / "empty"))
