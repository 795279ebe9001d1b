"""Zero-shot CLIP and SigLIP against transformers' own forward pass, and the prompts behind them."""

import re

import numpy as np
import pytest
import torch
from tiny_encoders import ENCODERS, clip, photo, write_photos
from transformers import AutoModel, AutoProcessor

from catlib.breeds import BREEDS, find
from catlib.classifiers import clip as prompts
from catlib.classifiers.clip import ClipZeroShot
from catlib.classifiers.encoder import ClipEncoder, encoder_dtype
from catlib.classifiers.predict import predict
from catlib.errors import InputError

NAMES = ["Abyssinian", "Manx", "Siamese", "Extra-Toes Cat - Hemingway Polydactyl"]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(request, tmp_path_factory):
    return clip(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize(("own", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_computes_in_its_own_precision_and_a_cpu_in_float32(monkeypatch, own, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: own or including_emulation)
    gpu, cpu = torch.device("cuda:1"), torch.device("cpu")
    assert encoder_dtype("auto", gpu) is expected and encoder_dtype("auto", cpu) is torch.float32
    assert encoder_dtype("auto", torch.device("mps")) is torch.float32
    for device in (gpu, cpu):
        assert encoder_dtype("bfloat16", device) is torch.bfloat16 and encoder_dtype("float32", device) is torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENCODERS)
def test_plain_prompts_equal_the_softmax_of_the_models_own_logits(kind, tmp_path):
    """Photos of other shapes and names with capitals, which a tokenizer of SigLIP 2 would tell apart: it learned small letters."""
    folder = clip(tmp_path, kind)
    images = [photo(0), photo(1).resize((90, 30)), photo(2).resize((30, 70))]
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    sentences = [prompts.breed_prompts(name, "plain")[0] for name in NAMES]
    texts = processor.tokenizer(sentences, padding=True, return_tensors="pt")
    if kind.startswith("siglip"):
        small = [sentence.lower() for sentence in sentences]
        texts = {
            "input_ids": processor.tokenizer(small, padding="max_length", max_length=77, return_tensors="pt")[
                "input_ids"
            ]
        }
    pixels = processor.image_processor(images=images, return_tensors="pt")
    with torch.no_grad():
        expected = model(**texts, **pixels).logits_per_image.double().log_softmax(-1).numpy()
    batch = ClipZeroShot(ClipEncoder.load(str(folder)), NAMES, "plain").classify(images)
    assert np.abs(batch.log_probs - expected).max() < 1e-5 and np.ptp(expected, axis=0).max() > 1e-4
    assert list(batch.predicted) == [NAMES[i] for i in expected.argmax(1)]


def test_ensemble_is_the_normalised_mean_of_unit_vectors(folder):
    encoder = ClipEncoder.load(str(folder))
    classifier = ClipZeroShot(encoder, NAMES, "ensemble")
    for name, vector in zip(NAMES, classifier.text_vectors, strict=True):
        vectors = encoder.text_features(prompts.breed_prompts(name, "ensemble"))
        assert len(vectors) > 5 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        mean = vectors.mean(0)
        assert np.allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_scores_do_not_depend_on_the_batch_or_the_order(folder):
    encoder, images = ClipEncoder.load(str(folder)), [photo(i) for i in range(4)]
    whole = ClipZeroShot(encoder, NAMES).classify(images).log_probs
    single = np.concatenate([ClipZeroShot(encoder, NAMES).classify([image]).log_probs for image in images])
    turned = ClipZeroShot(encoder, NAMES[::-1]).classify(images).log_probs[:, ::-1]
    assert np.abs(whole - single).max() < 1e-4 and np.abs(whole - turned).max() < 1e-4


def test_features_of_known_photos_are_not_computed_again(folder, monkeypatch):
    encoder = ClipEncoder.load(str(folder))
    images, computed = [photo(i) for i in range(4)], []
    original = encoder.compute
    monkeypatch.setattr(encoder, "compute", lambda images: computed.append(len(images)) or original(images))
    first = encoder.features(images[:3], ["a", "b", "c"])["image_embedding"]
    second = encoder.features([images[2], images[3], images[0]], ["c", "d", "a"])["image_embedding"]
    assert computed == [3, 1]
    assert np.array_equal(second[[0, 2]], first[[2, 0]])
    encoder.features(images[:1])
    assert computed == [3, 1, 1]  # without ids nothing is looked up


def test_sidecar(folder, tmp_path):
    samples = write_photos(tmp_path / "photos", NAMES)
    out = tmp_path / "clip-zero-shot.jsonl"
    meta = predict(ClipZeroShot(ClipEncoder.load(str(folder)), NAMES), samples, tmp_path / "photos", out).meta
    assert meta["base_model"] == str(folder) and meta["prompt"].startswith("ensemble: a photo of an Abyssinian")


@pytest.mark.slow
def test_auto_takes_the_sentences_that_are_best_on_validation(folder, tmp_path):
    """What was tried and chosen stands in the sidecar; the prior correction takes each breed's mean logit off."""
    encoder, photos = ClipEncoder.load(str(folder)), tmp_path / "photos"
    vectors = encoder.of_samples(write_photos(photos, NAMES * 3), photos, "")[encoder.poolings[0]]
    said = {}
    for style in prompts.PROMPTS:
        logits = vectors @ ClipZeroShot(encoder, NAMES, style).text_vectors.T
        said |= {(style, False): logits.argmax(1), (style, True): (logits - logits.mean(0)).argmax(1)}
    samples = write_photos(photos, [NAMES[i] for i in said["traits", True]])  # these sentences are always right
    chosen = ClipZeroShot.choose(encoder, NAMES, samples, photos, "clip-zero-shot")
    right = {(row["prompts"], row["prior_corrected"]): row["accuracy"] for row in chosen.how["prompts_tried"]}
    assert right == {key: round(float((said["traits", True] == own).mean()), 4) for key, own in said.items()}
    best = next(key for key, accuracy in right.items() if accuracy == 1.0)  # the first of equal ones
    assert (chosen.prompts, bool(chosen.prior.any())) == best and min(right.values()) < 1
    out = predict(chosen, samples, photos, tmp_path / "clip-zero-shot.jsonl")
    assert all(p.predicted == p.breed for p in out.predictions)
    assert out.meta["prompts_tried"] == chosen.how["prompts_tried"] and (out.meta["prior"] is not None) is best[1]


def test_no_clip_there(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        ClipEncoder.load(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="cannot be loaded"):
        ClipEncoder.load(str(tmp_path))
    folder = clip(tmp_path / "clip")
    for file in folder.glob("*processor*"):
        file.unlink()
    with pytest.raises(InputError, match="processor"):
        ClipEncoder.load(str(folder))


def test_traits_become_sentences():
    sentences = prompts.breed_prompts("Abyssinian", "traits")
    assert len(sentences) >= 4 and all("Abyssinian cat" in sentence for sentence in sentences)
    ears = find("Abyssinian").traits.ears
    assert f"a photo of an Abyssinian cat with {ears} ears." in sentences
    assert set(sentences) < set(prompts.breed_prompts("Abyssinian", "ensemble"))


def test_a_breed_without_traits_keeps_its_plain_sentence(monkeypatch):
    monkeypatch.setattr(prompts, "find", lambda name: None)
    assert (
        prompts.breed_prompts("Moggy", "traits")
        == prompts.breed_prompts("Moggy", "plain")
        == ["a photo of a Moggy cat."]
    )


def test_every_breed_has_distinct_clean_sentences():
    for style in prompts.PROMPTS:
        seen = [sentence for breed in BREEDS for sentence in prompts.breed_prompts(breed.name, style)]
        assert len(set(seen)) == len(seen) and not any("{" in s or "  " in s or "Cat cat" in s for s in seen)


def test_every_sentence_reads_as_english():
    """Articles fit, a tail with rings stays one thing, and a name that another animal has stands beside the word cat."""
    every = {
        s: b.name
        for b in BREEDS
        for style in ("plain", "ensemble", "descriptions")
        for s in prompts.breed_prompts(b.name, style)
    }
    assert len(every) > 67 * 12
    for sentence, breed in every.items():
        text = sentence.casefold().replace("an m on", "")
        assert not re.search(r"\ba [aei]|\ban [^aeio]|, with|\bcat cat|\bno tail tail", text), sentence
        assert "cat" in text and sentence.endswith("."), (breed, sentence)
        names = [re.sub(" cat$", "", name.casefold()) for name in breed.split(" - ")]
        assert any(f"{name} cat" in text for name in names), (breed, sentence)  # not: a photo of a Chinchilla
    assert "a photo of a Chausie cat with a three-quarter-length tail with dark rings." in every
    assert any("calico, in white, orange and black" in sentence for sentence in every)


def test_photos_made_ready_ahead_give_the_same_features(folder):
    encoder = ClipEncoder.load(str(folder), "cpu")
    images = [photo(number) for number in range(3)]
    encoder.ahead = True
    ready = [encoder.prepare(image) for image in images]
    encoder.ahead = False
    assert encoder.prepare(images[0]) is images[0] and isinstance(ready[0], dict)
    for pooling, matrix in encoder.features(images).items():
        np.testing.assert_allclose(encoder.features(ready)[pooling], matrix, atol=1e-6)
