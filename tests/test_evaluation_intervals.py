"""The bootstrap: reproducible, fast, stratified, and covering the truth at its nominal rate."""

import time

import numpy as np
import pytest
from evaluation_cases import BREEDS, RARE, make_set, truth
from scipy.stats import binomtest

from catlib.evaluation.bootstrap import PSEUDO_SINGLE, interval, make_cells, resample_cells, wilson
from catlib.evaluation.compare import compare
from catlib.evaluation.metrics import evaluate


def draw_set(name, true, rates, rng, breeds=BREEDS):
    """A model whose answers follow `rates` (breeds, breeds): row b is the distribution of what breed b is called."""
    row = np.array([breeds.index(t) for t in true])
    said = [breeds[i] for i in (rates.cumsum(axis=1)[row] > rng.random((len(row), 1))).argmax(axis=1)]
    return make_set(name, true, said, breeds=breeds)


def rates_with(recall, rng):
    rates = np.zeros((len(recall), len(recall)))
    for i, right in enumerate(recall):
        rates[i] = np.insert(rng.dirichlet(np.full(len(recall) - 1, 0.3)) * (1 - right), i, right)
    return rates


def true_figures(rates, support, rare):
    """Accuracy and macro-F1 that the model has on endlessly many photos of the same mixture of breeds."""
    tp, called = rates.diagonal() * support, support @ rates
    f1 = 2 * tp / (support + called)
    return tp.sum() / support.sum(), f1.mean(), f1[rare].mean()


def test_same_seed_same_interval_and_other_seed_another():
    true = truth(12)
    rng = np.random.default_rng(0)
    predictions = draw_set("m", true, rates_with([0.6] * 10, rng), rng)
    first, again, other = (evaluate(predictions, RARE, bootstrap=500, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first["macro_f1"]["ci95"] != other["macro_f1"]["ci95"]
    assert first["macro_f1"]["ci95"] == pytest.approx(other["macro_f1"]["ci95"], abs=0.02)


def test_resamples_keep_the_photos_of_each_breed():
    true = np.repeat([0, 1, 2], [1, 5, 30])
    cells = make_cells(true, np.where(np.arange(36) % 2, true, -1))
    counts = resample_cells(cells, 300, 0, PSEUDO_SINGLE)
    for breed, photos in enumerate([1, 5, 30]):
        assert counts[cells.true == breed].sum(axis=0) == pytest.approx(photos)


def test_two_thousand_resamples_of_67_breeds_take_well_under_two_seconds():
    breeds = tuple(f"breed {i}" for i in range(67))
    rng = np.random.default_rng(0)
    true = truth(18, breeds)
    predictions = draw_set("m", true, rates_with([0.7] * 67, rng), rng, breeds)
    start = time.process_time()
    evaluate(predictions, breeds[:7], bootstrap=2000)
    assert time.process_time() - start < 2.0


def test_nothing_right_is_not_certainly_nothing():
    """0 of 12 right: the upper end is near the exact one (Clopper and Pearson), and not 0."""
    true = truth(6, RARE)
    metrics = evaluate(make_set("m", true, ["Manx"] * 12), RARE, bootstrap=2000)
    exact = binomtest(0, 12).proportion_ci().high
    assert metrics["priority_accuracy"]["ci95"][0] == 0
    assert 0.5 * exact < metrics["priority_accuracy"]["ci95"][1] < 1.3 * exact


def test_wilson_equals_scipy():
    for right, n in ((0, 5), (3, 7), (40, 41)):
        reference = binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right, n) == pytest.approx([reference.low, reference.high])


def test_interval_stays_around_its_estimate():
    draws = np.linspace(0.2, 0.4, 101)
    assert interval(0.3, draws) == pytest.approx([0.205, 0.395])
    low, high = interval(0.0, draws - 0.2, 0.0, 1.0)
    assert low == 0.0 and high > 0


@pytest.mark.slow
def test_intervals_cover_the_truth_at_their_nominal_rate():
    """400 simulated test sets with rare breeds of five photos: 95 % +- 3 points, as in benchmarks/interval_coverage.py.

    The tolerance adds the simulation's own standard error, 1.1 points.
    """
    rng = np.random.default_rng(7)
    support = np.array([20, 30, 12, 25, 5, 5, 16, 10, 40, 8])
    true = truth(dict(zip(BREEDS, support, strict=True)))
    rare = [BREEDS.index(breed) for breed in RARE]
    hits = np.zeros((400, 3), dtype=bool)
    for i in range(len(hits)):
        if i % 40 == 0:
            rates = rates_with(rng.uniform(0.3, 0.9, size=len(BREEDS)), rng)
            known = true_figures(rates, support, rare)
        metrics = evaluate(draw_set("m", true, rates, rng), RARE, bootstrap=400, seed=i)
        for j, key in enumerate(("accuracy", "macro_f1", "priority_macro_f1")):
            low, high = metrics[key]["ci95"]
            hits[i, j] = low - 1e-9 <= known[j] <= high + 1e-9
    coverage = 100 * hits.mean(axis=0)
    assert np.all(np.abs(coverage - 95) <= 3 + 1.1), coverage


def test_the_calibration_error_of_an_honest_model_may_be_nought():
    """Labels drawn from the very probabilities that the model claims: the interval reaches 0 in about 95 % of the sets."""
    rng = np.random.default_rng(3)
    reached = []
    for seed in range(60):
        p = rng.dirichlet(np.full(len(BREEDS), 0.15), size=240).clip(1e-9)
        p /= p.sum(axis=1, keepdims=True)
        true = [BREEDS[(row.cumsum() > rng.random()).argmax()] for row in p]
        claimed = make_set("m", true, [BREEDS[i] for i in p.argmax(1)], log_probs=np.log(p))
        reached.append(evaluate(claimed, bootstrap=100, seed=seed)["ece"]["ci95"][0] == 0)
    assert np.mean(reached) > 0.85


@pytest.mark.slow
def test_paired_intervals_cover_the_true_gain():
    rng = np.random.default_rng(5)
    support = np.array([20, 30, 12, 25, 5, 5, 16, 10, 40, 8])
    true = truth(dict(zip(BREEDS, support, strict=True)))
    rare = [BREEDS.index(breed) for breed in RARE]
    hits = np.zeros((500, 3), dtype=bool)
    for i in range(len(hits)):
        if i % 25 == 0:
            rates = [rates_with(rng.uniform(0.3, 0.9, size=len(BREEDS)), rng) for _ in range(2)]
            known = 100 * np.subtract(*[true_figures(r, support, rare) for r in rates])
        c = compare(*(draw_set(n, true, r, rng) for n, r in zip("ab", rates, strict=True)), RARE, bootstrap=400, seed=i)
        ends = [c["ci95"], c["macro_f1_gain_points"]["ci95"], c["priority_f1_gain_points"]["ci95"]]
        hits[i] = [low <= gain <= high for (low, high), gain in zip(ends, known, strict=True)]
    coverage = 100 * hits.mean(axis=0)
    assert np.all(np.abs(coverage - 95) <= 3 + 1.0), coverage
