"""Linear probes: chosen without looking at test photos, fair to rare breeds, saved without pickle."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tiny_encoders import clip, llava, photo, write_photos
from transformers import AutoModel, BitImageProcessor, Dinov2Config, Dinov2WithRegistersConfig

from catlib.classifiers.encoder import ClipEncoder, DinoEncoder, FeatureExtractor, TowerEncoder
from catlib.classifiers.opponents import KINDS, MAX_FOLDS, Photos, choose_and_fit, deal_folds
from catlib.classifiers.predict import predict
from catlib.classifiers.probe import Probe
from catlib.data.images import open_image
from catlib.data.records import Sample
from catlib.errors import InputError

BREEDS = ["Manx", "Persian", "Siamese", "York Chocolate"]


class MeanColour(FeatureExtractor):
    """Two poolings: the mean colour, which tells the planted breeds apart, and noise."""

    name, poolings = "colour", ("noise", "colour")

    def compute(self, images):
        rng = np.random.default_rng(len(images))
        colours = np.array([np.asarray(image).mean(axis=(0, 1)) for image in images])
        return {"noise": rng.normal(size=(len(images), 5)), "colour": colours}

    def describe(self):
        return {"base_model": "colour"}


def coloured(folder, counts: dict[str, int]) -> list[Sample]:
    from PIL import Image

    folder.mkdir()
    samples = []
    for breed, count in counts.items():
        for i in range(count):
            level = 40 + 60 * BREEDS.index(breed)
            Image.new("RGB", (8, 8), (level + i % 5, 200 - level // 2, i % 7)).save(folder / f"{breed}-{i}.png")
            samples.append(Sample(f"{breed}-{i}", f"{breed}-{i}.png", (), {"breed": breed}))
    return samples


def clouds(counts: list[int], width: int = 6, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    return 3 * rng.normal(size=(len(counts), width))[labels] + rng.normal(size=(len(labels), width)), labels


def test_folds_never_hold_out_all_photos_of_a_breed():
    _, labels = clouds([40, 7, 2, 1, 5])
    folds = deal_folds(labels, seed=0)
    for fold in range(MAX_FOLDS):
        assert set(labels[folds != fold]) == set(labels)
    assert folds[labels == 3].tolist() == [-1]
    assert len(set(folds[labels == 2])) == 2
    sizes = np.bincount(folds[folds >= 0])
    assert len(sizes) == MAX_FOLDS and sizes.max() - sizes.min() <= 1
    assert np.array_equal(folds, deal_folds(labels, seed=0)) and not np.array_equal(folds, deal_folds(labels, seed=1))


def test_no_group_stands_in_two_folds():
    """Cats of three photos, and of one breed a single cat, which is always trained on."""
    labels, cats = np.repeat([0, 1, 2], [30, 12, 3]), np.repeat(np.arange(15), 3)
    folds = deal_folds(labels, 0, cats)
    assert all(len(set(folds[cats == cat])) == 1 for cat in range(15)) and set(folds[labels == 2]) == {-1}
    for fold in range(MAX_FOLDS):
        assert set(labels[folds != fold]) == {0, 1, 2}


def photos_of(features, labels, breeds, weights=None, text=None):
    features = features if isinstance(features, dict) else {"a": features}
    features = {key: matrix.astype(np.float32) for key, matrix in features.items()}
    weights = np.ones(len(labels)) if weights is None else weights
    return Photos(features, labels, breeds, weights, deal_folds(labels, 0), text or {})


def scores(kind, photos, x, **settings):
    way = KINDS[kind]
    return way.scores(way.fit(next(iter(photos.features.values())), photos, **settings), x.astype(np.float32))


def test_fit_equals_scikit_learn():
    features, labels = clouds([30, 20, 10])
    found = log_softmax(scores("linear", photos_of(features, labels, 3), features, C=0.1), axis=1)
    scaler = StandardScaler().fit(features)
    reference = LogisticRegression(C=0.1, max_iter=2000, tol=1e-8).fit(scaler.transform(features), labels)
    assert np.abs(np.exp(found) - reference.predict_proba(scaler.transform(features))).max() < 5e-3


@pytest.mark.parametrize("counts", [[30, 20, 0, 5], [30, 0, 0, 8], [30, 0, 0, 0]])
def test_breeds_without_training_photos_are_never_predicted_but_scored(counts):
    features, labels = clouds(counts)
    log_probs = log_softmax(scores("linear", photos_of(features, labels, 4), features, C=0.1), axis=1)
    assert np.isfinite(log_probs).all() and np.allclose(np.exp(log_probs).sum(1), 1, atol=1e-5)
    assert (log_probs.argmax(1) == labels).mean() > 0.9
    assert all((log_probs[:, breed] < np.log(1e-6)).all() for breed, count in enumerate(counts) if not count)


@pytest.mark.slow
def test_cross_validation_picks_the_pooling_and_the_penalty_that_generalise():
    informative, labels = clouds([30, 30, 30], width=8)
    noise = np.random.default_rng(1).normal(size=(90, 60))
    pooling, _, report = choose_and_fit("linear", photos_of({"noise": noise, "informative": informative}, labels, 3))
    assert pooling == report["pooling"] == "informative"
    own = [r for r in report["tried"] if r["pooling"] == "informative"]
    assert report["C"] == min(own, key=lambda r: r["log_loss"])["C"]
    _, _, on_noise = choose_and_fit("linear", photos_of({"noise": noise}, labels, 3))
    assert on_noise["C"] < report["C"]  # features that say nothing are best ignored


@pytest.mark.slow
def test_the_penalty_s_grid_goes_on_until_the_loss_turns():
    features, labels = clouds([60, 60, 60], width=6)
    features *= np.array([1.0, 1e-1, 1, 1, 1, 1])
    _, _, report = choose_and_fit("linear", photos_of(features + 2 * np.eye(6)[labels], labels, 3))
    grid = [row["C"] for row in report["tried"]]
    best = min(report["tried"], key=lambda row: row["log_loss"])
    assert best["C"] < max(grid) or max(grid) >= 1e5 or best["log_loss"] == 0


def test_weights_move_the_fit_to_rare_breeds():
    """Two overlapping clouds, 40 to 4: with equal weight for each breed more of the rare one is found."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [200, 20])
    features = rng.normal(size=(220, 2)) + labels[:, None]
    weights = np.where(labels == 1, 5.5, 0.55)
    found = [
        (scores("linear", photos_of(features, labels, 2, w), features, C=1.0).argmax(1) == 1)[labels == 1].mean()
        for w in (None, weights)
    ]
    assert found[1] > found[0] + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "knn", "tip-adapter", "projection"])
