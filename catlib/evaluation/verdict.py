"""Which track to run, and before a training whether to train: the plan's rules (assets/rules.yaml) over the facts of all tracks."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catlib.classifiers.tracks import TUNED, track
from catlib.errors import InputError
from catlib.evaluation.facts import PLAN_BUDGET_MS, UNDECIDED, Met, at_least, more_than, of_candidate, of_others
from catlib.evaluation.tables import Entry, in_words, points
from catlib.files import parse_yaml, read_text
from catlib.settings import ComparisonSettings

_FILE = Path(__file__).parents[1] / "assets" / "rules.yaml"
RULES: dict[str, Any] = parse_yaml(read_text(_FILE), str(_FILE))


@dataclass(frozen=True)
class Verdict:
    """`decision`: a key of the rules' `decisions`. `use`: the tracks to run, joined by "+"; of a gate, the best that is there.

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
        run = f" {to_run(self.as_json()['recommendation'])}".rstrip()
        reasons = "\n".join(f"- {reason}" for reason in self.reasons)
        return f"**Recommendation: {self.decision}. {RULES['decisions'][self.decision]}**{run}\n\n{reasons}"


def to_run(recommendation: Mapping[str, Any]) -> str:
    """The tracks that a recommendation (see `Verdict.as_json`) says to run, as a sentence; empty where it names none."""
    what = "Best without it" if recommendation.get("decision") in ("train", "skip") else "To run"
    use = recommendation.get("use")  # of a file that may be damaged
    return (
        f"{what}: {' and '.join(track(name).title for name in use.split('+'))}." if use and isinstance(use, str) else ""
    )


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
        photos = ", ".join(map(str, sorted(counts)))
        raise InputError(f"the models were measured on different photos ({photos} of them)")
    record, need, wanted = record or {}, need or {}, want.explanations_wanted
    trained = bool({**record, **need}.get("reasons") or (candidate and models[candidate].get("reasons")))
    facts = of_others(models, want, candidate) | {"obstacle": "", **need, "need": need.get("text", "")}
    facts |= {"gives": trained, "reasons": f"it is {'' if trained else 'not '}to be trained to give them"}
    if candidate is not None:
        facts |= of_candidate(models, comparisons, facts)
    facts |= {"wanted_reasons": wanted and facts["gives"], "reasons_not_given": wanted and not facts["gives"]}
    facts["lifted"] = want.accuracy_first or facts["wanted_reasons"]
    for role in ("candidate", "reference", "rival", "beater", "rare_beater", "deployed"):
        named = track(facts.get(role) or "zero-shot CLIP")
        facts |= {f"{role}_title": named.title, role.capitalize(): named.first}
    rows = _criteria(facts, record.get("outcome") or {}, facts["gives"])
    if facts.get("success"):
        facts["achieved"] = _achieved(facts, rows)
    rule = next(rule for rule in RULES["decide"] if _holds(rule["when"], facts))
    said = [rule["because"].format(**facts), *facts.get("against", ())]
    said += [entry["text"].format(**facts) for entry in RULES["tell"] if _holds(entry["when"], facts)]
    return Verdict(
        "skip" if candidate is None and rule["decision"] != "train" else rule["decision"],
        "+".join(filter(None, (facts[role] for role in rule["use"].split()))),
        tuple(text[:1].upper() + text[1:] for text in (*said, *remarks)),
        tuple(rows),
        facts["reference"],
    )


def _holds(condition: str, facts: Mapping[str, Any]) -> bool:
    """Whether all the named facts hold; one that this answer does not have does not."""
    return all(bool(facts.get(n.removeprefix("not "))) != n.startswith("not ") for n in condition.split(", "))


def _criteria(f: Mapping[str, Any], outcome: Mapping[str, Any], gives: bool) -> list[dict[str, Any]]:
    """The entries of `criteria` in metrics.json: those of success for a trained model, a latency where there is a budget."""
    want, budget = f["want"], f["budget"]
    clip = f["zero_shot"] or {"priority_accuracy": None, "priority_macro_f1": None}
    device, asked = outcome.get("device") or f.get("device"), {True: "asked for", False: "not asked for"}
    needless = more_than(clip["priority_accuracy"], want.clip_good_enough)
    low = at_least(clip["priority_macro_f1"], want.clip_priority_f1, operator.lt)
    reasons = f"{asked[want.explanations_wanted]}, {'' if gives else 'not '}given"
    # Of each: its figure, whether it is met, and a note.
    found: dict[str, tuple[Entry | None, Met, str]] = {
        "skip": (clip["priority_accuracy"], needless, ""),
        "budget": (None, 0 < budget < PLAN_BUDGET_MS, f"{budget:g} ms" if budget else "no budget given"),
        "no-gpu": (None, UNDECIDED if device is None else device == "cpu", f"to train on: {device or 'not known'}"),
        "do": (clip["priority_macro_f1"], low, ""),
        "explanations": (None, want.explanations_wanted and gives, reasons),
        "accuracy-first": (None, want.accuracy_first, asked[want.accuracy_first]),
    }
    if f["candidate"]:
        halved, fell = outcome.get("out_of_memory") or 0, outcome.get("val_loss_fell")
        finished = bool(outcome.get("finished")) and not halved if outcome else UNDECIDED
        losses = " → ".join(f"{loss:.3f}" for loss in outcome.get("val_losses") or ())
        found |= {
            "finished": (None, finished, f"out of memory {halved} times" if outcome else "no record of the training"),
            "loss": (None, UNDECIDED if fell is None else bool(fell), losses or "no record of the training"),
            "priority": (f["own"], more_than(f["own"], want.target_priority_f1), ""),
            "gain": (f["gain"], f["gain_met"], ""),
            "priority-gain": (f["rare"], at_least(f["rare"], want.target_gain_points), ""),
        }
        if budget:
            found["latency"] = (f["own_time"], f["time_met"], "")
    rows = []
    for entry in RULES["show"]:
        if entry["key"] in found:
            figure, met, note = found[entry["key"]]
            told = {key: entry[key].format(**f) for key in ("name", "target")}
            value, ci95 = (figure["value"], figure["ci95"]) if figure else (None, None)
            rows.append({"unit": "", **entry, **told, "value": value, "ci95": ci95, "met": met, "note": note})
    return rows


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
