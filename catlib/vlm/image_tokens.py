"""How many tokens a photo has, and so how many photos the vision tower looks at together."""

from typing import Any

FILL_TOKENS = (
    9216  # 16 photos of LLaVA-1.5, 2 of Pixtral's largest: its tower attends over all photos of a batch at once
)


def image_tokens_of(config: Any) -> int:
    """Image tokens of one photo: exact for LLaVA-1.5; the most there can be where a model keeps the photo's own shape."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    if vision.model_type == "pixtral":
        return side * (side + 1)  # a row break after each row
    if scale := getattr(config, "scale_factor", None):
        return 17 * (side // scale) ** 2 + 17 * 4  # 16 tiles and the whole photo, each between marks
    return side * side


def photos_at_once(config: Any) -> int:
    """Photos that go through the tower together when the feature cache is filled, 16 at most."""
    return max(1, min(16, FILL_TOKENS // image_tokens_of(config)))
