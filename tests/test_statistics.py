"""experiments/statistics.py: against closed forms, and other packages' numbers.

reference/metrics.npz holds what scikit-learn says (made by make_metrics.py).
"""
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluate import compare
from experiments.statistics import (label_aucs, mean_auc, ridge_scores, ridge_weights,
                                    subsample_interval)


@pytest.fixture(scope="module")
def stored():
    with np.load(Path(__file__).parent / "reference" / "metrics.npz") as arrays:
        return dict(arrays)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ridge_equals_scikit_learn(stored):
    """Both forms, D < N and D > N, give scikit-learn's coefficients."""
    x, y = torch.from_numpy(stored["real"]), torch.from_numpy(stored["target"])
    assert np.allclose(ridge_weights(x, y, 0.1), stored["ridge_tall"], atol=1e-9)
    assert np.allclose(ridge_weights(x[:10], y[:10], 0.1), stored["ridge_wide"], atol=1e-9)


@pytest.mark.parametrize("dimensions", [20, 400])
def test_probe_finds_a_planted_label(dimensions):
    """A label written along one direction is found; a label of coin tosses is not."""
    x = normal(600, dimensions) * torch.logspace(-3, 3, dimensions)  # scales must not matter
    y = torch.stack([x[:, 3] > 0, normal(600, seed=7) > 0], dim=1).double()
    scores = ridge_scores(x[:300], y[:300], x[300:])
    planted, chance = label_aucs(y[300:].numpy(), scores)
    assert planted > (0.95 if dimensions == 20 else 0.65)  # 300 images fix 400 weights poorly
    assert abs(chance - 0.5) < 0.12  # 3.5 standard errors of an AUC of 150 + 150
    assert mean_auc(y[300:].numpy(), scores) == pytest.approx((planted + chance) / 2)


def test_intervals_have_the_width_of_theory(stored):
    """For means it comes out as +- 1.96 standard errors; six metrics at once work as well."""
    a, b = normal(400, 1), normal(400, 1, seed=1)
    error = (a.var().item() / 400 + b.var().item() / 400) ** 0.5
    low, high = subsample_interval(lambda x, y: (x.mean() - y.mean()).item(), a, b, rounds=400)
    # the 2.5 % quantile of 400 draws is known to about 10 %
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert low < (a.mean() - b.mean()).item() < high
    low, high = subsample_interval(compare, stored["real"], stored["fake"], rounds=10)
    assert low.shape == high.shape == (6,) and (low < high).all()
