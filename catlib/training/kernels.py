"""LoRA layers, RMS norms and gated MLPs with hand-written gradients: the same function, fewer passes and half the memory.

peft's LoRA layer keeps the dropped-out input of every layer and casts it between float32 and bf16; transformers' RMSNorm
keeps float32 copies. What is kept here is what the chain rule needs (LoRA: Hu et al. 2021, arXiv 2106.09685; RMSNorm: Zhang and
Sennrich 2019, arXiv 1910.07467; the recomputation in backward follows Chen et al. 2016, arXiv 1604.06174).
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch.nn.functional import linear, silu

from catlib.vlm.families import GATED_MLPS, RMS_NORMS

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of one module that read the same input


def fuse(model: torch.nn.Module) -> int:
    """Replace the forward methods of the layers that are known, in place; returns how many. The others stay as they are.

    Left alone are DoRA, several adapters at once, biases trained with LoRA, and norms and MLPs of other classes.
    """
    count = 0
    for module in model.modules():
        for names in SIBLINGS:
            members = [getattr(module, name, None) for name in names]
            if all(isinstance(m, LoraLinear | LoraLinear4bit) and _plain(m) for m in members):
                shared = Siblings(members)
                for member in members:
                    object.__setattr__(member, "siblings", shared)  # no submodule: the members know each other by it
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, LoraLinear | LoraLinear4bit) and _plain(module):
            module.forward = MethodType(_lora_forward, module)  # type: ignore[method-assign]
        elif kind in RMS_NORMS:
            module.forward = MethodType(_norm_forward, module)
        elif kind in GATED_MLPS and getattr(module.config, "hidden_act", None) == "silu":
            module.forward = MethodType(_mlp_forward, module)
        else:
            continue
        count += 1
    return count


def is_fused(module: torch.nn.Module) -> bool:
    """Whether `fuse` has replaced the module's forward method."""
    return "forward" in vars(module) and getattr(module.forward, "__func__", None) in (
        _lora_forward,
        _norm_forward,
        _mlp_forward,
    )


class _Thread(threading.local):
    generator: torch.Generator | None = None  # None: torch's global one


_thread = _Thread()


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Dropout of the fused layers draws from this generator, in this thread."""
    _thread.generator = generator
    try:
        yield
    finally:
        _thread.generator = None


class LoraFunction(torch.autograd.Function):
    """y = x W' + bias + scale · dropout(x) A' B' for layers that read the same x, which share one draw of dropout.

    Arguments after p: A and B of each layer in turn. Keeps x and the (tokens, r) products; dropout is drawn again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layers: tuple[Any, ...], scales: tuple[float, ...], p: float, *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.layers, ctx.scales, ctx.p = layers, tuple(scale / (1 - p) for scale in scales), p
        ctx.seed = int(torch.randint(2**62, (1,), generator=_thread.generator)) if p else 0
        with torch.autocast(x.device.type, enabled=False):
            weights = [_weight(layer) for layer in layers]
            flat = x.reshape(-1, x.shape[-1]).to(weights[0][0].dtype)
            kept = _zero(flat.clone(), _dropped(flat, p, ctx.seed)) if p else flat
            low = kept @ _stacked(factors, flat.dtype).T
            outputs = []
            for (weight, bias), part, b, scale in zip(
                weights, _parts(low, factors), factors[1::2], ctx.scales, strict=True
            ):
                y = linear(flat, weight, bias)
                outputs.append(y.addmm_(part, (scale * b).to(flat.dtype).T).view(*x.shape[:-1], -1))
        ctx.save_for_backward(flat, low, *factors)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *received: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, low, *factors = ctx.saved_tensors
        gradients = [dy.reshape(-1, dy.shape[-1]).to(flat.dtype) for dy in received]
        dropped = _dropped(flat, ctx.p, ctx.seed) if ctx.p else None
        pieces = [
            dy @ (scale * b).to(flat.dtype) for dy, b, scale in zip(gradients, factors[1::2], ctx.scales, strict=True)
        ]
        dlow = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
        da = dlow.T @ (flat if dropped is None else _zero(flat.clone(), dropped))
        of_factors: list[torch.Tensor] = []
        lows = _parts(low, factors)
        for dy, part, a, b, da_part, scale in zip(
            gradients,
            lows,
            factors[::2],
            factors[1::2],
            da.split([a.shape[0] for a in factors[::2]]),
            ctx.scales,
            strict=True,
        ):
            of_factors += [da_part.to(a.dtype), ((dy.T @ part) * scale).to(b.dtype)]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dlow @ _stacked(factors, flat.dtype)
            if dropped is not None:
                _zero(dx, dropped)
            for dy, layer in zip(gradients, ctx.layers, strict=True):
                dx.addmm_(dy, _weight(layer)[0])
            dx = dx.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, None, *of_factors


