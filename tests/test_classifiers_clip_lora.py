"""CLIP and SigLIP tuned by LoRA: what learns, on which photos, and how a run takes it up again."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_encoders import clip

from catlib.classifiers import clip_lora
from catlib.classifiers.clip import ClipZeroShot
from catlib.classifiers.encoder import ClipEncoder
from catlib.classifiers.predict import predict
from catlib.data.images import open_image
from catlib.data.records import Sample
from catlib.serving.winner import open_winner

BREEDS = ("Manx", "Persian", "Siamese")


def striped(folder, each=8):
    """Photos of stripes, as wide as the breed says; two photos of a cat."""
    folder.mkdir(exist_ok=True)
    samples, rng = [], np.random.default_rng(0)
    for i in range(each * len(BREEDS)):
        breed, cat = i % len(BREEDS), i // 2 // len(BREEDS)
        wave = np.sin(np.arange(28) * (0.25, 0.7, 2.0)[breed] + cat)[None, :, None] * 90 + 128
        pixels = np.clip(wave + rng.normal(scale=9, size=(28, 28, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        samples.append(Sample(f"p{i}", f"{i}.png", (), {"breed": BREEDS[breed], "group": f"{BREEDS[breed]} {cat}"}))
    return samples


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_vision_tower_learns_and_a_second_run_takes_it_up(kind, tmp_path, monkeypatch):
    base, photos, folder = clip(tmp_path / "clip", kind), tmp_path / "photos", tmp_path / "run/probes/clip-lora"
    samples = striped(photos)
    monkeypatch.setitem(clip_lora.TRAINER, "learning_rate", 0.02)
    monkeypatch.setitem(clip_lora.TRAINER, "per_device_train_batch_size", 4)
    monkeypatch.setattr(clip_lora, "EPOCHS", 8)
    monkeypatch.setattr(clip_lora, "STEPS", 0)
    plain = ClipZeroShot(ClipEncoder.load(str(base)), BREEDS, "plain")
    before = {name: x.clone() for name, x in plain.encoder.model.state_dict().items()}

    def tune(samples=samples, **how):
        fresh = ClipZeroShot(ClipEncoder.load(str(base)), BREEDS, "plain", "clip-lora")
        return clip_lora.tuned_clip(fresh, samples, photos, folder, **how)

    made = tune()
    moved = {name for name, x in made.encoder.model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved and all("vision_model" in n and n.split(".")[-2] in ("q_proj", "k_proj", "v_proj") for n in moved)
    assert len(moved) == 3 * made.encoder.model.config.vision_config.num_hidden_layers
    assert sum(len(x.shape) == 2 and 2 in x.shape for x in load_file(folder / "adapter_model.safetensors").values())
    report = made.how["lora"]
    assert report["trained_on"] + report["held_out"] == len(samples) and 4 <= report["held_out"] <= 10
    assert min(report["held_out_losses"]) < report["held_out_losses"][0]

    def loss(classifier, name):
        found = predict(classifier, samples, photos, tmp_path / f"run/predictions/{name}.jsonl").predictions
        return -np.mean([p.scores[BREEDS.index(p.breed)] for p in found])

    after = loss(made, "clip-lora")
    assert after < loss(plain, "clip-zero-shot") - 0.005

    def refused(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(clip_lora, "_train", refused)
    again = tune()
    assert again.how == made.how and loss(again, "again") == pytest.approx(after, abs=1e-5)
    assert again.describe()["weights"] == made.describe()["weights"] != plain.describe()["weights"]
    (tmp_path / "run/metrics.json").write_text("{}")
    served = open_winner(tmp_path / "run", "clip-lora", "cpu").classifier  # as predict --run and serve --run open it
    images = [open_image(photos / sample.image) for sample in samples[:4]]
    assert np.allclose(served.classify(images).log_probs, made.classify(images).log_probs, atol=1e-5)
    about = (folder / "about.json").read_text()
    for other in ({"seed": 1}, {"balance": "sqrt"}, {"samples": samples[:-1]}):
        with pytest.raises(AssertionError, match="trained again"):
            tune(**other)
        assert not (folder / "about.json").exists()  # what lies there is not taken for the other training
        (folder / "about.json").write_text(about)


def test_held_out_groups_are_never_trained_on(tmp_path, monkeypatch):
    seen = {}

    class Watched(clip_lora.Trainer):
        def __init__(self, *args, **options):
            seen.update(options)
            super().__init__(*args, **options)

        def train(self):
            batch = self.data_collator(self.train_dataset[:3])
            assert batch["weights"].shape == (3,) and self.model(**batch)["loss"].requires_grad

    monkeypatch.setattr(clip_lora, "Trainer", Watched)
    samples = striped(tmp_path / "photos")[:-5]
    fresh = ClipZeroShot(ClipEncoder.load(str(clip(tmp_path / "clip"))), BREEDS)
    clip_lora.tuned_clip(fresh, samples, tmp_path / "photos", tmp_path / "lora", balance="uniform")
    trained, held = ({row[0].group for row in seen[f"{part}_dataset"]} for part in ("train", "eval"))
    assert held and not trained & held and len(seen["eval_dataset"]) >= 3
    weight = {
        breed: sum(r[2] for p in ("train", "eval") for r in seen[f"{p}_dataset"] if r[0].breed == breed)
        for breed in BREEDS
    }
    assert np.ptp(list(weight.values())) < 1e-9
    collate, row = seen["data_collator"], seen["eval_dataset"][0]
    assert torch.equal(
        collate([row])["pixel_values"], collate([row])["pixel_values"]
    )  # held-out photos stay as they are
    row = seen["train_dataset"][0]
    assert not torch.equal(collate([row])["pixel_values"], collate([row])["pixel_values"])
