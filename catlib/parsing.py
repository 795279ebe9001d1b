"""From a model's free text to a breed of the list, or to None: a guess in favour of the model would flatter it."""

import re
import unicodedata
from collections.abc import Sequence

from catlib.breeds import find

NEGATIONS = frozenset(
    {"not", "isn", "isnt", "wasn", "wasnt", "no", "never", "unlike", "neither", "nor", "than", "without"}
)
NEGATION_REACH = 3  # words before a name within which a negation counts: "is not really a Siamese"


class BreedParser:
    """Reads breeds off answers.

    Rules, in order: the whole answer, or its first sentence, is a name or an alias, spaces and punctuation aside (reasons
    may follow, which speak of tabby patterns and silver coats); otherwise names and aliases are found as whole words (a plural s is allowed), the longest first, and words already used by a longer one do not
    count again ("Manx Cat" is no "Manx"). A name shortly after a negation is not counted. One breed left: that is the
    answer. None left, or several different ones ("Siamese or Balinese"): None, which counts as wrong.
    """

    def __init__(self, breeds: Sequence[str]) -> None:
        own = {tuple(_words(breed)): breed for breed in breeds}
        other: dict[tuple[str, ...], str | None] = {}
        for breed in breeds:
            for alias in _aliases(breed):
                key = tuple(_words(alias))
                if key and key not in own:
                    other[key] = breed if other.get(key, breed) == breed else None  # shared by two breeds: says nothing
        self.names = own | {key: breed for key, breed in other.items() if breed is not None}
        self.compact = {"".join(key): breed for key, breed in self.names.items()}
        self.longest_first = sorted(self.names, key=len, reverse=True)

    def parse(self, answer: str) -> str | None:
        """The breed that `answer` names, in the list's spelling; None when it names none or several."""
        words = _words(answer)
        for part in (words, _words(re.split(r"[.!\n]", answer.strip(), maxsplit=1)[0])):
            if breed := self.compact.get("".join(part)):
                return breed
        free = [True] * len(words)
        found = set()
        for name in self.longest_first:
            for start in range(len(words) - len(name) + 1):
                span = slice(start, start + len(name))
                if all(free[span]) and _same(words[span], name):
                    free[span] = [False] * len(name)
                    if not NEGATIONS.intersection(words[max(0, start - NEGATION_REACH) : start]):
                        found.add(self.names[name])
        return found.pop() if len(found) == 1 else None


def _aliases(breed: str) -> list[str]:
    """Known aliases, and the two halves of a name such as `Sphynx - Hairless Cat`."""
    known = find(breed)
    halves = breed.split(" - ") if " - " in breed else []
    return [*(known.aliases if known else ()), *halves]


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.findall(r"[a-z0-9]+", plain.replace("_", " ").casefold())


def _same(words: Sequence[str], name: Sequence[str]) -> bool:
    *head, last = words
    return head == list(name[:-1]) and last in (name[-1], name[-1] + "s")
