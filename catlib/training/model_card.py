"""The README.md of a checkpoint: what it is, from which base and data, with which settings and figures."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from catlib.provenance import git_commit, package_versions
from catlib.settings import TrainSettings, split_list
from catlib.training.lora import count_parameters
from catlib.vlm.models import VLM

CHOSEN = split_list(
    """mode, train_projector, lora_r, lora_alpha, lora_dropout, lora_targets, epochs, batch_size,
    gradient_accumulation, lr, projector_lr, lr_schedule, warmup_ratio, balance, augment, seed"""
)
CARD = """---
{metadata}
---

# Cat breeds, named by a vision-language model

An adapter for `{base}` that answers the question “{question}” with a breed. {trainable:,} of {total:,} parameters were trained (mode `{mode}`).

## Data

{train} training and {val} validation photos of {breeds} breeds.

| breed | training | validation |
| --- | --- | --- |
{counts}

## Settings

| setting | value |
| --- | --- |
{settings}

## Figures on the validation photos

| figure | value |
| --- | --- |
{figures}

The test photos were not touched in training; the run's report has the figures on them.

## Use

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")
processor = AutoProcessor.from_pretrained("PATH_OF_THIS_FOLDER")
```

Made with {versions}; commit {commit}.
"""


def model_card(vlm: VLM, settings: TrainSettings, data: Any, figures: dict[str, Any]) -> str:
    """Markdown with the metadata block that the Hugging Face hub reads (https://huggingface.co/docs/hub/model-cards)."""
    trainable, total = count_parameters(vlm.model)
    metadata: dict[str, Any] = {"base_model": vlm.name, "library_name": "peft", "pipeline_tag": "image-text-to-text"}
    metadata |= {"tags": ["lora", "vision-language", "cat-breeds", "image-classification"]}
    train, val = (Counter(sample.breed for sample in part) for part in (data.train, data.val))
    names = {breed: breed + " (priority)" * (breed in data.priority) for breed in data.breeds}
    return CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=True).strip(),
        base=vlm.name,
        question=data.question,
        trainable=trainable,
        total=total,
        mode=settings.mode,
        train=len(data.train),
        val=len(data.val),
        breeds=len(data.breeds),
        counts=_table([names[breed], train[breed], val[breed]] for breed in data.breeds),
        settings=_table([key, getattr(settings, key)] for key in CHOSEN),
        figures=_table([key, f"{value:.4g}"] for key, value in figures.items() if isinstance(value, int | float)),
        versions=", ".join(f"{name} {version}" for name, version in package_versions().items()),
        commit=git_commit() or "unknown",
    )


def _table(rows: Iterable[Sequence[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
