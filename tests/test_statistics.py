"""experiments/statistics.py: against closed forms, bootstraps and other packages' numbers.

reference/metrics.npz holds what scikit-learn says (made by make_metrics.py).
"""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluate import compare, frechet_of_moments, kernel_distance, moments
from experiments.statistics import (auc_influence, cluster_agreement, delong_test, holm,
                                    kernel_subsets, linear_probe, mean_auc, merge_moments,
                                    ridge_weights, subsample_interval)


@pytest.fixture(scope="module")
def stored():
    with np.load(Path(__file__).parent / "reference" / "metrics.npz") as arrays:
        return dict(arrays)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_moments_in_a_stream(stored):
    """Merged batches, one of a single row, have the moments of the whole, so the same distance."""
    sets = [torch.from_numpy(stored[name]) for name in ("real", "fake")]
    merged = []
    for x in sets:
        total = moments(x[:1])
        for part in x[1:].split(31):
            total = merge_moments(total, moments(part))
        for got, want in zip(total, (len(x), x.mean(dim=0), x.T.cov() * (len(x) - 1))):
            assert torch.allclose(torch.as_tensor(got), torch.as_tensor(want), atol=1e-10)
        merged.append(total)
    assert frechet_of_moments(*merged) == pytest.approx(float(stored["frechet"]), rel=1e-9)


def test_kernel_distances_of_subsets(stored):
    """Random subsets scatter around the value of the whole sets: unbiased."""
    real, fake = map(torch.from_numpy, (stored["real"], stored["fake"]))
    value = kernel_distance(real, fake)
    subsets = kernel_subsets(real, fake, 40, subset_size=30, seed=1)
    assert subsets.shape == (40,) and subsets.std() > 0
    # unbiased, so subsets have the whole sets' value but for four standard errors
    assert abs(subsets.mean() - value) < 4 * subsets.std() / math.sqrt(40)


def delong_by_hand(labels, a, b):
    """Variance of AUC(a) - AUC(b) by the sums over all pairs of DeLong et al. 1988."""
    shares = []
    for scores in (a, b):
        x, y = scores[labels == 1], scores[labels == 0]
        won = (x[:, None] > y) + 0.5 * (x[:, None] == y)
        shares.append((won.mean(axis=1), won.mean(axis=0)))
    of_positives, of_negatives = (np.cov(*pair) for pair in zip(*shares))
    sides = np.array([1, -1])
    return sides @ (of_positives / (labels == 1).sum()
                    + of_negatives / (labels == 0).sum()) @ sides


def test_delong_equals_its_formula_and_the_bootstrap():
    """Ranks give what all pairs give, ties included; the error is near that of a bootstrap; equal
    scores differ by nothing, and the p value is the normal one."""
    rng = np.random.default_rng(0)
    labels = (np.arange(150) % 3 == 0).astype(int)
    a, b = ((labels + s * rng.standard_normal(150)).round(1) for s in (1.0, 1.5))
    difference, error, p = delong_test(auc_influence(labels, a), auc_influence(labels, b))
    assert error ** 2 == pytest.approx(delong_by_hand(labels, a, b), rel=1e-9)
    draws = []
    for rows in (rng.integers(150, size=150) for _ in range(1000)):
        x, y = (auc_influence(labels[rows], scores[rows])[0] for scores in (a, b))
        draws.append(x - y)
    # a deviation of 1000 draws is known to 2 %; the bootstrap's own bias is of order 1 / 50
    assert np.std(draws) == pytest.approx(error, rel=0.1)
    # 1.96 errors are 5 %
    a, b = (0.7 + 0.0196, np.full(4, 0.01)), (0.7, np.full(4, 0.005))
    assert delong_test(a, b)[1:] == pytest.approx((0.01, 0.05), abs=1e-4)
    assert delong_test(a, a) == (0.0, 0.0, 1.0)


def test_influence_of_a_mean_of_labels():
    """The error of a mean AUC over two labels of the same images is that of a bootstrap of whole
    images: where labels agree, twice the images of one are not twice the evidence."""
    rng = np.random.default_rng(1)
    first = rng.random(120) < 0.4
    both = np.stack([first, first ^ (rng.random(120) < 0.1)], axis=1)
    scores = both + rng.standard_normal((120, 1)) + 0.3 * rng.standard_normal((120, 2))
    parts = [auc_influence(*column) for column in zip(both.T, scores.T)]
    error = np.sqrt(np.square(np.mean([i for _, i in parts], axis=0)).sum())
    draws = [np.mean([auc_influence(*column)[0] for column in zip(both[rows].T, scores[rows].T)])
             for rows in (rng.integers(120, size=120) for _ in range(1000))]
    assert np.std(draws) == pytest.approx(error, rel=0.1)
    apart = np.sqrt(sum(np.square(i).sum() for _, i in parts)) / 2  # as if labels were apart
    assert error > 1.2 * apart


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, then 0.04 x 1 is lifted to its forerunner; at most 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


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
    (planted, chance), scores = linear_probe(x[:300], y[:300], x[300:], y[300:])
    assert scores.shape == (300, 2)
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


# homogeneity_completeness_v_measure and adjusted_rand_score of scikit-learn 1.9.1, sets as below
AGREEMENT = {"mixed": (0.5793801642857, 0.6, 0.5895098274473, 0.3571428571429),
             "finer": (1.0, 0.5212960286143, 0.6853314789616, 0.375)}


@pytest.mark.parametrize("name", AGREEMENT)
def test_cluster_agreement_equals_scikit_learns(name):
    """Homogeneity, completeness, V-measure and adjusted Rand index on two small tables."""
    truth, clusters = {
        "mixed": ("aaabbbccc", [0, 0, 1, 1, 1, 1, 2, 2, 0]),
        "finer": ("aaabbb", [0, 0, 1, 2, 2, 3])}[name]
    ours = cluster_agreement(list(truth), clusters)
    assert list(ours.values()) == pytest.approx(AGREEMENT[name], abs=1e-12)


def test_cluster_agreement_at_its_ends():
    """Equal partitions under other names: all 1. One cluster: nothing is told apart."""
    same = cluster_agreement(list("aabbc"), [5, 5, 1, 1, 9])
    assert list(same.values()) == pytest.approx([1, 1, 1, 1])
    one = cluster_agreement(list("aabbc"), [0] * 5)
    assert one["homogeneity"] == 0 and one["V-measure"] == 0 and one["adjusted Rand"] == 0
