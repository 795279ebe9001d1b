"""Near-duplicates: a 64-bit perceptual hash of each photo, and every pair of photos whose hashes are close.

The hash is that of `imagehash.phash` (a test holds the two equal), from the greyscale that is decoded already and as an integer
that numpy compares in bulk. Why 6 bits are the default: on the Oxford cats every pair seen at 0, 2 and 6 bits is the same cat in
the same scene, none lies at 8, and the first pair of two different cats comes at 10.
"""

import itertools

import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

HASH_BITS = 64
SIDE = 32  # pixels of the square that is transformed
FLAT = 2.0  # grey levels: a photo with less contrast has no structure to compare, its hash would be noise
_N = np.arange(SIDE)
_DCT = np.cos(np.pi * np.arange(8)[:, None] * (2 * _N + 1) / (2 * SIDE))  # the 8 lowest frequencies of DCT-II
_MIRROR = np.where(np.arange(8) % 2, -1, 1)


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
