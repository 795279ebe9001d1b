"""Bootstrap intervals: stratified by true breed, by group, seeded, and measured to cover at their nominal rate.

Plain percentile intervals undercover on the few photos of rare breeds, and far more where photos come in groups (of one cat);
`benchmarks/interval_coverage.py` measures it, docs/evaluation.md has the table. What is added, and why:

- Whole groups are drawn within their breed (without groups every photo is one), scaled to the breed's photos.
- Of a breed's m groups m-1 are drawn (Rao and Wu 1988): else the variance is too small by (m-1)/m.
- Pseudo groups of the breed's mean size: two right and two wrong for one model (Agresti and Coull 1998), one half for each joint
  outcome of two models (Agresti and Min 2005). Otherwise 0 right of 35 gives the interval [0, 0].
- The percentiles are moved by the bootstrap's estimate of its bias (Efron and Tibshirani 1993, chapter 10).
- Grouped photos: widened by Student's over the normal quantile, with groups less breeds degrees of freedom (Korn and Graubard 1998).
- Where too few groups allow no interval there is none: see `widening`. Shares of one count: Wilson's, see `effective_share`.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse, stats

from catlib.evaluation.outcomes import NO_ANSWER

LEVEL = 0.95
Z = float(stats.norm.ppf(1 - (1 - LEVEL) / 2))
PSEUDO_SINGLE = 4.0  # pseudo groups in all, for the figures of one model
PSEUDO_PAIRED = 2.0  # and for the difference between two models
UNSEEN_VARIANCE = 0.2  # of a figure's variance, at most, from breeds of one group; 92 % coverage: (1.75 / 1.96)^2 = 0.8
FEWEST_FREEDOMS = 10  # groups less breeds where photos are grouped: 1.96 holds 92 % of Student's t with ten


@dataclass(frozen=True)
class Cells:
    """Photos of one outcome lumped together, and groups of the same outcomes, so that a resample is a handful of counts.

    `true`: (m,) breed. `said`: (m, models) predicted breed or NO_ANSWER. `mark`: (m,) any further 0/1 outcome (top 3).
    `pseudo`: (m,) share of the pseudo groups that falls on the row; sums to 1.
    `kinds`: (m, kinds) photos of each row in one group of the kind; the first m kinds are single photos.
    `groups`: (kinds,) groups of that kind.
    """

    true: np.ndarray
    said: np.ndarray
    mark: np.ndarray
    pseudo: np.ndarray
    kinds: sparse.csc_array
    groups: np.ndarray

    def by_breed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(kinds,) the breed whose photos a kind of group holds; (breeds,) photos and groups of each breed."""
        breed = self.true[self.kinds.indices[self.kinds.indptr[:-1]]]
        photos = np.bincount(breed, weights=self.kinds.sum(axis=0) * self.groups)
        return breed, photos, np.bincount(breed, weights=self.groups)

    def widening(self, weight: np.ndarray | None = None) -> float | None:
        """`widening` of a figure in which breeds have the `weight` (breeds,), by default their photos."""
        _, photos, groups = self.by_breed()
        return widening(photos, groups, photos if weight is None else weight[: len(photos)])


