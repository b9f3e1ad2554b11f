"""What makes it fast: attention, and what is chosen by measuring it on this machine, i.e. CPU
threads, and whether blocks are compiled.

Threads wait for each other at every operation. Beside another busy program, e.g. a browser, one
of them is always late, and two threads are slower than one. So a run takes several only where they
gain much, and drops them when they no longer do: see ThreadWatch.
"""
import math
import os
import time

import torch
import torch.nn.functional as F

from support.command import one_line
from support.ranks import all_ranks, ranks

MIN_GAIN = 1.25  # of speed over one thread, below which more threads are not worth their waiting
MIN_STEPS = 100  # a shorter run would end before the measurement pays off
LONG = 1200      # seconds: compiling may take a minute, so shorter runs are not worth a try
WINDOW = 5.0     # seconds of steps that are judged together
PATIENCE = 1.5   # seconds to measure a step; a slower one is measured once


def shortest(step):
    """Seconds of the shortest of up to four calls of step(), the first of which warms up."""
    seconds = []
    while len(seconds) < 4 and sum(seconds) < PATIENCE:
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def rehearse(model, batch, dtype, backward=True):
    """Forward and backward pass of model.unet on `batch` random latents; leaves no gradients."""
    config = model.config
    side = config.image_size // config.vae.factor
    device = model.shift.device
    x = torch.randn(batch, config.vae.latent_channels, side, side, device=device)
    t = torch.zeros(batch, dtype=torch.int64, device=device)
    with (torch.set_grad_enabled(backward),
          torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)):
        prediction = model.unet(x, t, *model.null_context(batch))
    if backward:
        prediction.float().square().mean().backward()
        model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()


def set_threads(threads, device, steps, step):
    """Set the number of CPU threads. Returns (threads, gain): the number, for a resumed run to
    take, 0 on a GPU; and the measured speed over one thread, 0 if it was not measured.

    threads: the number, or 0 to measure step(), unless the run is short (of `steps` steps), has
    several ranks, or the user has set OMP_NUM_THREADS.
    """
    default = torch.get_num_threads()
    is_set = "OMP_NUM_THREADS" in os.environ or ranks() > 1
    gain = 0.0
    if not threads and device.type == "cpu":
        threads = default
        if default > 1 and not is_set and steps >= MIN_STEPS:
            with torch.random.fork_rng(devices=[]):  # PyTorch's random state stays as it was
                torch.set_num_threads(1)  # first, because more may be very slow
                alone = shortest(step)
                torch.set_num_threads(default)
                gain = alone / shortest(step)
            threads = default if gain >= MIN_GAIN else 1
            print(f"{threads} of {default} threads: {default} are {gain:.1f} times as fast as one, "
                  "but wait for each other beside other programs; choose with --threads N")
    if threads:
        torch.set_num_threads(threads)
    return threads, gain


class ThreadWatch:
    """Falls back to one thread when several have become slower than one.

    gain: their speed over one thread when they were measured; 0 never falls back. Another program
    is busy if steps take longer than one thread would, by a quarter, in two windows in succession.
    """

    def __init__(self, gain=0.0):
        self.gain = gain
        self.stage = None
        self.fastest = {}  # stage -> seconds of a step
        self.steps = 0     # of this window
        self.seconds = 0.0
        self.slow_windows = 0

    def look(self, stage, steps, seconds):
        """Call it after some steps, which took these seconds altogether."""
        if stage != self.stage:  # its steps take another time
            self.stage = stage
            self.steps, self.seconds, self.slow_windows = 0, 0.0, 0
        self.steps += steps
        self.seconds += seconds
        if not self.gain or torch.get_num_threads() == 1 or self.seconds < WINDOW:
            return
        step = self.seconds / self.steps
        self.steps, self.seconds = 0, 0.0
        self.fastest[stage] = min(step, self.fastest.get(stage, step))
        is_slow = step > MIN_GAIN * self.gain * self.fastest[stage]
        self.slow_windows = self.slow_windows + 1 if is_slow else 0
        if self.slow_windows == 2:
            print(f"\nnote: a step takes {step:.2f} s, {self.fastest[stage]:.2f} s before: another "
                  "program is busy; one thread from now on")
            torch.set_num_threads(1)


# ---- compiling ---------------------------------------------------------------------------------

def compile_blocks(model, **options):
    """torch.compile each of the `repeated_blocks` of every network in model, in place.

    This compiles much faster than whole networks, and the blocks run equally fast.
    """
    # Blocks share their code, compiled once per width: allow more than the default of 8 versions.
    config = torch._dynamo.config
    config.cache_size_limit = max(64, config.cache_size_limit)  # recompile_limit has this alias
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
    if wanted:
        compile_blocks(model, **options)
    if wanted is not None or device.type != "cuda":
        return bool(wanted)
    eager = max(all_ranks(shortest(step)))  # all ranks decide alike
    if steps * eager < LONG:
        return False

    # Without a compiler on this machine, blocks stay as they are.
    compiled, note = math.inf, ""
    began = time.perf_counter()
    try:
        compile_blocks(model, **options)
        step()
        warm_up = time.perf_counter() - began
        compiled = shortest(step)
        note = (f"after {warm_up:.0f} s of compiling, a step takes {compiled:.3f} s instead of "
                f"{eager:.3f} s")
    except Exception as error:  # compilers raise anything
        note = one_line(error)[:200]
    pays = max(all_ranks(compiled)) < eager
    print(f"torch.compile {'on' if pays else 'off'}: {note}")
    if not pays:
        for block in repeated_blocks(model):
            block._compiled_call_impl = None  # undoes block.compile
    return pays


# ---- attention ---------------------------------------------------------------------------------

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
