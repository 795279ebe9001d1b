"""The training loop: plain steps over a fixed order, resumable to the same weights, stopped before it can lie."""

import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from catlib.data.conversations import spelled_answers
from catlib.data.records import Sample
from catlib.errors import CatlibError
from catlib.settings import TrainSettings
from catlib.training.history import History, read_history
from catlib.training.interrupts import AfterThisStep
from catlib.training.lora import rank_remark, with_alpha
from catlib.training.measure import Meter
from catlib.training.model_card import model_card
from catlib.training.order import epoch_order, steps_of
from catlib.training.passes import Passes
from catlib.training.run import Run, set_up
from catlib.training.state import load_state, random_state, save_state, set_random_state
from catlib.training.team import Team
from catlib.training.trackers import check_tracker
from catlib.training.validation import Watch, validation_loss, watched_part
from catlib.vlm.adapters import fingerprint, save_checkpoint
from catlib.vlm.batches import check_batch

log = logging.getLogger(__name__)
SAME_RUN = (
    "epochs",
    "batch_size",
    "gradient_accumulation",
    "seed",
    "lr",
    "projector_lr",
    "lr_schedule",
    "warmup_ratio",
    "mode",
    "train_projector",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "balance",
    "base_model",
    "use_rslora",
    "use_dora",
    "weight_decay",
    "max_grad_norm",
    "dtype",
    "augment",
    "cache_features",
)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left: the checkpoint folder (the best epoch's adapter) and the lines of history.jsonl."""

    checkpoint: Path
    history: list[dict[str, Any]]
    best: dict[str, float]


class Progress:
    """Where a run stands. `state()` and `set()` move it to and from the file that a resumed run starts from."""

    def __init__(self) -> None:
        self.epoch = self.step_in_epoch = self.step = 0
        self.best_value: list[float] | None = None  # lower is better, entry by entry
        self.best: dict[str, float] = {}
        self.epochs_without_gain = 0
        self.seconds = 0.0
        self.window: list[tuple[float, int]] = []  # (summed loss, tokens) of the steps since the last logged one
        self.stopped = False

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    def set(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Trainer:
    """One run. `train(settings)` below is the way in; the class only holds what the steps share."""

    def __init__(self, settings: TrainSettings) -> None:
        check_tracker(settings.tracker)
        self.settings = settings
        self.team = Team(settings)
        self.main = self.team.main
        torch.manual_seed(settings.seed)  # before LoRA's matrices are drawn
        self.run: Run = set_up(settings, self.team)
        self.vlm = self.run.vlm
        self.progress = Progress()
        self.interrupt = AfterThisStep()
        self.meter = Meter(self.vlm.base.device)
        self._prepare()

    def _prepare(self) -> None:
        s, run = self.settings, self.run
        named = [(n, p) for n, p in self.vlm.model.named_parameters() if p.requires_grad]
        projector = [p for n, p in named if f"{self.vlm.family.projector}." in n and "lora_" not in n]
        rest = [p for n, p in named if not any(p is q for q in projector)]
        groups = [{"params": rest, "lr": s.lr}, {"params": projector, "lr": s.projector_lr}]
        groups = [group for group in groups if group["params"]]
        self.trained = named
        self.passes = Passes(run, self.team, [parameter for _, parameter in named])
        self.optimizer = torch.optim.AdamW(
            groups, weight_decay=s.weight_decay, fused=self.vlm.base.device.type != "mps"
        )
        steps_an_epoch = math.ceil(len(run.data.train) / self.passes.effective_batch)
        total = steps_an_epoch * s.epochs
        warm_up = math.ceil(s.warmup_ratio * total)
        kind = "constant_with_warmup" if s.lr_schedule == "constant" else s.lr_schedule
        self.schedule = get_scheduler(kind, self.optimizer, warm_up, total)
        self.run.folder.mkdir(parents=True, exist_ok=True)
        self.history = History(run.folder, s, self.main)
        watched = watched_part(run.data.val, s.watch_photos, s.seed)
        question = run.data.val[0].question
        self.watch = (
            Watch(
                self.vlm,
                run.val_collate,
                watched,
                run.data.breeds,
                run.data.priority,
                question,
                spelled_answers(run.data.val),
            )
            if watched
            else None
        )
        self.total_steps = total

    # --- the loop ---

    def fit(self) -> TrainResult:
        """Train to the end, from where an interrupted run of the same settings stopped."""
        self._resume()
        s, p = self.settings, self.progress
        check_batch(self.vlm, self.run.collate(self.run.data.train[: s.batch_size]))
        try:
            with self.interrupt:
                while p.epoch < s.epochs and not p.stopped:
                    self._epoch()
        except KeyboardInterrupt:
            log.warning("interrupted after step %d; saving where training stands", p.step)
            self._save_state()
            self._save_adapter("last", {"interrupted": True})
            self.history.close("KILLED")
            raise
        except BaseException:
            self.history.close("FAILED")
            raise
        self.history.close("FINISHED")
        history = read_history(self.history.path)
        return TrainResult(self.run.folder, history, p.best)

    def _epoch(self) -> None:
        s, p, samples = self.settings, self.progress, self.run.data.train
        if self.run.collate.augment is not None:
            self.run.collate.augment.start_epoch(p.epoch)
        steps = steps_of(epoch_order(samples, s.seed, p.epoch, s.balance), self.passes.effective_batch)
        seen, since = 0, time.perf_counter()
        for number, indices in enumerate(steps[p.step_in_epoch :], start=p.step_in_epoch + 1):
            for soon in (indices, *steps[number : number + 1]):
                self.passes.prefetch([samples[i] for i in soon])
            summed, tokens, norm = self._step([samples[i] for i in indices])
            p.step, p.step_in_epoch = p.step + 1, p.step_in_epoch + 1
            p.window.append((summed, tokens))
            seen += len(indices)
            if p.step % s.log_steps == 0 or p.step_in_epoch == len(steps):
                elapsed = time.perf_counter() - since
                self.history.add(
                    "step",
                    p.step,
                    {
                        "epoch": p.epoch + p.step_in_epoch / len(steps),
                        "loss": sum(w[0] for w in p.window) / sum(w[1] for w in p.window),
                        "lr": self.schedule.get_last_lr()[0],
                        "grad_norm": norm,
                        "photos_per_second": seen / elapsed,
                        "peak_memory_gb": self.meter.peak_gb(),
                    },
                )
                p.seconds += elapsed
                p.window, seen, since = [], 0, time.perf_counter()
            if s.save_steps and p.step % s.save_steps == 0 and p.step_in_epoch < len(steps):
                p.seconds += time.perf_counter() - since
                since = time.perf_counter()
                self._save_state()
            self.interrupt.check()
        p.epoch, p.step_in_epoch = p.epoch + 1, 0
        self._end_of_epoch()

    def _step(self, samples: list[Sample]) -> tuple[float, int, float]:
        """One optimizer step: (summed loss, supervised tokens, gradient norm before clipping)."""
        parameters = self.passes.parameters
        summed, tokens = self.passes.add_gradients(samples, self.progress.step)
        self.team.sum_gradients(parameters)
        summed, tokens = self.team.sum(summed, tokens)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm))
        if not math.isfinite(norm):
            ids = ", ".join(sample.id for sample in samples)
            raise CatlibError(f"step {self.progress.step + 1}: the gradient is not finite, in the samples {ids}")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return summed, tokens, norm

    # --- after an epoch ---

    def _end_of_epoch(self) -> None:
        s, p = self.settings, self.progress
        start = time.perf_counter()
        self.vlm.model.eval()
        passes = self.passes
        with passes.autocast():
            figures: dict[str, Any] = {
                "epoch": p.epoch,
                "val_loss": passes.within_memory(
                    lambda: validation_loss(
                        passes.loss,
                        self.run.val_collate,
                        self.run.data.val,
                        passes.micro_batch,
                        self.team,
                        passes.lanes,
                    )
                ),
            }
            if (watch := self.watch) is not None:
                figures |= passes.within_memory(lambda: watch.measure(passes.micro_batch))
        figures = self.team.from_main(figures)
        self.vlm.model.train()
        value = [figures["val_loss"]]
        if s.watch == "priority_f1":  # a few rare photos often tie: the loss decides between equals
            value = [-figures.get("priority_f1", figures.get("accuracy", 0.0)), *value]
        better = p.best_value is None or value < p.best_value
        p.epochs_without_gain = 0 if better else p.epochs_without_gain + 1
        if better:
            p.best_value, p.best = value, dict(figures)
        p.seconds += time.perf_counter() - start
        figures |= {"seconds": p.seconds, "peak_memory_gb": self.meter.peak_gb()}
        self.history.add("epoch", p.step, figures)
        self._save_adapter("last", figures)
        if better:
            self._save_adapter("", figures)
        if s.early_stopping and p.epochs_without_gain >= s.early_stopping:
            log.info("stopped early: no better %s for %d epochs", s.watch, p.epochs_without_gain)
            p.stopped = True
        self._save_state()

    # --- saving and resuming ---

    def _save_adapter(self, part: str, figures: dict[str, Any]) -> None:
        """The best adapter lies in the checkpoint folder itself, the last one in `last/`."""
        if not self.main:
            return
        data = self.run.data
        facts = {
            "settings": asdict(self.settings),
            "base_model": self.vlm.name,
            "breeds": list(data.breeds),
            "priority_breeds": list(data.priority),
            "question": data.val[0].question,
            "spelled": spelled_answers(data.val),
            "base_fingerprint": fingerprint(self.vlm),
            "data": data.digests,
            "figures": figures,
            "micro_batch": self.passes.micro_batch,
            "remarks": [remark for remark in (rank_remark(self.settings),) if remark],
        }
        card = model_card(self.vlm, self.settings, data, figures)
        save_checkpoint(self.vlm, self.run.folder / part, facts, card)

    @property
    def _state_file(self) -> Path:
        return self.run.folder / "state" / "state.pt"

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        settings = asdict(self.settings)
        return {key: settings[key] for key in SAME_RUN} | {"data": self.run.data.digests}

    def _save_state(self) -> None:
        if self.main:
            save_state(
                self._state_file,
                {
                    "identity": self._identity(),
                    "progress": self.progress.state(),
                    "weights": {name: parameter.detach().cpu() for name, parameter in self.trained},
                    "optimizer": self.optimizer.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "random": random_state(),
                },
            )

    def _resume(self) -> None:
        state = load_state(self._state_file) if self.settings.resume else None
        if state is not None and state["identity"] != self._identity():
            old, new = state["identity"], self._identity()
            changed = sorted(key for key in new if old.get(key) != new[key])
            log.warning("%s holds a run with other %s: starting anew", self.run.folder, ", ".join(changed))
            state = None
        if state is not None:
            weights = state["weights"]
            for name, parameter in self.trained:
                parameter.data.copy_(weights[name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.progress.set(state["progress"])
            set_random_state(state["random"])
            log.info("resumed after step %d of %d", self.progress.step, self.total_steps)
        self.history.rewind(self.progress.step)


def train(settings: TrainSettings) -> TrainResult:
    """Fine-tune as the settings say; the checkpoint folder holds the best epoch's adapter.

    Raises InputError for wrong data or models before anything is computed, CatlibError when training cannot go on.
    """
    return Trainer(with_alpha(settings)).fit()
