"""Can the model's probabilities be believed? Temperature, reliability, and how much can be answered at a given precision."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from catlib.errors import InputError
from catlib.evaluation.bootstrap import share
from catlib.evaluation.metrics import equal_mass_bins
from catlib.evaluation.outcomes import LOG_FLOOR, Outcomes
from catlib.evaluation.tables import Entry
from catlib.files import read_json, read_text, write_json
from catlib.runs import CALIBRATION, DIGEST

log = logging.getLogger(__name__)
TEMPERATURES = (0.02, 50.0)  # the fit stays within these: beyond them the scores are constant or a hard argmax


def fit_temperature(validation: Outcomes) -> float:
    """The temperature T that minimises the negative log-likelihood of softmax(log_probs / T) on validation photos.

    Guo et al. 2017, "On calibration of modern neural networks". Raises InputError for predictions without scores.
    """
    scores = _scores(validation)
    rows = np.arange(len(validation))

    def nll(log_temperature: float) -> float:
        return -log_softmax(scores / np.exp(log_temperature), axis=1)[rows, validation.true].mean()

    return float(np.exp(minimize_scalar(nll, bounds=tuple(np.log(TEMPERATURES)), method="bounded").x))


def apply_temperature(o: Outcomes, temperature: float) -> Outcomes:
    """The same predictions with their log-probabilities at another temperature; no answer changes."""
    return replace(o, log_probs=log_softmax(_scores(o) / temperature, axis=1))


class ReliabilityBin(NamedTuple):
    """Photos of similar confidence: how sure the model was on average, and how often it was right."""

    confidence: float
    accuracy: Entry
    photos: int


def reliability(o: Outcomes) -> list[ReliabilityBin]:
    """The reliability diagram's points, in the equal-mass bins that the expected calibration error uses."""
    code = equal_mass_bins(o.confidence)
    parts = [code == number for number in range(code.max() + 1)]
    return [ReliabilityBin(float(o.confidence[p].mean()), share(o.correct[p], o.group[p]), int(p.sum())) for p in parts]


class RiskCoverage(NamedTuple):
    """Precision (n,) among the `coverage` (n,) share of photos that the model is surest of, at `threshold` (n,)."""

    coverage: np.ndarray
    precision: np.ndarray
    threshold: np.ndarray

    @property
    def area(self) -> float:
        """The area under the risk-coverage curve (Geifman et al. 2019): the mean share of wrong answers over all coverages."""
        return float(np.sum((1 - self.precision) * np.diff(self.coverage, prepend=0.0)))


def risk_coverage(o: Outcomes) -> RiskCoverage:
    """Precision against coverage when only the surest answers are given (El-Yaniv and Wiener 2010). Ties stay together."""
    confidence = o.confidence
    order = np.argsort(-confidence, kind="stable")
    sure, right = confidence[order], np.cumsum(o.correct[order])
    last = np.flatnonzero(np.append(sure[1:] < sure[:-1], True))  # a threshold cannot part photos of equal confidence
    return RiskCoverage((last + 1) / len(o), right[last] / (last + 1), sure[last])


class SelectiveResult(NamedTuple):
    """What answering only above a confidence `threshold` gives on the test photos: the share answered, and of these the right ones."""

    target: float
    threshold: float | None  # None: no threshold reached the target on the validation photos
    coverage: Entry
    precision: Entry | None  # None: no photo is answered


def threshold_for(validation: Outcomes, target: float) -> float | None:
    """The least confidence above which the answers on validation photos reach the `target` precision; None: there is none."""
    curve = risk_coverage(validation)
    reached = np.flatnonzero(curve.precision >= target)
    return float(curve.threshold[reached[-1]]) if len(reached) else None


def answer_at_precision(validation: Outcomes, test: Outcomes, target: float = 0.95) -> SelectiveResult:
    """How much can be answered at `target` precision: the threshold is chosen on validation, the figures are the test's."""
    threshold = threshold_for(validation, target)
    given = test.confidence >= (np.inf if threshold is None else threshold)
    precision = share(test.correct[given], test.group[given]) if given.any() else None
    return SelectiveResult(target, threshold, share(given, test.group), precision)


