"""Verdicts that concern several photos: copies, one photo under two breeds, near-duplicates, leaks from an official test."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np

from catlib.data.findings import Finding
from catlib.data.hashing import components, group_labels, near_pairs

ALIKE = 20
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
