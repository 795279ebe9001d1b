"""From a dataset and models to prediction files: what notebooks 03 and 04 do before there is anything to measure."""

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from catlib.classifiers.base import Classifier, predict
from catlib.data.prepare import load_dataset
from catlib.data.records import PredictionSet, Sample, read_samples
from catlib.errors import InputError
from catlib.evaluation.inputs import read_folder
from catlib.evaluation.names import TUNED, UNTUNED, ZERO_SHOT, ordered
from catlib.paths import resolve
from catlib.settings import ComparisonSettings, EvaluationSettings, split_list

if TYPE_CHECKING:
    from catlib.classifiers.explain import Explanation
    from catlib.classifiers.probe import LinearProbe
    from catlib.vlm.models import VLM

LATENCY_PHOTOS = 32  # photos that are timed one by one
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """The photos of an evaluation and where its predictions go. `train` is empty where no probe is fitted."""

    run_dir: Path
    image_root: Path
    breeds: tuple[str, ...]
    priority: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]

    def summary(self) -> str:
        """What is tested, in a sentence."""
        rare = ", ".join(self.priority) or "none"
        return f"{len(self.test)} test photos of {len({s.breed for s in self.test})} breeds; priority breeds: {rare}."

    def run(self, classifier: Classifier, batch_size: int) -> None:
        """Predictions of one model: the test photos into predictions/NAME.jsonl, the validation photos into
        predictions/val. Only the test photos are timed; there nothing that another model has computed is used again."""
        for folder, samples, timed in (("predictions/val", self.val, 0), ("predictions", self.test, LATENCY_PHOTOS)):
            out = self.run_dir / folder / f"{classifier.name}.jsonl"
            predict(classifier, samples, self.image_root, out, batch_size, latency_photos=timed, reuse=not timed)

    def run_probe(self, probe: "LinearProbe", batch_size: int) -> None:
        """As `run`, and the fitted probe into probes/NAME.npz, which `catlib predict --model probe:FILE` reads."""
        self.run(probe, batch_size)
        probe.save(self.run_dir / "probes" / f"{probe.name}.npz")

    def results(self) -> "Results":
        """All predictions of this run's folder, whoever wrote them."""
        return Results(read_folder(self.run_dir / "predictions"), read_folder(self.run_dir / "predictions" / "val"))


@dataclass(frozen=True)
class Results:
    """Predictions by model name, on the test photos and on the validation photos."""

    test: dict[str, PredictionSet]
    val: dict[str, PredictionSet]

    def only(self, names: Sequence[str]) -> "Results":
        """Those of the named models that are there, in the usual order."""
        kept = ordered([name for name in self.test if name in names])
        return Results({n: self.test[n] for n in kept}, {n: self.val[n] for n in kept if n in self.val})


def open_bench(settings: EvaluationSettings | ComparisonSettings) -> Bench:
    """The photos that the settings name. Raises InputError when a file is missing, or a priority breed is not in the
    data."""
    dataset = load_dataset(resolve(settings.test_data).parent)
    priority = tuple(split_list(settings.priority_breeds)) or dataset.priority_breeds
    if unknown := [breed for breed in priority if breed not in dataset.breeds]:
        raise InputError(
            f"priority_breeds: {', '.join(unknown)} not among the breeds of the data, which are "
            f"{', '.join(dataset.breeds)}"
        )
    train = getattr(settings, "train_data", "")
    test = tuple(read_samples(resolve(settings.test_data), dataset.image_root))
    return Bench(
        run_dir=resolve(settings.run_dir),
        image_root=dataset.image_root,
        breeds=dataset.breeds,
        priority=priority,
        train=tuple(read_samples(resolve(train), dataset.image_root)) if train else (),
        val=tuple(read_samples(resolve(settings.val_data), dataset.image_root)),
        test=evenly(test, settings.max_test_photos, settings.seed),
    )


def evenly(samples: Sequence[Sample], most: int, seed: int) -> tuple[Sample, ...]:
    """At most `most` samples (0: all), taken from all breeds in turn, in their old order; the same for the same seed."""
    if not 0 < most < len(samples):
        return tuple(samples)
    turn: dict[str, int] = {}
    shuffled = np.random.default_rng(seed).permutation(len(samples))
    ranked = []
    for i in shuffled:
        breed = samples[i].breed
        ranked.append((turn.setdefault(breed, 0), int(i)))
        turn[breed] += 1
    return tuple(samples[i] for i in sorted(i for _, i in sorted(ranked, key=lambda pair: pair[0])[:most]))


