"""Is the tuned VLM worth it against CLIP? The plan's rules applied to the figures, with the reasons in plain words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from catlib.errors import InputError
from catlib.evaluation.criteria import UNDECIDED, Criterion, Figure, Met, Targets, list_criteria, more_than
from catlib.evaluation.names import PROBES, TUNED, ZERO_SHOT, capitalise, title
from catlib.evaluation.reasons import Facts, beside_the_probe, plain_facts, undecided_in_words

RECOMMENDATIONS = {
    "adopt": "Adopt the tuned VLM.",
    "keep-clip": "Keep the cheaper model.",
    "combine": "Use both: neither model alone is the better choice.",
    "inconclusive": "Undecided: these photos cannot tell.",
}


@dataclass(frozen=True)
class Verdict:
    """`recommendation`: adopt | keep-clip | combine | inconclusive. `reasons`: sentences, the deciding one first."""

    recommendation: str
    reasons: tuple[str, ...]
    criteria: tuple[Criterion, ...]
    reference: str

    def as_json(self) -> dict[str, Any]:
        """The keys `criteria`, `recommendation`, `reasons` and `reference` of metrics.json."""
        return {
            "criteria": [c.as_json() for c in self.criteria],
            "recommendation": self.recommendation,
            "reasons": list(self.reasons),
            "reference": self.reference,
        }


def judge(
    models: Mapping[str, Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]],
    targets: Targets,
    candidate: str = TUNED,
) -> Verdict:
    """The verdict on `candidate` from entries of metrics.json.

    The reference is zero-shot CLIP; where it was not run, the best linear probe. The best probe is shown beside in any
    case. Raises InputError when the candidate, a reference or the paired comparison of the two is missing.
    """
    if candidate not in models:
        raise InputError(f"no figures of {candidate}: evaluate it first (found: {', '.join(models) or 'none'})")
    reference, probe = reference_of(models), _best_probe(models)
    versus = _find(comparisons, candidate, reference)
    versus_probe = _find(comparisons, candidate, probe) if probe else None
    facts = Facts(
        candidate=models[candidate],
        reference=models[reference],
        reference_title=title(reference),
        versus=versus,
        probe=models[probe] if probe else None,
        probe_title=title(probe) if probe else None,
        versus_probe=versus_probe,
        zero_shot_run=reference == ZERO_SHOT,
        targets=targets,
    )
    criteria = list_criteria(
        models[candidate],
        models[reference],
        title(reference),
        _gain(versus),
        _gain(versus_probe) if versus_probe else None,
        title(probe) if probe else None,
        targets,
    )
    recommendation, deciding = _decide(facts, {c.key: c.met for c in criteria})
    return Verdict(recommendation, (deciding, *plain_facts(facts)), tuple(criteria), reference)


def reference_of(models: Mapping[str, Mapping[str, Any]]) -> str:
    """What the tuned VLM is measured against: zero-shot CLIP, else the best linear probe. Raises InputError without
    either."""
    reference = ZERO_SHOT if ZERO_SHOT in models else _best_probe(models)
    if reference is None:
        raise InputError(
            f"nothing to compare the VLM with: neither {ZERO_SHOT} nor a linear probe ({' or '.join(PROBES)}) was run"
        )
    return reference


def _best_probe(models: Mapping[str, Mapping[str, Any]]) -> str | None:
    run = [name for name in PROBES if name in models]
    return max(run, key=lambda name: models[name]["accuracy"]["value"], default=None)


def _decide(facts: Facts, met: Mapping[str, Met]) -> tuple[str, str]:
    """The recommendation and the sentence that decides it: the first rule that applies."""
    targets, reference = facts.targets, facts.reference_title
    rare = facts.versus["priority_f1_gain_points"]
    rare_better, worse = more_than(rare, 0) is True, surely_worse(facts.versus)
    better_elsewhere = more_than(facts.versus["accuracy_gain_elsewhere_points"], 0) is True
    gain_met, rare_met = met["gain"], met["priority"]
    if rare is None:
        rare_met = True  # no priority breeds in this run: nothing is asked about them
    overrides = targets.explanations_wanted or targets.accuracy_first
    if met["skip"] is True and not overrides:
        return "keep-clip", (
            f"{capitalise(reference)} is already right on more than {targets.clip_good_enough:.0%} of the priority "
            "photos: "
            "the plan says to skip the VLM then."
        )
    if worse and not rare_better:
        return (
            "keep-clip",
            f"The tuned VLM is worse than {reference} on the same photos: both the interval of the gain and McNemar's "
            "exact test say so.",
        )
    if met["latency"] is False and not targets.accuracy_first:
        return "keep-clip", (
            f"The tuned VLM needs {facts.candidate['latency_ms']['p50']:.0f} ms for a photo, over the budget of "
            f"{targets.latency_ms:g} ms: "
            f"whatever its accuracy, it cannot be used within that budget{_where(facts.candidate)}."
        )
    if worse:
        return (
            "combine",
            f"The tuned VLM is worse than {reference} overall, but better on the priority breeds: let each do what it "
            "is good at.",
        )
    if facts.versus_probe is not None and _loses(facts.versus_probe):
        return (
            "keep-clip",
            f"{capitalise(facts.probe_title)} is better than the tuned VLM at a fraction of the cost: use that.",
        )
    if gain_met is True and rare is not None and rare["ci95"][1] < 0:
        return (
            "combine",
            f"The tuned VLM is better than {reference} overall, but worse on the priority breeds: use {reference} where "
            "the answer may be one of them.",
        )
    if gain_met is True and (rare_met is True or (rare_met == UNDECIDED and rare_better)):
        return beside_the_probe(facts)
    if rare_better and rare_met is not False and not better_elsewhere:
        return "combine", (
            "The tuned VLM is better on the priority breeds and not surely on the others: use it where the answer may "
            "be "
            f"a priority breed, and {reference} elsewhere."
        )
    mixed = facts.versus.get("combination")
    if mixed and mixed["ci95"][0] > 0 and gain_met is not True:
        return (
            "combine",
            f"Averaging both models gains {mixed['gain_points']:+.1f} points over the better one, and the interval excludes "
            "0; one alone does not reach the target.",
        )
    if gain_met is False:
        return (
            "keep-clip",
            f"The gain over {reference} is below {targets.gain_points:g} points, and the interval excludes more.",
        )
    if rare_met is False:
        return "keep-clip", (
            f"The priority macro-F1 is below {targets.priority_f1:.0%}, and the interval excludes more: the purpose is "
            "not reached; "
            "collect photos of these breeds before paying for a VLM."
        )
    return "inconclusive", undecided_in_words(facts, gain_met == UNDECIDED, rare_met == UNDECIDED)


def _where(model: Mapping[str, Any]) -> str:
    """The kind of hardware that a time was measured on, where it is known."""
    return f" on this hardware ({model['device']})" if model.get("device") else ""


def surely_worse(versus: Mapping[str, Any]) -> bool:
    """Less accurate by the paired interval and by McNemar's exact test, which at the edge may differ."""
    return versus["ci95"][1] < 0 and versus["mcnemar_p"] < 0.05


def _loses(versus: Mapping[str, Any]) -> bool:
    """Surely less accurate, and not surely better on the priority breeds."""
    return surely_worse(versus) and more_than(versus["priority_f1_gain_points"], 0) is not True


def _gain(comparison: Mapping[str, Any]) -> Figure:
    return {"value": comparison["accuracy_gain_points"], "ci95": comparison["ci95"]}


def _find(comparisons: Sequence[Mapping[str, Any]], a: str, b: str) -> Mapping[str, Any]:
    for comparison in comparisons:
        if (comparison["a"], comparison["b"]) == (a, b):
            return comparison
    raise InputError(f"no paired comparison of {a} with {b}: compare them on the same photos first")
