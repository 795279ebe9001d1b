"""What a training run tells a reader: what was supervised, curves, cost, and a conclusion computed from them."""

import html
import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from catlib.figures import BLUE, GREEN, GREY, ORANGE, PINK, WIDTH, percent_axis, styled
from catlib.settings import TrainSettings
from catlib.training.lora import count_parameters
from catlib.training.memory import Estimate
from catlib.training.run import Run
from catlib.vlm.batches import image_token_of, segments

Rows = Sequence[dict[str, Any]]
LEVEL = 1.02  # a validation loss within 2 % of the best one is no sign of overfitting
COLOURS = {"prompt": "#5b6670", "image": "#8A949E", "answer": "#0b6b3a"}


def setup_sentence(run: Run) -> str:
    """What is about to be trained, on what."""
    trainable, total = count_parameters(run.vlm.model)
    s, data = run.settings, run.data
    return (
        f"**{trainable:,}** of {total:,} parameters are trained ({trainable / total:.2%}; mode `{s.mode}`, rank {s.lora_r}, projector "
        f"`{s.train_projector}`), on **{len(data.train)} photos** of {len(data.breeds)} breeds, {len(data.val)} photos for "
        f"validation. Each optimizer step sees {s.batch_size * s.gradient_accumulation} photos; nothing in the vision tower changes."
    )


def supervised_html(run: Run, samples: int = 3) -> str:
    """The first samples as the model gets them, in HTML: grey what is given, green what it is taught to answer."""
    chosen = run.data.train[:samples]
    batch = run.collate(chosen)
    token = image_token_of(run.vlm.base.config)
    lines = []
    for row, sample in enumerate(chosen):
        spans = "".join(
            f'<span style="color:{COLOURS[role]};{"font-weight:700;background:#e3f4ea" if role == "answer" else ""}">'
            f"{html.escape(text)}</span>"
            for text, role in segments(batch, row, run.vlm.processor, token)
        )
        lines.append(
            f'<div style="margin:.4em 0"><small>{html.escape(sample.id)}</small><br><code>{spans}</code></div>'
        )
    return "\n".join(lines)


@styled
def loss_figure(history: Rows) -> Figure:
    """Training and validation loss, breed accuracy, learning rate and gradient norm over the optimizer steps."""
    steps, epochs = of_kind(history, "step"), of_kind(history, "epoch")
    figure, ((loss, accuracy), (rate, norm)) = plt.subplots(2, 2, figsize=(WIDTH, 6.2))
    loss.plot([r["step"] for r in steps], [r["loss"] for r in steps], color=GREY, label="training")
    loss.plot([r["step"] for r in epochs], [r["val_loss"] for r in epochs], color=BLUE, marker="o", label="validation")
    loss.set(title="Loss (nats a token)", ylim=(0, None))
    loss.legend()
    watched = [r for r in epochs if r.get("accuracy") is not None]
    accuracy.plot(
        [r["step"] for r in watched], [r["accuracy"] for r in watched], color=GREEN, marker="o", label="all breeds"
    )
    rare = [r for r in watched if r.get("priority_f1") is not None]
    if rare:
        accuracy.plot(
            [r["step"] for r in rare],
            [r["priority_f1"] for r in rare],
            color=PINK,
            marker="s",
            label="priority macro-F1",
        )
    accuracy.set(title="Closed-set accuracy on the watched photos")
    percent_axis(accuracy, "y", 0, 1.02)
    accuracy.legend(loc="lower right")
    rate.plot([r["step"] for r in steps], [r["lr"] for r in steps], color=ORANGE)
    rate.set(title="Learning rate", xlabel="optimizer step", ylim=(0, None))
    norm.plot([r["step"] for r in steps], [r["grad_norm"] for r in steps], color=GREY)
    norm.set(title="Gradient norm before clipping", xlabel="optimizer step", ylim=(0, None))
    return figure


