"""LoRA layers, RMS norms and gated MLPs with hand-written gradients: the same function, fewer passes and half the memory.

peft's LoRA layer keeps the dropped-out input of every layer and casts it between float32 and bf16; transformers' RMSNorm
keeps float32 copies. What is kept here is what the chain rule needs (LoRA: Hu et al. 2021, arXiv 2106.09685; RMSNorm: Zhang and
Sennrich 2019, arXiv 1910.07467; the recomputation in backward follows Chen et al. 2016, arXiv 1604.06174). On a GPU a pass is
bound by the number of kernels that the host can launch, so there torch's own fused kernels are used where it has one.
"""

import math
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

from catlib.vlm.families import ATTENTIONS, GATED_MLPS, RMS_NORMS

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of one module that read the same input


def fuse(model: torch.nn.Module) -> int:
    """Replace the forward methods of the layers that are known, in place; returns how many. The others stay as they are.

    Left alone are DoRA, several adapters at once, biases trained with LoRA, norms and MLPs of other classes, and whatever
    another library (Liger) has patched.
    """
    lora = [m for m in model.modules() if isinstance(m, LoraLinear | LoraLinear4bit) and _plain(m)]
    groups = {id(module): Group([module]) for module in lora}
    for module in model.modules():
        for names in SIBLINGS:
            members = [getattr(module, name, None) for name in names]
            if all(id(m) in groups for m in members) and len({groups[id(m)].scale for m in members}) == 1:
                groups |= dict.fromkeys(map(id, members), Group(members))
    count = 0
    for module in model.modules():
        kind = type(module).__name__
        if id(module) in groups:
            object.__setattr__(module, "group", groups[id(module)])  # no submodule: the members know each other by it
            module.forward = MethodType(_lora_forward, module)  # type: ignore[method-assign]
        elif kind in RMS_NORMS and _unpatched(module):
            module.forward = MethodType(_norm_forward, module)  # type: ignore[method-assign]
        elif kind in GATED_MLPS and _unpatched(module) and getattr(module.config, "hidden_act", None) == "silu":
            module.forward = MethodType(_mlp_forward, module)  # type: ignore[method-assign]
        else:
            if kind in ATTENTIONS:
                _fuse_rotary(sys.modules[type(module).__module__])
            continue
        count += 1
    return count


def is_fused(module: torch.nn.Module) -> bool:
    """Whether `fuse` has replaced the module's forward method."""
    ours = (_lora_forward, _norm_forward, _mlp_forward)
    return "forward" in vars(module) and getattr(module.forward, "__func__", None) in ours


def _unpatched(module: torch.nn.Module) -> bool:
    """Whether the module runs transformers' code, and not what another library put in its place."""
    patched = "forward" in vars(module) and not is_fused(module)
    return not patched and type(module).forward.__module__.startswith("transformers.models.")


class _Thread(threading.local):
    generator: torch.Generator | None = None  # None: torch's global one
    sine: torch.Tensor | None = None  # of the positions, as the model made it
    signed: torch.Tensor | None = None  # the same, negative in its first half


_thread = _Thread()


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Dropout of the fused layers draws from this generator, in this thread."""
    _thread.generator = generator
    try:
        yield
    finally:
        _thread.generator = None


@contextmanager
def constant_factors(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """While open, LoRA's matrices do not change: they are cast once and not at each use. Yields the copies."""
    found: list[Any] = [getattr(module, "group", None) for module in model.modules()]
    groups = {id(group): group for group in found if isinstance(group, Group)}.values()
    held: list[torch.Tensor] = []
    try:
        for group in groups:
            group.held = group.cast()
            held += [group.held[0], *group.held[1]]
        yield held
    finally:
        for group in groups:
            group.held, group.thread = None, threading.local()