class NormFunction(torch.autograd.Function):
    """RMSNorm over the last dimension with a frozen weight; keeps the input as it came and one number a token."""

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


def _plain(module: Any) -> bool:
    names = list(module.lora_A)
    return (
        len(names) == 1
        and not module.use_dora.get(names[0], False)
        and not module.merged
        and module.lora_B[names[0]].bias is None
        and not getattr(module, "lora_variant", {})
    )


class Siblings(threading.local):
    """LoRA layers that are called one after the other with the same input: the first call computes for all of them.

    Each thread has its own inputs and outputs.
    """

    def __init__(self, members: list[Any]) -> None:
        self.members = members
        self.clear()

    def clear(self) -> None:
        self.x: torch.Tensor | None = None
        self.waiting: dict[int, torch.Tensor] = {}

    def forward(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        if self.x is not x or id(module) not in self.waiting:
            outputs = _joint_forward(self.members, x)
            self.x, self.waiting = x, {id(m): y for m, y in zip(self.members, outputs, strict=True)}
        y = self.waiting.pop(id(module))
        if not self.waiting:
            self.clear()
        return y


def _lora_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    if module.disable_adapters or module.merged:
        return type(module).forward(module, x)
    siblings = getattr(module, "siblings", None)
    if siblings is not None and len({_probability(m) for m in siblings.members}) == 1:
        return siblings.forward(module, x)
    return _joint_forward([module], x)[0]


def _joint_forward(modules: list[Any], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    layers, scales, factors = [], [], []
    for module in modules:
        (name,) = module.lora_A
        layers.append(module.get_base_layer())
        scales.append(module.scaling[name])
        factors += [module.lora_A[name].weight, module.lora_B[name].weight]
    return LoraFunction.apply(x, tuple(layers), tuple(scales), _probability(modules[0]), *factors)


def _probability(module: Any) -> float:
    """The probability with which an entry of the layer's input is dropped, as things are now."""
    (dropout,) = module.lora_dropout.values()
    return dropout.p if module.training and isinstance(dropout, torch.nn.Dropout) else 0.0


def _stacked(factors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The A matrices, one below the other."""
    return torch.cat(list(factors[::2])).to(dtype) if len(factors) > 2 else factors[0].to(dtype)


def _parts(low: torch.Tensor, factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Each layer's columns of the (tokens, sum of ranks) product."""
    return low.split([a.shape[0] for a in factors[::2]], dim=1)


def _norm_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    return NormFunction.apply(x, module.weight, module.variance_epsilon)


def _mlp_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(GateFunction.apply(module.gate_proj(x), module.up_proj(x)))


def _weight(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The frozen layer's (weight, bias) in the dtype that is computed in; 4-bit weights are expanded for the moment."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight, layer.bias
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, state).to(layer.compute_dtype or torch.bfloat16)
    return weight, None if layer.bias is None else layer.bias.to(weight.dtype)


def _dropped(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Which entries of x dropout sets to 0, each with probability p; the same ones for the same seed.

    On a CPU their positions in the flattened x: the gaps between them are geometric, and log(u) / log(1 - p) rounded down is a
    geometric variable (Devroye 1986, Non-Uniform Random Variate Generation, X.2). So only p of the random numbers are needed
    that `bernoulli_` draws, which was a fifth of the time of a training step. Elsewhere a mask.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(p, generator=generator)
    n = x.numel()
    draws = int(n * p + 8 * math.sqrt(n * p) + 16)  # eight standard deviations more than are needed on average
    gaps = torch.rand(draws, generator=generator).neg_().add_(1).log_().mul_(1 / math.log1p(-p)).long().add_(1)
    positions = gaps.cumsum(0).sub_(1)
    return positions[: int(torch.searchsorted(positions, n))]


def _zero(x: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Set the dropped entries of x (contiguous) to 0, in place."""
    if dropped.dtype is torch.bool:
        return x.masked_fill_(dropped, 0)
    x.view(-1).index_fill_(0, dropped, 0)
    return x
