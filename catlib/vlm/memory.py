"""How much memory a training run will need, computed before it: weights, adapters, optimizer, activations, logits, features.

Nothing is looked up in a table. The model is built without weights from its configuration, and what autograd keeps is counted
by running the real forward pass of one and of two layers on tensors without data (torch's FakeTensorMode).
"""

import json
import logging
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from catlib.errors import InputError
from catlib.paths import resolve
from catlib.settings import TrainSettings
from catlib.vlm.fused import fuse
from catlib.vlm.lora import count_parameters, lora_config, peft_model
from catlib.vlm.models import Anatomy, empty_model, load_config

log = logging.getLogger(__name__)
SHIPPED = {
    "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b-hf",
    "mistral-community/pixtral-12b": "pixtral-12b",
    "HuggingFaceTB/SmolVLM-256M-Instruct": "smolvlm-256m",
}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, an 8-bit scale for 64 weights, a float for 256 scales (arXiv 2305.14314)
TEXT_TOKENS = 40  # question and answer; the breeds' names have 2 to 13 tokens
ANSWER_TOKENS = 8
SLACK = 1.05  # the allocator's rounding and fragments
GB = 1e9


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a training step, by cause. `peak` is their sum with 5 % for the allocator."""

    batch_size: int
    image_tokens: int
    trainable_parameters: int
    parameters: int
    weights: int
    adapters: int  # float32 copies of what is trained
    gradients: int
    optimizer: int  # AdamW's two moments
    activations: int  # what the forward pass keeps for the backward pass
    logits: int
    features: int  # the batch's tower features, or the tower's own work where they are not cached
    transient: int  # the largest thing alive for a moment: one layer's recomputation, gradient or dequantized weight

    @property
    def peak(self) -> int:
        parts = self.weights + self.adapters + self.gradients + self.optimizer + self.activations
        return int(SLACK * (parts + self.logits + self.features + self.transient))

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "peak": self.peak}


def model_config(ref: str) -> Any:
    """A model's configuration: of a folder, of the few hub models whose shape is shipped with catlib, or from the hub."""
    if (folder := resolve(ref)).is_dir():
        return load_config(str(folder))
    if ref in SHIPPED:
        text = resources.files("catlib").joinpath("assets", "configs", f"{SHIPPED[ref]}.json").read_text(encoding="utf-8")
        facts = json.loads(text)
        return AutoConfig.for_model(facts.pop("model_type"), **facts)
    return load_config(ref)


def image_tokens_of(config: Any) -> int:
    """Image tokens of one photo: exact for LLaVA-1.5; the most there can be where a model keeps the photo's own shape."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    if vision.model_type == "pixtral":
        return side * (side + 1)  # a row break after each row
    if scale := getattr(config, "scale_factor", None):
        return 17 * (side // scale) ** 2 + 17 * 4  # 16 tiles and the whole photo, each between marks
    return side * side


def estimate(
    settings: TrainSettings, config: Any | None = None, image_tokens: int | None = None, dtype: torch.dtype | None = None
) -> Estimate:
    """The need of a training step as the settings say. Raises InputError when the model is not known or not supported.

    `dtype` of the base; by default bfloat16 unless the settings say float32.
    """
    config = config or model_config(settings.base_model)
    dtype = dtype or (torch.float32 if settings.dtype == "float32" else torch.bfloat16)
    if settings.mode == "qlora":
        dtype = torch.bfloat16
    tokens = image_tokens or image_tokens_of(config)
    model = empty_model(config)
    anatomy = Anatomy.of(model)
    weights, largest = _weight_bytes(model, anatomy, dtype, settings.mode == "qlora")
    parameters = sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    trainable, _ = count_parameters(peft_model(model, lora_config(model, settings, anatomy)))
    length = tokens + TEXT_TOKENS
    saved_one, saved_two = (_saved(config, settings, dtype, layers, length) for layers in (1, 2))
    layers = config.get_text_config().num_hidden_layers
    layer = saved_two - saved_one
    batch = settings.batch_size
    text, vision = config.get_text_config(), config.vision_config
    size = dtype.itemsize
    hidden_state = batch * length * text.hidden_size * size
    if settings.gradient_checkpointing:
        activations, recomputed = (saved_one - layer) + layers * hidden_state, layer
    else:
        activations, recomputed = saved_one + (layers - 1) * layer, 0
    features = batch * tokens * vision.hidden_size * size
    if not settings.cache_features or settings.augment:
        features += 4 * batch * tokens * (vision.hidden_size + vision.intermediate_size) * size
    gradient = 3 * batch * length * text.intermediate_size * size  # of the widest layer, before it is multiplied back
    return Estimate(
        batch_size=batch, image_tokens=tokens, trainable_parameters=trainable, parameters=parameters, weights=weights,
        adapters=4 * trainable, gradients=4 * trainable, optimizer=8 * trainable, activations=activations,
        logits=3 * batch * ANSWER_TOKENS * text.vocab_size * 4, features=features,
        transient=recomputed + gradient + (largest * 2 if settings.mode == "qlora" else 0),
    )  # fmt: skip


def largest_batch(settings: TrainSettings, vram: float, image_tokens: int | None = None, config: Any | None = None) -> int:
    """The largest batch (a power of two, 64 at most) whose estimate stays below `vram` bytes; 0 when not even 1 does."""
    fitting = 0
    config = config or model_config(settings.base_model)
    for batch in (1, 2, 4, 8, 16, 32, 64):
        if estimate(replace(settings, batch_size=batch), config, image_tokens).peak > vram:
            break
        fitting = batch
    return fitting


def device_memory(device: torch.device) -> float | None:
    """Bytes that are free on a GPU, or in this machine's memory for the CPU; None where it cannot be told."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    facts = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines())
    return 1024.0 * int(facts["MemAvailable"].split()[0])


