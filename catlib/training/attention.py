"""Causal attention whose backward pass is plain matrix products: on a CPU, for the lengths of a photo's prompt.

torch's backward of flash attention in bfloat16 there took 25 per cent of a step for 7 per cent of its arithmetic; products of whole
matrices use the processor's units for bfloat16. The forward pass stays torch's.
"""

import math
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME, PLAIN = "catlib_products", "sdpa"
LONGEST = 512  # tokens; at 620 it gains little, at 1,000 flash attention is twice as fast, and keeps no tokens × tokens
OTHERS = ("position_bias", "cache", "softcap")  # arguments of transformers that change what is computed


class CausalAttention(torch.autograd.Function):
    """softmax(scale · q k', causal) v of q (batch, heads, tokens, width), k and v (batch, groups, tokens, width).

    `heads` is a multiple of `groups`, whose keys and values consecutive heads share. The probabilities are computed again in
    backward, in the dtype of q; the gradients are those of Vaswani et al. 2017, arXiv 1706.03762, equation 1.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        (_, _, tokens, width), groups = q.shape, k.shape[0] * k.shape[1]
        # The heads that share keys stand one below the other: (batch · groups, heads / groups · tokens, width).
        queries, keys, values, given = (x.reshape(groups, -1, width) for x in (q * ctx.scale, k, v, dy))
        hidden = torch.full((tokens, tokens), -torch.inf, dtype=q.dtype).triu_(1)
        scores = torch.bmm(queries, keys.transpose(1, 2)).view(-1, tokens, tokens)
        p = torch.softmax(scores.add_(hidden), -1)
        rows = p.view(groups, -1, tokens)
        dv = torch.bmm(rows.transpose(1, 2), given)
        dp = torch.bmm(given, values.transpose(1, 2)).view_as(p)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype).view_as(rows)
        dq, dk = torch.bmm(ds, keys).mul_(ctx.scale), torch.bmm(ds.transpose(1, 2), queries)
        return dq.view_as(q), dk.view_as(k), dv.view_as(v), None


def attend(
    module: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function on a CPU: `CausalAttention` where it is faster and the same, else torch's."""
    causal = mask is None and (module.is_causal if is_causal is None else is_causal)
    short = q.shape[2] == k.shape[2] <= LONGEST and q.shape[-1] == v.shape[-1]
    trained = q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if not (causal and short and trained) or dropout or any(more.get(name) is not None for name in OTHERS):
        return sdpa_attention_forward(module, q, k, v, mask, dropout, scaling, is_causal, **more)
    y = CausalAttention.apply(q, k, v, scaling or 1 / math.sqrt(q.shape[-1]))
    return y.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_products(config: Any) -> None:
    """Let the language model with this configuration, on a CPU, attend by `attend`, if it does by torch's function."""
    if config._attn_implementation == PLAIN:
        config._attn_implementation = NAME
