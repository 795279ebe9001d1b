"""What a training leaves behind: history.jsonl line by line, training.json, the best adapter and the last one."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from catlib.data.conversations import gives_reasons, longest_answer
from catlib.errors import CatlibError
from catlib.files import appending, read_jsonl, read_text, write_json, write_text
from catlib.paths import PACKAGE
from catlib.provenance import git_commit, package_versions
from catlib.runs import TRAINING
from catlib.settings import split_list
from catlib.training.lora import count_parameters, rank_remark
from catlib.training.run import Run
from catlib.vlm.adapters import fingerprint, save_checkpoint

log = logging.getLogger(__name__)
HISTORY = "history.jsonl"
TAGS = ["lora", "vision-language", "cat-breeds", "image-classification"]
CARD = PACKAGE / "assets" / "model_card.md"
CHOSEN = split_list(
    """mode, train_projector, lora_r, lora_alpha, lora_dropout, lora_targets, epochs, batch_size, gradient_accumulation, lr,
    projector_lr, image_pool, lr_schedule, warmup_ratio, balance, augment, seed"""
)


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


@dataclass(frozen=True)
class TrainResult:
    """What a finished training left: the checkpoint folder (the best epoch's adapter) and the lines of history.jsonl."""

    checkpoint: Path
    history: list[dict[str, Any]]
    best: dict[str, Any]
    outcome: dict[str, Any]  # as in training.json


class Record:
    """The files of one training; only the main process (`active`) writes them."""

    def __init__(self, run: Run, folder: Path, active: bool) -> None:
        self.run, self.folder, self.active = run, folder, active
        self.path = folder / HISTORY
        self.progress = Progress(run.micro_batch)
        self.arguments: TrainingArguments | None = None

    def rewind(self, step: int) -> None:
        """Drop what came after the step that training starts from."""
        if self.active:
            kept = [row for row in read_history(self.path) if row["step"] <= step] if step else []
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def add(self, kind: str, step: int, figures: Mapping[str, Any], said: str = "") -> None:
        """One line: kind is `step` or `epoch`; figures that are not finite are written as null. `said` is for the log alone."""
        if self.active:
            with appending(self.path) as write:
                write(json.dumps({"kind": kind, "step": step} | _finite(figures)) + "\n")
            texts = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()]
            log.info("step %d%s: %s", step, said, ", ".join(texts))

    def add_epoch(self, step: int, figures: dict[str, Any]) -> bool:
        """A validation: a line, the adapter in `last/`, and in the folder itself when it is the best. Whether training may go on."""
        s, p = self.run.settings, self.progress
        if not math.isfinite(figures["val_loss"]):
            raise CatlibError(f"step {step}: the validation loss is {figures['val_loss']}; training stopped")
        value = [figures["val_loss"]]
        if s.watch == "priority_f1":  # a few rare photos often tie: the loss decides between equals
            value = [-figures.get("priority_f1", figures.get("accuracy", 0.0)), *value]
        p.val_losses.append(figures["val_loss"])
        p.last, p.without_gain = figures, p.without_gain + 1
        if better := p.best_value is None or value < p.best_value:
            p.best_value, p.best, p.without_gain = value, figures, 0
        p.stopped_early = 0 < s.early_stopping <= p.without_gain
        if p.stopped_early:
            log.info("stopped early: no better %s for %d epochs", s.watch, p.without_gain)
        self.add("epoch", step, figures)
        for part in ("last", "") if better else ("last",):
            self.save(part, figures)
        return not p.stopped_early

    def save(self, part: str, figures: Mapping[str, Any]) -> None:
        """The adapter as it is, with processor, card and record, in the folder or in its `last/`."""
        if self.active:
            facts, card = self._facts(figures), model_card(self.run, figures)
            save_checkpoint(self.run.vlm, self.folder / part, facts, card, self.arguments)

    def write(self) -> None:
        """Bring the records beside the adapters up to date; the first one is there before any adapter."""
        for part, figures in (("", self.progress.best), ("last", self.progress.last)):
            if self.active and (figures or not part):
                write_json(self.folder / part / TRAINING, self._facts(figures))

    def _facts(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        remarks = list(filter(None, [rank_remark(self.run.settings)]))
        return self._of_the_run | {"figures": _finite(figures), "outcome": self.outcome(), "remarks": remarks}

    @cached_property
    def _of_the_run(self) -> dict[str, Any]:
        """What stays the same. Computed once: it reads all weights of the base and all answers."""
        data = self.run.data
        return {
            "settings": asdict(self.run.settings),
            "base_model": self.run.vlm.name,
            "breeds": list(data.breeds),
            "priority_breeds": list(data.priority),
            "question": data.question,
            "other_questions": data.others,
            "spelled": data.spelled,
            "reasons": gives_reasons(data.train),
            "answer_tokens": longest_answer(self.run.vlm.processor.tokenizer, data.train),
            "base_fingerprint": fingerprint(self.run.vlm),
            "data": data.digests,
            "lineage": data.lineage,
        }

    def outcome(self) -> dict[str, Any]:
        """How it went: the plan asks for a training without out-of-memory whose validation loss falls."""
        p = self.progress
        return {
            "finished": p.finished,
            "stopped_early": p.stopped_early,
            "out_of_memory": p.out_of_memory,
            "device": self.run.vlm.device.type,
            "micro_batch": p.micro_batch,
            "gradient_checkpointing": self.run.settings.recomputes,
            "peak_memory_gb": p.last.get("peak_memory_gb"),
            "seconds": p.seconds,
            "val_losses": p.val_losses,
            "val_loss_fell": min(p.val_losses[1:]) < p.val_losses[0] if len(p.val_losses) > 1 else None,
        }

    def result(self, best: dict[str, Any], outcome: dict[str, Any]) -> TrainResult:
        return TrainResult(self.folder, read_history(self.path), best, outcome)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of history.jsonl; a half-written last line is dropped."""
    if not path.is_file():
        return []
    text = read_text(path)
    if not text.endswith("\n"):
        write_text(path, text[: text.rfind("\n") + 1])
    return [row for _, row in read_jsonl(path)]


def model_card(run: Run, figures: Mapping[str, Any]) -> str:
    """Markdown with the metadata block that the Hugging Face hub reads (https://huggingface.co/docs/hub/model-cards)."""

    def table(rows: Iterable[Sequence[Any]]) -> str:
        return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)

    data, (trainable, total) = run.data, count_parameters(run.vlm.model)
    metadata = {"base_model": run.vlm.name, "library_name": "peft", "pipeline_tag": "image-text-to-text"}
    train, val = (Counter(sample.breed for sample in part) for part in (data.train, data.val))
    names = {breed: breed + " (priority)" * (breed in data.priority) for breed in data.breeds}
    return read_text(CARD).format(
        metadata=yaml.safe_dump(metadata | {"tags": TAGS}, sort_keys=True).strip(),
        base=run.vlm.name,
        question=data.question,
        trainable=trainable,
        total=total,
        mode=run.settings.mode,
        train=len(data.train),
        val=len(data.val),
        breeds=len(data.breeds),
        counts=table([names[breed], train[breed], val[breed]] for breed in data.breeds),
        settings=table([key, getattr(run.settings, key)] for key in CHOSEN),
        figures=table([key, f"{value:.4g}"] for key, value in figures.items() if isinstance(value, int | float)),
        versions=", ".join(f"{name} {version}" for name, version in package_versions().items()),
        commit=git_commit() or "unknown",
    )


def _finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
