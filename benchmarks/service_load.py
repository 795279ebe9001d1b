"""The service in a crowd: answers against sequential ones, bad photos, the event loop's longest pause, memory over time.

    python -m benchmarks.service_load [--checkpoint DIR] [--run RUN] [--requests 200] [--bad 10] [--long 2000] [--json]

Without --checkpoint the model is the demo's tiny LLaVA, and the photos are drawn cats. With --run it is what the run's verdict
says, asked about the run's test photos, and its answers are compared with the run's file line by line. All requests come at once
through the application of examples/app.py (httpx, no network), and once more straight to the service; the event loop is
watched by a task that wants to run every millisecond. Client, web framework and service share the loop and 200 requests
begin in one turn of it, so the same requests to a handler that does nothing tell what is not the service's. The peer, in
the same run: the plan's loop, one `generate` after the other, and the same loop called from a coroutine, as it is when
the model is simply called in a request handler.
"""

import argparse
import asyncio
import gc
import io
import json
import os
import random
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from fastapi import FastAPI, Request
from PIL import Image

from catlib.breeds import BREEDS
from catlib.classifiers.vlm import VLMClassifier
from catlib.data.images import inside
from catlib.data.prepare import load_dataset
from catlib.data.records import read_predictions, read_samples
from catlib.files import parse_yaml, read_text
from catlib.paths import resolve
from catlib.serving.service import VLMService, read_photo
from catlib.serving.winner import choose
from catlib.vlm.checkpoint import find_checkpoint, open_vlm
from catlib.vlm.decoding import generate_free
from demo.photos import draw_breed
from demo.tiny_models import MODELS
from examples.app import application


@dataclass
class Watch:
    """Milliseconds by which the event loop was late to run a task that wants to run every millisecond."""

    late: list[float] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            self.late.append(1000 * (time.perf_counter() - before) - 1)

    @asynccontextmanager
    async def watching(self):
        task = asyncio.create_task(self.run())
        await asyncio.sleep(0.02)
        try:
            yield self
            await asyncio.sleep(0.02)
        finally:
            task.cancel()

    @property
    def longest(self) -> float:
        return round(max(self.late), 1)


def photos(count: int) -> list[bytes]:
    """Drawn cats as JPEG files' contents."""
    found = []
    for number in range(count):
        stream = io.BytesIO()
        draw_breed(BREEDS[number % len(BREEDS)].name, "test", number, seed=5).save(stream, "JPEG", quality=92)
        found.append(stream.getvalue())
    return found


