"""Speed-ups that all networks share: attention in bf16 on a CPU, compiled blocks."""
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


def compile_blocks(model, **options):
    """torch.compile each of the `repeated_blocks` of every network in model, in place.

    This compiles much faster than whole networks, and the blocks run equally fast.
    """
    # Blocks share their code, compiled once per width: allow more than the default of 8 versions.
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(64, getattr(config, limit)))

    for network in model.modules():
        for block in network.modules():
            if isinstance(block, getattr(network, "repeated_blocks", ())):
                block.compile(**options)
