"""Metrics and calibration against scikit-learn, scipy and examples worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
from evaluation_cases import BREEDS, RARE, copied, make_set, scored_set, truth, write_set
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_recall_fscore_support, top_k_accuracy_score

from catlib.data.records import Prediction, PredictionSet, read_predictions
from catlib.errors import InputError
from catlib.evaluation.calibration import (
    answer_at_precision,
    apply_temperature,
    fit_temperature,
    reliability,
    risk_coverage,
)
from catlib.evaluation.metrics import evaluate, expected_calibration_error
from catlib.evaluation.outcomes import outcomes


def random_set(seed: int, photos: int = 400, silent: float = 0.1) -> PredictionSet:
    rng = np.random.default_rng(seed)
    true = rng.choice(BREEDS, size=photos, p=rng.dirichlet(np.full(len(BREEDS), 2.0)))
    log_probs = log_softmax(rng.normal(size=(photos, len(BREEDS))) * 2, axis=1)
    said = [None if rng.random() < silent else BREEDS[i] for i in log_probs.argmax(axis=1)]
    return make_set("random", true.tolist(), said, log_probs=log_probs)


@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_scikit_learn_on_random_predictions(seed):
    predictions = random_set(seed)
    true = [p.breed for p in predictions.predictions]
    said = [p.predicted or "no answer" for p in predictions.predictions]
    scores = np.array([p.scores for p in predictions.predictions])
    present = sorted(set(true))
    rare = [breed for breed in RARE if breed in present]
    metrics = evaluate(predictions, rare, bootstrap=100)
    assert metrics["accuracy"]["value"] == pytest.approx(accuracy_score(true, said))
    assert metrics["macro_f1"]["value"] == pytest.approx(f1_score(true, said, labels=present, average="macro"))
    assert metrics["weighted_f1"]["value"] == pytest.approx(f1_score(true, said, labels=present, average="weighted"))
    assert metrics["priority_macro_f1"]["value"] == pytest.approx(f1_score(true, said, labels=rare, average="macro"))
    assert metrics["nll"] == pytest.approx(log_loss(true, np.exp(scores), labels=BREEDS))
    index = [BREEDS.index(t) for t in true]
    assert metrics["top3_accuracy"]["value"] == pytest.approx(
        top_k_accuracy_score(index, scores, k=3, labels=range(len(BREEDS)))
    )
    precision, recall, f1, support = precision_recall_fscore_support(true, said, labels=present, zero_division=0)
    for i, breed in enumerate(present):
        row = metrics["per_breed"][breed]
        assert (row["recall"], row["f1"], row["support"]) == (
            pytest.approx(recall[i]),
            pytest.approx(f1[i]),
            support[i],
        )
        assert (row["precision"] or 0) == pytest.approx(precision[i])
    assert metrics["invalid_rate"]["value"] == pytest.approx(np.mean([s == "no answer" for s in said]))


def test_worked_example():
    """Six photos. Bengal: 2 of 3 right, one unanswered; Birman: 1 of 2 right, one called Bengal; Manx: called Birman.

    Bengal: precision 2/3, recall 2/3, F1 2/3. Birman: precision 1/2, recall 1/2, F1 1/2. Manx: F1 0. Macro-F1 = 7/18.
    """
    metrics = evaluate(
        make_set(
            "example",
            ["Bengal", "Bengal", "Bengal", "Birman", "Birman", "Manx"],
            ["Bengal", "Bengal", None, "Birman", "Bengal", "Birman"],
        ),
        ["Birman", "Manx"],
        bootstrap=200,
    )
    assert metrics["accuracy"]["value"] == pytest.approx(3 / 6)
    assert metrics["macro_f1"]["value"] == pytest.approx(7 / 18)
    assert metrics["weighted_f1"]["value"] == pytest.approx((3 * 2 / 3 + 2 * 1 / 2) / 6)
    assert metrics["priority_macro_f1"]["value"] == pytest.approx(1 / 4)
    assert metrics["priority_accuracy"]["value"] == pytest.approx(1 / 3)
    assert metrics["invalid_rate"]["value"] == pytest.approx(1 / 6)
    assert metrics["per_breed"]["Bengal"]["no_answer"] == 1
    assert metrics["per_breed"]["Persian"]["f1"] is None
    assert metrics["top3_accuracy"] is None and metrics["ece"] is None and metrics["nll"] is None
    low, high = metrics["accuracy"]["ci95"]
    assert 0 <= low <= metrics["accuracy"]["value"] <= high <= 1
    # Manx has one photo, which shows no variance: a third of the macro-F1 has no honest interval.
    assert metrics["macro_f1"]["ci95"] is None and metrics["priority_macro_f1"]["ci95"] is None


def test_brier_score_and_groups_by_hand():
    """Two breeds, true one at 0.9 and at 0.4: ((0.1^2 + 0.1^2) + (0.6^2 + 0.6^2)) / 2 = 0.37. The first two photos are one cat's."""
    two, log_probs = BREEDS[:2], np.log([[0.9, 0.1], [0.6, 0.4], [0.9, 0.1], [0.6, 0.4]])
    predictions = make_set("m", [*two, *two], [two[0]] * 4, breeds=two, log_probs=log_probs)
    rows = [replace(p, group="cat" if i < 2 else None) for i, p in enumerate(predictions.predictions)]
    metrics = evaluate(PredictionSet("m", tuple(rows), predictions.meta), bootstrap=200)
    assert metrics["brier"]["value"] == pytest.approx(0.37)
    assert metrics["brier"]["ci95"][0] <= 0.37 <= metrics["brier"]["ci95"][1]
    assert (metrics["n"], metrics["groups"]) == (4, 3)