def make_cells(
    true: np.ndarray, said: np.ndarray, mark: np.ndarray | None = None, group: np.ndarray | None = None
) -> Cells:
    """Distinct outcomes of n photos: `true` (n,), `said` (n,) or (n, models), `mark` (n,) 0/1, `group` (n,) or each its own.

    The pseudo groups of each breed that has photos are equally split over all right/wrong combinations of the models.
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
    own, unit = where[: len(true)], units(true, group)
    alone = np.bincount(unit)[unit] == 1
    held: dict[int, list[int]] = {}
    for i in np.flatnonzero(~alone):
        held.setdefault(int(unit[i]), []).append(int(own[i]))
    several = sorted(Counter(tuple(sorted(cells)) for cells in held.values()).items())
    members = [*((i,) for i in range(len(rows))), *(cells for cells, _ in several)]
    columns = np.repeat(np.arange(len(members)), [len(cells) for cells in members])
    ones = (np.ones(len(columns)), (np.concatenate(members).astype(int), columns))
    single = np.bincount(own[alone], minlength=len(rows))
    return Cells(
        true=rows[:, 0],
        said=rows[:, 1:-1],
        mark=rows[:, -1],
        pseudo=np.bincount(where[len(true) :], minlength=len(rows)) / len(ghosts),
        kinds=sparse.csc_array(ones, shape=(len(rows), len(members))),
        groups=np.concatenate([single, [count for _, count in several]]).astype(float),
    )


def units(true: np.ndarray, group: np.ndarray | None) -> np.ndarray:
    """(n,) number of what is drawn: the photos of one breed and one group; breed by breed, in the order of the groups."""
    if group is None:
        group = np.arange(len(true))
    return np.unique(np.column_stack([true, group]), axis=0, return_inverse=True)[1].reshape(-1)


def resample(
    kinds: sparse.csc_array,
    breed: np.ndarray,
    mass: np.ndarray,
    groups: np.ndarray,
    photos: np.ndarray,
    resamples: int,
    seed: int,
) -> np.ndarray:
    """Counts (rows, resamples) of a bootstrap that draws groups within their breed.

    `kinds` (rows, kinds): the photos of each row in a group of the kind; `breed` and `mass` (kinds,): which breed it belongs to
    and how likely it is within it. Of a breed's `groups` one less is drawn; its counts are scaled to its `photos`.
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros((kinds.shape[0], resamples))
    for b in np.unique(breed):
        columns = np.flatnonzero((breed == b) & (mass > 0))
        times, share = max(int(groups[b]) - 1, 1), mass[columns] / mass[columns].sum()
        if len(columns) > 200 and np.ptp(share) == 0:  # many equal ones: an index a draw is ten times as fast
            which = rng.integers(len(columns), size=(resamples, times)) + np.arange(resamples)[:, None] * len(columns)
            drawn = np.bincount(which.ravel(), minlength=resamples * len(columns)).reshape(resamples, -1).T
        else:
            drawn = rng.multinomial(times, share, size=resamples).T
        part = kinds[:, columns]
        rows = np.unique(part.indices)
        sums = part.tocsr()[rows] @ drawn
        counts[rows] = sums * (photos[b] / sums.sum(axis=0))
    return counts


def resample_cells(
    cells: Cells, resamples: int, seed: int, pseudo_groups: float, some: np.ndarray | None = None, counts: Any = None
) -> np.ndarray:
    """Counts (rows, resamples) of the cells, for a statistic of all breeds. With `some` breeds, whose counts are drawn anew in the
    `counts` of all: as a statistic of few breeds rests on few photos, each of these gets a larger share of the pseudo groups.
    """
    (breed, photos, groups), m = cells.by_breed(), len(cells.true)
    size, present = (photos / np.maximum(groups, 1))[cells.true], len(np.unique(cells.true))
    pseudo = pseudo_groups * cells.pseudo * present / (present if some is None else len(some))
    mass, more = cells.groups.copy(), np.flatnonzero((size > 1) & (pseudo > 0))
    mass[:m] += np.where(size > 1, 0.0, pseudo)
    kinds = sparse.hstack([cells.kinds, sparse.diags_array(size, format="csc")[:, more]], format="csc")
    breed, mass = np.concatenate([breed, cells.true[more]]), np.concatenate([mass, pseudo[more]])
    if some is None:
        return resample(kinds, breed, mass, groups, photos, resamples, seed)
    kept, rows = np.isin(breed, some), np.isin(cells.true, some)
    counts[rows] = resample(kinds[:, kept][rows], breed[kept], mass[kept], groups, photos, resamples, seed + 1)
    return counts


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


