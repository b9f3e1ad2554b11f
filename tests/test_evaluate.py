"""evaluate.py: metrics against closed forms and other packages' numbers; sub-commands on stand-ins.

reference/metrics.npz holds what scikit-learn, prdc and SciPy say (made by make_metrics.py),
reference/inception.npz what pytorch-fid's Inception says (made by make_inception.py).
"""
import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import data
import evaluate
from evaluate import (binary_labels, feature_extractor, nearest, read_samples, resemblance,
                      share_below, token_distances)
from metrics import (FIDInception, RandomFeatures, best_correlations, bootstrap_interval,
                     cohen_kappa, compare, correlations, dice, first_share, frechet_distance,
                     frechet_of_moments, kernel_distance, kernel_subsets, linear_probe,
                     merge_moments, moments, pixel_rows, prdc, psnr, ridge_weights, roc_auc,
                     subsample_interval)
from support.phantoms import chest_phantoms


@pytest.fixture(scope="module")
def stored():
    with np.load(Path(__file__).parent / "reference" / "metrics.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def chests():
    return chest_phantoms(300, size=64, seed=0)[0].expand(-1, 3, -1, -1)


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
    few = sets[0][:10], sets[1][:12]  # fewer images than the 16 dimensions: another form
    # roots of the zero eigenvalues' rounding errors near 1e-16 are 1e-8
    assert frechet_distance(*few) == pytest.approx(frechet_of_moments(*map(moments, few)), rel=1e-6)
    assert frechet_distance(*few) == pytest.approx(float(stored["frechet_few"]), rel=1e-6)


def test_frechet_of_exact_gaussians():
    """|dmu|^2 + sum (s1 - s2)^2 for sets of those moments, in any rotation; 0 for equal sets."""
    rotation, noise = torch.linalg.qr(normal(6, 6)).Q, normal(50, 6)
    white = torch.linalg.qr(noise - noise.mean(dim=0)).Q * math.sqrt(49)  # covariance 1, mean 0
    s1, s2 = torch.arange(1.0, 7).double(), torch.tensor([0.0, 1, 1, 2, 3, 9]).double()
    mu1, mu2 = normal(6, seed=1), normal(6, seed=2)
    want = ((mu1 - mu2).square().sum() + (s1 - s2).square().sum()).item()
    a, b = ((white * s) @ rotation.T + mu for s, mu in ((s1, mu1), (s2, mu2)))
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-9)
    assert abs(frechet_distance(a, a)) < 1e-6  # roots of rounding errors near 1e-16


def test_kernel_distance(stored):
    """The formula's value by scikit-learn's kernel; its mean over like sets is 0: unbiased."""
    value = kernel_distance(stored["real"], stored["fake"])
    assert value == pytest.approx(float(stored["kernel"]), rel=1e-9)
    draws = [kernel_distance(normal(30, 5, seed=2 * i), normal(30, 5, seed=2 * i + 1))
             for i in range(100)]
    error = np.std(draws) / math.sqrt(100)
    assert abs(np.mean(draws)) < 3 * error
    real, fake = map(torch.from_numpy, (stored["real"], stored["fake"]))
    subsets = kernel_subsets(real, fake, 40, subset_size=30, seed=1)
    assert subsets.shape == (40,) and subsets.std() > 0
    assert kernel_distance(real, fake, 40, 30, seed=1) == pytest.approx(subsets.mean())
    # unbiased, so subsets have the whole sets' value but for four standard errors
    assert abs(subsets.mean() - value) < 4 * subsets.std() / math.sqrt(40)
    same = normal(30, 5)
    assert kernel_distance(same, same) < -10 * error  # equal sets: below 0 by construction


def test_prdc_equals_the_package(stored):
    """Precision, recall, density and coverage are those of Naeem's package."""
    values = list(prdc(stored["real"], stored["fake"], k=5).values())
    assert values == pytest.approx(stored["prdc"].tolist(), abs=1e-6)
    assert list(prdc(normal(20, 3), normal(20, 3) + 100).values()) == [0, 0, 0, 0]
    assert prdc(normal(20, 3), normal(20, 3))["coverage"] == 1


def test_features_that_cannot_be_compared():
    """NaN, one image, other extractors and too few neighbours are refused in words."""
    x = normal(10, 3)
    broken = torch.where(torch.arange(30).view(10, 3) == 4, torch.nan, x)
    for bad, words in ((broken, "1 rows with NaN"), (x[:1], "need 2 or more"),
                       (x[:, :2], "of one extractor")):
        for metric in (frechet_distance, kernel_distance):
            with pytest.raises(ValueError, match=words):
                metric(x, bad)
    with pytest.raises(ValueError, match="1 rows with NaN"):
        moments(broken)
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


