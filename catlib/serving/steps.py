"""One photo to its answer, step by step: what the model sees, what it is given, what it weighs, what it says, and the time."""

import textwrap
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL.Image import Image

from catlib.classifiers.base import Classifier
from catlib.classifiers.explain import seen_photo
from catlib.classifiers.vlm import VLMClassifier
from catlib.colors import BLUE, GREEN, GREY, ORANGE, PINK, SKY
from catlib.data.images import open_image
from catlib.evaluation.tables import number
from catlib.figures import WIDTH, figure, percent_axis
from catlib.vlm.batches import image_token_of
from catlib.vlm.checkpoint import VLM
from catlib.vlm.decoding import generate_greedy
from catlib.vlm.prompting import inference_inputs

PARTS = {
    "decode the photo": GREY,
    "scale, crop, tokenize": PINK,
    "vision tower": ORANGE,
    "projector": GREEN,
    "read the prompt": SKY,
    "write the answer": BLUE,
}


@dataclass(frozen=True)
class Steps:
    """The way of one photo. `grid`: patches across and down, where the photo's tokens are a square; else None."""

    photo: Image
    seen: Image
    grid: int | None
    image_tokens: int
    prompt: str  # what the language model reads; the photo's tokens are counted, not shown
    scores: tuple[tuple[str, float], ...]  # breeds with their probability, the likeliest first
    written: tuple[tuple[str, float], ...]  # tokens of the answer with their probability, the end token included
    answer: str
    breed: str | None  # read off the answer
    truth: str | None
    milliseconds: tuple[float, ...]  # of PARTS

    @property
    def tokens(self) -> pd.DataFrame:
        """The answer's tokens in order with the probability that each had."""
        rows = {"text": [repr(text) for text, _ in self.written], "probability": [f"{p:.1%}" for _, p in self.written]}
        return pd.DataFrame(rows, index=range(1, len(self.written) + 1))


@torch.inference_mode()
def walk_through(classifier: VLMClassifier, path: Path, truth: str | None = None) -> Steps:
    """Take one photo through the model, timing each part; run twice, the first time to warm up.

    The answer is the one of greedy generation, the scores are those of the classifier, which decodes by `score`.
    """
    vlm = classifier.vlm
    _generate(vlm, open_image(path))
    start = time.perf_counter()
    photo = open_image(path)
    decoded = time.perf_counter() - start
    ids, tokens, chances, spent = _generate(vlm, photo)
    decode, image_token = vlm.processor.tokenizer.decode, image_token_of(vlm.base.config)
    answer = decode(tokens, skip_special_tokens=True).strip()
    runs = [(of_photo, list(run)) for of_photo, run in groupby(ids, lambda token: token == image_token)]
    count = ids.count(image_token)
    side = round(count**0.5)
    return Steps(
        photo=photo,
        seen=seen_photo(vlm, photo),
        grid=side if side * side == count else None,
        image_tokens=count,
        prompt="".join(f"[{len(run)} image tokens]" if of_photo else decode(run) for of_photo, run in runs),
        scores=ranked(classifier, photo),
        written=tuple((decode([token]), chance) for token, chance in zip(tokens, chances, strict=True)),
        answer=answer,
        breed=classifier.parser.parse(answer),
        truth=truth,
        milliseconds=tuple(1000 * seconds for seconds in (decoded, *spent)),
    )


def ranked(classifier: Classifier, photo: Image) -> tuple[tuple[str, float], ...]:
    """Every breed with its probability, the likeliest first."""
    scores = classifier.classify([photo]).log_probs
    assert scores is not None, f"{classifier.name} gives no scores"
    return tuple((classifier.breeds[i], float(np.exp(scores[0, i]))) for i in np.argsort(-scores[0]))