def test_calibration_error_worked_out_by_hand():
    """Two bins of five: confidence 0.5 and 1 of 5 right (gap 0.3); confidence 0.9 and 4 of 5 right (gap 0.1): ECE
    0.2."""
    confidence = np.array([0.5] * 5 + [0.9] * 5)
    correct = np.array([1, 0, 0, 0, 0, 1, 1, 1, 1, 0], dtype=bool)
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx(0.2)
    assert expected_calibration_error(confidence, correct, bins=1) == pytest.approx(0.2)
    assert expected_calibration_error(np.full(10, 0.5), correct, bins=1) == pytest.approx(0.0)


def test_priority_breed_without_photos_is_refused():
    predictions = make_set("m", ["Bengal", "Manx"], ["Bengal", "Manx"])
    with pytest.raises(InputError, match="Cymric"):
        evaluate(predictions, ["Manx", "Cymric"])
    assert evaluate(predictions, [], bootstrap=100)["priority_macro_f1"] is None


def test_predictions_that_cannot_be_evaluated_are_refused():
    with pytest.raises(InputError, match="no predictions"):
        evaluate(PredictionSet("m", (), {"breeds": list(BREEDS)}))
    with pytest.raises(InputError, match="no true breed"):
        evaluate(PredictionSet("m", (Prediction("x", "x.jpg", None, "Manx", None),), {"breeds": list(BREEDS)}))
    with pytest.raises(InputError, match="log-probabilities"):
        evaluate(make_set("m", ["Manx"], ["Manx"], log_probs=np.zeros((1, len(BREEDS)))))


