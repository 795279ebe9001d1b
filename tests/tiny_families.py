"""A tiny random model of each family, its files laid out as on the hub: configuration keys, processor files, special tokens, who
writes BOS, what ends a turn. `save` writes one; `FAMILIES` is the table.

Layouts are those of the processors' sources in transformers 5.23 and of `hub-layouts.md`; what stands in the real repositories
is unverified where `source` says so, since no hub can be reached. Weights are drawn wide, so that scores differ visibly.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny_encoders import tokenizer
from tokenizers import processors
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

SIDE, PATCH = 56, 14
STD = 0.12
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": STD,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": PATCH, "initializer_range": STD,
}  # fmt: skip
CLIP, SIGLIP = {"model_type": "clip_vision_model", **VISION}, {"model_type": "siglip_vision_model", **VISION}
SQUARE, SHORTEST = {"height": SIDE, "width": SIDE}, {"shortest_edge": SIDE}
GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]


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


BOS = "{{ bos_token }}"
LLAVA_15 = (  # llava-hf/llava-1.5-7b-hf: an answer ends with a space, no end token
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def mistral(image: str, bos: str = "") -> str:
    return (
        bos
        + "{% for message in messages %}{% if message['role'] == 'user' %}[INST]{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}"
        + image
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}[/INST]{% else %}"
        "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
    )


def chatml(image: str, before: str = "") -> str:
    return turns(image, "<|im_start|>ROLE\n", "<|im_end|>\n", before)


def role(template: str, name: str) -> str:
    """The template with another name for the assistant."""
    return template.replace("message.role", f"'{name}' if message.role == 'assistant' else 'user'")


@dataclass(frozen=True)
class Tiny:
    """`config`: of the model, its special tokens by name ("@TOKEN" becomes the id). `alone`: preprocessor_config.json without
    processor_config.json; `template_in`: the file that holds the template, none where there is none.
    """

    model_type: str
    config: Mapping[str, Any]
    special: tuple[str, ...]
    template: str
    processor: str
    images: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)  # the processor's
    bos: bool = False  # the tokenizer writes one
    ends: tuple[str, ...] = ("</s>",)  # of generation_config.json
    named: Mapping[str, str] = field(default_factory=dict)
    alone: bool = False
    template_in: str = "chat_template.jinja"
    targets: str = ""  # lora_targets, where the language model has none of the usual names


CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
MISTRAL_TOKENS = ("[INST]", "[/INST]")
PIXTRAL_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]", *MISTRAL_TOKENS)
QWEN_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>", *CHATML_TOKENS)
QWEN_PHOTO = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_IDS = {"image_token_id": "@<|image_pad|>", "video_token_id": "@<|video_pad|>",
            "vision_start_token_id": "@<|vision_start|>", "vision_end_token_id": "@<|vision_end|>"}  # fmt: skip
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
QWEN_IMAGES = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2,
               "size": {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}}  # fmt: skip
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "patch_size": 14, "out_hidden_size": 64,
              "initializer_range": STD}  # fmt: skip
QWEN3_TOWER = {**QWEN_TOWER, "num_position_embeddings": 16}
ROWS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
TILED = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
SMOL_TOWER = {**VISION, "patch_size": PATCH}
PIXTRAL = {"model_type": "pixtral", **VISION, "image_size": 2 * SIDE, "head_dim": 16}

FAMILIES = {
    "LLaVA-1.5": Tiny(  # template of llava-hf/llava-1.5-7b-hf
        "llava",
        {"vision_config": CLIP, "text_config": {"model_type": "llama", **TEXT}, "image_token_index": "@<image>",
         "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "image_seq_length": 16},
        (), LLAVA_15, "LlavaProcessor",
        {"image_processor_type": "CLIPImageProcessor", "size": SHORTEST, "crop_size": SQUARE},
        {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}, bos=True,
        template_in="chat_template.json",
    ),
    "LLaVA-NeXT": Tiny(  # template unverified
        "llava_next",
        {"vision_config": CLIP, "text_config": {"model_type": "mistral", **TEXT, "sliding_window": None},
         "image_token_index": "@<image>", "vision_feature_layer": -2, "image_grid_pinpoints": GRID},
        MISTRAL_TOKENS, mistral("<image>\n"), "LlavaNextProcessor",
        {"image_processor_type": "LlavaNextImageProcessor", "size": SHORTEST, "crop_size": SQUARE, "image_grid_pinpoints": GRID},
        {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}, bos=True,
        template_in="tokenizer_config.json",
    ),
    "LLaVA-OneVision": Tiny(  # template unverified
        "llava_onevision",
        {"vision_config": {**SIGLIP, "vision_use_head": False}, "text_config": {"model_type": "qwen2", **TEXT},
         "image_token_index": "@<image>", "video_token_index": "@<video>", "image_grid_pinpoints": GRID},
        ("<video>", *CHATML_TOKENS), chatml("<image>\n"), "LlavaOnevisionProcessor",
        {"image_processor_type": "LlavaOnevisionImageProcessor", "size": SQUARE, "image_grid_pinpoints": GRID},
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}, ends=("<|im_end|>",),
    ),
    "Pixtral": Tiny(  # mistral-community/pixtral-12b, template unverified
        "llava",
        {"vision_config": PIXTRAL, "text_config": {"model_type": "mistral", **TEXT, "sliding_window": None},
         "image_token_index": "@[IMG]", "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        PIXTRAL_TOKENS, mistral("[IMG]", BOS), "PixtralProcessor",
        {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 2 * SIDE}, "patch_size": PATCH},
        {"patch_size": PATCH}, bos=True,
    ),
    "Mistral3": Tiny(  # unverified
        "mistral3",
        {"vision_config": PIXTRAL, "text_config": {"model_type": "mistral", **TEXT, "sliding_window": None},
         "image_token_index": "@[IMG]", "spatial_merge_size": 2},
        PIXTRAL_TOKENS, mistral("[IMG]", BOS), "PixtralProcessor",
        {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 2 * SIDE}, "patch_size": PATCH},
        {"patch_size": PATCH, "spatial_merge_size": 2}, bos=True,
    ),
    "Idefics2": Tiny(  # unverified
        "idefics2",
        {"vision_config": {**VISION, "image_size": 2 * SIDE}, "image_token_id": "@<image>",
         "text_config": {"model_type": "mistral", **TEXT, "sliding_window": 48},
         "perceiver_config": {"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4,
                              "resampler_head_dim": 16, "num_key_value_heads": 2}},
        ("<fake_token_around_image>", "<end_of_utterance>"), turns("<image>", "ROLE: ", "<end_of_utterance>\n"),
        "Idefics2Processor",
        {"image_processor_type": "Idefics2ImageProcessor", "size": {"shortest_edge": 42, "longest_edge": 2 * SIDE}},
        {"image_seq_len": 4}, bos=True, ends=("</s>", "<end_of_utterance>"),
    ),
    "Idefics3": Tiny(  # unverified
        "idefics3",
        {"vision_config": SMOL_TOWER, "text_config": {"model_type": "llama", **TEXT}, "scale_factor": 2, "pad_token_id": 0,
         "image_token_id": "@<image>"},
        ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|end_of_text|>", *ROWS),
        turns("<image>", "ROLE: ", "<end_of_utterance>\n", BOS), "Idefics3Processor",
        {"image_processor_type": "Idefics3ImageProcessor", **TILED}, {"image_seq_len": 4}, bos=True,
        ends=("<|end_of_text|>", "<end_of_utterance>"), template_in="chat_template.json",
    ),
    "SmolVLM": Tiny(  # HuggingFaceTB/SmolVLM-256M-Instruct, template unverified
        "smolvlm",
        {"vision_config": {"model_type": "smolvlm_vision", **SMOL_TOWER}, "text_config": {"model_type": "llama", **TEXT},
         "scale_factor": 2, "pad_token_id": 0, "image_token_id": "@<image>"},
        ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>", "<|im_start|>", *ROWS),
        turns("<image>", "<|im_start|>ROLE: ", "<end_of_utterance>\n"), "SmolVLMProcessor",
        {"image_processor_type": "SmolVLMImageProcessor", **TILED}, {"image_seq_len": 4}, ends=("<end_of_utterance>",),
    ),
    "Qwen2-VL": Tiny(  # system turn as in hub-layouts.md
        "qwen2_vl",
        {"vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14,
                           "initializer_range": STD},
         "text_config": {**TEXT, **MROPE}, **QWEN_IDS},
        QWEN_TOKENS, chatml(QWEN_PHOTO, SYSTEM), "Qwen2VLProcessor", QWEN_IMAGES, ends=("<|im_end|>", "</s>"), alone=True,
        template_in="tokenizer_config.json",
    ),
    "Qwen2.5-VL": Tiny(
        "qwen2_5_vl",
        {"vision_config": {**QWEN_TOWER, "window_size": 56, "fullatt_block_indexes": [1]}, "text_config": {**TEXT, **MROPE},
         **QWEN_IDS},
        QWEN_TOKENS, chatml(QWEN_PHOTO, SYSTEM), "Qwen2_5_VLProcessor", QWEN_IMAGES, ends=("<|im_end|>", "</s>"), alone=True,
    ),
    "Qwen3-VL": Tiny(
        "qwen3_vl",
        {"vision_config": {**QWEN3_TOWER, "deepstack_visual_indexes": [0]}, "text_config": {**TEXT, **MROPE}, **QWEN_IDS},
        QWEN_TOKENS, chatml(QWEN_PHOTO), "Qwen3VLProcessor", QWEN_IMAGES, ends=("<|im_end|>", "</s>"), alone=True,
    ),
    "Qwen3.5": Tiny(  # unverified; a linear layer and one of full attention
        "qwen3_5",
        {"vision_config": QWEN3_TOWER,
         "text_config": {**TEXT, **MROPE, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16,
                         "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}, **QWEN_IDS},
        QWEN_TOKENS, chatml(QWEN_PHOTO), "Qwen3VLProcessor", QWEN_IMAGES, ends=("<|im_end|>", "</s>"),
    ),
    "Gemma3": Tiny(  # unverified
        "gemma3",
        {"vision_config": {**SIGLIP, "vision_use_head": False}, "mm_tokens_per_image": 4, "boi_token_index": "@<start_of_image>",
         "eoi_token_index": "@<end_of_image>", "image_token_index": "@<image_soft_token>",
         "text_config": {**TEXT, "sliding_window": 256, "layer_types": ["sliding_attention", "full_attention"]}},
        ("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>", "<end_of_turn>"),
        role(turns("<start_of_image>", "<start_of_turn>ROLE\n", "<end_of_turn>\n", BOS, "model"), "model"), "Gemma3Processor",
        {"image_processor_type": "Gemma3ImageProcessor", "size": SQUARE}, {"image_seq_length": 4}, bos=True,
        ends=("</s>", "<end_of_turn>"),
        named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    ),
    "PaliGemma": Tiny(  # no template; the processor writes BOS and the line break
        "paligemma",
        {"vision_config": {**SIGLIP, "vision_use_head": False, "projection_dim": 64}, "projection_dim": 64, "hidden_size": 64,
         "image_token_index": "@<image>", "text_config": {"model_type": "gemma2", **TEXT, "sliding_window": 24, "final_logit_softcapping": 3.0}},
        (), "", "PaliGemmaProcessor", {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "image_seq_length": 16},
        alone=True, bos=True, template_in="",
    ),
    "AyaVision": Tiny(  # unverified
        "aya_vision",
        {"vision_config": {**SIGLIP, "vision_use_head": False}, "image_token_index": "@<|IMG_PATCH|>", "downsample_factor": 2,
         "text_config": {"model_type": "cohere2", **TEXT, "sliding_window": 64, "logit_scale": 0.25,
                         "layer_types": ["sliding_attention", "full_attention"]}},
        ("<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "<|START_OF_TURN_TOKEN|>",
         "<|END_OF_TURN_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>"),
        BOS + "{% for message in messages %}<|START_OF_TURN_TOKEN|>{{ '<|CHATBOT_TOKEN|><|START_RESPONSE|>' if message.role == "
        "'assistant' else '<|USER_TOKEN|>' }}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% if message.role == 'assistant' %}<|END_RESPONSE|>{% endif %}"
        "<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        "<|START_RESPONSE|>{% endif %}",
        "AyaVisionProcessor",
        {"image_processor_type": "GotOcr2ImageProcessor", "size": SQUARE, "crop_to_patches": True, "max_patches": 4},
        {"patch_size": PATCH, "img_size": SIDE, "downsample_factor": 2}, bos=True, ends=("<|END_OF_TURN_TOKEN|>",),
    ),
    "InternVL": Tiny(  # unverified; sizes in the configuration are lists
        "internvl",
        {"vision_config": {**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
         "text_config": {"model_type": "qwen2", **TEXT}, "image_token_id": "@<IMG_CONTEXT>", "image_seq_length": 4},
        ("<img>", "</img>", "<IMG_CONTEXT>", "<video>", *CHATML_TOKENS), chatml("<IMG_CONTEXT>\n"), "InternVLProcessor",
        {"image_processor_type": "GotOcr2ImageProcessor", "size": SQUARE, "crop_to_patches": True, "max_patches": 4},
        {"image_seq_length": 4}, ends=("<|im_end|>",),
        named={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
               "video_token": "<video>"},
    ),
    "Mllama": Tiny(  # unverified
        "mllama",
        {"vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
                           "attention_heads": 2, "vision_output_dim": 64, "image_size": SIDE, "patch_size": PATCH,
                           "intermediate_layers_indices": [0], "max_num_tiles": 2, "initializer_range": STD,
                           "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
         "text_config": {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1],
                         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
         "image_token_index": "@<|image|>"},
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>", "<|image|>"),
        turns("<|image|>", "<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", BOS), "MllamaProcessor",
        {"image_processor_type": "MllamaImageProcessor", "size": SQUARE, "max_image_tiles": 2}, bos=True,
        ends=("<|end_of_text|>", "<|eot_id|>"), alone=True,
    ),
    "LFM2-VL": Tiny(  # unverified; a convolution layer and one of attention
        "lfm2_vl",
        {"vision_config": {"model_type": "siglip2_vision_model", **{k: v for k, v in VISION.items() if k != "image_size"},
                           "num_patches": 16},
         "text_config": {"model_type": "lfm2", **{k: v for k, v in TEXT.items() if k != "head_dim"},
                         "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
         "image_token_id": "@<image>", "projector_hidden_size": 48},
        ("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *(f"<|img_row_{r}_col_{c}|>" for r in range(1, 5)
                                                                     for c in range(1, 5)), *CHATML_TOKENS),
        chatml("<image>", BOS), "Lfm2VlProcessor",
        {"image_processor_type": "Lfm2VlImageProcessorFast", "encoder_patch_size": PATCH, "tile_size": SIDE, "max_tiles": 4,
         "min_image_tokens": 4, "max_image_tokens": 16, "max_num_patches": 64},
        bos=True, ends=("<|im_end|>",), targets="q_proj,k_proj,v_proj,out_proj,w1,w2,w3",
    ),
}  # fmt: skip


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the model, its generation configuration and its processor's files; the folder. No processor is built, so the library
    alone decides how the files are loaded.
    """
    tiny = FAMILIES[name]
    words = tokenizer()
    if tiny.bos:
        words.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", "<s> $A $B", special_tokens=[("<s>", 1)]
        )
    image = () if "<image>" in tiny.special or tiny.model_type == "mllama" else ("<image>",)
    words.add_special_tokens({"additional_special_tokens": [*image, *tiny.special]})
    facts = _with_ids(dict(tiny.config), words)
    # Mllama's placeholder has no row in the output layer: it is the last token.
    size = len(words) - (tiny.model_type == "mllama")
    facts["text_config"] = {**facts["text_config"], "vocab_size": size}
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(tiny.model_type, **facts)).float()
    for name_, parameter in model.named_parameters():
        if not parameter.any():  # zeros at first: biases, class tokens, a projector
            torch.nn.init.normal_(parameter, std=STD)
        if name_.endswith("latents"):
            torch.nn.init.normal_(parameter)
        if "gate" in name_ and parameter.numel() == 1:
            torch.nn.init.constant_(parameter, 0.8)  # closed by default: the photo would change nothing
    model.generation_config = GenerationConfig(
        eos_token_id=words.convert_tokens_to_ids(list(tiny.ends)), pad_token_id=0
    )
    model.save_pretrained(folder)
    _write_processor(tiny, folder, words)
    return folder


