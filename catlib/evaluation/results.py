"""Several models on the same photos: their predictions, and all figures that are computed from them."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from catlib.breeds import BREEDS, features, find, key_of
from catlib.classifiers.tracks import TUNED, UNKNOWN, UNTUNED, ordered, track
from catlib.data.records import Prediction, PredictionSet, Sample, read_samples
from catlib.errors import InputError
from catlib.evaluation.calibration import Calibrated, calibrate, risk_coverage
from catlib.evaluation.compare import compare, pair, paired_gains
from catlib.evaluation.facts import against, reference_of
from catlib.evaluation.metrics import calibration_figures, evaluate, per_breed
from catlib.evaluation.metrics_file import write_metrics
from catlib.evaluation.outcomes import outcomes
from catlib.evaluation.tables import Entry, in_words, milliseconds
from catlib.evaluation.unknown import told_apart
from catlib.evaluation.verdict import Verdict, judge
from catlib.paths import resolve
from catlib.runs import read_training
from catlib.settings import ComparisonSettings

DIGEST = re.compile("[0-9a-f]{64}")
WORDS = 3  # what goes on for so many words after the first sentence is a reason
_PHRASES = {breed.name: {key_of(phrase) for phrase in features(breed)[1:]} for breed in BREEDS}
_ALL = set().union(*_PHRASES.values())


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
    further: Mapping[str, Mapping[str, PredictionSet]] = field(default_factory=dict)  # by name of the set

    def only(self, names: Iterable[str]) -> "Results":
        """Those of the named models that are there, in the usual order, all on the photos that all of them have predicted.

        Raises InputError where no photo is common.
        """
        kept = ordered(set(names) & self.test.keys())
        test, dropped = _in_common({n: self.test[n] for n in kept})
        val, _ = _in_common({n: self.val[n] for n in kept if n in self.val})
        return replace(self, test=test, val=val, remarks=(*self.remarks, *dropped))

    @cached_property
    def calibrated(self) -> dict[str, Calibrated]:
        """Each model's test photos, as they are and with the temperature fitted on its validation photos."""
        return {name: self._calibrate(name) for name in self.test}

    def _calibrate(self, name: str) -> Calibrated:
        return calibrate(outcomes(self.val[name]) if name in self.val else None, outcomes(self.test[name]))

    @cached_property
    def models(self) -> dict[str, dict[str, Any]]:
        """The entries of `models` in metrics.json; with validation predictions also `validation` and `calibration`."""
        found = {}
        for name in self.test:
            c = self._calibrate(name)  # not `calibrated`: of 126,000 photos one model at a time is in memory
            found[name] = evaluate(c.raw, self.priority, bootstrap=self.bootstrap, seed=self.seed)
            found[name]["remarks"] = list(self.test[name].remarks)
            if name in self.val:
                found[name]["validation"] = _on_validation(self.val[name], self.priority)
            found[name]["reason_figures"] = reason_figures(self.test[name])
            if c.scaled is not None:
                found[name]["calibration"] = _calibration(c, self.bootstrap, self.seed)
            found[name]["further"] = self._on_further(name)
        return found

    def _on_further(self, name: str) -> dict[str, Any]:
        """Of each further set of photos that the model has predicted: what tells them from test photos, or the fall in accuracy."""
        found: dict[str, Any] = {}
        for photos, sets in self.further.items():
            if name in sets and photos == UNKNOWN:
                found[photos] = told_apart(self.test[name], sets[name])
            elif name in sets:
                before, after = pair(self.test[name], sets[name])
                fall = paired_gains(after, before, (), bootstrap=self.bootstrap, seed=self.seed)["accuracy"]
                found[photos] = {"n": len(after), "accuracy": float(after.correct.mean()), "gain_points": fall}
        return found

    @cached_property
    def comparisons(self) -> list[dict[str, Any]]:
        """The paired comparisons of the tuned VLM with every other model."""
        how: dict[str, Any] = {"bootstrap": self.bootstrap, "seed": self.seed, "val_a": self.val.get(self.candidate)}
        rivals = {name: predictions for name, predictions in self.test.items() if name != self.candidate}
        return [
            compare(self.test[self.candidate], b, self.priority, val_b=self.val.get(name), **how)
            for name, b in rivals.items()
        ]

    @property
    def versus(self) -> dict[str, Any]:
        """The comparison with the reference: zero-shot CLIP, or, where it was not run, the best linear probe."""
        reference = reference_of(self.models)
        return next(c for c in self.comparisons if c["b"] == reference)

    @property
    def record(self) -> dict[str, Any]:
        """What the training of the tuned VLM has left (training.json), found by its sidecar; {} where it is not there."""
        meta = self.test[self.candidate].meta if self.candidate in self.test else {}
        folder = meta.get("adapter") or meta.get("base_model") or ""
        return read_training(Path(folder)) if isinstance(folder, str) and folder else {}

    def judge(self, want: ComparisonSettings, train: Path | None = None) -> Verdict:
        """The verdict on the tuned VLM. Raises InputError where photos that it is judged on were trained or fitted on.

        `train`: samples that models were trained on, beside those that the candidate's training names.
        """
        record = self.record
        seen = [(n, keys_of(s.predictions), f"the validation predictions of {n}") for n, s in self.val.items()]
        own = resolve(str((record.get("settings") or {}).get("train_data") or "data"))
        if own.is_file():
            seen.append((self.candidate, keys_of(read_samples(own)), f"{own}, which it was trained on,"))
        if train:
            trained_on = keys_of(read_samples(train))
            seen += [(name, trained_on, str(train)) for name in self.test]
        for name, keys, where in seen:
            rows = self.test[name].predictions if name in self.test else ()
            refuse_seen({p.id: p.group if DIGEST.fullmatch(p.group or "") else None for p in rows}, keys, where)
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