@pytest.mark.parametrize(
    ("change", "meta", "message"),
    [
        ({"latency_ms": -1.0}, {}, "m.jsonl:1: key 'latency_ms'"),
        ({"predicted": "Manx"}, {}, "m.jsonl:1: predicted breed 'Manx' has the score"),
        ({}, {"breeds": BREEDS[::-1]}, "stand in another order"),
        ({}, {"breeds": [*BREEDS[:9], "Bengal"]}, "'Bengal' twice"),
        ({}, {"latency_single_ms": {"p50": -3.0, "p95": 1.0}}, "m.meta.json: key 'latency_single_ms'"),
        ({}, {"latency_single_ms": [1.0, "fast"]}, "m.meta.json: key 'latency_single_ms'"),
        ({}, {"images_per_second": -1}, "m.meta.json: key 'images_per_second'"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tmp_path, change, meta, message):
    good = scored_set("m", truth(2), 0.8, seed=1)
    assert read_predictions(write_set(good, tmp_path)).name == "m"
    rows = (replace(good.predictions[0], **change), *good.predictions[1:])
    path = write_set(
        PredictionSet("m", rows, {**good.meta, **{k: v if k != "breeds" else list(v) for k, v in meta.items()}}),
        tmp_path,
    )
    with pytest.raises(InputError, match=message):
        read_predictions(path)


def test_nan_is_refused_and_ties_from_rounding_are_not(tmp_path):
    true = truth(1)
    log_probs = log_softmax(np.eye(10) * 5, axis=1)
    path = write_set(make_set("m", true, true, log_probs=log_probs), tmp_path)
    text = path.read_text()
    path.write_text(text.replace('"latency_ms": 20.0', '"latency_ms": NaN', 1))
    with pytest.raises(InputError, match="NaN"):
        read_predictions(path)
    tied = np.full(10, -np.log(10))
    tied[0] -= 1e-5
    path = write_set(make_set("m", true[:1], [true[0]], log_probs=log_softmax(tied)[None]), tmp_path)
    assert read_predictions(path).predictions[0].predicted == true[0]


def test_a_photo_under_several_ids_is_said(tmp_path):
    path = write_set(copied(scored_set("m", truth(2), 0.8, seed=1), 3), tmp_path)
    assert any("40 of 60" in remark for remark in read_predictions(path).remarks)


def test_true_breed_that_the_model_does_not_know_counts_as_wrong():
    known = BREEDS[:3]
    metrics = evaluate(scored_set("m", truth(4, known), 1.0, breeds=known), bootstrap=100)
    assert metrics["accuracy"]["value"] == 1.0
    rows = make_set(
        "m",
        ["Abyssinian", "Siamese"],
        ["Abyssinian", "Bengal"],
        breeds=known,
        log_probs=log_softmax(np.eye(2, 3), axis=1),
    )
    metrics = evaluate(rows, ["Siamese"], bootstrap=100)
    assert metrics["accuracy"]["value"] == 0.5 and metrics["priority_macro_f1"]["value"] == 0.0


def test_tied_scores_do_not_count_as_top_three():
    """A model that says the same of every breed knows nothing, and must not get 100 % top-3."""
    flat = np.full((20, len(BREEDS)), -np.log(len(BREEDS)))
    metrics = evaluate(make_set("m", truth(2), ["Manx"] * 20, log_probs=flat), bootstrap=100)
    assert metrics["top3_accuracy"]["value"] == 0.0


def test_latency_prefers_photos_measured_one_at_a_time():
    true = truth(1)
    assert evaluate(make_set("m", true, true, latency_ms=8.0), bootstrap=100)["latency_ms"]["p50"] == 8.0
    listed = evaluate(make_set("m", true, true, latency_single_ms=[10, 20, 30, 40, 100]), bootstrap=100)["latency_ms"]
    assert listed["p50"] == 30 and listed["p95"] == pytest.approx(np.percentile([10, 20, 30, 40, 100], 95))
    given = evaluate(make_set("m", true, true, latency_single_ms={"p50": 12.5, "p95": 19.0, "n": 30}), bootstrap=100)
    low, high = given["latency_ms"].pop("p50_ci95")
    assert (
        given["latency_ms"] == {"p50": 12.5, "p95": 19.0, "kind": "one photo at a time"}
        and 11 < low < 12.5 < high < 14.1
    )
    assert listed["p50_ci95"] is None
    times = evaluate(make_set("m", true, true, latency_single_ms=list(range(1, 33))), bootstrap=100)["latency_ms"]
    assert times["p50_ci95"] == [10, 23]  # the sorted times that hold 98.0 %; one further in is 94.99


def test_temperature_undoes_a_known_distortion():
    """Labels drawn from softmax(z); the model claims softmax(3 z): the temperature is 3 and the error nearly
    vanishes."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=(6000, len(BREEDS))) * 1.5
    p = np.exp(log_softmax(z, axis=1))
    true = [BREEDS[(p[i].cumsum() > rng.random()).argmax()] for i in range(len(z))]
    claimed = log_softmax(3 * z, axis=1)
    said = [BREEDS[i] for i in claimed.argmax(1)]
    validation, test = (
        outcomes(make_set("m", true[part], said[part], log_probs=claimed[part]))
        for part in (slice(3000), slice(3000, None))
    )
    temperature = fit_temperature(validation)
    assert temperature == pytest.approx(3.0, rel=0.1)
    scaled = apply_temperature(test, temperature)
    assert expected_calibration_error(test.confidence, test.correct) > 0.15
    assert expected_calibration_error(scaled.confidence, scaled.correct) < 0.03
    assert (scaled.log_probs.argmax(1) == test.log_probs.argmax(1)).all()
    assert sum(b.photos for b in reliability(scaled)) == 3000


def test_risk_coverage_by_hand_and_threshold_from_validation():
    """Confidences 0.9, 0.8, 0.8, 0.6 with right, wrong, right, right: precision 1/1, then 2/3 (the tie goes
    together), 3/4."""
    top = np.array([0.9, 0.8, 0.8, 0.6])
    log_probs = np.log(np.column_stack([top, 1 - top]))
    two = BREEDS[:2]
    o = outcomes(make_set("m", [two[0], two[1], two[0], two[0]], [two[0]] * 4, breeds=two, log_probs=log_probs))
    curve = risk_coverage(o)
    assert curve.coverage.tolist() == [0.25, 0.75, 1.0]
    assert curve.precision == pytest.approx([1.0, 2 / 3, 3 / 4])
    assert curve.area == pytest.approx(0 * 0.25 + (1 / 3) * 0.5 + (1 / 4) * 0.25)
    result = answer_at_precision(o, o, target=0.95)
    assert (result.coverage["value"], result.precision["value"], result.threshold) == (0.25, 1.0, pytest.approx(0.9))
    assert answer_at_precision(o, o, target=0.7).coverage["value"] == 1.0
    hopeless = outcomes(make_set("m", [two[1]] * 4, [two[0]] * 4, breeds=two, log_probs=log_probs))
    assert answer_at_precision(hopeless, o).threshold is None
