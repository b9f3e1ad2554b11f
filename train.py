"""Train DiNO-Diffusion: embedder, VAE and conditional U-Net, by one loop.

    python train.py --data cxr                                     # a laptop
    python train.py --data FOLDER --preset base --out runs/mine    # your X-rays on a GPU
    python train.py --data histology --condition prompts           # 33 morphologies x 2 labels
    torchrun --nproc-per-node 8 train.py --data FOLDER --preset base          # eight GPUs

Stages, each a loss of a few lines around `fit`:
    1 embedder  DINO self-distillation            (skipped when --embedder names trained weights)
    2 vae       L1 + KL                           (skipped when --vae names trained weights)
    3 cache     latents (mean and std) and tokens of every training image -> memory-mapped .npy
    4 unet      mean squared error of v (or eps)  on the cache alone, given the image's tokens or,
                with --condition prompts, the words that K-means on the tokens gives it

A run's folder: config.json, split.csv, log.jsonl, curves.png, grid_STEP.png, model.pt (what
sample.py reads), state.pt (what --resume reads), cache/, held_out/ (a few sources to try); with
prompts also prompts.csv and morphologies.png; outliers.csv and unreadable.csv where images were
left out; lock while it runs.
All randomness derives from (seed, stage, step), so a resumed run equals one that was never stopped
(bit for bit on a CPU). Under torchrun each process (rank) computes its share of every batch with
noise of its own: resumed on as many ranks, a run goes on exactly; on another number, it goes on.
"""
import json
import math
import shlex
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np
import torch
import torchvision

from dino import (DINO, TOKEN_KINDS, VISION_TRANSFORMERS, VisionTransformer, conditioning_tokens,
                  load_dino)
from dinodiff import DinoDiffusion, DinoDiffusionConfig, EmbeddingSampler
from prompts import BASELINE, ENRICHED, UNLABELLED, balance, kmeans
from support.cache import (Latents, Pictures, are_files, build_cache, decode_once, fingerprint,
                           loader, picture_arrays, row_bytes)
from support.command import UserError, autocast_dtype, pick_device, run_script, user_errors
from support.datasets import open_dataset
from support.files import load_checkpoint, resolve_checkpoint, write_csv
from support.pictures import save_grid
from support.ranks import (all_ranks, average_gradients, join_ranks, rank, rows_of_rank,
                           share_batch_norm)
from support.run import Run, Stopped, print_end, print_start
from support.seeds import batch_rows, step_seed
from support.settings import reading_processes, train_settings
from support.training_set import open_training_set, write_choice, write_examples
from support.weights import PUBLISHED
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig, latent_statistics, vae_loss

STAGES = ("embedder", "vae", "unet")
PRESETS = {  # tiny: a laptop, everything is trained. sd15: starts from Stable Diffusion 1.5
    "tiny": dict(size=64, embedder="tiny", vae="train", unet="train",
                 embedder_batch=32, embedder_steps=300, vae_batch=4, vae_steps=2000, vae_lr=3e-3,
                 batch=16, unet_steps=1700, lr=1e-3),
    "cxr128": dict(size=128, embedder="tiny", vae="train", unet="train",
                   embedder_batch=32, embedder_steps=200, vae_batch=8, vae_steps=2500, vae_lr=2e-3,
                   batch=16, unet_steps=3500, lr=1e-3),
    "tissue64": dict(size=64, embedder="tiny", vae="train", unet="train",
                     embedder_batch=32, embedder_steps=300, vae_batch=8, vae_steps=2000,
                     vae_lr=2e-3, batch=16, unet_steps=1700, lr=1e-3),
    "small": dict(size=128, embedder="dino_vits16", vae="train", unet="train",
                  embedder_batch=128, embedder_steps=4000, vae_batch=32, vae_steps=10000,
                  vae_lr=1e-3, batch=128, unet_steps=20000, lr=5e-4),
    "base": dict(size=256, embedder="dino_vitb8", vae="sd-vae-ft-mse", unet="train",
                 embedder_batch=128, embedder_steps=4000, vae_batch=16, vae_steps=20000,
                 vae_lr=3e-4, batch=128, unet_steps=100000, lr=2e-4),
    "sd15": dict(size=512, embedder="dino_vitb8", vae="sd15", unet="sd15",
                 embedder_batch=128, embedder_steps=4000, vae_batch=8, vae_steps=20000,
                 vae_lr=1e-4, batch=16, unet_steps=100000, lr=1e-5),
}

