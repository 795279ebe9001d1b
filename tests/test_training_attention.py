"""Attention by matrix products: torch's function, its gradients, and when torch's own is taken."""

from types import SimpleNamespace

import pytest
import torch
from test_vlm_lora import batch_for
from tiny_models import save_llava
from torch.nn.functional import scaled_dot_product_attention

from catlib.settings import TrainSettings
from catlib.training import attention
from catlib.training.kernels import fuse
from catlib.training.lora import add_lora
from catlib.training.loss import AnswerLoss
from catlib.vlm.checkpoint import open_vlm


def tensors(batch, heads, groups, tokens, width, dtype):
    draw = torch.Generator().manual_seed(tokens)
    shapes = [(batch, tokens, number, width) for number in (heads, groups, groups, heads)]
    # As transformers has them: heads and tokens swapped without a copy.
    q, k, v, dy = (
        torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).transpose(1, 2) for shape in shapes
    )
    return [x.detach().requires_grad_() for x in (q, k, v)], dy


def plain(q, k, v, scale):
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def gradients(function, inputs, dy):
    y = function(*inputs, 0.3)
    return y, *torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("shape", [(1, 2, 2, 5, 4), (2, 6, 2, 17, 8), (3, 4, 1, 9, 8), (1, 1, 1, 1, 4)])
def test_gradients_are_those_of_torch(shape):
    inputs, dy = tensors(*shape, torch.float64)
    for ours, theirs in zip(
        gradients(attention.CausalAttention.apply, inputs, dy), gradients(plain, inputs, dy), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_in_bf16_they_are_as_near_to_the_exact_ones_as_torchs():
    inputs, dy = tensors(2, 9, 3, 70, 64, torch.bfloat16)
    exact = gradients(plain, [x.detach().double().requires_grad_() for x in inputs], dy.double())

    def far(found):
        return max(float((x - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True))

    ours, theirs = (far(gradients(f, inputs, dy)) for f in (attention.CausalAttention.apply, plain))
    assert ours < 1.5 * theirs


@pytest.mark.parametrize(
    ("change", "ours"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"tokens": attention.LONGEST + 1}, False),
        ({"mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)}, False),
        ({"causal": False}, False),
        ({"dropout": 0.1}, False),
        ({"position_bias": torch.zeros(1, 4, 6, 6, dtype=torch.bfloat16)}, False),
    ],
)
def test_torchs_own_is_taken_where_ours_is_another_or_slower(change, ours):
    dtype, tokens = change.get("dtype", torch.bfloat16), change.get("tokens", 6)
    (q, k, v), _ = tensors(1, 4, 2, tokens, 8, dtype)
    module = SimpleNamespace(is_causal=change.get("causal", True), num_key_value_groups=2)
    more = {"position_bias": change["position_bias"]} if "position_bias" in change else {}
    y, _ = attention.attend(module, q, k, v, change.get("mask"), dropout=change.get("dropout", 0.0), **more)
    assert ("CausalAttention" in str(seen(y.grad_fn))) is ours and y.shape == (1, tokens, 4, 8)
    with torch.no_grad():
        assert attention.attend(module, q, k, v, None)[0].grad_fn is None


def seen(node):
    """The names of the operations that a result came from."""
    return [type(node).__name__, *(name for parent, _ in node.next_functions if parent for name in seen(parent))]


@pytest.mark.parametrize(("chosen", "ours"), [("auto", True), ("eager", False)])
def test_a_training_in_bf16_uses_it_unless_the_user_chose_another(tmp_path, chosen, ours):
    vlm = open_vlm(str(save_llava(tmp_path / "llava")), device="cpu", precision="bfloat16", attention=chosen)
    add_lora(vlm, TrainSettings(lora_r=4))
    fuse(vlm.model)
    loss, _ = AnswerLoss(vlm)(batch_for(vlm))
    assert ("CausalAttentionBackward" in seen(loss.grad_fn)) is ours
