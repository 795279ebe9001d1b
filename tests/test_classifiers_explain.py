"""Heat maps: right where the truth is known, and in agreement with plain measurement."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoders import llava, photo

from catlib.classifiers.explain import (
    explain_prediction,
    falls_when_hidden,
    pick_examples,
    seen_photo,
)
from catlib.classifiers.vlm import VLMClassifier
from catlib.data.records import Prediction, PredictionSet
from catlib.errors import CatlibError
from catlib.evaluation.plots_photos import explanations
from catlib.vlm.attribution import image_positions, occluded_scores, patch_gradients
from catlib.vlm.families import FAMILIES
from catlib.vlm.scoring import LabelScorer

QUESTION, BREEDS = "Breed?", ["Manx", "Persian", "Siamese"]


@pytest.fixture(scope="module")
def vlm():
    return llava(question=QUESTION)


@pytest.mark.parametrize("method", ["gradient", "occlusion"])
def test_planted_evidence_is_found(vlm, method):
    """Below its embeddings the language model sees one image token only: all other patches must count nothing."""
    row, column = 2, 1
    ids = vlm.processor(images=photo(3), text=f"USER: <image>\n{QUESTION} ASSISTANT:", return_tensors="pt")[
        "input_ids"
    ][0]
    others = list(image_positions(vlm, ids)[0].tolist())
    others.pop(row * 4 + column)

    def blind(_, args):
        hidden = args[0].clone()
        hidden[:, others] = 0.1
        return (hidden, *args[1:])

    handle = vlm.model.model.language_model.layers[0].register_forward_pre_hook(blind)
    try:
        if method == "gradient":
            heat = patch_gradients(vlm, photo(3), QUESTION, "Persian")
        else:
            masks = [patch(None, None), *(patch(r, c) for r in range(4) for c in range(4))]
            whole, *occluded = occluded_scores(vlm, photo(3), QUESTION, "Persian", masks)
            heat = (whole - np.array(occluded)).reshape(4, 4)
    finally:
        handle.remove()
    assert abs(heat[row, column]) > 1e-3
    heat[row, column] = 0
    assert np.abs(heat).max() < 1e-5


def patch(row, column) -> np.ndarray:
    mask = np.zeros((4, 4), dtype=bool)
    if row is not None:
        mask[row, column] = True
    return mask


def test_nothing_occluded_is_the_score(vlm):
    scores = LabelScorer(vlm, BREEDS, QUESTION).score([photo(1)])[0]
    for breed, score in zip(BREEDS, scores, strict=True):
        assert abs(occluded_scores(vlm, photo(1), QUESTION, breed, [patch(None, None)])[0] - score) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("breed", BREEDS)
def test_gradients_add_up_to_what_the_photo_changes(vlm, breed):
    """Completeness of integrated gradients: the sum is the score of the photo less that of a featureless one."""
    heat = patch_gradients(vlm, photo(2), QUESTION, breed, steps=200)
    whole, featureless = occluded_scores(
        vlm, photo(2), QUESTION, breed, [patch(None, None), np.ones((4, 4), dtype=bool)]
    )
    assert heat.shape == (4, 4) and abs(whole - featureless) > 0.05
    assert abs(heat.sum() - (whole - featureless)) < 0.02 * np.abs(heat).sum()


@pytest.mark.slow
def test_hiding_the_most_relevant_patches_costs_more_than_hiding_others(vlm):
    gaps = []
    for seed in range(6):
        order = np.argsort(patch_gradients(vlm, photo(seed), QUESTION, "Persian").ravel())
        masks = [np.isin(np.arange(16), part).reshape(4, 4) for part in (order[-4:], order[:4])]
        best, worst = occluded_scores(vlm, photo(seed), QUESTION, "Persian", masks)
        gaps.append(worst - best)
    assert np.mean(gaps) > 0 and np.mean(np.array(gaps) > 0) > 0.8


def test_hiding_what_the_map_marks_is_measured(vlm):
    """One patch of 16 is a tenth; the map that marks the costliest patch falls furthest, one that marks another less."""
    whole, *single = occluded_scores(
        vlm, photo(3), QUESTION, "Persian", [patch(None, None), *(patch(r, c) for r in range(4) for c in range(4))]
    )
    falls = whole - np.array(single)
    best, mean = falls_when_hidden(vlm, photo(3), QUESTION, "Persian", falls.reshape(4, 4))
    worst, again = falls_when_hidden(vlm, photo(3), QUESTION, "Persian", -falls.reshape(4, 4))
    assert best == pytest.approx(falls.max(), abs=1e-4) and worst == pytest.approx(falls.min(), abs=1e-4)
    assert mean == again and falls.min() < mean < falls.max()


def test_explaining_leaves_the_model_as_it_was(vlm):
    before = LabelScorer(vlm, BREEDS, QUESTION).score([photo(0)])
    patch_gradients(vlm, photo(0), QUESTION, "Manx")
    assert np.array_equal(before, LabelScorer(vlm, BREEDS, QUESTION).score([photo(0)]))
    assert all(parameter.grad is None for parameter in vlm.model.parameters())


def test_grids(vlm):
    token = vlm.model.config.image_token_index

    class Other:
        base = type("M", (), {"config": type("C", (), {"image_token_id": token})()})()
        family = next(family for family in FAMILIES if family.name == "Pixtral")

    rows = torch.tensor([5, *[token] * 3, 7, *[token] * 3, 9])
    assert image_positions(Other, rows)[1] == (2, 3)
    Other.family = next(family for family in FAMILIES if family.tiled)
    tiles = torch.tensor([*[token] * 4, 7, *[token] * 4])
    positions, grid = image_positions(Other, tiles)
    assert grid == (2, 2) and positions.tolist() == [5, 6, 7, 8]
    with pytest.raises(CatlibError, match="no grid"):
        image_positions(Other, torch.tensor([token] * 5))


def test_seen_photo_is_the_centre_that_the_processor_keeps(vlm):
    wide = Image.new("RGB", (84, 28), "red")
    wide.paste("blue", (28, 0, 56, 28))
    seen = np.asarray(seen_photo(vlm, wide))
    assert seen.shape == (28, 28, 3) and np.abs(seen[:, 3:-3].astype(int) - [0, 0, 255]).max() < 20


@pytest.mark.slow
def test_panel_says_what_was_asked_and_answered(vlm):
    classifier = VLMClassifier(vlm, BREEDS)
    rows = [explain_prediction(classifier, photo(i), truth) for i, truth in enumerate(["Persian", None])]
    figure = explanations(rows).figure
    titles = [axis.get_title(loc) for axis in figure.axes for loc in ("left", "center")]
    words = " ".join([*titles, *(text.get_text() for axis in figure.axes for text in axis.texts)])
    assert "breed not known" in words and f"predicted: {rows[0].predicted}, {rows[0].probability:.0%} sure" in words
    assert "the breed's standard" in words and "in its own words" in words and "hiding the strongest tenth" in words
    figure.canvas.draw()


def test_examples_are_right_wrong_and_priority():
    def row(id, breed, predicted, best):
        return Prediction(id, id, breed, predicted, (best, -9.0, -9.0))

    rows = (
        row("a", "Manx", "Manx", -0.1),
        row("b", "Manx", "Manx", -0.5),
        row("c", "Persian", "Manx", -0.2),
        row("d", "Siamese", "Siamese", -0.3),
        row("e", "Manx", None, -0.1),
    )
    assert [p.id for p in pick_examples(PredictionSet("m", rows), ["Siamese"], each=1)] == ["a", "c", "d"]


def test_examples_show_other_breeds_first_and_a_rare_breed_that_is_right():
    def row(id, breed, predicted, best):
        return Prediction(id, id, breed, predicted, (best, -9.0, -9.0))

    rows = (
        row("a", "Manx", "Manx", -0.1),
        row("b", "Manx", "Manx", -0.2),
        row("c", "Persian", "Persian", -0.9),
        row("d", "Siamese", "Manx", -0.1),
        row("e", "Siamese", "Siamese", -0.8),
        row("f", "Siamese", "Persian", -0.3),
    )
    assert [p.id for p in pick_examples(PredictionSet("m", rows), ["Siamese"], each=2)] == ["a", "c", "e", "d"]
