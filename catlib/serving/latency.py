"""How long a photo takes and how many go through at once, with one, four or sixteen requests under way; and the memory."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import torch

MB = 1e6
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Load:
    """Photos asked about with `concurrency` requests under way. Times are those of single requests, from file to answer."""

    concurrency: int
    p50: float  # milliseconds
    p95: float
    photos_per_s: float
    answers: tuple[Any, ...]  # in the order of the photos


def measure_load(ask: Callable[[Path], Any], photos: Sequence[Path], concurrency: int, warm_up: int = 2) -> Load:
    """Ask about every photo once, `concurrency` at a time; the first `warm_up` are asked about before the clock runs."""
    for photo in photos[:warm_up]:
        ask(photo)

    def timed(photo: Path) -> tuple[Any, float]:
        start = time.perf_counter()
        answer = ask(photo)
        return answer, 1000 * (time.perf_counter() - start)

    with ThreadPoolExecutor(concurrency, thread_name_prefix="ask") as pool:
        start = time.perf_counter()
        results = list(pool.map(timed, photos))
        rate = len(photos) / (time.perf_counter() - start)
    p50, p95 = (round(float(ms), 2) for ms in np.percentile([ms for _, ms in results], [50, 95]))
    return Load(concurrency, p50, p95, round(rate, 3), tuple(answer for answer, _ in results))


class MemoryMeter:
    """Memory of a model in this process: made before it is loaded, asked after it has answered.

    On a GPU the allocator's peak; else the growth of the resident set up to its peak, where Linux keeps one, and up to now
    elsewhere. Never less than the weights: what an earlier model has left to the allocator is used again unseen.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            with suppress(OSError):
                _RESET.write_text("5")  # Linux: sets the peak of the resident set back to its present size
            self.before = psutil.Process().memory_info().rss

    def growth_mb(self, *models: torch.nn.Module) -> float:
        """Megabytes (10^6 bytes)."""
        weights = sum(p.nbytes for model in models for p in [*model.parameters(), *model.buffers()])
        now = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _peak()
        return round(max(weights, now - self.before) / MB, 1)


def server_memory_mb(url: str) -> float | None:
    """Resident memory of the processes that listen at a local URL, their children included; None when it is not known."""
    address = urlsplit(url)
    if address.hostname not in LOCAL:
        return None
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        listening = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
        owners = [psutil.Process(pid) for pid in {c.pid for c in listening if c.laddr[1:] == (port,)} if pid]
        family = {process for owner in owners for process in (owner, *owner.children(recursive=True))}
        total = sum(process.memory_info().rss for process in family)
    except psutil.Error:  # another user's process, or one that ended meanwhile
        return None
    return round(total / MB, 1) if total else None


def _peak() -> int:
    """The largest resident set up to now, bytes; the present one where the system keeps no peak."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    peaks = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return max(psutil.Process().memory_info().rss, *peaks)