def widening(photos: np.ndarray, groups: np.ndarray, weight: np.ndarray) -> float | None:
    """By what factor a figure's draws are spread, or None where too few groups allow no interval.

    `photos`, `groups` and `weight` (breeds,): of each breed, the weight being its share in the figure up to a factor. A
    breed of one group shows no variance. Were breeds alike, that of the figure would be in proportion to the sum of
    weight^2 / groups; at most UNSEEN_VARIANCE of it may come from such breeds. Single photos have no more to ask: the
    variance of right and wrong follows from the share. That between groups is estimated: FEWEST_FREEDOMS, and Student's t.
    """
    used = (weight > 0) & (groups > 0)
    photos, groups, share = photos[used], groups[used], weight[used] ** 2 / groups[used]
    if not used.any() or share[groups == 1].sum() > UNSEEN_VARIANCE * share.sum():
        return None
    if photos.sum() == groups.sum():
        return 1.0
    freedoms = groups.sum() - len(groups)
    return None if freedoms < FEWEST_FREEDOMS else float(stats.t.ppf(1 - (1 - LEVEL) / 2, freedoms)) / Z


def interval(
    estimate: float, draws: np.ndarray, low: float = -np.inf, high: float = np.inf, widen: float | None = 1.0
) -> list[float] | None:
    """The 95 % interval [low, high] from bootstrap draws: percentiles less the bootstrap's bias, within the figure's
    range; None where `widen` (see `widening`) is."""
    if widen is None:
        return None
    tail, middle = (1 - LEVEL) / 2, draws.mean()
    ends = np.quantile(draws, [tail, 1 - tail]) - (middle - estimate)
    if widen != 1.0:
        ends = estimate + widen * (ends - estimate)
    # A shift by the bias must not push the interval off the estimate that it is about.
    return [float(np.clip(min(ends[0], estimate), low, high)), float(np.clip(max(ends[1], estimate), low, high))]


def effective_share(values: np.ndarray, group: np.ndarray) -> float:
    """How many independent photos one of these is worth: 1 where every photo is a group of its own, else 1 / design effect.

    `values` and `group` (n,). The design effect is the variance of the mean between groups (Rao and Scott 1992, "A simple
    method for the analysis of clustered binary data") over that of independent photos, times (t/z)^2 for the degrees of
    freedom that it rests on (Korn and Graubard 1998). It is at least 1 and at most sum(size^2) / n, that of groups whose
    photos are all alike (Kish 1965), which is taken where all values are equal.
    """
    number = np.unique(group, return_inverse=True)[1].reshape(-1)
    size = np.bincount(number) if len(values) else np.ones(1)
    groups, n = len(size), len(values)
    if groups == n or n == 0:
        return 1.0
    alike, spread = float((size**2).sum() / n), float(((values - values.mean()) ** 2).sum())
    if groups < 2 or spread == 0:
        return 1 / alike
    between = float((np.bincount(number, weights=values - values.mean()) ** 2).sum()) * groups / (groups - 1)
    effect = between / spread * (float(stats.t.ppf(1 - (1 - LEVEL) / 2, groups - 1)) / Z) ** 2
    return 1 / min(max(effect, 1.0), alike)


def share(right: np.ndarray, group: np.ndarray) -> dict[str, Any]:
    """The share of `right` (n,) with Wilson's interval, for as many independent photos as the groups (n,) are worth."""
    worth, hits = effective_share(right.astype(float), group), int(right.sum())
    return {"value": hits / max(len(right), 1), "ci95": list(wilson(hits * worth, len(right) * worth))}


def wilson(successes: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927), for figures that rest on one count."""
    if trials <= 0:
        return 0.0, 1.0
    p, z2n = successes / trials, Z * Z / trials
    half = Z * np.sqrt(p * (1 - p) / trials + z2n / (4 * trials)) / (1 + z2n)
    middle = (p + z2n / 2) / (1 + z2n)
    return float(max(middle - half, 0.0)), float(min(middle + half, 1.0))
