"""Tiny models of families other than LLaVA, as transformers' auto classes find them: Idefics3 (SmolVLM's kind), Qwen2-VL,
Gemma3 and Mllama. `TURNS` writes conversations as the hub's templates do; layouts are those of `hub-layouts.md`, unverified
where no hub can be reached.
"""

import json
from pathlib import Path

import torch
from tiny_encoders import tokenizer
from tiny_models import write_processor
from tokenizers import processors
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip


def turns(image: str, opening: str, closing: str, bos: str = "", ready: str = "assistant") -> str:
    """A chat template: `opening` stands before a role's name, `closing` behind a turn; contents are trimmed, as Gemma's and
    Mllama's do.
    """
    return (
        f"{bos}{{% for message in messages %}}{opening.replace('ROLE', chr(123) * 2 + ' message.role ' + chr(125) * 2)}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + image + "{% else %}"
        "{{ part['text'] | trim }}{% endif %}{% endfor %}" + closing + "{% endfor %}"
        "{% if add_generation_prompt %}" + opening.replace("ROLE", ready).rstrip(" ") + "{% endif %}"
    )


def words_with(*special: str, bos: bool = False):
    """The tiny tokenizer with more special tokens, which puts <s> in front of a text when `bos`."""
    words = tokenizer()
    if bos:
        words.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
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


def save_gemma3(folder: Path) -> Path:
    """The processor puts line breaks and marks around a photo, which attends both ways; template and tokenizer write BOS."""
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = words_with(*names.values(), "<start_of_turn>", "<end_of_turn>", bos=True)
    ids = {name: words.convert_tokens_to_ids(token) for name, token in names.items()}
    vision = SiglipVisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                image_size=28, patch_size=7)  # fmt: skip
    text = Gemma3TextConfig(
        vocab_size=len(words),
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        **TEXT,
    )
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=ids["boi_token"], eoi_token_index=ids["eoi_token"],
        image_token_index=ids["image_token"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)  # zeros by default
    model.generation_config = GenerationConfig(eos_token_id=[2, words.convert_tokens_to_ids("<end_of_turn>")])
    model.save_pretrained(folder)
    images = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}}
    write_processor(folder, words, "Gemma3Processor", "", images, image_seq_length=4)
    template = turns("<start_of_image>", "<start_of_turn>ROLE\n", "<end_of_turn>\n", "{{ bos_token }}", "model")
    template = template.replace("{{ message.role }}", "{{ 'model' if message.role == 'assistant' else 'user' }}")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": names}), encoding="utf-8")
    return folder


def save_mllama(folder: Path) -> Path:
    """The photo enters by cross attention, by a mask that runs along the text; template and tokenizer write BOS."""
    words = words_with("<|image|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", bos=True)
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
        "vision_output_dim": 48, "image_size": 28, "patch_size": 7, "intermediate_layers_indices": [0], "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "initializer_range": 0.3,
    }  # fmt: skip
    text = {**TEXT, "num_hidden_layers": 3, "vocab_size": len(words), "cross_attention_layers": [1]}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=words.convert_tokens_to_ids("<|image|>"))
    )
    for name, gate in model.named_parameters():
        if "gate" in name and gate.numel() == 1:
            torch.nn.init.constant_(gate, 0.8)  # closed by default: the photo would change nothing
    model.generation_config = GenerationConfig(eos_token_id=[2, words.convert_tokens_to_ids("<|eot_id|>")])
    model.save_pretrained(folder)
    images = {"image_processor_type": "MllamaImageProcessor", "size": {"height": 28, "width": 28}, "max_image_tiles": 2}
    write_processor(folder, words, "MllamaProcessor", "", images)
    template = turns("<|image|>", "<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", "{{ bos_token }}")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
