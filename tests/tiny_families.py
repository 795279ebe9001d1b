"""Tiny models of families other than LLaVA, as transformers' auto classes find them: Idefics3 (SmolVLM's kind) and Qwen2-VL."""

from pathlib import Path

import torch
from tiny_encoders import tokenizer
from tiny_models import write_processor
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip


def words_with(*special: str):
    """The tiny tokenizer with more special tokens."""
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>", *special]})
    return words


def save_idefics3(folder: Path) -> Path:
    """Photos are cut into tiles of 28 pixels beside a small whole one, each tile four tokens between marks."""
    marks = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    words = words_with("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *marks)
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 7}  # fmt: skip
    torch.manual_seed(0)
    config = Idefics3Config(
        vision_config=vision, text_config=LlamaConfig(vocab_size=len(words), **TEXT), scale_factor=2, pad_token_id=0,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    images = {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 56},
        "max_image_size": {"longest_edge": 28},
    }
    write_processor(folder, words, "Idefics3Processor", "<image>", images, image_seq_len=4)
    return folder


def save_qwen2_vl(folder: Path) -> Path:
    """Photos keep their shape, and positions are triples of time, height and width."""
    names = {
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
    }
    words = words_with(*names.values())
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 7}
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        vision_config=vision, text_config={"vocab_size": len(words), "rope_parameters": rope, **TEXT},
        **{f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in names.items()},
    )  # fmt: skip
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    images = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 7, "merge_size": 2}
    images |= {"size": {"shortest_edge": 14 * 14, "longest_edge": 56 * 56}}
    photo = f"{names['vision_start']}{names['image']}{names['vision_end']}"
    write_processor(folder, words, "Qwen2VLProcessor", photo, images)
    return folder
