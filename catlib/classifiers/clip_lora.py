"""CLIP or SigLIP with LoRA in its vision tower, tuned by cross-entropy over the breeds' sentences, which the frozen text tower encodes.

Rank, scale, dropout, layers, rate, batch and decay are those of CLIP-LoRA (Zanella and Ben Ayed 2024, arXiv 2405.18541); the epoch is
chosen on a fifth of the training photos, whole groups that are left out of the training.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from PIL.Image import Image
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, normalize
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from catlib.classifiers.base import weights_digest
from catlib.classifiers.clip import ClipZeroShot
from catlib.classifiers.encoder import ClipEncoder
from catlib.classifiers.opponents import deal_folds
from catlib.data.conversations import balance_weights
from catlib.data.images import inside, open_image
from catlib.data.records import Sample
from catlib.errors import InputError
from catlib.files import read_json, write_json
from catlib.runs import WEIGHTS

TARGETS = r".*vision_model.*\.(q|k|v)_proj"
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 1, "use_rslora": True, "lora_dropout": 0.25, "target_modules": TARGETS}
EPOCHS, STEPS = 20, 1500  # at least so many of both: 20 epochs of few photos are too short
PATIENCE = 0.15  # of the epochs, without a better one
TRAINER: dict[str, Any] = {"learning_rate": 2e-4, "weight_decay": 0.01, "lr_scheduler_type": "cosine"}
TRAINER |= dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 32)
TRAINER |= {"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True}
TRAINER |= {"remove_unused_columns": False, "label_names": ["labels"]}
ABOUT = "about.json"
Row = tuple[Sample, int, float, bool]
log = logging.getLogger(__name__)


def tuned_clip(
    made: ClipZeroShot, samples: Sequence[Sample], image_root: Path, folder: Path, seed: int = 0, balance: str = "none"
) -> ClipZeroShot:
    """`made`, its encoder tuned on `samples`, or as `folder` holds it of the same training. `balance`: photos are weighted as
    the VLM's training draws them. Raises InputError for a model whose vision tower has none of the layers.
    """
    encoder, photos = made.encoder, [[s.id, s.breed, s.group] for s in samples]
    how = {"seed": seed, "balance": balance, "prompts": made.prompts, "breeds": list(made.breeds)}
    about = {"base": weights_digest(encoder.model), "photos": photos, **how, **LORA, **TRAINER}
    about |= {"length": [EPOCHS, STEPS]}
    if (folder / ABOUT).is_file() and (stored := read_json(folder / ABOUT)).get("about") == about:
        log.info("clip-lora: taken up from %s", folder)
        take_up(encoder, folder)
    else:
        (folder / ABOUT).unlink(missing_ok=True)
        stored = {"about": about, "report": _train(made, samples, image_root, folder, seed, balance)}
        write_json(folder / ABOUT, stored)
    made.how = {"lora": stored["report"]}
    return made


def take_up(encoder: ClipEncoder, folder: Path) -> None:
    """Put the LoRA that `folder` holds into the encoder's model. Raises InputError where there is none."""
    try:
        model = _with_lora(encoder)
        set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
        encoder.model = model.merge_and_unload().eval()
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no LoRA of CLIP: {str(error)[:200]}") from None


def _train(
    made: ClipZeroShot, samples: Sequence[Sample], image_root: Path, folder: Path, seed: int, balance: str
) -> dict[str, Any]:
    """Tune the encoder's model in place, its LoRA written to `folder`; what came out of it."""
    from catlib.training.run import Augment

    encoder, labels = made.encoder, np.array([made.breeds.index(s.breed) for s in samples])
    set_seed(seed)
    model = _with_lora(encoder)
    held, weights = deal_folds(labels, seed, [s.group for s in samples]) == 0, balance_weights(samples, balance)
    rows = list(zip(samples, labels.tolist(), weights.tolist(), (~held).tolist(), strict=True))
    trained, tested = ([row for row in rows if row[3] is which] for which in (True, False))
    steps = math.ceil(len(trained) / TRAINER["per_device_train_batch_size"])
    epochs = max(EPOCHS, math.ceil(STEPS / steps))
    best = _Best(model, math.ceil(PATIENCE * epochs))
    with tempfile.TemporaryDirectory() as scratch:
        fixed = {**TRAINER, "num_train_epochs": epochs, "seed": seed, "output_dir": scratch}
        fixed |= {"use_cpu": encoder.model.device.type == "cpu"}
        fixed |= {"bf16": encoder.model.dtype == torch.bfloat16, "fp16": encoder.model.dtype == torch.float16}
        trainer = Trainer(
            model=_Logits(model, torch.tensor(made.text_vectors, dtype=torch.float32), encoder.logit_scale),
            args=TrainingArguments(**fixed, eval_strategy="epoch" if tested else "no"),
            data_collator=partial(_collate, encoder.processor.image_processor, image_root, Augment(seed)),
            train_dataset=trained,
            eval_dataset=tested or None,
            callbacks=[best],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if best.state:
        set_peft_model_state_dict(model, best.state)
    model.save_pretrained(str(folder))
    encoder.model = model.merge_and_unload().eval()
    about = {"trained_on": len(trained), "held_out": len(tested), "seed": seed, "balance": balance}
    return {**about, "held_out_losses": best.losses}


def _with_lora(encoder: ClipEncoder) -> Any:
    try:
        return get_peft_model(encoder.model, LoraConfig(**LORA))
    except ValueError as error:
        raise InputError(f"clip-lora: {encoder.name} cannot be tuned: {str(error)[:200]}") from None


class _Logits(torch.nn.Module):
    """What Trainer trains: weighted cross-entropy of the scaled cosines between photos and the breeds' sentences."""

    def __init__(self, model: Any, texts: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.model: Any = model
        self.texts, self.scale = texts.to(next(model.parameters()).device), scale

    def forward(self, labels: torch.Tensor, weights: torch.Tensor, **pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        photos = normalize(self.model.get_image_features(**pixels).pooler_output.float(), dim=-1)
        logits = self.scale * photos @ self.texts.T
        return {"loss": (weights * cross_entropy(logits, labels, reduction="none")).mean(), "logits": logits}


def _collate(
    processor: Any, image_root: Path, augment: Callable[[Image, str], Image], rows: Sequence[Row]
) -> dict[str, torch.Tensor]:
    """Rows (sample, label, weight, whether it is trained on) as a batch; held-out photos stay as they are."""
    images = [open_image(inside(image_root, sample.image)) for sample, *_ in rows]
    images = [augment(x, row[0].id) if row[3] else x for x, row in zip(images, rows, strict=True)]
    batch = dict(processor(images=images, return_tensors="pt"))
    return batch | {"labels": torch.tensor([r[1] for r in rows]), "weights": torch.tensor([r[2] for r in rows])}


class _Best(TrainerCallback):
    """Keeps the LoRA of the epoch with the least held-out loss in memory; stops after `patience` epochs without a better one."""

    def __init__(self, model: Any, patience: int) -> None:
        self.patience, self.model, self.losses, self.state = patience, model, list[float](), dict[str, torch.Tensor]()

    def on_evaluate(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        self.losses.append(round(told["metrics"]["eval_loss"], 4))
        log.info("clip-lora: epoch %d, held-out loss %.4f", len(self.losses), self.losses[-1])
        best = self.losses.index(min(self.losses))
        if best == len(self.losses) - 1:
            self.state = {name: x.clone() for name, x in get_peft_model_state_dict(self.model).items()}
        control.should_training_stop = len(self.losses) - 1 - best >= self.patience
