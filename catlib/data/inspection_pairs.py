"""What notebook 01 says of near-duplicates: which pairs to show, and in words what was done about them."""

from collections import Counter
from collections.abc import Sequence

from catlib.data.audit import Finding
from catlib.data.check import Check
from catlib.data.duplicates import close_pairs
from catlib.data.splits import MOST_BITS

BEYOND = 4  # bits beyond the limit up to which pairs are looked for that were not joined
Pair = tuple[Finding, Finding, int]  # two photos and the number of bits in which their hashes differ


def pairs_sentence(pairs: Sequence[Pair], findings: Sequence[Finding], checked: Check) -> str:
    """What was found, and what was done about it."""
    groups = [n for n in Counter(finding.group for finding in findings if finding.group).values() if n > 1]
    if not groups:
        return f"No two photos are near-duplicates (hashes at most {checked.bits} bits apart)."
    by_id = ", or show one cat by its id" if any(finding.animal for finding in findings) else ""
    across = sum(a.breed != b.breed for a, b, _ in pairs)
    doubt = f" **{across} of the pairs carry two different breeds**: look at their labels." if across else ""
    return (
        f"{sum(groups):,} photos are alike (hashes at most {checked.bits} bits apart{by_id}): {_plural(len(groups), 'group')}, the "
        f"largest of {max(groups)} photos, each kept in one part.{doubt}"
    )


def one_of_each_group(pairs: Sequence[Pair]) -> list[Pair]:
    """The first pair of every group, then the others: what to show when there is no room for all."""
    seen: Counter[str] = Counter()
    turn = []
    for pair in pairs:
        turn.append(seen[pair[0].group])
        seen[pair[0].group] += 1
    return [pair for _, pair in sorted(zip(turn, pairs, strict=True), key=lambda item: item[0])]


def not_joined(findings: Sequence[Finding], bits: int, most: int = 3) -> list[Pair]:
    """The closest pairs that are beyond the limit: a reader sees whether the limit is drawn in the right place."""
    return [pair for pair in close_pairs(findings, min(MOST_BITS, bits + BEYOND)) if pair[2] > bits][:most]


def _plural(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
