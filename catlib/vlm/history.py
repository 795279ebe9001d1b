"""The run as it happens: one JSON line a logged step and an epoch, the same figures in the log and in a tracker."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from catlib.data.records import write_atomically
from catlib.errors import MissingExtra
from catlib.paths import resolve
from catlib.settings import TrainSettings

log = logging.getLogger(__name__)
FILE = "history.jsonl"


class History:
    """Appends to history.jsonl; `rewind` drops what came after the step that a resumed run starts from."""

    def __init__(self, folder: Path, settings: TrainSettings, active: bool = True) -> None:
        self.path = folder / FILE
        self.active = active  # only the main process writes
        self._send = _tracker(settings) if active else None

    def rewind(self, step: int) -> None:
        """Keep the lines up to optimizer step `step`."""
        if self.active:
            kept = [row for row in read_history(self.path) if row["step"] <= step] if step else []
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def add(self, kind: str, step: int, figures: Mapping[str, float]) -> None:
        """One line: kind is `step`, `epoch` or `end`; figures that are not finite are written as null."""
        if not self.active:
            return
        row = {"kind": kind, "step": step} | {k: _finite(v) for k, v in figures.items()}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        log.info("%s", " ".join([f"step {step}", *(f"{k} {_short(v)}" for k, v in figures.items())]))
        if self._send is not None:
            self._send({k: v for k, v in figures.items() if isinstance(v, int | float) and math.isfinite(v)}, step)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of history.jsonl; a half-written last line is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
    return rows


def _tracker(settings: TrainSettings) -> Any:
    """A function (figures, step) that sends to MLflow or TensorBoard, or None."""
    if settings.tracker == "mlflow":
        try:
            import mlflow
        except ImportError:
            raise MissingExtra("mlflow", "mlflow", "tracker mlflow") from None
        store = resolve("outputs/mlflow.db")
        store.parent.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{store}")
        mlflow.set_experiment("catlib")
        mlflow.start_run(run_name=Path(settings.output_dir).name)
        mlflow.log_params(asdict(settings))
        return lambda figures, step: mlflow.log_metrics(figures, step=step)
    if settings.tracker == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtra("tensorboard", "tensorboard", "tracker tensorboard") from None
        writer = SummaryWriter(resolve("outputs/tensorboard") / Path(settings.output_dir).name)

        def send(figures: Mapping[str, float], step: int) -> None:
            for key, value in figures.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return send
    return None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
