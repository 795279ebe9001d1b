"""From a dataset and models to prediction files: what notebooks 03 and 04 do before there is anything to measure."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from catlib.classifiers.explain import Explanation, explain_prediction, pick_examples
from catlib.classifiers.further import OnSet, further_sets
from catlib.classifiers.predict import predict
from catlib.classifiers.tracks import TRACKS, TUNED, Bench, Track, find_vlm, load_vlm, names_of, tracks_of
from catlib.classifiers.vlm import VLMClassifier
from catlib.data.conversations import evenly
from catlib.data.images import inside, open_image
from catlib.data.prepare import load_dataset
from catlib.data.records import Sample, read_samples
from catlib.errors import CatlibError, InputError
from catlib.evaluation.calibration import fit_calibration, store_calibration
from catlib.evaluation.metrics_file import measurable, read_folder
from catlib.evaluation.outcomes import outcomes
from catlib.evaluation.results import Results, keys_of, refuse_seen
from catlib.files import digest_of
from catlib.paths import resolve
from catlib.settings import ComparisonSettings, EvaluationSettings, split_list

Settings = EvaluationSettings | ComparisonSettings
log = logging.getLogger(__name__)
LATENCY_PHOTOS = 32  # photos that are timed one by one


def open_bench(settings: Settings) -> Bench:
    """The photos that the settings name, and the checkpoint, of which nothing is loaded.

    Raises InputError when a file is missing, a priority breed is not in the data, or test photos were trained on.
    """
    dataset = load_dataset(resolve(settings.test_data).parent)
    priority = tuple(split_list(settings.priority_breeds))
    priority = priority or measurable(dataset.priority_breeds, {sample.breed for sample in dataset.test})
    if unknown := [breed for breed in priority if breed not in dataset.breeds]:
        known = ", ".join(dataset.breeds)
        raise InputError(f"priority_breeds: {', '.join(unknown)} not among the breeds of the data, which are {known}")
    test = tuple(read_samples(resolve(settings.test_data), dataset.image_root))
    val = tuple(read_samples(resolve(settings.val_data), dataset.image_root))
    train: tuple[Sample, ...] = ()
    checkpoint = None
    seen: dict[str, Sequence[Sample]] = {settings.val_data: val, "train.jsonl": dataset.train}
    if isinstance(settings, ComparisonSettings):
        seen[settings.train_data] = train = tuple(read_samples(resolve(settings.train_data), dataset.image_root))
    else:
        checkpoint = find_vlm(settings, dataset.breeds)
        used = resolve((checkpoint.training.get("settings") or {}).get("train_data") or "data")
        if used.is_file():  # what the checkpoint was trained on, wherever the test photos lie
            seen[str(used)] = tuple(read_samples(used))
    digests: dict[str, str | None] = {s.id: _digest(s, dataset.image_root) for s in test}
    for name, samples in seen.items():
        refuse_seen(digests, keys_of(samples) | {_digest(s, dataset.image_root) for s in samples}, name)
    drawn = evenly(test, settings.max_test_photos, settings.seed)
    return Bench(
        run_dir=resolve(settings.run_dir),
        image_root=dataset.image_root,
        breeds=dataset.breeds,
        priority=priority,
        train=train,
        val=val,
        test=drawn,
        checkpoint=checkpoint,
        further=further_sets(settings, drawn, dataset.image_root, dataset.breeds),
    )


def _digest(sample: Sample, root: Path) -> str:
    if known := sample.metadata.get("sha256"):
        return str(known)
    photo = inside(root, sample.image)
    return digest_of(photo) if photo.is_file() else sample.id


def predict_candidates(bench: Bench, settings: EvaluationSettings, readings: bool = False) -> Results:
    """Predictions of the VLM, tuned and, if wanted, untuned. What is fitted on validation photos is stored with the checkpoint.

    `readings`: in place of that, test predictions of the tuned VLM in the `further_decodings`; with them, those of its own decoding.
    """
    if readings:
        made = predict_tracks([entry for entry in TRACKS if entry.of], bench, settings, ("test",))
        return _found(bench, settings, val=False).only([TUNED, *made])
    made = predict_tracks(tracks_of("candidate"), bench, settings)
    results = _found(bench, settings).only(made)
    scored = results.val.get(TUNED)
    if bench.checkpoint and bench.checkpoint.folder and scored and scored.meta.get("decoding") == "score":
        try:
            store_calibration(bench.checkpoint.folder, fit_calibration(outcomes(scored)))
        except CatlibError as error:  # a folder that only others may write
            log.warning("the calibration is not stored with the checkpoint: %s", error)
    return results


def predict_opponents(bench: Bench, settings: ComparisonSettings) -> Results:
    """Predictions of the baseline and of the opponents that the settings ask for; with them, those of the VLM.

    Raises InputError when the run's folder has no predictions of the tuned VLM.
    """
    if not (bench.run_dir / "predictions" / f"{TUNED}.jsonl").is_file():
        said = "run notebook 03_evaluation with the same run_dir first"
        raise InputError(f"{bench.run_dir}: no predictions of {TUNED}; {said}")
    made = predict_tracks(tracks_of("baseline", "opponent"), bench, settings)
    found = _found(bench, settings)
    # The verdict is told of the further ways to read the VLM, where they are of the same photos.
    ids = {name: {p.id for p in predictions.predictions} for name, predictions in found.test.items()}
    ways = [t.name for t in TRACKS if t.of and t.name in ids and ids[t.name] == ids.get(t.of)]
    return found.only([*made, *names_of("candidate"), *ways])


def _found(bench: Bench, settings: Settings, val: bool = True) -> Results:
    """All predictions that the run's folder has by now."""
    folder = bench.run_dir / "predictions"
    test, validation = read_folder(folder), read_folder(folder / "val") if val else {}
    further = {photos.name: read_folder(folder / photos.name) for photos in bench.further}
    return Results(test, validation, bench.priority, settings.bootstrap, settings.seed, further=further)