@dataclass(frozen=True)
class Calibrated:
    """A model's test photos before and after temperature scaling; everything fitted is fitted on validation.

    For a model without scores only `raw` is there.
    """

    raw: Outcomes
    scaled: Outcomes | None = None
    temperature: float | None = None
    chosen: SelectiveResult | None = None


def calibrate(validation: Outcomes | None, test: Outcomes, target: float = 0.95) -> Calibrated:
    """Temperature and answering threshold from `validation`, applied to `test`."""
    if validation is None or validation.log_probs is None or test.log_probs is None:
        return Calibrated(test)
    temperature = fit_temperature(validation)
    scaled = apply_temperature(test, temperature)
    chosen = answer_at_precision(apply_temperature(validation, temperature), scaled, target)
    return Calibrated(test, scaled, temperature, chosen)


def _scores(o: Outcomes) -> np.ndarray:
    if o.log_probs is None:
        raise InputError(f"{o.name}: its predictions carry no scores, so there is nothing to calibrate")
    return o.log_probs


@dataclass(frozen=True)
class Calibration:
    """What turns a model's scores into probabilities that can be believed, and says when it is sure: fitted on validation photos.

    `threshold` None: no confidence reached the `target` precision there. `way`: how the scores come about (question, breeds,
    normalisation, prior correction); with another one the fit does not hold.
    """

    temperature: float
    threshold: float | None
    target: float
    photos: int
    way: Mapping[str, Any]

    def scaled(self, log_probs: np.ndarray) -> np.ndarray:
        """Log-probabilities (n, breeds) at the fitted temperature."""
        return log_softmax(np.maximum(log_probs, LOG_FLOOR) / self.temperature, axis=1)

    def is_sure(self, probability: float) -> bool:
        """Whether the likeliest breed's probability reaches the threshold."""
        return self.threshold is not None and bool(probability >= self.threshold)


def fit_calibration(validation: Outcomes, target: float = 0.95) -> Calibration:
    """Temperature and threshold of a model from its validation photos. Raises InputError for predictions without scores."""
    temperature = fit_temperature(validation)
    threshold = threshold_for(apply_temperature(validation, temperature), target)
    way = {key: validation.meta.get(key) for key in ("breeds", "question", "score_norm")}
    way["prior_strength"] = (validation.meta.get("prior_correction") or {}).get("strength", 0.0)
    return Calibration(temperature, threshold, target, len(validation), way)


def store_calibration(folder: Path, fitted: Calibration) -> None:
    """Write calibration.json beside the checkpoint's weights, with their digest."""
    write_json(folder / CALIBRATION, {"weights": _weights(folder), **asdict(fitted)})


def stored_calibration(folder: Path) -> Calibration | None:
    """What was stored for the weights that lie in `folder` now; None where nothing was, or for others. Raises InputError."""
    path = folder / CALIBRATION
    if not path.is_file():
        return None
    stored = read_json(path)
    if stored.pop("weights", None) != _weights(folder):
        said = "%s belongs to other weights than those beside it and is left out: evaluate the checkpoint anew"
        log.warning(said, path)
        return None
    numbers = [stored.get(key) for key in ("temperature", "threshold", "target", "photos")]
    given, way = [n for i, n in enumerate(numbers) if (i, n) != (1, None)], stored.get("way")
    if not all(type(n) in (int, float) and n > 0 for n in given) or not isinstance(way, dict):
        raise InputError(f"{path}: temperature, threshold, target, photos or way is missing or of the wrong kind")
    return Calibration(*[*numbers, way])


def _weights(folder: Path) -> str:
    """The digest that training wrote beside an adapter; empty for weights of other tools."""
    return (read_text(folder / DIGEST).split() or [""])[0] if (folder / DIGEST).is_file() else ""
