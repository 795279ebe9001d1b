"""From a dataset and models to prediction files: what notebooks 03 and 04 do before there is anything to measure."""

import logging
from typing import TYPE_CHECKING

from catlib.classifiers.predict import predict
from catlib.classifiers.tracks import TRACKS, TUNED, Bench, Role, Track, find_vlm, load_vlm, names_of
from catlib.data.prepare import load_dataset
from catlib.data.records import read_samples
from catlib.data.sampling import evenly
from catlib.errors import CatlibError, InputError
from catlib.evaluation.calibration import fit_calibration, store_calibration
from catlib.evaluation.inputs import check_bootstrap, read_folder
from catlib.evaluation.outcomes import outcomes
from catlib.evaluation.results import Results
from catlib.paths import resolve
from catlib.settings import ComparisonSettings, EvaluationSettings, split_list

if TYPE_CHECKING:
    from catlib.classifiers.explain import Explanation

log = logging.getLogger(__name__)
LATENCY_PHOTOS = 32  # photos that are timed one by one


def open_bench(settings: EvaluationSettings | ComparisonSettings) -> Bench:
    """The photos that the settings name, and the checkpoint, of which nothing is loaded.

    Raises InputError when a file is missing, or a priority breed is not in the data.
    """
    check_bootstrap(settings.bootstrap)
    dataset = load_dataset(resolve(settings.test_data).parent)
    priority = tuple(split_list(settings.priority_breeds))
    if not priority:
        tested = {sample.breed for sample in dataset.test}
        priority = tuple(breed for breed in dataset.priority_breeds if breed in tested)
        if unseen := [breed for breed in dataset.priority_breeds if breed not in tested]:
            log.warning("priority breeds without a test photo, not measurable and in no average: %s", ", ".join(unseen))
    if unknown := [breed for breed in priority if breed not in dataset.breeds]:
        raise InputError(
            f"priority_breeds: {', '.join(unknown)} not among the breeds of the data, which are "
            f"{', '.join(dataset.breeds)}"
        )
    train = settings.train_data if isinstance(settings, ComparisonSettings) else ""
    test = tuple(read_samples(resolve(settings.test_data), dataset.image_root))
    return Bench(
        run_dir=resolve(settings.run_dir),
        image_root=dataset.image_root,
        breeds=dataset.breeds,
        priority=priority,
        train=tuple(read_samples(resolve(train), dataset.image_root)) if train else (),
        val=tuple(read_samples(resolve(settings.val_data), dataset.image_root)),
        test=evenly(test, settings.max_test_photos, settings.seed),
        checkpoint=find_vlm(settings, dataset.breeds) if isinstance(settings, EvaluationSettings) else None,
    )


def predict_candidates(bench: Bench, settings: EvaluationSettings, readings: bool = False) -> Results:
    """Predictions of the VLM, tuned and, if wanted, untuned. What is fitted on validation photos is stored with the checkpoint.

    `readings`: in place of that, test predictions of the tuned VLM in the `further_decodings`; with them, those of its own decoding.
    """
    if readings:
        made = [entry.name for entry in TRACKS if entry.of and _predict(entry, bench, settings)]
        bench.free()
        test = read_folder(bench.run_dir / "predictions")
        return Results(test, {}, bench.priority, settings.bootstrap, settings.seed).only([TUNED, *made])
    results = _predict_all(bench, settings, "candidate")
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
        raise InputError(
            f"{bench.run_dir}: no predictions of {TUNED}; run notebook 03_evaluation with the same run_dir first"
        )
    return _predict_all(bench, settings, "baseline", "opponent")


def _predict_all(bench: Bench, settings: EvaluationSettings | ComparisonSettings, *roles: Role) -> Results:
    wanted = (entry for entry in TRACKS if entry.role in roles and not entry.of)
    made = [entry.name for entry in wanted if _predict(entry, bench, settings)]
    bench.free()
    folder = bench.run_dir / "predictions"
    found = Results(read_folder(folder), read_folder(folder / "val"), bench.priority, settings.bootstrap, settings.seed)
    return found.only(made if "candidate" in roles else [*made, *names_of("candidate")])


def _predict(entry: Track, bench: Bench, settings: EvaluationSettings | ComparisonSettings) -> bool:
    """Predictions of one model: the test photos into predictions/NAME.jsonl, the validation photos into predictions/val.

    What it has fitted goes into probes/. Only the test photos are timed; there nothing that another model has computed is
    used again. False where the settings leave the model out.
    """
    classifier = entry.make(bench, settings) if entry.make else None
    if classifier is None:
        return False
    parts = (("predictions/val", bench.val, 0), ("predictions", bench.test, LATENCY_PHOTOS))
    for folder, samples, timed in parts[bool(entry.of) :]:  # nothing is fitted to a further reading
        predict(
            classifier,
            samples,
            bench.image_root,
            bench.run_dir / folder / f"{entry.name}.jsonl",
            settings.eval_batch_size,
            latency_photos=timed,
            reuse=not timed,
            seed=settings.seed,
        )
    classifier.store(bench.run_dir / "probes")
    return True


def explain_examples(
    bench: Bench, settings: EvaluationSettings, results: Results, each: int = 2
) -> list["Explanation"]:
    """Why the tuned VLM says so, for some photos: right, wrong and of priority breeds, `each` of a kind."""
    from catlib.classifiers.explain import explain_prediction, pick_examples
    from catlib.classifiers.vlm import VLMClassifier
    from catlib.data.images import inside, open_image

    chosen = pick_examples(results.test[TUNED], bench.priority, each)
    classifier = VLMClassifier(load_vlm(bench, settings), bench.breeds, score_norm=settings.score_norm, name=TUNED)
    rows = [explain_prediction(classifier, open_image(inside(bench.image_root, p.image)), p.breed) for p in chosen]
    del classifier
    bench.free()
    return rows
