"""The widget: a photo is picked, both models are asked, and the picture changes."""

from html import escape

import pytest
from serving_cases import BROKEN, jpeg, one_thread  # noqa: F401
from tiny_encoders import clip, llava
from tiny_models import BREEDS, QUESTION

from catlib.breeds import describe
from catlib.classifiers.clip import ClipZeroShot
from catlib.classifiers.encoder import ClipEncoder
from catlib.classifiers.vlm import VLMClassifier
from catlib.serving.widget import PhotoWidget, form_opinion, opinion_figure
from catlib.vlm.decoding import generate_free


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    encoder = ClipEncoder.load(str(clip(tmp_path_factory.mktemp("clip"))), "cpu")
    return VLMClassifier(llava(question=QUESTION), BREEDS), ClipZeroShot(encoder, BREEDS, "plain")


@pytest.fixture
def photos(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    return sorted(tmp_path.glob("*.jpg"))


@pytest.mark.slow
def test_an_opinion_is_what_the_models_say(models, photos):
    vlm, clip_model = models
    opinion = form_opinion(photos[1], vlm, clip_model)
    for classifier, found in ((vlm, opinion.vlm), (clip_model, opinion.clip)):
        batch = classifier.classify([opinion.photo])
        assert found[0][0] == batch.predicted[0] and sum(p for _, p in found) == pytest.approx(1)
        assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)
    assert opinion.answer == generate_free(vlm.vlm, [opinion.photo], QUESTION)[0]
    assert opinion.traits == f"{opinion.vlm[0][0]}: {describe(opinion.vlm[0][0])}"
    shown = opinion_figure(opinion, most=3)
    assert opinion.vlm[0][0] in shown.caption and opinion.clip[0][0] in shown.caption
    bars = [axes for axes in shown.figure.axes if axes.patches]
    assert [len(axes.patches) for axes in bars] == [3, 3]
    assert [round(patch.get_width(), 6) for patch in bars[0].patches] == [round(p, 6) for _, p in opinion.vlm[:3]]
    alone = opinion_figure(form_opinion(jpeg(1), vlm)).figure  # without CLIP
    assert len([axes for axes in alone.axes if axes.patches]) == 1


def pick(panel, content):
    """What the front end sends when a file is chosen."""
    file = {
        "name": "mine.jpg",
        "type": "image/jpeg",
        "size": len(content),
        "last_modified": 0,
        "content": memoryview(content),
    }
    panel.upload.set_state({"value": [file]})


@pytest.mark.slow
def test_a_photo_is_picked(models, photos):
    assert "text/html" not in PhotoWidget(*models)._repr_mimebundle_()  # no photo has been looked at
    panel = PhotoWidget(*models, photos)
    bundle = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle  # for JupyterLab, and for all others:
    first = bytes(panel.picture.value)
    assert first.startswith(b"\x89PNG") and escape(panel.shown.caption) in bundle["text/html"]
    pick(panel, jpeg(2))
    assert panel.opinion.vlm == form_opinion(jpeg(2), *models).vlm and panel.picture.value != first
    shown = panel.picture.value
    pick(panel, BROKEN)
    assert f"photo of {len(BROKEN)} bytes" in panel.status.value and panel.picture.value == shown
    panel.examples.value = photos[1]
    assert panel.opinion.vlm == form_opinion(photos[1], *models).vlm and panel.status.value == ""
    assert panel.picture.value != shown
    assert panel.shown.caption == opinion_figure(panel.opinion).caption
    assert escape(panel.shown.caption) in panel._repr_mimebundle_()["text/html"]
