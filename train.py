"""Train DiNO-Diffusion: embedder, autoencoder, conditional U-Net and refiner, by one loop.

    python train.py --data cxr                                     # a laptop
    python train.py --data FOLDER --preset base --out runs/mine    # your X-rays on a GPU
    python train.py --data histology --condition prompts           # 33 morphologies x 2 labels
    torchrun --nproc-per-node 8 train.py --data FOLDER --preset base          # eight GPUs

Stages, each a loss of a few lines around `fit`:
    1 embedder  DINO self-distillation            (skipped when --embedder names trained weights)
    2 vae       L1 + KL                           (skipped when --vae names trained weights)
    3 cache     latents (mean and std) and tokens of every training image, as memory-mapped .npy
    4 unet      mean squared error of v (or eps), from the cache, given the image's tokens or, with
                --condition prompts, words derived from K-means on the tokens
    5 refiner   the same loss on the autoencoder's residual, given the decoded image

A run's folder: config.json, split.csv, log.jsonl, curves.png, noise_levels.png, grid_STEP.png,
model.pt (for sample.py), state.pt (for --resume), cache/, held_out/ (a few sources to try); with
prompts also prompts.csv and morphologies.png; unreadable.csv, outliers.csv if images were left out.
All randomness derives from (seed, stage, step), so a resumed run equals an uninterrupted one (bit
for bit on a CPU with as many threads, and under torchrun on the same number of processes).
"""
import argparse
import json
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision

from dino import (DINO, TOKEN_KINDS, VISION_TRANSFORMERS, VisionTransformer, conditioning_tokens,
                  load_dino)
from dinodiff import DinoDiffusion, DinoDiffusionConfig, EmbeddingSampler
from prompts import balance, kmeans, labels_for_prompts, plan_prompts, prompt_numbers
from support.cache import (Latents, Pictures, build_cache, decode_once, fingerprint, loader,
                           read_vectors)
from support.command import Help, Stopped, UserError, number, run_script, user_errors
from support.files import load_checkpoint, resolve_checkpoint, write_csv
from support.held_out import HeldOut
from support.pictures import save_grid
from support.ranks import (all_ranks, autocast_dtype, average_gradients, join_ranks, pick_device,
                           rank, ranks, rows_of_rank)
from support.run import Progress, Run, print_end, print_start, resume_flags
from support.seeds import batch_rows, spaced_rows, step_seed
from support.speed import compile_blocks, compile_where_it_pays, rehearse, set_threads
from support.training_set import draw_clusters, open_training_set, write_choice, write_examples
from support.weights import PUBLISHED, find_weights
from unet import UNet, UNetConfig
from vae import (AutoencoderKL, VAEConfig, channel_importance, latent_statistics,
                 start_from_patches, vae_loss)

STAGES = ("embedder", "vae", "unet", "refiner")


# ---------------------------------------------------------------------------- presets

@dataclass(frozen=True)
class Preset:
    """Hyper-parameters of all stages. --set NAME=VALUE changes any but the networks' configs."""
    size: int = 64                    # pixels of an image's side
    previews: int = 5                 # sample grids drawn during a run

    # Stage 1, DINO: "tiny" trains a ViT; "random" leaves it untrained; else a name or path.
    embedder: str = "tiny"
    embedder_steps: int = 300
    embedder_batch: int = 32
    embedder_lr: float = 1e-3

    # Stage 2, the autoencoder: "train", a name or path.
    vae: str = "train"
    vae_config: VAEConfig = VAEConfig(base_channels=16, channel_multipliers=(1, 2, 4),
                                      layers_per_block=1)
    vae_steps: int = 1100             # the refiner makes up for a softer decoder
    vae_batch: int = 4                # small batches train faster
    vae_lr: float = 3e-3
    kl_weight: float = 1e-6
    latent_power: float = 0.0         # of a linear path: 0, latent channels of equal deviation;
                                      # 1, each in proportion to its effect on pixels

    # Stage 4, the diffusion model: "train", a name or path.
    unet: str = "train"
    unet_config: UNetConfig = UNetConfig(
        base_channels=64, channel_multipliers=(1, 2, 2), layers_per_block=1,
        attention_levels=(False, True, True), context_dim=192, num_heads=4)
    unet_steps: int = 1600
    batch: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.01
    ema: float = 0.999                # decay of the averaged weights
    prediction: str = "v"             # or eps, the classic
    drop_condition: float = 0.1       # share of training samples without condition
    tokens: str = "global"            # kind of tokens; with patch kinds the model can copy
    guidance_scale: float = 1.0       # of its samples
    clusters: int = 0                 # K of --condition prompts; 0: 33 with labels, 10 without
    template: str = ""                # of prompts, with <label> and <index>; default: the paper's

    # Stage 5, the refiner: with 0 steps there is none.
    refiner_width: int = 48           # channels of its first level
    refiner_steps: int = 300
    refiner_batch: int = 8
    refiner_window: int = 96          # side in pixels of its training crops
    refiner_lr: float = 1e-3
    refiner_noise: float = 0.2        # most noise on latents, in deviations: mimics samples' errors


