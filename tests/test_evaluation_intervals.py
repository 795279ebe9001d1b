"""The bootstrap: reproducible, fast, stratified, and covering the truth at its nominal rate."""

import time
from dataclasses import replace

import numpy as np
import pytest
from evaluation_cases import BREEDS, RARE, copied, grouped, make_set, scored_set, truth
from scipy.stats import binomtest

from catlib.data.records import PredictionSet
from catlib.evaluation.bootstrap import (
    PSEUDO_SINGLE,
    effective_share,
    interval,
    make_cells,
    resample_cells,
    share,
    wilson,
)
from catlib.evaluation.compare import compare, pair
from catlib.evaluation.metrics import evaluate
from catlib.evaluation.outcomes import outcomes


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


def test_resamples_of_groups_keep_the_photos_and_draw_groups_whole():
    """Breed 0: cats of 3, 3, 1 and 2 photos, each all right or all wrong; breed 1: five single photos."""
    true = np.repeat([0, 1], [9, 5])
    cat = np.concatenate([np.repeat([0, 1, 2, 3], [3, 3, 1, 2]), np.arange(4, 9)])
    said = np.where(np.isin(cat, (0, 2, 5)), true, -1)
    cells = make_cells(true, said, group=cat)
    counts = resample_cells(cells, 500, 0, 0.0)
    for breed, photos in enumerate([9, 5]):
        assert counts[cells.true == breed].sum(axis=0) == pytest.approx(photos)
    right = counts[(cells.true == 0) & (cells.said[:, 0] == 0)][0]
    whole = {9 * a / (a + b) for a in range(10) for b in range(10) if a + b}
    assert all(min(abs(r - w) for w in whole) < 1e-9 for r in right) and len(set(right.round(6))) > 5


def test_ten_copies_of_every_photo_say_no_more_than_one():
    true = truth(12)
    once = scored_set("a", true, 0.7, seed=1)
    single, tenfold = (evaluate(s, RARE, bootstrap=1000) for s in (once, copied(once, 10)))
    assert (tenfold["n"], tenfold["groups"]) == (1200, 120)
    for key in ("accuracy", "macro_f1", "priority_macro_f1", "top3_accuracy", "brier"):
        assert tenfold[key]["value"] == pytest.approx(single[key]["value"])
        assert tenfold[key]["ci95"] == pytest.approx(single[key]["ci95"], abs=0.04), key
    widths = [np.ptp(m["ece"]["ci95"]) for m in (single, tenfold)]
    assert widths[1] > 0.7 * widths[0]
    for breed in RARE:  # Student's quantile for twelve groups makes the copies' a little wider
        ends = [m["per_breed"][breed]["f1_ci95"] for m in (single, tenfold)]
        assert np.ptp(ends[0]) <= np.ptp(ends[1]) < 1.4 * np.ptp(ends[0])


def test_groups_of_one_change_no_digit():
    predictions = scored_set("a", truth(8), 0.6, seed=4)
    named = grouped(predictions, [f"cat {i}" for i in range(80)])
    assert evaluate(predictions, RARE, bootstrap=300) == evaluate(named, RARE, bootstrap=300)


