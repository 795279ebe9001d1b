"""Planted cases: is the recommendation what a sensible person would say, and do the reasons say why?"""

import json
from dataclasses import replace

import numpy as np
import pytest
from evaluation_cases import BREEDS, RARE, copied, grouped, make_set, scored_set, truth

from catlib.data.conversations import answer_for
from catlib.errors import InputError
from catlib.evaluation.compare import compare
from catlib.evaluation.facts import at_least, more_than
from catlib.evaluation.metrics import evaluate
from catlib.evaluation.results import reason_figures
from catlib.evaluation.tables import criteria_table
from catlib.evaluation.verdict import judge
from catlib.settings import ComparisonSettings

PLAN = ComparisonSettings()
COMMON = tuple(breed for breed in BREEDS if breed not in RARE)


def verdict_of(sets, priority=RARE, targets=PLAN, validation=None, candidate="vlm-tuned", **about):
    validation = validation or {}
    models = {s.name: evaluate(s, priority, bootstrap=400) | {"reason_figures": reason_figures(s)} for s in sets}
    for name, accuracy in (about.pop("on_validation", None) or {}).items():
        models[name]["validation"] = {"n": 50, "accuracy": accuracy, "priority_macro_f1": accuracy}
    first = next(s for s in sets if s.name == candidate)
    comparisons = [
        compare(first, s, priority, val_a=validation.get(candidate), val_b=validation.get(s.name), bootstrap=400)
        for s in sets
        if s is not first
    ]
    return judge(models, comparisons, targets, candidate, **about), comparisons


def telling(predictions, cut=0):
    """The same predictions of a model that was trained to give reasons, and gives them, `cut` letters short."""
    told = [answer_for(p.predicted, "label+traits", p.id) for p in predictions.predictions]
    rows = [replace(p, answer=text[: len(text) - cut]) for p, text in zip(predictions.predictions, told, strict=True)]
    return replace(predictions, predictions=tuple(rows), meta={**predictions.meta, "reasons": True})


def levels(common, rare):
    return {**dict.fromkeys(COMMON, common), **dict.fromkeys(RARE, rare)}


def test_clearly_better_is_adopted():
    true = truth(60)
    verdict, _ = verdict_of(
        [
            scored_set("vlm-tuned", true, levels(0.9, 0.85), seed=1, latency_ms=90.0),
            scored_set("clip-zero-shot", true, levels(0.6, 0.05), seed=2),
            scored_set("clip-probe", true, levels(0.75, 0.5), seed=3),
        ]
    )
    assert (verdict.decision, verdict.use, verdict.reference) == ("adopt", "vlm-tuned", "clip-zero-shot")
    assert {c["key"]: c["met"] for c in verdict.criteria} == {
        "finished": "undecided",
        "loss": "undecided",
        "priority": True,
        "gain": True,
        "priority-gain": True,
        "skip": False,
        "budget": False,
        "no-gpu": "undecided",
        "do": True,
        "explanations": False,
        "accuracy-first": False,
    }
    assert any("linear probe on CLIP features" in reason for reason in verdict.reasons)


@pytest.mark.parametrize("each", [1, 30])
def test_too_few_groups_decide_nothing(each):
    """One photo a breed, and thirty photos of one cat a breed: a gain of any size is no evidence, and that is said."""
    true = truth(each)
    sets = [
        scored_set("vlm-tuned", true, 0.999, seed=1),
        scored_set("clip-zero-shot", true, 0.05, seed=2),
        scored_set("clip-probe", true, 0.1, seed=3),
    ]
    verdict, comparisons = verdict_of([grouped(s, true) for s in sets])
    assert verdict.decision == "inconclusive" and comparisons[0]["ci95"] is None
    assert "10 independent groups" in verdict.reasons[0] and "no interval" in verdict.text
    table = criteria_table(verdict.criteria)
    assert "no interval" in table.to_string() and "nan" not in table.to_string()


def test_copies_of_the_photos_do_not_change_the_decision():
    true = truth(8)
    sets = [
        scored_set("vlm-tuned", true, levels(0.66, 0.5), seed=5),
        scored_set("clip-zero-shot", true, levels(0.6, 0.5), seed=6),
    ]
    decisions = [verdict_of(group)[0].decision for group in (sets, [copied(s, 10) for s in sets])]
    assert decisions == ["inconclusive", "inconclusive"]


