"""A part of the samples that is fair to rare breeds."""

from collections.abc import Sequence

import numpy as np

from catlib.data.records import Sample


def evenly(samples: Sequence[Sample], most: int, seed: int) -> tuple[Sample, ...]:
    """At most `most` samples (0: all), taken from all breeds in turn, in their old order; the same for the same seed."""
    if not 0 < most < len(samples):
        return tuple(samples)
    turn: dict[str, int] = {}
    shuffled = np.random.default_rng(seed).permutation(len(samples))
    ranked = []
    for i in shuffled:
        breed = samples[i].breed
        ranked.append((turn.setdefault(breed, 0), int(i)))
        turn[breed] += 1
    return tuple(samples[i] for i in sorted(i for _, i in sorted(ranked, key=lambda pair: pair[0])[:most]))
