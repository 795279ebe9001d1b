"""What the notebooks start from: the photos of a run, evenly drawn, and the predictions in its folder."""

from collections import Counter
from dataclasses import replace

import pytest
from evaluation_cases import BREEDS, RARE, scored_set, truth, write_set
from PIL import Image
from tiny_encoders import clip, save_llava, tuned

from catlib.classifiers.tracks import TRACKS, ordered, track
from catlib.data.conversations import evenly
from catlib.data.records import make_sample, write_samples
from catlib.errors import InputError
from catlib.evaluation import runs
from catlib.evaluation.metrics_file import read_folder
from catlib.evaluation.results import Results
from catlib.files import read_json
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
    chosen = evenly(everything, 21, seed=3)
    assert Counter(s.breed for s in chosen) == {"Manx": 8, "Bengal": 5, "Birman": 8}
    assert chosen == evenly(everything, 21, seed=3) != evenly(everything, 21, seed=4)
    assert [s.id for s in chosen] == [s.id for s in everything if s in chosen]
    assert evenly(everything, 0, seed=0) == evenly(everything, 99, seed=0) == tuple(everything)


def test_predictions_of_a_folder_become_metrics_and_comparisons(tmp_path):
    true, val = truth(10), truth(6)
    for seed, name in enumerate(("clip-zero-shot", "vlm-tuned", "tower-probe")):
        write_set(scored_set(name, true, 0.6, seed=seed), tmp_path / "predictions")
        write_set(scored_set(name, val, 0.6, seed=seed, prefix="val"), tmp_path / "predictions" / "val")
    folder = tmp_path / "predictions"
    results = Results(read_folder(folder), read_folder(folder / "val"), RARE, bootstrap=100)
    kept = results.only(["vlm-tuned", "tower-probe", "vlm-base"])
    assert list(kept.test) == list(kept.val) == ["vlm-tuned", "tower-probe"]
    assert all(
        m["calibration"]["temperature"] > 0 and len(m["per_breed"]) == len(BREEDS) for m in results.models.values()
    )
    pairs = [(c["a"], c["b"]) for c in results.comparisons]
    assert pairs == [("vlm-tuned", "clip-zero-shot"), ("vlm-tuned", "tower-probe")]
    assert all(c["combination"] for c in results.comparisons) and results.versus["b"] == "clip-zero-shot"
    verdict = results.judge(ComparisonSettings())
    content = read_json(results.save(tmp_path, verdict))
    assert set(content) == {"models", "comparisons", "priority_breeds", "criteria", "recommendation"}
    tuned = content["models"]["vlm-tuned"]
    assert tuned["n"] == tuned["groups"] == 100 and 0 < tuned["brier"]["value"] < 2
    said = results.conclusion()
    assert f"{tuned['accuracy']['value']:.1%}" in said and f"{tuned['macro_f1']['value']:.1%}" in said


