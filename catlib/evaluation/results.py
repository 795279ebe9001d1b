"""Several models on the same photos: their predictions, and all figures that are computed from them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from catlib.classifiers.tracks import TUNED, UNTUNED, ordered, track
from catlib.data.records import PredictionSet, Sample, read_samples
from catlib.errors import InputError
from catlib.evaluation.calibration import Calibrated, calibrate, risk_coverage
from catlib.evaluation.compare import compare
from catlib.evaluation.metrics import evaluate_outcomes, expected_calibration_error, per_breed
from catlib.evaluation.metrics_file import write_metrics
from catlib.evaluation.outcomes import outcomes
from catlib.evaluation.reasons import reason_figures
from catlib.evaluation.tables import Entry, in_words, milliseconds
from catlib.evaluation.verdict import Verdict, against, judge, reference_of
from catlib.paths import resolve
from catlib.settings import ComparisonSettings

DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Results:
    """Predictions by model name, on the test photos and on the validation photos; every figure is computed when asked for.

    `bootstrap` and `seed`: resamples behind each 95 % interval, and their seed. `remarks`: what a reader of figures has to know.
    """

    test: Mapping[str, PredictionSet]
    val: Mapping[str, PredictionSet]
    priority: tuple[str, ...] = ()
    bootstrap: int = 2000
    seed: int = 0
    remarks: tuple[str, ...] = ()
    candidate: str = TUNED

    def only(self, names: Iterable[str]) -> "Results":
        """Those of the named models that are there, in the usual order, all on the photos that all of them have predicted.

        Raises InputError where no photo is common.
        """
        kept = ordered(set(names) & self.test.keys())
        test, dropped = in_common({n: self.test[n] for n in kept})
        val, _ = in_common({n: self.val[n] for n in kept if n in self.val})
        return replace(self, test=test, val=val, remarks=(*self.remarks, *dropped))

    @cached_property
    def calibrated(self) -> dict[str, Calibrated]:
        """Each model's test photos, as they are and with the temperature fitted on its validation photos."""
        return {
            name: calibrate(outcomes(self.val[name]) if name in self.val else None, outcomes(predictions))
            for name, predictions in self.test.items()
        }

    @cached_property
    def models(self) -> dict[str, dict[str, Any]]:
        """The entries of `models` in metrics.json; with validation predictions also `validation` and `calibration`."""
        found = {}
        for name, c in self.calibrated.items():
            found[name] = evaluate_outcomes(c.raw, self.priority, bootstrap=self.bootstrap, seed=self.seed)
            found[name]["remarks"] = list(self.test[name].remarks)
            if name in self.val:
                found[name]["validation"] = _on_validation(self.val[name], self.priority)
            found[name]["reason_figures"] = reason_figures(self.test[name])
            if c.scaled is not None:
                found[name]["calibration"] = _calibration(c)
        return found

    @cached_property
    def comparisons(self) -> list[dict[str, Any]]:
        """The paired comparisons of the tuned VLM with every other model."""
        return [self.compare(self.candidate, name) for name in self.test if name != self.candidate]

    def compare(self, a: str, b: str) -> dict[str, Any]:
        """The gain of model `a` over model `b`."""
        val = {"val_a": self.val.get(a), "val_b": self.val.get(b)}
        return compare(self.test[a], self.test[b], self.priority, **val, bootstrap=self.bootstrap, seed=self.seed)

    @property
    def versus(self) -> dict[str, Any]:
        """The comparison with the reference: zero-shot CLIP, or, where it was not run, the best linear probe."""
        reference = reference_of(self.models)
        return next(c for c in self.comparisons if c["b"] == reference)

    @property
    def record(self) -> dict[str, Any]:
        """What the training of the tuned VLM has left (training.json), found by its sidecar; {} where it is not there."""
        meta = self.test[self.candidate].meta if self.candidate in self.test else {}
        from catlib.vlm.adapters import read_training  # brings torch, which figures alone do not need

        folder = meta.get("adapter") or meta.get("base_model") or ""
        return read_training(Path(folder)) if isinstance(folder, str) and folder else {}

    def judge(self, want: ComparisonSettings) -> Verdict:
        """The verdict on the tuned VLM. Raises InputError where photos that it is judged on were trained or fitted on."""
        record = self.record
        for name, predictions in self.val.items():
            seen = {key for p in predictions.predictions for key in (p.id, p.group)}
            refuse_seen(self.test.get(name), seen, f"the validation predictions of {name}")
        trained = resolve(str((record.get("settings") or {}).get("train_data") or "data"))
        if trained.is_file():
            refuse_seen(
                self.test.get(self.candidate), keys_of(read_samples(trained)), f"{trained}, which it was trained on,"
            )
        if self.candidate not in self.test:
            raise InputError(f"no predictions of {self.candidate}; there are those of {', '.join(self.test) or 'none'}")
        return judge(self.models, self.comparisons, want, self.candidate, record=record, remarks=self.remarks)

    def save(self, run_dir: Path, verdict: Verdict | None = None) -> Path:
        """Merge the figures into the run's metrics.json."""
        return write_metrics(
            run_dir,
            models=self.models,
            comparisons=self.comparisons,
            priority_breeds=list(self.priority),
            verdict=verdict.as_json() if verdict else None,
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
        lines += [against(self.models, c) for c in self.comparisons if c["b"] == UNTUNED]
        lines.append(f"It fails most often on {told}.")
        if m["invalid_rate"]["value"] > 0:
            lines.append(f"It names no breed for {in_words(m['invalid_rate'])} of the photos, which counts as wrong.")
        if "calibration" in m:
            lines.append(_answered(m["calibration"]))
        if m["latency_ms"]["p50"] is not None:
            lines.append(f"A photo takes {milliseconds(m)} (median; {m['latency_ms']['kind']}).")
        return "\n- ".join([*lines, *self.remarks])


def in_common(sets: Mapping[str, PredictionSet]) -> tuple[dict[str, PredictionSet], list[str]]:
    """The sets reduced to the photos that all of them have, and what is to be said of it. Raises InputError where none is common."""
    ids = [{p.id for p in s.predictions} for s in sets.values()]
    common = set.intersection(*ids) if ids else set()
    if sets and not common:
        raise InputError(f"{', '.join(sets)} have no photo in common: were they run on the same test file?")
    said = [
        f"{track(name).first} has predictions of {len(own)} photos; only the {len(common)} that all models have are judged."
        for name, own in zip(sets, ids, strict=True)
        if len(own) > len(common)
    ]
    kept = {n: replace(s, predictions=tuple(p for p in s.predictions if p.id in common)) for n, s in sets.items()}
    return (kept if said else dict(sets)), said


def keys_of(samples: Sequence[Sample]) -> set[str | None]:
    """By what a photo is known again in predictions: its id, and its digest, which is its group where it has no other."""
    return {key for s in samples for key in (s.id, s.group, s.metadata.get("sha256"))}


def refuse_seen(test: PredictionSet | None, seen: set[str | None], where: str) -> None:
    """Raise InputError where test photos are among those `seen`: by their ids, or by digests that are their groups."""
    rows = test.predictions if test else ()
    both = [p.id for p in rows if p.id in seen or (p.group in seen and DIGEST.fullmatch(p.group or ""))]
    if both:
        raise InputError(
            f"{len(both)} of {len(rows)} test photos stand in {where} as well (the first: {both[0]!r}): figures on photos that "
            "were seen say nothing; predict the test part of a split that `catlib data` has made"
        )


def _on_validation(predictions: PredictionSet, priority: Sequence[str]) -> dict[str, Any]:
    """Plain figures on validation photos, by which tracks are chosen."""
    o = outcomes(predictions)
    table = per_breed(o, priority)
    rare = [row["f1"] for row in table.values() if row["priority"] and row["support"]]
    return {
        "n": len(o),
        "accuracy": float(o.correct.mean()),
        "priority_macro_f1": float(np.mean(rare)) if rare else None,
    }


def _calibration(c: Calibrated) -> dict[str, Any]:
    """What metrics.json says about calibration: the test's ECE at the fitted temperature, and what can be answered."""
    chosen, scaled = c.chosen, c.scaled
    assert chosen is not None and scaled is not None
    found = None if chosen.precision_ci95 is None else {"value": chosen.precision, "ci95": list(chosen.precision_ci95)}
    return {
        "temperature": c.temperature,
        "area_under_risk_coverage": risk_coverage(scaled).area,
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