def test_intervals_have_the_width_of_theory(stored):
    """For means both come out as +- 1.96 standard errors; six metrics at once work as well."""
    a, b = normal(400, 1), normal(400, 1, seed=1)
    error = (a.var().item() / 400 + b.var().item() / 400) ** 0.5
    low, high = subsample_interval(lambda x, y: (x.mean() - y.mean()).item(), a, b, rounds=400)
    # the 2.5 % quantile of 400 draws is known to about 10 %
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert low < (a.mean() - b.mean()).item() < high
    low, high = bootstrap_interval(np.mean, a[:, 0].numpy())
    assert high - low == pytest.approx(2 * 1.96 * a.std().item() / 20, rel=0.15)
    low, high = subsample_interval(compare, stored["real"], stored["fake"], rounds=10)
    assert low.shape == high.shape == (6,) and (low < high).all()


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


def test_extractors(tmp_path, monkeypatch):
    """Each gets the range and side it wants; names tell weights apart; what is missing is said."""
    args = SimpleNamespace(features="inception", weights=str(tmp_path / "w.pth"), checkpoint=None)
    images = torch.linspace(-1, 1, 32).expand(2, 3, 32, 32)
    seen = []

    class DenseNet(nn.Linear):
        def __init__(self, weights):
            super().__init__(1, 1)

        def features2(self, x):
            seen.append(x)
            return x.mean(dim=(1, 2, 3))[:, None]

    def load_inception(net, source):
        net.forward = lambda x: seen.append(x) or x
        return net

    monkeypatch.setitem(sys.modules, "torchxrayvision", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchxrayvision.models", SimpleNamespace(DenseNet=DenseNet))
    names = []
    for value in (0.0, 1.0):
        torch.save({"weight": torch.full((1, 1), value), "bias": torch.zeros(1)}, args.weights)
        args.features = "xrv"
        name, extract = feature_extractor(args, "cpu")
        names.append(name)
    extract(images)
    assert names[0] != names[1] and "224 px" in name
    assert seen[-1].shape == (2, 1, 224, 224)
    assert seen[-1].min() == -1024 and seen[-1].max() == 1024
    args.features = "inception"
    with pytest.raises(data.UserError, match="cannot load .*FIDInception is needed.*--weights"):
        feature_extractor(args, "cpu")
    monkeypatch.setattr(evaluate, "load_weights", load_inception)
    feature_extractor(args, "cpu")[1](images)
    assert seen[-1].min() == 0 and seen[-1].max() == 1
    monkeypatch.setitem(sys.modules, "torchxrayvision.models", None)
    args.features = "xrv"
    with pytest.raises(data.UserError, match="pip install torchxrayvision"):
        feature_extractor(args, "cpu")


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


def test_pictures_into_numbers():
    """Pearson's r as NumPy has it, and the best one; share of first ranks; 64 pixels; PSNR."""
    a, b = normal(5, 30), normal(9, 30, seed=1)
    want = np.corrcoef(a.numpy(), b.numpy())[:5, 5:]
    assert np.allclose(correlations(a, b).numpy(), want, atol=1e-12)
    assert np.allclose(best_correlations(a, b, chunk=2).numpy(), want.max(axis=1), atol=1e-12)
    assert first_share(torch.tensor([[3.0, 1], [2, 1]])) == 0.5
    assert first_share(torch.ones(4, 4)) == 0.0  # ties are no recognition
    images = torch.full((2, 3, 128, 128), 0.5)
    images[:, :, ::2] = -0.5
    assert pixel_rows(images).shape == (2, 64 * 64)
    assert torch.allclose(pixel_rows(images), torch.tensor(0.5), atol=1e-6)
    assert psnr(images, images + 0.02) == pytest.approx(40.0, abs=0.01)  # 20 log10(2 / 0.02)


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

    def sample(self, tokens, seeds, steps, guidance_scale, eta, batch):
        if tokens is None:
            tokens = torch.stack([normal(3, 64, seed=s).float() for s in seeds])
        return nn.functional.interpolate(tokens.view(-1, 3, 8, 8), size=64, mode="bilinear")


def test_resemblance_tells_a_copy_from_noise(chests):
    """A model that copies is recognised as such, one without a condition stays at chance."""
    sources, training = chests[:40], chests[40:160]
    results = []
    for condition in ("dino", "none"):
        reference, seeds, rows = resemblance(Copier(condition), sources, iter(training.split(50)),
                                             [0, 1], RandomFeatures(), batch=16)
        results.append(seeds[0])
        assert len(seeds) == 2 and [len(r) for r in rows] == [8, 8, 8, 8]
    copy, noise = results
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
    assert result["frechet"]["noise"] > 5 * result["frechet"]["floor"]
    assert result["frechet"]["streamed"] == pytest.approx(result["frechet"]["all"], rel=1e-6)
    data.save_png(tmp_path / "dark" / "large.png", torch.zeros(3, 96, 96))
    with pytest.raises(data.UserError, match=r"\[64, 96\] pixels a side.*--size 64"):
        evaluate.main(["fidelity", str(tmp_path / "real"), str(tmp_path / "dark")])


def fidelity(folder, *arguments):
    """The JSON that `fidelity` writes."""
    evaluate.main(["fidelity", *map(str, arguments), "--device", "cpu", "--out",
                   str(folder / "out.json")])
    return json.loads((folder / "out.json").read_text())


def test_statistics_instead_of_images(chests, tmp_path):
    """A file of statistics gives its images' distance; foreign and damaged ones are refused."""
    for i, image in enumerate(chests[:40]):
        data.save_png(tmp_path / "ab"[i % 2] / f"{i}.png", image)
    a, b, stats = tmp_path / "a", tmp_path / "b", tmp_path / "stats.npz"
    whole = fidelity(tmp_path, a, b, "--save-stats", stats)
    capped = fidelity(tmp_path, a, b, "--max-features", 12, "--batch", 7)
    stored = fidelity(tmp_path, stats, b)
    assert stored["real"] == 20 and set(stored["frechet"]) == {"streamed"}
    for other in (capped, stored):  # float32 features of other batches differ in the last digits
        assert other["frechet"]["streamed"] == pytest.approx(whole["frechet"]["streamed"], rel=1e-4)
        assert other["brightness"]["real"] == pytest.approx(whole["brightness"]["real"], rel=1e-6)
    assert capped["frechet"]["all"] != whole["frechet"]["all"]
    with np.load(stats) as file:
        content = dict(file)
    for change, words in (({"extractor": "inception 0"}, "holds features of inception 0"),
                          ({"side": 96}, r"\[64, 96\] pixels a side"),
                          ({"mean": content["mean"][:5]}, "damaged"),
                          ({"mean": np.array([{}])}, "damaged"),
                          ({"scatter": content["scatter"] * np.nan}, "damaged")):
        np.savez(stats, **{**content, **change})
        with pytest.raises(data.UserError, match=words):
            fidelity(tmp_path, stats, b)
    np.savez(stats, mu=content["mean"], sigma=content["scatter"])  # pytorch-fid's names
    with pytest.raises(data.UserError, match="without its extractor's name"):
        fidelity(tmp_path, stats, b)
    np.savez(stats, train_images=np.zeros((5, 64, 64), np.uint8), train_labels=np.zeros((5, 1)))
    with pytest.raises(data.UserError, match="got 5 images .*12 are needed"):
        fidelity(tmp_path, a, stats)


def test_colour_against_grey_is_refused(chests, tmp_path):
    """A set in colour and a grey one do not compare; a slight tint does, and is reported."""
    for name, tint in (("grey", 0.0), ("tinted", 0.01), ("colour", 0.4)):
        for i, image in enumerate(chests[:24]):
            red = image + torch.tensor([tint, 0, 0]).view(3, 1, 1)
            data.save_png(tmp_path / name / f"{i}.png", red)
    result = fidelity(tmp_path, tmp_path / "grey", tmp_path / "tinted")
    assert result["brightness"]["synthetic"]["colour"] == pytest.approx(0.005, abs=0.003)
    with pytest.raises(data.UserError, match="one set is grey, the other in colour"):
        fidelity(tmp_path, tmp_path / "grey", tmp_path / "colour")


def write_samples(folder, images, rows):
    """What sample.py leaves: images and samples.csv of (strategy, sources)."""
    with open(data.make_folder(folder) or folder / "samples.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "strategy", "sources", "checkpoint"])
        for i, (image, row) in enumerate(zip(images, rows)):
            data.save_png(folder / "images" / f"{i}.png", image)
            table.writerow([f"images/{i}.png", *row, "model.pt"])


@pytest.fixture
def split(chests):
    """(data set of 60 chests, 40 training and 20 held-out numbers)."""
    files = [f"part/{i}.jpg" for i in range(60)]
    images = data.ImageSet("chests", "", 64, files, {}, cache=dict(enumerate(chests[:60])))
    return images, torch.arange(40), torch.arange(40, 60)


def test_sources_of_samples(chests, split, tmp_path):
    """samples.csv tells groups and sources; what it does not name is an error."""
    rows = [("reconstruct", "runs/held_out/3.png"), ("reconstruct", "50.png"), ("random", ""),
            ("interpolate", "41.png|a/7.png"), ("reconstruct", "other.png"),
            ("prototype", "prototype 0 of 2"), ("interpolate", "45.png|46.png")]
    write_samples(tmp_path, chests[:7], rows)
    _, sources, groups = read_samples(tmp_path, *split[:2])
    assert sources == [[3], [50], [], [41, 7], [], [], [45, 46]]
    assert groups == ["training source", "held-out source", "no source", "training source",
                      "source from elsewhere", "no source", "held-out source"]
    data.save_png(tmp_path / "images" / "unknown.png", chests[0])
    with pytest.raises(data.UserError, match="tells no source of 1 images.*unknown.png"):
        read_samples(tmp_path, *split[:2])
    (tmp_path / "samples.csv").unlink()
    with pytest.raises(data.UserError, match="tells no source of 8 images"):
        read_samples(tmp_path, *split[:2])


def test_nearest_neighbour():
    """Distance and number are those of a search by hand; what is not allowed is passed over."""
    a, b = normal(7, 5), normal(9, 5, seed=1)
    want = (a[:, None] - b).square().mean(dim=2).sqrt()
    assert torch.allclose(token_distances(a, b), want, atol=1e-12)
    allowed = torch.ones(7, 9, dtype=torch.bool)
    distance, column = nearest(token_distances, a, b, allowed, chunk=3)
    assert torch.equal(column, want.argmin(dim=1)) and torch.allclose(distance, want.amin(dim=1))
    allowed[torch.arange(7), column] = False
    assert torch.allclose(nearest(token_distances, a, b, allowed)[0], want.sort(dim=1)[0][:, 1])
    held = np.arange(1000.0)
    assert share_below(held, held) == 0.01 and share_below(held, held + 500) == 0
    assert share_below(held, np.zeros(3)) == 1


def test_privacy_finds_copies(chests, split, tmp_path, monkeypatch):
    """Copies of a training image are found if it is no source, or counts; others look like real."""
    images, train, test = split
    model = Copier()
    model.embedder = nn.Linear(1, 1)
    model.embedder.input_side = 64
    run = tmp_path / "run"
    monkeypatch.setattr(evaluate, "open_run", lambda args: (run, model, {}, images, train, test))
    write_samples(tmp_path / "declared", chests[:20], [("reconstruct", f"{i}.png")
                                                       for i in range(20)])
    write_samples(tmp_path / "held", chests[40:60], [("reconstruct", f"{i}.png")
                                                     for i in range(40, 60)])
    write_samples(tmp_path / "stolen", chests[:10], [("random", "")] * 10)
    evaluate.main(["privacy", *(str(tmp_path / name) for name in ("declared", "held", "stolen"))])
    result = json.loads((run / "privacy.json").read_text())
    for table in result["distances"].values():
        shares = {name: row["share below"] for name, row in table.items()}
        assert shares.pop("training source, left out") < 0.5  # the others of 40: as real ones
        assert shares.pop("held-out source, left out") == shares.pop("held-out real") == 0.05
        # 8-bit files: copies lie 0.002 away, other phantoms 0.03 and more
        assert shares == {"training source, counted": 1, "held-out source, counted": 1,
                          "no source": 1}
        assert table["held-out source, left out"]["median"] == pytest.approx(
            table["held-out real"]["median"], rel=0.02)
    pairs = result["closest"]
    assert len(pairs) == 2 * 4 * 8 and (run / "privacy.png").stat().st_size > 10_000
    stolen = [pair for pair in pairs if pair["row"] == "samples, source left out, by pixels"]
    assert all(Path(pair["image"]).parent.name == "stolen" and not pair["is source"]
               and Path(pair["image"]).stem == Path(pair["nearest"]).stem for pair in stolen)


# homogeneity_completeness_v_measure and adjusted_rand_score of scikit-learn 1.9.1, sets as below
AGREEMENT = {"mixed": (0.5793801642857, 0.6, 0.5895098274473, 0.3571428571429),
             "finer": (1.0, 0.5212960286143, 0.6853314789616, 0.375)}


@pytest.mark.parametrize("name", AGREEMENT)
def test_cluster_agreement_equals_scikit_learns(name):
    """Homogeneity, completeness, V-measure and adjusted Rand index on two small tables."""
    truth, clusters = {
        "mixed": ("aaabbbccc", [0, 0, 1, 1, 1, 1, 2, 2, 0]),
        "finer": ("aaabbb", [0, 0, 1, 2, 2, 3])}[name]
    ours = evaluate.cluster_agreement(list(truth), clusters)
    assert list(ours.values()) == pytest.approx(AGREEMENT[name], abs=1e-12)


def test_cluster_agreement_at_its_ends():
    """Equal partitions under other names: all 1. One cluster: nothing is told apart."""
    same = evaluate.cluster_agreement(list("aabbc"), [5, 5, 1, 1, 9])
    assert list(same.values()) == pytest.approx([1, 1, 1, 1])
    one = evaluate.cluster_agreement(list("aabbc"), [0] * 5)
    assert one["homogeneity"] == 0 and one["V-measure"] == 0 and one["adjusted Rand"] == 0