def epoch_rows(history: Rows) -> list[dict[str, str]]:
    """A row an epoch for a table."""
    return [
        {
            "epoch": f"{row['epoch']:g}",
            "validation loss": f"{row['val_loss']:.3f}",
            "accuracy": _percent(row.get("accuracy")),
            "priority macro-F1": _percent(row.get("priority_f1")),
            "time so far": f"{row['seconds']:.0f} s",
        }
        for row in of_kind(history, "epoch")
    ]


def cost_sentence(history: Rows, estimate: Estimate, device: str) -> str:
    """Time, speed and memory of the run, the memory beside the estimate."""
    last, steps = of_kind(history, "epoch")[-1], of_kind(history, "step")
    rates = sorted(row["photos_per_second"] for row in steps)
    what = "of GPU memory" if device == "cuda" else "resident, Python and its libraries included"
    return (
        f"Training took **{last['seconds']:.0f} s** at a median of **{rates[len(rates) // 2]:.1f} photos/s**, peak memory "
        f"**{last['peak_memory_gb']:.2f} GB** {what}; the estimate for the model alone is {estimate.peak / 1e9:.2f} GB."
    )


def training_conclusion(history: Rows, settings: TrainSettings) -> str:
    """Did it train, did it overfit? From the validation loss of the epochs."""
    epochs = of_kind(history, "epoch")
    losses = [row["val_loss"] for row in epochs]
    best = min(range(len(losses)), key=losses.__getitem__)
    falling = all(b < a for a, b in itertools.pairwise(losses))
    if len(losses) == 1:
        trained = f"One epoch was run; its validation loss is {losses[0]:.3f}, and with one there is no trend to judge."
    elif falling:
        trained = f"**It trained**: the validation loss fell in every epoch, from {losses[0]:.3f} to {losses[-1]:.3f}."
    elif best == 0:
        trained = (
            f"**It did not improve** after the first epoch (validation loss {losses[0]:.3f}, then {losses[-1]:.3f})."
        )
    else:
        trained = f"It trained until epoch {best + 1} (validation loss {losses[0]:.3f} to {losses[best]:.3f}), not in every epoch."
    last_training = of_kind(history, "step")[-1]["loss"]
    if best < len(losses) - 1 and losses[-1] < LEVEL * losses[best]:
        fit = f"It has **levelled off**: the last validation loss, {losses[-1]:.3f}, is within {LEVEL - 1:.0%} of the best."
    elif best < len(losses) - 1:
        fit = f"**It overfits** from there: the last epoch's validation loss is {losses[-1]:.3f}; the loss was best in epoch {best + 1}."
    elif losses[-1] > 2 * last_training:
        fit = (
            f"The training loss ({last_training:.3f}) is less than half of the validation loss ({losses[-1]:.3f}): it remembers photos, "
            "though validation still gains; more epochs may overfit."
        )
    else:
        fit = f"There is no sign of overfitting: training loss {last_training:.3f}, validation loss {losses[-1]:.3f}."
    row = kept_epoch(epochs, settings.watch)
    parts = (
        [f"{_percent(row['accuracy'])} of the watched validation photos are named right"]
        if row.get("accuracy") is not None
        else []
    )
    if row.get("priority_f1") is not None:
        parts.append(f"the priority breeds reach a macro-F1 of {_percent(row['priority_f1'])}")
    closing = f" In the epoch that was kept ({row['epoch']:g}), {' and '.join(parts)}." if parts else ""
    return f"{trained} {fit}{closing} The checkpoint is `{settings.output_dir}`."


def kept_epoch(epochs: Rows, watch: str) -> dict[str, Any]:
    """The epoch whose adapter the checkpoint holds: the trainer's own choice, equal values decided by the loss."""
    if watch == "val_loss":
        return min(epochs, key=lambda row: row["val_loss"])
    return min(epochs, key=lambda row: (-row.get("priority_f1", row.get("accuracy", 0.0)), row["val_loss"]))


def of_kind(history: Rows, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind, `step` or `epoch`."""
    return [row for row in history if row["kind"] == kind]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