VAES = {  # channels of image and latent, base_channels, channel_multipliers, layers_per_block
    "tiny": VAEConfig(3, 4, 16, (1, 2, 4), 1),
    "cxr128": VAEConfig(3, 8, 32, (1, 2, 4), 1, stem=2),
    "tissue64": VAEConfig(3, 8, 32, (1, 2, 4), 1),
    "small": VAEConfig(3, 4, 64, (1, 2, 4), 1),
    "base": VAEConfig(3, 4, 64, (1, 2, 4, 4), 2),
    "sd15": VAEConfig(),
}

UNETS = {  # channels in and out, base_channels, multipliers, layers, attention, context_dim, heads
    "tiny": UNetConfig(4, 4, 64, (1, 2, 2), 1, (False, True, True), 192, 4),
    "cxr128": UNetConfig(8, 8, 64, (1, 2, 2), 1, (True, True, True), 192, 4),
    "tissue64": UNetConfig(8, 8, 64, (1, 2, 2), 1, (False, True, True), 192, 4),
    "small": UNetConfig(4, 4, 128, (1, 2, 3), 2, (False, True, True), 384, 8),
    "base": UNetConfig(4, 4, 192, (1, 2, 3, 4), 2, (True, True, True, False), 768, 8),
    "sd15": UNetConfig(),
}

TEMPLATES = {"labels": BASELINE, "labels and clusters": ENRICHED, "clusters": UNLABELLED}


# ---- The loop ----------------------------------------------------------------------------------

def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def warmed_up(decay):
    """The function step n -> decay of an EMA, min(decay, (1 + n) / (10 + n)): the random start is
    soon forgotten."""
    return lambda step: min(decay, (1 + step) / (10 + step))


def trainable(model):
    """Name -> parameter, of those that are trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fit(stage, model, loss_fn, dataset, *, steps, upto=None, batch, lr, device, seed=0, run=None,
        ema=None, ema_decay=warmed_up(0.999), dtype=torch.float32, betas=(0.9, 0.99),
        weight_decay=0.01, warmup=50, clip=1.0, accumulate=1, workers=0):
    """The one training loop: from the step that `run` has saved, up to step `upto` of `steps`.

    loss_fn(batch on the device, step, generator) -> (scalar loss, dict of values to log). The
        generator is seeded by (seed, stage, step, rank, part).
    dataset: `__getitems__(rows)` -> tuple of tensors.
    ema: name -> tensor for each trained parameter, moved in place: ema_decay(step) of itself, the
        rest of the parameter.
    batch: images a step, of all ranks together; each cuts its share into `accumulate` parts.
    Raises UserError when a loss is not finite, Stopped after a signal; the state is saved then, at
        the end, and every few minutes.
    """
    params = trainable(model)
    optimizer = torch.optim.AdamW(params.values(), lr=lr, betas=betas, weight_decay=weight_decay,
                                  fused=device.type != "mps")
    upto = upto or steps
    progress = (run or Run()).begin(stage, steps, upto, model, optimizer, ema)

    # Which images each step sees: epochs in an order of their own.
    order = step_seed(seed, stage, "order")
    plan = (rows_of_rank(batch_rows(step, batch, len(dataset), order))
            for step in range(progress.done, upto))
    warmup = min(warmup, max(1, steps // 5))

    model.train()
    for step, tensors in enumerate(loader(dataset, plan, workers, device), progress.done):
        rate = learning_rate(step, steps, lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # The gradient: of the mean loss over all parts of the batch.
        mean_loss = 0.0
        for part in range(accumulate):
            x = [tensor[part::accumulate].to(device, non_blocking=True) for tensor in tensors]
            generator = torch.Generator(device)
            generator.manual_seed(step_seed(seed, stage, step, rank(), part))
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss, logs = loss_fn(x, step, generator)
            (loss / accumulate).backward()
            mean_loss = mean_loss + loss.detach() / accumulate
        average_gradients(params.values())

        # The step, and the average of the weights.
        norm = torch.nn.utils.clip_grad_norm_(params.values(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            weights = [p.detach() for p in params.values()]
            torch._foreach_lerp_(list(ema.values()), weights, 1 - ema_decay(step))

        progress.after_step(mean_loss, norm, rate, batch, logs)
    model.eval()


@torch.no_grad()
def load_trained(model, weights):
    """Copy weights, name -> tensor, into the model's trained parameters."""
    for name, p in trainable(model).items():
        p.copy_(weights[name])