def test_what_grouped_photos_are_worth():
    """Alike within 20 cats of 5: a fifth of the photos (more than a fifth would be lost to Student's t, but none is worth less
    than its cat); independent of the cat: nearly all."""
    rng = np.random.default_rng(0)
    cat = np.repeat(np.arange(400), 5)
    assert effective_share(rng.random(2000).round(), np.arange(2000)) == 1.0
    assert effective_share(np.repeat(rng.random(400).round(), 5), cat) == pytest.approx(0.2, rel=0.02)
    assert effective_share(rng.random(2000).round(), cat) > 0.85
    assert effective_share(np.ones(2000), cat) == pytest.approx(0.2)
    assert effective_share(np.ones(7), np.zeros(7)) == pytest.approx(1 / 7)
    # Half of the variance lies between cats: design effect 1 + 4 * 0.5.
    mixed = np.where(rng.random(2000) < np.sqrt(0.5), np.repeat(rng.random(400).round(), 5), rng.random(2000).round())
    assert effective_share(mixed, cat) == pytest.approx(1 / 3, rel=0.15)
    assert share(np.ones(10), np.repeat([0, 1], 5)) == {"value": 1.0, "ci95": list(wilson(2, 2))}
    assert share(np.array([]), np.array([]))["ci95"] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("photos", "each", "shown"),
    [
        ({**dict.fromkeys(BREEDS, 12), **dict.fromkeys(RARE, 1)}, 1, {"accuracy", "macro_f1", "top3_accuracy", "ece"}),
        (1, 1, set()),
        ({**dict.fromkeys(BREEDS, 12), **dict.fromkeys(RARE, 8)}, 4, {"accuracy", "macro_f1", "top3_accuracy", "ece"}),
        (4, 4, set()),
        (2, 1, {"accuracy", "macro_f1", "top3_accuracy", "ece", "priority_macro_f1", "priority_accuracy"}),
    ],
)
def test_too_few_groups_have_no_interval(photos, each, shown):
    """Breeds of one group show no variance, and a variance between a handful of cats is not known."""
    true = truth(photos)
    predictions = grouped(scored_set("m", true, 0.6, seed=2), [f"{t} {i // each}" for i, t in enumerate(true)])
    found = evaluate(predictions, RARE, bootstrap=200)
    keys = ("accuracy", "macro_f1", "top3_accuracy", "ece", "priority_macro_f1", "priority_accuracy")
    few = (
        {"macro_f1"} if each == 1 and photos != 2 else set()
    )  # two of ten breeds with one photo each: three quarters of it
    assert {key for key in keys if found[key]["ci95"]} == shown - few


def test_groups_join_photos_of_one_file_and_of_both_files():
    true = truth(2, BREEDS[:3])
    a = grouped(make_set("a", true, true), ["x", None, None, "y", None, None])
    same = PredictionSet("a", tuple(replace(p, image=f"{i // 2}.jpg") for i, p in enumerate(a.predictions)), a.meta)
    assert outcomes(a).group.tolist() == [0, 1, 2, 3, 4, 5]
    assert outcomes(same).group.tolist() == [0, 0, 1, 1, 2, 2]
    chain = grouped(same, ["x", None, "x", None, None, None])
    assert outcomes(chain).group.tolist() == [0, 0, 0, 0, 1, 1]
    b = grouped(make_set("b", true, true), [None, "z", None, None, None, "z"])
    assert pair(a, b)[1].group.tolist() == [0, 1, 2, 3, 4, 1]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("icc", [0.5, 0.8])
def test_intervals_cover_the_truth_where_photos_come_in_cats(icc):
    """250 simulated test sets of 30 cats of 3 a breed: 95 % +- 3 points, and the simulation's standard error."""
    rng = np.random.default_rng(11)
    breeds, rare = BREEDS[:6], [0, 1]
    true, support = truth(90, breeds), np.full(6, 90)
    cat = [f"cat {i // 3}" for i in range(len(true))]
    hits = np.zeros((250, 5), dtype=bool)
    for i in range(len(hits)):
        if i % 25 == 0:
            rates = [rates_with(rng.uniform(0.3, 0.9, size=6), rng) for _ in range(2)]
            known = [true_figures(r, support, rare) for r in rates]
        sets = []
        for name, r in zip("ab", rates, strict=True):
            own, of_cat = ([p.predicted for p in draw_set(name, true, r, rng, breeds).predictions] for _ in range(2))
            shared = rng.random(len(true)) < np.sqrt(icc)
            said = [of_cat[j - j % 3] if shared[j] else own[j] for j in range(len(true))]
            sets.append(grouped(make_set(name, true, said, breeds=breeds), cat))
        m = evaluate(sets[0], breeds[:2], bootstrap=300, seed=i)
        c = compare(*sets, breeds[:2], bootstrap=300, seed=i)
        ends = [m[key]["ci95"] for key in ("accuracy", "macro_f1", "priority_macro_f1")]
        ends += [c["ci95"], c["macro_f1_gain_points"]["ci95"]]
        values = [*known[0], *(100 * np.subtract(*known))[:2]]
        hits[i] = [low <= value <= high for (low, high), value in zip(ends, values, strict=True)]
    coverage = 100 * hits.mean(axis=0)
    assert np.all(np.abs(coverage - 95) <= 3 + 1.4), coverage


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


@pytest.mark.slow
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


@pytest.mark.long
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
