"""The reasons behind a verdict, one sentence each, every figure computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from catlib.evaluation.criteria import Targets, more_than
from catlib.evaluation.names import capitalise, title
from catlib.evaluation.tables import signed


@dataclass(frozen=True)
class Facts:
    """What a verdict rests on: entries of `models` and `comparisons`, and the targets."""

    candidate: Mapping[str, Any]
    reference: Mapping[str, Any]
    reference_title: str
    versus: Mapping[str, Any]
    probe: Mapping[str, Any] | None
    probe_title: str | None
    versus_probe: Mapping[str, Any] | None
    zero_shot_run: bool
    targets: Targets


def plain_facts(facts: Facts) -> list[str]:
    """The sentences that follow the deciding one: gain, priority breeds, probe, time, combination."""
    versus, rare = facts.versus, facts.versus["priority_f1_gain_points"]
    said = []
    if not facts.zero_shot_run:
        said.append(
            f"Zero-shot CLIP was not run: the reference is {facts.reference_title}, which has seen the training photos "
            "as the VLM has."
        )
    said.append(
        f"Against {facts.reference_title} the tuned VLM's accuracy is {_moved(versus)} on {versus['n']} photos "
        f"({_chance(versus['mcnemar_p'])})."
    )
    if rare is None:
        said.append("No priority breeds were given, so nothing is said about them.")
    else:
        own = facts.candidate["priority_macro_f1"]
        said.append(
            f"On the priority breeds its macro-F1 is {_share(own)}, against "
            f"{_share(facts.reference['priority_macro_f1'])} "
            f"of {facts.reference_title} ({_points(rare['value'], rare['ci95'])})."
        )
    if facts.probe_title is None:
        said.append("No linear probe was run: a gain over zero-shot CLIP then only says that trained beats untrained.")
    elif facts.zero_shot_run:
        versus = facts.versus_probe
        said.append(
            f"Against {facts.probe_title}, which learns from the same photos without a language model, its accuracy is "
            f"{_moved(versus)}."
        )
    p50 = facts.candidate["latency_ms"]["p50"]
    if p50 is None:
        said.append("Its time for a photo was not measured, so the latency budget stays open.")
    else:
        other = facts.reference["latency_ms"]["p50"]
        beside = "" if other is None else f", {facts.reference_title} {other:.0f} ms"
        over = p50 > facts.targets.latency_ms
        rank = " (accuracy outranks latency here)" if over and facts.targets.accuracy_first else ""
        said.append(
            f"A photo takes the tuned VLM {p50:.0f} ms (median, "
            f"{facts.candidate['latency_ms'].get('kind', 'as measured')}){beside}; "
            f"the budget of {facts.targets.latency_ms:g} ms is {'exceeded' if over else 'kept'}{rank}."
        )
    if mixed := facts.versus.get("combination"):
        said.append(
            f"Averaging both models (weight of the VLM {mixed['weight_a']:.2f}, chosen on validation) gives "
            f"{mixed['accuracy']:.1%} accuracy, "
            f"{_points(mixed['gain_points'], mixed['ci95'])} over {title(mixed['over'])} alone, the better one of the two."
        )
    if facts.candidate.get("device") == "cpu":
        said.append(
            "The plan also says to skip the VLM where there is no GPU; it ran on a CPU here, and the time above is a CPU's."
        )
    if facts.targets.explanations_wanted:
        said.append("Reasons are wanted with the breed: of these models only the VLM can give them.")
    return said


def beside_the_probe(facts: Facts) -> tuple[str, str]:
    """The recommendation when all targets over the reference are met: does the language model add anything over a
    probe?"""
    gain = f"{_points(facts.versus['accuracy_gain_points'], facts.versus['ci95'])} over {facts.reference_title}"
    own, target = facts.candidate["priority_macro_f1"], facts.targets.priority_f1
    if own is None:
        success = f"The target is met: {gain}."
    elif own["ci95"][0] >= target:
        success = f"Every target is met: {gain}, and a macro-F1 of {_share(own)} on the priority breeds."
    else:
        success = (
            f"The gain is certain, {gain}, and so is one on the priority breeds; only whether their macro-F1 of "
            f"{_share(own)} "
            f"reaches {target:.0%} is not settled."
        )
    versus = facts.versus_probe
    if versus is None:
        return "adopt", success
    overall = {"value": versus["accuracy_gain_points"], "ci95": versus["ci95"]}
    rare = versus["priority_f1_gain_points"]
    if versus["ci95"][1] < 0:
        return (
            "combine",
            f"Overall {facts.probe_title} is better, on the priority breeds the tuned VLM: let each do what it is good "
            "at.",
        )
    if more_than(overall, 0) is True or more_than(rare, 0) is True:
        return "adopt", success
    if facts.targets.explanations_wanted:
        return (
            "adopt",
            f"{success} {capitalise(facts.probe_title)} is as good as far as these photos tell, but it cannot give the "
            "reasons that are wanted.",
        )
    if versus["ci95"][1] < facts.targets.gain_points:
        return "keep-clip", (
            f"{success} But {facts.probe_title} does as well within {facts.targets.gain_points:g} points at a fraction "
            "of the cost: use that."
        )
    return "inconclusive", (
        f"{success} But whether it beats {facts.probe_title}, which costs a fraction, these {versus['n']} photos "
        "cannot tell."
    )


def undecided_in_words(facts: Facts, gain_open: bool, rare_open: bool) -> str:
    """Which targets lie inside their intervals, on how many photos, and how many would decide."""
    own, spans = facts.candidate["priority_macro_f1"], []
    if gain_open:
        low, high = facts.versus["ci95"]
        spans.append(f"the gain may be anything from {low:+.1f} to {high:+.1f} points")
    if rare_open and own is not None:
        rare = sum(row["support"] for row in facts.candidate["per_breed"].values() if row["priority"])
        low, high = own["ci95"]
        spans.append(f"the priority macro-F1 anything from {low:.0%} to {high:.0%} ({rare} photos)")
    said = f"{facts.versus['n']} photos cannot decide it: {' and '.join(spans) or 'the intervals span the targets'}."
    return f"{said} {photos_needed(facts)}".strip()


def photos_needed(facts: Facts) -> str:
    """Roughly how many test photos would decide the accuracy gain, were it as measured; empty when it is decided or
    far off."""
    gain, (low, high), target = facts.versus["accuracy_gain_points"], facts.versus["ci95"], facts.targets.gain_points
    distance = abs(gain - target)
    if not low < target <= high or distance == 0:
        return ""
    needed = facts.versus["n"] * ((high - low) / 2 / distance) ** 2
    if needed > 1e5:
        return "The gain lies so near the target that no realistic number of photos would decide it."
    return f"Were the gain as measured, about {_round_up(needed)} test photos would decide it."


def _round_up(number: float) -> int:
    step = 10 if number < 300 else 100 if number < 5000 else 1000
    return int(-(-number // step) * step)


def _points(value: float, ci95: list[float]) -> str:
    return f"{signed(value)} points [{signed(ci95[0])}, {signed(ci95[1])}]"


def _share(figure: Mapping[str, Any]) -> str:
    return f"{figure['value']:.1%} [{figure['ci95'][0]:.1%}, {figure['ci95'][1]:.1%}]"


def _chance(p: float) -> str:
    return "McNemar's exact test p < 0.001" if p < 0.001 else f"McNemar's exact test p = {p:.3f}"


def _moved(versus: Mapping[str, Any]) -> str:
    gain, (low, high) = versus["accuracy_gain_points"], versus["ci95"]
    return f"{abs(gain):.1f} points {'higher' if gain >= 0 else 'lower'} [{signed(low)}, {signed(high)}]"