@contextmanager
def swapped(model, ema):
    """Inside, the model holds the EMA weights."""
    kept = {name: p.detach().clone() for name, p in trainable(model).items()}
    load_trained(model, ema)
    try:
        yield
    finally:
        load_trained(model, kept)


# ---- The model ---------------------------------------------------------------------------------

def new_vit(size):
    """The ViT that is trained here, with random weights."""
    tiny = VISION_TRANSFORMERS["tiny"]
    side = min(size, 128)  # what it sees
    return VisionTransformer(replace(tiny, image_size=side - side % tiny.patch_size))


def open_init(args):
    """The DinoDiffusion that --init names, or None."""
    if not args.init:
        return None
    return DinoDiffusion.from_checkpoint(load_checkpoint(resolve_checkpoint(args.init)))


def goes_on(args):
    """Whether the U-Net of --init goes on training."""
    return bool(args.init) and args.unet == args.init


def refuse_unlike(init, config):
    """UserError if a U-Net trained by the one config cannot go on under the other."""
    for name in ("image_size", "condition", "tokens", "token_shape", "template", "labels",
                 "clusters", "schedule", "prediction", "zero_terminal_snr"):
        was, now = getattr(init, name), getattr(config, name)
        if was != now:
            raise UserError(f"--init was trained with {name} {was}, this run has {now}",
                            "its U-Net can only go on with the same", "change the flag that sets "
                            "it, or pass --unet train")
    if (init.vae.factor, init.vae.latent_channels) != (config.vae.factor,
                                                       config.vae.latent_channels):
        raise UserError("--vae has latents of another shape than that of --init",
                        f"factor {init.vae.factor} and {init.vae.latent_channels} channels are "
                        "needed", "leave --vae out, or pass --unet train")


def build_model(args, labels, rows):
    """The bundle, with published weights where flags name them; everything that can be refused is
    refused here, before anything is written."""
    # The parts: random, trained by others, or those of --init.
    template, values, clusters = plan_prompts(args, labels, rows, TEMPLATES)
    init = open_init(args)
    torch.manual_seed(step_seed(args.seed, "embedder") % 2 ** 31)
    if args.embedder not in ("tiny", "random"):
        vit = load_dino(args.embedder)
    else:
        vit = init.embedder if init and args.embedder == "tiny" else new_vit(args.size)
    parts = {"embedder": vit}
    vae_config = VAES[args.preset]
    if init or args.vae != "train":
        is_trained = args.vae in ("train", "decoder")
        parts["vae"] = init.vae if is_trained else AutoencoderKL.from_pretrained(args.vae)
        vae_config = parts["vae"].config
    unet_config = UNETS[args.preset]
    if args.unet != "train":
        parts["unet"] = UNet.from_pretrained(args.unet)
        unet_config = parts["unet"].config

    # The whole.
    torch.manual_seed(step_seed(args.seed, "weights") % 2 ** 31)
    tokens = conditioning_tokens(vit, torch.zeros(1, 3, args.size, args.size), args.tokens)
    model = DinoDiffusion(DinoDiffusionConfig(
        image_size=args.size, vae=vae_config, unet=unet_config, vit=vit.config,
        condition=args.condition, tokens=args.tokens, token_shape=tuple(tokens.shape[1:]),
        template=template, labels=values, clusters=clusters, schedule=args.schedule,
        prediction=args.prediction, zero_terminal_snr=args.zero_snr, min_snr_gamma=args.min_snr))
    if goes_on(args):
        refuse_unlike(init.config, model.config)
        parts["projection"] = init.projection
        for name in model.STATISTICS:
            getattr(model, name).copy_(getattr(init, name))
    for name, part in parts.items():
        getattr(model, name).load_state_dict(part.state_dict())
    model.unet.checkpointing = args.checkpointing
    return model


# ---- Stages 1 and 2: embedder and VAE ----------------------------------------------------------

