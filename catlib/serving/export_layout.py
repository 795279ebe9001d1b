"""The names of a plain checkpoint's weights as the hub has them, which vLLM and llama.cpp's converter read."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from catlib.files import read_json, write_json

INDEX = "model.safetensors.index.json"
# towers whose weights the hub keeps one level deeper than transformers 5 writes them for a model built from a configuration
DEEPER = ("clip_vision_model", "siglip_vision_model")
TOWER, HUB_TOWER = "vision_tower.", "vision_tower.vision_model."


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
    if tower in DEEPER and name.startswith(TOWER) and not name.startswith(HUB_TOWER):
        return HUB_TOWER + name.removeprefix(TOWER)
    return name


def lacks_hub_names(folder: Path) -> bool:
    """Whether some tensor has another name on the hub."""
    tower = tower_type(folder)
    return any(hub_name(name, tower) != name for name in weight_names(folder))


def to_hub_layout(folder: Path) -> int:
    """Rename the tensors of a saved LLaVA in place, file by file; returns how many got another name."""
    tower, renamed = tower_type(folder), 0
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as tensors:
            changed = sum(hub_name(name, tower) != name for name in tensors.keys())
        if changed:
            renamed += changed
            save_file({hub_name(n, tower): t for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    if renamed and (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        index["weight_map"] = {hub_name(name, tower): file for name, file in index["weight_map"].items()}
        write_json(folder / INDEX, index)
    return renamed
