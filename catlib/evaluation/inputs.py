"""Prediction files, found and read: those of a run's folder, those named on the command line."""

import logging
from collections.abc import Sequence
from pathlib import Path

from catlib.breeds import PRIORITY_BREEDS
from catlib.data.records import PredictionSet, read_predictions
from catlib.errors import InputError
from catlib.paths import resolve
from catlib.settings import split_list

log = logging.getLogger(__name__)


def read_all(paths: Sequence[str | Path]) -> dict[str, PredictionSet]:
    """Prediction files by model name (the file's); what a reader has to know about them is logged.

    Raises InputError when two files have the same name.
    """
    sets: dict[str, PredictionSet] = {}
    for path in paths:
        predictions = read_predictions(given_file(path))
        if predictions.name in sets:
            raise InputError(
                f"{path}: a second file of the model {predictions.name!r}; a model is named after its file"
            )
        sets[predictions.name] = predictions
        for remark in predictions.remarks:
            log.warning("%s", remark)
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
    """The priority breeds: those `named` (comma separated), else those of the plan's seven that the models know and that have a photo.

    A named breed without a photo is refused when the metrics are computed.
    """
    if named is not None and named.strip():
        return tuple(split_list(named))
    known = {breed for predictions in sets for breed in predictions.breeds}
    shown = {prediction.breed for predictions in sets for prediction in predictions.predictions}
    found = tuple(breed for breed in PRIORITY_BREEDS if breed in known & shown)
    if unseen := [breed for breed in PRIORITY_BREEDS if breed in known - shown]:
        log.warning("priority breeds without a test photo, not measurable and in no average: %s", ", ".join(unseen))
    elif len(found) < len(PRIORITY_BREEDS):
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