def _in_common(sets: Mapping[str, PredictionSet]) -> tuple[dict[str, PredictionSet], list[str]]:
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


def keys_of(rows: Iterable[Sample | Prediction]) -> set[str | None]:
    """By what a photo is known again: its id, and its digest, which is its group where it has no other."""
    return {key for r in rows for key in (r.id, r.group, r.metadata.get("sha256") if isinstance(r, Sample) else None)}


def refuse_seen(test: Mapping[str, str | None], seen: set[str | None], where: str) -> None:
    """Raise InputError where test photos (their digests, None where not known, by id) are among those `seen`."""
    if both := [name for name, digest in test.items() if ({name, digest} - {None}) & seen]:
        raise InputError(
            f"{len(both)} of {len(test)} test photos stand in {where} as well (the first: {both[0]!r}): figures on photos that "
            "were trained on say nothing; predict the test part of a split that `catlib data` has made"
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


def _calibration(c: Calibrated, bootstrap: int, seed: int) -> dict[str, Any]:
    """What metrics.json says about calibration: the test's ECE at the fitted temperature, and what can be answered."""
    chosen, scaled = c.chosen, c.scaled
    assert chosen is not None and scaled is not None
    return {
        "temperature": c.temperature,
        "area_under_risk_coverage": risk_coverage(scaled).area,
        **calibration_figures(scaled, bootstrap, seed),
        "answered_at_precision": chosen.target,
        "answered": chosen.coverage,
        "precision": chosen.precision,
    }


def _answered(calibration: Entry) -> str:
    said = "no photo is answered"
    if calibration["precision"]:
        right = in_words(calibration["precision"])
        said = f"{in_words(calibration['answered'])} of the photos are answered, {right} of them rightly"
    target = f"{calibration['answered_at_precision']:.0%}"
    return f"With a threshold chosen on validation photos for {target} precision, {said}."


def reason_figures(predictions: PredictionSet) -> dict[str, Any] | None:
    """What the reasons in a model's answers are worth; None where it gives none.

    `given`: share of the photos with a reason. Of these, `complete`: that end with a full stop, not cut off; `traits`: mean number of
    traits of the table that are named. Of the traits named, `of_breed_named` and `of_true_breed`: the share that the table gives
    the breed that was named, and the true one. `breeds_with_several`: of the breeds named for two photos or more, the share with
    more than one reason: 0 says that the model recites one text a breed, whatever the photo shows.
    """
    given = [(p, reason) for p in predictions.predictions if (reason := _reason(p.answer or ""))]
    if not given:
        return None
    count = named = true = 0
    texts: dict[str, list[str]] = defaultdict(list)
    for p, reason in given:
        text = key_of(reason)
        said = {phrase for phrase in _ALL if phrase in text}
        said = {phrase for phrase in said if not any(phrase != other and phrase in other for other in said)}
        count += len(said)
        named += len(said & _of(p.predicted))
        true += len(said & _of(p.breed))
        if p.predicted:
            texts[p.predicted].append(text)
    several = [len(set(own)) > 1 for own in texts.values() if len(own) > 1]
    return {
        "given": len(given) / len(predictions.predictions),
        "complete": sum(reason.endswith(".") for _, reason in given) / len(given),
        "traits": count / len(given),
        "of_breed_named": named / count if count else None,
        "of_true_breed": true / count if count else None,
        "breeds_with_several": sum(several) / len(several) if several else None,
    }


def _reason(answer: str) -> str:
    reason = answer.partition(".")[2].strip()
    return reason if len(reason.split()) >= WORDS else ""


def _of(breed: str | None) -> set[str]:
    found = find(breed) if breed else None
    return _PHRASES[found.name] if found else set()
