"""From photos to a predictions file: batches decoded ahead, continuation after an interruption, and the time of one photo."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from PIL.Image import Image

from catlib.classifiers.base import BrokenOff, Classifier
from catlib.data.images import inside, open_image
from catlib.data.records import Prediction, PredictionSet, Sample, meta_path, prediction_line, read_predictions
from catlib.errors import InputError, NotFinite
from catlib.files import appending, locked, read_json, remove_leftovers, write_bytes, write_json, write_text
from catlib.progress import track
from catlib.provenance import git_commit, package_versions

log = logging.getLogger(__name__)
OnError = Callable[[Sample, InputError], None]
DECODERS = max(2, min(16, os.cpu_count() or 2))  # threads; Pillow releases the interpreter lock while it decodes
MEASURED = ("images_per_second", "latency_single_ms")  # in the sidecar, kept by a run that finds nothing left to do


def predict(
    classifier: Classifier,
    samples: Sequence[Sample],
    image_root: Path,
    out: Path,
    batch_size: int = 16,
    resume: bool = True,
    on_error: OnError | None = None,
    latency_photos: int = 0,
    reuse: bool = True,
    seed: int = 0,
    processes: int = 0,
) -> PredictionSet:
    """Classify `samples` into the predictions file `out` and its sidecar; return both.

    An interrupted run leaves the finished lines; with `resume` the next run of the same model over the same photos
    continues after them, in the same batches, and without it, or when the sidecar shows another model, it starts
    anew. The rate in the sidecar covers the photos of this call, image decoding included. `latency_photos`: so many
    photos are timed one by one as well, into the sidecar's `latency_single_ms`. `on_error` as in `read_batches`.
    `reuse` False: features that another classifier has computed are computed again, for a rate that tells the whole cost.
    `seed` is the run's, for the sidecar. Raises InputError where `out` or its sidecar holds anything but predictions that catlib
    has written, and while another process writes them.

    Of several `processes`, by default those that torchrun or `accelerate launch` have started together, each classifies a share of
    the batches; what all have found is put together in order, and all return it.
    """
    description = {"name": out.stem, "breeds": list(classifier.breeds), **classifier.describe()}
    if (processes := processes or int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        refuse_foreign(out)

        def own(some: Sequence[Sample], part: Path) -> None:
            predict(classifier, some, image_root, part, batch_size, resume, on_error, latency_photos, reuse, seed, 1)

        if not (resume and len(_finished(out, description, samples)) == len(samples)):
            _in_shares(own, samples, out, 1 if classifier.row_by_row else batch_size, processes)
        return read_predictions(out)
    busy = f"{out}: another process writes predictions there; wait for its end, or name another file"
    with locked(out.with_name(f".{out.name}.lock"), busy):
        for path in (out, meta_path(out)):
            remove_leftovers(path.parent, path.name)
        refuse_foreign(out)
        done = _finished(out, description, samples) if resume else set()
        if not done:
            out.unlink(missing_ok=True)
        meta = {**description, "batch_size": batch_size, "seed": seed}
        meta |= {"versions": package_versions(), "commit": git_commit()}
        if done:
            log.info("%s: %d of %d photos were predicted before", out.stem, len(done), len(samples))
            before = read_json(meta_path(out))
            meta |= {key: before[key] for key in MEASURED if key in before}
        write_json(meta_path(out), meta)
        todo = len(samples) - len(done)
        start = time.perf_counter()
        found = iterate(classifier, samples, image_root, batch_size, done, on_error, reuse)
        with appending(out) as add:
            for prediction in track(found, out.stem, total=todo):
                add(prediction_line(prediction))
        if todo:
            meta["images_per_second"] = round(todo / (time.perf_counter() - start), 3)
        if latency_photos and (todo or "latency_single_ms" not in meta):
            meta["latency_single_ms"] = measure_latency(classifier, samples, image_root, latency_photos)
        write_json(meta_path(out), meta)
        return read_predictions(out)


def _in_shares(own: Callable[..., None], samples: Sequence[Sample], out: Path, size: int, processes: int) -> None:
    """Each `size` samples in turn to one of the processes, whose file outlives an interruption; the first one merges them."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # the slowest is waited for
    rank, step = dist.get_rank(), processes * size
    parts = [out.with_name(f".{out.stem}.{k + 1}-of-{processes}.jsonl") for k in range(processes)]
    if share := [s for at in range(rank * size, len(samples), step) for s in samples[at : at + size]]:
        own(share, parts[rank])
    dist.barrier()
    if rank == 0:
        found = [read_predictions(part) for part in parts if part.is_file()]
        lines = {p.id: prediction_line(p) for one in found for p in one.predictions}
        rate = round(sum(one.meta.get("images_per_second", 0.0) for one in found), 3)
        write_json(meta_path(out), {**found[0].meta, "name": out.stem, "images_per_second": rate})
        write_text(out, "".join(lines[sample.id] for sample in samples if sample.id in lines))
        for path in (*parts, *map(meta_path, parts)):
            path.unlink(missing_ok=True)
    dist.barrier()


