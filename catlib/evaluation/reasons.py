"""Reasons that a model gives with its answers, held against the table of breeds: are they whole, fitting, and more than one text?"""

from collections import defaultdict
from typing import Any

from catlib.breeds import BREEDS, features, find, key_of
from catlib.data.records import PredictionSet

WORDS = 3  # what goes on for so many words after the first sentence is a reason
_PHRASES = {breed.name: {key_of(phrase) for phrase in features(breed)[1:]} for breed in BREEDS}
_ALL = set().union(*_PHRASES.values())


def reason_figures(predictions: PredictionSet) -> dict[str, Any] | None:
    """What the reasons in a model's answers are worth; None where it gives none.

    `given`: share of the photos with a reason. Of these, `complete`: that end with a full stop, not cut off; `traits`: mean number of
    traits of the table that are named. Of the traits named, `of_breed_named` and `of_true_breed`: the share that the table gives
    the breed that was named, and the true one. `breeds_with_several`: of the breeds named for two photos or more, the share with
    more than one reason: 0 says that the model recites one text a breed, whatever the photo shows.
    """
    given = [(p, reason) for p in predictions.predictions if (reason := _reason(p.answer or ""))]
    if not given:
        return None
    count = named = true = 0
    texts: dict[str, list[str]] = defaultdict(list)
    for p, reason in given:
        text = key_of(reason)
        said = {phrase for phrase in _ALL if phrase in text}
        said = {phrase for phrase in said if not any(phrase != other and phrase in other for other in said)}
        count += len(said)
        named += len(said & _of(p.predicted))
        true += len(said & _of(p.breed))
        if p.predicted:
            texts[p.predicted].append(text)
    several = [len(set(own)) > 1 for own in texts.values() if len(own) > 1]
    return {
        "given": len(given) / len(predictions.predictions),
        "complete": sum(reason.endswith(".") for _, reason in given) / len(given),
        "traits": count / len(given),
        "of_breed_named": named / count if count else None,
        "of_true_breed": true / count if count else None,
        "breeds_with_several": sum(several) / len(several) if several else None,
    }


def _reason(answer: str) -> str:
    reason = answer.partition(".")[2].strip()
    return reason if len(reason.split()) >= WORDS else ""


def _of(breed: str | None) -> set[str]:
    found = find(breed) if breed else None
    return _PHRASES[found.name] if found else set()
