"""Before a training: is it worth its hours? The verdict's rules over what can be known without a tuned model."""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.benchmark import Timer

from catlib.classifiers.tracks import tracks_of
from catlib.data.conversations import gives_reasons
from catlib.data.records import read_samples
from catlib.errors import InputError
from catlib.evaluation.metrics_file import read_folder
from catlib.evaluation.results import Results
from catlib.evaluation.runs import open_bench, predict_tracks
from catlib.evaluation.verdict import Verdict, judge
from catlib.files import write_json
from catlib.paths import resolve
from catlib.settings import ComparisonSettings, TrainSettings
from catlib.training.memory import GB, Footprint, choose, model_config, usual_shape
from catlib.training.memory_check import device_memory, ways_that_fit
from catlib.vlm.models import pick_device, pick_dtype

# Of the rate of a large matrix product: 0.53 measured on a CPU; on an H100 0.28 in micro-batches of 4, 0.43 of 16 (docs/gpu).
UTILISATION = {"cpu": 0.4, "cuda": 0.28}
CPU_HOURS = 24.0  # longer than this, nobody wants to wait for a CPU


def gate(profile: str, given: Mapping[str, Any]) -> tuple[Verdict, dict[str, Any]]:
    """Train or skip, with the figures and rules that decide, and what is written to gate.json in the run's folder.

    `profile` and `given` as for `catlib report`. Zero-shot CLIP and the other tracks that need no training of a VLM are measured on the
    validation photos, unless it is clear already that nothing can be trained here. Raises InputError where photos or models
    are missing.
    """
    start = time.monotonic()
    train, want = TrainSettings.of_profile(profile, given), ComparisonSettings.of_profile(profile, given)
    if want.clip_prompts == "auto":
        want = replace(want, clip_prompts="ensemble")  # chosen on the photos that are measured here, they would flatter
    need = training_need(train, want.budget_hours)
    models: dict[str, Any] = {}
    if not need["obstacle"]:
        with TemporaryDirectory() as folder:  # the run's own predictions stay as they are
            bench = replace(open_bench(want), run_dir=Path(folder))
            made = predict_tracks(tracks_of("baseline", "opponent"), bench, want, ("val",))
            val = read_folder(bench.run_dir / "predictions" / "val")
            models = Results(val, {}, bench.priority, want.bootstrap, want.seed).only(made).models
    verdict = judge(models, [], want, None, need=need)
    facts = {**verdict.as_json(), "profile": profile, "need": need, "wishes": asdict(want), "models": models}
    facts["seconds"] = round(time.monotonic() - start, 1)
    write_json(resolve(want.run_dir) / "gate.json", facts)
    return verdict, facts


def training_need(settings: TrainSettings, budget_hours: float = 0.0) -> dict[str, Any]:
    """What a training takes on the device at hand: {"device", "peak_gb", "free_gb", "hours", "reasons", "text", "obstacle"}.

    `obstacle`: why it cannot be done here, or "". Hours are those of the passes over the training photos (`Footprint.flops`, half
    as much again with gradient checkpointing), at a share of the rate that a matrix product reaches here; without validation.
    """
    samples = read_samples(resolve(settings.train_data)) if resolve(settings.train_data).is_file() else []
    facts: dict[str, Any] = {"device": "cpu", "peak_gb": None, "free_gb": None, "hours": None, "obstacle": ""}
    facts["reasons"] = gives_reasons(samples)
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        return facts | {"obstacle": "There is no GPU, and the settings ask for one to train on.", "text": ""}
    device = pick_device(settings.device)
    config, dtype, cpu = model_config(settings.base_model), pick_dtype(settings.dtype, device), device.type == "cpu"
    where = facts["device"] = device.type
    if cpu or where == "cuda":
        where = "a CPU, as there is no GPU" if cpu else torch.cuda.get_device_name(device)
    try:
        shape = usual_shape(config, settings)  # as the training itself
    except InputError as error:
        return facts | {"text": f"What training needs on {where} is not known: {error}."}

    of = cache(lambda way: Footprint(way, config, shape, dtype, cpu=cpu))
    free = device_memory(device)
    way = of(settings).at(settings.batch_size) if free is None else choose(settings, of, free, device.type == "cuda")
    peak, again = way.peak, 1.5 if way.gradient_checkpointing else 1.0  # a forward pass more is half of the rest
    operations = again * of(settings).flops() * len(samples) * settings.epochs
    hours = operations / (UTILISATION["cpu" if cpu else "cuda"] * matmul_rate(device, dtype)) / 3600
    facts |= {"peak_gb": peak / GB, "free_gb": None if free is None else free / GB, "hours": hours}
    took = f"{hours:.1f} hours" if hours >= 0.1 else "less than 0.1 hours"
    text = f"Training on {len(samples)} photos takes about {peak / GB:.1f} GB and {took} on {where}"
    most = budget_hours or (CPU_HOURS if cpu else 0.0)
    if free is not None and peak > free and not settings.force:
        ways = "; ".join(ways_that_fit(settings, of, free)) or "nothing"
        facts["obstacle"] = f"{text}, where {free / GB:.1f} GB are free. What fits: {ways}."
    elif most and hours > most:
        facts["obstacle"] = f"{text}, more than the {most:g} hours that it may take."
    return facts | {"text": f"{text}."}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product, measured; on a GPU of one that is large enough to fill it."""
    size = 1024 if device.type == "cpu" else 4096
    a = torch.ones(size, size, device=device, dtype=dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.3).median
