"""A model's processor for photos and text, also where torchvision is not installed.

transformers prepares photos with PIL where torchvision is missing, but two things of it still ask for torchvision: the video
part of a processor (Qwen-VL, InternVL, SmolVLM, LLaVA-OneVision), which no photo needs, and Pixtral's processor, for a function
about sizes that the PIL module has as well. Everything else is transformers' own classes and the model's own files.
"""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

from catlib.errors import CatlibError, InputError
from catlib.files import read_json

# The largest sizes that a configuration may name, by how the entry's name ends: several times those of any published model.
# Beyond them building the model alone takes minutes, or more memory than there is.
LARGEST = {
    "layers": 1000,
    "depth": 1000,
    "vocab_size": 2**22,
    "image_size": 2**14,
    "_size": 2**18,
    "_dim": 2**18,
    "heads": 2**13,
}
POSITIVE = ("hidden_size", "intermediate_size", "vocab_size", "image_size", "patch_size", "num_attention_heads")
TRIAL_S, TRIAL_GB = 20, 4  # what a template or pattern may take: it needs milliseconds
CODE = ("auto_map", "custom_pipelines")  # entries by which a model's files name Python code of their own


def from_files(kind: Any, ref: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained(ref)`, the one call of it in catlib: weights and settings are read, code of the model's own never runs.

    Raises InputError for a folder that names code, whatever stands on standard input, or sizes that no model has; and what
    transformers raises: OSError, ValueError, KeyError, ImportError, or ValueError for whatever else it stumbles over.
    """
    for path in sorted(Path(ref).glob("*config.json")):
        _check_entries(read_json(path), path)
    try:
        return kind.from_pretrained(ref, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError, MemoryError):
        raise
    except Exception as error:  # a nonsensical entry makes a model's own code raise anything
        if isinstance(error, RuntimeError) and "memory" in str(error).lower():
            raise
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _check_entries(value: Any, path: Path) -> None:
    """Raise InputError for an entry, at any depth, by which transformers would fetch or import code that is not its own, and for a
    size that no model has.
    """
    for key, inner in value.items() if isinstance(value, dict) else ():
        if (key in CODE and inner) or ("attn_implementation" in key and "/" in str(inner)):  # a kernel of the hub
            raise InputError(
                f"{path}: the entry {key!r} asks for Python code that comes with the model; catlib never runs such code. If "
                "transformers knows the architecture itself, remove the entry"
            )
        most = next((most for end, most in LARGEST.items() if key.endswith(end)), math.inf)
        least = 1 if key in POSITIVE else 0 if key.startswith("num_") else -math.inf
        if any(
            isinstance(n, int | float) and not least <= n <= most
            for n in (inner if isinstance(inner, list) else [inner])
        ):
            raise InputError(f"{path}: the entry {key!r} is {inner!r:.100}; catlib knows models of {least} to {most}")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_entries(inner, path)


def load_processor(ref: str) -> Any:
    """The processor of a hub model or a folder.

    Raises InputError when it is missing, has no chat template, or needs a package that is not installed.
    """
    try:
        processor = from_files(AutoProcessor, ref) if is_torchvision_available() else _without_torchvision(ref)
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        text = str(error).strip() or type(error).__name__
        if missing := next((name for name in ("torchvision", "num2words", "sentencepiece") if name in text), None):
            raise InputError(f"the processor of model {ref!r} needs {missing}: pip install {missing}") from None
        raise InputError(
            f"model {ref!r} has no usable processor: it needs tokenizer files and processor_config.json or "
            f"preprocessor_config.json ({text.splitlines()[0][:300]})"
        ) from None
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise InputError(f"model {ref!r} has no image-and-text processor; found only a {type(processor).__name__}")
    if not getattr(processor, "chat_template", None) and not getattr(processor.tokenizer, "chat_template", None):
        raise InputError(f"model {ref!r}: its processor has no chat template (chat_template.jinja is missing)")
    _try_out(processor, ref)
    return processor


def _try_out(processor: Any, ref: str) -> None:
    """Raise InputError for a chat template or a tokenizer's regular expression that does not end within seconds.

    Only a process of its own can be stopped in the middle of either, so that each template is rendered there first, and a
    tokenizer where it holds a doubtful pattern.
    """
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    templates = list(template.values()) if isinstance(template, dict) else [template]
    path = Path(ref) / "tokenizer.json"
    patterns = re.findall(r'"Regex"\s*:\s*"((?:[^"\\]|\\.)*)"', path.read_text("utf-8")) if path.is_file() else []
    tokenizer = str(path) if any(map(is_doubtful, patterns)) else ""
    for what, data in [("chat template", {"template": t}) for t in templates] + [
        ("tokenizer", {"tokenizer": tokenizer})
    ]:
        if any(data.values()) and not ends_in_time(json.dumps(data)):
            raise InputError(f"model {ref!r}: its {what} does not end within {TRIAL_S} s, or takes over {TRIAL_GB} GB")


def is_doubtful(pattern: str) -> bool:
    """Whether matching a regular expression may take for ever: it repeats a group, or has many repetitions in a row."""
    return (
        ")+" in pattern
        or ")*" in pattern
        or "){" in pattern
        or any(len(re.findall(r"[+*{]", part)) > 4 for part in pattern.split("|"))
    )


@cache
def ends_in_time(data: str) -> bool:
    """Whether the trial (see trial.py) of a template, a tokenizer or patterns, as JSON, comes to an end, be it an error."""
    command = [sys.executable, "-I", str(Path(__file__).with_name("trial.py")), str(TRIAL_GB)]
    frugal = {
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_ARENA_MAX": "1",
    }  # virtual memory counts
    try:
        done = subprocess.run(
            command, input=data, text=True, capture_output=True, timeout=TRIAL_S, env=os.environ | frugal
        )
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        return False


class VideoSettings(VideoProcessorMixin):
    """Stands in a processor for its video part: keeps the settings, so that they are saved again, and reads no video."""

    num_frames = fps = None  # SmolVLM's chat template asks for them

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
    vars(transformers)["VideoProcessorMixin"] = VideoProcessorMixin  # a processor checks its parts by exported names
    parts = {
        "image_processor": from_files(AutoImageProcessor, ref),
        "tokenizer": from_files(AutoTokenizer, ref),
        "video_processor": VideoSettings(**_video_settings(ref)),
    }
    facts, _ = kind.get_processor_dict(ref)
    return kind.from_args_and_dict([parts[name] for name in attributes], facts)


def _processor_class(ref: str) -> type[ProcessorMixin] | None:
    """The class that the model's files name, or the one of its type; None where there is none."""
    facts, _ = ProcessorMixin.get_processor_dict(ref)
    name = facts.get("processor_class")
    if not name:
        try:
            name = ImageProcessingMixin.get_image_processor_dict(ref)[0].get("processor_class")
        except OSError:
            name = None
    if not name:
        try:
            name = PROCESSOR_MAPPING_NAMES.get(from_files(AutoConfig, ref).model_type)
        except (OSError, ValueError):
            return None
    if name == "PixtralProcessor":
        return _pixtral_processor_class()
    return getattr(transformers, name or "", None)


def _pixtral_processor_class() -> type[ProcessorMixin]:
    """Pixtral's processor, its module imported with the PIL module in the place of the one that needs torchvision."""
    package = "transformers.models.pixtral"
    taken = f"{package}.image_processing_pixtral"
    sys.modules[taken] = importlib.import_module(f"{package}.image_processing_pil_pixtral")
    try:
        return importlib.import_module(f"{package}.processing_pixtral").PixtralProcessor
    finally:
        del sys.modules[taken]


def _video_settings(ref: str) -> dict[str, Any]:
    """What the model's files say about videos; empty where they say nothing."""
    try:
        settings, _ = VideoProcessorMixin.get_video_processor_dict(ref)
    except OSError:
        return {}
    return {name: value for name, value in settings.items() if name != "image_processor_type"}