def predict_vlm(bench: Bench, settings: EvaluationSettings) -> Results:
    """Predictions of the VLM, tuned and, if wanted, untuned."""
    from catlib.classifiers.prior import fit_prior
    from catlib.classifiers.vlm import VLMClassifier

    wanted = [UNTUNED, TUNED] if settings.evaluate_base else [TUNED]
    for name in wanted:
        vlm = _open(settings, tuned=name == TUNED)
        classifier = VLMClassifier(vlm, bench.breeds, settings.decoding, settings.score_norm, name=name)
        if settings.prior_correction and settings.decoding == "score":
            fit_prior(classifier, bench.val, bench.image_root, settings.eval_batch_size)
        bench.run(classifier, settings.eval_batch_size)
        del vlm, classifier
        _free()
    return bench.results().only(wanted)


def _open(settings: EvaluationSettings, tuned: bool = True) -> "VLM":
    """The checkpoint that the settings name, or its base, both asked the same question."""
    from catlib.vlm.checkpoint import find_checkpoint, open_vlm
    from demo.tiny_models import resolve_model

    base, question = resolve_model(settings.base_model, "llava"), settings.prompt
    checkpoint = find_checkpoint(resolve(settings.checkpoint), base_model=base, question=question, tuned=tuned)
    return open_vlm(checkpoint, device=settings.device, precision="4-bit" if settings.quantize else settings.dtype)


def explain_examples(
    bench: Bench, settings: EvaluationSettings, results: Results, each: int = 2
) -> list["Explanation"]:
    """Why the tuned VLM says so, for some photos: right, wrong and of priority breeds, `each` of a kind."""
    from catlib.classifiers.explain import explain_prediction, pick_examples
    from catlib.classifiers.vlm import VLMClassifier
    from catlib.data.images import inside, open_image

    vlm = _open(settings)
    classifier = VLMClassifier(vlm, bench.breeds, score_norm=settings.score_norm, name=TUNED)
    chosen = pick_examples(results.test[TUNED], bench.priority, each)
    rows = [explain_prediction(classifier, open_image(inside(bench.image_root, p.image)), p.breed) for p in chosen]
    del vlm, classifier
    _free()
    return rows


def predict_clip_and_probes(bench: Bench, settings: ComparisonSettings) -> Results:
    """Predictions of zero-shot CLIP (unless `clip_model` is empty) and of the linear probes; with them, those of the
    VLM.

    Raises InputError when the run's folder has no predictions of the tuned VLM.
    """
    if not (bench.run_dir / "predictions" / f"{TUNED}.jsonl").is_file():
        raise InputError(
            f"{bench.run_dir}: no predictions of {TUNED}; run notebook 03_evaluation with the same run_dir first"
        )
    from catlib.classifiers.clip import ClipZeroShot
    from catlib.classifiers.encoder import ClipEncoder, TowerEncoder
    from catlib.classifiers.probe import LinearProbe
    from catlib.vlm.checkpoint import open_vlm
    from demo.tiny_models import resolve_model

    batch, fitted = settings.eval_batch_size, (bench.breeds, bench.train, bench.image_root)
    wanted = [TUNED, UNTUNED]
    if settings.clip_model:
        encoder = ClipEncoder.load(resolve_model(settings.clip_model, "clip"), settings.device, settings.dtype)
        bench.run(ClipZeroShot(encoder, bench.breeds, settings.clip_prompts, name=ZERO_SHOT), batch)
        wanted.append(ZERO_SHOT)
        if settings.probe:
            bench.run_probe(LinearProbe.fit(encoder, *fitted, "clip-probe", batch, settings.seed), batch)
            wanted.append("clip-probe")
        del encoder
        _free()
    if settings.probe:
        vlm = open_vlm(resolve_model(settings.base_model, "llava"), device=settings.device, precision=settings.dtype)
        bench.run_probe(LinearProbe.fit(TowerEncoder(vlm), *fitted, "tower-probe", batch, settings.seed), batch)
        wanted.append("tower-probe")
        del vlm
        _free()
    return bench.results().only(wanted)


def _free() -> None:
    """Give the memory of a deleted model back before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
