"""Kill every command at random moments, run it again to its end, and compare what it leaves with a run that was left alone.

    python benchmarks/kill_all.py --kills 50 [--seed 0] [--only train,export] [--json FILE]

A tiny LLaVA on drawn photos. Each command is timed once, then killed (SIGKILL) at moments drawn evenly over its run time. After each
kill: no input has changed, what is under the output's name is the former or a whole new one, and the same command run again
ends with 0, with the result of the run that was left alone, and leaves no temporary file. The processes are forked from this one,
which has imported the libraries, so that the kills fall into the work. POSIX only. Prints a table; exit code 1 when a case failed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@dataclass(frozen=True)
class Case:
    """A command, the folder or file that it writes (None: nothing), and what of it must be equal."""

    words: list[str]
    out: Path | None
    result: Callable[[Path], object]
    share: int = 1  # of the kills
    prepare: Callable[[], object] | None = None  # before each kill: makes what the command removes
    again: tuple[int, ...] = (0,)  # exit codes of the same command run again


def content(folder: Path, pattern: str) -> dict[str, bytes]:
    """The bytes of the files of a folder that match, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob(pattern)) if path.is_file()
    }


def predictions(path: Path) -> list[dict[str, object]]:
    """The predictions without what depends on the clock."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "latency_ms"} for row in rows]


def make(work: Path) -> dict[str, Case]:
    """The inputs of all commands below work/in, and the commands."""
    from evaluation_cases import scored_set, truth, write_set
    from photo_makers import fill
    from tiny_models import BREEDS, save_wide_llava, write_dataset

    from catlib.serving.engine_process import free_port

    source = work / "in"
    (work / "notebooks" / "profiles").mkdir(parents=True)
    for book in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(book, work / "notebooks")
    save_wide_llava(source / "llava")
    data = write_dataset(source / "data")
    fill(source / "breeds", dict.fromkeys(BREEDS[:3], 14))
    a, b = (write_set(scored_set(name, truth(5), 0.7, seed=i), source / "predictions") for i, name in enumerate("ab"))
    profile = f"photos: {source / 'breeds'}\ndata_dir: {work / 'split'}\nbase_model: {source / 'llava'}\nmin_side: 16\n"
    (work / "notebooks" / "profiles" / "p.yaml").write_text(profile, encoding="utf-8")
    training = [
        "--base_model",
        source / "llava",
        "--train_data",
        data / "train.jsonl",
        "--val_data",
        data / "val.jsonl",
    ]
    training += ["--lora_r", 4, "--epochs", 4, "--batch_size", 2, "--gradient_accumulation", 1, "--save_steps", 1]
    training += [
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--num_workers",
        0,
        "--watch_photos",
        4,
        "--lora_dropout",
        0.1,
    ]
    assert run(["train", *map(str, training), "--output_dir", str(source / "tuned")]) == 0
    weights, tuned = "adapter_model.safetensors", str(source / "tuned")
    photos = [str(source / "data" / "photos"), "--device", "cpu", "--batch-size", "1"]
    two = [str(a), str(b)]

    three = write_dataset(source / "q")
    lines = (three / "train.jsonl").read_text().splitlines(keepends=True)
    for part, own in (("train", lines[::2]), ("test", lines[1::2])):
        (three / f"{part}.jsonl").write_text("".join(own))
    splits = "".join(f"{part}_data: {three / part}.jsonl\n" for part in ("train", "val", "test"))
    text = f"{splits}base_model: {source / 'llava'}\nclip_model: ''\nmin_side: 16\ndevice: cpu\n"
    (work / "notebooks" / "profiles" / "q.yaml").write_text(text, encoding="utf-8")
    runs = work / "outputs" / "runs"
    assert run(["report", "p", "--notebooks", "01", "--run", "one"]) == 0
    shutil.copy(runs / "one" / "01_data_inspection.ipynb", source / "book.ipynb")
    shutil.copytree(source / "predictions", runs / "one" / "predictions")
    shutil.copytree(runs / "one", runs / "two")

    def nothing(_: Path) -> None:
        return None

    cases = {
        "data": Case(
            ["data", str(source / "breeds"), "--min-side", "16"], work / "data", lambda p: content(p, "*.jsonl"), 3
        ),
        "train": Case(["train", *map(str, training)], work / "train", lambda p: content(p, weights), 5),
        "predict": Case(["predict", "--checkpoint", tuned, *photos], work / "p" / "p.jsonl", predictions, 4),
        "evaluate": Case(
            ["evaluate", "--bootstrap", "3000", "--predictions", *two], work / "e" / "m.json", Path.read_bytes, 3
        ),
        "export": Case(
            ["export", "merge", "--checkpoint", tuned, "--device", "cpu", "--force"],
            work / "export",
            lambda p: content(p, "*.safetensors"),
            4,
        ),
        "report": Case(
            ["report", "p", "--notebooks", "01"], work / "outputs" / "runs" / "p", lambda p: content(p, "audit.csv"), 2
        ),
        "compare": Case(["compare", *two, "--bootstrap", "3000"], None, nothing),
        "memory": Case(["memory", "--base-model", str(source / "llava")], None, nothing),
        "verdict": Case(["verdict", "--bootstrap", "3000", "--candidate", "a", "--predictions", *two], None, nothing),
        "params": Case(["params", "p"], None, nothing),
        "render": Case(["render", str(source / "book.ipynb")], work / "page" / "p.html", Path.read_bytes, 2),
        "gate": Case(
            ["gate", "q"],
            runs / "q",
            lambda p: json.loads((p / "gate.json").read_text())["recommendation"]["decision"],
            3,
        ),
        "runs": Case(["runs"], None, nothing),
        "runs compare": Case(
            ["runs", "compare", "one", "two"], work / "reports" / "compare-one-two.html", Path.read_bytes, 2
        ),
        "runs rm": Case(
            ["runs", "rm", "gone"],
            runs / "gone",
            Path.exists,
            2,
            prepare=lambda: shutil.copytree(runs / "one", runs / "gone", dirs_exist_ok=True),
            again=(0, 2),  # 2: all was gone when it was killed
        ),
        "serve": Case(
            ["serve", "--engine", "service", "--checkpoint", tuned, "--device", "cpu", "--port", str(free_port())],
            None,
            nothing,
            4,
        ),
    }
    return cases


def command(case: Case, out: Path | None) -> list[str]:
    """The case's words with its output."""
    option = {"train": "--output_dir"}.get(case.words[0], "--out")
    return case.words if out is None or case.words[0] in ("report", "gate", "runs") else [*case.words, option, str(out)]


