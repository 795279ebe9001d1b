"""catlib's training settings as transformers' TrainingArguments, with whatever further options `trainer_args` names."""

import inspect
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from catlib.errors import InputError, MissingExtra
from catlib.files import parse_yaml
from catlib.paths import resolve
from catlib.settings import TrainSettings, did_you_mean, split_list
from catlib.training.sharding import Sharding
from catlib.vlm.models import VLM, pick_device

# Options that have a setting (their own, or one of another name), and those that the engine decides: accepted, they would do nothing,
# or harm.
SETTING = {n: n for n in split_list("output_dir, weight_decay, max_grad_norm, seed, save_steps, report_to")}
SETTING |= {"num_train_epochs": "epochs", "learning_rate": "lr", "warmup_steps": "warmup_ratio"}
SETTING |= dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), "batch_size")
SETTING |= dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), "gradient_checkpointing")
SETTING |= {"gradient_accumulation_steps": "gradient_accumulation", "bf16": "dtype", "logging_steps": "log_steps"}
SETTING |= {"use_cpu": "device", "dataloader_num_workers": "num_workers", "metric_for_best_model": "watch"}
SETTING["resume_from_checkpoint"] = "resume"
AS_SET = split_list(
    "weight_decay, max_grad_norm, epochs, lr, warmup_ratio, batch_size, log_steps"
)  # handed on as they are
DECIDED = split_list(
    """auto_find_batch_size, average_tokens_across_devices, data_seed, dataloader_drop_last, deepspeed, fp16, fsdp,
    fsdp_config, label_names, label_smoothing_factor, load_best_model_at_end, neftune_noise_alpha, push_to_hub,
    remove_unused_columns, save_only_model, save_strategy, train_sampling_strategy, use_liger_kernel"""
)


def training_arguments(settings: TrainSettings, dtype: torch.dtype, device: torch.device) -> TrainingArguments:
    """The arguments of a training whose frozen base is of this dtype on this device; an item of the data loader is a whole
    optimizer step. Raises InputError for a `trainer_args` that is unknown, without effect, or a setting of catlib's.
    """
    deepspeed = by_deepspeed()
    if deepspeed and dtype is torch.float16:
        raise InputError("DeepSpeed needs a GPU that computes in bfloat16 or, on others, --dtype float32")
    values: dict[str, Any] = {name: getattr(settings, own) for name, own in SETTING.items() if own in AS_SET} | {
        "output_dir": str(resolve(settings.output_dir)),
        "lr_scheduler_type": settings.lr_schedule.replace("constant", "constant_with_warmup"),
        "seed": settings.training_seed,
        # bf16 arithmetic over a bf16 base; what is trained stays float32
        "bf16": dtype is torch.bfloat16 and not deepspeed,
        "fp16": dtype is torch.float16,  # with loss scaling: cards without bf16
        "use_cpu": device.type == "cpu" and not deepspeed,
        "ddp_backend": "gloo" if device.type == "cpu" and deepspeed else None,
        "logging_nan_inf_filter": False,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "report_to": "none",  # trackers are added behind a guard
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "label_names": [],
    }
    try:
        arguments = TrainingArguments(**values | further_options(settings.trainer_args))
    except (ValueError, TypeError) as error:
        raise InputError(f"trainer_args: {str(error).splitlines()[0]}") from None
    _ = arguments.device
    arguments._n_gpu = min(arguments._n_gpu, 1)  # several GPUs are several processes, never torch's DataParallel
    return arguments


def further_options(text: str) -> dict[str, Any]:
    """The options in `trainer_args`, a YAML or JSON mapping. Raises InputError."""
    options = parse_yaml(text, "trainer_args") if text.strip() else {}
    if not isinstance(options, dict):
        raise InputError(f"trainer_args: expected a mapping, as in '{{optim: adafactor}}'; found {text!r}")
    known = inspect.signature(TrainingArguments).parameters
    for name in options:
        if name in SETTING:
            raise InputError(f"trainer_args: {name} is the setting {SETTING[name]}; set that")
        if name in DECIDED:
            raise InputError(f"trainer_args: {name} is not available; catlib's trainer decides that itself")
        if name not in known:
            raise InputError(f"trainer_args: transformers has no option {name!r}{did_you_mean(str(name), known)}")
    return options


def by_deepspeed() -> bool:
    """Whether this process was launched with a DeepSpeed configuration."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def own_state(device: str) -> PartialState:
    """This process among those that were launched with it, on its own device; DeepSpeed's on a CPU are met by gloo."""
    on_cpu = pick_device(device).type == "cpu"
    return PartialState(backend="gloo") if on_cpu and by_deepspeed() else PartialState(cpu=on_cpu)


def own_autocast(vlm: VLM) -> AbstractContextManager[Any]:
    """16-bit arithmetic over a 16-bit base where DeepSpeed switches accelerate's off; its own would round what is trained."""
    low = by_deepspeed() and vlm.dtype is not torch.float32
    return torch.autocast(vlm.device.type, vlm.dtype) if low else nullcontext()


def check_launch() -> Sharding:
    """How this process was launched to have the frozen matrices in pieces. Raises InputError for a launch that catlib cannot do."""
    if by_deepspeed():
        stage, file = map(os.environ.get, ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_DEEPSPEED_CONFIG_FILE"))
        if stage not in ("2", "3") or file:
            fits = "with configs/accelerate/zero2.yaml or zero3.yaml"
            raise InputError(f"of DeepSpeed ZeRO-2 and ZeRO-3 are available, without a file of its own: launch {fits}")
        # Calls of its own that torch will drop one day, and a hook that fires where it should; both at every step.
        warnings.filterwarnings("ignore", module=r"deepspeed\.|torch\.distributed\.c10d_logger")
        if find_spec("deepspeed") is None:
            raise MissingExtra("deepspeed", "deepspeed", f"a launch with configs/accelerate/zero{stage}.yaml")
        return "zero3" if stage == "3" else ""
    return "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" else ""
