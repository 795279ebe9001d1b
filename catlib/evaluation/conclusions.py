"""The last cells of the notebooks: conclusions in Markdown, every figure computed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from catlib.evaluation.criteria import criteria_rows, more_than
from catlib.evaluation.names import TUNED, UNTUNED, ZERO_SHOT, title
from catlib.evaluation.tables import markdown_table, points
from catlib.evaluation.verdict import RECOMMENDATIONS, Verdict, surely_worse

if TYPE_CHECKING:
    from catlib.classifiers.explain import Explanation

LITTLE = 0.05  # nats; a fall below it changes a probability by less than 5 %


def evaluation_conclusion(
    models: Mapping[str, Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]] = (),
    name: str = TUNED,
    base: str = UNTUNED,
) -> str:
    """How good the model is, on the priority breeds apart, against the untuned one, where it fails, and how far to
    trust it. The paired gain of tuning is told when `comparisons` has it."""
    m = models[name]
    lines = [
        f"**{title(name, first=True)} names {_share(m['accuracy'])} of {m['n']} test photos rightly; its macro-F1 over "
        f"{m['breeds']} "
        f"breeds is {_share(m['macro_f1'])}.**"
    ]
    if m["priority_macro_f1"] is not None:
        lines.append(
            f"On the {len(m['priority_breeds'])} priority breeds its macro-F1 is {_share(m['priority_macro_f1'])}."
        )
    if base in models:
        b = models[base]
        rare = (
            ""
            if b["priority_macro_f1"] is None
            else f" and {_share(b['priority_macro_f1'])} macro-F1 on the priority breeds"
        )
        lines.append(f"Before tuning it had {_share(b['accuracy'])} right{rare}.")
    lines += [_tuning(c) for c in comparisons if (c["a"], c["b"]) == (name, base)]
    seen = {b: row for b, row in m["per_breed"].items() if row["support"]}
    worst = sorted(seen, key=lambda b: (seen[b]["f1"], b))[:3]
    told = [f"{breed} (F1 {seen[breed]['f1']:.0%} on {seen[breed]['support']} photos)" for breed in worst]
    lines.append(f"It fails most often on {', '.join(told)}.")
    if m["invalid_rate"]["value"] > 0:
        lines.append(f"It names no breed for {_share(m['invalid_rate'])} of the photos, which counts as wrong.")
    if calibration := m.get("calibration"):
        target = f"{calibration['answered_at_precision']:.0%}"
        answered = "no photo is answered"
        if calibration["precision"]:
            right = _share(calibration["precision"])
            answered = f"{_share(calibration['answered'])} of the photos are answered, {right} of them rightly"
        lines.append(f"With a threshold chosen on validation photos for {target} precision, {answered}.")
    if (p50 := m["latency_ms"]["p50"]) is not None:
        lines.append(
            f"A photo takes {p50:.0f} ms (median; p95 {m['latency_ms']['p95']:.0f} ms; {m['latency_ms']['kind']})."
        )
    return "\n- ".join(["", *lines]).strip()


def _tuning(c: Mapping[str, Any]) -> str:
    """What tuning has changed, judged on the same photos."""
    overall = {"value": c["accuracy_gain_points"], "ci95": c["ci95"]}
    rare = c["priority_f1_gain_points"]
    sure = any(more_than(figure, 0) is True for figure in (overall, rare))
    lost = surely_worse(c)
    verdict = "it lost accuracy" if lost else "the gain is certain" if sure else "no gain is certain"
    beside = "" if rare is None else f", and the priority macro-F1 by {points(rare)}"
    return f"On the same photos tuning changed the accuracy by {points(overall)} points{beside}: {verdict}."


def comparison_conclusion(verdict: Verdict) -> str:
    """The recommendation, its reasons, and the criteria table."""
    reasons = "\n".join(f"- {reason}" for reason in verdict.reasons)
    table = markdown_table(criteria_rows([c.as_json() for c in verdict.criteria]))
    headline = RECOMMENDATIONS[verdict.recommendation]
    return f"**Recommendation: {verdict.recommendation}. {headline}**\n\n{reasons}\n\n{table}"


def explanations_sentence(rows: Sequence["Explanation"]) -> str:
    """What the explanations show: how concentrated the evidence is, for right and for wrong answers, and whether the
    maps mark what the model uses."""
    parts = []
    for right, what in ((True, "right"), (False, "wrong")):
        shares = [_top_tenth(row.heat) for row in rows if (row.predicted == row.breed) is right]
        if shares:
            parts.append(f"{np.mean(shares):.0%} for the {len(shares)} {what} answer{'s' if len(shares) > 1 else ''}")
    if not parts:
        return "No photo was explained."
    fall, other = (float(np.mean([getattr(row, key) for row in rows])) for key in ("fall", "random_fall"))
    passed = sum(row.fall > row.random_fall for row in rows)
    judged = (
        "the maps mark what the model uses" if passed > len(rows) / 2 and fall > other else "the maps cannot be trusted"
    )
    if fall > other and fall < LITTLE:
        judged += ", though no tenth of a photo decides much where the model is this sure"
    return (
        f"Of all evidence for the breed, the strongest tenth of the patches holds {' and '.join(parts)}. Put to the test by "
        f"hiding that tenth, the breed's lead over the next falls by {fall:.2f} nats on average, and by {round(other, 2) + 0.0:.2f} when "
        f"as many random patches are hidden; it falls further in {passed} of {len(rows)} photos: {judged}."
    )


def _top_tenth(heat: np.ndarray) -> float:
    """Share of the positive evidence in the strongest tenth of the patches; 0.1 when it is spread evenly."""
    positive = np.sort(np.maximum(heat, 0).ravel())[::-1]
    return float(positive[: max(1, len(positive) // 10)].sum() / max(positive.sum(), 1e-12))


def opponent_note(reference: str) -> str:
    """What the tuned VLM is measured against, and plainly when that is not zero-shot CLIP."""
    if reference == ZERO_SHOT:
        return f"The tuned VLM is measured against **{title(reference)}**, with the linear probes beside it."
    return (
        f"**Zero-shot CLIP was not run** (`clip_model` is empty). The tuned VLM is measured against "
        f"**{title(reference)}** instead: a "
        "harder opponent, which has learned from the same photos."
    )


def confusion_changes_sentence(comparison: Mapping[str, Any]) -> str:
    """The confusion that shrinks most and the one that grows most."""
    parts = []
    for which, verb in (("vanish", "shrinks"), ("appear", "grows")):
        rows: Sequence[Mapping[str, Any]] = comparison["confusions"][which]
        if rows:
            top = rows[0]
            parts.append(
                f"the confusion that {verb} most is {top['breed']} called {top['said']} ({top['b']} to {top['a']} "
                "photos)"
            )
    if not parts:
        return "The two models make the same mistakes."
    text = "; ".join(parts)
    return f"From {title(comparison['b'])} to {title(comparison['a'])}, {text}."


def _share(figure: Mapping[str, Any]) -> str:
    return f"{figure['value']:.1%} [{figure['ci95'][0]:.1%}, {figure['ci95'][1]:.1%}]"
