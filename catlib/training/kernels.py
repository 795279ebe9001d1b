"""LoRA layers, RMS norms and gated MLPs with hand-written gradients: the same function, fewer passes and half the memory.

peft's LoRA layer keeps the dropped-out input of every layer and casts it between float32 and bf16; transformers' RMSNorm keeps
float32 copies. What is kept here is what the chain rule needs (LoRA: arXiv 2106.09685; RMSNorm: arXiv 1910.07467; recomputation in
backward: arXiv 1604.06174). A GPU waits for the host to launch kernels, so torch's own fused ones are used there.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch.nn.functional import linear, rms_norm, silu

from catlib.training import dropout
from catlib.training.attention import use_products
from catlib.vlm.families import ATTENTIONS, GATED_MLPS, RMS_NORMS

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of one module that read the same input


def fuse(model: torch.nn.Module) -> int:
    """Replace the forward methods of the layers that are known, in place; returns how many.

    Left alone are DoRA, several adapters, trained biases, classes that are not known, and what another library (Liger) has patched.
    """
    lora = [m for m in model.modules() if isinstance(m, LoraLinear | LoraLinear4bit) and _plain(m)]
    groups = {id(module): Group([module]) for module in lora}
    for module in model.modules():
        for names in SIBLINGS:
            members = [getattr(module, name, None) for name in names]
            if all(id(m) in groups for m in members) and len({groups[id(m)].scale for m in members}) == 1:
                groups |= dict.fromkeys(map(id, members), Group(members))
    count, on_cpu = 0, next(model.parameters()).device.type == "cpu"
    for module in model.modules():
        kind, forward = type(module).__name__, None
        if id(module) in groups:
            object.__setattr__(module, "group", groups[id(module)])  # no submodule: the members know each other by it
            forward = _lora_forward
        elif kind in RMS_NORMS and _unpatched(module):
            forward = _norm_forward
        elif kind in GATED_MLPS and _unpatched(module) and module.config.hidden_act == "silu":  # type: ignore[union-attr]
            forward = _mlp_forward
        elif kind in ATTENTIONS:
            _fuse_rotary(sys.modules[type(module).__module__])
            if on_cpu:
                use_products(module.config)
        if forward is not None:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
            count += 1
    return count


def is_fused(module: torch.nn.Module) -> bool:
    """Whether `fuse` has replaced the module's forward method."""
    ours = (_lora_forward, _norm_forward, _mlp_forward)
    return getattr(vars(module).get("forward"), "__func__", None) in ours


def _unpatched(module: torch.nn.Module) -> bool:
    """Whether the module runs transformers' code, and not what another library put in its place."""
    own = "forward" not in vars(module) or is_fused(module)
    return own and type(module).forward.__module__.startswith("transformers.models.")


def _plain(module: Any) -> bool:
    """Whether a LoRA layer has one adapter, of the plain kind."""
    only = len(module.lora_A) == 1 and not module.merged and not module.lora_variant
    return only and all(b.bias is None for b in module.lora_B.values())


