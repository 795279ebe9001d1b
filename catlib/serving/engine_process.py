"""An engine as a process: its command line, started, waited for until it answers, stopped with all that it has started."""

import errno
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from catlib.errors import CatlibError, InputError
from catlib.paths import without_secrets
from catlib.transfer import Client, TransferError

log = logging.getLogger(__name__)
SECRET = re.compile(r"--?(.*[-_])?(api[-_]?key|hft|token|secret|password|credentials?)", re.IGNORECASE)  # options
POLL_S = 0.1
PATIENCE_S = 20.0  # for a clean end, before it is killed
SHOWN_LINES = 15
# A process that outlives this one: its standard input ends when this one does, however that comes about (kill -9, no memory).
WATCH = (
    "import os, sys, time\n"
    "sys.stdin.read()\n"
    "for number in (15, 9):\n"
    "    os.killpg(int(sys.argv[1]), number); time.sleep(5)\n"
)


@dataclass(frozen=True)
class Where:
    """What every engine is told alike: where to listen, the model's name, and options of its own."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "cats"
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """An engine's command line. `environment` is added to the process's own; `model` is the name it is asked for by."""

    engine: str
    arguments: tuple[str, ...]
    model: str
    host: str
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def reached(self) -> str:
        """The address at which it is reached from this machine."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host

    @property
    def url(self) -> str:
        """Where it answers, from this machine."""
        return f"http://{f'[{self.reached}]' if ':' in self.reached else self.reached}:{self.port}"

    def __str__(self) -> str:
        """The line for a shell; the values of options that name a SECRET are not shown, since it is logged."""
        variables = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        shown: list[str] = []
        for text, before in zip(self.arguments, ("", *self.arguments), strict=False):
            name, equals, _ = text.partition("=")
            value = SECRET.fullmatch(before) and not text.startswith("--")
            shown.append("***" if value else f"{name}=***" if equals and SECRET.fullmatch(name) else text)
        return without_secrets(" ".join([*variables, shlex.join(shown)]))


@dataclass
class Running:
    """A process that answers; `start_s` is how long that took."""

    process: subprocess.Popen
    start_s: float

    def wait(self) -> None:
        """Wait until it ends by itself, which it should not. Raises CatlibError."""
        raise CatlibError(f"the engine ended by itself, {_how(self.process.wait())}")


@contextmanager
def running(command: Command, timeout_s: float = 600.0, output: Path | None = None) -> Iterator[Running]:
    """The engine, answering, for as long as the context is open; then it is stopped, whatever happened.

    `output`: file that gets what it prints; None: it prints where this process does. Raises InputError when the port is taken,
    CatlibError when it ends or does not answer within `timeout_s` seconds.
    """
    refuse_taken_port(command)
    start = time.perf_counter()
    # A group of its own: Ctrl-C reaches this process alone, which then ends the group.
    options: dict[str, Any] = {"env": {**os.environ, **command.environment}, "start_new_session": True}
    with output.open("wb") if output else nullcontext() as stream:
        options |= {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": subprocess.STDOUT if stream else None}
        try:
            process = subprocess.Popen(command.arguments, **options)
        except OSError as error:
            raise InputError(f"{command.arguments[0]} cannot be started: {error}") from None
    watch = None
    try:
        arguments = [sys.executable, "-c", WATCH, str(process.pid)]
        watch = subprocess.Popen(arguments, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        with Client() as http:
            while not _healthy(http, command.url):
                if (code := process.poll()) is not None:
                    raise CatlibError(f"{command.engine} ended before it answered, {_how(code)}{_last_lines(output)}")
                if time.perf_counter() - start > timeout_s:
                    late = f"{command.engine} did not answer at {command.url} within {timeout_s:g} s"
                    raise CatlibError(late + _last_lines(output))
                time.sleep(POLL_S)
        yield Running(process, time.perf_counter() - start)
    finally:
        stop(process)
        if watch:
            watch.kill()
            watch.communicate()


def stop(process: subprocess.Popen, patience_s: float = PATIENCE_S) -> None:
    """Ask the whole group to end, and kill what is left of it after `patience_s` seconds, or at a second Ctrl-C."""
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        log.warning("the engine did not end within %g s; it is killed", patience_s)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def refuse_taken_port(command: Command) -> None:
    """Raise InputError when another process holds the port (its answers would be taken for the engine's), or none can be had."""
    host, port = command.host, command.port
    taken = f"port {port} on {command.reached} is taken; stop what listens there, or choose another with --port"
    with suppress(OSError), socket.create_connection((command.reached, port), timeout=1):
        raise InputError(taken)
    try:
        family, kind, _, _, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # a port that was let go of a moment ago is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:  # held on another of this machine's addresses, or not answering yet
            raise InputError(taken) from None
        raise InputError(f"cannot listen on port {port} of {host}: {error.strerror or error}") from None


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _healthy(http: Client, url: str) -> bool:
    """Whether /health, which all engines have, says 200; in time, whatever listens there."""
    with suppress(TransferError):
        return http.send("GET", f"{url}/health", within_s=5).status == 200
    return False


def _how(code: int) -> str:
    return f"with exit code {code}" if code >= 0 else f"by signal {signal.Signals(-code).name}"


def _last_lines(output: Path | None) -> str:
    if output is None:
        return "; its own messages are above"
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-SHOWN_LINES:]
    return "; its last words:\n" + "\n".join(lines)