def test_identical_models_are_not_adopted():
    true = truth(60)
    tuned = scored_set("vlm-tuned", true, 0.8, seed=1)
    clip = make_set("clip-zero-shot", true, [p.predicted for p in tuned.predictions])
    verdict, (comparison,) = verdict_of([tuned, clip])
    low, high = comparison["ci95"]
    assert low <= 0 <= high and comparison["p"] == 1.0
    assert verdict.decision == "keep-clip"
    assert "below 3 points" in verdict.reasons[0]


@pytest.mark.slow
def test_better_on_the_priority_breeds_only_is_combined():
    true = truth({**dict.fromkeys(COMMON, 100), **dict.fromkeys(RARE, 15)})
    noise = np.random.default_rng(0).normal(size=(len(true), len(BREEDS)))
    verdict, (comparison,) = verdict_of(
        [
            scored_set("vlm-tuned", true, levels(0.8, 0.9), seed=1, noise=noise),
            scored_set("clip-zero-shot", true, levels(0.8, 0.1), seed=1, noise=noise),
        ]
    )
    assert comparison["priority_f1_gain_points"]["ci95"][0] > 0
    assert verdict.decision == "combine" and "priority" in verdict.reasons[0]
    assert verdict.use == "vlm-tuned+clip-zero-shot" and "the tuned VLM and zero-shot CLIP" in verdict.text
    slightly_worse, _ = verdict_of(
        [
            scored_set("vlm-tuned", true, levels(0.72, 0.9), seed=1, noise=noise),
            scored_set("clip-zero-shot", true, levels(0.8, 0.1), seed=1, noise=noise),
        ]
    )
    assert slightly_worse.decision == "combine"
    assert "priority" in slightly_worse.reasons[0]


def test_better_overall_but_worse_on_the_priority_breeds_is_no_plain_adoption():
    true = truth({**dict.fromkeys(COMMON, 60), **dict.fromkeys(RARE, 60)})
    verdict, (comparison,) = verdict_of(
        [
            scored_set("vlm-tuned", true, levels(0.95, 0.35), seed=1),
            scored_set("clip-zero-shot", true, levels(0.6, 0.72), seed=2),
        ]
    )
    assert comparison["ci95"][0] > 3 and comparison["priority_f1_gain_points"]["ci95"][1] < 0
    assert verdict.decision == "combine" and "worse on the priority breeds" in verdict.reasons[0]


@pytest.mark.slow
def test_the_plan_s_rules_without_a_figure_are_told():
    true = truth(60)
    sets = [
        telling(scored_set("vlm-tuned", true, levels(0.9, 0.85), seed=1)),
        scored_set("clip-zero-shot", true, levels(0.6, 0.05), seed=2),
    ]
    losses = {"val_losses": [0.9, 0.4], "val_loss_fell": True}
    record = {"outcome": {"finished": True, "out_of_memory": 0, "device": "cpu", **losses}}
    verdict, _ = verdict_of(sets, targets=ComparisonSettings(explanations_wanted=True), record=record)
    met = {c["key"]: c["met"] for c in verdict.criteria}
    assert (met["no-gpu"], met["explanations"], met["accuracy-first"]) == (True, True, False)
    assert met["finished"] is met["loss"] is True and "Every target is met" in verdict.reasons[0]
    rows = criteria_table(verdict.criteria).T
    assert rows["Skip it: there is no GPU to train on"]["measured"] == "to train on: cpu"
    assert rows["Validation loss fell over the epochs"]["measured"] == "0.900 → 0.400"
    for change in ({"out_of_memory": 1}, {"finished": False}, {"val_loss_fell": False}):
        verdict, _ = verdict_of(sets, record={"outcome": record["outcome"] | change})
        assert verdict.decision == "adopt" and "Every target" not in verdict.reasons[0]
        assert [c["met"] for c in verdict.criteria if c["key"] in ("finished", "loss")].count(False) == 1


