"""How well do zero-shot lung masks out of the U-Net fit the true ones?

A denoising U-Net groups positions that belong together, though it never saw a mask. Two ways to
read that off, each from noised latents of the image itself:
- DiffSeg, the paper's way (Tian et al. 2024, "Diffuse, Attend, and Segment", arXiv 2308.12469):
  maps of self-attention are merged while their symmetric KL divergence is small, in each image.
- K-means on the features of the U-Net's decoder at several steps (after Baranchuk et al. 2022,
  arXiv 2112.03126, who train a classifier on them). Clusters are those of the training images, the
  same for every image, so that one rule names them all.

    labels = diffseg(attention_maps(model, images), size=64)           # (B, 64, 64) int64
    centers, _ = kmeans(points(decoder_features(model, training)), 6)
    labels = nearest_clusters(decoder_features(model, images), centers, size=64)

Images are (B, 3, H, W) in [-1, 1], square; `model` is a DinoDiffusion; masks are (B, H, W) bool.
Neither method knows what a lung is: `under_seeds` tells from where lungs usually lie, `best_labels`
from masks. Deliberate differences: DiffSeg is conditioned by the image's own embedding, without
K-means refinement or anchors finer than the map. Decoder features are centred in each image (ours):
that takes off exposure and view, in which real X-rays differ most.

Dice on held-out images, beside floors: an untrained U-Net, the mean mask, Otsu's threshold, the
whole image. Writes segment.json and segment.png into the run's folder.
"""
import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from evaluate import bootstrap_interval, dice
from experiments.common import add_run_flags, open_run
from prompts import kmeans
from support.command import UserError, number, print_table, user_errors
from support.fast import attention_weights
from support.files import write_json
from support.images import otsu_level
from support.pictures import save_grid
from unet import UNet

SEEDS = ((-0.4, -0.15), (0.4, -0.15))  # x, y in [-1, 1]: the middle of either lung, in most chests


# ---------------------------------------------------------------- what the U-Net sees

@torch.no_grad()
def denoise_once(model, images, t, seed=0):
    """One pass of the U-Net over the images' latents at step t; hooks pick up what they want.

    The noise is the same for every image, so an image's mask does not depend on its batch.
    """
    x0 = model.encode(images)
    noise = torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(seed)).to(x0)
    steps = torch.full((len(x0),), t, device=x0.device)
    xt = model.schedule.add_noise(x0, noise.expand_as(x0), steps)

    condition = model.embed(images) if model.config.condition == "dino" else None
    context, mask = model.context(condition, len(x0))
    model.unet(xt, steps, context, mask)


def attention_maps(model, images, t=300, seed=0):
    """Self-attention of all resolutions: list of (B, heads, N, N), N = h*w of its block."""
    maps = []

    def keep(attn, inputs, output):
        x, source = inputs[:2]
        maps.append(attention_weights(attn.split_heads(attn.to_q(x)),
                                      attn.split_heads(attn.to_k(source))))

    hooks = [module.register_forward_hook(keep) for name, module in model.unet.named_modules()
             if name.endswith(".attn1")]
    try:
        denoise_once(model, images, t, seed)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def decoder_outputs(model, images, t, seed):
    """Outputs of the decoder's blocks at step t, in order: list of (B, D, h, w)."""
    blocks = []
    for level in model.unet.up_blocks:
        blocks += level.attentions or level.resnets
    outputs = []

    def keep(module, inputs, output):
        outputs.append(output.float())

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        denoise_once(model, images, t, seed)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def decoder_features(model, images, timesteps=(50, 150, 300), blocks=6, least_side=8, seed=0):
    """Outputs of the last decoder blocks, joined: (B, D, h, w) at the largest block's side.

    blocks: so many at most, of those with a side of `least_side` or more. Each is scaled to unit
    norm at every position, so that wide blocks do not outweigh the others; the mean over an image's
    positions is taken off, so that clusters are of tissue, not of exposure.
    """
    features = []
    for t in timesteps:
        outputs = decoder_outputs(model, images, t, seed)
        least = min(least_side, outputs[-1].shape[-1])
        large = [x for x in outputs if x.shape[-1] >= least]
        features += [F.normalize(x, dim=1) for x in large[-blocks:]]

    side = max(x.shape[-1] for x in features)
    x = torch.cat([F.interpolate(x, (side, side), mode="bilinear") for x in features], dim=1)
    return x - x.mean((2, 3), keepdim=True)


# ---------------------------------------------------------------- DiffSeg