class Group:
    """LoRA layers that are called one after the other with the same input: the first call computes for all of them.

    Each thread has its own inputs and outputs.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        (name,) = members[0].lora_A
        self.members, self.scale = members, float(members[0].scaling[name])
        self.layers = [m.get_base_layer() for m in members]
        self.ranks = [m.lora_A[name].out_features for m in members]
        self._matrices = [part[name] for m in members for part in (m.lora_A, m.lora_B)]
        self.held: tuple[torch.Tensor, list[torch.Tensor]] | None = None
        self.thread = threading.local()

    @property
    def factors(self) -> list[torch.Tensor]:
        """A and B of each layer in turn."""
        return [matrix.weight for matrix in self._matrices]

    def cast(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(scale times the A matrices, one below the other, the B matrices) in the dtype that is computed in."""
        if self.held is not None:
            return self.held
        with torch.no_grad():
            dtype, factors = _dtype(self.layers[0]), self.factors
            return (torch.cat(factors[::2]) * self.scale).to(dtype), [b.detach().to(dtype) for b in factors[1::2]]

    def forward(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """A member's output."""
        now = self.thread
        if getattr(now, "x", None) is not x or id(module) not in now.waiting:
            outputs = LoraFunction.apply(x, self, self.cast(), _probability(module), *self.factors)
            now.x, now.waiting = x, {id(m): y for m, y in zip(self.members, outputs, strict=True)}
        y = now.waiting.pop(id(module))
        if not now.waiting:
            now.x = None
        return y


class LoraFunction(torch.autograd.Function):
    """y = x W' + bias + scale · dropout(x) A' B' for the layers of a group, which share one draw of dropout.

    Keeps x and the (tokens, r) products; dropout is drawn again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: Group, cast: Any, p: float, *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        a, bs = cast
        flat = x.reshape(-1, x.shape[-1]).to(a.dtype)
        ctx.draw = _draw(flat) if p else None
        kept = _drop(flat, p, ctx.draw)[0] if p else flat
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
        kept, dropped = _drop(flat, p, ctx.draw) if p else (flat, None)
        da = _product(dlow.T, kept, factors[0].dtype).mul_(group.scale).split(group.ranks)
        db = [
            _product(dy.T, part, factors[0].dtype)
            for dy, part in zip(gradients, low.split(group.ranks, 1), strict=True)
        ]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _undrop(dlow, a, dropped, p) if dropped is not None else dlow @ a
            for dy, layer in zip(gradients, group.layers, strict=True):
                dx.addmm_(dy, _weight(layer)[0])
            dx = dx.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, None, *(gradient for pair in zip(da, db, strict=True) for gradient in pair)


class NormFunction(torch.autograd.Function):
    """RMSNorm over the last dimension with a frozen weight; keeps the input as it came and one number a token. For the CPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, inverse, weight)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        scaled = (dy * weight).float()
        normed = x.float() * inverse
        scaled -= normed * (scaled * normed).mean(-1, keepdim=True)
        return (scaled * inverse).to(x.dtype), None, None


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