@pytest.mark.slow
def test_the_budget_is_the_user_s():
    """The VLM is better but takes 400 ms, CLIP 12 ms: that decides only where the user has a budget, and accuracy or reasons that it
    was trained to give outrank it."""
    true = truth(60)
    fast = scored_set("clip-zero-shot", true, levels(0.6, 0.05), seed=2, latency_ms=12.0)
    sets = [scored_set("vlm-tuned", true, levels(0.9, 0.85), seed=1, latency_ms=400.0), fast]
    giving = [telling(sets[0]), fast]
    verdict, _ = verdict_of(sets)
    assert verdict.decision == "adopt" and "400 ms" in verdict.text and "12 ms" in verdict.text
    verdict, _ = verdict_of(sets, targets=ComparisonSettings(latency_budget_ms=150.0))
    assert (verdict.decision, verdict.use) == ("keep-clip", "clip-zero-shot")
    assert "400 ms" in verdict.reasons[0] and "150 ms" in verdict.reasons[0]
    assert next(c["met"] for c in verdict.criteria if c["key"] == "latency") is False
    assert verdict_of(sets, targets=ComparisonSettings(latency_budget_ms=500.0))[0].decision == "adopt"
    assert (
        verdict_of(sets, targets=ComparisonSettings(latency_budget_ms=150.0, accuracy_first=True))[0].decision
        == "adopt"
    )
    wished = ComparisonSettings(latency_budget_ms=150.0, explanations_wanted=True)
    assert verdict_of(giving, targets=wished)[0].decision == "adopt"
    for less, said in (
        (sets[0], "not trained to give any"),
        (replace(sets[0], meta={**sets[0].meta, "reasons": True}), "not measured"),
        (telling(sets[0], cut=1), "0% of the photos get a whole one"),
    ):
        verdict, _ = verdict_of([less, fast], targets=wished)
        assert verdict.decision == "keep-clip" and said in verdict.text
    assert next(c["met"] for c in verdict.criteria if c["key"] == "explanations") is False


@pytest.mark.slow
def test_the_reading_to_run_is_named_and_its_time_is_that_one_s():
    """Three ways to read one model: the one of the run, unless another is as accurate and faster, keeps a budget that it does not
    keep, or gives the reasons that are wanted."""
    true = truth(60)
    noise = np.random.default_rng(0).normal(size=(len(true), len(BREEDS)))

    def read(name, accuracy, times):
        made = scored_set(
            name, true, accuracy, seed=1, noise=noise, latency_single_ms=[times + i / 9 for i in range(32)]
        )
        return replace(made, predictions=tuple(replace(p, scores=None) for p in made.predictions))

    score = scored_set("vlm-tuned", true, levels(0.9, 0.85), seed=1, noise=noise, latency_single_ms=[200.0] * 32)
    clip = scored_set("clip-zero-shot", true, levels(0.6, 0.05), seed=2, latency_ms=12.0)
    fast = read("vlm-tuned-constrained", levels(0.9, 0.85), 100.0)
    worse = read("vlm-tuned-constrained", levels(0.8, 0.75), 100.0)
    slow = read("vlm-tuned-free", levels(0.9, 0.85), 400.0)
    budget = ComparisonSettings(latency_budget_ms=150.0)

    verdict, _ = verdict_of([score, fast, slow, clip])
    assert (verdict.decision, verdict.use) == ("adopt", "vlm-tuned-constrained") and "surely faster" in verdict.text
    for others in ([slow], [worse], [worse, slow]):  # slower, or less accurate
        verdict, _ = verdict_of([score, *others, clip])
        assert (verdict.decision, verdict.use) == ("adopt", "vlm-tuned") and "Where it runs" not in verdict.text
    verdict, _ = verdict_of([score, slow, clip], targets=budget)
    assert verdict.decision == "keep-clip" and "200 ms" in verdict.reasons[0]
    verdict, _ = verdict_of([score, fast, slow, clip], targets=budget)
    assert (verdict.decision, verdict.use) == ("adopt", "vlm-tuned-constrained") and "keeps the budget" in verdict.text
    row = next(c for c in verdict.criteria if c["key"] == "latency")
    assert row["met"] is True and 100 <= row["value"] < 104
    near = scored_set("clip-probe", true, levels(0.9, 0.85), seed=1, noise=noise, latency_ms=150.0)
    verdict, _ = verdict_of([score, fast, near, clip])  # the probe is as good, and slower than the reading that runs
    assert (verdict.decision, verdict.use) == ("adopt", "vlm-tuned-constrained") and "slower" in verdict.reasons[0]
    wished = ComparisonSettings(explanations_wanted=True)
    assert verdict_of([score, fast, telling(slow), clip], targets=wished)[0].use == "vlm-tuned-free"


