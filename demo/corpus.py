"""What the demo models are taught from: drawn cats with captions, questions and answers.

Half of the cats are of the demo set's common breeds, some of the other breeds, and a third of no breed at all: they
have random traits, so that the models can see the traits of rare breeds, too. None is of a priority breed, and none of
the pictures is in the demo set: their random stream is another.
"""

import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from catlib.breeds import BREEDS, PRIORITY_BREEDS, describe, find
from catlib.progress import track
from demo.drawing import draw_cat
from demo.drawing_look import Look, look_of, random_traits
from demo.photos import SHARES, STREAMS

SIDE = 108  # pixels kept of each picture; the models see crops of it scaled to their own size
COMMON = tuple(name for name in SHARES if name not in PRIORITY_BREEDS)
OTHERS = tuple(breed.name for breed in BREEDS if not breed.priority and breed.name not in SHARES)
TEMPLATES = (
    "a photo of a {}.", "a photo of a {} cat.", "a {} cat.", "{}", "a photo of a {}, a type of cat.",
    "a picture of my {}.",
    "a close-up photo of a {} cat.", "a {}, a breed of cat.",
)  # fmt: skip
QUESTIONS = (
    "What breed is the cat in this photo?", "Which breed is this cat?", "What breed of cat is this?",
    "Name the breed of the cat.",
)  # fmt: skip
MEASURES = ("fur", "crimp", "wrinkles", "white", "ear_size", "ear_round", "ear_spread", "ear_bend", "tufts", "tail", "fluff",
            "width", "legs", "wedge", "cheek", "flat")  # fmt: skip
REPEAT = "Repeat the name of this breed: {}"
LOOKS = (
    ("What color is the cat?", lambda look: look.color),
    ("What pattern does the coat have?", lambda look: look.pattern),
    ("What color are the eyes?", lambda look: look.eye),
    ("How long is the coat?", lambda look: look.coat_length),
    ("Describe the cat.", lambda look: sketch(look)),
)


@dataclass(frozen=True)
class Corpus:
    """n drawn cats: `pixels` (n, 3, SIDE, SIDE) uint8, `breeds` with None for a cat of no breed, and their looks."""

    pixels: torch.Tensor
    breeds: Sequence[str | None]
    looks: Sequence[Look]

    def caption(self, i: int, rng: np.random.Generator) -> str:
        """A caption of cat i: its breed, its traits, or both."""
        breed, look = self.breeds[i], self.looks[i]
        kind = rng.random()
        if breed is None or kind < 0.15:
            return f"a photo of a cat, {sketch(look)}."
        if kind < 0.25:
            return f"a photo of a {breed}, {describe(breed)}."
        return str(rng.choice(TEMPLATES)).format(breed)

    def labels(self) -> torch.Tensor:
        """Breed and traits as class numbers (n, 9); -100 for the breed of a cat of no breed."""
        rows = [
            (breed, look.color, look.pattern, _hair(look), look.eye, *_shape(look), look.rims)
            for breed, look in zip(self.breeds, self.looks, strict=True)
        ]
        columns = []
        for column in zip(*rows, strict=True):
            numbers = {value: i for i, value in enumerate(sorted(set(column) - {None}))}
            columns.append([numbers.get(value, -100) for value in column])
        return torch.tensor(columns).T

    def measures(self) -> torch.Tensor:
        """Sizes, shapes and colours of the cats in standard deviations from their mean, (n, measures)."""
        rows = [
            [
                *(getattr(look, name) for name in MEASURES),
                *look.base,
                *look.dark,
                *look.eyes[0],
                *look.eyes[1],
                look.ringed,
            ]
            for look in self.looks
        ]
        values = torch.tensor(rows, dtype=torch.float32)
        return (values - values.mean(0)) / (values.std(0) + 1e-6)

    def question(self, i: int, rng: np.random.Generator) -> tuple[str, str]:
        """A question about cat i and its answer; or a name to repeat, as a language model can write every breed's."""
        kind = rng.random()
        if kind < 0.15:
            name = BREEDS[rng.integers(len(BREEDS))].name
            return REPEAT.format(name), name
        breed = self.breeds[i]
        if breed is None or kind < 0.4:
            question, answer = LOOKS[rng.integers(len(LOOKS))]
            return question, answer(self.looks[i])
        return str(rng.choice(QUESTIONS)), breed


