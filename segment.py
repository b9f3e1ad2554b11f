"""Zero-shot lung masks out of a diffusion model: DiffSeg on attention, K-means on features.

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
"""

import math

import torch
import torch.nn.functional as F

from unet import keep_attention

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
    own = None if model.prompts or model.config.condition == "none" else model.embed(images)
    context, mask = model.context(own, len(x0))
    xt = model.schedule.add_noise(x0, noise.expand_as(x0), steps)
    model.unet(xt, steps, context, mask)


def attention_maps(model, images, t=300, seed=0):
    """Self-attention of all resolutions: list of (B, heads, N, N), N = h*w of its block."""
    with keep_attention(model.unet, only="attn1") as maps:
        denoise_once(model, images, t, seed)
    return list(maps.values())


def decoder_features(model, images, timesteps=(50, 150, 300), blocks=6, least_side=8, seed=0):
    """Outputs of the last decoder blocks, joined: (B, D, h, w) at the largest block's side.

    blocks: so many at most, of those with a side of `least_side` or more. Each is scaled to unit
    norm at every position, so that wide blocks do not outweigh the others; the mean over an image's
    positions is taken off, so that clusters are of tissue, not of exposure.
    """
    ends = [level.attentions[i] if level.attentions else level.resnets[i]
            for level in model.unet.up_blocks for i in range(len(level.resnets))]
    features = []
    for t in timesteps:
        kept = []
        hooks = [end.register_forward_hook(lambda module, given, x: kept.append(x)) for end in ends]
        try:
            denoise_once(model, images, t, seed)
        finally:
            for hook in hooks:
                hook.remove()
        features += [F.normalize(x.float(), dim=1) for x in kept
                     if x.shape[-1] >= min(least_side, kept[-1].shape[-1])][-blocks:]
    side = max(x.shape[-1] for x in features)
    x = torch.cat([F.interpolate(x, (side, side), mode="bilinear") for x in features], dim=1)
    return x - x.mean((2, 3), keepdim=True)


# ---------------------------------------------------------------- DiffSeg

def join_attention(maps):
    """Maps of all resolutions -> one, (B, N, N) with rows that sum to 1, N of the largest.

    Keys are brought to the largest side bilinearly, queries repeated, weights are proportional to
    sides. Source: Tian et al. 2024, section 3.2.
    """
    side = max(math.isqrt(x.shape[-1]) for x in maps)
    total = 0
    for x in maps:
        B, _, N, _ = x.shape
        own = math.isqrt(N)
        keys = x.mean(1).reshape(B, N, own, own)                  # (B, heads, N, N) -> (B, N, h, w)
        keys = F.interpolate(keys, (side, side), mode="bilinear").flatten(2)
        keys = keys / keys.sum(-1, keepdim=True)
        grid = keys.reshape(B, own, own, -1)                             # queries in their places
        grid = grid.repeat_interleave(side // own, 1).repeat_interleave(side // own, 2)
        total = total + own * grid.flatten(1, 2)                     # (B, H, W, N) -> (B, N, N)
    return total / total.sum(-1, keepdim=True)


def symmetric_kl(a, b):
    """Half of KL(a|b) + KL(b|a) for rows of (N, D) and (M, D) distributions -> (N, M), nats."""
    a, b = a.double().clamp_min(1e-12), b.double().clamp_min(1e-12)
    own = [(x * x.log()).sum(1) for x in (a, b)]
    return (own[0][:, None] + own[1] - a @ b.log().T - a.log() @ b.T).clamp_min(0) / 2


def merge(attention, threshold, grid, rounds):
    """One image's attention (N, N) -> proposals (P, N): distributions over positions.

    Round 1: each anchor of a grid x grid lattice becomes the mean of all maps nearer to it than the
    threshold. Later: each proposal not yet taken, that of those near it. Source: section 3.3.
    """
    side = math.isqrt(len(attention))
    ticks = ((torch.arange(min(grid, side)) + 0.5) * side / min(grid, side)).long()
    anchors = (ticks[:, None] * side + ticks).flatten().to(attention.device)
    near = (symmetric_kl(attention[anchors], attention) < threshold).float()
    proposals = near @ attention / near.sum(1, keepdim=True)          # an anchor is near itself
    for _ in range(rounds - 1):
        near, merged = symmetric_kl(proposals, proposals) < threshold, []
        free = torch.ones(len(proposals), dtype=torch.bool, device=proposals.device)
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
    return torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)))[1][:, -count:]


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
    squares = [labels[:, y - half:y + half, x - half:x + half].flatten()
               for x, y in ((round((s + 1) / 2 * side) for s in seed) for seed in SEEDS)]
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

def otsu_level(values):
    """The level of 0 to 255 (int) that parts whole numbers, array or tensor, with the largest
    variance between both sides (Otsu 1979)."""
    values = torch.as_tensor(values).flatten()
    p = torch.bincount(values, minlength=256).double() / values.numel()
    below, mean = p.cumsum(0), (p * torch.arange(256, device=p.device)).cumsum(0)
    between = (mean[-1] * below - mean).square() / (below * (1 - below)).clamp_min(1e-9)
    return int(between.argmax())


def otsu(images):
    """Dark pixels (B, H, W) bool of images: 5x5 means up to each image's own otsu_level."""
    grey = F.avg_pool2d(F.pad(images.mean(1, keepdim=True), (2,) * 4, mode="reflect"), 5, stride=1)
    levels = ((grey[:, 0] + 1) * 127.5).round().long().clamp(0, 255)
    return torch.stack([level <= otsu_level(level) for level in levels])


def outlined(images, masks):
    """Images (N, 3, H, W) in [-1, 1] with the edges of masks (N, H, W) bool in red."""
    edge = (F.max_pool2d(1 - masks.float(), 3, stride=1, padding=1) > 0) & masks  # next to outside
    return torch.where(edge[:, None], torch.tensor([1.0, -1.0, -1.0])[:, None, None], images)