def train_embedder(args, run, model, pictures, dtype, workers):
    """DINO on the training images; the teacher becomes model.embedder."""
    if "embedder" not in run.finished:
        torch.manual_seed(step_seed(args.seed, "dino") % 2 ** 31)
        device = model.shift.device
        steps = args.embedder_steps
        dino = DINO(model.config.vit)
        if args.init:
            for network in (dino.student, dino.teacher):
                network["backbone"].load_state_dict(model.embedder.state_dict())
        dino = share_batch_norm(dino.to(device))

        def loss_fn(batch, step, generator):
            return dino.loss(*batch, step / steps, generator)

        def momentum(step):
            return dino.momentum((step + 1) / steps)

        # The teacher is an average of the student: an EMA.
        teacher = dict(zip(trainable(dino), dino.teacher.parameters()))
        fit("embedder", dino, loss_fn, pictures, steps=steps, batch=args.embedder_batch, lr=1e-3,
            device=device, seed=args.seed, run=run, ema=teacher, ema_decay=momentum, dtype=dtype,
            betas=(0.9, 0.999), weight_decay=0.04, warmup=30, clip=3.0, workers=workers)
        run.finish("embedder", dino.teacher_vit().state_dict())
    model.embedder.load_state_dict(run.finished["embedder"])


def note_widths(config, device, dtype):
    """oneDNN's bf16 convolutions want multiples of 16 channels: a base of 24 took 802 ms an image
    on a CPU, one of 32 took 108 (measured)."""
    odd = [width for width in config.widths if width % 16]
    if odd and device.type == "cpu" and dtype == torch.bfloat16:
        print(f"note: the autoencoder's widths {odd} are no multiples of 16, which is slow in bf16 "
              "on a CPU: pass --dtype float32")


def plain_layout(network, device, dtype):
    """Off channels_last where that is slow: bf16 on a CPU, above all in group norms. A step of the
    tiny autoencoder takes 0.16 s for 0.34, of the U-Net 0.25 for 0.32 (measured)."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        network.to(memory_format=torch.contiguous_format)


def random_window(x, multiple, seed):
    """A window of half the side of x (B, C, H, W), at one random place for all images; its side and
    its place are multiples of `multiple`."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, or each step would wait for a GPU
    side = max(multiple, x.shape[-1] // 2 // multiple * multiple)
    places = (x.shape[-1] - side) // multiple + 1
    top, left = (multiple * torch.randint(places, (2,), generator=generator)).tolist()
    return x[..., top:top + side, left:left + side].contiguous()


def train_vae(args, run, model, pictures, dtype, workers):
    """L1 + KL, and with --perceptual a distance in the embedder's feature space: model.vae."""
    if "vae" not in run.finished:
        device = model.shift.device
        note_widths(model.config.vae, device, dtype)
        model.vae.requires_grad_(True)
        if args.vae == "decoder":  # latents stay as they are, and so any U-Net of theirs
            model.vae.encoder.requires_grad_(False)
            model.vae.quant_conv.requires_grad_(False)
        plain_layout(model.vae, device, dtype)

        # Texture is learned from windows, a quarter of the work; the whole image comes at the end.
        whole_from = int(args.vae_windows * args.vae_steps)

        def features(image):
            return conditioning_tokens(model.embedder, image, "patch")

        def loss_fn(batch, step, generator):
            (image,) = batch
            if step < whole_from:
                image = random_window(image, model.vae.config.factor,
                                      step_seed(args.seed, "window", step))
            return vae_loss(model.vae, image, generator, perceptual_weight=args.perceptual,
                            perceptual=features if args.perceptual else None)

        fit("vae", model.vae, loss_fn, pictures, steps=args.vae_steps, batch=args.vae_batch,
            lr=args.vae_lr, device=device, seed=args.seed, run=run, dtype=dtype, weight_decay=0.0,
            warmup=20, workers=workers)
        run.finish("vae", model.vae.state_dict())
    model.vae.load_state_dict(run.finished["vae"])
    model.vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)


# ---- Stage 3: the cache ------------------------------------------------------------------------

def latent_arrays(size, vae, token_shape):
    """What the cache holds of an image: name -> (shape, dtype).

    float16 rounds a latent by 0.05 %; tokens stay float32, for they differ from image to image by
    a few per cent of their length only.
    """
    side = size // vae.factor
    return {"latents": ((2, vae.latent_channels, side, side), np.float16),  # mean and std
            "tokens": (token_shape, np.float32)}


