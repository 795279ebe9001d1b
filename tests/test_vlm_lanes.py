"""Threads side by side at one batch: the same gradient as one thread's, the same weights each time, and alone where they would clash."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_llava, save_pixtral, settings, write_dataset

from catlib.training.kernels import LoraFunction, fuse
from catlib.training.lanes import Lanes, lanes_for
from catlib.training.lora import add_lora
from catlib.training.trainer import Trainer, train
from catlib.vlm.checkpoint import open_vlm


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("lanes")
    save_llava(root / "llava")
    save_pixtral(root / "pixtral")
    write_dataset(root / "data")
    return root


@pytest.fixture(autouse=True)
def two_threads(place, monkeypatch):
    monkeypatch.setenv("CATLIB_ROOT", str(place))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def options(place, out, kind="llava", **more):
    return settings(place / kind, place / "data" / "vlm", out, **{"batch_size": 4, "gradient_accumulation": 1, **more})


@pytest.mark.parametrize("kind", ["llava", "pixtral"])
@pytest.mark.parametrize("count", [2, 3])
def test_lanes_give_the_gradient_of_one(place, tmp_path, kind, count):
    trainer = Trainer(options(place, tmp_path / "out", kind, lora_dropout=0.0, train_projector="full"))
    for _, parameter in trainer.trained:
        torch.nn.init.normal_(parameter, std=0.2)
    gradients, losses = [], []
    for lanes in (1, count):
        trainer.lanes = Lanes(lanes)
        samples = trainer.run.data.train[:5]  # a micro-batch of four, and one of one sample
        losses.append(float(trainer.training_step(trainer.loss, samples)))
        gradients.append([parameter.grad.clone() for _, parameter in trainer.trained])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for one, many in zip(*gradients, strict=True):
        assert (one - many).abs().max() <= 1e-5 * max(1.0, float(one.abs().max()))
    assert max(float(g.abs().max()) for g in gradients[0]) > 1e-3


def test_lanes_with_dropout_train_to_the_same_weights_again(place, tmp_path, monkeypatch):
    drawn = []
    plain = LoraFunction.apply
    monkeypatch.setattr(LoraFunction, "apply", lambda *given: drawn.append(given[3]) or plain(*given))
    weights = []
    for name in ("first", "second"):
        result = train(options(place, tmp_path / name, lora_dropout=0.5))
        weights.append(load_file(result.checkpoint / "last" / "adapter_model.safetensors"))
    assert set(drawn) == {0.0, 0.5}  # validation and training
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.get_num_threads() == 2


def test_lanes_are_as_many_as_threads_and_samples_and_one_where_threads_would_clash(place, tmp_path):
    chosen = options(place, tmp_path)
    vlm = open_vlm(str(place / "llava"), device="cpu", precision="float32")
    add_lora(vlm, chosen)
    assert lanes_for(vlm, chosen).count == 1, "peft's own layers draw from the global generator"
    fuse(vlm.model)
    assert lanes_for(vlm, chosen).count == 2
    assert lanes_for(vlm, chosen, processes=2).count == 1
    for change in ({"batch_size": 1}, {"gradient_checkpointing": True}, {"mode": "qlora"}):
        assert lanes_for(vlm, replace(chosen, **change)).count == 1
    vlm.base.config.text_config.attention_dropout = 0.1
    for layer in vlm.base.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    assert lanes_for(vlm, chosen).count == 1


def test_parts_are_in_order_and_nearly_equal():
    assert Lanes(2).cut("abcde") == ["ab", "cde"]
    assert Lanes(3).cut("ab") == ["a", "b"]
    assert Lanes(1).cut("abc") == ["abc"]
    assert Lanes(2).run(str.upper, ["ab", "cde"]) == ["AB", "CDE"]


def test_the_first_error_is_raised_when_all_have_ended():
    ended = []

    def work(part):
        if part != "late":
            raise ValueError(part)
        torch.randn(300, 300).matrix_power(50)
        ended.append(part)

    with pytest.raises(ValueError, match="one"):
        Lanes(3).run(work, ["one", "late", "two"])
    assert ended == ["late"]


def test_threads_are_in_the_callers_modes():
    def modes(_):
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads()

    lanes = Lanes(2)
    assert lanes.run(modes, [0, 1]) == [(True, False, 1)] * 2
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert lanes.run(modes, [0, 1]) == [(False, True, 1)] * 2
    assert torch.get_num_threads() == 2
