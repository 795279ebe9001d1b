"""The tables of notebook 01: what the data are, how clean, how even, and what their test can tell."""

from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
import pandas as pd

from catlib.data.check import Check
from catlib.data.conversations import questions_of
from catlib.data.dataset import Dataset
from catlib.data.findings import Finding
from catlib.data.nearness import by_part, warnings_of
from catlib.data.records import PARTS
from catlib.figures import breed_label

SUPPOSED_F1 = 0.7  # the interval of an F1 depends on the F1; this one is in the middle of what is hoped for
TOO_WIDE = 0.4  # an F1 known no better than ± 20 points does not tell a good model from a middling one
UNEVEN = 3  # times the training photos of the rarest breed, from where on sampling should be balanced
SHOWN = 8  # breeds that a cell names
DRAWS = 20_000
NOT_MEASURABLE = "not measurable"  # of a breed without a test photo


@cache
def f1_interval(support: int, f1: float = SUPPOSED_F1) -> tuple[float, float]:
    """Where 95 % of the measured F1 values would fall for a breed with `support` test photos and a true F1 of `f1`.
    Simulated for a model whose precision and recall are both `f1`: true positives are binomial(support, f1), false
    positives Poisson with mean support · (1 - f1), F1 = 2 TP / (TP + FP + support)."""
    if support == 0:
        return 0.0, 1.0
    rng = np.random.default_rng(support)
    hits, false = rng.binomial(support, f1, DRAWS), rng.poisson(support * (1 - f1), DRAWS)
    low, high = np.quantile(2 * hits / (hits + false + support), [0.025, 0.975])
    return float(low), float(high)


def f1_width(support: int) -> float:
    """Width of that interval, from 0 to 1."""
    low, high = f1_interval(support)
    return high - low


def macro_half_width(supports: Sequence[int]) -> float:
    """Half the width of the 95 % interval of the mean F1 over breeds, their errors taken as independent."""
    return float(np.sqrt(sum((f1_width(n) / 2) ** 2 for n in supports)) / len(supports)) if supports else 1.0


def by_breed(dataset: Dataset) -> pd.DataFrame:
    """Photos of each breed (index) in each part and in `all`, whether it is a `priority` breed, and the `width` of its F1's
    interval; the breed with the most photos first."""
    counts = {part: Counter(sample.breed for sample in dataset.part(part)) for part in PARTS}
    index = pd.Index(dataset.breeds, name="breed")
    frame = pd.DataFrame({part: [counts[part][breed] for breed in index] for part in PARTS}, index=index)
    frame["all"] = frame.sum(axis=1)
    frame["priority"] = index.isin(dataset.priority_breeds)
    frame["width"] = [f1_width(n) for n in frame["test"].tolist()]
    return frame.sort_values(["all", "breed"], ascending=[False, True])


def about(dataset: Dataset, findings: Sequence[Finding]) -> pd.DataFrame:
    """Where the photos come from, what became of the names of their breeds, and what is asked about them."""
    card = dataset.card
    question, others = questions_of(dataset.val)
    rows = {
        "photos": str(dataset.image_root),
        "layout": f"{card['source']}, {len(findings):,} files",
        "notes": "; ".join(card["notes"]),
        "names mapped to the list of breeds": "; ".join(card["names_mapped"]),
        "breeds that are not in the list": ", ".join(card["unknown_breeds"]),
        "question": question + (f" ({others} of {len(dataset.val)} validation samples ask another)" if others else ""),
    }
    return pd.DataFrame({"": {name: text for name, text in rows.items() if text}})


def counts(dataset: Dataset) -> pd.DataFrame:
    """Photos by breed and part, and the F1 interval that each breed's test photos allow; ★: priority."""
    frame = by_breed(dataset)
    ends = [(f1_interval(n) if n else None) for n in frame["test"].tolist()]
    intervals = [f"{100 * end[0]:.0f} to {100 * end[1]:.0f} %" if end else NOT_MEASURABLE for end in ends]
    shown = frame[[*PARTS, "all"]].assign(**{f"95 % interval of a true F1 of {100 * SUPPOSED_F1:.0f} %": intervals})
    return shown.set_axis(frame.index.map(lambda breed: breed_label(breed, breed in dataset.priority_breeds)))


def left_out(dataset: Dataset, findings: Sequence[Finding]) -> pd.DataFrame:
    """How many files each reason has left out, with an example."""
    gone = [finding for finding in findings if not finding.kept]
    frame = _tally([(f.verdict, f"{f.image}: {f.detail or f.verdict}") for f in gone], "reason", "files")
    if missing := dataset.card["missing"]["count"]:
        frame.loc["listed, but not there"] = [missing, "each is named in dataset.json"]
    return frame


