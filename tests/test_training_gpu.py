"""The fused layers' way on a GPU, imitated on a CPU and taken on a GPU where there is one: `pytest -m gpu`."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_llava, save_wide_llava, settings, write_dataset
from transformers.models.llama import modeling_llama

from catlib.data.records import read_samples
from catlib.settings import TrainSettings
from catlib.training import dropout, kernels, run
from catlib.training.kernels import constant_factors, fuse
from catlib.training.lora import add_lora, recompute
from catlib.training.loss import AnswerLoss
from catlib.training.trainer import train
from catlib.vlm.batches import Collator
from catlib.vlm.checkpoint import open_vlm
from catlib.vlm.features import FrozenFeatures

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu")
    save_llava(root / "model")
    save_wide_llava(root / "wide")
    write_dataset(root / "data")
    return root


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_gpu)])
def device(request, monkeypatch):
    """On a CPU, torch's kernels in place of the hand-written ones, as on a GPU; what is patched in transformers is undone."""
    monkeypatch.setattr(dropout, "on_gpu", lambda x: True)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    return request.param


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    return "cuda"


def wrapped(place, device, precision="float32", model="model", **more):
    """A model with LoRA whose B is drawn, so that A has a gradient, and a batch of two photos with cached features."""
    torch.manual_seed(0)
    vlm = open_vlm(str(place / model), device=device, precision=precision)
    add_lora(vlm, TrainSettings(**{"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **more}))
    draw = torch.Generator().manual_seed(1)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            parameter.data = (0.2 * torch.randn(parameter.shape, generator=draw)).to(parameter)
    samples = read_samples(place / "data" / "vlm" / "train.jsonl")[:2]
    cache = FrozenFeatures(vlm, place / f"features-{device}-{model}-{precision}", 1.0)
    cache.fill([(place / "data" / s.image, s.metadata["sha256"]) for s in samples])
    return vlm, Collator(vlm, place / "data", cache)(samples).to(vlm.device)


def gradient(vlm, batch, seed=0, low=False):
    """(loss, gradients of what is trained, one after the other)"""
    vlm.model.train()
    vlm.model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast(vlm.device.type, torch.bfloat16, enabled=low):
        loss, n = AnswerLoss(vlm)(batch)
    (loss / n).backward()
    return float(loss.detach()) / n, torch.cat([p.grad.flatten().double() for p in trained(vlm)])


def trained(vlm):
    return [p for p in vlm.model.parameters() if p.requires_grad]


def error(found, reference):
    return float((found[1] - reference[1]).norm() / reference[1].norm())


@pytest.mark.slow
def test_fused_gradients_equal_autograds(place, device):
    vlm, batch = wrapped(place, device)
    plain = gradient(vlm, batch)
    assert fuse(vlm.model) > 0
    assert modeling_llama.apply_rotary_pos_emb.__module__ == kernels.__name__
    assert error(gradient(vlm, batch), plain) < 1e-5
    with constant_factors(vlm.model):
        assert error(gradient(vlm, batch), plain) < 1e-5
    for parameter in trained(vlm):
        parameter.data *= 1.5
    with constant_factors(vlm.model):  # cast anew
        changed = gradient(vlm, batch)
    assert error(changed, gradient(vlm, batch)) < 1e-6 and error(changed, plain) > 0.01


@pytest.mark.slow
def test_fused_gradients_in_bf16_are_as_near_to_float32_as_autograds(place, device):
    vlm, batch = wrapped(place, device)
    for parameter in vlm.model.parameters():  # the reference has the rounded weights that the bf16 runs have
        parameter.data = parameter.data.bfloat16().float()
    batch = replace(batch, features=batch.features.bfloat16().float())
    exact = gradient(vlm, batch)
    for parameter in vlm.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    plain = gradient(vlm, batch, low=True)
    fuse(vlm.model)
    assert error(gradient(vlm, batch, low=True), exact) < 1.3 * error(plain, exact) + 1e-3


@pytest.mark.slow
def test_dropout_is_drawn_again_in_backward_and_in_recomputation(place, device):
    vlm, batch = wrapped(place, device, lora_dropout=0.3)
    fuse(vlm.model)
    at = gradient(vlm, batch, seed=7)
    assert gradient(vlm, batch, seed=8)[0] != at[0] == gradient(vlm, batch, seed=7)[0]
    draw = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=draw).to(p) * p.norm() / p.numel() ** 0.5 for p in trained(vlm)]
    losses = []
    for step in (2e-3, -4e-3):
        for parameter, d in zip(trained(vlm), direction, strict=True):
            parameter.data += step * d
        losses.append(gradient(vlm, batch, seed=7)[0])
    for parameter, d in zip(trained(vlm), direction, strict=True):
        parameter.data += 2e-3 * d
    slope = float(torch.cat([d.flatten().double() for d in direction]) @ at[1])
    assert (losses[0] - losses[1]) / 4e-3 == pytest.approx(slope, rel=0.05)
    recompute(vlm.base)
    assert error(gradient(vlm, batch, seed=7), at) < 1e-4


def test_drawing_again_leaves_the_generator_where_it_was(device):
    x = torch.ones(400, 1000, device=device)
    draw = dropout.draw(x)
    kept, _ = dropout.drop(x, 0.05, draw)
    after = torch.rand(3, device=device)
    dropout.generator_of(x).set_state(draw)
    dropout.drop(x, 0.05, dropout.draw(x))
    again, _ = dropout.drop(x, 0.05, draw)
    assert torch.equal(kept, again) and torch.equal(after, torch.rand(3, device=device))
    assert float((kept == 0).float().mean()) == pytest.approx(0.05, abs=0.002)
    assert float(kept.max()) == pytest.approx(1 / 0.95)


@pytest.mark.slow
def test_4bit_layers_fused_equal_pefts(place, device):
    vlm, batch = wrapped(place, device, "4-bit", "wide", mode="qlora")
    plain = gradient(vlm, batch, low=True)
    assert fuse(vlm.model) == 2 * 7 + 2 * 2 + 1 + 2
    assert error(gradient(vlm, batch, low=True), plain) < 0.06  # bf16 noise of both


def test_a_layer_that_another_library_has_patched_is_left_alone(place, monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *given, **more: given[:2])
    vlm, _ = wrapped(place, "cpu")
    norms = [m for m in vlm.model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    norms[0].forward = lambda x: x
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: x)
    fuse(vlm.model)
    assert [kernels.is_fused(m) for m in norms] == [False] + [True] * (len(norms) - 1)
    assert not any(kernels.is_fused(m) for m in vlm.model.modules() if type(m).__name__ == "LlamaMLP")
    assert modeling_llama.apply_rotary_pos_emb.__module__ == __name__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_cached_features_give_the_loss_of_photos(place, cuda):
    vlm, batch = wrapped(place, cuda)
    samples = read_samples(place / "data" / "vlm" / "train.jsonl")[:2]
    fuse(vlm.model)
    photos = Collator(vlm, place / "data")(samples).to(vlm.device)
    assert photos.features is None
    assert error(gradient(vlm, photos), gradient(vlm, batch)) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_training_falls_and_is_the_same_again(place, tmp_path, monkeypatch, cuda, dtype):
    monkeypatch.setenv("CATLIB_ROOT", str(tmp_path))
    monkeypatch.setattr(run, "pick_dtype", lambda *_: dtype)
    weights = []
    for name in ("first", "second"):
        chosen = settings(place / "model", place / "data" / "vlm", tmp_path / name, device=cuda, epochs=6, lr=3e-2)
        result = train(replace(chosen, dtype="auto", lora_dropout=0.1))
        losses = [row["val_loss"] for row in result.history if row["kind"] == "epoch"]
        assert losses[-1] < losses[0]
        weights.append(load_file(result.checkpoint / "last" / "adapter_model.safetensors"))
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])
