"""evaluate.py, experiments/statistics.py: against closed forms and other packages' numbers.

reference/metrics.npz holds what scikit-learn, prdc and SciPy say (made by make_metrics.py),
reference/inception.npz what pytorch-fid's Inception says (made by make_inception.py).
"""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluate import (FIDInception, RandomFeatures, bootstrap_interval, cohen_kappa, correlations,
                      dice, frechet_distance, kernel_distance, pixel_rows, prdc, psnr, roc_auc)
from experiments.statistics import (label_aucs, mean_auc, ridge_scores, ridge_weights,
                                    subsample_interval)


@pytest.fixture(scope="module")
def stored():
    with np.load(Path(__file__).parent / "reference" / "metrics.npz") as arrays:
        return dict(arrays)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inception_case():
    """Seeded weights for FID's Inception, and two pictures (2, 3, 80, 64) in [0, 1]."""
    rng, weights = np.random.default_rng(0), {}
    for name, value in FIDInception().state_dict().items():
        x = torch.from_numpy(rng.standard_normal(tuple(value.shape), dtype=np.float32))
        if value.ndim > 1:
            x *= (2 / value[0].numel()) ** 0.5  # keeps the size of the signal through the layers
        elif name.endswith(("bn.weight", "running_var")):
            x = 1 + 0.5 * x.tanh()
        weights[name] = x.long() * 0 if value.dtype == torch.int64 else x
    pictures = torch.from_numpy(rng.random((2, 3, 80, 64), dtype=np.float32))
    return weights, torch.stack([pictures[0], pictures[1] ** 8])


def test_frechet_equals_scipy_sqrtm(stored):
    """The eigenvalue form gives the sqrtm form's value, with full rank and with few images."""
    real, fake = stored["real"], stored["fake"]
    assert frechet_distance(real, fake) == pytest.approx(float(stored["frechet"]), rel=1e-9)
    # of a singular matrix sqrtm keeps about half of the digits
    assert frechet_distance(real[:10], fake[:12]) == pytest.approx(float(stored["frechet_few"]),
                                                                   rel=1e-6)


def test_frechet_of_exact_gaussians():
    """|dmu|^2 + sum (s1 - s2)^2 for sets of those moments, in any rotation; 0 for equal sets."""
    rotation, noise = torch.linalg.qr(normal(6, 6)).Q, normal(50, 6)
    white = torch.linalg.qr(noise - noise.mean(dim=0)).Q * math.sqrt(49)  # covariance 1, mean 0
    s1, s2 = torch.arange(1.0, 7).double(), torch.tensor([0.0, 1, 1, 2, 3, 9]).double()
    mu1, mu2 = normal(6, seed=1), normal(6, seed=2)
    want = ((mu1 - mu2).square().sum() + (s1 - s2).square().sum()).item()
    a, b = ((white * s) @ rotation.T + mu for s, mu in ((s1, mu1), (s2, mu2)))
    # one deviation is 0, where the square root turns rounding by 1e-16 into 1e-8
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-8)
    assert abs(frechet_distance(a, a)) < 1e-6  # roots of rounding errors near 1e-16


def test_kernel_distance(stored):
    """The formula's value by scikit-learn's kernel; its mean over like sets is 0: unbiased."""
    value = kernel_distance(stored["real"], stored["fake"])
    assert value == pytest.approx(float(stored["kernel"]), rel=1e-9)
    draws = [kernel_distance(normal(30, 5, seed=2 * i), normal(30, 5, seed=2 * i + 1))
             for i in range(100)]
    error = np.std(draws) / math.sqrt(100)
    assert abs(np.mean(draws)) < 3 * error
    same = normal(30, 5)
    assert kernel_distance(same, same) < -10 * error  # equal sets: below 0 by construction


def test_prdc_equals_the_package(stored):
    """Precision, recall, density and coverage are those of Naeem's package."""
    values = list(prdc(stored["real"], stored["fake"], k=5).values())
    assert values == pytest.approx(stored["prdc"].tolist(), abs=1e-6)
    assert list(prdc(normal(20, 3), normal(20, 3) + 100).values()) == [0, 0, 0, 0]
    assert prdc(normal(20, 3), normal(20, 3))["coverage"] == 1


def test_features_that_cannot_be_compared():
    """NaN, other extractors and too few neighbours are refused in words."""
    x = normal(10, 3)
    broken = torch.where(torch.arange(30).view(10, 3) == 4, torch.nan, x)
    for bad, words in ((broken, "1 rows with NaN"), (x[:, :2], "from one extractor")):
        with pytest.raises(ValueError, match=words):
            frechet_distance(x, bad)
    with pytest.raises(ValueError, match="need 6 or more"):
        prdc(x[:5], x)


