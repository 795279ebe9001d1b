"""From prediction files to metrics of several models at once: what `catlib evaluate` and the notebooks share."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catlib.breeds import PRIORITY_BREEDS
from catlib.data.records import PredictionSet, read_predictions
from catlib.errors import InputError
from catlib.evaluation.calibration import Calibrated, calibrate
from catlib.evaluation.compare import compare
from catlib.evaluation.metrics import evaluate_outcomes, expected_calibration_error
from catlib.evaluation.names import TUNED
from catlib.evaluation.outcomes import outcomes
from catlib.paths import resolve
from catlib.settings import split_list

log = logging.getLogger(__name__)


def read_all(paths: Sequence[str | Path]) -> dict[str, PredictionSet]:
    """Prediction files by model name (the file's). Raises InputError when two files have the same name."""
    sets: dict[str, PredictionSet] = {}
    for path in paths:
        predictions = read_predictions(given_file(path))
        if predictions.name in sets:
            raise InputError(
                f"{path}: a second file of the model {predictions.name!r}; a model is named after its file"
            )
        sets[predictions.name] = predictions
    return sets


def given_file(path: str | Path) -> Path:
    """A file named on the command line: from the working directory, else, as everywhere in catlib, from the project's
    root."""
    here = Path(path).expanduser()
    return here if here.is_file() or not resolve(path).is_file() else resolve(path)


def read_folder(folder: Path) -> dict[str, PredictionSet]:
    """All predictions that lie in a folder (`run_dir`/predictions, or its `val`)."""
    return read_all(sorted(folder.glob("*.jsonl"))) if folder.is_dir() else {}


def choose_priority(named: str | None, sets: Sequence[PredictionSet]) -> tuple[str, ...]:
    """The priority breeds: those `named` (comma separated), else those of the plan's seven that the models know.

    A named breed without a photo is refused when the metrics are computed.
    """
    if named is not None and named.strip():
        return tuple(split_list(named))
    known = {breed for predictions in sets for breed in predictions.breeds}
    found = tuple(breed for breed in PRIORITY_BREEDS if breed in known)
    if len(found) < len(PRIORITY_BREEDS):
        log.warning(
            "of the plan's %d priority breeds these models know %d; name others with --priority",
            len(PRIORITY_BREEDS),
            len(found),
        )
    return found


def check_bootstrap(resamples: int) -> None:
    """Raises InputError when there are too few resamples for the ends of a 95 % interval."""
    if resamples < 100:
        raise InputError(
            f"--bootstrap {resamples}: a 95 % interval needs at least 100 resamples, 2000 for a stable one"
        )


def evaluate_all(
    sets: Mapping[str, PredictionSet],
    validation: Mapping[str, PredictionSet],
    priority: Sequence[str],
    *,
    bootstrap: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Metrics of each model by name; with its validation predictions also `calibration`: temperature, ECE after it,
    and how
    much can be answered at 95 % precision."""
    models = {}
    for name, predictions in sets.items():
        test = outcomes(predictions)
        models[name] = evaluate_outcomes(test, priority, bootstrap=bootstrap, seed=seed)
        calibrated = calibrate(outcomes(validation[name]) if name in validation else None, test)
        if calibrated.scaled is not None:
            models[name]["calibration"] = calibration_entry(calibrated)
    return models


def compare_all(
    test: Mapping[str, PredictionSet],
    validation: Mapping[str, PredictionSet],
    priority: Sequence[str],
    *,
    candidate: str = TUNED,
    bootstrap: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The paired comparisons of the candidate with every other model."""
    first = test[candidate]
    return [
        compare(
            first,
            other,
            priority,
            val_a=validation.get(candidate),
            val_b=validation.get(name),
            bootstrap=bootstrap,
            seed=seed,
        )
        for name, other in test.items()
        if name != candidate
    ]


def calibration_entry(c: Calibrated) -> dict[str, Any]:
    """What metrics.json says about calibration: the test's ECE at the fitted temperature, and what can be answered."""
    chosen = c.chosen
    return {
        "temperature": c.temperature,
        "ece": expected_calibration_error(c.scaled.confidence, c.scaled.correct),
        "answered_at_precision": chosen.target,
        "answered": {"value": chosen.coverage, "ci95": list(chosen.coverage_ci95)},
        "precision": None
        if chosen.precision is None
        else {"value": chosen.precision, "ci95": list(chosen.precision_ci95)},
    }
