"""`image_pool`: a quarter of the image tokens, in training, scoring, generation and heat maps alike, or refused with the reason."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import BREEDS, QUESTION, save_llava, save_pixtral, settings, write_dataset

from catlib.classifiers.vlm import VLMClassifier
from catlib.cli import main
from catlib.data.images import open_image
from catlib.data.records import read_samples
from catlib.errors import InputError
from catlib.serving.export import find_mergeable
from catlib.training.memory import Footprint, model_config
from catlib.training.trainer import train
from catlib.vlm.attribution import patch_gradients
from catlib.vlm.checkpoint import find_checkpoint, open_vlm
from catlib.vlm.decoding import generate_constrained, generate_free
from catlib.vlm.features import FrozenFeatures, compute_features, projector_input
from catlib.vlm.models import load_config
from catlib.vlm.prompting import inference_inputs
from catlib.vlm.scoring import LabelScorer

LLAVA_7B = "llava-hf/llava-1.5-7b-hf"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("pool")
    save_llava(root / "model")
    write_dataset(root / "data")
    return root


def options(place, out, **more):
    more = {"image_pool": 2, "watch_photos": 4, "train_projector": "full", "lora_dropout": 0.0, **more}
    return settings(place / "model", place / "data" / "vlm", place / out, **more)


@pytest.fixture(scope="module")
def trained(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATLIB_ROOT", str(place))
        yield train(options(place, "trained"))


def tokens(vlm, image):
    return int((inference_inputs(vlm, [image], [QUESTION])["input_ids"] == vlm.base.config.image_token_id).sum())


def losses(result):
    return [row.get("loss", row.get("val_loss")) for row in result.history]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("projector", ["full", "lora"])
def test_cached_equals_uncached_and_differs_from_all_tokens(place, trained, monkeypatch, projector):
    monkeypatch.setenv("CATLIB_ROOT", str(place))
    ways = [{"cache_features": True}, {"cache_features": False}, {"image_pool": 1}]
    results = [
        train(options(place, f"{projector}-{i}", train_projector=projector, epochs=1, **way))
        for i, way in enumerate(ways)
    ]
    cached, uncached, whole = map(losses, results)
    assert uncached == pytest.approx(cached, rel=1e-5)
    assert whole != pytest.approx(cached, rel=1e-2)
    assert results[0].best["accuracy"] == results[1].best["accuracy"]


@pytest.mark.slow
def test_the_checkpoint_is_used_as_it_was_trained(place, trained):
    vlm = open_vlm(trained.checkpoint, device="cpu", precision="float32")
    base = open_vlm(find_checkpoint(trained.checkpoint, tuned=False), device="cpu", precision="float32")
    samples = read_samples(place / "data" / "vlm" / "val.jsonl")
    images = [open_image(place / "data" / sample.image) for sample in samples]
    assert (tokens(vlm, images[0]), tokens(base, images[0])) == (4, 16)
    scorer = LabelScorer(vlm, BREEDS, QUESTION)
    true = [scorer.breeds.index(sample.breed) for sample in samples]
    scores = scorer.score(images)
    loss = -scores[range(len(true)), true].sum() / scorer.counts[true].sum()
    assert loss == pytest.approx(trained.best["val_loss"], rel=1e-4)
    classifier = VLMClassifier(vlm, BREEDS, decoding="score")
    assert classifier.classify(images).log_probs.argmax(1).tolist() == scores.argmax(1).tolist()
    assert len(generate_free(vlm, images, QUESTION)) == len(images)
    assert set(generate_constrained(vlm, images, QUESTION, BREEDS)) <= set(BREEDS)
    assert patch_gradients(vlm, images[0], QUESTION, samples[0].breed).shape == (2, 2)


@pytest.mark.slow
def test_the_projector_reads_means_and_the_cache_keeps_the_towers_vectors(place, trained, tmp_path):
    pooled, whole = (
        open_vlm(find_checkpoint(trained.checkpoint, tuned=tuned), device="cpu", precision="float32")
        for tuned in (True, False)
    )
    image = open_image(next((place / "data" / "photos").iterdir()))
    (kept,), (same,) = (compute_features(vlm, [image]) for vlm in (pooled, whole))
    assert torch.equal(kept.vectors, same.vectors) and torch.equal(kept.block, same.block)
    assert FrozenFeatures(pooled, tmp_path, 1.0).folder == FrozenFeatures(whole, tmp_path, 1.0).folder
    read = []
    first = next(module for module in pooled.projector.modules() if isinstance(module, torch.nn.Linear))
    first.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.inference_mode():
        pooled.base(**inference_inputs(pooled, [image], [QUESTION]))
        seen = projector_input(pooled, lambda: pooled.base(**inference_inputs(pooled, [image], [QUESTION])))
    grid = kept.vectors.view(4, 4, -1)
    expected = torch.stack([grid[i : i + 2, j : j + 2].mean((0, 1)) for i in (0, 2) for j in (0, 2)])
    torch.testing.assert_close(read[0][0], expected)
    torch.testing.assert_close(seen, kept.vectors)


@pytest.mark.slow
def test_other_engines_and_a_mixed_continuation_are_refused(place, trained, monkeypatch, capsys):
    monkeypatch.setenv("CATLIB_ROOT", str(place))
    with pytest.raises(InputError, match="image_pool 2: vLLM, llama.cpp"):
        find_mergeable(trained.checkpoint)
    folder, out = str(trained.checkpoint), str(place / "export")
    for command in (["export", "merge", "--out", out], ["serve", "--engine", "vllm"]):
        assert main([*command, "--checkpoint", folder]) == 2
        assert "Only catlib can use it" in capsys.readouterr().err
    with pytest.raises(InputError, match="init_adapter.*was trained with image_pool 2"):
        train(options(place, "mixed", init_adapter=folder, image_pool=1))
    record = trained.checkpoint / "training.json"
    text = record.read_text()
    record.write_text(text.replace('"image_pool": 2', '"image_pool": 3'))
    with pytest.raises(InputError, match="wrong kind"):
        find_checkpoint(trained.checkpoint)
    record.write_text(text)
    assert json.loads(text)["settings"]["image_pool"] == 2


@pytest.mark.slow
def test_photos_that_are_no_even_square_are_refused_before_weights_are_loaded(place, tmp_path, monkeypatch):
    monkeypatch.setattr("catlib.vlm.checkpoint.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    pixtral, odd = save_pixtral(tmp_path / "pixtral"), save_llava(tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    config["vision_config"]["image_size"] = 35
    (odd / "config.json").write_text(json.dumps(config))
    for model, message in ((pixtral, "no single square of tokens; LLaVA-1.5 has one"), (odd, "5 x 5 tokens")):
        with pytest.raises(InputError, match=f"image_pool: .*{message}"):
            train(options(place, tmp_path / "out", base_model=str(model)))
        with pytest.raises(InputError, match=message):
            Footprint(options(place, "x"), load_config(str(model)))


@pytest.mark.slow
def test_the_memory_estimate_knows_it():
    config = model_config(LLAVA_7B)
    whole, pooled = (
        Footprint(settings(LLAVA_7B, Path("data"), Path("out"), image_pool=pool, dtype="bfloat16"), config).at(4)
        for pool in (1, 2)
    )
    assert (whole.image_tokens, pooled.image_tokens) == (576, 144)
    assert whole.tower == pooled.tower and whole.features == pooled.features
    assert 0.2 < pooled.activations / whole.activations < 0.4
