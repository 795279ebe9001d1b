"""What is trained: the language model's layers by full path, never the vision tower; the plan's numbers; hand-written gradients."""

import pytest
import torch
from peft import LoraConfig
from tiny_models import save_llava

from catlib.errors import InputError
from catlib.settings import TrainSettings
from catlib.training.kernels import fuse
from catlib.training.lora import (
    add_lora,
    count_parameters,
    lora_config,
    lora_module_names,
    peft_model,
    rank_remark,
    with_alpha,
)
from catlib.training.loss import AnswerLoss
from catlib.training.memory import model_config
from catlib.vlm.batches import IGNORED, Batch
from catlib.vlm.checkpoint import open_vlm
from catlib.vlm.models import empty_model, quantization

PLAN = TrainSettings()


@pytest.mark.slow
def test_llava_7b_has_exactly_the_right_trainable_parameters():
    model = empty_model(model_config("llava-hf/llava-1.5-7b-hf"))
    config = lora_config(model, PLAN)
    model.requires_grad_(False)
    model = peft_model(model, config)
    trainable, _ = count_parameters(model)
    assert trainable == 79_953_920
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 32 * 7 * 2
    assert not [n for n in trained if "vision_tower" in n or "projector" in n]


@pytest.mark.slow
def test_matching_by_last_name_would_hit_the_tower():
    model = empty_model(model_config("llava-hf/llava-1.5-7b-hf"))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    naive = [n for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in targets and hasattr(m, "in_features")]
    ours = lora_module_names(model, targets)
    assert len([n for n in naive if "vision_tower" in n]) * 2 == 144  # the plan's mistake
    assert set(naive) - set(ours) == {n for n in naive if "vision_tower" in n}
    model.requires_grad_(False)
    theirs = peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules=targets))
    assert count_parameters(theirs)[0] == 84_672_512


@pytest.mark.parametrize(("given", "alpha"), [({"lora_r": 16}, 32), ({}, 64), ({"lora_r": 16, "lora_alpha": 8}, 8)])
def test_alpha_is_twice_the_rank_unless_it_is_given(folder, given, alpha):
    vlm = open_vlm(str(folder), device="cpu", precision="float32")
    assert lora_config(vlm.model, TrainSettings(**given)).lora_alpha == alpha
    assert with_alpha(TrainSettings(**given)).lora_alpha == alpha


@pytest.mark.slow
def test_a_rank_outside_the_plans_is_remarked(folder, caplog):
    assert not rank_remark(TrainSettings()) and not rank_remark(TrainSettings(mode="projector", lora_r=4))
    wrapped(folder, lora_r=8)
    assert "lora_r 8" in caplog.text and "16 to 32" in caplog.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("lora"))


def wrapped(folder, fused=False, **more):
    torch.manual_seed(0)
    vlm = open_vlm(str(folder), device="cpu", precision="float32")
    add_lora(vlm, TrainSettings(**{"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **more}))
    torch.manual_seed(1)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    if fused:
        assert fuse(vlm.model) == 3 * 7 + 3 * 2 + 1 + 3  # LoRA layers, norms, MLPs
    return vlm


def batch_for(vlm):
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 400, (2, 30), generator=draw)
    ids[:, 2:18] = vlm.base.config.image_token_id
    labels = torch.full_like(ids, IGNORED)
    labels[:, -4:] = ids[:, -4:]
    return Batch(("a", "b"), ids, torch.ones_like(ids), labels, torch.randn(32, 24, generator=draw), None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "trained"),
    [
        ({"mode": "projector"}, {"projector"}),
        ({"train_projector": "none"}, {"language_model"}),
        ({"train_projector": "full"}, {"language_model", "projector"}),
        ({"train_projector": "lora"}, {"language_model", "projector"}),
        ({"use_dora": True}, {"language_model"}),
        ({"use_rslora": True}, {"language_model"}),
    ],
)
def test_modes_train_what_they_say(folder, more, trained):
    vlm = wrapped(folder, **more)
    before = {n: p.detach().clone() for n, p in vlm.model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in vlm.model.parameters() if p.requires_grad], lr=1e-2)
    loss, n = AnswerLoss(vlm)(batch_for(vlm))
    (loss / n).backward()
    optimizer.step()
    changed = [n for n, p in vlm.model.named_parameters() if not torch.equal(p, before[n])]
    parts = {part for part in ("vision_tower", "projector", "language_model") if any(part in n for n in changed)}
    assert parts == trained


