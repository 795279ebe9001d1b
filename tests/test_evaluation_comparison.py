"""The paired comparison against scipy and worked examples; metrics.json; what a verdict needs from it."""

import json
from itertools import product

import numpy as np
import pytest
from evaluation_cases import BREEDS, RARE, copied, grouped, make_set, scored_set, truth
from scipy.special import log_softmax
from scipy.stats import binomtest, false_discovery_control
from sklearn.metrics import f1_score

from catlib.data.records import PredictionSet
from catlib.errors import CatlibError, InputError
from catlib.evaluation.compare import compare, mcnemar, sign_flip
from catlib.evaluation.metrics_file import read_metrics, write_metrics


def test_gains_and_tests_equal_independent_references():
    true = truth(20)
    rng = np.random.default_rng(0)
    said = [[t if rng.random() < p else str(rng.choice(BREEDS)) for t in true] for p in (0.7, 0.5)]
    c = compare(make_set("a", true, said[0]), make_set("b", true, said[1]), RARE, bootstrap=500)
    right = [np.array([s == t for s, t in zip(row, true, strict=True)]) for row in said]
    only = [(right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()]
    assert c["accuracy_gain_points"] == pytest.approx(100 * (right[0].mean() - right[1].mean()))
    assert c["p"] == pytest.approx(binomtest(only[0], sum(only)).pvalue)
    assert [c["only_a_right"], c["only_b_right"]] == only
    assert c["oracle_accuracy"] == pytest.approx((right[0] | right[1]).mean())
    assert c["agreement"] == pytest.approx(np.mean([x == y for x, y in zip(*said, strict=True)]))
    f1 = [f1_score(true, row, labels=list(BREEDS), average="macro") for row in said]
    assert c["macro_f1_gain_points"]["value"] == pytest.approx(100 * (f1[0] - f1[1]))
    rare = [f1_score(true, row, labels=list(RARE), average="macro") for row in said]
    assert c["priority_f1_gain_points"]["value"] == pytest.approx(100 * (rare[0] - rare[1]))
    # The paired interval is near the textbook one for the difference of paired proportions.
    n, gain = len(true), only[0] - only[1]
    half = 196 * np.sqrt(sum(only) - gain**2 / n) / n
    assert c["ci95"] == pytest.approx([100 * gain / n - half, 100 * gain / n + half], abs=1.5)
    p = [row["p"] for row in c["breeds"]]
    assert [row["p_adjusted"] for row in c["breeds"]] == pytest.approx(list(false_discovery_control(p)))


def test_breeds_and_confusions_by_hand():
    """Bengal: b has all 12 as Manx, a has 11 right and 1 as Birman: it gains, p = 2/2^11; Birman is the same in both."""
    true = ["Bengal"] * 12 + ["Birman"] * 12
    a = make_set("a", true, ["Bengal"] * 11 + ["Birman"] + ["Birman"] * 12)
    b = make_set("b", true, ["Manx"] * 12 + ["Birman"] * 12)
    c = compare(a, b, bootstrap=200)
    bengal, birman = c["breeds"]
    assert (bengal["breed"], bengal["change"], birman["change"]) == ("Bengal", "gains", "undecided")
    assert bengal["p"] == pytest.approx(2 / 2**11) and bengal["p_adjusted"] == pytest.approx(4 / 2**11)
    assert bengal["gain_points"] == pytest.approx(100 * 11 / 12) and birman["gain_points"] == 0
    assert c["confusions"]["vanish"] == [{"breed": "Bengal", "said": "Manx", "a": 0, "b": 12}]
    assert c["confusions"]["appear"] == [{"breed": "Bengal", "said": "Birman", "a": 1, "b": 0}]
    assert len(c["disagreements"]) == 12 and c["disagreements"][0]["breed"] == "Bengal"
    assert compare(b, a, bootstrap=200)["breeds"][-1]["change"] == "loses"


@pytest.mark.slow
def test_many_equal_breeds_are_not_called_changed():
    """100 pairs of models that are equally good: the corrected tests call almost no breed better or worse."""
    rng = np.random.default_rng(0)
    true = truth(15)
    calls = 0
    for _ in range(100):
        said = [[t if rng.random() < 0.6 else "Siamese" for t in true] for _ in range(2)]
        c = compare(make_set("a", true, said[0]), make_set("b", true, said[1]), bootstrap=100)
        calls += any(row["change"] != "undecided" for row in c["breeds"])
    assert calls <= 10


def test_same_photos_only():
    true = truth(4)
    a = make_set("a", true, true)
    some = PredictionSet("b", tuple(reversed(a.predictions[5:])), a.meta)
    c = compare(a, some, bootstrap=100)
    assert (c["n"], c["dropped"], c["agreement"]) == (35, {"a": 5, "b": 0}, 1.0)
    with pytest.raises(InputError, match="no photo in common"):
        compare(a, make_set("b", true, true, prefix="other"))
    with pytest.raises(InputError, match="photo-0003.*Abyssinian.*Manx"):
        compare(a, make_set("b", [*true[:3], "Manx", *true[4:]], true))


def test_breeds_in_another_order_change_nothing():
    true = truth(8)
    a, b = scored_set("a", true, 0.7, seed=1), scored_set("b", true, 0.5, seed=2)
    order = np.random.default_rng(0).permutation(len(BREEDS))
    scores = np.array([p.scores for p in b.predictions])[:, order]
    shuffled = make_set(
        "b", true, [p.predicted for p in b.predictions], breeds=[BREEDS[i] for i in order], log_probs=scores
    )
    assert compare(a, b, RARE, bootstrap=200) == compare(a, shuffled, RARE, bootstrap=200)


def test_mcnemar_without_a_difference():
    assert mcnemar(0, 0) == 1.0


def test_the_test_exchanges_whole_groups():
    """Against all sign patterns, and McNemar's test where no group has two discordant photos."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        net, group = rng.integers(-1, 2, size=30), rng.integers(0, 9, size=30)
        sums = np.array([net[group == g].sum() for g in range(9)])
        totals = np.array(list(product((1, -1), repeat=9))) @ sums
        assert sign_flip(net, group) == pytest.approx(np.mean(np.abs(totals) >= abs(sums.sum())))
        assert sign_flip(net, np.arange(30)) == mcnemar(int((net > 0).sum()), int((net < 0).sum()))
    assert sign_flip(np.zeros(4, dtype=int), np.zeros(4, dtype=int)) == 1.0
    assert sign_flip(np.ones(40, dtype=int), np.repeat(np.arange(4), 10)) == 2 / 2**4


@pytest.mark.slow
def test_the_test_keeps_its_level_where_cats_agree():
    """Two equally good models, 20 cats of 5 that they are right on together: p < 0.05 in at most 5 % of the sets."""
    rng = np.random.default_rng(0)
    cat = np.repeat(np.arange(20), 5)
    nets = [
        np.where(rng.random(100) < 0.8, np.repeat(rng.integers(-1, 2, 20), 5), rng.integers(-1, 2, 100))
        for _ in range(600)
    ]
    assert np.mean([sign_flip(net, cat) < 0.05 for net in nets]) < 0.05 + 0.02
    assert np.mean([sign_flip(net, np.arange(100)) < 0.05 for net in nets]) > 0.2  # as if photos were independent


def test_ten_copies_of_every_photo_change_no_test():
    true = truth(12)
    a, b = scored_set("a", true, 0.7, seed=1), scored_set("b", true, 0.6, seed=2)
    once, tenfold = (compare(*sets, RARE, bootstrap=4000) for sets in ((a, b), (copied(a, 10), copied(b, 10))))
    assert (tenfold["n"], tenfold["groups"]) == (1200, once["groups"]) == (1200, 120)
    assert tenfold["p"] == pytest.approx(once["p"])
    for own, other in zip(once["breeds"], tenfold["breeds"], strict=True):
        assert other["p"] == pytest.approx(own["p"]) and other["change"] == own["change"]
    for key in ("macro_f1_gain_points", "priority_f1_gain_points", "accuracy_gain_elsewhere_points"):
        assert tenfold[key]["ci95"] == pytest.approx(once[key]["ci95"], abs=2.5)
    assert tenfold["ci95"] == pytest.approx(once["ci95"], abs=1.0)


def test_too_few_groups_give_a_gain_without_an_interval():
    true = truth(6)
    sets = [grouped(scored_set(n, true, p, seed=i), true) for i, (n, p) in enumerate([("a", 0.9), ("b", 0.3)])]
    c = compare(*sets, RARE, bootstrap=200)
    assert c["groups"] == 10 and c["ci95"] is None and c["macro_f1_gain_points"]["ci95"] is None
    assert c["accuracy_gain_points"] > 30


def noisy(name, true, seed):
    """A model whose scores are the truth under noise that no other model shares."""
    index = [BREEDS.index(t) for t in true]
    log_probs = log_softmax(
        1.8 * np.eye(len(BREEDS))[index] + np.random.default_rng(seed).normal(size=(len(true), 10)), axis=1
    )
    said = [BREEDS[i] for i in log_probs.argmax(1)]
    return make_set(name, true, said, log_probs=log_probs, prefix="val" if len(true) == 400 else "photo")


def test_combining_two_models_with_independent_errors_gains():
    true, val = truth(60), truth(40)
    a, b, val_a, val_b = (
        noisy(name, rows, seed) for seed, (name, rows) in enumerate([("a", true), ("b", true), ("a", val), ("b", val)])
    )
    mixed = compare(a, b, RARE, val_a=val_a, val_b=val_b, bootstrap=500)["combination"]
    assert 0.3 < mixed["weight_a"] < 0.7
    assert mixed["ci95"][0] > 5
    best = max(a, b, key=lambda s: np.mean([p.predicted == p.breed for p in s.predictions]))
    assert mixed["over"] == best.name and mixed["gain_points"] == pytest.approx(
        100 * (mixed["accuracy"] - np.mean([p.predicted == p.breed for p in best.predictions]))
    )
    useless = scored_set("b", true, 0.1, seed=5)
    val_useless = scored_set("b", val, 0.1, seed=6, prefix="val")
    mixed = compare(a, useless, RARE, val_a=val_a, val_b=val_useless, bootstrap=500)["combination"]
    assert mixed["weight_a"] >= 0.8 and abs(mixed["gain_points"]) < 3
    assert compare(a, b, bootstrap=100)["combination"] is None


def test_metrics_file_merges_and_stays_strict(tmp_path):
    write_metrics(tmp_path, models={"vlm-tuned": {"accuracy": 1}}, comparisons=[{"a": "x", "b": "y", "n": 1}])
    write_metrics(
        tmp_path,
        models={"clip": {"accuracy": 0}},
        comparisons=[{"a": "x", "b": "y", "n": 2}, {"a": "x", "b": "z", "n": 3}],
    )
    path = write_metrics(tmp_path, verdict={"recommendation": {"decision": "adopt"}, "criteria": []})
    content = json.loads(path.read_text())
    assert set(content["models"]) == {"vlm-tuned", "clip"}
    assert [(c["b"], c["n"]) for c in content["comparisons"]] == [("y", 2), ("z", 3)]
    assert content["recommendation"]["decision"] == "adopt"
    before = path.read_text()
    with pytest.raises(CatlibError, match="no finite number"):
        write_metrics(tmp_path, models={"bad": {"accuracy": float("nan")}})
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_metrics(path)
