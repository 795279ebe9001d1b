"""The engines that can run the tuned model, measured on the same photos: what notebook 05 does before there is a table."""

import gc
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from catlib.data.images import inside, open_image
from catlib.data.prepare import load_dataset
from catlib.data.records import Sample, read_samples, write_atomically
from catlib.errors import CatlibError, InputError
from catlib.evaluation.metrics_file import METRICS_FILE, read_metrics
from catlib.evaluation.names import PROBES, ZERO_SHOT, short
from catlib.evaluation.runs import evenly
from catlib.parsing import BreedParser
from catlib.paths import resolve
from catlib.progress import track
from catlib.serving.latency import Load, MemoryMeter, measure_load, server_memory_mb
from catlib.serving.service import VLMService
from catlib.serving.worker import Worker
from catlib.settings import ServingSettings, split_list
from catlib.vlm.checkpoint import PRECISIONS, Checkpoint, find_checkpoint

if TYPE_CHECKING:
    from catlib.classifiers.clip import ClipZeroShot

FILE = "serving.json"


@dataclass(frozen=True)
class Engine:
    """An engine's figures; `loads` is empty where it was not measured, and `note` says why, or where a figure is from.

    `same_answer`, `same_breed`: shares of the photos on which it agrees with the reference, the first precision in this
    process, asked about one photo at a time. `under_load`: of its own answers, those that stay the same however many
    requests are under way.
    """

    name: str
    kind: str  # process | server | clip | probe
    loads: tuple[Load, ...] = ()
    memory_mb: float | None = None
    same_answer: float | None = None
    same_breed: float | None = None
    under_load: float | None = None
    note: str = ""

    @property
    def alone(self) -> Load | None:
        """The figures with one request at a time."""
        return next((load for load in self.loads if load.concurrency == 1), None)

    @property
    def fastest(self) -> Load | None:
        """The figures with the number of requests at which most photos go through."""
        return max(self.loads, key=lambda load: load.photos_per_s, default=None)


@dataclass(frozen=True)
class ServingBench:
    """The tuned model, the photos that every engine is asked about, and where the figures go."""

    run_dir: Path
    image_root: Path
    tuned: Checkpoint
    breeds: tuple[str, ...]
    samples: tuple[Sample, ...]
    concurrency: tuple[int, ...]

    @property
    def photos(self) -> list[Path]:
        """The files of the samples."""
        return [inside(self.image_root, sample.image) for sample in self.samples]

    def summary(self) -> str:
        """What is asked about what, in a sentence."""
        adapter = f"the adapter `{self.tuned.adapter.name}` on " if self.tuned.adapter else ""
        return f"{len(self.samples)} test photos; {adapter}`{Path(self.tuned.base).name}`, candidates: {len(self.breeds)} breeds."


def open_serving(settings: ServingSettings) -> ServingBench:
    """Checkpoint and photos that the settings name. Raises InputError when something is missing or ill-formed."""
    from demo.tiny_models import resolve_model

    dataset = load_dataset(resolve(settings.test_data).parent)
    test = read_samples(resolve(settings.test_data), dataset.image_root)
    try:
        concurrency = tuple(sorted({int(entry) for entry in split_list(settings.serving_concurrency)} | {1}))
    except ValueError:
        raise InputError(
            f"serving_concurrency: expected whole numbers with commas, found {settings.serving_concurrency!r}"
        ) from None
    if concurrency[0] < 1 or settings.serving_photos < 1:
        raise InputError("serving_concurrency and serving_photos must be at least 1")
    precisions = split_list(settings.serving_precisions)
    if not precisions or set(precisions) - set(PRECISIONS[1:]):
        raise InputError(
            f"serving_precisions: expected some of {', '.join(PRECISIONS[1:])}; found {settings.serving_precisions!r}"
        )
    return ServingBench(
        resolve(settings.run_dir),
        dataset.image_root,
        find_checkpoint(
            resolve(settings.checkpoint),
            base_model=resolve_model(settings.base_model, "llava"),
            question=settings.prompt,
        ),
        dataset.breeds,
        evenly(test, settings.serving_photos, settings.seed),
        concurrency,
    )


