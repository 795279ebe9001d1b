"""Breed names as photos bring them, mapped to the names of the list of 67, and every decision reported."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from catlib.breeds import BREEDS, PRIORITY_BREEDS, find
from catlib.errors import InputError
from catlib.parameters import did_you_mean
from catlib.parsing import check_names
from catlib.settings import DataSettings, split_list

SHOWN = 6  # names that a line gives; the dataset card has all
NEAR = 0.75  # likeness from which on a name may be a misspelling of another


@dataclass(frozen=True)
class Names:
    """What became of the names that a source uses."""

    breed_of: dict[str, str]  # name as found → breed
    unknown: tuple[str, ...]  # breeds that are not in the list of 67
    merged: tuple[str, ...]  # "found → breed" where the two differ

    def notes(self) -> list[str]:
        """What a reader has to know about the names, a line each."""
        more = "" if len(self.merged) <= SHOWN else f" and {len(self.merged) - SHOWN} more"
        merged = f"names mapped to the list of breeds: {'; '.join(self.merged[:SHOWN])}{more}"
        unknown = f"not in the list of {len(BREEDS)} breeds, kept as breeds of their own: {_hinted(self.unknown)}"
        return [merged] * bool(self.merged) + [unknown] * bool(self.unknown)


def understand(found: Iterable[str], unknown_breeds: str = "keep") -> Names:
    """Map names through aliases, case, underscores and punctuation. A name that is not in the list stays a breed of its
    own, or raises InputError with `unknown_breeds` "refuse"."""
    breed_of: dict[str, str] = {}
    unknown: dict[str, str] = {}  # folded → breed, so that `my_breed` and `My Breed` are one
    for name in sorted(set(found)):
        known = find(name)
        breed_of[name] = known.name if known else unknown.setdefault(_plain(name).casefold(), _plain(name))
    if unknown and unknown_breeds == "refuse":
        advice = f"Rename them to names of the list of {len(BREEDS)} breeds, or set unknown_breeds=keep"
        raise InputError(f"unknown breeds: {_hinted(unknown.values())}. {advice}")
    merged = tuple(f"{name} → {breed}" for name, breed in breed_of.items() if name != breed)
    return Names(breed_of, tuple(unknown.values()), merged)


def restrict(breeds: Sequence[str], settings: DataSettings) -> set[str]:
    """The breeds to use. Raises InputError when `breeds` or `priority_breeds` names one that has no photos, or two are one name."""
    wanted = set(_match(split_list(settings.breeds), breeds, "breeds")) or set(breeds)
    _match(split_list(settings.priority_breeds), sorted(wanted), "priority_breeds")
    check_names(sorted(wanted))
    return wanted


def priority_of(breeds: Sequence[str], settings: DataSettings) -> tuple[str, ...]:
    """The priority breeds: the named ones, which must be in the data (InputError), else those of the plan's seven that are."""
    named = _match(split_list(settings.priority_breeds), breeds, "priority_breeds")
    return tuple(named) or tuple(breed for breed in PRIORITY_BREEDS if breed in breeds)


def _match(wanted: Sequence[str], present: Sequence[str], option: str) -> list[str]:
    folded = {_plain(breed).casefold(): breed for breed in present}
    matched = []
    for name in wanted:
        known = find(name)
        breed = known.name if known and known.name in present else folded.get(_plain(name).casefold())
        if breed is None:
            here = f"the breeds here are {', '.join(present)}"
            raise InputError(f"{option}: {name!r} has no photos{did_you_mean(name, present, NEAR)}; {here}")
        matched.append(breed)
    return list(dict.fromkeys(matched))


def _plain(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())  # macOS writes é as e and an accent


def _hinted(unknown: Iterable[str]) -> str:
    """Names with the name of the list that each may be a misspelling of."""
    return ", ".join(f"{name!r}{did_you_mean(name, [breed.name for breed in BREEDS], NEAR)}" for name in unknown)