def trains_on_pictures(args):
    """Whether a stage looks at every image many times."""
    return args.embedder == "tiny" or args.vae in ("train", "decoder")


@torch.no_grad()
def cache_latents(args, run, model, found, pictures, workers):
    """Latents and tokens of every training image; both nets in float32, as in sampling."""
    def encode(images):
        return {"latents": torch.stack(model.posterior(images), dim=1),
                "tokens": conditioning_tokens(model.embedder, images, args.tokens)}

    weights = [*model.vae.parameters(), *model.embedder.parameters()]
    made_by = args.tokens + fingerprint([found.train, *weights])
    arrays = latent_arrays(args.size, model.config.vae, model.config.token_shape)
    folder = run.folder / "cache"
    build_cache(folder, arrays, pictures, encode, made_by, run, 4 * args.vae_batch, workers,
                model.shift.device)
    if run.writes:
        rows = [[row, found.images.files[i]] for row, i in enumerate(found.train.tolist())]
        write_csv(folder / "index.csv", [["row", "file"], *rows])
    return Latents(folder)


def measure_statistics(args, model, cache):
    """Mean and deviation over the training set: of each latent channel, of each token entry.

    A U-Net of --init keeps those that it was trained with, where the networks are still the same.
    """
    n = len(cache)
    chunks = [range(i, min(i + 256, n)) for i in range(0, n, 256)]
    if goes_on(args) and args.vae in (args.init, "decoder"):
        pass
    elif "sd15" in (args.preset, args.unet):
        model.scale.fill_(0.18215)  # what this U-Net was trained with
    else:
        shift, scale = latent_statistics(cache.__getitems__(list(rows))[:2] for rows in chunks)
        model.shift.copy_(shift.view_as(model.shift))
        model.scale.copy_(scale.view_as(model.scale))

    # Twice through the tokens, which need not fit into memory.
    if goes_on(args) and args.embedder == args.init:
        return
    def tokens():
        return (torch.from_numpy(np.float64(cache.tokens[i.start:i.stop])) for i in chunks)

    mean = sum(x.sum(0) for x in tokens()) / n
    std = (sum((x - mean).square().sum(0) for x in tokens()) / n).sqrt()
    model.token_mean.copy_(mean)
    model.token_std.copy_(std.clamp(min=1e-4 * std.max().item() + 1e-12))


# ---- Prompts from clusters ---------------------------------------------------------------------

def prompt_numbers(config, labels, clusters):
    """The number in `config.prompts` of images with these labels (list) and clusters (N,)."""
    if not config.labels:
        return clusters
    label = torch.tensor([config.labels.index(label) for label in labels])
    return label * (config.clusters or 1) + clusters


def image_features(model, cache):
    """The standardised tokens of each training image, flattened: (N, G*D), on model's device."""
    tokens = torch.from_numpy(np.array(cache.tokens)).to(model.shift.device)
    return model.standardise(tokens).flatten(1)


def find_clusters(args, run, model, cache):
    """K-means on the standardised training tokens: model.centers, and the cluster of each image,
    (N,) int64; all 0 where labels alone make the prompts."""
    if "prompts" not in run.finished:
        centers = model.centers
        cluster = torch.zeros(len(cache), dtype=torch.int64)
        if model.config.clusters:
            with user_errors():
                result = kmeans(image_features(model, cache), model.config.clusters, args.seed)
            centers, cluster = all_ranks([x.cpu() for x in result])[0]  # GPUs may round apart
        run.finish("prompts", {"centers": centers, "cluster": cluster})
    model.centers.copy_(run.finished["prompts"]["centers"])
    return run.finished["prompts"]["cluster"]


