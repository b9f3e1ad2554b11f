"""Attention in the form that is fastest where it runs."""
import math

import torch
import torch.nn.functional as F


def attention_weights(q, k, mask=None):
    """softmax(q k^T / sqrt(d)): (B, heads, M, d), (B, heads, N, d) -> (B, heads, M, N), float32.

    mask: bool, broadcastable to the result, True = attend.
    """
    scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1)


def attention(q, k, v, mask=None):
    """F.scaled_dot_product_attention, except in bf16 on a CPU.

    There the fused kernel takes 3 to 7 times as long in a training step of up to 256 tokens.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attention_weights(q, k, mask).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
