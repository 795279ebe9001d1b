"""Where curves go besides history.jsonl: an MLflow store in one sqlite file, or TensorBoard's event files."""

import importlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from catlib.data.records import write_atomically
from catlib.errors import MissingExtra
from catlib.paths import resolve
from catlib.settings import TrainSettings

STORE, ARTIFACTS, EVENTS = "outputs/mlflow.db", "outputs/mlflow-artifacts", "outputs/tensorboard"
PACKAGES = {"mlflow": "mlflow", "tensorboard": "torch.utils.tensorboard"}


class Tracker(Protocol):
    """Takes a run's figures as they come."""

    def send(self, figures: Mapping[str, float], step: int) -> None: ...

    def close(self, status: str) -> None:
        """`status`: FINISHED, FAILED or KILLED."""


def check_tracker(name: str) -> None:
    """Raise MissingExtra when the tracker's package is not installed: before a model is loaded and not after."""
    if name != "none":
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError:
            raise MissingExtra(name, name, f"tracker {name}") from None


def open_tracker(settings: TrainSettings, folder: Path, step: int) -> Tracker | None:
    """The tracker of the settings, going on after optimizer step `step` of the run in `folder`; None for `none`."""
    if settings.tracker == "mlflow":
        return MlflowTracker(settings, folder, step)
    if settings.tracker == "tensorboard":
        return TensorboardTracker(Path(settings.output_dir).name, step)
    return None


class MlflowTracker:
    """One MLflow run for one training run, also where it was interrupted and resumed: its id lies beside the checkpoint.

    By the client and not by `mlflow.start_run`, whose one active run a process would share with the user's own.
    """

    def __init__(self, settings: TrainSettings, folder: Path, step: int) -> None:
        from mlflow import MlflowClient

        store = resolve(STORE)
        store.parent.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(f"sqlite:///{store}")
        remembered = folder / "mlflow.json"
        if step and remembered.is_file():
            self.id = json.loads(remembered.read_text(encoding="utf-8"))["run_id"]
            self.client.update_run(self.id, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name("catlib")
        number = (
            experiment.experiment_id
            if experiment
            else self.client.create_experiment("catlib", resolve(ARTIFACTS).as_uri())
        )
        self.id = self.client.create_run(number, run_name=folder.name).info.run_id
        for key, value in asdict(settings).items():
            self.client.log_param(self.id, key, value)
        write_atomically(remembered, json.dumps({"run_id": self.id, "store": STORE}))

    def send(self, figures: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(
            self.id, [Metric(key, float(value), now, step) for key, value in _numbers(figures).items()]
        )

    def close(self, status: str) -> None:
        self.client.set_terminated(self.id, status)


class TensorboardTracker:
    """Event files in a folder of the run's name; what a resumed run does again replaces what was there from that step on."""

    def __init__(self, name: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(resolve(EVENTS) / name, purge_step=step + 1)

    def send(self, figures: Mapping[str, float], step: int) -> None:
        for key, value in _numbers(figures).items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self, status: str) -> None:
        self.writer.close()


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in figures.items() if isinstance(value, int | float) and math.isfinite(value)}