def join_attention(maps):
    """Maps of all resolutions -> one, (B, N, N) with rows that sum to 1, N of the largest.

    Keys are brought to the largest side bilinearly, queries repeated, weights are proportional to
    sides. Source: Tian et al. 2024, section 3.2.
    """
    largest = max(math.isqrt(x.shape[-1]) for x in maps)
    total = 0
    for x in maps:
        B, _, N, _ = x.shape
        side = math.isqrt(N)

        # Keys, as pictures, to the largest side.
        keys = x.mean(1).reshape(B, N, side, side)                # (B, heads, N, N) -> (B, N, h, w)
        keys = F.interpolate(keys, (largest, largest), mode="bilinear").flatten(2)
        keys = keys / keys.sum(-1, keepdim=True)

        # Queries, in their places, repeated.
        times = largest // side
        grid = keys.reshape(B, side, side, -1)
        grid = grid.repeat_interleave(times, 1).repeat_interleave(times, 2)
        total = total + side * grid.flatten(1, 2)                 # (B, H, W, N) -> (B, N, N)
    return total / total.sum(-1, keepdim=True)


def symmetric_kl(a, b):
    """Half of KL(a|b) + KL(b|a) for rows of (N, D) and (M, D) distributions -> (N, M), nats."""
    if a.device.type == "mps":  # has no float64
        return symmetric_kl(a.cpu(), b.cpu()).float().to(a.device)
    a = a.double().clamp_min(1e-12)
    b = b.double().clamp_min(1e-12)
    entropy_a = (a * a.log()).sum(1)
    entropy_b = (b * b.log()).sum(1)
    cross = a @ b.log().T + a.log() @ b.T
    return (entropy_a[:, None] + entropy_b - cross).clamp_min(0) / 2


def merge(attention, threshold, grid, rounds):
    """One image's attention (N, N) -> proposals (P, N): distributions over positions.

    Round 1: each anchor of a grid x grid lattice becomes the mean of all maps nearer to it than the
    threshold. Later: each proposal not yet taken, that of those near it. Source: section 3.3.
    """
    # Anchors in the middle of their cells; an anchor is near itself.
    side = math.isqrt(len(attention))
    count = min(grid, side)
    ticks = ((torch.arange(count) + 0.5) * side / count).long()
    anchors = (ticks[:, None] * side + ticks).flatten().to(attention.device)
    near = (symmetric_kl(attention[anchors], attention) < threshold).float()
    proposals = near @ attention / near.sum(1, keepdim=True)

    # Greedy merging.
    for _ in range(rounds - 1):
        near = symmetric_kl(proposals, proposals) < threshold
        free = torch.ones(len(proposals), dtype=torch.bool, device=proposals.device)
        merged = []
        for i in range(len(proposals)):
            if free[i]:
                group = near[i] & free
                group[i] = True
                merged.append(proposals[group].mean(0))
                free &= ~group
        proposals = torch.stack(merged)
    return proposals


def diffseg(maps, size, threshold=0.9, grid=16, rounds=3):
    """Segments by merging self-attention maps: (B, size, size) int64, numbered in each image.

    maps: list of (B, heads, N, N) of attention_maps. threshold: symmetric KL in nats below which
    two maps are one; the less sharp the attention, the lower it must be.
    """
    labels = []
    for attention in join_attention(maps):
        proposals = merge(attention, threshold, grid, rounds)
        side = math.isqrt(proposals.shape[1])
        pictures = proposals.reshape(1, -1, side, side)                # (P, N) -> (1, P, h, w)
        labels.append(F.interpolate(pictures, (size, size), mode="bilinear")[0].argmax(0))
    return torch.stack(labels)


# ---------------------------------------------------------------- K-means

def points(features):
    """(B, D, h, w) -> (B*h*w, D), what kmeans takes."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


def principal_axes(features, count):
    """Directions (D, count) in which features (B, D, h, w) vary most: K-means is fast there."""
    x = points(features)
    x = x - x.mean(0)
    return torch.linalg.eigh(x.T @ x)[1][:, -count:]


def nearest_clusters(features, centers, size):
    """Number of the nearest centre, (B, size, size) int64; distances go to `size` bilinearly."""
    B, _, h, w = features.shape
    distances = torch.cdist(points(features), centers).square()
    distances = distances.reshape(B, h, w, -1).permute(0, 3, 1, 2)         # -> (B, k, h, w)
    return F.interpolate(distances, (size, size), mode="bilinear").argmin(1)


# ---------------------------------------------------------------- which label is lung?

def under_seeds(labels, k, least=0.25):
    """Labels (k,) bool that fill a share of `least` or more of small squares around two seeds.

    labels: (B, H, W) int64, of one image or of many that share labels. No mask is looked at.
    """
    side = labels.shape[-1]
    half = max(1, side // 16)
    squares = []
    for seed_x, seed_y in SEEDS:
        x = round((seed_x + 1) / 2 * side)
        y = round((seed_y + 1) / 2 * side)
        squares.append(labels[:, y - half:y + half, x - half:x + half].flatten())
    count = torch.bincount(torch.cat(squares), minlength=k)
    return count >= least * count.sum()


def best_labels(labels, masks, k):
    """The set of labels, (k,) bool, whose union has the highest pooled Dice with the masks.

    Sorted by the share of their pixels in the masks, the best are the first so many. On the masks
    that one is judged by, this is the oracle; on training masks, a rule.
    """
    size = torch.bincount(labels.flatten(), minlength=k).double()
    inside = torch.bincount(labels[masks], minlength=k).double()
    order = (inside / size.clamp_min(1)).argsort(descending=True)
    dices = 2 * inside[order].cumsum(0) / (size[order].cumsum(0) + masks.sum())
    chosen = torch.zeros(k, dtype=torch.bool, device=labels.device)
    chosen[order[:dices.argmax() + 1]] = True
    return chosen & (inside > 0)


# ---------------------------------------------------------------- a floor, and pictures

def otsu(images):
    """Dark pixels (B, H, W) bool of images: 5x5 means up to each image's own otsu_level."""
    grey = F.avg_pool2d(F.pad(images.mean(1, keepdim=True), (2,) * 4, mode="reflect"), 5, stride=1)
    levels = ((grey[:, 0] + 1) * 127.5).round().long().clamp(0, 255)
    return torch.stack([level <= otsu_level(level) for level in levels])


