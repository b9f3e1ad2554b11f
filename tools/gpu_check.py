"""What a GPU does with this project, beside diffusers: a markdown table, rows as they come.

    python tools/gpu_check.py              # in the repository's root; at most ten minutes
    python tools/gpu_check.py --smoke      # all of it on a CPU with tiny networks: does it run?
    python tools/gpu_check.py --only base sampling

Sections come in order of worth and take at most 90 s each; one that fails names its error, and the
next begins. bf16 autocast; diffusers, where installed, has the same weights, inputs and optimizer.
The last column is the seconds of diffusers, not compiled, over those of the row.
"""
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dinodiff import NoiseSchedule, Refiner, ddim_sample, guided
from support.speed import compile_blocks
from train import PRESETS, refiner_config
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

SECTION_SECONDS = 90
VARIANTS = ("diffusers", "ours", "ours, compiled", "diffusers, compiled")
LAYOUTS = ("ours, compiled, contiguous", "ours, contiguous")
GRAPHS = "ours, whole, CUDA graphs"  # for networks that wait for kernel launches
COLUMNS = ("work", "variant", "ms", "images/s", "of bf16 rate", "GiB", "warm-up s", "x diffusers")


class Bench:
    """Times work on the device and prints a row of the table each."""

    def __init__(self, smoke):
        self.smoke = smoke
        self.device = torch.device("cpu" if smoke else "cuda")
        self.backend = "eager" if smoke else "inductor"
        self.rate = math.inf    # measured bf16 products a second
        self.peer_seconds = {}  # work -> seconds of diffusers, eager

    def preset(self, name):
        """A Preset, with tiny networks in a smoke test."""
        if not self.smoke:
            return PRESETS[name]
        return replace(PRESETS["tiny"], size=32, batch=2, refiner_batch=2, refiner_width=8,
                       refiner_window=16, vae_config=VAEConfig(3, 4, 32, (1, 1), 1),
                       unet_config=UNetConfig(4, 4, 32, (1,), 1, (True,), 8, 2))

    def seconds(self, work, repeats):
        """Of one call, with all that it has left on the GPU."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        wait()
        return (time.perf_counter() - began) / repeats

    def clean(self):
        """Forget graphs and free memory, so that rows do not disturb each other."""
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def row(self, name, variant, work, images, flops=0):
        """Time a function and print it; flops: of one call."""
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

    def networks(self, ours, peer=None, variants=VARIANTS):
        """(variant, network) for each variant; one at a time, because memory is counted."""
        for variant in variants:
            self.clean()
            is_peer = variant.startswith("diffusers")
            if is_peer and not (peer and find_spec("diffusers")):
                continue
            with self.device:  # 860 million random numbers take a CPU ten seconds
                torch.manual_seed(0)
                network = no_zeros(ours()).to(self.device)
                if is_peer:
                    weights = network.state_dict()
                    network = peer()
                    network.load_state_dict(weights)
            if "contiguous" in variant:
                network.to(memory_format=torch.contiguous_format)
            if variant == GRAPHS:
                network = torch.compile(network, mode="reduce-overhead")
            elif "compiled" in variant and is_peer:
                network.compile_repeated_blocks(fullgraph=True, backend=self.backend)
            elif "compiled" in variant:
                compile_blocks(network, dynamic=False, backend=self.backend)
            yield variant, network

    def training_step(self, network, loss_fn):
        """A function that does what a step of train.fit does."""
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


def no_zeros(network):
    """The network with small random numbers where weights start at zero."""
    with torch.no_grad():
        for p in network.parameters():
            if not p.any():
                p.normal_(std=0.02)
    return network


def tensor_of(output):
    """What a network of either library returns."""
    return output if torch.is_tensor(output) else output[0]


# ---------------------------------------------------------------------------- the U-Net

def peer_unet(preset):
    from diffusers import UNet2DConditionModel
    config = preset.unet_config
    has = config.attention_levels
    return UNet2DConditionModel(
        in_channels=config.in_channels, out_channels=config.out_channels,
        block_out_channels=tuple(config.widths), layers_per_block=config.layers_per_block,
        cross_attention_dim=config.context_dim, attention_head_dim=config.num_heads,
        down_block_types=["CrossAttnDownBlock2D" if x else "DownBlock2D" for x in has],
        up_block_types=["CrossAttnUpBlock2D" if x else "UpBlock2D" for x in has[::-1]])


def inputs(preset, batch, device):
    """xt, t and four context tokens."""
    side = preset.size // preset.vae_config.factor
    config = preset.unet_config
    return (torch.randn(batch, config.in_channels, side, side, device=device),
            torch.arange(batch, device=device),
            torch.randn(batch, 4, config.context_dim, device=device))


def training_flops(preset):
    """Of one image: three times those of a forward pass."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        UNet(preset.unet_config)(*inputs(preset, 1, "meta"))
    return 3 * counter.get_total_flops()


def unet_steps(bench, preset_name, variants=(*VARIANTS, *LAYOUTS), checkpointing=False):
    """A training step of the U-Net, ours and diffusers'."""
    preset = bench.preset(preset_name)
    batch = preset.batch
    xt, t, context = inputs(preset, batch, bench.device)
    name = f"training step, {preset_name}, batch {batch}{', checkpointing' * checkpointing}"
    for variant, network in bench.networks(lambda: UNet(preset.unet_config),
                                           lambda: peer_unet(preset), variants):
        network.checkpointing = checkpointing

        def loss_fn(network=network):
            return F.mse_loss(tensor_of(network(xt, t, context)).float(), xt)

        bench.row(name, variant, bench.training_step(network, loss_fn), batch,
                  training_flops(preset) * batch)


