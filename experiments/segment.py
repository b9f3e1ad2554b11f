"""How well do lung masks from the U-Net match the true ones, if it never saw a mask?

Two ways to read masks off the U-Net while it denoises the image's own noised latents:
- DiffSeg, the paper's way (Tian et al. 2024, "Diffuse, Attend, and Segment", arXiv 2308.12469):
  maps of self-attention are merged while their symmetric KL divergence is small, in each image.
- K-means on features of the U-Net's decoder (after Baranchuk et al. 2022, arXiv 2112.03126, who
  train a classifier on them). Clusters are those of training images, the same for every image.
In both, labels at two fixed points of the image are lung.

K-means masks are as coarse as the latents. So a border step follows (ours): the distance to the
lung clusters is a soft score, which is enlarged and snapped to edges by a guided filter; the
largest piece on each side stays. Of the thresholds, the one is chosen whose contours lie on the
strongest edges of training images; of the K, the one with the largest product of that strength and
the agreement (mean Dice) of its masks with those of the other K. No true mask is used.

Images are (B, 3, H, W) in [-1, 1], square; `model` is a DinoDiffusion; masks are (B, H, W) bool.
Differences: DiffSeg uses only the finest self-attention, is conditioned by the image's own
embedding and does no K-means refinement; decoder features are centred in each image, which removes
exposure.

Prints Dice on held-out images after each step. Writes segment.json and segment.png (truth green,
ours red) into the run's folder.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from dino import resize
from evaluate import bootstrap_interval, dice
from experiments.common import add_run_flags, open_run
from prompts import kmeans
from support.command import UserError, number, print_table, user_errors
from support.speed import attention_weights
from support.files import write_json
from support.pictures import save_grid

SEEDS = ((-0.4, -0.15), (0.4, -0.15))  # x, y in [-1, 1]: the middle of either lung, in most chests
THRESHOLDS = [x / 100 for x in range(30, 62, 2)]  # of the score; 0.5 is halfway between clusters


# ---- what the U-Net sees -----------------------------------------------------------------------

@torch.no_grad()
def record(model, images, t, seed, modules, function):
    """Denoise the images' latents at step t: function(module, inputs, output) of each call.

    The noise is the same for every image, so an image's mask does not depend on its batch.
    """
    x0 = model.encode(images)
    noise = torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(seed)).to(x0)
    steps = torch.full((len(x0),), t, device=x0.device)
    xt = model.schedule.add_noise(x0, noise.expand_as(x0), steps)
    context, mask = model.null_context(len(x0))
    if model.config.condition == "dino" and model.config.vit:
        context, mask = model.context(model.embed(images))

    results = []
    hooks = [module.register_forward_hook(lambda *call: results.append(function(*call)))
             for module in modules]
    model.unet(xt, steps, context, mask)
    for hook in hooks:
        hook.remove()
    return results


def finest_attention(model, images, t=300, seed=0):
    """Self-attention of the finest resolution, mean of heads and blocks: (B, N, N), N = h*w."""
    def weights(attn, inputs, output):
        x, source = inputs[:2]
        q = attn.split_heads(attn.to_q(x))
        k = attn.split_heads(attn.to_k(source))
        return attention_weights(q, k).mean(1)

    modules = [module for name, module in model.unet.named_modules() if name.endswith(".attn1")]
    maps = record(model, images, t, seed, modules, weights)
    finest = max(x.shape[-1] for x in maps)
    return torch.stack([x for x in maps if x.shape[-1] == finest]).mean(0)


def decoder_features(model, images, t=150, seed=0):
    """Outputs of the decoder's two finest levels, joined: (B, D, h, w).

    Each block's output is scaled to unit norm at every position, so that wide blocks do not
    outweigh the others; the mean over an image's positions is subtracted.
    """
    blocks = [block for level in model.unet.up_blocks[-2:]
              for block in level.attentions or level.resnets]
    outputs = record(model, images, t, seed, blocks, lambda block, inputs, output: output.float())
    size = outputs[-1].shape[2:]
    x = [F.interpolate(F.normalize(x, dim=1), size, mode="bilinear") for x in outputs]
    x = torch.cat(x, dim=1)
    return x - x.mean((2, 3), keepdim=True)


@torch.no_grad()
def patch_tokens(model, images, seed=0):
    """Patch tokens of the embedder, less their mean over the image: (B, D, h, w)."""
    vit = model.embedder.vit
    tokens = vit.features(resize(images, vit.input_side))[2]
    side = math.isqrt(tokens.shape[1])
    x = tokens.transpose(1, 2).unflatten(2, (side, side))         # (B, N, D) -> (B, D, h, w)
    return x - x.mean((2, 3), keepdim=True)


def pixel_features(model, images, seed=0):
    """Grey pixels as features, 8 x 8 at each place: (B, 64, H / 8, W / 8)."""
    x = F.pixel_unshuffle(images.mean(1, keepdim=True), 8)
    return x - x.mean((2, 3), keepdim=True)


FEATURES = {"decoder": decoder_features, "vit": patch_tokens, "pixels": pixel_features}


def under_seeds(labels, k):
    """Which of k labels fill a quarter or more of small squares around the seeds, (k,) bool.

    labels: (B, H, W) int64, of one image or of many that share labels.
    """
    side = labels.shape[-1]
    half = max(1, side // 16)
    squares = []
    for seed_x, seed_y in SEEDS:
        x = round((seed_x + 1) / 2 * side)
        y = round((seed_y + 1) / 2 * side)
        squares.append(labels[:, y - half:y + half, x - half:x + half])
    count = torch.cat(squares).flatten().bincount(minlength=k)
    return count >= count.sum() / 4


# ---- DiffSeg -----------------------------------------------------------------------------------

def symmetric_kl(a, b):
    """Half of KL(a|b) + KL(b|a) for rows of (N, D) and (M, D) distributions -> (N, M), nats."""
    log_a = a.clamp_min(1e-12).log()
    log_b = b.clamp_min(1e-12).log()
    entropies = (a * log_a).sum(1)[:, None] + (b * log_b).sum(1)
    return (entropies - a @ log_b.T - log_a @ b.T).clamp_min(0) / 2


def diffseg(attention, size, threshold, grid=16, rounds=3):
    """Segments of one image by merging its attention maps (N, N): (size, size) int64.

    threshold: the KL below which two maps are merged. grid: anchors a side. Source: section 3.3.
    """
    # Round 1: each anchor becomes the mean of all maps near it.
    side = math.isqrt(len(attention))
    count = min(grid, side)
    ticks = ((torch.arange(count) + 0.5) * side / count).long().to(attention.device)
    anchors = (ticks[:, None] * side + ticks).flatten()
    near = (symmetric_kl(attention[anchors], attention) < threshold).float()
    proposals = near @ attention / near.sum(1, keepdim=True)

    # Later rounds: each proposal that is still free absorbs the free ones near it.
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
    pictures = proposals.view(1, -1, side, side)                  # (P, N) -> (1, P, h, w)
    return F.interpolate(pictures, (size, size), mode="bilinear")[0].argmax(0)


def masks_by_diffseg(model, args, images):
    """Lung masks of the images by DiffSeg."""
    masks = []
    for x in images.split(args.batch):
        for attention in finest_attention(model, x.to(model.shift.device), seed=args.seed):
            labels = diffseg(attention, x.shape[-1], args.threshold).cpu()
            masks.append(under_seeds(labels[None], int(labels.max()) + 1)[labels])
    return torch.stack(masks)


# ---- K-means and the border step ---------------------------------------------------------------

def lung_score(features, centers, lungs, size):
    """Features (B, D, h, w), centers (k, D), lungs (k,) bool -> (B, size, size) in [0, 1]; above
    0.5 a lung cluster is nearer than any other."""
    points = features.permute(0, 2, 3, 1)                         # -> (B, h, w, D)
    distances = torch.cdist(points.flatten(0, 2), centers).square().view(*points.shape[:3], -1)
    lung = distances[..., lungs].amin(-1)
    other = distances[..., ~lungs].amin(-1)
    score = (other / (lung + other))[:, None]
    return F.interpolate(score, (size, size), mode="bicubic")[:, 0].clamp(0, 1)


def guided_filter(score, guide, radius=6, epsilon=1e-3):
    """Smooth score (B, H, W), except across edges of the guide (B, H, W) in [0, 1].

    In each window the score is a linear function of the guide. Source: He et al. 2010, equations 5,
    6 and 8.
    """
    def mean(x):
        return F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)

    covariance = mean(guide * score) - mean(guide) * mean(score)
    variance = mean(guide * guide) - mean(guide).square()
    slope = covariance / (variance + epsilon)
    offset = mean(score) - slope * mean(guide)
    return mean(slope) * guide + mean(offset)


def largest_pieces(masks):
    """The largest connected piece in the left half and in the right one, holes filled."""
    result = np.zeros(masks.shape, bool)
    middle = masks.shape[-1] // 2
    for mask, out in zip(masks.numpy(), result):
        for half in (slice(None, middle), slice(middle, None)):
            pieces, _ = ndimage.label(mask[:, half])
            sizes = np.bincount(pieces.ravel())
            sizes[0] = 0  # the background
            out[:, half] = (pieces == sizes.argmax()) & (sizes.max() > 0)
        out[:] = ndimage.binary_fill_holes(out)
    return torch.from_numpy(result)


def contours(masks):
    """The pixels of masks (B, H, W) bool that touch the outside."""
    return (F.max_pool2d(1 - masks.float(), 3, stride=1, padding=1) > 0) & masks


def edge_strength(masks, grey):
    """Mean gradient of the images (B, H, W) in [0, 1], smoothed 3x3, on the masks' contours."""
    smooth = F.avg_pool2d(grey, 3, stride=1, padding=1, count_include_pad=False)
    gradient = torch.hypot(*torch.gradient(smooth, dim=(1, 2)))
    return gradient[contours(masks)].mean().nan_to_num(0).item()


