"""The VLM as a classifier: normalisation, prior correction chosen on validation only, what the sidecar says."""

import numpy as np
import pytest
import torch
from tiny_encoders import llava, photo, write_photos

from catlib.classifiers.predict import predict
from catlib.classifiers.vlm import VLMClassifier, choose_strength, fit_prior
from catlib.data.conversations import spelled_answers
from catlib.data.records import make_sample
from catlib.errors import InputError
from catlib.vlm.scoring import LabelScorer

BREEDS, QUESTION = ["Manx", "Extra-Toes Cat - Hemingway Polydactyl", "Siamese"], "Breed?"


@pytest.fixture(scope="module")
def vlm():
    return llava(question=QUESTION)


@pytest.mark.parametrize("norm", ["sum", "mean"])
def test_log_probs_are_the_normalised_scores(vlm, norm):
    images = [photo(i) for i in range(3)]
    scorer = LabelScorer(vlm, BREEDS, QUESTION)
    scores = scorer.score(images) / (scorer.counts if norm == "mean" else 1)
    batch = VLMClassifier(vlm, BREEDS, score_norm=norm).classify(images)
    assert np.allclose(batch.log_probs, scores - np.logaddexp.reduce(scores, axis=1, keepdims=True), atol=1e-5)
    assert list(batch.predicted) == [BREEDS[i] for i in scores.argmax(1)]


def test_prior_correction_subtracts_the_prompt_without_photo(vlm):
    images = [photo(0), photo(1)]
    scorer = LabelScorer(vlm, BREEDS, QUESTION)
    raw = scorer.score(images) - 0.7 * scorer.prior()
    batch = VLMClassifier(vlm, BREEDS, prior_strength=0.7).classify(images)
    assert np.allclose(batch.log_probs, raw - np.logaddexp.reduce(raw, axis=1, keepdims=True), atol=1e-5)


def test_strength_undoes_a_planted_prior():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 200)
    prior = np.array([0.0, -8.0, -3.0, -5.0])
    evidence = 3 * np.eye(4)[truth] + rng.normal(size=(200, 4))
    strength, table = choose_strength(evidence + prior, prior, truth)
    assert 0.7 <= strength <= 1.3
    assert table[str(strength)] == max(table.values()) > table["0.0"] + 0.3


def test_no_correction_where_it_changes_nothing():
    scores = 5 * np.eye(3)
    assert choose_strength(scores, np.zeros(3), [0, 1, 2])[0] == 0.0


def test_fitting_is_recorded_and_used(vlm, tmp_path):
    samples = write_photos(tmp_path / "photos", BREEDS * 3)
    classifier = fit_prior(VLMClassifier(vlm, BREEDS), samples, tmp_path / "photos", batch_size=4)
    scores = classifier.raw_scores([photo(i) for i in range(9)])
    expected, _ = choose_strength(scores, classifier.prior, [0, 1, 2] * 3)
    assert abs(classifier.prior_strength - expected) <= 0.1  # JPEG is not exactly the photo
    meta = predict(classifier, samples, tmp_path / "photos", tmp_path / "vlm-base.jsonl").meta
    assert meta["prior_correction"]["strength"] == classifier.prior_strength
    assert meta["prior_correction"]["fitted_on"] == 9 and len(meta["prior_correction"]["accuracy_by_strength"]) == 16


def test_correction_needs_scores(vlm, tmp_path):
    with pytest.raises(InputError, match="decoding 'score'"):
        fit_prior(VLMClassifier(vlm, BREEDS, decoding="free"), [], tmp_path)
    with pytest.raises(InputError, match="sorcery"):
        VLMClassifier(vlm, BREEDS, decoding="sorcery")


def test_free_answers_are_kept_and_parsed(vlm, monkeypatch):
    from catlib.classifiers import vlm as module

    monkeypatch.setattr(module, "generate_free", lambda *_: ["It is a Siamese cat.", "No idea."])
    batch = VLMClassifier(vlm, BREEDS, decoding="free").classify([photo(0), photo(1)])
    assert batch.predicted == ["Siamese", None] and batch.log_probs is None
    assert batch.answers == ["It is a Siamese cat.", "No idea."]


def test_what_settles_a_breed_is_read_off_the_answers_of_the_data():
    def sample(breed, answer):
        return make_sample("x", "x.jpg", "Breed?", answer, breed=breed, source="s", sha256="0", split="val")

    samples = [
        sample("Manx", "Manx. It shows in the photo as a cat. Look."),
        sample("Manx", "Manx. It is a cat."),
        sample("Siamese", "Siamese"),
        sample("Persian", "This is a Persian cat"),
        sample("Bengal", "Bengal."),
        sample("Bengal", "a Bengal"),
        sample("Birman", "no idea"),
    ]
    assert spelled_answers(samples) == {"Manx": "Manx.", "Persian": "This is a Persian cat"}


def test_predictions_of_a_model_trained_again_in_the_same_folder_are_not_taken_over(tmp_path):
    samples, out = write_photos(tmp_path / "photos", BREEDS), tmp_path / "vlm-tuned.jsonl"
    calls, made = [], []
    for change in (0.0, 0.0, 1.0):
        vlm = llava(question=QUESTION)
        with torch.no_grad():
            vlm.base.model.language_model.layers[0].mlp.down_proj.weight.add_(change)
        classifier = VLMClassifier(vlm, BREEDS)
        plain = classifier.classify
        classifier.classify = lambda images, ids=None, plain=plain: calls.append(len(images)) or plain(images, ids)
        made.append(predict(classifier, samples, tmp_path / "photos", out).predictions)
        calls.append("next")
    assert calls.count("next") == 3 and calls[-3] == "next" != calls[-2], (
        "the second takes over, the third predicts anew"
    )
    assert made[0] == made[1] != made[2]


def test_sidecar(vlm):
    meta = VLMClassifier(vlm, BREEDS, name="vlm-tuned").describe()
    assert len(meta.pop("weights")) == 16
    assert meta == {
        "base_model": "tiny",
        "adapter": None,
        "question": QUESTION,
        "decoding": "score",
        "device": "cpu",
        "dtype": "float32",
        "score_norm": "sum",
        "label_pass": "tree",
        "prior_correction": {"strength": 0.0},
    }


@pytest.mark.slow
@pytest.mark.parametrize("decoding", ["score", "constrained", "free"])
def test_photos_made_ready_ahead_give_the_same_predictions(vlm, tmp_path, decoding):
    samples = write_photos(tmp_path / "photos", BREEDS * 3)
    found = []
    for ahead in (False, True):
        classifier = VLMClassifier(vlm, BREEDS, decoding)
        classifier.ahead = ahead
        kept = predict(classifier, samples, tmp_path / "photos", tmp_path / f"{ahead}.jsonl", batch_size=4)
        found.append([(p.id, p.predicted, p.scores, p.answer) for p in kept.predictions])
    for (id, predicted, scores, answer), (other, *rest) in zip(*found, strict=True):
        assert (id, predicted, answer) == (other, rest[0], rest[2])
        assert scores is None or np.allclose(scores, rest[1], atol=1e-4)