def outlined(images, masks):
    """Images (N, 3, H, W) in [-1, 1] with the edges of masks (N, H, W) bool in red."""
    edge = (F.max_pool2d(1 - masks.float(), 3, stride=1, padding=1) > 0) & masks  # next to outside
    return torch.where(edge[:, None], torch.tensor([1.0, -1.0, -1.0])[:, None, None], images)


# ---------------------------------------------------------------- the question

def known_masks(images, kind, numbers):
    """(those of the numbers that have a mask, their masks (N, side, side) bool)."""
    if kind not in images.masks:
        raise UserError(f"{images.name} has no {kind}", f"it has {[*images.masks] or 'no masks'}",
                        "pass --mask-kind, or data with a folder masks/")
    found = [i for i in numbers.tolist() if images.masks[kind][i] is not None]
    masks = [images.mask(i, kind).bool() for i in found]
    blank = [images.files[i] for i, mask in zip(found, masks) if mask.all() or not mask.any()]
    if blank or len(found) < 2:
        raise UserError(f"{len(found)} of {len(numbers)} images have {kind}, {len(blank)} of them "
                        f"all black or all white {blank[:3]}", "2 that show lungs are needed in "
                        "training and held out", "correct the masks, or pass --mask-kind")
    return torch.tensor(found), torch.cat(masks)


def masks_by_kmeans(model, args, unlabelled, known, known_y, shown):
    """{method and rule: (masks (N, H, W) bool, labels (N, H, W))} of the images `shown`.

    unlabelled: training images for K-means; known, known_y: training images with masks.
    """
    def features_of(images, axes=None):
        parts = []
        for x in images.split(args.batch):
            x = decoder_features(model, x.to(model.shift), args.timesteps, seed=args.seed)
            if axes is not None:
                x = torch.einsum("bdhw,dc->bchw", x, axes.to(x))
            parts.append(x.cpu())
        return torch.cat(parts)

    axes = principal_axes(features_of(unlabelled[:100]), 48)
    features = features_of(unlabelled, axes)
    known_features = features_of(known, axes)
    shown_features = features_of(shown, axes)

    side = shown.shape[-1]
    found = {}
    for k in args.clusters:
        centers, _ = kmeans(points(features), k, args.seed, starts=3)
        labels = nearest_clusters(shown_features, centers, side)
        lungs = under_seeds(nearest_clusters(features, centers, side), k)
        if lungs.any():
            found[f"K-means {k}, seeds"] = (lungs[labels], labels)
        lungs = best_labels(nearest_clusters(known_features, centers, side), known_y, k)
        found[f"K-means {k}, masks"] = (lungs[labels], labels)
    return found


def masks_by_diffseg(model, args, usual, shown):
    """The same of DiffSeg, whose labels differ in each image; usual (H, W) bool: the mean mask."""
    labels = []
    for x in shown.split(args.batch):
        maps = attention_maps(model, x.to(model.shift), seed=args.seed)
        labels.append(diffseg(maps, shown.shape[-1], args.threshold).cpu())
    labels = torch.cat(labels)

    k = int(labels.max()) + 1
    by_seeds = torch.stack([under_seeds(x[None], k)[x] for x in labels])
    by_place = torch.stack([best_labels(x, usual, k)[x] for x in labels])
    return {"DiffSeg, seeds": (by_seeds, labels), "DiffSeg, masks": (by_place, labels)}


def score(masks, truth):
    """A row of the table: mean Dice of masks and truth (N, H, W) bool, with its interval."""
    scores = np.array([dice(*pair) for pair in zip(masks, truth)])
    return {"Dice": scores.mean().item(), "95 %": bootstrap_interval(np.mean, scores)}


