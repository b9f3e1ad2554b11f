"""Every metric of this project beside its equation, and the networks that judge images.

    Frechet    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))                             (1)
    kernel     mean k(a, a') + mean k(b, b') - 2 mean k(a, b), k = (x.y / D + 1)^3       (2)
    AUC        P(score of a positive > score of a negative), ties a half                 (3)
    Dice       2 |A and B| / (|A| + |B|)                                                 (4)
    kappa      (observed - expected agreement) / (1 - expected)                          (5)

    python evaluate.py REAL SYNTHETIC           # all distances of two folders of images
    frechet_distance(features_a, features_b)    # (N, D), (M, D) -> float
    prdc(real, fake, k=5)                       # precision, recall, density, coverage

Features are (N, D), torch or NumPy; all metrics compute in float64 on the CPU. Images are
(B, 3, H, W) in [-1, 1]. Compare Frechet distances only at the same judge, resizing and counts. For
intervals, runs, Inception and other judges: `python -m experiments fidelity`.

Deliberate choices:
- The trace term of (1) uses singular values, which are always real and faster than `sqrtm`.
- The default judge is a fixed-seed random network. It needs no download, and it is not the network
  whose features conditioned the model under test.
- Every distance has a floor beside it: that of real images to other real images, at equal counts.
"""
import argparse
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import mannwhitneyu
from torch import nn
from torchvision.models import inception

from support.command import Help, UserError, number, print_table, run_script, user_errors
from support.datasets import open_dataset
from support.ranks import pick_device
from support.training_set import choose, split_halves


# ---------------------------------------------------------------- distances between feature sets

def as_features(*sets, least=2):
    """Each set as float64 (N, D) on the CPU."""
    sets = [torch.as_tensor(x).to("cpu", torch.float64) for x in sets]
    for x in sets:
        bad = (~x.isfinite().all(dim=1)).sum().item()
        if bad or len(x) < least or x.shape[1] != sets[0].shape[1]:
            raise ValueError(f"got features {[tuple(x.shape) for x in sets]}, {bad} rows with NaN: "
                             f"need {least} or more finite rows per set, from one extractor: add "
                             "images, or check them and the extractor's weights")
    return sets


def frechet_distance(a, b):
    """Equation (1) of two feature sets. Source: Heusel et al. 2017, equation 6.

    S1 = A^T A and S2 = B^T B, so the trace of the root is the sum of the singular values of A B^T.
    Each of A and B is the centred features, or their triangular QR factor if that is smaller.
    """
    a, b = as_features(a, b)
    shift = a.mean(dim=0) - b.mean(dim=0)
    factors = []
    for x in (a, b):
        x = (x - x.mean(dim=0)) / (len(x) - 1) ** 0.5
        factors.append(torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x)
    a, b = factors
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return (shift.square().sum() + a.square().sum() + b.square().sum() - 2 * cross).item()


def off_diagonal_mean(k):
    """Mean of a square matrix without its diagonal."""
    return ((k.sum() - k.trace()) / (len(k) * (len(k) - 1))).item()


def kernel_distance(a, b):
    """Equation (2) of two feature sets, unbiased: may be negative. KID, Binkowski et al. 2018."""
    a, b = as_features(a, b)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = off_diagonal_mean(kernel(a, a)) + off_diagonal_mean(kernel(b, b))
    return within - 2 * kernel(a, b).mean().item()


