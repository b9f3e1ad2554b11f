"""experiments/: the front door and what they share; then each against stand-ins with known answers.
"""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from evaluate import RandomFeatures
from experiments import __main__ as front_door
from experiments import common, privacy
from experiments.common import OpenedRun
from experiments.privacy import open_samples, share_below, token_distances
from experiments.resemble import resemblance
from support.command import UserError
from support.datasets import ImageSet, open_dataset
from support.files import save_atomic, write_csv
from support.phantoms import chest_phantoms
from support.pictures import save_png


@pytest.fixture(scope="module")
def chests():
    return chest_phantoms(160, size=64, seed=0)[0].expand(-1, 3, -1, -1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_front_door_lists_the_experiments(capsys):
    front_door.main([])
    assert "fidelity" in capsys.readouterr().out
    with pytest.raises(UserError, match="no experiment 'judge'.*pass one of .*fidelity"):
        front_door.main(["judge"])


@pytest.mark.parametrize("name", front_door.find_experiments())
def test_every_experiment_has_its_own_help(name, capsys):
    with pytest.raises(SystemExit):
        front_door.main([name, "--help"])
    assert f"python -m experiments {name}" in capsys.readouterr().out


def test_labels():
    """Images without a sure answer are left out; a label that too few images have is refused."""
    columns = {"nodule": ["1", "0", "-1", "", "1.0", "0"], "finding": ["A", "A", "", "B", "A", "A"]}
    images = ImageSet("table", "", 8, [f"{i}.png" for i in range(6)], columns)
    parts = torch.arange(3), torch.arange(3, 6)
    _, train, test, _ = common.read_labels(images, ["nodule"], *parts, 1)
    assert train.tolist() == [0, 1] and test.tolist() == [4, 5]
    with pytest.raises(UserError, match="no label of finding"):
        common.read_labels(images, None, *parts, 40)


def ask(name, run, *arguments):
    """The result that an experiment writes into the run's folder."""
    front_door.main([name, "--checkpoint", str(run), "--device", "cpu", *arguments])
    return json.loads((run / f"{name}.json").read_text())


def test_a_run_is_opened_whole(labelled_run, tmp_path):
    """Model, flags and both parts of the data, at most as many as asked for, always the same."""
    args = SimpleNamespace(checkpoint=str(labelled_run), data=None, device="cpu", count=5,
                           train_limit=None)
    run = common.open_run(args)
    assert run.folder == labelled_run
    assert not run.model.training and len(run.images) == 60 and len(run.test) == 5
    assert set(run.train.tolist()).isdisjoint(run.test.tolist())
    assert torch.equal(run.test, common.open_run(args).test)
    checkpoint = torch.load(labelled_run / "model.pt", weights_only=True)
    save_atomic(tmp_path / "model.pt", {**checkpoint, "training": {}})
    with pytest.raises(UserError, match="does not say which images it was trained on"):
        common.open_run(args, tmp_path)


def test_probe_command(labelled_run):
    """A row for the embedder, each set of random weights, and pixels; AUCs of each label."""
    table = ask("probe", labelled_run, "--seeds", "0", "--label-column", "kind", "--least", "5")
    assert list(table) == ["embedder", "random weights, seed 0", "16x16 grey pixels"]
    for row in table.values():
        assert 0 <= row["95 %"][0] <= row["mean"] <= row["95 %"][1] <= 1
        assert row["mean"] == pytest.approx((row["even"] + row["odd"]) / 2)


def test_resemble_command(labelled_run):
    """Figures of each seed and their summary."""
    result = ask("resemble", labelled_run, "--count", "6", "--train-limit", "20", "--seeds", "0",
                 "1", "--no-refine")
    assert result["sources"] == 6 and result["training_images"] == 20
    name = "correlation with own source"
    values = [result["seeds"][seed][name] for seed in "01"]
    assert result["summary"][name]["mean"] == pytest.approx(np.mean(values))
    assert result["real"]["Frechet to training"] > 0


def test_embed_command(labelled_run, tmp_path):
    """Names and raw tokens of all images, in the order of the data."""
    data = str(labelled_run.parent)
    flags = ["embed", data, "--checkpoint", str(labelled_run), "--device", "cpu", "--out"]
    front_door.main([*flags, str(tmp_path / "x.npz")])
    with pytest.raises(UserError, match="is the data set itself"):
        front_door.main([*flags, data])
    images = open_dataset(data, 32)
    _, model = common.load_model(labelled_run / "model.pt", "cpu")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert arrays["files"].tolist() == images.files
        want = model.embedder.tokens(images.batch([7]))
        assert np.allclose(arrays["tokens"][[7]], want, atol=1e-5)


class Copier(nn.Module):
    """Stands in for the bundle: tokens are the 8x8 picture, samples are blurred sources."""

    def __init__(self, condition="dino"):
        super().__init__()
        self.config = SimpleNamespace(condition=condition, tokens="global", image_size=64,
                                      vit="a stand-in")
        self.register_buffer("shift", torch.zeros(1))

    def encode(self, x):
        return x

    def decode(self, x0):
        return x0 * 0.99

    def embed(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 8).flatten(2)

    def sample(self, tokens, seeds, guidance_scale, batch, refine):
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
    assert noise["Frechet, times the real floor"] > 10 > 1 > reference["brightness"] > 0
    assert 30 < reference["VAE PSNR, dB"] < 60  # 0.99 x is 46 dB below the values' own size
    assert reference["Frechet of VAE reconstructions"] < reference["Frechet of 3x3-blurred real"]


def write_samples(folder, images, rows):
    """What sample.py leaves: images and samples.csv of (strategy, sources)."""
    table = [["file", "strategy", "sources", "checkpoint"]]
    for i, (image, row) in enumerate(zip(images, rows)):
        save_png(folder / "images" / f"{i}.png", image)
        table.append([f"images/{i}.png", *row, "model.pt"])
    write_csv(folder / "samples.csv", table)


@pytest.fixture
def split(chests):
    """(data set of 60 chests, 40 training and 20 held-out numbers)."""
    files = [f"part/{i}.jpg" for i in range(60)]
    images = ImageSet("chests", "", 64, files, {}, cache=dict(enumerate(chests[:60])))
    return images, torch.arange(40), torch.arange(40, 60)


def test_sources_of_samples(chests, split, tmp_path):
    """samples.csv names the sources, known by their stem, or where that is not enough by their
    folders: CheXpert calls nearly every image view1_frontal."""
    rows = [("reconstruct", "runs/held_out/3.png"), ("random", ""),
            ("interpolate", "41.png|a/7.png"), ("reconstruct", "other.png"),
            ("prototype", "prototype 0 of 2")]
    write_samples(tmp_path, chests[:5], rows)
    samples, sources = open_samples(tmp_path, split[0])
    assert sources == [[3], [], [41, 7], [], []] and samples.files == [f"{i}.png" for i in range(5)]
    files = [f"p{i}/study{j}/view.jpg" for i in range(3) for j in range(2)]
    write_samples(tmp_path / "b", chests[:3], [("reconstruct", "/data/p2/study1/view.jpg"),
                                               ("reconstruct", "study0/view.jpg"),
                                               ("reconstruct", "view.jpg")])
    _, sources = open_samples(tmp_path / "b", replace(split[0], files=files))
    assert sources == [[5], [0, 2, 4], [0, 1, 2, 3, 4, 5]]


def test_distances():
    """Distances are those by hand, and the share below the 1st percentile is exact."""
    a, b = normal(7, 5), normal(9, 5, seed=1)
    want = (a[:, None] - b).square().mean(dim=2).sqrt()
    assert torch.allclose(token_distances(a, b), want, atol=1e-12)
    held_out = np.arange(1000.0)
    assert share_below(held_out, held_out) == 0.01 and share_below(held_out, held_out + 500) == 0
    assert share_below(held_out, np.zeros(3)) == 1


def test_privacy_finds_copies(chests, split, tmp_path, monkeypatch):
    """Copies of a training image are found unless it is their source; others look like real."""
    images, train, test = split
    run = tmp_path / "run"
    opened = OpenedRun(run, Copier(), images, train, test)
    monkeypatch.setattr(privacy, "open_run", lambda args: opened)
    sets = {"declared": range(20), "held": range(40, 60), "stolen": range(10)}
    for name, indices in sets.items():
        rows = [("random", "") if name == "stolen" else ("reconstruct", f"{i}.png")
                for i in indices]
        write_samples(tmp_path / name, chests[list(indices)], rows)
    front_door.main(["privacy", *(str(tmp_path / name) for name in sets)])
    result = json.loads((run / "privacy.json").read_text())
    for table in result["distances"].values():
        real = table.pop("held-out real")
        declared, held, stolen = (table[str(tmp_path / name)] for name in sets)
        # 8-bit files: copies lie 0.002 away, other phantoms 0.03 and more.
        assert stolen["share below"] == 1 and stolen["median"] < real["median"] / 5
        assert declared["share below"] < 0.5 and held["share below"] <= 0.05
        assert held["median"] == pytest.approx(real["median"], rel=0.02)