def test_a_time_whose_interval_spans_the_budget_does_not_decide():
    true = truth(60)
    times = [140.0 + i for i in range(24)]  # median 151.5
    sets = [
        scored_set("vlm-tuned", true, levels(0.9, 0.85), seed=1, latency_single_ms=times),
        scored_set("clip-zero-shot", true, levels(0.6, 0.05), seed=2, latency_ms=12.0),
    ]
    verdict, _ = verdict_of(sets, targets=ComparisonSettings(latency_budget_ms=150.0))
    assert (
        verdict.decision == "adopt" and next(c["met"] for c in verdict.criteria if c["key"] == "latency") == "undecided"
    )
    assert "Every target" not in verdict.reasons[0] and "may keep it" in verdict.text


@pytest.mark.slow
def test_an_opponent_that_exceeds_the_budget_is_not_counted():
    """A probe of 900 ms is no cheaper choice: without a budget it wins by its accuracy, with one it is out."""
    true = truth(60)
    sets = [
        scored_set("vlm-tuned", true, levels(0.85, 0.85), seed=1, latency_ms=300.0),
        scored_set("clip-zero-shot", true, levels(0.6, 0.05), seed=2, latency_ms=12.0),
        scored_set("clip-probe", true, levels(0.97, 0.97), seed=3, latency_ms=900.0),
    ]
    verdict, _ = verdict_of(sets)
    assert (verdict.decision, verdict.use) == ("keep-clip", "clip-probe") and "cost" not in verdict.reasons[0]
    verdict, _ = verdict_of(sets, targets=ComparisonSettings(latency_budget_ms=500.0))
    assert (verdict.decision, verdict.use) == ("adopt", "vlm-tuned") and "exceeds" in verdict.text
    equal = [*sets[:2], scored_set("clip-probe", true, levels(0.85, 0.85), seed=1, latency_ms=900.0)]
    verdict, _ = verdict_of(equal)
    assert verdict.decision == "adopt" and "slower" in verdict.reasons[0]


@pytest.mark.slow
def test_the_priority_breeds_count_against_every_track():
    """Better than the probe overall and worse on the priority breeds: both are used, and it is said."""
    true = truth({**dict.fromkeys(COMMON, 80), **dict.fromkeys(RARE, 60)})
    sets = [
        scored_set("vlm-tuned", true, levels(0.95, 0.65), seed=1),
        scored_set("clip-zero-shot", true, levels(0.6, 0.05), seed=2),
        scored_set("clip-probe", true, levels(0.75, 0.98), seed=3),
    ]
    verdict, _ = verdict_of(sets)
    assert (verdict.decision, verdict.use) == ("combine", "vlm-tuned+clip-probe")
    assert "worse on the priority breeds" in verdict.reasons[0]
    tie = [*sets[:2], scored_set("clip-probe", true, levels(0.89, 0.98), seed=3)]
    verdict, _ = verdict_of(tie)
    assert (verdict.decision, verdict.use) == ("keep-clip", "clip-probe") and "priority" in verdict.reasons[0]


def test_tuning_that_harmed_is_said_and_the_untuned_model_is_used():
    true = truth(100)
    noise = np.random.default_rng(0).normal(size=(len(true), len(BREEDS)))
    sets = [
        scored_set("vlm-tuned", true, levels(0.86, 0.6), seed=1, noise=noise),
        scored_set("vlm-base", true, levels(0.93, 0.9), seed=1, noise=noise),
        scored_set("clip-zero-shot", true, levels(0.6, 0.05), seed=2),
    ]
    verdict, _ = verdict_of(sets)
    assert (verdict.decision, verdict.use) == ("keep-clip", "vlm-base") and "harmed" in verdict.reasons[0]