def prdc(real, fake, k=5):
    """Precision, recall, density, coverage: dict of floats; balls reach to the k-th neighbour.

    Source: Kynkaanniemi et al. 2019, equation 2; Naeem et al. 2020, equations 5 and 6.
    """
    real, fake = as_features(real, fake, least=k + 1)
    # Exact differences: the faster matrix product loses small distances.
    distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    # The smallest distance is that to the image itself, so its k-th neighbour is number k + 1.
    real_radius = distances(real, real).kthvalue(k + 1, dim=1, keepdim=True).values  # (N, 1)
    fake_radius = distances(fake, fake).kthvalue(k + 1, dim=1).values  # (M,)

    across = distances(real, fake)  # (N, M)
    in_real_ball = across < real_radius
    in_fake_ball = across < fake_radius
    return {"precision": in_real_ball.any(dim=0).double().mean().item(),
            "recall": in_fake_ball.any(dim=1).double().mean().item(),
            "density": in_real_ball.double().sum(dim=0).mean().item() / k,
            "coverage": in_real_ball.any(dim=1).double().mean().item()}


METRICS = ("frechet", "kernel", "precision", "recall", "density", "coverage")


def compare(real, fake):
    """All METRICS of two feature sets, array (6,)."""
    return np.array([frechet_distance(real, fake), kernel_distance(real, fake),
                     *prdc(real, fake).values()])


# ---------------------------------------------------------------- metrics of labels and masks

def roc_auc(labels, scores):
    """Equation (3) of labels (N,) and scores (N,). Source: Mann & Whitney 1947."""
    labels = np.asarray(labels).astype(bool)
    scores = np.asarray(scores, dtype=np.float64)
    positives = scores[labels]
    negatives = scores[~labels]
    if not (len(positives) and len(negatives) and np.isfinite(scores).all()):
        raise ValueError(f"got {len(positives)} positive and {len(negatives)} negative labels, or "
                         "NaN: an AUC needs both classes and numbers: check label, split and model")
    wins = mannwhitneyu(positives, negatives, method="asymptotic").statistic
    return float(wins / (len(positives) * len(negatives)))


def dice(a, b):
    """Equation (4) of two masks of one shape (nonzero is inside); 1 if both are empty."""
    a = torch.as_tensor(a).bool()
    b = torch.as_tensor(b).bool()
    if a.shape != b.shape:
        raise ValueError(f"masks of shape {tuple(a.shape)} and {tuple(b.shape)}: need the same")
    total = a.sum() + b.sum()
    return 1.0 if total == 0 else (2 * (a & b).sum() / total).item()


def cohen_kappa(a, b):
    """Equation (5) of two readers' answers (N,), (N,) to the same images. Source: Cohen 1960."""
    a = np.asarray(a)
    b = np.asarray(b)
    observed = np.mean(a == b)
    expected = sum(np.mean(a == c) * np.mean(b == c) for c in np.union1d(a, b))
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def bootstrap_interval(metric, *arrays, groups=None, rounds=1000, seed=0):
    """95 % interval [low, high] of metric(*arrays): the metric of rows drawn with replacement, or
    of all rows of drawn groups (one entry per row, e.g. its patient).

    Draws for which it is undefined (ValueError or NaN), such as those of one class, are skipped.
    Source: Efron 1979, percentile method.
    """
    rng = np.random.default_rng(seed)
    members = range(len(arrays[0]))  # the rows of each group
    if groups is not None:
        _, group_of = np.unique(groups, return_inverse=True)
        members = [np.flatnonzero(group_of == k) for k in range(group_of.max() + 1)]
    values = []
    for _ in range(rounds):
        rows = rng.integers(0, len(members), len(members))
        if groups is not None:
            rows = np.concatenate([members[k] for k in rows])
        try:
            values.append(metric(*(x[rows] for x in arrays)))
        except ValueError:
            continue
    return np.nanquantile(values, [0.025, 0.975]).tolist()


# ---------------------------------------------------------------- image statistics

def pixel_rows(images):
    """Grey values (N, P) in [0, 1] of images (N, 3, H, W); sides above 64 are averaged to 64."""
    grey = (images.mean(dim=1) + 1) / 2
    return F.adaptive_avg_pool2d(grey, min(64, grey.shape[-1])).flatten(1)