def start(words: list[str], log: Path) -> int:
    """Run a command in a forked process with a session of its own; its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    import torch

    from catlib.cli import main

    torch.set_num_threads(1)  # makes torch's pool anew after the fork; the threads that load a model would race for it
    code = 1
    try:
        code = main(words)
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(words: list[str]) -> int:
    """Run a command to its end; its exit code, the words of a failure printed."""
    with tempfile.TemporaryDirectory() as folder:
        pid = start(words, Path(folder) / "log")
        _, status = os.waitpid(pid, 0)
        if code := os.waitstatus_to_exitcode(status):
            print(f"{' '.join(words)[:300]}\nended with {code}: {(Path(folder) / 'log').read_text()[-1500:]}")
        return code


def killed(words: list[str], after: float, log: Path) -> bool:
    """Kill a command after so many seconds; whether it was still alive. Its children (a notebook's kernel) are ended too."""
    pid = start(words, log)
    end = time.monotonic() + after
    while time.monotonic() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with suppress(ProcessLookupError):  # it had no children
        os.killpg(pid, signal.SIGKILL)
    return True


def inputs(work: Path) -> dict[str, tuple[int, int]]:
    """What no command may change."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in (work / "in").rglob("*") if path.is_file()
    }


def try_case(case: Case, kills: int, work: Path, draw: random.Random) -> tuple[int, list[str]]:
    """(kills that hit, what was wrong)."""

    def empty() -> None:
        if case.out is not None:
            if case.words[0] == "runs":
                case.out.unlink(missing_ok=True) if case.out.is_file() else shutil.rmtree(case.out, ignore_errors=True)
            else:
                whole = case.words[0] in ("data", "train", "export", "report", "gate")
                shutil.rmtree(case.out if whole else case.out.parent, ignore_errors=True)
            shutil.rmtree(work / "split", ignore_errors=True)
        if case.prepare:
            case.prepare()

    empty()
    began = time.monotonic()
    if run(command(case, case.out)):
        return 0, ["it fails when left alone"]
    duration, before = time.monotonic() - began, inputs(work)
    expected, problems, hits = case.result(case.out) if case.out else None, [], 0
    for attempt in range(10 * kills):
        if hits == kills:
            break
        if attempt % 2 == 0 or case.prepare:
            empty()  # every other time it finds a whole output, which it replaces or goes on with
        if not killed(command(case, case.out), draw.uniform(0, duration), work / "log"):
            continue
        hits += 1
        if inputs(work) != before:
            problems.append("an input was changed")
        again = run(command(case, case.out))
        if again not in case.again:
            problems.append(f"run again, it ends with {again}")
        elif case.out is not None:
            if case.result(case.out) != expected:
                problems.append("run again, the result is another one")
            left = [path.name for path in work.rglob(".*") if ".writing-" in path.name or ".former-" in path.name]
            if left:
                problems.append(f"left behind: {', '.join(left[:3])}")
    return hits, problems


def try_server(case: Case, kills: int, work: Path, draw: random.Random) -> tuple[int, list[str]]:
    """(kills of a server that hit, what was wrong): started again it answers at the same port, and SIGTERM ends it with 0."""
    url, log = f"http://127.0.0.1:{case.words[-1]}", work / "log"

    def answers(pid: int) -> bool:
        end = time.monotonic() + 120
        while time.monotonic() < end and not os.waitpid(pid, os.WNOHANG)[0]:
            with suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    return True
            time.sleep(0.02)
        return False

    before, problems, duration = inputs(work), [], 0.0
    for attempt in range(kills + 1):  # the first is left alone
        if attempt:
            killed(case.words, draw.uniform(0, 1.3 * duration), log)
        began = time.monotonic()
        pid = start(case.words, log)
        if not answers(pid):
            problems.append(f"it does not answer: {log.read_text()[-300:]}")
            continue
        duration = time.monotonic() - began
        photo = next((work / "in" / "data" / "photos").glob("*"))
        if httpx.post(f"{url}/breed", content=photo.read_bytes(), trust_env=False).status_code != 200:
            problems.append("it refuses a photo")
        os.kill(pid, signal.SIGTERM)
        if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            problems.append(f"SIGTERM: it ends with {code}")
        if inputs(work) != before:
            problems.append("an input was changed")
    return kills, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="commands, comma separated")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    import torch

    torch.set_num_threads(1)
    for module in ("catlib.cli", "catlib.training.trainer", "catlib.serving.export", "catlib.evaluation.results"):
        __import__(module)
    draw, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["CATLIB_ROOT"] = folder
        cases = make(work)
        chosen = {name: case for name, case in cases.items() if name in (args.only.split(",") if args.only else cases)}
        total = sum(case.share for case in chosen.values())
        for name, case in chosen.items():
            tried = try_server if name == "serve" else try_case
            hits, problems = tried(case, max(1, round(args.kills * case.share / total)), work, draw)
            rows.append({"command": name, "kills": hits, "failed": len(problems), "problems": problems})
            print(f"{name:<10} {hits:>3} kills, {len(problems)} failed {'; '.join(problems)}", flush=True)
    print(
        f"{sum(row['kills'] for row in rows)} kills over {len(rows)} commands, {sum(row['failed'] for row in rows)} failed"
    )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return int(any(row["failed"] or not row["kills"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
