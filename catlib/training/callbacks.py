"""What goes on beside the steps: the flow of a training, and trackers that cannot end it."""

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import patch_environment
from transformers import TrainerCallback, TrainerState
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from catlib.files import read_json, write_json
from catlib.paths import resolve, without_secrets
from catlib.progress import LOG_EVERY_S
from catlib.training.record import HISTORY
from catlib.training.sharding import keep_whole
from catlib.vlm.processors import first_line

if TYPE_CHECKING:
    from catlib.training.trainer import Trainer

log = logging.getLogger(__name__)
STORE, EVENTS, RUNS = "outputs/mlflow.db", "outputs/tensorboard", "outputs"


class Flow(TrainerCallback):
    """When a training logs, saves and ends."""

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        self.said = 0.0  # when the last line of progress was

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        t, progress = self.trainer, self.trainer.record.progress
        if t.sharding == "zero3":
            keep_whole(t.model_wrapped)
        torch.set_rng_state(t.drawn)  # as LoRA's matrices left it; a resumed training then loads its own
        rank = t.processes.process_index
        torch.cuda.manual_seed(args.seed * 1_000_003 + rank)  # dropout's draws; without a GPU it does nothing
        if rank:
            torch.manual_seed(args.seed * 1_000_003 + rank)
        t.since = time.perf_counter()
        t.record.rewind(state.global_step)
        if state.global_step:
            t._tr_loss += progress.loss_since_log
            t._globalstep_last_logged = progress.logged_step
            log.info("resumed after step %d of %d", state.global_step, state.max_steps)
        if args.get_warmup_steps(state.max_steps) >= state.max_steps:
            log.warning("all %d steps are warm-up: the learning rate never reaches lr", state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        t = self.trainer
        if t.processes.num_processes > 1:  # a signal that reached one of them counts for all
            t.interrupted = bool(t.accelerator.gather(torch.tensor([t.interrupted], device=args.device)).any())
        ends = control.should_training_stop or float(state.epoch).is_integer()
        control.should_log |= ends
        silent = time.perf_counter() - self.said > LOG_EVERY_S  # of long steps each is said
        if silent and t.processes.is_main_process and not control.should_log:
            self.said = time.perf_counter()
            log.info("step %d%s", state.global_step, self._left(state))
        due = t.settings.save_steps and state.global_step % t.settings.save_steps == 0
        if (due or t.interrupted) and not ends:  # the end of an epoch is saved with its validation
            t.tick()
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if "loss" in logs:
            self.said = time.perf_counter()
            row = {**logs, "lr": more["lr_scheduler"].get_last_lr()[0]}
            names = ("epoch", "loss", "lr", "grad_norm", "photos_per_second", "peak_memory_gb")
            figures = {name: row[name] for name in names}
            self.trainer.record.add("step", state.global_step, figures, self._left(state))

    def _left(self, state: TrainerState) -> str:
        minutes = self.trainer.record.progress.seconds / state.global_step * (state.max_steps - state.global_step) / 60
        return f" of {state.max_steps}, {minutes:.0f} min left"

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        t = self.trainer
        if t.is_in_train:
            epoch = float(state.epoch)
            figures = {"epoch": int(epoch) if epoch.is_integer() else epoch}
            figures |= {name.replace("eval_loss", "val_loss").removeprefix("eval_"): x for name, x in metrics.items()}
            figures |= {"seconds": t.record.progress.seconds, "peak_memory_gb": t.peak_memory_gb()}
            control.should_training_stop |= not t.record.add_epoch(state.global_step, figures)
            t.tick()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.interrupted:
            raise KeyboardInterrupt


class Tracker(TrainerCallback):
    """One of transformers' trackers behind a guard: whatever it raises, training goes on; it is warned of once, and then let be.

    A resumed training goes on in the same MLflow or W&B run, whose id lies beside the checkpoint. MLFLOW_TRACKING_URI and the other
    variables that transformers reads are honoured; without them everything stays under outputs/.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.failed = name, folder, False
        self.remembered = folder / f"{name}.json"
        self.inner: Any = None
        self.variables: dict[str, str] = {}  # of the environment, while the tracker works
        for event in (name for name in vars(TrainerCallback) if name.startswith("on_")):
            setattr(self, event, partial(self._event, event))

    def close(self, status: str) -> None:
        """End the run as `KILLED` or `FAILED`; one that went well has been ended by its own callback."""
        endings: dict[str, Callable[[], Any]] = {
            "mlflow": lambda: self.inner._ml_flow.end_run(status),
            "wandb": lambda: self.inner._wandb.finish(exit_code=1),
            "tensorboard": lambda: self.inner.tb_writer.close(),
        }
        if self.inner is not None:
            self._guarded(endings[self.name])

    def _event(self, event: str, args: Any, state: TrainerState, control: Any, **more: Any) -> None:
        begins = event == "on_train_begin"
        if begins and state.is_world_process_zero and self.name != "none":
            self._guarded(lambda: self._open(state.global_step))
        if self.inner is not None:
            self._guarded(lambda: getattr(self.inner, event)(args, state, control, **more))
            if begins and self.name != "tensorboard":
                self._guarded(lambda: write_json(self.remembered, {"run_id": self._run_id()}))

    def _guarded(self, work: Callable[[], Any]) -> None:
        if not self.failed:
            try:
                with patch_environment(**self.variables):
                    work()
            except Exception as error:
                self.failed = True
                hint = f"; pip install 'catlib[{self.name}]'" if isinstance(error, ImportError) else ""
                said = without_secrets(first_line(error))  # a tracker's address may hold a password
                log.warning("%s takes no curves (%s%s); %s has them", self.name, said, hint, HISTORY)

    def _open(self, step: int) -> None:
        run = read_json(self.remembered)["run_id"] if step and self.remembered.is_file() else ""
        if self.name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            # What a resumed training does again replaces what was there from that step on.
            self.inner = TensorBoardCallback(SummaryWriter(resolve(EVENTS) / self.folder.name, purge_step=step + 1))
            return
        import_module(self.name)
        usual = {"MLFLOW_TRACKING_URI": f"sqlite:///{resolve(STORE)}", "MLFLOW_EXPERIMENT_NAME": "catlib"}
        same = {"MLFLOW_RUN_ID": run}
        if self.name == "wandb":
            usual = {"WANDB_PROJECT": "catlib", "WANDB_DIR": str(resolve(RUNS)), "WANDB_NAME": self.folder.name}
            same = {"WANDB_RUN_ID": run, "WANDB_RESUME": "allow"}
        resolve(RUNS).mkdir(parents=True, exist_ok=True)
        self.variables = {k: v for k, v in usual.items() if k not in os.environ} | (same if run else {})
        self.inner = MLflowCallback() if self.name == "mlflow" else WandbCallback()
        self.inner._async_log = False  # MLflow's: an error in a thread of its own could not be caught

    def _run_id(self) -> str:
        return self.inner._ml_flow.active_run().info.run_id if self.name == "mlflow" else self.inner._wandb.run.id
