"""Other families through the auto classes: they train on the answer alone, without cached features, save, load and score."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_families import save_gemma3, save_idefics3, save_mllama, save_qwen2_vl
from tiny_models import BREEDS, QUESTION, settings, write_dataset
from transformers import AutoConfig

from catlib.data.images import open_image
from catlib.training.trainer import train
from catlib.vlm.checkpoint import open_vlm
from catlib.vlm.families import FAMILIES, family_of
from catlib.vlm.models import empty_model
from catlib.vlm.prompting import label_tokens, messages
from catlib.vlm.scoring import LabelScorer


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({kind for family in FAMILIES for kind in family.model_types}))
def test_an_entry_names_parts_that_the_model_has(kind):
    config = AutoConfig.for_model(kind)
    config.get_text_config().num_hidden_layers = 1
    if kind == "aya_vision":  # transformers' own default of its tower, 1152 / 14, cannot be built
        config.vision_config.num_attention_heads = 16
    family = family_of(empty_model(config))
    assert family in FAMILIES and kind in family.model_types


@pytest.mark.slow
@pytest.mark.parametrize("save", [save_idefics3, save_qwen2_vl, save_gemma3, save_mllama])
def test_it_trains_on_the_language_model_saves_loads_and_scores(save, tmp_path, monkeypatch):
    monkeypatch.setenv("CATLIB_ROOT", str(tmp_path))
    model, data = save(tmp_path / "model"), write_dataset(tmp_path / "data")
    result = train(settings(model, data, tmp_path / "out", epochs=4, lr=5e-2, train_projector="lora"))
    losses = [row["val_loss"] for row in result.history if row["kind"] == "epoch"]
    assert losses[-1] < losses[0] - 1
    assert all(0 <= row["accuracy"] <= 1 for row in result.history if row["kind"] == "epoch")
    weights = load_file(result.checkpoint / "adapter_model.safetensors")
    assert all(weights[name].abs().max() > 0 for name in weights)
    assert not [n for n in weights if ("vision_model." in n or ".visual." in n) and "merger" not in n]
    images = [open_image(path) for path in sorted((tmp_path / "data" / "photos").iterdir())[:3]]
    tuned = open_vlm(result.checkpoint, device="cpu", precision="float32")
    scores = LabelScorer(tuned, BREEDS, QUESTION).score(images)
    assert np.allclose(scores, plain_scores(tuned, images), atol=1e-3)
    untuned = open_vlm(str(model), device="cpu", precision="float32")
    assert scores.mean() > LabelScorer(untuned, BREEDS, QUESTION).score(images).mean() + 1


def plain_scores(vlm, images):
    """The same log-likelihoods by one forward pass for each photo and breed, the processor's own inputs unaltered."""
    scores = np.zeros((len(images), len(BREEDS)))
    for i, image in enumerate(images):
        for j, breed in enumerate(BREEDS):
            turn, label = messages(QUESTION, breed), label_tokens(vlm, QUESTION, breed)
            turn[0]["content"][0] = {"type": "image", "image": image}
            inputs = vlm.processor.apply_chat_template(turn, tokenize=True, return_dict=True, return_tensors="pt")
            ids = inputs["input_ids"][0].tolist()
            start = next(k for k in reversed(range(len(ids))) if ids[k : k + len(label)] == label)
            with torch.no_grad():
                logits = vlm.base(**inputs).logits[0, start - 1 : start + len(label) - 1].log_softmax(-1)
            scores[i, j] = float(logits[range(len(label)), label].sum())
    return scores
