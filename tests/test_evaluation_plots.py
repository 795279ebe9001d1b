"""Every figure draws without a warning for 2, 10 and 67 breeds, shows once, and has a caption with true figures."""

import warnings
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from evaluation_cases import BREEDS, RARE, grouped, make_set, scored_set, truth
from PIL import Image

from catlib.classifiers.explain import Explanation
from catlib.evaluation import plots, plots_model, plots_photos
from catlib.evaluation.calibration import calibrate
from catlib.evaluation.compare import compare
from catlib.evaluation.metrics import evaluate
from catlib.evaluation.outcomes import outcomes
from catlib.figures import Shown

MANY = tuple(f"Breed number {i}" for i in range(67))


def draw(shown):
    """Draw as a report would; a warning (a glyph missing, a layout that collapses) fails the test. The caption."""
    assert isinstance(shown, Shown) and shown.figure.number not in plt.get_fignums()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown.figure.canvas.draw()
    caption = shown.caption
    assert caption.endswith(".") and caption[0].isupper() and "nan" not in caption and caption in shown.alt
    return caption


@pytest.mark.slow
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
    assert "photos" in draw(plots_model.confusion(o, rare))
    draw(plots_model.confusion(outcomes(clip), rare))
    for beside in ("clip-zero-shot", "vlm-base", None):  # one that was not run is left out
        draw(plots_model.f1_by_breed(models, "vlm-tuned", beside=beside))
    for c in (view, silent):
        draw(plots_model.confidence(c))
        draw(plots.precision_by_coverage([c]))
    draw(plots.overview(models))
    draw(plots.gains(versus))
    draw(plots_photos.mistakes(o, tmp_path, rare))
    draw(plots_photos.disagreements(versus, tmp_path, rare))
    draw(plots.learning_curve([(x, {"models": models}) for x in (5, 10, 20)], "photos_per_breed"))
    few = {s.name: evaluate(grouped(s, true), rare, bootstrap=100) for s in (tuned, clip)}
    assert "no interval" in draw(plots.overview(few))
    assert "no interval" in draw(plots.gains(compare(grouped(tuned, true), clip, rare, bootstrap=100)))
    draw(plots_model.f1_by_breed(few, "vlm-tuned", beside="clip-zero-shot"))
    draw(plots.learning_curve([(x, {"models": few}) for x in (5, 10, 20)], "photos_per_breed"))


def test_captions_say_what_was_planted():
    true = ["Bengal"] * 10 + ["Birman"] * 10 + ["Manx"] * 5
    said = ["Bengal"] * 10 + ["Manx"] * 7 + ["Birman"] * 3 + [None] * 5
    o = outcomes(make_set("vlm-tuned", true, said))
    assert "Birman called Manx (7 of 10 photos)" in plots_model.confusion(o).caption
    models = {"vlm-tuned": evaluate(make_set("vlm-tuned", true, said, latency_ms=200.0), ["Manx"], bootstrap=100)}
    caption = plots_model.f1_by_breed(models, "vlm-tuned").caption
    assert "from 0% (Manx, 5 photos) to 100% (Bengal, 10 photos)" in caption
    assert "without scores" in plots_model.confidence(calibrate(None, o)).caption


def test_learning_curve_says_whether_more_data_still_helps():
    def run(value):
        return {"models": {"vlm-tuned": {"priority_macro_f1": {"value": value, "ci95": [value - 0.05, value + 0.05]}}}}

    rising = plots.slope([(20, run(0.6)), (5, run(0.2)), (10, run(0.4))], "photos_per_breed")
    assert "from 20.0%" in rising and "60.0%" in rising and rising.endswith("still rising.")
    level = plots.slope([(5, run(0.2)), (10, run(0.22))], "photos_per_breed")
    assert level.endswith("level within its uncertainty.")
    assert "not enough runs" in plots.slope([(5, run(0.2))], "photos_per_breed")


def test_similar_breeds_stand_side_by_side():
    """Breeds 0 and 9 are taken for each other, as are 3 and 6: in the order they are neighbours."""
    counts = np.diag(np.full(10, 20))
    for a, b in ((0, 9), (3, 6)):
        counts[a, b] = counts[b, a] = 15
    order = list(plots_model.similarity_order(counts))
    assert sorted(order) == list(range(10))
    assert abs(order.index(0) - order.index(9)) == 1 and abs(order.index(3) - order.index(6)) == 1


def test_priority_breeds_are_marked_and_photos_counted():
    true = truth(3)
    figure = plots_model.confusion(outcomes(scored_set("vlm-tuned", true, 0.8)), RARE).figure
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "★ Cymric (3)" in labels and "Manx (3)" in labels


def test_no_model_is_called_best_where_all_have_nothing():
    true = ["Bengal"] * 10 + ["Manx"] * 5
    models = {
        n: evaluate(make_set(n, true, ["Bengal"] * 15), ["Manx"], bootstrap=100) for n in ("vlm-tuned", "vlm-base")
    }
    assert "no model" in plots.overview(models).caption.rsplit("priority", 1)[1]


def test_a_missed_precision_target_is_said():
    """On validation the surest half is right, on the test half of these are wrong: the target is missed."""
    sure = np.array([0.9] * 100 + [0.6] * 100)
    log_probs = np.log(np.column_stack([sure, 1 - sure]))
    two, said = BREEDS[:2], [BREEDS[0]] * 200
    val = make_set("vlm-tuned", [two[0]] * 100 + [two[1]] * 100, said, breeds=two, log_probs=log_probs)
    test = make_set("vlm-tuned", [two[i % 2] for i in range(200)], said, breeds=two, log_probs=log_probs)
    view = calibrate(outcomes(val), outcomes(test))
    caption = plots.precision_by_coverage([view, view]).caption
    assert "answers 50% of the test photos" in caption and "short of the 95% aimed at" in caption
    assert "the tuned VLM 50% (50% right)" in caption


def test_explanations_say_how_concentrated_the_evidence_is():
    """Of 20 patches the strongest tenth, two, hold 8 of 10 of what speaks for the breed; what speaks against it does
    not count."""
    heat = np.zeros((4, 5))
    heat[0, :4] = [5.0, 3.0, 1.0, 1.0]
    heat[1] = -2.0
    seen = Image.new("RGB", (40, 40), "gray")
    row = Explanation(seen, heat, "Manx", "Manx", "Cymric", 0.9, "Manx", fall=2.0, random_fall=0.25)
    caption = draw(plots_photos.explanations([row, row]))
    assert "80% for the 2 right answers" in caption and "2.00 nats" in caption and " 0.25" in caption
    assert "in 2 of 2 photos" in caption and "cannot be trusted" not in caption
    little = draw(plots_photos.explanations([replace(row, fall=0.03, random_fall=-0.001)]))
    assert "patches 0.00;" in little and little.endswith("this sure.")
    doubtful = draw(plots_photos.explanations([replace(row, predicted="Bengal", random_fall=3.0)]))
    assert "1 wrong answer" in doubtful and "in 0 of 1 photos" in doubtful and "cannot be trusted" in doubtful
    assert draw(plots_photos.explanations([])) == "No photo was explained."
