"""The output folder of a training: whose it is, what is saved in it, and when it may be used again."""

import logging
import os
import resource
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState

from catlib.errors import InputError
from catlib.files import locked, read_json
from catlib.paths import resolve
from catlib.runs import set_aside
from catlib.settings import TrainSettings

log = logging.getLogger(__name__)
# Settings that change how a training runs and not what comes out of it, or only where it is written.
FREE = (
    "gradient_checkpointing", "run", "run_dir", "hint", "output_dir", "train_data", "val_data", "device", "num_workers", "cache_limit_gb", "log_steps",
    "save_steps", "report_to", "tracker", "resume", "overwrite", "force", "priority_breeds", "watch_photos", "early_stopping", "watch",
)  # fmt: skip


def prepare_folder(folder: Path, settings: TrainSettings, data: Mapping[str, str]) -> None:
    """Make sure that the folder is empty or holds this very training: a checkpoint is never replaced by one of other settings.

    Another training in the folder of a named run, or with `overwrite`, is set aside; else it is an InputError with the difference.
    """
    processes = PartialState()
    with alone(folder, processes.is_main_process):
        if processes.is_main_process and (differences := "; ".join(_differences(folder, settings, data))):
            if not settings.run and not settings.overwrite:
                raise InputError(
                    f"{folder} holds another training ({differences}). Give another output_dir, or set the old one aside with "
                    "--overwrite"
                )
            kept = set_aside(resolve(settings.run_dir) if settings.run else folder, folder)
            log.warning("%s held another training (%s), which is now %s", folder, differences, kept)
        processes.wait_for_everyone()


def alone(folder: Path, main: bool) -> AbstractContextManager[None]:
    """Hold the folder for the training of this main process; a second one is refused (InputError)."""
    busy = f"{folder}: another training writes there; wait for its end, or give another output_dir"
    return locked(folder.with_name(f".{folder.name}.lock"), busy) if main else nullcontext()


def _differences(folder: Path, settings: TrainSettings, data: Mapping[str, str]) -> list[str]:
    """What is different in the training that the folder holds; empty when it holds none."""
    record = folder / "training.json"
    if not record.is_file():
        adapter = (folder / "adapter_model.safetensors").is_file()
        return ["an adapter without the record training.json"] if adapter else []
    facts = read_json(record)
    old, new, default = facts.get("settings", {}), asdict(settings), asdict(TrainSettings())
    changed = [
        f"{key} {old.get(key, default[key])!r}, not {value!r}"
        for key, value in new.items()
        if key not in FREE and old.get(key, default[key]) != value
    ]
    return changed + (["other photos"] if facts.get("data") != dict(data) else [])


def saved_steps(folder: Path) -> list[Path]:
    """The whole saves in a folder, the latest last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def fsync(folder: Path) -> None:
    """Flush the files of a folder to the disk."""
    for path in folder.iterdir():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB (10^9 bytes): the GPU's where there is one, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, kibibytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