def dice_each(masks, others):
    """Dice of each pair of masks (B, H, W): (B,)."""
    return np.array([dice(*pair) for pair in zip(masks, others)])


def masks_by_kmeans(model, args, training, images):
    """{K: {step: masks of the images}}, each step after the previous; and {K: {"threshold",
    "strength" of edges, "agreement"}}, on training images.

    A K is missing if none or all of its clusters are lung.
    """
    extract = FEATURES[args.features]
    features, own_features = (
        torch.cat([extract(model, x.to(model.shift.device), seed=args.seed)
                   for x in part.split(args.batch)]).cpu() for part in (training, images))
    grey, own_grey = ((part.mean(1) + 1) / 2 for part in (training, images))

    # The 48 directions in which features vary most: K-means is fast there, and more stable in K.
    points = features.transpose(0, 1).flatten(1)                  # (D, B*h*w), of mean 0
    axes = torch.linalg.eigh(points @ points.T)[1][:, -48:]
    features, own_features = (torch.einsum("bdhw,dc->bchw", x, axes)
                              for x in (features, own_features))

    results = {}
    edges = {}
    training_masks = {}
    for k in args.clusters:
        with user_errors():
            centers, labels = kmeans(features.permute(0, 2, 3, 1).flatten(0, 2), k, args.seed, 3)
        lungs = under_seeds(labels.view(len(features), *features.shape[2:]), k)
        if not lungs.any() or lungs.all():
            continue

        # The threshold, by edges of the training images.
        score = guided_filter(lung_score(features, centers, lungs, grey.shape[-1]), grey)
        masks = {threshold: largest_pieces(score > threshold) for threshold in THRESHOLDS}
        strengths = {threshold: edge_strength(x, grey) for threshold, x in masks.items()}
        threshold = max(strengths, key=strengths.get)
        edges[k] = {"threshold": threshold, "strength": strengths[threshold]}
        training_masks[k] = masks[threshold]

        # The masks of the images.
        score = lung_score(own_features, centers, lungs, grey.shape[-1])
        filtered = guided_filter(score, own_grey)
        results[k] = {
            f"K-means {k}": score > 0.5,
            f"K-means {k} + guided filter": filtered > 0.5,
            f"K-means {k} + largest pieces": largest_pieces(filtered > 0.5),
            f"K-means {k} + threshold {threshold:g}": largest_pieces(filtered > threshold)}

    # How far the masks of a K agree with those of the others.
    for k in results:
        others = [dice_each(training_masks[k], masks).mean()
                  for other, masks in training_masks.items() if other != k]
        edges[k]["agreement"] = float(np.mean(others or [1.0]))
    return results, edges


