"""Adapters on disk: written whole or not at all, and put into a base only where each tensor has its place there."""

import hashlib
import io
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from transformers.utils.hub import cached_file

from catlib.errors import InputError
from catlib.files import digest_of, read_json, read_text, saving, write_bytes, write_json, write_text
from catlib.runs import CONFIG, DIGEST, TRAINING, WEIGHTS, read_training
from catlib.vlm.models import VLM
from catlib.vlm.processors import first_line, from_files

log = logging.getLogger(__name__)
SCHEME = "2:"  # of the fingerprints that are made now; those without a number are of the first
BY_PATTERN = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern")
# what it raises for a configuration of other types or values than it thinks of
NOT_AS_PEFT_EXPECTS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
SAMPLED = 64  # values of each tensor in a fingerprint


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
    """Tokenizer, chat template and processor_config.json, and the preprocessor_config.json that other engines read;
    written beside the earlier ones, which are replaced when all is there: a full disk leaves them whole.
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

    training_args.bin (transformers' `arguments`) is what the Hub's tools look for: a pickle, which nothing here ever reads.
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
        found = digest_of(adapter / WEIGHTS)
    except OSError as error:
        raise InputError(f"{adapter / WEIGHTS}: {error.strerror}") from None
    if found not in read_text(adapter / DIGEST).split():
        raise InputError(
            f"{adapter / WEIGHTS} is not what the training wrote: its SHA-256 is {found}, not the one in {DIGEST}. The file is "
            f"damaged or was replaced; copy the folder again, or, if you changed the weights yourself, delete {DIGEST}"
        )


def check_config(adapter: Path) -> None:
    """Compare the configuration with the weights' header, before anything is built from it.

    Raises InputError when ranks differ, a matrix of a pair is missing or does not fit the other, or a pattern might not end: only plain names are read as patterns.
    """
    facts = read_json(adapter / CONFIG)
    ranks, alphas = facts.get("rank_pattern") or {}, facts.get("alpha_pattern") or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise InputError(f"{adapter / CONFIG}: rank_pattern and alpha_pattern must be objects")
    if odd := [key for key in (*ranks, *alphas) if re.search(r"[*+{?(]", key)]:
        raise InputError(f"{adapter / CONFIG}: the pattern {odd[0]!r} repeats or groups; name the modules plainly")
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    try:
        with safe_open(adapter / WEIGHTS, framework="pt") as tensors:
            for name in tensors.keys():
                if part := re.match(r"(.+)\.lora_([AB])\.", name):
                    pairs.setdefault(part[1], {})[part[2]] = tuple(tensors.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{adapter / WEIGHTS}: broken: {error}") from None
    for module, found in pairs.items():
        if len(found) < 2:
            raise InputError(f"{adapter / WEIGHTS}: {module}.lora_{'B' if 'A' in found else 'A'} is missing")
        down, up = found["A"], found["B"]
        if len(down) < 2 or len(up) < 2 or down[0] != up[1] or down[0] not in (facts.get("r"), *ranks.values()):
            raise InputError(
                f"{adapter / WEIGHTS}: {module} has lora_B {up} and lora_A {down} in place of the rank in {CONFIG}, "
                f"r {facts.get('r')}"
            )


def load_adapter(vlm: VLM, adapter: Path, trainable: bool = False) -> None:
    """Put an adapter's weights into `vlm`; for inference they take the base's dtype.

    Which modules it changes is read off its weights, named as by transformers 4 or 5; the expression in its
    configuration is not run. Raises InputError when the base is not the one it was trained on, or a tensor is missing,
    left over or of another shape: peft itself would only warn, and answer with an untrained adapter.
    """
    facts = read_training(adapter)
    if expected := facts.get("base_fingerprint"):
        first = not expected.startswith(SCHEME)
        if first:
            log.warning("%s: a fingerprint of the first scheme, which sees norms and embeddings of the base", adapter)
        if expected != (found := _first_fingerprint(vlm) if first else fingerprint(vlm)):
            raise InputError(
                f"{adapter} was trained on {facts.get('base_model')!r} (fingerprint {expected}), not on {vlm.name!r} ({found})"
            )
    check_weights(adapter)
    check_config(adapter)
    try:
        config = from_files(PeftConfig, str(adapter))
        saved = convert_peft_adapter_state_dict_for_transformers(vlm.base, config, load_file(adapter / WEIGHTS))
        parts = {n: n.removeprefix("base_model.model.").split(".lora_")[0] for n in saved if ".lora_" in n}
        ranks = {module: len(saved[name]) for name, module in parts.items() if ".lora_A." in name}
        kind = "aLoRA" if getattr(config, "alora_invocation_tokens", None) else config.peft_type
        if kind != "LORA":
            raise ValueError(f"a {kind} adapter; only LoRA is known")
        stated = {name: getattr(config, name) for name in BY_PATTERN}
        config.target_modules = set(parts.values()) or DUMMY_TARGET_MODULES
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.rank_pattern = {re.escape(name): rank for name, rank in ranks.items() if rank != config.r}
        config.inference_mode = not trainable
        model = PeftModel(vlm.base, config, autocast_adapter_dtype=trainable)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{adapter / WEIGHTS}: broken: {error}") from None
    except NOT_AS_PEFT_EXPECTS as error:
        raise InputError(f"{adapter / CONFIG} does not fit {vlm.name!r}: {first_line(error)}") from None
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted, given = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (state, saved))
    if wrong := sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)):
        name = wrong[0]
        shapes = f"{given.get(name)} in place of {wanted.get(name)}"
        problem = "missing" if name not in given else "left over" if name not in wanted else shapes
        raise InputError(
            f"{adapter / WEIGHTS} does not fit {vlm.name!r}: {len(wrong)} tensors, first: {name} is {problem}"
        )
    set_peft_model_state_dict(model, saved)
    vars(config).update(stated)  # as others know it, who compare it or save it again
    if not trainable:
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data = parameter.data.to(vlm.dtype)
        model.requires_grad_(False).eval()
    vlm.model, vlm.checkpoint = model, replace(vlm.checkpoint, adapter=adapter)


def fingerprint(vlm: VLM) -> str:
    """The scheme's number and 16 hex digits that change with any tensor of the base, tower and projector included, and
    are the same however it is loaded, cut into files or named; empty where the base has no safetensors files.

    Hashes SAMPLED values of each tensor in the files, rounded to bf16, with its size and the end of its name.
    """
    options: dict[str, Any] = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    base, seen = vlm.checkpoint.base, []
    index = cached_file(base, "model.safetensors.index.json", **options)
    names = set(read_json(Path(index))["weight_map"].values()) if index else {"model.safetensors"}
    for path in filter(None, (cached_file(base, name, **options) for name in names)):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name).flatten()
                if tensor.is_floating_point() and not name.endswith("inv_freq"):
                    values = tensor[:: max(1, len(tensor) // SAMPLED) | 1].to(torch.bfloat16).tolist()
                    end = re.search(r"[^.]+\.\d+\..*|[^.]+\.[^.]+$", name)
                    seen.append(f"{end[0] if end else name} {len(tensor)} {values}")
    return SCHEME + hashlib.sha256("\n".join(sorted(seen)).encode()).hexdigest()[:16] if seen else ""


def _first_fingerprint(vlm: VLM) -> str:
    """The first scheme's: norms and biases of the language model and rows of the embeddings, as they are in memory."""
    digest = hashlib.sha256(type(vlm.base).__name__.encode())
    embeddings = vlm.base.get_input_embeddings().weight
    vectors = vlm.base.get_submodule(vlm.family.language_model).named_parameters()
    seen = [p for name, p in vectors if p.dim() == 1 and "lora_" not in name]
    for tensor in (embeddings[:: max(1, len(embeddings) // 256)], *seen):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
