"""Every figure draws without a warning for 2, 10 and 67 breeds, shows once, and has a sentence with true figures."""

import warnings
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from evaluation_cases import BREEDS, RARE, make_set, scored_set, truth
from matplotlib.figure import Figure
from PIL import Image

from catlib.evaluation import plots, plots_breeds, plots_calibration, plots_photos, plots_time
from catlib.evaluation.calibration import calibrate
from catlib.evaluation.compare import compare
from catlib.evaluation.conclusions import explanations_sentence
from catlib.evaluation.metrics import evaluate
from catlib.evaluation.outcomes import outcomes

MANY = tuple(f"Breed number {i}" for i in range(67))


def draw(figure, sentence):
    """Draw as a report would; a warning (a glyph missing, a layout that collapses) fails the test."""
    assert isinstance(figure, Figure) and figure.number not in plt.get_fignums() if hasattr(figure, "number") else True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()
    assert sentence.endswith(".") and sentence[0].isupper() and "nan" not in sentence
    return sentence


@pytest.mark.parametrize("breeds", [BREEDS[:2], BREEDS, MANY])
def test_every_figure_draws(breeds, tmp_path):
    rare = breeds[:1]
    true, val = truth(4, breeds), truth(3, breeds)
    tuned = scored_set("vlm-tuned", true, 0.7, breeds=breeds, seed=1)
    said = [
        None if i % 9 == 0 else p.predicted
        for i, p in enumerate(scored_set("b", true, 0.4, breeds=breeds, seed=2).predictions)
    ]
    clip = make_set("clip-zero-shot", true, said, breeds=breeds, latency_ms=5.0)
    models = {s.name: evaluate(s, rare, bootstrap=100) for s in (tuned, clip)}
    o, versus = outcomes(tuned), compare(tuned, clip, rare, bootstrap=100)
    view = calibrate(outcomes(scored_set("vlm-tuned", val, 0.7, breeds=breeds, seed=3)), o)
    silent = calibrate(None, outcomes(clip))
    for breed in breeds:
        (tmp_path / breed).mkdir()
    for p in tuned.predictions:
        Image.new("RGB", (40, 30), "gray").save(tmp_path / p.image)
    draw(plots_breeds.confusion_figure(o, rare), plots_breeds.confusion_sentence(o))
    draw(plots_breeds.confusion_figure(outcomes(clip), rare), plots_breeds.confusion_sentence(outcomes(clip)))
    draw(
        plots_breeds.f1_figure(models, "vlm-tuned", beside="clip-zero-shot"),
        plots_breeds.f1_sentence(models, "vlm-tuned"),
    )
    draw(plots_breeds.f1_figure(models, "vlm-tuned", beside="vlm-base"), "One that was not run is left out.")
    for c in (view, silent):
        draw(plots_calibration.reliability_figure(c), plots_calibration.reliability_sentence(c))
        draw(plots_calibration.risk_coverage_figure([c]), plots_calibration.risk_coverage_sentence(c))
    draw(plots.overview_figure(models), plots.overview_sentence(models))
    draw(plots.gain_figure(versus), plots.gain_sentence(versus))
    draw(plots_time.time_figure(models, 150.0), plots_time.time_sentence(models, 150.0))
    draw(plots_photos.mistakes_figure(o, tmp_path, rare), plots_photos.mistakes_sentence(o))
    draw(plots_photos.disagreement_figure(versus, tmp_path, rare), plots_photos.disagreement_sentence(versus))
    runs = [(x, {"models": models}) for x in (5, 10, 20)]
    draw(plots.learning_curve_figure(runs, "photos_per_breed"), plots.learning_curve_sentence(runs, "photos_per_breed"))


def test_sentences_say_what_was_planted():
    true = ["Bengal"] * 10 + ["Birman"] * 10 + ["Manx"] * 5
    said = ["Bengal"] * 10 + ["Manx"] * 7 + ["Birman"] * 3 + [None] * 5
    o = outcomes(make_set("vlm-tuned", true, said))
    assert "Birman called Manx (7 of 10 photos)" in plots_breeds.confusion_sentence(o)
    models = {"vlm-tuned": evaluate(make_set("vlm-tuned", true, said, latency_ms=200.0), ["Manx"], bootstrap=100)}
    assert "from 0% (Manx, 5 photos) to 100% (Bengal, 10 photos)" in plots_breeds.f1_sentence(models, "vlm-tuned")
    assert "the tuned VLM exceeds the budget of 150 ms" in plots_time.time_sentence(models, 150.0)
    assert "without scores" in plots_calibration.reliability_sentence(calibrate(None, o))


