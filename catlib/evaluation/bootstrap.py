"""Bootstrap intervals: stratified by true breed, seeded, vectorised, and measured to cover at their nominal rate.

Plain percentile intervals undercover on the few photos that rare breeds have. `benchmarks/interval_coverage.py`
simulates test sets of 12, 20 and 67 breeds whose true figures are known; what it shows is why three steps are added:

- Each breed's n photos are resampled n-1 at a time and scaled back to n (Rao and Wu 1988, "Resampling inference with
  complex survey data"): otherwise the variance is too small by (n-1)/n, a fifth for a breed with five photos.
- A handful of pseudo photos is spread over the breeds: two right and two wrong for one model (Agresti and Coull
  1998), one half for each of the four joint outcomes of two models (Agresti and Min 2005). Otherwise 0 right of 35
  gives the interval [0, 0].
- The percentile interval is moved by the bootstrap's own estimate of its bias (Efron and Tibshirani 1993, chapter 10).

Measured on 1,000 simulated test sets a scenario: these intervals hold the truth in 92.7 to 96.5 % of the sets, for
accuracy, macro-F1, priority macro-F1 and the paired gains alike; in 98 to 100 % where 35 photos are nearly all right or
all wrong, as exact binomial intervals do. Plain percentiles: 89.2 to 94.4 %, and 45 % where the true F1 is nearly 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import sparse, stats

from catlib.evaluation.outcomes import NO_ANSWER

LEVEL = 0.95
PSEUDO_SINGLE = 4.0  # pseudo photos in all, for the figures of one model
PSEUDO_PAIRED = 2.0  # and for the difference between two models
Statistic = Callable[[np.ndarray], np.ndarray]  # (rows, resamples) photo counts -> (resamples,)


@dataclass(frozen=True)
class Cells:
    """Photos of one outcome lumped together, so that a resample is a handful of counts.

    `true`: (m,) breed. `said`: (m, models) predicted breed or NO_ANSWER. `mark`: (m,) any further 0/1 outcome (top 3).
    `count`: (m,) photos. `pseudo`: (m,) share of the pseudo photos that falls on the row; sums to 1.
    """

    true: np.ndarray
    said: np.ndarray
    mark: np.ndarray
    count: np.ndarray
    pseudo: np.ndarray


def make_cells(true: np.ndarray, said: np.ndarray, mark: np.ndarray | None = None) -> Cells:
    """Distinct outcomes of n photos: `true` (n,), `said` (n,) or (n, models), `mark` (n,) 0/1.

    The pseudo photos of each breed that has photos are equally split over all right/wrong combinations of the models.
    """
    said = said.reshape(len(true), -1)
    models = said.shape[1]
    mark = np.zeros(len(true), dtype=int) if mark is None else mark.astype(int)
    present = np.unique(true)
    combinations = np.array(np.meshgrid(*[[True, False]] * models)).reshape(models, -1).T
    ghosts = [[breed, *np.where(right, breed, NO_ANSWER), int(right[0])] for breed in present for right in combinations]
    table = np.concatenate([np.column_stack([true, said, mark]), np.array(ghosts)])
    rows, where = np.unique(table, axis=0, return_inverse=True)
    where = where.reshape(-1)
    return Cells(
        true=rows[:, 0],
        said=rows[:, 1:-1],
        mark=rows[:, -1],
        count=np.bincount(where[: len(true)], minlength=len(rows)).astype(float),
        pseudo=np.bincount(where[len(true) :], minlength=len(rows)) / len(ghosts),
    )


def resample(stratum: np.ndarray, mass: np.ndarray, sizes: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Counts (rows, resamples) of a stratified bootstrap.

    `stratum` (rows,) and `mass` (rows,) say which breed a row belongs to and how likely it is within it; each column's
    counts of breed b sum to `sizes[b]`.
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros((len(stratum), resamples))
    for breed in np.unique(stratum):
        rows = np.flatnonzero((stratum == breed) & (mass > 0))
        size = int(sizes[breed])
        drawn = max(size - 1, 1)
        counts[rows] = rng.multinomial(drawn, mass[rows] / mass[rows].sum(), size=resamples).T * (size / drawn)
    return counts


def resample_cells(
    cells: Cells, resamples: int, seed: int, pseudo_photos: float, group: int | None = None
) -> np.ndarray:
    """Counts (rows, resamples) of the cells. `group`: over how many breeds the statistic averages (default: all
    present).

    A statistic of few breeds rests on few photos, so that each of its breeds gets a larger share of the pseudo photos.
    """
    present = len(np.unique(cells.true))
    sizes = np.bincount(cells.true, weights=cells.count).round().astype(int)
    mass = cells.count + pseudo_photos * cells.pseudo * present / (group or present)
    return resample(cells.true, mass, sizes, resamples, seed)


def sums(counts: np.ndarray, code: np.ndarray, k: int) -> np.ndarray:
    """(k, resamples): the counts added up by `code` (rows,); rows with a negative code are left out."""
    rows = np.flatnonzero(code >= 0)
    chooser = sparse.csr_array((np.ones(len(rows)), (code[rows], rows)), shape=(k, len(code)))
    return chooser @ counts


def f1_by_breed(cells: Cells, counts: np.ndarray, k: int, model: int = 0) -> np.ndarray:
    """F1 (k, resamples) of each breed, 2 TP / (support + times predicted); 0 where both are 0."""
    said = cells.said[:, model]
    right = np.where(said == cells.true, said, -1)
    total = sums(counts, cells.true, k) + sums(counts, said, k)
    return np.divide(2 * sums(counts, right, k), total, out=np.zeros_like(total), where=total > 0)


def interval(estimate: float, draws: np.ndarray, low: float = -np.inf, high: float = np.inf) -> list[float]:
    """The 95 % interval [low, high] from bootstrap draws: percentiles less the bootstrap's bias, within the figure's
    range."""
    tail = (1 - LEVEL) / 2
    ends = np.quantile(draws, [tail, 1 - tail]) - (draws.mean() - estimate)
    # A shift by the bias must not push the interval off the estimate that it is about.
    return [float(np.clip(min(ends[0], estimate), low, high)), float(np.clip(max(ends[1], estimate), low, high))]


def wilson(successes: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927), for figures that rest on one count."""
    if trials <= 0:
        return 0.0, 1.0
    z = stats.norm.ppf(1 - (1 - LEVEL) / 2)
    p, z2n = successes / trials, z * z / trials
    half = z * np.sqrt(p * (1 - p) / trials + z2n / (4 * trials)) / (1 + z2n)
    middle = (p + z2n / 2) / (1 + z2n)
    return float(max(middle - half, 0.0)), float(min(middle + half, 1.0))
