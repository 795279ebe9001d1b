"""vLLM's options for a LoRA adapter that is served unmerged, and which adapters it cannot serve so."""

import json
import shlex
from pathlib import Path
from typing import Any

from safetensors import safe_open

from catlib.errors import InputError
from catlib.vlm.adapters import CONFIG, WEIGHTS, base_of

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as --max-lora-rank
PREFIX = "base_model.model."  # peft's, before a module's path
PROJECTOR = "model.multi_modal_projector."
NAMES = {"model.language_model.": "language_model.model.", PROJECTOR: "multi_modal_projector."}  # LLaVA's paths in vLLM
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def lora_options(adapter: Path, name: str) -> list[str]:
    """The options that serve `adapter` under `name`. Raises InputError for one that vLLM cannot apply unmerged.

    LoRA on the projector takes --enable-tower-connector-lora, by which vLLM wraps the vision tower's layers as well, whatever
    the adapter holds, and then fails on a tower with a class token (vLLM 0.32: it counts the tower's rows by the image tokens).
    So the layers that have LoRA are named in full, and the tower stays as it is.
    """
    base_of(adapter)
    config: dict[str, Any] = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    advice = f"merge it: catlib export merge --checkpoint {shlex.quote(str(adapter))} --out MERGED, then serve --model MERGED"
    if saved := config.get("modules_to_save"):
        raise InputError(
            f"{adapter}: the adapter carries modules trained in full ({', '.join(saved)}), which vLLM does not apply. Either {advice}; "
            "or train the projector by LoRA (--train_projector lora), which can be served unmerged"
        )
    if config.get("use_dora"):
        raise InputError(f"{adapter}: vLLM does not apply DoRA adapters; {advice}")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    ceiling = next((r for r in RANKS if r >= rank), None)
    if ceiling is None:
        raise InputError(f"{adapter}: rank {rank} is over vLLM's largest, {RANKS[-1]}; {advice}")
    options = ["--enable-lora", "--max-lora-rank", str(ceiling), "--lora-modules", f"{name}={adapter}"]
    modules = lora_modules(adapter)
    if any(module.startswith(PROJECTOR) for module in modules):
        options += ["--enable-tower-connector-lora", "--lora-target-modules", *vllm_names(modules)]
    return options


def lora_modules(adapter: Path) -> list[str]:
    """Full paths of the layers that an adapter's weights belong to, as transformers names them."""
    with safe_open(adapter / WEIGHTS, framework="pt") as tensors:
        return sorted({name.removeprefix(PREFIX).split(".lora_")[0] for name in tensors.keys()})


def vllm_names(modules: list[str]) -> list[str]:
    """vLLM's paths of the layers, and those of the fused layers that they are parts of there.

    >>> vllm_names(["model.language_model.layers.0.self_attn.q_proj"])
    ['language_model.model.layers.0.self_attn.q_proj', 'language_model.model.layers.0.self_attn.qkv_proj']
    """
    names = set()
    for module in modules:
        prefix = next((prefix for prefix in NAMES if module.startswith(prefix)), "")
        path, _, last = (NAMES.get(prefix, "") + module.removeprefix(prefix)).rpartition(".")
        names |= {f"{path}.{last}", f"{path}.{FUSED.get(last, last)}"}
    return sorted(names)
