"""Every metric of this project beside its equation, and the networks that judge images.

    Frechet    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))                             (1)
    kernel     mean k(a, a') + mean k(b, b') - 2 mean k(a, b), k = (x.y / D + 1)^3       (2)
    AUC        P(score of a positive > score of a negative), ties a half                 (3)
    Dice       2 |A and B| / (|A| + |B|)                                                 (4)
    kappa      (observed - expected agreement) / (1 - expected)                          (5)

    python evaluate.py REAL SYNTHETIC           # all distances of two folders of images
    frechet_distance(features_a, features_b)    # (N, D), (M, D) -> float
    prdc(real, fake, k=5)                       # precision, recall, density, coverage

Features are (N, D), torch or NumPy; everything computes in float64 on the CPU. Images are
(B, 3, H, W) in [-1, 1]. Deliberate choices: the trace term of (1) by eigenvalues (always real,
faster than `sqrtm`); a fixed-seed random network as the default judge, which needs no download and
favours nobody: never the features that conditioned the model under test; beside every figure the
floor, which is that of real images against other real ones at equal counts. Frechet distances
compare only with those of the same judge, resize rule and counts. With intervals, for runs, and by
Inception or another judge: `python -m experiments fidelity`.
"""
import argparse
from contextlib import suppress
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import nn
from torchvision.models import inception

from support.command import (Help, UserError, batch_int, pick_device, positive_int, print_table,
                             run_script, seed_int, user_errors)
from support.datasets import open_dataset
from support.splits import split_holdout


# ---------------------------------------------------------------- distances between feature sets

def as_features(*sets, least=2):
    """Each set as float64 (N, D) on the CPU; ValueError for NaN, infinity, few rows, unlike D."""
    sets = [torch.as_tensor(x).detach().to("cpu", torch.float64) for x in sets]
    for x in sets:
        bad = (~x.isfinite().all(dim=1)).sum().item()
        if bad or len(x) < least or x.shape[1] != sets[0].shape[1]:
            raise ValueError(f"got features {[tuple(x.shape) for x in sets]}, {bad} rows with NaN: "
                             f"need {least} or more finite rows a set, of one extractor: add "
                             "images, or look at them and at the extractor's weights")
    return sets


def moments(x):
    """(N, mean (D,), scatter (D, D) = sum of (x - mean)(x - mean)^T) of features (N, D)."""
    x, = as_features(x, least=1)
    mean = x.mean(dim=0)
    return len(x), mean, (x - mean).T @ (x - mean)


def frechet_of_moments(a, b):
    """Equation (1) of two sets' moments. Source: Heusel et al. 2017, equation 6.

    The last trace sums the roots of the eigenvalues of S1 S2; the symmetric A^T S2 A has the same
    ones, where S1 = A A^T.
    """
    n, mu1, scatter1 = a
    m, mu2, scatter2 = b
    s1 = scatter1 / (n - 1)
    s2 = scatter2 / (m - 1)
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp(min=0).sqrt()  # A
    cross = torch.linalg.eigvalsh(root.T @ s2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * cross).item()


def frechet_distance(a, b):
    """Equation (1) of two feature sets; with fewer images than dimensions by a smaller matrix.

    S1 = A^T A and S2 = B^T B of centred features A, B: the roots are the singular values of A B^T.
    """
    a, b = as_features(a, b)
    if min(len(a), len(b)) > a.shape[1]:
        return frechet_of_moments(moments(a), moments(b))
    shift = a.mean(dim=0) - b.mean(dim=0)
    a = (a - a.mean(dim=0)) / (len(a) - 1) ** 0.5
    b = (b - b.mean(dim=0)) / (len(b) - 1) ** 0.5
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return (shift.square().sum() + a.square().sum() + b.square().sum() - 2 * cross).item()


def off_diagonal_mean(k):
    """Mean of a square matrix without its diagonal."""
    return ((k.sum() - k.trace()) / (len(k) * (len(k) - 1))).item()


def kernel_distance(a, b):
    """Equation (2) of two feature sets, unbiased, so it may be negative: KID.

    Source: Binkowski et al. 2018.
    """
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


# ---------------------------------------------------------------- labels, masks, readers, intervals

def roc_auc(labels, scores):
    """Equation (3) of labels (N,) and scores (N,). Source: Mann & Whitney 1947."""
    labels = np.asarray(labels).astype(bool)
    scores = np.asarray(scores, dtype=np.float64)
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not (positives and negatives and np.isfinite(scores).all()):
        raise ValueError(f"got {positives} positive and {negatives} negative labels, or NaN: "
                         "an AUC needs both classes and numbers: check label, split and model")
    rank_sum = rankdata(scores)[labels].sum()  # tied scores share their mean rank
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def dice(a, b):
    """Equation (4) of two masks of one shape (nonzero is inside); 1 if both are empty."""
    a = torch.as_tensor(a).bool()
    b = torch.as_tensor(b).bool()
    if a.shape != b.shape:
        raise ValueError(f"masks of shape {tuple(a.shape)} and {tuple(b.shape)}: need the same")
    total = a.sum() + b.sum()
    return 1.0 if total == 0 else (2 * (a & b).sum() / total).item()