@pytest.mark.slow
def test_a_track_that_is_not_in_the_list_counts_as_well():
    true = truth(60)
    sets = [
        scored_set("vlm-tuned", true, levels(0.8, 0.7), seed=1),
        scored_set("clip-zero-shot", true, levels(0.6, 0.05), seed=2),
        scored_set("clip-probe", true, levels(0.7, 0.5), seed=3),
        scored_set("somebodys-own", true, levels(0.98, 0.97), seed=4),
    ]
    verdict, comparisons = verdict_of(sets)
    assert (verdict.decision, verdict.use) == ("keep-clip", "somebodys-own") and "somebodys-own" in verdict.reasons[0]
    told = {
        name: [r for r in verdict.reasons if r.startswith("Against") and name in r] for name in ("somebodys", "probe")
    }
    assert len(told["somebodys"]) == 1 and not told["probe"], (
        "those that decide have a sentence each, the others share one"
    )
    (gain,) = (c["accuracy_gain_points"] for c in comparisons if c["b"] == "clip-probe")
    assert f"macro-F1: the linear probe on CLIP features {gain:+.1f} [" in verdict.text


@pytest.mark.slow
def test_the_opponent_is_chosen_on_validation_where_that_is_possible():
    """On these test photos the first probe happens to have three more right; on validation the other one is ahead."""
    true = truth(60)
    tuned = scored_set("vlm-tuned", true, levels(0.62, 0.6), seed=1)
    wrong = [i for i, p in enumerate(tuned.predictions) if p.predicted != p.breed]

    def righted(name, count):
        return make_set(
            name, true, [true[i] if i in wrong[:count] else p.predicted for i, p in enumerate(tuned.predictions)]
        )

    sets = [tuned, righted("clip-zero-shot", 0), righted("clip-probe", 3), righted("tower-probe", 1)]
    verdict, _ = verdict_of(sets)
    assert verdict.use == "clip-probe" and "test photos, as" in verdict.text
    chosen = {"clip-zero-shot": 0.5, "clip-probe": 0.6, "tower-probe": 0.7}
    verdict, _ = verdict_of(sets, on_validation=chosen)
    assert verdict.use == "tower-probe" and "validation photos" in verdict.text


def test_models_on_different_photos_are_refused():
    true = truth(20)
    few = scored_set("clip-zero-shot", true, 0.5, seed=2)
    few = replace(few, predictions=few.predictions[1:])
    with pytest.raises(InputError, match="different photos"):
        verdict_of([scored_set("vlm-tuned", true, 0.9, seed=1), few])


def test_worse_model_is_not_taken_however_fast():
    true = truth(60)
    verdict, _ = verdict_of(
        [
            scored_set("vlm-tuned", true, levels(0.5, 0.2), seed=1, latency_ms=5.0),
            scored_set("clip-zero-shot", true, levels(0.8, 0.5), seed=2, latency_ms=100.0),
        ]
    )
    assert verdict.decision == "keep-clip" and "worse" in verdict.reasons[0]


def test_too_few_photos_decide_nothing():
    true = truth(2)
    verdict, _ = verdict_of(
        [
            scored_set("vlm-tuned", true, levels(0.75, 0.6), seed=1),
            scored_set("clip-zero-shot", true, levels(0.65, 0.4), seed=2),
        ]
    )
    assert verdict.decision == "inconclusive"
    assert "20 photos" in verdict.reasons[0]
    assert next(c["met"] for c in verdict.criteria if c["key"] == "gain") == "undecided"


def test_sure_gains_with_an_open_priority_target_are_adopted_with_that_said():
    """Few photos of priority breeds: surely far better than CLIP there, whether above 50 % is open."""
    true = truth({**dict.fromkeys(COMMON, 60), **dict.fromkeys(RARE, 9)})
    verdict, (comparison,) = verdict_of(
        [
            scored_set("vlm-tuned", true, levels(0.9, 0.6), seed=1),
            scored_set("clip-zero-shot", true, levels(0.5, 0.0), seed=2),
        ]
    )
    assert next(c["met"] for c in verdict.criteria if c["key"] == "priority") == "undecided"
    assert comparison["priority_f1_gain_points"]["ci95"][0] > 0
    assert verdict.decision == "adopt" and "not settled" in verdict.reasons[0] and "Every" not in verdict.reasons[0]


