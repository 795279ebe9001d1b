"""The cat breeds: names, aliases, priority flags and traits (from the breeds' public standards)."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).parent / "assets" / "breeds.yaml"
# Scripts without spaces between words, and Hangul, whose particles stick to the noun: a character is a word of its own.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[|?;,(/]|[{_UNSPACED}][^\w\s]*|(?![{_UNSPACED}])\w(?:(?![{_UNSPACED}])\S)*")
_APOSTROPHE = re.compile(r"(?<=\w)['’‘ʼ´`](?=(?:s|t|m|d|re|ve|ll)\b)")
_ACCENT = re.compile(r"(?<=[a-zα-ω])[\u0300-\u036f]+|[\u0591-\u05c7\u0640\u064b-\u0652\ufe00-\ufe0f]", re.IGNORECASE)
MANY = {"calico", "tortoiseshell", "torbie", "tuxedo", "bicolor"}  # patterns of several colours at once
_HAIR = re.compile(r"(short|medium|long|wire)[\s-]*hair(?:ed|s)?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Traits:
    """What a judge looks at. Feeds CLIP prompts, answers with reasons, and drawings of cats."""

    coat_length: str  # hairless | short | medium | long
    coat: str  # its kind in words: "wiry and springy"
    colors: tuple[str, ...]
    patterns: tuple[str, ...]  # solid | tabby | spotted | ticked | colorpoint | tortoiseshell | bicolor | calico | …
    eyes: tuple[str, ...]  # colours
    ears: str  # e.g. "large and wide set", "folded", "curled back"
    tail: str  # e.g. "long and whip-like", "none", "short and bobbed"
    build: str  # e.g. "cobby", "slender", "large and rectangular"
    face: str = ""  # shape of the head where it tells: "a flat, round face"
    mark: str = ""  # the one trait that tells the breed apart: "very short legs"


@dataclass(frozen=True)
class Breed:
    """One of the 67 names of the photo collection (some are coats or colours, not pedigree breeds)."""

    name: str
    traits: Traits
    priority: bool = False
    aliases: tuple[str, ...] = ()


def find(name: str) -> Breed | None:
    """The breed of a folder or CSV name, through aliases, case, underscores, punctuation and a "cat" too many; None when unknown."""
    key = key_of(name)
    return _BY_KEY.get(key) or _BY_KEY.get(key.removesuffix("s").removesuffix("cat"))


def spell(text: str) -> str:
    """`text` in one of the ways in which Unicode and English write it: no accents on Latin and Greek letters, "isn't" as isnt.

    "Short Hair", "short-haired" and "shorthair" are one word. Letters of other scripts keep their marks.
    """
    plain = unicodedata.normalize("NFKD", _APOSTROPHE.sub("", text).replace("_", " "))
    plain = unicodedata.normalize("NFC", _ACCENT.sub("", plain))
    return _HAIR.sub(r"\1hair", "".join(c for c in plain if unicodedata.category(c) != "Cf"))


def words(text: str) -> list[str]:
    """The words of a text in any script, lower case, without punctuation."""
    return [word.casefold() for word in split(spell(text))]


def split(spelled: str, marks: str = "") -> list[str]:
    """The words of a text that is `spell`ed, their case kept, and of its punctuation those `marks` of "|?;,(/"."""
    kept = (c if unicodedata.category(c)[0] in "LMN" else f" {c} " if c in marks else " " for c in spelled)
    return _WORD.findall("".join(kept))


def key_of(name: str) -> str:
    """What is the same for all spellings of a name."""
    return "".join(words(name))


def describe(breed: Breed | str, turn: int = 0) -> str:
    """A phrase that gives the breed's traits as a reason, without its name: "a lithe and muscular cat with a short coat, …".

    `turn`: the traits begin with another one. Raises KeyError for a name that is not in the list.
    """
    build, *phrases = features(breed)
    turn %= len(phrases)
    phrases = [*phrases[turn:], *phrases[:turn]]
    return f"{_article(build)} cat with {', '.join(phrases[:-1])} and {phrases[-1]}"


def features(breed: Breed | str) -> list[str]:
    """A breed's build, then phrases for coat, head, ears, eyes, tail and mark. Raises KeyError for a name that is not in the list."""
    found = find(breed) if isinstance(breed, str) else breed
    if found is None:
        raise KeyError(breed)
    t = found.traits
    length, look = (
        t.coat_length.replace("medium", "medium-length"),
        f"{_either(t.patterns)}, in {_either(t.colors, all_of_them=MANY.issuperset(t.patterns))}",
    )
    coat = f"bare, {t.coat} skin ({look})" if length == "hairless" else f"a {length}, {t.coat} coat ({look})"
    kind, separator, clause = t.tail.partition(", with ")
    tail = "no tail" if t.tail == "none" else f"{_article(kind)} tail{' with ' if separator else ''}{clause}"
    build, _, more = t.build.partition(", with ")
    return [build, *filter(None, (coat, more, t.face, f"{t.ears} ears", f"{_either(t.eyes)} eyes", tail, t.mark))]


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _either(words: Sequence[str], all_of_them: bool = False) -> str:
    return (" and " if all_of_them else " or ").join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _parse(row: Mapping[str, Any]) -> Breed:
    row = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    name, priority, aliases = row.pop("name"), row.pop("priority", False), row.pop("aliases", ())
    return Breed(name, Traits(**row), priority, aliases)


BREEDS: tuple[Breed, ...] = tuple(map(_parse, yaml.safe_load(TABLE.read_text(encoding="utf-8"))))
PRIORITY_BREEDS: tuple[str, ...] = tuple(breed.name for breed in BREEDS if breed.priority)
_BY_KEY = {key_of(n): breed for breed in BREEDS for n in (breed.name, *breed.aliases)}
