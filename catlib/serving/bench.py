"""The engines that can run the tuned model, measured on the same photos at several loads: time, throughput, memory, agreement."""

import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import torch
from PIL.Image import Image

from catlib.classifiers.clip import ClipZeroShot
from catlib.classifiers.encoder import ClipEncoder
from catlib.classifiers.endpoint import EndpointClassifier, crop_side
from catlib.classifiers.tracks import ZERO_SHOT, names_of, track
from catlib.classifiers.vlm import VLMClassifier
from catlib.data.conversations import evenly
from catlib.data.images import inside, open_image
from catlib.data.prepare import load_dataset
from catlib.data.records import Sample, read_samples
from catlib.errors import CatlibError, InputError
from catlib.evaluation.metrics_file import METRICS_FILE, read_metrics
from catlib.files import write_json
from catlib.parsing import BreedParser
from catlib.paths import resolve
from catlib.progress import track as progress
from catlib.serving.worker import Worker
from catlib.settings import ServingSettings, split_list
from catlib.vlm.checkpoint import PRECISIONS, Checkpoint, find_checkpoint, open_vlm
from catlib.vlm.decoding import answer_limit
from catlib.vlm.models import pick_device

FILE = "serving.json"
MB = 1e6
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Load:
    """Photos asked about with `concurrency` requests under way. Times are those of single requests, from file to answer."""

    concurrency: int
    p50: float  # milliseconds
    p95: float
    photos_per_s: float
    answers: tuple[Any, ...]  # in the order of the photos


def measure_load(ask: Callable[[Path], Any], photos: Sequence[Path], concurrency: int) -> Load:
    """Ask about every photo once, `concurrency` at a time; the first two are asked about before the clock runs, too."""
    for photo in photos[:2]:
        ask(photo)

    def timed(photo: Path) -> tuple[Any, float]:
        start = time.perf_counter()
        answer = ask(photo)
        return answer, 1000 * (time.perf_counter() - start)

    with ThreadPoolExecutor(concurrency, thread_name_prefix="ask") as pool:
        start = time.perf_counter()
        answers, times = zip(*pool.map(timed, photos), strict=True)
        rate = len(photos) / (time.perf_counter() - start)
    p50, p95 = (round(float(ms), 2) for ms in np.percentile(times, [50, 95]))
    return Load(concurrency, p50, p95, round(rate, 3), answers)


def memory_meter(device: torch.device) -> Callable[[torch.nn.Module], float]:
    """What tells the memory of a model in this process, MB (10^6 bytes): made before it is loaded, asked after it has answered.

    On a GPU the allocator's peak, else the growth of the resident set; never less than the weights, since what an earlier model
    has left to the allocator is used again unseen.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)

    def now() -> int:
        return torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss

    def growth(model: torch.nn.Module) -> float:
        weights = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
        return round(max(weights, now() - before) / MB, 1)

    before = now()
    return growth


def server_memory_mb(url: str) -> float | None:
    """Resident memory of the processes that listen at a local URL, their children included; None when it is not known."""
    address = urlsplit(url)
    if address.hostname not in LOCAL:
        return None
    with suppress(psutil.Error):  # another user's process, or one that ended meanwhile
        listening = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
        owners = [psutil.Process(pid) for pid in {c.pid for c in listening if c.laddr[1:] == (address.port,)} if pid]
        family = {process for owner in owners for process in (owner, *owner.children(recursive=True))}
        return round(sum(process.memory_info().rss for process in family) / MB, 1) or None
    return None


@dataclass(frozen=True)
class Engine:
    """An engine's figures; `loads` is empty where it was not measured, and `note` says why.

    `same_answer`, `same_breed`: shares of the photos on which it agrees with the reference, the first precision in this
    process, asked about one photo at a time. `under_load`: of its own answers, those that stay the same however many
    requests are under way. None for another model.
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
    def alone(self) -> Load:
        """The figures with one request at a time."""
        return self.loads[0]

    @property
    def fastest(self) -> Load:
        """The figures with the number of requests at which most photos go through."""
        return max(self.loads, key=lambda load: load.photos_per_s)