def test_every_kind_learns_what_is_planted_and_its_settings_are_chosen(kind):
    features, labels = clouds([24, 24, 12], width=6)
    rng = np.random.default_rng(3)
    texts = rng.normal(size=(3, 6))
    text = {
        "texts": texts / np.linalg.norm(texts, axis=1, keepdims=True),
        "scale": np.array(10.0),
        "projection": np.eye(6),
    }
    names = {"image_embedding": features, "before_projection": features}
    pooling, arrays, report = choose_and_fit(kind, photos_of(names, labels, 3, text=text))
    found = KINDS[kind].scores(arrays, features.astype(np.float32))
    assert (found.argmax(1) == labels).mean() > 0.9 and np.isfinite(found).all()
    assert report["folds"] == MAX_FOLDS and set(KINDS[kind].grid) <= set(report)
    assert pooling == {"tip-adapter": "image_embedding", "projection": "before_projection"}.get(kind, pooling)
    if kind in ("tip-adapter", "projection"):  # the sentences alone, which are planted wrong, know nothing
        alone = (features / np.linalg.norm(features, axis=1, keepdims=True)) @ text["texts"].T
        assert (alone.argmax(1) == labels).mean() < 0.8


def test_single_photos_only_still_fit():
    features, labels = clouds([1, 1, 1])
    _, arrays, report = choose_and_fit("linear", photos_of(features, labels, 3))
    assert report["folds"] == 0 and (KINDS["linear"].scores(arrays, features).argmax(1) == labels).all()


