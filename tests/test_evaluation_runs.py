"""What the notebooks start from: the photos of a run, evenly drawn, and the predictions in its folder."""

from collections import Counter
from dataclasses import replace

import pytest
from catlib.evaluation.names import ordered
from evaluation_cases import BREEDS, RARE, scored_set, truth, write_set
from PIL import Image

from catlib.data.records import make_sample, write_samples
from catlib.errors import InputError
from catlib.evaluation import runs
from catlib.evaluation.inputs import compare_all, evaluate_all, read_folder
from catlib.settings import ComparisonSettings, EvaluationSettings


def samples(photos):
    return [
        make_sample(
            f"{breed}-{i}", f"{breed}/{i}.jpg", "Which?", breed, breed=breed, source="s", sha256="0", split="test"
        )
        for breed, count in photos.items()
        for i in range(count)
    ]


def test_a_limited_test_set_is_drawn_evenly_over_breeds_and_repeats():
    everything = samples({"Manx": 40, "Bengal": 5, "Birman": 12})
    chosen = runs.evenly(everything, 21, seed=3)
    assert Counter(s.breed for s in chosen) == {"Manx": 8, "Bengal": 5, "Birman": 8}
    assert chosen == runs.evenly(everything, 21, seed=3) != runs.evenly(everything, 21, seed=4)
    assert [s.id for s in chosen] == [s.id for s in everything if s in chosen]
    assert runs.evenly(everything, 0, seed=0) == runs.evenly(everything, 99, seed=0) == tuple(everything)


def test_predictions_of_a_folder_become_metrics_and_comparisons(tmp_path):
    true, val = truth(10), truth(6)
    for seed, name in enumerate(("clip-zero-shot", "vlm-tuned", "tower-probe")):
        write_set(scored_set(name, true, 0.6, seed=seed), tmp_path / "predictions")
        write_set(scored_set(name, val, 0.6, seed=seed, prefix="val"), tmp_path / "predictions" / "val")
    results = runs.Results(read_folder(tmp_path / "predictions"), read_folder(tmp_path / "predictions" / "val"))
    kept = results.only(["vlm-tuned", "tower-probe", "vlm-base"])
    assert list(kept.test) == list(kept.val) == ["vlm-tuned", "tower-probe"]
    models = evaluate_all(results.test, results.val, RARE, bootstrap=100, seed=0)
    assert all(m["calibration"]["temperature"] > 0 and len(m["per_breed"]) == len(BREEDS) for m in models.values())
    comparisons = compare_all(results.test, results.val, RARE, bootstrap=100, seed=0)
    assert [(c["a"], c["b"]) for c in comparisons] == [("vlm-tuned", "clip-zero-shot"), ("vlm-tuned", "tower-probe")]
    assert all(c["combination"] for c in comparisons)


def test_models_stand_in_their_usual_order():
    assert ordered(["b", "clip-probe", "vlm-tuned", "a"]) == ["vlm-tuned", "clip-probe", "a", "b"]


@pytest.fixture
def dataset(tmp_path):
    """A finished split of two photos a part and breed, as the data room leaves it to foreign JSONL: without a card."""
    for part in ("train", "val", "test"):
        rows = []
        for breed in ("Bengal", "Burmilla", "Manx"):
            for i in range(2):
                image = f"images/{part}-{breed}-{i}.jpg"
                (tmp_path / "images").mkdir(exist_ok=True)
                Image.new("RGB", (8, 8)).save(tmp_path / image)
                rows.append(make_sample(image, image, "Which?", breed, breed=breed, source="s", sha256="0", split=part))
        write_samples(tmp_path / "vlm" / f"{part}.jsonl", rows)
    return {f"{part}_data": str(tmp_path / "vlm" / f"{part}.jsonl") for part in ("val", "test")}


def test_bench_holds_the_photos_that_the_settings_name(dataset, tmp_path):
    settings = EvaluationSettings(
        run_dir=str(tmp_path / "run"), priority_breeds="Burmilla", max_test_photos=3, **dataset
    )
    bench = runs.open_bench(settings)
    assert (len(bench.test), len(bench.val), bench.train, bench.priority) == (3, 6, (), ("Burmilla",))
    assert bench.summary() == "3 test photos of 3 breeds; priority breeds: Burmilla."
    with pytest.raises(InputError, match="Sokoke"):
        runs.open_bench(replace(settings, priority_breeds="Sokoke"))
    train = {"train_data": dataset["test_data"].replace("test.jsonl", "train.jsonl")}
    comparison = ComparisonSettings(run_dir=str(tmp_path / "run"), clip_model="", **dataset, **train)
    with pytest.raises(InputError, match="notebook 03_evaluation"):
        runs.predict_clip_and_probes(runs.open_bench(comparison), comparison)
