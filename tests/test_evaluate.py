"""evaluate.py: metrics against closed forms and other packages' numbers; sub-commands on stand-ins.

reference/metrics.npz holds what scikit-learn, prdc and SciPy say (made by make_metrics.py).
"""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import data
import evaluate
from evaluate import (RandomFeatures, best_correlations, binary_labels, bootstrap_interval,
                      cohen_kappa, compare, correlations, dice, first_share, frechet_distance,
                      frechet_from_statistics, gaussian_statistics, kernel_distance, linear_probe,
                      pixel_rows, prdc, psnr, resemblance, ridge_weights, roc_auc,
                      subsample_interval)
from phantoms import chest_phantoms


@pytest.fixture(scope="module")
def stored():
    with np.load(Path(__file__).parent / "reference" / "metrics.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def chests():
    """300 phantoms (300, 3, 64, 64) in [-1, 1]."""
    return chest_phantoms(300, size=64, seed=0)[0].expand(-1, 3, -1, -1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny arrays: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


STORED_FEATURES = [0.3371, 0.0944, -0.083, -0.0997, -0.0695, 0.3387, 0.3512, 0.0059, 0.0019,
                   -0.0009]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- distances

def test_frechet_equals_scipy_sqrtm(stored):
    """The eigenvalue form gives the sqrtm form's value, with full rank and with few images."""
    real, fake = stored["real"], stored["fake"]
    assert frechet_distance(real, fake) == pytest.approx(float(stored["frechet"]), rel=1e-9)
    # of a singular matrix sqrtm keeps about half of the digits
    assert frechet_distance(real[:10], fake[:12]) == pytest.approx(float(stored["frechet_few"]),
                                                                   rel=1e-6)


def test_frechet_of_exact_gaussians():
    """Diagonal Gaussians have the closed form |dmu|^2 + sum (s1 - s2)^2, in any rotation."""
    rotation = torch.linalg.qr(normal(6, 6)).Q
    s1, s2 = torch.arange(1.0, 7).double(), torch.tensor([0.0, 1, 1, 2, 3, 9]).double()
    mu1, mu2 = normal(6, seed=1), normal(6, seed=2)
    turned = [rotation @ torch.diag(s ** 2) @ rotation.T for s in (s1, s2)]
    want = ((mu1 - mu2).square().sum() + (s1 - s2).square().sum()).item()
    assert frechet_from_statistics(mu1, turned[0], mu2, turned[1]) == pytest.approx(want, rel=1e-9)


def test_frechet_of_samples_and_shifts(stored):
    """Identical sets give 0, a shifted copy |d|^2, samples of Gaussians nearly their distance."""
    real = torch.from_numpy(stored["real"])
    assert abs(frechet_distance(real, real)) < 1e-6  # roots of rounding errors near 1e-16
    shift = normal(16, seed=3)
    assert frechet_distance(real, real + shift) == pytest.approx(float(shift @ shift), rel=1e-6)
    a, b = normal(20000, 3), 2 * normal(20000, 3, seed=1) + 1
    # 3 (1 - 2)^2 + 3 = 6; standard error of the shift term: 2 sqrt(3 (1 + 4) / 20000) = 0.055
    assert frechet_distance(a, b) == pytest.approx(6, abs=0.2)


def test_streamed_statistics_equal_numpy():
    """Batches of unequal size far from zero give the mean and unbiased covariance of all rows."""
    x = normal(50, 4) + 1000
    mean, covariance = gaussian_statistics(iter([x[:1], x[1:20].float().double(), x[20:]]))
    whole = gaussian_statistics(x)
    # float32 holds numbers near 1000 to 6e-5, which is what the middle batch lost
    assert torch.allclose(mean, x.mean(dim=0), rtol=0, atol=1e-4)
    assert torch.allclose(covariance, torch.cov(x.T), rtol=0, atol=1e-3)
    assert torch.allclose(whole[1], torch.cov(x.T), rtol=1e-9, atol=0)


def test_kernel_distance(stored):
    """The value is that of the formula by scikit-learn's kernel; subsets give a mean near it."""
    want = float(stored["kernel"])
    assert kernel_distance(stored["real"], stored["fake"]) == pytest.approx(want, rel=1e-9)
    mean, sd = kernel_distance(stored["real"], stored["fake"], subsets=100, subset_size=60)
    assert sd > 0 and abs(mean - want) < 4 * sd / math.sqrt(100) + 1e-3
    again = kernel_distance(stored["real"], stored["fake"], subsets=100, subset_size=60)
    assert again == (mean, sd)


def test_kernel_distance_is_unbiased():
    """Over many pairs of sets from one distribution the mean is 0 within its standard error."""
    draws = [kernel_distance(normal(30, 5, seed=2 * i), normal(30, 5, seed=2 * i + 1))
             for i in range(100)]
    error = np.std(draws) / math.sqrt(100)
    assert abs(np.mean(draws)) < 3 * error
    biased = [kernel_distance(a, a) for a in [normal(30, 5)]]  # equal sets: below 0 by construction
    assert biased[0] < -10 * error


def test_prdc_equals_the_package(stored):
    """Precision, recall, density and coverage are those of Naeem's package."""
    values = list(prdc(stored["real"], stored["fake"], k=5).values())
    assert values == pytest.approx(stored["prdc"].tolist(), abs=1e-6)
    assert list(prdc(normal(20, 3), normal(20, 3) + 100).values()) == [0, 0, 0, 0]
    assert prdc(normal(20, 3), normal(20, 3))["coverage"] == 1


def test_features_that_cannot_be_compared():
    """NaN, one image, other extractors and too few neighbours are refused in words."""
    x = normal(10, 3)
    with pytest.raises(ValueError, match="1 of 10 feature rows"):
        frechet_distance(torch.where(torch.arange(30).view(10, 3) == 4, torch.nan, x), x)
    with pytest.raises(ValueError, match="got 1 image"):
        frechet_distance(x[:1], x)
    with pytest.raises(ValueError, match="same feature extractor"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="at least 6"):
        prdc(x[:5], x)
    with pytest.raises(ValueError, match="kernel distance needs 2"):
        kernel_distance(x[:1], x)


# ---- labels, masks, readers, probes

def test_auc_equals_scikit_learn(stored):
    """Tied scores count a half; the value is scikit-learn's; one class is refused."""
    auc = roc_auc(stored["labels"], stored["scores"])
    assert auc == pytest.approx(float(stored["auc"]), abs=1e-9)
    assert roc_auc([0, 0, 1, 1], [1, 2, 2, 3]) == 3.5 / 4
    assert roc_auc([0, 1], [5, 5]) == 0.5
    with pytest.raises(ValueError, match="0 positive and 3 negative"):
        roc_auc([0, 0, 0], [1, 2, 3])
    with pytest.raises(ValueError, match="NaN"):
        roc_auc([0, 1], [1, float("nan")])


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
    with pytest.raises(ValueError, match="got 2 and 3 answers"):
        cohen_kappa([1, 0], [1, 0, 1])


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


# ---- intervals

def test_intervals_have_the_width_of_theory():
    """For means both intervals come out as +- 1.96 standard errors."""
    a, b = normal(400, 1), normal(400, 1, seed=1)
    error = (a.var().item() / 400 + b.var().item() / 400) ** 0.5
    low, high = subsample_interval(lambda x, y: (x.mean() - y.mean()).item(), a, b, rounds=400)
    # the 2.5 % quantile of 400 draws is known to about 10 %
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert low < (a.mean() - b.mean()).item() < high
    low, high = bootstrap_interval(np.mean, a[:, 0].numpy())
    assert high - low == pytest.approx(2 * 1.96 * a.std().item() / 20, rel=0.15)


def test_intervals_of_metrics(stored):
    """Six metrics at once; a bootstrap redraws one-class draws, and gives up on one-class data."""
    low, high = subsample_interval(compare, stored["real"], stored["fake"], rounds=10)
    assert low.shape == high.shape == (6,) and (low < high).all()
    labels, scores = np.array([0, 0, 0, 1]), np.array([0.1, 0.2, 0.3, 0.9])
    assert bootstrap_interval(roc_auc, labels, scores, rounds=50) == (1.0, 1.0)
    with pytest.raises(ValueError, match="both classes"):
        bootstrap_interval(roc_auc, labels * 0, scores, rounds=10)


# ---- the random judge

def test_random_features_are_the_same_everywhere():
    """A smooth test picture gives stored numbers: anybody's Frechet distances can be compared."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 48), torch.linspace(-1, 1, 48), indexing="ij")
    picture = torch.stack([x * y, (3 * y).sin(), x ** 2])[None]
    features = RandomFeatures()(picture)
    assert features.shape == (1, 217)
    # 1e-4: float32 convolutions differ by 1e-6 between machines, the logarithm adds some
    assert features[0, ::24].tolist() == pytest.approx(STORED_FEATURES, abs=1e-4)
    assert not torch.allclose(RandomFeatures(seed=1)(picture), features, atol=0.1)
    assert RandomFeatures()(torch.zeros(2, 3, 32, 32)).isfinite().all()  # flat, smallest side


def test_random_features_see_what_people_see(chests):
    """Blur, noise, brightness, mirroring and shuffling move the distance well above the floor."""
    judge = RandomFeatures()
    train, test = chests[:150], chests[150:]
    train = judge(train)
    floor = frechet_distance(judge(test), train)
    generator = torch.Generator().manual_seed(0)
    changed = {
        "blur": torch.nn.functional.avg_pool2d(test, 3, stride=1),
        "noise": test + 0.1 * torch.randn(test.shape, generator=generator),
        "brightness": test + 0.1,
        "mirror": test.flip(3),
        "shuffled": test.flatten(2)[..., torch.randperm(4096, generator=generator)].view_as(test)}
    for name, images in changed.items():
        # 150 against 150 give 1.9 to 39 times the floor, 256 against 2,000 give 4 to 121 times
        assert frechet_distance(judge(images), train) > 1.5 * floor, name


# ---- pictures into numbers

def test_correlations_equal_numpy():
    """Pearson's r of rows, its diagonal rank, and the best one over chunks."""
    a, b = normal(5, 30), normal(9, 30, seed=1)
    want = np.corrcoef(a.numpy(), b.numpy())[:5, 5:]
    assert np.allclose(correlations(a, b).numpy(), want, atol=1e-12)
    assert np.allclose(best_correlations(a, b, chunk=2).numpy(), want.max(axis=1), atol=1e-12)
    assert first_share(torch.tensor([[3.0, 1], [2, 1]])) == 0.5
    assert first_share(torch.ones(4, 4)) == 0.0  # ties are no recognition


def test_pixels_and_psnr():
    """Large images are averaged to 64 pixels a side; PSNR takes 2.0 from peak to peak."""
    images = torch.full((2, 3, 128, 128), 0.5)
    images[:, :, ::2] = -0.5
    assert pixel_rows(images).shape == (2, 64 * 64)
    assert torch.allclose(pixel_rows(images), torch.tensor(0.5), atol=1e-6)
    assert psnr(images, images + 0.02) == pytest.approx(40.0, abs=0.01)  # 20 log10(2 / 0.02)


# ---- sub-commands

class Copier(nn.Module):
    """Stands in for the bundle: tokens are the 8x8 picture, samples are blurred sources."""

    def __init__(self, condition="dino"):
        super().__init__()
        self.config = SimpleNamespace(condition=condition, tokens="global", image_size=64)
        self.register_buffer("mark", torch.zeros(1))

    def encode(self, x):
        return x

    def decode(self, x0):
        return x0 * 0.99

    def embed(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 8).flatten(2)

    def sample(self, tokens, seeds, steps, guidance_scale, batch):
        if tokens is None:
            tokens = torch.stack([normal(3, 64, seed=s).float() for s in seeds])
        return nn.functional.interpolate(tokens.view(-1, 3, 8, 8), size=64, mode="bilinear")


def test_resemblance_tells_a_copy_from_noise(chests):
    """A model that copies is recognised as such, one without a condition stays at chance."""
    sources, training = chests[:40], chests[40:160]
    results = {}
    for condition in ("dino", "none"):
        reference, seeds, rows = resemblance(Copier(condition), sources, iter(training.split(50)),
                                             [0, 1], RandomFeatures(), batch=16)
        results[condition] = seeds
        assert len(seeds) == 2 and [len(r) for r in rows] == [8, 8, 8, 8]
    copy, noise = results["dino"][0], results["none"][0]
    assert copy["correlation with own source"] > 0.85 > copy["correlation with other sources"]
    assert copy["own source first, by pixels"] > 0.9
    assert copy["own source first, by the model's own tokens"] > 0.9
    assert abs(noise["correlation with own source"]) < 0.1
    assert noise["own source first, by pixels"] < 0.2  # chance 1 / 40
    assert noise["Frechet, times the real floor"] > 10 > 1 > reference["brightness between"] > 0
    assert 30 < reference["VAE PSNR, dB"] < 60  # 0.99 x is 46 dB below the values' own size
    assert reference["Frechet of VAE reconstructions"] < reference["Frechet of 3x3-blurred real"]


def test_labels_for_the_probe():
    """0/1 columns are one label, lists are cut at |, and rare values are left out."""
    columns = {"nodule": ["0", "1"] * 50, "finding": ["A|B", "B", "C|A", ""] * 25}
    parts = np.arange(60), np.arange(60, 100)
    names, train, test = binary_labels(columns, ["nodule", "finding"], *parts, least=10)
    assert names == ["nodule", "A", "B", "C"] and train.shape == (60, 4) and test.shape == (40, 4)
    assert train[:4, 1].tolist() == [1, 0, 1, 0] and train[:4, 2].tolist() == [1, 1, 0, 0]
    assert binary_labels(columns, ["finding"], *parts, least=15)[0] == ["A", "B"]
    with pytest.raises(data.UserError, match="no label of finding"):
        binary_labels(columns, ["finding"], *parts, least=40)
    with pytest.raises(data.UserError, match="no column 'age'"):
        binary_labels(columns, ["age"], *parts)


def test_fidelity_command(chests, tmp_path, capsys):
    """Two folders give a table with a floor and a JSON file; darker copies are called darker."""
    for i, image in enumerate(chests[:40]):
        data.save_png(tmp_path / "real" / f"{i}.png", image)
        if i < 20:
            data.save_png(tmp_path / "dark" / f"{i}.png", image - 0.4)
    evaluate.main(["fidelity", str(tmp_path / "real"), str(tmp_path / "dark"), "--device", "cpu"])
    out = capsys.readouterr().out
    assert "warning: fewer images than the 217 dimensions" in out
    result = json.loads((tmp_path / "dark" / "fidelity.json").read_text())
    assert result["real"] == 40 and result["synthetic"] == 20
    assert result["frechet"]["equal"] > 2 * result["frechet"]["floor"]
    assert result["brightness"]["synthetic"]["mean"] < result["brightness"]["real"]["mean"] - 0.1
    data.save_png(tmp_path / "dark" / "large.png", torch.zeros(3, 96, 96))
    with pytest.raises(data.UserError, match="large.png has 96 pixels a side.*--size 64"):
        evaluate.main(["fidelity", str(tmp_path / "real"), str(tmp_path / "dark")])
