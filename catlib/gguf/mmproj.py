"""The mmproj file of a LLaVA with a CLIP tower. llama.cpp's converter writes Pixtral's, and refuses `clip_vision_model`."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from transformers import CLIPVisionConfig

from catlib.errors import InputError, MissingExtra
from catlib.files import read_json

PARTS = ("vision_tower.", "multi_modal_projector.")
PROJECTOR = {f"{PARTS[1]}linear_1": "mm.0", f"{PARTS[1]}linear_2": "mm.2"}  # LLaVA's, by llama.cpp's count
UNUSED = "post_layernorm"  # of the class token alone; LLaVA reads the layers below it


def write_clip_mmproj(folder: Path, out: Path, half: bool = True) -> None:
    """Tower and projector of the plain model in `folder` (the hub's names) as `out`; matrices in float16, or float32.

    Only the layers that the model reads are written, and `feature_layer` says which one is last: without it llama.cpp leaves
    out one more. Raises InputError for a tower or projector that llama.cpp's graph has no place for; MissingExtra.
    """
    try:
        import gguf
    except ImportError:
        raise MissingExtra("gguf", "gguf", "exporting to llama.cpp") from None

    config = read_json(folder / "config.json")
    images = read_json(folder / "preprocessor_config.json")
    vision = {k: v for k, v in config["vision_config"].items() if k not in ("model_type", "dtype")}
    vision = CLIPVisionConfig(**vision).to_dict()  # config.json leaves what is the class's default out
    layers = _layers(config, vision)
    writer = gguf.GGUFWriter(str(out), "clip")
    writer.add_type("mmproj")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(vision["image_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_projection_dim(config["text_config"]["hidden_size"])
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(vision["layer_norm_eps"])
    writer.add_vision_block_count(layers)
    writer.add_array("clip.vision.feature_layer", [layers])
    writer.add_vision_image_mean(images["image_mean"])
    writer.add_vision_image_std(images["image_std"])
    if vision["hidden_act"] != "quick_gelu":  # what llama.cpp takes without a word
        writer.add_vision_use_gelu(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():
                layer = re.search(r"encoder\.layers\.(\d+)", name)
                if not name.startswith(PARTS) or UNUSED in name or (layer and int(layer[1]) >= layers):
                    continue
                module, _, kind = name.rpartition(".")
                known = PROJECTOR.get(module)
                target = f"{known}.{kind}" if known else names.get_name(name, try_suffixes=(".weight", ".bias"))
                if target is None:
                    raise InputError(f"{folder}: llama.cpp has no place for the tensor {name}")
                data = tensors.get_tensor(name).float().numpy()
                matrix = data.ndim > 1 and "position_embd" not in target
                writer.add_tensor(target, data.astype(np.float16) if half and matrix else data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _layers(config: dict[str, Any], vision: dict[str, Any]) -> int:
    """How many of the tower's layers LLaVA reads."""
    layer, strategy = config.get("vision_feature_layer", -2), config.get("vision_feature_select_strategy", "default")
    total = vision["num_hidden_layers"]
    if not isinstance(layer, int) or strategy != "default" or vision["hidden_act"] not in ("quick_gelu", "gelu"):
        raise InputError(
            f"llama.cpp's LLaVA takes one layer of the tower without its class token and a (quick) GELU; this model has "
            f"vision_feature_layer {layer}, strategy {strategy!r}, {vision['hidden_act']}"
        )
    return layer if layer >= 0 else total + 1 + layer
