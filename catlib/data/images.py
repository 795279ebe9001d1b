"""The one place where a photo is opened: inside its root, upright, RGB, within size limits, or a clear error."""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from catlib.errors import InputError

MAX_PIXELS = 100_000_000  # a 100-megapixel photo decodes to 300 MB; more is a mistake or a decompression bomb


class ImageError(InputError):
    """A photo that cannot be used; the message names the file and the reason."""


def inside(root: Path, relative: str) -> Path:
    """The path of `relative` below `root`; an InputError when it is absolute or leaves the root by `..` or a link."""
    root = root.resolve()
    path = (root / relative).resolve()
    if Path(relative).is_absolute() or not path.is_relative_to(root):
        raise InputError(f"image path {relative!r} leaves its image root {root}: give a path relative to that folder")
    return path


def open_image(path: Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a photo to an RGB image, EXIF orientation applied, transparency flattened onto white.

    `path`: a file, or an open one, which errors call by its `name`. Raises ImageError when the file is missing, is not an
    image, is truncated, or has more than `max_pixels` pixels. Of an animated file the first frame is taken.
    """
    name = path if isinstance(path, Path) else getattr(path, "name", "photo")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > max_pixels:
                    raise ImageError(f"{name}: {image.width} x {image.height} pixels, over the limit of {max_pixels}")
                image.seek(0)
                image.load()
                image = ImageOps.exif_transpose(image)
                return to_rgb(image)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such photo") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image that Pillow can read") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name}: broken image: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB, transparency flattened onto white."""
    image = to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Greyscale of more than 8 bits as mode L; others as they are. Pillow's own conversion cuts at 255: the photo would be white.

    16 bits are divided by 257; 32-bit and floating-point values have no fixed white and are stretched from least to greatest.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        return Image.fromarray(((values - values.min()) / max(np.ptp(values), 1e-12) * 255).round().astype(np.uint8))
    return image