def measure_engines(bench: ServingBench, settings: ServingSettings) -> list[Engine]:
    """Every engine's figures, written to run_dir/serving.json as well; an engine that cannot be asked is not measured."""
    ways: list[tuple[str, str, Callable[[], tuple[list[Load], float | None]]]] = [
        (f"transformers, {precision}", "process", lambda precision=precision: _in_process(bench, settings, precision))
        for precision in split_list(settings.serving_precisions)
    ]
    for name, url in (("vLLM", settings.vllm_url), ("llama.cpp", settings.llamacpp_url)):
        ways.append((name, "server", lambda url=url: _served(bench, settings, url)))
    found: list[Engine] = []
    reference: tuple[str, ...] | None = None
    for name, kind, measure in track(ways, "engines", unit="engines"):
        try:
            loads, memory = measure()
        except (CatlibError, torch.OutOfMemoryError) as error:
            if reference is None:
                raise  # there is nothing to compare the others with
            found.append(Engine(name, kind, note=f"not measured: {str(error).splitlines()[0]}"))
        else:
            reference = reference or loads[0].answers
            found.append(_compared(bench, name, kind, loads, reference, memory))
    found.append(_clip(bench, settings))
    found += _probes(bench)
    rows = [asdict(engine) for engine in found]
    write_atomically(bench.run_dir / FILE, json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return found


def _in_process(bench: ServingBench, settings: ServingSettings, precision: str) -> tuple[list[Load], float]:
    from catlib.vlm.models import pick_device

    meter = MemoryMeter(pick_device(settings.device))
    with closing(VLMService(max_batch=max(bench.concurrency))) as service:
        service.load(resolve(settings.checkpoint), settings.device, precision, bench.tuned.base)
        loads = _loads(bench, lambda photo: service.predict_finetuned(photo, bench.tuned.question).answer)
        return loads, meter.growth_mb(service.model)


def _served(bench: ServingBench, settings: ServingSettings, url: str) -> tuple[list[Load], float | None]:
    from catlib.classifiers.endpoint import EndpointClassifier
    from catlib.classifiers.photo_urls import crop_side

    if not url:
        raise InputError("no URL given")
    crop = crop_side(resolve(settings.checkpoint)) or crop_side(Path(bench.tuned.base))
    with closing(EndpointClassifier(url, bench.breeds, bench.tuned.question, crop=crop, tries=3)) as endpoint:
        loads = _loads(bench, lambda photo: endpoint.ask(open_image(photo)))
        return loads, server_memory_mb(endpoint.url)


def _clip(bench: ServingBench, settings: ServingSettings) -> Engine:
    if not settings.clip_model:
        return Engine(short(ZERO_SHOT), "clip", note="not measured: no CLIP model given")
    from catlib.classifiers.clip import ClipZeroShot
    from catlib.vlm.models import pick_device

    meter = MemoryMeter(pick_device(settings.device))
    clip: ClipZeroShot = load_clip(settings, bench.breeds)
    worker = Worker(lambda _, photos: clip.classify(photos).predicted, max(bench.concurrency))
    with closing(worker):
        loads = _loads(bench, lambda photo: worker.submit("", lambda: open_image(photo)).result())
    return Engine(short(ZERO_SHOT), "clip", tuple(loads), meter.growth_mb(clip.encoder.model))


def load_clip(settings: ServingSettings, breeds: Sequence[str]) -> "ClipZeroShot":
    """Zero-shot CLIP as the settings name it."""
    from catlib.classifiers.clip import ClipZeroShot
    from catlib.classifiers.encoder import ClipEncoder
    from demo.tiny_models import resolve_model

    encoder = ClipEncoder.load(resolve_model(settings.clip_model, "clip"), settings.device)
    return ClipZeroShot(encoder, breeds, settings.clip_prompts)


def _probes(bench: ServingBench) -> list[Engine]:
    """The linear probes as notebook 04 has timed them, photo by photo; none where it has not run."""
    path = bench.run_dir / METRICS_FILE
    models = read_metrics(path).get("models", {}) if path.is_file() else {}
    times = {name: models[name]["latency_ms"] for name in PROBES if name in models}
    return [
        Engine(
            short(name),
            "probe",
            (Load(1, ms["p50"], ms["p95"], round(1000 / ms["p50"], 3), ()),),
            note="timed in notebook 04",
        )
        for name, ms in times.items()
        if ms["p50"]
    ]


def _loads(bench: ServingBench, ask: Callable[[Path], Any]) -> list[Load]:
    return [measure_load(ask, bench.photos, n, warm_up=2) for n in bench.concurrency]


def _compared(
    bench: ServingBench, name: str, kind: str, loads: Sequence[Load], reference: Sequence[str], memory: float | None
) -> Engine:
    parse = BreedParser(bench.breeds).parse
    alone, n = loads[0].answers, len(reference)
    same = sum(a == b for a, b in zip(alone, reference, strict=True)) / n
    breed = sum(parse(a) == parse(b) for a, b in zip(alone, reference, strict=True)) / n
    steady = sum(len({load.answers[i] for load in loads}) == 1 for i in range(n)) / n
    gc.collect()
    return Engine(name, kind, tuple(loads), memory, same, breed, steady)
