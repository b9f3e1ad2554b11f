"""Statistics used only by the experiments. The metrics themselves are in evaluate.py.

    scores = ridge_scores(train_x, train_y, test_x)    # (M, L), of a linear model on features
    label_aucs(test_y, scores)                         # AUC of each label
    subsample_interval(metric, a, b)                   # 95 % interval of a distance

All compute in float64 on the CPU. Deliberate choice: intervals of distances come from subsampling
without replacement, because the duplicates of a bootstrap bias distances.
"""
import numpy as np
import torch

from evaluate import as_features, roc_auc

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # of ridge regression


def label_aucs(labels, scores):
    """AUC of each label: labels (N, L) of 0 and 1, scores (N, L)."""
    return [roc_auc(*column) for column in zip(labels.T, scores.T)]


def mean_auc(labels, scores):
    """Mean of label_aucs."""
    return float(np.mean(label_aucs(labels, scores)))


def ridge_weights(x, y, strength):
    """argmin |x w - y|^2 + strength N |w|^2, solved in the smaller of N and D dimensions."""
    n, d = x.shape
    penalty = strength * n * torch.eye(min(n, d), dtype=x.dtype)
    if d <= n:
        return torch.linalg.solve(x.T @ x + penalty, x.T @ y)
    return x.T @ torch.linalg.solve(x @ x.T + penalty, y)


def ridge_scores(train_x, train_y, test_x):
    """Ridge regression on features: predicted labels minus their training means, (M, L), NumPy.

    train_x (N, D), train_y (N, L) of 0 and 1, test_x (M, D). Features are standardised with
    training statistics. Each label gets the strength with the least squared error on a fifth of
    the training set.
    """
    train_x, test_x = as_features(train_x, test_x)
    mean = train_x.mean(dim=0)
    std = train_x.std(dim=0).clamp(min=1e-8)
    train_x = (train_x - mean) / std
    test_x = (test_x - mean) / std
    train_y = torch.as_tensor(train_y).double()
    train_y = train_y - train_y.mean(dim=0)

    # Choose the best strength for each label.
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0))
    fifth = len(order) // 5
    validation = order[:fifth]
    fit = order[fifth:]
    errors = []
    for strength in STRENGTHS:
        predicted = train_x[validation] @ ridge_weights(train_x[fit], train_y[fit], strength)
        errors.append((predicted - train_y[validation]).square().mean(dim=0))
    best = torch.stack(errors).argmin(dim=0).tolist()  # (strengths, L) -> (L,)

    # Fit each label again, on the whole training set.
    scores = [test_x @ ridge_weights(train_x, train_y[:, label], STRENGTHS[index])
              for label, index in enumerate(best)]
    return torch.stack(scores, dim=1).numpy()


def subsample_interval(metric, a, b, rounds=50, seed=0):
    """95 % interval (low, high) of metric(a, b), which may be an array (Politis & Romano 1994).

    Draws halves without replacement. The variance of a mean over halves equals that of the mean of
    the whole set (1/m - 1/n = 1/n at m = n/2), so the deviations of the halves, centered on the
    value of the whole set, give the interval.
    """
    generator = torch.Generator().manual_seed(seed)

    def half(x):
        return x[torch.randperm(len(x), generator=generator)[:len(x) // 2]]

    draws = np.stack([metric(half(a), half(b)) for _ in range(rounds)])
    low, high = np.quantile(draws - draws.mean(axis=0), [0.025, 0.975], axis=0)
    full = metric(a, b)
    return full + low, full + high