def cohen_kappa(a, b):
    """Equation (5) of two readers' answers (N,), (N,). Source: Cohen 1960."""
    a = np.asarray(a)
    b = np.asarray(b)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"got {a.size} and {b.size} answers: kappa needs the same images, and one "
                         "at least, from both readers")
    observed = np.mean(a == b)
    expected = sum(np.mean(a == c) * np.mean(b == c) for c in np.union1d(a, b))
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def bootstrap_interval(metric, *arrays, rounds=1000, seed=0):
    """95 % percentile interval (low, high) of metric(*arrays), rows drawn together (Efron 1979).

    Draws for which the metric is not defined (ValueError: of one class only) are left out.
    """
    rng = np.random.default_rng(seed)
    n = len(arrays[0])
    draws = []
    for _ in range(rounds):
        rows = rng.integers(n, size=n)
        with suppress(ValueError):
            draws.append(metric(*(x[rows] for x in arrays)))
    return np.quantile(draws, [0.025, 0.975]).tolist()


# ---------------------------------------------------------------- pictures into numbers

def pixel_rows(images):
    """Grey values (N, P) in [0, 1] of images (N, 3, H, W); sides above 64 are averaged to 64."""
    grey = (images.mean(dim=1) + 1) / 2
    return F.adaptive_avg_pool2d(grey, min(64, grey.shape[-1])).flatten(1)


def correlations(a, b):
    """Pearson correlation over P of each row of (N, P) with each of (M, P): (N, M)."""
    a = F.normalize(a - a.mean(dim=1, keepdim=True), dim=1)
    b = F.normalize(b - b.mean(dim=1, keepdim=True), dim=1)
    return a @ b.T


def psnr(a, b):
    """Peak signal-to-noise ratio, decibels, mean over images (N, 3, H, W) in [-1, 1] (peak 2)."""
    error = (a - b).square().flatten(1).mean(dim=1).clamp(min=1e-12)
    return (10 * (4 / error).log10()).mean().item()


def grey_values(images):
    """Mean grey, contrast, colour (largest minus smallest channel) of images, in [0, 1]: (N, 3)."""
    pixels = pixel_rows(images)
    colour = (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2)) / 2
    return torch.stack([pixels.mean(dim=1), pixels.std(dim=1), colour], dim=1)


def sharpness(images):
    """Variance of the Laplacian of the grey values, in [0, 1], of images (N, 3, H, W): (N,).

    Source: Pech-Pacheco et al. 2000, section 3.
    """
    grey = (images.mean(dim=1, keepdim=True) + 1) / 2
    laplacian = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    return F.conv2d(grey, laplacian[None, None]).var(dim=(1, 2, 3))


def brightness(grey):
    """Mean grey, its spread between images, means of contrast and colour: grey_values' moments."""
    n, mean, scatter = grey
    return {"mean": mean[0].item(), "between": (scatter[0, 0] / (n - 1)).sqrt().item(),
            "within": mean[1].item(), "colour": mean[2].item()}


# ---------------------------------------------------------------- judges

class RandomFeatures(nn.Module):
    """Fixed-seed random network: images (B, 3, H, W) in [-1, 1], side >= 32 -> (B, 217) features.

    Texture: the log deviation of each of 104 channels of four convolutions, and apart from it their
    mean, contrast, which would else count 104 times. Layout: 4x4 grids of the picture and the last
    stage. Source: Naeem et al. 2020, section 5: random embeddings for images unlike ImageNet.
    """

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same anywhere
        width = 3
        for i, channels in enumerate((16, 24, 32, 32)):
            w = torch.randn(channels, width, 3, 3, generator=generator)
            w = w - w.mean(dim=(2, 3), keepdim=True)  # sees edges; brightness is for the grid
            w = w * (2 / w.square().sum(dim=(1, 2, 3), keepdim=True)).sqrt()
            self.register_buffer(f"filters{i}", w)
            width = channels

    @torch.no_grad()
    def forward(self, x):
        picture = F.adaptive_avg_pool2d(x, 4).flatten(1) / 3 ** 0.5  # (B, 3, H, W) -> (B, 48)

        texture = []
        for i, filters in enumerate(self.buffers()):
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), filters, stride=1 if i == 0 else 2)
            texture.append((x.std(dim=(2, 3)) + 0.05).log())  # 0.05: flat images stay finite
            x = F.leaky_relu(x, 0.1)
        texture = torch.cat(texture, dim=1)                          # (B, 104)
        contrast = texture.mean(dim=1, keepdim=True)

        stage = F.adaptive_avg_pool2d(x[:, :4], 4).flatten(1)        # (B, 4, h, w) -> (B, 64)
        return torch.cat([0.5 * (texture - contrast), 0.5 * contrast, picture, stage], dim=1)


