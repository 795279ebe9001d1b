"""Which track to run, and before a training whether to train: the plan's rules (assets/rules.yaml) over the facts of all tracks."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from catlib.classifiers.tracks import TUNED, UNTUNED, names_of, ordered, track
from catlib.errors import InputError
from catlib.evaluation.tables import Entry, cost, in_words, milliseconds, points, right_of_total, signed, test_name
from catlib.evaluation.tables import within as bounds
from catlib.files import parse_yaml, read_text
from catlib.settings import ComparisonSettings

RULES = Path(__file__).parents[1] / "assets" / "rules.yaml"
UNDECIDED = "undecided"
Met = bool | str  # True, False or UNDECIDED
PLAN_BUDGET_MS = 150.0  # the plan: skip the VLM where a photo may take less
DECISIONS = {
    "adopt": "Adopt the tuned VLM.",
    "keep-clip": "Do without the tuned VLM.",
    "combine": "Use both: neither model alone is the better choice.",
    "inconclusive": "Undecided: these photos cannot tell.",
    "train": "Train.",
    "skip": "Do not train.",
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


def ends(figure: Entry | None) -> tuple[float, float]:
    """The ends of the interval; without one, a figure may be anything."""
    return tuple((figure or {}).get("ci95") or (-math.inf, math.inf))


def surely_worse(versus: Entry) -> bool:
    """Less accurate by the paired interval and by the paired test, which at the edge may differ."""
    return ends(versus)[1] < 0 and versus["p"] < 0.05


def accuracy_gain(versus: Entry) -> Entry:
    """The accuracy gain of a comparison as a figure, in points."""
    return {"value": versus["accuracy_gain_points"], "ci95": versus["ci95"]}


@dataclass(frozen=True)
class Verdict:
    """`decision`: a key of DECISIONS. `use`: the tracks to run, joined by "+"; of a gate, the best one that is there.

    `reasons`: sentences, the deciding one first. `criteria`: entries of metrics.json. `reference`: what the targets are over.
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
        what = "Best without it" if self.decision in ("train", "skip") else "To run"
        run = f" {what}: {' and '.join(track(name).title for name in self.use.split('+'))}." if self.use else ""
        reasons = "\n".join(f"- {reason}" for reason in self.reasons)
        return f"**Recommendation: {self.decision}. {DECISIONS[self.decision]}**{run}\n\n{reasons}"


def judge(
    models: Mapping[str, Entry],
    comparisons: Sequence[Entry],
    want: ComparisonSettings,
    candidate: str | None = TUNED,
    *,
    record: Mapping[str, Any] | None = None,
    need: Mapping[str, Any] | None = None,
    remarks: Sequence[str] = (),
) -> Verdict:
    """The verdict on `candidate` from entries of metrics.json, `comparisons` being its gains over every other model.

    With `candidate` None nothing is trained yet, and the decision is train or skip; `need` then holds what a training takes:
    {"obstacle": text, "text", "device", "reasons": whether its answers give reasons}. `record`: the training's own (training.json).
    `remarks`: what a reader has to know about the photos. Raises InputError when figures or a comparison are missing, or when
    models were measured on different photos.
    """
    if candidate is not None and candidate not in models:
        raise InputError(f"no figures of {candidate}: evaluate it first (found: {', '.join(models) or 'none'})")
    if len(counts := {m["n"] for m in models.values()}) > 1:
        raise InputError(
            f"the models were measured on different photos ({', '.join(map(str, sorted(counts)))} of them)"
        )
    need, outcome = need or {}, (record or {}).get("outcome") or {}
    facts = _facts_of_others(models, want, candidate) | {"obstacle": "", **need, "need": need.get("text", "")}
    gives = bool({**(record or {}), **need}.get("reasons") or (candidate and models[candidate].get("reasons")))
    facts["wanted_reasons"], facts["reasons_not_given"] = (
        want.explanations_wanted and gives,
        want.explanations_wanted > gives,
    )
    facts["lifted"] = want.accuracy_first or facts["wanted_reasons"]
    if candidate is not None:
        facts |= _facts_of_candidate(models, comparisons, want, candidate, facts)
    for role in ("candidate", "reference", "rival", "beater", "rare_beater"):
        named = track(facts.get(role) or "zero-shot CLIP")
        facts |= {f"{role}_title": named.title, role.capitalize(): named.first}
    shown = _measured(facts, want, outcome, outcome.get("device") or facts.get("device"), gives)
    rows = _rows(shown, facts, bool(candidate))
    if facts.get("success"):
        facts["achieved"] = _achieved(facts, rows)
    rule = next(rule for rule in _tables()["decide"] if _holds(rule["when"], facts))
    said = [rule["because"].format(**facts), *facts.get("against", ())]
    said += [entry["text"].format(**facts) for entry in _tables()["tell"] if _holds(entry["when"], facts)]
    return Verdict(
        "skip" if candidate is None and rule["decision"] != "train" else rule["decision"],
        "+".join(filter(None, (facts[role] for role in rule["use"].split()))),
        tuple(text[:1].upper() + text[1:] for text in (*said, *remarks)),
        tuple(rows),
        facts["reference"],
    )


