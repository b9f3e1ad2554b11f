"""Every metric of this project, small and beside its equation; imports nothing of the project.

    frechet_distance(features_a, features_b)      # (N, D), (M, D) -> float
    prdc(real, fake, k=5)                         # precision, recall, density, coverage
    roc_auc(labels, scores), dice(a, b), cohen_kappa(a, b), cluster_agreement(truth, clusters)

Features are (N, D), torch or NumPy; everything computes in float64 on the CPU. Deliberate choices:
the trace term of the Frechet distance by eigenvalues (always real, faster than `sqrtm`); intervals
of distances by subsampling without replacement (duplicates, which a bootstrap makes, bias them), of
AUC by bootstrap; a fixed-seed random network as a judge that needs no download and favours nobody.
"""
from contextlib import suppress
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import norm, rankdata
from torch import nn
from torchvision.models import inception


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


def merge_moments(a, b):
    """Moments of two sets in one, so that none needs to be kept. Source: Chan et al. 1979."""
    (n, mean, scatter), (m, other, scatter_b) = a, b
    shift, total = other - mean, n + m
    return (total, mean + shift * (m / total),
            scatter + scatter_b + torch.outer(shift, shift) * (n * m / total))


def frechet_of_moments(a, b):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Source: Heusel et al. 2017, equation 6.

    The last trace sums the roots of the eigenvalues of S1 S2; the symmetric A^T S2 A has the same
    ones, where S1 = A A^T.
    """
    (n, mu1, s1), (m, mu2, s2) = a, b
    s1, s2 = s1 / (n - 1), s2 / (m - 1)
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ s2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * cross).item()


def frechet_distance(a, b):
    """The same of two feature sets; with fewer images than dimensions by a smaller matrix.

    S1 = A^T A and S2 = B^T B of centred features A, B: the roots are the singular values of A B^T.
    """
    a, b = as_features(a, b)
    if min(len(a), len(b)) > a.shape[1]:
        return frechet_of_moments(moments(a), moments(b))
    shift = a.mean(dim=0) - b.mean(dim=0)
    a, b = ((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return sum(x.square().sum() for x in (shift, a, b)).sub(2 * cross).item()


def off_diagonal_mean(k):
    """Mean of a square matrix without its diagonal."""
    return ((k.sum() - k.trace()) / (len(k) * (len(k) - 1))).item()


def kernel_distance(a, b, subsets=0, subset_size=1000, seed=0):
    """Unbiased MMD^2, kernel (x.y / D + 1)^3; may be negative. Source: Binkowski et al. 2018.

    Over all rows, or the mean over `subsets` draws without replacement of `subset_size` rows.
    """
    a, b = as_features(a, b)
    if subsets:
        return kernel_subsets(a, b, subsets, subset_size, seed).mean().item()
    aa, bb, ab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    return off_diagonal_mean(aa) + off_diagonal_mean(bb) - 2 * ab.mean().item()


def kernel_subsets(a, b, subsets=50, subset_size=1000, seed=0):
    """kernel_distance of random subsets, drawn without replacement: array (subsets,)."""
    draw, m = torch.Generator().manual_seed(seed), min(subset_size, len(a), len(b))
    return np.array([kernel_distance(*(x[torch.randperm(len(x), generator=draw)[:m]]
                                       for x in (a, b))) for _ in range(subsets)])


def prdc(real, fake, k=5):
    """Precision, recall, density, coverage: dict of floats; balls reach to the k-th neighbour.

    Source: Kynkaanniemi et al. 2019, equation 2; Naeem et al. 2020, equations 5 and 6.
    """
    real, fake = as_features(real, fake, least=k + 1)
    # exact differences: the faster matrix-product form loses small distances
    distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    # the smallest distance is that to the image itself, so its k-th neighbour is number k + 1
    real_radius = distances(real, real).kthvalue(k + 1, dim=1, keepdim=True).values  # (N, 1)
    fake_radius = distances(fake, fake).kthvalue(k + 1, dim=1).values  # (M,)
    across = distances(real, fake)  # (N, M)
    in_real_ball = across < real_radius
    return {"precision": in_real_ball.any(dim=0).double().mean().item(),
            "recall": (across < fake_radius).any(dim=1).double().mean().item(),
            "density": in_real_ball.double().sum(dim=0).mean().item() / k,
            "coverage": in_real_ball.any(dim=1).double().mean().item()}


# ---------------------------------------------------------------- labels, masks, readers, intervals

def roc_auc(labels, scores):
    """P(score of a positive > of a negative), ties a half (Mann & Whitney 1947): (N,) and (N,)."""
    labels, scores = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not (positives and negatives and np.isfinite(scores).all()):
        raise ValueError(f"got {positives} positive and {negatives} negative labels, or NaN: "
                         "an AUC needs both classes and numbers: check label, split and model")
    rank_sum = rankdata(scores)[labels].sum()  # tied scores share their mean rank
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def auc_influence(labels, scores):
    """(AUC, what each image adds to its error (N,)) of labels and scores (N,), (N,).

    Each image's share of won pairs, less the AUC, over sqrt(n (n - 1)) for the n images of its
    class. The sum of squares is DeLong's variance; the influence of a difference or of a mean of
    AUCs over the same images is the difference or mean of influences.
    Source: DeLong et al. 1988; shares by ranks: Sun & Xu 2014.
    """
    auc, scores = roc_auc(labels, scores), np.asarray(scores, dtype=np.float64)
    positive, ranks = np.asarray(labels).astype(bool), rankdata(scores)
    influence = np.empty(len(scores))
    for own in (positive, ~positive):
        n, m = own.sum(), (~own).sum()
        below = (ranks[own] - rankdata(scores[own])) / m  # share of the other class, ties a half
        share = below if own is positive else 1 - below
        influence[own] = (share - auc) / np.sqrt(n * max(n - 1, 1))
    return auc, influence


def delong_test(a, b):
    """Two-sided test that paired AUCs are equal: (difference, standard error, p value).

    a, b: what auc_influence returns, or the mean of several over the same images.
    """
    difference, error = a[0] - b[0], float(np.sqrt(np.square(a[1] - b[1]).sum()))
    p = float(2 * norm.sf(abs(difference) / error)) if error > 0 else float(difference == 0)
    return float(difference), error, p


def holm(p):
    """p values (K,) adjusted for K tests, list: the k-th smallest times K - k + 1, never falling
    and at most 1. Source: Holm 1979."""
    p, order = np.asarray(p, dtype=np.float64), np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted[np.argsort(order)].tolist()


def dice(a, b):
    """2 |A and B| / (|A| + |B|) of two masks of one shape (nonzero is inside); 1 if both empty."""
    a, b = torch.as_tensor(a).bool(), torch.as_tensor(b).bool()
    if a.shape != b.shape:
        raise ValueError(f"masks of shape {tuple(a.shape)} and {tuple(b.shape)}: need the same")
    total = a.sum() + b.sum()
    return 1.0 if total == 0 else (2 * (a & b).sum() / total).item()


def cohen_kappa(a, b):
    """(observed - expected agreement) / (1 - expected) of answers (N,), (N,); Cohen 1960."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"got {a.size} and {b.size} answers: kappa needs the same images, and one "
                         "at least, from both readers")
    observed = np.mean(a == b)
    expected = sum(np.mean(a == c) * np.mean(b == c) for c in np.union1d(a, b))
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def cluster_agreement(truth, clusters):
    """How well clusters (N,) find known classes (N,): a dict, 1 is perfect.

    homogeneity = 1 - H(truth | clusters) / H(truth): is each cluster of one class? completeness:
    the other way round. V-measure: their harmonic mean (Rosenberg & Hirschberg 2007). adjusted
    Rand: pairs that both keep together, 0 by chance (Hubert & Arabie 1985). More clusters than
    classes cannot hurt homogeneity, but hurt the others.
    Source: the formulas of scikit-learn's functions of these names, natural logarithms.
    """
    truth, clusters = (np.unique(values, return_inverse=True)[1] for values in (truth, clusters))
    table = np.zeros((truth.max() + 1, clusters.max() + 1))
    np.add.at(table, (truth, clusters), 1)
    n, rows, columns = len(truth), table.sum(1), table.sum(0)

    def entropy(counts):
        share = counts[counts > 0] / n
        return -(share * np.log(share)).sum()

    def pairs(counts):
        return (counts * (counts - 1) / 2).sum()

    shared = entropy(rows) + entropy(columns) - entropy(table)  # mutual information
    homogeneity, completeness = (shared / entropy(x) if entropy(x) > 0 else 1.0
                                 for x in (rows, columns))
    both = homogeneity + completeness
    chance = pairs(rows) * pairs(columns) / pairs(np.array([n]))
    best = (pairs(rows) + pairs(columns)) / 2
    return {"homogeneity": homogeneity, "completeness": completeness,
            "V-measure": 2 * homogeneity * completeness / both if both else 0.0,
            "adjusted Rand": (pairs(table) - chance) / (best - chance) if best > chance else 1.0}