def _generate(vlm: VLM, photo: Image) -> tuple[list[int], list[int], list[float], list[float]]:
    """The prompt's tokens, the greedy ones with their probabilities, and the seconds of PARTS but the first."""
    marks: dict[str, float] = {}  # of the first pass through each part

    def mark(name: str) -> None:
        if vlm.device.type == "cuda":
            torch.cuda.synchronize()
        marks.setdefault(name, time.perf_counter())

    with ExitStack() as hooks:
        for part in ("tower", "projector", "language_model"):
            module = vlm.base.get_submodule(getattr(vlm.family, part))
            hooks.enter_context(module.register_forward_pre_hook(lambda *_, p=part: mark(f"{p} begins")))
            hooks.enter_context(module.register_forward_hook(lambda *_, p=part: mark(f"{p} ends")))
        mark("start")
        inputs = inference_inputs(vlm, [photo], [vlm.question])
        mark("ready")
        output = generate_greedy(vlm, inputs, return_dict_in_generate=True, output_logits=True)
        mark("done")
    prompt = inputs["input_ids"][0].tolist()
    tokens = output.sequences[0, len(prompt) :].tolist()
    chances = [float(step[0].float().softmax(-1)[token]) for step, token in zip(output.logits, tokens, strict=True)]
    tower, projector = (marks[f"{part} ends"] - marks[f"{part} begins"] for part in ("tower", "projector"))
    if vlm.family.projector.startswith(f"{vlm.family.tower}."):  # it is a part of the tower
        tower -= projector
    ready, read = marks["ready"], marks["language_model ends"]
    seconds = [ready - marks["start"], tower, projector, read - ready - tower - projector, marks["done"] - read]
    return prompt, tokens, chances, seconds


@figure
def steps_figure(steps: Steps) -> tuple[Figure, str]:
    """The photo, what the model sees of it with its patches, the likeliest breeds, and the time of each part."""
    drawn, panels = plt.subplot_mosaic("ABC;DDD", figsize=(WIDTH, 4.9), height_ratios=(3.4, 0.6))
    left, middle, right, axes = (panels[name] for name in "ABCD")
    for picture, image in ((left, steps.photo), (middle, steps.seen)):
        picture.imshow(image)
        picture.set_axis_off()
    left.set_title("1 · the photo")
    middle.set_title(f"2 · seen as {steps.image_tokens} tokens")
    if steps.grid:
        (width, height), cuts = steps.seen.size, np.linspace(0, 1, steps.grid + 1)
        middle.vlines(cuts * width - 0.5, -0.5, height - 0.5, "white", linewidth=0.4, alpha=0.7)
        middle.hlines(cuts * height - 0.5, -0.5, width - 0.5, "white", linewidth=0.4, alpha=0.7)
    draw_bars(right, steps.scores[:5], steps.truth)
    right.set_title("3 · breeds, by likelihood")
    whole = sum(steps.milliseconds)
    starts = (0.0, *np.cumsum(steps.milliseconds))
    for (part, hue), spent, start in zip(PARTS.items(), steps.milliseconds, starts, strict=False):
        axes.barh(0, spent, left=start, color=hue, label=f"{part}: {number(spent)} ms")
    axes.set(yticks=[], xlim=(0, whole))
    axes.grid(visible=False)
    axes.set_title(f"4 · where {number(whole)} ms go")
    drawn.legend(*axes.get_legend_handles_labels(), ncols=3, loc="outside lower center", fontsize=9)

    read = steps.breed or "no breed of the list"
    truth = "" if steps.truth is None else f" (the photo shows {'it' if steps.breed == steps.truth else steps.truth})"
    most_ms, slowest = max(zip(steps.milliseconds, PARTS, strict=True))
    likeliest, probability = steps.scores[0]
    return drawn, (
        f"The answer is “{steps.answer}”, read as {read}{truth}; the likeliest breed is {likeliest}, at {probability:.0%}. "
        f"{most_ms / whole:.0%} of {number(whole)} ms go into one part: {slowest}."
    )


def draw_bars(axes: Axes, scores: Sequence[tuple[str, float]], truth: str | None = None, hue: str = BLUE) -> None:
    """Breeds with their probabilities as bars, the likeliest on top; the true breed's name stands in bold."""
    bars = axes.barh(range(len(scores)), [probability for _, probability in scores], color=hue, height=0.62)
    axes.bar_label(bars, [f"{probability:.1%}" for _, probability in scores], padding=3, fontsize=9)
    names = [textwrap.shorten(breed.split(" - ")[0], 22, placeholder="…") for breed, _ in scores]
    axes.set_yticks(range(len(scores)), names)
    for label, (breed, _) in zip(axes.get_yticklabels(), scores, strict=True):
        label.set_fontweight("bold" if breed == truth else "normal")
    axes.invert_yaxis()
    percent_axis(axes, high=1.18)  # room for the label of a sure answer
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
