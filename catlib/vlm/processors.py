"""A model's files through transformers, never its code; its processor for photos and text, also without torchvision.

transformers prepares photos with PIL where torchvision is missing, but two things of it still ask for it: the video part of a
processor, which no photo needs, and processors that take a function from a module that needs it, where the PIL module has the same.
"""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, processing_utils
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

from catlib.errors import CatlibError, InputError
from catlib.files import read_json
from catlib.vlm.families import TEMPLATES, check_pool

# The largest sizes that a configuration may name, by how the entry's name ends: several times those of any published model.
# Beyond them building the model alone takes minutes, or more memory than there is.
LARGEST = {"layers": 1000, "depth": 1000, "heads": 2**13, "vocab_size": 2**22, "image_size": 2**14}
LARGEST |= {"_size": 2**18, "_dim": 2**18}  # of those that end otherwise
POSITIVE = ("hidden_size", "intermediate_size", "vocab_size", "image_size", "patch_size", "num_attention_heads")
TRIAL_S, TRIAL_GB = 20, 4  # what a template or pattern may take: it needs milliseconds
CODE = ("auto_map", "custom_pipelines")  # entries by which a model's files name Python code of their own
MISSING_FILE = "does not appear to have"  # transformers' words where a repository is there and lacks a file


def from_files(kind: Any, ref: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained(ref)`, the one call of it in catlib: weights and settings are read, code of the model's own never runs.

    Raises InputError for a folder that names code or sizes that no model has, and for a hub name that gives nothing (misspelt,
    gated, or offline and not in the cache); and what transformers raises: OSError, KeyError, ImportError, and ValueError for all else.
    """
    for path in sorted(Path(ref).glob("*config.json")):
        _check_entries(read_json(path), path)
    try:
        return kind.from_pretrained(ref, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        hub = isinstance(error, OSError) or type(error).__name__ == "HFValidationError"  # a name that no hub could have
        if Path(ref).is_dir() or not hub or MISSING_FILE in str(error):
            raise
        raise InputError(
            f"model {str(ref)!r} is neither a folder here nor to be had from the hub: check the spelling (OWNER/NAME); for a gated "
            "model accept its terms on its page and log in (hf auth login); without a network, or with HF_HUB_OFFLINE=1, it must "
            f"have been downloaded before ({first_line(error)})"
        ) from None
    except (KeyError, ImportError, MemoryError):
        raise
    except Exception as error:  # a nonsensical entry makes a model's own code raise anything
        if isinstance(error, RuntimeError) and "memory" in str(error).lower():
            raise
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _check_entries(value: Any, path: Path) -> None:
    """Raise InputError for an entry, at any depth, that names code which is not transformers' own, or a size that no model has."""
    entries = value if isinstance(value, dict) else {}
    for key, inner in entries.items():
        if (key in CODE and inner) or ("attn_implementation" in key and "/" in str(inner)):  # a kernel of the hub
            raise InputError(
                f"{path}: the entry {key!r} asks for Python code that comes with the model; catlib never runs such code. If "
                "transformers knows the architecture itself, remove the entry"
            )
        most = next((most for end, most in LARGEST.items() if key.endswith(end)), math.inf)
        least = 1 if key in POSITIVE else 0 if key.startswith("num_") else -math.inf
        numbers = [n for n in (inner if isinstance(inner, list) else [inner]) if isinstance(n, int | float)]
        if not all(least <= n <= most for n in numbers):
            raise InputError(f"{path}: the entry {key!r} is {inner!r:.100}; catlib knows models of {least} to {most}")
    for inner in value if isinstance(value, list) else entries.values():
        _check_entries(inner, path)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def load_processor(ref: str, max_pixels: int = 0, image_pool: int = 1) -> Any:
    """The processor of a hub model or a folder, its chat template in `chat_template` wherever the files have it.

    Raises InputError when it is missing, has no chat template, needs a package that is not installed, or cannot keep
    photos at `max_pixels` (see `limit_pixels`) or at a token for `image_pool` x `image_pool` patches (see `check_pool`).
    """
    try:
        if not Path(ref).is_dir():
            from_files(AutoConfig, ref)  # says what is wrong with a hub name
        processor = from_files(AutoProcessor, ref) if is_torchvision_available() else _without_torchvision(ref)
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        for missing in ("torchvision", "num2words", "sentencepiece"):
            if missing in str(error).lower():
                raise InputError(f"the processor of model {ref!r} needs {missing}: pip install {missing}") from None
        raise InputError(
            f"model {ref!r} has no usable processor: it needs tokenizer files and processor_config.json or "
            f"preprocessor_config.json ({first_line(error)})"
        ) from None
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise InputError(f"model {ref!r} has no image-and-text processor; found only a {type(processor).__name__}")
    own = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    processor.chat_template = own or TEMPLATES.get(type(processor).__name__)
    if not processor.chat_template:
        raise InputError(
            f"model {ref!r}: its processor has no chat template. Snapshots from before 2025 lack it: download the model again, or "
            "put the chat_template.jinja of the model's page on the hub into the folder"
        )
    _try_out(processor, ref)
    limit_pixels(processor.image_processor, max_pixels, ref)
    if image_pool > 1:
        check_pool(from_files(AutoConfig, ref), image_pool)
        processor.patch_size *= image_pool  # by which it counts a photo's tokens
    return processor


def limit_pixels(images: Any, most: int, ref: str = "") -> None:
    """Let the image processor hand on at most about so many pixels of a photo, in as many tiles as that makes; 0: as it does.

    A small view of the whole photo that comes beside the tiles does not count. Raises InputError where photos have one size.
    """
    if not most:
        return
    size, edge = {name: value for name, value in dict(images.size).items() if value}, math.isqrt(most)
    if hasattr(images, "merge_size"):  # here sizes are areas
        images.size = {name: min(value, most) for name, value in size.items()}
    elif grid := getattr(images, "image_grid_pinpoints", None):
        side = min(map(min, grid))
        images.image_grid_pinpoints = [shape for shape in grid if math.prod(shape) <= most] or [[side, side]]
    elif hasattr(images, "crop_to_patches"):
        images.max_patches = max(1, min(images.max_patches, most // (size["height"] * size["width"])))
        images.crop_to_patches = images.crop_to_patches and images.max_patches > 1
    elif hasattr(images, "tile_size"):
        tiles = min(images.max_tiles, most // images.tile_size**2)
        images.max_tiles = max(images.min_tiles, tiles)
        images.do_image_splitting = images.do_image_splitting and tiles >= images.min_tiles
    elif tile := dict(getattr(images, "max_image_size", None) or {}).get("longest_edge"):
        images.do_image_splitting = images.do_image_splitting and most >= 2 * tile**2
        images.size = {"longest_edge": max(tile, min(size["longest_edge"], edge))}
    elif "longest_edge" in size:
        images.size = {name: min(value, edge) for name, value in size.items()}
    else:
        raise InputError(f"max_pixels: a photo of model {ref!r} always has {size}; it cannot be made smaller")


def _try_out(processor: Any, ref: str) -> None:
    """Raise InputError for a chat template, or a tokenizer with a doubtful pattern, that does not end within seconds:
    only a process of its own can be stopped in the middle of either.
    """
    own, path = processor.chat_template, Path(ref) / "tokenizer.json"
    tries = [("chat template", "template", one) for one in (own.values() if isinstance(own, dict) else [own])]
    patterns = re.findall(r'"Regex"\s*:\s*"((?:[^"\\]|\\.)*)"', path.read_text("utf-8")) if path.is_file() else []
    tries += [("tokenizer", "tokenizer", str(path))] * any(map(is_doubtful, patterns))
    for what, key, value in tries:
        if not _ends_in_time(json.dumps({key: value})):
            raise InputError(f"model {ref!r}: its {what} does not end within {TRIAL_S} s, or takes over {TRIAL_GB} GB")


def is_doubtful(pattern: str) -> bool:
    """Whether matching a regular expression may take for ever: it repeats a group, or has many repetitions in a row."""
    many = any(len(re.findall(r"[+*{]", part)) > 4 for part in pattern.split("|"))
    return many or re.search(r"\)[+*{]", pattern) is not None


@cache
def _ends_in_time(data: str) -> bool:
    """Whether the trial (see trial.py) of a template or a tokenizer, as JSON, comes to an end, be it an error."""
    command = [sys.executable, "-I", str(Path(__file__).with_name("trial.py")), str(TRIAL_GB)]
    # virtual memory counts, of which each thread takes some
    frugal = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}
    options: Any = {"text": True, "capture_output": True, "timeout": TRIAL_S, "env": os.environ | frugal}
    try:
        return subprocess.run(command, input=data, **options).returncode == 0
    except subprocess.TimeoutExpired:
        return False


class VideoSettings(VideoProcessorMixin):
    """Stands in a processor for its video part: keeps the settings, so that they are saved again, and reads no video."""

    num_frames = fps = None  # a chat template may ask for them

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    def preprocess(self, videos: Any, **options: Any) -> Any:
        raise CatlibError("videos need torchvision, which is not installed")


def _without_torchvision(ref: str) -> Any:
    """What AutoProcessor gives, with a PIL image processor and without a video part."""
    kind = _processor_class(ref)
    if kind is None:
        return from_files(AutoProcessor, ref)
    if "video_processor" not in (attributes := kind.get_attributes()):
        return from_files(kind, ref)
    # a processor checks its parts by the names that transformers exports, in a copy of the package that it holds
    setattr(processing_utils.transformers_module, "VideoProcessorMixin", VideoProcessorMixin)  # noqa: B010
    try:
        settings, _ = VideoProcessorMixin.get_video_processor_dict(ref)
    except OSError:
        settings = {}
    settings.pop("image_processor_type", None)
    parts = {"image_processor": from_files(AutoImageProcessor, ref), "tokenizer": from_files(AutoTokenizer, ref)}
    parts["video_processor"] = VideoSettings(**settings)
    facts, _ = kind.get_processor_dict(ref)
    return kind.from_args_and_dict([parts[name] for name in attributes], facts)


def _processor_class(ref: str) -> type[ProcessorMixin] | None:
    """The class that the model's files name, or the one of its type; None where there is none."""
    name = ProcessorMixin.get_processor_dict(ref)[0].get("processor_class")
    for ask in (
        lambda: ImageProcessingMixin.get_image_processor_dict(ref)[0].get("processor_class"),
        lambda: PROCESSOR_MAPPING_NAMES.get(from_files(AutoConfig, ref).model_type),
    ):
        with suppress(OSError, ValueError):
            name = name or ask()
    kind = getattr(transformers, name or "", None)
    if "torchvision" not in getattr(kind, "_backends", ()):
        return kind
    # transformers' placeholder: import the class with the PIL module in the place of the one that needs torchvision
    module = kind.__module__  # type: ignore[union-attr]
    taken, pil = (module.replace(".processing_", f".image_processing_{middle}") for middle in ("", "pil_"))
    sys.modules[taken] = importlib.import_module(pil)
    try:
        return getattr(importlib.import_module(module), kind.__name__)  # type: ignore[union-attr]
    finally:
        del sys.modules[taken]