PRESETS = {
    "tiny": Preset(),  # a laptop
    "cxr128": Preset(  # the bundled model
        size=128,
        vae_config=VAEConfig(latent_channels=8, base_channels=16, channel_multipliers=(1, 2, 4),
                             layers_per_block=1, stem=2, linear=True),
        vae_steps=1400, vae_batch=8, vae_lr=2e-3, latent_power=0.5,
        unet_config=UNetConfig(
            in_channels=8, out_channels=8, base_channels=64, channel_multipliers=(1, 2, 2),
            layers_per_block=1, attention_levels=(True, True, True), context_dim=192, num_heads=4),
        unet_steps=12000, guidance_scale=1.5, refiner_steps=4000),
    "tissue64": Preset(  # colour patches
        vae_config=VAEConfig(latent_channels=8, base_channels=32, channel_multipliers=(1, 2, 4),
                             layers_per_block=1),
        vae_steps=2000, vae_batch=8, vae_lr=2e-3,
        unet_config=UNetConfig(
            in_channels=8, out_channels=8, base_channels=64, channel_multipliers=(1, 2, 2),
            layers_per_block=1, attention_levels=(False, True, True), context_dim=192,
            num_heads=4),
        unet_steps=1700, refiner_steps=1500),
    "small": Preset(  # one GPU
        size=128, embedder="dino_vits16", embedder_steps=4000, embedder_batch=128,
        vae_config=VAEConfig(base_channels=64, channel_multipliers=(1, 2, 4), layers_per_block=1),
        vae_steps=10000, vae_batch=32, vae_lr=1e-3,
        unet_config=UNetConfig(
            base_channels=128, channel_multipliers=(1, 2, 3), attention_levels=(False, True, True),
            context_dim=384),
        unet_steps=20000, batch=128, lr=5e-4, refiner_steps=10000, refiner_batch=32),
    "base": Preset(
        size=256, embedder="dino_vitb8", embedder_steps=4000, embedder_batch=128,
        vae="sd-vae-ft-mse",
        vae_config=VAEConfig(base_channels=64),
        vae_steps=20000, vae_batch=16, vae_lr=3e-4,
        unet_config=UNetConfig(base_channels=192, channel_multipliers=(1, 2, 3, 4)),
        unet_steps=100000, batch=128, lr=2e-4, refiner_steps=20000, refiner_batch=32),
    "sd15": Preset(  # starts from Stable Diffusion 1.5
        size=512, embedder="dino_vitb8", embedder_steps=4000, embedder_batch=128,
        vae="sd15", vae_config=VAEConfig(), vae_steps=20000, vae_batch=8, vae_lr=1e-4,
        unet="sd15", unet_config=UNetConfig(), unet_steps=100000, lr=1e-5, prediction="eps",
        refiner_steps=20000, refiner_batch=16),
}


# ---------------------------------------------------------------------------- the loop

def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def warmed_up(decay):
    """Step -> decay of the EMA, lower at first, so that the random start does not dominate."""
    return lambda step: min(decay, (1 + step) / (10 + step))


def trainable(model):
    """Name -> parameter, of the trainable parameters."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fit(stage, model, loss_fn, dataset, *, steps, batch, lr, device, upto=None, seed=0, run=None,
        ema=None, ema_decay=warmed_up(0.999), dtype=torch.float32, betas=(0.9, 0.99),
        weight_decay=0.01, warmup=50, clip=1.0, accumulate=1):
    """The training loop of all stages, from the step saved in `run` up to step `upto` of `steps`.

    loss_fn(batch, step, generator) -> a scalar loss, or (loss, dict of values to log).
    dataset: `__getitems__(rows)` -> tuple of tensors.
    ema: name -> tensor for each trainable parameter, updated in place: ema = d * ema + (1 - d) * p
        with d = ema_decay(step).
    batch: images per step over all ranks; each rank splits its share into `accumulate` parts.
    Raises UserError if a loss is not finite, and Stopped after a signal, when the state is saved.
    """
    params = trainable(model)
    optimizer = torch.optim.AdamW(params.values(), lr=lr, betas=betas, weight_decay=weight_decay,
                                  fused=device.type != "mps")
    upto = upto or steps
    progress = Progress(run or Run(), stage, steps, upto, model, optimizer, ema)

    # The images of each step; every epoch is shuffled differently.
    order = step_seed(seed, stage, "order")
    plan = (rows_of_rank(batch_rows(step, batch, len(dataset), order))
            for step in range(progress.done, upto))
    warmup = min(warmup, max(1, steps // 5))

    model.train()
    for step, tensors in enumerate(loader(dataset, plan, device), progress.done):
        rate = learning_rate(step, steps, lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # Gradient of the mean loss over all parts of the batch.
        mean_loss = 0.0
        for part in range(accumulate):
            x = [tensor[part::accumulate].to(device, non_blocking=True) for tensor in tensors]
            generator = torch.Generator(device)
            generator.manual_seed(step_seed(seed, stage, step, rank(), part))
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = loss_fn(x, step, generator)
            loss, logs = loss if isinstance(loss, tuple) else (loss, {})
            (loss / accumulate).backward()
            mean_loss = mean_loss + loss.detach() / accumulate
        average_gradients(params.values())

        # Optimiser step and EMA.
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
    """Copy weights, name -> tensor, into the model's trainable parameters."""
    for name, p in trainable(model).items():
        p.copy_(weights[name])