def rotated(q: torch.Tensor, k: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries and keys (rows, heads, tokens, width) turned by their positions' angles (rows, tokens, width)."""
    if _thread.sine is not sine:  # the same tensor in all layers of a pass
        half = sine.shape[-1] // 2
        _thread.sine, _thread.signed = sine, torch.cat([-sine[..., :half], sine[..., half:]], -1).unsqueeze(1)
    cosine = cosine.unsqueeze(1)
    return RotaryFunction.apply(q, cosine, _thread.signed), RotaryFunction.apply(k, cosine, _thread.signed)


def _halves_swapped(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)


def _fuse_rotary(modeling: Any) -> None:
    """Let the attention layers of a transformers module turn by `rotated` where they compute on a GPU."""
    plain = modeling.apply_rotary_pos_emb

    def turned(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        alike = _on_gpu(q) and unsqueeze_dim == 1 and cos.shape[-1] == q.shape[-1] and cos.dtype == q.dtype
        return rotated(q, k, cos, sin) if alike else plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    if plain.__module__ == modeling.__name__:  # else it is this one already, or Liger's
        modeling.apply_rotary_pos_emb = turned


def _plain(module: Any) -> bool:
    names = list(module.lora_A)
    return (
        len(names) == 1
        and not module.use_dora.get(names[0], False)
        and not module.merged
        and module.lora_B[names[0]].bias is None
        and not getattr(module, "lora_variant", {})
    )


def _lora_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    group = module.group
    if module.disable_adapters or module.merged or len({_probability(m) for m in group.members}) > 1:
        return type(module).forward(module, x)
    return group.forward(module, x)


def _norm_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    if _on_gpu(x):
        with torch.autocast(x.device.type, enabled=False):  # which would have it in float32
            return rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)
    return NormFunction.apply(x, module.weight, module.variance_epsilon)


def _mlp_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(GateFunction.apply(module.gate_proj(x), module.up_proj(x)))


def _probability(module: Any) -> float:
    """The probability with which an entry of the layer's input is dropped, as things are now."""
    (dropout,) = module.lora_dropout.values()
    return dropout.p if module.training and isinstance(dropout, torch.nn.Dropout) else 0.0


def _dtype(layer: Any) -> torch.dtype:
    """What a frozen layer computes in."""
    return (
        layer.weight.dtype
        if getattr(layer.weight, "quant_state", None) is None
        else layer.compute_dtype or torch.bfloat16
    )


def _weight(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The frozen layer's (weight, bias) in the dtype that is computed in; 4-bit weights are expanded for the moment."""
    state = getattr(layer.weight, "quant_state", None)
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


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda  # a function, so that tests can take this way without a GPU


def _generator(x: torch.Tensor) -> torch.Generator:
    return torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator


def _draw(x: torch.Tensor) -> Any:
    """What dropout needs to draw the same again: the state of a GPU's generator, or a seed."""
    if _on_gpu(x):
        return _generator(x).get_state()
    return int(torch.randint(2**62, (1,), generator=_thread.generator))


def _drop(x: torch.Tensor, p: float, draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / (1 - p) with each entry dropped with probability p, what `_undrop` needs of it); the same for the same draw."""
    if not _on_gpu(x):
        dropped = _dropped(x, p, draw)
        kept = x * (1 / (1 - p))
        kept.view(-1).index_fill_(0, dropped, 0)
        return kept, dropped
    generator = _generator(x)
    now = generator.get_state()
    if again := not torch.equal(now, draw):
        generator.set_state(draw)
    kept, mask = torch.native_dropout(x, p, True)
    if again:
        generator.set_state(now)
    return kept, mask


def _undrop(dlow: torch.Tensor, a: torch.Tensor, dropped: torch.Tensor, p: float) -> torch.Tensor:
    """The gradient dlow a of what was kept as the gradient of what went in."""
    if _on_gpu(dlow):
        return torch.ops.aten.native_dropout_backward(dlow @ a, dropped, 1 / (1 - p))
    dx = (dlow * (1 / (1 - p))) @ a
    dx.view(-1).index_fill_(0, dropped, 0)
    return dx


def _dropped(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Positions in the flattened x that dropout sets to 0, each with probability p; the same ones for the same seed. For the CPU.

    The gaps between them are geometric: log(u) / log(1 - p) rounded down (Devroye 1986, Non-Uniform Random Variate Generation, X.2).
    So only p of the random numbers are needed that `bernoulli_` draws, which was a fifth of the time of a step.
    """
    generator = torch.Generator().manual_seed(seed)
    n = x.numel()
    draws = int(n * p + 8 * math.sqrt(n * p) + 16)  # eight standard deviations more than are needed on average
    gaps = torch.rand(draws, generator=generator).neg_().add_(1).log_().mul_(1 / math.log1p(-p)).long().add_(1)
    positions = gaps.cumsum(0).sub_(1)
    return positions[: int(torch.searchsorted(positions, n))]
