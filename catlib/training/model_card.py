"""The README.md of a checkpoint: what it is, from which base and data, with which settings and figures."""

from collections import Counter
from typing import Any

import yaml

from catlib.provenance import git_commit, package_versions
from catlib.settings import TrainSettings
from catlib.training.lora import count_parameters
from catlib.vlm.models import VLM

CHOSEN = (
    "mode", "train_projector", "lora_r", "lora_alpha", "lora_dropout", "lora_targets", "epochs", "batch_size", "gradient_accumulation",
    "lr", "projector_lr", "lr_schedule", "warmup_ratio", "balance", "augment", "seed",
)  # fmt: skip


def model_card(vlm: VLM, settings: TrainSettings, data: Any, figures: dict[str, Any]) -> str:
    """Markdown with the metadata block that the Hugging Face hub reads (https://huggingface.co/docs/hub/model-cards)."""
    trainable, total = count_parameters(vlm.model)
    metadata = {
        "base_model": vlm.name,
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lora", "vision-language", "cat-breeds", "image-classification"],
    }
    counts = Counter(s.breed for s in data.train)
    rows = [
        f"| {breed}{' (priority)' if breed in data.priority else ''} | {counts[breed]} | "
        f"{sum(s.breed == breed for s in data.val)} |"
        for breed in data.breeds
    ]
    measured = [f"| {key} | {value:.4g} |" for key, value in figures.items() if isinstance(value, int | float)]
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata, sort_keys=True).strip(),
            "---",
            "",
            "# Cat breeds, named by a vision-language model",
            "",
            f"An adapter for `{vlm.name}` that answers the question “{data.question}” with a breed. "
            f"{trainable:,} of {total:,} parameters were trained (mode `{settings.mode}`).",
            "",
            "## Data",
            "",
            f"{len(data.train)} training and {len(data.val)} validation photos of {len(data.breeds)} breeds.",
            "",
            "| breed | training | validation |",
            "| --- | --- | --- |",
            *rows,
            "",
            "## Settings",
            "",
            "| setting | value |",
            "| --- | --- |",
            *(f"| {key} | {getattr(settings, key)} |" for key in CHOSEN),
            "",
            "## Figures on the validation photos",
            "",
            "| figure | value |",
            "| --- | --- |",
            *measured,
            "",
            "The test photos were not touched in training; the run's report has the figures on them.",
            "",
            "## Use",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            f'base = AutoModelForImageTextToText.from_pretrained("{vlm.name}")',
            'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")',
            'processor = AutoProcessor.from_pretrained("PATH_OF_THIS_FOLDER")',
            "```",
            "",
            f"Made with {versions}; commit {git_commit() or 'unknown'}.",
            "",
        ]
    )
