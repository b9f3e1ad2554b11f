"""Train DiNO-Diffusion: embedder, VAE and conditional U-Net, by one loop.

    python train.py --data cxr                                     # a laptop, ten minutes
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
(bit for bit on a CPU). Under torchrun each process (rank) takes its share of every batch with the
noise that belongs to it, so the number of ranks changes nothing but the rounding of sums.
"""
import argparse
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import data
from data import StatusLine, UserError, run_script, step_seed, user_errors
from dino import (DINO, TOKEN_KINDS, VISION_TRANSFORMERS, VisionTransformer, build_vit,
                  conditioning_tokens, load_dino)
from dinodiff import DinoDiffusion, DinoDiffusionConfig, EmbeddingSampler
from prompts import BASELINE, ENRICHED, UNLABELLED, balance, kmeans
from unet import UNet, UNetConfig
from vae import PUBLISHED, AutoencoderKL, VAEConfig, latent_statistics, vae_loss

PRESETS = {  # tiny: a laptop, everything is trained. sd15: starts from Stable Diffusion 1.5
    "tiny": dict(size=64, embedder="tiny", vae="train", unet="train",
                 embedder_batch=32, embedder_steps=300, vae_batch=8, vae_steps=2000, vae_lr=3e-3,
                 batch=16, unet_steps=1700, lr=1e-3),
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
VAES = {  # base_channels, channel_multipliers, layers_per_block: factors 4, 4, 8, 8
    "tiny": VAEConfig(3, 4, 16, (1, 2, 4), 1), "small": VAEConfig(3, 4, 64, (1, 2, 4), 1),
    "base": VAEConfig(3, 4, 64, (1, 2, 4, 4), 2), "sd15": VAEConfig(),
}
UNETS = {  # base_channels, channel_multipliers, layers, attention_levels, context_dim, num_heads
    "tiny": UNetConfig(4, 4, 64, (1, 2, 2), 1, (False, True, True), 192, 4),
    "small": UNetConfig(4, 4, 128, (1, 2, 3), 2, (False, True, True), 384, 8),
    "base": UNetConfig(4, 4, 192, (1, 2, 3, 4), 2, (True, True, True, False), 768, 8),
    "sd15": UNetConfig(),
}
STAGES = ("embedder", "vae", "unet")
FREE_TO_CHANGE = {"device", "workers", "out", "resume", "dry_run", "torch", "torchvision"}


# ---------------------------------------------------------------------------- the loop

class Stopped(Exception):
    """Ctrl-C or SIGTERM came, and the run was saved: args[0] is the signal's number."""


@lru_cache(maxsize=4)
def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(step_seed(seed, epoch)))


def batch_rows(step, batch, n, seed):
    """Rows of the data for one step: epochs of reshuffled 0..n-1, cut into batches."""
    rows = []
    while len(rows) < batch:
        epoch, offset = divmod(step * batch + len(rows), n)
        rows += epoch_order(n, seed, epoch)[offset:offset + batch - len(rows)].tolist()
    return rows


def leave_signals_to_the_run(worker):
    """Ctrl-C in a terminal, and a cluster's SIGTERM, reach the loader's processes as well."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def loader(dataset, plan, workers=0):
    """One ready batch (a tuple of tensors, `dataset.__getitems__`) for each list of rows.

    Raises MemoryError if a process that reads images was killed: most often memory was full."""
    batches = iter(DataLoader(dataset, batch_sampler=plan, num_workers=workers, collate_fn=tuple,
                              worker_init_fn=leave_signals_to_the_run))
    if workers:  # torch's handler would raise in the middle of whatever runs when one is killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        try:
            rows = next(batches)
        except StopIteration:
            return
        except (EOFError, ConnectionError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "worker (pid" not in str(error):
                raise
            raise MemoryError("a process that reads images was killed") from error
        yield rows


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Share(torch.Generator):
    """Random numbers for the images index::count of a batch, which ranks and --accumulate cut into
    `count` parts. Losses draw for the whole batch and keep [:, index] of (B, count, ...): an
    image's noise does not depend on the cut."""
    share = (0, 1)


class Loss(torch.nn.Module):
    """A loss function as the forward pass of its model: what DistributedDataParallel wraps."""

    def __init__(self, model, loss_fn):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch, step, generator):
        return self.loss_fn(batch, step, generator)


