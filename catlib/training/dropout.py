"""Dropout that is drawn again in the backward pass, so that no mask is kept in between."""

import math
import threading
from typing import Any

import torch


class _Thread(threading.local):
    generator: torch.Generator | None = None  # that a CPU draws from; None: torch's global one


thread = _Thread()


def on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda  # a function, so that tests can take this way without a GPU


def generator_of(x: torch.Tensor) -> torch.Generator:
    return torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator


def draw(x: torch.Tensor) -> Any:
    """What dropout needs to draw the same again: the state of a GPU's generator, or a seed."""
    if on_gpu(x):
        return generator_of(x).get_state()
    return int(torch.randint(2**62, (1,), generator=thread.generator))


def drop(x: torch.Tensor, p: float, draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / (1 - p) with each entry dropped with probability p, what `undrop` needs of it); the same for the same draw."""
    if not on_gpu(x):
        dropped = _dropped(x, p, draw)
        kept = x * (1 / (1 - p))
        kept.view(-1).index_fill_(0, dropped, 0)
        return kept, dropped
    generator = generator_of(x)
    now = generator.get_state()
    if again := not torch.equal(now, draw):
        generator.set_state(draw)
    kept, mask = torch.native_dropout(x, p, True)
    if again:
        generator.set_state(now)
    return kept, mask


def undrop(dlow: torch.Tensor, a: torch.Tensor, dropped: torch.Tensor, p: float) -> torch.Tensor:
    """The gradient dlow a of what was kept as the gradient of what went in."""
    if on_gpu(dlow):
        return torch.ops.aten.native_dropout_backward(dlow @ a, dropped, 1 / (1 - p))
    dx = (dlow * (1 / (1 - p))) @ a
    dx.view(-1).index_fill_(0, dropped, 0)
    return dx


def _dropped(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Positions in the flattened x that dropout sets to 0, each with probability p; the same ones for the same seed.

    The gaps between them are geometric: log(u) / log(1 - p) rounded down (Devroye 1986, Non-Uniform Random Variate Generation,
    X.2). So only p of the random numbers are needed that `bernoulli_` draws, which was a fifth of the time of a step.
    """
    generator = torch.Generator().manual_seed(seed)
    n = x.numel()
    draws = int(n * p + 8 * math.sqrt(n * p) + 16)  # eight standard deviations more than are needed on average
    gaps = torch.rand(draws, generator=generator).neg_().add_(1).log_().mul_(1 / math.log1p(-p)).long().add_(1)
    positions = gaps.cumsum(0).sub_(1)
    return positions[: int(torch.searchsorted(positions, n))]
