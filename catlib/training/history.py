"""The run as it happens: one JSON line a logged step and an epoch, the same figures in the log and in a tracker."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catlib.data.records import write_atomically
from catlib.settings import TrainSettings
from catlib.training.trackers import Tracker, open_tracker

log = logging.getLogger(__name__)
FILE = "history.jsonl"


class History:
    """Appends to history.jsonl; `rewind` drops what came after the step that a resumed run starts from."""

    def __init__(self, folder: Path, settings: TrainSettings, active: bool = True) -> None:
        self.path = folder / FILE
        self.active = active  # only the main process writes
        self._settings = settings
        self._tracker: Tracker | None = None

    def rewind(self, step: int) -> None:
        """Keep the lines up to optimizer step `step`, and open the tracker there."""
        if self.active:
            self._tracker = open_tracker(self._settings, self.path.parent, step)
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
        if self._tracker is not None:
            self._tracker.send(figures, step)

    def close(self, status: str) -> None:
        """Tell the tracker how the run ended: FINISHED, FAILED or KILLED."""
        if self._tracker is not None:
            self._tracker.close(status)
            self._tracker = None


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of history.jsonl; a half-written last line is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
    return rows


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
