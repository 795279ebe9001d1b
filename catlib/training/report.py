"""What a training tells a reader: what was supervised, curves, cost, and a conclusion computed from them."""

import html
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from catlib.colors import BLUE, GREEN, GREY, ORANGE, PINK
from catlib.errors import CatlibError
from catlib.figures import WIDTH, figure, percent_axis
from catlib.training.lora import count_parameters
from catlib.training.memory import Footprint
from catlib.training.trainer import Trainer, TrainResult
from catlib.vlm.batches import image_token_of, segments

Rows = Sequence[dict[str, Any]]
LEVEL = 1.02  # a validation loss within 2 % of the best one is no sign of overfitting
STYLES = {
    "prompt": "color:#5b6670",
    "image": "color:#5a6670",
    "answer": "color:#0b6b3a;font-weight:700;background:#e3f4ea",
}


def setup_table(trainer: Trainer) -> pd.DataFrame:
    """What is about to be trained, on what."""
    trainable, total = count_parameters(trainer.vlm.model)
    s, data = trainer.settings, trainer.run.data
    way = "with" if s.recomputes else "without"
    rows = {
        "trained parameters": f"{trainable:,} of {total:,} ({trainable / total:.2%})",
        "mode": f"{s.mode}, rank {s.lora_r}, projector {s.train_projector}",
        "training photos": f"{len(data.train)} of {len(data.breeds)} breeds",
        "validation photos": f"{len(data.val)}",
        "photos an optimizer step": f"{s.batch_size * s.gradient_accumulation}",
        "a forward pass": f"{trainer.record.progress.micro_batch} photos, {way} gradient checkpointing",
        "question": data.question,
    }
    return pd.DataFrame({"value": rows})


def supervised_html(trainer: Trainer, samples: int = 3) -> str:
    """The first samples as the model gets them, in HTML: grey what is given, green what it is taught to answer."""
    chosen = trainer.run.data.train[:samples]
    batch = trainer.run.collate(chosen)
    token = image_token_of(trainer.vlm.base.config)
    lines = []
    for row, sample in enumerate(chosen):
        parts = segments(batch, row, trainer.vlm.processor, token)
        spans = "".join(f'<span style="{STYLES[role]}">{html.escape(text)}</span>' for text, role in parts)
        name = f"<small>{html.escape(sample.id)}</small>"
        lines.append(f'<div style="margin:.4em 0">{name}<br><code>{spans}</code></div>')
    return "\n".join(lines)


def epochs_table(history: Rows) -> pd.DataFrame:
    """A row an epoch."""
    rows = [
        {
            "epoch": f"{row['epoch']:g}",
            "validation loss": f"{row['val_loss']:.3f}",
            "accuracy": _percent(row.get("accuracy")),
            "priority macro-F1": _percent(row.get("priority_f1")),
            **({"breeds known before": _percent(row["old_accuracy"])} if "old_accuracy" in row else {}),
            "time so far": f"{row['seconds']:.0f} s",
        }
        for row in of_kind(history, "epoch")
    ]
    return pd.DataFrame(rows).set_index("epoch")


