"""From a breed's traits to the numbers that one drawn cat is made of, with the variation between individuals."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from catlib.breeds import BREEDS, Traits

RGB = tuple[float, float, float]

# base coat and marking colour (red, green, blue from 0 to 255) of the colour words in the breeds' traits
COLORS: Mapping[str, tuple[RGB, RGB]] = {
    "ruddy": ((176, 116, 66), (92, 54, 30)),
    "cinnamon": ((184, 122, 82), (130, 76, 46)),
    "fawn": ((206, 180, 154), (160, 130, 106)),
    "flame": ((222, 150, 84), (200, 120, 60)),
    "red": ((208, 132, 64), (164, 86, 32)),
    "orange": ((214, 136, 60), (168, 86, 30)),
    "cream": ((230, 206, 170), (206, 168, 122)),
    "brown": ((148, 114, 78), (60, 43, 30)),
    "tawny": ((178, 140, 92), (88, 58, 34)),
    "bronze": ((170, 136, 98), (78, 54, 38)),
    "gold": ((196, 148, 78), (96, 58, 28)),
    "snow": ((226, 212, 190), (136, 104, 80)),
    "sepia": ((206, 184, 152), (116, 86, 60)),
    "silver": ((194, 196, 199), (72, 72, 77)),
    "smoke": ((116, 116, 120), (52, 52, 56)),
    "white": ((239, 237, 232), (224, 220, 213)),
    "black": ((42, 40, 42), (20, 19, 20)),
    "sable": ((92, 62, 46), (58, 38, 28)),
    "seal": ((86, 62, 50), (58, 41, 34)),
    "chocolate": ((104, 68, 48), (74, 46, 32)),
    "chestnut": ((132, 80, 52), (88, 50, 32)),
    "champagne": ((196, 160, 128), (150, 110, 82)),
    "platinum": ((196, 186, 182), (160, 148, 144)),
    "lilac": ((178, 160, 158), (150, 130, 130)),
    "lavender": ((184, 166, 166), (154, 136, 138)),
    "blue": ((122, 132, 146), (88, 97, 112)),
    "grey": ((134, 134, 136), (76, 76, 80)),
    "pink": ((226, 182, 166), (196, 142, 128)),
    "peach": ((232, 194, 164), (204, 154, 120)),
    "tortie": ((150, 96, 60), (70, 48, 40)),
    "natural": ((150, 118, 92), (84, 60, 46)),
}
EYES: Mapping[str, RGB] = {
    "green": (126, 172, 84), "blue": (88, 150, 220), "gold": (222, 176, 62), "yellow": (220, 204, 84),
    "copper": (204, 116, 44), "orange": (222, 136, 46), "amber": (214, 146, 54), "hazel": (168, 148, 76),
    "aqua": (116, 196, 196), "brown": (140, 96, 56), "odd": (88, 150, 220),
}  # fmt: skip
# words that stand in the traits, each with what it does to a measure; all that occur are multiplied
EAR_SIZE = (("huge", 1.6), ("very large", 1.48), ("medium-large", 1.12), ("medium to large", 1.14),
            ("moderately large", 1.16), ("large", 1.3), ("small", 0.7), ("medium", 0.95))  # fmt: skip
TAIL_LENGTH = (("none", 0.0), ("bobbed", 0.24), ("pompom", 0.2), ("medium-short", 0.66), ("short", 0.6),
               ("medium-long", 0.86), ("three-quarter", 0.72), ("long", 1.08))  # fmt: skip
TAIL_FLUFF = (("plumed", 0.7), ("bushy", 1.0), ("fox", 1.0), ("brush", 0.7), ("pompom", 1.2), ("thick", 0.4),
              ("whip", -0.45), ("rat", -0.5), ("thin", -0.45), ("slim", -0.2), ("slender", -0.25))  # fmt: skip
WIDTH = (("cobby", 1.25), ("stocky", 1.14), ("round", 1.14), ("sturdy", 1.06), ("heavy", 1.1), ("large", 1.08),
         ("powerful", 1.08), ("barrel", 1.12), ("slender", 0.82), ("tubular", 0.86), ("slim", 0.88), ("lean", 0.9),
         ("lithe", 0.92), ("fine-boned", 0.9), ("graceful", 0.94), ("pot-bellied", 1.14))  # fmt: skip
LEGS = (("low", 0.78), ("cobby", 0.92), ("slender", 1.12), ("tubular", 1.08), ("long-legged", 1.2),
        ("slim-legged", 1.08), ("lean", 1.08), ("tall", 1.08), ("long-backed", 0.6))  # fmt: skip
FUR = {"hairless": 0.0, "short": 0.14, "medium": 0.55, "long": 1.0}


@dataclass(frozen=True)
class Look:
    """One cat: everything that the drawing needs and, in words, what a caption may say. Measures are relative to 1."""

    coat_length: str
    color: str
    pattern: str
    eye: str
    base: RGB
    dark: RGB
    second: RGB  # the other colour of a tortoiseshell, calico or torbie
    eyes: tuple[RGB, RGB]
    fur: float  # length of the hair at the outline
    crimp: float  # 0 straight hair, 1 crimped or curled
    wrinkles: float
    white: float  # share of the coat that white spotting covers
    ear_size: float
    ear_round: float
    ear_spread: float
    ear_bend: float  # -1 folded forward, 1 curled back
    tufts: float
    tail: float
    fluff: float
    ringed: bool
    width: float
    legs: float
    wedge: float  # how much the head narrows to the chin
    cheek: float
    flat: float  # how short the nose is
    rims: bool  # dark rims round eyes and nose


def look_of(traits: Traits, rng: np.random.Generator) -> Look:
    """A random individual with these traits: one of the colours, patterns and eye colours, every measure varied."""

    def vary(value: float, spread: float = 0.1) -> float:
        return float(value * np.exp(rng.normal(0, spread)))

    pattern, color, eye = (_draw(choice, rng) for choice in (traits.patterns, traits.colors, traits.eyes))
    if pattern == "solid" and traits.coat_length != "hairless" and color in ("brown", "silver"):
        pattern = "tabby" if "tabby" in traits.patterns else pattern  # genetics: these colours are tabby colours
    light = rng.normal(1, 0.09)
    tint = rng.normal(1, 0.018, 3)
    base, dark = (tuple(np.clip(np.array(c) * light * tint, 4, 250)) for c in _colors(color))
    second = _colors("cream" if "blue" in "".join(traits.colors) else "orange")[0]
    if traits.coat_length == "hairless":  # skin shows the colours of the missing coat only faintly
        second = tuple(0.75 * np.array(base) + 0.25 * np.array(second))
    iris = [_eye_color(eye), _eye_color("gold" if eye == "odd" else eye)]
    face, ears, tail = traits.face, traits.ears, traits.tail
    flat = 1.0 if "flat" in face else 0.55 if "short nose" in face else 0.0
    wedge = (
        0.5 if "wedge" in face else 0.4 if "triangular" in face or "heart" in face else 0.3 if "pixie" in face else 0.2
    )
    return Look(
        coat_length=traits.coat_length, color=color, pattern=pattern, eye=eye, base=base, dark=dark, second=second,
        eyes=(_iris(iris[0], rng), _iris(iris[1], rng)),
        fur=vary(FUR[traits.coat_length] * (1.2 if "shaggy" in traits.coat else 1.0), 0.2),
        crimp=vary(1.0, 0.15) if any(w in traits.coat for w in ("crimped", "wav", "curl")) else 0.0,
        wrinkles=vary(1.0, 0.3) if traits.coat_length == "hairless" else 0.0,
        white=_white(pattern, rng),
        ear_size=vary(_first(EAR_SIZE, ears, 1.0), 0.06),
        ear_round=0.75 if "round" in ears else 0.12 if "pointed" in ears else 0.35,
        ear_spread=(1.2 if "wide-set" in ears or "low" in ears else 0.85 if "high" in ears or "upright" in ears else 1)
        + float(rng.normal(0, 0.05)),
        ear_bend=-1.0 if "forward-folded" in ears else 1.0 if "curled" in ears else 0.0,
        tufts=1.0 if "tufted" in ears or "lynx" in ears else 0.0,
        tail=vary(_first(TAIL_LENGTH, tail, 0.9)),
        fluff=_first(TAIL_FLUFF, tail, 0.05) + 0.3 * FUR[traits.coat_length] + float(rng.normal(0, 0.08)),
        ringed="ring" in tail or "band" in tail or "tip" in tail or "tabby" in pattern or pattern == "spotted",
        width=vary(_all(WIDTH, traits.build), 0.05),
        legs=vary(_all(LEGS, traits.build), 0.05),
        wedge=vary(wedge, 0.15),
        cheek=vary(0.2 if "round" in face or "cheeks" in face or "cobby" in traits.build else 0.07, 0.3),
        flat=flat * float(rng.uniform(0.85, 1.1)),
        rims="rims" in traits.mark or pattern == "tipped",
    )  # fmt: skip


def random_traits(rng: np.random.Generator) -> Traits:
    """Traits of a cat of no breed: each one is taken from another breed."""
    parents = [BREEDS[i].traits for i in rng.integers(len(BREEDS), size=7)]
    looks = parents[0]  # colours and patterns stay together: a ticked lilac point does not exist
    if rng.random() < 0.9 and looks.coat_length == "hairless":
        looks = parents[6]
    hair = looks if looks.coat_length == "hairless" else parents[1] if parents[1].coat_length != "hairless" else looks
    return Traits(
        hair.coat_length, hair.coat, looks.colors, looks.patterns, parents[2].eyes, parents[3].ears, parents[4].tail,
        parents[5].build, parents[5].face, looks.mark if "rims" in looks.mark else "",
    )  # fmt: skip


def _draw(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    """The first of the standard's list is the most frequent."""
    weights = 0.62 ** np.arange(len(choices))
    return str(rng.choice(choices, p=weights / weights.sum()))


