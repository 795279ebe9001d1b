"""A model on disk (Checkpoint) and in memory (VLM), and the loading of weights and configurations."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from catlib.breeds import BREEDS
from catlib.data.conversations import QUESTION
from catlib.errors import InputError
from catlib.vlm.families import UNQUANTIZED, Family
from catlib.vlm.processors import first_line, from_files
from catlib.vlm.threads import fit_threads

FULL = ("out of memory", "not enough memory", "can't allocate memory", "cublas_status_alloc_failed")  # a device's words
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Checkpoint:
    """What a folder or hub name says about itself; nothing is loaded. Made by `catlib.vlm.checkpoint.find_checkpoint`."""

    name: str  # as it was given
    base: str  # for from_pretrained
    adapter: Path | None = None  # the folder of the adapter that goes into the base
    folder: Path | None = None  # the checkpoint's own folder; None for a hub name
    base_name: str = ""  # the base as it was given or recorded, where that is another folder name than `base`
    breeds: tuple[str, ...] = tuple(breed.name for breed in BREEDS)  # of the training, else the 67
    question: str = QUESTION  # the one to ask
    trained_question: str = ""  # empty: not known
    spelled: Mapping[str, str] = field(
        default_factory=dict
    )  # answers that training taught, where they are more than a name
    max_pixels: int = 0  # of a photo, as the processor hands it on; 0: the processor's own size
    image_pool: int = 1  # rows and columns of a photo's tokens that are averaged before the projector
    training: Mapping[str, Any] = field(default_factory=dict)  # training.json
    remarks: tuple[str, ...] = ()  # what is asked otherwise than it was trained

    @property
    def mode(self) -> str:
        """How it was trained (projector, lora, qlora); empty when no record says so."""
        return str(self.training.get("settings", {}).get("mode", ""))

    def check_engines(self) -> None:
        """Raise InputError for a model that other programs would show its photos otherwise than it was trained."""
        if self.image_pool > 1:
            shown = f"image_pool {self.image_pool}: vLLM, llama.cpp and others would show it all of a photo's tokens"
            raise InputError(f"{self.name} was trained with {shown}. Only catlib can use it (predict, evaluate, serve)")

    @property
    def merged(self) -> bool:
        """Whether the folder holds a tuned model whole, without an adapter."""
        return self.adapter is None and bool(self.training) and self.base == str(self.folder)


@dataclass
class VLM:
    """A loaded model with its processor, where it comes from, and what is particular to its architecture."""

    model: Any  # the transformers model, or peft's wrapper around it
    processor: Any
    checkpoint: Checkpoint
    family: Family

    def __post_init__(self) -> None:
        if grid := getattr(getattr(self.processor, "image_processor", None), "image_grid_pinpoints", None):
            self.base.config.image_grid_pinpoints = grid  # the model finds a photo's tiles by a copy of its own
        language_model, head = self.base.get_submodule(self.family.language_model), self.base.get_output_embeddings()
        for part in (self.tower, language_model, head):
            fit_threads(part)

    @property
    def base(self) -> Any:
        """The transformers model itself, adapters injected, without peft's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def tower(self) -> Any:
        return self.base.get_submodule(self.family.tower)

    @property
    def projector(self) -> torch.nn.Module:
        return self.base.get_submodule(self.family.projector)

    @property
    def name(self) -> str:
        """The base model's folder or hub name, as it is recorded."""
        return self.checkpoint.base_name or self.checkpoint.base

    # the folder whose LoRA weights are in the model, and what is asked and answered: the checkpoint's
    adapter = property(lambda self: self.checkpoint.adapter)
    question = property(lambda self: self.checkpoint.question)
    breeds = property(lambda self: self.checkpoint.breeds)
    spelled = property(lambda self: self.checkpoint.spelled)
    device = property(lambda self: self.base.device)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: the dtype of the embeddings, since quantized weights are stored as bytes."""
        return self.base.get_input_embeddings().weight.dtype

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output layer's logits of the language model's last states, in float32, capped where the model caps them."""
        logits = self.base.get_output_embeddings()(hidden).float()
        cap = self.family.caps_logits and getattr(self.base.config.get_text_config(), "final_logit_softcapping", None)
        return cap * (logits / cap).tanh() if cap else logits


