"""What notebook 01 says in figures and sentences: how even, how clean and how measurable a split is."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from catlib.data.audit import Finding
from catlib.data.check import Check
from catlib.data.dataset import PARTS, Dataset

SUPPOSED_F1 = 0.7  # the interval of an F1 depends on the F1; this one is in the middle of what is hoped for
TOO_WIDE = 0.4  # an F1 known no better than ± 20 points does not tell a good model from a middling one
UNUSUAL_ASPECT = 1.6  # longer side over shorter; camera formats end at 16 : 9, most photos at 3 : 2
DRAWS = 20_000
Rows = list[list[str]]


@cache
def f1_interval(support: int, f1: float = SUPPOSED_F1) -> tuple[float, float]:
    """Where 95 % of the measured F1 values would fall for a breed with `support` test photos and a true F1 of `f1`.

    Simulated for a model whose precision and recall are both `f1`: true positives are binomial(support, f1), false positives
    Poisson with mean support · (1 - f1), F1 = 2 TP / (TP + FP + support).
    """
    if support == 0:
        return 0.0, 1.0
    rng = np.random.default_rng(support)
    hits = rng.binomial(support, f1, DRAWS)
    false = rng.poisson(support * (1 - f1), DRAWS)
    low, high = np.quantile(2 * hits / (hits + false + support), [0.025, 0.975])
    return float(low), float(high)


def f1_width(support: int) -> float:
    """Width of that interval, from 0 to 1."""
    low, high = f1_interval(support)
    return high - low


def macro_half_width(supports: Sequence[int]) -> float:
    """Half the width of the 95 % interval of the mean F1 over breeds, their errors taken as independent."""
    return float(np.sqrt(sum((f1_width(n) / 2) ** 2 for n in supports)) / len(supports)) if supports else 1.0


def counts(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Photos by breed and part, the breed with the most photos first."""
    by_part = {part: Counter(sample.breed for sample in dataset.part(part)) for part in PARTS}
    table = {breed: {part: by_part[part][breed] for part in PARTS} for breed in dataset.breeds}
    return dict(sorted(table.items(), key=lambda item: (-sum(item[1].values()), item[0])))


def counts_rows(dataset: Dataset) -> Rows:
    """A table of the counts with the width of the F1 interval that each breed's test photos allow; ★: priority."""
    rows = [["breed", *PARTS, "all", "95 % interval of a true F1 of 70 %"]]
    for breed, n in counts(dataset).items():
        low, high = f1_interval(n["test"])
        star = "★ " if breed in dataset.priority_breeds else ""
        numbers = [str(n[part]) for part in PARTS]
        rows.append([star + breed, *numbers, str(sum(n.values())), f"{100 * low:.0f} to {100 * high:.0f} %"])
    return rows


def left_out_rows(findings: Sequence[Finding], missing: int = 0) -> Rows:
    """How many files each reason has left out, with an example."""
    reasons: dict[str, list[Finding]] = {}
    for finding in findings:
        if not finding.kept:
            reasons.setdefault(finding.verdict, []).append(finding)
    rows = [["reason", "files", "for example"]]
    for reason, files in sorted(reasons.items(), key=lambda item: -len(item[1])):
        rows.append([reason, f"{len(files):,}", f"{files[0].image}: {files[0].detail or reason}"])
    if missing:
        rows.append(["listed, but not there", f"{missing:,}", "each is named in dataset.json"])
    return rows


def remark_rows(findings: Sequence[Finding]) -> Rows:
    """What is unusual among the kept photos and is dealt with when they are opened."""
    seen: Counter[str] = Counter()
    example: dict[str, str] = {}
    for finding in findings:
        for remark in filter(None, finding.remarks.split(", ") if finding.kept else ()):
            remark = remark.partition(" (")[0]
            seen[remark] += 1
            example.setdefault(remark, finding.image)
    return [["remark", "photos", "for example"], *([name, f"{n:,}", example[name]] for name, n in seen.most_common())]


