"""Copies and near-duplicates: perceptual hashes, the groups that they make, and the verdicts that concern several photos.

The hash is that of `imagehash.phash` (a test holds the two equal), from the greyscale that is decoded already and as an integer
that numpy compares in bulk. Why 6 bits are the default: on the Oxford cats every pair seen at 0, 2 and 6 bits is the same cat in
the same scene, none lies at 8, and the first pair of two different cats comes at 10.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from catlib.data.findings import Finding

HASH_BITS = 64
SIDE = 32  # pixels of the square that is transformed
FLAT = 2.0  # grey levels: a photo with less contrast has no structure to compare, its hash would be noise
_DCT = np.cos(
    np.pi * np.arange(8)[:, None] * (2 * np.arange(SIDE) + 1) / (2 * SIDE)
)  # the 8 lowest frequencies of DCT-II
_MIRROR = np.where(np.arange(8) % 2, -1, 1)
ALIKE = 20  # of photos with the same hash so many are shown
STRONGEST = ("test", "val", "train", "")  # of near-duplicates with different official parts, the first keeps its photos


def judge_copies(findings: Sequence[Finding]) -> list[Finding]:
    """Of files with the same bytes one is kept; when they stand under different breeds none is, as no one knows which is right."""
    copies = defaultdict(list)
    for i, finding in enumerate(findings):
        if finding.kept:
            copies[finding.sha256].append(i)
    judged = list(findings)
    for same in copies.values():
        breeds = sorted({findings[i].breed for i in same})
        first = min(same, key=lambda i: (STRONGEST.index(findings[i].official), findings[i].image))
        for i in same:
            if len(breeds) > 1:
                others = ", ".join([findings[j].image for j in same if j != i][:ALIKE])
                detail = f"the same bytes as {others} ({' / '.join(breeds)})"
                judged[i] = replace(findings[i], verdict="two breeds", detail=detail)
            elif i != first:
                detail = f"the same bytes as {findings[first].image}"
                judged[i] = replace(findings[i], verdict="duplicate", detail=detail)
    return judged


def group_photos(
    findings: Sequence[Finding], bits: int, keys: Sequence[Collection[object]], similar: Iterable[tuple[str, str]]
) -> list[Finding]:
    """Give every kept photo the name of its group, and leave out what an official part would leak.

    One group are near-duplicates, photos of the same cat (`animal`), photos with one of their `keys` in common, the pairs of
    SHA-256 in `similar`, and chains of all these. It is named after the smallest SHA-256 in it. Where photos of an official test
    (or validation) part have a relative elsewhere, that one is left out: the official part is neither changed nor trained on.
    """
    kept = [i for i, finding in enumerate(findings) if finding.kept]
    hashed = [i for i in kept if findings[i].phash]
    labels = labels_of([findings[i] for i in hashed], bits).tolist()
    # whatever joins photos is a node too, behind those of the photos, so that chains over several reasons are found
    why: list[tuple[int, object]] = [*zip(hashed, labels, strict=True), *((i, key) for i in kept for key in keys[i])]
    why += [(i, ("animal", findings[i].animal)) for i in kept if findings[i].animal]
    place = {findings[i].sha256: i for i in kept}
    why += [(place[photo], pair) for pair in similar if set(pair) <= place.keys() for photo in pair]
    nodes: dict[object, int] = {}
    edges = [(i, nodes.setdefault(key, len(findings) + len(nodes))) for i, key in why]
    members: dict[int, list[int]] = defaultdict(list)
    group_of = components(len(findings) + len(nodes), np.array(edges)).tolist()
    for i in kept:
        members[group_of[i]].append(i)
    judged = list(findings)
    for together in members.values():
        _judge_group(judged, together)
    return judged


def _judge_group(judged: list[Finding], members: list[int]) -> None:
    photos = [judged[i] for i in members]
    name, breeds = min(photo.sha256 for photo in photos)[:16], sorted({photo.breed for photo in photos})
    strongest = min((photo.official for photo in photos), key=STRONGEST.index)
    twin = next(photo.image for photo in photos if photo.official == strongest)
    for i, finding in zip(members, photos, strict=True):
        finding = replace(finding, group=name)
        if len(breeds) > 1:
            remark = f"near-duplicate or same cat under another breed ({' / '.join(breeds)})"
            finding = replace(finding, remarks=", ".join(filter(None, (finding.remarks, remark))))
        if finding.official != strongest and strongest in ("test", "val"):
            finding = replace(finding, verdict=f"near-duplicate of the official {strongest} part", detail=f"of {twin}")
        judged[i] = finding


def labels_of(hashed: Sequence[Finding], bits: int) -> np.ndarray:
    """The number (n,) of each photo's group of near-duplicates, mirror images among them; all photos have their hashes.
    Of a mirror image half as many bits are asked: twice the comparisons would else find twice the chance likenesses,
    and a mirrored copy is within 2 bits."""
    plain, mirrored = _hashes(hashed)
    near, turned = group_labels(plain, bits), group_labels(plain, bits // 2, mirrored)
    return components(2 * len(hashed), np.stack([near, len(hashed) + turned], 1))[near]


def close_pairs(findings: Iterable[Finding], bits: int) -> list[tuple[Finding, Finding, int]]:
    """Pairs of kept photos whose hashes differ in at most `bits` bits, with the number of bits, the closest first. For
    looking at: of more than ALIKE photos with the same hash only the first are paired, as n of them make n²/2 pairs."""
    hashed: list[Finding] = []
    seen: Counter[str] = Counter()
    for finding in findings:
        if finding.group and finding.phash and seen[finding.phash] < ALIKE:
            seen[finding.phash] += 1
            hashed.append(finding)
    plain, mirrored = _hashes(hashed)
    closest: dict[tuple[int, int], int] = {}
    for values, most in ((plain, bits), (np.concatenate([plain, mirrored]), bits // 2)):
        pairs, gaps = near_pairs(values, most)
        for (a, b), gap in zip(np.sort(pairs % max(len(hashed), 1), axis=1).tolist(), gaps.tolist(), strict=True):
            if a != b:  # a symmetrical photo is near its own mirror image
                closest[a, b] = min(gap, closest.get((a, b), gap))
    found = [(hashed[a], hashed[b], gap) for (a, b), gap in closest.items()]
    return sorted(found, key=lambda pair: (pair[2], pair[0].image, pair[1].image))


def _hashes(photos: Sequence[Finding]) -> np.ndarray:
    """The hashes of photos and of their mirror images (2, n)."""
    return np.array([[int(f.phash, 16) for f in photos], [int(f.mirrored, 16) for f in photos]], dtype=np.uint64)


def perceptual_hashes(grey: Image.Image) -> tuple[int, int] | None:
    """The 64-bit pHash of a photo in mode L and that of the photo mirrored left to right; None when it is flat. Signs
    of the 8 x 8 lowest DCT frequencies against their median (N. Krawetz, "Looks Like It", 2011). Mirroring turns the
    sign of the odd horizontal frequencies, so the second hash needs no second transform."""
    pixels = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    if pixels.std() < FLAT:
        return None
    low = _DCT @ pixels @ _DCT.T
    return _signs(low), _signs(low * _MIRROR)


def near_pairs(hashes: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs i < j of hashes (uint64, shape (n,)) that differ in at most `bits` bits: pairs (p, 2), distances (p,).
    Exact, not approximate: of `bits` + 1 bands of the hash, at least one is equal in two hashes that differ in at most
    `bits` bits (pigeonhole), so only photos that share a band are compared. Equal hashes are compared once."""
    distinct, which = np.unique(np.asarray(hashes, dtype=np.uint64), return_inverse=True)
    close = _close_values(distinct, bits)
    same = np.repeat(np.arange(len(distinct))[:, None], 2, axis=1)
    values = pd.DataFrame(np.concatenate([same, close]), columns=["a", "b"])
    photos = pd.DataFrame({"value": which, "photo": np.arange(len(which))})
    both = values.merge(photos, left_on="a", right_on="value").merge(photos, left_on="b", right_on="value")
    both = both[(both["a"] != both["b"]) | (both["photo_x"] < both["photo_y"])]
    pairs = np.sort(both[["photo_x", "photo_y"]].to_numpy(np.int64), axis=1)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return pairs, np.bitwise_count(distinct[which[pairs[:, 0]]] ^ distinct[which[pairs[:, 1]]]).astype(np.int64)


