"""Ours beside the library that a user would pick instead: equal results first, then time.

    pip install diffusers timm scikit-learn pytorch-fid        # for this script alone
    python tools/benchmark.py all                              # two CPU cores, about 15 minutes
    python tools/benchmark.py unet sample --repeats 15         # or single parts
    python tools/benchmark.py threads                          # ours alone: 1 thread, 2, or asleep

Both sides get the same weights (parameter names agree), inputs, threads,
float32 and fused AdamW, and nothing else is set: the networks alone differ. Pairs alternate in one
run, and each leads in turn; a ratio is peer time / our time, the median over pairs, above 1 means
that ours is faster. A busy machine spoils times, and ratios less; least of all with one thread:

    OMP_NUM_THREADS=1 python tools/benchmark.py all --threads 1
"""
# ruff: noqa: B023 - closures are called in the round of the loop that makes them
import argparse
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "reference")]
from dino import VISION_TRANSFORMERS, VisionTransformer, preprocess
from dinodiff import NoiseSchedule, ddim_sample, guided
from evaluate import frechet_distance
from make_diffusers import diffusers_unet, diffusers_vae, fill_parameters, inputs
from prompts import inertia, kmeans
from support.ranks import autocast_dtype
from train import PRESETS
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

TINY = PRESETS["tiny"].unet_config
WIDE = UNetConfig(4, 4, 64, (1, 2, 4), 2, (True, True, True), 192, 4)


def seconds(work):
    """CPU seconds with one thread, because other work distorts them less; else wall time."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    work()
    return clock() - began


def compare(name, ours, peer, repeats):
    """Alternate the two after a warm-up; print medians, and the median ratio of pairs."""
    ours(), peer()
    times = np.empty((repeats, 2))
    for i in range(repeats):
        for side in ((0, 1), (1, 0))[i % 2]:
            times[i, side] = seconds((ours, peer)[side])
    mine, theirs = np.median(times, axis=0)
    low, ratio, high = np.quantile(times[:, 1] / times[:, 0], (0.25, 0.5, 0.75))
    print(f"| {name} | {mine:.4g} s | {theirs:.4g} s | {ratio:.2f} ({low:.2f} to {high:.2f}) |",
          flush=True)


def check(name, ours, peer, tolerance=1e-4):
    """Stop unless the results agree, relative to the peer's largest entry."""
    error = ((ours - peer).abs().max() / peer.abs().max()).item()
    print(f"{name}: largest difference / largest entry {error:.1e}", flush=True)
    assert error < tolerance, f"{name}: {error:.1e} is over {tolerance:.0e}: results differ"


def same_weights(ours, peer):
    """Both networks, filled with the same reproducible weights."""
    peer.load_state_dict(fill_parameters(ours, 0).state_dict(), strict=True)
    return ours, peer


# ---------------------------------------------------------------- networks

def unet_pair(c):
    return same_weights(UNet(c), diffusers_unet(
        c.base_channels, c.channel_multipliers, c.layers_per_block, c.attention_levels,
        c.context_dim, c.num_heads))