def worst_files(findings: Sequence[Finding], most: int = 8) -> list[tuple[Finding, str]]:
    """The kept photos that a model will see least of, with the reason: the smallest, and the longest beside their width."""
    kept = [finding for finding in findings if finding.kept and finding.width]
    usual = np.median([min(f.width, f.height) for f in kept]) if kept else 0
    small = [f for f in kept if min(f.width, f.height) < usual]  # where all are of one size, none is worth showing
    small = sorted(small, key=lambda f: (min(f.width, f.height), f.image))[: most // 2]
    long = sorted((f for f in kept if _aspect(f) > UNUSUAL_ASPECT), key=lambda f: (-_aspect(f), f.image))
    chosen = [(f, f"{f.width} × {f.height} pixels") for f in small]
    taken = {f.image for f in small}
    chosen += [(f, f"sides {_aspect(f):.1f} : 1") for f in long if f.image not in taken][: most - len(chosen)]
    return chosen


def summary(dataset: Dataset, findings: Sequence[Finding]) -> str:
    """Where the photos come from and what became of the names of their breeds, a line each."""
    card = dataset.card
    lines = [f"{len(findings):,} files in `{dataset.image_root}`, layout `{card['source']}`."]
    lines += [f"{note[0].upper()}{note[1:]}." for note in card["notes"]]
    if mapped := card["names_mapped"]:
        lines.append(f"{len(mapped)} names were mapped to the list of breeds, for example {'; '.join(mapped[:6])}.")
    if unknown := card["unknown_breeds"]:
        lines.append(f"Not in the list of breeds and kept as they are: {', '.join(unknown)}.")
    return "\n".join(f"- {line}" for line in lines)


def counts_sentence(dataset: Dataset) -> str:
    """How uneven the breeds are in training."""
    train = {breed: n["train"] for breed, n in counts(dataset).items()}
    most, least = max(train, key=train.get), min(train, key=train.get)
    total = ", ".join(
        f"{len(dataset.part(part)):,} {name}"
        for part, name in zip(PARTS, ("training", "validation", "test"), strict=False)
    )
    return (
        f"{len(dataset.breeds)} breeds, {total} photos. {most} has {train[most]} training photos, {least} {train[least]}: "
        f"**{train[most] / max(1, train[least]):.1f} to 1**. A photo's part is drawn from its content, so that it stays when photos are "
        "added; the shares of a breed therefore differ a little from those asked for."
    )


def sizes_sentence(findings: Sequence[Finding]) -> str:
    """Typical size, and how many photos are smaller than what a vision tower reads."""
    kept = [f for f in findings if f.kept and f.width]
    sides = np.array([min(f.width, f.height) for f in kept])
    wide = np.mean([_aspect(f) > 2 for f in kept])
    return (
        f"Half of the photos have a shorter side of at most {np.median(sides):.0f} pixels; {100 * np.mean(sides < 336):.0f} % are below "
        f"the 336 pixels that LLaVA-1.5's tower reads, so they are enlarged. {100 * wide:.1f} % are more than twice as long as wide."
    )


def width_sentence(dataset: Dataset) -> str:
    """Which breeds are too small to measure."""
    small = too_small(dataset)
    if not small:
        support = {breed: n["test"] for breed, n in counts(dataset).items()}
        worst = min(support, key=support.get)
        low, high = f1_interval(support[worst])
        return (
            f"**Every breed can be measured** within ± {100 * TOO_WIDE / 2:.0f} points of F1. The least certain is {worst} with "
            f"{support[worst]} test photos: a true 70 % is read as {100 * low:.0f} to {100 * high:.0f} %."
        )
    return (
        f"**{len(small)} of {len(dataset.breeds)} breeds {_are(small)} too small to measure alone** (interval wider than "
        f"{100 * TOO_WIDE:.0f} points). Their test photos: {', '.join(f'{breed} {n}' for breed, n in small.items())}."
    )


def too_small(dataset: Dataset) -> dict[str, int]:
    """Test photos of the breeds whose F1 interval is wider than TOO_WIDE, the smallest first."""
    support = {breed: n["test"] for breed, n in counts(dataset).items() if f1_width(n["test"]) > TOO_WIDE}
    return dict(sorted(support.items(), key=lambda item: item[1]))


def conclusion(dataset: Dataset, findings: Sequence[Finding], checked: Check) -> str:
    """Can this data be trusted, and what will hurt: Markdown, every word of it computed."""
    lines = [_trust(checked), _clean(findings, dataset.card)]
    train = {breed: n["train"] for breed, n in counts(dataset).items()}
    ratio = max(train.values()) / max(1, min(train.values()))
    if ratio > 3:
        lines.append(
            f"**Imbalance will hurt**: the most frequent breed has {ratio:.0f} times the training photos of the rarest. Train with "
            "`balance=sqrt`, and judge by macro-F1 rather than by accuracy."
        )
    priority = {breed: train[breed] for breed in dataset.priority_breeds}
    if priority:
        rarest = min(priority, key=priority.get)
        half = macro_half_width([counts(dataset)[breed]["test"] for breed in priority])
        lines.append(
            f"**Priority breeds**: {len(priority)}, with {sum(priority.values())} training photos together ({rarest} has "
            f"{priority[rarest]}). Their macro-F1 can be known within about ± {100 * half:.0f} points."
        )
    else:
        lines.append("**Priority breeds**: none in this data.")
    lines.append(_measurable(dataset))
    if remarks := dataset.card.get("remarks", ()):
        lines.append(f"**Small breeds** got less than was asked for: {'; '.join(remarks)}.")
    return "\n".join(f"- {line}" for line in lines)


def markdown_table(rows: Rows) -> str:
    """Rows of text, the first of them the heading, as a Markdown table; numbers stand to the right."""
    if len(rows) < 2:
        return "*none*"
    clean = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    numeric = [all(row[i].replace(",", "").isdigit() for row in rows[1:]) for i in range(len(rows[0]))]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join(f"| {' | '.join(row)} |" for row in [clean[0], rule, *clean[1:]])


def _measurable(dataset: Dataset) -> str:
    """The sentence on widths, shorter where many breeds are too small."""
    small = too_small(dataset)
    rare = [breed for breed in dataset.priority_breeds if breed in small]
    if not small:
        return width_sentence(dataset)
    among = (
        f", among them {len(rare)} of the {len(dataset.priority_breeds)} priority breeds: {', '.join(rare)}"
        if rare
        else ""
    )
    return (
        f"**{len(small)} of {len(dataset.breeds)} breeds {_are(small)} too small to measure alone** ({max(small.values())} test photos or "
        f"fewer){among}. Add photos, or judge by averages over breeds."
    )


def _are(things: Mapping[str, int]) -> str:
    return "is" if len(things) == 1 else "are"


def _trust(checked: Check) -> str:
    if checked.problems:
        return f"**The split cannot be trusted**: {len(checked.problems)} problems, the first: {checked.problems[0]}"
    return (
        f"**The split can be trusted**: all {checked.photos:,} photos were hashed anew, and none of the {checked.groups:,} groups of "
        f"near-duplicates (at most {checked.bits} of 64 bits apart) is in two parts."
    )


def _clean(findings: Sequence[Finding], card: Mapping[str, object]) -> str:
    reasons = Counter(finding.verdict for finding in findings if not finding.kept)
    listed = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    text = f"**{sum(reasons.values())} of {len(findings):,} files are left out**{': ' + listed if listed else ''}."
    if conflicts := reasons["two breeds"]:
        text += f" {conflicts} files show one photo under two breeds: somebody has to decide which label is right."
    missing = card.get("missing", {}).get("count", 0)
    return text + (f" {missing:,} photos that the source lists are not there." if missing else "")


def _aspect(finding: Finding) -> float:
    return max(finding.width, finding.height) / max(1, min(finding.width, finding.height))