def group_labels(hashes: np.ndarray, bits: int, mirrored: np.ndarray | None = None) -> np.ndarray:
    """The group number (n,) of each photo: photos joined by a chain of near-duplicates are one group. With the hashes
    of the mirrored photos, (n,) too, a photo and its mirror image are near-duplicates as well."""
    n = len(hashes)
    values = np.asarray(hashes if mirrored is None else np.concatenate([hashes, mirrored]), dtype=np.uint64)
    distinct, which = np.unique(values, return_inverse=True)
    edges = _close_values(distinct, bits)
    if mirrored is not None:
        edges = np.concatenate([edges, np.stack([which[:n], which[n:]], 1)])
    return components(len(distinct), edges)[which[:n]]


def components(n: int, edges: np.ndarray) -> np.ndarray:
    """The number (n,) of the connected component of each of n nodes; `edges`: pairs of nodes (m, 2)."""
    edges = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(n, n))
    return connected_components(graph, directed=False)[1]


def _close_values(distinct: np.ndarray, bits: int) -> np.ndarray:
    """Pairs (p, 2) of different hash values at most `bits` apart."""
    found = [np.empty((0, 2), dtype=np.int64)]
    edges = np.linspace(0, HASH_BITS, bits + 2).astype(int)
    for low, high in itertools.pairwise(edges):
        band = (distinct >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        band, values = band[order], distinct[order]
        alive = np.arange(len(order))
        for step in range(1, len(order)):  # as many steps as the fullest bucket has photos
            alive = alive[alive + step < len(order)]
            alive = alive[band[alive] == band[alive + step]]
            if not len(alive):
                break
            near = alive[np.bitwise_count(values[alive] ^ values[alive + step]) <= bits]
            found.append(np.sort(np.stack((order[near], order[near + step]), 1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _signs(low: np.ndarray) -> int:
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")
