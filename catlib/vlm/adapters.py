"""Adapters in the layout that peft, transformers and vLLM read: saving, and loading that refuses what does not fit."""

import hashlib
import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from catlib.errors import InputError
from catlib.files import read_json, read_text, saving, write_bytes, write_json, write_text
from catlib.vlm.models import VLM
from catlib.vlm.processors import TRIAL_S, ends_in_time, from_files, is_doubtful

WEIGHTS, CONFIG, TRAINING = "adapter_model.safetensors", "adapter_config.json", "training.json"
MOST_RANK = 2**16
DIGEST = f"{WEIGHTS}.sha256"  # SHA-256 of the weights, and of those that they replaced


def save_adapter(vlm: VLM, folder: Path) -> None:
    """Write adapter_config.json and then, as the last step, adapter_model.safetensors: each whole or not at all.

    The digest of the weights goes first, the one of those before stays beside it: a kill in between leaves weights that fit.
    """
    config = vlm.model.peft_config["default"]
    facts = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    facts |= {"inference_mode": True, "base_model_name_or_path": vlm.name}
    write_text(folder / CONFIG, json.dumps(facts, indent=2, sort_keys=True, default=str))
    state = get_peft_model_state_dict(vlm.model, save_embedding_layers=False)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    data = save(weights, metadata={"format": "pt"})
    earlier = read_text(folder / DIGEST).splitlines()[:1] if (folder / DIGEST).is_file() else []
    write_text(folder / DIGEST, "\n".join([hashlib.sha256(data).hexdigest(), *earlier]) + "\n")
    write_bytes(folder / WEIGHTS, data)


def save_processor(processor: Any, folder: Path) -> None:
    """Tokenizer, chat template and processor_config.json, and the preprocessor_config.json that other engines read.

    Written beside the earlier ones, which are replaced when all is there: a full disk leaves them whole.
    """
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".processor.writing-") as name:
            processor.save_pretrained(name)
            write_text(Path(name) / "preprocessor_config.json", processor.image_processor.to_json_string())
            for path in [path for path in Path(name).rglob("*") if path.is_file()]:
                target = folder / path.relative_to(name)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)


def save_checkpoint(vlm: VLM, folder: Path, training: Mapping[str, Any], card: str, arguments: Any) -> None:
    """The whole checkpoint. `training`: settings, data digests, metrics (training.json); `card`: the model card.

    training_args.bin (transformers' `arguments`) is written because the Hub's tools look for it. It is a pickle, so nothing here
    ever reads it.
    """
    save_processor(vlm.processor, folder)
    packed = io.BytesIO()
    torch.save(arguments, packed)
    write_bytes(folder / "training_args.bin", packed.getvalue())
    write_json(folder / TRAINING, dict(training))
    write_text(folder / "README.md", card)
    save_adapter(vlm, folder)


def base_of(adapter: Path) -> str:
    """The base model that an adapter names. Raises InputError when the folder holds no adapter."""
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise InputError(f"{adapter}: no {name}; this folder holds no adapter")
    base = read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise InputError(f"{adapter / CONFIG} names no base model (base_model_name_or_path); name it yourself")
    return base


def check_weights(adapter: Path) -> None:
    """Raise InputError when the weights' file is not the one that was written; one of other tools has no digest to compare."""
    if not (adapter / DIGEST).is_file():
        return
    try:
        with (adapter / WEIGHTS).open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{adapter / WEIGHTS}: {error.strerror}") from None
    if found not in read_text(adapter / DIGEST).split():
        raise InputError(
            f"{adapter / WEIGHTS} is not what the training wrote: its SHA-256 is {found}, not the one in {DIGEST}. The file is "
            f"damaged or was replaced; copy the folder again, or, if you changed the weights yourself, delete {DIGEST}"
        )


def load_adapter(vlm: VLM, adapter: Path, trainable: bool = False) -> None:
    """Put an adapter's weights into `vlm`; for inference they take the base's dtype.

    Raises InputError when the base is not the one it was trained on, or a tensor is missing, left over or of another shape:
    peft itself would only warn, and answer with an untrained adapter.
    """
    facts = read_training(adapter)
    if (expected := facts.get("base_fingerprint")) and expected != (found := fingerprint(vlm)):
        raise InputError(
            f"{adapter} was trained on {facts.get('base_model')!r} (fingerprint {expected}), not on {vlm.name!r} ({found})"
        )
    check_weights(adapter)
    _check_patterns(vlm, adapter)
    try:
        saved = load_file(adapter / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{adapter / WEIGHTS}: broken: {error}") from None
    try:
        config = from_files(PeftConfig, str(adapter))
        model = PeftModel(vlm.base, config, autocast_adapter_dtype=trainable)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{adapter / CONFIG} does not fit {vlm.name!r}: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    problems = [
        *(f"{name} is missing" for name in wanted.keys() - shapes.keys()),
        *(f"{name} is left over" for name in shapes.keys() - wanted.keys()),
        *(f"{n} is {shapes[n]} in place of {wanted[n]}" for n in wanted if n in shapes and shapes[n] != wanted[n]),
    ]
    if problems:
        raise InputError(
            f"{adapter / WEIGHTS} does not fit {vlm.name!r}: {len(problems)} tensors, first: {sorted(problems)[0]}"
        )
    set_peft_model_state_dict(model, saved)
    if not trainable:
        dtype = vlm.dtype
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data = parameter.data.to(dtype)
        model.requires_grad_(False).eval()
    vlm.model, vlm.checkpoint = model, replace(vlm.checkpoint, adapter=adapter)


def _check_patterns(vlm: VLM, adapter: Path) -> None:
    """Raise InputError for a regular expression in the configuration that does not end on the model's names, and a rank of no adapter."""
    facts = read_json(adapter / CONFIG)
    texts = [facts.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    texts += [key for name in ("rank_pattern", "alpha_pattern") for key in (facts.get(name) or {})]
    doubtful = [text for text in texts if isinstance(text, str) and is_doubtful(text)]
    names = [name for name, _ in vlm.base.named_modules()]
    if doubtful and not ends_in_time(json.dumps({"patterns": doubtful, "names": names})):
        raise InputError(f"{adapter / CONFIG}: the pattern {doubtful[0]!r:.200} does not end within {TRIAL_S} s")
    ranks = [facts.get("r"), *(facts.get("rank_pattern") or {}).values()]
    if any(isinstance(rank, int) and rank > MOST_RANK for rank in ranks):
        raise InputError(f"{adapter / CONFIG}: a rank above {MOST_RANK}")


def read_training(folder: Path) -> dict[str, Any]:
    """What training wrote beside the adapter; empty for an adapter made by another tool."""
    path = folder / TRAINING
    return read_json(path) if path.is_file() else {}


def fingerprint(vlm: VLM) -> str:
    """16 hex digits that change with the base's weights and are the same in bf16, float32 and 4-bit.

    Hashes what is never quantized, rounded to bf16: all norms and biases of the language model, rows of the embeddings, the
    shapes of everything. Adapters and a projector that is trained do not count.
    """
    digest = hashlib.sha256(type(vlm.base).__name__.encode())
    language_model = vlm.base.get_submodule(vlm.family.language_model)
    embeddings = vlm.base.get_input_embeddings().weight
    rows = embeddings[:: max(1, len(embeddings) // 256)]
    vectors = [p for n, p in language_model.named_parameters() if p.dim() == 1 and "lora_" not in n]
    for tensor in (rows, *vectors):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