def test_learning_curve_says_whether_more_data_still_helps():
    def run(value):
        return {"models": {"vlm-tuned": {"priority_macro_f1": {"value": value, "ci95": [value - 0.05, value + 0.05]}}}}

    rising = plots.learning_curve_sentence([(20, run(0.6)), (5, run(0.2)), (10, run(0.4))], "photos_per_breed")
    assert "from 20.0%" in rising and "60.0%" in rising and rising.endswith("still rising.")
    level = plots.learning_curve_sentence([(5, run(0.2)), (10, run(0.22))], "photos_per_breed")
    assert level.endswith("level within its uncertainty.")
    assert "not enough runs" in plots.learning_curve_sentence([(5, run(0.2))], "photos_per_breed")


def test_similar_breeds_stand_side_by_side():
    """Breeds 0 and 9 are taken for each other, as are 3 and 6: in the order they are neighbours."""
    counts = np.diag(np.full(10, 20))
    for a, b in ((0, 9), (3, 6)):
        counts[a, b] = counts[b, a] = 15
    order = list(plots_breeds.similarity_order(counts))
    assert sorted(order) == list(range(10))
    assert abs(order.index(0) - order.index(9)) == 1 and abs(order.index(3) - order.index(6)) == 1


def test_priority_breeds_are_marked_and_photos_counted():
    true = truth(3)
    figure = plots_breeds.confusion_figure(outcomes(scored_set("vlm-tuned", true, 0.8)), RARE)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "★ Cymric (3)" in labels and "Manx (3)" in labels


def test_no_model_is_called_best_where_all_have_nothing():
    true = ["Bengal"] * 10 + ["Manx"] * 5
    models = {
        n: evaluate(make_set(n, true, ["Bengal"] * 15), ["Manx"], bootstrap=100) for n in ("vlm-tuned", "vlm-base")
    }
    assert plots.overview_sentence(models).endswith("of the priority breeds no model has a single photo right.")


def test_a_missed_precision_target_is_said():
    """On validation the surest half is right, on the test half of these are wrong: the target is missed."""
    sure = np.array([0.9] * 100 + [0.6] * 100)
    log_probs = np.log(np.column_stack([sure, 1 - sure]))
    two, said = BREEDS[:2], [BREEDS[0]] * 200
    val = make_set("vlm-tuned", [two[0]] * 100 + [two[1]] * 100, said, breeds=two, log_probs=log_probs)
    test = make_set("vlm-tuned", [two[i % 2] for i in range(200)], said, breeds=two, log_probs=log_probs)
    view = calibrate(outcomes(val), outcomes(test))
    sentence = plots_calibration.risk_coverage_sentence(view, [view])
    assert "answers 50% of the test photos" in sentence and "short of the 95% aimed at" in sentence
    assert sentence.endswith("Thresholds chosen in the same way answer: the tuned VLM 50% (50% right).")


def test_explanations_say_how_concentrated_the_evidence_is():
    """Of 20 patches the strongest tenth, two, hold 8 of 10 of what speaks for the breed; what speaks against it does
    not count."""
    heat = np.zeros((4, 5))
    heat[0, :4] = [5.0, 3.0, 1.0, 1.0]
    heat[1] = -2.0
    row = SimpleNamespace(heat=heat, predicted="Manx", breed="Manx", fall=2.0, random_fall=0.25)
    said = explanations_sentence([row])
    assert "80% for the 1 right answer." in said and "by 2.00 nats" in said and "by 0.25" in said
    assert said.endswith("in 1 of 1 photos: the maps mark what the model uses.")
    row.fall, row.random_fall = 0.03, -0.001
    assert "by 0.00 when" in explanations_sentence([row]) and explanations_sentence([row]).endswith("this sure.")
    row.random_fall = 3.0
    assert explanations_sentence([row]).endswith("in 0 of 1 photos: the maps cannot be trusted.")
    assert explanations_sentence([]) == "No photo was explained."
