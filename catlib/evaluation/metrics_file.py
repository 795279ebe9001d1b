"""metrics.json of a run: what one notebook or command adds to it never loses what another has written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catlib.errors import CatlibError, InputError
from catlib.files import read_json, write_json

METRICS_FILE = "metrics.json"
read_metrics = read_json  # the content of a metrics file; InputError naming it when it is missing or no JSON object


def write_metrics(
    run_dir: Path,
    *,
    models: Mapping[str, Mapping[str, Any]] | None = None,
    comparisons: Sequence[Mapping[str, Any]] | None = None,
    verdict: Mapping[str, Any] | None = None,
    **further: Any,
) -> Path:
    """Merge figures into `run_dir`/metrics.json and return its path.

    `models` replaces the entries of the same names, `comparisons` those of the same pair; `verdict` brings `criteria` and
    `recommendation`; `further` keys are set as they are. Written as a whole, strict JSON. Raises CatlibError when a figure
    is NaN or infinite, which would say that it was not computed.
    """
    return merge_into(run_dir / METRICS_FILE, models=models, comparisons=comparisons, verdict=verdict, **further)


def merge_into(path: Path, **parts: Any) -> Path:
    """`write_metrics` for a metrics file of any name."""
    content = existing(path)
    models, comparisons, verdict = (parts.pop(key, None) for key in ("models", "comparisons", "verdict"))
    if models:
        content["models"] = {**content.get("models", {}), **models}
    if comparisons:
        pairs = {(c["a"], c["b"]) for c in comparisons}
        kept = [c for c in content.get("comparisons", []) if (c["a"], c["b"]) not in pairs]
        content["comparisons"] = [*kept, *comparisons]
    content.update(verdict or {})
    content.update({key: value for key, value in parts.items() if value is not None})
    try:
        write_json(path, content)
    except ValueError as error:
        raise CatlibError(f"{path}: a figure is no finite number ({error}); nothing was written") from None
    return path


def existing(path: Path) -> dict[str, Any]:
    """The content of a metrics file that is to be added to, {} where there is none. Raises InputError for any other file."""
    content: dict[str, Any] = read_metrics(path) if path.exists() else {}
    if content and not _is_metrics(content):
        raise InputError(
            f"{path} is no metrics file of catlib's and is not changed: name another file, or move it away"
        )
    return content


def _is_metrics(content: Mapping[str, Any]) -> bool:
    """Whether all that the file holds under the names of metrics.json is built as there, and some of it is there."""
    models, lists = content.get("models", {}), [content.get(key, []) for key in ("comparisons", "criteria")]
    advice = content.get("recommendation", {})
    return (
        bool(models or any(lists) or advice)
        and isinstance(models, dict)
        and all(isinstance(model, dict) and {"accuracy", "latency_ms"} & model.keys() for model in models.values())
        and all(isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries) for entries in lists)
        and all({"a", "b"} <= entry.keys() for entry in lists[0])
        and isinstance(advice, dict)
    )
