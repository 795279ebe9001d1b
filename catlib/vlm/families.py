"""The model families: all that is particular to an architecture, one entry each."""

from dataclasses import dataclass
from typing import Any

import torch

from catlib.errors import InputError


@dataclass(frozen=True)
class Family:
    """Full module paths of a model's three parts. Matching by last names would hit the tower's layers as well."""

    name: str
    model_types: tuple[str, ...]  # `model_type` of the configurations that belong to it
    tower: str
    projector: str
    language_model: str


FAMILIES = (
    Family(
        "LLaVA",
        ("llava", "llava_next", "llava_onevision", "mistral3"),
        tower="model.vision_tower",
        projector="model.multi_modal_projector",
        language_model="model.language_model",
    ),
    Family(
        "Idefics3",
        ("idefics3", "smolvlm"),
        tower="model.vision_model",
        projector="model.connector",
        language_model="model.text_model",
    ),
    Family(
        "Qwen-VL",
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
        tower="model.visual",
        projector="model.visual.merger",
        language_model="model.language_model",
    ),
)
PARTS = ("tower", "projector", "language_model")
UNQUANTIZED = ("lm_head", *sorted({getattr(family, part) for family in FAMILIES for part in ("tower", "projector")}))


def family_of(model: torch.nn.Module) -> Family:
    """The entry of a model; of one without an entry the parts are looked for where the others have them.

    Raises InputError where a part is not found.
    """
    config: Any = model.config
    names = {name for name, _ in model.named_modules()}
    own = [family for family in FAMILIES if config.model_type in family.model_types]
    found = {}
    for part in PARTS:
        paths = dict.fromkeys(getattr(family, part) for family in own or FAMILIES)
        found[part] = next((path for path in paths if path in names), "")
        if not found[part]:
            raise InputError(
                f"{type(model).__name__}: no {part.replace('_', ' ')} found under {', '.join(paths)}; "
                f"this architecture is not supported"
            )
    return own[0] if own else Family(config.model_type, (config.model_type,), **found)
