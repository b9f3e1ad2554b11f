"""experiments/segment.py: planted segments come back, rules and floors do as said."""
import json
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from dino import ViTConfig
from dinodiff import DinoDiffusion, DinoDiffusionConfig
from evaluate import dice
from experiments import segment
from experiments.__main__ import main as experiments
from experiments.common import OpenedRun
from experiments.segment import (attention_maps, best_labels, decoder_features, diffseg,
                                 join_attention, nearest_clusters, otsu, points, principal_axes,
                                 symmetric_kl, under_seeds)
from support.command import UserError
from support.datasets import open_dataset
from unet import UNetConfig
from vae import VAEConfig

CONFIG = DinoDiffusionConfig(
    image_size=32, vae=VAEConfig(base_channels=8, channel_multipliers=(1, 2), layers_per_block=1),
    unet=UNetConfig(base_channels=16, channel_multipliers=(1, 2), layers_per_block=1,
                    attention_levels=(False, True), context_dim=12, num_heads=2),
    vit=ViTConfig(8, 16, 4, 2, 32, normalise="per_image"), token_shape=(5, 16))
SIDE = 8
QUARTERS = torch.arange(4).view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)  # (8, 8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DinoDiffusion(CONFIG).eval()


@pytest.fixture(scope="module")
def chests():
    return open_dataset("phantoms", 32, seed=0, count=18)


