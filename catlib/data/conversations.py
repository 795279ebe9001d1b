"""What the model is asked, what it learns to answer, and which samples it sees how often."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from catlib.breeds import describe, find
from catlib.data.records import Sample
from catlib.errors import InputError

QUESTION = "What breed is the cat in this photo?"  # the standard one, asked of every validation and test photo
# Training photos are asked in several ways, so that the model learns the question and not its wording.
PARAPHRASES = (
    QUESTION,
    "Which cat breed is shown here?",
    "Identify the breed of this cat.",
    "What is the breed of this cat?",
    "Name the breed of the cat in the picture.",
)
REASONS = ("It shows in the photo as {}.", "The photo shows {}.", "What speaks for it is {}.", "This is {}.")


def question_for(sha256: str, part: str, seed: int) -> str:
    """A training photo's question is drawn from the paraphrases by seed and content; other parts get the plain one."""
    if part != "train":
        return QUESTION
    return PARAPHRASES[_drawn(f"question {seed} {sha256}") % len(PARAPHRASES)]


def _drawn(by: str) -> int:
    return int.from_bytes(hashlib.sha256(by.encode()).digest()[:8], "big")


def questions_of(samples: Iterable[Sample]) -> tuple[str, int]:
    """The question that most samples ask, and how many ask another one; the standard question where there is no sample."""
    counts = Counter(sample.question for sample in samples)
    question = min(counts, key=lambda text: (-counts[text], text), default=QUESTION)
    return question, counts.total() - counts[question]


def answer_for(breed: str, style: str, id: str = "") -> str:
    """`label`: the breed's name. `label+traits`: the name, then a sentence of reasons; a breed without known traits has
    none. Wording and order of the traits are drawn by the sample's `id`, so that the reasons of a breed are not one
    text to learn."""
    if style == "label" or find(breed) is None:
        return breed
    turn, wording = divmod(_drawn(f"reasons {id}") if id else 0, len(REASONS))
    return f"{breed}. {REASONS[wording].format(describe(breed, turn))}"


def spelled_answers(samples: Iterable[Sample]) -> dict[str, str]:
    """For each breed the beginning of its answers up to where the breed is settled, as far as that is not the bare name.

    After `Manx. It shows in the photo as …` that is `Manx.`, of `This is a Manx cat.` it is `This is a Manx cat.`: a model
    that learned these never ends its answer after the name, and must not be asked how likely that is. Breeds whose answers
    begin in several ways are left out.
    """
    found: dict[str, Counter[str]] = {}
    for sample in samples:
        before, name, after = sample.answer.partition(sample.breed)
        if name:
            sentence = after.split(".")[0] + "." if "." in after else after
            found.setdefault(sample.breed, Counter())[before + name + sentence] += 1
    ways = {breed: next(iter(counts)) for breed, counts in found.items() if len(counts) == 1}
    return {breed: text for breed, text in sorted(ways.items()) if text != breed}


def gives_reasons(samples: Iterable[Sample]) -> bool:
    """Whether most answers go on for three words or more after the sentence that names the breed."""
    given = [len(s.answer.partition(s.breed)[2].partition(".")[2].split()) > 2 for s in samples]
    return 2 * sum(given) > len(given)


def longest_answer(tokenizer: Any, samples: Iterable[Sample]) -> int:
    """Tokens of the longest answer, its end included: as many a trained model may need. Judged among the 100 longest texts."""
    texts = sorted({sample.answer for sample in samples}, key=len)[-100:]
    return max((len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts), default=0)


def balance_weights(samples: Sequence[Sample], mode: str) -> np.ndarray:
    """Weights (n,) for drawing training samples, mean 1; no line is copied. With n_b photos of breed b, a photo weighs
    n_b ** -1 (`uniform`: every breed is drawn equally often), n_b ** -0.5 (`sqrt`, between the two) or 1 (`none`)."""
    power = {"none": 0.0, "sqrt": 0.5, "uniform": 1.0}.get(mode)
    if power is None:
        raise InputError(f"balance must be none, sqrt or uniform; found {mode!r}")
    if not samples:
        return np.empty(0)
    _, which, counts = np.unique([sample.breed for sample in samples], return_inverse=True, return_counts=True)
    weights = counts[which].astype(float) ** -power
    return weights / weights.mean()


def evenly(samples: Sequence[Sample], most: int, seed: int) -> tuple[Sample, ...]:
    """At most `most` samples (0: all), taken from all breeds in turn, in their old order; the same for the same seed."""
    if not 0 < most < len(samples):
        return tuple(samples)
    turn: Counter[str] = Counter()
    ranked = []
    for i in np.random.default_rng(seed).permutation(len(samples)).tolist():
        ranked.append((turn[samples[i].breed], i))
        turn[samples[i].breed] += 1
    return tuple(samples[i] for i in sorted(i for _, i in sorted(ranked, key=lambda pair: pair[0])[:most]))