def derive_prompts(args, run, model, found, labels, cache):
    """The paper's step: label x cluster -> the number of each training image's prompt, (N,) int64.
    """
    cluster = find_clusters(args, run, model, cache)
    train_labels = [labels[i] for i in found.train] if labels else None
    numbers = prompt_numbers(model.config, train_labels, cluster)
    model.prompt_counts.copy_(numbers.bincount(minlength=len(model.prompts)))
    if run.writes:
        print(f"{(model.prompt_counts > 0).sum()} of {len(model.prompts)} prompts in use, e.g. "
              f"{model.prompts[numbers[0]]!r}; balanced; {run.folder / 'prompts.csv'}")
        texts = [model.prompts[number] for number in numbers]
        shown = cluster.tolist() if model.config.clusters else [""] * len(cluster)
        write_prompts(run.folder, found, labels, shown, texts)
        if model.config.clusters:
            draw_clusters(run.folder / "morphologies.png", found, cluster, args.seed)
    return numbers


def start_words(args, run, model, numbers, cache):
    """The words of the prompts start where their images lie; trained ones stay: those of --init and
    of a run that goes on."""
    if goes_on(args) or run.steps_done("unet") or "unet" in run.finished:
        return
    model.projection.start_from_images(
        [model.prompts[number] for number in numbers], image_features(model, cache),
        torch.Generator().manual_seed(step_seed(args.seed, "words")))


# ---- Stage 4: the U-Net ------------------------------------------------------------------------

