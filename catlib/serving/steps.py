"""One photo to its answer, step by step: what the model sees, what it is given, what it weighs, what it says, and the time."""

import html
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL.Image import Image

from catlib.classifiers.explain import seen_photo
from catlib.classifiers.vlm import VLMClassifier
from catlib.data.images import open_image
from catlib.evaluation.style import BLUE, GREEN, GREY, INK, ORANGE, PINK, SKY, WIDTH, styled
from catlib.evaluation.tables import Rows, number
from catlib.parsing import BreedParser
from catlib.vlm.batches import image_token_of
from catlib.vlm.decoding import greedy_options
from catlib.vlm.prompting import inference_inputs

if TYPE_CHECKING:
    from catlib.vlm.models import VLM

PARTS = (
    "decode the photo",
    "scale, crop, tokenize",
    "vision tower",
    "projector",
    "read the prompt",
    "write the answer",
)
PART_COLORS = (GREY, PINK, ORANGE, GREEN, SKY, BLUE)


@dataclass(frozen=True)
class Steps:
    """The way of one photo. `grid`: patches across and down, where the photo's tokens are a square; else None."""

    photo: Image
    seen: Image
    grid: int | None
    image_tokens: int
    prompt: tuple[tuple[str, str], ...]  # the text in parts, with what each is: text | image
    scores: tuple[tuple[str, float], ...]  # breeds with their probability, the likeliest first
    written: tuple[tuple[str, float], ...]  # tokens of the answer with their probability, the end token included
    answer: str
    breed: str | None  # read off the answer
    truth: str | None
    milliseconds: tuple[float, ...]  # of PARTS


@torch.inference_mode()
def walk_through(classifier: VLMClassifier, path: Path, truth: str | None = None) -> Steps:
    """Take one photo through the model, timing each part; run twice, the first time to warm up.

    The answer is the one of greedy generation, the scores are those of the classifier, which decodes by `score`.
    """
    vlm, question = classifier.vlm, classifier.prompt
    _generate(vlm, open_image(path), question)
    times = [time.perf_counter()]
    photo = open_image(path)
    times.append(time.perf_counter())
    tokens, spent, inputs = _generate(vlm, photo, question)
    batch = classifier.classify([photo])
    order = np.argsort(-batch.log_probs[0])
    decode = vlm.processor.tokenizer.decode
    answer = decode([token for token, _ in tokens], skip_special_tokens=True).strip()
    ids, image_token = inputs["input_ids"][0].tolist(), image_token_of(vlm.base.config)
    count = ids.count(image_token)
    side = round(count**0.5)
    return Steps(
        photo,
        seen_photo(vlm, photo),
        side if side * side == count else None,
        count,
        tuple(_prompt_parts(vlm, ids, image_token)),
        tuple((classifier.breeds[i], float(np.exp(batch.log_probs[0, i]))) for i in order),
        tuple((decode([token]), probability) for token, probability in tokens),
        answer,
        BreedParser(classifier.breeds).parse(answer),
        truth,
        (1000 * (times[1] - times[0]), *spent),
    )


def _generate(vlm: "VLM", photo: Image, question: str) -> tuple[list[tuple[int, float]], list[float], dict]:
    """Greedy tokens with their probabilities, the milliseconds of PARTS[1:], and the inputs."""
    marks: dict[str, float] = {}  # of the first pass through each part
    parts = {"tower": vlm.family.tower, "projector": vlm.family.projector, "reader": vlm.family.language_model}
    handles = []
    for name, path in parts.items():
        module = vlm.base.get_submodule(path)
        handles.append(module.register_forward_pre_hook(lambda *_, n=name: _mark(marks, f"{n} begins", vlm)))
        handles.append(module.register_forward_hook(lambda *_, n=name: _mark(marks, f"{n} ends", vlm)))
    start = _now(vlm)
    inputs = inference_inputs(vlm, [photo], [question])
    ready = _now(vlm)
    try:
        output = vlm.base.generate(**inputs, **greedy_options(vlm), return_dict_in_generate=True, output_logits=True)
    finally:
        for handle in handles:
            handle.remove()
    written = _now(vlm)
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    chances = [float(step[0].float().softmax(-1)[token]) for step, token in zip(output.logits, tokens, strict=True)]
    tower, projector = (marks[f"{part} ends"] - marks[f"{part} begins"] for part in ("tower", "projector"))
    if vlm.family.projector.startswith(f"{vlm.family.tower}."):  # Qwen-VL's is a part of its tower
        tower -= projector
    read = marks["reader ends"]
    seconds = [ready - start, tower, projector, read - ready - tower - projector, written - read]
    return list(zip(tokens, chances, strict=True)), [1000 * s for s in seconds], inputs


def _mark(marks: dict[str, float], name: str, vlm: "VLM") -> None:
    if name not in marks:
        marks[name] = _now(vlm)