@cache
def _tables() -> dict[str, list[dict[str, str]]]:
    return parse_yaml(read_text(RULES), str(RULES))


def _holds(condition: str, facts: Mapping[str, Any]) -> bool:
    """Whether all the named facts hold; one that this answer does not have does not."""
    return all(bool(facts.get(n.removeprefix("not "))) != n.startswith("not ") for n in condition.split(", "))


def reference_of(models: Mapping[str, Entry]) -> str:
    """What the plan's targets are measured against: zero-shot CLIP, else the best track that learned from the same photos.

    Raises InputError without either.
    """
    rest = [n for n in models if track(n).role != "candidate"]
    found = _best(models, [n for n in rest if n in names_of("baseline")]) or _best(models, rest)
    if found is None:
        raise InputError(
            f"nothing to compare the VLM with: neither {' or '.join(names_of('baseline', 'opponent'))} was run"
        )
    return found


def _best(models: Mapping[str, Entry], names: Iterable[str], key: str = "accuracy") -> str | None:
    """The best of the tracks, on validation where all others have such figures, so that none is chosen by its test photos; of
    equals the faster one."""

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


def _facts_of_others(models: Mapping[str, Entry], want: ComparisonSettings, candidate: str | None) -> dict[str, Any]:
    """What is known without a candidate: the other tracks, which of them may be run, and the plan's rules about CLIP and time."""
    budget = want.latency_budget_ms
    kept = {n: in_time(models, n, budget) for n in ordered(models)}
    rest = [n for n in kept if n != candidate and not track(n).of]
    ways = [n for n in kept if track(n).of and track(n).of == candidate]
    others = [n for n in rest if want.accuracy_first or kept[n] is not False]
    learned = any(track(n).role != "candidate" for n in rest)
    apart = {n: models[n] for n in rest}
    reference = reference_of(apart) if candidate or learned else ""
    rival = _best(apart, others) or reference
    zero_shot = models.get(reference) if reference in names_of("baseline") else None
    slow = in_time(models, candidate, budget) is False
    why = f"the budget of {budget:g} ms is under the plan's {PLAN_BUDGET_MS:g} ms: it says to skip the VLM then."
    if candidate and models[candidate]["latency_ms"]["p50"] is not None:
        device = models[candidate].get("device") or "not known"
        why = f"{track(candidate).title} needs {milliseconds(models[candidate])} for a photo on this hardware ({device}), over the "
        why += f"budget of {budget:g} ms: it cannot be used within that."
    said = {True: "keeps it", False: "exceeds it", UNDECIDED: "may keep it or not"}
    return {
        "want": want,
        "candidate": candidate,
        "untrained": candidate is None,
        "rest": rest,
        "others": others,
        "several_others": len(others) > 1,
        "on_validation": candidate is None or _on_validation(apart),  # a gate's figures are those of validation photos
        "levels": "; ".join(
            f"{track(n).title} {in_words(m['accuracy'])}, {right_of_total(m)} priority photos right"
            for n, m in apart.items()
        ),
        "opponent": any(track(n).role == "opponent" for n in rest),
        "reference": reference,
        "rival": rival,
        "zero_shot": zero_shot,
        "needless": more_than(zero_shot and zero_shot["priority_accuracy"], want.clip_good_enough) is True,
        "too_slow": why if slow else "",
        "ways": "; ".join(
            f"{track(n).title} {in_words(models[n]['accuracy'])}, {milliseconds(models[n])}" for n in ways
        ),
        "budget": budget,
        "budget_kept": "; ".join(f"{track(n).title} {said[kept[n]]}" for n in kept),
        "outranked": "; accuracy or reasons outrank it here" if slow else "",
        "times": "; ".join(
            f"{track(n).title} {milliseconds(models[n])}, {cost(models[n], want.price_per_hour)}" for n in kept
        ),
    }


