"""The driver behind every predictions file: order, resumption, bad photos, latency."""

import json

import numpy as np
import pytest
from tiny_encoders import write_photos

from catlib.classifiers.base import Batch, Classifier
from catlib.classifiers.predict import measure_latency, predict, read_batches
from catlib.data.images import ImageError
from catlib.data.records import Sample
from catlib.errors import InputError

BREEDS = ("Manx", "Persian", "Siamese")


class Colours(Classifier):
    """Scores by the mean colour; rounding depends on the batch on purpose, as that of a real model does."""

    name, breeds = "colours", BREEDS

    def __init__(self, stop_after: int | None = None, prompt: str = "?") -> None:
        self.stop_after, self.prompt, self.calls, self.seen_ids = stop_after, prompt, [], []

    def classify(self, images, ids=None) -> Batch:
        if self.stop_after is not None and len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(len(images))
        self.seen_ids.append(ids)
        means = np.array([np.asarray(image).mean(axis=(0, 1)) for image in images])
        probabilities = means / means.sum(1, keepdims=True)
        return self.from_log_probs(np.log(probabilities) + 1e-4 * means.mean())

    def describe(self):
        return {"prompt": self.prompt}


@pytest.fixture
def samples(tmp_path):
    return write_photos(tmp_path / "photos", [BREEDS[i % 3] for i in range(10)])


def lines(path):
    """The rows of a predictions file without their times."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "latency_ms"} for row in rows]


def test_predictions_keep_order_and_truth(tmp_path, samples):
    result = predict(Colours(), samples, tmp_path / "photos", tmp_path / "run" / "colours.jsonl", batch_size=4)
    assert [p.id for p in result.predictions] == [s.id for s in samples]
    assert [p.breed for p in result.predictions] == [s.breed for s in samples]
    assert all(p.predicted == BREEDS[int(np.argmax(p.scores))] and p.latency_ms > 0 for p in result.predictions)
    assert (
        result.meta["breeds"] == list(BREEDS)
        and result.meta["images_per_second"] > 0
        and result.meta["batch_size"] == 4
    )


@pytest.mark.parametrize("cut", [0, 17])
def test_an_interrupted_run_ends_with_the_same_file(tmp_path, samples, cut):
    whole = tmp_path / "whole.jsonl"
    predict(Colours(), samples, tmp_path / "photos", whole, batch_size=4)
    out = tmp_path / "part.jsonl"
    with pytest.raises(KeyboardInterrupt):
        predict(Colours(stop_after=2), samples, tmp_path / "photos", out, batch_size=4)
    assert len(lines(out)) == 8
    out.write_bytes(out.read_bytes()[: -cut or None])  # killed in the middle of a line
    again = Colours()
    predict(again, samples, tmp_path / "photos", out, batch_size=4)
    assert again.calls == ([4, 2] if cut else [2])  # a batch of which a line was lost is computed whole again
    assert lines(out) == lines(whole)


def test_nothing_is_left_to_do(tmp_path, samples):
    out = tmp_path / "colours.jsonl"
    first = predict(Colours(), samples, tmp_path / "photos", out, latency_photos=3)
    again = Colours(stop_after=0)
    second = predict(again, samples, tmp_path / "photos", out, latency_photos=3)
    assert again.calls == [] and second == first


@pytest.mark.parametrize("change", ["model", "photos", "resume"])
def test_another_run_starts_anew(tmp_path, samples, change):
    out = tmp_path / "colours.jsonl"
    predict(Colours(), samples, tmp_path / "photos", out)
    classifier = Colours(prompt="another" if change == "model" else "?")
    wanted = samples[:5] if change == "photos" else samples
    result = predict(classifier, wanted, tmp_path / "photos", out, resume=change != "resume")
    assert sum(classifier.calls) == len(wanted) == len(result.predictions)


def test_a_path_outside_the_root_is_refused(tmp_path, samples):
    (tmp_path / "secret.jpg").write_bytes((tmp_path / "photos" / "000.jpg").read_bytes())
    (tmp_path / "photos" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    for leak in ("../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg"):
        bad = [*samples[:2], Sample("leak", leak, (), {"breed": "Manx"})]
        with pytest.raises(InputError, match="leaves its image root"):
            predict(Colours(), bad, tmp_path / "photos", tmp_path / "out.jsonl")


def test_unreadable_photos_are_reported_or_raised(tmp_path, samples):
    (tmp_path / "photos" / "001.jpg").write_text("no photo")
    with pytest.raises(ImageError, match="001.jpg"):
        predict(Colours(), samples, tmp_path / "photos", tmp_path / "a.jsonl", batch_size=4)
    failed = []
    result = predict(
        Colours(),
        samples,
        tmp_path / "photos",
        tmp_path / "b.jsonl",
        4,
        on_error=lambda s, e: failed.append((s.id, str(e))),
    )
    assert [s for s, _ in failed] == ["photo-1"] and "001.jpg" in failed[0][1]
    assert [p.id for p in result.predictions] == [s.id for s in samples if s.id != "photo-1"]


def test_batches_of_unreadable_photos_only_are_left_out(tmp_path, samples):
    for i in range(4):
        (tmp_path / "photos" / f"{i:03}.jpg").unlink()
    batches = list(read_batches(samples, tmp_path / "photos", 4, on_error=lambda s, e: None))
    assert [[s.id for s in chunk] for chunk, _, _ in batches] == [
        [s.id for s in samples[4:8]],
        [s.id for s in samples[8:]],
    ]


def test_latency_is_that_of_single_photos_without_caches(tmp_path, samples):
    classifier = Colours()
    times = measure_latency(classifier, samples, tmp_path / "photos", n=5, warm_up=2)
    assert classifier.calls == [1] * 7 and classifier.seen_ids == [None] * 7
    assert len(times) == 5 and min(times) > 0


def test_a_rate_can_be_that_of_the_whole_work(tmp_path, samples):
    classifier = Colours()
    predict(classifier, samples, tmp_path / "photos", tmp_path / "colours.jsonl", batch_size=5, reuse=False)
    assert classifier.seen_ids == [None, None]  # without ids no kept feature is found