# ---------------------------------------------------------------------------- the model

def refuse_unlike(init, config):
    """UserError if a U-Net trained with config `init` cannot be fine-tuned with `config`."""
    for name in ("image_size", "condition", "tokens", "token_shape", "template", "labels",
                 "clusters", "prediction", "zero_terminal_snr"):
        before, now = getattr(init, name), getattr(config, name)
        if before != now:
            raise UserError(f"--init was trained with {name} {before}, this run has {now}",
                            "they must match to fine-tune its U-Net",
                            "change the flag that sets it, or pass --unet train")
    shapes = [(vae.factor, vae.latent_channels) for vae in (init.vae, config.vae)]
    if shapes[0] != shapes[1]:
        raise UserError("--vae has latents of another shape than --init",
                        f"factor {shapes[0][0]} and {shapes[0][1]} channels are needed",
                        "leave --vae out, or pass --unet train")


def refiner_config(preset, is_grey):
    """The refiner's U-Net: four bands per channel, attention in the middle block only."""
    channels = 1 if is_grey else 3
    width = preset.refiner_width
    return UNetConfig(in_channels=8 * channels, out_channels=4 * channels, base_channels=width,
                      channel_multipliers=(1, 2, 2), layers_per_block=1,
                      attention_levels=(False, False, False), context_dim=width, num_heads=4)


def build_model(preset, condition, init, prompts, vectors, is_grey, seed):
    """The DinoDiffusion to train, with the weights that the preset or flags name.

    init: the DinoDiffusion to start from, or None. prompts: (template, labels, clusters), see
    prompts.plan_prompts. vectors: name of an image -> (G, D) instead of a ViT, or None.
    """
    template, labels, clusters = prompts
    parts = {}

    # The embedder: vectors, or a ViT that is published, that of --init, or random.
    torch.manual_seed(step_seed(seed, "embedder") % 2 ** 31)
    if vectors:
        vit = None
        token_shape = next(iter(vectors.values())).shape
    else:
        if preset.embedder not in ("tiny", "random"):
            vit = load_dino(preset.embedder)
        elif init and preset.embedder == "tiny" and init.config.vit:
            vit = init.embedder.vit
        else:
            tiny = VISION_TRANSFORMERS["tiny"]
            side = min(preset.size, 128) // tiny.patch_size * tiny.patch_size
            vit = VisionTransformer(replace(tiny, image_size=side))
        images = torch.zeros(1, 3, preset.size, preset.size)
        token_shape = conditioning_tokens(vit, images, preset.tokens).shape[1:]

    # Autoencoder and U-Net.
    vae_config = preset.vae_config
    if init or preset.vae != "train":
        fine_tunes = preset.vae == "train"
        parts["vae"] = init.vae if fine_tunes else AutoencoderKL.from_pretrained(preset.vae)
        vae_config = parts["vae"].config
    unet_config = preset.unet_config
    if preset.unet != "train":
        parts["unet"] = UNet.from_pretrained(preset.unet)
        unet_config = parts["unet"].config

    # The whole model.
    torch.manual_seed(step_seed(seed, "weights") % 2 ** 31)
    refiner = refiner_config(preset, is_grey)
    if init and init.refiner and init.config.refiner.out_channels == refiner.out_channels:
        refiner = init.config.refiner
        parts["refiner"] = init.refiner
    elif not preset.refiner_steps:
        refiner = None
    model = DinoDiffusion(DinoDiffusionConfig(
        image_size=preset.size, vae=vae_config, unet=unet_config, vit=vit and vit.config,
        refiner=refiner, condition=condition, tokens=preset.tokens,
        token_shape=tuple(token_shape), template=template, labels=labels, clusters=clusters,
        prediction=preset.prediction, zero_terminal_snr=preset.prediction == "v",
        drop_condition=preset.drop_condition, guidance_scale=preset.guidance_scale))
    if init and preset.unet != "train":
        refuse_unlike(init.config, model.config)
        parts["projection"] = init.projection
        for name in model.STATISTICS:
            getattr(model, name).copy_(getattr(init, name))
    for name, part in parts.items():
        getattr(model, name).load_state_dict(part.state_dict())
    if vectors:
        model.embedder.table = vectors
    else:
        model.embedder.vit.load_state_dict(vit.state_dict())
    return model


# ---------------------------------------------------------------------------- stages 1 and 2

def train_embedder(preset, run, model, pictures, seed, dtype, from_init, compiled):
    """DINO on the training images; the teacher becomes model.embedder.vit."""
    if "embedder" not in run.finished:
        torch.manual_seed(step_seed(seed, "dino") % 2 ** 31)
        device = model.shift.device
        steps = preset.embedder_steps
        dino = DINO(model.config.vit)
        if from_init:
            for network in (dino.student, dino.teacher):
                network["backbone"].load_state_dict(model.embedder.vit.state_dict())
        dino = dino.to(device)
        if ranks() > 1 and device.type == "cuda":  # statistics of the whole batch
            dino = torch.nn.SyncBatchNorm.convert_sync_batchnorm(dino)
        if compiled:
            compile_blocks(dino)

        def loss_fn(batch, step, generator):
            return dino.loss(*batch, generator)

        def momentum(step):
            return dino.momentum((step + 1) / steps)

        # The teacher is the EMA of the student.
        teacher = dict(zip(trainable(dino), dino.teacher.parameters()))
        fit("embedder", dino, loss_fn, pictures, steps=steps, batch=preset.embedder_batch,
            lr=preset.embedder_lr, device=device, seed=seed, run=run, ema=teacher,
            ema_decay=momentum, dtype=dtype, betas=(0.9, 0.999), weight_decay=0.04, warmup=30,
            clip=3.0)
        run.finish("embedder", dino.teacher_vit().state_dict())
    model.embedder.vit.load_state_dict(run.finished["embedder"])