def check_fits(settings: TrainSettings, device: torch.device, dtype: torch.dtype, config: Any, image_tokens: int) -> Estimate:
    """The estimate of a run. Raises InputError when the device has less memory, naming what would fit, unless `force`."""
    need = estimate(settings, config, image_tokens, dtype)
    free = device_memory(device)
    log.info("estimated peak memory %.2f GB%s", need.peak / GB, "" if free is None else f" of {free / GB:.1f} GB free")
    if free is None or need.peak <= free:
        return need
    batch = largest_batch(settings, free, image_tokens, config)
    message = f"training needs about {need.peak / GB:.1f} GB and {device} has {free / GB:.1f} GB free; " + (
        f"a batch_size of {batch} fits" if batch else "no batch fits: set gradient_checkpointing, or mode qlora"
    )
    if not settings.force:
        raise InputError(f"{message}; --force trains all the same")
    log.warning("%s; training all the same", message)
    return need


def _weight_bytes(model: torch.nn.Module, anatomy: Anatomy, dtype: torch.dtype, quantized: bool) -> tuple[int, int]:
    """(bytes of the frozen base, parameters of its largest quantizable matrix)."""
    prefix = anatomy.language_model + "."
    four_bit = {
        f"{name}.weight": module.weight.numel()
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, torch.nn.Linear)
    }
    plain = sum(p.numel() for name, p in model.named_parameters() if not (quantized and name in four_bit))
    packed = sum(four_bit.values()) if quantized else 0
    return int(plain * dtype.itemsize + packed * NF4_BYTES), max(four_bit.values())


def _saved(config: Any, settings: TrainSettings, dtype: torch.dtype, layers: int, length: int) -> int:
    """Bytes that autograd keeps for a batch through the projector and `layers` layers, counted on tensors without data."""
    small = AutoConfig.for_model(config.model_type, **{k: v for k, v in config.to_dict().items() if k != "model_type"})
    small.get_text_config().num_hidden_layers = layers
    if getattr(small.get_text_config(), "layer_types", None):
        small.get_text_config().layer_types = small.get_text_config().layer_types[:layers]
    small.vision_config.num_hidden_layers = max(1, abs(getattr(small, "vision_feature_layer", 1) or 1))
    kept: dict[int, int] = {}
    model = empty_model(small).to(dtype)
    anatomy = Anatomy.of(model)
    model.requires_grad_(False)
    model = peft_model(model, lora_config(model, replace(settings, lora_dropout=0.0), anatomy))  # dropout keeps nothing
    fuse(model)
    model.train()
    with FakeTensorMode():
        _make_fake(model)
        fixed = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in fixed:
                kept[storage._cdata] = storage.nbytes()
                alive.append(tensor)  # a storage that is freed would give its number to the next
            return tensor

        alive: list[torch.Tensor] = []
        base = model.get_base_model()
        text = config.get_text_config()
        trains_projector = any(p.requires_grad for n, p in base.named_parameters() if anatomy.projector in n)
        embeddings = torch.empty(settings.batch_size, length, text.hidden_size, dtype=dtype, requires_grad=trains_projector)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16),
        ):
            base.get_submodule(anatomy.language_model)(inputs_embeds=embeddings * 1, use_cache=False)
    projector = 3 * settings.batch_size * length * text.hidden_size * dtype.itemsize if trains_projector else 0
    return sum(kept.values()) + projector


def _make_fake(model: torch.nn.Module) -> None:
    """Replace a meta model's tensors by fake CPU ones: only those go through autocast and the real attention kernel's rules."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
