"""A vision-language model in memory: found, loaded in the right precision or in 4-bit, its three parts named by full path."""

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from catlib.errors import InputError

log = logging.getLogger(__name__)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOWERS = ("model.vision_tower", "model.vision_model", "model.visual", "model.vision_encoder")
PROJECTORS = ("model.multi_modal_projector", "model.connector", "model.visual.merger", "model.vision_projector")
LANGUAGE_MODELS = ("model.language_model", "model.text_model", "model.text_decoder")


@dataclass(frozen=True)
class Anatomy:
    """Full module paths of the three parts. Matching by last names would hit the tower's layers as well."""

    tower: str
    projector: str
    language_model: str

    @classmethod
    def of(cls, model: torch.nn.Module) -> "Anatomy":
        """The parts of LLaVA, Pixtral, Idefics3/SmolVLM and Qwen-VL models. Raises InputError when a part is not found."""
        names = {name for name, _ in model.named_modules()}
        found = []
        for part, candidates in (
            ("vision tower", TOWERS),
            ("projector", PROJECTORS),
            ("language model", LANGUAGE_MODELS),
        ):
            path = next((candidate for candidate in candidates if candidate in names), None)
            if path is None:
                raise InputError(
                    f"{type(model).__name__}: no {part} found under {', '.join(candidates)}; this architecture is not supported"
                )
            found.append(path)
        return cls(*found)


@dataclass
class VLM:
    """A loaded model with its processor. `adapter` is the checkpoint folder whose LoRA weights are in it, if any."""

    model: torch.nn.Module
    processor: Any
    name: str
    anatomy: Anatomy
    adapter: Path | None = None

    @property
    def base(self) -> torch.nn.Module:
        """The transformers model itself, adapters injected, without peft's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def projector(self) -> torch.nn.Module:
        return self.base.get_submodule(self.anatomy.projector)


def pick_device(device: str = "auto") -> torch.device:
    """`auto` is the first GPU where there is one, Apple's GPU, or the CPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies it in hardware, else float32. float16 is not offered: its range is too
    small for training without loss scaling.
    """
    if dtype != "auto":
        return DTYPES[dtype]
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else device.type == "cpu" and _cpu_multiplies_bf16()
    return torch.bfloat16 if fast else torch.float32


@cache
def _cpu_multiplies_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def load_processor(ref: str) -> Any:
    """The processor of a model. Raises InputError when it is missing or has no chat template."""
    try:
        processor = AutoProcessor.from_pretrained(ref)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"model {ref!r} has no usable processor: it needs tokenizer files and processor_config.json or "
            f"preprocessor_config.json ({_first_line(error)})"
        ) from None
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise InputError(f"model {ref!r} has no image-and-text processor; found only a {type(processor).__name__}")
    if not getattr(processor, "chat_template", None) and not getattr(processor.tokenizer, "chat_template", None):
        raise InputError(f"model {ref!r}: its processor has no chat template (chat_template.jinja is missing)")
    return processor


def load_base(ref: str, device: torch.device, dtype: torch.dtype, quantize: bool = False) -> torch.nn.Module:
    """A base model's weights: plain in `dtype`, or the language model in 4-bit NF4 (double quantization, bf16 compute).

    In 4-bit the tower, the projector and the output layer stay unquantized; bitsandbytes matches its skip list against full
    paths, so they are named in full (https://arxiv.org/abs/2305.14314 for NF4).
    """
    if not ref:
        raise InputError("base_model is empty: name a hub model or a folder")
    extra: dict[str, Any] = {}
    try:
        if quantize:
            skipped = [*TOWERS, *PROJECTORS, "lm_head"]
            extra["quantization_config"] = quantization(skipped)
            dtype = torch.bfloat16
        model = AutoModelForImageTextToText.from_pretrained(ref, dtype=dtype, device_map={"": device}, **extra)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"base model {ref!r} cannot be loaded: {_first_line(error)}") from None
    model.requires_grad_(False)
    if quantize and device.type == "cpu":
        _let_go_of_the_file(model)
    return model.eval()


def _let_go_of_the_file(model: torch.nn.Module) -> None:
    """Copy what was not quantized: as views of the mapped weights file it would keep all of the unquantized file resident."""
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            parameter.data = parameter.data.clone()


def quantization(skipped: list[str]) -> BitsAndBytesConfig:
    """QLoRA's 4-bit settings; `skipped` are full module paths that stay as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skipped,
    )


def load_vlm(
    base: str, *, adapter: Path | None = None, device: str = "auto", dtype: str = "auto", quantize: bool = False
) -> VLM:
    """A model ready to answer: the base, or the base with a tuned adapter.

    `base` may be empty when an adapter is given: its `adapter_config.json` names the base. Raises InputError when a folder
    has no processor, or when the adapter does not fit (see `catlib.vlm.checkpoint.load_adapter`).
    """
    from catlib.vlm.checkpoint import base_of, load_adapter  # it imports this module

    where = pick_device(device)
    if adapter is not None:
        base = base or base_of(adapter)
    processor = load_processor(base)
    model = load_base(base, where, pick_dtype(dtype, where), quantize)
    vlm = VLM(model, processor, base, Anatomy.of(model))
    if adapter is not None:
        load_adapter(vlm, adapter)
    return vlm


def empty_model(config: Any) -> torch.nn.Module:
    """A model of this configuration on the meta device: structure and shapes without weights or memory."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def load_config(ref: str) -> Any:
    """The configuration of a hub model or folder. Raises InputError."""
    try:
        return AutoConfig.from_pretrained(ref)
    except (OSError, ValueError) as error:
        raise InputError(f"no configuration for model {ref!r}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
