"""What the verdict of a run says to use, loaded as the run has measured it: a VLM in its decoding, CLIP, a probe, or two averaged."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from catlib.classifiers.base import Batch, Classifier
from catlib.classifiers.clip import ClipZeroShot
from catlib.classifiers.encoder import ClipEncoder
from catlib.classifiers.probe import Probe
from catlib.classifiers.vlm import VLMClassifier
from catlib.data.records import meta_path, read_predictions
from catlib.errors import CatlibError, InputError
from catlib.evaluation.calibration import Calibration, fit_calibration
from catlib.evaluation.combine import mix
from catlib.evaluation.metrics_file import METRICS_FILE, read_metrics
from catlib.evaluation.outcomes import LOG_FLOOR, outcomes
from catlib.files import parse_yaml, read_json, read_text
from catlib.paths import folder_of_run, resolve
from catlib.provenance import git_commit, package_versions
from catlib.settings import DECODINGS
from catlib.vlm.checkpoint import find_checkpoint, open_vlm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Winner:
    """A model in memory. Of a run, `use`: its name, or two joined by "+"; `batch_size`: photos in one pass, as in the run."""

    classifier: Classifier
    calibration: Calibration | None
    use: str = ""
    batch_size: int = 1


class Combined(Classifier):
    """Two models whose calibrated log-probabilities are averaged, the weight fitted on validation photos."""

    def __init__(self, first: Classifier, second: Classifier, fitted: Mapping[str, float]) -> None:
        if set(first.breeds) != set(second.breeds):
            raise InputError(f"{first.name} and {second.name} know different breeds and cannot be averaged")
        self.parts, self.breeds, self.name = (first, second), first.breeds, f"{first.name}+{second.name}"
        self.weight = fitted["weight_a"]
        self.temperatures = (fitted["temperature_a"], fitted["temperature_b"])
        self.columns = [second.breeds.index(breed) for breed in first.breeds]

    def classify(self, images: Sequence[Image], ids: Sequence[str] | None = None) -> Batch:
        scores = [part.classify(images, ids).log_probs for part in self.parts]
        if scores[0] is None or scores[1] is None:
            raise CatlibError(f"{self.name}: one of the two gives no scores to average")
        own, other = (np.maximum(s, LOG_FLOOR) for s in (scores[0], scores[1][:, self.columns]))
        return self.from_log_probs(mix(self.weight, self.temperatures, own, other))

    def describe(self) -> dict[str, Any]:
        about = {part.name: part.describe() for part in self.parts}
        fitted = {"weight_a": self.weight, "temperatures": list(self.temperatures)}
        return {"base_model": None, "decoding": "average", "combination": fitted, "parts": about}


def choose(run: str | Path, use: str = "") -> tuple[Path, str]:
    """A run's folder (`run`: its name, or the folder itself), and what to use of it: as the verdict says, or `use`, which is
    warned of where it is another. Raises InputError where there are no figures of a run, or no verdict and no `use`.
    """
    own, by_name = resolve(run), isinstance(run, str) and "/" not in run
    folder = own if (own / METRICS_FILE).is_file() or not by_name else folder_of_run(str(run))
    if not (path := folder / METRICS_FILE).is_file():
        raise InputError(
            f"--run {run}: no {METRICS_FILE} in {folder}; make the run first: catlib report {Path(run).name}"
        )
    advice = read_metrics(path).get("recommendation")
    best = advice.get("use") if isinstance(advice, dict) else None
    if not isinstance(best, str) or not best:
        told = f"{path}: no verdict in it (recommendation.use); run notebook 04, or name a model"
        if not use:
            raise InputError(told)
        log.warning("%s", told)
    elif use and use != best:
        log.warning("the verdict of %s is to use %s; %s is used, as asked for", folder.name, best, use)
    return folder, use or str(best)


def open_winner(run: str | Path, use: str = "", device: str = "auto") -> Winner:
    """The recommended model of a run in memory, or `use`, so that it predicts as the run's files do.

    Raises InputError when the run has no verdict or no such model, or when what it measured is not there any more.
    """
    folder, use = choose(run, use)
    names, calibration = use.split("+"), None
    batch_size = sidecar_of(folder, names[0]).get("batch_size") or 1
    classifier, *others = (_open(folder, name, device) for name in names)
    validation = folder / "predictions" / "val" / f"{use}.jsonl"
    if others:
        comparisons = read_metrics(folder / METRICS_FILE).get("comparisons", [])
        pair: Mapping[str, Any] = next((c for c in comparisons if f"{c.get('a')}+{c.get('b')}" == use), {})
        if not (fitted := pair.get("combination")):
            raise InputError(
                f"{folder}: no weight was fitted for {use} (it takes scores of both on the validation photos); name one of the two"
            )
        classifier = Combined(classifier, others[0], fitted)
    elif validation.is_file() and (measured := outcomes(read_predictions(validation))).log_probs is not None:
        calibration = fit_calibration(measured)
    return Winner(classifier, calibration, use, batch_size)


def sidecar_of(folder: Path, name: str) -> dict[str, Any]:
    """What a run says about how a model predicted. Raises InputError naming the models that there are."""
    path = meta_path(folder / "predictions" / f"{name}.jsonl")
    if Path(name).name != name or not path.is_file():
        there = ", ".join(sorted(p.stem for p in (folder / "predictions").glob("*.jsonl"))) or "none"
        raise InputError(f"{folder}: no predictions of a model {name!r}; there are {there}")
    return read_json(path)


def adapter_of(folder: Path, about: Mapping[str, Any]) -> Path | None:
    """The folder of the adapter that a sidecar names; where the project was moved since, the one of the run's parameters."""
    if not (named := about.get("adapter")):
        return None
    return Path(named) if Path(named).is_dir() else resolve(_parameters(folder).get("checkpoint") or named)


