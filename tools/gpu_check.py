"""What a GPU does with this project: one line of JSON a figure, each beside its goal or its peer.

    python tools/gpu_check.py               # in the repository's root; 8 to 10 minutes on an H100
    python tools/gpu_check.py --smoke       # all of it on a CPU with tiny sizes: does it run?
    python tools/gpu_check.py --only sampling memory
    python tools/gpu_check.py --whole       # also preset small, trained whole on 112,120 images

Needs no network and nothing beyond requirements.txt; diffusers is timed beside where it is there.
Sections come in order of worth; those that no longer fit into --budget seconds say so. One that
fails names its error, and the next begins.
"""
# ruff: noqa: B023 - closures are called in the round of the loop that makes them
import argparse
import contextlib
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F

import train
from dino import ViTConfig
from dinodiff import DinoDiffusion, DinoDiffusionConfig
from evaluate import RandomFeatures, frechet_distance
from prompts import kmeans
from support.files import read_jsonl
from support.phantoms import chest_phantoms
from unet import UNetConfig
from vae import VAEConfig

# Operations of one training image, forward and backward (torch.utils.flop_counter).
FLOPS = {"small": 0.0553e12, "base": 0.1648e12, "sd15": 2.339e12}
GIB = 2 ** 30


class Check:
    """What all sections share: the device, the sizes, the time that is left."""

    def __init__(self, args):
        self.smoke = args.smoke
        self.budget = args.budget
        self.device = torch.device("cpu" if args.smoke else "cuda")
        self.folder = Path(tempfile.mkdtemp(prefix="gpu_check_"))
        self.began = time.monotonic()
        self.peak_flops = None  # measured bf16 products a second

    def presets(self, *names):
        return ("tiny",) if self.smoke else names

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work, repeats=1):
        """Of one call, with all that it has left on the GPU."""
        self.wait()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        self.wait()
        return (time.perf_counter() - began) / repeats

    def clean(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self):
        """GiB at the peak since `clean`; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / GIB if self.device.type == "cuda" else 0.0

    def section(self, name, work, needs):
        spent = time.monotonic() - self.began
        if spent + needs > self.budget:
            return say(f"{name}: left out", round(spent), "s spent", needs=needs)
        try:
            work(self)
        except Exception as error:  # the others are to be seen all the same
            where = error.__traceback__
            while where.tb_next:
                where = where.tb_next
            file = Path(where.tb_frame.f_code.co_filename).name
            say(f"{name}: FAILED", f"{type(error).__name__}: {str(error)[:300]}",
                at=f"{file}:{where.tb_lineno}")
        self.clean()
        say(f"{name}: took", time.monotonic() - self.began - spent, "s")


def say(figure, value, unit="", **more):
    """Print one figure as a line of JSON."""
    if isinstance(value, float):
        value = float(f"{value:.4g}")
    more = {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in more.items()}
    print(json.dumps({"figure": figure, "value": value, "unit": unit, **more}), flush=True)


# ---------------------------------------------------------------------------- the machine

def machine(check):
    """Its name, and how fast it multiplies and copies: what utilisation is measured against."""
    name = torch.cuda.get_device_name() if check.device.type == "cuda" else "cpu"
    say("device", name, torch=torch.__version__, cores=os.cpu_count())
    side = 256 if check.smoke else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(side, side, device=check.device, dtype=dtype)
        check.seconds(lambda: a @ a, 2)
        rate = 2 * side ** 3 / check.seconds(lambda: a @ a, 5)
        if dtype == torch.bfloat16:
            check.peak_flops = rate
        say(f"product of matrices, {dtype}", rate / 1e12, "TFLOP/s")
    x = torch.empty(2 ** (20 if check.smoke else 30), dtype=torch.uint8, device=check.device)
    y = torch.empty_like(x)
    check.seconds(lambda: y.copy_(x), 3)
    say("copy on the device", 2 * len(x) / check.seconds(lambda: y.copy_(x), 5) / 1e12, "TB/s")


# ---------------------------------------------------------------------------- the model

def new_model(preset, device):
    """The preset's DinoDiffusion with random weights, none of them zero, and a small ViT."""
    vae = train.VAES["sd15" if preset in ("base", "sd15") else preset]
    width = train.UNETS[preset].context_dim
    torch.manual_seed(0)
    with device:  # 860 million random numbers take a CPU ten seconds
        model = DinoDiffusion(DinoDiffusionConfig(
            image_size=train.PRESETS[preset]["size"], vae=vae, unet=train.UNETS[preset],
            vit=ViTConfig(16, 48, 2, 3, image_size=64), token_shape=(1, width)))
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.02)
    return model.to(device).eval()


