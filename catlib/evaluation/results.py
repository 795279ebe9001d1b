"""Several models on the same photos: their predictions, and all figures that are computed from them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from catlib.classifiers.tracks import TUNED, UNTUNED, ordered, track
from catlib.data.records import PredictionSet
from catlib.evaluation.calibration import Calibrated, calibrate
from catlib.evaluation.compare import compare
from catlib.evaluation.metrics import evaluate_outcomes, expected_calibration_error
from catlib.evaluation.metrics_file import write_metrics
from catlib.evaluation.outcomes import outcomes
from catlib.evaluation.tables import Entry, in_words, points
from catlib.evaluation.verdict import Verdict, accuracy_gain, judge, more_than, reference_of, surely_worse
from catlib.settings import ComparisonSettings


@dataclass(frozen=True)
class Results:
    """Predictions by model name, on the test photos and on the validation photos; every figure is computed when asked for.

    `bootstrap` and `seed`: resamples behind each 95 % interval, and their seed.
    """

    test: Mapping[str, PredictionSet]
    val: Mapping[str, PredictionSet]
    priority: tuple[str, ...] = ()
    bootstrap: int = 2000
    seed: int = 0

    def only(self, names: Iterable[str]) -> "Results":
        """Those of the named models that are there, in the usual order."""
        kept = ordered(set(names) & self.test.keys())
        return replace(self, test={n: self.test[n] for n in kept}, val={n: self.val[n] for n in kept if n in self.val})

    @cached_property
    def calibrated(self) -> dict[str, Calibrated]:
        """Each model's test photos, as they are and with the temperature fitted on its validation photos."""
        return {
            name: calibrate(outcomes(self.val[name]) if name in self.val else None, outcomes(predictions))
            for name, predictions in self.test.items()
        }

    @cached_property
    def models(self) -> dict[str, dict[str, Any]]:
        """The entries of `models` in metrics.json; with validation predictions also `calibration`."""
        found = {}
        for name, c in self.calibrated.items():
            found[name] = evaluate_outcomes(c.raw, self.priority, bootstrap=self.bootstrap, seed=self.seed)
            found[name]["remarks"] = list(self.test[name].remarks)
            if c.scaled is not None:
                found[name]["calibration"] = _calibration(c)
        return found

    @cached_property
    def comparisons(self) -> list[dict[str, Any]]:
        """The paired comparisons of the tuned VLM with every other model."""
        return [self.compare(TUNED, name) for name in self.test if name != TUNED]

    def compare(self, a: str, b: str) -> dict[str, Any]:
        """The gain of model `a` over model `b`."""
        val = {"val_a": self.val.get(a), "val_b": self.val.get(b)}
        return compare(self.test[a], self.test[b], self.priority, **val, bootstrap=self.bootstrap, seed=self.seed)

    @property
    def versus(self) -> dict[str, Any]:
        """The comparison with the reference: zero-shot CLIP, or, where it was not run, the best linear probe."""
        reference = reference_of(self.models)
        return next(c for c in self.comparisons if c["b"] == reference)

    def judge(self, want: ComparisonSettings) -> Verdict:
        """The verdict on the tuned VLM."""
        return judge(self.models, self.comparisons, want)

    def save(self, run_dir: Path, verdict: Verdict | None = None) -> Path:
        """Merge the figures into the run's metrics.json."""
        judged = verdict.as_json() if verdict else None
        return write_metrics(
            run_dir,
            models=self.models,
            comparisons=self.comparisons,
            verdict=judged,
            priority_breeds=list(self.priority),
        )

    def conclusion(self) -> str:
        """How good the tuned VLM is, in Markdown: priority breeds, gain of tuning, failures, and how far to trust it."""
        m, title = self.models[TUNED], track(TUNED).first
        rare, seen = m["priority_macro_f1"], {b: row for b, row in m["per_breed"].items() if row["support"]}
        worst = sorted(seen, key=lambda b: (seen[b]["f1"], b))[:3]
        told = ", ".join(f"{breed} (F1 {seen[breed]['f1']:.0%} on {seen[breed]['support']} photos)" for breed in worst)
        lines = [
            f"**{title} names {in_words(m['accuracy'])} of {m['n']} test photos rightly; its macro-F1 over {m['breeds']} "
            f"breeds is {in_words(m['macro_f1'])}.**"
        ]
        if rare is not None:
            lines.append(f"On the {len(self.priority)} priority breeds its macro-F1 is {in_words(rare)}.")
        lines += [_tuning(self.models[UNTUNED], c) for c in self.comparisons if c["b"] == UNTUNED]
        lines.append(f"It fails most often on {told}.")
        if m["invalid_rate"]["value"] > 0:
            lines.append(f"It names no breed for {in_words(m['invalid_rate'])} of the photos, which counts as wrong.")
        if "calibration" in m:
            lines.append(_answered(m["calibration"]))
        if (ms := m["latency_ms"])["p50"] is not None:
            lines.append(f"A photo takes {ms['p50']:.0f} ms (median; p95 {ms['p95']:.0f} ms; {ms['kind']}).")
        return "\n- ".join(lines)


def _calibration(c: Calibrated) -> dict[str, Any]:
    """What metrics.json says about calibration: the test's ECE at the fitted temperature, and what can be answered."""
    chosen, scaled = c.chosen, c.scaled
    assert chosen is not None and scaled is not None
    found = None if chosen.precision_ci95 is None else {"value": chosen.precision, "ci95": list(chosen.precision_ci95)}
    return {
        "temperature": c.temperature,
        "ece": expected_calibration_error(scaled.confidence, scaled.correct),
        "answered_at_precision": chosen.target,
        "answered": {"value": chosen.coverage, "ci95": list(chosen.coverage_ci95)},
        "precision": found,
    }


def _answered(calibration: Entry) -> str:
    said = "no photo is answered"
    if calibration["precision"]:
        right = in_words(calibration["precision"])
        said = f"{in_words(calibration['answered'])} of the photos are answered, {right} of them rightly"
    target = f"{calibration['answered_at_precision']:.0%}"
    return f"With a threshold chosen on validation photos for {target} precision, {said}."


def _tuning(base: Entry, c: Entry) -> str:
    """What tuning has changed, judged on the same photos."""
    overall, rare = accuracy_gain(c), c["priority_f1_gain_points"]
    sure = any(more_than(figure, 0) is True for figure in (overall, rare))
    verdict = "it lost accuracy" if surely_worse(c) else "the gain is certain" if sure else "no gain is certain"
    before = f"Before tuning it had {in_words(base['accuracy'])} right"
    beside = "" if rare is None else f", and the priority macro-F1 by {points(rare)}"
    if rare is not None:
        before += f" and {in_words(base['priority_macro_f1'])} macro-F1 on the priority breeds"
    return f"{before}; on the same photos tuning changed the accuracy by {points(overall)} points{beside}: {verdict}."
