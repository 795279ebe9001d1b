"""The backward pass of causal attention on a CPU: by matrix products (catlib/training/attention.py) and torch's own.

    OMP_NUM_THREADS=1 python benchmarks/attention.py

Prints milliseconds, the least of ten, and how far the gradients are from float64's (largest relative error of q's, k's and v's).
"""

import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from catlib.training.attention import CausalAttention

SHAPES = ((4, 9, 3, 276, 64), (4, 9, 3, 85, 64), (1, 32, 32, 620, 128), (2, 16, 8, 1000, 64))


def torchs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def main() -> None:
    for batch, heads, groups, tokens, width in SHAPES:
        sizes = [(batch, tokens, n, width) for n in (heads, groups, groups, heads)]
        *inputs, dy = (torch.randn(size, dtype=torch.bfloat16).transpose(1, 2) for size in sizes)
        scale, line = width**-0.5, f"batch {batch}, heads {heads}/{groups}, {tokens} tokens of {width}:"
        exact = [x.double().requires_grad_() for x in inputs]
        wanted = torch.autograd.grad(torchs(*exact, scale), exact, dy.double())
        for name, function in (("products", CausalAttention.apply), ("torch", torchs)):
            given, times = [x.detach().requires_grad_() for x in inputs], []
            for _ in range(10):
                y = function(*given, scale)
                start = time.perf_counter()
                found = torch.autograd.grad(y, given, dy)
                times.append(time.perf_counter() - start)
            far = max(float((x - w).norm() / w.norm()) for x, w in zip(found, wanted, strict=True))
            line += f"  {name} {1000 * min(times):.1f} ms, {far:.4f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
