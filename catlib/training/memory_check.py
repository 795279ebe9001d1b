"""Whether a run fits the device that it is about to start on: asked before any weights are loaded."""

import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import torch

from catlib.data.images import size_of
from catlib.data.records import Sample
from catlib.errors import CatlibError, InputError
from catlib.settings import TrainSettings
from catlib.training.memory import GB, Estimate, Footprint, choose, largest_batch, model_config, photo_tokens
from catlib.training.memory_trace import Shape
from catlib.vlm.models import pick_device, pick_dtype
from catlib.vlm.processors import load_processor
from catlib.vlm.prompting import answer_tokens, prompt_text, text_tokens

log = logging.getLogger(__name__)


def check_fits(settings: TrainSettings, ref: str, samples: Iterable[tuple[Sample, Path]]) -> Estimate | None:
    """The estimate of a run on (sample, photo's path), with the batch and way that `choose` found.

    None where the device's memory cannot be told (Apple's GPU), or the estimate fails, which is logged. Raises
    InputError when the device has less memory, naming what would fit; with `force` it only warns.
    """
    device = pick_device(settings.device)
    free = device_memory(device)
    if free is None:
        return None
    dtype, config, pairs = pick_dtype(settings.dtype, device), model_config(ref), list(samples)
    breeds = len({sample.breed for sample, _ in pairs})

    @cache
    def of(way: TrainSettings) -> Footprint:
        return Footprint(way, config, shape, dtype, breeds, photos=len(pairs), cpu=device.type == "cpu")

    try:
        shape = longest(load_processor(ref, settings.max_pixels, settings.image_pool), config, pairs)
        # a CPU's threads share the batch as it is given
        need = choose(settings, of, free, any_batch=device.type == "cuda")
    except CatlibError:
        raise
    except Exception as error:  # an architecture that tensors without data cannot pass: the run does not depend on it
        log.warning("no estimate of the memory of a %s: %r. Training goes on without one", config.model_type, error)
        return None
    way = "with" if need.gradient_checkpointing else "without"
    room = f"estimated peak memory {need.peak / GB:.2f} GB of {free / GB:.1f} GB free"
    log.info("%d photos in a pass, %s gradient checkpointing: %s", need.batch_size, way, room)
    if need.peak <= free:
        return need
    fits, worst = ways_that_fit(settings, of, free), max(need.phases, key=need.phases.__getitem__)
    message = (
        f"training {ref} at batch_size {need.batch_size} needs about {need.peak / GB:.1f} GB ({worst}), and {device} has "
        f"{free / GB:.1f} GB free. What fits: "
    ) + ("; ".join(fits) or "nothing, not even QLoRA with gradient checkpointing at batch_size 1")
    if not settings.force:
        raise InputError(f"{message}. --force trains all the same")
    log.warning("%s. Training all the same", message)
    return need


def ways_that_fit(settings: TrainSettings, of: Callable[[TrainSettings], Footprint], free: float) -> list[str]:
    """What to change so that training fits into `free` bytes, in words; `of` gives a way's footprint."""
    own = largest_batch(of(settings), free)
    fits = [f"batch_size {own}"] if own else []
    for mode, on in product(("lora", "qlora"), ("false", "true")):
        way = replace(settings, mode=mode, gradient_checkpointing=on)
        if batch := largest_batch(of(way), free):
            fits.append(f"mode {mode} with{'' if on == 'true' else 'out'} gradient_checkpointing at batch_size {batch}")
    return fits


def longest(processor: Any, config: Any, samples: Iterable[tuple[Sample, Path]]) -> Shape:
    """The most image tokens and text tokens that a sample has, and the answers' mean length."""
    pairs = list(samples)
    texts = {(sample.question, sample.answer) for sample, _ in pairs}
    answers = {(q, a): len(answer_tokens(processor, q, a)) for q, a in texts}
    prompts = {q: len(text_tokens(processor, prompt_text(processor, q))) for q, _ in texts}
    text = max(prompts[q] - 1 + n for (q, _), n in answers.items())  # one token of the prompt stands for the photo
    tokens = photo_tokens(processor, config, {size_of(path) for _, path in pairs})
    mean = sum(answers[sample.question, sample.answer] for sample, _ in pairs) / len(pairs)
    return Shape(tokens, text, math.ceil(mean))


def device_memory(device: torch.device) -> float | None:
    """Bytes that are free for one process on a GPU, or in this machine's or container's memory for the CPU, divided
    among the processes that were launched together; None where it cannot be told.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, for later use
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    if device.type != "cpu":
        return None
    free = float(psutil.virtual_memory().available)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (most := limit.read_text(encoding="utf-8").strip()) != "max":
        free = min(free, float(most) - float(used.read_text(encoding="utf-8")))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
