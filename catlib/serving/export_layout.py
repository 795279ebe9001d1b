"""The names of a plain checkpoint's weights as the hub has them, which vLLM and llama.cpp's converter read."""

import re
from pathlib import Path

from safetensors import safe_open

from catlib.files import read_json
from catlib.vlm.families import HUB_TOWERS


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder."""
    return sorted(folder.glob("*.safetensors"))


def weight_names(folder: Path) -> set[str]:
    """The names of all tensors of a checkpoint folder, without loading them."""
    names: set[str] = set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as tensors:
            names.update(tensors.keys())
    return names


def tower_type(folder: Path) -> str:
    """`model_type` of the vision configuration in a folder's config.json, empty where there is none."""
    return str((read_json(folder / "config.json").get("vision_config") or {}).get("model_type", ""))


def hub_name(name: str, tower: str) -> str:
    """The hub's name of a LLaVA tensor; `tower` is the `model_type` of the vision configuration.

    >>> hub_name("vision_tower.encoder.layers.0.layer_norm1.bias", "clip_vision_model")
    'vision_tower.vision_model.encoder.layers.0.layer_norm1.bias'
    """
    deeper = HUB_TOWERS.get(tower, "")
    return re.sub(rf"^((?:model\.)?vision_tower\.)(?!{re.escape(deeper)})", rf"\g<1>{deeper}", name) if deeper else name


def lacks_hub_names(folder: Path) -> bool:
    """Whether some tensor has another name on the hub."""
    tower = tower_type(folder)
    return any(hub_name(name, tower) != name for name in weight_names(folder))