def test_auc_equals_scikit_learn(stored):
    """Tied scores count a half; the value is scikit-learn's; one class is refused."""
    auc = roc_auc(stored["labels"], stored["scores"])
    assert auc == pytest.approx(float(stored["auc"]), abs=1e-9)
    assert roc_auc([0, 0, 1, 1], [1, 2, 2, 3]) == 3.5 / 4
    assert roc_auc([0, 1], [5, 5]) == 0.5
    for labels, scores in (([0, 0], [1, 2]), ([0, 1], [1, math.nan])):
        with pytest.raises(ValueError, match="needs both classes and numbers"):
            roc_auc(labels, scores)


def test_dice_and_kappa(stored):
    """Both equal their hand-computed values, and kappa scikit-learn's."""
    a, b = torch.tensor([[1, 1, 0, 0]]), torch.tensor([[0, 1, 1, 1]])
    assert dice(a, b) == pytest.approx(2 / 5)  # 2 * 1 / (2 + 3)
    assert dice(a * 0, b * 0) == 1.0 and dice(a, a * 0) == 0.0
    with pytest.raises(ValueError, match="need the same"):
        dice(a, b.T)
    assert cohen_kappa(*stored["readers"]) == pytest.approx(float(stored["kappa"]), abs=1e-9)
    assert cohen_kappa(["real", "fake"], ["fake", "real"]) == -1
    assert math.isnan(cohen_kappa([1, 1], [1, 1]))


def test_bootstrap_has_the_width_of_theory():
    """For a mean it comes out as +- 1.96 standard errors."""
    a = normal(400, 1)
    low, high = bootstrap_interval(np.mean, a[:, 0].numpy())
    # the 2.5 % quantile of 1000 draws is known to a few percent
    assert high - low == pytest.approx(2 * 1.96 * a.std().item() / 20, rel=0.15)
    # four copies of each row tell no more than one, if they are drawn together
    copies = a[:, 0].numpy().repeat(4)
    again = bootstrap_interval(np.mean, copies, groups=np.arange(400).repeat(4))
    assert again == pytest.approx([low, high], abs=1e-6)
    # draws of one class only are left out
    few = np.array([0, 0, 0, 1]), np.array([0.1, 0.2, 0.9, 0.8])
    assert 0 <= bootstrap_interval(roc_auc, *few)[0] < 2 / 3 < bootstrap_interval(roc_auc, *few)[1]


def test_random_features_are_the_same_everywhere():
    """A smooth test picture gives stored numbers: anybody's Frechet distances can be compared."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 48), torch.linspace(-1, 1, 48), indexing="ij")
    picture = torch.stack([x * y, (3 * y).sin(), x ** 2])[None]
    features = RandomFeatures()(picture)
    assert features.shape == (1, 217)
    # 1e-4: float32 convolutions differ by 1e-6 between machines, the logarithm adds some
    assert features[0, ::24].tolist() == pytest.approx([
        0.3371, 0.0944, -0.083, -0.0997, -0.0695, 0.3387, 0.3512, 0.0059, 0.0019, -0.0009],
        abs=1e-4)
    assert not torch.allclose(RandomFeatures(seed=1)(picture), features, atol=0.1)
    assert RandomFeatures()(torch.zeros(2, 3, 32, 32)).isfinite().all()  # flat, smallest side


def test_inception_equals_pytorch_fid():
    """With equal weights FIDInception gives the features that pytorch-fid gives."""
    weights, pictures = inception_case()
    net = FIDInception().eval()
    net.load_state_dict(weights)
    with np.load(Path(__file__).parent / "reference" / "inception.npz") as stored:
        want = torch.from_numpy(stored["features"])
    with torch.no_grad():
        got = net(pictures)
    assert got.shape == (2, 2048)
    # other machines order sums otherwise; one wrong pool moves them by 2e-3 or more
    assert (got - want).norm() < 1e-4 * want.norm()


def test_pictures_into_numbers():
    """Pearson's r as NumPy has it; 64 pixels; PSNR."""
    a, b = normal(5, 30), normal(9, 30, seed=1)
    want = np.corrcoef(a.numpy(), b.numpy())[:5, 5:]
    assert np.allclose(correlations(a, b).numpy(), want, atol=1e-12)
    images = torch.full((2, 3, 128, 128), 0.5)
    images[:, :, ::2] = -0.5
    assert pixel_rows(images).shape == (2, 64 * 64)
    assert torch.allclose(pixel_rows(images), torch.tensor(0.5), atol=1e-6)
    assert psnr(images, images + 0.02) == pytest.approx(40.0, abs=0.01)  # 20 log10(2 / 0.02)


# ---- experiments/statistics.py

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


def test_intervals_have_the_width_of_theory():
    """For means it comes out as +- 1.96 standard errors."""
    a, b = normal(400, 1), normal(400, 1, seed=1)
    error = (a.var().item() / 400 + b.var().item() / 400) ** 0.5
    low, high = subsample_interval(lambda x, y: (x.mean() - y.mean()).item(), a, b, rounds=400)
    # the 2.5 % quantile of 400 draws is known to about 10 %
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert low < (a.mean() - b.mean()).item() < high