def planted_attention(side, contrast, heads=2):
    """Maps (1, heads, N, N): each position looks `contrast` times more at its own quarter."""
    own = QUARTERS[::SIDE // side, ::SIDE // side].flatten()
    scores = 1 + (contrast - 1) * (own[:, None] == own).float()
    return (scores / scores.sum(1, keepdim=True)).expand(1, heads, -1, -1)


def same_partition(a, b):
    return len(set(zip(a.flatten().tolist(), b.flatten().tolist()))) == len(a.unique()) == len(
        b.unique())


def test_symmetric_kl_equals_scipy():
    """Half the sum of both directions is SciPy's; a distribution is 0 from itself."""
    rng = np.random.default_rng(0)
    a, b = rng.dirichlet(np.ones(16), 3), rng.dirichlet(np.ones(16), 5)
    want = [[(entropy(p, q) + entropy(q, p)) / 2 for q in b] for p in a]
    # 1e-6: entries under 1e-12 are raised to it
    assert np.allclose(symmetric_kl(torch.tensor(a), torch.tensor(b)), want, rtol=1e-6)
    assert symmetric_kl(torch.tensor(a), torch.tensor(a)).diagonal().max() < 1e-12


def test_join_attention():
    """Rows are distributions; one map is its mean over heads; weights follow the sides."""
    maps = [torch.rand(2, 3, n, n, generator=torch.Generator().manual_seed(n)).softmax(-1)
            for n in (16, 64)]
    joint = join_attention(maps)
    assert joint.shape == (2, 64, 64)
    assert torch.allclose(joint.sum(-1), torch.ones(2, 64), atol=1e-5)  # float32 sums of 64
    assert torch.allclose(join_attention(maps[1:]), maps[1].mean(1), atol=1e-6)
    alone = join_attention([maps[0], torch.zeros(2, 3, 64, 64) + 1 / 64])
    assert torch.allclose(joint - alone, 2 / 3 * (maps[1].mean(1) - 1 / 64), atol=1e-6)  # 8 of 12
    small = join_attention([maps[0], torch.full((2, 3, 64, 64), 1 / 64)]).view(2, 8, 8, 64)
    assert torch.equal(small[:, ::2, ::2], small[:, 1::2, 1::2])  # queries are repeated


def test_diffseg_finds_planted_segments():
    """Four quarters that look at themselves are four segments; without contrast there is one."""
    maps = [planted_attention(8, 1000), planted_attention(4, 1000)]
    labels = diffseg(maps[:1], SIDE)
    assert labels.shape == (1, SIDE, SIDE) and same_partition(labels[0], QUARTERS)
    assert len(diffseg(maps, SIDE)[0].unique()) == 4
    assert len(diffseg([planted_attention(8, 1.1)], SIDE)[0].unique()) == 1
    assert len(diffseg([planted_attention(8, 1.1)], SIDE, threshold=1e-4)[0].unique()) == 4
    assert len(diffseg(maps, SIDE, grid=1)[0].unique()) == 1  # one anchor, one proposal


def test_features_and_maps_of_the_model(model, chests):
    """Shapes, unit norm by block and step, centring; no image depends on its batch."""
    images = chests.batch(range(3))
    features = decoder_features(model, images)
    assert features.shape == (3, 3 * (2 * 32 + 2 * 16), 16, 16)  # 3 steps; latents of 16, 2 levels
    assert features.mean((2, 3)).abs().max() < 1e-5
    last = features.unflatten(1, (3, -1))[:, :, -16:]  # of one block: unit vectors less their mean
    means = 1 - last.square().sum(2).mean((2, 3))      # E|x - m|^2 = 1 - |m|^2
    assert (means > 0).all() and (means < 1).all()
    assert torch.allclose(decoder_features(model, images[1:2]), features[1:2], atol=1e-5)
    assert not torch.allclose(decoder_features(model, images, seed=1), features, atol=1e-3)
    assert decoder_features(model, images, (50,), blocks=1).shape == (3, 16, 16, 16)
    sides = [tuple(x.shape) for x in attention_maps(model, images)]
    assert sides == [(3, 2, 64, 64)] * 4  # attention at the lower level only: down, middle, up, up
    assert not any(module._forward_hooks for module in model.unet.modules())  # taken off again


def test_nearest_clusters():
    """Features that are a centre plus little noise get that centre's number at every pixel."""
    centers = torch.eye(4)
    features = centers[QUARTERS].permute(2, 0, 1)[None] + 0.01 * torch.randn(
        1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert points(features).shape == (64, 4)
    axes = principal_axes(features, 3)  # four centres span three directions
    assert torch.allclose(axes.T @ axes, torch.eye(3), atol=1e-5)
    spread, kept = (x - x.mean(0) for x in (points(features), points(features) @ axes))
    assert kept.square().sum() > 0.999 * spread.square().sum()  # noise of 0.01 has the rest
    large = QUARTERS.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(nearest_clusters(features, centers, 16)[0], large)


def test_seed_rule():
    """Labels under both seeds are chosen, others and the mediastinum between them are not."""
    x = torch.linspace(-1, 1, 64).expand(64, 64)
    labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    labels[:, x < -0.2], labels[:, x > 0.2] = 1, 2
    labels[:, :8] = 3
    assert under_seeds(labels, 5).tolist() == [False, True, True, False, False]


def test_best_labels_is_the_best_of_all_sets():
    """The chosen set has the Dice of the best of all 2^5 sets, found by trying each."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        labels = torch.randint(5, (2, 6, 6), generator=generator)
        masks = torch.rand(2, 6, 6, generator=generator) < 0.2 * labels / 4 + 0.2
        masks[0, 0, 0] = True
        every = [dice(torch.tensor(choice)[labels], masks) for choice in product((False, True),
                                                                                 repeat=5)]
        assert dice(best_labels(labels, masks, 5)[labels], masks) == pytest.approx(max(every))


def test_otsu_parts_two_greys():
    """A dark disc with noise is found to the blur of the 5x5 mean, whatever gain and offset."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    disc = x.square() + y.square() < 0.4
    noise = 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for gain, offset in ((0.8, 0), (0.3, 0.4)):
        image = gain * torch.where(disc, -1.0, 1.0) + gain * noise + offset
        assert dice(otsu(image.expand(1, 3, -1, -1))[0], disc) > 0.97


@pytest.fixture
def command(model, chests, tmp_path, monkeypatch):
    """Runs the experiment on phantoms: 10 to train, 8 held out, no mask for number 17."""
    chests.masks["masks"] = list(chests.masks["masks"])
    chests.masks["masks"][17] = None
    train, test = torch.arange(10), torch.arange(10, 18)

    def open_run(args, checkpoint=None):
        foreign = checkpoint and "foreign" in str(checkpoint)
        parts = (test, train) if foreign else (train, test)
        return OpenedRun(tmp_path, model, {}, chests, *parts)

    monkeypatch.setattr(segment, "open_run", open_run)

    def run(*arguments):
        experiments(["segment", "--clusters", "3", "--timesteps", "150", *arguments])
        return json.loads((tmp_path / "segment.json").read_text())

    return run


def test_command(command, chests, tmp_path, capsys):
    """Held-out images with a mask are judged, others counted; floors are what they should be."""
    result = command()
    said = capsys.readouterr().out
    assert result["images"] == 7 and result["training_masks"] == 10 and result["leaked"] == 0
    assert "left out: 1)" in said and "LEAKAGE" not in said
    truth = torch.cat([chests.mask(i) for i in range(10, 17)]).bool()
    mean = torch.cat([chests.mask(i) for i in range(10)]).float().mean(0) >= 0.5
    rows = result["dice"]
    assert rows["floor, constant mean of training masks"]["Dice"] == pytest.approx(
        np.mean([dice(mean, mask) for mask in truth]))
    assert rows["floor, whole image"]["Dice"] == pytest.approx(
        np.mean([dice(mask | True, mask) for mask in truth]))
    for method in ("K-means 3", "DiffSeg"):
        for name in (f"{method}, seeds", f"floor, untrained U-Net, {method}, masks"):
            assert rows[name]["ORACLE"] >= rows[name]["Dice"] - 1e-6
            assert rows[name]["95 %"][0] <= rows[name]["Dice"] <= rows[name]["95 %"][1]
    assert (tmp_path / "segment.png").stat().st_size > 10_000


def test_command_with_leakage_and_other_checkpoints(command, tmp_path, capsys):
    """Leakage is said; a sweep adds rows; checkpoints trained on the judged images are refused."""
    (tmp_path / "model_000010.pt").touch()
    result = command("--allow-leakage", "--sweep", str(tmp_path), "--unconditional", "control")
    assert result["leaked"] == 10 and result["images"] == 17
    assert "LEAKAGE: 10 of them were trained on" in capsys.readouterr().out
    rows = result["dice"]
    for method in ("K-means 3, seeds", "DiffSeg, masks"):  # the same model here, so its figures
        assert rows[method] == rows[f"{tmp_path.name}/model_000010: {method}"]
    assert "floor, unconditional, DiffSeg, seeds" in rows
    with pytest.raises(UserError, match="trained on other images, or on some of these"):
        command("--unconditional", "foreign")


def test_masks_that_cannot_serve(command, chests):
    """An absent kind of mask, and masks that show nothing, are refused with their names."""
    with pytest.raises(UserError, match=r"has no masks_manual: it has \['masks'\]: pass"):
        command("--mask-kind", "masks_manual")
    chests.masks["blank"] = [torch.zeros(1, 32, 32, dtype=torch.bool)] * 18
    with pytest.raises(UserError, match="all black or all white"):
        command("--mask-kind", "blank")
    chests.masks["few"] = [None] * 17 + [torch.eye(32)[None] > 0]
    with pytest.raises(UserError, match="1 of 8 images have few"):
        command("--mask-kind", "few")
    del chests.masks["blank"], chests.masks["few"]
