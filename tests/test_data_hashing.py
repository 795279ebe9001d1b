"""Near-duplicates: the hash is the published one, and the banded search finds exactly what an exhaustive one finds."""

import os
from pathlib import Path

import numpy as np
import pytest
from photo_makers import picture
from PIL import ImageOps

from catlib.data.audit import audit
from catlib.data.duplicates import group_labels, near_pairs, perceptual_hashes
from catlib.data.findings import Finding


def plain_hash(grey):
    """The hash of a photo, without that of its mirror image."""
    both = perceptual_hashes(grey)
    return both and both[0]


def exhaustive(hashes: np.ndarray, bits: int) -> set[tuple[int, int, int]]:
    i, j = np.triu_indices(len(hashes), 1)
    distance = np.bitwise_count(hashes[i] ^ hashes[j])
    near = distance <= bits
    return {*zip(i[near].tolist(), j[near].tolist(), distance[near].tolist(), strict=True)}


def found(hashes: np.ndarray, bits: int) -> set[tuple[int, int, int]]:
    pairs, distance = near_pairs(hashes, bits)
    assert len(pairs) == len({tuple(pair) for pair in pairs.tolist()}), "a pair was reported twice"
    return {(a, b, d) for (a, b), d in zip(pairs.tolist(), distance.tolist(), strict=True)}


@pytest.mark.parametrize("bits", [0, 1, 4, 6, 9, 16])
def test_every_pair_of_an_exhaustive_search_is_found(bits):
    rng = np.random.default_rng(bits)
    hashes = rng.integers(0, 2**64, 400, dtype=np.uint64)
    for _ in range(600):  # copies with a few bits changed, at and beyond the threshold, and equal ones
        copy = hashes[rng.integers(len(hashes))]
        for bit in rng.choice(64, rng.integers(0, bits + 4), replace=False):
            copy ^= np.uint64(1) << np.uint64(bit)
        hashes = np.append(hashes, copy)
    wanted = exhaustive(hashes, bits)
    assert len(wanted) > 50
    assert found(hashes, bits) == wanted


def test_groups_are_the_chains_of_pairs():
    hashes = np.array([0, 0b1, 0b111, 0, 2**63 - 1], dtype=np.uint64)
    labels = group_labels(hashes, 2)
    assert len({*labels[:4]}) == 1 and labels[4] != labels[0]
    assert near_pairs(np.array([], dtype=np.uint64), 6)[0].shape == (0, 2)


def test_the_hash_is_imagehash_phash():
    imagehash = pytest.importorskip("imagehash")
    for number in range(40):
        photo = picture(number, (200, 150)).convert("L")
        assert f"{plain_hash(photo):016x}" == str(imagehash.phash(photo))


def test_a_mirrored_copy_is_in_the_group_of_its_original():
    photos = [picture(number, (320, 240)).convert("L") for number in range(20)]
    for photo in photos:
        plain, mirrored = perceptual_hashes(photo)
        assert (plain_hash(ImageOps.mirror(photo)) ^ mirrored).bit_count() <= 1 and (plain ^ mirrored).bit_count() > 6
    both = np.array([perceptual_hashes(p) for p in (*photos, *map(ImageOps.mirror, photos[:5]))], dtype=np.uint64)
    labels = group_labels(both[:, 0], 6, both[:, 1]).tolist()
    assert labels[20:] == labels[:5] and len(set(labels)) == 20
    assert len(set(group_labels(both[:, 0], 6).tolist())) == 25


def test_a_copy_is_near_and_a_flat_picture_has_no_hash():
    photo = picture(1, (320, 240))
    a, b = plain_hash(photo.convert("L")), plain_hash(photo.resize((160, 120)).convert("L"))
    assert (a ^ b).bit_count() <= 6
    assert plain_hash(picture(1).convert("L").point(lambda _: 90)) is None


@pytest.mark.slow
def test_real_photos_exhaustively():
    folder = os.environ.get("CATLIB_PHOTOS")
    if not folder:
        pytest.skip("CATLIB_PHOTOS is not set")
    photos = sorted(Path(folder).rglob("*.jpg"))
    findings = audit(Path(folder), [Finding(str(p.relative_to(folder)), "cat") for p in photos], 32)
    hashes = np.array([int(f.phash, 16) for f in findings if f.phash], dtype=np.uint64)
    for bits in (6, 12):
        assert found(hashes, bits) == exhaustive(hashes, bits)
