"""How many threads a pass on a CPU is worth."""

import threading
from functools import cache
from typing import Any

import torch
from threadpoolctl import ThreadpoolController

# Products of a layer's matrix, for all rows of a pass, below which one thread is as fast. Several meet after each operation, and a
# library that was loaded before catlib could ask it not to spin makes them spin: with another process on the cores, a tiny model
# then takes fifty times as long.
WORTH_THREADS = 1e7
PATCH = 3 * 14**2  # values of a photo's patch, about
_held = threading.local()


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()  # of the libraries that are loaded by now, torch's among them


def fit_threads(module: torch.nn.Module) -> None:
    """Let each pass through a module on the CPU use one thread where its matrices are small for the rows that go through."""
    sizes = [m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear)]
    if not sizes or next(module.parameters()).device.type != "cpu":
        return
    size = sum(sizes) / len(sizes)

    def before(_: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = next(value for value in (*args, *named.values()) if isinstance(value, torch.Tensor))
        rows = x.numel() / (PATCH if x.dim() > 3 else x.shape[-1] if x.is_floating_point() else 1)
        few = rows * size < WORTH_THREADS and torch.get_num_threads() > 1
        _stack().append(_pools().limit(limits=1, user_api="openmp") if few else None)

    def after(*_: Any) -> None:
        if limit := _stack().pop():
            limit.restore_original_limits()

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, always_call=True)


def _stack() -> list[Any]:
    """The limits of the passes that this thread is in."""
    if not hasattr(_held, "limits"):
        _held.limits = []
    return _held.limits