def training_step(predict, parameters, target):
    """A function that does forward, backward and one AdamW step."""
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)

    def step():
        F.mse_loss(predict(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def benchmark_unet(repeats):
    for name, config, batch, side in (("tiny", TINY, 16, 16), ("64-wide", WIDE, 4, 32)):
        ours, peer = unet_pair(config)
        xt, context, target = inputs(1, (batch, 4, side, side), (batch, 4, config.context_dim),
                                     (batch, 4, side, side))
        t = torch.arange(batch) * (999 // batch)
        calls = (lambda: ours(xt, t, context),
                 lambda: peer(xt, t, context, return_dict=False)[0])
        predictions = [call() for call in calls]
        check(f"U-Net {name}, prediction", *predictions)
        for prediction in predictions:
            F.mse_loss(prediction, target).backward()
        theirs = dict(peer.named_parameters())
        check(f"U-Net {name}, gradients", *(
            torch.cat([p.grad.flatten() for p in side]) for side in (
                ours.parameters(), [theirs[n] for n, _ in ours.named_parameters()])))
        compare(f"U-Net {name}, {batch} x {side} x {side}, forward + backward + AdamW",
                *(training_step(call, net.parameters(), target)
                  for call, net in zip(calls, (ours, peer))), repeats)


def benchmark_sample(repeats, batch=8, steps=50, scale=2.0):
    from diffusers import DDIMScheduler
    ours, peer = (net.requires_grad_(False) for net in unet_pair(TINY))
    noise, context, null = inputs(1, (batch, 4, 16, 16), (batch, 4, 192), (batch, 4, 192))
    for net in (ours, peer):  # predictions of about unit size, so that nothing explodes
        net.conv_out.weight.mul_(0.3)
    schedule = NoiseSchedule(1000, "scaled_linear", "v", zero_terminal_snr=True)
    scheduler = DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", prediction_type="v_prediction", clip_sample=False,
        rescale_betas_zero_snr=True, timestep_spacing="trailing")

    def sample():
        return ddim_sample(guided(ours, context, null, scale), noise, schedule, steps)

    @torch.no_grad()
    def loop():  # what a pipeline's loop does
        scheduler.set_timesteps(steps)
        x, both = noise, torch.cat([null, context])
        for t in scheduler.timesteps:
            pair = scheduler.scale_model_input(torch.cat([x, x]), t)
            without, with_ = peer(pair, t, both, return_dict=False)[0].chunk(2)
            x = scheduler.step(without + scale * (with_ - without), t, x, return_dict=False)[0]
        return x

    check(f"{steps} DDIM steps", sample(), loop(), 1e-3)  # rounding of 50 steps
    compare(f"{steps} DDIM steps, guidance {scale:g}, tiny U-Net, batch {batch}", sample, loop,
            repeats)


@torch.no_grad()
def benchmark_vae(repeats):
    for base, multipliers, layers, batch, side in ((32, (1, 2, 4), 1, 8, 64),
                                                   (64, (1, 2, 4, 4), 2, 2, 128)):
        ours, peer = same_weights(AutoencoderKL(VAEConfig(3, 4, base, multipliers, layers)),
                                  diffusers_vae(base, multipliers, layers))
        x, = inputs(1, (batch, 3, side, side))
        calls = (lambda: ours.decode(ours.encode(x).mean),
                 lambda: peer.decode(peer.encode(x).latent_dist.mean).sample)
        name = f"VAE {base} wide, {batch} x {side} x {side}, encode + decode"
        check(name, *(call() for call in calls))
        compare(name, *calls, repeats)


@torch.no_grad()
def benchmark_vit(repeats, batch=8):
    import timm
    peer = timm.create_model("vit_small_patch16_224", num_classes=0)
    ours, peer = same_weights(VisionTransformer(VISION_TRANSFORMERS["dino_vits16"]), peer)
    x = inputs(1, (batch, 3, 224, 224))[0].clamp(-1, 1)
    calls = (lambda: ours(x)[:, 0], lambda: peer(preprocess(x, "imagenet")))
    check("ViT-S/16", *(call() for call in calls))
    compare(f"ViT-S/16, {batch} images of 224 px", *calls, repeats)


# ---------------------------------------------------------------- threads beside a busy program

def busy_program(is_on):
    """Multiply matrices with one thread while is_on is set."""
    torch.set_num_threads(1)
    a = torch.randn(512, 512)
    while is_on.wait():
        a @ a


def unet_steps(threads, most=5, patience=4):
    """Seconds of up to `most` training steps, fewer if slow: stops after `patience` seconds."""
    torch.set_num_threads(threads)
    unet = UNet(TINY)
    xt, context, target = inputs(1, (16, 4, 16, 16), (16, 4, TINY.context_dim), (16, 4, 16, 16))
    step = training_step(lambda: unet(xt, torch.arange(16) * 62, context).float(),
                         unet.parameters(), target)
    times = []
    device = torch.device("cpu")
    with torch.autocast("cpu", enabled=autocast_dtype(device) == torch.bfloat16):
        step()
        while len(times) < most and sum(times) < patience:
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
    return times


def benchmark_threads(repeats):
    """A step of tiny, quiet and beside a busy program, in processes that take turns."""
    spawn = multiprocessing.get_context("spawn")  # OpenMP reads its settings when it is loaded
    is_on = spawn.Event()
    spawn.Process(target=busy_program, args=(is_on,), daemon=True).start()
    more = max(2, torch.get_num_threads())
    workers = {}
    for name, count, policy in (("1", 1, {}), (f"{more}", more, {}),
                                (f"{more}, passive", more, {"OMP_WAIT_POLICY": "PASSIVE"})):
        os.environ.update(policy)
        workers[name] = spawn.Pool(1), count
        workers[name][0].apply(unet_steps, (1, 1))  # waits until it has started

    times = {name: {"quiet": [], "busy": []} for name in workers}
    for state in ["quiet", "busy"] * min(repeats, 3):
        is_on.set() if state == "busy" else is_on.clear()
        for name, (pool, count) in workers.items():
            times[name][state] += pool.apply(unet_steps, (count,))
    print("\n| threads | quiet | beside one busy program |\n| --- | --- | --- |")
    for name, states in times.items():
        cells = [f"{statistics.median(x):.2f} s ({min(x):.2f} to {max(x):.2f})"
                 for x in states.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


# ---------------------------------------------------------------- statistics

def blobs(n, d, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    centers = 1.5 * torch.randn(k, d, generator=g)
    return centers[torch.randint(k, (n,), generator=g)] + torch.randn(n, d, generator=g)


def noise(n, d):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(0))


def benchmark_kmeans(repeats):
    from sklearn.cluster import KMeans
    print("K = 33, n_init 10, greedy k-means++")
    sets = {"Gaussian blobs": blobs(2000, 64, 40), "uniform noise": noise(2000, 64)}
    for name, x in sets.items():
        ratios = []
        for seed in range(5):
            theirs = KMeans(33, n_init=10, random_state=seed).fit(x.numpy()).inertia_
            ratios.append(inertia(x, *kmeans(x, 33, seed)) / theirs)
        print(f"inertia, ours / theirs, {name} {tuple(x.shape)}: median of 5 seeds "
              f"{statistics.median(ratios):.4f} ({min(ratios):.4f}, {max(ratios):.4f})", flush=True)
    for name, x in (("blobs", blobs(50_000, 384, 40)), ("uniform noise", noise(50_000, 384))):
        array = np.ascontiguousarray(x.numpy())
        compare(f"K-means, {name}, N = 50,000, D = 384, n_init 10", lambda: kmeans(x, 33, 0),
                lambda: KMeans(33, n_init=10, random_state=0).fit(array), min(repeats, 3))


def benchmark_frechet(repeats, n=5000, d=2048):
    from pytorch_fid.fid_score import calculate_frechet_distance
    a, b = (x.double() for x in (blobs(n, d, 40, 0), blobs(n, d, 40, 1)))

    def theirs():
        moments = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a.numpy(), b.numpy()))
        return calculate_frechet_distance(*(m for pair in moments for m in pair))

    check("Frechet distance", torch.tensor(frechet_distance(a, b)), torch.tensor(theirs()), 1e-6)
    compare(f"Frechet distance, N = {n:,}, D = {d:,}, float64", lambda: frechet_distance(a, b),
            theirs, min(repeats, 3))


def main():
    parts = {name.removeprefix("benchmark_"): work for name, work in globals().items()
             if name.startswith("benchmark_")}
    parser = argparse.ArgumentParser(description="Times beside other libraries.")
    parser.add_argument("what", nargs="+", choices=(*parts, "all"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.repeats} repeats")
    if args.what != ["threads"]:
        print("| work | ours | peer | peer / ours (quartiles) |\n| --- | --- | --- | --- |")
    for name in parts if "all" in args.what else args.what:
        parts[name](args.repeats)


if __name__ == "__main__":
    main()
