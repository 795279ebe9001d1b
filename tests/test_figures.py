"""Figures that show themselves: any script, long names, and letters that can be read."""

import base64
import re
import xml.etree.ElementTree as ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.text import Text

from catlib.figures import LONGEST, SMALLEST, WIDTH, breed_label, figure


@figure
def bars(names, photo=False):
    """Bars."""
    fig, axes = plt.subplots(figsize=(WIDTH, 3))
    if photo:
        axes.imshow(np.zeros((4, 4, 3)))
    axes.set_yticks(range(len(names)), [breed_label(name, False) for name in names], fontsize=4)
    return fig, "A caption."


def shown_source(shown):
    return re.search(r'src="data:image/([^;]+);base64,([^"]+)"', shown._repr_html_()).groups()


@pytest.mark.slow
def test_names_that_the_font_lacks_are_written_by_the_readers_own():
    kind, data = shown_source(bars(["ペルシャ猫", "قط", "R&D <b> $x^{2$", "a\x01b"]))
    assert kind == "svg+xml"
    texts = "".join(ElementTree.fromstring(base64.b64decode(data)).itertext())
    assert "ペルシャ猫" in texts and "قط" in texts and "R&D <b> $x^{2$" in texts and "ab" in texts
    assert shown_source(bars(["Manx", "Кот"]))[0] == shown_source(bars(["ペルシャ猫"], photo=True))[0] == "png"


@pytest.mark.parametrize("photo", [False, True])
def test_a_drawing_is_offered_as_svg_and_marked(photo):
    shown = bars(["Manx"], photo)
    assert ("image/svg+xml" in shown._repr_mimebundle_()) is not photo
    assert ('class="drawing"' in shown._repr_html_()) is not photo


def test_letters_have_a_least_size_and_long_names_lose_their_middle():
    shown = bars(["Manx"])
    shown.png()
    assert min(text.get_fontsize() for text in shown.figure.findobj(Text) if text.get_text()) >= SMALLEST
    name = "A very long name of a breed, second variety"
    assert len(breed_label(name, False)) <= LONGEST + 1 and breed_label(name, False).endswith("riety")
    assert breed_label("Sphynx - Hairless Cat", True) == "★ Sphynx"