def with_pool(block, pool):
    """torchvision's Inception block, with another pool before its last branch."""
    class Block(block):
        def forward(self, x):  # torchvision's own last branch goes unused: a few percent of work
            return torch.cat([*self._forward(x)[:-1], self.branch_pool(pool(x))], dim=1)
    return Block


class FIDInception(inception.Inception3):
    """The Inception network of FID: images (B, 3, H, W) in [0, 1] -> (B, 2048); names of its file.

    Its weights, unlike torchvision's, want average pools that leave the padding out, a max pool in
    the last block and 1008 classes; 299 px by bilinear without antialias, as pytorch-fid. Sources:
    Szegedy et al. 2016; Heusel et al. 2017.
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
        for layer in list(self.children())[:-2]:  # without dropout and classes
            x = layer(x)
        return x.flatten(1)


# ---------------------------------------------------------------- two sets of images

@torch.no_grad()
def describe(batches, extractor, device="cpu"):
    """Features (N, D) and pixel rows (N, P) on the CPU of an iterator of image batches."""
    features = []
    pixels = []
    for x in batches:
        features.append(extractor(x.to(device)).flatten(1).cpu())
        pixels.append(pixel_rows(x).cpu())
    return torch.cat(features), torch.cat(pixels)


def only_side(sides):
    """The only number of pixels in a set; UserError for several, and for less than 32."""
    if len(sides) > 1 or min(sides) < 32:
        raise UserError(f"got images of {sorted(sides)} pixels a side", "one side is needed, 32 or "
                        "more, for resizing changes figures", f"pass --size {max(32, min(sides))}")
    return min(sides)


def refuse_unlike_modes(real, synthetic):
    """UserError if one of two `brightness` is that of grey images, the other of coloured ones."""
    colours = real["colour"], synthetic["colour"]
    if min(colours) < 0.01 and max(colours) > 0.05:  # the tint of a VAE stays far below
        raise UserError("one set is grey, the other in colour", "one mode is needed", "convert "
                        "one of them")


def warn_of_counts(n, m, dimensions):
    """Say what the counts of real and synthetic images do to the distances."""
    if min(n, m) <= dimensions:
        print(f"warning: fewer images than the {dimensions} dimensions: the covariance has no full "
              "rank, which raises the Frechet distance; read it beside its floor only")
    if n != m:
        print(f"warning: {n} against {m} images, and counts move distances: compare equal ones")


def main(argv=None):
    parser = argparse.ArgumentParser(description="How far are two sets of images apart?",
                                     formatter_class=Help)
    add = parser.add_argument
    add("real", help="folder of real images")
    add("synthetic", help="folder of others, e.g. of a run's samples")
    add("--size", type=positive_int, help="resize to this side (default: as they are)")
    add("--seed", type=seed_int, default=0, help="of the halves of the real images")
    add("--batch", type=batch_int, default=64, help="images at once")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False  # figures of a GPU equal those of a CPU

    # Real images in two halves, patients apart: the floor is one half against the other.
    real = open_dataset(args.real, args.size)
    synthetic = open_dataset(args.synthetic, args.size)
    first, second = split_holdout(real, 0.5, args.seed)
    parts = [(real, first), (real, second), (synthetic, torch.arange(len(synthetic)))]
    side = only_side({images[i].shape[-1] for images, numbers in parts for i in numbers})

    # Of each image three grey values, and features.
    device = pick_device(args.device)
    judge = RandomFeatures().to(device)

    def look(x):
        return torch.cat([grey_values(x), judge(x)], dim=1)

    sets = []
    for images, numbers in parts:
        batches = (images.batch(rows.tolist()) for rows in numbers.split(args.batch))
        sets.append(describe(batches, look, device)[0])
    half, other, fake = sets
    both = torch.cat([half, other])

    # Every distance at equal counts first, and then of all images.
    with user_errors():
        grey = {"real": brightness(moments(both[:, :3])),
                "synthetic": brightness(moments(fake[:, :3]))}
        refuse_unlike_modes(**grey)
        count = min(len(half), len(other), len(fake))
        columns = {"floor": compare(half[:count, 3:], other[:count, 3:]),
                   "equal": compare(half[:count, 3:], fake[:count, 3:]),
                   "all": compare(both[:, 3:], fake[:, 3:])}
    print(f"features: random network, seed 0, no resize; {side} px; {count} real images against "
          f"as many real (floor) and synthetic (equal) ones; all: {len(both)} against {len(fake)}")
    warn_of_counts(len(both), len(fake), both.shape[1] - 3)
    print_table({metric: {name: column[i] for name, column in columns.items()}
                 for i, metric in enumerate(METRICS)})
    print_table({f"brightness, {name}": figures for name, figures in grey.items()})


if __name__ == "__main__":
    run_script(main)
