"""LLaVA-1.5-7B's true widths with random weights: a slice of two layers as a folder, or the whole in NF4, built in memory."""

import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from catlib.training.memory import model_config
from catlib.vlm.families import UNQUANTIZED, family_of
from catlib.vlm.models import VLM, Checkpoint, empty_model, quantization

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny_encoders import TEMPLATE, tokenizer

NAME = "llava-hf/llava-1.5-7b-hf"


def config_of_7b(layers: int = 32) -> Any:
    """LLaVA-1.5-7B's configuration, with the ids of the small tokenizer that stands in for its own."""
    config = model_config(NAME)
    words = tokenizer()
    config.text_config.num_hidden_layers = layers
    config.image_token_index = config.image_token_id = words.convert_tokens_to_ids("<image>")
    config.text_config.pad_token_id, config.text_config.bos_token_id, config.text_config.eos_token_id = 0, 1, 2
    return config


def processor_of_7b() -> LlavaProcessor:
    """336 pixels, patches of 14: 576 image tokens."""
    side = {"height": 336, "width": 336}
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=side),
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def save_slice(folder: Path, layers: int = 2) -> Path:
    """The whole tower, projector, embeddings and output layer, and so many of the 32 layers, in bf16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlavaForConditionalGeneration(config_of_7b(layers)).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    processor_of_7b().save_pretrained(folder)
    return folder


def save_empty_7b(folder: Path) -> Path:
    """Configuration and processor of the whole, without weights."""
    config_of_7b().save_pretrained(folder)
    processor_of_7b().save_pretrained(folder)
    return folder


def build_7b_in_nf4(name: str) -> VLM:
    """The whole model: each matrix is drawn at random in bf16 and quantized before the next one is made."""
    config = config_of_7b()
    model = empty_model(config).to(torch.bfloat16)
    settings = quantization(list(UNQUANTIZED))
    replace_with_bnb_linear(model, settings.llm_int8_skip_modules, settings)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            drawn = torch.empty(parameter.shape, dtype=torch.bfloat16)
            if drawn.dim() == 1:
                drawn.fill_(1.0 if key == "weight" else 0.0)
            else:
                drawn.normal_(std=0.02, generator=generator)
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.nn.Params4bit(
                    drawn, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module
                )
                module.weight = weight.to("cpu")
            else:
                module._parameters[key] = torch.nn.Parameter(drawn, requires_grad=False)
    _fill_buffers(model, config)
    model.is_loaded_in_4bit, model.config.quantization_config = True, settings
    model.requires_grad_(False).eval()
    return VLM(model, processor_of_7b(), Checkpoint(name, name), family_of(model))


def _fill_buffers(model: torch.nn.Module, config: Any) -> None:
    """Positions and rotary frequencies, which are computed and not drawn: taken from a model of one layer each."""
    small = config.__class__(**{**config.to_dict()})
    small.text_config.num_hidden_layers, small.vision_config.num_hidden_layers = 1, 2
    small.text_config.hidden_size, small.text_config.intermediate_size, small.text_config.num_attention_heads = (
        128,
        8,
        1,
    )
    real = LlavaForConditionalGeneration(small)
    values = dict(real.named_buffers())
    for name, buffer in list(model.named_buffers()):
        owner, _, key = name.rpartition(".")
        if buffer.is_meta:
            if values[name].shape != buffer.shape:
                raise ValueError(f"{name}: {values[name].shape} in place of {buffer.shape}")
            model.get_submodule(owner)._buffers[key] = values[name]
