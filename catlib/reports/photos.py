"""The photos behind the figures: confusion matrices whose cells lead to them, breed by breed, and where two models disagree."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image, ImageOps

from catlib.classifiers.tracks import ordered, track
from catlib.data.images import inside, opening, to_rgb
from catlib.data.records import Prediction, PredictionSet, image_root_of, read_predictions
from catlib.errors import InputError
from catlib.evaluation.outcomes import NO_ANSWER, Outcomes, outcomes
from catlib.evaluation.plots_model import confusion_counts, similarity_order
from catlib.paths import resolve
from catlib.reports import html
from catlib.reports.markup import webp

SIDE, QUALITY = 104, 55  # of a thumbnail: pixels, and WebP's quality
ROOM, ROOM_TO_MAIL = 20_000_000, 6_000_000  # bytes that photos may take on their page, and in the file that is mailed
MAIL = 9_000_000  # bytes of that file, of which photos get what the notebooks leave
RIGHT_TO_MAIL = 2  # photos of a breed in that file that all models have right, and that they name differently
CARD = 420  # bytes of a photo's text, about
MOST_ROWS = 40  # of a list of photos that two models name differently
NO_BREED = "(no breed)"
KINDS = ("wrong", "named differently", "right")  # answers of the first model; the second: other models say otherwise
log = logging.getLogger(__name__)


class Thumbnails:
    """Small pictures of photos as style rules, equal ones once; `room`: bytes that they may take."""

    def __init__(self, root: Path, room: float) -> None:
        self.root, self.room = root, room
        self.rules: dict[str, int] = {}

    def add(self, image: str) -> str | None:
        """The class of a photo's thumbnail, "gone" where there is no such photo; None where there is no room."""
        if self.room < CARD:
            return None
        self.room -= CARD
        try:
            path = inside(self.root, image)
            uri = thumbnail(path, path.stat().st_mtime_ns)
        except (InputError, OSError):
            return "gone"
        if uri not in self.rules:
            self.room -= len(uri)
        return f"p{self.rules.setdefault(uri, len(self.rules))}"

    @property
    def style(self) -> Markup:
        """All rules, when the last photo has been added."""
        return Markup("").join(Markup(f".p{n}{{background-image:url({uri})}}\n") for uri, n in self.rules.items())


@lru_cache(20_000)
def thumbnail(path: Path, changed: int) -> str:
    """A photo as a small square data URI; `changed` tells versions of the file apart."""
    with opening(path) as image:
        image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG is decoded at a fraction of its size
        image.load()
        return webp(ImageOps.fit(to_rgb(ImageOps.exif_transpose(image)), (SIDE, SIDE), Image.Resampling.BOX), QUALITY)


def image_root(parameters: Mapping[str, Any]) -> Path:
    """The folder that the images of a run's predictions are relative to."""
    return image_root_of(resolve(str(parameters.get("test_data", "data/vlm/test.jsonl"))))


def albums(
    run_dir: Path, parameters: Mapping[str, Any], models: Mapping[str, Any], mailed: int
) -> list[dict[str, Markup] | None]:
    """The photos of a run for a page of their own and for the file to mail, of which the notebooks take `mailed` bytes: `html`
    and the `style` rules that hold each thumbnail once; None where there are no predictions that can be read. `models`: the
    entries of metrics.json."""
    limits = ((ROOM, 1 << 30), (min(ROOM_TO_MAIL, MAIL - mailed), RIGHT_TO_MAIL))
    try:
        found = {path.stem: read_predictions(path) for path in (run_dir / "predictions").glob("*.jsonl")}
        tracks = {name: _breeds(outcomes(found[name]), models.get(name, {})) for name in ordered(found)}
        root = image_root(parameters)
    except InputError as error:
        log.warning("no page of photos: %s", error)
        return [None] * len(limits)
    return [_album(root, found, tracks, *limit) if tracks else None for limit in limits]