def remarks(findings: Sequence[Finding]) -> pd.DataFrame:
    """What is unusual among the kept photos and is dealt with when they are opened, with an example."""
    seen = [(text.partition(" (")[0], f.image) for f in findings if f.kept for text in f.remarks.split(", ") if text]
    return _tally(seen, "remark", "photos")


def _tally(seen: Sequence[tuple[str, str]], what: str, unit: str) -> pd.DataFrame:
    """How often each name was seen (index), the most frequent first, with the first example."""
    frame = pd.DataFrame(seen, columns=[what, "for example"])
    tally = frame.groupby(what, sort=False).agg(**{unit: (what, "size"), "for example": ("for example", "first")})
    return tally.sort_values(unit, ascending=False, kind="stable")


def nearness(near: pd.DataFrame) -> pd.DataFrame:
    """How near each part is to training, in words for shares."""
    table = by_part(near)
    shares = {name: "{:.0%}" for name in map(str, table) if name.startswith(("nearer", "number"))}
    looks = dict.fromkeys(map(str, table), "{:,.4g}") | shares | {"photos": "{:,.0f}"}
    return table.apply(lambda column: column.map(looks[str(column.name)].format))


def conclusion(
    dataset: Dataset, findings: Sequence[Finding], checked: Check, near: pd.DataFrame | None = None, noise: str = ""
) -> pd.DataFrame:
    """Can this data be trusted, and what will hurt: a question a row. `noise`: what is known of wrong labels."""
    frame, rows = by_breed(dataset), list[tuple[str, str, str]]()
    trusted = (
        f"all {checked.photos:,} photos were hashed anew, and none of the {checked.groups:,} groups of near-duplicates (at most "
        f"{checked.bits} of 64 bits apart) is in two parts"
    )
    problems = "".join(f"{len(checked.problems)} problems, the first: {first}" for first in checked.problems[:1])
    rows.append(("Can the split be trusted?", "no" if problems else "yes", problems or trusted))
    reasons = Counter(finding.verdict for finding in findings if not finding.kept)
    because = [", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())] * bool(reasons)
    if reasons["two breeds"]:
        because.append("of a photo under two breeds somebody has to decide which label is right")
    if missing := dataset.card["missing"]["count"]:
        because.append(f"{missing:,} photos that the source lists are not there")
    gone = f"{reasons.total():,} of {len(findings):,} are left out"
    rows.append(("Are the files clean?", gone, "; ".join(because)))
    if near is not None:
        said = warnings_of(near)
        rows.append(("Is the test as far from training as a new cat?", "no" if said else "yes", "; ".join(said)))
    if noise:
        rows.append(("Are the labels right?", "a person decides", noise))
    train, test = frame["train"], frame["test"]
    ratio = train.max() / max(1, train.min())
    advice = "; train with balance=sqrt, and judge by macro-F1 rather than by accuracy" if ratio > UNEVEN else ""
    trained = f"training photos: {train.idxmax()} {train.max()}, {train.idxmin()} {train.min()}{advice}"
    rows.append(("Are the breeds even?", f"{ratio:.1f} to 1", trained))
    if len(rare := frame[frame["priority"]]):
        unseen = rare.index[rare["test"] == 0].tolist()
        half = macro_half_width([n for n in rare["test"].tolist() if n])
        answer = f"their macro-F1 within ± {100 * half:.0f} points" if len(unseen) < len(rare) else NOT_MEASURABLE
        answer += f", without {', '.join(unseen)}: {NOT_MEASURABLE}" if 0 < len(unseen) < len(rare) else ""
        fewest = f"the fewest {rare['train'].idxmin()}, {rare['train'].min()}"
        why = f"training photos of the {len(rare)}: {rare['train'].sum()} together, {fewest}"
        rows.append(("What can be known of the priority breeds?", answer, why))
    answer, why = "every one", f"the least certain is {test.idxmin()} with {test.min()} test photos"
    if len(small := frame[frame["width"] > TOO_WIDE].sort_values("test")):
        answer = f"{len(small)} of {len(frame)} are too small to be measured alone"
        some = ", ".join(f"{breed} {n}" for breed, n in small["test"].head(SHOWN).items())
        why = f"interval wider than {100 * TOO_WIDE:.0f} points: {some}{' …' * (len(small) > SHOWN)} test photos"
    rows.append(("Which breeds can be measured?", answer, why))
    if remarks := dataset.card.get("remarks"):
        more = f" … and {len(remarks) - SHOWN} more in dataset.json" * (len(remarks) > SHOWN)
        rows.append(("Did every breed get its share?", f"{len(remarks)} did not", "; ".join(remarks[:SHOWN]) + more))
    return pd.DataFrame(rows, columns=["question", "answer", "because"]).set_index("question")
