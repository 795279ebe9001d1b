"""transformers' Trainer with saves that are whole or not there, hold only what is trained, and lie in a folder of one training."""

import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from catlib.errors import CatlibError, InputError
from catlib.files import locked, read_json, remove_leftovers, write_json
from catlib.paths import resolve
from catlib.runs import TRAINING, set_aside
from catlib.settings import TrainSettings, split_list
from catlib.training.record import Progress, Record

log = logging.getLogger(__name__)
STATE, WEIGHTS = "progress.json", "trained.safetensors"
# Settings that do not change what comes out of a training, or only where it is written and which epoch is kept.
FREE = set(
    split_list("""run, run_dir, hint, output_dir, train_data, val_data, priority_breeds, device, num_workers, cache_features,
    cache_limit_gb, gradient_checkpointing, attn_implementation, log_steps, save_steps, report_to, tracker, resume,
    overwrite, force, watch, watch_photos, early_stopping""")
)


class SavingTrainer(transformers.Trainer):
    """Saves as transformers does, in `checkpoint-N`, but beside the place first: a kill at any moment leaves the save
    before, or this one whole. The latest is kept.
    """

    folder: Path
    record: Record
    processes: PartialState
    trained: list[tuple[str, torch.nn.Parameter]]

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder / ".saving")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name, staging, progress = f"checkpoint-{self.state.global_step}", self.folder / ".saving", self.record.progress
        progress.loss_since_log, progress.logged_step = float(self._tr_loss), self._globalstep_last_logged
        try:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
                write_json(staging / name / STATE, asdict(progress))
            self.processes.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.processes.wait_for_everyone()
            if self.args.should_save:
                for path in filter(Path.is_file, (staging / name).rglob("*")):
                    with path.open("rb+") as stream:
                        os.fsync(stream.fileno())
                shutil.rmtree(self.folder / name, ignore_errors=True)
                (staging / name).rename(self.folder / name)
                for folder in saves_in(self.folder):
                    if folder.name != name:
                        shutil.rmtree(folder)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            raise CatlibError(
                f"{self.folder / name}: the state could not be written ({error}); the one before it is untouched"
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What is trained, and no more."""
        if self.args.should_save:
            trained = {name: parameter.detach().cpu().contiguous() for name, parameter in self.trained}
            save_file(trained, Path(output_dir or self.folder) / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        engine: Any = self.model_wrapped
        engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)  # each process its piece
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        for name, parameter in self.trained:
            parameter.data.copy_(weights[name])


def saves_in(folder: Path) -> list[Path]:
    """The whole saves in a folder, the latest last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def read_progress(saved: Path, by_deepspeed: bool) -> Progress:
    """What a save says about where training stood. Raises InputError where the other kind of launch has written it."""
    if (saved / "latest").is_file() != by_deepspeed:
        raise InputError(f"{saved}: go on with DeepSpeed where the training began with it, and without where not")
    return Progress(**read_json(saved / STATE))


def prepare_folder(folder: Path, settings: TrainSettings, data: Mapping[str, str]) -> None:
    """Make sure that the folder is empty or holds this very training: a checkpoint is never replaced by one of other settings.

    Another training in the folder of a named run, or with `overwrite`, is set aside; else it is an InputError with the difference.
    """
    processes = PartialState()
    with alone(folder, processes.is_main_process):
        if processes.is_main_process:
            remove_leftovers(folder)
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
    if not (folder / TRAINING).is_file():
        return ["an adapter without a record"] if (folder / "adapter_model.safetensors").is_file() else []
    facts, default = read_json(folder / TRAINING), asdict(TrainSettings())
    old = default | facts.get("settings", {})
    new = {key: value for key, value in asdict(settings).items() if key not in FREE}
    changed = [f"{key} {old[key]!r} in place of {value!r}" for key, value in new.items() if old[key] != value]
    return changed + (["other photos"] if facts.get("data") != dict(data) else [])