@contextmanager
def constant_factors(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """While open, LoRA's matrices do not change: they are cast once and not at each use. Yields the copies."""
    found = (getattr(module, "group", None) for module in model.modules())
    groups = {group for group in found if isinstance(group, Group)}
    try:
        for group in groups:
            group.held = group.cast()
        yield [matrix for group in groups if group.held for matrix in (group.held[0], *group.held[1])]
    finally:
        for group in groups:
            group.held, group.thread = None, threading.local()


class Group:
    """LoRA layers that are called one after the other with the same input: the first call computes for all, in each thread."""

    def __init__(self, members: Sequence[Any]) -> None:
        (name,) = members[0].lora_A
        self.members, self.scale = members, float(members[0].scaling[name])
        self.layers = [m.get_base_layer() for m in members]
        self.ranks = [m.lora_A[name].out_features for m in members]
        self.matrices = [part[name] for m in members for part in (m.lora_A, m.lora_B)]  # A and B of each in turn
        self.held: tuple[torch.Tensor, list[torch.Tensor]] | None = None
        self.thread = threading.local()

    def cast(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(scale times the A matrices, one below the other, the B matrices) in the dtype that is computed in."""
        if self.held is not None:
            return self.held
        with torch.no_grad():
            dtype, factors = _dtype(self.layers[0]), [matrix.weight for matrix in self.matrices]
            return (torch.cat(factors[::2]) * self.scale).to(dtype), [b.detach().to(dtype) for b in factors[1::2]]


class LoraFunction(torch.autograd.Function):
    """y = x W' + bias + scale · dropout(x) A' B' for the layers of a group, which share one draw of dropout.

    Keeps x and the (tokens, r) products; dropout is drawn again in backward.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, cast: Any, p: float, *factors: torch.Tensor) -> Any:
        a, bs = cast
        flat = x.reshape(-1, x.shape[-1]).to(a.dtype)
        ctx.draw = dropout.draw(flat) if p else None
        kept = dropout.drop(flat, p, ctx.draw)[0] if p else flat
        low = kept @ a.T
        outputs = []
        for layer, part, b in zip(group.layers, low.split(group.ranks, 1), bs, strict=True):
            outputs.append(linear(flat, *_weight(layer)).addmm_(part, b.T).view(*x.shape[:-1], -1))
        ctx.save_for_backward(flat, low, *factors)  # the factors for autograd's check that nobody changed them
        ctx.group, ctx.p, ctx.shape, ctx.dtype = group, p, x.shape, x.dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *received: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, low, *factors = ctx.saved_tensors
        group, p = ctx.group, ctx.p
        a, bs = group.cast()
        gradients = [dy.reshape(-1, dy.shape[-1]) for dy in received]
        pieces = [dy @ b for dy, b in zip(gradients, bs, strict=True)]
        dlow = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
        kept, dropped = dropout.drop(flat, p, ctx.draw) if p else (flat, None)
        dtype, lows = factors[0].dtype, low.split(group.ranks, 1)
        da = _product(dlow.T, kept, dtype).mul_(group.scale).split(group.ranks)
        db = [_product(dy.T, part, dtype) for dy, part in zip(gradients, lows, strict=True)]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dropout.undrop(dlow, a, dropped, p) if dropped is not None else dlow @ a
            for dy, layer in zip(gradients, group.layers, strict=True):
                dx.addmm_(dy, _weight(layer)[0])
            dx = dx.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, None, *(gradient for pair in zip(da, db, strict=True) for gradient in pair)


class NormFunction(torch.autograd.Function):
    """RMSNorm over the last dimension with a frozen weight; keeps the input as it came and one number a token. For the CPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        scaled = (dy * weight).float()
        normed = x.float() * inverse
        shared = (scaled * normed).mean(-1, keepdim=True)
        return scaled.addcmul_(normed, shared, value=-1).mul_(inverse).to(x.dtype), None, None


class GateFunction(torch.autograd.Function):
    """silu(gate) · up; keeps the two factors and not the products in between."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate) * up

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, dy * silu(gate)


class RotaryFunction(torch.autograd.Function):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) of (…, tokens, width) in three kernels; only the angles are kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, signed: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, signed)
        return (x * cosine).addcmul_(_halves_swapped(x), signed)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cosine, signed = ctx.saved_tensors
        return (dy * cosine).addcmul_(_halves_swapped(dy), signed, value=-1), None, None


def _halves_swapped(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)


def _fuse_rotary(modeling: Any) -> None:
    """Let the attention layers of a transformers module turn by `RotaryFunction` where they compute on a GPU."""
    plain = modeling.apply_rotary_pos_emb

    def turned(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        alike = unsqueeze_dim == 1 and cos.shape[-1] == q.shape[-1] and cos.dtype == q.dtype
        if not (alike and dropout.on_gpu(q)):
            return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        if not hasattr(sin, "signed"):  # the same tensor in all layers of a pass
            half = sin.shape[-1] // 2
            sin.signed = torch.cat([-sin[..., :half], sin[..., half:]], -1).unsqueeze(1)
        return tuple(RotaryFunction.apply(x, cos.unsqueeze(1), sin.signed) for x in (q, k))

    if plain.__module__ == modeling.__name__:  # else it is this one already, or Liger's
        modeling.apply_rotary_pos_emb = turned


def _lora_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    group = module.group
    if module.disable_adapters or module.merged or len({_probability(m) for m in group.members}) > 1:
        return type(module).forward(module, x)
    now = group.thread
    if getattr(now, "x", None) is not x or id(module) not in now.waiting:
        factors = [matrix.weight for matrix in group.matrices]
        outputs = LoraFunction.apply(x, group, group.cast(), _probability(module), *factors)
        now.x, now.waiting = x, {id(m): y for m, y in zip(group.members, outputs, strict=True)}
    y = now.waiting.pop(id(module))
    if not now.waiting:
        now.x = None
    return y


def _norm_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    if dropout.on_gpu(x):
        with torch.autocast(x.device.type, enabled=False):  # which would have it in float32
            return rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)
    return NormFunction.apply(x, module.weight, module.variance_epsilon)


def _mlp_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(GateFunction.apply(module.gate_proj(x), module.up_proj(x)))


def _probability(module: Any) -> float:
    """The probability with which an entry of the layer's input is dropped, as things are now."""
    (layer,) = module.lora_dropout.values()
    return layer.p if module.training and isinstance(layer, torch.nn.Dropout) else 0.0


def _dtype(layer: Any) -> torch.dtype:
    """What a frozen layer computes in."""
    return layer.weight.dtype if quant_state(layer) is None else layer.compute_dtype or torch.bfloat16


def quant_state(layer: Any) -> Any:
    """What expands a layer's 4-bit weight, None where it has another; the layer knows it too, as a weight in pieces does not."""
    return getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)


def _weight(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The frozen layer's (weight, bias) in the dtype that is computed in; 4-bit weights are expanded for the moment."""
    state = quant_state(layer)
    if state is None:
        return layer.weight, layer.bias
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, state).to(_dtype(layer))
    return weight, None if layer.bias is None else layer.bias.to(weight.dtype)


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a b in a wider dtype: on a GPU the product itself is written so, without a copy."""
    if a.is_cuda and torch.version.hip is None and a.dtype is not dtype is torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)