def _parameters(folder: Path) -> Mapping[str, Any]:
    path = folder / "parameters.yaml"
    return parse_yaml(read_text(path), str(path)) if path.is_file() else {}


def _open(folder: Path, name: str, device: str) -> Classifier:
    """The classifier that a sidecar describes. Raises InputError where its weights are not those that were measured."""
    about = sidecar_of(folder, name)
    base, dtype, way = about.get("base_model"), about.get("dtype") or "auto", about.get("decoding")
    classifier: Classifier
    if "endpoint" in about or not base:
        raise InputError(f"{folder}: {name} was asked at {about.get('endpoint')}: use predict --model endpoint:URL")
    if "probe" in about:
        classifier = Probe.load(folder / "probes" / f"{name}.npz", device=device, dtype=dtype)
    elif way == "cosine":
        style = str(about.get("prompt") or "").partition(":")[0]
        encoder = ClipEncoder.load(base, device, dtype)
        if "lora" in about:
            from catlib.classifiers.clip_lora import take_up

            take_up(encoder, folder / "probes" / name)
        clip = classifier = ClipZeroShot(encoder, about["breeds"], style, name)
        clip.prior = clip.prior if about.get("prior") is None else np.array(about["prior"])
    elif way in DECODINGS:
        classifier = _open_vlm(folder, name, about, device)
    else:
        raise InputError(f"{folder}: {name} decodes by {way!r}, which cannot be loaded again")
    now, measured = classifier.describe(), about.get("weights")
    if measured and now.get("dtype") == dtype and now["weights"] != measured:
        told = f"{name}: the weights ({now['weights']}) are not those that {folder.name} has measured ({measured})"
        if (about.get("commit"), about.get("versions")) == (git_commit(), package_versions()):
            raise InputError(
                f"{told}: trained or replaced since. Run catlib report again, or load the checkpoint itself"
            )
        log.warning("%s, or another version of the code named them otherwise: compare some predictions", told)
    return classifier


def _open_vlm(folder: Path, name: str, about: Mapping[str, Any], device: str) -> VLMClassifier:
    set_to, adapter, base = _parameters(folder), adapter_of(folder, about), about["base_model"]
    known = {"question": about.get("question") or "", "breeds": about["breeds"]}
    found = find_checkpoint(adapter or base, base_model=base if adapter else "", **known)
    found = replace(found, spelled=about.get("spelled") or {})  # of the untuned base, too, those of the tuned one
    precision = "4-bit" if set_to.get("quantize") else about.get("dtype") or "auto"
    prior = (about.get("prior_correction") or {}).get("strength", 0.0)
    vlm = open_vlm(found, device=device, precision=precision)
    return VLMClassifier(vlm, about["breeds"], about["decoding"], about.get("score_norm", "sum"), prior, name)
