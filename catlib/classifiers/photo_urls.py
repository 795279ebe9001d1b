"""A photo as it is sent to a served model: cropped as the model's processor would, inside a URL."""

import base64
import io
from pathlib import Path

from PIL import Image

from catlib.files import read_json


def cropped(image: Image.Image, side: int) -> Image.Image:
    """The photo scaled so that its short side is `side` pixels, and its middle square of it: CLIP's preprocessing."""
    if not side:
        return image
    short = min(image.size)
    image = image.resize([side * length // short for length in image.size], Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


def crop_side(folder: Path) -> int:
    """The side of the square that a checkpoint's processor cuts out of photos; 0 when it works otherwise."""
    for name, within in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            config = read_json(folder / name)
            config = config.get(within, {}) if within else config
            crop, scale = config.get("crop_size") or {}, config.get("size") or {}
            if config.get("do_center_crop") and crop.get("height") == crop.get("width") == scale.get("shortest_edge"):
                return int(crop["height"] or 0)
    return 0


def data_url(image: Image.Image) -> str:
    """The photo inside a URL, as PNG: no pixel is changed by that."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