def pick_device(device: str = "auto") -> torch.device:
    """`auto` is the first GPU where there is one, Apple's GPU, or the CPU. A GPU by its number (cuda:1) becomes the process's own.

    Raises InputError for a number that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and (rank := os.environ.get("LOCAL_RANK")):  # of several processes each has a GPU of its own
        device = f"cuda:{int(rank) % max(1, torch.cuda.device_count())}"
    elif device.startswith("cuda:"):
        if int(device.removeprefix("cuda:")) >= (count := torch.cuda.device_count()):
            raise InputError(f"device {device}: this machine has {count} GPUs, counted from cuda:0")
        torch.cuda.set_device(device)
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies it in hardware, else float16 on a GPU and float32 elsewhere."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    multiplies = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "cpu" and multiplies else torch.float32


def load_base(
    ref: str, device: torch.device, dtype: torch.dtype, quantize: bool = False, attention: str = "auto"
) -> Any:
    """A base model's weights: plain in `dtype`, or the language model in 4-bit NF4 (double quantization, 16-bit compute).

    `attention`: transformers' name of an implementation; `auto`: the one that it takes itself, sdpa where there is one. In 4-bit
    the tower, the projector and the output layer stay unquantized; bitsandbytes matches its skip list against full paths, so they are
    named in full (https://arxiv.org/abs/2305.14314 for NF4). Raises InputError.
    """
    extra: dict[str, Any] = {"device_map": {"": device}, "output_loading_info": True}
    extra |= {} if attention == "auto" else {"attn_implementation": attention}
    if quantize:
        dtype = torch.float16 if dtype is torch.float16 else torch.bfloat16
        extra["quantization_config"] = quantization(list(UNQUANTIZED), dtype)
    try:
        model, found = from_files(AutoModelForImageTextToText, ref, dtype=dtype, **extra)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise InputError(f"base model {ref!r} cannot be loaded: {first_line(error)}") from None
    except RuntimeError as error:
        if "size" not in str(error):
            raise
        raise InputError(f"base model {ref!r}: weights of other shapes than its config.json says ({error})") from None
    wrong = [(kind, sorted(map(str, found[f"{kind}_keys"]))) for kind in ("missing", "unexpected", "mismatched")]
    if listed := "; ".join(f"{len(names)} {kind}, first {names[0]}" for kind, names in wrong if names):
        raise InputError(f"base model {ref!r}: its weights are not those that its config.json asks for: {listed}")
    model.requires_grad_(False)
    if quantize and device.type == "cpu":  # views of the mapped file would keep all of the unquantized file resident
        for parameter in model.parameters():
            if parameter.dtype.is_floating_point:
                parameter.data = parameter.data.clone()
    return model.eval()


def quantization(skipped: list[str], dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """QLoRA's 4-bit settings; `skipped` are full module paths that stay as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def empty_model(config: Any) -> Any:
    """A model of this configuration on the meta device: structure and shapes without weights or memory. Raises InputError."""
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except Exception as error:  # an entry that makes no sense, such as patches of size 0, raises anything
        raise InputError(f"no model can be built as configured: {type(error).__name__}: {first_line(error)}") from error


def load_config(ref: str) -> Any:
    """The configuration of a hub model or folder. Raises InputError."""
    try:
        return from_files(AutoConfig, ref)
    except (OSError, ValueError) as error:
        raise InputError(f"no configuration for model {ref!r}: {first_line(error)}") from None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory is full, in CUDA's words or the CPU allocator's."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in words for sign in FULL)