class Latents(torch.utils.data.Dataset):
    """Random latents and tokens for `fit`."""

    def __init__(self, model, count=256):
        config = model.config
        side = config.image_size // config.vae.factor
        self.rows = (torch.randn(count, 4, side, side), torch.rand(count, 4, side, side),
                     torch.randn(count, *config.token_shape))

    def __len__(self):
        return len(self.rows[0])

    def __getitems__(self, rows):
        return tuple(x[rows] for x in self.rows)


def time_fit(check, model, batch, warm=6, steps=20):
    """Seconds of one step of train.fit: loader, loss, backward, clipping, AdamW, EMA."""
    if check.smoke:
        warm, steps = 1, 2
    trained = model.trained
    ema = {name: p.detach().clone() for name, p in train.trainable(trained).items()}
    torch.set_float32_matmul_precision("high")  # as train_unet does
    times = []

    def loss_fn(rows, step, generator):
        if step in (warm, warm + steps - 1):
            check.wait()
            times.append(time.perf_counter())
        return model.loss(rows[0], rows[1], model.standardise(rows[2]), generator)

    with contextlib.redirect_stdout(sys.stderr):
        train.fit("unet", trained, loss_fn, Latents(model), steps=5000, upto=warm + steps,
                  batch=batch, lr=1e-5, device=check.device, ema=ema, dtype=torch.bfloat16)
    torch.set_float32_matmul_precision("highest")
    return (times[1] - times[0]) / (steps - 1)


def report_step(check, name, seconds, batch, preset, **more):
    if not check.smoke:
        rate = FLOPS[preset] * batch / seconds
        more["tflops"] = rate / 1e12
        if check.peak_flops:
            more["of_measured_bf16"] = rate / check.peak_flops
    say(f"{name}: training step", 1000 * seconds, "ms", batch=batch,
        images_per_second=batch / seconds, peak_gib=check.memory(), **more)


def batch_of(check, preset):
    return 2 if check.smoke else train.PRESETS[preset]["batch"]


def training(check, compiled=False):
    """Ours, bf16. Goals: 1.2 times diffusers eager, 1.0 times compiled; utilisation 40 %."""
    for preset in check.presets("base", "sd15", "small"):
        check.clean()
        model = new_model(preset, check.device)
        batch = batch_of(check, preset)
        if compiled:
            model.unet.compile(backend="eager" if check.smoke else "inductor")
        seconds = time_fit(check, model, batch)
        kind = "compiled" if compiled else "eager"
        report_step(check, f"{preset}, ours, {kind} bf16", seconds, batch, preset)


def memory(check):
    """Peak of a step with and without --checkpointing. Goals: sd15 in 24 GiB, base in 12."""
    for preset in check.presets("base", "sd15"):
        for checkpointing in (False, True):
            check.clean()
            model = new_model(preset, check.device)
            model.unet.checkpointing = checkpointing
            batch = batch_of(check, preset)
            seconds = time_fit(check, model, batch, 2, 4)
            say(f"{preset}, --checkpointing {'on' if checkpointing else 'off'}: peak",
                check.memory(), "GiB", batch=batch, step_ms=1000 * seconds)


# ---------------------------------------------------------------------------- diffusers beside