def correlations(a, b):
    """Pearson correlation of each row of (N, P) with each row of (M, P): (N, M)."""
    a = F.normalize(a - a.mean(dim=1, keepdim=True), dim=1)
    b = F.normalize(b - b.mean(dim=1, keepdim=True), dim=1)
    return a @ b.T


def psnr(a, b):
    """Peak signal-to-noise ratio, decibels, mean over images (N, 3, H, W) in [-1, 1] (peak 2)."""
    error = (a - b).square().flatten(1).mean(dim=1).clamp(min=1e-12)
    return (10 * (4 / error).log10()).mean().item()


def brightness(images):
    """Mean grey value of each image, in [0, 1]: (N,)."""
    return (images.mean(dim=(1, 2, 3)) + 1) / 2


def sharpness(images):
    """Variance of the Laplacian of grey values in [0, 1], (N,). Pech-Pacheco et al. 2000."""
    grey = (images.mean(dim=1, keepdim=True) + 1) / 2
    laplacian = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    return F.conv2d(grey, laplacian[None, None]).var(dim=(1, 2, 3))


# ---------------------------------------------------------------- judges

class RandomFeatures(nn.Module):
    """Fixed-seed random network: images (B, 3, H, W) in [-1, 1], side >= 32 -> (B, 217) features.

    Texture: the log standard deviation of each of 104 channels; their mean, the contrast, is one
    separate feature. Layout: 4x4 grids of the image and of the last stage.
    Source: Naeem et al. 2020, section 5: random embeddings for images unlike ImageNet.
    """
    NAME = "random network, seed 0, no resize"

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on all machines
        width = 3
        for i, channels in enumerate((16, 24, 32, 32)):
            w = torch.randn(channels, width, 3, 3, generator=generator)
            w = w - w.mean(dim=(2, 3), keepdim=True)  # filters see edges only
            w = w * (2 / w.square().sum(dim=(1, 2, 3), keepdim=True)).sqrt()
            self.register_buffer(f"filters{i}", w)
            width = channels

    @torch.no_grad()
    def forward(self, x):
        layout = F.adaptive_avg_pool2d(x, 4).flatten(1) / 3 ** 0.5   # (B, 3, H, W) -> (B, 48)

        texture = []
        for i, filters in enumerate(self.buffers()):
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), filters, stride=1 if i == 0 else 2)
            texture.append((x.std(dim=(2, 3)) + 0.05).log())  # 0.05 keeps flat images finite
            x = F.leaky_relu(x, 0.1)
        texture = torch.cat(texture, dim=1)                          # (B, 104)
        contrast = texture.mean(dim=1, keepdim=True)

        stage = F.adaptive_avg_pool2d(x[:, :4], 4).flatten(1)        # (B, 4, h, w) -> (B, 64)
        return torch.cat([0.5 * (texture - contrast), 0.5 * contrast, layout, stage], dim=1)


def with_pool(block, pool):
    """torchvision's Inception block with another pooling before its last branch."""
    class Block(block):
        def forward(self, x):  # torchvision's own last branch is computed and dropped
            return torch.cat([*self._forward(x)[:-1], self.branch_pool(pool(x))], dim=1)
    return Block


class FIDInception(inception.Inception3):
    """The Inception network of FID: images (B, 3, H, W) in [0, 1] -> (B, 2048).

    Its weights expect average pooling that ignores padding, max pooling in the last block, and 1008
    classes. Sources: Szegedy et al. 2016; Heusel et al. 2017; parameter names of pytorch-fid.
    """

    def __init__(self):
        mean = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        largest = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
        blocks = [inception.BasicConv2d,
                  with_pool(inception.InceptionA, mean),
                  inception.InceptionB,
                  with_pool(inception.InceptionC, mean),
                  inception.InceptionD,
                  with_pool(inception.InceptionE, mean),
                  None]
        super().__init__(1008, aux_logits=False, init_weights=False, inception_blocks=blocks)
        self.Mixed_7c = with_pool(inception.InceptionE, largest)(2048)

    def forward(self, x):
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        for layer in list(self.children())[:-2]:  # all but dropout and the classifier
            x = layer(x)
        return x.flatten(1)


