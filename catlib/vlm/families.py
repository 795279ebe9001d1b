"""The model families: all that is particular to an architecture, one entry each. A new family is an entry in FAMILIES.

Tests: a row in tests/test_vlm_families.py. What can be asked of a model or its processor directly (image token, positions on three
axes, sliding layers) is asked there and does not stand here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from catlib.errors import InputError

FILL_TOKENS = (
    9216  # image tokens that a tower sees at once, 16 photos of LLaVA-1.5: it attends over all photos of a batch
)
CLIP_TOWER, SIGLIP_TOWER, PIXTRAL_TOWER = (
    "clip_vision_model",
    "siglip_vision_model",
    "pixtral",
)  # `model_type` of towers
# towers whose weights the hub keeps one level deeper than transformers 5 writes them for a model built from a configuration
HUB_TOWERS: Mapping[str, str] = {CLIP_TOWER: "vision_model.", SIGLIP_TOWER: "vision_model."}
# what processors write for each token of the text beside the token itself
ALONG_TEXT = ("attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
# classes of the language models' layers whose arithmetic `catlib.training.kernels` knows
RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP")
ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention")


@dataclass(frozen=True)
class Family:
    """What catlib has to know of an architecture.

    `tower`, `projector`, `language_model`: full module paths; matching by last names would hit the tower's layers as well.
    `image_tokens`: of one photo, from the model's configuration: the most there can be where they depend on the photo's shape;
    None where the configuration does not tell.
    """

    name: str
    model_types: tuple[str, ...]  # `model_type` of the configurations that belong to it
    tower: str
    projector: str
    language_model: str
    towers: tuple[str, ...] = ()  # `model_type` of the vision configuration; empty: any
    image_tokens: Callable[[Any], int] | None = None
    keeps_shape: bool = False  # how many image tokens a photo has depends on its shape; the processor knows
    tiled: bool = False  # a photo is cut into tiles, and the last of them shows it whole
    caches_features: bool = False  # the projector reads nothing but the tower's output, so that can be kept on disk
    traces_tower: bool = False  # the tower does not branch on data: its memory is counted by running it without any
    answer_along: Mapping[str, int] = field(
        default_factory=dict
    )  # of ALONG_TEXT: what an answer's tokens have, if not the prompt's
    served_names: Mapping[str, str] = field(default_factory=dict)  # vLLM's prefixes of module paths, where they differ

    def photos_at_once(self, config: Any) -> int:
        """Photos that go through the tower together when the feature cache is filled, 16 at most."""
        tokens = self.image_tokens(config) if self.image_tokens else FILL_TOKENS
        return max(1, min(16, FILL_TOKENS // tokens))


def _patches(config: Any) -> int:
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def _rows_with_breaks(config: Any) -> int:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side * (side + 1)  # a row break after each row


def _sixteen_tiles_and_the_whole(config: Any) -> int:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return 17 * (side // config.scale_factor) ** 2 + 17 * 4  # each between marks


_LLAVA_PATHS = ("model.vision_tower", "model.multi_modal_projector", "model.language_model")
_LLAVA_SERVED = {
    "model.language_model.": "language_model.model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
FAMILIES = (
    Family(
        "Pixtral",
        ("llava",),
        *_LLAVA_PATHS,
        towers=(PIXTRAL_TOWER,),
        image_tokens=_rows_with_breaks,
        keeps_shape=True,
        caches_features=True,
        served_names=_LLAVA_SERVED,
    ),
    Family(
        "LLaVA-1.5",
        ("llava",),
        *_LLAVA_PATHS,
        image_tokens=_patches,
        caches_features=True,
        traces_tower=True,
        served_names=_LLAVA_SERVED,
    ),
    Family("Mistral3", ("mistral3",), *_LLAVA_PATHS, image_tokens=_rows_with_breaks, keeps_shape=True),
    # prompt and photo attend both ways, an answer (type 1) only backwards
    Family("PaliGemma", ("paligemma",), *_LLAVA_PATHS, image_tokens=_patches, answer_along={"token_type_ids": 1}),
    Family("LLaVA-NeXT", ("llava_next", "llava_onevision"), *_LLAVA_PATHS, image_tokens=_patches),
    Family(
        "Idefics3",
        ("idefics3", "smolvlm"),
        tower="model.vision_model",
        projector="model.connector",
        language_model="model.text_model",
        image_tokens=_sixteen_tiles_and_the_whole,
        tiled=True,
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


def find_family(config: Any) -> Family | None:
    """The entry of a configuration; None where there is none."""
    tower = getattr(getattr(config, "vision_config", None), "model_type", "")
    fitting = (f for f in FAMILIES if config.model_type in f.model_types and (not f.towers or tower in f.towers))
    return next(fitting, None)


def family_of(model: torch.nn.Module) -> Family:
    """The entry of a model; of one without an entry the parts are looked for where the others have them.

    Raises InputError where a part is not found.
    """
    config: Any = model.config
    names = {name for name, _ in model.named_modules()}
    own = find_family(config)
    found = {}
    for part in PARTS:
        paths = dict.fromkeys(getattr(family, part) for family in ((own,) if own else FAMILIES))
        found[part] = next((path for path in paths if path in names), "")
        if not found[part]:
            raise InputError(
                f"{type(model).__name__}: no {part.replace('_', ' ')} found under {', '.join(paths)}; "
                f"this architecture is not supported"
            )
    return own or Family(
        config.model_type, (config.model_type,), found["tower"], found["projector"], found["language_model"]
    )


def image_token_of(config: Any) -> int:
    """The id of the placeholder token of an image. Raises InputError for a model that has none."""
    for name in ("image_token_id", "image_token_index"):
        if isinstance(token := getattr(config, name, None), int):
            return token
    raise InputError(
        f"a {config.model_type} model has no image token; it is no image-text-to-text model that catlib knows"
    )