def diffusers_unet(check, preset):
    """The same architecture in diffusers, or None where that is not installed."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        return None
    config = train.UNETS[preset]
    has = config.attention_levels
    with check.device:
        return UNet2DConditionModel(
            sample_size=64, in_channels=4, out_channels=4, block_out_channels=tuple(config.widths),
            layers_per_block=config.layers_per_block, cross_attention_dim=config.context_dim,
            attention_head_dim=config.num_heads,
            down_block_types=tuple("CrossAttnDownBlock2D" if x else "DownBlock2D" for x in has),
            up_block_types=tuple("CrossAttnUpBlock2D" if x else "UpBlock2D" for x in reversed(has)),
        )


def peers(check, compiled=False):
    """diffusers' U-Net: a step with clipping, AdamW and EMA as ours has; DDIM's calls of it."""
    for preset in check.presets("base", "sd15"):
        check.clean()
        peer = diffusers_unet(check, preset)
        if peer is None:
            return say("diffusers", "not installed")
        call = torch.compile(peer) if compiled else peer
        params = list(peer.parameters())
        ema = [p.detach().clone() for p in params]
        optimizer = torch.optim.AdamW(params, 1e-5, fused=True)
        batch = batch_of(check, preset)
        side = train.PRESETS[preset]["size"] // (4 if preset == "tiny" else 8)
        x = torch.randn(batch, 4, side, side, device=check.device)
        context = torch.randn(batch, 4, train.UNETS[preset].context_dim, device=check.device)
        t = torch.arange(batch, device=check.device)

        def step():
            with torch.autocast(check.device.type, torch.bfloat16):
                prediction = call(x, t, context, return_dict=False)[0]
                loss = F.mse_loss(prediction.float(), x)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_lerp_(ema, [p.detach() for p in params], 0.001)

        kind = "compiled" if compiled else "eager"
        check.seconds(step, 1 if check.smoke else 4)
        seconds = check.seconds(step, 1 if check.smoke else 10)
        report_step(check, f"{preset}, diffusers, {kind} bf16", seconds, batch, preset)
        if not compiled:
            time_peer_sampling(check, preset, peer, side)


@torch.no_grad()
def time_peer_sampling(check, preset, peer, side):
    """One DDIM step of diffusers under guidance, both halves in one pass, bf16."""
    n = 2 if check.smoke else 32
    x = torch.randn(2 * n, 4, side, side, device=check.device)
    context = torch.randn(2 * n, 4, train.UNETS[preset].context_dim, device=check.device)
    t = torch.full((2 * n,), 500, device=check.device)

    def step():
        with torch.autocast(check.device.type, torch.bfloat16):
            null, conditional = peer(x, t, context, return_dict=False)[0].chunk(2)
        return null + 2 * (conditional - null)
    check.seconds(step)
    say(f"{preset}, diffusers, sampling bf16, guidance 2", 1000 * check.seconds(step, 3),
        "ms a step", batch=n)


# ---------------------------------------------------------------------------- sampling

def sampling(check):
    """Ours in both precisions. Goal: bf16 1.5 times as fast as diffusers eager."""
    for preset in check.presets("base", "sd15"):
        model = new_model(preset, check.device)
        n = 2 if check.smoke else 32
        condition = torch.randn(n, *model.config.token_shape)
        for dtype in (torch.bfloat16, torch.float32):
            check.clean()

            def make(steps):
                return model.sample(condition, list(range(n)), steps=steps,
                                    guidance_scale=2.0, eta=0.5, batch=n,
                                    dtype=dtype)
            assert make(2).isfinite().all()
            few = check.seconds(lambda: make(2))
            more = check.seconds(lambda: make(6))
            each = (more - few) / 4
            say(f"{preset}, ours, sampling {dtype}, guidance 2", 1000 * each, "ms a step", batch=n,
                images_per_second_50_steps=n / (few + 48 * each), peak_gib=check.memory())


def agreement(check):
    """CPU against GPU, float32 against bf16, of the same seeds: mean absolute difference of images
    in [0, 255], and the Frechet distance beside that of two halves."""
    here = new_model("tiny", torch.device("cpu"))
    there = copy.deepcopy(here).to(check.device)
    count = 4 if check.smoke else 256
    tokens = torch.randn(count, *here.config.token_shape,
                         generator=torch.Generator().manual_seed(1))
    options = {"seeds": list(range(count)), "steps": 8, "guidance_scale": 2.0, "eta": 0.5}
    images = {dtype: there.sample(tokens, dtype=dtype, **options).cpu()
              for dtype in (torch.float32, torch.bfloat16)}
    first = here.sample(tokens[:4], **{**options, "seeds": [0, 1, 2, 3]})
    gap = (images[torch.float32][:4] - first).abs().mean().item()
    say("CPU against GPU, float32: mean difference", 127.5 * gap, "grey levels")
    judge = RandomFeatures()
    whole, half = (judge(x) for x in images.values())
    gap = (images[torch.float32] - images[torch.bfloat16]).abs().mean().item()
    say("float32 against bf16: mean difference", 127.5 * gap, "grey levels",
        frechet=frechet_distance(whole, half),
        frechet_of_halves=frechet_distance(whole[::2], whole[1::2]))


# ---------------------------------------------------------------------------- command lines

def run(check, name, script, *flags, limit=600):
    """A script as a user starts it; its output. Says how long it took."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags), "--device",
                           check.device.type], cwd=check.folder, capture_output=True, text=True,
                          timeout=limit)
    if done.returncode:
        raise RuntimeError(f"{name}: code {done.returncode}: {(done.stderr or done.stdout)[-250:]}")
    say(f"{name}: whole command", time.monotonic() - began, "s")
    return done.stdout