def fit(stage, model, loss_fn, dataset, *, steps, batch, lr, device, seed=0, run=None, ema=None,
        dtype=torch.float32, betas=(0.9, 0.99), weight_decay=0.01, warmup=50, clip=1.0,
        ema_decay=0.999, accumulate=1, workers=0):
    """The one training loop, as a generator: yields the number of steps done, after each step.

    loss_fn(batch on the device, step, generator) -> (scalar loss, dict of values to log). The
    generator is seeded by (seed, stage, step). ema: dict of name -> tensor, updated in place with
    min(ema_decay, (1 + n) / (10 + n)): parameters only, and no memory of the random start.
    The batch is that of all ranks together; each rank cuts its share into `accumulate` parts. The
    loss in the log is the mean over ranks, the values beside it are those of rank 0's last part.
    With a `run`, rows go to its log and the state is saved every few minutes, at the end and on
    Ctrl-C; a saved state of this stage is taken up where it stopped.
    Raises UserError when a loss is not finite, Stopped after a signal.
    """
    params = trainable(model)
    warmup = min(warmup, max(1, steps // 5))
    optimizer = torch.optim.AdamW(params.values(), lr=lr, betas=betas, weight_decay=weight_decay,
                                  fused=device.type != "mps")
    start = run.restore(stage, model, optimizer, ema) if run else 0
    status = StatusLine(steps, stage, start)
    look_every = min(10, max(1, steps // 500))  # looking at a loss waits for the GPU
    losses, began, saved, wait = [], time.time(), time.time(), 120
    rank, ranks, order = data.rank(), data.ranks(), step_seed(seed, stage, "order")
    plan = (batch_rows(step, batch, len(dataset), order)[rank::ranks]
            for step in range(start, steps))
    forward = loss_fn if ranks == 1 else DistributedDataParallel(Loss(model, loss_fn))
    model.train()
    for step, rows in enumerate(loader(dataset, plan, workers), start):
        rate = learning_rate(step, steps, lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        for k in range(accumulate):
            part = [r[k::accumulate].to(device, non_blocking=True) for r in rows]
            generator = Share(device).manual_seed(step_seed(seed, stage, step, 0))
            generator.share = rank + ranks * k, ranks * accumulate
            last = ranks == 1 or k == accumulate - 1  # gradients are averaged once a step
            with nullcontext() if last else forward.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss, logs = forward(part, step, generator)
                (loss / accumulate).backward()
            total = total + loss.detach() / accumulate
        norm = torch.nn.utils.clip_grad_norm_(params.values(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            decay = min(ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in params.values()],
                                 1 - decay)
        losses.append(total + 0 * norm)  # NaN too where only the gradient is not finite
        done = step + 1
        look = done % look_every == 0 or done == steps
        values = data.all_ranks(torch.stack(losses).tolist()) if look else []
        values = [sum(each) / ranks for each in zip(*values)]
        bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None:
            state = run.folder / "state.pt" if run else Path("none")
            raise UserError(
                f"{stage}: the loss or its gradient is {values[bad]} at step "
                f"{done - len(values) + bad + 1} (learning rate {rate:.2g}): need a finite one; "
                f"last good state: {state if state.exists() else 'none'}; start anew with "
                + {"embedder": "--dtype float32", "vae": "a lower --vae-lr"}.get(
                    stage, "a lower --lr"))
        yield done  # the caller's turn: what it changes now is part of the saved state
        if not look:
            continue
        losses, value = [], sum(values) / len(values)
        with suppress(OSError):  # a closed pipe: who watched has gone, the run goes on
            status.update(done, loss=value, images=batch * len(values))
        if run:
            run.log(stage=stage, step=done, loss=value, lr=rate, seconds=time.time() - began,
                    **{name: float(v) for name, v in logs.items()})
            stop = max(data.all_ranks(run.stop_signal))  # all stop at the same step
            if stop or done == steps or time.time() - saved > wait:
                began_save = time.time()
                run.save(stage, done, model, optimizer, ema)
                saved = time.time()
                wait = max(wait, 20 * (saved - began_save))  # at most 5 % of the time
            if stop and done < steps:
                raise Stopped(stop)
    status.close()
    model.eval()


@torch.no_grad()
def load_ema(model, ema):
    for name, p in trainable(model).items():
        p.copy_(ema[name])


@contextmanager
def swapped(model, ema):
    """Inside, the model holds the EMA weights."""
    kept = {name: p.detach().clone() for name, p in trainable(model).items()}
    load_ema(model, ema)
    try:
        yield
    finally:
        load_ema(model, kept)


# ---------------------------------------------------------------------------- the run's folder

def lock(folder):
    """Keep a second run out of the folder; returns the open file that does it.

    The kernel holds the lock until this process ends in whatever way, so none is ever stale.
    """
    file = open(folder / "lock", "a+")
    try:
        import fcntl  # Windows has none, and runs without a lock
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{folder} is in use by process {file.read()[:20]}: a folder takes one run "
                        "at a time: wait for it, stop it, or pass another --out") from None
    except (ImportError, OSError) as error:
        print(f"note: no lock here ({error}): start no second run in {folder}")
    file.truncate(0)
    print(os.getpid(), file=file, flush=True)
    return file


class Run:
    """A folder that holds what was asked, what happened, and everything that a resume needs.

    Rank 0 writes; the others read state.pt, and keep what is finished in memory.
    """

    def __init__(self, folder, config, resume=False):
        self.folder, self.config = Path(folder), config
        self.finished, self.state, self.stop_signal = {}, None, 0
        if not data.rank():
            data.make_folder(self.folder / "cache")
            self.lock = lock(self.folder)
            for leftover in self.folder.glob(".*.tmp"):  # of a run that was killed while it wrote
                leftover.unlink()
        data.all_ranks()
        if resume and (self.folder / "state.pt").exists():
            saved = data.load_checkpoint(self.folder / "state.pt", ("finished", "state"),
                                         "copy it here again, or delete it and lose its steps")
            for name, value in saved.get("config", {}).items():
                if name not in FREE_TO_CHANGE and config.get(name, value) != value:
                    raise UserError(f"{self.folder / 'state.pt'} was made with {name} {value}, "
                                    f"not {config[name]}: need this run's own file: copy it here "
                                    "again, or delete it and lose its steps")
            self.finished, self.state = saved["finished"], saved["state"]
        if data.rank():
            return
        data.write_text_atomic(self.folder / "config.json", json.dumps(config, indent=2))
        kept = [r for r in self.rows() if r["stage"] in self.finished or (self.state and (
            r["stage"] == self.state["stage"] and r["step"] <= self.state["step"]))]
        data.write_text_atomic(self.folder / "log.jsonl",
                               "".join(json.dumps(row) + "\n" for row in kept))

    def rows(self):
        return data.read_jsonl(self.folder / "log.jsonl")

    def stay(self):
        """Do not make a deleted folder anew, half of it."""
        if not (self.folder / "config.json").exists():
            raise UserError(f"{self.folder} was moved or deleted: a run needs its folder: put it "
                            "back and pass --resume, or start anew with --out DIR")

    def log(self, **row):
        if data.rank():
            return
        self.stay()
        data.append_jsonl(self.folder / "log.jsonl", row)

    def catch_signals(self):
        """Ctrl-C and SIGTERM set a mark: the run saves and stops. A second one ends it at once."""
        def mark(number, frame):
            self.stop_signal = number
            signal.signal(number, signal.SIG_DFL)
            with suppress(OSError):  # the pipe's other end may have got the same Ctrl-C
                os.write(1, b"\nstopping: saving the state first ...\n")
        signal.signal(signal.SIGINT, mark)
        signal.signal(signal.SIGTERM, mark)

    def write_split(self, images, train, test, group_column):
        """split.csv; a resumed run must find the images that it began with."""
        path, new = self.folder / "split.csv", self.folder / ".split.tmp"
        data.write_split(new, images, train, test, group_column)
        begun = path.exists() and (self.state or self.finished)
        if begun and path.read_bytes() != new.read_bytes():
            raise UserError(f"the images differ from those that {self.folder} began with: need "
                            "the same set; restore it, or start anew with --out DIR")
        os.replace(new, path)

    def save(self, stage, step, model, optimizer, ema):
        self.state = {"stage": stage, "step": step, "model": model.state_dict(),
                      "optimizer": optimizer.state_dict(), "ema": ema}
        self.write()

    def write(self):
        if data.rank():
            return
        self.stay()
        data.save_atomic(self.folder / "state.pt", {
            "version": data.CHECKPOINT_VERSION, "config": self.config,
            "finished": self.finished, "state": self.state})

    def finish(self, stage, weights):
        """A stage is done: keep its weights, drop the rest of its state."""
        self.finished[stage], self.state = weights, None
        self.write()

    def restore(self, stage, model, optimizer, ema):
        """Load what was saved of this stage; returns the number of steps already done."""
        if not self.state or self.state["stage"] != stage:
            return 0
        model.load_state_dict(self.state["model"])
        optimizer.load_state_dict(self.state["optimizer"])
        for name in ema or {}:
            ema[name].copy_(self.state["ema"][name])
        step, self.state = self.state["step"], None  # drop the copy: it may be gigabytes
        print(f"{stage}: goes on after step {step}")
        return step


# ---------------------------------------------------------------------------- data for the loop

class Pictures(Dataset):
    """The training images, by row: a tuple of one tensor (B, 3, H, W) in [-1, 1]."""

    def __init__(self, images, indices):
        self.images, self.indices = images, indices

    def __len__(self):
        return len(self.indices)

    def __getitems__(self, rows):
        return (self.images.batch(self.indices[rows]),)


class Latents(Dataset):
    """The cache: rows of (mean, std, raw tokens), read from memory-mapped files. With the number of
    each image's prompt, these take the place of tokens, and every prompt comes equally often."""

    def __init__(self, folder, prompts=None, seed=0):
        with user_errors(f"{folder} must be whole", "delete it, and pass --resume"):
            self.latents = np.load(folder / "latents.npy", mmap_mode="r", allow_pickle=False)
            self.tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
        self.prompts, self.order = prompts, torch.arange(len(self.tokens))
        if prompts is not None:
            counts = prompts.bincount()
            n = int(counts.max() * (counts > 0).sum())  # one round for each image of the commonest
            self.order = balance(prompts.tolist(), n, seed)

    def __len__(self):
        return len(self.order)

    def __getitems__(self, rows):
        rows = self.order[rows].numpy()  # a tensor of one row would index like a number
        latents = torch.from_numpy(self.latents[rows].astype(np.float32))
        condition = (torch.from_numpy(self.tokens[rows]) if self.prompts is None
                     else self.prompts[rows])
        return latents[:, 0], latents[:, 1], condition


def fingerprint(tensors):
    """A short hash: a cache made by other weights or for other images must not be used."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def claim_disk(path):
    """Give a sparse file its blocks: a full disk is an error now, not the end by SIGBUS later."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


@torch.no_grad()
def build_cache(run, model, images, indices, batch, workers):
    """Latents (N, 2, C, h, w) float16 and raw tokens (N, G, D) float32, in a stream, resumable.

    float16 rounds a latent by 0.05 %; tokens stay float32, for they differ from image to image
    by a few per cent of their length only. Both nets run in float32, as they will in sampling.
    Ranks take batches in turn and write into the same files: they need one shared folder.
    """
    config, n, folder = model.config, len(indices), run.folder / "cache"
    side = config.image_size // config.vae.factor
    shape = (n, 2, config.vae.latent_channels, side, side)
    files = {"latents": (shape, np.float16), "tokens": ((n, *config.token_shape), np.float32)}
    mark = config.tokens + fingerprint([indices, *model.vae.parameters(),
                                        *model.embedder.parameters()])
    progress, done = folder / "progress.json", 0
    with user_errors(f"{folder} must be whole, on a disk with space for {n:,} rows",
                     "make space or delete it, and pass --resume"):
        if progress.exists() and all((folder / f"{name}.npy").exists() for name in files):
            seen = json.loads(progress.read_text())
            done = seen["rows"] if seen["made_by"] == mark else 0
        done = data.all_ranks(done)[0]
        if not data.rank():
            for name, (shape, dtype) in files.items():
                if not done:
                    np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
                claim_disk(folder / f"{name}.npy")
        data.all_ranks()
        arrays = {name: np.load(folder / f"{name}.npy", "r+", allow_pickle=False)
                  for name in files}
    if not done and not data.rank():
        data.write_csv(folder / "index.csv", [["row", "file"]] + [
            [row, images.files[i]] for row, i in enumerate(indices.tolist())])
    if done == n:
        return
    status = StatusLine(n, "cache", done)
    plan = [list(range(i, min(i + batch, n))) for i in range(done, n, batch)]
    plan += plan[-1:] * (-len(plan) % data.ranks())  # as many for each rank; the last one twice
    plan = plan[data.rank()::data.ranks()]
    for k, (x,) in enumerate(loader(Pictures(images, indices), plan, workers)):
        x, rows = x.to(model.shift.device), plan[k]
        posterior = model.vae.encode(x)
        both = torch.stack([posterior.mean, posterior.std], dim=1)  # 2 x (B, C, h, w)
        arrays["latents"][rows] = both.cpu().numpy()
        arrays["tokens"][rows] = conditioning_tokens(model.embedder, x,
                                                     config.tokens).cpu().numpy()
        stop = max(data.all_ranks(run.stop_signal))
        through = min(n, done + (k + 1) * data.ranks() * batch)  # rows that all ranks have made
        if k % 50 == 49 or through == n or stop:
            for array in arrays.values():
                array.flush()
            data.all_ranks()
            if not data.rank():
                data.write_text_atomic(progress, json.dumps({"rows": through, "made_by": mark}))
            if stop:
                raise Stopped(stop)
        status.update(through, images=len(rows) * data.ranks())
    status.close()


# ---------------------------------------------------------------------------- the stages

def find_labels(args, images, rows):
    """The label of each image in lower case, or None if there are none to put into prompts."""
    default = "label" if "label" in images.columns or args.condition == "labels" else "none"
    name = args.label_column or default
    if name == "none" and args.condition != "labels":
        return None
    if name not in images.columns:
        raise UserError(f"there is no label column {name!r}: {images.name} has "
                        f"{', '.join(images.columns) or 'no labels.csv'}: pass another "
                        "--label-column, or --condition prompts --label-column none")
    labels = [cell.strip().lower() for cell in images.columns[name]]
    empty = [images.files[i] for i in rows if not labels[i]]
    if empty:
        raise UserError(f"column {name!r} is empty for {len(empty):,} images (first: {empty[0]}): "
                        "each image needs a label: fill the cells, or pass --label-column none")
    if len({labels[i] for i in rows}) < 2:
        raise UserError(f"column {name!r} holds only {labels[rows[0]]!r}: two labels are needed to "
                        "tell apart: pass another --label-column, or --label-column none")
    return labels


def plan_prompts(args, labels, rows):
    """(template, labels, clusters) of the model's prompts; refuses what cannot work."""
    if args.condition not in ("prompts", "labels"):
        return "", (), 0
    values = tuple(sorted({labels[i] for i in rows})) if labels else ()
    clusters = 0 if args.condition == "labels" else args.clusters or (33 if values else 10)
    if clusters > min(len(rows), 1000):
        raise UserError(f"--clusters {clusters} for {len(rows)} training images: need no more "
                        "clusters than images, and at most 1,000: pass a smaller --clusters")
    template = args.template or (UNLABELLED if not values else ENRICHED if clusters else BASELINE)
    for word, used in (("<label>", values), ("<index>", clusters)):
        if bool(used) != (word in template):
            raise UserError(f"--template {template!r} {'lacks' if used else 'holds'} {word}: it "
                            f"must hold {word} if {word[1:-1]}s are used, and else not: correct it")
    return template, values, clusters


def find_outliers(args, images, batch=256):
    """(number, reason) of each histology patch that shows nothing; none for grey images."""
    first = images.batch(range(min(16, len(images))))
    if not (args.drop_outliers if args.drop_outliers is not None
            else (first.amax(1) - first.amin(1)).max() > 0.1):
        return []
    found, status = [], StatusLine(len(images), "outliers")
    for i in range(0, len(images), batch):
        part = range(i, min(i + batch, len(images)))
        reasons = data.find_outliers(images.batch(part))
        found += [(number, reason) for number, reason in zip(part, reasons) if reason]
        status.update(part.stop, images=len(part))
    status.close()
    return found


def own_vit(size):
    """The ViT that is trained here, with random weights."""
    tiny = VISION_TRANSFORMERS["tiny"]
    side = min(size, 128)  # what it sees
    return VisionTransformer(replace(tiny, image_size=side - side % tiny.patch_size))


def build_model(args, images, template, labels, clusters):
    """The bundle, with published weights where flags name them; everything that can be refused is
    refused here, before anything is written."""
    torch.manual_seed(step_seed(args.seed, "embedder") % 2 ** 31)
    vit = own_vit(args.size) if args.embedder in ("tiny", "random") else load_dino(args.embedder)
    vae = VAES[args.preset] if args.vae == "train" else AutoencoderKL.from_pretrained(args.vae)
    unet = UNETS[args.preset] if args.unet == "train" else UNet.from_pretrained(args.unet)
    torch.manual_seed(step_seed(args.seed, "weights") % 2 ** 31)
    tokens = conditioning_tokens(vit, images.batch([0]), args.tokens)
    model = DinoDiffusion(DinoDiffusionConfig(
        image_size=args.size, vae=getattr(vae, "config", vae), unet=getattr(unet, "config", unet),
        vit=vit.config, condition=args.condition, tokens=args.tokens,
        token_shape=tuple(tokens.shape[1:]), template=template, labels=labels, clusters=clusters,
        schedule=args.schedule, prediction=args.prediction, zero_terminal_snr=args.zero_snr,
        min_snr_gamma=args.min_snr))
    for mine, given in ((model.embedder, vit), (model.vae, vae), (model.unet, unet)):
        if isinstance(given, torch.nn.Module):
            mine.load_state_dict(given.state_dict())
    return model


def seconds_an_image(work, sides, batch, device):
    """(seconds that work(images) takes for an image of side sides[-1], the last answer): for ever
    more pixels at once, until they take a quarter of a second; then scaled by the area."""
    more = [(sides[-1], 2 ** k) for k in range(1, batch.bit_length())] + 2 * [(sides[-1], batch)]
    for side, n in [(sides[0], 1)] + [(side, 1) for side in sides] + more:
        x, began = torch.rand(n, 3, side, side, device=device), time.monotonic()
        answer = work(x).cpu()  # waits for the GPU
        took = time.monotonic() - began
        if took > 0.25:
            break
    return took / n * (sides[-1] / side) ** 2, answer


@torch.no_grad()
def forecast_cache(args):
    """For --dry-run, what the cache will take at most: bytes follow from the shapes; hours are an
    estimate, from loading a few images and from timing both nets with random weights."""
    try:
        with user_errors():
            device = data.pick_device(args.device)
            n, loading = data.survey(args.data, args.size, args.count)
            vae = (AutoencoderKL.from_pretrained(args.vae) if args.vae not in (*PUBLISHED, "train")
                   else AutoencoderKL(VAES["sd15" if args.vae in PUBLISHED else args.preset]))
            vit = (own_vit(args.size) if args.embedder in ("tiny", "random") else
                   build_vit(args.embedder) if args.embedder in VISION_TRANSFORMERS else
                   load_dino(args.embedder))
    except UserError as error:
        return {"note": f"no forecast: {error}"}
    vae, vit, batch = vae.to(device).eval(), vit.to(device).eval(), 4 * args.vae_batch
    sides = [side for side in (64, 128, 256) if side < args.size] + [args.size]
    encoding, _ = seconds_an_image(lambda x: vae.encode(x).mean, sides, batch, device)
    embedding, tokens = seconds_an_image(lambda x: conditioning_tokens(vit, x, args.tokens),
                                         [args.size], batch, device)
    latent = vae.config.latent_channels * (args.size // vae.config.factor) ** 2
    size = 2 * 2 * latent + 4 * tokens[0].numel()  # mean and std, float16; tokens, float32
    nets = encoding + embedding
    seconds = max(nets, loading / args.workers) if args.workers else nets + loading
    return {"images": n, "bytes_an_image": size, "gigabytes": n * size / 1e9,
            "hours": n * seconds / 3600, "note": f"an estimate for one process on {device}"}


def train_embedder(args, run, model, pictures, dtype):
    """DINO on the training images; the teacher becomes model.embedder."""
    device = model.shift.device
    if "embedder" not in run.finished:
        torch.manual_seed(step_seed(args.seed, "dino") % 2 ** 31)
        dino = DINO(model.config.vit).to(device)
        steps = args.embedder_steps
        for step in fit("embedder", dino, lambda rows, step, g: dino.loss(*rows, step / steps, g),
                        pictures, steps=steps, batch=args.embedder_batch, lr=1e-3, device=device,
                        seed=args.seed, run=run, dtype=dtype, betas=(0.9, 0.999),
                        weight_decay=0.04, warmup=30, clip=3.0, workers=args.workers):
            dino.update_teacher(step / steps)
        run.finish("embedder", dino.teacher_vit().state_dict())
    model.embedder.load_state_dict(run.finished["embedder"])


def train_vae(args, run, model, pictures, dtype):
    """L1 + KL, and with --perceptual a distance in the embedder's feature space: model.vae."""
    def loss_fn(rows, step, generator):
        return vae_loss(model.vae, *rows, generator, perceptual_weight=args.perceptual, perceptual=(
            lambda image: conditioning_tokens(model.embedder, image, "patch"))
            if args.perceptual else None)

    if "vae" not in run.finished:
        model.vae.requires_grad_(True)
        if model.shift.device.type == "cpu":  # 69 ms a step, in channels_last 115 (bf16, measured)
            model.vae.to(memory_format=torch.contiguous_format)
        for _ in fit("vae", model.vae, loss_fn, pictures, steps=args.vae_steps,
                     batch=args.vae_batch, lr=args.vae_lr, device=model.shift.device,
                     seed=args.seed, run=run, dtype=dtype, weight_decay=0.0, warmup=20,
                     workers=args.workers):
            pass
        run.finish("vae", model.vae.state_dict())
    model.vae.load_state_dict(run.finished["vae"])
    model.vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def measure_statistics(args, model, cache):
    """Mean and deviation over the training set: of each latent channel, of each token entry."""
    chunks = [range(i, min(i + 256, len(cache))) for i in range(0, len(cache), 256)]
    if "sd15" in (args.preset, args.unet):
        model.scale.fill_(0.18215)  # what this U-Net was trained with
    else:
        shift, scale = latent_statistics(cache.__getitems__(list(c))[:2] for c in chunks)
        model.shift.copy_(shift.view_as(model.shift))
        model.scale.copy_(scale.view_as(model.scale))
    def tokens():  # twice through the file, not all in memory
        return (torch.from_numpy(np.float64(cache.tokens[c.start:c.stop])) for c in chunks)

    mean = sum(t.sum(0) for t in tokens()) / len(cache)
    std = (sum((t - mean).square().sum(0) for t in tokens()) / len(cache)).sqrt()
    model.token_mean.copy_(mean)
    model.token_std.copy_(std.clamp(min=1e-4 * std.max().item() + 1e-12))


def prompt_numbers(config, labels, clusters):
    """The number in `config.prompts` of images with these labels (list) and clusters (N,)."""
    if not config.labels:
        return clusters
    own = torch.tensor([config.labels.index(label) for label in labels])
    return own * (config.clusters or 1) + clusters


def derive_prompts(args, run, model, images, train, labels):
    """The paper's step: K-means on the training tokens, label x cluster -> the number of each
    image's prompt, (N,) int64. Writes prompts.csv and the sheet morphologies.png."""
    config, cache = model.config, Latents(run.folder / "cache")
    if "prompts" not in run.finished:
        fit_of = {"cluster": torch.zeros(len(train), dtype=torch.int64), "centers": model.centers}
        if config.clusters:
            tokens = torch.from_numpy(np.array(cache.tokens)).to(model.shift.device)
            with user_errors():
                found = kmeans(model.standardise(tokens).flatten(1), config.clusters, args.seed)
            found = data.all_ranks([tensor.cpu() for tensor in found])[0]  # GPUs may round apart
            fit_of = dict(zip(("centers", "cluster"), found))
        run.finish("prompts", fit_of)
    model.centers.copy_(run.finished["prompts"]["centers"])
    cluster = run.finished["prompts"]["cluster"]
    numbers = prompt_numbers(config, labels and [labels[i] for i in train], cluster)
    model.prompt_counts.copy_(numbers.bincount(minlength=len(model.prompts)))
    if data.rank():
        return numbers
    data.write_csv(run.folder / "prompts.csv", [["file", "label", "cluster", "prompt"]] + [
        [images.files[i], labels[i] if labels else "", k if config.clusters else "",
         model.prompts[number]] for i, k, number in zip(
            train.tolist(), cluster.tolist(), numbers.tolist())])
    print(f"{(model.prompt_counts > 0).sum()} of {len(model.prompts)} prompts in use, e.g. "
          f"{model.prompts[numbers[0]]!r}; balanced; {run.folder / 'prompts.csv'}")
    if config.clusters:
        members = [train[cluster == k] for k in range(config.clusters)]
        shuffle = torch.Generator().manual_seed(args.seed)
        rows = [images.batch(own[torch.randperm(len(own), generator=shuffle)[:10]])
                for own in members]
        data.save_grid(run.folder / "morphologies.png", rows, captions=[
            f"{k}: {len(own)} images" for k, own in enumerate(members)])
    return numbers


def preview(model, images, sources, labels, step, folder):
    """grid_STEP.png: real held-out images, their VAE reconstructions, samples made from them, or
    from the prompts that fit them."""
    device, config = model.shift.device, model.config
    real = images.batch(sources).to(device)
    condition = None if config.condition == "none" else model.embed(real)
    if model.prompts:
        cluster = (model.cluster_of(condition).cpu() if config.clusters
                   else torch.zeros(len(real), dtype=torch.int64))
        numbers = prompt_numbers(config, labels and [labels[i] for i in sources], cluster)
        condition = [model.prompts[number] for number in numbers]
    samples = model.sample(condition, seeds=list(range(len(sources))), steps=25, eta=0.5)
    data.save_grid(folder / f"grid_{step:06d}.png",
                   [real.cpu(), model.decode(model.encode(real)).cpu(), samples.cpu()],
                   captions=["source", "VAE reconstruction", f"sample, step {step}"])


def train_unet(args, run, model, images, train, sources, labels, dtype):
    """The diffusion model itself, on cached latents and tokens; the model ends with EMA weights."""
    cache, steps, trained = Latents(run.folder / "cache"), args.unet_steps, model.trained
    measure_statistics(args, model, cache)
    if model.prompts:
        numbers = derive_prompts(args, run, model, images, train, labels)
        cache = Latents(run.folder / "cache", numbers, args.seed)
    torch.set_float32_matmul_precision("high")  # not before: tokens need all of float32
    if model.config.condition == "none":  # of the projection, only the null context is in use
        model.projection.requires_grad_(False).null_context.requires_grad_(True)
    ema = {name: p.detach().clone() for name, p in trainable(trained).items()}
    if args.compile:
        model.unet.compile()

    def loss_fn(batch, step, generator):
        mean, std, condition = batch
        if not model.prompts:
            condition = model.standardise(condition)
        return model.loss(mean, std, condition, generator)

    if "unet" not in run.finished:
        for step in fit("unet", trained, loss_fn, cache, steps=steps, batch=args.batch, lr=args.lr,
                        device=model.shift.device, seed=args.seed, run=run, ema=ema, dtype=dtype,
                        ema_decay=args.ema, accumulate=args.accumulate):
            if step % max(1, steps // args.grids) == 0 and not data.rank():
                trained.eval()
                with swapped(trained, ema):
                    preview(model, images, sources, labels, step, run.folder)
                    write_model(run, model)
                    if args.keep_checkpoints:
                        write_model(run, model, f"model_{step:06d}.pt")
                draw_curves(run)
                trained.train()
        run.finish("unet", ema)
    load_ema(trained, run.finished["unet"])


def write_model(run, model, name="model.pt"):
    data.save_atomic(run.folder / name,
                     {"version": data.CHECKPOINT_VERSION, **model.to_checkpoint(),
                      "training": run.config})


def draw_curves(run):
    rows = run.rows()
    series = {stage: ([r["step"] for r in rows if r["stage"] == stage],
                      [r["loss"] for r in rows if r["stage"] == stage]) for stage in STAGES}
    data.line_chart(run.folder / "curves.png", {k: v for k, v in series.items() if v[0]},
                    title="training loss", xlabel="step", ylabel="loss", log_y=True)


# ---------------------------------------------------------------------------- the command line

def parse(argv=None):
    """Flags -> Namespace. With --resume, flags that are not given come from the run's config."""
    p = argparse.ArgumentParser(
        description="Train DiNO-Diffusion. The default runs on a laptop without downloads.",
        usage="%(prog)s [flags]",
        formatter_class=data.Help)
    a = p.add_argument_group("data").add_argument
    a("--data", default="cxr", help="cxr, histology, phantoms, a folder of images, a MedMNIST "
      ".npz, or PatchCamelyon's .h5")
    a("--size", type=data.batch_int, help="image side in pixels (default: the preset's)")
    a("--holdout", default="0.15", help="share of groups that training never sees, or a file")
    a("--group-column", help="labels.csv column whose groups stay together (default: patient)")
    a("--count", type=data.positive_int, default=2400, help="how many phantoms to generate")
    a("--label-column", help="labels.csv column for prompts (default: label if there; or none)")
    a("--drop-outliers", action=argparse.BooleanOptionalAction,
      help="leave out black, blank and blurred patches (default: of colour images)")
    a = p.add_argument_group("model").add_argument
    a("--preset", choices=PRESETS, default="tiny", help="64, 128, 256 or 512 px")
    a("--embedder", help="tiny, random, a path, or one of: " + ", ".join(
        n for n in VISION_TRANSFORMERS if n != "tiny"))
    a("--vae", help="train, a path, or a published name (default: the preset's)")
    a("--unet", help="train, a path, or sd15 (default: the preset's)")
    a("--tokens", choices=TOKEN_KINDS, default="global", help="which tokens condition; patch "
      "kinds are for the ablation: the model may copy")
    a("--condition", choices=("dino", "prompts", "labels", "none"), default="dino",
      help="tokens; words from clusters of tokens (and labels); labels alone; unconditional")
    a("--clusters", type=data.positive_int,
      help="morphology types of --condition prompts (default: 33 with labels, 10 without)")
    a("--template", help="of prompts, with <label> and <index> (default: the paper's)")
    a("--schedule", choices=("scaled_linear", "linear", "cosine"), default="scaled_linear",
      help="noise schedule")
    a("--prediction", choices=("v", "eps"), help="what the U-Net predicts (default v; sd15 eps)")
    a("--zero-snr", action=argparse.BooleanOptionalAction,
      help="end the schedule in pure noise (default: on for v, off for eps)")
    a = p.add_argument_group("training").add_argument
    a("--steps", type=data.positive_int, help="caps every stage")
    for stage in STAGES:
        a(f"--{stage}-steps", type=data.positive_int, help="overrides the preset and --steps")
    a("--batch", type=data.batch_int, help="images a step of the U-Net (default: the preset's)")
    a("--vae-batch", type=data.batch_int, help="of the VAE: small ones learn it faster (default: "
      "the preset's)")
    a("--embedder-batch", type=data.batch_int, help="of the embedder (default: the preset's)")
    a("--accumulate", type=data.positive_int, default=1, help="parts a batch is cut into")
    a("--lr", type=data.positive_float, help="peak learning rate of the U-Net (default: "
      "the preset's)")
    a("--vae-lr", type=data.positive_float, help="peak learning rate of the VAE (default: "
      "the preset's)")
    a("--ema", type=data.fraction, default=0.999, help="decay of the averaged weights")
    a("--min-snr", type=data.not_negative, default=0.0, help="min-SNR gamma, 0 = off (paper: 5)")
    a("--perceptual", type=data.not_negative, default=0.0, help="weight in the VAE's loss")
    a("--seed", type=data.not_negative_int, default=0, help="of everything random")
    a = p.add_argument_group("machine and files").add_argument
    a("--device", default="auto", help="auto, cuda, mps or cpu")
    a("--dtype", choices=("auto", "float32", "bf16"), default="auto", help="autocast")
    a("--compile", action="store_true", help="torch.compile the U-Net (minutes of warm-up)")
    a("--workers", type=data.workers_int, default=0, help="processes that read images")
    a("--grids", type=data.positive_int, default=5, help="sample grids drawn in a run")
    a("--keep-checkpoints", action="store_true", help="keep a model_STEP.pt with each sample grid")
    a("--out", help="the run's folder (default: runs/NAME)")
    a("--resume", action="store_true", help="go on where the run stopped")
    a("--dry-run", action="store_true", help="print the settings, and the size and hours that the "
      "cache will take, as JSON, and exit")
    args = p.parse_args(argv)
    out = Path(args.out or f"runs/{Path(args.data).resolve().stem}")
    saved = out / "config.json"
    if saved.exists() and not args.dry_run:
        if not args.resume:
            raise UserError(f"{out} already holds a run: need a new folder, or --resume to go on; "
                            "pass --out DIR or --resume")
        with user_errors(f"{saved} is damaged", "copy it again, or start anew with --out DIR"):
            before = json.loads(saved.read_text())
            if not isinstance(before, dict):
                raise ValueError("no settings")
        before = {k: v for k, v in before.items()
                  if k in vars(args) and k not in ("resume", "dry_run")}
        args = p.parse_args(argv, argparse.Namespace(**before))
    args.out = str(out)
    preset = PRESETS[args.preset]
    for name, value in preset.items():
        if getattr(args, name) is None:
            value = min(value, args.steps or value) if name.endswith("_steps") else value
            setattr(args, name, value)
    for name, parts in ("batch", args.accumulate), ("vae_batch", 1), ("embedder_batch", 1):
        if vars(args)[name] % (data.ranks() * parts):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {vars(args)[name]} cannot be cut into {data.ranks()} x "
                            f"{parts} equal parts (processes x --accumulate): need a divisor of "
                            f"it: pass another {flag}, or --accumulate")
    if args.prediction is None:
        args.prediction = "eps" if "sd15" in (args.preset, args.unet) else "v"
    if args.zero_snr is None:
        args.zero_snr = args.prediction == "v"
    if saved.exists() and not args.dry_run:
        changed = [k for k, v in before.items() if v != vars(args)[k] and k not in FREE_TO_CHANGE]
        if changed:
            raise UserError(f"--{changed[0].replace('_', '-')} {vars(args)[changed[0]]} differs "
                            f"from the run's {before[changed[0]]}: a resumed run keeps its "
                            "settings; leave the flag out, or start anew with --out DIR")
    return args


def main(argv=None):
    data.join_ranks()
    args = parse(argv)
    config = {**vars(args), "torch": str(torch.__version__),
              "torchvision": str(torchvision.__version__)}
    if args.dry_run:
        print(json.dumps({**config, "vae_config": asdict(VAES[args.preset]),
                          "unet_config": asdict(UNETS[args.preset]),
                          "cache_forecast": forecast_cache(args)}, indent=2))
        return 0
    began, device = time.time(), data.pick_device(args.device)
    images = data.open_dataset(args.data, args.size, args.seed, args.count, whole=True)
    print(images.note, *(f"  note: {problem}" for problem in images.problems), sep="\n")
    train, test = data.split_holdout(images, args.holdout, args.seed, args.group_column)
    outliers = data.all_ranks(None if data.rank() else find_outliers(args, images))[0]
    dropped = torch.tensor([number for number, _ in outliers], dtype=torch.int64)
    train, test = (part[~torch.isin(part, dropped)] for part in (train, test))
    if not len(train):
        raise UserError(f"all {len(images)} images are outliers, or held out: some must be left to "
                        "train on: pass --no-drop-outliers")
    rows, labels = torch.cat([train, test]).tolist(), None
    if args.condition in ("prompts", "labels"):
        labels = find_labels(args, images, rows)
    with user_errors():
        model = build_model(args, images, *plan_prompts(args, labels, rows)).to(device)
    run = Run(args.out, config, args.resume)
    run.catch_signals()
    if not data.rank():
        run.write_split(images, train, test, args.group_column)
    if images.unreadable and not data.rank():
        data.write_csv(run.folder / "unreadable.csv", [["file", "why"], *images.unreadable])
    if outliers and not data.rank():
        data.write_csv(run.folder / "outliers.csv", [["file", "reason"]] + [
            [images.files[i], reason] for i, reason in outliers])
        print(f"{len(outliers)} outliers left out, named in {run.folder / 'outliers.csv'}")
    print(f"{len(train)} images to train on, {len(test)} held out; {args.size} px; {device}, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads; run: {run.folder}")
    print(f"U-Net and projection: {sum(p.numel() for p in model.trained.parameters()) / 1e6:.1f} M "
          f"parameters; context {tuple(model.context(None, 1)[0].shape[1:])}; condition "
          f"{args.condition}; {args.tokens} tokens {model.config.token_shape} of embedder "
          f"{args.embedder}")
    if args.tokens.startswith("patch"):
        print("note: patch tokens hold the layout of the source; the model may copy it")
    half, pictures = data.autocast_dtype(device, args.dtype), Pictures(images, train)
    sources = (test if len(test) else train)[:8]
    try:
        if args.embedder == "tiny":
            train_embedder(args, run, model, pictures, half)
        if args.vae == "train":
            train_vae(args, run, model, pictures, half)
        build_cache(run, model, images, train, 4 * args.vae_batch, args.workers)
        if device.type == "cpu" and args.dtype == "auto":
            half = torch.float32  # bf16 brings the U-Net nothing on a CPU (measured)
        train_unet(args, run, model, images, train, sources, labels, half)
    except Stopped as stopped:
        print(f"saved. Go on with: python train.py --resume --out {shlex.quote(args.out)}")
        return 128 + stopped.args[0]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if data.rank():
        return 0
    if args.condition == "dino" and len(train) > 1:
        tokens = torch.from_numpy(np.array(Latents(run.folder / "cache").tokens[:50_000]))
        model.embedding_sampler = EmbeddingSampler.fit(model.cpu().standardise(tokens),
                                                       seed=args.seed)
    write_model(run, model)
    draw_curves(run)
    table = [["file", *images.columns]]
    for i in sources.tolist():
        example = run.folder / "held_out" / f"{data.one_line(Path(images.files[i]).stem)}.png"
        if example.name in {row[0] for row in table}:  # another folder's image of that name
            example = example.with_stem(f"{i}_{example.stem}"[:60])
        data.save_png(example, images[i])
        table.append([example.name, *(column[i] for column in images.columns.values())])
    data.write_csv(run.folder / "held_out" / "labels.csv", table)
    (run.folder / "lock").unlink()
    if device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
    print(f"done in {(time.time() - began) / 60:.1f} minutes: {run.folder}/model.pt\n"
          f"next: python sample.py --checkpoint {shlex.quote(args.out)} " + (
              "--random --count 16" if args.condition == "none" else
              f"--prompt {shlex.quote(model.prompts[0])} --count 16" if model.prompts else
              f"--from-image {shlex.quote(str(example))} --count 4"))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