def memory(bench):
    """Steps with --checkpointing; those without are above."""
    for name in ("base", "sd15")[:1 if bench.smoke else 2]:
        unet_steps(bench, name, ("ours", "ours, compiled"), checkpointing=True)


def sampling(bench):
    """DDIM with guidance 2; diffusers' U-Net runs in our sampler."""
    batch, steps = (2, 2) if bench.smoke else (32, 10)
    for name in ("base", "sd15")[:1 if bench.smoke else 2]:
        preset = bench.preset(name)
        xt, _, context = inputs(preset, batch, bench.device)
        for variant, network in bench.networks(lambda preset=preset: UNet(preset.unet_config),
                                               lambda preset=preset: peer_unet(preset)):
            network.requires_grad_(False).eval()

            def work(network=network, xt=xt, context=context):
                def predict(x, t, context, mask):
                    return tensor_of(network(x, t, context))

                with torch.autocast(bench.device.type, torch.bfloat16):
                    model = guided(predict, context, 0 * context, 2.0)
                    ddim_sample(model, xt, NoiseSchedule(), steps)

            bench.row(f"{steps} steps of DDIM, {name}, batch {batch}", variant, work, batch)


# ---------------------------------------------------------------------------- VAE and refiner

def vae(bench):
    """Images to latents and back, by the VAE of sd15."""
    preset = bench.preset("sd15")
    config = preset.vae_config
    image = torch.rand(4, 3, preset.size, preset.size, device=bench.device)

    def peer():
        from diffusers import AutoencoderKL as Peer
        levels = len(config.widths)
        return Peer(block_out_channels=config.widths, layers_per_block=config.layers_per_block,
                    down_block_types=["DownEncoderBlock2D"] * levels,
                    up_block_types=["UpDecoderBlock2D"] * levels, latent_channels=4)

    # Of diffusers' VAE no block is marked as repeated.
    for variant, network in bench.networks(lambda: AutoencoderKL(config), peer, VARIANTS[:3]):
        @torch.no_grad()
        def work(network=network.eval()):
            with torch.autocast(bench.device.type, torch.bfloat16):
                posterior = network.encode(image)
                network.decode(getattr(posterior, "latent_dist", posterior).mean)

        bench.row(f"VAE there and back, {preset.size} px, batch 4", variant, work, 4)


def refiner(bench):
    """A training step of the refiner of base."""
    preset = bench.preset("base")
    batch, side = preset.refiner_batch, preset.refiner_window
    image, decoded = torch.rand(2, batch, 3, side, side, device=bench.device)
    generator = torch.Generator(bench.device)
    for variant, network in bench.networks(lambda: Refiner(refiner_config(preset, True)), None,
                                           ("ours", "ours, compiled")):
        def loss_fn(network=network):
            return network.loss(image, decoded, NoiseSchedule(), generator)

        bench.row(f"refiner's step, batch {batch}", variant,
                  bench.training_step(network, loss_fn), batch)


# ---------------------------------------------------------------------------- all

def machine(bench):
    """The device, and how fast it multiplies: what utilisation is measured against."""
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    side = 256 if bench.smoke else 8192
    a = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    bench.seconds(lambda: a @ a, 3)
    bench.rate = 2 * side ** 3 / bench.seconds(lambda: a @ a, 10)
    print(f"\n{name}, torch {torch.__version__}, bf16 product of {side} x {side}: "
          f"{bench.rate / 1e12:.3g} TFLOP/s\n")
    print_row(*COLUMNS)
    print_row(*["---"] * len(COLUMNS))


SECTIONS = {
    "base": lambda bench: unet_steps(bench, "base"),
    "sd15": lambda bench: unet_steps(bench, "sd15"),
    "small": lambda bench: unet_steps(bench, "small", (*VARIANTS, *LAYOUTS, GRAPHS)),
    "sampling": sampling,
    "cxr128": lambda bench: unet_steps(bench, "cxr128"),
    "vae": vae, "refiner": refiner, "memory": memory}


def too_long(*_):
    raise TimeoutError(f"over {SECTION_SECONDS} s")


def main(argv=None):
    parser = argparse.ArgumentParser(description="What a GPU does with this project.")
    parser.add_argument("--smoke", action="store_true", help="each kind of section on a CPU, tiny")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    args = parser.parse_args(argv)
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("error: no CUDA device: this script measures one: pass --smoke to try it on a CPU")

    bench = Bench(args.smoke)
    torch.set_float32_matmul_precision("high")  # as train.py does
    signal.signal(signal.SIGALRM, too_long)
    machine(bench)
    failures = 0
    tried = ("base", "sampling", "vae", "refiner", "memory")  # the others have the same code
    for name in args.only or (tried if args.smoke else SECTIONS):
        signal.alarm(SECTION_SECONDS)
        try:
            SECTIONS[name](bench)
        except Exception as error:  # the others are to be seen all the same
            failures += 1
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        finally:
            signal.alarm(0)
        bench.clean()
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
