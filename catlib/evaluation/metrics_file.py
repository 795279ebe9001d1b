"""The files of an evaluation: predictions, found and read; metrics.json, to which what one writes never loses another's."""

import logging
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from catlib.breeds import PRIORITY_BREEDS
from catlib.data.records import PredictionSet, read_predictions
from catlib.errors import CatlibError, InputError
from catlib.files import read_json, write_json
from catlib.paths import given_path
from catlib.settings import split_list

log = logging.getLogger(__name__)
METRICS_FILE = "metrics.json"
read_metrics = read_json  # the content of a metrics file; InputError naming it when it is missing or no JSON object


def read_all(paths: Sequence[str | Path]) -> dict[str, PredictionSet]:
    """Prediction files by model name (the file's); what a reader has to know about them is logged.

    Raises InputError when two files have the same name.
    """
    sets: dict[str, PredictionSet] = {}
    for path in map(given_path, paths):
        if path.stem in sets:
            raise InputError(f"{path}: a second file of the model {path.stem!r}; a model is named after its file")
        sets[path.stem] = read_predictions(path)
        for remark in sets[path.stem].remarks:
            log.warning("%s", remark)
    return sets


def read_folder(folder: Path) -> dict[str, PredictionSet]:
    """All predictions that lie in a folder (`run_dir`/predictions, or its `val`)."""
    return read_all(sorted(folder.glob("*.jsonl"))) if folder.is_dir() else {}


def choose_priority(named: str | None, sets: Sequence[PredictionSet]) -> tuple[str, ...]:
    """The priority breeds: those `named` (comma separated), else those of the plan's seven that the models know and that have a photo.

    A named breed without a photo is refused when the metrics are computed.
    """
    if named is not None and named.strip():
        return tuple(split_list(named))
    known = [breed for breed in PRIORITY_BREEDS if any(breed in predictions.breeds for predictions in sets)]
    found = measurable(known, {prediction.breed for predictions in sets for prediction in predictions.predictions})
    if len(known) == len(found) < len(PRIORITY_BREEDS):
        said = "of the plan's %d priority breeds these models know %d; name others with --priority"
        log.warning(said, len(PRIORITY_BREEDS), len(found))
    return found


def measurable(priority: Sequence[str], tested: Container[str | None]) -> tuple[str, ...]:
    """Those of the priority breeds that have a test photo; a warning names the others."""
    if unseen := [breed for breed in priority if breed not in tested]:
        log.warning("priority breeds without a test photo, not measurable and in no average: %s", ", ".join(unseen))
    return tuple(breed for breed in priority if breed in tested)


def write_metrics(
    place: Path,
    *,
    models: Mapping[str, Mapping[str, Any]] | None = None,
    comparisons: Sequence[Mapping[str, Any]] | None = None,
    verdict: Mapping[str, Any] | None = None,
    **further: Any,
) -> Path:
    """Merge figures into metrics.json of the folder `place`, or into the file of that name, and return its path.

    `models` replaces the entries of the same names, `comparisons` those of the same pair; `verdict` brings `criteria` and
    `recommendation`; `further` keys are set as they are. Written as a whole, strict JSON. Raises CatlibError when a figure
    is NaN or infinite, which would say that it was not computed.
    """
    path = place if place.suffix == ".json" else place / METRICS_FILE
    content = existing(path)
    if models:
        content["models"] = {**content.get("models", {}), **models}
    if comparisons:
        pairs = {(c["a"], c["b"]) for c in comparisons}
        kept = [c for c in content.get("comparisons", []) if (c["a"], c["b"]) not in pairs]
        content["comparisons"] = [*kept, *comparisons]
    content |= {**(verdict or {}), **{key: value for key, value in further.items() if value is not None}}
    try:
        write_json(path, content)
    except ValueError as error:
        raise CatlibError(f"{path}: a figure is no finite number ({error}); nothing was written") from None
    return path


def existing(path: Path) -> dict[str, Any]:
    """The content of a metrics file that is to be added to, {} where there is none. Raises InputError for any other file."""
    content: dict[str, Any] = read_metrics(path) if path.exists() else {}
    models, advice = content.get("models", {}), content.get("recommendation", {})
    lists = [content.get(key, []) for key in ("comparisons", "criteria")]
    # All that the file holds under the names of metrics.json has to be built as there, and some of it to be there.
    ours = (
        (models or any(lists) or advice)
        and isinstance(models, dict)
        and all(isinstance(model, dict) and {"accuracy", "latency_ms"} & model.keys() for model in models.values())
        and all(isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries) for entries in lists)
        and all({"a", "b"} <= entry.keys() for entry in lists[0])
        and isinstance(advice, dict)
    )
    if content and not ours:
        raise InputError(f"{path} is no metrics file of catlib's and is not changed: name another, or move it away")
    return content