def _write_processor(tiny: Tiny, folder: Path, words: Any) -> None:
    words.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    if tiny.named:
        facts["extra_special_tokens"] = dict(tiny.named)
    if tiny.template_in == "tokenizer_config.json":
        facts["chat_template"] = tiny.template
    elif tiny.template_in:
        text = tiny.template if tiny.template_in.endswith("jinja") else json.dumps({"chat_template": tiny.template})
        (folder / tiny.template_in).write_text(text, encoding="utf-8")
    path.write_text(json.dumps(facts), encoding="utf-8")
    options = {"processor_class": tiny.processor, **tiny.options}
    images = {**tiny.images, **(options if tiny.alone else {})}
    (folder / "preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")
    if not tiny.alone:
        (folder / "processor_config.json").write_text(json.dumps(options), encoding="utf-8")


def _with_ids(facts: dict[str, Any], words: Any) -> dict[str, Any]:
    found = {}
    for key, value in facts.items():
        if isinstance(value, dict):
            value = _with_ids(value, words)
        elif isinstance(value, str) and value.startswith("@"):
            value = words.convert_tokens_to_ids(value[1:])
        found[key] = value
    return found


save_idefics3, save_qwen2_vl, save_gemma3, save_mllama = (
    partial(save, name) for name in ("Idefics3", "Qwen2-VL", "Gemma3", "Mllama")
)
