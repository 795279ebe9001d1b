"""Executes the notebooks of a run in order, keeps a truthful account of it in state.json, and renders its pages."""

import fcntl
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import papermill
import yaml
from jupyter_client import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from catlib.data.records import write_atomically
from catlib.errors import CatlibError, InputError
from catlib.evaluation.metrics_file import METRICS_FILE
from catlib.paths import project_root, resolve
from catlib.provenance import git_commit, package_versions
from catlib.reports import index
from catlib.reports.stages import Stage, fingerprint, output_files, plan, select, signatures

# The kernel of this interpreter, and no progress bars in log files: catlib.progress logs lines there.
KERNEL_ENVIRONMENT = {
    "JUPYTER_PREFER_ENV_PATH": "1",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm would like widgets, which a static page cannot show
}
log = logging.getLogger(__name__)


def run_profile(
    profile: Path,
    overrides: Mapping[str, Any],
    run: str,
    *,
    force: bool = False,
    notebooks: str = "",
    tell: Callable[[str], None] = log.info,
) -> dict[str, Any]:
    """Execute the notebooks of a profile whose inputs have changed and return the run's state.

    `tell` gets a line for each stage. A stage that fails ends the run: its page shows the error, the later stages are
    marked as not run, and state["status"] is "failed". Raises InputError when a parameter is wrong or the run is in
    progress, before anything is executed; KeyboardInterrupt after the state has been written down.
    """
    stages = plan(profile, {**overrides, "run": run})
    chosen = select([stage.name for stage in stages], notebooks)
    run_dir = resolve(f"outputs/runs/{run}")
    run_dir.mkdir(parents=True, exist_ok=True)
    with (
        _locked(run_dir, run),
        _terminable(),
        _environment(),
        (run_dir / "log.txt").open("a", encoding="utf-8") as log_file,
    ):
        values = {key: value for stage in stages for key, value in stage.parameters.items()}
        write_atomically(run_dir / "parameters.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        state = _begin(run_dir, run, profile, stages)
        log_file.write(f"--- {state['started']} {' '.join(sys.argv)}\n")
        try:
            _execute_all(state, stages, chosen, run_dir, force, log_file, tell)
        except BaseException as unexpected:
            state["status"] = "interrupted" if isinstance(unexpected, KeyboardInterrupt) else "failed"
            raise
        finally:
            state["finished"] = _now()
            _save(state, run_dir)
        return state


def _execute_all(
    state: dict,
    stages: Sequence[Stage],
    chosen: Sequence[str],
    run_dir: Path,
    force: bool,
    log_file: TextIO,
    tell: Callable,
) -> None:
    """Go through the stages; skip what is unchanged, stop at the first that fails."""
    before = ""
    for number, stage in enumerate(stages):
        entry = state["stages"][stage.name]
        before = fingerprint(stage, before)
        recorded = entry.get("outputs", {})
        unchanged = entry["status"] == "done" and entry["fingerprint"] == before and signatures(recorded) == recorded
        if stage.name not in chosen:
            if not unchanged:
                _forget(state, [stage], run_dir)  # its results belong to other inputs
            continue
        if unchanged and not force:
            tell(f"{stage.name:<22} unchanged")
            continue
        _forget(state, [stage], run_dir)
        entry |= {"status": "running", "fingerprint": before, "started": _now(), "parameters": dict(stage.parameters)}
        _save(state, run_dir)
        tell(f"{stage.name:<22} …")
        start, clock = time.time(), time.monotonic()
        try:
            error = _execute(stage, run_dir, force, log_file)
        except BaseException as unexpected:
            entry["status"] = "interrupted" if isinstance(unexpected, KeyboardInterrupt) else "failed"
            _forget(state, stages[number + 1 :], run_dir)
            raise
        finally:
            entry |= {
                "duration_s": round(time.monotonic() - clock, 1),
                "page": (run_dir / f"{stage.name}.ipynb").is_file(),
            }
        entry["status"] = "failed" if error else "done"
        tell(f"{stage.name:<22} {entry['status']} in {entry['duration_s']:.0f} s")
        if error:
            entry["error"], entry["exit_code"] = str(error), error.exit_code
            state["status"] = "failed"
            _forget(state, stages[number + 1 :], run_dir)
            return
        written = [path for path in output_files(stage) if path.stat().st_mtime >= start - 1 or str(path) in recorded]
        entry["outputs"] = signatures(written)
        for other in stages[:number]:  # what an earlier stage has begun, this one may have added to
            files = state["stages"][other.name].get("outputs", {})
            files |= {path: signature for path, signature in entry["outputs"].items() if path in files}
        _save(state, run_dir)
    state["status"] = "done" if all(entry["status"] == "done" for entry in state["stages"].values()) else "incomplete"


def _execute(stage: Stage, run_dir: Path, force: bool, log_file: TextIO) -> CatlibError | None:
    """Execute one notebook with papermill into the run's folder; the error that it ended with, if any."""
    parameters = dict(stage.injected)
    if force and "resume" in stage.parameters:
        parameters["resume"] = False
    stream = _Tee(log_file, sys.stderr if log.isEnabledFor(logging.INFO) else None)
    try:
        papermill.execute_notebook(
            stage.source,
            run_dir / f"{stage.name}.ipynb",
            parameters,
            kernel_name="python3",
            cwd=stage.source.parent,
            progress_bar=False,
            stdout_file=log_file,
            stderr_file=stream,
            start_timeout=120,
            kernel_manager_class=_logged_kernel(log_file),
        )
    except PapermillExecutionError as error:
        log_file.write("\n".join(error.traceback) + "\n")
        kind = _own_errors().get(error.ename)
        if not kind:
            where = f"the traceback is in its page and in {run_dir / 'log.txt'}"
            return CatlibError(f"{stage.name}: {error.ename}: {error.evalue} ({where})")
        return InputError(error.evalue) if kind.exit_code == InputError.exit_code else CatlibError(error.evalue)
    except DeadKernelError:
        return CatlibError(f"{stage.name}: its kernel died, most likely for lack of memory; smaller batches need less")
    return None


def _logged_kernel(log_file: TextIO) -> type[AsyncKernelManager]:
    """A kernel manager whose kernels write what does not pass through Jupyter (C libraries, crashes) to the log."""

    class LoggedKernel(AsyncKernelManager):
        async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
            await super()._async_launch_kernel(kernel_cmd, **(options | {"stdout": log_file, "stderr": log_file}))

    return LoggedKernel


def _own_errors() -> dict[str, type[CatlibError]]:
    """catlib's error classes by name."""
    found, queue = {}, [CatlibError]
    while queue:
        kind = queue.pop()
        found[kind.__name__] = kind
        queue += kind.__subclasses__()
    return found


def _begin(run_dir: Path, run: str, profile: Path, stages: Sequence[Stage]) -> dict[str, Any]:
    """The state of a run that starts now, with what an earlier one of the same name has left."""
    earlier = index.read_state(run_dir) or {"stages": {}}
    entries = {
        stage.name: {"status": "not run", "page": False} | earlier["stages"].get(stage.name, {}) for stage in stages
    }
    for stage in stages:
        entries[stage.name]["title"] = stage.title
    return {
        "run": run,
        "profile": profile.stem,
        "status": "running",
        "pid": os.getpid(),
        "started": _now(),
        "finished": None,
        "commit": git_commit(),
        "versions": package_versions(),
        "stages": entries,
    }


def _forget(state: dict[str, Any], stages: Sequence[Stage], run_dir: Path) -> None:
    """Remove what earlier results of `stages` would claim: copies, pages, and metrics that one of them has begun."""
    metrics = run_dir / METRICS_FILE
    began = next((name for name, entry in state["stages"].items() if str(metrics) in entry.get("outputs", {})), None)
    for stage in stages:
        (run_dir / f"{stage.name}.ipynb").unlink(missing_ok=True)
        if stage.name == began:
            metrics.unlink(missing_ok=True)
        entry = state["stages"][stage.name]
        entry.clear()
        entry |= {"status": "not run", "page": False, "title": stage.title}


def _save(state: dict[str, Any], run_dir: Path) -> None:
    """Write state.json and bring the pages up to date with it."""
    write_atomically(run_dir / "state.json", json.dumps(state, indent=1, ensure_ascii=False) + "\n")
    index.render(state, run_dir)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


class _Tee:
    """A text stream that writes to the log and, unless quiet, to the terminal."""

    def __init__(self, *streams: TextIO | None) -> None:
        self.streams = [stream for stream in streams if stream]

    def write(self, text: str) -> None:
        for stream in self.streams:
            stream.write(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()


@contextmanager
def _locked(run_dir: Path, run: str) -> Iterator[None]:
    """Hold the run's lock, which the system releases however the process ends. Raises InputError when it is taken."""
    with (run_dir / ".lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise InputError(
                f"run {run!r} is in progress (process {holder}); wait for it or choose another --run"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does: with the kernel stopped and the state written."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _environment() -> Iterator[None]:
    """Environment variables that the kernels inherit."""
    wanted = KERNEL_ENVIRONMENT | {"CATLIB_ROOT": str(project_root())}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