def _facts_of_candidate(
    models: Mapping[str, Entry],
    comparisons: Sequence[Entry],
    want: ComparisonSettings,
    candidate: str,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """What the candidate is worth against every other track."""
    reference, rival, others, tuned = facts["reference"], facts["rival"], facts["others"], models[candidate]
    over = {name: _find(comparisons, candidate, name) for name in facts["rest"]}
    rare_over = {name: c["priority_f1_gain_points"] for name, c in over.items()}
    better = {name for name, c in over.items() if more_than(accuracy_gain(c), 0) is True}
    rare_better = {name for name, gain in rare_over.items() if more_than(gain, 0) is True}
    apart = {n: models[n] for n in over}
    beater = _best(apart, [n for n in others if surely_worse(over[n])])
    rare_beater = _best(apart, [n for n in others if ends(rare_over[n])[1] < 0], "priority_macro_f1")
    versus, own = over[reference], tuned["priority_macro_f1"]
    gain, mixed = accuracy_gain(versus), over[rival].get("combination")
    gain_met = at_least(gain, want.target_gain_points)
    rare_met = True if own is None else more_than(own, want.target_priority_f1)  # nothing is asked about none
    times = [models[n]["latency_ms"].get("p50_ci95") for n in (candidate, rival)]
    return {
        "photos": versus["n"],
        "gain": gain,
        "gain_met": gain_met,
        "gain_reached": gain_met is True,
        "gain_missed": gain_met is False,
        "own": own,
        "rare": rare_over[reference],
        "rare_missed": rare_met is False,
        "own_time": {"value": tuned["latency_ms"]["p50"], "ci95": tuned["latency_ms"].get("p50_ci95")},
        "time_met": in_time(models, candidate, want.latency_budget_ms),
        # On the priority breeds the target may be open where the gain is sure.
        "success": gain_met is True and (rare_met is True or (rare_met == UNDECIDED and reference in rare_better)),
        "beats_all": all(n in better or (n in rare_better and ends(over[n])[1] > 0) for n in others),
        "best_on_rare": rare_better >= {*others, reference},
        "better_elsewhere": more_than(over[rival]["accuracy_gain_elsewhere_points"], 0) is True,
        "rival_as_good": ends(over[rival])[1] < want.target_gain_points,
        "faster": all(times) and times[0][1] < times[1][0],
        "beater": beater,
        "beater_test": test_name(over[beater]) if beater else "",
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
        "against": [against(models, over[n], n in others) for n in facts["rest"]],
    }


def _measured(
    f: Mapping[str, Any], want: ComparisonSettings, outcome: Mapping[str, Any], device: str | None, gives: bool
) -> dict[str, tuple[Entry | None, Met, str]]:
    """For each criterion its figure, whether it is met, and a note."""
    clip = f["zero_shot"] or {"priority_accuracy": None, "priority_macro_f1": None}
    halved, fell = outcome.get("out_of_memory") or 0, outcome.get("val_loss_fell")
    finished = bool(outcome.get("finished")) and not halved if outcome else UNDECIDED
    losses = " → ".join(f"{loss:.3f}" for loss in outcome.get("val_losses") or ())
    asked = {True: "asked for", False: "not asked for"}
    low = at_least(clip["priority_macro_f1"], want.clip_priority_f1, operator.lt)
    needless = more_than(clip["priority_accuracy"], want.clip_good_enough)
    tight = 0 < want.latency_budget_ms < PLAN_BUDGET_MS
    reasons = f"{asked[want.explanations_wanted]}, {'' if gives else 'not '}given"
    shown = {
        "finished": (None, finished, f"out of memory {halved} times" if outcome else "no record of the training"),
        "loss": (None, UNDECIDED if fell is None else bool(fell), losses or "no record of the training"),
        "skip": (clip["priority_accuracy"], needless, ""),
        "budget": (None, tight, f"{want.latency_budget_ms:g} ms" if want.latency_budget_ms else "no budget given"),
        "no-gpu": (None, UNDECIDED if device is None else device == "cpu", f"to train on: {device or 'not known'}"),
        "do": (clip["priority_macro_f1"], low, ""),
        "explanations": (None, want.explanations_wanted and gives, reasons),
        "accuracy-first": (None, want.accuracy_first, asked[want.accuracy_first]),
    }
    if f["candidate"]:
        shown |= {
            "priority": (f["own"], more_than(f["own"], want.target_priority_f1), ""),
            "gain": (f["gain"], f["gain_met"], ""),
            "priority-gain": (f["rare"], at_least(f["rare"], want.target_gain_points), ""),
            "latency": (f["own_time"], f["time_met"], ""),
        }
    return shown


def _rows(
    shown: Mapping[str, tuple[Entry | None, Met, str]], facts: Mapping[str, Any], trained: bool
) -> list[dict[str, Any]]:
    """The entries of `criteria` in metrics.json: those of success for a trained model, a latency where there is a budget."""
    rows = []
    for entry in _tables()["show"]:
        if (entry["kind"] == "success" and not trained) or (entry["key"] == "latency" and not facts["budget"]):
            continue
        figure, met, note = shown[entry["key"]]
        about = {"unit": "", **entry, "name": entry["name"].format(**facts), "target": entry["target"].format(**facts)}
        value, ci95 = (figure["value"], figure["ci95"]) if figure else (None, None)
        rows.append({**about, "value": value, "ci95": ci95, "met": met, "note": note})
    return rows


def against(models: Mapping[str, Entry], c: Entry, counts: bool = True) -> str:
    """What the candidate gains over one other track, overall and on the priority breeds, and whether that one may be run."""
    gain, rare = c["accuracy_gain_points"], c["priority_f1_gain_points"]
    p = "< 0.001" if c["p"] < 0.001 else f"= {c['p']:.3f}"
    said = f"Against {track(c['b']).title} its accuracy is {abs(gain):.1f} points {'higher' if gain >= 0 else 'lower'}"
    said += f"{bounds(c['ci95'], signed)} on {c['n']} photos ({test_name(c)}: p {p})"
    if rare is not None:
        own, their = (in_words(models[c[side]]["priority_macro_f1"]) for side in ("a", "b"))
        said += f", its priority macro-F1 {own} against {their} ({points(rare, ' points')})"
    if c["b"] == UNTUNED and (surely_worse(c) or (rare is not None and ends(rare)[1] < 0)):
        said += "; tuning has harmed"
    return said + ("." if counts else "; that one exceeds the budget and is not counted.")


def _achieved(f: Mapping[str, Any], rows: Sequence[Entry]) -> str:
    """What is reached when the targets over the reference are, and which criteria are open or missed all the same."""
    open_rows = [row for row in rows if row["kind"] == "success" and row["met"] is not True]
    open_rows = [row for row in open_rows if f["own"] is not None or not row["key"].startswith("priority")]
    gained = f"{points(f['gain'], ' points')} over {f['reference_title']}"
    if f["own"] is not None:
        gained += f", and a macro-F1 of {in_words(f['own'])} on the priority breeds"
    if not open_rows:
        return f"Every target is met: {gained}"
    left = "; ".join(f"{row['name']}: {UNDECIDED if row['met'] == UNDECIDED else 'not met'}" for row in open_rows)
    return f"The gain is certain: {gained} (not settled or not met: {left})"


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


def _find(comparisons: Sequence[Entry], a: str, b: str) -> Entry:
    for comparison in comparisons:
        if (comparison["a"], comparison["b"]) == (a, b):
            return comparison
    raise InputError(f"no paired comparison of {a} with {b}: compare them on the same photos first")
