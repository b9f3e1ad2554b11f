"""Makes metrics.npz: inputs, and their metrics by scikit-learn 1.9.1, prdc 0.2, SciPy 1.17.1.

    pip install scikit-learn==1.9.1 prdc==0.2 scipy==1.17.1 && python make_metrics.py

SciPy's sqrtm and pytorch-fid's formula give the Frechet distance, with more and with fewer images
than dimensions. Scores are rounded to one digit, so that ties occur.
"""
from pathlib import Path

import numpy as np
from prdc import compute_prdc
from scipy.linalg import sqrtm
from sklearn.linear_model import Ridge
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from sklearn.metrics.pairwise import polynomial_kernel

rng = np.random.default_rng(0)
mix = rng.standard_normal((16, 16)) / 4
real = rng.standard_normal((120, 16)) @ mix
fake = 0.9 * rng.standard_normal((90, 16)) @ mix + 0.2


def frechet(a, b):
    root = sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    return (np.square(a.mean(0) - b.mean(0)).sum() + np.cov(a, rowvar=False).trace()
            + np.cov(b, rowvar=False).trace() - 2 * root.trace())


def kernel(a, b):
    aa, bb, ab = (polynomial_kernel(x, y, degree=3, gamma=1 / 16, coef0=1)
                  for x, y in ((a, a), (b, b), (a, b)))
    n, m = len(a), len(b)
    return ((aa.sum() - aa.trace()) / (n * (n - 1)) + (bb.sum() - bb.trace()) / (m * (m - 1))
            - 2 * ab.mean())


scores = rng.standard_normal(200)
labels = (scores + rng.standard_normal(200) > 0.5).astype(np.int64)
scores = scores.round(1)
readers = rng.integers(0, 3, (2, 60))
readers[1, :30] = readers[0, :30]
target = real[:, :2] @ rng.standard_normal((2, 2)) + 0.1 * rng.standard_normal((120, 2))
values = compute_prdc(real, fake, nearest_k=5)
np.savez_compressed(
    Path(__file__).with_name("metrics.npz"), real=real, fake=fake, scores=scores, labels=labels,
    readers=readers, target=target, frechet=frechet(real, fake), kernel=kernel(real, fake),
    frechet_few=frechet(real[:10], fake[:12]), kappa=cohen_kappa_score(*readers),
    auc=roc_auc_score(labels, scores), ridge_tall=Ridge(alpha=12, fit_intercept=False).fit(
        real, target).coef_.T, ridge_wide=Ridge(alpha=1, fit_intercept=False).fit(
        real[:10], target[:10]).coef_.T,
    prdc=np.array([values[k] for k in ("precision", "recall", "density", "coverage")]))
