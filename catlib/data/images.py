"""The one place where a photo is opened: a format of the list, within the limits, upright, RGB, or a clear error."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from catlib.errors import InputError

# What Pillow may decode. It goes by a file's content, not by its ending, and would hand an EPS named .jpg to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
PHOTO_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
MAX_PIXELS = 89_478_485  # where Pillow itself begins to warn: decoded 270 MB; more is a mistake or a decompression bomb
MAX_ASPECT = 50  # longer side over shorter; a model enlarges the shorter one: 2,700,000 x 33 pixels would cost minutes


class ImageError(InputError):
    """A photo that cannot be used; the message names the file and the reason. `verdict` is the reason in a word or two
    and `detail` what is known beyond it, as the audit's table has them."""

    def __init__(self, message: str, verdict: str = "broken", detail: str = "") -> None:
        super().__init__(message)
        self.verdict, self.detail = verdict, detail or message


def inside(root: Path, relative: str) -> Path:
    """The path of `relative` below `root`; an InputError when it is absolute or leaves the root by `..` or a link."""
    root, parts = root.resolve(), Path(relative).parts
    try:
        path = (root / relative).resolve()
        path.is_file()
    except (ValueError, OSError, RuntimeError) as error:  # a NUL, more letters than a name may have, links in a circle
        raise InputError(f"image path {relative[:100]!r}: {error}") from None
    if path.is_relative_to(root) and not Path(relative).is_absolute():
        return path
    steps = [root.joinpath(*parts[: n + 1]) for n in range(len(parts))] if not Path(relative).is_absolute() else []
    link = next((step for step in steps if step.is_symlink() and not step.resolve().is_relative_to(root)), None)
    if link is None:
        raise InputError(f"image path {relative!r} leaves its image root {root}: give a path relative to that folder")
    raise InputError(
        f"image path {relative!r} leaves its image root {root} by the link {link.relative_to(root)}, and links are not followed from a "
        f'path in a file: write {{"image_root": …}} with the folder that holds the photos ({link.resolve()}) into dataset.json beside '
        "the file, and the paths relative to it"
    )


@contextmanager
def opening(file: Path | BinaryIO) -> Iterator[Image.Image]:
    """A photo whose header has been read and whose pixels have not; of an animated one the first frame. `file`: a path,
    or an open file, which errors call by its `name`. Whatever goes wrong here or in the block is an ImageError: on a
    broken file Pillow's decoders raise nearly everything that Python has."""
    name = file if isinstance(file, Path) else getattr(file, "name", "photo")
    try:
        if isinstance(file, Path) and file.exists() and not file.is_file():
            raise _of(name, "not an image", "not a file")  # a pipe would be waited for
        with Image.open(file, formats=FORMATS) as image:
            check_size(image, str(name))
            image.seek(0)
            yield image
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such photo", "missing", "no such file") from None
    except UnidentifiedImageError:
        raise _of(name, "not an image", f"not a photo of the formats {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _of(name, "too large", str(error)) from None
    except Exception as error:
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        reason = str(error) or type(error).__name__
        raise ImageError(f"{name}: broken image: {reason}", "truncated" if cut else "broken", reason) from None


def check_size(image: Image.Image, name: str) -> None:
    """Raise ImageError for more than MAX_PIXELS, no pixels at all, or a strip."""
    size = f"{image.width} x {image.height} pixels"
    if image.width * image.height > MAX_PIXELS:
        raise _of(name, "too large", f"{size}, limit {MAX_PIXELS:,}")
    if not min(image.size) or max(image.size) > MAX_ASPECT * min(image.size):
        raise _of(name, "too long", f"{size}, one side over {MAX_ASPECT} times the other")


def _of(name: object, verdict: str, reason: str) -> ImageError:
    return ImageError(f"{name}: {reason}", verdict, reason)


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Decode a photo to an RGB image, EXIF orientation applied, transparency flattened onto white. Raises ImageError
    when the file is missing, not a photo, broken, or larger than MAX_PIXELS."""
    with opening(file) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def size_of(file: Path) -> tuple[int, int]:
    """Width and height as the header states them, before EXIF orientation. Raises ImageError as `open_image` does."""
    with opening(file) as image:
        return image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB, transparency flattened onto white."""
    image = to_8_bits(image)
    if has_alpha(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def has_alpha(image: Image.Image) -> bool:
    """Whether some of the image may be transparent."""
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def to_8_bits(image: Image.Image) -> Image.Image:
    """Greyscale of more than 8 bits as mode L; others as they are. Pillow's own conversion cuts at 255: the photo would
    be white. 16 bits are divided by 257; 32-bit and floating-point values have no fixed white and are stretched from
    least to greatest."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        return Image.fromarray(((values - values.min()) / max(np.ptp(values), 1e-12) * 255).round().astype(np.uint8))
    return image