# ---------------------------------------------------------------- two sets of images

@torch.no_grad()
def describe(batches, device, *functions):
    """The values (N, D) of each function of images, on the CPU, over an iterator of batches."""
    values = [[function(x).reshape(len(x), -1).cpu() for function in functions]
              for x in (batch.to(device) for batch in batches)]
    return [torch.cat(column) for column in zip(*values)]


def fidelity(parts, name, judge, device, batch=64):
    """Compare two sets and print all distances -> (results for JSON, features of the parts).

    parts: (ImageSet, indices) of real, other real and synthetic images
    judge: maps images (B, 3, H, W) in [-1, 1] to (B, D); name: its name
    """
    # Resizing changes all figures, so all images must have one side.
    sides = {images[i].shape[-1] for images, indices in parts for i in indices.tolist()}
    if len(sides) > 1 or min(sides) < 32:
        raise UserError(f"got images of {sorted(sides)} pixels a side",
                        "one side of 32 pixels or more is needed",
                        f"pass --size {max(32, min(sides))}")
    for images, indices in parts:
        if len(indices) < 6:
            raise UserError(f"got {len(indices)} images in a part of {images.name}",
                            "6 are needed, for five neighbours each", "add images")
    features, grey, sharp = zip(*[
        describe(images.batches(indices, batch), device, judge, brightness, sharpness)
        for images, indices in parts])

    # Distances at equal counts between real images, and to synthetic ones; then of all images.
    half, other, fake = features
    real = torch.cat([half, other])
    count = min(map(len, features))
    with user_errors("images of finite features are needed", "look at the images"):
        columns = {"floor": compare(half[:count], other[:count]),
                   "equal": compare(half[:count], fake[:count]),
                   "all": compare(real, fake)}
    table = {metric: {column: float(values[i]) for column, values in columns.items()}
             for i, metric in enumerate(METRICS)}
    looks = {"brightness difference": (grey[2].mean() - torch.cat(grey[:2]).mean()).item(),
             "sharpness ratio": (sharp[2].mean() / torch.cat(sharp[:2]).mean()).item()}

    side = sides.pop()
    print(f"features: {name}; {side} px; {count} real images against {count} other real ones "
          f"(floor) and {count} synthetic ones (equal); all: {len(real)} against {len(fake)}")
    if count <= real.shape[1]:
        print(f"warning: fewer images than the {real.shape[1]} dimensions, which raises the "
              "Frechet distance: compare it with its floor only")
    print_table(table)
    print_table({"synthetic against real": looks})
    results = {"features": name, "size": side, "real": len(real), "synthetic": len(fake), **table,
               **looks}
    return results, features


def add_flags(parser):
    add = parser.add_argument
    add("real", help="folder of real images")
    add("synthetic", help="folder of synthetic images")
    add("--size", type=number(int, 1), help="resize to this side (default: as they are)")
    add("--seed", type=number(int), default=0, help="of the split of the real images into halves")


def main(argv=None):
    parser = argparse.ArgumentParser(description="How far apart are two sets of images?",
                                     formatter_class=Help)
    add_flags(parser)
    parser.add_argument("--batch", type=number(int, 1), default=64, help="batch size")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False  # results on GPUs equal those on CPUs

    # Split the real images in two by patient: the floor is the distance between the halves.
    real = open_dataset(args.real, args.size)
    synthetic = open_dataset(args.synthetic, args.size)
    first, second = split_halves(real, args.seed)
    parts = [(real, choose(first)), (real, choose(second)),  # files may be sorted by class
             (synthetic, choose(range(len(synthetic))))]
    device = pick_device(args.device)
    fidelity(parts, RandomFeatures.NAME, RandomFeatures().to(device), device, args.batch)


if __name__ == "__main__":
    run_script(main)