def train_unet(args, run, model, cache, found, labels, dtype):
    """The diffusion model itself, on cached latents and tokens; the model ends with EMA weights."""
    measure_statistics(args, model, cache)
    if model.prompts:
        numbers = derive_prompts(args, run, model, found, labels, cache)
        start_words(args, run, model, numbers, cache)
        counts = numbers.bincount()
        n = int(counts.max() * (counts > 0).sum())  # one round for each image of the commonest
        ids = model.prompt_ids(model.prompts).cpu()
        cache = Latents(run.folder / "cache", ids[numbers], balance(numbers.tolist(), n, args.seed))
    torch.set_float32_matmul_precision("high")  # not before: tokens need all of float32
    if model.config.condition == "none":  # of the projection, only the null context is in use
        model.projection.requires_grad_(False).null_context.requires_grad_(True)
    if args.compile:
        model.unet.compile()
    plain_layout(model.unet, model.shift.device, dtype)

    def loss_fn(batch, step, generator):
        mean, std, condition = batch
        if not model.prompts:
            condition = model.standardise(condition)
        return model.loss(mean, std, condition, generator)

    # From one preview to the next.
    if "unet" not in run.finished:
        trained = model.trained
        ema = {name: p.detach().clone() for name, p in trainable(trained).items()}
        steps = args.unet_steps
        previews = sorted({max(1, steps * k // args.grids) for k in range(1, args.grids + 1)})
        for upto in previews:
            if upto < run.steps_done("unet"):
                continue
            fit("unet", trained, loss_fn, cache, steps=steps, upto=upto, batch=args.batch,
                lr=args.lr, device=model.shift.device, seed=args.seed, run=run, ema=ema,
                ema_decay=warmed_up(args.ema), dtype=dtype, accumulate=args.accumulate)
            if run.writes:
                with swapped(trained, ema):
                    preview(args, run, model, found, labels, upto)
        run.finish("unet", ema)
    load_trained(model.trained, run.finished["unet"])
    model.unet.to(memory_format=torch.channels_last)


def preview(args, run, model, found, labels, step):
    """grid_STEP.png: real held-out images, their VAE reconstructions, samples made from them, or
    from the prompts that fit them. And model.pt as it is now."""
    real = found.images.batch(found.examples).to(model.shift.device)
    condition = None if model.config.condition == "none" else model.embed(real)
    if model.prompts:
        cluster = torch.zeros(len(real), dtype=torch.int64)
        if model.config.clusters:
            cluster = model.cluster_of(condition).cpu()
        example_labels = [labels[i] for i in found.examples] if labels else None
        numbers = prompt_numbers(model.config, example_labels, cluster)
        condition = model.prompt_ids([model.prompts[number] for number in numbers])

    samples = model.sample(condition, seeds=list(range(len(real))), steps=25, eta=0.5)
    rows = [real.cpu(), model.decode(model.encode(real)).cpu(), samples.cpu()]
    save_grid(run.folder / f"grid_{step:06d}.png", rows,
              captions=["source", "VAE reconstruction", f"sample, step {step}"])
    run.write_model(model.to_checkpoint())
    if args.keep_checkpoints:
        run.write_model(model.to_checkpoint(), f"model_{step:06d}.pt")
    run.draw_curves(STAGES)


# ---- The command line --------------------------------------------------------------------------

def forecast_cache(args):
    """For --dry-run, the bytes that the cache will take at most, from shapes alone."""
    try:
        with user_errors():
            images = open_dataset(args.data, args.size, count=1)
            n = len(images) if len(images.sources) else args.count  # phantoms have no sources
            vae = VAES["sd15" if args.vae in PUBLISHED["vae"] else args.preset]
            if args.init and args.vae in ("train", "decoder"):
                vae = AutoencoderKL.from_pretrained(args.init).config
            elif args.vae not in (*PUBLISHED["vae"], "train"):
                vae = AutoencoderKL.from_pretrained(args.vae).config
            if args.embedder in ("tiny", "random"):
                vit = new_vit(args.size)
            elif args.embedder in VISION_TRANSFORMERS:
                with torch.device("meta"):  # shapes alone
                    vit = VisionTransformer(VISION_TRANSFORMERS[args.embedder])
            else:
                vit = load_dino(args.embedder)
    except UserError as error:
        return {"note": f"no forecast: {error}"}
    image = torch.zeros(1, 3, args.size, args.size, device=vit.cls_token.device)
    tokens = conditioning_tokens(vit, image, args.tokens)
    arrays = latent_arrays(args.size, vae, tokens.shape[1:])
    if are_files(images) and trains_on_pictures(args):
        arrays |= picture_arrays(args.size)
    size = row_bytes(arrays)
    return {"images": n, "bytes_an_image": size, "gigabytes": n * size / 1e9}


def train_stages(args, run, model, found, labels):
    """Stage after stage; the model ends trained, with all statistics."""
    device = model.shift.device
    workers = reading_processes(args.workers, device)
    dtype = autocast_dtype(device, args.dtype)
    pictures = Pictures(found.images, found.train)
    if trains_on_pictures(args):
        pictures = decode_once(pictures, run, workers)
    if args.embedder == "tiny":
        train_embedder(args, run, model, pictures, dtype, workers)
    if args.vae in ("train", "decoder"):
        train_vae(args, run, model, pictures, dtype, workers)

    cache = cache_latents(args, run, model, found, pictures, workers)
    train_unet(args, run, model, cache, found, labels, dtype)
    if args.condition == "dino" and len(found.train) > 1:
        tokens = torch.from_numpy(np.array(cache.tokens[:50_000]))
        model.embedding_sampler = EmbeddingSampler.fit(model.cpu().standardise(tokens),
                                                       seed=args.seed)


def parse(argv=None):
    """Flags -> Namespace; with --resume, what is not given is as the run began."""
    return train_settings(argv, PRESETS, VISION_TRANSFORMERS, TOKEN_KINDS)


def main(argv=None):
    join_ranks()
    args = parse(argv)
    config = {**vars(args), "torch": str(torch.__version__),
              "torchvision": str(torchvision.__version__)}
    if args.dry_run:
        networks = {"vae_config": asdict(VAES[args.preset]),
                    "unet_config": asdict(UNETS[args.preset])}
        print(json.dumps(config | networks | {"cache_forecast": forecast_cache(args)}, indent=2))
        return 0

    # Images and model: what can be refused is refused before a file is written.
    began = time.time()
    device = pick_device(args.device)
    found = open_training_set(args.out, args.resume, args.size, args.data, args.holdout, args.seed,
                              group_column=args.group_column or "patient", count=args.count)
    labels = labels_for_prompts(args, found)
    with user_errors():
        model = build_model(args, labels, torch.cat([found.train, found.test]).tolist()).to(device)

    # The run, until it is done or somebody stops it.
    run = Run(args.out, config | {"depth": found.images.depth}, args.resume)
    try:
        with run.signals_caught():
            write_choice(run, found)
            print_start(args, run, model, found, device)
            train_stages(args, run, model, found, labels)
    except Stopped as stopped:
        print(f"saved. Go on with: python train.py --resume --out {shlex.quote(args.out)}")
        return 128 + stopped.args[0]

    # What people take away.
    if run.writes:
        run.write_model(model.to_checkpoint())
        run.draw_curves(STAGES)
        example = write_examples(run.folder / "held_out", found)
        run.close()
        print_end(args, run, model, example, (time.time() - began) / 60)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
