"""The facts that the rules of assets/rules.yaml ask about: what intervals say of each track, and of the candidate against it."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from catlib.classifiers.tracks import UNTUNED, names_of, ordered, track
from catlib.errors import InputError
from catlib.evaluation import tables
from catlib.evaluation.tables import Entry, in_words, milliseconds, points, right_of_total
from catlib.settings import ComparisonSettings

UNDECIDED = "undecided"
Met = bool | str  # True, False or UNDECIDED
PLAN_BUDGET_MS = 150.0  # the plan: skip the VLM where a photo may take less


def at_least(figure: Entry | None, target: float, within: Callable[[float, float], bool] = operator.ge) -> Met:
    """True or False when the whole 95 % interval is on one side of the target, else undecided; so is a missing figure, and
    one that too few groups allow no interval for."""
    if figure is None or figure.get("value") is None:
        return UNDECIDED
    low, high = (within(end, target) for end in ends(figure))
    return low if low == high else UNDECIDED


def more_than(figure: Entry | None, target: float) -> Met:
    """As `at_least`, the target itself excluded."""
    return at_least(figure, target, operator.gt)


def ends(figure: Entry | None) -> tuple[float, float]:
    """The ends of the interval; without one, a figure may be anything."""
    return tuple((figure or {}).get("ci95") or (-math.inf, math.inf))


def surely_worse(versus: Entry) -> bool:
    """Less accurate by the paired interval and by the paired test, which at the edge may differ."""
    return ends(versus)[1] < 0 and versus["p"] < 0.05


def reference_of(models: Mapping[str, Entry]) -> str:
    """What the plan's targets are measured against: zero-shot CLIP, else the best track that learned from the same photos.

    Raises InputError without either.
    """
    rest = [n for n in models if track(n).role != "candidate"]
    found = _best(models, [n for n in rest if n in names_of("baseline")]) or _best(models, rest)
    if found is None:
        either = " or ".join(names_of("baseline", "opponent"))
        raise InputError(f"nothing to compare the VLM with: neither {either} was run")
    return found


def _best(models: Mapping[str, Entry], names: Iterable[str], key: str = "accuracy") -> str | None:
    """The best of the tracks: on validation where all have such figures, not by its test photos; of equals the faster."""

    def merit(name: str) -> tuple[float, float]:
        m = models[name]
        value = m["validation"].get(key) if _on_validation(models) else (m[key] or {}).get("value")
        return value or 0.0, -(m["latency_ms"]["p50"] or math.inf)

    return max(names, key=merit, default=None)


def _on_validation(models: Mapping[str, Entry]) -> bool:
    return all(m.get("validation") for m in models.values())


def in_time(models: Mapping[str, Entry], name: str | None, budget: float) -> Met:
    """Whether a photo takes at most `budget` ms (0: any), by the interval of the median. A VLM (None: one that is not trained yet)
    whose time is not measured is held to the plan's 150 ms."""
    ms = models[name]["latency_ms"] if name else {}
    if not budget:
        return True
    if ms.get("p50") is None:
        return False if (not name or track(name).role == "candidate") and budget < PLAN_BUDGET_MS else UNDECIDED
    return at_least({"value": ms["p50"], "ci95": ms.get("p50_ci95")}, budget, operator.le)


def of_others(models: Mapping[str, Entry], want: ComparisonSettings, candidate: str | None) -> dict[str, Any]:
    """What is known without a candidate: the other tracks, which of them may be run, and the plan's rules about CLIP and time."""
    budget = want.latency_budget_ms
    kept = {n: in_time(models, n, budget) for n in ordered(models)}
    rest = [n for n in kept if n != candidate and not track(n).of]
    ways = [n for n in kept if candidate and track(n).of == candidate]
    others = [n for n in rest if want.accuracy_first or kept[n] is not False]
    apart, roles = {n: models[n] for n in rest}, {track(n).role for n in rest}
    reference = reference_of(apart) if candidate or roles - {"candidate"} else ""
    zero_shot = models.get(reference) if reference in names_of("baseline") else None
    own = models[candidate] if candidate else {}
    said = {True: "keeps it", False: "exceeds it", UNDECIDED: "may keep it or not"}

    def listed(names: Iterable[str], say: Callable[[str, Entry], str]) -> str:
        return "; ".join(f"{track(n).title} {say(n, models[n])}" for n in names)

    return {
        "want": want,
        "candidate": candidate,
        "untrained": candidate is None,
        "rest": rest,
        "others": others,
        "several_others": len(others) > 1,
        "on_validation": candidate is None or _on_validation(apart),  # a gate's figures are those of validation photos
        "levels": listed(rest, lambda _, m: f"{in_words(m['accuracy'])}, {right_of_total(m)} priority photos right"),
        "opponent": "opponent" in roles,
        "reference": reference,
        "rival": _best(apart, others) or reference,
        "zero_shot": zero_shot,
        "needless": more_than(zero_shot and zero_shot["priority_accuracy"], want.clip_good_enough) is True,
        "slow": in_time(models, candidate, budget) is False,
        "own_device": own.get("device") or "not known",
        "ways": listed(ways, lambda _, m: f"{in_words(m['accuracy'])}, {milliseconds(m)}"),
        "budget": budget,
        "budget_kept": listed(kept, lambda n, _: said[kept[n]]),
        "times": listed(kept, lambda _, m: f"{milliseconds(m)}, {tables.cost(m, want.price_per_hour)}"),
    }