def _now(vlm: "VLM") -> float:
    if vlm.base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _prompt_parts(vlm: "VLM", ids: list[int], image_token: int) -> list[tuple[str, str]]:
    parts: list[tuple[str, list[int]]] = []
    for token in ids:
        role = "image" if token == image_token else "text"
        if not parts or parts[-1][0] != role:
            parts.append((role, []))
        parts[-1][1].append(token)
    decode = vlm.processor.tokenizer.decode
    return [(f"[{len(run)} image tokens]" if role == "image" else decode(run), role) for role, run in parts]


@styled
def steps_figure(steps: Steps, most: int = 5) -> Figure:
    """The photo, what the model sees of it with its patches, the likeliest breeds, and below the time of each part."""
    figure, panels = plt.subplot_mosaic(
        [["photo", "seen", "scores"], ["time", "time", "time"]],
        figsize=(WIDTH, 4.9),
        height_ratios=(3.4, 0.6),
        width_ratios=(1, 1, 0.95),
    )
    left, middle, right = panels["photo"], panels["seen"], panels["scores"]
    left.imshow(steps.photo)
    left.set_title("1 · the photo")
    middle.imshow(steps.seen)
    middle.set_title(f"2 · seen as {steps.image_tokens} tokens")
    if steps.grid:
        width, height = steps.seen.size
        for cut in range(steps.grid + 1):
            middle.axvline(cut * width / steps.grid - 0.5, color="white", linewidth=0.4, alpha=0.7)
            middle.axhline(cut * height / steps.grid - 0.5, color="white", linewidth=0.4, alpha=0.7)
    for axes in (left, middle):
        axes.set_axis_off()
    draw_bars(right, steps.scores[:most], steps.truth)
    right.set_title("3 · breeds, by likelihood")
    axes = panels["time"]
    begin = 0.0
    for part, spent, hue in zip(PARTS, steps.milliseconds, PART_COLORS, strict=True):
        axes.barh(0, spent, left=begin, color=hue, label=f"{part}: {number(spent)} ms")
        begin += spent
    axes.set_yticks([])
    axes.set_xlim(0, begin)
    axes.grid(visible=False)
    axes.set_title(f"4 · where {number(begin)} ms go")
    figure.legend(*axes.get_legend_handles_labels(), ncols=3, loc="outside lower center", fontsize=9)
    return figure


def draw_bars(axes: plt.Axes, scores: tuple[tuple[str, float], ...], truth: str | None = None, hue: str = BLUE) -> None:
    """Breeds with their probabilities as bars, the likeliest on top; the true breed's name stands in bold."""
    rows = range(len(scores))[::-1]
    axes.barh(rows, [probability for _, probability in scores], color=hue, height=0.62)
    axes.set_yticks(rows, [textwrap.shorten(breed.split(" - ")[0], 22, placeholder="…") for breed, _ in scores])
    for row, (breed, probability) in zip(rows, scores, strict=True):
        inside = probability > 0.8
        axes.text(
            probability + (-0.02 if inside else 0.02),
            row,
            f"{probability:.1%}",
            va="center",
            fontsize=9,
            ha="right" if inside else "left",
            color="white" if inside else INK,
        )
        if breed == truth:
            axes.get_yticklabels()[rows.index(row)].set_fontweight("bold")
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(lambda value, _: f"{round(100 * value):d} %")


def prompt_words(steps: Steps) -> str:
    """The prompt as the model gets it, in Markdown."""
    text = "".join(part for part, _ in steps.prompt).replace("`", "'")
    return f"What the language model reads:\n\n```text\n{text}\n```"


def written_rows(steps: Steps) -> Rows:
    """The answer's tokens in order with the probability that each had."""
    return [
        {
            "token": str(i),
            "text": f"<code>{html.escape(repr(text)).replace('|', '&#124;')}</code>",
            "probability": f"{probability:.1%}",
        }
        for i, (text, probability) in enumerate(steps.written, start=1)
    ]


def steps_sentence(steps: Steps) -> str:
    """Answer, breed, truth, whether likelihood and words agree, and the slowest part."""
    likeliest, probability = steps.scores[0]
    said = f"The answer is “{steps.answer}”, read as " + (
        f"**{steps.breed}**" if steps.breed else "no breed of the list"
    )
    truth = "" if steps.truth is None else f" (the photo shows {'it' if steps.breed == steps.truth else steps.truth})"
    agree = "The likeliest breed is the same" if likeliest == steps.breed else f"The likeliest breed is {likeliest}"
    slowest = int(np.argmax(steps.milliseconds))
    share = steps.milliseconds[slowest] / sum(steps.milliseconds)
    return (
        f"{said}{truth}. {agree}, at {probability:.0%}. Of {number(sum(steps.milliseconds))} ms, {share:.0%} go into one part: "
        f"{PARTS[slowest]}."
    )
