"""experiments/: the front door and what they share; then each against stand-ins with known answers.
"""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dino import ViTConfig
from dinodiff import DinoDiffusion, DinoDiffusionConfig
from evaluate import RandomFeatures
from experiments import __main__ as front_door
from experiments import common, privacy
from experiments.common import OpenedRun, binary_labels
from experiments.privacy import nearest, read_samples, share_below, token_distances
from experiments.resemble import best_correlations, first_share, resemblance
from support.command import UserError
from support.datasets import ImageSet, open_dataset
from support.files import CHECKPOINT_VERSION, save_atomic, write_csv
from support.phantoms import chest_phantoms
from support.pictures import save_png
from support.splits import write_split
from unet import UNetConfig
from vae import VAEConfig


@pytest.fixture(scope="module")
def chests():
    return chest_phantoms(160, size=64, seed=0)[0].expand(-1, 3, -1, -1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_front_door_lists_without_importing(capsys, monkeypatch):
    """The list has a line for each experiment, the question; nothing of it is imported for that."""
    monkeypatch.setattr(front_door.importlib, "import_module", None)
    front_door.main([])
    out = capsys.readouterr().out
    for name in ("clusters", "fidelity", "privacy", "probe", "resemble"):
        line, = (line for line in out.splitlines() if line.split()[:1] == [name])
        assert line.endswith("?") and len(line) <= 100
    assert "common" not in out and "statistics" not in out.replace("--save-stats", "")
    with pytest.raises(UserError, match="no experiment 'judge'.*here are .*fidelity"):
        front_door.main(["judge"])


@pytest.mark.parametrize("name", front_door.find_experiments())
def test_every_experiment_has_its_own_help(name, monkeypatch, capsys):
    """Its docstring, with lines kept, and a text for every flag."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        front_door.main([name, "--help"])
    out = capsys.readouterr().out
    assert f"python -m experiments {name}" in out and front_door.find_experiments()[name] in out
    assert len(out.splitlines()) <= 100


def test_labels_for_the_probe():
    """0/1 columns are one label, lists are cut at |, and rare values are left out."""
    columns = {"nodule": ["0", "1"] * 50, "finding": ["A|B", "B", "C|A", ""] * 25}
    parts = np.arange(60), np.arange(60, 100)
    names, train, test = binary_labels(columns, ["nodule", "finding"], *parts, least=10)
    assert names == ["nodule", "A", "B", "C"] and train.shape == (60, 4) and test.shape == (40, 4)
    assert train[:4, 1].tolist() == [1, 0, 1, 0] and train[:4, 2].tolist() == [1, 1, 0, 0]
    assert binary_labels(columns, ["finding"], *parts, least=15)[0] == ["A", "B"]
    with pytest.raises(UserError, match="no label of finding"):
        binary_labels(columns, ["finding"], *parts, least=40)
    with pytest.raises(UserError, match="no column 'age'"):
        binary_labels(columns, ["age"], *parts)


def test_images_without_a_sure_label_are_left_out(capsys):
    """Uncertain answers, empty text, images without a row; a blank among answers is a no."""
    columns = {"nodule": ["1", "0", "-1", "", "1.0", "1"], "finding": ["A", "", "A", "B", "A", "A"]}
    images = ImageSet("six", "", 8, list("abcdef"), columns, labelled=[True] * 5 + [False])
    train, test = common.with_known_labels(images, ["nodule", "finding"], torch.arange(3),
                                           torch.arange(3, 6))
    assert train.tolist() == [0] and test.tolist() == [3, 4]
    assert "2 training and 1 held-out images" in capsys.readouterr().out
    names, train_y, _ = binary_labels(columns, ["nodule"], [0, 1], [3, 4], least=1)
    assert names == ["nodule"] and train_y.tolist() == [[1], [0]]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run as train.py leaves it, with random weights, on 200 phantoms of 32 pixels."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    phantoms = open_dataset("phantoms", 32, count=200)
    table = [["file", *phantoms.columns]]
    for i, cells in enumerate(zip(*phantoms.columns.values())):
        save_png(folder / "data" / f"{i:03d}.png", phantoms[i])
        table.append([f"{i:03d}.png", *cells])
    write_csv(folder / "data" / "labels.csv", table)
    torch.manual_seed(0)
    config = DinoDiffusionConfig(
        image_size=32, vae=VAEConfig(3, 4, 8, (1, 1, 1), 1),
        unet=UNetConfig(4, 4, 16, (1, 2), 1, (False, True), 32, 4),
        vit=ViTConfig(8, 24, 2, 3), token_shape=(3, 24))
    flags = {"data": str(folder / "data"), "seed": 0, "count": 200, "embedder": "tiny"}
    model = DinoDiffusion(config)
    save_atomic(folder / "model.pt", {"version": CHECKPOINT_VERSION, **model.to_checkpoint(),
                                      "training": flags})
    write_split(folder / "split.csv", open_dataset(folder / "data", 32), torch.arange(100),
                torch.arange(100, 200))
    (folder / "cache").mkdir()
    np.save(folder / "cache" / "tokens.npy", normal(100, 3, 24).float().numpy())
    return folder


def test_a_run_is_opened_whole(run_folder):
    """Model, flags and both parts of the data, at most as many as asked for, always the same."""
    args = SimpleNamespace(checkpoint=str(run_folder), data=None, device="cpu", count=30,
                           train_limit=None)
    run = common.open_run(args)
    assert run.folder == run_folder and run.flags["embedder"] == "tiny"
    assert not run.model.training and len(run.images) == 200
    assert sorted(run.train.tolist()) == list(range(100)) and len(run.test) == 30
    assert torch.equal(run.test, common.open_run(args).test) and min(run.test) >= 100
    batches = list(common.batches_of(run.images, run.test, 20))
    assert [len(x) for x in batches] == [20, 10]
    assert torch.equal(batches[1][0], run.images[run.test[20]])


def test_probe_command(run_folder, capsys):
    """A row for each kind of tokens, each set of random weights, and pixels; AUCs of each label."""
    front_door.main(["probe", "--checkpoint", str(run_folder), "--device", "cpu", "--seeds", "0",
                     "--tokens", "cls"])
    table = json.loads((run_folder / "probe.json").read_text())
    assert list(table) == ["embedder", "random weights, seed 0",
                           "16x16 grey pixels"]
    for row in table.values():
        assert 0 < row["interval"][0] < row["mean"] < row["interval"][1] < 1
        assert row["mean"] == pytest.approx(np.mean(list(row["labels"].values())))
    assert "95 %" in capsys.readouterr().out
    with pytest.raises(UserError, match="no column 'nothing'"):
        front_door.main(["probe", "--checkpoint", str(run_folder), "--label-column", "nothing"])


def test_clusters_command(run_folder):
    """Tokens and pixels, K as asked, against a column of the labels."""
    front_door.main(["clusters", "--checkpoint", str(run_folder), "--device", "cpu", "--seeds", "0",
                     "--clusters", "3", "--label-column", "effusion"])
    table = json.loads((run_folder / "clusters.json").read_text())
    assert len(table) == 2 and all(name.endswith("K = 3") for name in table)
    assert all(0 <= row["homogeneity"] <= 1 for row in table.values())
    with pytest.raises(UserError, match="no column 'morphology'"):
        front_door.main(["clusters", "--checkpoint", str(run_folder)])


def test_resemble_command(run_folder):
    """Figures of each seed and their summary, as a file and a picture."""
    front_door.main(["resemble", "--checkpoint", str(run_folder), "--device", "cpu", "--steps", "2",
                     "--count", "6", "--train-limit", "20", "--seeds", "0", "1"])
    result = json.loads((run_folder / "resemble.json").read_text())
    assert result["sources"] == 6 and result["training_images"] == 20
    name = "correlation with own source"
    values = [result["seeds"][seed][name] for seed in "01"]
    assert result["summary"][name]["mean"] == pytest.approx(np.mean(values))
    assert result["real"]["Frechet to training"] > 0
    assert (run_folder / "resemble.png").stat().st_size > 1000


def test_search_of_an_image():
    """The best correlation is NumPy's, in chunks as well; share of first ranks."""
    a, b = normal(5, 30), normal(9, 30, seed=1)
    want = np.corrcoef(a.numpy(), b.numpy())[:5, 5:]
    assert np.allclose(best_correlations(a, b, chunk=2).numpy(), want.max(axis=1), atol=1e-12)
    assert first_share(torch.tensor([[3.0, 1], [2, 1]])) == 0.5
    assert first_share(torch.ones(4, 4)) == 0.0  # ties are no recognition


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
    """samples.csv tells groups and sources; what it does not name is an error."""
    rows = [("reconstruct", "runs/held_out/3.png"), ("reconstruct", "50.png"), ("random", ""),
            ("interpolate", "41.png|a/7.png"), ("reconstruct", "other.png"),
            ("prototype", "prototype 0 of 2"), ("interpolate", "45.png|46.png")]
    write_samples(tmp_path, chests[:7], rows)
    _, sources, groups = read_samples(tmp_path, *split[:2])
    assert sources == [[3], [50], [], [41, 7], [], [], [45, 46]]
    assert groups == ["training source", "held-out source", "no source", "training source",
                      "source from elsewhere", "no source", "held-out source"]
    save_png(tmp_path / "images" / "unknown.png", chests[0])
    with pytest.raises(UserError, match="tells no source of 1 images.*unknown.png"):
        read_samples(tmp_path, *split[:2])
    (tmp_path / "samples.csv").unlink()
    with pytest.raises(UserError, match="tells no source of 8 images"):
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
    opened = OpenedRun(run, model, {}, images, train, test)
    monkeypatch.setattr(privacy, "open_run", lambda args: opened)
    write_samples(tmp_path / "declared", chests[:20], [("reconstruct", f"{i}.png")
                                                       for i in range(20)])
    write_samples(tmp_path / "held", chests[40:60], [("reconstruct", f"{i}.png")
                                                     for i in range(40, 60)])
    write_samples(tmp_path / "stolen", chests[:10], [("random", "")] * 10)
    front_door.main(["privacy", *(str(tmp_path / name) for name in ("declared", "held", "stolen"))])
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
