"""Speed that does not belong in a network's text: attention in bf16 on a CPU, compiled blocks."""
import math

import torch
import torch.nn.functional as F


def attention_weights(q, k, mask=None):
    """Softmax of scaled products: (B, heads, M, d), (B, heads, N, d) -> (B, heads, M, N), float32.

    mask: bool, broadcast to the result, True = attend.
    """
    scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1)


def attention(q, k, v, mask=None):
    """F.scaled_dot_product_attention, step by step where the fused kernel is slow.

    That is bf16 on a CPU: with up to 256 tokens a training step of it takes 3 to 7 times as long.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attention_weights(q, k, mask).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def compile_blocks(model, **options):
    """Compile each of the `repeated_blocks` of every network in model, in place: far quicker than
    compiling whole networks, and as fast afterwards. options: of torch.compile.
    """
    # Blocks share their code, and every width is a case of it: allow more cases than 8.
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(64, getattr(config, limit)))

    for network in model.modules():
        for block in network.modules():
            if isinstance(block, getattr(network, "repeated_blocks", ())):
                block.compile(**options)
