"""Speed and memory on a GPU, compared with diffusers: a markdown table.

    python tools/gpu_check.py              # at most ten minutes
    python tools/gpu_check.py --smoke      # on a CPU with tiny networks: does it run?
    python tools/gpu_check.py --only base sampling

The most important sections come first; each takes at most 90 s; one that fails prints its error.
Autocast is bf16; diffusers, if installed, has the same weights, inputs and optimizer. The last
column is the time of diffusers, not compiled, divided by that of the row.
"""
# ruff: noqa: B023 - closures are called in the round of the loop that makes them
import argparse
import gc
import math
import signal
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "reference")]

from dinodiff import NoiseSchedule, ddim_sample, guided
from make_diffusers import diffusers_unet, diffusers_vae
from support.fast import compile_blocks
from train import PRESETS
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

SECTION_SECONDS = 90
VARIANTS = ("diffusers", "ours", "ours, compiled", "diffusers, compiled")
COLUMNS = ("work", "variant", "ms", "images/s", "of bf16 rate", "GiB", "warm-up s", "x diffusers")


class Bench:
    """Times work on the device and prints rows of the table."""

    def __init__(self, smoke):
        self.smoke = smoke
        self.device = torch.device("cpu" if smoke else "cuda")
        self.rate = math.inf    # measured bf16 operations per second
        self.peer_seconds = {}  # work -> seconds of diffusers, not compiled

    def preset(self, name):
        """A Preset, with tiny networks in a smoke test."""
        if not self.smoke:
            return PRESETS[name]
        return replace(PRESETS["tiny"], size=32, batch=2,
                       vae_config=VAEConfig(3, 4, 32, (1, 1), 1),
                       unet_config=UNetConfig(4, 4, 32, (1,), 1, (True,), 8, 2))

    def seconds(self, work, repeats):
        """Seconds per call, until the GPU has finished."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        wait()
        return (time.perf_counter() - began) / repeats

    def row(self, name, variant, work, images, flops=0):
        """Time a function and print its row; images, flops: of one call."""
        warm_up = self.seconds(work, 1)
        repeats = 1
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            repeats = max(3, min(50, int(2 / self.seconds(work, 3))))
        each = self.seconds(work, repeats)

        if variant == "diffusers":
            self.peer_seconds[name] = each
        peer = self.peer_seconds.get(name)
        peak = torch.cuda.max_memory_allocated() / 2 ** 30 if self.device.type == "cuda" else 0
        print_row(name, variant, f"{1000 * each:.1f}", f"{images / each:.0f}",
                  f"{flops / each / self.rate:.1%}" if flops else "-", f"{peak:.1f}",
                  f"{warm_up:.1f}", f"{peer / each:.2f}" if peer else "-")

    def networks(self, ours, peer, variants=VARIANTS):
        """Yields (variant, network); one at a time, because memory is measured."""
        backend = "eager" if self.smoke else "inductor"
        for variant in variants:
            self.clean()
            is_peer = variant.startswith("diffusers")
            if is_peer and not find_spec("diffusers"):
                continue
            with self.device:  # initialising 860 M parameters takes ten seconds on a CPU
                torch.manual_seed(0)
                network = ours().to(self.device)
                if is_peer:
                    weights = network.state_dict()
                    network = peer()
                    network.load_state_dict(weights)
            if "compiled" in variant and is_peer:
                network.compile_repeated_blocks(fullgraph=True, backend=backend)
            elif "compiled" in variant:
                compile_blocks(network, dynamic=False, backend=backend)
            yield variant, network

    def clean(self):
        """Free graphs and memory of the row before."""
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def training_step(self, network, loss_fn):
        """A function that does the work of one step of train.fit."""
        params = list(network.train().parameters())
        ema = [p.detach().clone() for p in params]
        optimizer = torch.optim.AdamW(params, 1e-5, fused=True)

        def step():
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = loss_fn()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_lerp_(ema, [p.detach() for p in params], 0.001)
        return step


def print_row(*cells):
    print("|", " | ".join(cells), "|", flush=True)


def tensor_of(output):
    """The output of a network of either library as a tensor."""
    return output if torch.is_tensor(output) else output[0]


# ---------------------------------------------------------------------------- the sections

def peer_unet(preset):
    config = preset.unet_config
    return diffusers_unet(config.base_channels, config.channel_multipliers,
                          config.layers_per_block, config.attention_levels, config.context_dim,
                          config.num_heads)


def inputs(preset, batch, device):
    """xt, t and four context tokens."""
    side = preset.size // preset.vae_config.factor
    return (torch.randn(batch, 4, side, side, device=device), torch.arange(batch, device=device),
            torch.randn(batch, 4, preset.unet_config.context_dim, device=device))


def training_flops(preset):
    """FLOPs of a training step per image: three times those of a forward pass."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        UNet(preset.unet_config)(*inputs(preset, 1, "meta"))
    return 3 * counter.get_total_flops()


