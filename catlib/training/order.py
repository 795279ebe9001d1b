"""Which samples an optimizer step sees: a pure function of seed, epoch and step, so that a resumed training sees the same."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from catlib.data.conversations import balance_weights
from catlib.data.records import Sample

T = TypeVar("T")


def epoch_order(samples: Sequence[Sample], seed: int, epoch: int, balance: str = "none") -> list[int]:
    """Indices of one epoch, as many as there are samples.

    `none`: each sample once, shuffled. `sqrt`, `uniform`: drawn with replacement, a breed of n photos with the chance sqrt(n) or 1.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    if balance == "none":
        return torch.randperm(len(samples), generator=generator).tolist()
    weights = torch.from_numpy(balance_weights(samples, balance))
    return torch.multinomial(weights, len(samples), replacement=True, generator=generator).tolist()


@dataclass
class Steps:
    """A batch sampler of one epoch: the indices of each optimizer step, all processes' together; the last may be smaller.

    `done`: the optimizer steps of the whole training so far, which tell the epoch. `begin` is called with (epoch, samples seen in it
    before) and `soon` with the samples of the step that comes and of the one after it.
    """

    samples: Sequence[Sample]
    size: int
    seed: int
    balance: str
    done: Callable[[], int]
    begin: Callable[[int, Sequence[Sample]], None]
    soon: Callable[[Sequence[Sample]], None]

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first = divmod(self.done(), len(self))
        order = epoch_order(self.samples, self.seed, epoch, self.balance)
        steps = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        self.begin(epoch, [self.samples[i] for i in order[: first * self.size]])
        for number, step in enumerate(steps):
            if number >= first:  # the others are passed over by accelerate's `skip_first_batches`
                for coming in steps[number : number + 2]:
                    self.soon([self.samples[i] for i in coming])
            yield step


def share(items: Sequence[T], most: int, rank: int = 0, processes: int = 1) -> list[tuple[Sequence[T], float]]:
    """A process's micro-batches of at most `most` items, each with its weight.

    All processes get as many, because they exchange gradients (or pieces of weights) together: smaller ones where some
    would have none, and where one still has fewer it repeats the first with weight 0.
    """
    most = max(1, min(most, math.ceil(len(items) / processes)))
    parts = [items[i : i + most] for i in range(0, len(items), most)]
    turns = math.ceil(len(parts) / processes)
    return [(parts[i], 1.0) if i < len(parts) else (parts[0], 0.0) for i in range(rank, turns * processes, processes)]
