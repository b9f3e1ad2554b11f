"""Statistics that only the experiments need; the metrics themselves stand in evaluate.py.

    auc_influence(labels, scores)        # what each image adds to the error of an AUC
    delong_test(a, b), holm(p)           # are two AUCs equal? adjusted for many such tests
    linear_probe(train_x, train_y, test_x, test_y)      # AUC of a ridge regression on features
    cluster_agreement(truth, clusters)   # do clusters find known classes?
    merge_moments(a, b)                  # statistics of a stream of images
    kernel_subsets(a, b)                 # kernel distances of random subsets
    subsample_interval(metric, a, b)     # 95 % of a distance between two sets

Everything computes in float64 on the CPU. Deliberate choice: intervals of distances come from
subsampling without replacement, for the duplicates that a bootstrap makes bias them.
"""
import numpy as np
import torch
from scipy.stats import norm, rankdata

from evaluate import as_features, kernel_distance, roc_auc


# ---------------------------------------------------------------- areas under the curve

def mean_auc(labels, scores):
    """Mean over labels of the AUC of labels (N, L) of 0 and 1 and scores (N, L)."""
    return float(np.mean([roc_auc(*column) for column in zip(labels.T, scores.T)]))


def auc_influence(labels, scores):
    """(AUC, what each image adds to its error (N,)) of labels and scores (N,), (N,).

    Each image's share of won pairs, less the AUC, over sqrt(n (n - 1)) for the n images of its
    class. The sum of squares is DeLong's variance; the influence of a difference or of a mean of
    AUCs over the same images is the difference or mean of influences.
    Source: DeLong et al. 1988; shares by ranks: Sun & Xu 2014.
    """
    auc = roc_auc(labels, scores)
    positive = np.asarray(labels).astype(bool)
    scores = np.asarray(scores, dtype=np.float64)
    ranks = rankdata(scores)

    influence = np.empty(len(scores))
    for members in (positive, ~positive):
        n = members.sum()
        m = len(scores) - n
        # Share of the other class that scores less, ties a half.
        below = (ranks[members] - rankdata(scores[members])) / m
        won = below if members is positive else 1 - below
        influence[members] = (won - auc) / np.sqrt(n * max(n - 1, 1))
    return auc, influence


def delong_test(a, b):
    """Two-sided test that paired AUCs are equal: (difference, standard error, p value).

    a, b: what auc_influence returns, or the mean of several over the same images.
    """
    difference = float(a[0] - b[0])
    error = float(np.sqrt(np.square(a[1] - b[1]).sum()))
    if error > 0:
        return difference, error, float(2 * norm.sf(abs(difference) / error))
    return difference, error, 1.0 if difference == 0 else 0.0


def holm(p):
    """p values (K,) adjusted for K tests, list: the k-th smallest times K - k + 1, never falling
    and at most 1. Source: Holm 1979."""
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p)
    factors = np.arange(len(p), 0, -1)
    adjusted = np.maximum.accumulate(p[order] * factors).clip(max=1)
    return adjusted[np.argsort(order)].tolist()


# ---------------------------------------------------------------- what features know

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
    train_y = torch.as_tensor(train_y).double()
    test_y = torch.as_tensor(test_y)

    # Statistics of the training set alone.
    mean = train_x.mean(dim=0)
    std = train_x.std(dim=0).clamp(min=1e-8)
    train_x = (train_x - mean) / std
    test_x = (test_x - mean) / std
    train_y = train_y - train_y.mean(dim=0)

    # The best strength of each label.
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed))
    fifth = len(order) // 5
    check = order[:fifth]
    fit = order[fifth:]
    errors = []
    for strength in strengths:
        predicted = train_x[check] @ ridge_weights(train_x[fit], train_y[fit], strength)
        errors.append((predicted - train_y[check]).square().mean(dim=0))
    best = torch.stack(errors).argmin(dim=0).tolist()  # (strengths, L) -> (L,)

    # Each label anew, from the whole training set.
    scores = [test_x @ ridge_weights(train_x, train_y[:, label], strengths[number])
              for label, number in enumerate(best)]
    aucs = [roc_auc(*column) for column in zip(test_y.T, scores)]
    return aucs, torch.stack(scores, dim=1).numpy()


def _entropy(counts):
    """Entropy, natural logarithm, of a table of counts."""
    share = counts[counts > 0] / counts.sum()
    return -(share * np.log(share)).sum()


def _pairs(counts):
    """Number of pairs within the groups of a table of counts."""
    return (counts * (counts - 1) / 2).sum()


def cluster_agreement(truth, clusters):
    """How well clusters (N,) find known classes (N,): a dict, 1 is perfect.

    homogeneity = 1 - H(truth | clusters) / H(truth): is each cluster of one class? completeness:
    the other way round. V-measure: their harmonic mean (Rosenberg & Hirschberg 2007). adjusted
    Rand: pairs that both keep together, 0 by chance (Hubert & Arabie 1985). More clusters than
    classes cannot hurt homogeneity, but hurt the others.
    Source: the formulas of scikit-learn's functions of these names, natural logarithms.
    """
    # How many images of each class are in each cluster.
    truth = np.unique(truth, return_inverse=True)[1]
    clusters = np.unique(clusters, return_inverse=True)[1]
    table = np.zeros((truth.max() + 1, clusters.max() + 1))
    np.add.at(table, (truth, clusters), 1)
    of_class = table.sum(axis=1)
    of_cluster = table.sum(axis=0)

    # Information that both share.
    mutual = _entropy(of_class) + _entropy(of_cluster) - _entropy(table)
    homogeneity = mutual / _entropy(of_class) if len(of_class) > 1 else 1.0
    completeness = mutual / _entropy(of_cluster) if len(of_cluster) > 1 else 1.0
    both = homogeneity + completeness

    # Pairs that both keep together.
    chance = _pairs(of_class) * _pairs(of_cluster) / _pairs(np.array([len(truth)]))
    best = (_pairs(of_class) + _pairs(of_cluster)) / 2
    rand = (_pairs(table) - chance) / (best - chance) if best > chance else 1.0
    return {"homogeneity": homogeneity, "completeness": completeness,
            "V-measure": 2 * homogeneity * completeness / both if both else 0.0,
            "adjusted Rand": rand}


# ---------------------------------------------------------------- distances of many images

def merge_moments(a, b):
    """Moments of two sets in one, so that none needs to be kept. Source: Chan et al. 1979.

    a, b and the result: (N, mean (D,), scatter (D, D)), as evaluate.moments has them.
    """
    n, mean_a, scatter_a = a
    m, mean_b, scatter_b = b
    shift = mean_b - mean_a
    between = torch.outer(shift, shift) * (n * m / (n + m))
    return n + m, mean_a + shift * (m / (n + m)), scatter_a + scatter_b + between


def kernel_subsets(a, b, subsets=50, subset_size=1000, seed=0):
    """kernel_distance of random subsets, drawn without replacement: array (subsets,).

    Their mean is KID as it is usually published. Source: Binkowski et al. 2018.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(subset_size, len(a), len(b))

    def draw(x):
        return x[torch.randperm(len(x), generator=generator)[:size]]

    return np.array([kernel_distance(draw(a), draw(b)) for _ in range(subsets)])


# ---------------------------------------------------------------- intervals

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
