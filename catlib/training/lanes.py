"""A batch worked through by several threads side by side, each with its share of the samples and of the cores.

On a CPU each small operation of a step ends with a wait of all threads for the slowest, long when another process takes
a core. Threads that go through the whole step apart wait for each other once.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import TypeVar

import torch

from catlib.settings import TrainSettings
from catlib.training import dropout, kernels
from catlib.vlm.models import VLM

T = TypeVar("T")
R = TypeVar("R")


class Lanes:
    """`count` threads that share torch's; one lane is the caller's own thread."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None

    def cut(self, items: Sequence[T]) -> list[Sequence[T]]:
        """The items in order, in as many parts as there are lanes for; sizes differ by one at most."""
        lanes = max(1, min(self.count, len(items)))
        edges = [len(items) * i // lanes for i in range(lanes + 1)]
        return [items[start:end] for start, end in pairwise(edges)]

    def run(self, work: Callable[[T], R], parts: Sequence[T]) -> list[R]:
        """`work` on each part, all at the same time, and the results in order. Raises the first part's error when all have ended.

        The threads have the caller's gradient mode and autocast. Dropout draws from a generator of each part, whichever thread is
        faster.
        """
        if len(parts) == 1:
            return [work(parts[0])]
        training = torch.is_grad_enabled()
        seed = int(torch.randint(2**62, (1,))) if training else 0
        low, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def in_lane(part: T, number: int) -> R:
            dropout.thread.generator = torch.Generator().manual_seed(seed + number)
            with torch.set_grad_enabled(training), torch.autocast("cpu", dtype, enabled=low):
                return work(part)

        futures = [self._threads().submit(in_lane, part, i) for i, part in enumerate(parts)]
        wait(futures)
        return [future.result() for future in futures]

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            mine = torch.get_num_threads()
            share = max(1, mine // self.count)
            self._pool = ThreadPoolExecutor(self.count, "lane", initializer=torch.set_num_threads, initargs=(share,))
            wait([self._pool.submit(torch.get_num_threads) for _ in range(self.count)])
            torch.set_num_threads(mine)  # each thread has its own number, but those to come have the last one set
        return self._pool


def lanes_for(vlm: VLM, settings: TrainSettings, processes: int = 1) -> Lanes:
    """As many lanes as there are samples in a batch and threads for them; one where threads would get in each other's way.

    So on a GPU, with 4-bit weights (each lane would expand them), with gradient checkpointing or any dropout but that of the fused
    layers (both depend on the global random state), and with several processes, whose exchange hangs on the whole backward pass.
    """
    fused = {id(part) for module in vlm.model.modules() if kernels.is_fused(module) for part in module.modules()}
    others = [m for m in vlm.model.modules() if isinstance(m, torch.nn.Dropout) and id(m) not in fused]
    draws = any(m.p > 0 for m in others) or any(getattr(m, "attention_dropout", 0) for m in vlm.model.modules())
    alone = vlm.device.type != "cpu" or processes > 1 or settings.mode == "qlora" or settings.recomputes
    apart = vlm.family.caches_features and not alone and not draws
    return Lanes(min(torch.get_num_threads(), settings.batch_size) if apart else 1)