def iterate(
    classifier: Classifier,
    samples: Sequence[Sample],
    image_root: Path,
    batch_size: int,
    done: Set[str] = frozenset(),
    on_error: OnError | None = None,
    reuse: bool = True,
) -> Iterator[Prediction]:
    """Predictions of the samples whose ids are not in `done`, in order; `reuse` of features as in `predict`.

    A batch of which a part is done is computed whole again: rounding may depend on the photos that share a batch, and a
    resumed run has to end with the figures of an uninterrupted one. A prediction's latency is the time to decode its
    photo plus an equal share of its batch. Of a classifier that works row by row, what it had found before it broke off
    in a batch is predicted before the error is raised, and is not computed again.
    """
    size = 1 if classifier.row_by_row else batch_size
    batches = [samples[first : first + size] for first in range(0, len(samples), size)]
    todo = [sample for batch in batches if any(s.id not in done for s in batch) for sample in batch]
    for chunk, images, decode_ms in read_batches(todo, image_root, batch_size, on_error, classifier.prepare):
        start = time.perf_counter()
        try:
            batch = classifier.classify_in_memory(images, [sample.id for sample in chunk] if reuse else None)
        except BrokenOff as error:
            share = 1000 * (time.perf_counter() - start) / max(1, len(error.done))
            for i, (breed, said) in sorted(error.done.items()):
                yield _prediction(chunk[i], breed, None, said, decode_ms[i] + share)
            raise
        except NotFinite as error:
            raise NotFinite(error.row, f"photo {chunk[error.row].image}") from None
        share = 1000 * (time.perf_counter() - start) / len(chunk)
        for i, sample in enumerate(chunk):
            if sample.id not in done:
                scores = None if batch.log_probs is None else batch.log_probs[i]
                answer = None if batch.answers is None else batch.answers[i]
                energy = None if batch.energy is None else float(f"{batch.energy[i]:.6g}")
                yield _prediction(sample, batch.predicted[i], scores, answer, decode_ms[i] + share, energy)


def _prediction(
    s: Sample,
    breed: str | None,
    scores: np.ndarray | None,
    answer: str | None,
    latency_ms: float,
    energy: float | None = None,
) -> Prediction:
    given = None if scores is None else tuple(map(float, scores))
    return Prediction(s.id, s.image, s.breed, breed, given, answer, latency_ms, group=s.group, energy=energy)


