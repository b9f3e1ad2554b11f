"""What K-means refuses, with the words for it."""
import torch


def count_distinct(x, enough):
    """Number of distinct rows; stops early once there are `enough` of them."""
    rows = 4 * enough
    while (found := len(torch.unique(x[:rows], dim=0))) < enough and rows < len(x):
        rows *= 4
    return found


def check_points(x, k, n_init):
    """Raise ValueError for a rank other than 2, NaN or infinity, k or n_init < 1, or k above the
    number of distinct rows of x (N, D)."""
    if x.ndim != 2:
        raise ValueError(f"points have shape {tuple(x.shape)}, K-means needs (N, D): "
                         "flatten each point to one row")
    if k < 1 or n_init < 1:
        raise ValueError(f"k is {k} and n_init {n_init}, K-means needs at least 1 cluster and 1 "
                         "start: pass such numbers")
    bad = int((~x.sum(1).isfinite()).sum())
    if bad:
        raise ValueError(f"{bad} of {len(x)} points hold NaN or infinity, K-means needs finite "
                         "numbers: drop those rows or check what made them")
    distinct = count_distinct(x, k)
    if distinct < k:
        raise ValueError(f"{distinct} distinct points for k = {k}, K-means needs at least k: "
                         "lower k (--clusters) or add images")