def _album(
    root: Path, sets: Mapping[str, PredictionSet], tracks: Mapping[str, Any], room: int, most_right: int
) -> dict[str, Markup]:
    main, *others = tracks
    answers = {name: {p.id: p for p in sets[name].predictions} for name in tracks}
    thumbnails, left_out, seen = Thumbnails(root, room), Counter[str](), Counter[tuple[int, str | None]]()
    ranked, cards = [], dict[str, dict[str, Any]]()
    for photo in answers[main].values():
        names = {predictions[photo.id].predicted for predictions in answers.values() if photo.id in predictions}
        kind = 0 if photo.predicted != photo.breed else 1 if len(names) > 1 else 2
        seen[kind, photo.breed] += 1
        ranked.append((kind, seen[kind, photo.breed], photo))
    # in the order in which they are worth a look, each kind evenly over the breeds
    for kind, number, photo in sorted(ranked, key=itemgetter(0, 1)):
        picture = thumbnails.add(photo.image) if KINDS[kind] == "wrong" or number <= most_right else None
        if picture is None:
            left_out[KINDS[kind]] += 1
        else:
            said = [(track(m).short, *_said(answers[m][photo.id], sets[m])) for m in tracks if photo.id in answers[m]]
            cards[photo.id] = {"number": len(cards), "picture": picture, "name": Path(photo.image).name, "said": said}
    values = {"cards": cards, "left_out": left_out, "n": len(answers[main]), "main": main, "tracks": [*tracks.values()]}
    values["pairs"] = [_disagreements(answers[main], answers[name], cards) for name in others]
    values["titles"] = {name: track(name).short for name in tracks}
    return {"html": html.part("album.html.j2", values), "style": thumbnails.style}


def _said(answer: Prediction, of: PredictionSet) -> tuple[bool, str]:
    """Whether an answer is right, and the answer: the breeds with the highest scores, or the words."""
    named = answer.predicted or NO_BREED
    if answer.scores:
        top = sorted(zip(answer.scores, of.breeds, strict=True), reverse=True)[:2]
        named = ", ".join(f"{breed} {math.exp(score):.0%}" for score, breed in top if score > math.log(0.005))
    return answer.predicted == answer.breed, f"{named} “{answer.answer[:80]}”" if answer.answer else named


def _breeds(o: Outcomes, model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's confusion matrix, breeds that are often confused side by side, and its photos by true breed and answer."""
    counts, kept = confusion_counts(o)
    order = [kept[i] for i in similarity_order(counts[:, :-1])]
    groups: dict[int, dict[int, list[str]]] = {int(true): defaultdict(list) for true in sorted(set(o.true))}
    for id, true, said in zip(o.ids, o.true.tolist(), o.predicted.tolist(), strict=True):
        groups[true][said].append(id)
    rows = []
    for true, said in groups.items():
        f1, n = model.get("per_breed", {}).get(o.breeds[true], {}), sum(map(len, said.values()))
        figure = {"value": f1.get("f1"), "ci95": f1.get("f1_ci95")}
        rows.append({"number": true, "breed": o.breeds[true], "f1": figure, "F1": f1.get("f1") or 0.0, "photos": n})
    return {
        "name": o.name,
        "names": {NO_ANSWER: NO_BREED} | dict(enumerate(o.breeds)),
        "rows": [true for true in order if true in groups],
        "columns": order + [NO_ANSWER] * bool(counts[:, -1].any()),
        "groups": groups,
        "breeds": rows,
        "wrong": int((~o.correct).sum()),
    }


def _disagreements(
    a: Mapping[str, Prediction], b: Mapping[str, Prediction], cards: Mapping[str, Any]
) -> dict[str, Any]:
    """The photos that two models name differently, side by side, in three lists of at most MOST_ROWS."""
    lists: dict[str, list[Any]] = {"only the first is right": [], "only the second is right": [], "both are wrong": []}
    for one, other in ((a[id], b[id]) for id in a if id in b and a[id].predicted != b[id].predicted):
        kind = 0 if one.predicted == one.breed else 1 if other.predicted == other.breed else 2
        lists[list(lists)[kind]].append((one, other))
    shown = {kind: [pair for pair in rows if pair[0].id in cards][:MOST_ROWS] for kind, rows in lists.items()}
    return {"lists": shown, "counts": {kind: len(rows) for kind, rows in lists.items()}}
