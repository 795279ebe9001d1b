"""What the fuzzer tries: for each kind of input a strategy that spoils a valid one, and what reads it.

`KINDS` names them; `Place(folder)` makes the valid inputs once, and `Place.survives(kind, data)` feeds spoilt bytes to the command
that reads them, in this process, and raises AssertionError unless it ends in time with a result or a clear refusal and has
changed no file but its output. tests/test_fuzz.py tries a few seconds of it, benchmarks/fuzz.py minutes.
"""

import io
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import httpx
from bs4 import BeautifulSoup
from evaluation_cases import scored_set, truth, write_set
from hypothesis import strategies as st
from photo_makers import encoded, picture
from tiny_encoders import clip, tuned, write_photos
from tiny_models import save_wide_llava

from catlib.classifiers.endpoint import EndpointClassifier
from catlib.cli import main
from catlib.data.images import FORMATS, open_image, size_of
from catlib.data.records import meta_path, read_samples
from catlib.errors import CatlibError
from catlib.files import read_csv
from catlib.reports.index import read_state, results
from catlib.reports.markup import clean, clean_output

BREEDS = ("Manx", "Persian", "Siamese")
SECONDS = 20  # after which a case hangs

# Strategies

NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**64), 10**12, 10**400, 1e308, 0.1, float("inf"), float("nan")]),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", " ", "..", "/etc/passwd", "\0", "\ud800", "Manx", "a" * 5000, "(a+)+$", "../x", "[[[", "{{x}}"]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def spoilt_bytes(draw: Callable, data: bytes, header: int = 0) -> bytes:
    """Flipped bits, cuts, repeats and insertions; `header`: half of the flips fall into the first so many bytes."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        end = len(changed)
        if not end:
            break
        at = draw(st.integers(0, min(end, header) - 1 if header and draw(st.booleans()) else end - 1))
        match draw(st.sampled_from(["flip", "flip", "byte", "cut", "end", "repeat", "insert", "zeros", "large"])):
            case "flip":
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "byte":
                changed[at] = draw(st.integers(0, 255))
            case "cut":
                del changed[at : at + draw(st.integers(1, 64))]
            case "end":
                del changed[at:]
            case "repeat":
                changed[at:at] = changed[at : at + draw(st.integers(1, 200))] * draw(st.integers(1, 30))
            case "insert":
                changed[at:at] = draw(st.binary(max_size=16))
            case "zeros":
                changed[at : at + 32] = bytes(32)
            case "large":
                changed[at : at + 4] = b"\xff" * 4
    return bytes(changed)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all entries of a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


@st.composite
def spoilt_json(draw: Callable, value: Any) -> bytes:
    """Entries replaced by values of other kinds, left out, added or given twice; now and then bytes that are no JSON."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(list(places(value))[1:] or [("x",)]))
        holder = value
        for key in path:
            holder = holder[key]
        if isinstance(holder, dict):
            match draw(st.sampled_from(["other", "other", "gone", "more"])):
                case "other":
                    holder[last] = draw(VALUES)
                case "gone":
                    holder.pop(last, None)
                case "more":
                    holder[draw(TEXTS)] = draw(VALUES)
        elif isinstance(holder, list):
            holder[last : last + draw(st.integers(0, 1))] = draw(st.lists(VALUES, max_size=3))
    data = json.dumps(value).encode()
    if draw(st.integers(0, 5)) == 0:
        data = draw(spoilt_bytes(data))
    return data


@st.composite
def spoilt_lines(draw: Callable, rows: list[Any]) -> bytes:
    """JSONL of which some lines are spoilt, missing or there twice."""
    lines = [json.dumps(row).encode() for row in rows]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        lines[at : at + 1] = draw(
            st.sampled_from([[draw(spoilt_json(rows[at % len(rows)]))], [], [lines[at]] * 2, [b"", lines[at]], [b"[]"]])
        ) or [b""]
    data = b"\n".join(lines) + draw(st.sampled_from([b"", b"\n", b"\r\n", b"\n\xff", b"\n\0\0\0"]))
    return draw(spoilt_bytes(data)) if draw(st.integers(0, 5)) == 0 else data


MARKUP = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            [
                "<script>",
                "</script>",
                "<img src=x onerror=alert(1)>",
                "<svg/onload=alert(1)>",
                "<a href='javascript:x'>",
                "<",
                ">",
            ]
            + [
                "<style>",
                "</style>",
                "<!--",
                "-->",
                "<table><tr><td>",
                "&lt;script&gt;",
                "<iframe src=//x>",
                "\0",
                "<p style='x:url(//y)'>",
            ]
            + [
                "<a href=' java\tscript:x'>",
                "<math><mi//xlink:href='data:x,<script>'>",
                "<noscript><p title='</noscript><script>'>",
                "<b" * 50,
            ]
        ),
    ),
    max_size=12,
).map(lambda parts: "".join(parts).encode("utf-8", "surrogatepass"))


