"""Is the tuned VLM worth it against CLIP? The plan's rules as three tables: what decides, what is told, what is measured."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from catlib.classifiers.tracks import TUNED, Role, names_of, track
from catlib.errors import InputError
from catlib.evaluation.tables import Entry, in_words, points, signed, test_name
from catlib.evaluation.tables import within as bounds
from catlib.settings import ComparisonSettings

UNDECIDED = "undecided"
Met = bool | str  # True, False or UNDECIDED
DECISIONS = {
    "adopt": "Adopt the tuned VLM.",
    "keep-clip": "Keep the cheaper model.",
    "combine": "Use both: neither model alone is the better choice.",
    "inconclusive": "Undecided: these photos cannot tell.",
}


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


def ends(figure: Entry) -> tuple[float, float]:
    """The ends of the interval; without one, a figure may be anything."""
    return tuple(figure["ci95"] or (-math.inf, math.inf))


def surely_worse(versus: Entry) -> bool:
    """Less accurate by the paired interval and by the paired test, which at the edge may differ."""
    return ends(versus)[1] < 0 and versus["p"] < 0.05


def accuracy_gain(versus: Entry) -> Entry:
    """The accuracy gain of a comparison as a figure, in points."""
    return {"value": versus["accuracy_gain_points"], "ci95": versus["ci95"]}


@dataclass(frozen=True)
class Rule:
    """The first rule that applies decides. `use`: the tracks to run; `because`: a sentence filled with the facts."""

    decision: str
    use: str
    when: Callable[[SimpleNamespace], bool]
    because: str


RULES = (
    Rule(
        "keep-clip",
        "reference",
        lambda f: f.needless is True and not (f.want.explanations_wanted or f.want.accuracy_first),
        "{reference.first} is already right on more than {want.clip_good_enough:.0%} of the priority photos: the plan says to "
        "skip the VLM then.",
    ),
    Rule(
        "keep-clip",
        "reference",
        lambda f: f.worse and not f.rare_better,
        "The tuned VLM is worse than {reference.title} on the same photos: the interval of the gain and {test} say so.",
    ),
    Rule(
        "keep-clip",
        "reference",
        lambda f: f.in_time is False and not f.want.accuracy_first,
        "The tuned VLM needs {p50:.0f} ms for a photo on this hardware ({device_text}), over the budget of "
        "{want.latency_budget_ms:g} ms: whatever its accuracy, it cannot be used within that budget.",
    ),
    Rule(
        "combine",
        "tuned reference",
        lambda f: f.worse,
        "The tuned VLM is worse than {reference.title} overall, but better on the priority breeds: let each do what it is good "
        "at.",
    ),
    Rule(
        "keep-clip",
        "probe",
        lambda f: f.worse_than_probe and not f.rare_over_probe,
        "{probe.first} is better than the tuned VLM at a fraction of the cost: use that.",
    ),
    Rule(
        "combine",
        "tuned reference",
        lambda f: f.gain_met is True and f.rare is not None and ends(f.rare)[1] < 0,
        "The tuned VLM is better than {reference.title} overall, but worse on the priority breeds: use {reference.title} where "
        "the answer may be one of them.",
    ),
    # The targets over the reference are met: does the language model add anything over a probe?
    Rule("adopt", "tuned", lambda f: f.success and f.probe is None, "{achieved}."),
    Rule(
        "combine",
        "tuned probe",
        lambda f: f.success and f.most_over_probe < 0,
        "Overall {probe.title} is better, on the priority breeds the tuned VLM: let each do what it is good at.",
    ),
    Rule("adopt", "tuned", lambda f: f.success and (f.beats_probe or f.rare_over_probe), "{achieved}."),
    Rule(
        "adopt",
        "tuned",
        lambda f: f.success and f.want.explanations_wanted,
        "{achieved}. {probe.first} is as good as far as these photos tell, but it cannot give the reasons that are wanted.",
    ),
    Rule(
        "keep-clip",
        "probe",
        lambda f: f.success and f.most_over_probe < f.want.target_gain_points,
        "{achieved}. But {probe.title} does as well within {want.target_gain_points:g} points at a fraction of the cost.",
    ),
    Rule(
        "inconclusive",
        "probe",
        lambda f: f.success,
        "{achieved}. But these photos cannot tell whether it beats {probe.title}, which costs a fraction.",
    ),
    # From here on a target is open or missed.
    Rule(
        "combine",
        "tuned reference",
        lambda f: f.rare_better and f.rare_met is not False and not f.better_elsewhere,
        "The tuned VLM is better on the priority breeds and not surely on the others: use it where the answer may be a "
        "priority breed, and {reference.title} elsewhere.",
    ),
    Rule(
        "combine",
        "tuned reference",
        lambda f: f.mixed is not None and ends(f.mixed)[0] > 0 and f.gain_met is not True,
        "Averaging both models gains {mixed[gain_points]:+.1f} points over the better one, and the interval excludes 0; one "
        "alone does not reach the target.",
    ),
    Rule(
        "keep-clip",
        "reference",
        lambda f: f.gain_met is False,
        "The gain over {reference.title} is below {want.target_gain_points:g} points, and the interval excludes more.",
    ),
    Rule(
        "keep-clip",
        "reference",
        lambda f: f.rare_met is False,
        "The priority macro-F1 is below {want.target_priority_f1:.0%}, and the interval excludes more: the purpose is not "
        "reached; collect photos of these breeds before paying for a VLM.",
    ),
    Rule("inconclusive", "reference", lambda f: True, "{versus[n]} photos cannot decide it: {still_open}"),
)

# What is told after the deciding sentence, where it applies.
REASONS: tuple[tuple[Callable[[SimpleNamespace], bool], str], ...] = (
    (
        lambda f: not f.zero_shot_run,
        "Zero-shot CLIP was not run: the reference is {reference.title}, which has seen the training photos as the VLM has.",
    ),
    (
        lambda f: True,
        "Against {reference.title} the tuned VLM's accuracy is {moved} on {versus[n]} photos ({test}: p {p}).",
    ),
    (lambda f: f.rare is None, "No priority breeds were given, so nothing is said about them."),
    (
        lambda f: f.rare is not None,
        "On the priority breeds its macro-F1 is {own_text}, against {their_text} of {reference.title} ({rare_text}).",
    ),
    (
        lambda f: f.probe is None,
        "No linear probe was run: a gain over zero-shot CLIP then only says that trained beats untrained.",
    ),
    (
        lambda f: f.probe is not None and f.zero_shot_run,
        "Against {probe.title}, which learns from the same photos without a language model, its accuracy is {moved_probe}.",
    ),
    (lambda f: f.p50 is None, "Its time for a photo was not measured, so the latency budget stays open."),
    (
        lambda f: f.p50 is not None,
        "A photo takes the tuned VLM {p50:.0f} ms (median, {timed}){beside}; the budget of "
        "{want.latency_budget_ms:g} ms is {budget}.",
    ),
    (
        lambda f: f.mixed is not None,
        "Averaging both models (weight of the VLM {mixed[weight_a]:.2f}, chosen on validation) gives {mixed[accuracy]:.1%} "
        "accuracy, {mixed_text} over {mixed_over} alone, the better one of the two.",
    ),
    (
        lambda f: f.device == "cpu",
        "The plan also says to skip the VLM where there is no GPU; it ran on a CPU here, and the time above is a CPU's.",
    ),
    (
        lambda f: f.want.explanations_wanted,
        "Reasons are wanted with the breed: of these models only the VLM can give them.",
    ),
)

# What is shown: key, kind (success: wanted; skip, do: the plan's rules), unit (empty: rests on no figure), name, target.
CRITERIA = (
    ("priority", "success", "share", "Priority macro-F1 of the tuned VLM", "at least {want.target_priority_f1:.0%}"),
    (
        "gain",
        "success",
        "points",
        "Accuracy gain over {reference.title}",
        "at least {want.target_gain_points:g} points",
    ),
    ("probe", "success", "points", "Accuracy gain over {probe.title}", "more than 0 points"),
    ("latency", "success", "ms", "Median time of the tuned VLM for one photo", "at most {want.latency_budget_ms:g} ms"),
    (
        "skip",
        "skip",
        "share",
        "Skip it: {reference.title} is good on the priority breeds",
        "over {want.clip_good_enough:.0%} right",
    ),
    (
        "do",
        "do",
        "share",
        "Do it: priority macro-F1 of {reference.title} stays low",
        "below {want.clip_priority_f1:.0%}",
    ),
    ("no-gpu", "skip", "", "Skip it: there is no GPU", "no GPU"),
    ("explanations", "do", "", "Do it: reasons are wanted with the breed", "asked for"),
    ("accuracy-first", "do", "", "Do it: accuracy outranks latency", "asked for"),
)


@dataclass(frozen=True)
class Verdict:
    """`decision`: a key of DECISIONS. `use`: the tracks to run, joined by "+". `reasons`: sentences, the deciding one first.

    `criteria`: entries of metrics.json. `reference`: the model that the tuned VLM was measured against.
    """

    decision: str
    use: str
    reasons: tuple[str, ...]
    criteria: tuple[dict[str, Any], ...]
    reference: str

    def as_json(self) -> dict[str, Any]:
        """The keys `criteria` and `recommendation` of metrics.json."""
        about = {"decision": self.decision, "use": self.use, "reasons": list(self.reasons), "reference": self.reference}
        return {"criteria": list(self.criteria), "recommendation": about}

    @property
    def text(self) -> str:
        """Decision, tracks to run and reasons, in Markdown."""
        use = " and ".join(track(name).title for name in self.use.split("+"))
        reasons = "\n".join(f"- {reason}" for reason in self.reasons)
        return f"**Recommendation: {self.decision}. {DECISIONS[self.decision]}** To run: {use}.\n\n{reasons}"


def judge(
    models: Mapping[str, Entry], comparisons: Sequence[Entry], want: ComparisonSettings, candidate: str = TUNED
) -> Verdict:
    """The verdict on `candidate` from entries of metrics.json; `want` holds the targets and what the user wishes.

    The reference is zero-shot CLIP; where it was not run, the best linear probe. The best probe is shown beside in any
    case. Raises InputError when the candidate, a reference or the paired comparison of the two is missing.
    """
    if candidate not in models:
        raise InputError(f"no figures of {candidate}: evaluate it first (found: {', '.join(models) or 'none'})")
    reference, probe = reference_of(models), _best(models, "opponent")
    facts = gather(models, comparisons, want, candidate, reference, probe)
    rule = next(rule for rule in RULES if rule.when(facts))
    names = {"tuned": candidate, "reference": reference, "probe": probe or ""}
    told = [rule.because, *(sentence for when, sentence in REASONS if when(facts))]
    return Verdict(
        decision=rule.decision,
        use="+".join(names[role] for role in rule.use.split()),
        reasons=tuple(sentence.format(**vars(facts)) for sentence in told),
        criteria=tuple(list_criteria(facts)),
        reference=reference,
    )


def reference_of(models: Mapping[str, Entry]) -> str:
    """What the tuned VLM is measured against: zero-shot CLIP, else the best linear probe. Raises InputError without either."""
    reference = _best(models, "baseline") or _best(models, "opponent")
    if reference is None:
        known = " or ".join(names_of("baseline", "opponent"))
        raise InputError(f"nothing to compare the VLM with: neither {known} was run")
    return reference


def gather(
    models: Mapping[str, Entry],
    comparisons: Sequence[Entry],
    want: ComparisonSettings,
    candidate: str,
    reference: str,
    probe: str | None,
) -> SimpleNamespace:
    """The facts by the names that the three tables use: figures, what is met, and pieces of sentences."""
    tuned, against = models[candidate], models[reference]
    versus = _find(comparisons, candidate, reference)
    over_probe = _find(comparisons, candidate, probe) if probe else None
    gain, probe_gain = accuracy_gain(versus), accuracy_gain(over_probe) if over_probe else None
    rare, own, device = versus["priority_f1_gain_points"], tuned["priority_macro_f1"], tuned.get("device")
    p50, their_p50 = tuned["latency_ms"]["p50"], against["latency_ms"]["p50"]
    own_met, gain_met = at_least(own, want.target_priority_f1), at_least(gain, want.target_gain_points)
    rare_met = True if rare is None else own_met  # without priority breeds nothing is asked about them
    rare_better = more_than(rare, 0) is True
    in_time = UNDECIDED if p50 is None else p50 <= want.latency_budget_ms
    overrides = " (accuracy outranks latency here)" if want.accuracy_first else ""
    mixed = versus.get("combination")
    return SimpleNamespace(
        want=want,
        reference=track(reference),
        zero_shot_run=track(reference).role == "baseline",
        probe=track(probe) if probe else None,
        versus=versus,
        gain=gain,
        gain_met=gain_met,
        worse=surely_worse(versus),
        better_elsewhere=more_than(versus["accuracy_gain_elsewhere_points"], 0) is True,
        own=own,
        own_met=own_met,
        rare=rare,
        rare_met=rare_met,
        rare_better=rare_better,
        # On the priority breeds the target may be open where the gain is sure.
        success=gain_met is True and (rare_met is True or (rare_met == UNDECIDED and rare_better)),
        theirs=against["priority_macro_f1"],
        low=at_least(against["priority_macro_f1"], want.clip_priority_f1),
        their_accuracy=against["priority_accuracy"],
        needless=more_than(against["priority_accuracy"], want.clip_good_enough),
        probe_gain=probe_gain,
        beats_probe=more_than(probe_gain, 0) is True,
        worse_than_probe=over_probe is not None and surely_worse(over_probe),
        most_over_probe=ends(over_probe)[1] if over_probe else float("inf"),
        rare_over_probe=over_probe is not None and more_than(over_probe["priority_f1_gain_points"], 0) is True,
        mixed=mixed,
        p50=p50,
        in_time=in_time,
        timed=tuned["latency_ms"].get("kind", "as measured"),
        device=device,
        device_text=device or "not known",
        moved=_moved(versus),
        moved_probe=_moved(over_probe) if over_probe else "",
        p="< 0.001" if versus["p"] < 0.001 else f"= {versus['p']:.3f}",
        test=test_name(versus),
        own_text=in_words(own),
        their_text=in_words(against["priority_macro_f1"]),
        rare_text=points(rare, " points"),
        beside="" if their_p50 is None else f", {track(reference).title} {their_p50:.0f} ms",
        budget=f"exceeded{overrides}" if in_time is False else "kept",
        mixed_text=points({"value": mixed["gain_points"], "ci95": mixed["ci95"]}, " points") if mixed else "",
        mixed_over=track(mixed["over"]).title if mixed else "",
        achieved=_achieved(gain, own, track(reference).title, want),
        still_open=_still_open(tuned, versus, gain_met == UNDECIDED, rare_met == UNDECIDED, want),
    )


def list_criteria(f: SimpleNamespace) -> list[dict[str, Any]]:
    """The entries of `criteria` in metrics.json, from the table and the facts."""
    wished = {True: "asked for", False: "not asked for"}
    want, time = f.want, None if f.p50 is None else {"value": f.p50, "ci95": None}
    measured: dict[str, tuple[Entry | None, Met, str]] = {
        "priority": (f.own, f.own_met, ""),
        "gain": (f.gain, f.gain_met, ""),
        "probe": (f.probe_gain, more_than(f.probe_gain, 0.0), "the fair opponent: it is trained, too"),
        "latency": (time, f.in_time, f.timed),
        "skip": (f.their_accuracy, f.needless, ""),
        "do": (f.theirs, f.low if f.low == UNDECIDED else not f.low, ""),
        "no-gpu": (None, UNDECIDED if f.device is None else f.device == "cpu", f"ran on: {f.device_text}"),
        "explanations": (None, want.explanations_wanted, wished[want.explanations_wanted]),
        "accuracy-first": (None, want.accuracy_first, wished[want.accuracy_first]),
    }
    rows = []
    for key, kind, unit, name, target in CRITERIA:
        if key == "probe" and f.probe in (None, f.reference):
            continue
        figure, met, note = measured[key]
        value, ci95 = (None, None) if figure is None else (figure["value"], figure["ci95"])
        about = {"key": key, "name": name.format(**vars(f)), "kind": kind, "target": target.format(**vars(f))}
        note = note or ("not measured" if figure is None else "")
        rows.append({**about, "value": value, "ci95": ci95, "unit": unit, "met": met, "note": note})
    return rows


def _achieved(gain: Entry, own: Entry | None, other: str, want: ComparisonSettings) -> str:
    """What is reached when the targets over the reference are."""
    gained = f"{points(gain, ' points')} over {other}"
    if own is None:
        return f"The target is met: {gained}"
    if ends(own)[0] >= want.target_priority_f1:
        return f"Every target is met: {gained}, and a macro-F1 of {in_words(own)} on the priority breeds"
    return (
        f"The gain is certain, {gained}, and so is one on the priority breeds; only whether their macro-F1 of {in_words(own)} "
        f"reaches {want.target_priority_f1:.0%} is not settled"
    )


def _still_open(tuned: Entry, versus: Entry, gain_open: bool, rare_open: bool, want: ComparisonSettings) -> str:
    """Which targets lie inside their intervals, and roughly how many test photos would decide the gain, were it as measured."""
    spans, (low, high), own = [], ends(versus), tuned["priority_macro_f1"]
    if few := [name for name, f in (("the gain", versus), ("the priority macro-F1", own)) if f and f["ci95"] is None]:
        groups = versus.get("groups", versus["n"])
        return (
            f"they are {groups} independent groups, too few in too many breeds for an interval of {' and '.join(few)}."
        )
    if gain_open:
        spans.append(f"the gain may be anything from {low:+.1f} to {high:+.1f} points")
    if rare_open and own is not None:
        photos = sum(row["support"] for row in tuned["per_breed"].values() if row["priority"])
        spans.append(
            f"the priority macro-F1 anything from {own['ci95'][0]:.0%} to {own['ci95'][1]:.0%} ({photos} photos)"
        )
    said = " and ".join(spans) or "the intervals span the targets"
    distance = abs(versus["accuracy_gain_points"] - want.target_gain_points)
    if not low < want.target_gain_points <= high or distance == 0:
        return f"{said}."
    needed = versus["n"] * ((high - low) / 2 / distance) ** 2
    if needed > 1e5:
        return f"{said}. The gain lies so near the target that no realistic number of photos would decide it."
    step = 10 if needed < 300 else 100 if needed < 5000 else 1000
    return f"{said}. Were the gain as measured, about {int(-(-needed // step) * step)} test photos would decide it."


def _best(models: Mapping[str, Entry], role: Role) -> str | None:
    run = [name for name in names_of(role) if name in models]
    return max(run, key=lambda name: models[name]["accuracy"]["value"], default=None)


def _moved(versus: Entry) -> str:
    gain = versus["accuracy_gain_points"]
    return f"{abs(gain):.1f} points {'higher' if gain >= 0 else 'lower'}{bounds(versus['ci95'], signed)}"


def _find(comparisons: Sequence[Entry], a: str, b: str) -> Entry:
    for comparison in comparisons:
        if (comparison["a"], comparison["b"]) == (a, b):
            return comparison
    raise InputError(f"no paired comparison of {a} with {b}: compare them on the same photos first")
