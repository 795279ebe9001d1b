"""How near each part is to training: by the numbers in names, by perceptual hash and in the space of frozen features.

The yardstick are training photos against the training photos that have nothing to do with them (another group, no near number):
so far away would the photo of a new cat be. A test that is nearer than that flatters every model.
"""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu

from catlib.data.cats import run_of
from catlib.data.findings import Finding

UNRELATED = "unrelated training photos"
APART = 5  # numbers; photos of one run that are nearer than that are not taken for unrelated
MOST = 3000  # photos of a breed and part that are looked at, evenly chosen; against all training photos
CELLS = 2_000_000  # distances that are computed at a time
BESIDE = 0.2  # share of a part with a training photo's number beside its own, from where on it is said
NEARER, SURE = 0.6, 0.001  # chance that a photo is nearer than an unrelated one (0.5: the same), and its p-value
MEASURES = {"bits": "perceptual hash, bits", "distance": "features, 1 - cosine"}


def nearness(findings: Sequence[Finding], features: Mapping[str, np.ndarray] | None = None) -> pd.DataFrame:
    """For each photo (index: image) the nearest training photo of its breed: a frame with breed, part, gap, bits,
    distance. Training photos have the part UNRELATED and the distance to the nearest one of those. `gap`: numbers
    between, infinite where the two are in no run; `distance`: NaN without `features` (SHA-256 to vector)."""
    kept = [finding for finding in findings if finding.kept and finding.part]
    breeds, parts = (np.array([getattr(f, name) for f in kept], dtype=object) for name in ("breed", "part"))
    runs = [run_of(f.name) for f in kept]
    series = [f"{PurePosixPath(f.name).parent}/{run[0]}" if run else f.name for f, run in zip(kept, runs, strict=True)]
    number = np.array([run[1] if run else 0 for run in runs], dtype=np.float64)
    group, run_code = (pd.factorize(pd.Series(names))[0] for names in ([f.group for f in kept], series))
    hashes = np.array([int(f.phash or "0", 16) for f in kept], dtype=np.uint64)
    hashed = np.array([bool(f.phash) for f in kept])
    vectors = None
    if features and all(f.sha256 in features for f in kept):
        vectors = np.stack([features[f.sha256] for f in kept]).astype(np.float32)
        vectors = (vectors - vectors.mean(0)) / np.maximum(vectors.std(0), 1e-6)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    nearest, bits, distance = np.full((3, len(kept)), np.inf)
    seen = np.zeros(len(kept), dtype=bool)
    for breed, part in sorted({(f.breed, f.part) for f in kept}):
        train, index = (np.flatnonzero((breeds == breed) & (parts == one)) for one in ("train", part))
        chosen = index[np.unique(np.linspace(0, len(index) - 1, min(MOST, len(index))).astype(int))]
        for i in np.array_split(chosen, 1 + len(chosen) * len(train) // CELLS) if len(train) else ():
            gap = np.where(run_code[i, None] == run_code[train], np.abs(number[i, None] - number[train]), np.inf)
            related = (part == "train") & ((group[i, None] == group[train]) | (gap <= APART))
            nearest[i] = np.where(related, np.inf, gap).min(1)
            apart = np.bitwise_count(hashes[i, None] ^ hashes[train]).astype(np.float64)
            bits[i] = np.where(related | ~hashed[i, None] | ~hashed[train], np.inf, apart).min(1)
            if vectors is not None:
                distance[i] = np.where(related, np.inf, 1 - vectors[i] @ vectors[train].T).min(1)
            seen[i] = True
    names = np.where(parts == "train", UNRELATED, parts)
    images = pd.Index([f.image for f in kept], name="image")
    found = {"breed": breeds, "part": names, "gap": nearest, "bits": bits, "distance": distance}
    return pd.DataFrame(found, index=images).replace({"bits": np.inf, "distance": np.inf}, np.nan)[seen]


def by_part(near: pd.DataFrame) -> pd.DataFrame:
    """A row for each part: its photos, the share beside a training photo's number, the median distances, and how often a photo
    is nearer to training than an unrelated training photo is to another (50 %: as far as a new cat's photo)."""
    rows = {}
    for part in ("test", "val", UNRELATED):
        mine = near[near["part"] == part]
        row = {"photos": len(mine), "number beside a training photo's": (mine["gap"] <= 1).mean()}
        for name, title in MEASURES.items():
            if near[name].notna().any():
                row |= {title: mine[name].median(), f"nearer by {title.split(',')[0]}": _nearer(near, part, name)[0]}
        if len(mine):
            rows[part] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def warnings_of(near: pd.DataFrame) -> list[str]:
    """What makes the test (or validation) look better than photos of new cats would."""
    said = []
    for part in ("test", "val"):
        mine = near[near["part"] == part]
        beside = int((mine["gap"] <= 1).sum())
        if beside > BESIDE * len(mine):
            said.append(
                f"{beside:,} of {len(mine):,} {part} photos stand beside a training photo by the number in their names, so they "
                "may show the same cat on the same day: split by blocks with group_by=numbers"
            )
        for name, title in MEASURES.items():
            nearer, p = _nearer(near, part, name)
            if nearer >= NEARER and p < SURE:
                by = f"by {title.split(',')[0]}: {100 * nearer:.0f} % of comparisons (50 % expected)"
                said.append(f"the {part} part is nearer to training than unrelated photos are, {by}")
    return said


def _nearer(near: pd.DataFrame, part: str, name: str) -> tuple[float, float]:
    """How often a photo of the part is nearer than an unrelated one, ties half, and the one-sided p-value (Mann and Whitney 1947)."""
    mine, others = (near.loc[near["part"] == one, name].dropna() for one in (part, UNRELATED))
    if mine.empty or others.empty:
        return float("nan"), 1.0
    test = mannwhitneyu(mine, others, alternative="less")
    return 1 - float(test.statistic) / (len(mine) * len(others)), float(test.pvalue)
