"""Training by transformers' Trainer, with catlib's batches, loss, optimizer groups and validation as plug-ins."""

import logging
import math
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from operator import mul
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, patch_environment
from torch.utils.data import DataLoader
from transformers import PrinterCallback

from catlib.data.conversations import evenly
from catlib.data.records import Sample
from catlib.errors import CatlibError
from catlib.paths import resolve
from catlib.provenance import peak_resident_gb
from catlib.runs import read_training
from catlib.settings import TrainSettings
from catlib.signals import ENDINGS, handling
from catlib.training.arguments import check_launch, own_autocast, own_state, training_arguments
from catlib.training.callbacks import Flow, Tracker
from catlib.training.kernels import constant_factors
from catlib.training.lanes import lanes_for
from catlib.training.lora import with_alpha
from catlib.training.loss import AnswerLoss, Watch, validation_loss
from catlib.training.order import Steps, share
from catlib.training.record import Record, TrainResult
from catlib.training.run import Run, TrainingData
from catlib.training.saves import SavingTrainer, alone, prepare_folder, read_progress, saves_in
from catlib.vlm.batches import Batch, check_batch
from catlib.vlm.models import out_of_memory

log = logging.getLogger(__name__)
T = TypeVar("T")


class Trainer(SavingTrainer):
    """One training; `fit()` runs it, or continues what was interrupted.

    One item of the data loader is one optimizer step with its samples of all processes: `training_step` cuts them into
    micro-batches. So memory that runs out is met with smaller ones, the number of processes changes nothing, and the
    loss is the mean over the supervised tokens of the whole step. Everything else is transformers' Trainer: its
    arguments (setting `trainer_args`), its callbacks (`add_callback`), its trackers.
    """

    def __init__(self, settings: TrainSettings) -> None:
        settings = with_alpha(settings)
        self.sharding = check_launch()
        self.folder, self.processes = resolve(settings.output_dir), own_state(settings.device)
        data = TrainingData(settings)
        prepare_folder(self.folder, settings, data.digests)
        torch.manual_seed(settings.training_seed)  # before LoRA's matrices are drawn
        self.run = Run(settings, data, self.sharding)
        self.settings = settings = self.run.settings  # with what `auto` came to
        self.drawn = torch.get_rng_state()
        self.vlm, self.loss = self.run.vlm, AnswerLoss(self.run.vlm)
        self.trained = [(n, p) for n, p in self.vlm.model.named_parameters() if p.requires_grad]
        self.record = Record(self.run, self.folder, self.processes.is_main_process)
        self.interrupted = False  # a signal has asked for the end, which waits for that of a step
        with patch_environment(ACCELERATE_USE_FSDP="false"):  # sharding is done by `Run`, on frozen weights only
            super().__init__(
                model=self.loss,
                args=training_arguments(settings, self.vlm.dtype, self.vlm.device),
                train_dataset=data.train,
                eval_dataset=data.val,
                callbacks=[Flow(self)],
            )
        self.remove_callback(PrinterCallback)
        self.record.arguments = self.args
        self.tracker = Tracker(settings.report_to, self.folder)
        self.add_callback(self.tracker)
        self.lanes = lanes_for(self.vlm, settings, self.processes.num_processes)
        watched = evenly(data.val, settings.watch_photos, settings.seed) if settings.watch_photos else ()
        self.watch = Watch(self.run, watched) if watched else None
        # Three times the loss of guessing among all tokens: no longer bad luck but a broken training.
        self.most = 3 * math.log(self.vlm.base.config.get_text_config().vocab_size)
        if self.vlm.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.vlm.device)
        self.since, self._busy, self._seen = time.perf_counter(), 0.0, 0
        self._samples: Sequence[Sample] = ()  # of the step that is under way

    def fit(self) -> TrainResult:
        """Train to the end, from where an interrupted training of the same settings stopped.

        The first SIGINT, SIGTERM or SIGHUP saves after the step that is under way and interrupts; a second one interrupts at once.
        """
        self.interrupted = False
        ends = handling(signal.SIGINT, *ENDINGS, handler=self._interrupt, ignored=False)
        with alone(self.folder, self.processes.is_main_process), ends:
            self.processes.wait_for_everyone()
            begun = self.record.progress.seconds > 0
            earlier = read_training(self.folder) if begun or self.settings.resume else {}
            if earlier.get("outcome", {}).get("finished"):
                return self.record.result(earlier["figures"], earlier["outcome"])
            saved = saves_in(self.folder)[-1:] if begun or self.settings.resume else []
            if begun and not saved:
                raise CatlibError("training was interrupted before anything was saved: make the Trainer anew")
            try:
                check_batch(self.vlm, self.run.collate(self.run.data.train[: self.settings.batch_size]))
                self.optimizer = self.lr_scheduler = None  # of an interrupted call
                if saved:
                    self.record.progress = read_progress(saved[0], self.is_deepspeed_enabled)
                else:
                    self._forget_saves()  # of an earlier training, with `resume` off
                    self.record.write()
                if not self.record.progress.stopped_early:  # else killed between its last save and its end
                    self.train(resume_from_checkpoint=str(saved[0]) if saved else None)
                self.record.progress.finished = True
                self.record.write()
                self._forget_saves()
            except BaseException as error:
                self.is_in_train, killed = False, isinstance(error, KeyboardInterrupt)
                if killed:
                    log.warning("interrupted after step %d; run it again to go on", self.state.global_step)
                    self.record.save("last", self.record.progress.last | {"interrupted": True})
                self.tracker.close("KILLED" if killed else "FAILED")
                raise
        return self.record.result(self.record.progress.best, self.record.outcome())

    def _interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        log.warning("interrupted: saving after this step; once more ends at once")

    def _forget_saves(self) -> None:
        for folder in saves_in(self.folder) if self.processes.is_main_process else []:
            shutil.rmtree(folder)

    # --- plug-ins of transformers' Trainer ---

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Lists of samples, one for each optimizer step; photos of the coming ones are made ready."""
        s, samples, augment = self.settings, self.run.data.train, self.run.augment

        def soon(coming: Sequence[Sample]) -> None:
            for part, _ in self._share(coming):
                self.run.collate.prefetch(part)

        size = s.batch_size * s.gradient_accumulation  # whatever the number of processes: they share it
        begin = augment.start_epoch if augment else lambda epoch, seen: None
        steps = Steps(samples, size, s.training_seed, s.balance, lambda: self.state.global_step, begin, soon)
        return DataLoader(samples, batch_sampler=steps, collate_fn=list, generator=torch.Generator())  # type: ignore[arg-type]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments, with a learning rate of its own for a projector that is trained in full."""
        if self.optimizer is None:
            s, rates = self.settings, (self.settings.lr, self.settings.projector_lr)
            groups: list[Any] = [{"params": [], "lr": lr, "weight_decay": s.weight_decay} for lr in rates]
            for name, parameter in self.trained:
                of_projector = f"{self.vlm.family.projector}." in name and "lora_" not in name
                groups[of_projector]["params"].append(parameter)
            kind, values = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind([group for group in groups if group["params"]], **values)
        return self.optimizer

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Put into `.grad` the gradient of the mean loss over all supervised tokens of a step, however it is cut up."""
        model.train()
        self._samples = inputs
        loss = self._within_memory(lambda: self._gradients(model, inputs))
        self._seen, self._busy = self._seen + len(inputs), self._busy + self.tick()
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss on the validation samples, and the breeds of the watched ones; the same figures in every process."""
        samples = self.run.data.val if eval_dataset is None else eval_dataset
        progress, collate, watch = self.record.progress, self.run.val_collate, self.watch

        def loss() -> float:
            return validation_loss(self.loss, collate, samples, progress.micro_batch, self.lanes)

        self.loss.eval()
        with self.accelerator.autocast(), own_autocast(self.vlm):
            figures = {"loss": self._within_memory(loss)}
            figures |= self._within_memory(lambda: watch.measure(progress.micro_batch)) if watch else {}
        self.loss.train()
        if self.processes.num_processes > 1:
            figures = broadcast_object_list([figures])[0]
        self.tick()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """transformers' figures of a step with speed and memory."""
        if "loss" in logs:
            logs |= {"photos_per_second": self._seen / max(self._busy, 1e-9), "peak_memory_gb": self.peak_memory_gb()}
            self._seen, self._busy = 0, 0.0
        super().log(logs, start_time)

    def tick(self) -> float:
        """Seconds since the last call; they count as training's."""
        before, self.since = self.since, time.perf_counter()
        self.record.progress.seconds += self.since - before
        return self.since - before

    def peak_memory_gb(self) -> float:
        """Peak memory of this process in GB (10^9 bytes): the GPU's where there is one, else the resident set."""
        on_gpu, device = self.vlm.device.type == "cuda", self.vlm.device
        return torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else peak_resident_gb()

    # --- the gradient of a step ---

    def _share(self, samples: Sequence[Sample]) -> list[tuple[Sequence[Sample], float]]:
        own = (self.processes.process_index, self.processes.num_processes)
        return share(samples, self.record.progress.micro_batch, *own)

    def _gradients(self, model: torch.nn.Module, samples: Sequence[Sample]) -> torch.Tensor:
        model.zero_grad()
        tokens = sum(len(self.run.collate.answer_ids(sample)) for sample in samples)
        # DDP takes the mean of the processes' gradients, transformers that of their losses: each gives its part so many times.
        part_of_mean = self.processes.num_processes / tokens
        parts, losses = self._share(samples), []
        for number, (part, weight) in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                self.accelerator.gradient_state._set_sync_gradients(number == len(parts))  # DeepSpeed steps then
                losses += [(weight, *loss) for loss in self._backward(model, part, weight * part_of_mean)]
        weights, ids, summed, counts = zip(*losses, strict=True)
        # Only now is a GPU waited for: it works through the whole step while the next passes are being issued.
        values, step = torch.stack(summed).tolist(), self.state.global_step
        warm = step >= self.args.get_warmup_steps(self.state.max_steps)
        for of, value, n in zip(ids, values, counts, strict=True):
            if not math.isfinite(value) or (warm and value / n > self.most):
                raise CatlibError(
                    f"step {step + 1}: loss {value / n:.3g} in the samples {', '.join(of)}; training stopped. "
                    "Lower lr, or look at these photos and answers"
                )
        return torch.tensor(sum(map(mul, weights, values)) * part_of_mean, device=self.args.device)

    def _backward(self, model: torch.nn.Module, samples: Sequence[Sample], scale: float) -> list[tuple[Any, ...]]:
        """Add `scale` times the gradient of a micro-batch's summed loss, each lane's part in a thread of its own; for
        each part the samples' ids, the summed loss and the number of supervised tokens.
        """
        batches = [self.run.collate(part).to(self.args.device) for part in self.lanes.cut(samples)]
        parameters = [parameter for _, parameter in self.trained]

        def work(batch: Batch) -> tuple[tuple[Any, ...], tuple[torch.Tensor | None, ...]]:
            loss, n = model(batch)
            known = batch.sample_ids, loss.detach(), n
            if len(batches) > 1:
                return known, torch.autograd.grad(loss * scale, parameters, allow_unused=True)
            self.accelerator.backward(loss * scale)
            return known, ()

        results = self.lanes.run(work, batches)
        for _, gradients in results:  # in order, whichever lane was first: a sum of floats depends on it
            for parameter, gradient in zip(parameters, gradients, strict=False):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return [known for known, _ in results]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        norm, scaler = float(super()._get_grad_norm(model, grad_norm)), self.accelerator.scaler
        lowest = scaler is None or scaler.get_scale() <= 1  # else fp16's scale is lowered, and the step left out
        if not math.isfinite(norm) and lowest:
            ids = ", ".join(sample.id for sample in self._samples)
            raise CatlibError(f"step {self.state.global_step + 1}: the gradient is not finite, in the samples {ids}")
        return norm

    def _within_memory(self, work: Callable[[], T]) -> T:
        """`work()`, again with half the micro-batch whenever the device runs out of memory; no weight was touched yet."""
        progress = self.record.progress
        while True:
            try:
                with constant_factors(self.vlm.model):
                    return work()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                # Of several processes the others wait in the middle of an exchange.
                if progress.micro_batch == 1 or self.processes.num_processes > 1:
                    raise CatlibError(
                        f"out of memory at a micro-batch of {progress.micro_batch}: set gradient_checkpointing, mode qlora, or a "
                        f"smaller batch_size ({str(error).splitlines()[0]})"
                    ) from error
            progress.micro_batch, progress.out_of_memory = progress.micro_batch // 2, progress.out_of_memory + 1
            self.loss.zero_grad()
            torch.cuda.empty_cache()
            log.warning("out of memory: micro-batches of %d from here, the effective batch stays", progress.micro_batch)


def train(settings: TrainSettings) -> TrainResult:
    """Fine-tune as the settings say; the checkpoint folder holds the best epoch's adapter.

    Raises InputError for wrong data or models before anything is computed, CatlibError when training cannot go on.
    """
    return Trainer(settings).fit()