def of_candidate(models: Mapping[str, Entry], comparisons: Sequence[Entry], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the candidate is worth against every other track. `facts`: those of `of_others`."""
    want, candidate, others = facts["want"], facts["candidate"], facts["others"]
    reference, rival, tuned = facts["reference"], facts["rival"], models[candidate]
    apart, over = {n: models[n] for n in facts["rest"]}, {c["b"]: c for c in comparisons if c["a"] == candidate}
    for name in apart:
        if name not in over:
            raise InputError(f"no paired comparison of {candidate} with {name}: compare them on the same photos first")
    gains = {n: {"value": over[n]["accuracy_gain_points"], "ci95": over[n]["ci95"]} for n in apart}
    rare_gains = {n: over[n]["priority_f1_gain_points"] for n in apart}
    better = {n for n in apart if more_than(gains[n], 0) is True}
    rare_better = {n for n in apart if more_than(rare_gains[n], 0) is True}
    beater = _best(apart, [n for n in others if surely_worse(over[n])])
    rare_beater = _best(apart, [n for n in others if ends(rare_gains[n])[1] < 0], "priority_macro_f1")
    versus, own, mixed = over[reference], tuned["priority_macro_f1"], over[rival].get("combination")
    gain_met = at_least(gains[reference], want.target_gain_points)
    rare_met = True if own is None else more_than(own, want.target_priority_f1)  # nothing is asked about none
    gives, reasons = explains(models, candidate, facts["gives"])
    deployed, why = reading_to_run(models, over, want, candidate)
    ms, time_met = models[deployed]["latency_ms"], in_time(models, deployed, want.latency_budget_ms)
    told = [n for n in apart if n in (reference, rival, beater, rare_beater, UNTUNED) or n not in others]
    gained = [against(models, over[n], n in others) for n in told]
    rest = [n for n in apart if n not in told]
    brief = "; ".join(
        f"{track(n).title} {' and '.join(map(points, filter(None, (gains[n], rare_gains[n]))))}" for n in rest
    )
    if rest:
        figures = "accuracy" + " and of priority macro-F1" * (own is not None)
        gained.append(f"Its gains over the other tracks, in points of {figures}: {brief}.")
    return {
        "gives": gives,
        "reasons": reasons,
        "deployed": deployed,
        "why_deployed": why,
        "slow": time_met is False,
        "own_ms": milliseconds(models[deployed]) if ms["p50"] is not None else "",
        "photos": versus["n"],
        "gain": gains[reference],
        "gain_met": gain_met,
        "gain_reached": gain_met is True,
        "gain_missed": gain_met is False,
        "own": own,
        "rare": rare_gains[reference],
        "rare_missed": rare_met is False,
        "own_time": {"value": ms["p50"], "ci95": ms.get("p50_ci95")},
        "time_met": time_met,
        # On the priority breeds the target may be open where the gain is sure.
        "success": gain_met is True and (rare_met is True or (rare_met == UNDECIDED and reference in rare_better)),
        "beats_all": all(n in better or (n in rare_better and ends(over[n])[1] > 0) for n in others),
        "best_on_rare": rare_better >= {*others, reference},
        "better_elsewhere": more_than(over[rival]["accuracy_gain_elsewhere_points"], 0) is True,
        "rival_as_good": ends(over[rival])[1] < want.target_gain_points,
        "faster": surely_faster(models, deployed, rival),
        "beater": beater,
        "beater_test": tables.test_name(over[beater]) if beater else "",
        "better_than_beater_on_rare": beater in rare_better,
        "harmed": "Tuning has harmed. " * (beater == UNTUNED),
        "rare_beater": rare_beater,
        "better_than_rare_beater": rare_beater in better,
        "harmed_rare": "Tuning has harmed there. " * (rare_beater == UNTUNED),
        "mixed": mixed,
        "mixing_gains": mixed is not None and rival in others and ends(mixed)[0] > 0,
        "mixed_gain": points({"value": mixed["gain_points"], "ci95": mixed["ci95"]}, " points") if mixed else "",
        "mixed_over": track(mixed["over"]).title if mixed else "",
        "still_open": _still_open(tuned, versus, gain_met == UNDECIDED, rare_met == UNDECIDED, want.target_gain_points),
        "against": gained,
    }


def surely_faster(models: Mapping[str, Entry], name: str, other: str) -> bool:
    """Whether the intervals of the median times lie apart, that of `name` below."""
    own, their = (models[n]["latency_ms"].get("p50_ci95") for n in (name, other))
    return bool(own and their and own[1] < their[0])


def reading_to_run(
    models: Mapping[str, Entry], over: Mapping[str, Entry], want: ComparisonSettings, candidate: str
) -> tuple[str, str]:
    """How to read the candidate's model where it runs, and why in another way than the candidate does ("" if as it does): the
    fastest way that is as accurate (surely within the target gain, not surely worse on the priority breeds) and has an advantage.
    """
    budget, ways = want.latency_budget_ms, [n for n in over if track(n).of == candidate]
    telling = [n for n in ways if want.explanations_wanted and models[n].get("reason_figures")]
    for name in sorted(telling or ways, key=lambda n: models[n]["latency_ms"]["p50"] or math.inf):
        c, late, kept = (
            over[name],
            in_time(models, candidate, budget) is not True,
            in_time(models, name, budget) is True,
        )
        faster = "is surely faster" if surely_faster(models, name, candidate) else ""
        said = f"keeps the budget of {budget:g} ms" if late and kept else faster
        said = "gives the reasons that are wanted" if telling else said
        if said and ends(c)[1] < want.target_gain_points and ends(c["priority_f1_gain_points"])[0] <= 0:
            gain = points({"value": -c["accuracy_gain_points"], "ci95": sorted(-end for end in c["ci95"])}, " points")
            return name, f"{said} ({milliseconds(models[name])}) and is as accurate ({gain})"
    return candidate, ""


def explains(models: Mapping[str, Entry], candidate: str, trained: bool) -> tuple[bool, str]:
    """Whether the candidate's reasons count, and what is to be said of them. It takes figures: most photos get a whole one, and
    most of the traits named are those of the breed named."""
    ways = [m for n, m in models.items() if candidate in (n, track(n).of)]
    if not (found := next(filter(None, (m.get("reason_figures") for m in ways)), None)):
        return False, "those of this VLM were not measured" if trained else "this VLM is not trained to give any"
    whole, named, true = (found[key] or 0.0 for key in ("complete", "of_breed_named", "of_true_breed"))
    whole *= found["given"]
    said = f"{whole:.0%} of the photos get a whole one; of the traits named, {named:.0%} are those of the breed named"
    return whole > 0.5 < named, f"{said} and {true:.0%} those of the true breed"


def against(models: Mapping[str, Entry], c: Entry, counts: bool = True) -> str:
    """What the candidate gains over one other track, overall and on the priority breeds, and whether that one may be run."""
    gain, rare = c["accuracy_gain_points"], c["priority_f1_gain_points"]
    p = "< 0.001" if c["p"] < 0.001 else f"= {c['p']:.3f}"
    said = f"Against {track(c['b']).title} its accuracy is {abs(gain):.1f} points {'higher' if gain >= 0 else 'lower'}"
    said += f"{tables.within(c['ci95'], tables.signed)} on {c['n']} photos ({tables.test_name(c)}: p {p})"
    if rare is not None:
        own, their = (in_words(models[c[side]]["priority_macro_f1"]) for side in ("a", "b"))
        said += f", its priority macro-F1 {own} against {their} ({points(rare, ' points')})"
    if c["b"] == UNTUNED and (surely_worse(c) or (rare is not None and ends(rare)[1] < 0)):
        said += "; tuning has harmed"
    return said + ("." if counts else "; that one exceeds the budget and is not counted.")


def _still_open(tuned: Entry, versus: Entry, gain_open: bool, rare_open: bool, target: float) -> str:
    """Which targets lie inside their intervals, and roughly how many test photos would decide the gain, were it as measured."""
    spans, (low, high), own = [], ends(versus), tuned["priority_macro_f1"]
    if few := [name for name, e in (("the gain", versus), ("the priority macro-F1", own)) if e and e["ci95"] is None]:
        groups = versus.get("groups", versus["n"])
        return (
            f"they are {groups} independent groups, too few in too many breeds for an interval of {' and '.join(few)}."
        )
    if gain_open:
        spans.append(f"the gain may be anything from {low:+.1f} to {high:+.1f} points")
    if rare_open and own is not None:
        spans.append(f"the priority macro-F1 anything from {own['ci95'][0]:.0%} to {own['ci95'][1]:.0%}")
    said = " and ".join(spans) or "the intervals span the targets"
    distance = abs(versus["accuracy_gain_points"] - target)
    if not low < target <= high or distance == 0:
        return f"{said}."
    needed = versus["n"] * ((high - low) / 2 / distance) ** 2
    if needed > 1e5:
        return f"{said}. The gain lies so near the target that no realistic number of photos would decide it."
    step = 10 if needed < 300 else 100 if needed < 5000 else 1000
    return f"{said}. Were the gain as measured, about {int(-(-needed // step) * step)} test photos would decide it."
