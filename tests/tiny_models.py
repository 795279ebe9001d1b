"""Tiny models saved to folders and photos on disk: what a training run in a test works with."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_encoders import TEMPLATE, llava, photo, tokenizer
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
)

from catlib.data.records import make_sample, write_samples
from catlib.settings import TrainSettings

QUESTION = "What breed is this cat?"
BREEDS = ("Manx", "Burmilla", "Siamese", "Extra-Toes Cat - Hemingway Polydactyl")


def save_llava(folder: Path, seed: int = 0) -> Path:
    """A tiny LLaVA with its processor in a folder, in float32."""
    vlm = llava(seed=seed)
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


def save_wide_llava(folder: Path) -> Path:
    """A LLaVA whose language model is 64 wide, a whole block of 4-bit quantization."""
    vlm = llava()
    config = vlm.model.config
    config.text_config.hidden_size, config.text_config.intermediate_size, config.text_config.num_hidden_layers = (
        64,
        128,
        2,
    )
    config.text_config.head_dim = 16
    torch.manual_seed(0)
    LlavaForConditionalGeneration._from_config(config).save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


def write_processor(folder: Path, words: Any, name: str, photo: str, images: dict[str, Any], **more: Any) -> None:
    """A processor's files as they lie on the hub. No class is built, so the library alone decides how they are loaded.

    `photo` stands for a photo in the chat template, `images` is the image processor's configuration, `more` the processor's.
    """
    words.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<image>\n", photo), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": name, **more}), encoding="utf-8")


def save_pixtral(folder: Path) -> Path:
    """A tiny Pixtral: its own tower and processor, with row breaks between the image tokens."""
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = PixtralVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=7
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 28}, "patch_size": 7}
    write_processor(folder, words, "PixtralProcessor", "[IMG]", images, patch_size=7)
    return folder


def write_dataset(root: Path, train: int = 12, val: int = 4) -> Path:
    """`train` and `val` photos of BREEDS in turn, with JSONL files and card in root/vlm, which is returned."""
    (root / "photos").mkdir(parents=True, exist_ok=True)
    number = 0
    for split, count in (("train", train), ("val", val)):
        samples = []
        for i in range(count):
            name = f"photos/{number:03}.jpg"
            photo(number).save(root / name)
            breed = BREEDS[i % len(BREEDS)]
            samples.append(
                make_sample(
                    f"{split}-{i}",
                    name,
                    QUESTION,
                    breed,
                    breed=breed,
                    source="test",
                    sha256=f"{root.name}-{number}",
                    split=split,
                )
            )
            number += 1
        write_samples(root / "vlm" / f"{split}.jsonl", samples)
    (root / "vlm" / "dataset.json").write_text(json.dumps({"image_root": ".."}), encoding="utf-8")
    return root / "vlm"


def settings(model: Path, data: Path, out: Path, **more: object) -> TrainSettings:
    """A short run on the CPU in float32."""
    values = {
        "base_model": str(model),
        "train_data": str(data / "train.jsonl"),
        "val_data": str(data / "val.jsonl"),
        "output_dir": str(out),
        "lora_r": 4,
        "epochs": 2,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "lr": 5e-3,
        "projector_lr": 1e-3,
        "dtype": "float32",
        "device": "cpu",
        "num_workers": 0,
        "log_steps": 1,
        "watch_photos": 4,
    }
    return TrainSettings.build({**values, **more})