def _white(pattern: str, rng: np.random.Generator) -> float:
    low, high = {
        "bicolor": (0.25, 0.65),
        "calico": (0.35, 0.6),
        "tuxedo": (0.2, 0.4),
        "mitted": (0.1, 0.2),
        "van": (0.8, 0.9),
    }.get(pattern, (0.0, 0.0))
    return float(rng.uniform(low, high))


def _colors(words: str) -> tuple[RGB, RGB]:
    """Colours of a phrase such as "silver-tipped blue" (its last known word counts) or "lilac silver" (mixed)."""
    known = [COLORS[w] for w in words.replace("-", " ").split() if w in COLORS]
    if "tipped" in words or len(known) == 1:
        return known[-1] if "white tipped" not in words else (COLORS["white"][0], COLORS["silver"][1])
    base, dark = np.mean([k[0] for k in known], axis=0), known[0][1]
    return tuple(base), dark


def _iris(color: RGB, rng: np.random.Generator) -> RGB:
    red, green, blue = np.clip(np.array(color) * rng.normal(1, 0.07, 3), 20, 250)
    return red, green, blue


def _eye_color(words: str) -> RGB:
    color = next(EYES[w] for w in reversed(words.replace("-", " ").split()) if w in EYES)
    if "deep" in words:
        return tuple(0.78 * np.array(color))
    return (
        (74, 176, 96) if "emerald" in words else (150, 196, 74) if words in ("vivid green", "luminous green") else color
    )


def _first(table: tuple[tuple[str, float], ...], words: str, default: float) -> float:
    return next((value for word, value in table if word in words), default)


def _all(table: tuple[tuple[str, float], ...], words: str) -> float:
    return float(np.prod([value for word, value in table if word in words]))
