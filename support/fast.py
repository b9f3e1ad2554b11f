"""Speed-ups that all networks share: attention in bf16 on a CPU, compiled blocks."""
import math
import time

import torch
import torch.nn.functional as F

from support.ranks import all_ranks
from support.threads import shortest

LONG = 1200  # seconds: compiling takes up to a minute, so shorter stages are not worth a try


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
    for block in repeated_blocks(model):
        block.compile(**options)


def repeated_blocks(model):
    """The blocks of every network in model that names their classes in `repeated_blocks`."""
    return [block for network in model.modules() for block in network.modules()
            if isinstance(block, getattr(network, "repeated_blocks", ()))]


def compile_where_it_pays(model, wanted, device, steps, step, **options):
    """compile_blocks(model), if wanted; returns whether the blocks are compiled.

    wanted: None compiles on CUDA for `steps` calls of step() that take long, and keeps the compiled
    blocks if they are faster. options: of torch.compile.
    """
    if wanted is None and device.type == "cuda":
        eager = all_ranks(shortest(step))[0]  # all ranks decide alike
        if steps * eager < LONG:
            return False
        compile_blocks(model, **options)
        began = time.perf_counter()
        step()
        warm_up = time.perf_counter() - began
        compiled = all_ranks(shortest(step))[0]
        wanted = compiled < eager
        print(f"torch.compile {'on' if wanted else 'off'}, after {warm_up:.0f} s of compiling: a "
              f"step takes {compiled:.3f} s instead of {eager:.3f} s; choose with --no-compile")
        if not wanted:
            for block in repeated_blocks(model):
                block._compiled_call_impl = None  # undoes block.compile
    elif wanted:
        compile_blocks(model, **options)
    return bool(wanted)
