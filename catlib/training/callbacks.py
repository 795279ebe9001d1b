"""What goes on beside the steps: history.jsonl, trackers that cannot end a training, interrupts that wait for the end of a step."""

import json
import logging
import math
import os
import signal
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from accelerate.utils import patch_environment
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from catlib.files import read_json, read_jsonl, write_json, write_text
from catlib.paths import resolve

log = logging.getLogger(__name__)
HISTORY = "history.jsonl"
STORE, EVENTS, RUNS = "outputs/mlflow.db", "outputs/tensorboard", "outputs/wandb"
EVENT_NAMES = [name for name in vars(TrainerCallback) if name.startswith("on_")]
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class History:
    """Appends to history.jsonl, the record of a training: a line a logged step and a validation."""

    def __init__(self, folder: Path, active: bool) -> None:
        self.path, self.active = folder / HISTORY, active  # only the main process writes

    def rewind(self, step: int) -> None:
        """Drop what came after the step that a resumed training starts from."""
        if self.active:
            kept = [row for row in read_history(self.path) if row["step"] <= step] if step else []
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def add(self, kind: str, step: int, figures: Mapping[str, Any], left: str = "") -> None:
        """One line: kind is `step` or `epoch`; figures that are not finite are written as null. `left`: what the log says of the rest."""
        if self.active:
            row = {"kind": kind, "step": step} | finite(figures)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            log.info(
                "%s",
                ", ".join([f"step {step}", *(f"{k} {_short(v)}" for k, v in figures.items()), *filter(None, [left])]),
            )


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of history.jsonl; a half-written last line is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    return [row for _, row in read_jsonl(path)]


def finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures as JSON can hold them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}


class Tracker(TrainerCallback):
    """One of transformers' trackers behind a guard: whatever it raises, training goes on; it is warned of once, and then let be.

    A resumed training goes on in the same MLflow or W&B run, whose id lies beside the checkpoint. MLFLOW_TRACKING_URI and the other
    variables that transformers reads are honoured; without them everything stays under outputs/.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.failed = name, folder, False
        self.inner: Any = None
        for event in EVENT_NAMES:
            setattr(self, event, partial(self._guarded, event))

    def close(self, status: str) -> None:
        """End the run as `KILLED` or `FAILED`; one that went well has been ended by its own callback."""
        if self.inner is not None and not self.failed:
            try:
                self._close(status)
            except Exception as error:
                self._fail(error)

    def _guarded(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        if self.failed or not state.is_world_process_zero or (self.inner is None and event != "on_train_begin"):
            return
        try:
            if event == "on_train_begin":
                self._open(args, state, control, **more)
            else:
                getattr(self.inner, event)(args, state, control, **more)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failed = True
        hint = (
            f"; pip install 'catlib[{self.name}]'"
            if isinstance(error, ImportError | RuntimeError) and self.inner is None
            else ""
        )
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("%s takes no curves (%s%s); %s has them", self.name, said, hint, HISTORY)

    def _open(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        remembered = self.folder / f"{self.name}.json"
        run = read_json(remembered)["run_id"] if state.global_step and remembered.is_file() else ""
        given = {
            name: value
            for name, value in self._environment(run).items()
            if name not in os.environ or name.endswith("RUN_ID")
        }
        with patch_environment(**given):
            if self.name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                # What a resumed training does again replaces what was there from that step on.
                writer = SummaryWriter(resolve(EVENTS) / self.folder.name, purge_step=state.global_step + 1)
                self.inner = TensorBoardCallback(writer)
            elif self.name == "mlflow":
                self.inner = MLflowCallback()
                self.inner._async_log = False  # an error in a thread of its own could not be caught
            else:
                self.inner = WandbCallback()
            self.inner.on_train_begin(args, state, control, **more)
        if identity := self._run_id():
            write_json(remembered, {"run_id": identity})

    def _environment(self, run: str) -> dict[str, str]:
        if self.name == "mlflow":
            store = resolve(STORE)
            store.parent.mkdir(parents=True, exist_ok=True)
            names = {"MLFLOW_TRACKING_URI": f"sqlite:///{store}", "MLFLOW_EXPERIMENT_NAME": "catlib"}
            return names | ({"MLFLOW_RUN_ID": run} if run else {})
        if self.name == "wandb":
            folder = resolve(RUNS)
            folder.mkdir(parents=True, exist_ok=True)
            names = {"WANDB_PROJECT": "catlib", "WANDB_DIR": str(folder), "WANDB_NAME": self.folder.name}
            return names | ({"WANDB_RUN_ID": run, "WANDB_RESUME": "allow"} if run else {})
        return {}

    def _run_id(self) -> str:
        if self.name == "mlflow":
            return self.inner._ml_flow.active_run().info.run_id
        return self.inner._wandb.run.id if self.name == "wandb" else ""

    def _close(self, status: str) -> None:
        if self.name == "mlflow":
            self.inner._ml_flow.end_run(status)
        elif self.name == "wandb":
            self.inner._wandb.finish(exit_code=1)
        else:
            self.inner.tb_writer.close()


class Interrupts:
    """While open, the first SIGINT, SIGTERM or SIGHUP only sets `wanted`; a second one interrupts at once.

    So what is saved then is a whole state and not half of one. Without effect outside the main thread; a signal that the process
    ignores (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        self.wanted = False
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        log.warning("interrupted: saving after this step; once more ends at once")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