def sketch(look: Look) -> str:
    """The look of one cat in words."""
    ears, tail, build = _shape(look)
    rims = "rimmed " if look.rims else ""
    return f"{look.color} {look.pattern}, {_hair(look)}, {rims}{look.eye} eyes, {ears} ears, {tail} tail, {build} build"


def _hair(look: Look) -> str:
    return "no hair" if look.coat_length == "hairless" else f"{look.coat_length}{' crimped' if look.crimp else ''} hair"


def _shape(look: Look) -> tuple[str, str, str]:
    """Ears, tail and build in words."""
    sizes = {"very large": look.ear_size > 1.35, "large": look.ear_size > 1.15, "small": look.ear_size < 0.8}
    bends = {"folded": look.ear_bend < 0, "curled": look.ear_bend > 0, "rounded": look.ear_round > 0.6}
    tails = {"no": look.tail < 0.05, "a short": look.tail < 0.45, "a bushy": look.fluff > 0.6}
    builds = {"stocky": look.width > 1.12, "slender": look.width < 0.9}
    ears = f"{_first(sizes, 'medium')} {_first(bends, 'upright')}"
    return ears, _first(tails, "a slim"), _first(builds, "medium")


def _first(cases: Mapping[str, bool], otherwise: str) -> str:
    return next((word for word, holds in cases.items() if holds), otherwise)


def draw_corpus(size: int, seed: int, workers: int = 2) -> Corpus:
    """Draw `size` cats; the same seed gives the same corpus."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        cats = list(track(pool.imap(_draw, ((seed, i) for i in range(size)), chunksize=50), "drawing cats", total=size))
    pixels = torch.from_numpy(np.stack([cat[0] for cat in cats])).permute(0, 3, 1, 2).contiguous()
    return Corpus(pixels, [cat[1] for cat in cats], [cat[2] for cat in cats])


def texts() -> list[str]:
    """Text that shows the tokenizers every word of captions, questions and answers, and every breed's name."""
    rng = np.random.default_rng(0)
    named = [template.format(b.name) for b in BREEDS for template in TEMPLATES] + [describe(b) for b in BREEDS]
    sketches = [sketch(look_of(b.traits, rng)) for b in BREEDS for _ in range(8)]
    asked = [f"USER: {q} ASSISTANT:" for q in (*QUESTIONS, REPEAT, *(q for q, _ in LOOKS)) for _ in range(20)]
    return named + sketches + asked


def augment(pixels: torch.Tensor, side: int, rng: np.random.Generator) -> torch.Tensor:
    """A batch of uint8 pictures as floats from -1 to 1 (n, 3, side, side), each cropped, mirrored and lit at random."""
    n = len(pixels)
    scale = rng.uniform(0.78, 1.02, n)
    shift = rng.uniform(-1, 1, (2, n)) * np.abs(1 - scale)
    mirrored = np.where(rng.random(n) < 0.5, -1, 1)
    nothing = np.zeros(n)
    maps = np.stack([scale * mirrored, nothing, shift[0], nothing, scale, shift[1]], 1).reshape(n, 2, 3)
    grid = torch.nn.functional.affine_grid(
        torch.from_numpy(maps.astype(np.float32)), [n, 3, side, side], align_corners=False
    )
    batch = torch.nn.functional.grid_sample(pixels.float(), grid, padding_mode="reflection", align_corners=False)
    gain = torch.from_numpy(rng.normal(1, 0.06, (n, 3, 1, 1)).astype(np.float32))
    return (batch * gain).clamp(0, 255) / 127.5 - 1


def _draw(job: tuple[int, int]) -> tuple[np.ndarray, str | None, Look]:
    seed, index = job
    rng = np.random.default_rng((seed, STREAMS["demo-models"], index))
    kind = rng.random()
    breed = None if kind < 0.32 else str(rng.choice(COMMON)) if kind < 0.82 else str(rng.choice(OTHERS))
    known = find(breed) if breed else None
    look = look_of(known.traits if known else random_traits(rng), rng)
    picture = draw_cat(look, rng).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(picture), breed, look
