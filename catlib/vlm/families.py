"""The model families: all that is particular to an architecture, one entry each in FAMILIES and a row in tests/family_matrix.py.

What a model or its processor can be asked (image token, tokens of a photo, positions on three axes, sliding layers) is asked there.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from catlib.errors import InputError

# image tokens that a tower sees at once, 16 photos of LLaVA-1.5: it attends over all photos of a batch
FILL_TOKENS = 9216
# `model_type` of towers
CLIP_TOWER, SIGLIP_TOWER, PIXTRAL_TOWER = "clip_vision_model", "siglip_vision_model", "pixtral"
# towers whose weights the hub keeps one level deeper than transformers 5 writes them for a model built from a configuration
HUB_TOWERS: Mapping[str, str] = {CLIP_TOWER: "vision_model.", SIGLIP_TOWER: "vision_model."}
# what processors write for each token of the text beside the token itself
ALONG_TEXT = ("attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
# classes of the language models' layers whose arithmetic `catlib.training.kernels` knows
RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP")
ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
# Chat templates, by the processor's class, of models that come without one; and the end of a prompt that a processor writes itself.
TEMPLATES: Mapping[str, str] = {
    "PaliGemmaProcessor": "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
}
PROMPT_ENDS: Mapping[str, str] = {"PaliGemmaProcessor": "\n"}
# Layers that keep a state of all they have read, which cannot be cut back as a cache of keys and values can.
STATEFUL = {"linear_attention", "conv", "mamba", "recurrent"}
# `model_type` of dual encoders that learned from lower-case texts padded to full length. Not each one's tokenizer lowers them.
PADDED_TEXT = ("siglip", "siglip2")


@dataclass(frozen=True)
class Family:
    """What catlib has to know of an architecture.

    `tower`, `projector`, `language_model`: full module paths; matching by last names would hit the tower's layers as well.
    `image_tokens`: the most that a photo has, from the configuration and `max_pixels`, for when the processor is not at hand.
    """

    name: str
    model_types: tuple[str, ...]  # `model_type` of the configurations that belong to it
    tower: str = "model.vision_tower"
    projector: str = "model.multi_modal_projector"
    language_model: str = "model.language_model"
    towers: tuple[str, ...] = ()  # `model_type` of the vision configuration; empty: any
    image_tokens: Callable[..., int] | None = None
    tiled: bool = False  # a photo is cut into tiles, and the last of them shows it whole
    square_grid: bool = False  # a photo is one square of tokens, a patch each: neighbours can be averaged
    caches_features: bool = False  # the projector reads nothing but the tower's output, so that can be kept on disk
    # by the language model's `final_logit_softcapping`, which not every model with one applies
    caps_logits: bool = False
    # of ALONG_TEXT: what an answer's tokens have, if not the prompt's
    answer_along: Mapping[str, int] = field(default_factory=dict)
    served_names: Mapping[str, str] = field(default_factory=dict)  # vLLM's prefixes of module paths, where they differ

    def photos_at_once(self, config: Any) -> int:
        """Photos that go through the tower together when the feature cache is filled, 16 at most."""
        tokens = self.image_tokens(config) if self.image_tokens else FILL_TOKENS
        return max(1, min(16, FILL_TOKENS // tokens))


def _patches(config: Any, most: int = 0) -> int:
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def _rows_with_breaks(config: Any, most: int = 0) -> int:
    vision = config.vision_config
    side = min(vision.image_size, math.isqrt(most) or vision.image_size) // vision.patch_size
    return side * (side + 1)  # a row break after each row


def _tiles_and_the_whole(config: Any, most: int = 0) -> int:
    vision = config.vision_config
    tiles = math.ceil(math.isqrt(most) / vision.image_size) ** 2 if most else 16
    count = tiles + 1 if not most or most >= 2 * vision.image_size**2 else 1
    return count * ((vision.image_size // vision.patch_size // config.scale_factor) ** 2 + 4)  # each between marks


_SERVED = {"model.language_model.": "language_model.model.", "model.multi_modal_projector.": "multi_modal_projector."}
_VISION_MODEL = ("model.vision_model", "model.connector", "model.text_model")
_VISUAL = ("model.visual", "model.visual.merger")
_CACHED: dict[str, Any] = {"caches_features": True, "served_names": _SERVED}
FAMILIES = (
    Family("Pixtral", ("llava",), towers=(PIXTRAL_TOWER,), image_tokens=_rows_with_breaks, **_CACHED),
    Family("LLaVA-1.5", ("llava",), image_tokens=_patches, square_grid=True, **_CACHED),
    Family("LLaVA-NeXT", ("llava_next",)),
    Family("LLaVA-OneVision", ("llava_onevision",)),
    Family("Mistral3", ("mistral3",)),
    Family("Gemma3", ("gemma3",)),
    # prompt and photo attend both ways, an answer (type 1) only backwards
    Family("PaliGemma", ("paligemma",), image_tokens=_patches, caps_logits=True, answer_along={"token_type_ids": 1}),
    Family("AyaVision", ("aya_vision",), tiled=True),
    Family("InternVL", ("internvl",), tiled=True),
    Family("Mllama", ("mllama",), tower="model.vision_model"),
    Family("LFM2-VL", ("lfm2_vl",)),
    Family("Idefics2", ("idefics2",), *_VISION_MODEL),
    Family("Idefics3", ("idefics3", "smolvlm"), *_VISION_MODEL, image_tokens=_tiles_and_the_whole, tiled=True),
    Family("Qwen-VL", ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), *_VISUAL),
)
PARTS = ("tower", "projector", "language_model")
UNQUANTIZED = ("lm_head", *sorted({getattr(family, part) for family in FAMILIES for part in ("tower", "projector")}))


def find_family(config: Any) -> Family | None:
    """The entry of a configuration; None where there is none."""
    tower = getattr(getattr(config, "vision_config", None), "model_type", "")
    fitting = (f for f in FAMILIES if config.model_type in f.model_types and (not f.towers or tower in f.towers))
    return next(fitting, None)


def check_pool(config: Any, pool: int) -> None:
    """Raise InputError where the tokens of a photo cannot be averaged `pool` by `pool`."""
    family, known = find_family(config), ", ".join(family.name for family in FAMILIES if family.square_grid)
    if pool > 1 and not (family and family.square_grid):
        raise InputError(f"image_pool: a photo of a {config.model_type} is no single square of tokens; {known} has one")
    if pool > 1 and (side := math.isqrt(_patches(config))) % pool:
        raise InputError(f"image_pool: the {side} x {side} tokens of a photo cannot be divided by {pool}")


def family_of(model: torch.nn.Module) -> Family:
    """The entry of a model; of one without an entry the parts are looked for where the others have them. Raises
    InputError where a part is not found.
    """
    config: Any = model.config
    names = {name for name, _ in model.named_modules()}
    own = find_family(config)
    found: dict[str, Any] = {}
    for part in PARTS:
        paths = dict.fromkeys(getattr(family, part) for family in ((own,) if own else FAMILIES))
        found[part] = next((path for path in paths if path in names), "")
        if not found[part]:
            missing = f"no {part.replace('_', ' ')} found under {', '.join(paths)}"
            raise InputError(f"{type(model).__name__}: {missing}; this architecture is not supported")
    return own or Family(config.model_type, (config.model_type,), **found)


def image_token_of(config: Any) -> int:
    """The id of the placeholder token of an image. Raises InputError for a model that has none."""
    for name in ("image_token_id", "image_token_index"):
        if isinstance(token := getattr(config, name, None), int):
            return token
    raise InputError(f"a {config.model_type} model has no image token; catlib knows no such image-text-to-text model")