def test_models_stand_in_their_usual_order():
    assert ordered(["b", "clip-probe", "vlm-tuned", "a"]) == ["vlm-tuned", "clip-probe", "a", "b"]
    assert (track("mine").short, track("mine").marker, track("mine").first) == ("mine", "X", "mine")
    assert len({(t.color, t.marker) for t in TRACKS}) == len({t.name for t in TRACKS}) == len(TRACKS)


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
                rows.append(
                    make_sample(image, image, "Which?", breed, breed=breed, source="s", sha256=image, split=part)
                )
        write_samples(tmp_path / "vlm" / f"{part}.jsonl", rows)
    return {f"{part}_data": str(tmp_path / "vlm" / f"{part}.jsonl") for part in ("val", "test")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny tuned VLM that was trained with a question of its own."""
    folder = tmp_path_factory.mktemp("models")
    return tuned(folder / "tuned", save_llava(folder / "base"), ("Bengal", "Burmilla", "Manx"), "Tell me the breed.")


@pytest.mark.slow
def test_bench_holds_the_photos_that_the_settings_name(dataset, checkpoint, tmp_path):
    settings = EvaluationSettings(
        run_dir=str(tmp_path / "run"),
        priority_breeds="Burmilla",
        max_test_photos=3,
        base_model="",
        checkpoint=str(checkpoint),
        **dataset,
    )
    bench = runs.open_bench(settings)
    assert (len(bench.test), len(bench.val), bench.train, bench.priority) == (3, 6, (), ("Burmilla",))
    assert "3 test photos of 3 breeds" in bench.summary() and "Burmilla" in bench.summary()
    with pytest.raises(InputError, match="Sokoke"):
        runs.open_bench(replace(settings, priority_breeds="Sokoke"))
    with pytest.raises(InputError, match="nowhere"):
        runs.open_bench(replace(settings, checkpoint=str(tmp_path / "nowhere")))
    train = {"train_data": dataset["test_data"].replace("test.jsonl", "train.jsonl")}
    with pytest.raises(InputError, match="6 of 6 test photos.*trained on"):
        runs.open_bench(replace(settings, test_data=train["train_data"], max_test_photos=0))
    comparison = ComparisonSettings(run_dir=str(tmp_path / "run"), clip_model="", **dataset, **train)
    with pytest.raises(InputError, match="notebook 03_evaluation"):
        runs.predict_opponents(runs.open_bench(comparison), comparison)


@pytest.mark.long
@pytest.mark.slow
def test_the_model_is_asked_what_it_was_trained_with_unless_told_otherwise(dataset, checkpoint, tmp_path):
    folder = tmp_path / "run"
    settings = EvaluationSettings(
        run_dir=str(folder),
        base_model="",
        checkpoint=str(checkpoint),
        priority_breeds="Manx",
        dtype="float32",
        bootstrap=100,
        **dataset,
    )
    results = runs.predict_candidates(runs.open_bench(settings), settings)
    assert list(results.test) == ["vlm-tuned", "vlm-base"] and set(results.val) == set(results.test)
    for name, predictions in results.test.items():
        meta = predictions.meta
        assert meta["question"] == "Tell me the breed." and (meta["adapter"] is not None) == (name == "vlm-tuned")
        assert {"weights", "decoding", "device", "dtype", "seed", "versions", "commit", "images_per_second"} <= set(
            meta
        )
        assert all(p.group for p in predictions.predictions)
    scores = {name: [p.scores for p in s.predictions] for name, s in results.test.items()}
    assert scores["vlm-tuned"] != scores["vlm-base"]
    other = replace(settings, prompt="Which cat is it?", evaluate_base=False)
    bench = runs.open_bench(other)
    assert "Which cat is it?" in bench.summary() and "Tell me the breed." in bench.summary()
    results = runs.predict_candidates(bench, other)
    assert list(results.test) == ["vlm-tuned"] and results.test["vlm-tuned"].meta["question"] == "Which cat is it?"
    rows = runs.explain_examples(bench, other, results, each=1)
    assert rows and all(row.seen.size == (28, 28) for row in rows)
    comparison = ComparisonSettings(
        run_dir=str(folder),
        base_model=str(checkpoint.parent / "base"),
        clip_model="",
        train_data=dataset["test_data"].replace("test.jsonl", "train.jsonl"),
        dtype="float32",
        priority_breeds="Manx",
        bootstrap=100,
        **dataset,
    )
    results = runs.predict_opponents(runs.open_bench(comparison), comparison)
    assert list(results.test) == ["vlm-tuned", "vlm-base", "tower-probe", "tower-knn"]
    assert (folder / "probes" / "tower-probe.npz").is_file() and results.versus["b"] in ("tower-probe", "tower-knn")


@pytest.mark.slow
def test_tracks_predict_further_sets_of_photos(dataset, tmp_path):
    """Photos of none of the breeds and changed ones, each set in a folder; what a track computes for one never serves another."""
    folder = tmp_path / "run"
    (tmp_path / "others").mkdir()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "others/red.png")
    settings = ComparisonSettings(
        run_dir=str(folder),
        clip_model=str(clip(tmp_path / "clip")),
        opponents="linear",
        train_data=dataset["test_data"].replace("test.jsonl", "train.jsonl"),
        unknown_data=str(tmp_path / "others"),
        robustness="crop,grey",
        priority_breeds="Manx",
        bootstrap=100,
        **dataset,
    )
    bench = runs.open_bench(settings)
    chosen = [entry for entry in TRACKS if entry.name in ("clip-zero-shot", "clip-probe", "clip-lora", "dino-probe")]
    assert runs.predict_tracks(chosen, bench, settings) == ["clip-zero-shot", "clip-probe"]
    sets = {name: read_folder(folder / "predictions" / name) for name in ("crop", "grey", "unknown")}
    assert all(list(ordered(found)) == ["clip-zero-shot", "clip-probe"] for found in sets.values())
    assert all(p.energy is not None for found in sets.values() for s in found.values() for p in s.predictions)
    assert {len(found["clip-probe"].predictions) for found in sets.values()} == {1, 6}
    assert sets["grey"]["clip-probe"].meta["photos"] == "grey"
    models = runs._found(bench, settings).models
    assert set(models["clip-probe"]["further"]) == {"crop", "grey", "unknown"}
    assert models["clip-zero-shot"]["further"]["unknown"]["energy"]["ci95"]
    with pytest.raises(InputError, match="expected some of linear.*lora"):
        runs.predict_tracks(chosen, bench, replace(settings, opponents="boosting"))
