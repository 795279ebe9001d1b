"""What a checkpoint folder holds, adapter or merged model, and the precision in which it fits what is there."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from catlib.breeds import BREEDS
from catlib.classifiers.vlm import VLMClassifier
from catlib.errors import InputError
from catlib.settings import EvaluationSettings, ServingSettings, split_list
from catlib.vlm.checkpoint import CONFIG, base_of, read_training
from catlib.vlm.models import VLM, empty_model, load_config, load_vlm, pick_device, pick_dtype

log = logging.getLogger(__name__)
PRECISIONS = ("auto", "bfloat16", "float32", "4-bit")
BLOCK = 64  # weights of NF4 that share a scale
ROOM = 1.2  # what answering needs on top of the weights: cache, activations, the tower's pixels


@dataclass(frozen=True)
class Tuned:
    """A checkpoint on disk: `base` and `adapter`, or a merged model (`adapter` None); what training asked and taught.

    `spelled`: the answers that training taught for breeds where they are more than the name.
    """

    base: str
    adapter: Path | None
    breeds: tuple[str, ...]
    question: str
    spelled: Mapping[str, str]


def open_checkpoint(folder: Path, base_model: str = "") -> Tuned:
    """Read what a folder says about itself; `base_model` goes before the base that an adapter names.

    Where no training record lists breeds and question, they are the collection's 67 and the standard question. Raises
    InputError when the folder holds neither an adapter nor a model.
    """
    from demo.tiny_models import resolve_model

    if not folder.is_dir():
        raise InputError(f"checkpoint {folder}: no such folder")
    training = read_training(folder)
    breeds = tuple(training.get("breeds") or (breed.name for breed in BREEDS))
    question = training.get("question") or EvaluationSettings.prompt
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        return Tuned(str(folder), None, breeds, question, training.get("spelled") or {})
    base = resolve_model(base_model or training.get("base_model") or base_of(folder), "llava")
    base_of(folder)  # refuses a folder without weights before anything is loaded
    return Tuned(base, folder, breeds, question, training.get("spelled") or {})


def load_tuned(tuned: Tuned, device: str = "auto", precision: str = "auto") -> VLM:
    """The model in memory. `auto`: bfloat16 where the device computes in it, else float32; 4-bit on a GPU without the room.

    Raises InputError when the precision is none, the base is not there, or the adapter does not fit it.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}; found {precision!r}")
    where = pick_device(device)
    if precision == "auto":
        free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else None
        count = sum(p.numel() for p in empty_model(load_config(tuned.base)).parameters()) if free is not None else 0
        precision = choose_precision(pick_dtype("auto", where), count, free)
    if precision == "4-bit" and where.type == "cpu":
        _check_widths(tuned.base)
    log.info(
        "loading %s%s in %s on %s", tuned.base, f" with {tuned.adapter}" if tuned.adapter else "", precision, where
    )
    dtype = "auto" if precision == "4-bit" else precision
    return load_vlm(tuned.base, adapter=tuned.adapter, device=str(where), dtype=dtype, quantize=precision == "4-bit")


def _check_widths(base: str) -> None:
    """Raise InputError where bitsandbytes could load the model in 4-bit and not compute with it on the CPU."""
    text = load_config(base).get_text_config()
    widths = {name: getattr(text, name, 0) or 0 for name in ("hidden_size", "intermediate_size")}
    if odd := [f"{name} {width}" for name, width in widths.items() if width % BLOCK]:
        raise InputError(
            f"4-bit on a CPU needs layers whose width is a multiple of {BLOCK}; {Path(base).name} has {', '.join(odd)}"
        )


def load_classifier(tuned: Tuned, breeds: Sequence[str], settings: ServingSettings) -> VLMClassifier:
    """The tuned model as the classifier that scores every breed, in the first of `serving_precisions`."""
    precision = split_list(settings.serving_precisions)[0]
    return VLMClassifier(load_tuned(tuned, settings.device, precision), breeds, settings.prompt, spelled=tuned.spelled)


def choose_precision(best: torch.dtype, parameters: int, free: int | None) -> str:
    """The precision for `parameters` weights when `best` is the device's own and `free` bytes of GPU memory are left.

    `free` None: the memory is not asked about (a CPU swaps rather than fails).
    """
    if free is not None and ROOM * parameters * best.itemsize > free:
        return "4-bit"
    return str(best).removeprefix("torch.")
