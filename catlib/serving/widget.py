"""Photos tried by hand: the likeliest breeds, the breed's traits and CLIP's opinion beside them, as a widget or a figure."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL.Image import Image

from catlib.breeds import describe, find
from catlib.classifiers.base import Classifier
from catlib.classifiers.vlm import VLMClassifier
from catlib.colors import BLUE, ORANGE
from catlib.errors import CatlibError
from catlib.figures import WIDTH, Shown, figure
from catlib.serving.service import Photo, read_photo
from catlib.serving.steps import draw_bars, ranked
from catlib.vlm.decoding import generate_free

PIXELS = 480  # photos are shown at this size at most


@dataclass(frozen=True)
class Opinion:
    """What two models make of a photo: breeds with probabilities, the likeliest first; `clip` is empty without CLIP."""

    photo: Image
    answer: str
    breed: str | None  # read off the answer
    vlm: tuple[tuple[str, float], ...]
    clip: tuple[tuple[str, float], ...]

    @property
    def traits(self) -> str:
        """The standard of the breed that the answer names, else of the likeliest: what to look for in the photo."""
        breed = self.breed or self.vlm[0][0]
        return f"{breed}: {describe(breed)}" if find(breed) else f"{breed} is not in the list of known breeds"


def form_opinion(image: Photo, vlm: VLMClassifier, clip: Classifier | None = None) -> Opinion:
    """Ask both models about a photo. `vlm` decodes by `score`. Raises InputError when the photo cannot be read."""
    photo = read_photo(image)
    answer = generate_free(vlm.vlm, [photo], vlm.vlm.question)[0]
    return Opinion(photo, answer, vlm.parser.parse(answer), ranked(vlm, photo), ranked(clip, photo) if clip else ())


@figure
def opinion_figure(opinion: Opinion, most: int = 5) -> tuple[Figure, str]:
    """A photo, the VLM's likeliest breeds and CLIP's as bars, below them the answer and the traits."""
    bars = {"V": ("the tuned VLM", opinion.vlm, BLUE), "C": ("zero-shot CLIP", opinion.clip, ORANGE)}
    shown = {panel: bar for panel, bar in bars.items() if bar[1]}
    layout = f"P{''.join(shown)};{'W' * (1 + len(shown))}"
    drawn, axes = plt.subplot_mosaic(layout, figsize=(WIDTH, 4.2), height_ratios=(3.2, 1))
    photo = opinion.photo.copy()
    photo.thumbnail((PIXELS, PIXELS))
    axes["P"].imshow(photo)
    axes["P"].set_axis_off()
    for panel, (title, scores, hue) in shown.items():
        draw_bars(axes[panel], scores[:most], hue=hue)
        axes[panel].set_title(title)
    words = [f"The VLM says: “{opinion.answer}”", f"What to look for. {opinion.traits}."]
    text = "\n".join(textwrap.fill(line, 132, max_lines=3, placeholder=" …") for line in words)
    axes["W"].text(0, 1, text, va="top", color=BLUE if opinion.breed else ORANGE, linespacing=1.4)
    axes["W"].set_axis_off()
    likeliest = [f"{name} {scores[0][0]}" for name, scores in (("VLM", opinion.vlm), ("CLIP", opinion.clip)) if scores]
    return drawn, f"Likeliest breed: {', '.join(likeliest)}."


class PhotoWidget:
    """A panel to pick a photo, from a file or among `photos`, and see what both models make of it.

    The first of `photos` is looked at to begin with. `shown` is the figure of the last one that was looked at, and the panel
    shows itself as that wherever widgets do not live, as in a report's page.
    """

    def __init__(self, vlm: VLMClassifier, clip: Classifier | None = None, photos: Sequence[Path] = ()) -> None:
        self.vlm, self.clip = vlm, clip
        self.opinion: Opinion | None = None
        self.shown: Shown | None = None
        self.upload = ipywidgets.FileUpload(accept="image/*", multiple=False, description="Photo …")
        options = [(f"{path.parent.name}/{path.name}", path) for path in photos]
        self.examples = ipywidgets.Dropdown(options=options, description="or one of:", layout={"width": "24em"})
        self.status = ipywidgets.HTML()
        self.picture = ipywidgets.Image(format="png", layout={"max_width": "100%"})
        bar = ipywidgets.HBox([self.upload, *([self.examples] if photos else []), self.status])
        self.box = ipywidgets.VBox([bar, self.picture])
        if photos:
            self._show(form_opinion(photos[0], vlm, clip))
        self.upload.observe(self._picked, "value")
        self.examples.observe(self._picked, "value")

    def look(self, image: Photo) -> None:
        """Form an opinion of a photo and show it; of one that cannot be read, say why and leave the last one."""
        self.status.value = "looking …"
        try:
            self._show(form_opinion(image, self.vlm, self.clip))
            self.status.value = ""
        except CatlibError as error:
            self.status.value = f"<b>{escape(str(error))}</b>"

    def _show(self, opinion: Opinion) -> None:
        self.opinion, self.shown = opinion, opinion_figure(opinion)
        self.picture.value = self.shown.png()

    def _picked(self, change: dict[str, Any]) -> None:
        """A file that was uploaded, or an example that was chosen."""
        if new := change["new"]:
            self.look(new if isinstance(new, Path) else bytes(new[-1]["content"]))

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The widget for front ends that know widgets, and the figure for all others."""
        bundle = dict(self.box._repr_mimebundle_(**options) or {})
        return bundle | ({"text/html": self.shown._repr_html_()} if self.shown else {})