def stage_rates(check, name, folder, batches):
    """Images a second of each stage, from the second third of its log on."""
    rows = read_jsonl(check.folder / folder / "log.jsonl")
    for stage, batch in batches.items():
        own = [row for row in rows if row["stage"] == stage]
        first = own[len(own) // 3]
        seconds = max(own[-1]["seconds"] - first["seconds"], 1e-9)
        say(f"{name}: {stage}", batch * (own[-1]["step"] - first["step"]) / seconds, "images/s",
            first_loss=own[0]["loss"], last_loss=own[-1]["loss"])


def chest_like(check, path, count, side):
    """A MedMNIST file of chest phantoms with fresh noise, as many and as large as ChestMNIST+."""
    base = chest_phantoms(8, side, 0)[0][:, 0]
    grey = ((base + 1) * 127.5).numpy()
    rng = np.random.default_rng(0)
    images = np.empty((count, side, side), np.uint8)
    for i in range(count):
        noise = rng.normal(0, 6, grey[0].shape)
        images[i] = np.clip(grey[i % 8] + noise, 0, 255)
    parts = np.split(images, [int(0.7 * count), int(0.8 * count)])
    arrays = {}
    for name, part in zip(("train", "val", "test"), parts):
        arrays[f"{name}_images"] = part
        arrays[f"{name}_labels"] = np.zeros((len(part), 1), np.uint8)
    np.savez(path, **arrays)


def command_lines(check):
    """train.py, stopped early, and sample.py, on files in MedMNIST's form."""
    preset = "tiny" if check.smoke else "small"
    side = train.PRESETS[preset]["size"]
    chest_like(check, check.folder / "chest.npz", 40 if check.smoke else 4000, side)
    steps = 2 if check.smoke else 100
    batch = ("--batch", 2, "--vae-batch", 2) if check.smoke else ()
    run(check, f"train.py --preset {preset}", "train.py", "--data", "chest.npz", "--preset",
        preset, "--embedder", "tiny", "--steps", steps, "--grids", 1, "--out", "run", *batch)
    sizes = {} if check.smoke else train.PRESETS[preset]
    stage_rates(check, preset, "run", {
        "embedder": train.PRESETS[preset]["embedder_batch"], "vae": sizes.get("vae_batch", 2),
        "unet": sizes.get("batch", 2)})
    run(check, "sample.py --random", "sample.py", "--checkpoint", "run", "--random", "--count",
        4 if check.smoke else 1000, "--steps", 2 if check.smoke else 15, "--sampler", "dpm",
        "--out", "samples")


def small_whole(check):
    """Preset small on 112,120 images of 128 px. Goal: 10 minutes."""
    preset = "tiny" if check.smoke else "small"
    count = 40 if check.smoke else 112_120
    chest_like(check, check.folder / "whole.npz", count, train.PRESETS[preset]["size"])
    few = ("--steps", 2, "--batch", 2, "--vae-batch", 2) if check.smoke else ()
    run(check, f"train.py --preset {preset}, whole", "train.py", "--data", "whole.npz", "--preset",
        preset, "--embedder", "tiny", "--grids", 1, "--out", "whole", *few, limit=3600)


def clustering(check):
    x = torch.randn(500 if check.smoke else 50_000, 384,
                    generator=torch.Generator().manual_seed(0)).to(check.device)
    kmeans(x[:400], 5)
    say("K-means of 50,000 x 384 noise, K 33, 10 starts", check.seconds(lambda: kmeans(x, 33)), "s")


# ---------------------------------------------------------------------------- all

def training_compiled(check):
    training(check, compiled=True)


def peers_compiled(check):
    peers(check, compiled=True)


SECTIONS = {  # name: (work, seconds that it may take on an H100, as guessed)
    "machine": (machine, 20), "training": (training, 60), "sampling": (sampling, 60),
    "diffusers": (peers, 60), "memory": (memory, 60), "agreement": (agreement, 20),
    "commands": (command_lines, 120), "compiled": (training_compiled, 150),
    "diffusers-compiled": (peers_compiled, 150), "clustering": (clustering, 20)}


def main(argv=None):
    parser = argparse.ArgumentParser(description="What a GPU does with this project.")
    parser.add_argument("--smoke", action="store_true", default=bool(os.environ.get("SMOKE")),
                        help="all sections on the CPU, tiny")
    parser.add_argument("--budget", type=float, default=600, help="seconds for all sections")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    parser.add_argument("--whole", action="store_true", help="train preset small whole, too")
    args = parser.parse_args(argv)
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("error: no CUDA device: this script measures one: pass --smoke to try it on a CPU")
    if args.smoke:  # smaller than any preset: this tries the script, not the networks
        train.VAES["tiny"] = VAEConfig(3, 4, 8, (1, 2, 4), 1)
        train.UNETS["tiny"] = UNetConfig(4, 4, 32, (1, 2), 1, (False, True), 32, 4)

    check = Check(args)
    for name in args.only or SECTIONS:
        check.section(name, *SECTIONS[name])
    if args.whole:
        check.budget = float("inf")
        check.section("small, whole", small_whole, 0)
    say("all", time.monotonic() - check.began, "s", folder=str(check.folder))


if __name__ == "__main__":
    main()
