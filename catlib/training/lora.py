"""What is trained: LoRA on the language model's linear layers, matched by full path, and the projector on request."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES

from catlib.errors import CatlibError, InputError
from catlib.paths import resolve
from catlib.settings import TrainSettings, split_list
from catlib.training.kernels import quant_state
from catlib.vlm.adapters import load_adapter
from catlib.vlm.families import Family, family_of
from catlib.vlm.models import VLM

log = logging.getLogger(__name__)
USUAL_RANKS = (16, 32)  # the plan's
OF_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "modules_to_save")


def with_alpha(settings: TrainSettings) -> TrainSettings:
    """The settings with `lora_alpha` worked out: 0 stands for 2r, so that runs of different ranks have one scale."""
    return settings if settings.lora_alpha else replace(settings, lora_alpha=2 * settings.lora_r)


def rank_remark(settings: TrainSettings) -> str:
    """What is unusual about the rank; empty where nothing is, or no LoRA is trained."""
    low, high = USUAL_RANKS
    usual = settings.mode == "projector" or low <= settings.lora_r <= high
    return "" if usual else f"lora_r {settings.lora_r} is outside the usual {low} to {high}"


def recompute(model: Any) -> None:
    """Let a model compute activations again in the backward pass in place of keeping them."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # the other name goes with transformers 6
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def lora_module_names(model: torch.nn.Module, targets: Sequence[str], family: Family | None = None) -> list[str]:
    """Full paths of the language model's linear layers whose last name is among `targets`, in the model's order.

    Never those of a vision tower, which may have a q_proj too. Raises InputError for a target without a layer.
    """
    prefix = (family or family_of(model)).language_model + "."
    layers = [n for n, m in model.named_modules() if n.startswith(prefix) and hasattr(m, "in_features")]
    last = {name: name.rsplit(".", 1)[-1] for name in layers}
    if missing := set(targets) - set(last.values()):
        there = ", ".join(sorted(set(last.values())))
        raise InputError(f"lora_targets: no layer {', '.join(sorted(missing))} in {prefix[:-1]}; it has {there}")
    return [name for name in layers if last[name] in targets]


def lora_config(model: torch.nn.Module, settings: TrainSettings, family: Family | None = None) -> LoraConfig:
    """peft's configuration for the settings; in mode `projector` there is no LoRA, the projector is trained in full.

    A pattern is matched against a module's whole path; peft would match a list against its end, which would hit namesakes.
    """
    family = family or family_of(model)
    full = settings.mode == "projector" or settings.train_projector == "full"
    names = [] if settings.mode == "projector" else lora_module_names(model, split_list(settings.lora_targets), family)
    if settings.mode != "projector" and settings.train_projector == "lora":
        linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        names += [name for name in linears if name.startswith(f"{family.projector}.")]
    pattern = "|".join(dict.fromkeys(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in names))
    matched = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)} if names else set()
    if matched != set(names):
        raise CatlibError(f"the LoRA pattern {pattern} matches {len(matched)} layers in place of {len(names)}")
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=with_alpha(settings).lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias="none",
        task_type="CAUSAL_LM",
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        target_modules=pattern or DUMMY_TARGET_MODULES,  # the latter: peft, there is no LoRA
        modules_to_save=[family.projector] if full else None,
    )


def add_lora(vlm: VLM, settings: TrainSettings) -> None:
    """Wrap the model for training: base frozen, adapters (and a projector trained in full) in float32.

    float32 because a bf16 weight of size 1 absorbs any update below 0.004. Raises CatlibError when nothing is trained, or
    something in the vision tower.
    """
    if remark := rank_remark(settings):
        log.warning("%s", remark)
    config = lora_config(vlm.model, settings, vlm.family)
    vlm.model.requires_grad_(False)
    if settings.init_adapter:
        checkpoint, folder = vlm.checkpoint, resolve(settings.init_adapter)
        wanted = {name for name, _ in vlm.model.named_modules() if re.fullmatch(str(config.target_modules), name)}
        load_adapter(vlm, folder, trainable=True)
        in_float32(vlm.model)
        vlm.checkpoint = checkpoint  # what is trained is another one
        own = vlm.model.peft_config["default"]
        found = {name for name, module in vlm.base.named_modules() if hasattr(module, "lora_A")}
        differ = [key for key in OF_LORA if getattr(own, key) != getattr(config, key)]
        other = [f"{key} {getattr(own, key)!r} in place of {getattr(config, key)!r}" for key in differ]
        if other := other + ["other lora_targets"] * (found != wanted):
            raise InputError(f"init_adapter: {folder} has {', '.join(other)}; set lora_* and train_projector as before")
        own.target_modules = config.target_modules  # as it is saved: a pattern and not hundreds of names
    else:
        vlm.model = peft_model(vlm.model, config)
    for module in vlm.model.modules():
        # On a CPU with AVX-512 bf16 bitsandbytes 0.50 repacks 4-bit weights for inference at the first forward pass in eval mode (a
        # validation), for good. What it calls then has no backward: no gradient would pass through, without any error.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (a plain attribute, which mypy takes for a tensor)
    tower, projector = f"{vlm.family.tower}.", f"{vlm.family.projector}."
    trained = [name for name, parameter in vlm.model.named_parameters() if parameter.requires_grad]
    if in_tower := [name for name in trained if tower in name and projector not in name]:
        raise CatlibError(f"{len(in_tower)} tensors of the vision tower would be trained, first {in_tower[0]}")
    if not trained:
        raise CatlibError("nothing is trained: mode and lora_targets leave no parameter")
    vlm.model.train()
    vlm.tower.eval()  # frozen: no dropout in it either


def peft_model(model: torch.nn.Module, config: LoraConfig, empty: bool = False) -> torch.nn.Module:
    """The model with adapters attached, everything that is trained in float32; `empty`: adapters without data, on the meta device."""
    return in_float32(get_peft_model(model, config, autocast_adapter_dtype=True, low_cpu_mem_usage=empty))


def in_float32(model: torch.nn.Module) -> torch.nn.Module:
    """The model with what is trained in float32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; 4-bit weights are counted by their original shape."""
    trainable = total = 0
    packed = {id(m.weight): state for m in model.modules() if "weight" in m._parameters and (state := quant_state(m))}
    for parameter in model.parameters():
        state = packed.get(id(parameter))
        n = state.shape.numel() if state is not None else parameter.numel()
        total += n
        trainable += n * parameter.requires_grad
    return trainable, total