def test_a_bf16_base_trains_float32_adapters_and_fp16_is_refused(folder):
    torch.manual_seed(0)
    vlm = open_vlm(str(folder), device="cpu", precision="bfloat16")
    add_lora(vlm, TrainSettings(lora_r=4, train_projector="full"))
    dtypes = {parameter.requires_grad: set() for parameter in vlm.model.parameters()}
    for parameter in vlm.model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    with pytest.raises(InputError, match="dtype must be one of auto, bfloat16, float32"):
        TrainSettings.build({"dtype": "float16"})


def test_an_unknown_target_is_refused_with_the_layers_there_are(folder):
    with pytest.raises(InputError, match="no layer w_proj.*q_proj"):
        wrapped(folder, lora_targets="w_proj")


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["none", "full", "lora"])
def test_hand_written_gradients_equal_autograds(folder, projector):
    gradients = []
    for fused in (False, True):
        vlm = wrapped(folder, fused, train_projector=projector) if projector != "lora" or not fused else None
        if vlm is None:
            vlm = wrapped(folder, train_projector=projector)
            fuse(vlm.model)
        loss, n = AnswerLoss(vlm)(batch_for(vlm))
        (loss / n).backward()
        gradients.append((float(loss), {k: p.grad for k, p in vlm.model.named_parameters() if p.requires_grad}))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    for name, gradient in gradients[0][1].items():
        assert (gradient - gradients[1][1][name]).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name


def test_dropout_drops_its_share_and_the_gradient_is_that_of_the_same_draw():
    from catlib.training.dropout import _dropped

    x = torch.zeros(400, 1000)
    shares = [len(_dropped(x, 0.05, seed)) / x.numel() for seed in range(5)]
    assert all(abs(share - 0.05) < 0.002 for share in shares)
    assert torch.equal(_dropped(x, 0.05, 3), _dropped(x, 0.05, 3))
    assert len(_dropped(x, 0.05, 3).unique()) == len(_dropped(x, 0.05, 3))
    columns = torch.bincount(_dropped(x, 0.05, 4) % 1000, minlength=1000).float()
    assert columns.std() < 1.3 * (400 * 0.05 * 0.95) ** 0.5  # no column is favoured


def test_numeric_gradient_under_dropout(folder):
    vlm = wrapped(folder, fused=True, lora_dropout=0.3)
    vlm.model.double()
    batch = batch_for(vlm)
    parameter = next(p for n, p in vlm.model.named_parameters() if "lora_A" in n and "layers.1" in n)

    def value():
        torch.manual_seed(5)
        return AnswerLoss(vlm)(batch)[0]

    value().backward()
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)).to(parameter.dtype)
    exact, step = float((parameter.grad * direction).sum()), 1e-3
    with torch.no_grad():
        parameter += step * direction
        up = float(value())
        parameter -= 2 * step * direction
        down = float(value())
    assert (up - down) / (2 * step) == pytest.approx(exact, rel=0.02, abs=1e-2)


@pytest.mark.slow
def test_only_the_language_model_is_quantized_and_training_survives_a_validation(tmp_path):
    import bitsandbytes as bnb
    from tiny_models import save_wide_llava

    folder = save_wide_llava(tmp_path / "wide")
    vlm = open_vlm(str(folder), device="cpu", precision="4-bit")
    four_bit = [n for n, m in vlm.model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(four_bit) == 2 * 7
    assert all(name.startswith("model.language_model.") for name in four_bit)
    assert quantization([]).bnb_4bit_use_double_quant
    add_lora(vlm, TrainSettings(mode="qlora", lora_r=4, lora_dropout=0.0, train_projector="full"))
    for fused in (False, True):
        if fused:
            fuse(vlm.model)
        norms = []
        for _ in range(2):
            vlm.model.train()
            vlm.model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, n = AnswerLoss(vlm)(wide_batch(vlm))
            (loss / n).backward()
            norms.append(float(vlm.projector.modules_to_save["default"].linear_1.weight.grad.norm()))
            vlm.model.eval()  # a validation pass, in which bitsandbytes would repack the weights for inference
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                AnswerLoss(vlm)(wide_batch(vlm))
        assert norms[0] > 0
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def wide_batch(vlm):
    batch = batch_for(vlm)
    return Batch(batch.sample_ids, batch.input_ids, batch.attention_mask, batch.labels, batch.features.bfloat16(), None)
