"""Checkpoints: the adapter in the layout that peft, transformers and vLLM read, and loading that refuses what does not fit."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from catlib.data.records import write_atomically
from catlib.errors import InputError
from catlib.vlm.models import VLM

WEIGHTS, CONFIG, TRAINING = "adapter_model.safetensors", "adapter_config.json", "training.json"


def write_file(path: Path, data: bytes) -> None:
    """Write bytes by renaming a complete, synced temporary file; a failure leaves the former file as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def adapter_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained tensors under the names that peft saves them by, on the CPU."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save_adapter(vlm: VLM, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write adapter_config.json and then, as the last step, adapter_model.safetensors: each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    config = vlm.model.peft_config["default"]
    facts = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    facts |= {"inference_mode": True, "base_model_name_or_path": vlm.name}
    write_file(folder / CONFIG, json.dumps(facts, indent=2, sort_keys=True, default=str).encode())
    write_file(folder / WEIGHTS, save(dict(state or adapter_state(vlm.model)), metadata={"format": "pt"}))


def save_processor(processor: Any, folder: Path) -> None:
    """Tokenizer, chat template and processor_config.json, and the preprocessor_config.json that other engines read."""
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    write_file(folder / "preprocessor_config.json", processor.image_processor.to_json_string().encode())


def save_checkpoint(vlm: VLM, folder: Path, training: Mapping[str, Any], card: str) -> None:
    """The whole checkpoint. `training`: settings, data digests, metrics (training.json); `card`: the model card.

    training_args.bin is written because the Hub's tools look for it. It is a pickle, so nothing here ever reads it.
    """
    save_processor(vlm.processor, folder)
    torch.save(dict(training.get("settings", {})), folder / "training_args.bin")
    write_atomically(folder / TRAINING, json.dumps(dict(training), indent=1, ensure_ascii=False))
    write_atomically(folder / "README.md", card)
    save_adapter(vlm, folder)


def base_of(adapter: Path) -> str:
    """The base model that an adapter names. Raises InputError when the folder holds no adapter."""
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise InputError(f"{adapter}: no {name}; this folder holds no adapter")
    try:
        base = json.loads((adapter / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except ValueError as error:
        raise InputError(f"{adapter / CONFIG}: not JSON: {error}") from None
    if not base:
        raise InputError(f"{adapter / CONFIG} names no base model (base_model_name_or_path); name it yourself")
    return base


def load_adapter(vlm: VLM, adapter: Path, trainable: bool = False) -> None:
    """Put an adapter's weights into `vlm`; for inference they take the base's dtype.

    Raises InputError when the base is not the one it was trained on, or a tensor is missing, left over or of another shape:
    peft itself would only warn, and answer with an untrained adapter.
    """
    base_of(adapter)
    facts = read_training(adapter)
    if (expected := facts.get("base_fingerprint")) and expected != (found := fingerprint(vlm)):
        raise InputError(
            f"{adapter} was trained on {facts.get('base_model')!r} (fingerprint {expected}), not on {vlm.name!r} ({found})"
        )
    try:
        saved = load_file(adapter / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{adapter / WEIGHTS}: broken: {error}") from None
    config = PeftConfig.from_pretrained(str(adapter))
    try:
        model = PeftModel(vlm.model, config, autocast_adapter_dtype=trainable)
    except ValueError as error:
        raise InputError(f"{adapter / CONFIG} does not fit {vlm.name!r}: {str(error).splitlines()[0]}") from None
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    problems = [
        *(f"{name} is missing" for name in wanted.keys() - shapes.keys()),
        *(f"{name} is left over" for name in shapes.keys() - wanted.keys()),
        *(
            f"{n} is {shapes[n]} in place of {wanted[n]}"
            for n in wanted.keys() & shapes.keys()
            if shapes[n] != wanted[n]
        ),
    ]
    if problems:
        raise InputError(
            f"{adapter / WEIGHTS} does not fit {vlm.name!r}: {len(problems)} tensors, first: {sorted(problems)[0]}"
        )
    set_peft_model_state_dict(model, saved)
    if not trainable:
        dtype = model.get_input_embeddings().weight.dtype
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data = parameter.data.to(dtype)
        model.requires_grad_(False).eval()
    vlm.model, vlm.adapter = model, adapter


def read_training(adapter: Path) -> dict[str, Any]:
    """What training wrote beside the adapter; empty for an adapter made by another tool."""
    path = adapter / TRAINING
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def fingerprint(vlm: VLM) -> str:
    """16 hex digits that change with the base's weights and are the same in bf16, float32 and 4-bit.

    Hashes what is never quantized, rounded to bf16: all norms and biases of the language model, rows of the embeddings, the
    shapes of everything. Adapters and a projector that is trained do not count.
    """
    digest = hashlib.sha256(type(vlm.base).__name__.encode())
    language_model = vlm.base.get_submodule(vlm.anatomy.language_model)
    embeddings = vlm.base.get_input_embeddings().weight
    rows = embeddings[:: max(1, len(embeddings) // 256)]
    vectors = [p for n, p in language_model.named_parameters() if p.dim() == 1 and "lora_" not in n]
    for tensor in (rows, *vectors):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def copy_adapter(source: Path, target: Path) -> None:
    """Copy a checkpoint's files (no folders) by renaming whole files, the weights last."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda p: p.name == WEIGHTS):
        if path.is_file() and not path.name.startswith("."):
            temporary = target / f".{path.name}.{os.getpid()}"
            shutil.copyfile(path, temporary)
            temporary.replace(target / path.name)