# The valid inputs, and who reads them


@contextmanager
def in_time(seconds: int) -> Iterator[None]:
    """Raise AssertionError in the main thread when the block computes for longer, or takes twenty times as long by the clock,
    which other processes may hold up; a call into C that never returns is not ended.
    """

    def late(*_: object) -> None:
        raise AssertionError(f"still running after {seconds} s")

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return
    clocks = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 20 * seconds)}
    before = {number: signal.signal(number, late) for number in clocks}
    for clock, most in clocks.values():
        signal.setitimer(clock, most)
    try:
        yield
    finally:
        for clock, _ in clocks.values():
            signal.setitimer(clock, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def command(*words: object) -> int:
    """Run a command of catlib in this process: its exit code. AssertionError for a traceback, a failure nobody thought of, or a code
    that says nothing.
    """
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as error:
            code = error.code
    said = err.getvalue()
    assert code in (0, 1, 2), (code, said)
    assert "run again with --debug" not in said and "Traceback" not in said, said[-2000:]
    assert code == 0 or "catlib" in said, said
    return code


class Place:
    """A folder with a small model, an adapter, photos, samples, predictions, metrics, a profile and a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        os.environ["CATLIB_ROOT"] = str(folder)
        (folder / "notebooks" / "profiles").mkdir(parents=True)
        clip(folder / "clip")
        tuned(folder / "tuned", save_wide_llava(folder / "llava"), BREEDS, "Which breed?")
        write_photos(folder / "photos", ["Manx"] * 3)
        for i, breed in enumerate(BREEDS):
            (folder / "breeds" / breed).mkdir(parents=True)
            for j in range(12):
                (folder / "breeds" / breed / f"{j}.jpg").write_bytes(encoded(picture(100 * i + j), "JPEG"))
        assert command("data", folder / "breeds", "--out", folder / "data" / "vlm", "--min-side", 16) == 0
        true = truth(4, BREEDS)
        self.a, self.b = (
            write_set(scored_set(name, true, 0.7, breeds=BREEDS, seed=i), folder / "predictions")
            for i, name in enumerate("ab")
        )
        assert command("evaluate", "--predictions", self.a, self.b, "--bootstrap", 100, "--out", folder / "m.json") == 0
        run = folder / "outputs" / "runs" / "r"
        run.mkdir(parents=True)
        shutil.copy(folder / "m.json", run / "metrics.json")
        state = {"run": "r", "profile": "p", "status": "done", "pid": 1, "stages": {"01_x": {"status": "done"}}}
        (run / "state.json").write_text(json.dumps(state))
        self.formats = {kind: encoded(picture(7), kind) for kind in FORMATS}
        self.formats["TIFF deflate"] = encoded(picture(7), "TIFF", compression="tiff_adobe_deflate")
        self.formats["PNG alpha"] = encoded(picture(7).convert("RGBA"), "PNG")
        self.formats["GIF film"] = encoded(picture(7), "GIF", save_all=True, append_images=[picture(8)])
        self.formats["JPEG exif"] = encoded(
            picture(7), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
        )
        self.formats["PNG grey 16"] = encoded(picture(7).convert("I;16"), "PNG")

    # What a kind's valid input is, as a strategy of spoilt ones

    def json_of(self, *names: str) -> st.SearchStrategy[bytes]:
        return spoilt_json(json.loads(self.folder.joinpath(*names).read_text(encoding="utf-8")))

    def rows_of(self, path: Path) -> st.SearchStrategy[bytes]:
        return spoilt_lines([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:4]])

    def strategy(self, kind: str) -> st.SearchStrategy[bytes]:
        """Spoilt inputs of the kind."""
        profile = {
            "run": "x",
            "base_model": "llava",
            "lr": 1e-4,
            "epochs": 2,
            "mode": "lora",
            "trainer_args": {"optim": "sgd"},
        }
        profile |= {"priority_breeds": "Manx", "vllm_url": "http://h/v1", "data_dir": "data"}
        model = {"id": "m", "owned_by": "x"}
        reply = {"data": [model], "choices": [{"message": {"content": "Manx"}}]}
        table = (
            b"image,breed,part,verdict,group,sha256,phash\na.jpg,Manx,train,kept,g,00,11\n'=1,Manx,test,kept,h,01,12\n"
        )
        photos = st.sampled_from(sorted(self.formats)).flatmap(lambda name: spoilt_bytes(self.formats[name], 64))
        return {
            "samples": lambda: self.rows_of(self.folder / "data" / "vlm" / "train.jsonl"),
            "predictions": lambda: self.rows_of(self.a),
            "sidecars": lambda: self.json_of("predictions", meta_path(self.a).name),
            "metrics": lambda: self.json_of("m.json"),
            "state": lambda: self.json_of("outputs", "runs", "r", "state.json"),
            "profiles": lambda: spoilt_json(profile),  # JSON is YAML
            "profiles as text": lambda: spoilt_bytes(
                b"lr: 1e-4\nepochs: 2\nhint: 'x'\ntrainer_args: {a: [1, .5]}\n# end\n"
            ),
            "adapter configs": lambda: self.json_of("tuned", "adapter_config.json"),
            "training records": lambda: self.json_of("tuned", "training.json"),
            "model configs": lambda: self.json_of("llava", "config.json"),
            "adapter weights": lambda: spoilt_bytes(
                (self.folder / "tuned" / "adapter_model.safetensors").read_bytes(), 200
            ),
            "photos": lambda: photos,
            "tables": lambda: spoilt_bytes(table),
            "endpoint answers": lambda: spoilt_json(reply),
            "HTML": lambda: MARKUP,
        }[kind]()

    def survives(self, kind: str, data: bytes) -> None:
        """Feed `data` to what reads this kind. Raises AssertionError."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        before = self.contents()
        with in_time(SECONDS):
            getattr(self, "_" + kind.replace(" ", "_").lower())(data, out)
        assert self.contents() == before, "a file was changed that is no output"

    def contents(self) -> dict[str, tuple[int, int]]:
        files = (
            path
            for path in self.folder.rglob("*")
            if path.is_file() and "out" not in path.relative_to(self.folder).parts[0]
        )
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

    def _samples(self, data: bytes, out: Path) -> None:
        (out / "x.jsonl").write_bytes(data)
        refused(lambda path: read_samples(path, self.folder / "breeds"), out / "x.jsonl")

    def _predictions(self, data: bytes, out: Path) -> None:
        shutil.copy(meta_path(self.a), out / "x.meta.json")
        (out / "x.jsonl").write_bytes(data)
        command("evaluate", "--predictions", out / "x.jsonl", "--bootstrap", 100, "--out", out / "m.json")

    def _sidecars(self, data: bytes, out: Path) -> None:
        shutil.copy(self.a, out / "x.jsonl")
        (out / "x.meta.json").write_bytes(data)
        command("compare", out / "x.jsonl", self.b, "--bootstrap", 100)

    def _metrics(self, data: bytes, out: Path) -> None:
        (out / "m.json").write_bytes(data)
        if command("evaluate", "--predictions", self.a, "--bootstrap", 100, "--out", out / "m.json"):
            assert (out / "m.json").read_bytes() == data

    def _state(self, data: bytes, out: Path) -> None:
        for name in ("state.json", "metrics.json"):
            (out / name).write_bytes(data)
        for read in (read_state, results):
            refused(read, out)

    def _profiles(self, data: bytes, out: Path) -> None:
        (out / "p.yaml").write_bytes(data)
        command("memory", "--profile", out / "p.yaml", "--base-model", self.folder / "llava")

    _profiles_as_text = _profiles

    def _adapter_configs(self, data: bytes, out: Path, name: str = "adapter_config.json") -> None:
        shutil.copytree(self.folder / "tuned", out / "tuned")
        (out / "tuned" / name).write_bytes(data)
        command("predict", "--checkpoint", out / "tuned", self.folder / "photos" / "000.jpg", "--device", "cpu")

    def _training_records(self, data: bytes, out: Path) -> None:
        self._adapter_configs(data, out, "training.json")

    def _adapter_weights(self, data: bytes, out: Path) -> None:
        shutil.copytree(self.folder / "tuned", out / "tuned")
        (out / "tuned" / "adapter_model.safetensors.sha256").unlink()  # as of another tool: nothing to compare with
        (out / "tuned" / "adapter_model.safetensors").write_bytes(data)
        command("predict", "--checkpoint", out / "tuned", self.folder / "photos" / "000.jpg", "--device", "cpu")

    def _model_configs(self, data: bytes, out: Path) -> None:
        shutil.copytree(self.folder / "llava", out / "llava")
        (out / "llava" / "config.json").write_bytes(data)
        words = ("--model", "base", "--base-model", out / "llava", "--breeds", ",".join(BREEDS), "--device", "cpu")
        command("predict", *words, self.folder / "photos" / "000.jpg")

    def _photos(self, data: bytes, out: Path) -> None:
        (out / "x.jpg").write_bytes(data)
        refused(size_of, out / "x.jpg")
        if (image := refused(open_image, out / "x.jpg")) is not None:
            assert image.mode == "RGB" and min(image.size) > 0

    def _tables(self, data: bytes, out: Path) -> None:
        (out / "t.csv").write_bytes(data)
        refused(read_csv, out / "t.csv")

    def _endpoint_answers(self, data: bytes, out: Path) -> None:
        def reply(_: httpx.Request) -> httpx.Response:
            return httpx.Response(200, stream=httpx.ByteStream(data))

        real, answer = httpx.AsyncClient, httpx.MockTransport(reply)
        httpx.AsyncClient = lambda *_, **__: real(transport=answer)  # type: ignore[assignment,misc]
        try:
            asked = refused(lambda url: EndpointClassifier(url, BREEDS, "?", tries=1), "http://h/v1")
            if asked is not None:
                refused(asked.classify, [picture(1)])
                asked.close()
        finally:
            httpx.AsyncClient = real  # type: ignore[misc]

    def _html(self, data: bytes, out: Path) -> None:
        text = data.decode("utf-8", "replace")
        for kept in (clean(text), clean_output(text)):
            for tag in BeautifulSoup(kept, "html.parser").find_all(True):
                assert tag.name not in ("script", "style", "iframe", "svg", "math", "object", "link", "base", "form"), (
                    kept
                )
                for name, value in tag.attrs.items():
                    assert not name.startswith("on") and "script:" not in "".join(str(value).split()).lower(), kept


KINDS = (
    *("samples", "predictions", "sidecars", "metrics", "state", "profiles", "profiles as text", "adapter configs"),
    *("training records", "model configs", "adapter weights", "photos", "tables", "endpoint answers", "HTML"),
)


def refused(read: Callable, value: Any) -> Any:
    """What is read; None where it is refused with a clear error."""
    try:
        return read(value)
    except CatlibError as error:
        assert str(error), "an error without a word"
        return None


def quiet() -> None:
    """No progress bars and no hub."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    sys.setrecursionlimit(1000)