def memory_format(device, dtype):
    """channels_last, except for bf16 on a CPU, where it makes group norms slow."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        return torch.contiguous_format
    return torch.channels_last


def train_vae(preset, run, model, pictures, seed, dtype, from_init):
    """Train model.vae on L1 + KL, from PCA if it has a linear path."""
    device = model.shift.device
    if "vae" not in run.finished:
        model.vae.requires_grad_(True)
        if model.vae.config.linear and not from_init:
            (images,) = pictures.__getitems__(spaced_rows(len(pictures), 300).tolist())
            start_from_patches(model.vae, images)  # on the CPU: MPS lacks float64
        model.vae.to(memory_format=memory_format(device, dtype))

        def loss_fn(batch, step, generator):
            (image,) = batch
            return vae_loss(model.vae, image, generator, preset.kl_weight)

        fit("vae", model.vae, loss_fn, pictures, steps=preset.vae_steps, batch=preset.vae_batch,
            lr=preset.vae_lr, device=device, seed=seed, run=run, dtype=dtype, weight_decay=0.0,
            warmup=20)
        run.finish("vae", model.vae.state_dict())
    model.vae.load_state_dict(run.finished["vae"])
    model.vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------- stage 3: the cache

@torch.no_grad()
def cache_latents(run, model, dataset, pictures):
    """Latents and tokens of every training image. Tokens stay float32, because they differ by only
    a few percent of their norm."""
    config = model.config
    files = [dataset.images.files[i] for i in dataset.train.tolist()]
    side = config.image_size // config.vae.factor
    arrays = {"latents": ((2, config.vae.latent_channels, side, side), np.float16),  # mean and std
              "tokens": (config.token_shape, np.float32)}

    def encode(images, rows):
        return {"latents": torch.stack(model.posterior(images), dim=1),
                "tokens": model.embedder.tokens(images, [files[row] for row in rows])}

    weights = [*model.vae.parameters(), *model.embedder.parameters()]
    made_by = config.tokens + fingerprint([dataset.train, *weights])
    folder = run.folder / "cache"
    build_cache(folder, arrays, pictures, encode, made_by, run, device=model.shift.device)
    return Latents(folder)


def measure_statistics(model, cache, scale, keep_tokens, latent_power=0.0):
    """Mean and deviation over the training set of each latent channel and each token entry. scale
    of latents: "measure", "keep" that of --init, or a number."""
    if scale == "measure":
        chunks = torch.arange(len(cache)).split(256)
        shift, deviation = latent_statistics(cache.__getitems__(rows)[:2] for rows in chunks)
        model.shift.copy_(shift.view_as(model.shift))
        model.scale.copy_(deviation.view_as(model.scale))
        if model.vae.config.linear:
            model.scale.mul_(channel_importance(model.vae, deviation) ** latent_power)
    elif scale != "keep":
        model.scale.fill_(scale)

    # Moments in float64, from the memory-mapped file.
    if not keep_tokens:
        tokens = cache.tokens  # (N, G, D)
        mean = tokens.mean(0, dtype=np.float64)
        mean_square = np.einsum("ngd,ngd->gd", tokens, tokens, dtype=np.float64) / len(tokens)
        std = torch.from_numpy((mean_square - mean ** 2).clip(min=0) ** 0.5)
        model.token_mean.copy_(torch.from_numpy(mean))
        model.token_std.copy_(std.clamp(min=1e-4 * std.max().item() + 1e-12))


# ---------------------------------------------------------------------------- stage 4: the U-Net

def derive_prompts(run, model, dataset, labels, cache, keep_centers, seed):
    """Label x cluster -> index of each training image's prompt, (N,) int64; the prompts; and the
    features (N, G*D) from which their words are initialised. keep_centers: those that the words of
    a fine-tuned model stand for."""
    tokens = torch.from_numpy(np.array(cache.tokens)).to(model.shift.device)
    features = model.standardise(tokens).flatten(1)  # (N, G, D) -> (N, G*D)

    # K-means; rank 0 decides, because GPUs may round differently.
    if "prompts" not in run.finished:
        centers = model.centers
        cluster = torch.zeros(len(features), dtype=torch.int64)
        if model.config.clusters:
            if keep_centers:
                cluster = model.cluster_of(features)
            else:
                with user_errors():
                    centers, cluster = kmeans(features, model.config.clusters, seed)
            centers, cluster = all_ranks((centers.cpu(), cluster.cpu()))[0]
        run.finish("prompts", {"centers": centers, "cluster": cluster})
    model.centers.copy_(run.finished["prompts"]["centers"])
    cluster = run.finished["prompts"]["cluster"]

    # The prompt of each image.
    config = model.config
    train_labels = [labels[i] for i in dataset.train] if labels else None
    prompt_of = prompt_numbers(config.labels, train_labels, config.clusters, cluster)
    texts = [model.prompts[k] for k in prompt_of]
    model.prompt_counts.copy_(prompt_of.bincount(minlength=len(model.prompts)))
    if run.writes:
        print(f"{(model.prompt_counts > 0).sum()} of {len(model.prompts)} prompts in use, e.g. "
              f"{texts[0]!r}; balanced; {run.folder / 'prompts.csv'}")
        files = [dataset.images.files[i] for i in dataset.train]
        blank = [""] * len(files)
        rows = zip(files, train_labels or blank, cluster.tolist() if config.clusters else blank,
                   texts)
        write_csv(run.folder / "prompts.csv", [["file", "label", "cluster", "prompt"], *rows])
        if config.clusters:
            draw_clusters(run.folder / "morphologies.png", dataset.images, dataset.train, cluster,
                          seed)
    return prompt_of, texts, features


def train_unet(preset, run, model, cache, dataset, labels, keep_tokens, seed, dtype, accumulate):
    """Train U-Net and projection on cached latents and tokens; the model ends with EMA weights."""
    device = model.shift.device

    # Prompts in place of tokens: each comes equally often.
    if model.prompts:
        prompt_of, texts, features = derive_prompts(run, model, dataset, labels, cache,
                                                    keep_tokens, seed)
        if preset.unet == "train" and not run.steps_done("unet") and "unet" not in run.finished:
            model.projection.start_from_images(
                texts, features, torch.Generator().manual_seed(step_seed(seed, "words")))
        counts = prompt_of.bincount()
        n = int(counts.max() * (counts > 0).sum())  # each image of the most frequent prompt once
        ids = model.prompt_ids(model.prompts).cpu()
        cache = Latents(run.folder / "cache", ids[prompt_of], balance(prompt_of.tolist(), n, seed))

    torch.set_float32_matmul_precision("high")  # only now: embedding needs full float32
    if model.config.condition == "none":  # uses only the projection's null context
        model.projection.requires_grad_(False).null_context.requires_grad_(True)

    def loss_fn(batch, step, generator):
        mean, std, condition = batch
        if not model.prompts:
            condition = model.standardise(condition)
        return model.loss(mean, std, condition, generator)

    if "unet" not in run.finished:
        trained = model.trained
        ema = {name: p.detach().clone() for name, p in trainable(trained).items()}
        steps = preset.unet_steps
        previews = {max(1, steps * k // preset.previews) for k in range(1, preset.previews + 1)}

        # Up to 64 held-out images, on which each preview measures the loss.
        held_out = None
        if steps and run.writes and len(dataset.test):
            generator = torch.Generator().manual_seed(step_seed(seed, "held out"))
            order = torch.randperm(len(dataset.test), generator=generator)
            indices = dataset.test[order[:64]]
            held_out = HeldOut(model, *conditions_of(model, dataset, labels, indices), seed)

        # Train in segments between previews.
        for upto in sorted(previews) if steps else []:
            if upto < run.steps_done("unet"):
                continue
            fit("unet", trained, loss_fn, cache, steps=steps, upto=upto, batch=preset.batch,
                lr=preset.lr, device=device, seed=seed, run=run, ema=ema,
                ema_decay=warmed_up(preset.ema), dtype=dtype, weight_decay=preset.weight_decay,
                accumulate=accumulate)

            # A preview shows the EMA weights; training continues with the raw ones.
            if run.writes:
                raw = {name: p.detach().clone() for name, p in trainable(trained).items()}
                load_trained(trained, ema)
                samples = preview(run, model, dataset, labels, upto)
                if held_out:
                    held_out.measure(run, model, cache, samples, upto, upto == steps)
                load_trained(trained, raw)
                run.draw_curves()
        run.finish("unet", ema)
    load_trained(model.trained, run.finished["unet"])
    model.unet.to(memory_format=torch.channels_last)


def conditions_of(model, dataset, labels, indices):
    """Images (B, 3, H, W) of these indices, their tokens (B, G, D), and their condition."""
    images = dataset.images
    real = images.batch(indices).to(model.shift.device)
    tokens = model.embed(real, [images.files[i] for i in indices])
    if not model.prompts:
        return real, tokens, None if model.config.condition == "none" else tokens
    cluster = torch.zeros(len(real), dtype=torch.int64)
    if model.config.clusters:
        cluster = model.cluster_of(tokens).cpu()
    labels = [labels[i] for i in indices] if labels else None
    prompt_of = prompt_numbers(model.config.labels, labels, model.config.clusters, cluster)
    ids = model.prompt_ids([model.prompts[k] for k in prompt_of])
    return real, tokens, ids.to(real.device)


def preview(run, model, dataset, labels, step, refined=False):
    """Write model.pt and a grid of held-out images, reconstructions and samples (B, 3, H, W), which
    are returned without refinement."""
    real, _, condition = conditions_of(model, dataset, labels, dataset.examples)
    seeds = list(range(len(real)))
    samples = model.sample(condition, seeds, refine=False)
    rows = [real, model.decode(model.encode(real)), samples]
    captions = ["source", "reconstruction", f"sample, step {step}"]
    if refined:
        rows += [model.refine(samples, seeds)]
        captions += ["refined sample"]
    name = "grid_refined.png" if refined else f"grid_{step:06d}.png"
    save_grid(run.folder / name, [row.cpu() for row in rows], captions)
    run.write_model(model.to_checkpoint())
    return samples


# ---------------------------------------------------------------------------- stage 5: the refiner

class PicturesAndLatents:
    """Training images and their latents: (image, mean, std)."""

    def __init__(self, pictures, cache):
        self.pictures = pictures
        self.cache = cache

    def __len__(self):
        return len(self.pictures)

    def __getitems__(self, rows):
        return *self.pictures.__getitems__(rows), *self.cache.__getitems__(rows)[:2]


def random_window(images, side, multiple, seed):
    """Crop the same random square of `side` pixels, at multiples of `multiple`, out of each batch
    of images (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, to avoid waiting for the GPU
    places = (images[0].shape[-1] - side) // multiple + 1
    top, left = (multiple * torch.randint(places, (2,), generator=generator)).tolist()
    return [x[..., top:top + side, left:left + side] for x in images]


def train_refiner(preset, run, model, pictures, cache, dataset, labels, seed, dtype):
    """Equation (8) on reconstructions from noisy latents; the refiner ends with EMA weights."""
    refiner = model.refiner
    pairs = PicturesAndLatents(pictures, cache)
    device = model.shift.device

    def decode_noisy(mean, std, generator):
        """Decode a draw from the posterior plus noise of 0 to refiner_noise deviations."""
        noise, error = torch.randn((2, *mean.shape), generator=generator, device=device)
        amount = torch.rand(len(mean), 1, 1, 1, generator=generator, device=device)
        x0 = (mean + std * noise - model.shift) * model.scale
        with torch.autocast(device.type, enabled=False):
            return model.decode(x0 + preset.refiner_noise * amount * error)

    def draw_pairs(count):
        """Batches of (image, decoded) from that many training images, evenly spaced."""
        generator = torch.Generator(device).manual_seed(step_seed(seed, "residuals"))
        for part in spaced_rows(len(pairs), count).split(16):
            image, mean, std = (x.to(device) for x in pairs.__getitems__(part.tolist()))
            yield image, decode_noisy(mean, std, generator)

    if "refiner" not in run.finished:
        if (refiner.residual_std == 1).all():  # else --init has measured them
            refiner.measure(draw_pairs(256))
        refiner.unet.to(memory_format=memory_format(device, dtype))
        multiple = 2 * model.config.refiner.factor
        side = max(1, min(preset.refiner_window, preset.size) // multiple) * multiple

        def loss_fn(batch, step, generator):
            image, mean, std = batch
            images = image, decode_noisy(mean, std, generator)
            window_seed = step_seed(seed, "window", step)
            image, decoded = random_window(images, side, multiple, window_seed)
            return refiner.loss(image, decoded, model.schedule, generator)

        ema = {name: p.detach().clone() for name, p in trainable(refiner).items()}
        fit("refiner", refiner, loss_fn, pairs, steps=preset.refiner_steps,
            batch=preset.refiner_batch, lr=preset.refiner_lr, device=device, seed=seed, run=run,
            ema=ema, ema_decay=warmed_up(preset.ema), dtype=dtype)
        load_trained(refiner, ema)
        refiner.calibrate(draw_pairs(32), model.schedule)
        run.finish("refiner", refiner.state_dict())
    refiner.load_state_dict(run.finished["refiner"])
    refiner.unet.to(memory_format=torch.channels_last)
    if run.writes:
        preview(run, model, dataset, labels, preset.unet_steps, refined=True)


# ---------------------------------------------------------------------------- the command line

def flags():
    parser = argparse.ArgumentParser(
        description="Train DiNO-Diffusion. The default runs on a laptop without downloads.",
        usage="%(prog)s [flags]", formatter_class=Help)

    flag = parser.add_argument_group("data").add_argument
    flag("--data", default="cxr",
         help="cxr, histology, phantoms, a folder of images, or a MedMNIST .npz")
    flag("--table", help="CSV of labels, patients and split (default: labels.csv in the folder)")
    flag("--file-column", default="file", help="its column of file names")
    flag("--group-column", default="patient", help="its column of patients, kept on one side")
    flag("--patient-from", metavar="REGEX", help="patient from the path: what (...) matches")
    flag("--holdout", type=number(float, 0, 1), default=0.15,
         help="share of patients held out, if the set has no split")
    flag("--count", type=number(int, 1), default=2400, help="number of phantoms to generate")

    flag = parser.add_argument_group("model").add_argument
    flag("--preset", choices=PRESETS, default="tiny", help="64 px: tiny, tissue64; 128: cxr128, "
         "small; 256: base; 512: sd15")
    flag("--init", help="a run, a model.pt, or box, whose U-Net is fine-tuned; --embedder tiny "
         "and --vae train fine-tune those parts too")
    flag("--embedder", help="tiny, random, a file of vectors (.npz), a path, or one of: "
         + ", ".join(PUBLISHED["vit"]))
    flag("--vae", help="train, a path, or a published name")
    flag("--unet", help="train, a path, or sd15")
    flag("--condition", choices=("dino", "prompts", "labels", "none"), default="dino",
         help="tokens; words from clusters of tokens (and labels); labels alone; unconditional")
    flag("--label-column", help="column for prompts, or none (default: label, if there is one)")

    flag = parser.add_argument_group("training (default: the preset's)").add_argument
    flag("--size", type=number(int, 8, 4096), help="image side in pixels")
    flag("--steps", type=number(int, 1), help="caps every stage")
    flag("--batch", type=number(int, 1), help="images per step of the U-Net")
    flag("--lr", type=number(float, 1e-12), help="peak learning rate of the U-Net")
    flag("--set", nargs="+", metavar="NAME=VALUE", default=[],
         help="any field of Preset, e.g. vae_steps=6000 refiner_steps=0")
    flag("--accumulate", type=number(int, 1), default=1, help="number of parts of a batch")
    flag("--checkpointing", action="store_true", help="less memory, a third more time")
    flag("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of all randomness")

    flag = parser.add_argument_group("machine and files").add_argument
    flag("--device", default="auto", help="auto, cuda, mps or cpu")
    flag("--dtype", choices=("auto", "float32", "bf16"), default="auto", help="autocast")
    flag("--compile", action=argparse.BooleanOptionalAction,
         help="torch.compile all blocks (default: on a GPU, in a long run, if it is faster)")
    flag("--threads", type=number(int, 0), default=0,
         help="of the CPU; 0 takes 1 unless more are measured to be faster")
    flag("--out", help="the run's folder (default: runs/NAME)")
    flag("--resume", action="store_true", help="continue where the run stopped")
    flag("--dry-run", action="store_true", help="print all settings as JSON and exit")
    return parser


def parse(argv=None):
    """Flags -> Namespace; with --resume, defaults are the run's: see resume_flags."""
    parser = flags()
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/{Path(args.data).resolve().stem}"
    return args if args.dry_run else resume_flags(parser, argv, args.out)


MAY_BE_ZERO = {"unet_steps", "refiner_steps", "kl_weight", "weight_decay", "ema",
               "drop_condition", "clusters", "refiner_noise", "latent_power"}


def read_overrides(pairs):
    """["vae_steps=6000", ...] -> {name: value}; UserError for an unknown name or a bad value."""
    defaults = {field.name: field.default for field in fields(Preset)
                if isinstance(field.default, (int, float, str))}
    overrides = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in defaults:
            raise UserError(f"--set {pair!r} names no setting", f"one of {', '.join(defaults)}",
                            "pass NAME=VALUE")
        kind = type(defaults[name])
        need = f"more than {'or equal to ' * (name in MAY_BE_ZERO)}0"
        with user_errors(f"--set {name} takes {kind.__name__}, {need}", f"pass {name}=VALUE"):
            value = kind(text)
            if kind is not str and not (0 < value < math.inf or value == 0 and
                                        name in MAY_BE_ZERO):
                raise ValueError(f"got {pair}")
        overrides[name] = value
    return overrides


def is_published(unet):
    """Whether --unet names a file or folder of Stable Diffusion, and not a run of ours."""
    if unet in ("train", *PUBLISHED["unet"]):
        return unet != "train"
    with user_errors():
        return find_weights(unet, "unet").suffix != ".pt"


def prediction_of(unet):
    """What a trained U-Net predicts: Stable Diffusion's eps, or as in its run."""
    if is_published(unet):
        return "eps"
    with user_errors():
        return load_checkpoint(find_weights(unet, "unet"))["config"]["prediction"]


def choose_preset(args, init):
    """The Preset, changed by --init and then by flags; UserError if settings are contradictory."""
    preset = PRESETS[args.preset]
    capped = {name: min(getattr(preset, name), args.steps or math.inf)
              for name in (f"{stage}_steps" for stage in STAGES)}
    inherited = {}
    if init:
        inherited = {"embedder": args.init, "vae": args.init, "unet": args.init,
                     "size": init.config.image_size, "prediction": init.config.prediction,
                     "tokens": init.config.tokens,
                     "guidance_scale": init.config.guidance_scale}
    overrides = read_overrides(args.set)
    unet = args.unet or overrides.get("unet", "train")
    if init and unet not in ("train", args.init):
        raise UserError(f"--init {args.init} and --unet {unet}", "one U-Net is fine-tuned",
                        "leave one of them out")
    if unet != "train":
        inherited["prediction"] = prediction_of(unet)
    names = ("size", "embedder", "vae", "unet", "batch", "lr")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    preset = replace(preset, **capped | inherited | overrides | given)

    if not preset.unet_steps and preset.unet == "train":
        raise UserError("--set unet_steps=0 leaves the U-Net untrained",
                        "trained weights are needed", "pass --init RUN, or more steps")
    for name, allowed in ("prediction", ("v", "eps")), ("tokens", TOKEN_KINDS):
        if getattr(preset, name) not in allowed:
            raise UserError(f"--set {name}={getattr(preset, name)}",
                            f"need one of {', '.join(allowed)}", "pass one of these")

    # Ranks and parts need equally many images, because their mean gradients are averaged.
    parts = {"batch": ranks() * args.accumulate, "vae_batch": ranks(),
             "embedder_batch": ranks(), "refiner_batch": ranks()}
    for name, count in parts.items():
        if getattr(preset, name) % count:
            raise UserError(f"{name} {getattr(preset, name)} cannot be cut into equal parts",
                            f"a multiple of {count} (processes x --accumulate) is needed",
                            f"pass --set {name}=N")
    return preset


def train_stages(args, preset, run, model, dataset, labels, dtype):
    """Run all stages: trains the model in place."""
    pictures = Pictures(dataset.images, dataset.train)
    trains_embedder = preset.embedder == "tiny"
    trains_vae = preset.vae == "train"
    if trains_embedder or trains_vae or preset.refiner_steps:
        pictures = decode_once(pictures, run)
    if trains_embedder:
        train_embedder(preset, run, model, pictures, args.seed, dtype, bool(args.init),
                       args.compile)
    if trains_vae:
        train_vae(preset, run, model, pictures, args.seed, dtype, bool(args.init))

    # Latents, tokens and statistics; a fine-tuned U-Net keeps those it was trained with.
    cache = cache_latents(run, model, dataset, pictures)
    fine_tunes_unet = bool(args.init) and preset.unet == args.init
    scale = "measure"
    if fine_tunes_unet and preset.vae == args.init:
        scale = "keep"
    elif is_published(preset.unet):
        scale = 0.18215  # what Stable Diffusion's U-Net was trained with
    keep_tokens = fine_tunes_unet and preset.embedder == args.init
    measure_statistics(model, cache, scale, keep_tokens, preset.latent_power)

    train_unet(preset, run, model, cache, dataset, labels, keep_tokens, args.seed, dtype,
               args.accumulate)
    if model.refiner and preset.refiner_steps:
        train_refiner(preset, run, model, pictures, cache, dataset, labels, args.seed, dtype)
    if args.condition == "dino" and len(dataset.train) > 1:
        tokens = torch.from_numpy(np.array(cache.tokens[:50_000]))
        model.cpu()
        model.embedding_sampler = EmbeddingSampler.fit(model.standardise(tokens), seed=args.seed)


def main(argv=None):
    join_ranks()
    args = parse(argv)
    init = None
    if args.init:
        with user_errors():
            init = DinoDiffusion.from_checkpoint(load_checkpoint(resolve_checkpoint(args.init)))
    preset = choose_preset(args, init)
    config = {**vars(args), "settings": asdict(preset), "torch": str(torch.__version__),
              "torchvision": str(torchvision.__version__)}
    if args.dry_run:
        print(json.dumps(config, indent=2))
        return 0

    # The images; here and below, all errors are raised before a file is written.
    began = time.time()
    device = pick_device(args.device)
    dataset = open_training_set(
        Path(args.out), args.resume, preset.size, data=args.data, holdout=args.holdout,
        seed=args.seed, condition=args.condition, table=args.table, file_column=args.file_column,
        group_column=args.group_column, patient_from=args.patient_from, count=args.count)
    images = dataset.images
    rows = torch.cat([dataset.train, dataset.test]).tolist()

    # Labels, prompts, vectors, and the model.
    labels = labels_for_prompts(images.columns, args.label_column, args.condition, rows,
                                images.name)
    vectors = read_vectors(preset.embedder) if preset.embedder.endswith(".npz") else None
    with user_errors():
        prompts = plan_prompts(labels and [labels[i] for i in rows], len(dataset.train),
                               args.condition, preset.clusters, preset.template)
        some = images.batch(dataset.train[spaced_rows(len(dataset.train), 64)].tolist())
        is_grey = bool((some.amax(1) - some.amin(1)).mean() < 0.01)
        model = build_model(preset, args.condition, init, prompts, vectors, is_grey, args.seed)
        if vectors:
            model.embedder.tokens(torch.zeros(0), [images.files[i] for i in rows])

    # How it computes.
    model.unet.checkpointing = args.checkpointing
    dtype = autocast_dtype(device, args.dtype)
    step = partial(rehearse, model, preset.batch // (ranks() * args.accumulate), dtype)
    config["threads"], thread_gain = set_threads(args.threads, device, preset.unet_steps, step)
    model.to(device)
    model.unet.to(memory_format=memory_format(device, dtype))
    config["compile"] = args.compile = compile_where_it_pays(model, args.compile, device,
                                                             preset.unet_steps, step)

    # Train.
    run = Run(args.out, config | {"depth": images.depth}, args.resume, thread_gain)
    try:
        with run.signals_caught():
            write_choice(run, dataset)
            print_start(preset, run, model, dataset, device)
            train_stages(args, preset, run, model, dataset, labels, dtype)
    except Stopped as stopped:
        print(f"Saved. Resume with: python train.py --resume --out {shlex.quote(args.out)}")
        return 128 + stopped.args[0]

    # Outputs.
    if run.writes:
        run.write_model(model.to_checkpoint())
        run.draw_curves()
        example = write_examples(run.folder / "held_out", dataset)
        run.close()
        print_end(run, model, example, (time.time() - began) / 60)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
