"""An engine as a process: started, waited for until it answers, and stopped with all that it has started."""

import errno
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from catlib.errors import CatlibError, InputError
from catlib.serving.engines import Command

log = logging.getLogger(__name__)
POLL_S = 0.1
PATIENCE_S = 20.0  # for a clean end, before it is killed
SHOWN_LINES = 15


@dataclass
class Running:
    """A process that answers; `start_s` is how long that took."""

    process: subprocess.Popen
    start_s: float

    def wait(self) -> None:
        """Wait until it ends by itself, which it should not. Raises CatlibError."""
        code = self.process.wait()
        raise CatlibError(f"the engine ended by itself, {_how(code)}")


@contextmanager
def running(command: Command, timeout_s: float = 600.0, output: Path | None = None) -> Iterator[Running]:
    """The engine, answering, for as long as the context is open; then it is stopped, whatever happened.

    `output`: file that gets what it prints; None: it prints where this process does. Raises InputError when the port is taken,
    CatlibError when it ends or does not answer within `timeout_s` seconds.
    """
    refuse_taken_port(command)
    start = time.perf_counter()
    with output.open("wb") if output else nullcontext() as stream:
        try:
            process = subprocess.Popen(
                command.arguments,
                env={**os.environ, **command.environment},
                stdout=stream,
                stderr=subprocess.STDOUT if stream else None,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a group of its own: Ctrl-C reaches this process alone, which then ends the group
            )
        except OSError as error:
            raise InputError(f"{command.arguments[0]} cannot be started: {error}") from None
    try:
        while not _healthy(command.url):
            if (code := process.poll()) is not None:
                raise CatlibError(f"{command.engine} ended before it answered, {_how(code)}{_last_lines(output)}")
            if time.perf_counter() - start > timeout_s:
                late = f"{command.engine} did not answer at {command.url} within {timeout_s:g} s"
                raise CatlibError(late + _last_lines(output))
            time.sleep(POLL_S)
        yield Running(process, time.perf_counter() - start)
    finally:
        stop(process)


def stop(process: subprocess.Popen, patience_s: float = PATIENCE_S) -> None:
    """Ask the whole group to end, and kill what is left of it after `patience_s` seconds, or at a second Ctrl-C."""
    try:
        _signal_group(process, signal.SIGTERM)
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        log.warning("the engine did not end within %g s; it is killed", patience_s)
    finally:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def refuse_taken_port(command: Command) -> None:
    """Raise InputError when another process holds the port (its answers would be taken for the engine's), or none can be had."""
    host = command.url.split("//")[1].rsplit(":", 1)[0].strip("[]")
    taken = f"port {command.port} on {host} is taken; stop what listens there, or choose another with --port"
    with suppress(OSError), socket.create_connection((host, command.port), timeout=1):
        raise InputError(taken)
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            command.host or "0.0.0.0", command.port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # a port that was let go of a moment ago is free
            probe.bind(address)
    except OSError as error:
        if (
            error.errno == errno.EADDRINUSE
        ):  # held, if only on another of this machine's addresses, or not answering yet
            raise InputError(taken) from None
        raise InputError(f"cannot listen on port {command.port} of {command.host}: {error.strerror or error}") from None


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """While open, SIGTERM raises KeyboardInterrupt as Ctrl-C does, so that what has been started is stopped."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _healthy(url: str) -> bool:
    """Whether /health, which both engines have, says 200."""
    try:
        # never by way of a proxy, and without loading certificates each time
        return httpx.get(f"{url}/health", timeout=5, trust_env=False, verify=False).status_code == 200
    except httpx.HTTPError:
        return False


def _signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _how(code: int) -> str:
    return f"with exit code {code}" if code >= 0 else f"by signal {signal.Signals(-code).name}"


def _last_lines(output: Path | None) -> str:
    if output is None:
        return "; its own messages are above"
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-SHOWN_LINES:]
    return "; its last words:\n" + "\n".join(lines)
