"""Training by transformers' Trainer, with catlib's batches, loss, optimizer groups, validation and whole saves as plug-ins."""

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, patch_environment
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from catlib.data.records import Sample
from catlib.errors import CatlibError
from catlib.files import read_json, write_json
from catlib.paths import resolve
from catlib.settings import TrainSettings
from catlib.training.arguments import check_launch, training_arguments
from catlib.training.callbacks import History, Interrupts, Tracker, finite, read_history
from catlib.training.lanes import lanes_for
from catlib.training.loss import AnswerLoss
from catlib.training.model_card import model_card
from catlib.training.order import Steps, share
from catlib.training.output import alone, fsync, peak_memory_gb, prepare_folder, saved_steps
from catlib.training.run import Run, load_data, set_up
from catlib.training.validation import Watch, validation_loss, watched_part
from catlib.vlm.batches import Batch, check_batch
from catlib.vlm.checkpoint import TRAINING, fingerprint, save_checkpoint

log = logging.getLogger(__name__)
T = TypeVar("T")
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cublas_status_alloc_failed")
STATE, WEIGHTS = "progress.json", "trained.safetensors"


@dataclass(frozen=True)
class TrainResult:
    """What a finished training left: the checkpoint folder (the best epoch's adapter) and the lines of history.jsonl."""

    checkpoint: Path
    history: list[dict[str, Any]]
    best: dict[str, float]


@dataclass
class Progress:
    """Where a training stands, as far as transformers' own state does not tell it; saved and resumed with that."""

    micro_batch: int
    seconds: float = 0.0
    out_of_memory: int = 0  # times that the micro-batch was halved
    best_value: list[float] | None = None  # lower is better, entry by entry
    best: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    val_losses: list[float] = field(default_factory=list)  # of each validation
    without_gain: int = 0
    loss_since_log: float = 0.0
    logged_step: int = 0
    stopped_early: bool = False
    finished: bool = False