def ridge_weights(x, y, strength):
    """argmin |x w - y|^2 + strength N |w|^2, solved in the smaller of N and D dimensions."""
    n, d = x.shape
    penalty = strength * n * torch.eye(min(n, d), dtype=x.dtype)
    if d <= n:
        return torch.linalg.solve(x.T @ x + penalty, x.T @ y)
    return x.T @ torch.linalg.solve(x @ x.T + penalty, y)


def linear_probe(train_x, train_y, test_x, test_y, strengths=(0.001, 0.01, 0.1, 1.0, 10.0), seed=0):
    """(AUC of each label, scores (M, L)) of a ridge regression on frozen features.

    train_x (N, D), train_y (N, L) of 0 and 1. Features are standardised with training statistics;
    each label's strength is the one with the least squared error on a fifth of the training set.
    """
    train_x, test_x = as_features(train_x, test_x)
    train_y, test_y = torch.as_tensor(train_y).double(), torch.as_tensor(test_y)
    mean, std = train_x.mean(dim=0), train_x.std(dim=0).clamp(min=1e-8)
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    train_y = train_y - train_y.mean(dim=0)
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed))
    check, fit = order[:len(order) // 5], order[len(order) // 5:]
    errors = [(train_x[check] @ ridge_weights(train_x[fit], train_y[fit], s)
               - train_y[check]).square().mean(dim=0) for s in strengths]
    best = torch.stack(errors).argmin(dim=0).tolist()  # (strengths, L) -> (L,)
    scores = torch.stack([test_x @ ridge_weights(train_x, train_y[:, j], strengths[k])
                          for j, k in enumerate(best)], dim=1)
    return [roc_auc(y, s) for y, s in zip(test_y.T, scores.T)], scores.numpy()


def subsample_interval(metric, a, b, rounds=50, seed=0):
    """95 % interval (low, high) of metric(a, b), which may be an array (Politis & Romano 1994).

    Halves are drawn without replacement. A mean spreads over them as its standard error over the
    whole set (1/m - 1/n = 1/n at m = n/2), so their deviations are laid around the full value.
    """
    generator = torch.Generator().manual_seed(seed)

    def half(x):
        return x[torch.randperm(len(x), generator=generator)[:len(x) // 2]]

    draws = np.stack([metric(half(a), half(b)) for _ in range(rounds)])
    low, high = np.quantile(draws - draws.mean(axis=0), [0.025, 0.975], axis=0)
    full = metric(a, b)
    return full + low, full + high


def bootstrap_interval(metric, *arrays, rounds=1000, seed=0):
    """95 % percentile interval (low, high) of metric(*arrays), rows drawn together (Efron 1979).

    Draws for which the metric is not defined (ValueError: of one class only) are left out.
    """
    rng, n, draws = np.random.default_rng(seed), len(arrays[0]), []
    for rows in (rng.integers(n, size=n) for _ in range(rounds)):
        with suppress(ValueError):
            draws.append(metric(*(x[rows] for x in arrays)))
    return np.quantile(draws, [0.025, 0.975]).tolist()


# ---------------------------------------------------------------- pictures into numbers

class RandomFeatures(nn.Module):
    """Fixed-seed random network: images (B, 3, H, W) in [-1, 1], side >= 32 -> (B, 217) features.

    Texture: the log deviation of each of 104 channels of four convolutions, and apart from it their
    mean, contrast, which would else count 104 times. Layout: 4x4 grids of the picture and the last
    stage. Source: Naeem et al. 2020, section 5: random embeddings for images unlike ImageNet.
    """

    def __init__(self, seed=0):
        super().__init__()
        generator, width = torch.Generator().manual_seed(seed), 3  # a CPU generator: same anywhere
        for i, channels in enumerate((16, 24, 32, 32)):
            w = torch.randn(channels, width, 3, 3, generator=generator)
            w = w - w.mean(dim=(2, 3), keepdim=True)  # sees edges; brightness is for the grid
            w = w * (2 / w.square().sum(dim=(1, 2, 3), keepdim=True)).sqrt()
            self.register_buffer(f"filters{i}", w)
            width = channels

    @torch.no_grad()
    def forward(self, x):
        layout, texture = [F.adaptive_avg_pool2d(x, 4).flatten(1) / 3 ** 0.5], []
        for i, filters in enumerate(self.buffers()):
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), filters, stride=1 if i == 0 else 2)
            texture.append((x.std(dim=(2, 3)) + 0.05).log())  # 0.05: flat images stay finite
            x = F.leaky_relu(x, 0.1)
        layout.append(F.adaptive_avg_pool2d(x[:, :4], 4).flatten(1))  # (B, 4, h, w) -> (B, 64)
        texture = torch.cat(texture, dim=1)
        contrast = texture.mean(dim=1, keepdim=True)
        return torch.cat([0.5 * (texture - contrast), 0.5 * contrast, *layout], dim=1)


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
        a, c, e = (with_pool(block, mean) for block in (
            inception.InceptionA, inception.InceptionC, inception.InceptionE))
        super().__init__(1008, aux_logits=False, init_weights=False, inception_blocks=[
            inception.BasicConv2d, a, inception.InceptionB, c, inception.InceptionD, e, None])
        largest = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
        self.Mixed_7c = with_pool(inception.InceptionE, largest)(2048)

    def forward(self, x):
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        for layer in list(self.children())[:-2]:  # without dropout and classes
            x = layer(x)
        return x.flatten(1)


# ---------------------------------------------------------------- pictures beside pictures

def pixel_rows(images):
    """Grey values (N, P) in [0, 1] of images (N, 3, H, W); sides above 64 are averaged to 64."""
    grey = (images.mean(dim=1) + 1) / 2
    return F.adaptive_avg_pool2d(grey, min(64, grey.shape[-1])).flatten(1)


def correlations(a, b):
    """Pearson correlation over P of each row of (N, P) with each of (M, P): (N, M)."""
    a, b = (F.normalize(x - x.mean(dim=1, keepdim=True), dim=1) for x in (a, b))
    return a @ b.T


def best_correlations(a, b, chunk=1024):
    """Highest correlation of each row of a with any row of b: (N,), b in chunks to spare memory."""
    return torch.stack([correlations(a, part).amax(dim=1) for part in b.split(chunk)]).amax(dim=0)


def first_share(similarity):
    """Share of the rows of (N, N) whose own column is the strict maximum; chance is 1 / N."""
    others = similarity.clone().fill_diagonal_(-torch.inf).amax(dim=1)
    return (similarity.diagonal() > others).double().mean().item()


def psnr(a, b):
    """Peak signal-to-noise ratio, decibels, mean over images (N, 3, H, W) in [-1, 1] (peak 2)."""
    error = (a - b).square().flatten(1).mean(dim=1).clamp(min=1e-12)
    return (10 * (4 / error).log10()).mean().item()


def grey_values(images):
    """Mean grey, contrast, colour (largest minus smallest channel) of images, in [0, 1]: (N, 3)."""
    pixels, colour = pixel_rows(images), images.amax(dim=1) - images.amin(dim=1)
    return torch.stack([pixels.mean(dim=1), pixels.std(dim=1), colour.mean(dim=(1, 2)) / 2], dim=1)


def brightness(grey):
    """Mean grey, its spread between images, means of contrast and colour: grey_values' moments."""
    n, mean, scatter = grey
    return {"mean": mean[0].item(), "between": (scatter[0, 0] / (n - 1)).sqrt().item(),
            "within": mean[1].item(), "colour": mean[2].item()}


METRICS = ("frechet", "kernel", "precision", "recall", "density", "coverage")


def compare(real, fake):
    """All METRICS of two feature sets, array (6,)."""
    return np.array([frechet_distance(real, fake), kernel_distance(real, fake),
                     *prdc(real, fake).values()])