def measure_latency(
    classifier: Classifier, samples: Sequence[Sample], image_root: Path, n: int = 32, warm_up: int = 2
) -> list[float]:
    """Milliseconds from file to answer for `n` photos that come alone.

    Decoding counts, loading the model does not; the first `warm_up` photos are not timed, and no feature cached by id
    is used. The photos are taken evenly from `samples`.
    """
    chosen = [samples[i * len(samples) // n] for i in range(n)] if len(samples) > n else list(samples)
    times = []
    for sample in [*chosen[:warm_up], *chosen]:
        start = time.perf_counter()
        classifier.classify([open_image(inside(image_root, sample.image))])
        times.append(1000 * (time.perf_counter() - start))
    return [round(ms, 3) for ms in times[-len(chosen) :]]


def refuse_foreign(out: Path) -> None:
    """Raise InputError where predictions for `out` would replace anything but predictions, unlabelled by catlib's own sidecar."""
    sidecar = meta_path(out)
    if not os.path.lexists(out) and not os.path.lexists(sidecar):
        return
    problem = "holds no predictions of catlib's"
    if sidecar.is_file():
        with suppress(InputError):
            meta = read_json(sidecar)
            ours = isinstance(meta.get("breeds"), list) and "python" in (meta.get("versions") or ())
            if ours and not os.path.lexists(out):
                return
            if ours and out.is_file():
                with out.open("rb") as stream:
                    first = stream.readline(1_000_000)
                if first.strip(b"\0") == b"" or (first.startswith(b'{"id": ') and b'"conversations"' not in first):
                    return
        problem = f"or its sidecar {sidecar.name} {problem}"
    raise InputError(f"{out} {problem} and is not replaced: name another file, or move it away")


def _finished(out: Path, description: dict[str, Any], samples: Sequence[Sample]) -> set[str]:
    """Ids already predicted by the same model for the same photos; a half-written last line is cut off."""
    if not out.is_file() or not meta_path(out).is_file():
        return set()
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    whole = whole[: whole.rfind(b"\n", 0, whole.index(b"\0")) + 1] if b"\0" in whole else whole  # after a power cut
    if whole != data:
        write_bytes(out, whole)
    try:
        before = read_predictions(out)
    except InputError as error:
        log.warning("starting anew: %s", error)
        return set()
    if any(before.meta.get(key) != value for key, value in json.loads(json.dumps(description)).items()):
        log.info("%s holds another model's predictions; starting anew", out)
        return set()
    wanted = {(sample.id, sample.image, sample.breed) for sample in samples}
    if not wanted.issuperset((p.id, p.image, p.breed) for p in before.predictions):
        log.info("%s holds predictions of other photos; starting anew", out)
        return set()
    return {prediction.id for prediction in before.predictions}


def read_batches(
    samples: Sequence[Sample],
    image_root: Path,
    batch_size: int,
    on_error: OnError | None = None,
    prepare: Callable[[Image], Any] = lambda image: image,
) -> Iterator[tuple[list[Sample], list[Any], list[float]]]:
    """Yield batches of samples with what `prepare` makes of their upright RGB photos, and the milliseconds that each one took.

    One batch is read ahead. A photo that cannot be opened raises an InputError, or, with `on_error`, is reported to
    it and left out; a batch in which nothing is left is not yielded.
    """
    with ThreadPoolExecutor(DECODERS, thread_name_prefix="decode") as pool:

        def start(first: int) -> list[tuple[Sample, Future]]:
            return [(s, pool.submit(_read, image_root, s, prepare)) for s in samples[first : first + batch_size]]

        try:
            ahead = start(0)
            for first in range(batch_size, len(samples) + batch_size, batch_size):
                current, ahead = ahead, start(first)
                read: list[tuple[Sample, Any, float]] = []
                for sample, future in current:
                    try:
                        read.append((sample, *future.result()))
                    except InputError as error:
                        if on_error is None:
                            raise
                        on_error(sample, error)
                if read:
                    chunk, images, decode_ms = zip(*read, strict=True)
                    yield list(chunk), list(images), list(decode_ms)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read(image_root: Path, sample: Sample, prepare: Callable[[Image], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    image = prepare(open_image(inside(image_root, sample.image)))
    return image, 1000 * (time.perf_counter() - start)