def hostile(number: int, photo: bytes) -> bytes:
    """Bytes that no photo has: nothing, random ones, a cut photo, a program for Ghostscript, a strip, a bomb."""
    kind = number % 6
    if kind < 4:
        return (
            b"",
            random.Random(number).randbytes(500),
            photo[: len(photo) // 3],
            b"%!PS-Adobe-3.0 EPSF-3.0\n{} loop",
        )[kind]
    stream = io.BytesIO()
    Image.new("1", (100_000, 3) if kind == 4 else (14_000, 14_000)).save(stream, "PNG")
    return stream.getvalue()


async def send(app: FastAPI, bodies: list[bytes], path: str = "/breed") -> list[httpx.Response]:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://cats", timeout=None) as client:
        return await asyncio.gather(*(client.post(path, content=body) for body in bodies))


def of_run(run: str, count: int) -> tuple[list[bytes], list[str | None]]:
    """`count` test photos of a run, and what the run's recommended model has predicted for them."""
    folder, use = choose(run)
    where = parse_yaml(read_text(folder / "parameters.yaml"), "parameters.yaml")["test_data"]
    root = load_dataset(resolve(where).parent).image_root
    said = {p.id: p.predicted for p in read_predictions(folder / "predictions" / f"{use}.jsonl").predictions}
    samples = [s for s in read_samples(resolve(where), root) if s.id in said]
    chosen = [samples[n % len(samples)] for n in range(count)]
    return [inside(root, s.image).read_bytes() for s in chosen], [said[s.id] for s in chosen]


async def measure(args: argparse.Namespace, checkpoint: Path) -> dict:
    service = VLMService(max_batch=args.max_batch, decoding="free")
    naive = sequential = None
    if args.run:
        good, expected = of_run(args.run, args.requests - args.bad)
        async with Watch().watching() as watch:
            await asyncio.to_thread(service.load_run, args.run)
        loading = watch.longest
    else:
        good = photos(args.requests - args.bad)
        vlm = open_vlm(find_checkpoint(checkpoint), device=args.device, precision=args.precision)
        read = VLMClassifier(vlm, decoding="free").parser.parse
        expected = [read(generate_free(vlm, [read_photo(body)], vlm.question)[0]) for body in good[:4]]  # warms up
        start = time.perf_counter()
        expected = [read(generate_free(vlm, [read_photo(body)], vlm.question)[0]) for body in good]
        sequential = len(good) / (time.perf_counter() - start)
        async with Watch().watching() as watch:
            for body in good[:5]:
                generate_free(vlm, [read_photo(body)], vlm.question)
                await asyncio.sleep(0)
        naive = watch.longest
        del vlm
        async with Watch().watching() as watch:
            await service.load_finetuned_model(checkpoint, args.device, args.precision)
        loading = watch.longest
    bad = [hostile(n, good[n % len(good)]) for n in range(args.bad)]
    app = application(service)

    @app.post("/nothing")
    async def nothing(request: Request) -> dict[str, str]:
        await request.body()
        return {}

    if not args.no_freeze:
        gc.freeze()
    await send(app, good[:8])
    order = list(range(args.requests))
    random.Random(1).shuffle(order)
    bodies = good + bad
    async with Watch().watching() as watch:
        start = time.perf_counter()
        responses = await send(app, [bodies[i] for i in order])
        seconds = time.perf_counter() - start
    pauses = {"with_http": watch.longest}
    async with Watch().watching() as watch:
        await send(app, [bodies[i] for i in order], "/nothing")
    pauses["http_alone"] = watch.longest
    async with Watch().watching() as watch:
        calls = (service.predict_finetuned_async(bodies[i]) for i in order)
        await asyncio.gather(*calls, return_exceptions=True)
    pauses["service_alone"] = watch.longest

    def told(found: list[httpx.Response]) -> tuple[int, list[httpx.Response]]:
        """(right answers, bad photos refused) of responses in `order`, or of its beginning."""
        pairs = list(zip(order, found, strict=False))
        right = sum(r.status_code == 200 and r.json()["breed"] == expected[i] for i, r in pairs if i < len(good))
        return right, [r for i, r in pairs if i >= len(good) and r.status_code == 422]

    same, refused = told(responses)
    result = {
        "requests": args.requests,
        "right": same,
        "of": len(good),
        "errors": len(refused),
        "bad": args.bad,
        "different_breeds": len(set(expected)),
        "error_example": refused[0].json()["detail"] if refused else None,
        "loop_longest_ms": pauses,
        "loop_longest_while_loading_ms": loading,
        "loop_longest_naive_ms": naive,
        "photos_per_s": round(len(good) / seconds, 1),
        "sequential_photos_per_s": sequential and round(sequential, 1),
        "ratio": sequential and round(len(good) / seconds / sequential, 2),
    }
    process, resident, long_right, long_refused = psutil.Process(), [], 0, 0
    for first in range(0, args.long, args.requests):
        right, errors = told(await send(app, [bodies[i] for i in order[: args.long - first]]))
        long_right, long_refused = long_right + right, long_refused + len(errors)
        resident.append(round(process.memory_info().rss / 1e6, 1))
    service.close()
    return result | {
        "long_requests": args.long,
        "long_right": long_right,
        "long_refused": long_refused,
        "resident_mb": resident,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--run", help="a run's name: what its verdict says, against its own file")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--bad", type=int, default=10)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--long", type=int, default=2000, help="requests over which the memory is watched")
    parser.add_argument("--no-freeze", action="store_true", help="leave out the documented gc.freeze() after loading")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = asyncio.run(measure(args, args.checkpoint or MODELS / "llava"))
    if args.json:
        print(json.dumps(result))
        return 0
    print(
        f"{result['right']} of {result['of']} breeds equal the expected ones ({result['different_breeds']} different ones)"
    )
    print(f"{result['errors']} of {result['bad']} bad photos refused, for example: {result['error_example']}")
    beside = f", one after the other {result['sequential_photos_per_s']}: {result['ratio']}x" if result["ratio"] else ""
    print(f"{result['photos_per_s']} photos/s{beside}")
    pauses = result["loop_longest_ms"]
    print(f"longest pause of the event loop: {pauses['service_alone']} ms for the service's calls alone, ", end="")
    print(f"{pauses['with_http']} ms through HTTP ({pauses['http_alone']} ms of an empty handler's requests), ", end="")
    naive = result["loop_longest_naive_ms"]
    print(f"{result['loop_longest_while_loading_ms']} ms while loading", end="")
    print(f", {naive} ms with the model called in the handler itself" if naive else "")
    print(
        f"{result['long_requests']} requests: {result['long_right']} answered as expected, {result['long_refused']} refused"
    )
    print(f"resident memory over them, MB: {', '.join(map(str, result['resident_mb']))}")
    print(f"{os.cpu_count()} cores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