@pytest.mark.slow
def test_probe_that_does_as_well_is_the_cheaper_choice():
    true = truth(150)
    noise = np.random.default_rng(0).normal(size=(len(true), len(BREEDS)))
    sets = [
        scored_set("vlm-tuned", true, levels(0.9, 0.85), seed=1, noise=noise),
        scored_set("clip-zero-shot", true, levels(0.6, 0.05), seed=2),
        scored_set("clip-probe", true, levels(0.9, 0.85), seed=1, noise=noise),
    ]
    verdict, _ = verdict_of(sets)
    assert verdict.decision == "keep-clip" and "does as well" in verdict.reasons[0]
    assert verdict.use == "clip-probe"
    wished = ComparisonSettings(explanations_wanted=True)
    assert verdict_of(sets, targets=wished)[0].decision == "keep-clip"
    assert verdict_of([telling(sets[0]), *sets[1:]], targets=wished)[0].decision == "adopt"
    better = scored_set("clip-probe", true, levels(0.98, 0.97), seed=5)
    verdict, _ = verdict_of([*sets[:2], better])
    assert verdict.decision == "keep-clip" and "linear probe" in verdict.reasons[0]


def test_clip_good_enough_on_the_priority_breeds_means_skip():
    true = truth(100)
    verdict, _ = verdict_of(
        [
            scored_set("vlm-tuned", true, levels(0.97, 0.99), seed=1),
            scored_set("clip-zero-shot", true, levels(0.9, 0.93), seed=2),
        ]
    )
    assert verdict.decision == "keep-clip" and "80%" in verdict.reasons[0]


@pytest.mark.slow
def test_zero_shot_clip_not_run_is_said_plainly():
    true = truth(60)
    sets = [
        scored_set("vlm-base", true, levels(0.3, 0.0), seed=4),
        scored_set("vlm-tuned", true, levels(0.9, 0.85), seed=1),
        scored_set("tower-probe", true, levels(0.7, 0.4), seed=2),
    ]
    verdict, _ = verdict_of(sets)
    assert verdict.reference == "tower-probe" and verdict.decision == "adopt"
    assert any("Zero-shot CLIP was not run" in reason for reason in verdict.reasons)
    with pytest.raises(InputError, match="nothing to compare"):
        verdict_of(sets[:2])
    with pytest.raises(InputError, match="vlm-tuned"):
        judge({}, [], ComparisonSettings())


def test_no_priority_breeds_and_no_latency_leave_their_criteria_open():
    true = truth(60)
    sets = [scored_set("vlm-tuned", true, 0.9, seed=1), scored_set("clip-zero-shot", true, 0.6, seed=2)]
    sets = [replace(s, predictions=tuple(replace(p, latency_ms=None) for p in s.predictions)) for s in sets]
    verdict, _ = verdict_of(sets, priority=())
    met = {c["key"]: c["met"] for c in verdict.criteria}
    assert met["priority"] == "undecided" and "latency" not in met and verdict.decision == "adopt"
    assert any("not measured" in reason for reason in verdict.reasons)


def test_verdict_is_plain_json_and_targets_come_from_the_settings():
    true = truth(30)
    sets = [scored_set("vlm-tuned", true, 0.8, seed=1), scored_set("clip-zero-shot", true, 0.6, seed=2)]
    targets = ComparisonSettings(target_gain_points=7.5, latency_budget_ms=60.0)
    verdict, _ = verdict_of(sets, targets=targets)
    content = json.loads(json.dumps(verdict.as_json(), allow_nan=False))
    assert set(content) == {"criteria", "recommendation"}
    assert {"decision", "use", "reasons"} <= set(content["recommendation"])
    assert "at least 7.5 points" in {c["target"] for c in content["criteria"]}
    assert all({"name", "target", "value", "ci95", "met"} <= set(c) for c in content["criteria"])
    assert criteria_table(content["criteria"])[["measured", "result"]].all(axis=None)


def test_met_needs_the_whole_interval():
    figure = {"value": 0.6, "ci95": [0.5, 0.7]}
    assert [at_least(figure, t) for t in (0.5, 0.4, 0.6, 0.71)] == [True, True, "undecided", False]
    assert [more_than(figure, t) for t in (0.5, 0.49, 0.7)] == ["undecided", True, False]
    assert at_least(None, 0.5) == "undecided"
