"""From a model's free text to a breed of the list, or to None: a guess in favour of the model would flatter it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from catlib.breeds import BREEDS, find, key_of, spell, split
from catlib.errors import InputError

MARKS = "|?;,(/"  # the punctuation that counts: end of sentence, question, colon or semicolon, comma, bracket, slash
NEAR = 30  # words before a name that are looked at
_ALIASES = {alias for breed in BREEDS for alias in breed.aliases}
CODES = {a.lower() for a in _ALIASES if a.isupper()} - {a.lower() for a in _ALIASES if not a.isupper()}
# Names that mean something else without "cat" or "breed" beside them.
EVERYDAY = {
    "black and white", "cornish", "curl", "devon", "exotic", "fold", "hairless", "hemingway", "mandarin", "oriental",
    "selkirk", "silver", "thai", "tiger", "tricolor", "tricolour", "tux", "tuxedo", "york",
}  # fmt: skip
COATS = {
    "Calico", "Dilute Calico", "Dilute Tortoiseshell", "Silver", "Tabby", "Tiger", "Torbie", "Tortoiseshell", "Tuxedo",
}  # fmt: skip

# The regular expressions read an answer as `_tokens` writes it, what stands before a name (up to a space) or after it.
_BREAKS = ((r"[.!](?=\W|$)|[\n。।]", "|"), ("؟", "?"), (":", ";"), (r"[،、—–]|\s-\s", ","), (r"\[", "("))
_CAT = re.compile(r" (?:cat|kitten|breed|feline)s?\b")
_NO_CAT = re.compile(
    r" (?:rug|carpet|tiger|husky|python|twin|hare|rabbit|goat|wool|sweater|lamb|salt|mountain|lily)s?\b"
)
_PLACE = re.compile(r"\b(?:in|from|near|at) $")
_BE = r" (?:is|are|be|called|named|most|likely|probably|possibly|looks?|like|appears?|seems?|to|could|may|might|would)"
_IS_BREED = re.compile(
    rf"\b(?:breed|cat)(?: (?:of|in) (?:the|this|that) \w+){{0,2}}(?:{_BE})* an? $"
    rf"|\bbreed(?: (?:of|in) (?:the|this|that) \w+){{0,2}}(?:{_BE}| [;,|])+ $"
)
_CLAUSE_ENDS = re.compile(r"$| [|?;,(]| (?:with|and|or|because|which|since)\b")
_LEAD = re.compile(
    r"^(?:(?:(?:answer|breed|class|category|label|type) ;|its|(?:it|this|that) is|thats|(?:these|they) are)"
    r"(?: probably| likely)* )?(?:an? (?!;))?"
)
# Certainty that looks like negation; insertions between a negation and what it denies; where a negation ends.
_SURE = re.compile(
    r"\b(?:(?:no|without(?: an?y?)?) (?:doubt|question|mistak\w+)|(?:do not|dont) doubt|not (?:only|just|merely)"
    r"|(?:none|nothing|no|not|(?:cannot|cant|couldnt|can not|could not) be) (?:(?:any\w*|breed|cat) )?"
    r"(?:other|else|but|less)(?: breed| cat)?(?: than)?)\b"
)
_ASIDE = re.compile(r", (?:in my opinion|in fact|of course|however|i think|i believe|actually|though) , ")
_TURN = re.compile(
    r".*(?:[|?;,(]|\b(?:(?<!anything )but|so|because|since|rather|instead(?! of)|however|therefore|thus|hence|which"
    r"|while|maybe|perhaps|making|suggest\w*|indicat\w*|and (?:(?:the|this) \w+ )?(?:is|are|its?|has|looks|appears|seems))\b)"
)
_DENIED = re.compile(
    r"\b(?:not|never|none|neither|nor|cannot|(?:is|are|was|were|do|does|did|ca|could|would|wo|should|has)nt)\b"
    r"(?: \S+){0,8} $"
    r"|\b(?:no|non|without|unlike|less like|than|anything but|instead of|opposed to|different from|rul\w+ out"
    r"|(?:confus|mistak|mistook)\w* (?:\w+ )?(?:with|for))\b(?: (?!(?:is|are|its|has|looks|thats|i)\b)\S+){0,3} $"
)
_DENIED_AFTER = re.compile(
    r"(?: cats?)?(?: \?(?: \|)?(?: \w+)? (?:no|nope|not)(?= [|;,]|$)"
    r"| (?:isnt|is not|arent|are not) (?:\w+ ){0,2}breeds?\b| (?:is unlikely|(?:is|can be) ruled out))"
)
_COMPARED = re.compile(
    r"\b(?:similar to|related to|relatives? of|cousins? of|resembl\w+|reminiscent of|compared (?:to|with)"
    r"|(?:bred|developed|descended|derived) from|crossed with|(?:version|variety) of"
    r"|(?:coat|fur|body|build|face|head|ears?|eyes?|tail|legs?|looks?|pattern|markings?|points|colou?rs?) of)"
    r"(?: (?:an?|the|that of|those of))* $"
)
_LIST = re.compile(r" (?:(?:,|/|or|nor|and|an?|the|even|also|cats?|breeds?) )*")
_COAT_OF = re.compile(
    r"(?: \w+){0,2} (?:coat|fur|pattern|patterned|marking|stripe|colou?r|colou?red|colou?ring|coloration|point|hair)s?\b"
)
_APART = re.compile(r"[|?;@]|\b(?:or|nor|than|but|not|and an?|and the)\b|^ [,/](?: an?)? $")
_COAT_NEXT = re.compile(r" (?:(?:\(|in|with|an?|cat) )*")


@dataclass
class _Mention:
    """A name of the 67 or of the list, found in an answer at tokens[start:end]."""

    breed: str | None  # None: of the 67, not among the candidates
    start: int
    end: int
    coat: bool
    weight: int = 2  # 2: said, 1: only compared with, 0: denied


class BreedParser:
    """Reads breeds off answers, in any script.

    The whole answer, or its first sentence, is a name or an alias: that is the answer. Otherwise names are found as whole words,
    the longest first; words used once do not count again ("Manx Cat" is no "Manx"), those of the 67 that are not candidates use up
    theirs, too. Codes such as MAN count in capitals, everyday words such as Tiger beside "cat" or "breed". What is denied does not
    count, what is only compared with counts if nothing else is named, and the word for a coat yields to a pedigree ("a grey tabby
    Maine Coon"). One breed left: that is the answer. None left, or several: None, which counts as wrong.

    Raises InputError where two breeds have the same letters, or one has none.
    """

    def __init__(self, breeds: Sequence[str]) -> None:
        check_names(breeds)
        self.names: dict[tuple[str, ...], str | None] = {form: breed for breed in breeds for form in _forms(breed)}
        owners: dict[tuple[str, ...], set[str]] = {}
        for breed in breeds:
            for form in (form for alias in _aliases(breed) for form in _forms(alias)):
                owners.setdefault(form, set()).add(breed)
        for form, sharing in owners.items():
            self.names.setdefault(form, sharing.pop() if len(sharing) == 1 else None)
        for form in (form for known in BREEDS for name in _aliases(known.name) for form in _forms(name)):
            self.names.setdefault(form, None)
        self.whole: dict[str, str | None] = {}
        for form, owner in self.names.items():
            self.whole.setdefault(_key(form), owner)
        self.sizes = sorted({len(form) for form in self.names}, reverse=True)

    def parse(self, answer: str) -> str | None:
        """The breed that `answer` names, in the list's spelling; None when it names none or several."""
        if (key := key_of(answer)) in self.whole:
            return self.whole[key]
        text = " ".join(_tokens(answer)).strip("| ")
        for part in (text, text.split(" |")[0]):
            key = _key(_LEAD.sub("", part).split())
            if key in self.whole and key not in CODES and "?" not in part:
                return self.whole[key]
        said = [m for m in self._mentions(self._complete(_SURE.sub(",", _ASIDE.sub("", text)).split())) if m.weight]
        top = max((m.weight for m in said), default=0)
        named = {m.breed for m in said if m.weight == top and (m.breed or not m.coat)}
        return named.pop() if len(named) == 1 else None

    def _complete(self, tokens: list[str]) -> list[str]:
        """The words with those that "or" saves said: "Devon or Cornish Rex", "Turkish Angora or Van"."""
        full = list(tokens)
        for i in range(len(tokens) - 2, 0, -1):
            first, then = tokens[i - 1], tokens[i + 1]
            if tokens[i] in ("or", "and", "/"):
                if {(first, tail) for tail in tokens[i + 2 : i + 3]} & self.names.keys():
                    full.insert(i, tokens[i + 2])
                elif {(head, then) for head in tokens[max(0, i - 2) : i - 1]} & self.names.keys():
                    full.insert(i + 1, tokens[i - 2])
        return full

    def _mentions(self, tokens: list[str]) -> list[_Mention]:
        """The names in an answer that stand for a breed, in their order and weighed."""
        found = self._find(tokens)
        shown = list(tokens)
        for m in found:
            shown[m.start : m.end] = ["~" if m.coat else "@"] + [""] * (m.end - m.start - 1)

        def text(start: int, end: int | None = None) -> str:
            return " ".join(["", *filter(None, shown[start:end]), ""])

        gaps = [text(a.end, b.start) for a, b in pairwise(found)]
        for i, m in enumerate(found):
            clause = _TURN.sub("", text(max(0, m.start - NEAR), m.start))
            place = _PLACE.search(clause) and not _CAT.match(text(m.end, m.end + 1))  # "a cat in Havana"
            m.weight = 0 if _DENIED.search(clause) else 1 if _COMPARED.search(clause) else 0 if place else 2
            rest = "".join(takewhile(_LIST.fullmatch, gaps[i - 1 : i + NEAR])) if i else ""
            if rest and (not gaps[i - 1].strip() or re.search(r"/|\b(?:or|nor|and)\b", rest)):
                m.weight = min(m.weight, found[i - 1].weight)  # "not a Siamese, Balinese or Birman"
        pedigrees = [m for m in found if not m.coat and m.weight == 2]
        for m in (m for m in found if m.coat and pedigrees):
            near = [p for p in pedigrees if abs(p.start - m.start) < NEAR]
            before = any(p.start > m.start and not _APART.search(text(m.end, p.start)) for p in near)
            behind = any(p.start < m.start and _COAT_NEXT.fullmatch(text(p.end, m.start)) for p in near)
            if before or behind or _COAT_OF.match(text(m.end, m.end + NEAR)):
                m.weight = 0
        return found

    def _find(self, tokens: list[str]) -> list[_Mention]:
        free = [True] * len(tokens)
        found = []
        for size in self.sizes:
            for start in range(len(tokens) - size, -1, -1):  # from the right, where the noun is
                end = start + size
                form = next((form for form in _singulars(tokens[start:end]) if form in self.names), None)
                if form is None or not all(free[start:end]):
                    continue
                free[start:end] = [False] * size
                before = " ".join([*tokens[max(0, start - NEAR) : start], ""])
                after = " ".join(["", *tokens[end : end + NEAR]])
                alone = _IS_BREED.search(before) and _CLAUSE_ENDS.match(after)
                if " ".join(form) in EVERYDAY and not (alone or _CAT.match(after)):
                    continue
                if not (_NO_CAT.match(after) or _DENIED_AFTER.match(after)):
                    found.append(_Mention(self.names[form], start, end, form in _COATS))
        return sorted(found, key=lambda m: m.start)


def check_names(breeds: Iterable[str]) -> None:
    """Raises InputError where two breeds have the same letters, or one has none: no answer could name them."""
    keys: dict[str, str] = {}
    for breed in breeds:
        key = key_of(breed)
        if not key:
            raise InputError(f"breed {breed!r} has no letter and no digit: no answer could name it; rename it")
        if keys.setdefault(key, breed) != breed:
            raise InputError(
                f"breeds {keys[key]!r} and {breed!r} have the same letters: no answer could tell them apart; rename one"
            )


def _aliases(breed: str) -> list[str]:
    """Its spelling in the list of 67, known aliases, and the halves of a name such as `Sphynx - Hairless Cat`."""
    known = find(breed)
    names = [breed, *([known.name, *known.aliases] if known else [])]
    return [*names, *(half for name in names if " - " in name for half in name.split(" - "))]


def _tokens(text: str) -> list[str]:
    """Words, lower case but for codes in capitals in a text that has small letters, and MARKS."""
    spelled = spell(text)
    for pattern, mark in _BREAKS:
        spelled = re.sub(pattern, mark, spelled)
    mixed = any(c.islower() for c in spelled)
    return [
        word if mixed and word.isupper() and word.casefold() in CODES else word.casefold()
        for word in split(spelled, MARKS)
    ]


def _forms(name: str) -> list[tuple[str, ...]]:
    """The ways in which an answer may write a name."""
    if (code := key_of(name)) in CODES:
        return [(code.upper(),)]
    tokens = _tokens(name)
    plain = tuple(token for token in tokens if token not in MARKS)
    joined = "".join(plain)
    return [tuple(tokens), plain, *([(joined,)] if len(joined) >= 8 else [])]  # MaineCoon, but Mike is no Mi-ke


def _singulars(tokens: Sequence[str]) -> Iterable[tuple[str, ...]]:
    *head, last = tokens
    yield tuple(tokens)
    for ending, singular in (("s", ""), ("es", ""), ("ies", "y")):
        if last.endswith(ending):
            yield (*head, last.removesuffix(ending) + singular)


def _key(tokens: Iterable[str]) -> str:
    return "".join(token for token in tokens if token not in MARKS).casefold()


_COATS = {form for breed in BREEDS if breed.name in COATS for name in _aliases(breed.name) for form in _forms(name)}
