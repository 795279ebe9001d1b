"""Does every engine give the same answers? transformers with the adapter against merged, vLLM and llama.cpp, and how fast.

    CATLIB_VLLM_PYTHON=… CATLIB_LLAMA_CPP=… CATLIB_LLAMA_SERVER=… python -m benchmarks.engine_parity CHECKPOINT … [--photos 120]
    python -m benchmarks.engine_parity CHECKPOINT --url http://127.0.0.1:8000/v1#cats [--crop SIDE]      a server that runs already

CHECKPOINT: an adapter that catlib has trained, or several. Drawn cats of the demo's test stream, or an even draw of the photos of
`--test TEST.jsonl`, one request at a time, greedy, at most 50 tokens, all in float32 (llama.cpp: f16 weights). Reference is transformers with the adapter, in this process.
Engines that are not installed are listed as not measured. `--server NAME=PATH` adds another llama-server, a patched one say.
Columns: same answers; largest difference of a token's log-probability in those, nats; seconds from start to the first sign of
life; milliseconds of the first answer, and p50 and p95 of the others; photos/s with four requests at a time; peak memory of the
engine's processes (transformers: of this one), MB.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from PIL.Image import Image

from catlib.classifiers.endpoint import crop_side
from catlib.data.conversations import evenly
from catlib.data.dataset import load_dataset
from catlib.data.images import inside, open_image
from catlib.data.records import read_samples
from catlib.errors import CatlibError
from catlib.evaluation.tables import text_table
from catlib.gguf.engines import llama_command, vllm_command
from catlib.gguf.export import convert, find_converter
from catlib.gguf.parity import Speaker, Spoken, class_token_last, compare_spoken, speak_here
from catlib.serving.engine_process import Command, Where, free_port, running
from catlib.serving.export import Photos, find_mergeable, merge
from catlib.vlm.checkpoint import VLM, Checkpoint, open_vlm
from demo.photos import SHARES, draw_breed

Row = dict[str, str]


def drawn_cats(count: int) -> Photos:
    """So many drawn cats, of all breeds in turn, that no training has seen."""
    drawn = [(breed, number) for number in range(-(-count // len(SHARES))) for breed in SHARES][:count]
    images = tuple(draw_breed(breed, "test", number, seed=0) for breed, number in drawn)
    return Photos(tuple(f"{breed} {number}" for breed, number in drawn), images, "drawn cats")


def test_photos(test: Path, count: int) -> Photos:
    """So many of the photos of a test file, evenly over the breeds."""
    root = load_dataset(test.resolve().parent).image_root
    samples = evenly(read_samples(test, root), count, 0)
    images = tuple(open_image(inside(root, sample.image)) for sample in samples)
    return Photos(tuple(sample.id for sample in samples), images, f"photos of {test}")


def timed(speak: Callable[[Image], Spoken], photos: Photos) -> tuple[list[Spoken], list[float]]:
    """Answers one after another, and the milliseconds of each."""
    answers, times = [], []
    for image in photos.images:
        start = time.perf_counter()
        answers.append(speak(image))
        times.append(1000 * (time.perf_counter() - start))
    return answers, times


def row(name: str, reference: Sequence[Spoken], run: "Run", photos: Photos) -> Row:
    """A line of the table, printed at once as well, with what differs: a run that is cut off has not been for nothing."""
    parity = compare_spoken(reference, run.answers, photos.names)
    p50, p95 = np.percentile(run.times[1:], [50, 95])
    for difference in parity.differing[:5]:
        print(f"  {name}: {difference}", flush=True)
    if len(parity.differing) > 5:
        print(f"  {name}: and {len(parity.differing) - 5} more", flush=True)
    line = {
        "engine": name,
        "same": f"{parity.same}/{parity.photos}",
        "nats": f"{parity.largest_difference:.1e}" if parity.same else "–",
        "first ms": f"{run.times[0]:.0f}",
        "p50 ms": f"{p50:.0f}",
        "p95 ms": f"{p95:.0f}",
        **run.figures,
    }
    print("  " + ", ".join(f"{key} {value}" if key != "engine" else value for key, value in line.items()), flush=True)
    return line


def memory_mb(pid: int) -> float:
    """Memory of a process and its children, each page once (PSS), MB."""
    parent = psutil.Process(pid)
    return sum(p.memory_full_info().pss for p in (parent, *parent.children(recursive=True))) / 1e6


@dataclass(frozen=True)
class Run:
    """What an engine said and how long it took."""

    answers: list[Spoken]
    times: list[float]
    figures: Row


def ask_all(url: str, source: Checkpoint, crop: int, photos: Photos) -> Run:
    """All photos one after another, then once more with four requests at a time."""
    speaker = Speaker(url, source.breeds, source.question, crop=crop)
    answers, times = timed(speaker.speak, photos)
    with ThreadPoolExecutor(4) as pool:
        start = time.perf_counter()
        together = list(pool.map(speaker.speak, photos.images))
        rate = len(together) / (time.perf_counter() - start)
    speaker.close()
    if moved := sum(a.text != b.text for a, b in zip(answers, together, strict=True)):
        print(f"  {url}: {moved} answers change when four are asked at a time", flush=True)
    return Run(answers, times, {"photos/s": f"{rate:.1f}"})


def serve_and_ask(command: Command, source: Checkpoint, crop: int, photos: Photos, log: Path) -> Run:
    """Start an engine, ask it, stop it."""
    print(f"\n{command}", flush=True)
    with running(command, 600, log) as engine:
        run = ask_all(f"{command.url}/v1#{command.model}", source, crop, photos)
        figures = {"start s": f"{engine.start_s:.1f}", "MB": f"{memory_mb(engine.process.pid):.0f}"}
    return replace(run, figures=run.figures | figures)


def in_process(vlm: VLM, photos: Photos) -> Run:
    """The model in this process, one photo at a time."""
    answers, times = timed(lambda image: speak_here(vlm, image, vlm.question), photos)
    rate = 1000 * len(times) / sum(times)
    return Run(answers, times, {"photos/s": f"{rate:.1f}", "MB": f"{psutil.Process().memory_info().rss / 1e6:.0f}"})


def measure(checkpoint: Path, photos: Photos, work: Path, servers: dict[str, str]) -> list[Row]:
    """All engines for one adapter."""
    source = find_mergeable(checkpoint)
    reference = in_process(open_vlm(source, device="cpu", precision="float32"), photos)
    rows = [row("transformers, adapter", reference.answers, reference, photos)]
    merged = merge(source, work / "merged", dtype="float32", device="cpu").folder
    base = merge(find_mergeable(source.base), work / "base", dtype="float32", device="cpu").folder
    plain = open_vlm(merged, device="cpu", precision="float32")
    rows.append(row("transformers, merged", reference.answers, in_process(plain, photos), photos))

    def try_engine(name: str, build: Callable[[], Command]) -> Run | None:
        try:
            run = serve_and_ask(build(), source, crop_side(merged), photos, work / "engine.log")
        except CatlibError as error:
            print(f"\n{name}: not measured: {error}", flush=True)
            rows.append({"engine": name, "same": "not measured"})
            return None
        rows.append(row(name, reference.answers, run, photos))
        return run

    serve = partial(vllm_command, dtype="float32", max_model_len=256)
    try_engine("vLLM, adapter", lambda: serve(str(base), Where(port=free_port()), adapter=checkpoint))
    try_engine("vLLM, merged", lambda: serve(str(merged), Where(port=free_port())))
    gguf = work / "gguf"
    gguf.mkdir()
    try:
        convert(merged, gguf, work / "stage", find_converter(), "f16")
    except CatlibError as error:
        print(f"\nllama.cpp: not measured: {error}", flush=True)
        return [*rows, {"engine": "llama.cpp, f16", "same": "not measured"}]
    with class_token_last(plain):
        defect = in_process(plain, photos).answers
    for name, binary in servers.items():
        run = try_engine(f"llama.cpp f16, {name}", partial(llama_command, gguf, Where(port=free_port()), binary=binary))
        if run is not None:
            rows.append(row("  against transformers with its class-token defect", defect, run, photos))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--photos", type=int, default=120)
    parser.add_argument("--test", type=Path, help="test.jsonl whose photos are asked about; default: drawn cats")
    parser.add_argument("--url", default="", help="measure this server only")
    parser.add_argument(
        "--crop", type=int, default=-1, help="side that photos are cropped to for --url (default: as the model's)"
    )
    parser.add_argument("--server", action="append", default=[], metavar="NAME=PATH", help="one more llama-server")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    servers = {"as installed": ""} | dict(text.split("=", 1) for text in args.server)
    photos = test_photos(args.test, args.photos) if args.test else drawn_cats(args.photos)
    for checkpoint in args.checkpoints:
        source = find_mergeable(checkpoint.resolve())
        print(f"\n== {checkpoint.name}: {source.base}, {len(photos.names)} {photos.origin}", flush=True)
        with tempfile.TemporaryDirectory() as work:
            if args.url:
                reference = in_process(open_vlm(source, device="cpu", precision="float32"), photos)
                crop = crop_side(checkpoint.resolve()) if args.crop < 0 else args.crop
                there = ask_all(args.url, source, crop, photos)
                rows = [
                    row("transformers", reference.answers, reference, photos),
                    row(args.url, reference.answers, there, photos),
                ]
            else:
                rows = measure(checkpoint.resolve(), photos, Path(work), servers)
        columns = list(dict.fromkeys(key for line in rows for key in line))
        print("\n" + text_table([{key: line.get(key, "–") for key in columns} for line in rows]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
