"""What goes on beside the steps: the flow of a training, trackers that cannot end it, interrupts that wait for the end of a step."""

import logging
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import patch_environment
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from catlib.files import read_json, write_json
from catlib.paths import resolve
from catlib.training.record import HISTORY

if TYPE_CHECKING:
    from catlib.training.trainer import Trainer

log = logging.getLogger(__name__)
STORE, EVENTS, RUNS = "outputs/mlflow.db", "outputs/tensorboard", "outputs/wandb"
EVENT_NAMES = [name for name in vars(TrainerCallback) if name.startswith("on_")]
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Flow(TrainerCallback):
    """When a training logs, saves and ends."""

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        t, progress = self.trainer, self.trainer.record.progress
        torch.set_rng_state(t.drawn)  # as LoRA's matrices left it; a resumed training then loads its own
        if rank := t.processes.process_index:
            torch.manual_seed(args.seed * 1_000_003 + rank)
        t.since = time.perf_counter()
        t.record.rewind(state.global_step)
        if state.global_step:
            t._tr_loss += progress.loss_since_log
            t._globalstep_last_logged = progress.logged_step
            log.info("resumed after step %d of %d", state.global_step, state.max_steps)
        if args.get_warmup_steps(state.max_steps) >= state.max_steps:
            log.warning("all %d steps are warm-up: the learning rate never reaches lr", state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        t = self.trainer
        if t.processes.num_processes > 1:  # a signal that reached one of them counts for all
            flags = t.accelerator.gather(torch.tensor([t.interrupts.wanted], device=args.device))
            t.interrupts.wanted = bool(flags.any())
        ends = control.should_training_stop or float(state.epoch).is_integer()
        control.should_log |= ends
        due = t.settings.save_steps and state.global_step % t.settings.save_steps == 0
        if (due or t.interrupts.wanted) and not ends:  # the end of an epoch is saved with its validation
            t.tick()
            control.should_save = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **more: Any
    ) -> None:
        if "loss" in logs:
            seconds, step = self.trainer.record.progress.seconds, state.global_step
            row = {**logs, "lr": more["lr_scheduler"].get_last_lr()[0]}
            names = ("epoch", "loss", "lr", "grad_norm", "photos_per_second", "peak_memory_gb")
            left = f" of {state.max_steps}, {seconds / step * (state.max_steps - step) / 60:.0f} min left"
            self.trainer.record.add("step", step, {name: row[name] for name in names}, left)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        t = self.trainer
        if t.is_in_train:
            epoch = float(state.epoch)
            figures = {"epoch": int(epoch) if epoch.is_integer() else epoch, "val_loss": metrics["eval_loss"]}
            figures |= {k: metrics[f"eval_{k}"] for k in ("accuracy", "priority_f1") if f"eval_{k}" in metrics}
            figures |= {"seconds": t.record.progress.seconds, "peak_memory_gb": t.peak_memory_gb()}
            control.should_training_stop |= not t.record.add_epoch(state.global_step, figures)
            t.tick()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.trainer.interrupts.wanted:
            raise KeyboardInterrupt


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
