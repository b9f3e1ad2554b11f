"""How many CPU threads a training takes.

Threads wait for each other at every operation. Beside another busy program, e.g. a browser, one
of them is always late, and two threads are slower than one. So the second has to earn its place.
"""
import os
import time

import torch

from support.ranks import ranks

MIN_GAIN = 1.25  # of speed over one thread, below which more threads are not worth their waiting
MIN_STEPS = 100  # a shorter run would end before the measurement pays off
PATIENCE = 1.5   # seconds for each number of threads; a slower step is measured once


def choose_threads(timings):
    """{threads: seconds of a step}, 1 among them -> the fastest number, or 1 if it gains little."""
    fastest = min(timings, key=timings.get)
    return fastest if timings[1] >= MIN_GAIN * timings[fastest] else 1


def measure_threads(step, counts):
    """{threads: seconds}: the shortest of up to four calls of step(), the first of which warms up;
    1 first, for others may be very slow. PyTorch's random state stays as it was."""
    timings = {}
    with torch.random.fork_rng(devices=[]):
        for count in counts:
            torch.set_num_threads(count)
            seconds = []
            while len(seconds) < 4 and sum(seconds) < PATIENCE:
                began = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - began)
            timings[count] = min(seconds)
    return timings


def rehearse(model, batch, dtype):
    """Forward and backward pass of model.unet on `batch` random latents; leaves no gradients."""
    config = model.config
    side = config.image_size // config.vae.factor
    x = torch.randn(batch, config.vae.latent_channels, side, side)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        prediction = model.unet(x, torch.zeros(batch).long(), *model.null_context(batch))
    prediction.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def set_threads(threads, device, steps, step):
    """Set the number of CPU threads, and return it for a resumed run to take; 0 on a GPU.

    threads: the number, or 0 to measure step(), unless the run is short (of `steps` steps), has
    several ranks, or the user has set OMP_NUM_THREADS.
    """
    default = torch.get_num_threads()
    is_set = "OMP_NUM_THREADS" in os.environ or ranks() > 1
    if not threads and device.type == "cpu":
        threads = default
        if default > 1 and not is_set and steps >= MIN_STEPS:
            timings = measure_threads(step, (1, default))
            threads = choose_threads(timings)
            gain = f"{default} threads are {timings[1] / timings[default]:.1f} times as fast"
            if threads == 1:
                print(f"1 thread: {gain}, and wait for each other when other programs run; "
                      "choose with --threads N")
            else:
                print(f"{gain} as 1; while other programs run they wait for each other, and "
                      "--threads 1 is faster")
    if threads:
        torch.set_num_threads(threads)
    return threads
