"""One checkpoint read in every way: score, constrained and free in this process, and held to its breeds by vLLM and llama.cpp.

    CATLIB_VLLM_PYTHON=… CATLIB_LLAMA_CPP=… python -m benchmarks.readings CHECKPOINT data/demo/vlm/test.jsonl
    python -m benchmarks.readings CHECKPOINT TEST.jsonl --vllm http://127.0.0.1:8000/v1#cats      a server that runs already

CHECKPOINT: an adapter that catlib has trained; the engines get it merged. `--photos N`: an even draw of the test photos over the
breeds. An engine that is not installed, or does not build the model, is listed with the reason. Columns: accuracy in per cent
with its 95 % interval; answers that name no breed; photos with the breed that `constrained` names in this process; p50 and p95 of
a photo that comes alone, ms from file to answer; photos/s with 1 and 16 requests under way, where this process takes what waits as
one batch; answers that then differ; resident memory of the process, or of the engine's, GB. Times are of photos that are asked
about for the first time, as an engine keeps what it has seen: 16 at once of every second photo (`--together N`: of N), then one at a
time of the others.

`--prompt-logprobs N`: all breeds of N photos are scored by vLLM too, a request a breed with `prompt_logprobs`, all of a photo at
once, and compared with score in this process.
"""

import argparse
import logging
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from catlib.classifiers.endpoint import EndpointClassifier, crop_side
from catlib.classifiers.vlm import VLMClassifier
from catlib.data.conversations import evenly
from catlib.data.dataset import load_dataset
from catlib.data.images import inside, open_image
from catlib.data.records import Prediction, PredictionSet, Sample, read_samples
from catlib.errors import CatlibError
from catlib.evaluation.metrics import evaluate
from catlib.evaluation.tables import number, share, text_table
from catlib.gguf.engines import llama_command, vllm_command
from catlib.gguf.export import convert, find_converter
from catlib.gguf.parity import class_token_last
from catlib.serving.bench import Load, measure_load, server_memory_mb
from catlib.serving.engine_process import Command, Where, free_port, running
from catlib.serving.export import find_mergeable, merge, tower_type
from catlib.serving.worker import Worker
from catlib.vlm.checkpoint import VLM, open_vlm
from catlib.vlm.families import CLIP_TOWER
from catlib.vlm.scoring import LabelScorer

HERE, CONCURRENCY = "constrained", (1, 16)
Row = dict[str, str]
Breeds = list[str | None]


