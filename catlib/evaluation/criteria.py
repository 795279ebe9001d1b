"""The plan's success criteria and its skip and do-it rules as data, filled with the figures of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from catlib.evaluation.tables import signed
from catlib.settings import ComparisonSettings

UNDECIDED = "undecided"
Met = bool | str  # True, False or UNDECIDED
Figure = Mapping[str, Any]  # {"value", "ci95"}


@dataclass(frozen=True)
class Targets:
    """What counts as success, from the parameters of a run."""

    priority_f1: float = 0.5  # at least, 0..1
    gain_points: float = 3.0  # accuracy over the reference, at least, points
    clip_good_enough: float = 0.8  # the reference's accuracy on the priority breeds that makes a VLM needless, 0..1
    clip_priority_f1: float = 0.6  # the reference's priority F1 below which the plan says to do it, 0..1
    latency_ms: float = 150.0  # median for one photo, at most
    explanations_wanted: bool = False
    accuracy_first: bool = False  # accuracy outranks latency

    @classmethod
    def of(cls, settings: ComparisonSettings) -> "Targets":
        """The targets among a run's parameters."""
        return cls(
            settings.target_priority_f1,
            settings.target_gain_points,
            settings.clip_good_enough,
            settings.clip_priority_f1,
            settings.latency_budget_ms,
            settings.explanations_wanted,
            settings.accuracy_first,
        )


@dataclass(frozen=True)
class Criterion:
    """One line of the criteria table. `kind`: success (wanted), skip or do (the plan's rules); `met` says whether it
    holds."""

    key: str  # priority | gain | probe | latency | skip | no-gpu | do | explanations | accuracy-first
    name: str
    kind: str
    target: str
    value: float | None
    ci95: tuple[float, float] | None
    unit: str  # share | points | ms; "" for a rule that rests on no figure
    met: Met
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """The entry of `criteria` in metrics.json."""
        return {**asdict(self), "ci95": None if self.ci95 is None else list(self.ci95)}


def at_least(figure: Figure | None, target: float) -> Met:
    """True or False when the whole 95 % interval is on one side of the target, else undecided; so is a missing
    figure."""
    if figure is None or figure.get("value") is None:
        return UNDECIDED
    low, high = figure["ci95"]
    return True if low >= target else False if high < target else UNDECIDED


def more_than(figure: Figure | None, target: float) -> Met:
    """As `at_least`, the target itself excluded."""
    if figure is None or figure.get("value") is None:
        return UNDECIDED
    low, high = figure["ci95"]
    return True if low > target else False if high <= target else UNDECIDED


def list_criteria(
    tuned: Mapping[str, Any],
    reference: Mapping[str, Any],
    reference_title: str,
    gain: Figure,
    probe_gain: Figure | None,
    probe_title: str | None,
    targets: Targets,
) -> list[Criterion]:
    """The criteria table: `tuned` and `reference` are entries of `models`, the gains are in points, the tuned VLM's
    over the other."""
    p50 = tuned["latency_ms"]["p50"]
    latency_met: Met = UNDECIDED if p50 is None else p50 <= targets.latency_ms
    below = at_least(reference["priority_macro_f1"], targets.clip_priority_f1)
    rows = [
        _criterion(
            "priority",
            "Priority macro-F1 of the tuned VLM",
            "success",
            f"at least {targets.priority_f1:.0%}",
            tuned["priority_macro_f1"],
            "share",
            at_least(tuned["priority_macro_f1"], targets.priority_f1),
        ),
        _criterion(
            "gain",
            f"Accuracy gain over {reference_title}",
            "success",
            f"at least {targets.gain_points:g} points",
            gain,
            "points",
            at_least(gain, targets.gain_points),
        ),
        Criterion(
            "latency",
            "Median time of the tuned VLM for one photo",
            "success",
            f"at most {targets.latency_ms:g} ms",
            p50,
            None,
            "ms",
            latency_met,
            tuned["latency_ms"].get("kind", ""),
        ),
        _criterion(
            "skip",
            f"Skip it: {reference_title} is good enough on the priority breeds",
            "skip",
            f"accuracy there over {targets.clip_good_enough:.0%}",
            reference["priority_accuracy"],
            "share",
            more_than(reference["priority_accuracy"], targets.clip_good_enough),
        ),
        _criterion(
            "do",
            f"Do it: priority macro-F1 of {reference_title} stays low",
            "do",
            f"below {targets.clip_priority_f1:.0%}",
            reference["priority_macro_f1"],
            "share",
            below if below == UNDECIDED else not below,
        ),
        *_plain_rules(tuned.get("device"), targets),
    ]
    if probe_title is not None and probe_title != reference_title:
        rows.insert(
            2,
            _criterion(
                "probe",
                f"Accuracy gain over {probe_title}",
                "success",
                "more than 0 points",
                probe_gain,
                "points",
                more_than(probe_gain, 0.0),
                "without it, a gain over zero-shot CLIP only says that trained beats untrained",
            ),
        )
    return rows


def _plain_rules(device: str | None, targets: Targets) -> list[Criterion]:
    """The plan's rules that rest on no figure: the hardware, and what is wanted."""

    def rule(key: str, name: str, kind: str, target: str, met: Met, note: str) -> Criterion:
        return Criterion(key, name, kind, target, None, None, "", met, note)

    wanted = {True: "asked for", False: "not asked for"}
    return [
        rule(
            "no-gpu",
            "Skip it: there is no GPU",
            "skip",
            "no GPU",
            UNDECIDED if device is None else device == "cpu",
            f"ran on: {device or 'not known'}",
        ),
        rule(
            "explanations",
            "Do it: reasons are wanted with the breed",
            "do",
            "asked for",
            targets.explanations_wanted,
            wanted[targets.explanations_wanted],
        ),
        rule(
            "accuracy-first",
            "Do it: accuracy outranks latency",
            "do",
            "asked for",
            targets.accuracy_first,
            wanted[targets.accuracy_first],
        ),
    ]


def _criterion(
    key: str, name: str, kind: str, target: str, figure: Figure | None, unit: str, met: Met, note: str = ""
) -> Criterion:
    if figure is None:
        return Criterion(key, name, kind, target, None, None, unit, met, note or "not measured")
    return Criterion(key, name, kind, target, float(figure["value"]), tuple(figure["ci95"]), unit, met, note)


def format_value(row: Criterion | Mapping[str, Any]) -> str:
    """A criterion's value with its interval, in its unit: "54.2 % [38.0, 70.1]"."""
    row = row if isinstance(row, Mapping) else row.as_json()
    if row["value"] is None:
        return row["note"] if row["unit"] == "" else "not measured"
    scale, unit = {"share": (100, " %"), "points": (1, " points"), "ms": (1, " ms")}[row["unit"]]
    write = signed if row["unit"] == "points" else "{:.1f}".format
    text = f"{write(row['value'] * scale)}{unit}"
    return text if row["ci95"] is None else f"{text} [{write(row['ci95'][0] * scale)}, {write(row['ci95'][1] * scale)}]"


def met_in_words(met: Met) -> str:
    """`met`, `not met` or `undecided`."""
    return met if isinstance(met, str) else "met" if met else "not met"


def criteria_rows(criteria: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The criteria as rows of text for a table."""
    return [
        {
            "criterion": c["name"],
            "target": c["target"],
            "measured": format_value(c),
            "result": met_in_words(c["met"]) if c["kind"] == "success" else _rule(c["met"]),
        }
        for c in criteria
    ]


def _rule(met: Met) -> str:
    return met if isinstance(met, str) else "applies" if met else "does not apply"
