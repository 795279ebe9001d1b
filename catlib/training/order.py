"""The order in which samples are seen: a pure function of seed and epoch, so that a resumed run sees the same."""

from collections.abc import Sequence

import torch

from catlib.data.conversations import balance_weights
from catlib.data.records import Sample


def epoch_order(samples: Sequence[Sample], seed: int, epoch: int, balance: str = "none") -> list[int]:
    """Indices of one epoch, as many as there are samples.

    `none`: each sample once, shuffled. `sqrt`, `uniform`: drawn with replacement, a breed of n photos having the chance sqrt(n) or
    1 instead of n; rare breeds are seen more often without copied lines.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    if balance == "none":
        return torch.randperm(len(samples), generator=generator).tolist()
    weights = torch.from_numpy(balance_weights(samples, balance))
    return torch.multinomial(weights, len(samples), replacement=True, generator=generator).tolist()


def steps_of(order: Sequence[int], effective_batch: int) -> list[list[int]]:
    """The samples of each optimizer step; the last one of an epoch may be smaller."""
    return [list(order[i : i + effective_batch]) for i in range(0, len(order), effective_batch)]