# ---- the question ------------------------------------------------------------------------------

def known_masks(images, indices):
    """(those of the indices that have a mask, their masks (N, side, side) bool)."""
    given = images.masks.get("masks") is not None
    masks = {i: images.mask(i) for i in indices.tolist() if given}
    masks = {i: mask.bool() for i, mask in masks.items() if mask is not None and mask.any()}
    if len(masks) < 2:
        raise UserError(f"{len(masks)} of {len(indices)} images have a mask that is not empty",
                        "2 are needed, in training and held out", "put them into masks/ beside "
                        "the images")
    return [*masks], torch.cat([*masks.values()])


def outlined(images, masks, colour):
    """Images (B, 3, H, W) with the contours of masks (B, H, W) in a colour."""
    return torch.where(contours(masks)[:, None], torch.tensor(colour)[:, None, None], images)


def add_flags(parser):
    add_run_flags(parser, train_limit=2000)
    add = parser.add_argument
    add("--fit", type=number(int, 1), default=150, help="training images of K-means at most")
    add("--clusters", type=number(int, 2), nargs="+", default=[6, 8, 10], help="K, each tried")
    add("--features", choices=FEATURES, default="decoder", help="of K-means: the U-Net's decoder, "
        "or for comparison the embedder's patch tokens, or plain pixels")
    add("--threshold", type=number(float, 0), default=0.03, help="KL of DiffSeg, nats (paper: 0.9)")
    add("--seed", type=number(int, 0), default=0, help="of noise and K-means")