@dataclass(frozen=True)
class Exam:
    """The test photos; those of them that are asked about with many requests under way are every `step`-th."""

    samples: Sequence[Sample]
    photos: Sequence[Path]
    breeds: Sequence[str]
    step: int

    def loads(self, ask: Callable[[Path], Any]) -> tuple[list[Load], list[Any], int]:
        """The load of one photo at a time and that of many at once, the answers to all photos alone, and how many differed."""
        many = measure_load(ask, self.photos[:: self.step], CONCURRENCY[1])
        alone = measure_load(ask, [photo for i, photo in enumerate(self.photos) if i % self.step], CONCURRENCY[0])
        others, again = iter(alone.answers), [ask(photo) for photo in self.photos[:: self.step]]
        answers = [next(others) if i % self.step else again[i // self.step] for i in range(len(self.photos))]
        return [alone, many], answers, sum(a != b for a, b in zip(again, many.answers, strict=True))

    def row(
        self, name: str, loads: Sequence[Load], differ: int, said: Breeds, reference: Breeds, memory_mb: float
    ) -> Row:
        """A line of the table, printed at once as well: a run that is cut off has not been for nothing."""
        pairs = zip(self.samples, said, strict=True)
        rows = tuple(Prediction(s.id, s.image, s.breed, breed, None, group=s.group) for s, breed in pairs)
        metrics = evaluate(PredictionSet(name, rows, {"breeds": list(self.breeds)}))
        alike = sum(a == b for a, b in zip(said, reference, strict=True))
        line = {"reading": name, "accuracy": share(metrics["accuracy"]), "invalid": str(said.count(None))}
        line |= {f"as {HERE}": f"{alike}/{len(said)}", "p50 ms": number(loads[0].p50), "p95 ms": number(loads[0].p95)}
        line |= {f"photos/s, {load.concurrency}": number(load.photos_per_s) for load in loads}
        line |= {"differ": str(differ), "GB": f"{memory_mb / 1000:.2f}"}
        print("  " + ", ".join(f"{key} {value}" for key, value in line.items()), flush=True)
        return line


def in_process(vlm: VLM, exam: Exam, decoding: str) -> tuple[list[Load], int, Breeds, float]:
    """The loads of a reading in this process, answers that differ, the breeds named one at a time, the process's memory in MB."""
    classifier = VLMClassifier(vlm, exam.breeds, decoding)
    with closing(Worker(lambda _, images: classifier.classify(images).predicted, max(CONCURRENCY))) as worker:
        loads, said, differ = exam.loads(lambda photo: worker.submit("", lambda: open_image(photo)).result())
    return loads, differ, said, psutil.Process().memory_info().rss / 1e6


@contextmanager
def reached(url: str, build: Callable[[], Command], log: Path) -> Iterator[str]:
    """The URL of an engine: of one that runs already, or of one that is started for as long as the context is open."""
    if url:
        yield url
        return
    command = build()
    print(f"\n{command}", flush=True)
    with running(command, 900, log):
        yield f"{command.url}/v1#{command.model}"


def prompted(endpoint: EndpointClassifier, scorer: LabelScorer, photo: Path) -> np.ndarray:
    """Log-likelihoods of all breeds' names (breeds,), each read off a prompt that ends with the name. One request a breed."""
    asked = endpoint.request(open_image(photo))

    def score(breed: str, tokens: Sequence[int]) -> float:
        answer = {"role": "assistant", "content": [{"type": "text", "text": scorer.spelled.get(breed, breed)}]}
        more = {"add_generation_prompt": False, "prompt_logprobs": 0, "max_tokens": 1}
        body = {**asked, "messages": [*asked["messages"], answer], **more}
        given = endpoint._send("POST", "/chat/completions", body, threading.Event())["prompt_logprobs"]
        return sum(entry[str(token)]["logprob"] for entry, token in zip(given[-len(tokens) :], tokens, strict=True))

    with ThreadPoolExecutor(len(scorer.breeds)) as pool:
        return np.array(list(pool.map(score, scorer.breeds, scorer.labels)))


def prompt_logprobs(url: str, exam: Exam, vlm: VLM, options: Mapping[str, Any], most: int) -> str:
    """What scores by `prompt_logprobs` cost, and how far they are from this process's."""
    scorer = LabelScorer(vlm, exam.breeds, vlm.question, spelled=vlm.spelled)
    photos = exam.photos[:: max(1, len(exam.photos) // most)][:most]
    with closing(EndpointClassifier(url, exam.breeds, vlm.question, **options)) as endpoint:
        found = measure_load(lambda photo: prompted(endpoint, scorer, photo), photos, 1)
    own = measure_load(lambda photo: scorer.score([open_image(photo)])[0], photos, 1)
    there, here = np.array(found.answers), np.array(own.answers)
    same = int((there.argmax(1) == here.argmax(1)).sum())
    return (
        f"prompt_logprobs, {len(photos)} photos, {len(exam.breeds)} requests each: p50 {found.p50} ms, p95 {found.p95} ms; score in "
        f"this process {own.p50} and {own.p95} ms; same breed {same}, largest difference {np.abs(there - here).max():.2g} nats"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("test", type=Path, help="test.jsonl beside its train.jsonl")
    parser.add_argument("--photos", type=int, default=0, help="0: all")
    parser.add_argument("--together", type=int, default=0, help="photos asked about with many under way; 0: half")
    parser.add_argument(
        "--engines-only", action="store_true", help="in this process `constrained` alone, to compare with"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--vllm", default="", metavar="URL#MODEL")
    parser.add_argument("--llamacpp", default="", metavar="URL")
    parser.add_argument("--prompt-logprobs", type=int, default=0, metavar="N")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    source, data = find_mergeable(args.checkpoint.resolve()), load_dataset(args.test.resolve().parent)
    samples = evenly(read_samples(args.test, data.image_root), args.photos, 0)
    photos = [inside(data.image_root, sample.image) for sample in samples]
    exam = Exam(samples, photos, source.breeds, max(2, len(photos) // (args.together or len(photos))))
    print(f"{args.checkpoint.name}: {source.base}, {len(photos)} test photos, {args.dtype}", flush=True)
    vlm, rows, reference = open_vlm(source, device="cpu", precision=args.dtype), [], None
    for decoding in (HERE, *(() if args.engines_only else ("score", "free"))):
        loads, differ, said, memory_mb = in_process(vlm, exam, decoding)
        reference = reference or said
        rows.append(exam.row(decoding, loads, differ, said, reference, memory_mb))
    with tempfile.TemporaryDirectory() as work:
        options = {"crop": crop_side(args.checkpoint), "spelled": source.spelled, "timeout_s": 600.0}
        place, plain, log = Where(port=free_port()), Path(work) / "merged", Path(work) / "log"

        def merged() -> Path:
            return plain if plain.exists() else merge(source, plain, dtype=args.dtype, device="cpu").folder

        def gguf() -> Command:
            (folder := Path(work) / "gguf").mkdir()
            convert(merged(), folder, Path(work) / "stage", find_converter(), "f16")
            return llama_command(folder, place)

        engines = {
            "vLLM, choice": (args.vllm, lambda: vllm_command(str(merged()), place, dtype=args.dtype)),
            "llama.cpp f16, grammar": (args.llamacpp, gguf),
        }
        for name, (url, build) in engines.items():
            try:
                with reached(url, build, log) as there:
                    held = EndpointClassifier(there, exam.breeds, source.question, decoding=HERE, **options)
                    loads, answers, differ = exam.loads(lambda photo, held=held: held.ask(open_image(photo)))
                    said = [held.read(answer) for answer in answers]
                    rows.append(exam.row(name, loads, differ, said, reference, server_memory_mb(held.url) or 0.0))
                    held.close()
                    if args.prompt_logprobs and held.engine == "vllm":
                        print(prompt_logprobs(there, exam, vlm, options, args.prompt_logprobs), flush=True)
            except CatlibError as error:
                print(f"\n{name}: not measured: {error}", flush=True)
                rows.append({"reading": name, "accuracy": "not measured"})
                continue
            if name.startswith("llama") and tower_type(Path(source.base)) == CLIP_TOWER:
                here = VLMClassifier(vlm, exam.breeds, HERE)
                with class_token_last(vlm):
                    alike = sum(
                        here.classify([open_image(p)]).predicted == [b] for p, b in zip(photos, said, strict=True)
                    )
                print(f"  like {HERE} here with llama.cpp's class-token defect: {alike} of {len(photos)}", flush=True)
    columns = list(rows[0])
    print("\n" + text_table([{key: line.get(key, "–") for key in columns} for line in rows]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