class Trainer(transformers.Trainer):
    """One training; `train(settings)` below or `fit()` runs it, or continues what was interrupted.

    One item of the data loader is one optimizer step with its samples of all processes: `training_step` cuts them into
    micro-batches. So memory that runs out is met with smaller ones, the number of processes changes nothing, and the loss is the
    mean over the supervised tokens of the whole step. Everything else is transformers' Trainer: its arguments (setting
    `trainer_args`), its callbacks (`add_callback`), its trackers.
    """

    def __init__(self, settings: TrainSettings) -> None:
        sharded = check_launch(settings)
        self.settings, self.folder = settings, resolve(settings.output_dir)
        self.processes = PartialState(cpu=settings.device == "cpu")
        data = load_data(settings)
        prepare_folder(self.folder, settings, data.digests)
        torch.manual_seed(settings.seed)  # before LoRA's matrices are drawn
        self.run: Run = set_up(settings, data, sharded and self.processes.num_processes > 1)
        self.drawn = torch.get_rng_state()
        self.vlm = self.run.vlm
        base = self.vlm.base
        with patch_environment(ACCELERATE_USE_FSDP="false"):  # sharding is done in `set_up`, on frozen weights only
            super().__init__(
                model=AnswerLoss(self.vlm),
                args=training_arguments(settings, base.get_input_embeddings().weight.dtype, base.device),
                train_dataset=data.train,
                eval_dataset=data.val,
                callbacks=[_Epochs(self)],
            )
        self.remove_callback(PrinterCallback)
        self.trained = [(n, p) for n, p in self.vlm.model.named_parameters() if p.requires_grad]
        self.progress = Progress(settings.batch_size)
        self.interrupts = Interrupts()
        self.lanes = lanes_for(self.vlm, settings, self.processes.num_processes)
        self.history = History(self.folder, self.is_world_process_zero())
        self.tracker = None if settings.report_to == "none" else Tracker(settings.report_to, self.folder)
        if self.tracker is not None:
            self.add_callback(self.tracker)
        watched = watched_part(data.val, settings.watch_photos, settings.seed)
        self.watch = (
            Watch(self.vlm, self.run.val_collate, watched, data.breeds, data.priority, data.question, data.spelled)
            if watched
            else None
        )
        # Three times the loss of guessing among all tokens: no longer bad luck but a broken training.
        self.most = 3 * math.log(base.config.get_text_config().vocab_size)
        self._since, self._busy, self._seen = time.perf_counter(), 0.0, 0
        self._samples: Sequence[Sample] = ()  # of the step that is under way

    # --- from start to end ---

    def fit(self) -> TrainResult:
        """Train to the end, from where an interrupted training of the same settings stopped."""
        with alone(self.folder, self.is_world_process_zero()), self.interrupts:
            self.processes.wait_for_everyone()
            begun, record = self.progress.seconds > 0, self.folder / TRAINING
            facts = read_json(record) if record.is_file() and (begun or self.settings.resume) else {}
            if facts.get("outcome", {}).get("finished"):
                return TrainResult(self.folder, read_history(self.history.path), facts["figures"])
            saved = saved_steps(self.folder)[-1:] if begun or self.settings.resume else []
            if begun and not saved:
                raise CatlibError("training was interrupted before anything was saved: make the Trainer anew")
            try:
                self._fit(saved[0] if saved else None)
            except BaseException as error:
                self.is_in_train = False
                killed = isinstance(error, KeyboardInterrupt)
                if killed and self.is_world_process_zero():
                    log.warning("interrupted after step %d; run it again to go on", self.state.global_step)
                    self._save_adapter("last", self.progress.last | {"interrupted": True})
                if self.tracker is not None:
                    self.tracker.close("KILLED" if killed else "FAILED")
                raise
        return TrainResult(self.folder, read_history(self.history.path), self.progress.best)

    def _fit(self, saved: Path | None) -> None:
        main = self.is_world_process_zero()
        if saved is None and main:
            for folder in saved_steps(self.folder):  # of an earlier training, with `resume` off
                shutil.rmtree(folder)
            self._write_record()
        check_batch(self.vlm, self.run.collate(self.run.data.train[: self.settings.batch_size]))
        self.optimizer = self.lr_scheduler = None  # of an interrupted call of `fit`
        if saved is not None:
            self.progress = Progress(**read_json(saved / STATE))
        if not self.progress.stopped_early:  # else killed between its last save and its end
            self.train(resume_from_checkpoint=None if saved is None else str(saved))
        self.progress.finished = True
        if main:
            self._write_record()
            for folder in saved_steps(self.folder):
                shutil.rmtree(folder)

    # --- plug-ins of transformers' Trainer: data, optimizer, step ---

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Lists of samples, one for each optimizer step; photos of the coming ones are made ready."""
        s, samples, augment = self.settings, self.run.data.train, self.run.collate.augment

        def begin(epoch: int, seen: Sequence[Sample]) -> None:
            if augment is not None:
                augment.start_epoch(epoch, [sample.id for sample in seen])

        def soon(coming: Sequence[Sample]) -> None:
            for part, _ in self._share(coming):
                self.run.collate.prefetch(part)

        size = s.batch_size * s.gradient_accumulation  # whatever the number of processes: they share it
        steps = Steps(samples, size, s.seed, s.balance, lambda: self.state.global_step, begin, soon)
        return DataLoader(samples, batch_sampler=steps, collate_fn=list, generator=torch.Generator())

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments, with a learning rate of its own for a projector that is trained in full."""
        if self.optimizer is None:
            s = self.settings
            projector = [p for n, p in self.trained if f"{self.vlm.anatomy.projector}." in n and "lora_" not in n]
            rest = [p for _, p in self.trained if not any(p is q for q in projector)]
            groups = [{"params": rest, "lr": s.lr}, {"params": projector, "lr": s.projector_lr}]
            kind, values = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [group | {"weight_decay": s.weight_decay} for group in groups if group["params"]]
            self.optimizer = kind(groups, **values)
        return self.optimizer

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Put into `.grad` the gradient of the mean loss over all supervised tokens of a step, however it is cut up.

        Raises CatlibError for a loss that is no number or explodes, and when not even one sample fits.
        """
        model.train()
        self._samples = inputs
        loss = self._within_memory(lambda: self._gradients(model, inputs))
        self._seen += len(inputs)
        self._busy += self._tick()
        return loss

    def _share(self, samples: Sequence[Sample]) -> list[tuple[Sequence[Sample], float]]:
        return share(samples, self.progress.micro_batch, self.processes.process_index, self.processes.num_processes)

    def _gradients(self, model: torch.nn.Module, samples: Sequence[Sample]) -> torch.Tensor:
        model.zero_grad()
        tokens = sum(len(self.run.collate.answer_ids(sample)) for sample in samples)
        # DDP takes the mean of the processes' gradients, transformers that of their losses: each gives its part so many times.
        part_of_mean = self.processes.num_processes / tokens
        parts, summed = self._share(samples), 0.0
        for number, (part, weight) in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                summed += weight * self._backward(model, part, weight * part_of_mean)
        return torch.tensor(summed * part_of_mean, device=self.args.device)

    def _backward(self, model: torch.nn.Module, samples: Sequence[Sample], scale: float) -> float:
        """Add `scale` times the gradient of a micro-batch's summed loss, of each lane's part in a thread of its own; the loss."""
        batches = [self.run.collate(part).to(self.vlm.base.device) for part in self.lanes.cut(samples)]
        if len(batches) == 1:
            loss, value = self._loss(model, batches[0])
            self.accelerator.backward(loss * scale)
            return value
        parameters = [parameter for _, parameter in self.trained]

        def work(batch: Batch) -> tuple[float, tuple[torch.Tensor | None, ...]]:
            loss, value = self._loss(model, batch)
            return value, torch.autograd.grad(loss * scale, parameters, allow_unused=True)

        results = self.lanes.run(work, batches)
        for _, gradients in results:  # in order, whichever lane was first: a sum of floats depends on it
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return sum(value for value, _ in results)

    def _loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, float]:
        """(summed loss, its value)."""
        loss, n = model(batch)
        value = float(loss.detach())
        warm = self.state.global_step >= self.args.get_warmup_steps(self.state.max_steps)
        if not math.isfinite(value) or (warm and value / n > self.most):
            raise CatlibError(
                f"step {self.state.global_step + 1}: loss {value / n:.3g} in the samples {', '.join(batch.sample_ids)}; training "
                "stopped. Lower lr, or look at these photos and answers"
            )
        return loss, value

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm))
        if not math.isfinite(norm):
            ids = ", ".join(sample.id for sample in self._samples)
            raise CatlibError(f"step {self.state.global_step + 1}: the gradient is not finite, in the samples {ids}")
        return norm

    def _within_memory(self, work: Callable[[], T]) -> T:
        """`work()`, again with half the micro-batch whenever the device runs out of memory; no weight was touched yet."""
        while True:
            try:
                return work()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                size = self.progress.micro_batch
                if size == 1 or self.processes.num_processes > 1:  # others wait in the middle of an exchange
                    raise CatlibError(
                        f"out of memory at a micro-batch of {size}: set gradient_checkpointing, mode qlora, or a smaller "
                        f"batch_size ({str(error).splitlines()[0]})"
                    ) from error
                self.progress.micro_batch, self.progress.out_of_memory = size // 2, self.progress.out_of_memory + 1
            self.model.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            log.warning("out of memory: going on with micro-batches of %d, the effective batch stays", size // 2)

    # --- validation, records, saves ---

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss on the validation samples, and the breeds of the watched ones; the same figures in every process."""
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        self.model.eval()
        with self.accelerator.autocast():
            loss = self._within_memory(
                lambda: validation_loss(
                    self.model, self.run.val_collate, samples, self.progress.micro_batch, self.lanes
                )
            )
            figures = {"loss": loss}
            if (watch := self.watch) is not None:
                figures |= self._within_memory(lambda: watch.measure(self.progress.micro_batch))
        if self.processes.num_processes > 1:
            figures = broadcast_object_list([figures])[0]
        self.model.train()
        self._tick()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """transformers' figures with speed and memory; those of steps go into history.jsonl."""
        if "loss" in logs:
            logs["photos_per_second"] = self._seen / max(self._busy, 1e-9)
            logs["peak_memory_gb"] = peak_memory_gb(self.vlm.base.device)
            self._busy, self._seen = 0.0, 0
        super().log(logs, start_time)

    def record_epoch(self, metrics: Mapping[str, float]) -> None:
        """A validation's figures into the history; the adapter into `last/`, and into the folder itself when it is the best."""
        s, p = self.settings, self.progress
        figures: dict[str, Any] = {"epoch": _whole(self.state.epoch), "val_loss": metrics["eval_loss"]}
        figures |= {k: metrics[f"eval_{k}"] for k in ("accuracy", "priority_f1") if f"eval_{k}" in metrics}
        if not math.isfinite(figures["val_loss"]):
            raise CatlibError(
                f"epoch {figures['epoch']}: the validation loss is {figures['val_loss']}; training stopped"
            )
        value = [figures["val_loss"]]
        if s.watch == "priority_f1":  # a few rare photos often tie: the loss decides between equals
            value = [-figures.get("priority_f1", figures.get("accuracy", 0.0)), *value]
        better = p.best_value is None or value < p.best_value
        figures |= {"seconds": p.seconds, "peak_memory_gb": peak_memory_gb(self.vlm.base.device)}
        p.without_gain = 0 if better else p.without_gain + 1
        p.val_losses.append(figures["val_loss"])
        p.last = figures
        if better:
            p.best_value, p.best = value, figures
        if s.early_stopping and p.without_gain >= s.early_stopping:
            log.info("stopped early: no better %s for %d epochs", s.watch, p.without_gain)
            p.stopped_early = self.control.should_training_stop = True
        self.history.add("epoch", self.state.global_step, figures)
        if self.is_world_process_zero():
            self._save_adapter("last", figures)
            if better:
                self._save_adapter("", figures)

    def _facts(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """What training.json says, figures and outcome included."""
        data, p = self.run.data, self.progress
        losses = p.val_losses
        return {
            "settings": asdict(self.settings),
            "base_model": self.vlm.name,
            "breeds": list(data.breeds),
            "priority_breeds": list(data.priority),
            "question": data.question,
            "other_questions": data.others,
            "spelled": data.spelled,
            "base_fingerprint": fingerprint(self.vlm),
            "data": data.digests,
            "figures": finite(figures),
            "micro_batch": p.micro_batch,
            "outcome": {
                "finished": p.finished,
                "stopped_early": p.stopped_early,
                "out_of_memory": p.out_of_memory,
                "peak_memory_gb": p.last.get("peak_memory_gb"),
                "seconds": p.seconds,
                "val_losses": losses,
                "val_loss_fell": min(losses[1:]) < losses[0] if len(losses) > 1 else None,
            },
        }

    def _save_adapter(self, part: str, figures: dict[str, Any]) -> None:
        card = model_card(self.vlm, self.settings, self.run.data, figures)
        save_checkpoint(self.vlm, self.folder / part, self._facts(figures), card)

    def _write_record(self) -> None:
        for part, figures in (("", self.progress.best), ("last", self.progress.last)):
            if figures or not part:
                write_json(self.folder / part / TRAINING, self._facts(figures))

    def _tick(self) -> float:
        """Seconds since the last call, which count as training's."""
        now = time.perf_counter()
        spent, self._since = now - self._since, now
        self.progress.seconds += spent
        return spent

    # --- whole saves, and going on from them: transformers' checkpoint-N folders, with what is trained instead of all weights ---

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder / ".saving")

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write beside the final place, flush, and rename: a kill at any moment leaves the save before it, or this one whole."""
        main, staging = self.is_world_process_zero(), self.folder / ".saving"
        name = f"checkpoint-{self.state.global_step}"
        self._tick()
        self.progress.loss_since_log, self.progress.logged_step = float(self._tr_loss), self._globalstep_last_logged
        try:
            if main:
                shutil.rmtree(staging, ignore_errors=True)
                write_json(staging / name / STATE, asdict(self.progress))
            self.processes.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.processes.wait_for_everyone()
            if main:
                fsync(staging / name)
                earlier = saved_steps(self.folder)
                shutil.rmtree(self.folder / name, ignore_errors=True)
                (staging / name).rename(self.folder / name)
                for folder in earlier:
                    if folder.name != name:
                        shutil.rmtree(folder)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            raise CatlibError(
                f"{self.folder / name}: the state could not be written ({error}); the one before it is untouched"
            ) from error
        finally:
            if main:
                shutil.rmtree(staging, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            trained = {name: parameter.detach().cpu().contiguous() for name, parameter in self.trained}
            save_file(trained, Path(output_dir or self.folder) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        for name, parameter in self.trained:
            parameter.data.copy_(weights[name])


class _Epochs(TrainerCallback):
    """When to log, save, validate and end; the trainer does it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        t = self.trainer
        t._since = time.perf_counter()
        torch.set_rng_state(t.drawn)  # as LoRA's matrices left it; a resumed training then loads its own
        if rank := t.processes.process_index:
            torch.manual_seed(args.seed * 1_000_003 + rank)
        t.history.rewind(state.global_step)
        if state.global_step:
            t._tr_loss += t.progress.loss_since_log
            t._globalstep_last_logged = t.progress.logged_step
            log.info("resumed after step %d of %d", state.global_step, state.max_steps)
        if args.get_warmup_steps(state.max_steps) >= state.max_steps:
            log.warning("all %d steps are warm-up: the learning rate never reaches lr", state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        t = self.trainer
        if t.processes.num_processes > 1:  # a signal that reached one of them counts for all
            flags = t.accelerator.gather(torch.tensor([t.interrupts.wanted], device=args.device))
            t.interrupts.wanted = bool(flags.any())
        epoch_ends = float(state.epoch).is_integer()
        control.should_log |= epoch_ends or control.should_training_stop
        due = t.interrupts.wanted or (t.settings.save_steps and state.global_step % t.settings.save_steps == 0)
        if (
            due and not epoch_ends and not control.should_training_stop
        ):  # what ends an epoch is saved with its validation
            control.should_save = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **more: Any
    ) -> None:
        if "loss" in logs:
            t = self.trainer
            left = t.progress.seconds / max(state.global_step, 1) * (state.max_steps - state.global_step)
            names = ("epoch", "loss", "lr", "grad_norm", "photos_per_second", "peak_memory_gb")
            row = {**logs, "lr": more["lr_scheduler"].get_last_lr()[0]}
            said = f"of {state.max_steps} steps, {left / 60:.0f} min left"
            t.history.add("step", state.global_step, {name: row[name] for name in names}, said)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        if self.trainer.is_in_train:
            self.trainer.record_epoch(metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.trainer.interrupts.wanted:
            raise KeyboardInterrupt


def train(settings: TrainSettings) -> TrainResult:
    """Fine-tune as the settings say; the checkpoint folder holds the best epoch's adapter.

    Raises InputError for wrong data or models before anything is computed, CatlibError when training cannot go on.
    """
    return Trainer(settings).fit()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory is full, in CUDA's words or the CPU allocator's."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in words for sign in OUT_OF_MEMORY)


def _whole(epoch: float | None) -> float:
    return int(epoch) if epoch is not None and float(epoch).is_integer() else epoch or 0.0