def unet_steps(bench, name):
    """A training step of the U-Net, also with --checkpointing."""
    preset = bench.preset(name)
    batch = preset.batch
    xt, t, context = inputs(preset, batch, bench.device)
    variants = (*VARIANTS, "ours, checkpointing", "ours, compiled, checkpointing")
    for variant, network in bench.networks(lambda: UNet(preset.unet_config),
                                           lambda: peer_unet(preset), variants):
        network.checkpointing = "checkpointing" in variant

        def loss_fn():
            return F.mse_loss(tensor_of(network(xt, t, context)).float(), xt)

        bench.row(f"training step, {name}, batch {batch}", variant,
                  bench.training_step(network, loss_fn), batch, training_flops(preset) * batch)


def sampling(bench):
    """DDIM with guidance 2; diffusers' U-Net runs in our sampler."""
    batch, steps = (2, 2) if bench.smoke else (32, 10)
    for name in ("base", "sd15"):
        preset = bench.preset(name)
        xt, _, context = inputs(preset, batch, bench.device)
        for variant, network in bench.networks(lambda: UNet(preset.unet_config),
                                               lambda: peer_unet(preset)):
            network.requires_grad_(False).eval()

            def predict(x, t, context, mask):
                return tensor_of(network(x, t, context))

            def work():
                with torch.autocast(bench.device.type, torch.bfloat16):
                    model = guided(predict, context, 0 * context, 2.0)
                    ddim_sample(model, xt, NoiseSchedule(), steps)

            bench.row(f"{steps} steps of DDIM, {name}, batch {batch}", variant, work, batch)


def vae(bench):
    """Encode and decode with the VAE of sd15."""
    preset = bench.preset("sd15")
    config = preset.vae_config
    image = torch.rand(4, 3, preset.size, preset.size, device=bench.device)

    def peer():
        return diffusers_vae(config.base_channels, config.channel_multipliers,
                             config.layers_per_block)

    # diffusers marks no block of its VAE as repeated, so the last variant is left out.
    for variant, network in bench.networks(lambda: AutoencoderKL(config), peer, VARIANTS[:3]):
        @torch.no_grad()
        def work():
            with torch.autocast(bench.device.type, torch.bfloat16):
                posterior = network.encode(image)
                network.decode(getattr(posterior, "latent_dist", posterior).mean)

        bench.row(f"VAE, encode and decode, {preset.size} px, batch 4", variant, work, 4)


SECTIONS = {
    "base": lambda bench: unet_steps(bench, "base"),
    "sd15": lambda bench: unet_steps(bench, "sd15"),
    "sampling": sampling,
    "small": lambda bench: unet_steps(bench, "small"),
    "vae": vae,
}


# ---------------------------------------------------------------------------- all

def print_machine(bench):
    """The device, the rate of a large matrix product, and the head of the table."""
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    side = 256 if bench.smoke else 8192
    a = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    bench.seconds(lambda: a @ a, 3)
    bench.rate = 2 * side ** 3 / bench.seconds(lambda: a @ a, 10)
    print(f"\n{name}, torch {torch.__version__}, bf16 product of {side} x {side}: "
          f"{bench.rate / 1e12:.3g} TFLOP/s\n")
    print_row(*COLUMNS)
    print_row(*["---"] * len(COLUMNS))


def too_long(*_):
    raise TimeoutError(f"over {SECTION_SECONDS} s")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Speed and memory on a GPU.")
    parser.add_argument("--smoke", action="store_true", help="on a CPU with tiny networks")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS],
                        help="only these sections")
    args = parser.parse_args(argv)
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("error: no CUDA device: this script needs one: pass --smoke to try it on a CPU")

    bench = Bench(args.smoke)
    torch.set_float32_matmul_precision("high")  # as train.py does
    signal.signal(signal.SIGALRM, too_long)
    print_machine(bench)
    failures = 0
    for name in args.only:
        signal.alarm(SECTION_SECONDS)
        try:
            SECTIONS[name](bench)
        except Exception as error:  # the other sections run all the same
            failures += 1
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        finally:
            signal.alarm(0)
        bench.clean()
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