def predict_tracks(
    entries: Iterable[Track], bench: Bench, settings: Settings, parts: Sequence[str] = ("val", "test")
) -> list[str]:
    """Predictions of those models that the settings do not leave out, and their names.

    The test photos go into predictions/NAME.jsonl, the validation photos into predictions/val, further sets of photos into a folder
    of their names (of a call without validation photos none are predicted), what was fitted into probes/. The test
    photos (of a call without them, the others) are timed; there nothing that another model has computed is used again.
    """
    made = [entry.name for entry in entries if _predict(entry, bench, settings, parts)]
    bench.free()
    return made


def _predict(entry: Track, bench: Bench, settings: Settings, parts: Sequence[str]) -> bool:
    classifier = entry.make(bench, settings) if entry.make else None
    if classifier is None:
        return False
    place: Path = bench.run_dir / "predictions"
    how: dict[str, Any] = {"seed": settings.seed, "batch_size": settings.eval_batch_size}
    for part in parts:
        timed = part == "test" or "test" not in parts
        samples, folder = (bench.test, place) if part == "test" else (bench.val, place / "val")
        out, latency_photos = folder / f"{entry.name}.jsonl", LATENCY_PHOTOS if timed else 0
        predict(classifier, samples, bench.image_root, out, latency_photos=latency_photos, reuse=not timed, **how)
    for photos in bench.further if {"val", "test"} <= set(parts) else ():
        out = place / photos.name / f"{entry.name}.jsonl"
        predict(OnSet(classifier, photos.name), photos.samples, photos.image_root, out, **how)
    classifier.store(bench.run_dir / "probes")
    return True


def explain_examples(bench: Bench, settings: EvaluationSettings, results: Results, each: int = 2) -> list[Explanation]:
    """Why the tuned VLM says so, for some photos: right, wrong and of priority breeds, `each` of a kind."""
    chosen = pick_examples(results.test[TUNED], bench.priority, each)
    classifier = VLMClassifier(load_vlm(bench, settings), bench.breeds, score_norm=settings.score_norm, name=TUNED)
    rows = [explain_prediction(classifier, open_image(inside(bench.image_root, p.image)), p.breed) for p in chosen]
    del classifier
    bench.free()
    return rows