def oracle(labels, truth):
    """Mean Dice (N images) of the best labels of each image by its own mask."""
    scores = []
    for x, y in zip(labels, truth):
        best = best_labels(x, y, int(x.max()) + 1)
        scores.append(dice(best[x], y))
    return float(np.mean(scores))


def open_controls(args, run):
    """{title of its rows: model} of the run, of --sweep, --unconditional and an untrained U-Net."""
    paths = {}
    for path in map(Path, args.sweep):
        files = sorted(path.glob("model*.pt")) if path.is_dir() else [path]
        paths |= {f"{file.parent.name}/{file.stem}: ": file for file in files}
    if args.unconditional:
        paths["floor, unconditional, "] = args.unconditional

    models = {"": run.model}
    for title, path in paths.items():
        other = open_run(args, path)
        same_data = other.images.note == run.images.note
        if not same_data or not set(run.test.tolist()) <= set(other.test.tolist()):
            raise UserError(f"{path} was trained on other images, or on some of these", "the same "
                            "data, held out alike, are needed", "train it with that --seed")
        models[title] = other.model

    torch.manual_seed(args.seed)
    untrained = copy.deepcopy(run.model)
    untrained.unet = UNet(run.model.config.unet).to(run.model.shift.device).eval()
    return models | {"floor, untrained U-Net, ": untrained}


def add_flags(parser):
    add_run_flags(parser, train_limit=2000)
    add = parser.add_argument
    add("--mask-kind", default="masks", help="folder of the masks in the data")
    add("--allow-leakage", action="store_true", help="judge training images too, and say so")
    add("--fit", type=number(int, 1), default=150, help="training images at most")
    add("--clusters", type=number(int, 1), nargs="+", default=[6, 256], help="K, each tried")
    add("--timesteps", type=number(int, 0), nargs="+", default=[50, 150, 300],
        help="of the features")
    add("--threshold", type=number(float, 0), default=0.01, help="KL of DiffSeg, nats (paper: 0.9)")
    add("--sweep", nargs="+", default=[], metavar="FILE", help="more model.pt, or folders")
    add("--unconditional", metavar="RUN", help="a control of train.py --condition none")
    add("--seed", type=number(int, 0), default=0, help="of noise, K-means, the untrained U-Net")


def main(args):
    run = open_run(args)
    images = run.images

    # Which images are judged, and which masks may name the clusters.
    judged = torch.cat([run.test, run.train]) if args.allow_leakage else run.test
    numbers, truth = known_masks(images, args.mask_kind, judged)
    teachers, known_y = known_masks(images, args.mask_kind, run.train)
    usual = known_y.float().mean(0) >= 0.5
    shown = images.batch(numbers.tolist())
    known = images.batch(teachers[:args.fit].tolist())
    unlabelled = images.batch(run.train[:args.fit].tolist())
    leaked = len(teachers) if args.allow_leakage else 0
    print(f"Dice with {args.mask_kind} of {len(shown)} images at {shown.shape[-1]} px (without a "
          f"mask, left out: {len(judged) - len(shown)}); clusters of {len(unlabelled)} training "
          f"images, named by {len(known)} training masks; seed {args.seed}; 95 % by bootstrap")
    if args.allow_leakage:
        print(f"LEAKAGE: {leaked} of them were trained on")

    # A row for each model, method and rule; pictures of the run's own model.
    table = {}
    pictures = {}
    for title, model in open_controls(args, run).items():
        with user_errors():
            found = masks_by_kmeans(model, args, unlabelled, known, known_y[:args.fit], shown)
            found |= masks_by_diffseg(model, args, known_y[:args.fit].float().mean(0) >= 0.5, shown)
        for method, (masks, labels) in found.items():
            table[title + method] = {**score(masks, truth), "ORACLE": oracle(labels, truth)}
            pictures.setdefault(method, masks)

    # Floors that no network is needed for.
    table["floor, constant mean of training masks"] = score(usual.expand_as(truth), truth)
    table["floor, Otsu's threshold"] = score(otsu(shown), truth)
    table["floor, whole image"] = score(torch.ones_like(truth), truth)
    print_table(table)
    print("seeds: labels at two fixed points are lung (no row: no label fills a quarter there);\n"
          "masks: training masks name them, not zero-shot; ORACLE: the best labels by the own mask")

    rows = [shown, *(outlined(shown, masks) for masks in (truth, *pictures.values()))]
    path = run.folder / "segment.png"
    save_grid(path, [row[:8] for row in rows], ["image", "true edge", *pictures])
    print(f"wrote {path}")
    write_json(run.folder / "segment.json", {
        "images": len(shown), "training_masks": len(known), "leaked": leaked, "dice": table,
        "settings": vars(args)})