@figure
def curves(history: Rows) -> tuple[Figure, str]:
    """Training and validation loss, breed accuracy, learning rate and gradient norm over the optimizer steps."""
    steps, epochs = of_kind(history, "step"), of_kind(history, "epoch")
    drawn, ((loss, accuracy), (rate, norm)) = plt.subplots(2, 2, figsize=(WIDTH, 6.2))

    def line(axes: Any, rows: Rows, key: str, color: str, label: str = "", marker: str = "") -> None:
        if known := [(row["step"], row[key]) for row in rows if row.get(key) is not None]:
            axes.plot(*zip(*known, strict=True), color=color, label=label or None, marker=marker)

    line(loss, steps, "loss", GREY, "training")
    line(loss, epochs, "val_loss", BLUE, "validation", "o")
    line(accuracy, epochs, "accuracy", GREEN, "all breeds", "o")
    line(accuracy, epochs, "priority_f1", PINK, "priority macro-F1", "s")
    line(rate, steps, "lr", ORANGE)
    line(norm, steps, "grad_norm", GREY)
    loss.set(title="Loss (nats a token)", ylim=(0, None))
    loss.legend()
    accuracy.set(title="Closed-set accuracy on the watched photos")
    percent_axis(accuracy, "y", 0, 1.02)
    if accuracy.lines:
        accuracy.legend(loc="lower right")
    rate.set(title="Learning rate", xlabel="optimizer step", ylim=(0, None))
    norm.set(title="Gradient norm before clipping", xlabel="optimizer step", ylim=(0, None))
    best = min(epochs, key=lambda row: row["val_loss"])
    caption = (
        f"The validation loss is lowest after epoch {best['epoch']:g} of {epochs[-1]['epoch']:g}: {best['val_loss']:.3f}; "
        f"it begins with {epochs[0]['val_loss']:.3f} and ends with {epochs[-1]['val_loss']:.3f}."
    )
    return drawn, caption


def cost_table(trainer: Trainer, result: TrainResult) -> pd.DataFrame:
    """Time, speed and memory of the training, the memory beside the estimate."""
    rates = sorted(row["photos_per_second"] for row in of_kind(result.history, "step"))
    device = trainer.vlm.device.type
    settings = replace(trainer.settings, batch_size=result.outcome["micro_batch"])
    try:
        need = f"{Footprint(settings, trainer.vlm.base.config).at(settings.batch_size).peak / 1e9:.2f} GB"
    except CatlibError:
        need = "not known"
    halved = result.outcome["out_of_memory"]
    rows = {
        "time": f"{result.outcome['seconds']:.0f} s",
        "median speed": f"{rates[len(rates) // 2]:.1f} photos/s",
        "peak memory": f"{result.outcome['peak_memory_gb']:.2f} GB {'of the GPU' if device == 'cuda' else 'resident'}",
        "estimate for the model alone": need,
        "out of memory": f"{halved} times, the micro-batch halved" if halved else "never",
    }
    return pd.DataFrame({"value": rows})


def conclusion(result: TrainResult, watch: str) -> pd.DataFrame:
    """Did it train, did it overfit, and which epoch was kept? A row a question, from the history."""
    epochs, best = of_kind(result.history, "epoch"), result.best
    losses = [row["val_loss"] for row in epochs]
    lowest = min(range(len(losses)), key=losses.__getitem__)
    training = of_kind(result.history, "step")[-1]["loss"]
    if len(losses) == 1:
        fell = "one epoch: no trend to judge"
    elif all(b < a for a, b in itertools.pairwise(losses)):
        fell = "yes, in every epoch"
    else:
        fell = f"until epoch {lowest + 1}, not after" if lowest else "no: the first epoch is the best"
    if lowest == len(losses) - 1:
        overfits = "may begin: it remembers photos" if losses[-1] > 2 * training else "no sign of it"
    else:
        overfits = "it has levelled off" if losses[-1] < LEVEL * losses[lowest] else f"yes, after epoch {lowest + 1}"
    kept = f"accuracy {_percent(best.get('accuracy'))}, priority macro-F1 {_percent(best.get('priority_f1'))}"
    rows = [
        ("Did the validation loss fall?", fell, f"{losses[0]:.3f} → {losses[-1]:.3f}"),
        ("Does it overfit?", overfits, f"training {training:.3f}, validation {losses[-1]:.3f}"),
        ("Which epoch is kept?", f"epoch {best['epoch']:g}, by {watch}", kept),
    ]
    return pd.DataFrame(rows, columns=["question", "answer", "figures"]).set_index("question")


def of_kind(history: Rows, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind, `step` or `epoch`."""
    return [row for row in history if row["kind"] == kind]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
