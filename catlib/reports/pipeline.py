"""Executes the notebooks of a run in order, keeps a truthful account of it in state.json, and renders its pages."""

import asyncio
import copy
import glob
import itertools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import papermill
import yaml
from jupyter_client import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from catlib.errors import CatlibError, InputError
from catlib.evaluation.metrics_file import METRICS_FILE
from catlib.files import locked, remove_leftovers, write_json, write_text
from catlib.paths import folder_of_run, project_root, relative, resolve
from catlib.progress import Console
from catlib.provenance import git_commit, package_versions
from catlib.reports import index
from catlib.reports.stages import Stage, changes, digest, fingerprint, output_files, plan, select, signatures
from catlib.signals import handling

# No progress bars in log files: catlib.progress logs lines there.
KERNEL_ENVIRONMENT = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm would like widgets, which a static page cannot show
}
DATA = ("train_data", "val_data", "test_data")
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

    `tell` gets a line for each stage. A stage that fails ends the run: its page shows the error and state["status"] is
    "failed". Results that were not asked for again stay; where something that they depend on has changed, they are marked
    as outdated. Raises InputError when a parameter is wrong or the run is in progress, before anything is executed;
    KeyboardInterrupt after the state has been written down.
    """
    stages = plan(profile, {**overrides, "run": run})
    chosen = select([stage.name for stage in stages], notebooks)
    run_dir = folder_of_run(run)
    earlier = index.read_state(run_dir)
    holder = earlier["pid"] if earlier else "unknown"
    busy = f"run {run!r} is in progress (process {holder}); wait for it or choose another --run"
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this interpreter
    with locked(run_dir / ".lock", busy), handling(signal.SIGTERM):
        remove_leftovers(run_dir)
        with (run_dir / "log.txt").open("a", encoding="utf-8") as log_file:
            _write_parameters(run_dir, {key: value for stage in stages for key, value in stage.parameters.items()})
            kept = copy.deepcopy(earlier["stages"]) if earlier else {}
            entries = {s.name: {"status": "not run"} | kept.get(s.name, {}) | {"title": s.title} for s in stages}
            state = {"run": run, "profile": profile.stem, "status": "running", "pid": os.getpid(), "started": _now()}
            state |= {"commit": git_commit(), "versions": package_versions(), "stages": entries}
            log_file.write(f"--- {state['started']} {' '.join(sys.argv)}\n")
            runner = _Runner(run_dir, force, log_file, tell, state, earlier)
            try:
                runner.run(stages, chosen)
            except BaseException as unexpected:
                state["status"] = _ending(unexpected)
                raise
            finally:
                state["finished"] = _now()
                runner.save()
        return state


def _ending(unexpected: BaseException) -> str:
    return "interrupted" if isinstance(unexpected, KeyboardInterrupt) else "failed"


@dataclass
class _Runner:
    """One invocation: the folder that it fills and the account that it keeps."""

    run_dir: Path
    force: bool
    log_file: TextIO
    tell: Callable[[str], None]
    state: dict[str, Any]
    earlier: dict[str, Any] | None  # the state before

    def run(self, stages: Sequence[Stage], chosen: Sequence[str]) -> None:
        """Go through the stages; skip what is unchanged, mark what has changed and was not asked for, stop at a failure."""
        now: dict[str, str] = {}
        entries = self.state["stages"]
        for number, stage in enumerate(stages):
            entry, now = entries[stage.name], fingerprint(stage, now)
            changed = changes(entry, stage, now)
            if entry["status"] in ("done", "outdated"):
                entry |= {"status": "outdated" if changed else "done", "changed": changed}
            if stage.name not in chosen:
                continue
            if entry["status"] == "done" and not self.force:
                self.tell(f"{stage.name:<22} unchanged")
                continue
            self.tell(f"{stage.name:<22} …")
            try:
                self.execute(stage, now)
            finally:
                if entry["status"] != "done":
                    self.state["status"] = "failed"
                    for later in (entries[stage.name] for stage in stages[number + 1 :]):
                        if later["status"] in ("done", "outdated"):
                            later |= {"status": "outdated", "changed": [f"{stage.name}, which has {entry['status']}"]}
            self.tell(f"{stage.name:<22} {entry['status']} in {entry['duration_s']:.0f} s")
            if entry["status"] != "done":
                return
        done = all(entry["status"] == "done" for entry in entries.values())
        self.state["status"] = "done" if done else "incomplete"

    def execute(self, stage: Stage, now: Mapping[str, str]) -> None:
        """Execute one notebook and write down how it went, also when that is an interruption."""
        entries, metrics = self.state["stages"], self.run_dir / METRICS_FILE
        entry, attempts = entries[stage.name], self.attempts()
        recorded = entry.get("outputs", {})
        began = next((name for name, e in entries.items() if relative(metrics) in e.get("outputs", {})), None)
        if stage.name == began:  # what the others have added to it would stand beside other predictions
            metrics.unlink(missing_ok=True)
        entry.clear()
        entry |= {"status": "running", "title": stage.title, "started": _now(), "parameters": dict(stage.parameters)}
        entry["outputs"] = recorded  # until it is done they are those of its earlier execution
        self.save()
        start, clock = time.time(), time.monotonic()
        try:
            error = _execute(stage, self.run_dir, self.force, self.log_file)
        except BaseException as unexpected:
            entry["status"] = _ending(unexpected)
            raise
        finally:
            entry["duration_s"] = round(time.monotonic() - clock, 1)
            for folder in self.attempts() - attempts:
                self.account_of_attempt(folder, stage.name)
        if error:
            entry |= {"status": "failed", "error": str(error), "exit_code": error.exit_code}
            return
        files = output_files(stage)
        written = [path for path in files if path.stat().st_mtime >= start - 1 or relative(path) in recorded]
        samples = {key.removesuffix("_data"): resolve(str(stage.parameters.get(key, ""))) for key in DATA}
        digests = {part: digest(path.read_bytes())[:8] for part, path in samples.items() if path.is_file()}
        entry |= {"status": "done", "fingerprint": dict(now), "outputs": signatures(written), "data": digests}
        for other in itertools.takewhile(lambda other: other is not entry, entries.values()):
            theirs = other.get("outputs", {})  # what an earlier stage has begun, this one may have added to
            theirs |= {path: signature for path, signature in entry["outputs"].items() if path in theirs}

    def attempts(self) -> set[Path]:
        """The folders in which earlier attempts of this run are kept (`catlib.runs.set_aside`)."""
        return set(self.run_dir.parent.glob(f"{glob.escape(self.run_dir.name)}~*"))

    def account_of_attempt(self, folder: Path, training: str) -> None:
        """State and pages of the attempt that the notebook `training` has just set aside, as they were before."""
        for name in ("state.json", "parameters.yaml"):  # these are of the run that goes on
            (folder / name).unlink(missing_ok=True)
        if self.earlier is None:
            return
        state = copy.deepcopy(self.earlier) | {"run": folder.name}
        for name, entry in state["stages"].items():
            now = self.state["stages"].get(name, {})
            if name != training and now.get("fingerprint") != entry.get("fingerprint"):
                (folder / f"{name}.ipynb").unlink(missing_ok=True)  # run again since, for other data
        _write_parameters(folder, index.parameters_of(state))
        index.settle(state, folder)
        write_json(folder / "state.json", state)
        index.render_run(state, folder)

    def save(self) -> None:
        """Write state.json and bring the pages up to date with it."""
        index.settle(self.state, self.run_dir)
        write_json(self.run_dir / "state.json", self.state)
        index.render(self.state, self.run_dir)


def _execute(stage: Stage, run_dir: Path, force: bool, log_file: TextIO) -> CatlibError | None:
    """Execute one notebook with papermill into the run's folder; the error that it ended with, if any. It gets its name
    there when it has ended, however it did: until then the earlier one stays, which may be set aside."""
    again = {"resume": False} if force and "resume" in stage.parameters else {}
    unfinished, done = run_dir / f".{stage.name}.ipynb", run_dir / f"{stage.name}.ipynb"
    console = Console(stage.name, log_file, sys.stderr if log.isEnabledFor(logging.INFO) else None)
    try:
        papermill.execute_notebook(
            stage.source,
            unfinished,
            {**stage.injected, **again},
            kernel_name="python3",
            cwd=stage.source.parent,
            progress_bar=False,
            stdout_file=log_file,
            stderr_file=console,
            start_timeout=120,
            iopub_timeout=600,  # the client's own 4 s end a run where the machine is busy
            kernel_manager_class=_logged_kernel(log_file, project_root()),  # asked here: papermill changes the folder
        )
    except PapermillExecutionError as error:
        log_file.write("\n".join(error.traceback) + "\n")
        if kind := _kinds().get(error.ename):
            return (InputError if kind.exit_code == InputError.exit_code else CatlibError)(error.evalue)
        where = f"the traceback is in its page and in {relative(run_dir / 'log.txt')}"
        return CatlibError(f"{stage.name}: {error.ename}: {error.evalue} ({where})")
    except DeadKernelError:
        return CatlibError(f"{stage.name}: its kernel died, most likely for lack of memory; smaller batches need less")
    finally:
        console.close()
        if unfinished.is_file():
            unfinished.replace(done)
    return None


def _logged_kernel(log_file: TextIO, root: Path) -> type[AsyncKernelManager]:
    """A kernel manager whose kernels write what does not pass through Jupyter (C libraries, crashes) to the log, and end
    without a word when the run is interrupted."""

    class LoggedKernel(AsyncKernelManager):
        async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
            options |= {"stdout": log_file, "stderr": log_file}
            options["env"] = {**options["env"], **KERNEL_ENVIRONMENT, "CATLIB_ROOT": str(root)}
            await super()._async_launch_kernel(kernel_cmd, **options)

        async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:  # type: ignore[override]
            # An interrupt leaves nbclient's tasks on the loop: one would find the kernel dead and print a traceback.
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await super().shutdown_kernel(now=now, restart=restart)

    return LoggedKernel


def _kinds(kind: type[CatlibError] = CatlibError) -> dict[str, type[CatlibError]]:
    """catlib's error classes by name."""
    return {kind.__name__: kind} | {name: sub for own in kind.__subclasses__() for name, sub in _kinds(own).items()}


def _write_parameters(run_dir: Path, values: Mapping[str, Any]) -> None:
    write_text(run_dir / "parameters.yaml", yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