def main(args):
    run = open_run(args)
    if args.features == "vit" and not run.model.config.vit:
        raise UserError("this model was trained on a file of vectors", "--features vit needs a ViT",
                        "pass another --checkpoint")
    indices, truth = known_masks(run.images, run.test)
    _, training_masks = known_masks(run.images, run.train)
    images = run.images.batch(indices)
    training = run.images.batch(run.train[:args.fit].tolist())
    print(f"Dice of {len(images)} held-out images at {images.shape[-1]} px, "
          f"{len(run.test) - len(images)} without a mask left out; clusters and thresholds of "
          f"{len(training)} training images, no mask used; seed {args.seed}")

    # Masks of each K, of which edges and agreement choose one.
    by_k, edges = masks_by_kmeans(run.model, args, training, images)
    if not by_k:
        raise UserError(f"--clusters {args.clusters}: none or all clusters lie on the lungs",
                        "some of them must", "pass other --clusters")
    best = max(by_k, key=lambda k: edges[k]["strength"] * edges[k]["agreement"])
    ours = [*by_k[best].values()][-1]
    rows = {name: masks for steps in by_k.values() for name, masks in steps.items()}
    rows[f"K by edges and agreement: {best}"] = ours

    # The paper's way, and the floor: one mask for all.
    rows["DiffSeg"] = masks_by_diffseg(run.model, args, images)
    rows["floor, mean of training masks"] = (training_masks.float().mean(0) >= 0.5).expand_as(truth)

    table = {}
    for name, masks in rows.items():
        scores = dice_each(masks, truth)
        table[name] = {"Dice": scores.mean().item(), "95 %": bootstrap_interval(np.mean, scores)}
    print_table(table)

    # The best, the middle and the worst five.
    order = np.argsort(-dice_each(ours, truth))
    middle = max(0, len(order) // 2 - 2)
    pictures = []
    for chosen in (order[:5], order[middle:middle + 5], order[-5:]):
        both = outlined(images[chosen], truth[chosen], (-1.0, 1.0, -1.0))
        pictures += [images[chosen], outlined(both, ours[chosen], (1.0, -1.0, -1.0))]
    save_grid(run.folder / "segment.png", pictures, ["best", "", "middle", "", "worst", ""])
    print(f"wrote {run.folder / 'segment.png'}")
    write_json(run.folder / "segment.json", {
        "images": len(images), "dice": table, "settings": vars(args), "edges": edges})