@pytest.mark.slow
def test_probe_from_photos_to_predictions_and_back_from_disk(tmp_path):
    samples = coloured(tmp_path / "photos", {"Manx": 12, "Persian": 9, "Siamese": 2})
    probe = Probe.fit(MeanColour(), BREEDS, samples, tmp_path / "photos", "clip-probe", batch_size=4)
    assert probe.report["pooling"] == "colour" and probe.report["trained_on"] == 23
    result = predict(probe, samples, tmp_path / "photos", tmp_path / "clip-probe.jsonl")
    assert np.mean([p.predicted == p.breed for p in result.predictions]) == 1
    assert result.meta["probe"]["C"] == probe.report["C"]
    probe.save(tmp_path / "probe.npz")
    again = Probe.load(tmp_path / "probe.npz", MeanColour())
    images = [photo(i) for i in range(3)]
    assert np.array_equal(again.classify(images).log_probs, probe.classify(images).log_probs)
    assert again.describe() == probe.describe() and again.breeds == tuple(BREEDS)


@pytest.mark.slow
def test_wrong_files_are_named(tmp_path):
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(InputError, match="not a saved linear probe"):
        Probe.load(tmp_path / "text.npz", MeanColour())
    np.savez(tmp_path / "evil.npz", about=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="not a saved linear probe"):
        Probe.load(tmp_path / "evil.npz", MeanColour())
    samples = coloured(tmp_path / "photos", {"Manx": 2, "Persian": 2})
    Probe.fit(MeanColour(), BREEDS, samples, tmp_path / "photos", "p").save(tmp_path / "p.npz")
    other = MeanColour()
    other.describe = lambda: {"base_model": "another"}
    with pytest.raises(InputError, match="fitted on features of colour"):
        Probe.load(tmp_path / "p.npz", other)
    with pytest.raises(InputError, match="Persian"):
        Probe.fit(MeanColour(), ["Manx", "Siamese"], samples, tmp_path / "photos", "p")


def test_tower_features_are_what_the_language_model_is_shown():
    vlm, images = llava(), [photo(0), photo(1)]
    features = TowerEncoder(vlm).features(images)
    pixels = vlm.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    shown = vlm.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1].detach().numpy()
    assert np.allclose(features["cls"], shown[:, 0], atol=1e-5) and np.allclose(
        features["mean"], shown[:, 1:].mean(1), atol=1e-5
    )


@pytest.mark.slow
def test_probes_on_the_real_kinds_of_features(tmp_path):
    samples = write_photos(tmp_path / "photos", BREEDS * 2)
    for extractor in (ClipEncoder.load(str(clip(tmp_path / "clip"))), TowerEncoder(llava())):
        probe = Probe.fit(extractor, BREEDS, samples, tmp_path / "photos", "probe")
        result = predict(probe, samples, tmp_path / "photos", tmp_path / f"{probe.extractor.poolings[0]}.jsonl")
        whole = probe.classify([open_image(tmp_path / "photos" / s.image) for s in samples]).log_probs
        assert np.allclose([p.scores for p in result.predictions], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("registers", [0, 4])
def test_dino_features_are_the_class_token_and_the_mean_of_the_patches(tmp_path, registers):
    kind = Dinov2WithRegistersConfig if registers else Dinov2Config
    more = {"num_register_tokens": registers} if registers else {}
    config = kind(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7, **more)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(tmp_path / "dino")
    size = {"size": {"height": 28, "width": 28}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessor(**size).save_pretrained(tmp_path / "dino")
    encoder = DinoEncoder.load(str(tmp_path / "dino"))
    found = encoder.compute([photo(0), photo(1)])
    pixels = encoder.processor(images=[photo(0), photo(1)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = encoder.model(pixels).last_hidden_state
    assert hidden.shape[1] == 1 + registers + 16
    assert np.allclose(found["cls"], hidden[:, 0], atol=1e-6)
    assert np.allclose(found["cls+mean"][:, 16:], hidden[:, 1 + registers :].mean(1), atol=1e-6)
    samples = coloured(tmp_path / "photos", {"Manx": 6, "Persian": 6})
    probe = Probe.fit(encoder, BREEDS, samples, tmp_path / "photos", "dino-probe")
    probe.save(tmp_path / "dino-probe.npz")
    again, images = Probe.load(tmp_path / "dino-probe.npz"), [photo(2)]
    assert np.array_equal(again.classify(images).log_probs, probe.classify(images).log_probs)
    assert again.extractor.kind == "dino" and probe.describe()["base_model"] == str(tmp_path / "dino")
    with pytest.raises(InputError, match="not a DINOv2"):
        DinoEncoder.load(str(clip(tmp_path / "clip")))
    with pytest.raises(InputError, match="cannot be loaded"):
        DinoEncoder.load(str(tmp_path / "photos"))