@dataclass(frozen=True)
class ServingBench:
    """The tuned model, and the photos that every engine is asked about."""

    settings: ServingSettings
    checkpoint: Checkpoint
    samples: tuple[Sample, ...]
    photos: tuple[Path, ...]  # of the samples
    concurrency: tuple[int, ...]

    def summary(self) -> str:
        """What is asked about what, and what differs from the training."""
        what = self.checkpoint
        adapter = f"the adapter `{what.adapter.name}` on " if what.adapter else ""
        asked = f"{len(self.samples)} test photos; {adapter}`{Path(what.base).name}` is asked “{what.question}”"
        return " ".join([f"{asked}, with {len(what.breeds)} breeds as candidates.", *what.remarks])

    def vlm(self, precision: str = "", decoding: str = "score") -> VLMClassifier:
        """The tuned model in a precision, by default the first of `serving_precisions`; by default it scores every breed."""
        precision = precision or split_list(self.settings.serving_precisions)[0]
        vlm = open_vlm(self.checkpoint, device=self.settings.device, precision=precision)
        return VLMClassifier(vlm, None, decoding)

    def clip(self) -> ClipZeroShot | None:
        """Zero-shot CLIP as the settings name it; None where they name none."""
        s = self.settings
        if not s.clip_model:
            return None
        return ClipZeroShot(ClipEncoder.load(s.clip_model, s.device), self.checkpoint.breeds, s.clip_prompts)

    def measure(self) -> list[Engine]:
        """Every engine's figures, written to serving.json in the run's folder as well, one that cannot be asked with the
        reason. The first engine is what the others are compared with.
        """
        s, precisions = self.settings, split_list(self.settings.serving_precisions)
        ways: list[tuple[str, str, Callable[[], tuple[list[Load], float | None]]]] = [
            *(
                (f"transformers, {name}", "process", partial(self._here, partial(self.vlm, name, "free")))
                for name in precisions
            ),
            ("vLLM", "server", partial(self._served, s.vllm_url)),
            ("llama.cpp", "server", partial(self._served, s.llamacpp_url)),
            (track(ZERO_SHOT).short, "clip", partial(self._here, self.clip)),
        ]
        found: list[Engine] = []
        for name, kind, figures in progress(ways, "engines", unit="engines"):
            try:
                loads, memory = figures()
            except (CatlibError, torch.OutOfMemoryError) as error:
                if not found:
                    raise  # there is nothing to compare the others with
                found.append(Engine(name, kind, note=str(error).splitlines()[0]))
            else:
                reference = found[0].loads[0].answers if found else loads[0].answers
                agreement = (None, None, None) if kind == "clip" else self._agreement(loads, reference)
                found.append(Engine(name, kind, tuple(loads), memory, *agreement))
            gc.collect()
        found += self._probes()
        write_json(resolve(s.run_dir) / FILE, [asdict(engine) for engine in found])
        return found

    def _here(self, make: Callable[[], VLMClassifier | ClipZeroShot | None]) -> tuple[list[Load], float]:
        """The loads of a classifier in this process, where requests that wait share a batch, and its memory in MB."""
        growth_mb = memory_meter(pick_device(self.settings.device))
        if (classifier := make()) is None:
            raise InputError("no CLIP model given")

        def answer(_: str, photos: Sequence[Image]) -> Sequence[str | None]:
            batch = classifier.classify(photos)
            return batch.answers or batch.predicted

        with closing(Worker(answer, max(self.concurrency))) as worker:
            loads = self._loads(lambda photo: worker.submit("", lambda: open_image(photo)).result())
        module = classifier.vlm.model if isinstance(classifier, VLMClassifier) else classifier.encoder.model
        return loads, growth_mb(module)

    def _served(self, url: str) -> tuple[list[Load], float | None]:
        """The loads of the model behind a URL, asked as this checkpoint is. Raises InputError, EndpointError."""
        if not url:
            raise InputError("no URL given")
        what = self.checkpoint
        crop = (crop_side(what.folder) if what.folder else 0) or crop_side(Path(what.base))
        options: dict[str, Any] = {"crop": crop, "tries": 3, "max_tokens": answer_limit(what)}
        with closing(EndpointClassifier(url, what.breeds, what.question, **options)) as served:
            return self._loads(lambda photo: served.ask(open_image(photo))), server_memory_mb(served.url)

    def _loads(self, ask: Callable[[Path], Any]) -> list[Load]:
        return [measure_load(ask, self.photos, n) for n in self.concurrency]

    def _probes(self) -> list[Engine]:
        """The linear probes as notebook 04 has timed them, photo by photo; none where it has not run."""
        path = resolve(self.settings.run_dir) / METRICS_FILE
        models = read_metrics(path).get("models", {}) if path.is_file() else {}
        times = [(track(name).short, models[name]["latency_ms"]) for name in names_of("opponent") if name in models]
        return [
            Engine(name, "probe", (Load(1, ms["p50"], ms["p95"], round(1000 / ms["p50"], 3), ()),))
            for name, ms in times
            if ms["p50"]
        ]

    def _agreement(self, loads: Sequence[Load], reference: Sequence[str]) -> tuple[float, float, float]:
        """Shares of the photos with the reference's answer, with its breed, and with one answer at every load."""
        parse = BreedParser(self.checkpoint.breeds).parse
        pairs, n = list(zip(loads[0].answers, reference, strict=True)), len(reference)
        steady = sum(len(set(answers)) == 1 for answers in zip(*(load.answers for load in loads), strict=True))
        return sum(a == b for a, b in pairs) / n, sum(parse(a) == parse(b) for a, b in pairs) / n, steady / n


def open_serving(settings: ServingSettings) -> ServingBench:
    """Checkpoint and photos that the settings name. Raises InputError when something is missing or ill-formed."""
    dataset = load_dataset(resolve(settings.test_data).parent)
    test = read_samples(resolve(settings.test_data), dataset.image_root)
    under_way, precisions = split_list(settings.serving_concurrency), split_list(settings.serving_precisions)
    if not all(n.isdecimal() and int(n) for n in under_way) or settings.serving_photos < 1:
        found = f"{settings.serving_concurrency!r} and {settings.serving_photos}"
        raise InputError(f"serving_concurrency and serving_photos: expected whole numbers of at least 1, found {found}")
    if not precisions or set(precisions) - set(PRECISIONS[1:]):
        known = ", ".join(PRECISIONS[1:])
        raise InputError(f"serving_precisions: expected some of {known}; found {settings.serving_precisions!r}")
    about: dict[str, Any] = {"base_model": settings.base_model, "question": settings.prompt, "breeds": dataset.breeds}
    checkpoint = find_checkpoint(settings.checkpoint, **about)
    samples = evenly(test, settings.serving_photos, settings.seed)
    photos = tuple(inside(dataset.image_root, sample.image) for sample in samples)
    return ServingBench(settings, checkpoint, samples, photos, tuple(sorted({1, *map(int, under_way)})))
